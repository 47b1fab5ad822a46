import argparse
import collections
import datetime
import decimal
import pathlib
import sys
import types
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from swin_dense.weights.files import read_weights_file
from swin_dense.weights.foreign_objects import (
    ForeignMapping,
    ForeignObject,
    ForeignSequence,
    is_harmless,
    libraries_of,
)

WEIGHTS = {"patch_embed.proj.weight": torch.arange(12.0).reshape(2, 3, 2, 1), "norm.bias": torch.ones(5)}


@contextmanager
def foreign_class(full_name, base=object, **members):
    """A class of a library that is not installed; the library is there only while a file is written."""
    module, _, name = full_name.rpartition(".")
    parts = module.split(".")
    added = [".".join(parts[: end + 1]) for end in range(len(parts)) if ".".join(parts[: end + 1]) not in sys.modules]
    sys.modules.update({part: types.ModuleType(part) for part in added})
    kind = type(name, (base,), {"__module__": module, "__qualname__": name, **members})
    setattr(sys.modules[module], name, kind)
    try:
        yield kind
    finally:
        delattr(sys.modules[module], name)
        for part in added:
            del sys.modules[part]


def filled_mapping(kind):
    made = kind(a=1, b=[2, {"c": "text"}])
    made["inner"] = kind(d=None)
    made.__dict__["frozen"] = True
    return made


def plain_object(kind):
    made = kind()
    made.values = [1.5, np.float64(2)]
    made.inner = kind()
    return made


def read_back(path, content, **settings):
    torch.save({"model": WEIGHTS, **content}, path, **settings)
    return path


def assert_weights_are_read(path, libraries):
    found = read_weights_file(path)
    assert found.wrapper == "model"
    assert found.tensors.keys() == WEIGHTS.keys()
    assert all(torch.equal(value, WEIGHTS[name]) for name, value in found.tensors.items())
    assert found.notes == ((f"objects of other libraries not read: {libraries}",) if libraries else ())
    assert not {"yacs", "mmengine", "mmcv", "omegaconf", "detectron2"} & sys.modules.keys()


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "stream"])
@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize(
    ("full_name", "base", "make"),
    [
        # Under "config" in the official Swin files; https://github.com/microsoft/Swin-Transformer, utils.py.
        ("yacs.config.CfgNode", dict, filled_mapping),
        ("fvcore.common.config.CfgNode", dict, filled_mapping),
        ("detectron2.config.config.CfgNode", dict, filled_mapping),
        ("mmengine.config.config.ConfigDict", dict, filled_mapping),
        ("mmcv.utils.config.ConfigDict", dict, filled_mapping),
        ("easydict.EasyDict", dict, filled_mapping),
        ("addict.addict.Dict", dict, filled_mapping),
        ("pytorch_lightning.utilities.parsing.AttributeDict", dict, filled_mapping),
        ("omegaconf.dictconfig.DictConfig", object, plain_object),
        ("timm.scheduler.cosine_lr.CosineLRScheduler", object, plain_object),
        ("torchvision.transforms.functional.InterpolationMode", object, plain_object),
        ("mmdet.core.Anything", list, lambda kind: kind([1, 2, 3])),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_beside_objects_of_libraries_that_are_not_installed_are_read(
    tmp_path, full_name, base, make, protocol, new_format
):
    path = tmp_path / "weights.pth"
    settings = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": new_format}
    with foreign_class(full_name, base) as kind:
        content = make(kind)
        if protocol == 3 and base is object:
            content.values.pop()  # numpy's bytes are an instruction of protocol 3 that torch does not know
        read_back(path, {"config": content}, **settings)
    libraries = {full_name.partition(".")[0]} | ({"numpy"} if base is object and protocol == 2 else set())
    assert_weights_are_read(path, ", ".join(sorted(libraries)))


def test_history_of_mmengine_with_its_own_methods_is_passed_over(tmp_path):
    # Its __getstate__ adds a table of its methods, which protocol 2 pickles as calls of getattr.
    members = {
        "mean": lambda self: 0.0,
        "__getstate__": lambda self: {**self.__dict__, "statistics_methods": {"mean": type(self).mean}},
    }
    name = "mmengine.logging.history_buffer.HistoryBuffer"
    members["mean"].__module__, members["mean"].__qualname__ = name.rpartition(".")[0], "HistoryBuffer.mean"
    with foreign_class(name, **members) as kind:
        buffer = plain_object(kind)
        buffer._log_history = np.arange(3.0)
        del buffer.inner
        path = read_back(tmp_path / "epoch_12.pth", {"message_hub": {"log_scalars": {"train/loss": buffer}}})
    assert_weights_are_read(path, "mmengine, numpy, standard library")


def test_state_that_is_no_dictionary_is_passed_over(tmp_path):
    members = {"__getstate__": lambda self: ({"a": 1}, "file.py", "text"), "__setstate__": lambda self, state: None}
    with foreign_class("mmengine.config.config.Config", **members) as kind:
        path = read_back(tmp_path / "a.pth", {"cfg": kind()})
    assert_weights_are_read(path, "mmengine")


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "stream"])
def test_plain_values_of_numpy_and_the_standard_library_are_passed_over(tmp_path, new_format):
    content = {
        "scalar": np.float64(0.5),
        "flag": np.bool_(True),
        "array": np.arange(6).reshape(2, 3),
        "texts": np.array(["a", "b"]),
        "type": np.dtype("float32"),
        "old_state": np.random.RandomState(1).get_state(),
        "generator": np.random.default_rng(1),
        "arguments": argparse.Namespace(lr=1e-4, nested=argparse.Namespace(path=pathlib.PurePosixPath("/a/b"))),
        "simple": types.SimpleNamespace(a=1),
        "counts": collections.defaultdict(list, {"a": [1]}),
        "last": collections.deque([1, 2], maxlen=3),
        "layers": collections.ChainMap({"a": 1}),
        "set": {1, 2},
        "frozen": frozenset([1]),
        "range": range(3),
        "when": datetime.datetime(2021, 3, 25, tzinfo=datetime.UTC),
        "duration": datetime.timedelta(seconds=3),
        "exact": decimal.Decimal("0.1"),
        "bytes": b"\x00\xff",
        "big": 2**70,
        "torch": [torch.__version__, torch.float16, torch.Size([2]), torch.device("cuda:0")],
    }
    path = read_back(tmp_path / "a.pth", content, _use_new_zipfile_serialization=new_format)
    assert_weights_are_read(path, "numpy, standard library, torch")


def test_old_names_of_numpy_are_passed_over(tmp_path):
    pickled = torch.serialization.io.BytesIO()
    torch.save({"model": WEIGHTS, "best": np.float64(0.5)}, pickled, _use_new_zipfile_serialization=False)
    path = tmp_path / "old.pth"
    path.write_bytes(pickled.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert b"numpy.core" in path.read_bytes()
    assert_weights_are_read(path, "numpy")


def test_optimiser_and_schedule_are_passed_over_as_states_and_as_objects(tmp_path):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    states = {"optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict()}
    assert_weights_are_read(read_back(tmp_path / "states.pth", states), "")
    objects = {"optimizer": optimizer, "lr_scheduler": schedule}
    assert_weights_are_read(read_back(tmp_path / "objects.pth", objects), "standard library, torch")


def test_stand_ins_forget_everything():
    foreign = ForeignObject(1, "a")
    foreign.__setstate__({"secret": 1})
    assert vars(foreign) == {}
    assert ForeignMapping({"a": 1}) == {} and type(ForeignMapping()) is collections.OrderedDict
    assert ForeignSequence([1]) == []


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "posix.system",
        "nt.system",
        "subprocess.Popen",
        "builtins.eval",
        "builtins.exec",
        "builtins.__import__",
        "builtins.open",
        "builtins.compile",
        "importlib.import_module",
        "functools.partial",
        "operator.attrgetter",
        "shutil.rmtree",
        "socket.socket",
        "runpy.run_path",
        "pickle.loads",
        "torch.load",
        "torch.hub.load",
        "torch.storage._load_from_bytes",
        "torch.jit._script.unpackage_script_module",
        "numpy.load",
        "numpy.testing._private.utils.runstring",
        "numpy.f2py.diagnose.run",
        "timm.create_model",
        "mmengine.config.config.read_base",
        "yacs.config._decode_cfg_value",
        "yacsy.config.CfgNode",
        "yacs",
        "CfgNode",
        "collections.namedtuple",
        "pathlib",
        "",
    ],
)
def test_functions_and_unknown_libraries_have_no_stand_in(name):
    assert not is_harmless(name)


def test_libraries_of_names_each_once():
    assert libraries_of(["yacs.config.CfgNode", "numpy.dtype", "numpy.ndarray", "argparse.Namespace"]) == (
        "numpy",
        "standard library",
        "yacs",
    )
