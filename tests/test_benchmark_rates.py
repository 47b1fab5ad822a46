import pytest

from swin_dense.tools.benchmark_rates import needed_workers, training_rates
from swin_dense.tools.benchmark_tables import IMAGES_PER_S
from swin_dense.tools.markdown_page import markdown_table


def part(title, **rates):
    rows = {name.replace("_", "-"): {"ms": "7", IMAGES_PER_S: rate} for name, rate in rates.items()}
    return f"### {title}\n\n{markdown_table(rows)}\n\n- a sentence"


SECTIONS = {
    "Backbone swin_t, C": "\n\n".join(
        [
            "Machine: of a test",
            part("inference, float32", swin_dense="9.0"),
            part("forward and backward, bfloat16", timm="3.0", swin_dense="1,234.5"),
        ]
    ),
    "Mask R-CNN swin_t, G": "start\n\n"
    + part("train step, float32", swin_dense="2.5", **{"swin_dense, compiled": "3"}),
    "UPerNet swin_t, C": "start\n\n" + part("train step, float32", swin_dense="1.0"),
    "Loading images, C": "start\n\n" + markdown_table({"asked for": {IMAGES_PER_S: "5", "workers": "1"}}),
}


def test_rates_are_those_of_our_training_on_images_with_objects():
    assert training_rates(SECTIONS) == {
        "Backbone swin_t, C: forward and backward, bfloat16": 1234.5,
        "Mask R-CNN swin_t, G: train step, float32": 3.0,
    }
    assert training_rates({}) == {}


def test_row_without_rates_has_none():
    table = markdown_table({"swin-dense": {"ms": "7"}})
    assert training_rates({"Backbone swin_t, C": f"\n### train step\n\n{table}"}) == {}
    assert training_rates({"Backbone swin_t, C": "\n### train step\n\nno table"}) == {}


@pytest.mark.parametrize(("rate", "workers"), [(0.1, 1), (7.0, 1), (7.1, 2), (70.0, 10)])
def test_workers_load_at_least_as_fast_as_asked_for_and_one_less_does_not(rate, workers):
    found = needed_workers({"a": rate}, 7.0)["a"]
    assert found == {"images_per_s": rate, "workers": workers}
    assert 7.0 * workers >= rate > 7.0 * (workers - 1)
