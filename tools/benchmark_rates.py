"""How many workers of a loader a model keeps busy: what one of them loads, beside what models train on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from swin_dense.tools.benchmark_contest import OURS
from swin_dense.tools.benchmark_tables import IMAGES_PER_S
from swin_dense.tools.markdown_page import read_markdown_table

_LOADED_FOR = ("Backbone ", "Mask R-CNN ")  # a segmenter's labels are loaded in another way
_TRAINING = ("train step", "forward and backward")


def training_rates(sections: Mapping[str, str]) -> dict[str, float]:
    """Images a second that our models train on, the fastest of each row, by the row's title and its device.

    Args:
        sections: Of the benchmarks' page, by title, as `read_sections` gives them.
    """
    rates: dict[str, float] = {}
    for title, text in sections.items():
        for part in text.split("\n### ")[1:] if title.startswith(_LOADED_FOR) else []:
            row = part.partition("\n")[0]
            table = read_markdown_table(part) if row.startswith(_TRAINING) else {}
            ours = [cells.get(IMAGES_PER_S, "") for name, cells in table.items() if name.startswith(OURS)]
            if all(ours) and ours:
                rates[f"{title}: {row}"] = max(float(rate.replace(",", "")) for rate in ours)
    return rates


def needed_workers(rates: Mapping[str, float], worker_images_per_s: float) -> dict[str, dict[str, Any]]:
    """For each rate {"images_per_s", "workers"}, where every worker has a core of its own.

    Args:
        rates: Images a second by name.
        worker_images_per_s: What one worker loads.
    """
    return {
        name: {"images_per_s": rate, "workers": math.ceil(rate / worker_images_per_s)} for name, rate in rates.items()
    }
