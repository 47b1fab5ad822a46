import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from swin_dense.config import SwinConfig
from swin_dense.errors import ConfigError
from swin_dense.tools import benchmark_models
from swin_dense.tools.backbone_peers import BACKBONE_PEERS
from swin_dense.tools.benchmark_backbone import BackboneContest
from swin_dense.tools.benchmark_contest import COMPILED, OURS, Contest, Contestant, Row
from swin_dense.tools.benchmark_detect import DetectionContest
from swin_dense.tools.benchmark_models import (
    CONTESTS,
    Settings,
    chosen_peers,
    chosen_rows,
    command,
    measure_contest,
    ratios_of,
    require_networks,
    step_flops,
)
from swin_dense.tools.benchmark_page import read_sections
from swin_dense.tools.benchmark_scaling import Point, Sweep
from swin_dense.tools.benchmark_segment import SegmentationContest
from swin_dense.tools.benchmark_tables import section_parts
from swin_dense.tools.main import main, parse

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CONFIG = SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), window_size=3)
CONTEST = BackboneContest(CONFIG, {})
TINY: dict[str, Contest[Any]] = {
    "backbone": CONTEST,
    "detect": DetectionContest(
        CONFIG,
        {"num_classes": 5, "fpn_channels": 8, "box_head_channels": 16, "mask_head_channels": 8, "max_proposals": 31},
    ),
    "segment": SegmentationContest(CONFIG, {"num_classes": 7, "channels": 8, "auxiliary_channels": 6}),
}
ROW = Row("inference", "float32", 2, (96, 128))


@pytest.fixture
def settings(monkeypatch):
    """Each piece of work takes a second longer than the one before, whatever it does; nothing large is multiplied."""
    monkeypatch.setattr("swin_dense.tools.benchmark_timing._PRODUCT_SIDE", {"cpu": 10})
    seconds = itertools.count(1)

    def time_of(work):
        work()
        return float(next(seconds))

    return Settings(repeats=3, warmup=1, compile=False, device=CPU, time_of=time_of)


@pytest.fixture
def perturbed(monkeypatch):
    """A torchvision whose maps are a little larger than they should be."""
    peer = BACKBONE_PEERS["torchvision"]

    class Larger(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            maps = self.model(images)
            return {**maps, "c4": 1.01 * maps["c4"]}

    def build(backbone, size_hw):
        return Larger(peer.build(backbone, size_hw))

    monkeypatch.setitem(BACKBONE_PEERS, "torchvision", type(peer)(peer.window_rule, build))


def arguments(*words):
    return parse(["benchmark", *words])


def test_row_holds_every_contestant_with_paired_ratios(settings, capsys):
    figures = measure_contest(CONTEST, [ROW], ["torchvision", "timm"], settings)
    (row,) = figures["rows"]
    assert list(row["contestants"]) == [OURS, "torchvision", "timm"] and figures["refused"] == []
    # Each round has a large product too; the warm-up began with ours, so the rounds begin with torchvision, timm, it.
    times_s = {name: each["time_s"]["all"] for name, each in row["contestants"].items()}
    assert times_s == {OURS: [4.0, 7.0, 10.0], "torchvision": [1.0, 8.0, 11.0], "timm": [2.0, 5.0, 12.0]}
    ratio = row["contestants"]["timm"]["ratios"][OURS]
    assert ratio["all"] == [2 / 4, 5 / 7, 12 / 10] and ratio["median"] == 5 / 7
    assert row["contestants"][OURS]["ratios"] == {}
    rate = row["products_per_s"]
    assert rate == 2 * 10**3 / 6.0  # of its second time; the others are 3 and 9
    for each in row["contestants"].values():
        assert each["share_of_floor"] == row["flops"] / rate / each["time_s"]["median"]
        assert each["images_per_s"] == 2 / each["time_s"]["median"]
        assert each["peak_bytes"] > 4 * sum(value.numel() for value in CONTEST.own(ROW).model.parameters())
    shown = capsys.readouterr().out
    assert ROW.title in shown and "torchvision equals swin-dense" in shown


def test_peer_whose_outputs_differ_has_times_but_no_ratio(settings, perturbed, capsys):
    figures = measure_contest(CONTEST, [ROW], ["torchvision", "timm"], settings)
    contestants = figures["rows"][0]["contestants"]
    assert contestants["torchvision"]["ratios"] == {} and len(contestants["torchvision"]["time_s"]["all"]) == 3
    assert contestants["timm"]["ratios"]
    (sentence,) = figures["refused"]
    assert sentence.startswith(f"{ROW.title}: torchvision differs from swin-dense")
    assert "c4 by 1.0e-02 in float32, more than the 0.001 allowed." in sentence
    shown = " ".join(capsys.readouterr().out.split())
    assert "outputs differ" in shown and "torchvision does not equal swin-dense" in shown


def test_compiled_contestants_take_part_a_second_time(settings, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    compiling = Settings(2, 0, True, CPU, settings.time_of)
    contestants = measure_contest(CONTEST, [ROW], ["torchvision"], compiling)["rows"][0]["contestants"]
    assert list(contestants) == [OURS, "torchvision", OURS + COMPILED, "torchvision" + COMPILED]
    assert list(contestants["torchvision" + COMPILED]["ratios"]) == [OURS, OURS + COMPILED]
    assert list(contestants[OURS + COMPILED]["ratios"]) == [OURS]


@pytest.mark.parametrize("contest", ["backbone", "detect", "segment"])
@pytest.mark.parametrize("mode", ["inference", "train step"])
def test_compiled_contestant_that_computes_something_else_has_no_ratio(contest, mode, settings, monkeypatch):
    def spoil(call, **options):
        with torch.no_grad():
            next(call.__self__.parameters())[0] += 9
        return call

    monkeypatch.setattr(torch, "compile", spoil)
    spoiling = Settings(1, 0, True, CPU, settings.time_of)
    figures = measure_contest(TINY[contest], [replace(ROW, mode=mode)], [], spoiling)
    contestants = figures["rows"][0]["contestants"]
    assert contestants[OURS + COMPILED]["ratios"] == contestants[OURS]["ratios"] == {}
    (sentence,) = figures["refused"]
    assert f"{OURS}{COMPILED} differs from {OURS}: " in sentence


def test_refused_peer_has_no_ratio_compiled_either():
    times_s = {name: [1.0] for name in (OURS, "a", "b", OURS + COMPILED, "a" + COMPILED, "b" + COMPILED)}
    ratios = ratios_of(times_s, {"a"})
    assert ratios["a"] == ratios["a" + COMPILED] == {} and len(ratios["b"]) == len(ratios["b" + COMPILED]) == 2


@pytest.mark.parametrize("batch_size", [1, 3])
def test_operations_grow_with_the_batch_and_threefold_in_training(batch_size):
    def flops(mode):
        row = Row(mode, "bfloat16", batch_size, (96, 128))
        return step_flops(CONTEST.own(row), CONTEST.batch(row), row)

    single = Row("inference", "float32", 1, (96, 128))
    assert flops("inference") == batch_size * step_flops(CONTEST.own(single), CONTEST.batch(single), single) > 10**6
    assert flops("train step") == flops("forward and backward") == 3 * flops("inference")


def test_memory_that_runs_out_is_one_message(settings, monkeypatch):
    def fail(contestant, batch, row):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(benchmark_models, "work_of", fail)
    with pytest.raises(ConfigError, match=r"does not suffice for this row: inference.*choose a smaller --batch or"):
        measure_contest(CONTEST, [ROW], [], settings)


# ---- What the command line asks for.


@pytest.mark.parametrize("part", CONTESTS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_default_rows_change_where_asked_and_stay_unlike(part, device):
    defaults = CONTESTS[part].default_rows[device]
    assert chosen_rows(defaults, arguments(part)) == list(defaults)
    words = ["--batch", "3", "--size", "31", "47", "--precision", "bfloat16"]
    rows = chosen_rows(defaults, arguments(part, *words))
    assert {(row.batch_size, row.size_hw, row.precision) for row in rows} == {(3, (31, 47), "bfloat16")}
    assert len(set(rows)) == len(rows) and len({row.mode for row in rows}) == 2
    rows = chosen_rows(defaults, arguments(part, "--precision", "float32"))
    assert len(set(rows)) == len(rows) and not any(row.cast_once for row in rows)


def test_rows_of_a_gpu_are_those_of_detectors_and_segmenters():
    modes = [(row.mode, row.precision, row.batch_size, row.size_hw) for row in BackboneContest.default_rows["cuda"]]
    assert modes == [
        ("forward and backward", "bfloat16", 8, (800, 1344)),
        ("inference", "bfloat16", 8, (800, 1344)),
        ("forward and backward", "bfloat16", 16, (512, 512)),
    ]


def test_peers_are_all_or_those_asked_for():
    assert chosen_peers(CONTEST, None) == (["timm", "torchvision", "huggingface"], [])
    assert chosen_peers(CONTEST, ["torchvision,timm", "timm"]) == (["torchvision", "timm"], [])
    assert chosen_peers(CONTEST, []) == ([], [])
    with pytest.raises(ConfigError, match=r"Backbone is compared with timm, torchvision, huggingface, got 'smp'\."):
        chosen_peers(CONTEST, ["timm,smp"])


def test_absent_peer_is_named_and_left_out(monkeypatch):
    monkeypatch.setattr(benchmark_models, "find_spec", lambda name: None if name == "transformers" else name)
    peers, notes = chosen_peers(CONTEST, None)
    assert peers == ["timm", "torchvision"]
    assert notes == ["huggingface is not installed and left out (pip install transformers)."]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--size", "0", "7"], "--size must be two numbers from 1, got 0 7"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--warmup", "-1"], "--warmup must be 0 or more, got -1"),
        (["--limit-s", "nan"], "--limit-s must be above 0, got nan"),
        (["--variant", "swin_x"], "there is no Swin variant 'swin_x'"),
        (["--variant", "swin_v2_t"], "peers are compared for Swin V1; choose such a --variant"),
        (["--peers", "mmdet"], "is compared with timm, torchvision, huggingface, got 'mmdet'"),
        (["--peers", "timm", "--size", "98", "128"], "timm takes multiples of 4 pixels, got --size 98 128"),
        (["--device", "nonsense"], "nonsense"),
        (["--document", "."], ".: cannot be written; name a file in a folder that can."),
    ],
)
def test_what_does_not_fit_is_refused(words, message, capsys, settings):
    assert main(["benchmark", "backbone", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_segmenters_of_peers_do_not_train_on_one_image(capsys):
    assert main(["benchmark", "segment", "--batch", "1", "--device", "cpu"]) == 2
    wanted = (
        "--batch must be at least 2 to train UPerNet beside huggingface, smp, got 1; or give --peers without a name."
    )
    assert wanted in capsys.readouterr().err
    require_networks(TINY["segment"], [replace(ROW, batch_size=1)], ["smp"])
    require_networks(TINY["segment"], [replace(ROW, batch_size=1, mode="train step")], [])


def test_command_is_told_without_paths():
    words = ["--batch", "2", "--size", "96", "128", "--peers", "timm", "--compile", "--scaling", "--json", "/a/b.json"]
    told = command(arguments("detect", *words, "--document", "/a/b.md"))
    start = "swin-dense benchmark detect --variant swin_t --device auto --batch 2 --size 96 128 --peers timm"
    assert told == f"{start} --compile --scaling --limit-s 20 --document FILE"
    assert vars(parse(told.split()[1:])).keys() == vars(arguments("detect")).keys()


@pytest.fixture
def tiny(monkeypatch, settings):
    """The command with a tiny backbone and narrow heads, and time that stands still."""
    monkeypatch.setattr(benchmark_models, "variant_config", lambda name: CONFIG)
    monkeypatch.setattr(benchmark_models, "clock_of", lambda device: settings.time_of)
    for part, contest in TINY.items():
        monkeypatch.setitem(CONTESTS, part, lambda config, _, contest=contest: contest)


@pytest.mark.parametrize("part", CONTESTS)
def test_command_measures_prints_and_writes(part, tiny, tmp_path, capsys):
    words = ["--size", "96", "128", "--batch", "2", "--repeats", "1", "--warmup", "0", "--device", "cpu"]
    words += ["--precision", "float32"]
    files = ["--json", str(tmp_path / "figures.json"), "--document", str(tmp_path / "page.md")]
    peers = {"backbone": ["timm"], "detect": ["torchvision"], "segment": ["smp"]}[part]
    assert main(["benchmark", part, *words, *files, "--peers", *peers]) == 0
    written = json.loads((tmp_path / "figures.json").read_text())
    figures, shown = written[part], capsys.readouterr().out
    page = (tmp_path / "page.md").read_text()
    assert json.loads(json.dumps(figures)) == figures and figures["refused"] == []
    assert read_sections(tmp_path / "page.md") == {
        figures["title"]: "\n\n".join(section_parts(figures, written["machine"]))
    }
    assert str(tmp_path) not in page and f"swin-dense benchmark {part} " in page
    for row in figures["rows"]:
        assert f"### {row['title']}" in page and row["title"] in shown
        for name, each in row["contestants"].items():
            assert f"{1000 * each['time_s']['median']:,.0f}" in page and f"| {name} |" in page
        assert list(row["contestants"]) == [OURS, *peers] and list(row["agreement"]) == peers
    assert all(f"{name} {number}" in " ".join(page.split()) for name, number in figures["versions"].items())


def test_command_leaves_a_page_of_something_else(tiny, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("my notes")
    assert main(["benchmark", "backbone", "--device", "cpu", "--document", str(page)]) == 2
    assert "something else wrote this file" in capsys.readouterr().err and page.read_text() == "my notes"


def test_scaling_goes_into_the_section(tiny, tmp_path, monkeypatch):
    def sweeps(contest, precision, variant):
        return [
            Sweep(
                "image size",
                [Point(f"{side} px", contest, replace(ROW, size_hw=(side, side))) for side in (96, 128)],
                True,
            )
        ]

    monkeypatch.setattr(benchmark_models, "scaling_sweeps", sweeps)
    words = ["--size", "96", "128", "--batch", "1", "--repeats", "1", "--warmup", "0", "--device", "cpu"]
    words += ["--precision", "float32", "--peers", "torchvision", "--scaling", "--limit-s", "1000"]
    assert main(["benchmark", "backbone", *words, "--document", str(tmp_path / "page.md")]) == 0
    (text,) = read_sections(tmp_path / "page.md").values()
    assert "### Scaling with image size\n\nMilliseconds:\n\n|  | swin-dense | torchvision |\n" in text
    assert "| 96 px |" in text and " (swin-dense), " in text and " (torchvision)." in text


def test_command_says_no_where_outputs_differ(tiny, perturbed, tmp_path, capsys):
    words = ["--size", "96", "128", "--repeats", "1", "--warmup", "0", "--device", "cpu", "--precision", "float32"]
    files = ["--json", str(tmp_path / "figures.json"), "--document", str(tmp_path / "page.md")]
    assert main(["benchmark", "backbone", *words, "--peers", "torchvision", *files]) == 1
    error = capsys.readouterr().err
    assert "no ratio: inference, float32, 1 image of 96 x 128: torchvision differs from swin-dense" in error
    assert "c4 by 1.0e-02 in float32, more than the 0.001 allowed." in error
    assert json.loads((tmp_path / "figures.json").read_text())["backbone"]["refused"]
    assert "outputs differ" in (tmp_path / "page.md").read_text()


def test_contestants_are_what_the_contest_says():
    for contest in CONTESTS.values():
        assert contest.peers and set(contest.default_rows) == {"cpu", "cuda"}
    assert issubclass(type(CONTEST.own(ROW)), Contestant)
