"""mmdetection's and mmsegmentation's own models beside this library: their files give the same numbers here.

The packages are optional: `pip install --no-deps mmengine==0.10.7 mmcv-lite==2.1.0 mmsegmentation==1.2.2 mmdet==3.3.0`
beside this library, then what their imports still ask for by name. `pytest -m slow tests/test_openmmlab.py` runs the
tests, which are skipped where a package is missing.
"""

# mypy: disable-error-code="import-not-found"

import importlib
import importlib.util
import math
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from swin_dense.heads.foreign_files import build_recognised
from swin_dense.weights import load_weights
from swin_dense.weights.files import read_weights_file
from swin_dense.weights.loading import recognise_file
from swin_dense.weights.recognition import COMPUTED_BUFFERS, recognise
from swin_dense.weights.writing import in_format

# What those packages warn of when they are imported and called.
_FOREIGN_WARNINGS = [f"ignore::{name}Warning" for name in ("Deprecation", "Future", "Import", "User")]
pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(line) for line in _FOREIGN_WARNINGS)]

DIM, HEADS, DEPTHS, WINDOW = 12, (1, 2, 4, 8), (2, 2, 2, 2), 7
SIZES_HW = ((97, 131), (120, 89))
BATCH_HW = (128, 160)  # the larger sides, rounded up to 32
NUM_CLASSES = 5


# ---- What mmcv-lite lacks of mmcv, on torchvision's operators.


def suppress_overlapping(boxes, scores, iou_threshold, offset):
    assert offset == 0, "torchvision knows no other"
    return torch.ops.torchvision.nms(boxes, scores, iou_threshold)


def pool_aligned(
    features,
    rois,
    output,
    _argmax_y,
    _argmax_x,
    *,
    aligned_height,
    aligned_width,
    spatial_scale,
    sampling_ratio,
    pool_mode,
    aligned,
):
    assert pool_mode == 1, "torchvision averages only"
    roi_align = torch.ops.torchvision.roi_align
    output.copy_(roi_align(features, rois, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned))


def compiled_operators():
    """A module that mmcv's Python code takes for its compiled one; operators that no test needs only have a name."""
    module = types.ModuleType("mmcv._ext")
    module.nms = suppress_overlapping
    module.roi_align_forward = pool_aligned
    module.__getattr__ = lambda name: None
    return module


@dataclass(frozen=True)
class Parents:
    """Builders of small models with random weights in float64, in evaluation mode."""

    mmdet_configs: Path
    mmseg_configs: Path

    def backbone(self, library, seed=0):
        module = importlib.import_module(f"{library}.models.backbones.swin")
        return randomised(module.SwinTransformer(**swin_settings()), seed)

    def upernet(self, seed=0):
        from mmseg.registry import MODELS

        model = self._settings(self.mmseg_configs / "_base_/models/upernet_swin.py", "mmseg.SegDataPreProcessor")
        model.decode_head.update(in_channels=channels(), channels=16, num_classes=7, norm_cfg={"type": "BN"})
        model.auxiliary_head.update(in_channels=4 * DIM, channels=8, num_classes=7, norm_cfg={"type": "BN"})
        return randomised(MODELS.build(model), seed)

    def mask_rcnn(self, seed=0):
        model = self._detector_settings("mask-rcnn_r50_fpn.py")
        model.roi_head.bbox_head.update(in_channels=16, fc_out_channels=32, num_classes=NUM_CLASSES)
        return self._detector(model, seed)

    def cascade(self, shared_regression, seed=0):
        model = self._detector_settings("cascade-mask-rcnn_r50_fpn.py")
        for head in model.roi_head.bbox_head:
            head.update(
                type="ConvFCBBoxHead",
                num_shared_convs=4,
                num_shared_fcs=1,
                norm_cfg={"type": "BN"},
                in_channels=16,
                conv_out_channels=16,
                fc_out_channels=32,
                num_classes=NUM_CLASSES,
                reg_class_agnostic=shared_regression,
            )
        return self._detector(model, seed)

    def _settings(self, path, preprocessor):
        from mmengine.config import Config

        model = Config.fromfile(path).model
        model.data_preprocessor.type = preprocessor
        model.pop("pretrained", None)
        model.backbone = {"type": "SwinTransformer", **swin_settings()}
        return model

    def _detector_settings(self, file):
        model = self._settings(self.mmdet_configs / "_base_/models" / file, "mmdet.DetDataPreprocessor")
        model.neck.update(in_channels=channels(), out_channels=16)
        model.rpn_head.update(in_channels=16, feat_channels=16)
        for part in ("bbox_roi_extractor", "mask_roi_extractor"):
            model.roi_head[part].out_channels = 16
        model.roi_head.mask_head.update(in_channels=16, conv_out_channels=16, num_classes=NUM_CLASSES)
        return model

    def _detector(self, settings, seed):
        from mmdet.models import detectors  # noqa: F401 - fills the registry
        from mmdet.registry import MODELS

        model = randomised(MODELS.build(settings), seed)
        anchors = model.rpn_head.prior_generator  # float32 in any model
        anchors.scales, anchors.ratios = anchors.scales.double(), anchors.ratios.double()
        anchors.base_anchors = anchors.gen_base_anchors()
        spread_classes(model)
        return model


@pytest.fixture(scope="module")
def parents():
    for name in ("mmengine", "mmcv", "mmdet", "mmseg"):
        pytest.importorskip(name)
    import mmdet
    import mmseg

    if importlib.util.find_spec("mmcv._ext") is None:
        sys.modules["mmcv._ext"] = compiled_operators()
    return Parents(*(Path(package.__file__).parent / ".mim/configs" for package in (mmdet, mmseg)))


def swin_settings():
    return {
        "embed_dims": DIM,
        "depths": DEPTHS,
        "num_heads": HEADS,
        "window_size": WINDOW,
        "drop_path_rate": 0.0,
    }


def channels():
    return [DIM * 2**stage for stage in range(4)]


@torch.no_grad()
def randomised(model, seed):
    """No number is 0 or 1 as it is after building, and layers neither damp nor blow up what passes them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.double().named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if "table" in name:
            parameter.copy_(noise)
        elif parameter.ndim >= 2:
            parameter.copy_(noise * math.sqrt(gain_of(name) / parameter[0].numel()))
        else:
            parameter.copy_(0.2 * noise + (name.endswith("weight")))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    model.eval()  # mmdetection's backbone returns nothing here
    return model


def gain_of(name):
    """Variance of a layer's output over that of its input: scores and classes are to vary, boxes to stay boxes."""
    wanted = {"rpn_reg": 0.1, "fc_reg": 0.5, "conv_logits": 4.0, "convs": 2.0, "shared_fcs": 2.0}
    return next((gain for part, gain in wanted.items() if part in name), 1.0)


@torch.no_grad()
def spread_classes(detector):
    """Class logits get mean 0 and deviation 2 over the boxes of a batch; otherwise one class wins everywhere."""

    def spread(layer, inputs, logits):
        layer.weight.mul_(2 / logits.std(dim=0)[:, None])
        layer.bias.copy_(-(inputs[0] @ layer.weight.T).mean(dim=0))
        return layer.forward(*inputs)

    layers = [layer for name, layer in detector.roi_head.named_modules() if name.endswith("fc_cls")]
    hooks = [layer.register_forward_hook(spread) for layer in layers]
    images = random_images(*SIZES_HW, seed=2)
    samples = samples_of(images)
    maps = detector.extract_feat(padded(images))
    proposals = detector.rpn_head.predict(maps, samples)
    metas = [sample.metainfo for sample in samples]
    detector.roi_head.predict_bbox(maps, metas, proposals, detector.roi_head.test_cfg)
    for hook in hooks:
        hook.remove()


# ---- What is compared.


def own_twin(parent, tmp_path, prefix="", **meta):
    """This library's model from a file as the parent writes it, and nothing of the file left over."""
    path = tmp_path / "epoch_12.pth"
    state = {prefix + name: value for name, value in parent.state_dict().items()}
    torch.save({"meta": {"epoch": 12, **meta}, "state_dict": state, "optimizer": {}}, path)
    model = build_recognised(recognise_file(read_weights_file(path))).double()
    report = load_weights(model, path)
    assert report.missing == () and report.resized == ()
    assert all(name.endswith(COMPUTED_BUFFERS) for name in report.unused)
    return model.eval()


def without_normalisation(model):
    """Both models get numbers that are normalised already."""
    model.normalize = nn.Identity()
    return model


def random_images(*sizes_hw, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *size_hw, generator=generator, dtype=torch.float64) for size_hw in sizes_hw]


def largest_gap(got, wanted):
    assert got.shape == wanted.shape and got.isfinite().all()
    return float((got - wanted).abs().max())


def padded(images):
    batch = torch.zeros(len(images), 3, *BATCH_HW, dtype=torch.float64)
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return batch


def samples_of(images):
    from mmdet.structures import DetDataSample

    sizes_hw = [tuple(image.shape[1:]) for image in images]
    return [
        DetDataSample(metainfo={"img_shape": size_hw, "ori_shape": size_hw, "scale_factor": (1.0, 1.0)})
        for size_hw in sizes_hw
    ]


def written(model, library):
    """The tensors of this library's model in the parent's format."""
    parts = in_format(recognise(model.state_dict(), "model"), library)
    assert parts.kept == ()
    return parts.tensors


@pytest.mark.parametrize("library", ["mmdet", "mmseg"])
@torch.no_grad()
def test_backbone_equals_openmmlabs(parents, library, tmp_path):
    parent = parents.backbone(library)
    own = own_twin(parent, tmp_path, prefix="backbone.")
    images = torch.stack(random_images((97, 131), (97, 131)))
    for got, wanted in zip(own(images).values(), parent(images), strict=True):
        assert float(wanted.std()) > 0.5
        assert largest_gap(got, wanted) < 1e-9

    other = parents.backbone(library, seed=1)
    other.load_state_dict(written(own, library), strict=True)
    for got, wanted in zip(other(images), parent(images), strict=True):
        assert torch.equal(got, wanted)


@torch.no_grad()
def test_upernet_equals_mmsegmentations(parents, tmp_path):
    parent = parents.upernet()
    own = without_normalisation(own_twin(parent, tmp_path, dataset_meta={"classes": tuple("abcdefg")}))
    images = torch.stack(random_images((97, 131), (97, 131)))
    metas = [{"img_shape": (97, 131), "ori_shape": (97, 131)}] * 2
    wanted = parent.encode_decode(images, metas)
    assert len(wanted.argmax(dim=1).unique()) >= 3
    assert largest_gap(own(images), wanted) < 1e-9
    auxiliary = own.auxiliary_head(own.backbone(images)["c4"])
    assert largest_gap(auxiliary, parent.auxiliary_head(parent.extract_feat(images))) < 1e-9

    other = parents.upernet(seed=1)
    other.load_state_dict(written(own, "mmseg"), strict=True)
    assert torch.equal(other.encode_decode(images, metas), wanted)


def detector_of(parents, kind, seed=0):
    if kind == "mask_rcnn":
        return parents.mask_rcnn(seed)
    return parents.cascade(shared_regression=kind == "cascade_shared_regression", seed=seed)


def paste_in_float32(monkeypatch):
    """mmdetection's pasting takes nothing else, though the rest of it runs in float64."""
    from mmdet.models.roi_heads.mask_heads import fcn_mask_head

    paste = fcn_mask_head._do_paste_mask

    def paste_float64(masks, boxes, *sizes, **options):
        return paste(masks.float(), boxes.float(), *sizes, **options)

    monkeypatch.setattr(fcn_mask_head, "_do_paste_mask", paste_float64)


@pytest.mark.parametrize("kind", ["mask_rcnn", "cascade", "cascade_shared_regression"])
@torch.no_grad()
def test_detector_equals_mmdetections(parents, kind, tmp_path, monkeypatch):
    paste_in_float32(monkeypatch)
    parent = detector_of(parents, kind)
    own = without_normalisation(own_twin(parent, tmp_path, dataset_meta={"classes": tuple("abcde")}))
    images = random_images(*SIZES_HW)
    batch, samples = padded(images), samples_of(images)

    own_batch, levels = own.pyramid(images)
    own_proposals, _ = own.rpn(own_batch, levels, None)
    for got, wanted in zip(own_proposals, parent.rpn_head.predict(parent.extract_feat(batch), samples), strict=True):
        assert len(wanted) > 100
        assert largest_gap(got, wanted.bboxes) < 1e-6

    for got, sample in zip(own(images), parent.predict(batch, samples), strict=True):
        wanted = sample.pred_instances
        assert len(wanted) > 20 and len(wanted.labels.unique()) >= 3
        assert torch.equal(got["labels"], wanted.labels)
        assert largest_gap(got["boxes"], wanted.bboxes) < 1e-6
        assert largest_gap(got["scores"], wanted.scores) < 1e-9
        assert 0.01 < float(wanted.masks.double().mean()) < 0.9
        assert float(((got["masks"][:, 0] >= 0.5) != wanted.masks).double().mean()) < 1e-5

    other = detector_of(parents, kind, seed=1)
    other.load_state_dict(written(own, "mmdet"), strict=True)
    for got, wanted in zip(other.predict(batch, samples_of(images)), parent.predict(batch, samples), strict=True):
        for field in ("bboxes", "labels", "scores", "masks"):
            assert torch.equal(got.pred_instances[field], wanted.pred_instances[field])
