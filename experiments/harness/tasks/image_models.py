"""Image classifiers for 32 x 32 inputs, by the names that specs use.

torchvision and timm do not have all CIFAR variants. Here are the three-stage ResNet of He et al. 2016 (arXiv
1512.03385, section 4.2), the Wide ResNet of Zagoruyko and Komodakis 2016 (arXiv 1605.07146), and the libraries'
ResNet-50 and ViT at CIFAR's resolution.
"""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from experiments.harness.runs.facts import ImageSet
from experiments.harness.tasks.storage import DataError

Norm = Callable[[int], nn.Module]
"""Takes the number of channels and returns a normalisation layer."""


def groupnorm(channels: int) -> nn.GroupNorm:
    """GroupNorm with groups of 8 channels: examples are normalised separately, so micro-batch size has no effect."""
    return nn.GroupNorm(channels // 8, channels)


def build(name: str, classes: int, image_size: int = 32) -> nn.Module:
    """The model of that name, initialised from torch's global generator.

    Args:
        name: One of `MODELS`; or `module:callable`, which is called with `num_classes=`; or `hf-hub:OWNER/NAME`, or
            the path of a folder with a timm model (written by timm's `save_for_hf`). The last two are pretrained and
            get a new last layer.
        classes: Number of outputs.
        image_size: Side of the images in pixels, for timm's models.

    Raises:
        DataError: if timm's model is not available; the message says what to do.
    """
    if "/" in name:
        return pretrained(name, classes, image_size)
    return from_callable(name, classes) if ":" in name else MODELS[name](classes)


def from_callable(name: str, classes: int) -> nn.Module:
    """The model that `module:callable` returns, called with `num_classes=`.

    Raises:
        DataError: if there is no such callable, or it does not return an `nn.Module`.
    """
    module, _, function = name.partition(":")
    try:
        model = getattr(importlib.import_module(module), function)(num_classes=classes)
    except (AttributeError, ImportError, TypeError) as error:
        raise DataError(
            f"The model {name} could not be built ({error}): name an importable callable that takes num_classes and "
            "returns an nn.Module."
        ) from error
    if not isinstance(model, nn.Module):
        raise DataError(f"The model {name} is of type {type(model).__name__}: the callable must return an nn.Module.")
    return model


def pretrained(name: str, classes: int, image_size: int) -> nn.Module:
    """timm's pretrained model from a folder or the hub; position embeddings are resampled to the image size.

    Raises:
        DataError: if it is not available; the message says what to do.
    """
    import timm

    folder = Path(name).expanduser()
    if not name.startswith("hf-hub:") and not (folder / "config.json").is_file():
        raise DataError(
            f"{folder} has no timm model (no config.json): name a folder that timm's save_for_hf wrote, or "
            "hf-hub:OWNER/NAME."
        )
    place = name if name.startswith("hf-hub:") else f"local-dir:{folder}"
    try:
        return timm.create_model(place, pretrained=True, num_classes=classes, img_size=image_size)
    except Exception as error:  # timm and the hub's client raise many types
        message = [*str(error).strip().splitlines(), type(error).__name__][0]
        raise DataError(
            f"timm could not load {name} ({message[:200]}): name a Vision Transformer's folder, or run once with a "
            "network."
        ) from error


def pixel_statistics(model: nn.Module, data: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, by channel, of the pixels that a model was pretrained on; else the data set's."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return tuple(config.get("mean", data.mean)), tuple(config.get("std", data.std))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, normalised after each, with a projection where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = norm(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), norm(channels))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class PreactivationBlock(nn.Module):
    """Normalisation and ReLU before each 3x3 convolution; the shortcut is the identity unless the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = F.relu(self.norm1(x))
        x = x if self.shortcut is None else self.shortcut(y)
        return x + self.conv2(F.relu(self.norm2(self.conv1(y))))


def resnet(depth: int, classes: int, width: int = 16, norm: Norm = nn.BatchNorm2d) -> nn.Module:
    """CIFAR ResNet of 6n + 2 layers in stages of `width`, 2 `width` and 4 `width` channels."""
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), norm(width), nn.ReLU()]
    stages = _stages(partial(BasicBlock, norm=norm), (depth - 2) // 6, width, width)
    return _initialised(nn.Sequential(*stem, *stages, *_head(4 * width, classes)))


def wide_resnet(depth: int, widen: int, classes: int) -> nn.Module:
    """WRN-depth-widen: 6n + 4 layers in stages of 16, 32 and 64 times `widen` channels, no dropout."""
    stages = _stages(PreactivationBlock, (depth - 4) // 6, 16, 16 * widen)
    last = [nn.BatchNorm2d(64 * widen), nn.ReLU()]
    return _initialised(
        nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), *stages, *last, *_head(64 * widen, classes))
    )


def imagenet_resnet(depth: int, classes: int) -> nn.Module:
    """torchvision's ResNet with a 3x3 stem of stride 1 and no first pooling, as usual for CIFAR's image size."""
    from torchvision import models

    model = getattr(models, f"resnet{depth}")(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return _initialised(model)


class ConvolutionalStem(nn.Module):
    """Tokens from convolutions of stride 2 instead of square patches.

    From Xiao et al. 2021 (arXiv 2106.14881), whose Vision Transformers need fewer images and epochs with it; here with
    GELU and without normalisation. It replaces timm's patch embedding.
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: object) -> None:
        super().__init__()
        self.num_patches = (img_size // patch_size) ** 2
        layers, steps = [], patch_size.bit_length() - 1
        for step in range(steps):
            channels = embed_dim >> (steps - 1 - step)
            layers += [nn.Conv2d(in_chans, channels, 3, 2, 1), nn.GELU()]
            in_chans = channels
        self.layers = nn.Sequential(*layers, nn.Conv2d(in_chans, embed_dim, 1))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.layers(x).flatten(2).transpose(1, 2)


def vit(classes: int, **options: Any) -> nn.Module:
    """timm's Vision Transformer (arXiv 2010.11929) for 32 x 32 images, with mean pooling; `options` are timm's."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=32, num_classes=classes, global_pool="avg", **options)


def vit_tiny(classes: int) -> nn.Module:
    """torchvision's Vision Transformer of 12 layers and width 192 for 32 x 32 images, over patches of 4."""
    from torchvision.models import VisionTransformer

    size = {"image_size": 32, "patch_size": 4, "num_layers": 12, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
    return VisionTransformer(num_classes=classes, **size)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda classes: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, classes)),
    "resnet8": lambda classes: resnet(8, classes),
    "resnet8-groupnorm": lambda classes: resnet(8, classes, norm=groupnorm),
    "resnet18": partial(imagenet_resnet, 18),
    "resnet20": lambda classes: resnet(20, classes),
    "resnet50": partial(imagenet_resnet, 50),
    "wrn-10-1": lambda classes: wide_resnet(10, 1, classes),
    "wrn-16-4": lambda classes: wide_resnet(16, 4, classes),
    "wrn-28-10": lambda classes: wide_resnet(28, 10, classes),
    "vit-micro": lambda classes: vit(
        classes, patch_size=8, embed_dim=64, depth=3, num_heads=4, mlp_ratio=2.0, embed_layer=ConvolutionalStem
    ),
    "vit-tiny": vit_tiny,
    "vit-small": lambda classes: vit(classes, patch_size=4, embed_dim=384, depth=7, num_heads=12, mlp_ratio=1.0),
}


def _stages(block: Callable[[int, int, int], nn.Module], blocks: int, channels_in: int, width: int) -> list[nn.Module]:
    layers = []
    for stride, channels in ((1, width), (2, 2 * width), (2, 4 * width)):
        for index in range(blocks):
            layers.append(block(channels_in, channels, stride if index == 0 else 1))
            channels_in = channels
    return layers


def _head(channels: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def _initialised(model: nn.Module) -> nn.Module:
    """He initialisation of the convolutions (arXiv 1502.01852, fan-out), torch's defaults elsewhere."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
