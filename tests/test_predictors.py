import numpy as np
import pytest
import torch
from PIL import Image

from swin_dense.classification import classifier
from swin_dense.config import SwinConfig
from swin_dense.conventions import IMAGENET_MEAN, IMAGENET_STD
from swin_dense.datasets.classification_dataset import MemoryImage
from swin_dense.datasets.drawing import draw_instances
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.tiles import blending_weights
from swin_dense.datasets.transforms import centre_crop, instance_inference, semantic_inference
from swin_dense.errors import CheckpointError, ConfigError, ImageError
from swin_dense.heads.model_file import load_model, save_model
from swin_dense.tools.predictors import (
    ClassificationPredictor,
    InstancePredictor,
    SemanticPredictor,
    load_predictor,
    recipe_and_labels,
    resized,
)
from swin_dense.tools.recipe import InferenceSettings

pytestmark = pytest.mark.usefixtures("one_thread")


def picture(size_hw, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), dtype=np.uint8)


def same(first, second):
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    arrays = ("boxes_xyxy", "labels", "scores")
    equal = all(np.array_equal(getattr(first, name), getattr(second, name)) for name in arrays)
    return equal and first.masks_rle == second.masks_rle


@pytest.fixture
def predictor(tiny_run):
    return load_predictor(tiny_run.last_model)


def test_prediction_is_in_the_frame_of_the_original(predictor):
    height, width = size_hw = (53, 97)
    image = picture(size_hw)
    before = image.copy()
    prediction = predictor(image)
    assert np.array_equal(image, before)
    if isinstance(predictor, SemanticPredictor):
        assert prediction.shape == size_hw and prediction.dtype == np.uint8 and prediction.max() < 10
        return
    assert len(prediction.scores) > 0 and prediction.boxes_xyxy.dtype == np.float32
    assert (prediction.boxes_xyxy >= 0).all()
    assert (prediction.boxes_xyxy <= np.array([width, height, width, height]) + 1e-3).all()
    assert (np.diff(prediction.scores) <= 0).all()
    assert set(prediction.labels) <= set(range(6)) and prediction.labels.dtype == np.int64
    assert prediction.masks().shape == (len(prediction.scores), *size_hw)


def test_prediction_is_the_same_again_and_beside_others(predictor, tmp_path):
    images = [picture(size_hw, seed) for seed, size_hw in enumerate([(61, 67), (97, 53), (64, 64)])]
    paths = [tmp_path / f"{index}.png" for index in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray(image).save(path)
    alone = [predictor(image) for image in images]
    together = dict(predictor.predict_files(paths, [None] * 3))
    assert list(together) == [0, 1, 2]
    assert all(same(together[index], alone[index]) for index in range(3))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_prediction_is_the_same_with_workers(predictor, tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for seed, path in enumerate(paths):
        Image.fromarray(picture((61, 67), seed)).save(path)
    without, with_workers = (dict(predictor.predict_files(paths, [None] * 2, workers)) for workers in (0, 1))
    assert all(same(without[index], with_workers[index]) for index in range(2))


def test_stated_size_must_fit(predictor, tmp_path):
    Image.fromarray(picture((61, 67))).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="61"):
        list(predictor.predict_files([tmp_path / "a.png"], [(60, 67)]))


def test_picture_draws_over_a_copy(predictor):
    image = picture((61, 67))
    before = image.copy()
    drawn = predictor.picture(image, predictor(image))
    assert np.array_equal(image, before)
    assert drawn.dtype == np.uint8 and drawn.shape[0] >= 61 and drawn.shape[1] >= 67


def test_picture_holds_only_objects_from_the_drawn_score_on(instance_run):
    predictor = load_predictor(instance_run.last_model, overrides=["inference.drawn_score=1.0"])
    image = picture((61, 67))
    bare = draw_instances(image, np.zeros((0, 4), np.float32), [], None)
    assert np.array_equal(predictor.picture(image, predictor(image)), bare)


def test_overrides_reach_the_predictor(instance_run):
    predictor = load_predictor(instance_run.last_model, overrides=["inference.drawn_score=0.25"])
    assert isinstance(predictor, InstancePredictor) and predictor.drawn_score == 0.25
    with pytest.raises(ConfigError, match=r"did you mean 'inference\.drawn_score'"):
        load_predictor(instance_run.last_model, overrides=["inference.drawn_scor=1"])


def test_model_is_in_evaluation_mode(predictor):
    assert not any(module.training for module in predictor.model.modules())


def test_model_that_train_did_not_write_is_refused(instance_run, tmp_path):
    model, about = load_model(instance_run.last_model)
    for key in ("recipe", "labels"):
        path = tmp_path / f"without_{key}.safetensors"
        save_model(path, model, {name: about[name] for name in ("recipe", "labels") if name != key})
        with pytest.raises(CheckpointError, match=f"a model without {key}; use a file that swin-dense train wrote"):
            load_predictor(path)
    recipe, labels = recipe_and_labels("x", about, ["run.seed=3"])
    assert recipe.run.seed == 3 and labels.names == tuple(about["labels"]["names"])


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


TILES = ("inference.tile_size=60", "inference.tile_overlap=16")


def tiled(run, *changes):
    return load_predictor(run.last_model, overrides=[*TILES, *changes])


def one_tile(run):
    return load_predictor(run.last_model, overrides=["inference.tile_size=500"])


def at_own_pixels(run, size_hw):
    """The usual predictor, told to leave an image of this size as it is."""
    short, long = sorted(size_hw)
    if run.task == "semantic":
        return load_predictor(run.last_model, overrides=[f"inference.scale=[{long},{short}]"])
    return load_predictor(
        run.last_model, overrides=[f"inference.short_edge={short}", f"inference.max_long_edge={long}"]
    )


def test_one_tile_equals_the_whole_image_bit_for_bit(tiny_run):
    image = picture((61, 97))
    first, second = one_tile(tiny_run)(image), at_own_pixels(tiny_run, (61, 97))(image)
    assert same(first, second)
    assert isinstance(first, np.ndarray) or len(first.scores) > 0


def test_tiles_give_a_prediction_like_that_of_the_whole(tiny_run):
    image = picture((61, 97))
    before = image.copy()
    prediction = tiled(tiny_run)(image)
    assert np.array_equal(image, before)
    if isinstance(prediction, np.ndarray):
        assert prediction.shape == (61, 97) and prediction.dtype == np.uint8 and prediction.max() < 10
        return
    assert len(prediction.scores) > 100 and (np.diff(prediction.scores) <= 0).all()  # the model's limit is of a tile
    assert (prediction.boxes_xyxy >= 0).all() and (prediction.boxes_xyxy <= np.array([97, 61, 97, 61])).all()
    assert prediction.masks().shape == (len(prediction.scores), 61, 97)
    assert prediction.boxes_xyxy[:, 0].max() > 50 and prediction.boxes_xyxy[:, 1].max() > 25
    fewer = tiled(tiny_run, "inference.max_detections=3")(image)
    assert same(fewer, prediction.select(np.arange(3)))


def test_semantic_tiles_blend_the_models_scores(semantic_run):
    predictor = tiled(semantic_run)
    image = picture((61, 97))
    total = np.zeros((10, 61, 97))
    grid = predictor.tiling.grid((61, 97))
    rows = zip(grid.tops, blending_weights(grid.tops, 60), strict=True)
    columns = list(zip(grid.lefts, blending_weights(grid.lefts, 60), strict=True))
    for top, row_weights in rows:
        for left, column_weights in columns:
            tile = torch.from_numpy(image[top : top + 60, left : left + 60]).permute(2, 0, 1)
            with torch.no_grad():
                scores = predictor.model(tile[None].float() / 255)[0].numpy()
            total[:, top : top + 60, left : left + 60] += scores * np.outer(row_weights, column_weights)
    assert np.array_equal(predictor(image), total.argmax(axis=0))


def test_tiled_files_are_predicted_like_images(tiny_run, tmp_path):
    predictor = tiled(tiny_run)
    images = [picture(size_hw, seed) for seed, size_hw in enumerate([(61, 67), (97, 53)])]
    paths = [tmp_path / f"{index}.png" for index in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray(image).save(path)
    together = dict(predictor.predict_files(paths, [None] * 2, workers=2))
    assert list(together) == [0, 1] and all(same(together[index], predictor(images[index])) for index in range(2))


def test_pictures_of_large_tiled_images_are_reduced(tiny_run, monkeypatch):
    monkeypatch.setattr("swin_dense.tools.large_pictures.LONGEST_SIDE", 50)
    image = picture((61, 97))
    predictor = tiled(tiny_run)
    assert predictor.picture(image, predictor(image)).shape[1] == 48


def test_classifier_refuses_tiles(classification_run):
    with pytest.raises(ConfigError, match="a classifier sees an image as a whole"):
        load_predictor(classification_run.last_model, overrides=["inference.tile_size=500"])


def test_class_probabilities_are_the_models_for_the_cropped_normalised_image(classification_run):
    predictor = load_predictor(classification_run.last_model)
    assert isinstance(predictor, ClassificationPredictor)
    image = picture((41, 67))
    probabilities = predictor(image)
    crop = torch.from_numpy(centre_crop(image, (16, 16))).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        wanted = predictor.model(((crop - mean) / std)[None])[0].softmax(dim=0)
    assert probabilities.dtype == np.float32 and probabilities.sum() == pytest.approx(1)
    assert np.abs(probabilities - wanted.numpy()).max() < 1e-6
    assert predictor.picture(image, probabilities).shape[1] >= 67


def test_pictures_in_memory_are_predicted_like_files(classification_run, tmp_path):
    predictor = load_predictor(classification_run.last_model)
    image = picture((41, 67))
    Image.fromarray(image).save(tmp_path / "a.png")
    sources = [tmp_path / "a.png", MemoryImage("a", image)]
    first, second = dict(predictor.predict_files(sources, [None] * 2)).values()
    assert np.array_equal(first, second) and np.array_equal(first, predictor(image))


def test_classifier_of_other_channels_is_refused():
    model = classifier(SwinConfig(embed_dim=8, depths=(1,), num_heads=(1,), out_features=("c2",)), 2, in_channels=4)
    with pytest.raises(ConfigError, match="needed for 4 channels"):
        ClassificationPredictor(model, LabelMap(("a", "b"), (0, 1)), InferenceSettings(), torch.device("cpu"))
