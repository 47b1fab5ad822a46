import argparse
import builtins
import json
import os
import subprocess
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swin_dense.errors import CheckpointError
from swin_dense.weights.files import read_weights_file

WEIGHTS = {
    "layers.0.weight": torch.arange(6.0).reshape(2, 3),
    "norm.bias": torch.ones(5, dtype=torch.bfloat16),
    "index": torch.arange(7),
}
SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".json", "")


def write_zip(path, content=WEIGHTS):
    torch.save(content, path)


def write_stream(path, content=WEIGHTS):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_safetensors(path, content=WEIGHTS, metadata=None):
    safetensors.torch.save_file(content, path, metadata)


WRITERS = {"zip": write_zip, "stream": write_stream, "safetensors": write_safetensors}


def write_parts(folder, suffix="safetensors", **changes):
    """Two parts and their index; `changes` are entries of the weight map."""
    names = list(WEIGHTS)
    parts = {f"model-0000{number}-of-00002.{suffix}": names[number - 1 :: 2] for number in (1, 2)}
    for file, held in parts.items():
        (write_safetensors if suffix == "safetensors" else write_zip)(folder / file, {n: WEIGHTS[n] for n in held})
    weight_map = {name: file for file, held in parts.items() for name in held}
    index = folder / f"model.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 90}, "weight_map": weight_map | changes}))
    return index


def same_weights(tensors, expected=WEIGHTS):
    return tensors.keys() == expected.keys() and all(
        torch.equal(value, expected[name]) and value.dtype == expected[name].dtype for name, value in tensors.items()
    )


# ---- What is read.


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", WRITERS)
def test_content_decides_the_kind_and_not_the_suffix(tmp_path, kind, suffix):
    path = tmp_path / f"weights{suffix}"
    WRITERS[kind](path)
    for given_path in (path, str(path)):
        found = read_weights_file(given_path)
        assert same_weights(found.tensors)
        assert (found.source, found.wrapper, found.class_names, found.about, found.notes) == (
            str(path),
            "",
            None,
            None,
            (),
        )


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_parts_under_an_index_are_joined(tmp_path, suffix):
    found = read_weights_file(write_parts(tmp_path, suffix))
    assert same_weights(found.tensors)
    assert found.source.endswith(".index.json")


def test_parts_may_be_links_as_in_download_caches(tmp_path):
    folder, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    folder.mkdir(), blobs.mkdir()
    index = write_parts(folder)
    for number, part in enumerate(sorted(folder.glob("*.safetensors"))):
        part.rename(blobs / str(number))
        part.symlink_to(Path("..") / "blobs" / str(number))
    assert same_weights(read_weights_file(index).tensors)


def test_parts_keep_what_was_not_read_in_the_notes(tmp_path):
    index = write_parts(tmp_path, "bin")
    part = sorted(tmp_path.glob("*.bin"))[0]
    write_zip(part, {**torch.load(part), "arguments": argparse.Namespace(a=1)})
    assert read_weights_file(index).notes == (f"objects of other libraries in {part.name} not read: standard library",)


def test_model_files_of_this_library_tell_what_they_are(tmp_path):
    about = {"format": 1, "architecture": {"head": "upernet"}, "labels": {"names": ["wall", "sky"], "raw_ids": [1, 3]}}
    write_safetensors(tmp_path / "best.safetensors", metadata={"swin_dense": json.dumps(about)})
    found = read_weights_file(tmp_path / "best.safetensors")
    assert (found.about, found.class_names, found.notes) == (about, ("wall", "sky"), ())


@pytest.mark.parametrize("text", ["{", "[1]", "7", ""])
def test_damaged_descriptions_do_not_hinder_the_weights(tmp_path, text):
    write_safetensors(tmp_path / "a.safetensors", metadata={"swin_dense": text})
    found = read_weights_file(tmp_path / "a.safetensors")
    assert same_weights(found.tensors) and found.about is None and found.class_names is None
    assert found.notes == ("the text beside the weights is damaged, not used",)


def test_foreign_descriptions_are_nothing_to_speak_of(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert read_weights_file(tmp_path / "a.safetensors").notes == ()


def test_checkpoint_of_openmmlab_gives_weights_and_class_names(tmp_path):
    content = {"meta": {"dataset_meta": {"classes": ("cat", "dog")}, "epoch": 3}, "state_dict": WEIGHTS}
    write_zip(tmp_path / "epoch_3.pth", content)
    found = read_weights_file(tmp_path / "epoch_3.pth")
    assert same_weights(found.tensors) and (found.wrapper, found.class_names) == ("state_dict", ("cat", "dog"))


def test_tensors_that_share_numbers_are_read(tmp_path):
    content = {"a": torch.ones(50), "b": torch.ones(3)[None].expand(4, 3)}
    content["c"] = content["a"][10:20]
    write_zip(tmp_path / "a.pth", content)
    assert same_weights(read_weights_file(tmp_path / "a.pth").tensors, content)


# ---- What is refused, each in one sentence that names the file.


class Attack:
    def __init__(self, function, *arguments):
        self.parts = (function, arguments)

    def __reduce__(self):
        return self.parts


class AttackOnBuild:
    def __init__(self, attack):
        self.attack = attack

    def __reduce__(self):
        return argparse.Namespace, (), self.attack


def cut(kind, share):
    def write(path):
        WRITERS[kind](path)
        content = path.read_bytes()
        path.write_bytes(content[: max(1, int(share * len(content)))])

    return write


def holding(content):
    return lambda path: path.write_bytes(content)


def saved(make, new_format=True):
    return lambda path: torch.save(make(path), path, _use_new_zipfile_serialization=new_format)


def with_pickle(content):
    """A zip file of torch with this pickle."""

    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3\n")

    return write


def compressed(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(30_000_000))


def with_header(header, data=b""):
    def write(path):
        text = json.dumps(header).encode() if not isinstance(header, bytes) else header
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)

    return write


def marker_of(path):
    return path.with_name("marker")


ATTACKS = {
    "system": lambda path: Attack(os.system, f"touch {marker_of(path)}"),
    "eval": lambda path: Attack(eval, f"open({str(marker_of(path))!r}, 'w')"),
    "exec": lambda path: Attack(exec, f"open({str(marker_of(path))!r}, 'w')"),
    "Popen": lambda path: Attack(subprocess.Popen, ["touch", str(marker_of(path))]),
    "open": lambda path: Attack(builtins.open, str(marker_of(path)), "w"),
    "in_list": lambda path: {**WEIGHTS, "x": [1, [Attack(os.system, f"touch {marker_of(path)}")]]},
    "in_optimizer": lambda path: {
        "model": WEIGHTS,
        "optimizer": {"state": Attack(os.system, f"touch {marker_of(path)}")},
    },
    "in_key": lambda path: {Attack(os.system, f"touch {marker_of(path)}"): 1},
    "on_build": lambda path: {"model": WEIGHTS, "x": AttackOnBuild(Attack(os.system, f"touch {marker_of(path)}"))},
    "by_getattr": lambda path: Attack(getattr, Attack(__import__, "os"), "system"),
    "partial": lambda path: Attack(__import__("functools").partial, os.system, f"touch {marker_of(path)}"),
}

MALFORMED = {
    "missing": (lambda path: None, "there is no such weights file"),
    "folder": (lambda path: path.mkdir(), "is a folder; and there is no weights file in it"),
    "pipe": (os.mkfifo, "is a device or a pipe"),
    "empty": (holding(b""), "is empty"),
    "one_byte": (holding(b"P"), "text that begins with 'P'"),
    "text": (holding("Gewichte für Swin\nmehr".encode()), "text that begins with 'Gewichte für Swin', not"),
    "html": (holding(b"<!DOCTYPE html><html><body>Sign in"), "a web page"),
    "html_later": (holding(b"\n  <html>"), "a web page"),
    "lfs": (holding(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "a Git LFS pointer.*git lfs pull"),
    "png": (holding(b"\x89PNG\r\n\x1a\n\0\0"), "a PNG image"),
    "jpeg": (holding(b"\xff\xd8\xff\xe0\0\x10JFIF"), "a JPEG image"),
    "gzip": (holding(b"\x1f\x8b\x08\0"), "compressed with gzip"),
    "numpy": (holding(b"\x93NUMPY\x01\0"), "a NumPy array"),
    "hdf5": (holding(b"\x89HDF\r\n"), "an HDF5 file"),
    "tar": (holding(b"storages".ljust(257, b"\0") + b"ustar\x0000"), "a tar archive"),
    "noise": (holding(bytes(range(129, 256)) * 9), "none of the kinds that are read"),
    "plain_pickle": (holding(__import__("pickle").dumps({"model": {}})), "a plain pickle, as detectron2's"),
    "empty_zip": (holding(b"PK\x05\x06" + bytes(18)), "an empty zip archive"),
    "zip_of_text": (lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "a"), "end is missing|did not write it"),
    "json": (holding(b'{"architectures": ["SwinModel"]}'), "is JSON, but no index of weights"),
    "json_list": (holding(b"[1, 2]"), "is JSON, but no index"),
    "json_cut": (holding(b'{"weight_map": {"a": '), "looks like JSON and is not whole"),
    "json_deep": (holding(b"[" * 100_000), "looks like JSON and is not whole"),
    "json_empty": (holding(b'{"weight_map": {}}'), "its weight_map is empty"),
    "json_list_map": (holding(b'{"weight_map": ["a"]}'), "no index of weights"),
    **{f"zip_{share}": (cut("zip", share), "Copy or download|is text") for share in (0, 0.01, 0.3, 0.7, 0.99)},
    **{
        f"stream_{share}": (cut("stream", share), "another copy|download|plain pickle|none of the kinds")
        for share in (0, 0.02, 0.99)
    },
    "stream_0.5": (cut("stream", 0.5), "damaged or cut"),
    **{f"safetensors_{share}": (cut("safetensors", share), "is cut, it has .* asks for") for share in (0.1, 0.5, 0.99)},
    "safetensors_8": (cut("safetensors", 0.03), "none of the kinds"),
    "header_no_json": (with_header(b"{'a': 1}"), "no valid safetensors file"),
    "header_list": (with_header(b"{}[]"), "no valid safetensors file"),
    "header_deep": (with_header(b'{"a":' * 50_000), "no valid safetensors file"),
    "header_type": (
        with_header({"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        "no valid safetensors file",
    ),
    "header_shape": (
        with_header({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4]}}, bytes(4)),
        "no valid safetensors file",
    ),
    "header_overlap": (
        with_header({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, bytes(4)),
        "no valid safetensors file",
    ),
    "header_offsets": (
        with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": "ab"}}),
        "no valid safetensors",
    ),
    "header_giant": (with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 10**15]}}), "asks for 10000"),
    "header_empty": (with_header({}), "holds no tensors by name"),
    "complex": (saved(lambda path: {"w": torch.ones(2, dtype=torch.complex64)}), "w is complex"),
    "complex_st": (lambda path: write_safetensors(path, {"w": torch.ones(2, dtype=torch.complex64)}), "w is complex"),
    "sparse": (saved(lambda path: {"w": torch.ones(2).to_sparse()}), "holds sparse tensors"),
    "meta": (saved(lambda path: {"w": torch.ones(2, device="meta")}), "holds meta tensors"),
    "no_tensors": (saved(lambda path: {"epoch": 3, "config": "x"}), "no tensors by name; its keys are: epoch, config"),
    "only_optimizer": (saved(lambda path: {"optimizer": {"state": {0: torch.ones(1)}}}), "its keys are: optimizer"),
    "nested_nothing": (saved(lambda path: {"model": {"state_dict": {"a": 1}}}), "its keys are: model"),
    "list": (saved(lambda path: [torch.ones(2)]), "holds a list"),
    "tensor": (saved(lambda path: torch.ones(2), new_format=False), "holds a Tensor"),
    "number": (saved(lambda path: 7), "holds a int"),
    "module": (saved(lambda path: torch.nn.Linear(2, 2)), "holds a whole pickled model"),
    "bomb": (compressed, "is compressed"),
    "no_pickle": (with_pickle(b""), "damaged or cut"),
    "deep_key": (with_pickle(b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s."), "a tuple 51 deep"),
    "doubling_key": (with_pickle(b"\x80\x02})" + b"q\x01h\x01\x86" * 40 + b"K\x01s."), "deep of [0-9]* values"),
    "deep_list": (with_pickle(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."), "holds a list"),
    "doubling_call": (with_pickle(b"\x80\x02" + b"](q\x01h\x01e" * 3 + b"])R."), "damaged"),
    "tensor_of_list": (with_pickle(b"\x80\x02ctorch\nTensor\n](K\x01K\x02e\x85R."), "would call torch.Tensor"),
    "long_name": (saved(lambda path: {"a\nb" * 9_000: 1}), "its keys are"),
    "giant_list": (with_pickle(b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R."), "builtins.bytearray"),
    "newobj": (with_pickle(b"\x80\x02csubprocess\nPopen\nX\x04\0\0\0true\x85\x81."), "would call subprocess.Popen"),
    "protocol_4": (lambda path: torch.save(WEIGHTS, path, pickle_protocol=4), "pickled with protocol 4"),
    **{
        f"attack_{name}_{'zip' if new_format else 'stream'}": (
            saved(make, new_format),
            "would call .*nothing was executed",
        )
        for name, make in ATTACKS.items()
        for new_format in (True, False)
    },
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_end_in_one_sentence_and_execute_nothing(tmp_path, name):
    write, words = MALFORMED[name]
    path = tmp_path / "strange.pth"
    write(path)
    with pytest.raises(CheckpointError, match=f"(?s)^{path}: .*({words})") as caught:
        read_weights_file(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))
    assert "weights_only" not in str(caught.value)
    assert not marker_of(path).exists()


def test_giant_made_of_one_number_is_refused(tmp_path):
    write_zip(tmp_path / "a.pth", {"w": torch.zeros(1).expand(300_000, 300_000)})
    with pytest.raises(CheckpointError, match=r"w claims shape \(300000, 300000\), 360000000000 bytes in a file of"):
        read_weights_file(tmp_path / "a.pth")


@pytest.mark.parametrize("kind", WRITERS)
def test_reading_leaves_the_file_as_it_was(tmp_path, kind):
    path = tmp_path / "a"
    WRITERS[kind](path)
    before = path.read_bytes()
    path.chmod(0o444)
    for tensor in read_weights_file(path).tensors.values():
        tensor.zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["model.safetensors", "config.json", "pytorch_model.bin"], "model.safetensors"),
        (["best.safetensors", "last.safetensors", "metrics.csv"], "best.safetensors"),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors"], "model.safetensors.index.json"),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"], "pytorch_model.bin.index.json"),
        (["epoch_12.pth", "epoch_2.pth"], "epoch_12.pth"),
    ],
)
def test_folders_are_answered_with_the_file_to_pass(tmp_path, files, named):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=f"is a folder; pass the weights file in it: {tmp_path / named}\\.$"):
        read_weights_file(tmp_path)


@pytest.mark.parametrize(
    "part",
    [
        "../a.safetensors",
        "/etc/passwd",
        "x/../../a.safetensors",
        "C:\\a.safetensors",
        "..\\a.safetensors",
        "",
        "a\0b",
        7,
        None,
    ],
)
def test_parts_outside_the_folder_are_refused(tmp_path, part):
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="outside its own folder; that is refused"):
        read_weights_file(write_parts(folder, index=part))


def test_parts_that_are_not_there_are_named(tmp_path):
    index = write_parts(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"its part model-00002-of-00002\.safetensors is not beside it\. Download all 2"
    ):
        read_weights_file(index)


def test_names_that_their_part_does_not_hold_are_named(tmp_path):
    index = write_parts(tmp_path, **{"head.bias": "model-00001-of-00002.safetensors"})
    with pytest.raises(
        CheckpointError, match=r"says that head\.bias is in model-00001-of-00002\.safetensors, which does not"
    ):
        read_weights_file(index)


def test_parts_that_are_an_index_themselves_are_refused(tmp_path):
    index = write_parts(tmp_path, index="model.safetensors.index.json")
    with pytest.raises(CheckpointError, match=r"index\.json: .*not a weights file"):
        read_weights_file(index)


def test_unreadable_files_are_refused(tmp_path, monkeypatch):
    write_zip(tmp_path / "a.pth")
    refused = PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "open", lambda *arguments, **settings: (_ for _ in ()).throw(refused))
    with pytest.raises(CheckpointError, match=r"a\.pth: cannot be read \(Permission denied\)"):
        read_weights_file(tmp_path / "a.pth")


# ---- Damage of any kind: a result or one of our errors.

CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["set", "flip", "delete", "insert", "giant", "cut"]), st.floats(0, 1), st.integers(0, 255)
    ),
    min_size=1,
    max_size=4,
)


def damaged(content, changes):
    content = bytearray(content)
    for change, place, value in changes:
        at = int(place * (len(content) - 1))
        if not content:
            break
        if change == "set":
            content[at] = value
        elif change == "flip":
            content[at] ^= 1 << value % 8
        elif change == "delete":
            del content[at : at + value % 9]
        elif change == "insert":
            content[at:at] = bytes([value]) * (value % 9)
        elif change == "giant":
            content[at : at + 4] = b"\xff\xff\xff\x7f"
        else:
            del content[at:]
    return bytes(content)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """The bytes of a small file of each kind."""
    folder = tmp_path_factory.mktemp("intact")
    content = {"model": WEIGHTS, "config": argparse.Namespace(a=[1, 2]), "epoch": 3}
    write_zip(folder / "zip", content)
    write_stream(folder / "stream", content)
    write_safetensors(folder / "safetensors", metadata={"swin_dense": '{"labels": {"names": ["a"]}}'})
    write_parts(folder).rename(folder / "index")
    return {kind: (folder / kind).read_bytes() for kind in (*WRITERS, "index")}


def read_damaged(content, changes, folder):
    path = folder / "damaged"
    path.unlink(missing_ok=True)
    path.write_bytes(damaged(content, changes))
    try:
        found = read_weights_file(path)
    except CheckpointError as error:
        assert str(error).startswith(str(folder)) and "weights_only" not in str(error)
    else:
        assert all(value.isfinite().all() in (True, False) for value in found.tensors.values())


@pytest.mark.parametrize("kind", [*WRITERS, "index"])
def test_any_damage_ends_in_a_result_or_in_our_error(kind, intact, tmp_path):
    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(changes=CHANGES)
    def run(changes):
        read_damaged(intact[kind], changes, tmp_path)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*WRITERS, "index"])
def test_much_damage_ends_in_a_result_or_in_our_error(kind, intact, tmp_path):
    @settings(max_examples=5_000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(changes=CHANGES)
    def run(changes):
        read_damaged(intact[kind], changes, tmp_path)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
def test_every_single_byte_may_be_wrong(kind, intact, tmp_path):
    length = len(intact[kind])
    for at in range(length):
        for change in ("flip", "giant", "cut"):
            read_damaged(intact[kind], [(change, at / (length - 1), at)], tmp_path)
