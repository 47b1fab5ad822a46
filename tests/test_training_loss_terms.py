import pytest
import torch

from swin_dense.training.loss_terms import LossTerm, means, shares, total


def test_total_is_the_sum_of_the_means():
    terms = {"a": LossTerm(torch.tensor(2.0), 3), "b": LossTerm(torch.tensor(5.0), 0).times(0.5)}
    assert means(terms) == {"a": 2.0, "b": 2.5} and terms["b"].count == 0
    assert total(means(terms)) == 4.5


def test_shares_make_the_mean_of_the_whole_from_those_of_the_parts():
    values = torch.rand(11, dtype=torch.float64)
    parts = values.split([5, 0, 1, 5])
    counts = [{"a": len(part), "b": 0} for part in parts]
    weighed = [share["a"] * (part.sum() / max(1, len(part))) for share, part in zip(shares(counts), parts, strict=True)]
    assert float(sum(weighed)) == pytest.approx(float(values.mean()), abs=1e-15)
    assert all(share["b"] == 0 for share in shares(counts))
