import io
import os
import pickle
import subprocess

import pytest
import torch

from swin_dense.errors import CheckpointError
from swin_dense.weights.foreign_objects import ForeignMapping, ForeignObject, ForeignSequence
from swin_dense.weights.pickle_scan import scan_pickle


class Calls:
    def __init__(self, function, *arguments):
        self.parts = (function, arguments)

    def __reduce__(self):
        return self.parts


def scan(content):
    return scan_pickle(io.BytesIO(content), "a.pth")


def test_scan_ends_behind_its_pickle():
    file = io.BytesIO(pickle.dumps(7, 2) + pickle.dumps("text", 2) + b"rest")
    scan_pickle(file, "a")
    assert file.tell() == len(pickle.dumps(7, 2))
    scan_pickle(file, "a")
    assert file.read() == b"rest"


def test_scan_finds_the_bytes_of_every_storage_once(tmp_path):
    path = tmp_path / "a.pth"
    shared = torch.ones(6)
    tensors = [shared, shared[2:], shared.view(2, 3).T, torch.ones(5, dtype=torch.bfloat16), torch.ones(0)]
    torch.save({str(index): tensor for index, tensor in enumerate(tensors)}, path)
    reader = torch._C.PyTorchFileReader(str(path))
    assert scan(reader.get_record("data.pkl")).storage_bytes == {"0": 24, "1": 10, "2": 0}


@pytest.mark.parametrize("function", [os.system, eval, exec, subprocess.Popen, open, pickle.loads, torch.load])
@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("nest", [lambda x: x, lambda x: [x], lambda x: {"model": {"w": (1, x)}}, lambda x: {x: 1}])
def test_calls_of_anything_unknown_are_refused_by_name(function, protocol, nest):
    with pytest.raises(CheckpointError, match=rf"a\.pth: opening it would call [\w.]*\.{function.__name__}, which"):
        scan(pickle.dumps(nest(Calls(function, "1")), protocol))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02csubprocess\nPopen\n)\x81.",
        b"\x80\x02csubprocess\nPopen\n.",
        b"\x80\x02}cposix\nsystem\nb.",
        b"\x80\x02c__builtin__\nexec\n.",
        b"\x80\x02ccommands\ngetoutput\n.",
    ],
)
def test_names_are_refused_wherever_they_stand(content):
    with pytest.raises(CheckpointError, match="nothing was executed"):
        scan(content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged or cut"),
        (b"\x80", "damaged or cut"),
        (b"\x80\x02", "damaged or cut"),
        (b"\x80\x02}", "damaged or cut"),
        (b"\x80\x02.", "damaged or cut"),
        (b"\x80\x02h\x07.", "damaged or cut"),
        (b"\x80\x02t.", "damaged or cut"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged or cut"),
        (b"\x80\x02X\x07\x00\x00\x00storageQ.", "damaged or cut"),
        (b"\x80\x02)Q.", "damaged or cut"),
        (b"\x80\x04N.", "pickled with protocol 4; torch reads up to 3"),
        (b"I7\n.", "the pickle instruction INT"),
        (b"\x80\x02N0.", "the pickle instruction POP"),
        (b"\x80\x02\x82\x01.", "the pickle instruction EXT1"),
        (b"\x80\x02ctorch._utils\n_rebuild_qtensor\n.", "holds quantised tensors"),
        (b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n.", "holds sparse tensors"),
        (b"\x80\x02ctorch.nn.modules.linear\nLinear\n.", "holds a whole pickled model"),
        (b"\x80\x02ctorch.distributed.tensor\nDTensor\n.", "distributed tensors"),
        (b"\x80\x02)" + b"\x85" * 1_000 + b".", "a tuple 51 deep of 50 values"),
        (b"\x80\x02ctorch\nTensor\n\x8a\x05\0\0\0\0\x01\x85R.", "would call torch.Tensor"),
        (b"\x80\x02ctorch\nFloatStorage\nK\x01\x85R.", "would call FloatStorage"),
        (b"\x80\x02]](K\x01K\x02etR.", "damaged or cut"),
        (
            b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(ctorch\nTensor\nNNNtR.",
            "would call torch.Tensor",
        ),
    ],
    ids=lambda value: value.decode("latin1").encode("unicode_escape").decode()[:40] if isinstance(value, bytes) else "",
)
def test_damaged_and_strange_pickles_are_refused(content, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        scan(content)
    assert str(caught.value).startswith("a.pth: ") and "\n" not in str(caught.value)


def test_use_decides_the_kind_of_stand_in():
    found = scan(
        b"\x80\x02]("
        b"cyacs.config\nCfgNode\n)\x81U\x01aK\x01s"
        b"caddict\nDict\n)\x81(U\x01aK\x01u"
        b"cmmdet.core\nItems\n)\x81K\x01a"
        b"ccollections\ndeque\n)R(K\x01K\x02e"
        b"cargparse\nNamespace\n)\x81}b"
        b"e."
    )
    assert found.foreign == {
        "yacs.config.CfgNode": ForeignMapping,
        "addict.Dict": ForeignMapping,
        "mmdet.core.Items": ForeignSequence,
        "collections.deque": ForeignSequence,
        "argparse.Namespace": ForeignObject,
    }
