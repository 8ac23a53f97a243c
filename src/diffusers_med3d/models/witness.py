"""A reward that is trained on nothing: the witness function between scans and samples, in features of a frozen network.

Gretton et al., A kernel two-sample test (JMLR 2012), section 2.3: the function whose mean differs most between two sets
is mean_j k(x, real_j) - mean_j k(x, generated_j), and the difference of its means is the squared maximum mean
discrepancy, of which KID is a case. It says of each sample whether it lies where scans are common and samples rare.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..hub.publish import PublishMixin
from ..metrics import ScatteringFeatures, polynomial_kernel
from .casting import QuietCastMixin
from .reward import SliceRewardModel, VolumeRewardModel
from .sizes import check_volumes

KERNELS = ("gaussian", "cubic")
EXTRACTORS: dict[str, type[VolumeRewardModel] | type[SliceRewardModel]] = {
    model.__name__: model for model in (VolumeRewardModel, SliceRewardModel)
}
HAAR = "haar"


def gaussian_kernel(a: Tensor, b: Tensor, bandwidth: float) -> Tensor:
    """exp(-|x - y|^2 / (2 bandwidth^2)) of every pair: (N, D) and (M, D) to float64 (N, M)."""
    distances = torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return torch.exp(-distances.square() / (2 * bandwidth**2))


def median_distance(features: Tensor) -> float:
    """The median Euclidean distance of all pairs of (N, D), the usual bandwidth (Gretton et al. 2012, section 8).

    Raises:
        ValueError: fewer than two vectors, or equal ones.
    """
    found = torch.pdist(features.double())
    median = found.median().item() if len(found) else 0.0
    if not median > 0:
        raise ValueError(f"the scans' features have the median distance {median}; expected several that differ.")
    return median


def witness(features: Tensor, real: Tensor, generated: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Mean kernel to the real minus mean kernel to the generated: features (B, D), (N, D), (M, D) to float32 (B,).

    Without generated ones (M = 0) the second mean is left out.
    """
    values = kernel(features, real).mean(1)
    if len(generated):
        values = values - kernel(features, generated).mean(1)
    return values.float()


class WitnessRewardModel(PublishMixin, QuietCastMixin, ModelMixin, ConfigMixin):
    """Scores volumes by the witness function; holds the features of scans and a buffer of the newest samples'.

    `of_scans` makes one. For features of another network override `features`.

    Args:
        extractor: "VolumeRewardModel" or "SliceRewardModel", whose pooled features are taken, or "haar"
            (`metrics.ScatteringFeatures`, for sides of at least 32 voxels).
        extractor_config: config of that model.
        num_scans, num_features: size of the features of scans.
        buffer_size: how many samples are remembered.
        kernel: "gaussian" with the median distance of the scans' features as bandwidth, or "cubic", KID's.
        in_channels: channels of a volume.
        data_settings: as in `VolumeRewardModel`.

    Raises:
        ValueError: an unknown extractor or kernel, sizes below 1.
    """

    scans: Tensor
    samples: Tensor
    num_samples: Tensor
    bandwidth: Tensor

    @register_to_config
    def __init__(
        self,
        extractor: str = "SliceRewardModel",
        extractor_config: dict[str, Any] | None = None,
        num_scans: int = 2,
        num_features: int = 1,
        buffer_size: int = 256,
        kernel: str = "gaussian",
        in_channels: int = 1,
        data_settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if extractor not in (*EXTRACTORS, HAAR):
            raise ValueError(f"extractor must be one of {(*EXTRACTORS, HAAR)}, got {extractor!r}.")
        if kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {KERNELS}, got {kernel!r}.")
        if min(num_scans, num_features, buffer_size) < 1:
            raise ValueError(
                f"num_scans, num_features and buffer_size must be at least 1, got {num_scans}, {num_features}, "
                f"{buffer_size}."
            )
        self.network = EXTRACTORS[extractor](**(extractor_config or {})) if extractor in EXTRACTORS else None
        self._make_room(num_scans, num_features)
        self.register_buffer("num_samples", torch.zeros((), dtype=torch.int64))
        self.register_buffer("bandwidth", torch.ones(()))

    def _make_room(self, num_scans: int, num_features: int) -> None:
        self.register_buffer("scans", torch.zeros(num_scans, num_features))
        self.register_buffer("samples", torch.zeros(self.config.buffer_size, num_features))  # the newest last

    @classmethod
    def of_scans(
        cls,
        extractor: VolumeRewardModel | SliceRewardModel | str,
        scans: Tensor,
        samples: Tensor | None = None,
        batch_size: int = 8,
        **options: Any,
    ) -> Self:
        """Make one from volumes.

        Args:
            extractor: a reward model, whose weights are copied, or "haar".
            scans: (N, C, X, Y, Z) in [0, 1], at least two; their features are kept, not they.
            samples: (M, C, X, Y, Z) of the generator before fine-tuning, for the buffer.
            batch_size: volumes at a time.
            **options: ``buffer_size``, ``kernel`` and ``data_settings`` (by default the extractor's).
        """
        config: dict[str, Any] = {"extractor": HAAR}
        if not isinstance(extractor, str):
            own = {name: value for name, value in extractor.config.items() if not name.startswith("_")}
            settings = own.pop("data_settings", None)
            config = {"extractor": type(extractor).__name__, "extractor_config": own, "data_settings": settings}
        elif extractor != HAAR:
            raise ValueError(f"extractor must be a reward model or {HAAR!r}, got {extractor!r}.")
        config |= {"in_channels": scans.shape[1], **options}
        model = cls(**config)
        device = scans.device
        if model.network is not None and not isinstance(extractor, str):
            model.network.load_state_dict(extractor.state_dict())
            device = extractor.device
        model.eval().requires_grad_(False).to(device)
        features = torch.cat([model.features(part.to(device)) for part in scans.split(batch_size)])
        model.register_to_config(num_scans=features.shape[0], num_features=features.shape[1])
        model._make_room(*features.shape)
        model.to(device).scans.copy_(features)
        model.bandwidth.fill_(median_distance(features))
        for part in () if samples is None else samples.split(batch_size):
            model.update(part.to(device))
        return model

    @torch.no_grad()
    def features(self, volumes: Tensor) -> Tensor:
        """What volumes (B, C, X, Y, Z) in [0, 1] are compared by: float32 (B, D).

        Raises:
            ValueError: wrong rank, channels or size.
        """
        check_volumes(volumes, self.config.in_channels)
        if self.network is None:
            return ScatteringFeatures()(volumes).to(volumes.device)
        return self.network.features(volumes).float()

    @torch.no_grad()
    def forward(self, volumes: Tensor) -> Tensor:
        """Score volumes (B, C, X, Y, Z) in [0, 1]: float32 (B,), higher where scans are more common than samples."""
        kernel = polynomial_kernel
        if self.config.kernel == "gaussian":
            kernel = partial(gaussian_kernel, bandwidth=self.bandwidth.item())
        known = self.samples[len(self.samples) - int(self.num_samples) :]
        return witness(self.features(volumes), self.scans.float(), known.float(), kernel)

    @torch.no_grad()
    def update(self, volumes: Tensor) -> None:
        """Remember samples (B, C, X, Y, Z), the oldest ones make room."""
        self.samples.copy_(torch.cat([self.samples, self.features(volumes).to(self.samples)])[-len(self.samples) :])
        self.num_samples.fill_(min(len(self.samples), int(self.num_samples) + len(volumes)))
