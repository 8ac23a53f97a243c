"""What the page does: generate, compare and score volumes. No Gradio here."""

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from monai.data import MetaTensor

from ..data import decode_nifti, prepare, to_meta_tensor
from ..data.nifti import open_nifti, scan_name
from ..hub import bundled_names
from ..hub.resolve import CHECKPOINTS
from ..metrics import sharpness
from ..pipelines import MedDiffusion3DPipeline, MedDiffusion3DPipelineOutput
from ..pipelines.conditions import names_by_index
from ..rewards import RewardFunc, load_reward
from ..rewards.scoring import score
from ..schedulers.flow import predicts_flow

NO_CLASS = "(no class)"
SAVED_SAMPLER = "as saved"
SAMPLERS = {
    "DDIM": DDIMScheduler,
    "DDPM": DDPMScheduler,
    "DPM-Solver++": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
    "Euler": EulerDiscreteScheduler,
}
"""For a variance-preserving diffusion; a rectified flow is sampled as it was saved."""

UNREADABLE = "cannot be read as NIfTI"  # as diffusers_med3d.data.nifti says it, followed by nibabel's words
MAX_UPLOAD_BYTES = 2**29  # of the file as it is sent
MAX_UNPACKED_BYTES = 2**31
MAX_UPLOAD_VOXELS = 2**27  # 512^3
LARGEST_SEED = 2**32 - 1
MAX_REWARD_SECONDS = 120.0  # others wait for the page meanwhile
KEPT_PIPELINES = 4  # in memory at a time

StepFunc = Callable[[int, int], None]
"""Called as ``f(done, total)`` after each denoising step."""


@dataclass(frozen=True)
class Settings:
    """What one volume is asked for, apart from the checkpoint.

    Args:
        class_label: a name of `class_choices`; `NO_CLASS` is the null class. None for a network without classes.
        conditions: the network's other conditions by name, as the pipeline's call takes them.
        seed: of the noise; two checkpoints with one seed start from the same noise.
        num_inference_steps: denoising steps of the whole schedule.
        guidance_scale: classifier-free guidance; 1 is off.
        sampler: a name of `sampler_choices`.
        strength: part of the schedule in [0, 1] that a scan is noised for; only used with a scan.
    """

    class_label: str | None = None
    conditions: Mapping[str, Any] | None = None
    seed: int = 0
    num_inference_steps: int = 20
    guidance_scale: float = 1.0
    sampler: str = SAVED_SAMPLER
    strength: float = 0.5


@dataclass(frozen=True)
class Reward:
    """A reward function with the name that the page shows."""

    name: str
    func: RewardFunc


def bundled_generators() -> list[str]:
    """Return the names of the bundled checkpoints that generate volumes."""
    return [name for name in bundled_names() if (CHECKPOINTS / name / "model_index.json").is_file()]


@lru_cache(maxsize=KEPT_PIPELINES)
def load_pipeline(name_or_path: str) -> MedDiffusion3DPipeline:
    """Return a generator on the GPU, or on the CPU where there is none; the last few stay in memory.

    Raises:
        ValueError, OSError: no such generator.
    """
    if not name_or_path.strip():
        raise ValueError("no checkpoint is chosen; choose a bundled name, or type a folder or a Hub id.")
    pipeline = MedDiffusion3DPipeline.from_pretrained(name_or_path.strip())
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def load_rewards(names: Sequence[str]) -> list[Reward]:
    """Return the rewards that are meant by names, folders, Hub ids or ``file.py:function``.

    Raises:
        ValueError, OSError, ImportError: something that is no reward.
    """
    return [Reward(name.rstrip("/").split("/")[-1], load_reward(name)) for name in names]


def class_choices(pipeline: MedDiffusion3DPipeline) -> list[str]:
    """Return the classes that a generator knows, the null class last; empty for a network without classes."""
    if pipeline.unet.null_class is None:
        return []
    named = names_by_index(pipeline)
    return [*(named.values() if named else map(str, range(pipeline.unet.null_class))), NO_CLASS]


def sampler_choices(pipeline: MedDiffusion3DPipeline) -> list[str]:
    """Return the samplers that fit a generator."""
    return [SAVED_SAMPLER, *(() if predicts_flow(pipeline.scheduler) else SAMPLERS)]


def parse_conditions(text: str) -> dict[str, Any] | None:
    """Return conditions from the text of a JSON object, None from no text.

    Raises:
        ValueError: anything else than an object.
    """
    if not text.strip():
        return None
    try:
        conditions = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the conditions are no JSON ({error}).") from error
    if not isinstance(conditions, dict):
        raise ValueError(f'the conditions must be a JSON object such as {{"age": 0.5}}, got {text.strip()[:60]}.')
    return conditions


def read_scan(content: bytes, file_name: str) -> MetaTensor:
    """Return an uploaded NIfTI file as a scan (X, Y, Z) or (C, X, Y, Z) with its affine in millimetres.

    Args:
        content: the file, gzipped or not.
        file_name: how messages call it.

    Raises:
        ValueError: no NIfTI, a file or an image that is too large, or voxels and affines that cannot be used.
    """
    entry = {"path": file_name, "bytes": _unpacked(content, file_name)}
    try:
        voxels = math.prod(open_nifti(entry, "the upload").shape)
        if voxels > MAX_UPLOAD_VOXELS:
            raise ValueError(
                f"{file_name} has {voxels} voxels, more than the {MAX_UPLOAD_VOXELS} that this page takes."
            )
        return to_meta_tensor(*decode_nifti(entry, "the upload"))
    except ValueError as error:
        message = str(error).replace(scan_name(entry, "the upload"), file_name)
        raise ValueError(_unreadable(file_name) if UNREADABLE in message else message) from error


def _unreadable(file_name: str) -> str:
    return f"{file_name} {UNREADABLE}: it is damaged or no NIfTI file."


def _unpacked(content: bytes, file_name: str) -> bytes:
    if content[:2] != b"\x1f\x8b":
        return content
    unpacker = zlib.decompressobj(wbits=31)
    try:
        plain = unpacker.decompress(content, MAX_UNPACKED_BYTES)
    except zlib.error as error:
        raise ValueError(_unreadable(file_name)) from error
    if unpacker.unconsumed_tail:
        raise ValueError(f"{file_name} unpacks to more than {MAX_UNPACKED_BYTES} bytes, the most that this page takes.")
    if not unpacker.eof:
        raise ValueError(f"{file_name} {UNREADABLE}: the gzip file ends too early.")
    return plain


def prepare_scan(scan: MetaTensor, pipeline: MedDiffusion3DPipeline, fit: str = "refuse") -> MetaTensor:
    """Return a scan on the grid of a generator: (C, X, Y, Z) in [0, 1], with its affine.

    Args:
        scan: of `read_scan`.
        pipeline: whose grid and channels it must fit.
        fit: what becomes of anatomy larger than the grid: "refuse", "shrink" or "crop".

    Raises:
        ValueError: a scan that does not fit.
    """
    try:
        volume = prepare(scan, like=pipeline, fit=fit)
    except ValueError as error:
        raise ValueError(str(error).replace("scan of MetaTensor", "this scan")) from error
    channels = pipeline.vae.config.in_channels
    if len(volume) != channels:
        raise ValueError(f"this scan has {len(volume)} channel(s), the checkpoint makes {channels}.")
    return volume


def generate(
    pipeline: MedDiffusion3DPipeline,
    settings: Settings,
    scan: MetaTensor | None = None,
    on_step: StepFunc = lambda done, total: None,
) -> MedDiffusion3DPipelineOutput:
    """Return one volume (1, C, X, Y, Z), from noise or from a prepared scan that is noised in part.

    The pipeline is shared: the call gets a scheduler of its own and changes nothing in it.

    Args:
        scan: of `prepare_scan`; the volume then has its affine.
        on_step: called after each denoising step.

    Raises:
        ValueError: settings that cannot be used.
    """
    if not 0 <= settings.seed <= LARGEST_SEED:
        raise ValueError(f"the seed must be a whole number from 0 to {LARGEST_SEED}, got {settings.seed}.")
    own = _with_sampler(pipeline, settings.sampler)
    own.set_progress_bar_config(disable=True)

    def after_step(running: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        on_step(step + 1, running.num_timesteps)

    from_scan = {} if scan is None else {"volumes": scan, "strength": settings.strength}
    output = own(
        class_labels=_label(pipeline, settings.class_label),
        conditions=settings.conditions,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        generator=torch.Generator().manual_seed(settings.seed),
        callback_on_step_end=after_step,
        **from_scan,
    )
    return MedDiffusion3DPipelineOutput(output.volumes.cpu(), output.affine, output.spacing)


def compare(
    pipelines: Sequence[MedDiffusion3DPipeline],
    settings: Settings,
    scans: Sequence[MetaTensor] | None = None,
    on_step: StepFunc = lambda done, total: None,
) -> list[MedDiffusion3DPipelineOutput]:
    """Return one volume of each generator, all from the same seed and settings.

    Args:
        scans: one scan as each generator's grid has it, or None.
        on_step: called after each step of all of them.
    """
    made: list[MedDiffusion3DPipelineOutput] = []
    for index, pipeline in enumerate(pipelines):

        def of_all(done: int, total: int, before: int = index) -> None:
            on_step(before * total + done, len(pipelines) * total)

        made.append(generate(pipeline, settings, None if scans is None else scans[index], of_all))
    return made


def score_volume(
    volumes: torch.Tensor, rewards: Sequence[Reward], settings: Settings | None = None
) -> dict[str, float | str]:
    """Return the scores of one volume by name: every reward and the sharpness; a sentence where one cannot score it.

    Args:
        volumes: (1, C, X, Y, Z) in [0, 1].
        rewards: of `load_rewards`.
        settings: what the volume was made with; rewards get its class and conditions.
    """
    columns: dict[str, list[Any]] = {"class_label": [None if settings is None else settings.class_label]}
    if settings is not None and settings.conditions:
        columns |= {name: [value] for name, value in settings.conditions.items()}
    scores: dict[str, float | str] = {}
    for reward in rewards:
        try:
            found = float(score([reward.func], [reward.name], volumes, columns, timeout=MAX_REWARD_SECONDS)[0, 0])
            scores[reward.name] = found if math.isfinite(found) else "no score for this volume"
        except ValueError as error:
            scores[reward.name] = " ".join(f"cannot score this volume: {error}".split())
    detail = float(sharpness(volumes)[0])
    return scores | {"sharpness": detail if math.isfinite(detail) else "no tissue in this volume"}


def _label(pipeline: MedDiffusion3DPipeline, label: str | None) -> int | str | None:
    if label in (None, "", NO_CLASS):
        return None
    return label if names_by_index(pipeline) or not label.isdecimal() else int(label)


def _with_sampler(pipeline: MedDiffusion3DPipeline, sampler: str) -> MedDiffusion3DPipeline:
    if sampler not in sampler_choices(pipeline):
        raise ValueError(f"{sampler!r} is no sampler of this checkpoint; it has {sampler_choices(pipeline)}.")
    scheduler_class = type(pipeline.scheduler) if sampler == SAVED_SAMPLER else SAMPLERS[sampler]
    return MedDiffusion3DPipeline.from_pipe(pipeline, scheduler=scheduler_class.from_config(pipeline.scheduler.config))
