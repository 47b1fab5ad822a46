from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from swin_dense.classification import classifier
from swin_dense.config import SwinConfig
from swin_dense.conventions import IMAGENET_MEAN, IMAGENET_STD
from swin_dense.datasets.classification_dataset import MemoryImage
from swin_dense.datasets.classification_transforms import centre_crop
from swin_dense.datasets.drawing import draw_instances
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.semantic_transforms import semantic_inference
from swin_dense.datasets.tiles import blending_weights
from swin_dense.errors import CheckpointError, ConfigError, ImageError
from swin_dense.heads.model_file import load_model, save_model
from swin_dense.heads.sliding_window import SlidingWindow
from swin_dense.tools.classification_task import ClassificationTask
from swin_dense.tools.image_views import resized
from swin_dense.tools.predictors import (
    ClassificationPredictor,
    InstancePredictor,
    SemanticPredictor,
    load_predictor,
    recipe_and_labels,
)
from swin_dense.tools.recipe import InferenceSettings
from swin_dense.tools.semantic_task import SemanticTask
from swin_dense.tools.tasks import task_of

pytestmark = pytest.mark.usefixtures("one_thread")


def picture(size_hw, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), dtype=np.uint8)


def same(first, second):
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    arrays = ("boxes_xyxy", "labels", "scores")
    equal = all(np.array_equal(getattr(first, name), getattr(second, name)) for name in arrays)
    return equal and first.masks_rle == second.masks_rle


@pytest.fixture(params=["instance", "semantic", "classification"])
def any_run(request):
    return request.getfixturevalue(f"{request.param}_run")


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


def samples_of(run):
    """The run's predictor, its validation images as the model sees them, and what their losses compare with."""
    predictor = load_predictor(run.last_model)
    recipe, label_map = recipe_and_labels(run.last_model, load_model(run.last_model)[1])
    validation = task_of(recipe).validation_data(label_map)
    samples = []
    for index, seen, size_hw, target in predictor.images(
        validation.paths, validation.sizes_hw, 0, target_of=validation.target
    ):
        assert index == len(samples)
        samples.append((seen, size_hw, target))
    return predictor, samples


def test_prediction_is_the_same_bit_for_bit_with_losses(any_run):
    predictor, samples = samples_of(any_run)
    assert predictor.gives_losses
    for seen, size_hw, target in samples:
        prediction, losses = predictor.predict_with_losses(seen, size_hw, target)
        assert same(prediction, predictor.predict(seen, size_hw))
        assert losses and all(term.mean.isfinite() for term in losses.values())


def test_losses_are_those_of_a_training_batch_of_one_image(semantic_run, classification_run):
    for run, kind in ((semantic_run, SemanticTask), (classification_run, ClassificationTask)):
        predictor, samples = samples_of(run)
        recipe, _ = recipe_and_labels(run.last_model, load_model(run.last_model)[1])
        for seen, size_hw, target in samples:
            label = target[None] if isinstance(target, torch.Tensor) else torch.tensor([target])
            batch = SimpleNamespace(images=seen[None], labels=label)
            with torch.no_grad():
                wanted = kind(recipe).losses(predictor.model, batch, torch.device("cpu"))
            _, found = predictor.predict_with_losses(seen, size_hw, target)
            assert list(found) == list(wanted)
            for name, term in wanted.items():
                assert float(found[name].mean) == pytest.approx(float(term.mean), rel=1e-6)
                assert found[name].count == term.count


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("instance", ["inference.tile_size=64", "inference.tile_overlap=8"]),
        ("instance", ["inference.augmented=true"]),
        ("instance", ["inference.soft_nms=linear"]),
        ("semantic", ["inference.tile_size=64", "inference.tile_overlap=8"]),
        ("semantic", ["inference.augmented=true"]),
        ("semantic", ["inference.slide_crop_hw=[64,64]"]),
    ],
)
def test_parts_and_several_views_of_images_give_no_losses(task, changes, request):
    run = request.getfixturevalue(f"{task}_run")
    assert not load_predictor(run.last_model, overrides=changes).gives_losses


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


def test_classifier_refuses_tiles_and_several_views(classification_run):
    for setting in ("tile_size=500", "augmented=true"):
        name = setting.split("=")[0]
        with pytest.raises(ConfigError, match=f"inference.{name}: a classifier sees an image once and whole"):
            load_predictor(classification_run.last_model, overrides=[f"inference.{setting}"])


SMALL_VIEWS = (
    "inference.augmented=true",
    "inference.augmented_short_edges=[47, 80]",
    "inference.augmented_max_long_edge=150",
    "inference.augmented_ratios=[0.7, 1.3]",
)


def augmented(run, *changes):
    return load_predictor(run.last_model, overrides=[*SMALL_VIEWS, *changes])


def one_view(run):
    """The usual sizes, asked for as several of which there is one."""
    sizes = ("short_edges=[64]", "max_long_edge=100", "ratios=[1.0]", "flip=false")
    return augmented(run, *(f"inference.augmented_{size}" for size in sizes))


def test_one_view_is_the_usual_prediction_bit_for_bit(tiny_run, predictor):
    image = picture((61, 97))
    assert same(one_view(tiny_run)(image), predictor(image))


@pytest.fixture
def lively(randomise):
    def load(run, *overrides):
        """A model that does not say the same of every pixel, as one of four steps does."""
        predictor = load_predictor(run.last_model, overrides=overrides)
        model = randomise(predictor.model)
        if run.task == "semantic":
            with torch.no_grad():
                logits = model(torch.from_numpy(picture((61, 97))).permute(2, 0, 1)[None].float() / 255)
            model.decode_head.conv_seg.bias.data -= logits.mean(dim=(0, 2, 3))
        return predictor

    return load


def test_several_views_give_a_prediction_in_the_frame_of_the_original(tiny_run, lively, tmp_path):
    (height, width), image = (53, 97), picture((53, 97))
    before, predictor = image.copy(), lively(tiny_run, *SMALL_VIEWS)
    prediction = predictor(image)
    assert np.array_equal(image, before)
    Image.fromarray(image).save(tmp_path / "a.png")
    assert same(dict(predictor.predict_files([tmp_path / "a.png"], [None], workers=1))[0], prediction)
    assert not same(prediction, lively(tiny_run)(image))
    if isinstance(prediction, np.ndarray):
        assert prediction.shape == (height, width) and prediction.dtype == np.uint8 and prediction.max() < 10
        return
    assert len(prediction.scores) == 100 and (np.diff(prediction.scores) <= 0).all()
    assert (prediction.boxes_xyxy >= 0).all()
    assert (prediction.boxes_xyxy <= np.array([width, height, width, height])).all()
    assert prediction.masks().shape == (100, height, width)


def test_semantic_views_average_the_models_probabilities(semantic_run, lively):
    image, total = picture((61, 97)), 0
    predictor = lively(semantic_run, *SMALL_VIEWS)
    for scale in ((89, 44), (166, 83)):
        seen = resized(image, semantic_inference(scale))[None].float() / 255
        for flipped in (False, True):
            with torch.no_grad():
                logits = predictor.model(seen.flip(3) if flipped else seen)
            logits = functional.interpolate(logits, size=(61, 97), mode="bilinear", align_corners=False)
            total = total + (logits.flip(3) if flipped else logits)[0].softmax(dim=0)
    best = total.topk(2, dim=0).values
    clear = (best[0] - best[1] > 1e-4).numpy()
    labels = total.argmax(dim=0).numpy()
    assert clear.mean() > 0.9 and len(np.unique(labels)) > 2 and np.array_equal(predictor(image)[clear], labels[clear])


def test_usual_labels_are_those_of_the_logits_at_the_models_size_resized_to_the_original(semantic_run, lively):
    image = picture((61, 97))
    predictor = lively(semantic_run)
    seen = resized(image, semantic_inference((128, 64)))[None].float() / 255
    with torch.no_grad():
        logits = functional.interpolate(predictor.model(seen), size=(61, 97), mode="bilinear", align_corners=False)
    labels = predictor(image)
    assert len(np.unique(labels)) > 2 and np.array_equal(labels, logits[0].argmax(dim=0).numpy())


def test_a_window_that_holds_the_image_gives_the_usual_labels(semantic_run, lively):
    image = picture((61, 97))
    plain, large, small = (
        lively(semantic_run, f"inference.slide_crop_hw={window}")(image) for window in ("null", "[200,200]", "[40,40]")
    )
    assert np.array_equal(large, plain) and not np.array_equal(small, plain)


def test_windows_are_of_the_resized_image(semantic_run, lively):
    image = picture((61, 97))
    overrides = ["inference.slide_crop_hw=[40, 60]", "inference.slide_stride_hw=[30, 31]"]
    predictor = lively(semantic_run, *overrides)
    seen = resized(image, semantic_inference((128, 64)))[None].float() / 255
    with torch.no_grad():
        logits = SlidingWindow((40, 60), (30, 31))(seen, predictor.model)
    logits = functional.interpolate(logits, size=(61, 97), mode="bilinear", align_corners=False)[0]
    labels = predictor(image)
    assert len(np.unique(labels)) > 2 and np.array_equal(labels, logits.argmax(dim=0).numpy())


def test_soft_nms_lowers_scores(instance_run):
    image = picture((61, 97))
    hard, soft = (
        load_predictor(instance_run.last_model, overrides=[f"inference.soft_nms={method}"])(image)
        for method in ("null", "gaussian")
    )
    assert len(soft.scores) == 100 and soft.scores[0] == hard.scores[0] and (soft.scores[1:] < hard.scores[0]).all()
    assert not same(soft, hard) and (np.diff(soft.scores) <= 0).all()
    assert len(tiled(instance_run, "inference.soft_nms=gaussian")(image).scores) > 100


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
