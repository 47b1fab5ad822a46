"""Extract multi-scale backbone features of pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swin_dense.heads.backbones import Normalize
    from swin_dense.swin import SwinTransformer

HELP = "Save the backbone's feature maps c2 to c5 of pictures, one .npz file each."
EXAMPLE = """  swin-dense features swin_t photos/ --weights swin_tiny.pth --out features
  swin-dense features swin_t photos/ --weights imagenet1k --out features
  swin-dense features runs/coco/best.safetensors photos/ --out features --short-edge 800"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model", metavar="MODEL", help="a variant such as swin_t, a file that train wrote, or one of any family"
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="pictures, or folders of pictures")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the .npz files")
    parser.add_argument(
        "--weights", metavar="FILE", help="weights of a variant: a file, or a name such as imagenet1k; default: random"
    )
    parser.add_argument("--short-edge", type=int, metavar="PX", help="resize to this short edge; default: as they are")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; default: auto")


def run(arguments: argparse.Namespace) -> int:
    """Write one .npz per picture with arrays c2 … c5, (C, h, w) float32, and the picture's size."""
    from swin_dense.tools.image_files import find_images, named_apart

    paths = find_images(arguments.images)

    import numpy as np
    import torch

    from swin_dense.datasets.images import read_image
    from swin_dense.datasets.transforms import instance_inference
    from swin_dense.tools.image_views import resized
    from swin_dense.tools.progress_bar import tracked
    from swin_dense.training.distributed import process_from_environment

    device = process_from_environment(arguments.device).device
    backbone, normalize = (part.to(device).eval() for part in _parts(arguments.model, arguments.weights))
    resize = instance_inference(arguments.short_edge, 10 * arguments.short_edge) if arguments.short_edge else None
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path, name in tracked(list(zip(paths, named_apart(paths), strict=True)), "extracting"):
        image = read_image(path)
        tensor = torch.from_numpy(image).permute(2, 0, 1) if resize is None else resized(image, resize)
        with torch.inference_mode():
            features = backbone(normalize(tensor.to(device).float() / 255)[None])
        arrays = {level: feature[0].cpu().numpy() for level, feature in features.items()}
        np.savez(arguments.out / f"{name}.npz", input_size_hw=tensor.shape[1:], image_size_hw=image.shape[:2], **arrays)
    shapes = ", ".join(f"{level} {array.shape}" for level, array in arrays.items())
    print(f"{len(paths)} pictures, features in {arguments.out}; of the last one: {shapes}")
    return 0


def _parts(model: str, weights: str | None) -> tuple[SwinTransformer, Normalize]:
    from swin_dense.classification import Classifier
    from swin_dense.config import VARIANTS, variant_config
    from swin_dense.errors import ConfigError
    from swin_dense.heads.backbones import Normalize
    from swin_dense.heads.model_file import load_model
    from swin_dense.swin import SwinTransformer, create_backbone
    from swin_dense.weights import load_weights, read_config
    from swin_dense.weights.files import read_weights_file

    if model in VARIANTS:
        if weights is None:
            print("features of random weights: name a file with --weights", file=sys.stderr)
        backbone = create_backbone(model, weights=weights)
        return backbone, Normalize(backbone.config.in_channels)
    if not Path(model).suffix:
        variant_config(model)  # raises, naming the nearest variant
    if weights is not None:
        raise ConfigError(f"{model} has weights of its own: leave out --weights {weights}, or name a variant.")
    file = read_weights_file(model)
    if file.about is None:
        backbone = SwinTransformer(read_config(file))
        print(load_weights(backbone, file), file=sys.stderr)
        return backbone, Normalize(backbone.config.in_channels)
    trained, _ = load_model(model)
    if isinstance(trained, Classifier):
        return trained.backbone, Normalize(trained.backbone.config.in_channels)
    return trained.backbone, trained.normalize


if __name__ == "__main__":
    from swin_dense.tools.main import main

    sys.exit(main(["features", *sys.argv[1:]]))
