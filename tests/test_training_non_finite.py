import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from swin_dense.training.loss_terms import LossTerm
from swin_dense.training.micro_batches import MicroBatch, even_slices
from swin_dense.training.non_finite import MOST_FILES, diagnose, save_bad_batch
from swin_dense.training.random_state import random_state

INFINITE, NAN = float("inf"), float("nan")


class Rows:
    def __init__(self, rows, ids=None, boxes=None):
        self.rows = rows
        self.ids = list(range(len(rows))) if ids is None else ids
        self.boxes = torch.zeros(len(rows), 4) if boxes is None else boxes

    def describe(self):
        return f"rows {self.ids}"

    def split(self, parts):
        slices = even_slices(len(self.ids), parts)
        return [Rows(self.rows[part], self.ids[part], self.boxes[part]) for part in slices]

    def plain(self):
        return {"rows": self.rows, "ids": self.ids, "targets": [{"boxes": boxes} for boxes in self.boxes]}


class Factor(nn.Module):
    """Multiplies; in another precision than float32 by something else."""

    def __init__(self, factor, reduced_factor=None):
        super().__init__()
        self.factor, self.reduced_factor = factor, reduced_factor

    def forward(self, x):
        reduced = self.reduced_factor is not None and torch.is_autocast_enabled("cpu")
        return x * (self.reduced_factor if reduced else self.factor)


def model_of(middle=None):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Identity() if middle is None else middle, nn.Dropout(0.3), nn.Linear(4, 1))


def batch_of(count=5, **changes):
    return Rows(torch.rand(count, 3, generator=torch.Generator().manual_seed(2)), **changes)


def diagnosis_of(model, *batches, loss=torch.square, precision="bfloat16", losses=None):
    """Of batches after their backward pass, as the loop has them."""

    def forward_in(reduced):
        def forward(batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
                return {"loss": LossTerm(loss(model(batch.rows).float()).mean(), len(batch.rows))}

        return forward

    forward = forward_in(precision == "bfloat16")
    micro_batches = []
    for batch in batches:
        state = random_state()
        named = {"loss": forward(batch)["loss"].mean.detach()} if losses is None else losses
        micro_batches.append(MicroBatch(batch, state, named))
    return diagnose(
        model.train(), micro_batches, forward, forward_in(False), in_float32=precision == "float32"
    ), micro_batches


@pytest.mark.parametrize("value", [NAN, INFINITE, 3e38])
def test_value_in_an_image_is_the_data_and_named(value):
    batch = batch_of()
    batch.rows[3, 1] = value
    diagnosis, _ = diagnosis_of(model_of(), batch)
    assert (diagnosis.verdict, diagnosis.images) == ("data", "rows [3]")
    assert diagnosis.reason == "rows is not finite or absurdly large."
    assert diagnosis.place == "the output of 0" or value == 3e38


def test_value_in_a_target_is_named_by_its_path():
    batch = batch_of(boxes=torch.zeros(5, 4))
    batch.boxes[2, 1] = NAN
    batch.rows[2] = NAN
    model = model_of()
    batch.plain = lambda: {
        "images": [torch.zeros(3, dtype=torch.uint8)],
        "targets": [{"boxes": b} for b in batch.boxes],
    }
    diagnosis, _ = diagnosis_of(model, batch)
    assert diagnosis.reason == "targets[2].boxes is not finite or absurdly large."


@pytest.mark.parametrize("value", [NAN, -INFINITE, 1e20])
def test_weight_is_named_first_of_all(value):
    model, batch = model_of(), batch_of()
    with torch.no_grad():
        model[3].weight[0, 2] = value
    diagnosis, _ = diagnosis_of(model, batch)
    assert (diagnosis.verdict, diagnosis.place, diagnosis.images) == ("weights", "3.weight", batch.describe())


def test_running_statistic_counts_as_a_weight():
    model = model_of(nn.BatchNorm1d(4))
    model[1].running_var[1] = NAN
    diagnosis, _ = diagnosis_of(model, batch_of())
    assert (diagnosis.verdict, diagnosis.place) == ("weights", "1.running_var")


def test_overflow_of_reduced_precision_alone_is_the_precision():
    diagnosis, _ = diagnosis_of(model_of(Factor(1.0, reduced_factor=INFINITE)), batch_of())
    assert (diagnosis.verdict, diagnosis.place) == ("precision", "the output of 1")
    assert "Verdict: precision; it is finite in float32." in str(diagnosis) and "loss=" in str(diagnosis)


def test_overflow_in_float32_too_is_the_data_and_the_module_is_named():
    diagnosis, _ = diagnosis_of(model_of(Factor(INFINITE)), batch_of())
    assert (diagnosis.verdict, diagnosis.place) == ("data", "the output of 1")
    assert diagnosis.reason == "it is not finite in float32 either, with weights that are."


def test_loss_itself_is_named_where_all_modules_are_finite():
    diagnosis, _ = diagnosis_of(model_of(), batch_of(), loss=lambda x: x / 0)
    assert (diagnosis.verdict, diagnosis.place) == ("data", "the loss loss")


def test_gradient_is_followed_where_the_losses_are_finite():
    diagnosis, _ = diagnosis_of(model_of(), batch_of(), loss=lambda x: (x * 0).sqrt())
    assert (diagnosis.verdict, diagnosis.place) == ("data", "the gradient at the output of 3")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_computation_that_is_finite_the_second_time_is_unknown(precision):
    diagnosis, _ = diagnosis_of(model_of(), batch_of(), precision=precision, losses={"loss": torch.tensor(NAN)})
    assert (diagnosis.verdict, diagnosis.place) == ("unknown", None)


@pytest.mark.parametrize("guilty", [0, 1, 2])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_micro_batch_is_found(guilty, kind):
    batches = [batch_of() for _ in range(3)]
    if kind == "loss":
        batches[guilty].rows[1] = NAN
    else:
        batches[guilty].rows[:] = 0

    def loss(x):  # infinite slope where the output is the bias
        return (x - model[3].bias).abs().sqrt() if kind == "gradient" else x

    model = model_of()
    with torch.no_grad():
        model[0].bias.zero_()
    diagnosis, micro_batches = diagnosis_of(model, *batches, loss=loss, precision="float32")
    assert diagnosis.micro_batch is micro_batches[guilty] and diagnosis.verdict == "data"


def test_batch_that_does_not_fit_in_float32_is_looked_at_in_parts():
    class Small(Factor):
        def forward(self, x):
            if not torch.is_autocast_enabled("cpu") and len(x) > self.factor:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return x

    batch = batch_of()
    batch.rows[4] = NAN
    assert diagnosis_of(model_of(Small(2)), batch)[0].images == "rows [4]"
    diagnosis, _ = diagnosis_of(model_of(Small(0)), batch)
    assert diagnosis.verdict == "unknown"
    assert diagnosis.reason == "it could not be computed again: CUDA out of memory."


@pytest.mark.parametrize("reduced_only", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_module_is_named_inside_what_is_computed_again_in_the_backward_pass(backward, reduced_only):
    class Recomputed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
            self.inner[1].register_forward_hook(self.spoil)

        def spoil(self, module, arguments, output):
            if reduced_only and not torch.is_autocast_enabled("cpu"):
                return output
            return output + (output - output).sqrt() if backward else output / 0

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    diagnosis, _ = diagnosis_of(model_of(Recomputed()), batch_of())
    assert diagnosis.verdict == ("precision" if reduced_only else "data")
    assert diagnosis.place == ("the gradient at the output of 1.inner.0" if backward else "the output of 1.inner.1")


def test_diagnosis_leaves_weights_gradients_and_hooks_alone():
    model, batch = model_of(nn.SyncBatchNorm(4)), batch_of()
    model[1].eval()
    batch.rows[0] = NAN
    model[0].weight.grad = torch.ones(4, 3)
    before = [parameter.clone() for parameter in model.parameters()]
    diagnosis_of(model, batch, precision="float32")
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert torch.equal(model[0].weight.grad, torch.ones(4, 3)) and model[3].weight.grad is None
    assert not any(module._forward_hooks for module in model.modules())
    assert model[1].training  # it was put into evaluation mode for the observation only


def test_bad_batch_is_written_and_read_back(tmp_path):
    batch = batch_of()
    batch.rows[3, 1] = NAN
    diagnosis, (micro_batch,) = diagnosis_of(model_of(), batch)
    said = save_bad_batch(tmp_path / "bad", 12, 3, diagnosis)
    path = tmp_path / "bad" / "step_000012_rank3.pt"
    assert said == f"It is kept as {path}."
    kept = torch.load(path, weights_only=True)
    assert (kept["step"], kept["rank"], kept["verdict"]) == (12, 3, "data")
    assert (kept["images"], kept["place"]) == ("rows [3]", "the output of 0")
    torch.testing.assert_close(kept["batch"]["rows"], batch.rows, rtol=0, atol=0, equal_nan=True)
    assert kept["batch"]["ids"] == batch.ids
    assert torch.equal(kept["random_state"]["torch"], micro_batch.random_state["torch"])
    assert math.isnan(kept["losses"]["loss"])


def test_bad_batches_are_kept_up_to_a_number_and_a_full_disk_is_no_error(tmp_path, monkeypatch):
    diagnosis, _ = diagnosis_of(model_of(Factor(INFINITE)), batch_of())
    said = [save_bad_batch(tmp_path / "bad", step, 0, diagnosis) for step in range(MOST_FILES + 2)]
    assert len(list((tmp_path / "bad").iterdir())) == MOST_FILES
    assert said[-1] == f"It is not kept: {tmp_path / 'bad'} holds {MOST_FILES} such batches already."

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert "It could not be kept: " in save_bad_batch(tmp_path / "other", 1, 0, diagnosis)
    monkeypatch.setattr(Path, "mkdir", full)
    assert "No space left on device" in save_bad_batch(tmp_path / "third", 1, 0, diagnosis)
