"""Convert annotations between the formats in use, so that one data set can feed both heads."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swin_dense.errors import ConfigError, DataError

if TYPE_CHECKING:
    from swin_dense.datasets.convert_findings import Findings
    from swin_dense.datasets.convert_labels import ConvertedLabel
    from swin_dense.datasets.convert_objects import ConvertedImage
    from swin_dense.datasets.convert_outputs import SplitCounts
    from swin_dense.datasets.labels import LabelMap

    Report = Callable[[int, int], None]
    Converted = tuple[LabelMap, Iterator[ConvertedImage] | Iterator[ConvertedLabel]]

HELP = "Convert masks, palettes, LabelMe or YOLO files to what train reads, and COCO objects to label pictures."
EXAMPLE = """  swin-dense convert ped/masks --from masks --images ped/images --classes person --out coco --held-out 0.2
  swin-dense convert voc/labels --from palette --palette labelmap.txt --images voc/images --out voc_labels
  swin-dense convert instances_val.json --from coco --to labels --images val2017 --out labels --split val
  swin-dense convert labelme --from labelme --out coco
  swin-dense convert yolo/labels --from yolo --images yolo/images --classes yolo/data.yaml --out coco

Images are linked, or copied with --copy-images. OUT must be new or empty, or hold the other split of the same
conversion: run once with --split train and once with --split val, or let --held-out make both. Nothing is replaced,
the source is only read, and where anything in it is wrong all of it is told and nothing is written."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("source", metavar="SOURCE", type=Path, help="folder of masks, label pictures, JSON or text files; or COCO JSON")
    add("--from", dest="source_format", required=True, choices=_FORMATS, help="what SOURCE is")
    add("--to", choices=("coco", "labels"), help="coco (objects) or labels (classes); follows from --from")
    add("--out", required=True, type=Path, metavar="OUT", help="a new folder")
    add("--images", type=Path, metavar="DIR", help="folder of the images; labelme finds them from its files")
    add("--split", choices=("train", "val"), default="train", help="what the images are for; default: train")
    add("--held-out", type=float, default=0.0, metavar="SHARE", help="put this share into val, such as 0.2")
    add("--copy-images", action="store_true", help="copy the images; default: relative links to them")
    add("--json", type=Path, metavar="FILE", help="write the counts, or the faults")
    add("--classes", nargs="+", metavar="NAME", help="class names, or a text file with one a line, or YOLO's data.yaml")

    masks = parser.add_argument_group("from masks")
    masks.add_argument(
        "--instances",
        choices=("values", "components"),
        help="values number the objects of one class (default), or values are classes whose components are objects",
    )
    masks.add_argument("--first-value", type=int, metavar="N", help="of components: the first class; default: 1")
    masks.add_argument(
        "--ignored-values", type=int, nargs="*", metavar="N", help="values beside 0 that are no objects; often 255"
    )
    masks.add_argument("--label-suffix", metavar="TEXT", help="what names have after the image's, such as _mask")

    palette = parser.add_argument_group("from palette")
    palette.add_argument(
        "--palette", type=Path, metavar="FILE", help='lines "red green blue name", or CVAT\'s labelmap'
    )
    palette.add_argument("--ignored-names", nargs="+", metavar="NAME", help="names whose pixels become 255")
    palette.add_argument("--unknown", choices=("error", "ignore"), help="other colours: an error (default), or 255")

    coco = parser.add_argument_group("from coco")
    coco.add_argument("--values", choices=("order", "ids"), help="categories counted in order (default), or their ids")
    coco.add_argument(
        "--uncovered",
        choices=("background", "ignore"),
        help="pixels without an object: class 0 (default), or 255",
    )
    coco.add_argument(
        "--crowds", choices=("ignore", "background", "class"), help="crowd regions: 255 (default), or as named"
    )
    coco.add_argument(
        "--order",
        choices=("area", "file"),
        help="on top is the smaller object (default), or the later one in the file",
    )

    labelme = parser.add_argument_group("from labelme")
    labelme.add_argument(
        "--skip-unsupported",
        action="store_const",
        const=True,
        help="leave out points, lines and stored masks, counted; otherwise they are faults",
    )
    yolo = parser.add_argument_group("from yolo")
    yolo.add_argument(
        "--boxes-as-masks",
        action="store_const",
        const=True,
        help="a box without polygon is its object's mask; otherwise a fault",
    )


def run(arguments: argparse.Namespace) -> int:
    """Convert and print what was written."""
    from swin_dense.datasets.convert_findings import Findings
    from swin_dense.tools.tables import write_json

    _require_options(arguments)
    findings = Findings()
    try:
        label_map, counts = _convert(arguments, findings)
    except DataError:
        if findings.faults:
            write_json(arguments.json, {"faults": findings.faults})
        raise
    _print(arguments, label_map, counts, findings)
    write_json(arguments.json, _summary(arguments, label_map, counts, findings))
    return 0


def _require_options(arguments: argparse.Namespace) -> None:
    name, chosen = arguments.source_format, _FORMATS[arguments.source_format]
    if arguments.to not in (None, chosen.target):
        raise ConfigError(f"there is no conversion from {name} to {arguments.to}, only to {chosen.target}.")
    for option in {option for each in _FORMATS.values() for option in each.options} - set(chosen.options):
        if getattr(arguments, option) is not None:
            owners = " or ".join(owner for owner, each in _FORMATS.items() if option in each.options)
            raise ConfigError(f"{_flag(option)} belongs to --from {owners}, not to {name}.")
    for option in chosen.needed:
        if getattr(arguments, option) is None:
            raise ConfigError(f"--from {name} needs {_flag(option)}; see swin-dense convert --help.")
    if arguments.first_value is not None and arguments.instances != "components":
        raise ConfigError("--first-value belongs to --instances components.")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _convert(arguments: argparse.Namespace, findings: Findings) -> tuple[LabelMap, dict[str, SplitCounts]]:
    from swin_dense.datasets.convert_outputs import (
        Splits,
        new_output,
        require_content,
        write_coco,
        write_labels,
        write_record,
    )
    from swin_dense.tools.progress_bar import progress_bar

    splits = Splits(arguments.split, arguments.held_out)
    chosen = _FORMATS[arguments.source_format]
    target = chosen.target
    write: Any = {"coco": write_coco, "labels": write_labels}[target]
    with new_output(arguments.out, splits, target) as staging, progress_bar("converting") as show:
        label_map, converted = chosen.read(arguments, findings, show)
        counts = write(staging, arguments.out, converted, label_map, splits, copy_images=arguments.copy_images)
        findings.require_none(arguments.source)
        require_content(counts, "an object" if target == "coco" else "a pixel of a class")
        write_record(staging, arguments.out, arguments.source_format, target, label_map.names, counts)
    return label_map, counts


def _from_masks(arguments: argparse.Namespace, findings: Findings, show: Report) -> Converted:
    from swin_dense.datasets.convert_masks import ComponentInstances, NumberedInstances, component_labels, read_masks
    from swin_dense.datasets.labels import LabelMap

    names = _class_names(arguments.classes)
    ignored = None if arguments.ignored_values is None else tuple(arguments.ignored_values)
    read_objects: NumberedInstances | ComponentInstances
    if arguments.instances == "components":
        first_value = 1 if arguments.first_value is None else arguments.first_value
        label_map = component_labels(names, first_value, ignored)
        read_objects = ComponentInstances(label_map)
    else:
        if len(names) > 1:
            raise ConfigError(
                f"masks that number their objects do not say classes; got {len(names)} names. Give one name, or pass "
                f"--instances components if the values are classes."
            )
        label_map = LabelMap(names, (1,))
        read_objects = NumberedInstances(ignored)
    suffix = arguments.label_suffix or ""
    return label_map, read_masks(arguments.images, arguments.source, read_objects, findings, suffix, show)


def _from_coco(arguments: argparse.Namespace, findings: Findings, show: Report) -> Converted:
    from swin_dense.datasets.convert_labels import DrawingRule, drawing_rule, read_coco_labels

    given = {name: getattr(arguments, name) for name in ("values", "uncovered", "crowds", "order")}

    def make_rule(categories: LabelMap) -> DrawingRule:
        return drawing_rule(categories, **{name: value for name, value in given.items() if value is not None})

    return read_coco_labels(arguments.source, arguments.images, make_rule, findings, show)


def _from_palette(arguments: argparse.Namespace, findings: Findings, show: Report) -> Converted:
    from swin_dense.datasets.convert_palette import read_palette, read_palette_labels

    palette = read_palette(arguments.palette, tuple(arguments.ignored_names or ()))
    labels = read_palette_labels(
        arguments.images,
        arguments.source,
        palette,
        findings,
        ignore_unknown=arguments.unknown == "ignore",
        label_suffix=arguments.label_suffix or "",
        report=show,
    )
    return palette.label_map, labels


def _from_labelme(arguments: argparse.Namespace, findings: Findings, show: Report) -> Converted:
    from swin_dense.datasets.convert_labelme import labelme_classes, labelme_images, read_labelme_folder

    files = read_labelme_folder(
        arguments.source,
        arguments.images,
        findings,
        skip_unsupported=bool(arguments.skip_unsupported),
        report=show,
    )
    if not files:
        findings.require_none(arguments.source)
    label_map = labelme_classes(files, None if arguments.classes is None else _class_names(arguments.classes))
    return label_map, labelme_images(files, label_map, findings)


def _from_yolo(arguments: argparse.Namespace, findings: Findings, show: Report) -> Converted:
    from swin_dense.datasets.convert_yolo import read_yolo, yolo_classes

    label_map = yolo_classes(_class_names(arguments.classes))
    images = read_yolo(
        arguments.images,
        arguments.source,
        len(label_map),
        findings,
        boxes_as_masks=bool(arguments.boxes_as_masks),
        report=show,
    )
    return label_map, images


@dataclass(frozen=True)
class _Format:
    target: str
    read: Callable[[argparse.Namespace, Findings, Report], Converted]
    needed: tuple[str, ...]
    options: tuple[str, ...]


_FORMATS = {
    "masks": _Format(
        "coco",
        _from_masks,
        ("images", "classes"),
        ("classes", "instances", "first_value", "ignored_values", "label_suffix"),
    ),
    "coco": _Format("labels", _from_coco, ("images",), ("values", "uncovered", "crowds", "order")),
    "palette": _Format(
        "labels", _from_palette, ("images", "palette"), ("palette", "ignored_names", "unknown", "label_suffix")
    ),
    "labelme": _Format("coco", _from_labelme, (), ("classes", "skip_unsupported")),
    "yolo": _Format("coco", _from_yolo, ("images", "classes"), ("classes", "boxes_as_masks")),
}


def _class_names(words: list[str]) -> tuple[str, ...]:
    """The names on the command line, or those in the file that it names."""
    from swin_dense.datasets.class_names import read_class_names
    from swin_dense.datasets.convert_yolo import read_data_yaml

    path = Path(words[0])
    if len(words) > 1:
        return tuple(words)
    if path.suffix.lower() in (".yaml", ".yml"):
        return read_data_yaml(path)
    if path.suffix.lower() in (".txt", ".csv", ".names") or path.is_file():
        return read_class_names(path)
    return tuple(words)


def _print(
    arguments: argparse.Namespace, label_map: LabelMap, counts: Mapping[str, SplitCounts], findings: Findings
) -> None:
    from swin_dense.tools.tables import print_table

    to_coco = _FORMATS[arguments.source_format].target == "coco"
    unit, empty = ("objects", "images_without_objects") if to_coco else ("pixels", "images_all_ignored")
    rows = {
        split: {
            "images": count.images,
            empty: count.empty_images,
            unit: sum(count.classes[name] for name in label_map.names),
        }
        for split, count in counts.items()
    }
    print_table(f"{arguments.source} converted to {arguments.out}", rows)
    names = list(next(iter(counts.values())).classes)
    by_class = {name: {split: count.classes[name] for split, count in counts.items()} for name in names}
    print_table(f"{unit} by class", by_class)
    if findings.notes:
        print_table("notes", dict(findings.notes))
    print(_next_command(arguments, label_map))


def _next_command(arguments: argparse.Namespace, label_map: LabelMap) -> str:
    from swin_dense.datasets.convert_outputs import CLASS_FILE, read_record

    record = read_record(arguments.out) or {"splits": {}}
    missing = [split for split in ("train", "val") if split not in record["splits"]]
    if missing:
        return f"next: the same for the {missing[0]} images, with --split {missing[0]} and --out {arguments.out}"
    data = shlex.quote(f"data={arguments.out}")
    if record["to"] == "coco":
        return f"next: swin-dense train mask_rcnn_swin_t_1x {data}"
    classes = f"dataset.classes={CLASS_FILE} dataset.first_value={label_map.raw_ids[0]} 'dataset.ignored_values=[]'"
    return f"next: swin-dense train upernet_swin_t_160k {data} {classes}"


def _summary(
    arguments: argparse.Namespace, label_map: LabelMap, counts: Mapping[str, SplitCounts], findings: Findings
) -> dict[str, Any]:
    return {
        "from": arguments.source_format,
        "to": _FORMATS[arguments.source_format].target,
        "out": str(arguments.out),
        "label_map": label_map.to_dict(),
        "splits": {
            split: {"images": count.images, "empty_images": count.empty_images, "classes": dict(count.classes)}
            for split, count in counts.items()
        },
        "notes": dict(findings.notes),
    }


if __name__ == "__main__":
    from swin_dense.tools.main import main

    sys.exit(main(["convert", *sys.argv[1:]]))
