"""What it changes to leave regions without single annotations out of the losses, beside teaching them as background.

Some objects of the generated training set become crowd regions, as where a group was not annotated one by one; the same
recipe is then trained twice from the same weights, and both models are scored on the untouched validation set. The
training reference of torchvision drops crowds when it reads COCO (references/detection/coco_utils.py), so that whatever
lies in them is background, as `ignore_overlap=null` makes it here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from swin_dense.datasets.detection_errors import FOREGROUND_IOU, DetectionErrors
from swin_dense.errors import ConfigError
from swin_dense.heads.detector_settings import COCO_IGNORE_OVERLAP
from swin_dense.tools.benchmark import spread
from swin_dense.tools.machine import machine_line
from swin_dense.tools.markdown_page import markdown_page, markdown_table, wrapped, write_markdown

if TYPE_CHECKING:
    from swin_dense.tools.instance_prediction import InstancePrediction
    from swin_dense.tools.recipe import Recipe

RECIPE_NAME = "shapes_instance"
SETTINGS = {
    "ignored": f"model.head.ignore_overlap={COCO_IGNORE_OVERLAP}",
    "background": "model.head.ignore_overlap=null",
}
SCORES = ("box AP", "box AP50", "mask AP", "recall", "precision")

Scores = dict[str, float | None]


def measure_ignored(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; returns every figure.

    Raises:
        ConfigError: A number is out of range.
    """
    from swin_dense.tools.benchmark_data import one_thread
    from swin_dense.tools.tables import print_table

    _require_fitting(arguments)
    seeds = sorted(set(arguments.seeds))
    kept = contextlib.nullcontext(arguments.runs)
    with TemporaryDirectory() if arguments.runs is None else kept as folder, one_thread():
        root = Path(folder).resolve()  # paths of a recipe start from its data
        by_seed = {str(seed): _measure_seed(root, seed, arguments.share, arguments.steps) for seed in seeds}
    figures = {
        "command": shlex.join(_command(seeds, arguments)),
        "share": arguments.share,
        "steps": arguments.steps,
        "by_seed": by_seed,
        "summary": summarise([each["scores"] for each in by_seed.values()]),
    }
    title = f"scores after {arguments.steps} steps, {arguments.share:.0%} of the training objects ignored"
    print_table(title, _seed_rows(figures))
    print_table("median over the seeds (least to most)", _summary_rows(figures))
    return figures


def _require_fitting(arguments: argparse.Namespace) -> None:
    if min(arguments.seeds) < 0:
        raise ConfigError(f"--seeds must be 0 or more each, got {arguments.seeds}.")
    if arguments.steps < 1:
        raise ConfigError(f"--steps must be at least 1, got {arguments.steps}.")
    if not 0 <= arguments.share < 1:
        raise ConfigError(f"--share must be at least 0 and below 1, got {arguments.share}.")


def _command(seeds: Sequence[int], arguments: argparse.Namespace) -> list[str]:
    numbers = ["--seeds", *map(str, seeds), "--steps", str(arguments.steps), "--share", str(arguments.share)]
    return ["swin-dense", "benchmark", "ignored", *numbers, "--document", "FILE"]


def _measure_seed(root: Path, seed: int, share: float, steps: int) -> dict[str, Any]:
    from swin_dense.datasets.shapes import write_shapes
    from swin_dense.tools.progress_bar import progress_bar
    from swin_dense.tools.run_folder import RunFolder
    from swin_dense.tools.train import train
    from swin_dense.training.checkpoint import has_state
    from swin_dense.training.metrics_file import read_metrics

    folder = root / f"seed_{seed}_share_{share}_steps_{steps}"
    with progress_bar(f"drawing data set {seed}") as show:
        paths = write_shapes(folder / "data", seed=seed, report=show)
    whole = json.loads(paths.training.annotation_file.read_text())
    content = ignore_share(whole, share, seed)
    annotation_file = folder / "instances.json"
    annotation_file.write_text(json.dumps(content))
    scores, step_time_s = {}, {}
    for name, recipe in recipes(paths.root, annotation_file, seed, steps).items():
        run = RunFolder(folder / name)
        train(recipe, run, device="cpu", resume=has_state(run.path))
        step_time_s[name] = median(row["step_time_s"] for row in read_metrics(run.metrics) if "step_time_s" in row)
        scores[name] = _score(recipe, run.last_model)
    num_crowds = sum(annotation["iscrowd"] for annotation in whole["annotations"])
    return {
        "pictures": len(whole["images"]),
        "objects": len(whole["annotations"]) - num_crowds,
        "ignored_objects": sum(annotation["iscrowd"] for annotation in content["annotations"]) - num_crowds,
        "crowds": num_crowds,
        "scores": scores,
        "step_time_s": step_time_s,
    }


def ignore_share(content: Mapping[str, Any], share: float, seed: int) -> dict[str, Any]:
    """A data set of which some objects, drawn at random, are crowd regions; the one given stays as it is.

    Args:
        content: COCO annotations with `iscrowd` and segmentations.
        share: Of the objects that are no crowds yet, in [0, 1], rounded to whole objects.
        seed: Of the choice.
    """
    sizes_hw = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    objects = [annotation["id"] for annotation in content["annotations"] if not annotation["iscrowd"]]
    chosen = set(random.Random(seed).sample(objects, round(share * len(objects))))
    annotations = [
        _as_crowd(annotation, sizes_hw[annotation["image_id"]]) if annotation["id"] in chosen else annotation
        for annotation in content["annotations"]
    ]
    return {**content, "annotations": annotations}


def _as_crowd(annotation: Mapping[str, Any], size_hw: tuple[int, int]) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        encoded = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size_hw))
        segmentation = {"size": list(size_hw), "counts": encoded["counts"].decode("ascii")}
    return {**annotation, "iscrowd": 1, "segmentation": segmentation}


def recipes(data: Path, annotation_file: Path, seed: int, steps: int) -> dict[str, Recipe]:
    """The recipe in each of `SETTINGS`; nothing else differs."""
    from swin_dense.tools.recipe import read_recipe

    overrides = [
        f"data={data}",
        f"dataset.train_annotations={annotation_file}",
        f"schedule.steps={steps}",
        f"run.seed={seed}",
        "run.evaluate_every_steps=null",
        "run.pictures=0",
    ]
    return {name: read_recipe(RECIPE_NAME, [*overrides, setting]) for name, setting in SETTINGS.items()}


def _score(recipe: Recipe, model_file: Path) -> Scores:
    from swin_dense.datasets.instance_scores import InstanceScores
    from swin_dense.tools.evaluation import evaluate
    from swin_dense.tools.instance_task import InstanceTask
    from swin_dense.tools.predictors import load_predictor
    from swin_dense.training.distributed import process_from_environment

    process = process_from_environment("cpu")
    predictor = load_predictor(model_file, process.device)
    task = InstanceTask(recipe)
    validation = task.validation_data(predictor.label_map)
    dataset = validation.dataset
    by_boxes = InstanceScores(dataset.ground_truth, dataset.label_map, kinds=("box",))

    def add(index: int, found: InstancePrediction) -> None:
        image_id = dataset.image_ids[index]
        boxes = by_boxes.coco.detections(image_id, found.boxes_xyxy, found.scores, found.labels, None)
        by_boxes.add(image_id, boxes)

    scores = evaluate(predictor, validation, process, on_prediction=add)
    assert scores is not None  # there is one process
    recall, precision = recall_and_precision(by_boxes.errors, recipe.inference.drawn_score)
    table = {**task.table(scores), "recall": recall, "precision": precision}
    return {name: table[name] for name in SCORES}


def recall_and_precision(errors: DetectionErrors, least_score: float) -> tuple[float | None, float | None]:
    """How many objects are found, and how many detections are right, at one score, all classes together.

    Args:
        errors: The detections, sorted into right ones and errors.
        least_score: Detections below it do not count.

    Returns:
        Fractions of 1; None without objects, and without detections that count.
    """
    counts = errors.counts(least_score).values()
    objects, detections, correct = (
        sum(of_class[name] for of_class in counts) for name in ("objects", "detections", "correct")
    )
    return (correct / objects if objects else None), (correct / detections if detections else None)


def summarise(scores: Sequence[Mapping[str, Scores]]) -> dict[str, dict[str, Any]]:
    """Median and range over the seeds.

    Args:
        scores: Of each seed, {setting: {score: value}}.

    Returns:
        By score, the spread of each setting and of their difference within a seed, ignored minus background, None
        where there is no value; "more" and "fewer" tell in how many seeds the difference is above and below 0.
    """
    return {name: _summary([{key: each[key][name] for key in SETTINGS} for each in scores]) for name in SCORES}


def _summary(values: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    differences = _differences([(each["ignored"], each["background"]) for each in values])
    return {
        **{setting: _spread([each[setting] for each in values]) for setting in SETTINGS},
        "difference": _spread(differences),
        "more": sum(difference > 0 for difference in differences),
        "fewer": sum(difference < 0 for difference in differences),
    }


def _differences(pairs: Sequence[tuple[float | None, float | None]]) -> list[float]:
    return [first - second for first, second in pairs if first is not None and second is not None]


def _spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    known = [value for value in values if value is not None]
    return spread(known) if known else None


def _seed_rows(figures: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    return {
        f"seed {seed}, {setting}": {name: _number(value, "") for name, value in scores.items()}
        for seed, measured in figures["by_seed"].items()
        for setting, scores in measured["scores"].items()
    }


def _summary_rows(figures: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    num_seeds = len(figures["by_seed"])
    return {
        name: {
            **{setting: _range(values[setting], "") for setting in SETTINGS},
            "difference": _range(values["difference"], "+"),
            "seeds with more": f"{values['more']} of {num_seeds}",
            "with fewer": f"{values['fewer']} of {num_seeds}",
        }
        for name, values in figures["summary"].items()
    }


def _number(value: float | None, sign: str) -> str:
    return "n/a" if value is None else f"{value:{sign}.3f}"


def _range(values: Mapping[str, Any] | None, sign: str) -> str:
    if values is None:
        return "n/a"
    middle, least, most = (_number(values[key], sign) for key in ("median", "min", "max"))
    return f"{middle} ({least} to {most})"


def write_document(path: Path, figures: Mapping[str, Any], machine: Mapping[str, str]) -> None:
    """Write the figures of `measure_ignored` as a page with its question, command and machine."""
    write_markdown(path, document(figures, machine))


def document(figures: Mapping[str, Any], machine: Mapping[str, str]) -> str:
    """That page, Markdown; every number in it is measured or a setting."""
    parts = [
        wrapped(
            "Real data have regions whose objects nobody annotated one by one. What does it change to leave them out "
            "of the losses, as this library does, rather than to teach them as background, as torchvision does, whose "
            "training reference drops crowd annotations when it reads them?"
        ),
        "This page is written by this command:",
        f"```sh\n{figures['command']}\n```",
        wrapped(f"Machine: {machine_line(machine)}"),
        wrapped(_method(figures)),
        "\n".join(f"- {name}: `{setting}`" for name, setting in SETTINGS.items()),
        wrapped(_outcome(figures)),
        markdown_table(_summary_rows(figures)),
        markdown_table(_seed_rows(figures)),
        wrapped(
            "AP is COCO's, on the untouched validation set. Recall and precision are those of what is drawn: boxes "
            f"from the recipe's `inference.drawn_score` on, right at an IoU of {FOREGROUND_IOU} with an object of "
            "their class. Medians stand before their range over the seeds; a difference is ignored minus background "
            "within one seed."
        ),
        wrapped(
            "Recall and precision belong to one score. A model that learns some objects as background should give all "
            "objects lower scores: at one score it then draws fewer, and fewer of these are wrong; another score "
            "trades one for the other. AP goes over all scores and does not depend on that choice."
        ),
    ]
    return markdown_page("Ignored regions: left out of the losses, or taught as background", parts)


def _method(figures: Mapping[str, Any]) -> str:
    measured = list(figures["by_seed"].values())
    chosen = [f"{each['ignored_objects']} of {each['objects']}" for each in measured]
    crowds = [str(each["crowds"]) for each in measured]
    step_time_s = median(seconds for each in measured for seconds in each["step_time_s"].values())
    return (
        f"For each seed, the demo's data set is drawn with {measured[0]['pictures']} training pictures. "
        f"{figures['share']:.0%} of the training objects ({', '.join(chosen)}), chosen at random, become regions with "
        f'`"iscrowd": 1`, each for itself; the crowds that the set has anyway ({", ".join(crowds)}) are such regions '
        f"too, and pictures without any object left are not trained on. The recipe `{RECIPE_NAME}` is trained twice, "
        "from the same weights and with the same order and augmentation of the pictures, for "
        f"{figures['steps']} steps on one thread ({step_time_s:.1f} seconds a step). That is short, so that the "
        "differences matter here, not the scores themselves."
    )


def _outcome(figures: Mapping[str, Any]) -> str:
    num_seeds, summary = len(figures["by_seed"]), figures["summary"]
    higher = [name for name, values in summary.items() if values["more"] == num_seeds]
    lower = [name for name, values in summary.items() if values["fewer"] == num_seeds]
    neither = [name for name in summary if name not in (*higher, *lower)]
    higher_text, lower_text, neither_text = (", ".join(names) or "nothing" for names in (higher, lower, neither))
    return (
        f"Number of seeds: {num_seeds}. Higher in each of them where regions are ignored: {higher_text}. "
        f"Lower in each: {lower_text}. Neither: {neither_text}."
    )
