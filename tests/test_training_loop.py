import os
import random
import signal
import subprocess
import sys
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from torch import nn

from swin_dense.errors import ConfigError, DivergenceError, Interrupted
from swin_dense.training import loop
from swin_dense.training.checkpoint import capture_state, load_state, restore_state, save_state
from swin_dense.training.loop import LoopSettings, train
from swin_dense.training.loss_terms import LossTerm
from swin_dense.training.micro_batches import even_slices
from swin_dense.training.non_finite import SkippedSteps
from swin_dense.training.optimizer import build_optimizer
from swin_dense.training.schedule import poly_schedule

CPU = torch.device("cpu")
TOTAL_STEPS = 12


class ToyBatch:
    """Made from its number alone, so that a resumed run sees the same."""

    def __init__(self, number, size=6, dtype=torch.float32, inputs=None):
        generator = torch.Generator().manual_seed(number)
        self.inputs = torch.rand(size, 3, generator=generator, dtype=dtype) if inputs is None else inputs
        self.number = number

    @property
    def ids(self):
        return [f"{self.number}.{index}" for index in range(len(self.inputs))]

    def describe(self):
        return f"images [{self.number}]"

    def part(self, start, size):
        return ToyBatch(self.number, inputs=self.inputs[start : start + size])

    def split(self, parts):
        return [ToyBatch(self.number, inputs=self.inputs[part]) for part in even_slices(len(self.inputs), parts)]

    def plain(self):
        return {"inputs": self.inputs, "number": self.number}


def toy_batches(start=0):
    number = start
    while True:
        yield ToyBatch(number)
        number += 1


def compute_losses(model, batch):
    output = model(batch.inputs)
    losses = {"first": output.square().mean(), "second": 0.5 * (output[:, 0] - 1).abs().mean()}
    return {name: LossTerm(loss, len(output)) for name, loss in losses.items()}


class ToyRun:
    def __init__(self, seed=0, dropout=0.3, dtype=torch.float32, folder=None, learning_rate=0.05):
        torch.manual_seed(seed)
        random.seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Dropout(dropout), nn.Linear(5, 2)).to(dtype)
        self.optimizer = build_optimizer(self.model, learning_rate=learning_rate, weight_decay=0.1)
        self.scheduler = poly_schedule(self.optimizer, total_steps=TOTAL_STEPS, warmup_steps=3, warmup_start=0.1)
        self.folder = folder
        self.logs, self.events, self.told = [], [], []
        self.skipped_steps = SkippedSteps()

    def on_log(self, log):
        self.logs.append((log.step, log.losses, log.gradient_norm, log.learning_rate))

    def on_checkpoint(self, step):
        self.events.append(("checkpoint", step))
        if self.folder is not None:
            extra = {"skipped_steps": asdict(self.skipped_steps)}
            save_state(self.folder, capture_state(self.model, self.optimizer, self.scheduler, step=step, extra=extra))

    def on_evaluate(self, step):
        self.events.append(("evaluate", step))
        self.model.eval()
        torch.rand(random.randrange(1, 9))

    def train(self, batches=None, losses=compute_losses, start_step=0, after_update=None, bad_batches=None, **settings):
        every = {"log_every_steps": 1, "checkpoint_every_steps": 3, "evaluate_every_steps": 4}
        train(
            self.model,
            toy_batches(start_step) if batches is None else batches,
            losses,
            self.optimizer,
            self.scheduler,
            LoopSettings(**{"total_steps": TOTAL_STEPS, **every, **settings}),
            device=CPU,
            start_step=start_step,
            skipped_steps=self.skipped_steps,
            bad_batches=bad_batches,
            on_log=self.on_log,
            on_checkpoint=self.on_checkpoint,
            on_evaluate=self.on_evaluate,
            on_event=self.told.append,
            after_update=after_update,
        )
        return self

    def resume(self, **settings):
        state = load_state(self.folder).state
        restore_state(state, self.model, self.optimizer, self.scheduler)
        self.skipped_steps = SkippedSteps(**state.extra["skipped_steps"])
        return self.train(start_step=state.step, **settings)


def weights(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])


def test_train_calls_back_when_due_and_checkpoints_before_evaluating():
    run = ToyRun().train(total_steps=10, log_every_steps=4)
    assert [step for step, *_ in run.logs] == [4, 8, 10]
    assert run.events == [
        ("checkpoint", 3),
        ("checkpoint", 4),
        ("evaluate", 4),
        ("checkpoint", 6),
        ("checkpoint", 8),
        ("evaluate", 8),
        ("checkpoint", 9),
        ("checkpoint", 10),
        ("evaluate", 10),
    ]
    assert run.model.training


def test_train_lowers_the_loss_and_logs_the_rate_of_each_step():
    run = ToyRun(dropout=0.0).train()
    totals = [sum(losses.values()) for _, losses, _, _ in run.logs]
    assert totals[-1] < 0.7 * totals[0]
    assert run.logs[0][3] == pytest.approx(0.05 * 0.1) and run.logs[3][3] == pytest.approx(0.05 * 9 / 12)


def test_evaluation_changes_nothing_of_the_training():
    often, once = ToyRun().train(evaluate_every_steps=1), ToyRun().train(evaluate_every_steps=TOTAL_STEPS)
    assert often.logs == once.logs
    assert torch.equal(weights(often), weights(once))


def test_iterating_a_loader_changes_nothing_of_the_training():
    loader = torch.utils.data.DataLoader([ToyBatch(number) for number in range(TOTAL_STEPS)], batch_size=None)
    assert torch.equal(weights(ToyRun().train(loader)), weights(ToyRun().train()))


@pytest.mark.parametrize("stop_step", range(1, TOTAL_STEPS))
def test_run_interrupted_and_resumed_equals_the_uninterrupted_one_bit_for_bit(tmp_path, stop_step):
    whole = ToyRun().train()
    first = ToyRun(folder=tmp_path)

    def stopping_losses(model, batch):
        if batch.number == stop_step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_losses(model, batch)

    with pytest.raises(Interrupted) as caught:
        first.train(losses=stopping_losses)
    assert caught.value.exit_code == 143
    assert first.events[-1] == ("checkpoint", stop_step)
    second = ToyRun(seed=5, folder=tmp_path).resume()
    assert first.logs + second.logs == whole.logs
    assert torch.equal(weights(second), weights(whole))
    evaluations = [event for event in first.events + second.events if event[0] == "evaluate"]
    assert evaluations == [("evaluate", step) for step in (4, 8, 12)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_in_an_evaluation_raises_there_and_the_evaluation_is_made_again(tmp_path, number):
    run = ToyRun(folder=tmp_path)
    former = signal.getsignal(number)
    evaluate, run.on_evaluate = run.on_evaluate, lambda step: os.kill(os.getpid(), number)
    with pytest.raises(Interrupted) as caught:
        run.train()
    assert caught.value.signal_number == number
    assert signal.getsignal(number) is former
    run.on_evaluate = evaluate
    run.events.clear()
    run.resume()
    assert run.events[0] == ("evaluate", 4)
    assert torch.equal(weights(run), weights(ToyRun().train()))


def test_second_interrupt_stops_at_once():
    def interrupting_losses(model, batch):
        os.kill(os.getpid(), signal.SIGINT)
        return compute_losses(model, batch)

    run = ToyRun()
    run.on_checkpoint = lambda step: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.train(losses=interrupting_losses)


@pytest.mark.parametrize("max_gradient_norm", [None, 0.05])
def test_accumulated_micro_batches_equal_one_big_batch(max_gradient_norm):
    def whole():
        return (ToyBatch(number, dtype=torch.float64) for number in range(TOTAL_STEPS))

    def parts():
        return (batch.part(start, 2) for batch in whole() for start in (0, 2, 4))

    settings = {"max_gradient_norm": max_gradient_norm}
    big = ToyRun(dropout=0.0, dtype=torch.float64).train(whole(), **settings)
    small = ToyRun(dropout=0.0, dtype=torch.float64).train(parts(), accumulation_steps=3, **settings)
    torch.testing.assert_close(weights(small), weights(big), rtol=0, atol=1e-12)
    for (_, losses, norm, _), (_, big_losses, big_norm, _) in zip(small.logs, big.logs, strict=True):
        assert losses == pytest.approx(big_losses, abs=1e-12) and norm == pytest.approx(big_norm, abs=1e-12)


def test_gradient_is_shortened_to_its_greatest_norm():
    run = ToyRun(dropout=0.0)
    norms = []
    run.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]).norm().item())
    )
    run.train(max_gradient_norm=0.25, total_steps=3)
    logged = [norm for _, _, norm, _ in run.logs]
    assert max(logged) > 0.25
    assert norms == pytest.approx([min(norm, 0.25) for norm in logged], rel=1e-4)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights():
    seen = []

    def losses(model, batch):
        output = model(batch.inputs)
        seen.append(output.dtype)
        return {"loss": LossTerm(output.float().square().mean(), len(output))}

    run = ToyRun().train(losses=losses, precision="bfloat16", total_steps=2)
    assert seen == [torch.bfloat16] * 2
    assert weights(run).dtype == torch.float32


def test_what_follows_an_update_is_called_after_each():
    run = ToyRun()
    seen = []
    run.train(after_update=lambda: seen.append(weights(run)))
    assert len(seen) == TOTAL_STEPS and torch.equal(seen[-1], weights(run))
    assert not any(torch.equal(first, second) for first, second in pairwise(seen))


def poisoned(numbers, value=float("nan")):
    """Losses of which one is not finite for these batches."""

    def losses(model, batch):
        terms = compute_losses(model, batch)
        if batch.number in numbers:
            terms["second"] = LossTerm(terms["second"].mean * 0 + value, len(batch.inputs))
        return terms

    return losses


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_step_with_a_loss_that_is_not_finite_is_skipped(value, accumulation_steps):
    run, updates = ToyRun(), []
    run.train(
        losses=poisoned({5}, value),
        accumulation_steps=accumulation_steps,
        after_update=lambda: updates.append(weights(run)),
    )
    bad_step = 5 // accumulation_steps + 1
    assert [step for step, *_ in run.logs] == [step for step in range(1, TOTAL_STEPS + 1) if step != bad_step]
    assert len(updates) == TOTAL_STEPS - 1 and weights(run).isfinite().all()
    (event,) = run.told
    assert (event.step, event.kind) == (bad_step, "skipped")
    assert event.text.startswith(f"step {bad_step}: skipped, 1 in a row of at most 10: not finite with images [5]")
    assert f"second={value:.6g})" in event.text and "first=0." in event.text and "[4]" not in event.text
    assert asdict(run.skipped_steps) == {"in_a_row": 0, "in_all": 1}


def test_skipped_step_changes_nothing_but_the_schedule():
    skipping = ToyRun().train(losses=poisoned({5}))
    without = ToyRun()

    def batches():  # the same without the batch that is skipped
        yield from (ToyBatch(number) for number in range(TOTAL_STEPS + 1) if number != 5)

    def follow_the_other():
        if without.scheduler.last_epoch == 5:
            without.scheduler.step()

    without.train(batches(), total_steps=TOTAL_STEPS - 1, after_update=follow_the_other)
    assert torch.equal(weights(skipping), weights(without))
    whole = [rate for *_, rate in ToyRun().train().logs]
    assert [rate for *_, rate in skipping.logs] == whole[:5] + whole[6:]


def test_first_step_may_be_skipped():
    run = ToyRun().train(losses=poisoned({0}))
    assert [event.step for event in run.told] == [1] and len(run.logs) == TOTAL_STEPS - 1


def test_running_statistics_of_a_skipped_step_are_taken_back():
    class Normalised(ToyRun):
        def __init__(self):
            super().__init__()
            self.model.insert(1, nn.BatchNorm1d(5))
            self.optimizer = build_optimizer(self.model, learning_rate=0.05, weight_decay=0.1)
            self.scheduler = poly_schedule(self.optimizer, total_steps=TOTAL_STEPS, warmup_steps=3, warmup_start=0.1)

    batches = [ToyBatch(number) for number in range(TOTAL_STEPS)]
    batches[4].inputs[2, 1] = float("nan")
    run = Normalised().train(batches)
    assert run.model[1].running_mean.isfinite().all() and int(run.model[1].num_batches_tracked) == TOTAL_STEPS - 1
    (event,) = run.told
    assert "Verdict: data; inputs is not finite or absurdly large" in event.text and "output of 0 (" in event.text


@pytest.mark.parametrize("most", [0, 2])
def test_too_many_skipped_steps_in_a_row_end_the_run(most):
    run = ToyRun()
    bad = {1, 2} | set(range(4, 5 + most)) if most else {4}
    with pytest.raises(DivergenceError) as caught:
        run.train(losses=poisoned(bad), max_skipped_steps=most)
    message = str(caught.value)
    assert message.startswith(f"step {5 + most}: training diverged, more than {most} steps in a row are not finite;")
    assert f"images [{4 + most}]" in message and message.endswith("use float32.")
    assert len(run.told) == 2 * most and weights(run).isfinite().all()
    assert ("checkpoint", 5 + most) not in run.events


@pytest.mark.parametrize("stop_step", [4, 5, 6, 7, 9])
def test_resumed_run_skips_and_stops_as_the_whole_one(tmp_path, stop_step):
    bad, most = {4, 5, 8, 9, 10}, 2

    def outcome(run, start, **changes):
        with pytest.raises(DivergenceError) as caught:
            start(losses=poisoned(bad), max_skipped_steps=most, **changes)
        return str(caught.value), weights(run), asdict(run.skipped_steps)

    whole = ToyRun()
    expected = outcome(whole, whole.train)
    first = ToyRun(folder=tmp_path)
    first.train(losses=poisoned(bad), max_skipped_steps=most, total_steps=stop_step)
    second = ToyRun(seed=5, folder=tmp_path)
    message, found, skipped = outcome(second, second.resume)
    assert (message, skipped) == (expected[0], expected[2]) and torch.equal(found, expected[1])
    assert first.logs + second.logs == whole.logs
    assert first.told + second.told == whole.told


def test_gradient_that_is_not_finite_skips_the_step():
    def losses(model, batch):
        # sqrt has a finite value and an infinite slope at 0.
        loss = (model(batch.inputs).sum() * 0).sqrt() if batch.number == 3 else model(batch.inputs).square().mean()
        return {"root": LossTerm(loss, 6)}

    run = ToyRun(dropout=0.0).train(losses=losses)
    (event,) = run.told
    assert "not finite with images [3], first in the gradient at the output of 3 (root=0). Verdict: data" in event.text


def test_weight_that_is_not_finite_stops_at_once():
    run = ToyRun()
    with torch.no_grad():
        run.model[3].weight[1, 2] = float("nan")
    with pytest.raises(
        DivergenceError, match=r"step 1: training diverged: .* first in 3\.weight .* Verdict: weights; "
    ):
        run.train()


def test_bad_batch_is_kept(tmp_path):
    run = ToyRun()
    run.train(losses=poisoned({5}), bad_batches=tmp_path / "bad")
    (path,) = (tmp_path / "bad").iterdir()
    assert path.name == "step_000006_rank0.pt" and run.told[0].text.endswith(f"It is kept as {path}.")
    kept = torch.load(path, weights_only=True)
    assert torch.equal(kept["batch"]["inputs"], ToyBatch(5).inputs)


class NoMemory:
    """Losses of a device that holds so many images at most, in chosen batches."""

    def __init__(self, numbers, most_images, where):
        self.numbers, self.most_images, self.where = numbers, most_images, where
        self.sizes = []

    def __call__(self, model, batch):
        self.sizes.append(len(batch.inputs))
        if self.where == "before" and batch.number in self.numbers:
            self.fail(None)
        terms = compute_losses(model, batch)
        if batch.number in self.numbers and len(batch.inputs) > self.most_images:
            if self.where == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory.")
            if terms["first"].mean.requires_grad:
                terms["first"].mean.register_hook(self.fail)
        return terms

    @staticmethod
    def fail(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(("most_images", "parts"), [(3, 2), (2, 4), (1, 6)])
def test_step_out_of_memory_is_redone_in_parts(most_images, parts, where):
    def batches():
        return (ToyBatch(number, dtype=torch.float64) for number in range(2 * TOTAL_STEPS))

    settings = {"accumulation_steps": 2, "max_gradient_norm": 0.3}
    untroubled = ToyRun(dropout=0.0, dtype=torch.float64).train(batches(), **settings)
    run = ToyRun(dropout=0.0, dtype=torch.float64)
    run.train(batches(), NoMemory({9, 16}, most_images, where), **settings)
    torch.testing.assert_close(weights(run), weights(untroubled), rtol=0, atol=1e-12)
    assert run.logs[:4] == untroubled.logs[:4]
    for (_, losses, norm, _), (_, whole_losses, whole_norm, _) in zip(run.logs, untroubled.logs, strict=True):
        assert losses == pytest.approx(whole_losses, abs=1e-12) and norm == pytest.approx(whole_norm, abs=1e-12)
    assert [(event.step, event.kind, event.text) for event in run.told] == [
        (
            step,
            "out_of_memory",
            f"step {step}: out of memory with images [{number}], 6 at once; redone in {parts} parts",
        )
        for step, number in ((5, 9), (9, 16))
    ]


def test_redone_step_draws_the_same_random_numbers_where_it_fits():
    """Its first micro-batch is computed twice, and equal; so is everything before, bit for bit."""
    whole = ToyRun().train(accumulation_steps=2)
    run = ToyRun().train(losses=NoMemory({9}, 3, "backward"), accumulation_steps=2)
    assert run.logs[:4] == whole.logs[:4]
    assert run.logs[4] != whole.logs[4]  # dropout draws anew in parts


def test_after_three_redone_steps_batches_start_in_parts():
    losses = NoMemory(set(range(TOTAL_STEPS)), 3, "forward")
    run = ToyRun(dropout=0.0).train(losses=losses)
    assert [event.step for event in run.told] == [1, 2, 3, 3]
    assert run.told[-1].text == "step 3: from the next step on, batches are computed in 2 parts from the start"
    assert losses.sizes == [6, 3, 3, 3, 3] * 3 + [3, 3, 3, 3] * (TOTAL_STEPS - 3)


def test_error_is_not_shared_where_the_others_wait_in_the_middle_of_a_pass(monkeypatch):
    monkeypatch.setattr(loop, "several_processes", lambda: True)
    monkeypatch.setattr(loop, "share_rare", lambda report: pytest.fail("nobody would answer"))
    run = ToyRun()
    run.model.append(nn.SyncBatchNorm(2))
    with pytest.raises(ConfigError, match=r"step 1: out of memory with images \[0\]\. BatchNorm that is synchronised"):
        run.train(losses=NoMemory({0}, 0, "before"))


def test_image_that_does_not_fit_alone_ends_the_run_in_words():
    run = ToyRun()
    with pytest.raises(
        ConfigError, match=r"step 3: out of memory with one image alone, images \[2\]\. Recompute activ"
    ):
        run.train(losses=NoMemory({2}, 0, "forward"))


def test_batches_that_end_too_early_are_named():
    with pytest.raises(ConfigError, match="the batches ended in step 6 of 12: the loader must give 1 for each"):
        ToyRun().train([ToyBatch(number) for number in range(5)])


def test_finished_run_only_evaluates_and_a_start_beyond_the_end_is_refused():
    run = ToyRun().train(start_step=TOTAL_STEPS)
    assert run.events == [("evaluate", TOTAL_STEPS)] and run.logs == [] and run.model.training
    with pytest.raises(ConfigError, match=r"start_step must lie in \[0, total_steps = 12\], got 13"):
        ToyRun().train(start_step=13)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"accumulation_steps": 0}, "accumulation_steps"),
        ({"log_every_steps": -1}, "log_every_steps"),
        ({"max_skipped_steps": -1}, "max_skipped_steps must be 0 or more, got -1"),
        ({"max_gradient_norm": 0.0}, "max_gradient_norm must be above 0"),
        ({"max_gradient_norm": float("nan")}, "max_gradient_norm must be above 0"),
        ({"precision": "float16"}, "precision must be float32 or bfloat16, got 'float16'"),
    ],
)
def test_loop_settings_refuse_bad_values(change, text):
    with pytest.raises(ConfigError, match=text):
        ToyRun().train(**change)


TWO_PROCESSES = """
import importlib.util, os, signal, sys
import torch
from swin_dense.errors import ConfigError, DivergenceError
from swin_dense.training.distributed import distributed, wrap
from swin_dense.errors import Interrupted

specification = importlib.util.spec_from_file_location("toy", sys.argv[1])
toy = importlib.util.module_from_spec(specification)
specification.loader.exec_module(toy)

with distributed("cpu", timeout_s=60) as process:

    def say(*words):  # in one piece: both processes write to one pipe
        os.write(1, (" ".join(map(str, (process.rank, *words))) + "\\n").encode())

    def wrapped_run(**settings):
        run = toy.ToyRun(dropout=0.0, **settings)
        run.model = wrap(run.model, process)
        return run

    batches = (toy.ToyBatch(number, dtype=torch.float64) for number in range(toy.TOTAL_STEPS))
    parts = (batch.part(3 * process.rank + index, 1) for batch in batches for index in range(3))
    run = wrapped_run(dtype=torch.float64).train(parts, accumulation_steps=3, max_gradient_norm=0.05)
    if process.is_main:
        torch.save({"weights": toy.weights(run), "losses": [log[1] for log in run.logs]}, sys.argv[2])

    def told(run):
        return [(event.step, event.kind, event.text) for event in run.told]

    for where in ("forward", "backward"):
        batches = (toy.ToyBatch(number, dtype=torch.float64) for number in range(toy.TOTAL_STEPS))
        parts = (batch.part(3 * process.rank, 3) for batch in batches)
        run = wrapped_run(dtype=torch.float64)
        run.train(parts, toy.NoMemory({4, 7} if process.rank == 1 else {7}, 1, where), max_gradient_norm=0.05)
        if process.is_main:
            torch.save({"weights": toy.weights(run)}, f"{sys.argv[2]}.{where}")
        for line in told(run):
            say(where, *line)

    run = wrapped_run()
    run.train(losses=toy.poisoned({6, 7} if process.rank == 1 else set()))
    say("skipped", [step for step, *_ in told(run)], [step for step, *_ in run.logs], run.skipped_steps.in_all)
    say(run.told[0].text.partition(" (")[0])
    try:
        wrapped_run().train(losses=toy.poisoned({6, 7} if process.rank == 1 else set()), max_skipped_steps=1)
    except DivergenceError as error:
        say(str(error).split(",")[0])
    try:
        wrapped_run().train(losses=toy.NoMemory({1} if process.rank == 1 else set(), 0, "forward"))
    except ConfigError as error:
        say(str(error).split(".")[0])

    def signalled_losses(model, batch):
        if process.rank == 1 and batch.number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return toy.compute_losses(model, batch)

    run = wrapped_run()
    try:
        run.train(losses=signalled_losses)
    except Interrupted as error:
        say("interrupted", error.exit_code, run.events[-1])

os._exit(0)  # Gloo's threads now and then abort the interpreter's teardown
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "script.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(folder / "script.py"), __file__, str(folder / "result.pt")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result = torch.load(folder / "result.pt", weights_only=True)
    for where in ("forward", "backward"):
        result[where] = torch.load(folder / f"result.pt.{where}", weights_only=True)["weights"]
    return sorted(done.stdout.splitlines()), result


def test_two_processes_equal_one_with_the_same_global_batch(two_processes):
    _, result = two_processes
    batches = (ToyBatch(number, dtype=torch.float64) for number in range(TOTAL_STEPS))
    run = ToyRun(dropout=0.0, dtype=torch.float64).train(batches, max_gradient_norm=0.05)
    torch.testing.assert_close(result["weights"], weights(run), rtol=0, atol=1e-12)
    for got, (_, losses, _, _) in zip(result["losses"], run.logs, strict=True):
        assert got == pytest.approx(losses, abs=1e-12)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_process_out_of_memory_does_not_change_the_result(two_processes, where):
    lines, result = two_processes
    torch.testing.assert_close(result[where], result["weights"], rtol=0, atol=1e-12)
    texts = [f"out of memory with images [{number}], 3 at once; redone in 3 parts" for number in (4, 7, 7)]
    expected = [f"{step} out_of_memory step {step}: {text}" for step, text in zip((5, 8, 8), texts, strict=True)]
    for rank in (0, 1):  # both know, and one of them tells
        start = f"{rank} {where} "
        assert [line.removeprefix(start) for line in lines if line.startswith(start)] == expected


def test_one_process_out_of_memory_for_good_ends_both(two_processes):
    lines, _ = two_processes
    said = [line for line in lines if "one image alone" in line]
    assert said == [f"{rank} step 2: out of memory with one image alone, images [1]" for rank in (0, 1)]


def test_step_that_is_not_finite_in_one_process_is_skipped_in_both(two_processes):
    lines, _ = two_processes
    logged = [step for step in range(1, TOTAL_STEPS + 1) if step not in (7, 8)]
    for rank in (0, 1):
        assert f"{rank} skipped [7, 8] {logged} 2" in lines
        text = "in process 1 not finite with images [6], first in the loss second"
        assert f"{rank} step 7: skipped, 1 in a row of at most 10: {text}" in lines


def test_two_processes_stop_together(two_processes):
    lines, _ = two_processes
    assert [line for line in lines if "interrupted" in line or "diverged" in line] == [
        "0 interrupted 143 ('checkpoint', 5)",
        "0 step 8: training diverged",
        "1 interrupted 143 ('checkpoint', 5)",
        "1 step 8: training diverged",
    ]
