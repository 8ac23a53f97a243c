"""MedDiffusion3DPipeline: class-conditional latent diffusion of 3D medical volumes."""

import inspect
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from monai.data import MetaTensor

from .. import viz
from ..hub.origin import forget_local_path
from ..hub.publish import PublishMixin
from ..models import AutoencoderKL3D, AutoencoderKLMaisi3D, DiffusionUNet3D, DiffusionUNetMaisi3D, VQModel3D
from ..models.sizes import check_divisible, check_volumes
from ..schedulers.flow import check_fits, interpolate, is_flow, predicts_flow, set_timesteps
from ..utils.checks import is_number, is_whole, positive_spacing, whole_number
from ..utils.wrappers import unwrapped
from .best_of import choose
from .lora import UNetLoraMixin

ClassLabels = int | str | None | Sequence[int | str | None] | torch.Tensor
Generators = torch.Generator | list[torch.Generator] | None

MAX_ETA = 1 - 1e-6
"""What ``eta=1`` is rounded to: where sampling begins at pure noise, float32 may leave DDIM the root of -6e-8."""


def guided_prediction(
    unet: torch.nn.Module,
    sample: torch.Tensor,
    timestep: torch.Tensor | float | int,
    class_labels: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    conditions: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The network's prediction under classifier-free guidance: null + scale * (conditional - null).

    Ho & Salimans 2022 (arXiv 2207.12598), equation 6, in diffusers' convention: 1 is the conditional prediction alone
    and costs one forward of B; any other scale costs one forward of 2B. The pipeline, the RL rollout and the RL update
    all call this.

    Args:
        unet: `DiffusionUNet3D` or `DiffusionUNetMaisi3D`, possibly wrapped (DDP, PEFT, compiled).
        sample: (B, C, x, y, z), already scaled for the scheduler.
        timestep: one number for the batch, or (B,).
        class_labels: (B,), None for the null class.
        guidance_scale: 1 switches guidance off.
        conditions: of `DiffusionUNetMaisi3D` (its ``encode_conditions``), the same in both halves; else None.

    Returns:
        (B, C, x, y, z) in the dtype of ``sample``.

    Raises:
        ValueError: guidance of a network without a null class.
    """
    model_input = sample.to(next(unet.parameters()).dtype)
    extra = {} if conditions is None else {"conditions": conditions}
    if guidance_scale == 1 or class_labels is None:
        if guidance_scale != 1 and unwrapped(unet).null_class is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs a network with classes; this one has none.")
        return unet(model_input, timestep, class_labels, **extra).sample.to(sample.dtype)
    timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
    null_labels = torch.full_like(class_labels, unwrapped(unet).null_class)
    if conditions is not None:
        extra = {"conditions": {name: torch.cat([value] * 2) for name, value in conditions.items()}}
    labels = torch.cat([null_labels, class_labels])
    both = unet(torch.cat([model_input] * 2), torch.cat([timestep] * 2), labels, **extra).sample
    null, conditional = both.to(sample.dtype).chunk(2)  # each (B, C, x, y, z)
    return null + guidance_scale * (conditional - null)


def check_guidance_and_eta(guidance_scale: float, eta: float) -> None:
    """Refuse a guidance scale or an eta that no network can be sampled with (ValueError)."""
    if not is_number(guidance_scale) or not 0 <= guidance_scale < math.inf:
        raise ValueError(f"guidance_scale must be a number >= 0 (1 is off), got {guidance_scale!r}.")
    if not is_number(eta) or not 0 <= eta <= 1:
        raise ValueError(f"eta must be a number in [0, 1], got {eta!r}.")


def _one_each(value: Any, batch: int) -> list[Any]:
    """A value for the whole batch, or a sequence of one per sample, as a list."""
    if isinstance(value, torch.Tensor | np.ndarray):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) and len(value) == batch else [value] * batch


@dataclass
class MedDiffusion3DPipelineOutput(BaseOutput):
    """What a call gives back.

    Args:
        volumes: (B, C, X, Y, Z) float32 in [0, 1], RAS axes; an array for ``output_type="np"``, normalised latents for
            ``"latent"``.
        affine: float64 (4, 4), or (B, 4, 4) where one was given per volume: voxel to RAS millimetres. None for latents.
        spacing: voxel size (mm) that was generated, whatever a given affine says. None for latents.
        scores: (B, best_of) float32, of all samples that were made with ``best_of``; the highest was kept.
    """

    volumes: torch.Tensor | Any  # np.ndarray where asked for, which a type checker cannot tell
    affine: np.ndarray | None = None
    spacing: tuple[float, ...] | None = None
    scores: torch.Tensor | None = None

    def save_nifti(self, folder: str | os.PathLike, prefix: str = "sample", overwrite: bool = False) -> list[Path]:
        """Write ``folder/{prefix}-0000.nii.gz`` and on: float32 voxels as they are, true affine, millimetres.

        One channel gives a 3D image, more give a fourth axis. Each file appears whole or not at all.

        Args:
            folder: created if missing.
            prefix: start of every file name.
            overwrite: replace files of the same name.

        Returns:
            The paths, in the order of the batch.

        Raises:
            ValueError: the output holds latents.
            FileExistsError: a file is there already and ``overwrite`` is False; nothing is written then.
        """
        if self.affine is None:
            raise ValueError('latents have no affine; call the pipeline with output_type="pt" or "np" to save volumes.')
        volumes = np.asarray(self.volumes.cpu() if torch.is_tensor(self.volumes) else self.volumes, dtype=np.float32)
        affines = np.broadcast_to(self.affine, (len(volumes), 4, 4))
        folder = Path(folder)
        paths = [folder / f"{prefix}-{i:04d}.nii.gz" for i in range(len(volumes))]
        taken = [path.name for path in paths if path.exists()]
        if taken and not overwrite:
            raise FileExistsError(f"{folder} already holds {', '.join(taken)}; pass overwrite=True or another prefix.")
        folder.mkdir(parents=True, exist_ok=True)
        for path, volume, affine in zip(paths, volumes, affines, strict=True):
            voxels = volume[0] if len(volume) == 1 else np.moveaxis(volume, 0, -1)  # (X, Y, Z) or (X, Y, Z, C)
            image = nibabel.Nifti1Image(voxels, affine)
            image.set_qform(affine, code="aligned")  # readers that prefer the quaternion see the same place
            image.header.set_xyzt_units("mm")
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                nibabel.save(image, Path(temporary) / path.name)
                os.replace(Path(temporary) / path.name, path)
        return paths

    def show(self, viewer: str = "auto", channel: int = 0) -> Any:
        """What a notebook displays of the volumes, with their true affine: see `viz.show`.

        Args:
            viewer: "niivue" turns them in the browser (extra ``notebook``); "static" is a matplotlib figure; "auto" is
                NiiVue where it is installed, else the figure.
            channel: which one is drawn.

        Raises:
            ValueError: the output holds latents; no such viewer.
            ImportError: NiiVue was asked for and is not installed.
        """
        if self.affine is None:
            raise ValueError('latents cannot be shown; call the pipeline with output_type="pt" or "np".')
        return viz.show(self.volumes, self.affine, viewer, channel=channel)


def _in_order(what: str, names: Sequence[str] | dict[str, int] | None) -> list[str] | dict[str, int] | None:
    """Names as a list, from a list or from the ``{name: index}`` of model_index.json; a dict where indices are left
    out. ``what`` is what they are called in messages.
    """
    if names is None:
        return None
    if not isinstance(names, list | tuple | dict) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{what} must be a list of texts, or a dict from text to index, got {names!r:.200}.")
    if isinstance(names, dict):
        names = {name: whole_number(f"{what}[{name!r}]", index) for name, index in names.items()}
        ordered = sorted(names, key=names.__getitem__)
        return ordered if [names[name] for name in ordered] == list(range(len(ordered))) else dict(names)
    return list(names)


def _plain_labels(labels: ClassLabels) -> Any:
    """One label, or a list of them: tensors and arrays as Python's numbers.

    Raises:
        ValueError: something else, or what has no order, such as a set.
    """
    plain: Any = getattr(labels, "tolist", lambda: labels)()
    if plain is None or isinstance(plain, int | str):
        return plain
    if isinstance(plain, bytes) or not isinstance(plain, Sequence):
        raise ValueError(f"class_labels must be an index, a name, None or a list of these, got {plain!r:.200}.")
    return [
        label.item() if isinstance(label, torch.Tensor | np.ndarray) and label.ndim == 0 else label for label in plain
    ]


def _check_real_tensor(name: str, value: Any) -> None:
    if not torch.is_tensor(value):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")
    if value.is_complex():
        raise ValueError(f"{name} must be real numbers, got {value.dtype}.")


def _with_affine(
    volumes: torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor, ...] | None,
    affine: np.ndarray | torch.Tensor | None,
) -> tuple[torch.Tensor | None, np.ndarray | torch.Tensor | None]:
    """One scan or a list of scans as a plain batch, with the affines that MetaTensors bring unless one is given.

    Raises:
        ValueError: a list of different shapes, or a batch that does not have as many affines as scans, as torch.stack
            makes of MetaTensors: it keeps the affine of the first alone. MONAI's DataLoader keeps all.
    """
    if isinstance(volumes, list | tuple):
        scans: list[Any] = list(volumes)
        for i, scan in enumerate(scans):
            _check_real_tensor(f"volumes[{i}]", scan)
    elif isinstance(volumes, MetaTensor) and volumes.ndim in (4, 5):
        plain = volumes.as_subclass(torch.Tensor)
        plain = plain[None] if plain.ndim == 4 else plain
        own = volumes.affine.cpu().numpy().reshape(-1, 4, 4)
        if affine is None and len(own) != len(plain):
            raise ValueError(
                f"this batch of {len(plain)} scans brings {len(own)} affine(s); pass a list of scans (MetaTensors), "
                "each of which has its own, or affine=, or the plain tensor."
            )
        return plain, affine if affine is not None else own[0] if len(own) == 1 else own
    else:
        return volumes, affine
    shapes = sorted({tuple(scan.shape) for scan in scans})
    if len(shapes) != 1 or len(shapes[0]) != 4:
        raise ValueError(f"a list of volumes must hold (C, X, Y, Z) tensors of one shape, got {shapes}.")
    known = [scan.affine.cpu().numpy() for scan in scans if isinstance(scan, MetaTensor)]
    if affine is None and len(known) == len(scans):
        affine = known[0] if len(known) == 1 else np.stack(known)
    return torch.stack([scan.as_subclass(torch.Tensor) for scan in scans]), affine


class MedDiffusion3DPipeline(PublishMixin, UNetLoraMixin, DiffusionPipeline):
    """Generates 3D volumes: class-conditional latent diffusion (Pinaya et al. 2022, arXiv 2209.07162) with any
    diffusers scheduler, or rectified flow.

    Args:
        vae: autoencoder with latent statistics in its config.
        unet: predicts noise, velocity or sample, as ``scheduler.config.prediction_type`` says, or the velocity of a
            flow; last class is the null class.
        scheduler: any diffusers scheduler of a variance-preserving diffusion (DDPM, DDIM, DPM-Solver++, UniPC, Euler,
            ...); for a rectified flow FlowMatchEulerDiscreteScheduler, or DPM-Solver++ or UniPC set to flow sigmas.
        volume_shape: default size (X, Y, Z) in voxels.
        spacing: voxel size (mm) of the training data; generated affines have no other source.
        orientation: axes of the training data; only "RAS".
        class_names: one name per class, without the null class; as ``{name: index}`` where not every class has one.
        channel_names: one name per image channel, such as ("t1",).
        intensity: in words, what 0 and 1 stand for.
        data_settings: how the volumes and classes of the training data were made, as ``data.DataSettings.to_dict()``
            has it; the arguments above say what they say again.

    Raises:
        ValueError: names, sizes or spacing that do not fit the networks.
    """

    model_cpu_offload_seq = "unet->vae"
    _callback_tensor_inputs = ["latents", "class_labels"]

    def __init__(
        self,
        vae: AutoencoderKL3D | AutoencoderKLMaisi3D | VQModel3D,
        unet: DiffusionUNet3D | DiffusionUNetMaisi3D,
        scheduler: KarrasDiffusionSchedulers,
        volume_shape: list[int] | tuple[int, ...] = (64, 64, 64),
        spacing: list[float] | tuple[float, ...] = (3.0, 3.0, 3.0),
        orientation: str = "RAS",
        class_names: list[str] | tuple[str, ...] | dict[str, int] | None = None,
        channel_names: list[str] | tuple[str, ...] | dict[str, int] | None = None,
        intensity: str = "[0, 1]",
        data_settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        parts = (
            ("vae", vae, "latent_channels", "an autoencoder, such as AutoencoderKL3D"),
            ("unet", unet, "null_class", "a UNet, such as DiffusionUNet3D"),
            ("scheduler", scheduler, "set_timesteps", "a diffusers scheduler, such as DDIMScheduler"),
        )
        for name, part, attribute, expected in parts:
            if not hasattr(part, attribute):
                raise ValueError(f"{name} must be {expected}, got {part!r:.60}.")
        if not isinstance(intensity, str):
            raise ValueError(f"intensity must be a text, got {intensity!r:.200}.")
        if data_settings is not None and not isinstance(data_settings, dict):
            raise ValueError(f"data_settings must be a dict or None, got {data_settings!r:.200}.")
        if orientation != "RAS":
            raise ValueError(f"orientation must be 'RAS', got {orientation!r}.")
        sides = positive_spacing(spacing)
        if vae.latent_channels != unet.config.in_channels:
            raise ValueError(
                f"the autoencoder has {vae.latent_channels} latent channels, the UNet takes {unet.config.in_channels}."
            )
        class_names, channel_names = _in_order("class_names", class_names), _in_order("channel_names", channel_names)
        classes = unet.null_class or 0
        if isinstance(class_names, dict):
            indices, embeds = list(class_names.values()), unet.config.num_class_embeds or 0
            if len(set(indices)) != len(indices) or any(not 0 <= index < embeds for index in indices):
                raise ValueError(f"class_names need different indices from 0 to {embeds - 1}, got {class_names}.")
        elif class_names is not None and len(class_names) != classes:
            raise ValueError(
                f"class_names must name the {classes} classes of the UNet (the null class has no name), "
                f"got {class_names}."
            )
        if channel_names is not None and len(channel_names) != vae.config.in_channels:
            raise ValueError(f"channel_names must be {vae.config.in_channels} name(s), got {channel_names}.")
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)
        self._check_volume_shape(volume_shape)
        self.register_to_config(
            volume_shape=[int(side) for side in volume_shape],
            spacing=list(sides),
            orientation=orientation,
            class_names=class_names,
            channel_names=channel_names,
            intensity=intensity,
            data_settings=data_settings,
        )
        self._predicts_flow = predicts_flow(scheduler)
        self._guidance_scale = 1.0
        self._num_timesteps = 0

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As `DiffusionPipeline.save_pretrained`, without the local folder that a component was loaded from.

        Raises:
            ValueError: the UNet carries LoRA adapters, which `from_pretrained` could not read.
        """
        self._check_without_adapters()
        forget_local_path(self.scheduler)  # diffusers' own class; ours leave it out when they write their config
        super().save_pretrained(os.fspath(save_directory), *args, **kwargs)

    def to_json_string(self) -> str:
        """The config as model_index.json, with names written as ``{"young": 0, ...}``.

        diffusers takes a list that begins with a string for a component and its library, and would not load it from the
        Hub.
        """
        config = json.loads(super().to_json_string())
        for key in ("class_names", "channel_names"):
            if isinstance(config[key], list):
                config[key] = {name: index for index, name in enumerate(config[key])}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the running call, for callbacks."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the running call, for callbacks."""
        return self._num_timesteps

    @property
    def _size_divisor(self) -> int:
        return self.vae.downsample_factor * self.unet.size_divisor

    def _check_volume_shape(self, volume_shape: Sequence[int]) -> tuple[int, ...]:
        """Refuse a size that autoencoder and UNet together cannot take; returns the latent size (x, y, z)."""
        check_divisible(volume_shape, self._size_divisor, "volume_shape")
        latent_shape = self.vae.latent_shape(volume_shape)
        known = self.unet.config.get("position_shape") or latent_shape
        if latent_shape != tuple(known):
            only = tuple(side * self.vae.downsample_factor for side in known)
            raise ValueError(
                f"volume_shape {tuple(volume_shape)} is not {only}, the only size that this generator makes: it knows "
                "latents of that size place by place."
            )
        return latent_shape

    def affine(self, volume_shape: Sequence[int] | None = None, spacing: Sequence[float] | None = None) -> np.ndarray:
        """Voxel to RAS millimetres, float64 (4, 4): this pipeline's spacing, the volume's centre at the origin."""
        sides = np.asarray(spacing or self.config.spacing, dtype=np.float64)
        affine = np.diag([*sides, 1.0])
        affine[:3, 3] = -sides * (np.asarray(volume_shape or self.config.volume_shape) - 1) / 2
        return affine

    def encode_class_labels(self, labels: ClassLabels, batch: int) -> torch.Tensor | None:
        """Class labels to indices.

        Args:
            labels: an index, a name from ``class_names`` or None (the null class) for the whole batch; or one per
                sample, as a list or an integer tensor.
            batch: number of samples B.

        Returns:
            int64 (B,) on the pipeline's device; None for a network without classes.

        Raises:
            ValueError: unknown name, index out of range, wrong number of labels, or labels for a network without
                classes.
        """
        labels = _plain_labels(labels)
        if labels is None or isinstance(labels, int | str):
            labels = [labels] * batch
        if len(labels) != batch:
            raise ValueError(f"class_labels has {len(labels)} entries for {batch} sample(s).")
        null_class = self.unet.null_class
        if null_class is None:
            if any(label is not None for label in labels):
                raise ValueError(f"this pipeline has no classes, so class_labels must be None; got {list(labels)}.")
            return None
        names = self.config.class_names or []
        names = names if isinstance(names, dict) else {name: index for index, name in enumerate(names)}
        last = self.unet.config.num_class_embeds - 1
        indices = []
        for label in labels:
            if isinstance(label, str) and label not in names:
                raise ValueError(f"unknown class {label!r}; this pipeline has {list(names)}, and None for no class.")
            index = null_class if label is None else names[label] if isinstance(label, str) else label
            if isinstance(index, bool) or not isinstance(index, int | np.integer) or not 0 <= index <= last:
                raise ValueError(
                    f"class label {label!r} is no whole number from 0 to {last} (the null class is {null_class})."
                )
            indices.append(int(index))
        return torch.tensor(indices, dtype=torch.long, device=self._execution_device)

    def predict(
        self,
        latents: torch.Tensor,
        t: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        conditions: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`guided_prediction` of this pipeline's UNet; ``latents`` must already be scaled for the scheduler."""
        return guided_prediction(self.unet, latents, t, class_labels, guidance_scale, conditions)

    def encode_conditions(
        self, conditions: Mapping[str, Any] | None, spacing: Sequence[float] | None, batch: int
    ) -> dict[str, torch.Tensor] | None:
        """`DiffusionUNetMaisi3D.encode_conditions` with the voxel size to generate; None for a network without.

        Raises:
            ValueError: a condition that is missing or unknown, or any for a network that takes none.
        """
        unet = unwrapped(self.unet)
        if not isinstance(unet, DiffusionUNetMaisi3D) or "spacing" not in unet.condition_names:
            if spacing is not None:
                raise ValueError(f"this network knows one spacing, {tuple(self.config.spacing)} mm; got {spacing}.")
        if not isinstance(unet, DiffusionUNetMaisi3D):
            if conditions is not None:
                raise ValueError(f"this network takes no conditions besides class_labels, got {sorted(conditions)}.")
            return None
        conditions = dict(conditions or {})
        if "spacing" in conditions:
            raise ValueError("spacing is an argument of its own, because the affine depends on it.")
        if "spacing" in self.unet.condition_names:
            conditions["spacing"] = spacing or self.config.spacing
        encoded = self.unet.encode_conditions(conditions, batch)
        return {name: value.to(self._execution_device) for name, value in encoded.items()}

    def check_scheduler(self) -> None:
        """Refuse, with a ValueError, a scheduler that this pipeline's network cannot belong to."""
        check_fits(self.scheduler, self._predicts_flow)

    def decode_latents(self, latents: torch.Tensor, chunk_size: int = 1) -> torch.Tensor:
        """Normalised latents (B, c, x, y, z) to float32 volumes (B, C, X, Y, Z) in [0, 1], ``chunk_size`` at a time."""
        return torch.cat([self.vae.decode_latents(chunk) for chunk in latents.split(chunk_size)])

    def encode_latents(self, volumes: torch.Tensor, chunk_size: int = 4) -> torch.Tensor:
        """Volumes (B, C, X, Y, Z) in [0, 1] to normalised latents (posterior mean), ``chunk_size`` at a time."""
        return torch.cat([self.vae.encode_latents(chunk) for chunk in volumes.split(chunk_size)])

    def _batch_size(
        self,
        num_samples: int | None,
        class_labels: ClassLabels,
        generator: Generators,
        latents: torch.Tensor | None,
        volumes: torch.Tensor | None,
    ) -> int:
        """The one number of samples that everything given agrees on."""
        counts = {}
        if num_samples is not None:
            counts["num_samples"] = whole_number("num_samples", num_samples, 1)
        class_labels = _plain_labels(class_labels)
        if class_labels is not None and not isinstance(class_labels, int | str):
            counts["class_labels"] = len(class_labels)
        if isinstance(generator, list):
            counts["generator"] = len(generator)
        if latents is not None:
            counts["latents"] = len(latents)
        if volumes is not None:
            counts["volumes"] = len(volumes)
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{name}: {count}" for name, count in counts.items())
            raise ValueError(f"every argument must give the same number of samples, got {found}.")
        batch = next(iter(counts.values()), 1)
        if batch < 1:
            raise ValueError(f"there must be at least one sample, got {next(iter(counts))} of length 0.")
        return batch

    def check_sampling(self, num_inference_steps: int, guidance_scale: float, eta: float) -> None:
        """Refuse what this scheduler and network cannot be sampled with (ValueError)."""
        self.check_scheduler()
        trained = self.scheduler.config.num_train_timesteps
        if not is_whole(num_inference_steps) or not 1 <= num_inference_steps <= trained:
            raise ValueError(
                f"num_inference_steps must be a whole number from 1 to {trained}, got {num_inference_steps!r}."
            )
        check_guidance_and_eta(guidance_scale, eta)
        if guidance_scale != 1 and self.unet.null_class is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs a network with classes; this one has none.")

    def _check_inputs(
        self,
        num_inference_steps: int,
        guidance_scale: float,
        eta: float,
        generator: Generators,
        latents: torch.Tensor | None,
        output_type: str,
        volumes: torch.Tensor | None,
        strength: float | None,
        affine: np.ndarray | torch.Tensor | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        self.check_sampling(num_inference_steps, guidance_scale, eta)
        for one in generator if isinstance(generator, list) else [generator]:
            if one is not None and not isinstance(one, torch.Generator):
                raise TypeError(f"generator must be a torch.Generator or a list of them, got {type(one).__name__}.")
        if output_type not in ("pt", "np", "latent"):
            raise ValueError(f"output_type must be 'pt', 'np' or 'latent', got {output_type!r}.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"callbacks can have {self._callback_tensor_inputs}, not {sorted(unknown)}.")
        if latents is not None:
            _check_real_tensor("latents", latents)
            if latents.ndim != 5:
                raise ValueError(f"latents must have shape (B, c, x, y, z), got {tuple(latents.shape)}.")
        if latents is not None and volumes is not None:
            raise ValueError("give latents (where sampling starts) or volumes (what is partially noised), not both.")
        if (volumes is None) != (strength is None):
            given = "no volumes" if volumes is None else "volumes"
            raise ValueError(f"volumes and strength belong together, got {given} and strength={strength}.")
        if volumes is None or strength is None:
            if affine is not None:
                raise ValueError("affine belongs to volumes; generated volumes carry the pipeline's own.")
            return
        if not is_number(strength) or not 0 <= strength <= 1:
            raise ValueError(f"strength must be a number in [0, 1], got {strength!r}.")
        if strength > 0 and round(strength * num_inference_steps) == 0:
            raise ValueError(
                f"strength={strength} is no more than half of one of {num_inference_steps} steps; "
                f"use num_inference_steps >= {math.floor(0.5 / strength) + 1}, or strength 0 for a round trip."
            )
        _check_real_tensor("volumes", volumes)
        check_volumes(volumes, self.vae.config.in_channels)
        if len(volumes) == 0:
            raise ValueError(f"volumes hold no sample: shape {tuple(volumes.shape)}.")
        lowest, highest = float(volumes.min()), float(volumes.max())
        if lowest < -1e-3 or highest > 1 + 1e-3:
            raise ValueError(f"volumes must lie in [0, 1], got [{lowest:.4g}, {highest:.4g}].")
        if affine is not None:
            fits = tuple(affine.shape) in ((4, 4), (len(volumes), 4, 4))
            if not fits or not np.isfinite(np.asarray(affine)).all():
                raise ValueError(
                    f"affine must be (4, 4) or ({len(volumes)}, 4, 4) and finite, got {tuple(affine.shape)}: "
                    f"{np.asarray(affine).tolist()}."
                )

    def _timesteps(self, num_inference_steps: int, strength: float | None) -> torch.Tensor:
        """The scheduler's timesteps, for partial noising the last ``round(strength * num_inference_steps)`` steps of
        them.
        """
        set_timesteps(self.scheduler, num_inference_steps, self._execution_device)
        if strength is None:
            return self.scheduler.timesteps
        start = (num_inference_steps - round(strength * num_inference_steps)) * self.scheduler.order
        return self.scheduler.timesteps[start:]

    def _first_latents(
        self,
        shape: tuple[int, ...],
        generator: Generators,
        latents: torch.Tensor | None,
        volumes: torch.Tensor | None,
        strength: float | None,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """Where sampling starts, float32 (B, c, x, y, z): noise, the caller's noise, or partially noised volumes."""
        device, flow = self._execution_device, is_flow(self.scheduler)
        scale = 1.0 if flow else self.scheduler.init_noise_sigma
        if latents is not None:
            if latents.shape != shape:
                raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}.")
            if not torch.isfinite(latents).all():
                raise ValueError(f"latents hold {int((~torch.isfinite(latents)).sum())} NaN or infinite values.")
            return latents.to(device, torch.float32) * scale
        noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if volumes is None or strength == 1:  # not even the trace of the volume that some schedules leave at T
            return noise * scale
        encoded = self.encode_latents(
            volumes.as_subclass(torch.Tensor).to(device, torch.float32)
        )  # MONAI's MetaTensor too
        if strength == 0:
            return encoded
        start = timesteps[:1].repeat(len(encoded))
        if flow:
            return interpolate(encoded, noise, start / self.scheduler.config.num_train_timesteps)
        return self.scheduler.add_noise(encoded, noise, start)

    def _best_of(
        self,
        count: int,
        reward: Callable[..., Any] | None,
        batch: int,
        latents: torch.Tensor | None,
        class_labels: ClassLabels,
        conditions: Mapping[str, Any] | None,
        output_type: str,
        return_dict: bool,
        **options: Any,
    ) -> MedDiffusion3DPipelineOutput | Any:
        if not callable(reward):
            raise ValueError(
                f"best_of needs a reward to choose by, a function f(volumes, **conditions); got {reward!r:.60}. "
                "diffusers_med3d.rewards.load_reward makes one of a name or folder."
            )
        if latents is not None or output_type == "latent":
            raise ValueError("best_of draws several noises and scores volumes; give no latents and ask for none.")
        made: list[MedDiffusion3DPipelineOutput] = []

        def sample() -> torch.Tensor:
            made[:] = [self(num_samples=batch, class_labels=class_labels, conditions=conditions, **options)]
            return made[0].volumes

        columns = {**(conditions or {}), **({} if class_labels is None else {"class_label": class_labels})}
        lists = {name: _one_each(value, batch) for name, value in columns.items()}
        best, scores = choose(sample, reward, count, lists)
        volumes = best if output_type == "pt" else best.cpu().numpy()
        output = MedDiffusion3DPipelineOutput(volumes, made[0].affine, made[0].spacing, scores)
        return output if return_dict else (output.volumes, output.affine, output.spacing)

    @torch.no_grad()
    def __call__(
        self,
        num_samples: int | None = None,
        class_labels: ClassLabels = None,
        volume_shape: Sequence[int] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pt",
        volumes: torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor, ...] | None = None,
        strength: float | None = None,
        affine: np.ndarray | torch.Tensor | None = None,
        spacing: Sequence[float] | None = None,
        conditions: Mapping[str, Any] | None = None,
        best_of: int = 1,
        reward: Callable[..., Any] | None = None,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> MedDiffusion3DPipelineOutput | Any:
        """Generate volumes, or noise given ones partially and denoise them again.

        Args:
            num_samples: B; by default as many as class_labels, generators, latents or volumes were given, else 1.
            class_labels: index, name or None (null class) for all, or one per sample.
            volume_shape: (X, Y, Z), multiples of what autoencoder and UNet divide by; by default the pipeline's own.
            num_inference_steps: denoising steps of the whole schedule.
            guidance_scale: classifier-free guidance against the null class; 1 is off.
            eta: noise of DDIM, from 0 (deterministic) to 1 (as DDPM); schedulers without it ignore it, as in diffusers.
            generator: one, or a list with one per sample. With a list, a sample does not depend on its batch: on a CPU
                in float32 it agrees with the same sample made alone to 1e-4 per voxel (convolutions split a batch
                differently).
            latents: start from these instead of drawn noise: (B, c, x, y, z), standard normal.
            output_type: "pt", "np" (same axes as "pt") or "latent" (normalised latents, not decoded).
            volumes: (B, C, X, Y, Z) in [0, 1], one scan (C, X, Y, Z) of ``data.prepare``, or a list of them; encoded
                (posterior mean), noised to ``strength`` and denoised (SDEdit, Meng et al. 2021, arXiv 2108.01073).
                Needs ``strength``.
            strength: part of the schedule in [0, 1]: the last ``round(strength * num_inference_steps)`` steps run. 0 is
                the round trip through the autoencoder; 1 starts from pure noise.
            affine: of ``volumes``, (4, 4) or (B, 4, 4); handed on to the output. Prepared scans (MetaTensors, alone or
                in a list) bring their own, so what is made of a scan overlays it.
            spacing: voxel size (mm) to generate, for a network that takes it (MAISI); by default the pipeline's own.
            conditions: other conditions of such a network by name (``unet.condition_names``), such as
                ``{"top_region": "chest", "bottom_region": "abdomen"}``; for the whole batch or one per sample.
            best_of: make so many samples in the place of each and keep the one with the highest ``reward``. It takes so
                many times as long, and what is kept is less diverse.
            reward: ``f(volumes, **conditions)`` as for ``DDPOTrainer``, such as ``load_reward("brain-t1-reward-3d")``;
                gets ``class_label`` as it was given.
            callback_on_step_end: called as ``f(pipeline, step, timestep, tensors)`` after each step, may return changed
                tensors.
            callback_on_step_end_tensor_inputs: which of "latents", "class_labels" it gets.
            return_dict: False gives the tuple (volumes, affine, spacing).

        Raises:
            ValueError, TypeError: an argument that cannot be used, with the value found and what was expected.

        Example:
            >>> pipe = MedDiffusion3DPipeline.from_pretrained("brain-t1")
            >>> generator = torch.Generator().manual_seed(0)
            >>> out = pipe(class_labels=["young", "old"], num_inference_steps=30, generator=generator)
            >>> out.volumes.shape
            torch.Size([2, 1, 48, 64, 48])
        """
        # 1. Check the arguments
        best_of = whole_number("best_of", best_of, 1)
        volumes, affine = _with_affine(volumes, affine)
        affine = affine.cpu() if isinstance(affine, torch.Tensor) else affine
        self._check_inputs(
            num_inference_steps, guidance_scale, eta, generator, latents, output_type,
            volumes, strength, affine, callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        batch = self._batch_size(num_samples, class_labels, generator, latents, volumes)
        if volume_shape is not None:
            volume_shape = check_divisible(volume_shape, self._size_divisor, "volume_shape")
        if volumes is not None:
            if volume_shape not in (None, tuple(volumes.shape[2:])):
                raise ValueError(f"volumes have shape {tuple(volumes.shape[2:])}, volume_shape says {volume_shape}.")
            volume_shape = tuple(volumes.shape[2:])
        elif volume_shape is None:
            volume_shape = tuple(self.config.volume_shape)
        latent_shape = (batch, self.unet.config.in_channels, *self._check_volume_shape(volume_shape))
        labels = self.encode_class_labels(class_labels, batch)
        encoded_conditions = self.encode_conditions(conditions, spacing, batch)

        if best_of != 1 or reward is not None:
            return self._best_of(
                best_of, reward, batch, latents, class_labels, conditions, output_type, return_dict,
                volume_shape=volume_shape, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
                eta=eta, generator=generator, volumes=volumes, strength=strength, affine=affine, spacing=spacing,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            )  # fmt: skip

        # 2. Where sampling starts
        timesteps = self._timesteps(num_inference_steps, strength)
        self._guidance_scale, self._num_timesteps = guidance_scale, len(timesteps)
        latents = self._first_latents(latent_shape, generator, latents, volumes, strength, timesteps)

        # 3. Denoise; the scheduler computes in float32 whatever the network's dtype
        step_arguments = inspect.signature(self.scheduler.step).parameters
        options = {"eta": min(eta, MAX_ETA), "generator": generator}
        extra = {name: value for name, value in options.items() if name in step_arguments}
        flow = is_flow(self.scheduler)  # whose scheduler never scales
        for i, t in enumerate(self.progress_bar(timesteps)):
            model_input = latents if flow else self.scheduler.scale_model_input(latents, t)
            prediction = self.predict(model_input, t, labels, guidance_scale, encoded_conditions)
            latents = self.scheduler.step(prediction, t, latents, **extra).prev_sample
            if callback_on_step_end is not None:
                tensors: dict[str, Any] = {"latents": latents, "class_labels": labels}
                given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                tensors |= callback_on_step_end(self, i, t, given) or {}
                latents, labels = tensors["latents"], tensors["class_labels"]

        # 4. Decode
        decoded = latents if output_type == "latent" else self.decode_latents(latents)
        damaged = int((~decoded.isfinite()).flatten(1).any(1).sum())
        if damaged:
            warnings.warn(
                f"{damaged} of {batch} samples hold NaN or infinite values, made with guidance_scale={guidance_scale}.",
                stacklevel=3,
            )
        if output_type == "latent":
            output = MedDiffusion3DPipelineOutput(volumes=decoded)
        else:
            output = MedDiffusion3DPipelineOutput(
                volumes=decoded if output_type == "pt" else decoded.cpu().numpy(),
                affine=self.affine(volume_shape, spacing) if affine is None else np.asarray(affine, dtype=np.float64),
                spacing=tuple(float(side) for side in spacing or self.config.spacing),
            )
        self.maybe_free_model_hooks()
        return output if return_dict else (output.volumes, output.affine, output.spacing)
