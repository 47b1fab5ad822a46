"""UPerNet on a Swin backbone: a label for every pixel.

Unified Perceptual Parsing for Scene Understanding (Xiao et al., 2018), https://arxiv.org/abs/1807.10221; numbers from
the official Swin configuration upernet_swin_tiny_patch4_window7_512x512_160k_ade20k.py. Parameter names follow the
published checkpoints.

    images (B, 3, H, W) -> normalise -> backbone {"c2" .. "c5"}
      -> c5 through the pooling pyramid, then top-down through c4, c3, c2 -> fused map at 1/4 size
      -> logits (B, K, H / 4, W / 4) -> (B, K, H, W)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from swin_dense.config import SwinConfig
from swin_dense.conventions import IGNORED_LABEL
from swin_dense.errors import ConfigError, DataError
from swin_dense.features import FeatureSpec
from swin_dense.heads.backbones import Normalize, as_backbone
from swin_dense.heads.batch_norm import BatchNorm
from swin_dense.heads.losses import upsampled_segmentation_loss
from swin_dense.heads.precision import at_least_float32
from swin_dense.heads.upsampling import convolve_resized, likeliest_classes, resize
from swin_dense.swin import SwinTransformer
from swin_dense.training.loss_terms import LossTerm, means
from swin_dense.windows import SizeHW

AUXILIARY_FEATURE = "c4"  # the third stage, in all published configurations


class ConvNormReLU(nn.Module):
    """Convolution without bias, batch normalisation, ReLU; the size stays.

    New weights are not those of the published code but smaller (Kaiming by inputs, not by outputs), and those of the
    classifiers larger (Xavier, not 0.01). AdamW's steps do not depend on the size of weights: where a norm follows,
    small ones turn faster, and a classifier of small ones is silent for long. Weights that are loaded are not affected.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        kernel_size: 1 or 3.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = BatchNorm(out_channels)
        nn.init.kaiming_uniform_(self.conv.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) to (B, out_channels, h, w)."""
        return self.normalize(self.conv(x))

    def normalize(self, x: Tensor) -> Tensor:
        """What follows the convolution."""
        return functional.relu(self.bn(x), inplace=True)


class PyramidConvNormReLU(ConvNormReLU):
    """The same layers for maps of several sizes, as if these were resized to that of the first and concatenated."""

    def forward(self, maps: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        """Maps (B, C_i, h_i, w_i), whose channels add up to in_channels, to (B, out_channels, h_0, w_0)."""
        return self.normalize(convolve_resized(maps, self.conv.weight, size_hw(maps[0])))


class UPerHead(nn.Module):
    """The decoder: pooling pyramid, top-down path, fusion, classifier.

    Args:
        in_channels: Channels of the maps, finest first.
        channels: Width of the decoder.
        num_classes: K.
        pool_sizes: Grid sides of the pooling pyramid.
        dropout: Of whole channels before the classifier.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        num_classes: int,
        pool_sizes: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        *fine_channels, coarsest_channels = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), ConvNormReLU(coarsest_channels, channels, 1))
            for size in pool_sizes
        )
        self.bottleneck = PyramidConvNormReLU(coarsest_channels + len(pool_sizes) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNormReLU(c, channels, 1) for c in fine_channels)
        self.fpn_convs = nn.ModuleList(ConvNormReLU(channels, channels, 3) for _ in fine_channels)
        self.fpn_bottleneck = PyramidConvNormReLU(len(in_channels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, kernel_size=1)
        _initialise_classifier(self.conv_seg)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, h_i, w_i), finest first, to logits (B, K, h_0, w_0)."""
        return self.conv_seg(self.dropout(self.decode(maps)))

    def decode(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps as in `forward` to the fused map (B, channels, h_0, w_0)."""
        *fine_maps, coarsest = maps
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, fine_maps, strict=True)]
        laterals.append(self.pool_pyramid(coarsest))
        for level in reversed(range(len(laterals) - 1)):
            laterals[level] = laterals[level] + resize(laterals[level + 1], size_hw(laterals[level]))
        smooth = [conv(x) for conv, x in zip(self.fpn_convs, laterals[:-1], strict=True)] + laterals[-1:]
        return self.fpn_bottleneck(smooth)

    def pool_pyramid(self, x: Tensor) -> Tensor:
        """The coarsest map with its averages over grids of several sizes: (B, C, h, w) to (B, channels, h, w)."""
        return self.bottleneck([x, *(pool(x) for pool in self.psp_modules)])


class FCNHead(nn.Module):
    """The auxiliary classifier that helps the third stage learn; not used in inference.

    Args:
        in_channels: Channels of the map.
        channels: Width of its convolution.
        num_classes: K.
        dropout: Of whole channels before the classifier.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvNormReLU(in_channels, channels, 3))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, kernel_size=1)
        _initialise_classifier(self.conv_seg)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to logits (B, K, h, w)."""
        return self.conv_seg(self.dropout(self.convs(x)))


class UPerNet(nn.Module):
    """Backbone, decoder and auxiliary head.

    Args:
        backbone: Maps c2 to c5.
        decode_head: Logits from all maps.
        auxiliary_head: Logits from c4 for a second loss.
        normalize: Shifts and scales image channels.
        num_classes: K.
        architecture: What `upernet` was called with, in plain types, so that a file can rebuild the model.
    """

    auxiliary_weight = 0.4  # of its loss, in all published configurations
    compiled_parts = ("backbone", "decode_head", "auxiliary_head")  # by `swin_dense.compile`

    def __init__(
        self,
        backbone: SwinTransformer,
        decode_head: UPerHead,
        auxiliary_head: FCNHead,
        normalize: Normalize,
        num_classes: int,
        architecture: dict[str, Any],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head
        self.normalize = normalize
        self.num_classes = num_classes
        self.architecture = architecture

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Logits, or losses where labels are given.

        Args:
            images: (B, 3, H, W) RGB float in [0, 1]; any H, W >= 1.
            labels: (B, H, W) integers in [0, K), 255 where a pixel is ignored.

        Returns:
            Without labels, logits (B, K, H, W). With labels {"loss_segmentation", "loss_auxiliary"}, to be summed.

        Raises:
            ConfigError: Images of a wrong kind.
            DataError: Labels that do not fit the images or the number of classes.
        """
        if labels is not None:
            return means(self.loss_terms(images, labels))
        return enlarge(self._coarse_logits(images), images)

    def loss_terms(self, images: Tensor, labels: Tensor) -> dict[str, LossTerm]:
        """The losses as in `forward`, with what each is a mean over: all pixels."""
        _, losses = self._coarse_logits_and_losses(images, labels)
        return losses

    def logits_and_losses(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, LossTerm]]:
        """What `forward` gives without and with labels, from one pass; in evaluation mode, losses of validation images.

        Args:
            images: As in `forward`.
            labels: As in `forward`.

        Returns:
            Logits (B, K, H, W), and the losses with what each is a mean over.

        Raises:
            ConfigError: As in `forward`.
            DataError: As in `forward`.
        """
        coarse, losses = self._coarse_logits_and_losses(images, labels)
        return enlarge(coarse, images), losses

    def predict_labels(self, images: Tensor, original_size_hw: SizeHW | None = None) -> Tensor:
        """The likeliest class of each pixel: `forward(images).argmax(dim=1)`, bit for bit, without all the logits.

        Args:
            images: As in `forward`.
            original_size_hw: (H', W') before the images were resized to (H, W). As in the published evaluations, logits
                at (H, W) are resized to it, and then compared; None is (H, W).

        Returns:
            (B, H', W') int64 in [0, K).

        Raises:
            ConfigError: As in `forward`.
        """
        logits = at_least_float32(self._coarse_logits(images))
        return likeliest_classes(logits, [size_hw(images), original_size_hw or size_hw(images)])

    def _coarse_logits(self, images: Tensor) -> Tensor:
        return self.decode_head(list(self._features(images).values()))

    def _coarse_logits_and_losses(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, LossTerm]]:
        features = self._features(images)
        check_labels(labels, images, self.num_classes)
        logits = self.decode_head(list(features.values()))
        auxiliary_logits = self.auxiliary_head(features[AUXILIARY_FEATURE])
        auxiliary = LossTerm(upsampled_segmentation_loss(auxiliary_logits, labels), labels.numel())
        return logits, {
            "loss_segmentation": LossTerm(upsampled_segmentation_loss(logits, labels), labels.numel()),
            "loss_auxiliary": auxiliary.times(self.auxiliary_weight),
        }

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        if images.ndim != 4:
            raise ConfigError(f"images must be (B, channels, H, W), got shape {tuple(images.shape)}.")
        return self.backbone(self.normalize(images))


def enlarge(logits: Tensor, images: Tensor) -> Tensor:
    """Logits at full precision and at the size of the images."""
    return resize(at_least_float32(logits), size_hw(images))


def size_hw(maps: Tensor) -> SizeHW:
    """(height, width) of maps (..., height, width)."""
    return maps.shape[-2], maps.shape[-1]


def check_labels(labels: Tensor, images: Tensor, num_classes: int) -> None:
    """Refuse labels that would train something else than meant. Values are looked at on the CPU only.

    Args:
        labels: As in `UPerNet.forward`.
        images: As in `UPerNet.forward`.
        num_classes: K.

    Raises:
        DataError: Says what was wanted and what was got.
    """
    wanted = (images.shape[0], *images.shape[2:])
    if tuple(labels.shape) != wanted or labels.is_floating_point():
        raise DataError(f"labels must be integers of shape {wanted}, got {labels.dtype} of {tuple(labels.shape)}.")
    if labels.is_cuda:
        return
    wrong = labels[(labels != IGNORED_LABEL) & ((labels < 0) | (labels >= num_classes))]
    if len(wrong):
        raise DataError(
            f"labels must be 0 to {num_classes - 1}, or {IGNORED_LABEL} to ignore a pixel; "
            f"{len(wrong)} pixels hold other values, such as {int(wrong[0])}."
        )


def _initialise_classifier(conv: nn.Conv2d) -> None:
    nn.init.xavier_uniform_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)


def _channels(specs: Mapping[str, FeatureSpec]) -> list[int]:
    return [spec.channels for spec in specs.values()]


def upernet(
    backbone: str | SwinConfig | SwinTransformer,
    num_classes: int,
    weights: str | None = None,
    channels: int = 512,
    auxiliary_channels: int = 256,
    dropout: float = 0.1,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> UPerNet:
    """UPerNet on a Swin backbone. Defaults are the published networks'.

    Args:
        backbone: A variant name, a configuration, or a backbone.
        num_classes: K.
        weights: A weights file to load into the model or into its backbone; None leaves random weights.
        channels: Width of the decoder.
        auxiliary_channels: Width of the auxiliary head.
        dropout: Of whole channels before each classifier.
        image_mean: Of each channel; None is ImageNet's.
        image_std: Of each channel; None is ImageNet's.

    Raises:
        ConfigError: A setting is out of range.
        CheckpointError: The weights do not fit.

    Example:
        >>> config = SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
        >>> segmenter = upernet(config, num_classes=5, channels=16).eval()
        >>> segmenter(torch.rand(2, 3, 41, 67)).shape
        torch.Size([2, 5, 41, 67])
    """
    if not 1 <= num_classes <= IGNORED_LABEL:
        raise ConfigError(f"num_classes must be 1 to {IGNORED_LABEL}, which marks ignored pixels, got {num_classes}.")
    backbone = as_backbone(backbone)
    specs = backbone.feature_specs
    model = UPerNet(
        backbone=backbone,
        decode_head=UPerHead(_channels(specs), channels, num_classes, dropout=dropout),
        auxiliary_head=FCNHead(specs[AUXILIARY_FEATURE].channels, auxiliary_channels, num_classes, dropout),
        normalize=Normalize(backbone.config.in_channels, image_mean, image_std),
        num_classes=num_classes,
        architecture={
            "head": "upernet",
            "backbone": backbone.config.to_dict(),
            "num_classes": num_classes,
            "channels": channels,
            "auxiliary_channels": auxiliary_channels,
            "dropout": dropout,
            "image_mean": list(image_mean) if image_mean else None,
            "image_std": list(image_std) if image_std else None,
        },
    )
    if weights is not None:
        from swin_dense.weights import load_weights

        load_weights(model, weights)
    return model
