import dataclasses

import pytest
import torch

from swin_dense.config import SwinConfig
from swin_dense.errors import ConfigError
from swin_dense.swin import SwinTransformer
from swin_dense.tools.backbone_peers import BACKBONE_PEERS, one_window, require_timm_size
from swin_dense.tools.benchmark_contest import spread_weights

pytestmark = pytest.mark.usefixtures("one_thread")

# Maps of 24 x 40 to 3 x 5 cells: windows divide none of their sides but the last ones, where one fits.
SIZE_HW = (96, 160)
CONFIG = SwinConfig(embed_dim=8, depths=(2, 2, 1, 2), num_heads=(1, 2, 2, 4), window_size=3, drop_path_rate=0.0)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    backbone = SwinTransformer(CONFIG).eval()
    spread_weights(backbone, torch.Generator().manual_seed(1))
    return backbone


def with_rule(backbone, rule):
    changed = SwinTransformer(dataclasses.replace(CONFIG, window_rule=rule)).eval()
    changed.load_state_dict(backbone.state_dict())
    return changed


def largest_difference(maps, others):
    assert list(maps) == list(others)
    return max(float((maps[name] - others[name]).abs().max()) for name in maps)


@pytest.mark.parametrize("name", BACKBONE_PEERS)
def test_peer_computes_what_ours_does_with_its_window_rule(name, backbone):
    pytest.importorskip({"huggingface": "transformers"}.get(name, name))
    peer = BACKBONE_PEERS[name].build(backbone, SIZE_HW).eval()
    images = torch.randn(2, 3, *SIZE_HW, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        maps = peer(images)
        assert largest_difference(maps, with_rule(backbone, BACKBONE_PEERS[name].window_rule)(images)) < 1e-5
        differs = largest_difference(maps, backbone(images)) > 1e-2
    assert differs == (name != "huggingface")


@pytest.mark.parametrize("name", BACKBONE_PEERS)
def test_peer_has_as_many_parameters_of_its_own(name, backbone):
    pytest.importorskip({"huggingface": "transformers"}.get(name, name))
    peer = BACKBONE_PEERS[name].build(backbone, SIZE_HW)
    own = {parameter.data_ptr() for parameter in backbone.parameters()}
    assert not any(parameter.data_ptr() in own for parameter in peer.parameters())
    counts = [sum(value.numel() for value in model.parameters()) for model in (backbone, peer)]
    # Hugging Face keeps a final norm, which nothing reads.
    assert counts[1] - counts[0] == (2 * 64 if name == "huggingface" else 0)


def test_sizes_that_timm_has_another_network_for_are_refused():
    with pytest.raises(ConfigError, match="timm takes multiples of 4 pixels, got --size 96 158"):
        require_timm_size(CONFIG, (96, 158))
    with pytest.raises(ConfigError, match=r"--size 64 96; choose at least 96 pixels a side, or other --peers\."):
        require_timm_size(CONFIG, (64, 96))
    require_timm_size(CONFIG, (68, 96))  # a last map of 3 x 3 cells, after padding


def test_one_window_is_that_of_every_stage():
    assert one_window(CONFIG) == one_window(dataclasses.replace(CONFIG, window_size=(3, 3, 3, 3))) == 3
    for other in ({"version": 2}, {"window_size": (3, 3, 3, 2)}):
        with pytest.raises(ConfigError, match="peers are compared for Swin V1; choose such a --variant"):
            one_window(dataclasses.replace(CONFIG, **other))
