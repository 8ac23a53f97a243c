"""Extractors by name. Two work offline; the canonical ones fetch their weights and say so where they cannot."""

from collections.abc import Callable

import torch
from monai.networks.nets import resnet10, resnet50
from torch import Tensor, nn

from .features import Extractor, PlanarFeatures, SliceFeatures
from .features3d import ScatteringFeatures

EXTRACTORS = ("efficientnet-lite0", "haar-scattering-3d", "inception", "radimagenet", "medicalnet")
RADIMAGENET_REPOSITORY, RADIMAGENET_FILE = "Lab-Rasool/RadImageNet", "ResNet50.pt"
_RESNET_CHILDREN = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


def extractor(name: str, device: str | torch.device = "cpu") -> Callable[[Tensor], Tensor]:
    """A feature extractor by name.

    =================== ===== =========================================================================================
    efficientnet-lite0  2D    ImageNet, from the package of that name; offline
    haar-scattering-3d  3D    no weights; offline
    inception           2D    the canonical network of the FID (TensorFlow's of 2015), from the package `pytorch-fid`,
                              which fetches the weights; only with it may a Fréchet distance be called FID
    radimagenet         2D    ResNet-50 trained on radiology (Mei et al., Radiology: AI 2022), from the Hub
    medicalnet          3D    ResNet-10 trained on 23 segmentation sets (Chen et al., arXiv 1904.00625), from the Hub
    =================== ===== =========================================================================================

    Raises:
        ValueError: unknown name.
        ImportError: a package is missing; the message says which.
        ConnectionError: the weights cannot be reached; the message says which extractors work offline.
    """
    if name == "efficientnet-lite0":
        return SliceFeatures(device=device)
    if name == "haar-scattering-3d":
        return ScatteringFeatures()
    makers: dict[str, Callable[..., Extractor]] = {
        "inception": _inception,
        "radimagenet": _radimagenet,
        "medicalnet": MedicalNetFeatures,
    }
    if name not in makers:
        raise ValueError(f"unknown extractor {name!r}, expected one of {', '.join(EXTRACTORS)}.")
    try:
        return makers[name](device)
    except OSError as error:  # what the Hub's client, urllib and requests raise without a connection
        raise ConnectionError(
            f"the weights of the extractor {name!r} cannot be reached ({type(error).__name__}: {error}). "
            f"Offline, use {EXTRACTORS[0]!r} (2D) and {EXTRACTORS[1]!r} (3D)."
        ) from error


def _inception(device: str | torch.device) -> PlanarFeatures:
    try:
        from pytorch_fid.inception import InceptionV3
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise ImportError(
            "The canonical Inception network needs pip install pytorch-fid, and a torchvision built for this torch "
            f"({type(error).__name__}: {error})."
        ) from error
    network = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval().requires_grad_(False).to(device)
    return PlanarFeatures(_FirstPooled(network), "inception-2015-12-05 (FID's)", image_size=299, device=device)


class _FirstPooled(nn.Module):
    """The first output of a network, flattened."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor) -> Tensor:
        return self.network(pictures)[0].flatten(1)


def radimagenet_network(state: dict[str, Tensor]) -> nn.Module:
    """RadImageNet's ResNet-50 as published (keys `backbone.0.weight`, ...): pictures (N, 3, H, W) in [-1, 1] to (N,
    2048).

    Raises:
        RuntimeError: keys that do not fit, all of them named.
    """
    network = resnet50(spatial_dims=2, n_input_channels=3, feed_forward=False, bias_downsample=False, conv1_t_stride=2)
    renamed = {}
    for key, value in state.items():
        index, _, rest = key.removeprefix("backbone.").partition(".")
        renamed[f"{_RESNET_CHILDREN[int(index)]}.{rest}" if index.isdigit() else key] = value
    network.load_state_dict(renamed)
    return network.eval().requires_grad_(False)


def _radimagenet(device: str | torch.device) -> PlanarFeatures:
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(RADIMAGENET_REPOSITORY, RADIMAGENET_FILE)
    network = radimagenet_network(torch.load(path, map_location="cpu", weights_only=True)).to(device)
    return PlanarFeatures(network, "resnet50/RadImageNet", 2.0, -1.0, image_size=224, device=device)


class MedicalNetFeatures:
    """Callable: volumes (B, C, X, Y, Z) in [0, 1] -> (B, 512 C), MedicalNet's ResNet-10 by MONAI, pooled.

    Each channel goes through the network alone, brought to mean 0 and standard deviation 1 over what is above 0, as in
    training (Chen et al. 2019).

    Args:
        device: where the network runs.
        network: in place of the download, for tests and local weights.

    Raises:
        OSError: the Hub cannot be reached.
    """

    def __init__(self, device: str | torch.device = "cpu", network: nn.Module | None = None) -> None:
        self.device, self.extractor = torch.device(device), "medicalnet-resnet10/23 datasets, 3D"
        self.blocks: dict[str, slice] = {}
        if network is None:
            network = resnet10(
                pretrained=True,
                spatial_dims=3,
                n_input_channels=1,
                conv1_t_stride=2,
                feed_forward=False,
                bias_downsample=False,
            )
        self.network = network.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def __call__(self, volumes: Tensor) -> Tensor:
        if volumes.ndim != 5:
            raise ValueError(f"MedicalNet features need volumes (B, C, X, Y, Z), got {tuple(volumes.shape)}.")
        answers = []
        for volume in volumes.detach().float().to(self.device).flatten(0, 1)[:, None]:
            inside = volume[volume > 0]
            if len(inside) < 2:
                raise ValueError("MedicalNet features need something above 0 in every channel, got an empty one.")
            answers.append(self.network(((volume - inside.mean()) / inside.std().clamp_min(1e-6))[None]))
        features = torch.cat(answers).reshape(len(volumes), -1).cpu()
        self.blocks = {"3D": slice(0, features.shape[1])}
        return features
