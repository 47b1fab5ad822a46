import pytest
import torch

from swin_dense.config import SwinConfig
from swin_dense.errors import ConfigError
from swin_dense.heads import upernet
from swin_dense.tools.segmenter_peers import hugging_face_twin, smp_twin

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=3, window_rule="timm")


@pytest.fixture(scope="module")
def segmenter(randomise):
    torch.manual_seed(0)
    return randomise(upernet(CONFIG, 5, channels=12, auxiliary_channels=6)).eval()


def num_parameters(model):
    return sum(value.numel() for value in model.parameters())


def test_twin_of_smp_lacks_the_auxiliary_head_only(segmenter):
    twin = smp_twin(segmenter, (96, 128)).eval()
    assert num_parameters(segmenter) - num_parameters(twin) == num_parameters(segmenter.auxiliary_head)
    images = torch.rand(1, 3, 96, 128)
    with torch.no_grad():
        got = twin.segmentation_head[0](twin.decoder(twin.encoder(images)))
        wanted = segmenter.decode_head(list(segmenter.backbone(images).values()))
    assert float((got - wanted).norm() / wanted.norm()) < 1e-4  # the norms of the maps have another epsilon


def test_twin_of_smp_wants_a_size_that_timm_takes(segmenter):
    with pytest.raises(ConfigError, match="choose at least 96 pixels a side"):
        smp_twin(segmenter, (96, 64))


def test_twin_of_hugging_face_has_both_heads_and_the_loss(segmenter, randomise):
    pytest.importorskip("transformers")
    dense = randomise(
        upernet(SwinConfig(**{**vars(CONFIG), "window_rule": "dense"}), 5, channels=12, auxiliary_channels=6)
    )
    dense = dense.eval()
    twin = hugging_face_twin(dense).eval()
    final_norm = 2 * 64  # which nothing reads
    assert num_parameters(twin) == num_parameters(dense) + final_norm
    images, labels = torch.rand(2, 3, 97, 131), torch.randint(0, 5, (2, 97, 131))
    with torch.no_grad():
        got = twin(dense.normalize(images), labels=labels)
        wanted = sum(dense(images, labels).values())
        assert float((got.logits - dense(images)).abs().max()) < 1e-4
    assert float(got.loss) == pytest.approx(float(wanted), rel=1e-5)
