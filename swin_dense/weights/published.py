"""Published weights by name, and their files in the cache that torch.hub uses.

What the names stand for, per variant:

- "imagenet1k": the authors' classifier of the 1000 classes. Trained on ImageNet-1K alone where such a file exists,
  because the published detectors and segmenters start from it; else trained on ImageNet-22K first.
- "imagenet22k": the authors' classifier of ImageNet-22K. The Swin V2 files were trained with 12 × 12 windows; they are
  listed under the variants whose position bias measures its offsets against these (`pretrained_window_sizes`).
- "coco": the authors' detector of the asked kind, trained for 36 epochs ("3x"). For a bare backbone Mask R-CNN's, or
  Cascade Mask R-CNN's where there is none of the former.
- "ade20k": the UPerNet with the highest published mIoU at one scale; the authors' own where another's gain is below
  0.1. OpenMMLab's base and large ones started from ImageNet-22K.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from swin_dense.config import variant_config
from swin_dense.errors import CheckpointError, ConfigError
from swin_dense.typed_values import did_you_mean

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

HUGGING_FACE = "https://huggingface.co"
_HUGGING_FACE_PREFIX = "huggingface:"
_HUGGING_FACE_FILES = ("model.safetensors", "pytorch_model.bin")
_TORCHVISION_NAME = re.compile(r"\w+_Weights\.\w+")
# These two publish each file under a name that ends in the first digits of its SHA-256.
_HOSTS_WITH_HASH = ("download.pytorch.org", "download.openmmlab.com")
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.pth$")
_STALLED_AFTER_S = 30.0
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class PublishedFile:
    """A weights file that its makers offer for download.

    Attributes:
        url: Its https address.
        sha256_prefix: The first or all hexadecimal digits of its SHA-256; None where no checksum is published.
        training: What it was trained on, and its published score in per cent.
        source: Where address and score are published.
    """

    url: str
    sha256_prefix: str | None
    training: str
    source: str


def _hash_in_name(url: str) -> str | None:
    found = _HASH_IN_NAME.search(url) if urlsplit(url).hostname in _HOSTS_WITH_HASH else None
    return found and found[1]


# The authors' classifiers: file, and top-1 accuracy in per cent on ImageNet-1K's validation images at the resolution in
# its name. Where the name says 22kto1k, ImageNet-22K came first.
_IMAGENET1K = {
    "swin_t": ("v1.0.0/swin_tiny_patch4_window7_224.pth", 81.2),
    "swin_s": ("v1.0.0/swin_small_patch4_window7_224.pth", 83.2),
    "swin_b": ("v1.0.0/swin_base_patch4_window7_224.pth", 83.5),
    "swin_l": ("v1.0.0/swin_large_patch4_window7_224_22kto1k.pth", 86.3),
    "swin_b_w12_384": ("v1.0.0/swin_base_patch4_window12_384.pth", 84.5),
    "swin_l_w12_384": ("v1.0.0/swin_large_patch4_window12_384_22kto1k.pth", 87.3),
    "swin_v2_t": ("v2.0.0/swinv2_tiny_patch4_window8_256.pth", 81.8),
    "swin_v2_s": ("v2.0.0/swinv2_small_patch4_window8_256.pth", 83.7),
    "swin_v2_b": ("v2.0.0/swinv2_base_patch4_window8_256.pth", 84.2),
    "swin_v2_t_w16_256": ("v2.0.0/swinv2_tiny_patch4_window16_256.pth", 82.8),
    "swin_v2_s_w16_256": ("v2.0.0/swinv2_small_patch4_window16_256.pth", 84.1),
    "swin_v2_b_w16_256": ("v2.0.0/swinv2_base_patch4_window16_256.pth", 84.6),
    "swin_v2_b_w12to16_256": ("v2.0.0/swinv2_base_patch4_window12to16_192to256_22kto1k_ft.pth", 86.2),
    "swin_v2_l_w12to16_256": ("v2.0.0/swinv2_large_patch4_window12to16_192to256_22kto1k_ft.pth", 86.9),
    "swin_v2_b_w12to24_384": ("v2.0.0/swinv2_base_patch4_window12to24_192to384_22kto1k_ft.pth", 87.1),
    "swin_v2_l_w12to24_384": ("v2.0.0/swinv2_large_patch4_window12to24_192to384_22kto1k_ft.pth", 87.6),
}
_IMAGENET22K = {
    "swin_t": "v1.0.8/swin_tiny_patch4_window7_224_22k.pth",
    "swin_s": "v1.0.8/swin_small_patch4_window7_224_22k.pth",
    "swin_b": "v1.0.0/swin_base_patch4_window7_224_22k.pth",
    "swin_l": "v1.0.0/swin_large_patch4_window7_224_22k.pth",
    "swin_b_w12_384": "v1.0.0/swin_base_patch4_window12_384_22k.pth",
    "swin_l_w12_384": "v1.0.0/swin_large_patch4_window12_384_22k.pth",
    "swin_v2_b_w12to16_256": "v2.0.0/swinv2_base_patch4_window12_192_22k.pth",
    "swin_v2_l_w12to16_256": "v2.0.0/swinv2_large_patch4_window12_192_22k.pth",
    "swin_v2_b_w12to24_384": "v2.0.0/swinv2_base_patch4_window12_192_22k.pth",
    "swin_v2_l_w12to24_384": "v2.0.0/swinv2_large_patch4_window12_192_22k.pth",
}
_CLASSIFIER_SOURCE = "github.com/microsoft/Swin-Transformer, MODELHUB.md"

# The authors' detectors: file, and average precision in per cent of boxes and of masks on COCO val2017.
_MASK_RCNN = {
    "swin_t": ("v1.0.2/mask_rcnn_swin_tiny_patch4_window7.pth", 46.0, 41.6),
    "swin_s": ("v1.0.2/mask_rcnn_swin_small_patch4_window7.pth", 48.5, 43.3),
}
_CASCADE_MASK_RCNN = {
    "swin_t": ("v1.0.2/cascade_mask_rcnn_swin_tiny_patch4_window7.pth", 50.4, 43.7),
    "swin_s": ("v1.0.2/cascade_mask_rcnn_swin_small_patch4_window7.pth", 51.9, 45.0),
    "swin_b": ("v1.0.2/cascade_mask_rcnn_swin_base_patch4_window7.pth", 51.9, 45.0),
}
_DETECTOR_SOURCE = "github.com/SwinTransformer/Swin-Transformer-Object-Detection, README.md"

# The authors' segmenters: file, mIoU in per cent on ADE20K's validation images at one scale. They publish no checksums.
_AUTHORS_UPERNET = {
    "swin_t": ("v1.0.1/upernet_swin_tiny_patch4_window7_512x512.pth", 44.51),
    "swin_s": ("v1.0.1/upernet_swin_small_patch4_window7_512x512.pth", 47.64),
}
_AUTHORS_UPERNET_SOURCE = "github.com/SwinTransformer/Swin-Transformer-Semantic-Segmentation, README.md"
# OpenMMLab's: folder, the end of the file's name after it, and the same mIoU.
_OPENMMLAB_UPERNET = {
    "swin_b": (
        "upernet_swin_base_patch4_window7_512x512_160k_ade20k_pretrain_224x224_22K",
        "20210526_211650-762e2178.pth",
        50.13,  # configs/swin/metafile.yaml; the README says 50.31
    ),
    "swin_l": (
        "upernet_swin_large_patch4_window7_512x512_pretrain_224x224_22K_160k_ade20k",
        "20220318_015320-48d180dd.pth",
        51.17,
    ),
    "swin_b_w12_384": (
        "upernet_swin_base_patch4_window12_512x512_160k_ade20k_pretrain_384x384_22K",
        "20210531_125459-429057bf.pth",
        50.76,
    ),
    "swin_l_w12_384": (
        "upernet_swin_large_patch4_window12_512x512_pretrain_384x384_22K_160k_ade20k",
        "20220318_091743-9ba68901.pth",
        52.25,
    ),
}
_OPENMMLAB_UPERNET_SOURCE = "github.com/open-mmlab/mmsegmentation, configs/swin/README.md"


def _published() -> dict[tuple[str, str, str | None], PublishedFile]:
    authors = "https://github.com/SwinTransformer/storage/releases/download"
    openmmlab = "https://download.openmmlab.com/mmsegmentation/v0.5/swin"
    table: dict[tuple[str, str, str | None], PublishedFile] = {}
    for variant, (file, top1) in _IMAGENET1K.items():
        training = f"{'ImageNet-22K, then ' if '22kto1k' in file else ''}ImageNet-1K; top-1 {top1}"
        published = PublishedFile(f"{authors}/{file}", None, training, _CLASSIFIER_SOURCE)
        table["imagenet1k", variant, "classifier"] = published
    for variant, file in _IMAGENET22K.items():
        published = PublishedFile(f"{authors}/{file}", None, "ImageNet-22K", _CLASSIFIER_SOURCE)
        table["imagenet22k", variant, "classifier"] = published
    for head, files in (("mask_rcnn", _MASK_RCNN), ("cascade_mask_rcnn", _CASCADE_MASK_RCNN)):
        for variant, (file, box_ap, mask_ap) in files.items():
            training = f"ImageNet-1K, then COCO; box AP {box_ap}, mask AP {mask_ap}"
            table["coco", variant, head] = PublishedFile(f"{authors}/{file}", None, training, _DETECTOR_SOURCE)
    for variant, (file, miou) in _AUTHORS_UPERNET.items():
        training = f"ImageNet-1K, then ADE20K; mIoU {miou}"
        published = PublishedFile(f"{authors}/{file}", None, training, _AUTHORS_UPERNET_SOURCE)
        table["ade20k", variant, "upernet"] = published
    for variant, (folder, ending, miou) in _OPENMMLAB_UPERNET.items():
        url = f"{openmmlab}/{folder}/{folder}_{ending}"
        training = f"ImageNet-22K, then ADE20K; mIoU {miou}"
        published = PublishedFile(url, _hash_in_name(url), training, _OPENMMLAB_UPERNET_SOURCE)
        table["ade20k", variant, "upernet"] = published
    for (name, variant, _), published in list(table.items()):
        table.setdefault((name, variant, None), published)  # Mask R-CNN comes before Cascade Mask R-CNN
    return table


PUBLISHED: Mapping[tuple[str, str, str | None], PublishedFile] = _published()
"""Files by name, variant of `swin_dense.config.VARIANTS` and head; the head None is the bare backbone."""

NAMES = tuple(dict.fromkeys(name for name, _, _ in PUBLISHED))


def find_published(name: str, variant: str | None, head: str | None) -> PublishedFile:
    """The published file of a name for a model.

    Args:
        name: One of `NAMES`: "imagenet1k", "imagenet22k", "coco" or "ade20k".
        variant: The model's variant, a key of `swin_dense.config.VARIANTS`; None for a configuration of its own.
        head: "classifier", "mask_rcnn", "cascade_mask_rcnn" or "upernet"; None for a bare backbone. A head that the
            name has no files of, such as "mask_rcnn" for "imagenet1k", gets the file for a bare backbone.

    Raises:
        ConfigError: The name or the variant is unknown, or nothing is published for the two and the head.
    """
    if name not in NAMES:
        raise ConfigError(f"there are no published weights {name!r}{did_you_mean(name, list(NAMES))}")
    if variant is None:
        raise ConfigError(
            f"weights={name!r} are published for named variants only; this model has a configuration of its own: "
            "create it from a variant's name, or give a file."
        )
    variant_config(variant)  # raises where there is no such variant
    key_head = head if head in {key[2] for key in PUBLISHED if key[0] == name} else None
    if (name, variant, key_head) not in PUBLISHED:
        wanted = f"{name!r}" if key_head is None else f"{name!r} ({key_head})"
        variants = [key[1] for key in PUBLISHED if (key[0], key[2]) == (name, key_head)]
        raise ConfigError(
            f"no weights {wanted} are published for {variant}; for {variant} there are {_names_of(variant)}; "
            f"{wanted} exist for {', '.join(variants)}."
        )
    return PUBLISHED[name, variant, key_head]


def _names_of(variant: str) -> str:
    """What is published for a variant, as "imagenet1k (classifier), coco (mask_rcnn)"."""
    keys = [key for key in PUBLISHED if key[1] == variant and key[2] is not None]
    return ", ".join(f"{name} ({head})" for name, _, head in keys) or "none"


def resolve(name_or_path: str | Path | WeightsEnum, variant: str | None = None, head: str | None = None) -> Path:
    """The file that a model's `weights` argument means; downloaded once, then taken from torch.hub's cache.

    Args:
        name_or_path: A path; a name of `NAMES` (write "./coco" for a file so called); a member of torchvision's weight
            enumerations or its name, such as "Swin_T_Weights.IMAGENET1K_V1"; "huggingface:owner/name" for that
            repository's model.safetensors or else pytorch_model.bin, such as
            "huggingface:timm/swin_tiny_patch4_window7_224.ms_in1k"; or an https address.
        variant: As in `find_published`; only the names need it.
        head: As in `find_published`.

    Returns:
        A path. A `Path` is returned as it is; whether it exists shows when it is read.

    Raises:
        ConfigError: As `find_published`, or the words name no weights.
        CheckpointError: There is no such file, it cannot be downloaded, or its checksum is not the published one.
    """
    if isinstance(name_or_path, Path):
        return name_or_path
    if not isinstance(name_or_path, str):
        return _cached(_url_of_member(name_or_path))
    if name_or_path in NAMES:
        published = find_published(name_or_path, variant, head)
        return _cached(published.url, published.sha256_prefix)
    if name_or_path.startswith(_HUGGING_FACE_PREFIX):
        return _hugging_face_file(name_or_path.removeprefix(_HUGGING_FACE_PREFIX))
    if name_or_path.startswith("https://"):
        return _cached(name_or_path)
    if "://" in name_or_path:
        raise ConfigError(f"{name_or_path}: weights are downloaded from https addresses only.")
    path = Path(name_or_path)
    if not path.is_file() and _TORCHVISION_NAME.fullmatch(name_or_path):
        return _cached(_url_of_torchvision(name_or_path))
    if not path.is_file():
        raise CheckpointError(
            f"there is no file {name_or_path}, and there are no published weights of that name"
            f"{did_you_mean(name_or_path, list(NAMES))}"
        )
    return path


def _url_of_member(member: object) -> str:
    url = getattr(member, "url", None)
    if not isinstance(url, str):
        raise ConfigError(
            f"weights must be a path, one of {', '.join(NAMES)}, an https address or a member of torchvision's weight "
            f"enumerations, got {member!r}."
        )
    return url


def _url_of_torchvision(name: str) -> str:
    from torchvision import models

    try:
        return models.get_weight(name).url
    except (KeyError, ValueError):
        known = [
            str(member) for model in models.list_models(include="swin_*") for member in models.get_model_weights(model)
        ]
        raise ConfigError(
            f"there is no file {name}, and torchvision has no such weights{did_you_mean(name, known)}"
        ) from None


def _hugging_face_file(repository: str) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ConfigError(f"weights from Hugging Face are named huggingface:owner/name, got huggingface:{repository}.")
    urls = [f"{HUGGING_FACE}/{repository}/resolve/main/{name}" for name in _HUGGING_FACE_FILES]
    for url in urls:
        if _cache_path(url).is_file():
            return _cached(url)
    for url in urls:
        try:
            return _cached(url)
        except CheckpointError as error:
            # Hugging Face answers 404 where the file is missing, 401 where the repository is.
            if not isinstance(error.__cause__, HTTPError) or error.__cause__.code not in (401, 404):
                raise
    raise CheckpointError(
        f"huggingface:{repository}: there is no such public repository at {HUGGING_FACE}, or it holds neither "
        f"{' nor '.join(_HUGGING_FACE_FILES)}."
    )


def _cached(url: str, sha256_prefix: str | None = None) -> Path:
    path = _cache_path(url)
    sha256_prefix = sha256_prefix or _hash_in_name(url)
    if not path.is_file():
        _download(url, path, sha256_prefix)
    elif sha256_prefix is not None:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(sha256_prefix):
            raise CheckpointError(
                f"{path}: its SHA-256 starts with {digest[: len(sha256_prefix)]}, that of {url} with {sha256_prefix}; "
                "the file is damaged or another one. Delete it to have it downloaded again, or give its path to use it."
            )
    return path


def _cache_path(url: str) -> Path:
    from torch import hub

    parts = urlsplit(url).path.split("/")
    name = parts[-1]
    if url.startswith(f"{HUGGING_FACE}/"):  # there every repository has a file of the same name
        # /owner/name/resolve/revision/file
        name = "--".join([*parts[1:3], *(part for part in parts[4:5] if part != "main"), *parts[5:]])
    if parts[-1] in ("", ".", ".."):
        raise ConfigError(f"{url}: the address ends in no file name.")
    return Path(hub.get_dir()) / "checkpoints" / name


def _download(url: str, path: Path, sha256_prefix: str | None) -> None:
    # A name of its own, because the processes of one training may all download.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            digest = _transfer(url, temporary)
            if sha256_prefix is not None and not digest.startswith(sha256_prefix):
                raise OSError(f"its SHA-256 starts with {digest[: len(sha256_prefix)]}, not with {sha256_prefix}")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, HTTPException, ValueError) as error:  # ValueError: an address that cannot be one
        if isinstance(error, HTTPError):
            error.close()  # it holds the connection
        raise CheckpointError(
            f"{url}: cannot be downloaded ({_reason(error)}). If you have the file from elsewhere, put it into "
            f"the folder {path.parent} under the name {path.name}."
        ) from error


def _transfer(url: str, destination: Path) -> str:
    """Download to a new file, which is on the disk afterwards; returns its SHA-256.

    torch.hub.download_url_to_file takes a connection that broke off for the end of the file and waits for ever on one
    that is stalled.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    request = Request(url, headers={"User-Agent": "swin-dense"})
    with urlopen(request, timeout=_STALLED_AFTER_S) as response, open(destination, "xb") as file:
        if response.headers.get_content_type() == "text/html":
            raise OSError("the address leads to a web page, not to a file")
        length = response.headers.get("Content-Length")
        total = None if length is None else int(length)
        sha256 = hashlib.sha256()
        console = Console(stderr=True, soft_wrap=True)
        console.print(f"downloading {url} to {destination.parent}", markup=False, highlight=False)
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=total)
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                sha256.update(chunk)
                progress.advance(task, len(chunk))
        if total is not None and file.tell() != total:
            raise OSError(f"the connection broke off after {file.tell()} of {total} bytes")
        file.flush()
        os.fsync(file.fileno())
    return sha256.hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"HTTP {error.code} {error.reason}"
    return str(error.reason if isinstance(error, URLError) else error) or type(error).__name__
