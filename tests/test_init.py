import importlib
import json
import subprocess
import sys

import pytest

import swin_dense

HEAVY = ("torch", "torchvision", "numpy", "pycocotools", "albumentations", "cv2", "PIL", "safetensors", "timm", "rich")


def loaded_after(statement):
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout))


def test_import_is_light():
    assert not loaded_after("import swin_dense") & set(HEAVY)


def test_config_and_errors_are_usable_without_torch():
    statement = (
        "import swin_dense\nassert swin_dense.variant_config('swin_t').embed_dim == 96\n"
        "assert swin_dense.FeatureSpec(3, 4).stride == 4\nassert swin_dense.ConfigError"
    )
    assert not loaded_after(statement) & set(HEAVY)


def test_backbone_needs_no_torchvision():
    loaded = loaded_after("import swin_dense\nswin_dense.create_backbone")
    assert "torch" in loaded
    assert not loaded & {"torchvision", "pycocotools", "albumentations", "cv2", "PIL"}


def test_every_public_name_resolves_to_what_its_module_holds():
    for name in swin_dense.__all__:
        value = getattr(swin_dense, name)
        home = getattr(value, "__module__", None)
        if home is not None and home.startswith("swin_dense"):
            assert getattr(importlib.import_module(home), name) is value
    assert sorted(swin_dense.__all__) == sorted(set(swin_dense.__all__))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'swin_dense' has no attribute 'swin_tiny'"):
        swin_dense.swin_tiny  # noqa: B018
    assert not hasattr(swin_dense, "SwinTransformerV9")
