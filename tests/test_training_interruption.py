import os
import pickle
import signal
import threading
import time

import pytest

from swin_dense.errors import Interrupted
from swin_dense.training.interruption import StopSignals


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signals_only_note_the_first_and_restore_the_handlers(number):
    former = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with StopSignals() as signals:
        assert signals.signal_number is None
        send(number)
        assert signals.signal_number == number
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == former


def test_stop_signals_second_interrupt_raises_at_once():
    with StopSignals() as signals:
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert signals.signal_number == signal.SIGINT


def test_stop_signals_take_terminal_and_torchrun_interrupts_as_one(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    with StopSignals() as signals:
        send(signal.SIGINT)
        send(signal.SIGINT)
    assert signals.signal_number == signal.SIGINT


def test_stop_signals_second_terminate_changes_nothing():
    with StopSignals() as signals:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
    assert signals.signal_number == signal.SIGTERM


def test_stop_signals_at_once_raise_where_the_signal_arrives():
    with StopSignals() as signals:
        with pytest.raises(Interrupted), signals.at_once():
            send(signal.SIGTERM)
        with pytest.raises(Interrupted), signals.at_once():
            pytest.fail("a signal noted before must raise on entry")
        send(signal.SIGTERM)


def test_stop_signals_outside_the_main_thread_do_nothing():
    seen = []

    def run():
        with StopSignals() as signals:
            seen.append(signals.signal_number)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [None]


def test_interrupted_names_the_signal_and_the_exit_code():
    error = pickle.loads(pickle.dumps(Interrupted(signal.SIGTERM)))
    assert (error.exit_code, Interrupted(signal.SIGINT).exit_code) == (143, 130)
    assert "SIGTERM" in str(error) and "--resume" in str(error)
