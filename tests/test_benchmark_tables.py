from swin_dense.tools.benchmark_contest import COMPILED, OURS
from swin_dense.tools.benchmark_tables import (
    IMAGES_PER_S,
    print_row,
    print_sweep,
    row_table,
    section_parts,
    sweep_tables,
)


def spread_of(median, least, most):
    return {"median": median, "min": least, "max": most, "all": [least, median, most]}


def contestant(times_s, ratios):
    return {
        "time_s": times_s,
        "images_per_s": 1 / times_s["median"],
        "ratios": ratios,
        "peak_bytes": 3 * 2**20,
        "share_of_floor": 0.4567,
    }


def one_agreement(**changes):
    agreed = {
        "reference": "swin-dense with window_rule=timm",
        "precision": "float32",
        "compared": ["c2", "c3"],
        "worst": "c3",
        "difference": 1.234e-6,
        "tolerance": 1e-3,
        "holds": True,
    }
    return {**agreed, **changes}


ROW = {
    "title": "inference, float32, 1 image of 7 x 11",
    "contestants": {
        OURS: contestant(spread_of(0.1234, 0.1, 0.2), {}),
        "timm": contestant(spread_of(12.34, 11.0, 13.0), {OURS: spread_of(1.5, 1.25, 2.0)}),
        "smp": contestant(spread_of(0.5, 0.4, 0.6), {}),
    },
    "agreement": {
        "timm": [one_agreement(), one_agreement(precision="bfloat16", difference=0.0123, tolerance=0.03)],
        "smp": [one_agreement(difference=0.5, holds=False)],
    },
    "flops": 12.3e9,
    "products_per_s": 1234.5e9,
    "refused": ["smp differs"],
}


def point(pixels, **contestants):
    return {"pixels": pixels, "contestants": {name.replace("_", "-"): each for name, each in contestants.items()}}


def measured(median_s):
    return {"time_s": spread_of(median_s, 0.25, 0.75), "peak_bytes": 2**21, "left_out": None}


LEFT_OUT = {"time_s": None, "peak_bytes": None, "left_out": "out of memory"}
SWEEP = {
    "title": "image size",
    "points": {
        "256 x 256": point(65536, swin_dense=measured(0.5), timm=measured(1.25)),
        "2048 x 2048": point(4194304, swin_dense=measured(40.0), timm=LEFT_OUT),
    },
    "exponents": {OURS: 1.049, "timm": None},
}
FIGURES = {
    "command": "swin-dense benchmark backbone --document FILE",
    "title": "Backbone swin_t, a device",
    "device": "cpu",
    "threads": 3,
    "repeats": 5,
    "versions": {"transformers": "5.1"},
    "notes": ["huggingface is not installed."],
    "rows": [ROW],
    "refused": ["smp differs"],
    "scaling": [SWEEP],
}


def test_cells_show_medians_ranges_ratios_memory_and_share():
    table = row_table(ROW)
    assert table[OURS] == {
        "ms": "123.4 (100.0 to 200.0)",
        IMAGES_PER_S: "8.10",
        f"x {OURS}": "1",
        "peak memory": "3 MiB",
        "of the floor": "46%",
    }
    assert table["timm"]["ms"] == "12,340 (11,000 to 13,000)"
    assert table["timm"][f"x {OURS}"] == "1.50 (1.25 to 2.00)"
    assert table["smp"][f"x {OURS}"] == "outputs differ"


def test_compiled_contestants_have_both_ratios():
    both = {OURS: spread_of(3.0, 2.0, 4.0), OURS + COMPILED: spread_of(6.0, 5.0, 7.0)}
    contestants = {
        **ROW["contestants"],
        OURS + COMPILED: contestant(spread_of(1.0, 1.0, 1.0), {OURS: spread_of(0.5, 0.5, 0.5)}),
        "timm" + COMPILED: contestant(spread_of(1.0, 1.0, 1.0), both),
    }
    table = row_table({**ROW, "contestants": contestants})
    assert table["timm" + COMPILED][f"x {OURS}"] == "3.00 (2.00 to 4.00)"
    assert table["timm" + COMPILED][f"x {OURS}{COMPILED}"] == "6.00 (5.00 to 7.00)"
    assert table[OURS + COMPILED][f"x {OURS}{COMPILED}"] == "1"
    assert table[OURS + COMPILED][f"x {OURS}"] == "0.50 (0.50 to 0.50)"


def test_scaling_has_a_line_for_each_point_and_a_column_for_each_contestant():
    assert sweep_tables(SWEEP) == {
        "Milliseconds": {
            "256 x 256": {OURS: "500.0", "timm": "1,250.0"},
            "2048 x 2048": {OURS: "40,000.0", "timm": "out of memory"},
        },
        "Peak memory": {
            "256 x 256": {OURS: "2 MiB", "timm": "2 MiB"},
            "2048 x 2048": {OURS: "2 MiB", "timm": "n/a"},
        },
    }


def test_section_holds_what_the_figures_hold():
    machine = {"date": "2026-01-02", "device": "cpu (of a test)", "torch": "2.15"}
    page = "\n\n".join(section_parts(FIGURES, machine))
    text = " ".join(page.split())
    assert f"```sh\n{FIGURES['command']}\n```" in page
    assert "date 2026-01-02 device cpu (of a test) torch 2.15 transformers 5.1" in text
    assert "Measured on cpu, 5 rounds, 3 threads." in text and FIGURES["notes"][0] in text
    assert (
        f"### {ROW['title']}\n\n|  | ms |" in page
        and "| 12,340 (11,000 to 13,000) | 0.08 | 1.50 (1.25 to 2.00)" in page
    )
    agreed = "timm equals swin-dense with window_rule=timm: c2, c3 in float32 to 1.2e-06 (0.001 allowed); c2, c3 in "
    assert agreed + "bfloat16 to 1.2e-02 (0.03 allowed)." in text
    assert "smp does not equal swin-dense with window_rule=timm: c2, c3 in float32 to 5.0e-01 (0.001 allowed)." in text
    assert "Floor: 12 billion operations; one large product reaches 1,234 billion operations a second." in text
    assert "### Scaling with image size" in page and "Milliseconds:\n\n|  | swin-dense | timm |\n" in page
    assert "| 40,000.0 | out of memory |" in page and "Peak memory:" in page and "| 2 MiB | n/a |" in page
    assert "Time grows with the pixels to the power of 1.05 (swin-dense)." in text
    assert all(not line.startswith(("# ", "## ")) for line in page.splitlines())  # those of the page
    without = "\n\n".join(section_parts({**FIGURES, "scaling": []}, machine))
    assert "Scaling" not in without and "None" not in page


def test_terminal_shows_the_same(capsys):
    print_row(ROW)
    print_sweep(SWEEP)
    shown = " ".join(capsys.readouterr().out.split())
    assert ROW["title"] in shown and "outputs differ" in shown and "timm equals swin-dense" in shown
    assert "scaling with image size" in shown and "the power of 1.05" in shown
