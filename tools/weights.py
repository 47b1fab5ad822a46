"""Say what is in a weights file of any family, and write it in another family's format."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swin_dense.weights.files import WeightsFile
    from swin_dense.weights.recognition import Recognised
    from swin_dense.weights.report import WeightsReport

HELP = "Say what a weights file of any family holds and what of it loads; convert it into another family's format."
EXAMPLE = """  swin-dense weights swin_tiny_patch4_window7_224.pth
  swin-dense weights mask_rcnn_swin_t.pth --to torchvision --out mask_rcnn_swin_t.safetensors
  swin-dense weights swinv2_tiny.safetensors --window-size 8 --json receipt.json"""

_FORMATS = ("official", "mmdet", "mmseg", "torchvision", "timm", "huggingface", "detectron2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("file", metavar="FILE", help="a .pth, .pt, .bin or .safetensors file, or a sharded one's index")
    parser.add_argument("--to", choices=_FORMATS, metavar="FORMAT", help=f"write it as {', '.join(_FORMATS)} do")
    parser.add_argument(
        "--out", type=Path, metavar="OUT", help="where to, with --to: a .safetensors, .pth, .pt or .bin file"
    )
    parser.add_argument(
        "--window-size",
        type=int,
        nargs="+",
        metavar="N",
        help="the window of a Swin V2, or one per stage, where the file does not tell it",
    )
    parser.add_argument(
        "--pretrained-window-size",
        type=int,
        nargs="+",
        metavar="N",
        help="with it, the window of its first training, or one per stage, where that was another",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the receipt for programs")


def run(arguments: argparse.Namespace) -> int:
    """Print the receipt; with --to, write the file."""
    from swin_dense.errors import ConfigError
    from swin_dense.tools.tables import write_json
    from swin_dense.weights.files import read_weights_file
    from swin_dense.weights.loading import recognise_file, require_backbone

    if (arguments.to is None) != (arguments.out is None):
        raise ConfigError("--to FORMAT and --out FILE belong together.")
    _require_different_files(arguments)
    file = read_weights_file(arguments.file)
    found = recognise_file(file)
    require_backbone(found)
    found = _with_windows(found, arguments.window_size, arguments.pretrained_window_size)
    report = _load(found, file)
    _print_receipt(found, report)
    write_json(arguments.json, _as_json(found, report))
    if arguments.to is not None:
        _write(found, file, arguments.to, arguments.out)
    return 0


def _require_different_files(arguments: argparse.Namespace) -> None:
    from swin_dense.errors import ConfigError

    source = Path(arguments.file).resolve()
    for option, path in (("--out", arguments.out), ("--json", arguments.json)):
        if path is not None and path.resolve() == source:
            raise ConfigError(f"{option} {path} is the file that is read; name another one.")
    if arguments.out is not None and arguments.json is not None and arguments.out.resolve() == arguments.json.resolve():
        raise ConfigError(f"--out and --json are both {arguments.out}; name two files.")


def _with_windows(found: Recognised, window: Sequence[int] | None, pretrained: Sequence[int] | None) -> Recognised:
    from dataclasses import replace

    from swin_dense.config import SwinConfig
    from swin_dense.errors import ConfigError

    if window is None:
        if pretrained is not None:
            raise ConfigError("--pretrained-window-size belongs to --window-size.")
        return found
    if "window_size" in found.fields:
        raise ConfigError(
            f"{found.source} tells its window size, {found.fields['window_size']}; leave --window-size out."
        )
    stages = len(found.fields["depths"])
    fields = {**found.fields, "window_size": window[0] if len(window) == 1 else list(window)}
    if pretrained is not None:
        fields["pretrained_window_sizes"] = list(pretrained) * (stages if len(pretrained) == 1 else 1)
    SwinConfig.from_dict(fields)  # says what is wrong with them
    return replace(found, fields=fields)


def _load(found: Recognised, file: WeightsFile) -> WeightsReport:
    """Load the file into the model that it describes."""
    from swin_dense.heads.foreign_files import build_recognised
    from swin_dense.weights.loading import load_weights

    any_window = {} if "window_size" in found.fields else {"window_size": 8}  # changes no parameter of a Swin V2
    return load_weights(build_recognised(found, **any_window), file)


def _print_receipt(found: Recognised, report: WeightsReport) -> None:
    from swin_dense.tools.tables import print_table
    from swin_dense.weights.report import percent

    print(report)
    fields = {name: value for name, value in found.fields.items() if name != "out_features"}
    print("backbone: " + ", ".join(f"{name} {value}" for name, value in fields.items()))
    if "window_size" not in found.fields:
        print("  its window size is not told by such a file; give it with --window-size")
    rows: dict[str, dict[str, Any]] = {}
    for group, numbers, _ in report.by_group():
        wanted = sum(numbers.values()) - numbers["unused"]
        loaded = wanted - numbers["missing"]
        changes: dict[str, Any] = {outcome: count or "" for outcome, count in numbers.items() if outcome != "loaded"}
        rows[group] = {"parameters": wanted, "loaded": percent(loaded / wanted) if wanted else "", **changes}
    print_table("what became of the numbers of each part", rows)


def _as_json(found: Recognised, report: WeightsReport) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(report), "loaded": list(report.loaded), "backbone": found.fields}


def _write(found: Recognised, file: WeightsFile, name: str, out: Path) -> None:
    from swin_dense.weights.recognition import recognise
    from swin_dense.weights.report import a_few
    from swin_dense.weights.writing import in_format, write_weights

    written = in_format(found, name)
    rule, new_rule = (part.fields["window_rule"] for part in (found, recognise(written.tensors, str(out))))
    write_weights(out, written, name, found.head, file.class_names)
    print(f"wrote {len(written.tensors)} tensors in {name} format to {out}")
    if written.kept:
        print(f"  names of this library for what {name} has none for: {a_few(written.kept)}")
    if new_rule != rule:
        print(
            f"  the code of {name} treats maps that do not divide into windows by the rule {new_rule!r}, "
            f"the model in {file.source} by {rule!r}: there the outputs will differ"
        )
    if found.unused:
        print(f"  left out, no part of a Swin model here: {a_few(list(found.unused))}")
