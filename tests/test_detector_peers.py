import pytest
import torch
from torch import nn

from swin_dense.config import SwinConfig
from swin_dense.heads import mask_rcnn
from swin_dense.tools.backbone_peers import torchvision_backbone
from swin_dense.tools.detector_peers import torchvision_twin

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=3)
WIDTHS = {"fpn_channels": 8, "box_head_channels": 16, "mask_head_channels": 8, "max_proposals": 31}


@pytest.fixture(scope="module")
def detector(randomise):
    torch.manual_seed(0)
    return randomise(mask_rcnn(CONFIG, 3, style="torchvision", score_threshold=0.0, max_detections=9, **WIDTHS)).eval()


def test_twin_detects_what_ours_in_its_style_does(detector):
    twin = torchvision_twin(detector, torchvision_backbone(detector.backbone, (128, 160))).eval()
    images = [torch.rand(3, 128, 160), torch.rand(3, 96, 131)]
    with torch.no_grad():
        for got, wanted in zip(twin(images), detector(images), strict=True):
            assert len(wanted["scores"]) == 9
            assert torch.equal(got["labels"] - 1, wanted["labels"])
            for name in ("boxes", "scores", "masks"):
                assert got[name].shape == wanted[name].shape
                assert float((got[name] - wanted[name]).abs().max()) < 1e-3


def test_twin_takes_images_as_they_are(detector):
    twin = torchvision_twin(detector, torchvision_backbone(detector.backbone, (128, 160)))
    image = torch.rand(3, 97, 131)
    for training in (True, False):
        batch, _ = twin.train(training).transform([image], None)
        assert batch.image_sizes == [(97, 131)] and batch.tensors.shape == (1, 3, 128, 160)
        assert torch.allclose(batch.tensors[0, :, :97, :131], detector.normalize(image))


def test_any_backbone_may_be_the_body(detector):
    class Zeros(nn.Module):
        def forward(self, images):
            sizes = [[-(-side // (4 * 2**stage)) for side in images.shape[2:]] for stage in range(4)]
            return {f"c{stage + 2}": torch.zeros(len(images), 8 * 2**stage, *size) for stage, size in enumerate(sizes)}

    with torch.no_grad():
        found = torchvision_twin(detector, Zeros()).eval()([torch.rand(3, 64, 64)])
    assert len(found) == 1 and found[0]["boxes"].shape[1] == 4
