import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

from swin_dense.errors import ConfigError, DivergenceError, Interrupted
from swin_dense.training.checkpoint import capture_state, load_state, restore_state, save_state
from swin_dense.training.loop import LoopSettings, train
from swin_dense.training.optimizer import build_optimizer
from swin_dense.training.schedule import poly_schedule

CPU = torch.device("cpu")
TOTAL_STEPS = 12


class ToyBatch:
    """Made from its number alone, so that a resumed run sees the same."""

    def __init__(self, number, size=6, dtype=torch.float32):
        generator = torch.Generator().manual_seed(number)
        self.inputs = torch.rand(size, 3, generator=generator, dtype=dtype)
        self.number = number

    def describe(self):
        return f"images [{self.number}]"

    def part(self, start, size):
        part = ToyBatch(self.number)
        part.inputs = self.inputs[start : start + size]
        return part


def toy_batches(start=0):
    number = start
    while True:
        yield ToyBatch(number)
        number += 1


def compute_losses(model, batch):
    output = model(batch.inputs)
    return {"first": output.square().mean(), "second": 0.5 * (output[:, 0] - 1).abs().mean()}


class ToyRun:
    def __init__(self, seed=0, dropout=0.3, dtype=torch.float32, folder=None, learning_rate=0.05):
        torch.manual_seed(seed)
        random.seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Dropout(dropout), nn.Linear(5, 2)).to(dtype)
        self.optimizer = build_optimizer(self.model, learning_rate=learning_rate, weight_decay=0.1)
        self.scheduler = poly_schedule(self.optimizer, total_steps=TOTAL_STEPS, warmup_steps=3, warmup_start=0.1)
        self.folder = folder
        self.logs, self.events = [], []

    def on_log(self, log):
        self.logs.append((log.step, log.losses, log.gradient_norm, log.learning_rate))

    def on_checkpoint(self, step):
        self.events.append(("checkpoint", step))
        if self.folder is not None:
            save_state(self.folder, capture_state(self.model, self.optimizer, self.scheduler, step=step))

    def on_evaluate(self, step):
        self.events.append(("evaluate", step))
        self.model.eval()
        torch.rand(random.randrange(1, 9))

    def train(self, batches=None, losses=compute_losses, start_step=0, **settings):
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
            on_log=self.on_log,
            on_checkpoint=self.on_checkpoint,
            on_evaluate=self.on_evaluate,
        )
        return self

    def resume(self):
        state = load_state(self.folder).state
        restore_state(state, self.model, self.optimizer, self.scheduler)
        return self.train(start_step=state.step)


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
        return {"loss": output.float().square().mean()}

    run = ToyRun().train(losses=losses, precision="bfloat16", total_steps=2)
    assert seen == [torch.bfloat16] * 2
    assert weights(run).dtype == torch.float32


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_loss_that_is_not_finite_stops_before_the_update(value, accumulation_steps):
    def losses(model, batch):
        named = compute_losses(model, batch)
        return {**named, "second": named["second"] * 0 + value} if batch.number == 5 else named

    run = ToyRun()
    before = []
    run.on_log = lambda log: before.append(weights(run))
    with pytest.raises(DivergenceError) as caught:
        run.train(losses=losses, accumulation_steps=accumulation_steps, checkpoint_every_steps=99)
    message = str(caught.value)
    assert message.startswith(f"step {5 // accumulation_steps + 1}: training diverged")
    assert f"second={value:.6g} in batch images [5]." in message and "first=0." in message and "[4]" not in message
    assert torch.equal(weights(run), before[-1])
    assert ("checkpoint", 6) not in run.events


def test_gradient_that_is_not_finite_stops_before_the_update():
    def losses(model, batch):
        # sqrt has a finite value and an infinite slope at 0.
        return {"root": (model(batch.inputs).sum() * 0).sqrt()}

    run = ToyRun()
    before = weights(run)
    with pytest.raises(DivergenceError, match=r"step 1: .*gradient norm=nan, root=0 in batch images \[0\]"):
        run.train(losses=losses)
    assert torch.equal(weights(run), before)


def test_batch_without_description_is_named_by_its_type():
    with pytest.raises(DivergenceError, match="in batch of type Tensor"):
        ToyRun().train([torch.rand(2, 3)], losses=lambda model, batch: {"loss": model(batch).sum() * float("nan")})


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
from swin_dense.errors import DivergenceError
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

    def diverging_losses(model, batch):
        losses = toy.compute_losses(model, batch)
        return {**losses, "third": losses["first"] * (float("nan") if process.rank == 1 else 1.0)}

    try:
        wrapped_run().train(losses=diverging_losses)
    except DivergenceError as error:
        say(str(error).split(",")[0])

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
    return sorted(done.stdout.splitlines()), torch.load(folder / "result.pt", weights_only=True)


def test_two_processes_equal_one_with_the_same_global_batch(two_processes):
    _, result = two_processes
    batches = (ToyBatch(number, dtype=torch.float64) for number in range(TOTAL_STEPS))
    run = ToyRun(dropout=0.0, dtype=torch.float64).train(batches, max_gradient_norm=0.05)
    torch.testing.assert_close(result["weights"], weights(run), rtol=0, atol=1e-12)
    for got, (_, losses, _, _) in zip(result["losses"], run.logs, strict=True):
        assert got == pytest.approx(losses, abs=1e-12)


def test_two_processes_stop_together(two_processes):
    lines, _ = two_processes
    assert lines == [
        "0 interrupted 143 ('checkpoint', 5)",
        "0 step 1: training diverged in another process",
        "1 interrupted 143 ('checkpoint', 5)",
        "1 step 1: training diverged",
    ]
