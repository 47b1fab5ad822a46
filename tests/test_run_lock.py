import os
import signal
import subprocess
import sys
import time

import pytest

from swin_dense.errors import ConfigError
from swin_dense.tools.run_lock import LOCK_NAME, only_run_in

pytestmark = pytest.mark.skipif(os.name != "posix", reason="record locks are POSIX")

HOLD = """
import sys, time
from pathlib import Path
from swin_dense.tools.run_lock import only_run_in
with only_run_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-P", "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_is_refused_and_the_first_is_named(holder, tmp_path):
    with pytest.raises(ConfigError, match=rf"run: process {holder.pid} trains here already"):
        with only_run_in(tmp_path / "run"):
            pytest.fail("both are in")
    assert (tmp_path / "run" / LOCK_NAME).read_text() == str(holder.pid)


def test_a_killed_run_leaves_no_lock_behind(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with only_run_in(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK_NAME).read_text() == str(os.getpid())
    assert not list((tmp_path / "run").iterdir())


def test_a_child_does_not_inherit_the_lock(tmp_path):
    with only_run_in(tmp_path / "run"):
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
    try:
        with only_run_in(tmp_path / "run"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/run: cannot be written to \(Not a directory\)"):
        with only_run_in(tmp_path / "file" / "run"):
            pytest.fail("there is no folder")
