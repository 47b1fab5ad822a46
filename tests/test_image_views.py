import numpy as np
import pytest
import torch

from swin_dense.datasets.semantic_transforms import semantic_inference
from swin_dense.datasets.transforms import instance_inference
from swin_dense.errors import ConfigError
from swin_dense.tools.image_views import instance_views, resized, semantic_views
from swin_dense.tools.recipe import InferenceSettings


def picture(size_hw):
    return np.random.default_rng(0).integers(0, 256, (*size_hw, 3), dtype=np.uint8)


def sizes_hw(views, size_hw):
    return [tuple(resized(picture(size_hw), resize).shape[1:]) for resize in views.resizings]


@pytest.mark.parametrize("views_of", [instance_views, semantic_views])
def test_there_is_one_view_unless_asked_for_more(views_of):
    views = views_of(InferenceSettings(short_edge=61, max_long_edge=97, scale=(97, 61)))
    assert views.only_resizing() is views.resizings[0] and not views.with_flipped
    assert sizes_hw(views, (30, 40)) == [(61, 81)]


@pytest.mark.parametrize("views_of", [instance_views, semantic_views])
@pytest.mark.parametrize("flip", [False, True])
def test_one_size_without_flip_is_one_view(views_of, flip):
    settings = InferenceSettings(
        augmented=True, augmented_short_edges=(61,), augmented_ratios=(1.0,), augmented_flip=flip
    )
    views = views_of(settings)
    assert views.only_resizing() is (None if flip else views.resizings[0])


def test_semantic_sizes_are_the_published_ones():
    views = semantic_views(InferenceSettings(augmented=True))
    # Short edges 256, 384, … 896 of a long image of ADE20K, 3 : 4.
    wanted = [(256, 341), (384, 512), (512, 683), (640, 853), (768, 1024), (896, 1195)]
    assert sizes_hw(views, (192, 256)) == wanted and views.with_flipped and views.only_resizing() is None


def test_instance_sizes_are_detectron2s():
    views = instance_views(InferenceSettings(augmented=True))
    assert sizes_hw(views, (60, 80)) == [(edge, round(edge * 4 / 3)) for edge in range(400, 1201, 100)]
    assert max(width for _, width in sizes_hw(views, (10, 50))) == 4000 and views.with_flipped


@pytest.mark.parametrize(
    ("views_of", "settings", "message"),
    [
        (semantic_views, {"augmented_ratios": (1.0, 0.0)}, "augmented_ratios must be one positive number or more, got"),
        (semantic_views, {"augmented_ratios": ()}, "got []"),
        (semantic_views, {"tile_size": 500}, "inference.tile_size=500 for tiles"),
        (instance_views, {"augmented_short_edges": ()}, "augmented_short_edges must hold one length or more"),
        (instance_views, {"augmented_short_edges": (0,)}, "must be whole numbers"),
        (instance_views, {"augmented_max_long_edge": 300}, "300"),
        (instance_views, {"tile_size": 500}, "inference.tile_size=500 for tiles"),
    ],
)
def test_settings_out_of_range_are_refused(views_of, settings, message):
    with pytest.raises(ConfigError) as caught:
        views_of(InferenceSettings(augmented=True, **settings))
    assert message in str(caught.value)


@pytest.mark.parametrize("resize", [instance_inference(32, 40), semantic_inference((40, 32))])
def test_resized_is_channels_first_and_in_bounds(resize):
    image = picture((37, 101))
    tensor = resized(image, resize)
    assert tensor.dtype == torch.uint8 and tensor.is_contiguous() and tensor.shape[0] == 3
    assert max(tensor.shape[1:]) == 40 and min(tensor.shape[1:]) <= 32


def test_resized_by_nothing_shares_the_pixels():
    image = picture((37, 101))
    tensor = resized(image, None)
    assert tensor.shape == (3, 37, 101) and np.shares_memory(tensor.numpy(), image)
    image.flags.writeable = False
    assert np.array_equal(resized(image, None).permute(1, 2, 0), image)
