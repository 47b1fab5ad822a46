import math

import pytest
import torch

from swin_dense.tools.benchmark_agreement import (
    MAP_TOLERANCE,
    agreement,
    first_agreement,
    full_float32,
    relative_difference,
)


def test_difference_is_relative_and_of_the_whole():
    wanted = torch.tensor([3.0, 4.0])
    assert relative_difference(wanted, wanted) == 0
    assert relative_difference(1.25 * wanted, wanted) == pytest.approx(0.25)
    assert relative_difference(1e6 * 1.25 * wanted, 1e6 * wanted) == pytest.approx(0.25)
    assert relative_difference(torch.zeros(2), torch.zeros(2)) == 0


@pytest.mark.parametrize(
    "value", [torch.ones(3), torch.ones(1, 2), torch.tensor([1.0, math.nan]), torch.tensor([math.inf, 1.0])]
)
def test_what_cannot_be_compared_differs_without_end(value):
    assert relative_difference(value, torch.ones(2)) == math.inf
    assert relative_difference(torch.ones(2), torch.zeros(2)) == math.inf


def test_worst_map_decides():
    ours = {"c2": torch.ones(3), "c3": torch.ones(4), "more": torch.ones(5)}
    theirs = {"c2": torch.full((3,), 1.001), "c3": torch.full((4,), 1.02)}
    found = agreement(theirs, ours, "ours", "bfloat16", tolerance=0.03)
    assert found.compared == ("c2", "c3") and found.worst == "c3" and found.holds
    assert found.difference == pytest.approx(0.02, rel=1e-4)
    refused = agreement(theirs, ours, "ours", "bfloat16", tolerance=0.01)
    assert not refused.holds
    assert refused.refusal("timm") == "timm differs from ours: c3 by 2.0e-02 in bfloat16, more than the 0.01 allowed."


def test_first_reference_that_agrees_is_taken_and_no_further_one_is_asked():
    asked = []

    def reference(value):
        def outputs():
            asked.append(value)
            return {"c2": torch.tensor([value])}

        return outputs

    references = {"a": reference(2.0), "b": reference(1.0), "c": reference(1.0)}
    found = first_agreement({"c2": torch.tensor([1.0])}, references)
    assert found.reference == "b" and found.holds and asked == [2.0, 1.0]
    assert found.tolerance == MAP_TOLERANCE["float32"]


def test_nearest_reference_is_told_where_none_agrees():
    references = {name: lambda v=v: {"c2": torch.tensor([v])} for name, v in (("a", 3.0), ("b", 1.5), ("c", 9.0))}
    found = first_agreement({"c2": torch.tensor([1.0])}, references)
    assert found.reference == "b" and not found.holds


def test_float32_is_put_back():
    before = torch.backends.cudnn.allow_tf32
    with pytest.raises(RuntimeError), full_float32():
        assert not torch.backends.cudnn.allow_tf32
        raise RuntimeError
    assert torch.backends.cudnn.allow_tf32 == before
