"""A recipe: every number of a training run, in one readable YAML file. Needs no torch.

A recipe is found by its name in `tools/recipes` or by its path; `key=value` on the command line changes single values;
the resolved recipe is saved with the run and inside the trained model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from swin_dense.errors import ConfigError, DataError
from swin_dense.typed_values import build, did_you_mean, override, plain

RECIPE_FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """Where files lie, if not where `data` suggests, and what the classes are.

    Attributes:
        format: Classification only: "class_folders" is a folder of pictures for each class, "cifar10" is CIFAR-10 as it
            is distributed.
        train_images: Folder of training images, for classification of class folders; null finds it under `data`.
        train_annotations: Instance: COCO JSON; semantic: folder of label pictures.
        val_images: As `train_images`.
        val_annotations: As `train_annotations`.
        classes: Semantic only: "ade20k", a file with one name per line, the names, or how many; value i of a label
            picture is class i, counted from `first_value`.
        first_value: Semantic only: the value of the first class in the label pictures.
        ignored_values: Semantic only: values that mean "no label" (255 always does, unless it is a class).
    """

    format: Literal["class_folders", "cifar10"] = "class_folders"
    train_images: str | None = None
    train_annotations: str | None = None
    val_images: str | None = None
    val_annotations: str | None = None
    classes: str | int | tuple[str, ...] | None = None
    first_value: int = 0
    ignored_values: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What is trained.

    Attributes:
        variant: A published Swin variant.
        detector: Instance: which detector; the other tasks have one model each.
        backbone: Fields of `SwinConfig` that differ from the variant.
        head: Arguments of the detector or of `upernet` that differ from their defaults; a classifier has none.
        weights: A file to start the backbone or the whole model from, or a name of published weights such as
            imagenet1k; null starts from random weights.
    """

    variant: str = "swin_t"
    detector: Literal["mask_rcnn", "cascade_mask_rcnn"] = "mask_rcnn"
    backbone: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class AugmentationSettings:
    """How training images are changed. Lengths in pixels.

    Attributes:
        flip_probability: Of mirroring.
        short_edges: Instance: lengths that the short edge is drawn from.
        max_long_edge: Instance: cap of the long edge.
        crop_branch: Instance: crop before resizing half of the images.
        jitter_size: Instance: large-scale jitter to a square of this side, in place of `short_edges`,
            `max_long_edge` and `crop_branch`; null does without.
        jitter_range: Instance: the image is scaled to fit the square times a number from this range.
        copy_paste_probability: Instance: of pasting objects of another image into an image; needs `jitter_size`.
        scale: Semantic: (long, short) edge bounds.
        ratio_range: Semantic: both bounds are multiplied by a number from this range.
        crop_size_hw: Semantic, classification: the size trained on.
        max_category_ratio: Semantic: a crop is drawn again while one class covers this share.
        photometric: Semantic, classification: also distort the colours.
        area_range: Classification: a share of the image's area from this range is cut out and resized.
        aspect_range: Classification: width over height of what is cut out.
        padding: Classification: for images of `crop_size_hw`; instead of cutting out a share, the image is moved by up
            to so many pixels; null cuts.
        mixup_alpha: Classification: blend pairs of images, by shares from the beta distribution; 0 never does.
        cutmix_alpha: Classification: cut a box of one image into another, likewise.
        tile_size: Instance, semantic: train on a random tile of this side of each image, cut out before everything
            else, so that the other lengths are those of the tile; null takes whole images.
        tile_least_share: Instance: an object of which less than this share of its box remains in the tile takes no
            part, neither as an object nor as background.
    """

    flip_probability: float = 0.5
    short_edges: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    max_long_edge: int = 1333
    crop_branch: bool = False
    jitter_size: int | None = None
    jitter_range: tuple[float, float] = (0.1, 2.0)
    copy_paste_probability: float = 0.0
    scale: tuple[int, int] = (2048, 512)
    ratio_range: tuple[float, float] = (0.5, 2.0)
    crop_size_hw: tuple[int, int] = (512, 512)
    max_category_ratio: float = 0.75
    photometric: bool = True
    area_range: tuple[float, float] = (0.08, 1.0)
    aspect_range: tuple[float, float] = (0.75, 4 / 3)
    padding: int | None = None
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    tile_size: int | None = None
    tile_least_share: float = 0.5


@dataclass(frozen=True, kw_only=True)
class InferenceSettings:
    """How images are resized or cut in evaluation and prediction, and what is drawn. Lengths in pixels.

    Attributes:
        short_edge: Instance: length of the short edge.
        max_long_edge: Instance: cap of the long edge.
        drawn_score: Instance: pictures show the objects from this score on; results hold all of them.
        scale: Semantic: (long, short) edge bounds.
        crop_size_hw: Classification: cut out of the middle after resizing to 256/224 of it; images of this size stay.
        tile_size: Instance, semantic: images are predicted in overlapping tiles of this side, whose results are merged,
            for images of any size; null predicts them whole.
        tile_overlap: Neighbouring tiles overlap by at least this much; objects up to it are whole in one of them.
        tile_scale: The model sees a tile this many times as large. It replaces `short_edge`, `max_long_edge` and
            `scale`, which are for whole images: 1 leaves every image, small or large, at its own pixels.
        max_detections: Instance, with tiles: the most objects of one image, best first; null keeps all. The model's own
            limit holds for each tile.
        soft_nms: Instance: boxes that overlap lower each other's scores instead of removing each other, as published
            for HTC++; null is the suppression that the model was built with.
        slide_crop_hw: Semantic: the model sees the resized image in windows of this size, and the logits of windows
            that overlap are averaged (mmsegmentation's "slide"); null shows it whole, as in the published Swin models.
        slide_stride_hw: From one window to the next; null is two thirds of the window, as BEiT and ConvNeXt have it:
            341 of 512, 426 of 640.
        augmented: Instance, semantic: see each image in several sizes, as the other `augmented_` values say, and put
            the results together: class probabilities are averaged, boxes suppress each other, masks are averaged.
        augmented_short_edges: Instance: in place of `short_edge`; detectron2's, as nobody published those of Swin.
        augmented_max_long_edge: Instance: in place of `max_long_edge`; detectron2's.
        augmented_ratios: Semantic: `scale` times each of these; the published ones.
        augmented_flip: See each size flipped as well.
    """

    short_edge: int = 800
    max_long_edge: int = 1333
    drawn_score: float = 0.5
    scale: tuple[int, int] = (2048, 512)
    crop_size_hw: tuple[int, int] = (224, 224)
    tile_size: int | None = None
    tile_overlap: int = 128
    tile_scale: float = 1.0
    max_detections: int | None = None
    soft_nms: Literal["linear", "gaussian"] | None = None
    slide_crop_hw: tuple[int, int] | None = None
    slide_stride_hw: tuple[int, int] | None = None
    augmented: bool = False
    augmented_short_edges: tuple[int, ...] = (400, 500, 600, 700, 800, 900, 1000, 1100, 1200)
    augmented_max_long_edge: int = 4000
    augmented_ratios: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    augmented_flip: bool = True


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW, and what one step is.

    Attributes:
        learning_rate: For steps of `reference_batch_size` images.
        reference_batch_size: The learning rate follows `batch_size` in proportion, as in the official ImageNet training
            with AdamW; null takes it as it is. Lengths in steps, such as the warm-up's, stay.
        layer_decay: Each block of the backbone learns at this many times the rate of the next one; 1 for all alike.
        average_decay: Evaluate and keep an exponential moving average of the weights with this decay; null does
            without.
        weight_decay: Not applied to LayerNorms, relative position biases and position embeddings.
        batch_size: Images of one step, over all processes and micro-batches.
        micro_batch_size: Images that one process handles at once; null is its whole share of the step.
        max_gradient_norm: Longer gradients are shortened to it; null leaves them.
        precision: "auto" is bfloat16 on a GPU and float32 on a CPU.
    """

    learning_rate: float = 1e-4
    reference_batch_size: int | None = None
    layer_decay: float = 1.0
    average_decay: float | None = None
    weight_decay: float = 0.05
    batch_size: int = 16
    micro_batch_size: int | None = None
    max_gradient_norm: float | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def scaled_learning_rate(self) -> float:
        """The learning rate for steps of `batch_size` images."""
        if self.reference_batch_size is None:
            return self.learning_rate
        return self.learning_rate * (self.batch_size / self.reference_batch_size)


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """How long, and how the learning rate goes.

    Attributes:
        epochs: Passes over the data; give this or `steps`.
        steps: Updates; give this or `epochs`.
        decay: "step" multiplies by 0.1 at each milestone, "poly" and "cosine" fall to `minimum_factor`.
        milestones: Of "step", in the unit that the length is given in.
        power: Of "poly"; 1 is a straight line.
        minimum_factor: Of "poly" and "cosine": the last learning rate over the first.
        warmup_steps: Steps of linear warm-up, whatever the batch.
        warmup_start: The learning rate of the first step over the full one.
    """

    epochs: int | None = None
    steps: int | None = None
    decay: Literal["step", "poly", "cosine"] = "step"
    milestones: tuple[int, ...] = ()
    power: float = 1.0
    minimum_factor: float = 0.0
    warmup_steps: int = 500
    warmup_start: float = 0.001


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything around the steps.

    Attributes:
        seed: Of weights, order and augmentation.
        workers: Processes that load data, for each training process; null chooses.
        log_every_steps: A row of metrics.csv.
        checkpoint_every_steps: At most so many steps are lost.
        evaluate_every_steps: Validation; null only at the end.
        validation_losses: Also compute the losses of the validation images, from the pass that predicts them; not where
            the model sees tiles, windows or several views.
        pictures: Validation images drawn with ground truth beside prediction.
        shard_model: Cut weights, gradients and the optimiser's state into one piece for each process: less memory for
            more exchange. A step that runs out of memory then ends the run, and one whose loss is not finite is skipped
            without a diagnosis.
        max_skipped_steps: So many steps in a row may have a loss or gradient that is not finite; they are skipped. One
            more ends the run.
        max_unreadable_images: So many training images may turn out to be unreadable; the next one stands in for each.
            One more ends the run.
        tensorboard: Also write the numbers of metrics.csv for TensorBoard, into `tensorboard/` of the run's folder.
        loading_timeout_s: A batch that the workers do not bring in so many seconds is loaded anew; 0 waits for ever.
    """

    seed: int = 0
    workers: int | None = None
    log_every_steps: int = 50
    checkpoint_every_steps: int = 1000
    evaluate_every_steps: int | None = None
    validation_losses: bool = True
    pictures: int = 8
    max_skipped_steps: int = 10
    shard_model: bool = False
    max_unreadable_images: int = 10
    tensorboard: bool = False
    loading_timeout_s: int = 600


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every number of a training run.

    Attributes:
        task: "instance" trains a detector on COCO-format data, "semantic" trains UPerNet on label pictures,
            "classification" trains a classifier on pictures of one class each.
        data: The data set's folder; relative paths of `dataset` start from it.
    """

    task: Literal["instance", "semantic", "classification"]
    data: str | None = None
    dataset: DatasetSettings = field(default_factory=DatasetSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    augmentation: AugmentationSettings = field(default_factory=AugmentationSettings)
    inference: InferenceSettings = field(default_factory=InferenceSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        if (self.schedule.epochs is None) == (self.schedule.steps is None):
            raise ConfigError("recipe: give either schedule.epochs or schedule.steps, and set the other to null.")
        for name in ("workers", "pictures", "max_skipped_steps", "max_unreadable_images", "loading_timeout_s"):
            value = getattr(self.run, name)
            if value is not None and value < 0:
                raise ConfigError(f"recipe: run.{name} must be 0 or more, got {value}.")
        for name, count in (
            ("schedule.epochs", self.schedule.epochs),
            ("schedule.steps", self.schedule.steps),
            ("optimizer.batch_size", self.optimizer.batch_size),
            ("optimizer.micro_batch_size", self.optimizer.micro_batch_size),
        ):
            if count is not None and count < 1:
                raise ConfigError(f"recipe: {name} must be 1 or more, got {count}.")
        reference = self.optimizer.reference_batch_size
        if reference is not None and reference < 1:
            raise ConfigError(f"recipe: optimizer.reference_batch_size must be 1 or more, or null, got {reference}.")
        if self.augmentation.copy_paste_probability and self.augmentation.jitter_size is None:
            raise ConfigError(
                "recipe: augmentation.copy_paste_probability needs images of one size; "
                "give augmentation.jitter_size too, for example 1024."
            )

    def with_absolute_data(self) -> Recipe:
        """The same with the data folder's full path, so that a model finds its data from wherever it is evaluated.

        Raises:
            DataError: There is no such folder.
        """
        if self.data is None:
            return self
        if not Path(self.data).is_dir():
            raise DataError(f"data={self.data}: there is no such folder; pass the folder of the data set.")
        return replace(self, data=str(Path(self.data).resolve()))

    def to_dict(self) -> dict[str, Any]:
        """As nested plain types, for YAML and JSON."""
        return plain(self)

    def to_yaml(self) -> str:
        """As a file that `read_recipe` reads back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


def read_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply "key=value" overrides.

    Args:
        name_or_path: The name of a file in `tools/recipes`, or the path of a YAML file.
        overrides: Assignments such as "optimizer.batch_size=8".

    Raises:
        ConfigError: There is no such recipe, it is not YAML, or a key or value is wrong.
    """
    path = find_recipe(name_or_path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe holds keys and values, got {type(values).__name__}.")
    return recipe_from(values, overrides, str(path))


def recipe_from(values: Mapping[str, Any], overrides: Sequence[str], where: str) -> Recipe:
    """A recipe from plain values, such as those inside a trained model, with overrides.

    Args:
        values: As `Recipe.to_dict` gives them.
        overrides: Assignments such as "data=/data/coco".
        where: What to call the source in messages.

    Raises:
        ConfigError: A key or value is wrong.
    """
    changed: dict[str, Any] = plain(values)
    for assignment in overrides:
        if "=" not in assignment and Path(assignment).is_dir():
            raise ConfigError(f"command line: {assignment!r} is not key=value; did you mean data={assignment}?")
        override(changed, assignment, Recipe)
    return build(Recipe, changed, where)


def changed_values(before: Mapping[str, Any], after: Recipe) -> list[str]:
    """What differs between two recipes, one sentence without a full stop for each value.

    Args:
        before: As `Recipe.to_dict` gave it, perhaps by another version of this library.
        after: The recipe of now.
    """
    old, new = _leaves(before), _leaves(after.to_dict())
    return [
        f"{key} is {new.get(key)!r}, no longer {old.get(key)!r}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        leaves |= _leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return leaves


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe.

    Raises:
        ConfigError: There is none; the nearest name is suggested.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"there is no recipe file {path}.")
        return path
    names = recipe_names()
    if name_or_path not in names:
        raise ConfigError(f"there is no recipe {name_or_path!r}{did_you_mean(name_or_path, names)}")
    return RECIPE_FOLDER / f"{name_or_path}.yaml"


def recipe_names() -> list[str]:
    """The recipes that come with the library."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))
