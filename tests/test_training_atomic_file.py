import errno
import hashlib
import os
import resource
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch

from swin_dense.errors import CheckpointError
from swin_dense.training import atomic_file
from swin_dense.training.atomic_file import atomic_write, read_checked, write_checked

CONTENT = {"weights": {"a": torch.arange(7.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}, "step": 5, "score": None}


def assert_equal_content(got):
    assert got["step"] == 5 and got["score"] is None
    assert all(torch.equal(got["weights"][name], CONTENT["weights"][name]) for name in "ab")


@pytest.fixture
def checked(tmp_path):
    path = tmp_path / "file.pt"
    write_checked(path, CONTENT)
    return path


def test_checked_file_round_trip_and_plain_torch_load(checked):
    assert_equal_content(read_checked(checked))
    assert_equal_content(torch.load(checked, weights_only=True))
    assert zipfile.ZipFile(checked).testzip() is None
    assert os.listdir(checked.parent) == ["file.pt"]


def test_read_checked_notices_every_flipped_bit(checked):
    whole = checked.read_bytes()
    for position in range(0, len(whole), 13):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        checked.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            read_checked(checked)


def test_read_checked_notices_every_cut(checked):
    whole = checked.read_bytes()
    for length in range(0, len(whole), 17):
        checked.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_checked(checked)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "git lfs pull"),
        (b"\x80\x04K\x01.", "is not a file that torch.save wrote"),
        (b"PK\x03\x04" + b"x" * 500, "no checksum at its end"),
    ],
)
def test_read_checked_names_what_a_foreign_file_is(tmp_path, content, text):
    path = tmp_path / "foreign.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=text):
        read_checked(path)


def test_read_checked_names_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone.pt: cannot be read \(No such file"):
        read_checked(tmp_path / "gone.pt")
    with pytest.raises(CheckpointError, match="Is a directory"):
        read_checked(tmp_path)


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


def test_read_checked_runs_no_code_and_gives_no_dangerous_advice(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, marker = tmp_path / "evil.pt", tmp_path / "marker"
    with open(path, "w+b") as file:
        torch.save({"model": Attack(str(marker))}, file)
        atomic_file._append_checksum(file)
    with pytest.raises(CheckpointError) as caught:
        read_checked(path)
    assert not marker.exists()
    assert "mkdir" in str(caught.value) and "weights_only" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_read_checked_refuses_compressed_entries(checked):
    with zipfile.ZipFile(checked) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(checked, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    with open(checked, "r+b") as file:
        atomic_file._append_checksum(file)
    with pytest.raises(CheckpointError, match="compressed"):
        read_checked(checked)


@pytest.mark.parametrize("value", [np.float64(0.5), {1, 2}, object()])
def test_write_checked_names_the_value_that_cannot_be_saved(tmp_path, value):
    with pytest.raises(CheckpointError, match=r"f.pt\['extra'\]\[1\]: a value of type"):
        write_checked(tmp_path / "f.pt", {"extra": [0, value]})
    assert os.listdir(tmp_path) == []


def test_write_checked_keeps_the_former_file(checked):
    before = checked.read_bytes()
    write_checked(checked, {**CONTENT, "step": 6}, keep_as=checked.with_name("previous.pt"))
    assert checked.with_name("previous.pt").read_bytes() == before
    assert read_checked(checked)["step"] == 6


def test_write_checked_on_a_full_disk_leaves_the_former_files_and_no_litter(checked):
    before = checked.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written .* MB are free .* unharmed"):
            write_checked(checked, {"big": torch.zeros(100_000)}, keep_as=checked.with_name("previous.pt"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checked.read_bytes() == before
    assert os.listdir(checked.parent) == ["file.pt"]


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_write_checked_failing_in_the_system_leaves_the_former_file(checked, monkeypatch, failing):
    def fail(*_):
        raise OSError(errno.EACCES, "Permission denied")

    before = checked.read_bytes()
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(CheckpointError, match="Permission denied"):
        write_checked(checked, CONTENT)
    assert checked.read_bytes() == before
    assert os.listdir(checked.parent) == ["file.pt"]


def test_atomic_write_interrupted_leaves_the_former_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


KILLED_WRITER = """
import sys
from pathlib import Path
from swin_dense.training.atomic_file import atomic_write
block = b"x" * 100_000
number = 0
while True:
    number += 1
    with atomic_write(Path(sys.argv[1]), keep_as=Path(sys.argv[2])) as file:
        file.write(b"%09d" % number + block)
        file.write(b"%09d" % number)
    if number == 1:
        print("started", flush=True)
"""


def test_atomic_write_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    last, previous = tmp_path / "last", tmp_path / "previous"
    command = [sys.executable, "-c", KILLED_WRITER, str(last), str(previous)]
    for delay_s in (0.003, 0.011):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(delay_s)
            child.kill()
        whole = [path for path in (last, previous) if path.exists()]
        assert whole and all(path.read_bytes()[:9] == path.read_bytes()[-9:] for path in whole)


def test_checksum_is_that_of_the_bytes_before_it(checked):
    whole = checked.read_bytes()
    assert whole[-64:].decode() == hashlib.sha256(whole[: -len(b"sha256:") - 64]).hexdigest()


def test_what_is_no_file_is_written_to_and_stays(tmp_path):
    pipe, received = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    with atomic_write(pipe) as file:
        file.write(b"content")
    reader.join(timeout=10)
    assert received == [b"content"] and pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
