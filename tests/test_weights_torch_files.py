import argparse
import os
import tracemalloc
import zipfile

import pytest
import torch

from swin_dense.errors import CheckpointError
from swin_dense.weights.torch_files import read_stream_file, read_zip_file

WEIGHTS = {
    "half": torch.arange(7, dtype=torch.float16),
    "bfloat16": torch.ones(3, 2, dtype=torch.bfloat16),
    "double": torch.linspace(0, 1, 5, dtype=torch.float64),
    "index": torch.arange(11),
    "flags": torch.tensor([True, False]),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "part": torch.arange(10.0)[3:7],
    "scalar": torch.tensor(3.0),
    "empty": torch.ones(0, 5),
    "parameter": torch.nn.Parameter(torch.ones(3)),
}


def save(path, content=WEIGHTS, **settings):
    torch.save(content, path, **settings)
    return path


def rewrite(path, change=lambda name, content: content, compression=zipfile.ZIP_STORED, added=()):
    """The archive with changed entries."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, change(name.partition("/")[2], archive.read(name))) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in [*entries, *added]:
            archive.writestr(name, content)
    return path


def in_pickle(old, new):
    return lambda name, content: content.replace(old, new) if name == "data.pkl" else content


READERS = [(read_zip_file, True), (read_stream_file, False)]


@pytest.mark.parametrize(("read", "new_format"), READERS)
def test_tensors_of_every_type_come_back_bit_for_bit(tmp_path, read, new_format):
    path = save(tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
    content, libraries = read(path)
    assert libraries == () and content.keys() == WEIGHTS.keys()
    for name, value in content.items():
        assert torch.equal(value, WEIGHTS[name]) and value.dtype == WEIGHTS[name].dtype, name


def test_suffix_that_torch_treats_apart_changes_nothing(tmp_path):
    content, _ = read_zip_file(save(tmp_path / "a.safetensors"))
    assert all(torch.equal(value, WEIGHTS[name]) for name, value in content.items())


def test_numbers_of_the_other_byte_order_are_turned(tmp_path):
    path = save(tmp_path / "a.pth", {"w": torch.arange(5, dtype=torch.int32)})

    def turn(name, content):
        if name == "byteorder":
            return b"big"
        return torch.arange(5, dtype=torch.int32).numpy().byteswap().tobytes() if name == "data/0" else content

    rewrite(path, turn)
    before = path.read_bytes()
    assert read_zip_file(path)[0]["w"].tolist() == [0, 1, 2, 3, 4]
    assert path.read_bytes() == before


def test_changing_a_tensor_leaves_the_file_as_it_was(tmp_path):
    path = save(tmp_path / "a.pth")
    before = path.read_bytes()
    read_zip_file(path)[0]["double"].fill_(7)
    assert path.read_bytes() == before


@pytest.mark.parametrize(("read", "new_format"), READERS)
@pytest.mark.parametrize("variable", ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"])
def test_environment_cannot_lift_the_protection(tmp_path, monkeypatch, variable, read, new_format):
    monkeypatch.setenv(variable, "1")
    seen = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **kw: (seen.append(kw["weights_only"]), load(*a, **kw))[1])
    assert read(save(tmp_path / "a.pth", _use_new_zipfile_serialization=new_format))[0].keys() == WEIGHTS.keys()
    assert seen == [True]
    marker = tmp_path / "marker"

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    path = save(tmp_path / "attack.pth", {**WEIGHTS, "x": Attack()}, _use_new_zipfile_serialization=new_format)
    # Past our own scan, torch's reader refuses too.
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        load(path, weights_only=True)
    with pytest.raises(CheckpointError, match=r"would call posix\.system"):
        read(path)
    assert not marker.exists()


def test_stand_ins_are_registered_for_the_time_of_the_call_only(tmp_path):
    content = {"arguments": argparse.Namespace(b=1), "w": torch.arange(6.0)}
    before = set(torch.serialization.get_safe_globals())
    read_zip_file(save(tmp_path / "a.pth", content))
    with pytest.raises(CheckpointError, match="torch cannot read it"):
        read_zip_file(rewrite(save(tmp_path / "b.pth", content), in_pickle(b"K\x06\x85", b"K\x07\x85")))
    assert set(torch.serialization.get_safe_globals()) == before


# ---- Files that ask for more than they hold.


def test_compressed_archives_are_refused_before_they_expand(tmp_path):
    path = save(tmp_path / "bomb.pth", {"w": torch.zeros(5_000_000)})
    rewrite(path, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"bomb\.pth: its zip archive is compressed"):
            read_zip_file(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_entries_that_overlap_are_refused(tmp_path):
    path = save(tmp_path / "a.pth", {"w": torch.zeros(5_000)})
    with zipfile.ZipFile(path, "a") as archive:
        (big,) = (entry for entry in archive.infolist() if entry.filename.endswith("data/0"))
        for number in range(1, 9):
            copy = zipfile.ZipInfo(f"a/data/{number}")
            copy.header_offset, copy.file_size, copy.compress_size = big.header_offset, big.file_size, big.file_size
            copy.CRC = big.CRC
            archive.filelist.append(copy)
            archive.NameToInfo[copy.filename] = copy
        archive._didModify = True
    with pytest.raises(CheckpointError, match="promises more bytes than the file has"):
        read_zip_file(path)


def test_entry_named_twice_is_refused(tmp_path):
    path = save(tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="Duplicate name"):
        rewrite(path, added=[("a/data.pkl", b"\x80\x02}.")])
    with pytest.raises(CheckpointError, match="names an entry twice"):
        read_zip_file(path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        # The storage of arange(6.0) is six numbers of four bytes.
        (b"K\x06t", b"J\x00\xca\x9a\x3bt", "refers to 4000000000 bytes under data/0 and there are 24"),
        (b"K\x06t", b"K\x05t", "refers to 20 bytes under data/0 and there are 24"),
        (b"K\x06t", b"J\xff\xff\xff\xfft", "damaged or cut"),
        (b"K\x06\x85", b"J\x00\xca\x9a\x3b\x85", "torch cannot read it"),
        (b"K\x06\x85", b"K\x07\x85", "torch cannot read it"),
        (b"K\x06\x85", b"J\xff\xff\xff\xff\x85", "torch cannot read it"),
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009", "24 bytes under data/9 and there are none"),
    ],
)
def test_sizes_that_do_not_fit_the_storage_are_refused(tmp_path, old, new, words):
    path = save(tmp_path / "a.pth", {"w": torch.arange(6.0)})
    assert old in zipfile.ZipFile(path).read("a/data.pkl")
    with pytest.raises(CheckpointError, match=words):
        read_zip_file(rewrite(path, in_pickle(old, new)))


def test_streams_that_claim_more_than_they_hold_are_refused(tmp_path):
    path = save(tmp_path / "a.pth", {"w": torch.arange(6.0)}, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"K\x06N", b"\x8a\x05\x00\x00\x00\x00\x7fN"))
    with pytest.raises(CheckpointError, match=r"has \d+ bytes, its list of tensors asks for 2181843386\d\d\d"):
        read_stream_file(path)
    for end in (len(content) - 1, len(content) - 24):
        path.write_bytes(content[:end])
        with pytest.raises(CheckpointError, match=f"has {end} bytes, its list of tensors asks for {len(content)}"):
            read_stream_file(path)


# ---- Other archives.


def test_torchscript_is_named(tmp_path):
    path = save(tmp_path / "a.pth")
    rewrite(path, added=[("a/constants.pkl", b"\x80\x02).")])
    with pytest.raises(CheckpointError, match="is a TorchScript program"):
        read_zip_file(path)


def test_other_zip_archives_are_named(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("deep/inside/data.pkl", b"")
    with pytest.raises(CheckpointError, match=r"torch\.save did not write it"):
        read_zip_file(path)


def test_encrypted_entries_are_refused(tmp_path):
    path = save(tmp_path / "a.pth")
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[directory + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="its zip archive is damaged"):
        read_zip_file(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_cut_archives_are_refused_with_their_size(tmp_path, share):
    path = save(tmp_path / "a.pth")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=f"end is missing or damaged .{int(share * len(content))} bytes"):
        read_zip_file(path)


def test_torchs_advice_is_never_passed_on(tmp_path):
    # A foreign object where torch wants numbers: past the scan, refused by torch with its long advice or in few words.
    path = tmp_path / "a.pth"
    for new in (b"cnumpy\ndtype\n\x85", b"cnumpy\ndtype\n)R)R\x85", b"}}b\x85"):
        save(path, {"w": torch.arange(6.0)})
        with pytest.raises(CheckpointError) as caught:
            read_zip_file(rewrite(path, in_pickle(b"K\x06\x85", new)))
        assert "weights_only" not in str(caught.value) and "trust" not in str(caught.value)
        assert "\n" not in str(caught.value)
