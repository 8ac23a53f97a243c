"""Stage 2: pre-train the latent diffusion model."""

import math
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import datasets
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import TrainerCallback

from .. import metrics, viz
from ..data import VolumeDataset, check_same_settings, settings_of
from ..data.latents import LatentDataset
from ..data.training_subjects import TRAINING_SUBJECTS
from ..hub.origin import inherited_license
from ..models import AutoencoderKL3D, VQModel3D
from ..pipelines.conditions import call_arguments, encode_rows, scan_rows
from ..pipelines.med_diffusion_3d import MedDiffusion3DPipeline
from ..schedulers.flow import flow_scheduler, is_flow, logit_normal_times
from ..schedulers.noising import noised, training_timesteps
from ..utils.checks import check_least
from ..utils.files import write_json
from ..utils.wrappers import unwrapped
from .autoencoder import latent_statistics
from .base import Med3DConfig, Med3DTrainer, describe_volumes
from .muon import Muon

PROGRESS = "progress.json"
"""Validation loss and distances of every evaluation against the volumes seen."""

FILMED = 4
"""Samples of the pictures by which a run is watched."""

SAMPLE_WEIGHT_CAP = 5.0
"""Largest weight of a timestep when the network predicts the sample (min-SNR-gamma, arXiv 2303.09556, gamma = 5)."""


@dataclass
class LatentDiffusionConfig(Med3DConfig):
    """Arguments of ``LatentDiffusionTrainer``."""

    output_dir: str = field(default="outputs/diffusion", metadata={"help": "Where everything is written."})
    max_steps: int = field(default=4000, metadata={"help": "Optimizer steps."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Latents per device and step."})
    per_device_eval_batch_size: int = field(default=12, metadata={"help": "Volumes generated at a time in evaluation."})
    learning_rate: float = field(default=4e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=100, metadata={"help": "Steps of linear warm-up."})
    muon: bool = field(
        default=False,
        metadata={
            "help": "Train the matrices and convolutions of the UNet's blocks with Muon, the rest with AdamW, both at "
            "learning_rate."
        },
    )
    ema_decay: float = field(default=0.999, metadata={"help": "Decay of the average of the weights; 0 is off."})
    class_dropout: float = field(
        default=0.1, metadata={"help": "Share of labels replaced by the null class, for classifier-free guidance."}
    )
    copies: int = field(default=8, metadata={"help": "Augmented copies per scan in the latent cache."})
    max_shift: int = field(default=2, metadata={"help": "Largest shift of a copy in voxels per axis."})
    latent_statistics: bool = field(
        default=False,
        metadata={
            "help": "Normalise latents by statistics of the cached ones instead of the autoencoder's own: mean per "
            "channel and place, standard deviation per channel. For scans on another grid than the autoencoder's."
        },
    )
    time_distribution: str = field(
        default="logit_normal",
        metadata={
            "help": "Times at which a flow is trained. logit_normal: the logarithm of noise over signal is normal; "
            "validation stays uniform, so that runs can be compared.",
            "choices": ["uniform", "logit_normal"],
        },
    )
    logit_mean: float = field(default=0.0, metadata={"help": "Mean of that logarithm; above 0 is more noise."})
    logit_std: float = field(default=1.2, metadata={"help": "Its standard deviation."})
    image_weighting: bool = field(
        default=True,
        metadata={
            "help": "Weigh the squared error of every latent channel by how much it changes the decoded image. "
            "Otherwise many channels of fine detail drown the few that carry the anatomy."
        },
    )
    eval_samples: int = field(
        default=12, metadata={"help": "Volumes generated at every evaluation, for KID and pictures; 0 skips both."}
    )
    eval_inference_steps: int = field(default=25, metadata={"help": "Denoising steps of these volumes."})
    sample_every: int = field(
        default=1,
        metadata={"help": "They are generated at every how many evaluations; the others take the loss alone."},
    )
    patience: int = field(
        default=0,
        metadata={"help": "Stop after so many evaluations without a lower validation loss than before; 0 never stops."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(vars(self), {"copies": 1, "max_shift": 0, "eval_samples": 0, "eval_inference_steps": 1})
        if not 0.0 <= self.class_dropout < 1.0:
            raise ValueError(f"class_dropout must be in [0, 1), got {self.class_dropout}.")
        if self.time_distribution not in ("uniform", "logit_normal"):
            raise ValueError(f"time_distribution must be uniform or logit_normal, got {self.time_distribution!r}.")
        if not math.isfinite(self.logit_mean):
            raise ValueError(f"logit_mean must be finite, got {self.logit_mean}.")
        if not 0 < self.logit_std < math.inf:
            raise ValueError(f"logit_std must be positive and finite, got {self.logit_std}.")
        if self.sample_every < 1 or self.patience < 0:
            raise ValueError(
                f"sample_every must be at least 1 and patience at least 0, got {self.sample_every}, {self.patience}."
            )
        if self.muon and self.deepspeed_plugin is not None:
            raise ValueError("muon=True does not go with DeepSpeed, which flattens the matrices that Muon works on.")


class LatentDiffusionTrainer(Med3DTrainer):
    """Trains the UNet of a ``MedDiffusion3DPipeline`` on cached latents.

    The loss is the mean squared error of what the scheduler's ``prediction_type`` says (velocity: Salimans & Ho 2022,
    arXiv 2202.00512, appendix D; sample: the same error seen from x_0, its weight capped; with a flow scheduler the
    velocity of a rectified flow, see flow.py), at timesteps spread evenly over the batch (Kingma et al. 2021, arXiv
    2107.00630, appendix I.1).

    Args:
        model: pipeline whose ``unet`` is trained; autoencoder with latent statistics.
        args: arguments.
        train_dataset: scans. What a `DiffusionUNetMaisi3D` takes besides class and spacing comes from the columns of
            its names in their metadata.
        eval_dataset: validation scans, for the validation loss, KID and pictures.
        earlier_subjects: subjects that the UNet was trained on before, when training starts from another generator.

    Raises:
        ValueError: scans without a condition that the network takes, or with one that it cannot take; too few volumes
            for the KID of an evaluation.
        ImportError: see `metrics.SliceFeatures`, on which the KID is taken.
    """

    _name = "LatentDiffusion"

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        model: MedDiffusion3DPipeline,
        args: LatentDiffusionConfig,
        train_dataset: VolumeDataset,
        eval_dataset: VolumeDataset | None = None,
        earlier_subjects: Collection[str] = (),
        **kwargs,
    ) -> None:
        self.pipeline = model
        check_same_settings(settings_of(model), train_dataset.settings, ("the pipeline", "the scans"))
        model.register_to_config(data_settings=train_dataset.settings.to_dict())
        self.training_subjects = {item["subject"] for item in train_dataset} | set(earlier_subjects)
        self.pipeline.vae.requires_grad_(False).to(args.device)  # transformers moves the UNet alone
        if eval_dataset is not None and args.eval_samples:  # what an evaluation cannot do is refused before training
            if min(args.eval_samples, len(eval_dataset)) < 3:
                raise ValueError(
                    f"KID needs at least 3 volumes on each side, got eval_samples={args.eval_samples} and "
                    f"{len(eval_dataset)} validation scans; eval_samples=0 leaves it out."
                )
            scans = eval_dataset.stack()
            extractors: dict[str, metrics.Extractor] = {"": metrics.SliceFeatures(device=args.device)}
            if min(scans.shape[2:]) >= 32:
                extractors["_haar"] = metrics.ScatteringFeatures()
            self._features = {name: (extract, extract(scans)) for name, extract in extractors.items()}
        rows = scan_rows(model, train_dataset)
        self.conditions = encode_rows(model, rows)
        self.film_rows = rows.select(range(min(FILMED, len(rows))))
        cache = Path(args.output_dir) / "cache"
        with args.main_process_first(desc="encoding scans"):
            self.latents = LatentDataset(
                train_dataset, model.vae, cache / "train.safetensors", args.copies, args.max_shift, args.seed
            )
            if eval_dataset is not None:
                self.eval_rows = scan_rows(model, eval_dataset)
                self.eval_conditions = encode_rows(model, self.eval_rows)
                self.eval_latents = LatentDataset(eval_dataset, model.vae, cache / "eval.safetensors", copies=1)
        if args.latent_statistics:
            moments = zip(self.latents.mean.flatten(0, 1), self.latents.sigma.flatten(0, 1), strict=True)
            model.vae.set_latent_statistics(*latent_statistics(moments))
        if getattr(model.unet, "data_variance", None) is not None and bool((model.unet.data_variance == 1).all()):
            model.unet.set_data_variance(self.latents.variance())
        self.channel_weights = torch.ones(model.vae.latent_channels)
        if args.image_weighting:
            gain = decoder_gain(model.vae, self.latents.mean[:1, 0].float())
            self.channel_weights = gain / gain.mean()
        super().__init__(
            model=unwrapped(model.unet), args=args, train_dataset=self.latents, eval_dataset=eval_dataset, **kwargs
        )
        self.card_data = describe_volumes(train_dataset, eval_dataset)
        self.inherited_license = inherited_license(model, model.unet, model.vae)
        if args.patience:
            self.add_callback(_PatienceCallback())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in transformers; with ``args.muon`` the matrices and kernels inside the UNet's blocks are `Muon`'s.

        First and last layers, embeddings, norms and biases are AdamW's.
        """
        if not self.args.muon or self.optimizer is not None:
            return super().create_optimizer(model)
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in (model or self.model).named_parameters():
            if parameter.requires_grad:
                (matrices if "_block" in name and parameter.ndim >= 2 else others).append(parameter)
        optimizer = self.optimizer = Muon(
            matrices,
            others,
            lr=self.args.learning_rate,
            weight_decay=self.args.weight_decay,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
        )
        return optimizer

    def _error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Weighted mean square error of every sample: (B, c, x, y, z) to (B,)."""
        error = (prediction.float() - target).square().flatten(2).mean(2)
        return (error * self.channel_weights.to(error.device)).mean(1)

    def _denoising_loss(
        self,
        unet: nn.Module,
        latents: Tensor,
        labels: Tensor | None,
        noise: Tensor,
        shift: Tensor,
        others: dict[str, Tensor] | None = None,
        uniform_times: bool = False,
    ) -> Tensor:
        scheduler = self.pipeline.scheduler
        spread = (shift + torch.arange(len(latents), device=latents.device) / len(latents)) % 1.0
        if is_flow(scheduler) and self.args.time_distribution == "logit_normal" and not uniform_times:
            spread = logit_normal_times(spread, self.args.logit_mean, self.args.logit_std)
        timesteps = training_timesteps(scheduler, spread)
        noisy, target = noised(scheduler, latents, noise, timesteps)
        error = self._error(_under(unet, others)(noisy, timesteps, labels, return_dict=False)[0], target)
        if scheduler.config.get("prediction_type") == "sample":
            # an error of the sample is 1 / sigma^2 = SNR + 1 times as large as a velocity; capped as Hang et al. 2023
            alphas = scheduler.alphas_cumprod.to(latents.device)[timesteps]
            error = error * (1 / (1 - alphas)).clamp(max=SAMPLE_WEIGHT_CAP)
        return error.mean()

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs) -> Tensor:
        """Denoising loss of one batch {"index": (B,)}."""
        latents = self.latents.draw(inputs["index"]).to(self.args.device)
        labels, others = self.conditions.take(inputs["index"].cpu())
        if labels is not None:
            dropped = torch.rand(labels.shape, device=labels.device) < self.args.class_dropout
            labels = torch.where(dropped, self.pipeline.unet.null_class, labels)
        shift = torch.rand((), device=latents.device)
        return self._denoising_loss(model, latents, labels, torch.randn_like(latents), shift, others)

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Validation loss with fixed noise; KID, sharpness and pictures of samples. All with the averaged weights."""
        if self.eval_dataset is None or eval_dataset not in (None, self.eval_dataset):
            raise ValueError("evaluate judges the eval_dataset that the trainer was made with, and no other.")
        self.model.eval()
        generator = torch.Generator().manual_seed(self.args.seed)
        results: dict[str, float] = {}
        with self.ema_weights(), self.accelerator.autocast():
            losses = []
            for i, mean in enumerate(self.eval_latents.mean[:, 0]):
                latents = self.pipeline.vae.normalize_latents(mean[None].to(self.args.device)).repeat(8, 1, 1, 1, 1)
                noise = torch.randn(latents.shape, generator=generator).to(latents.device)
                labels, others = self.eval_conditions.take(torch.full((8,), i))
                shift = torch.tensor(0.5 / 8)
                loss = self._denoising_loss(
                    self.pipeline.unet, latents, labels, noise, shift, others, uniform_times=True
                )
                losses.append(loss)
            results |= _validation_loss(torch.stack(losses).cpu(), metric_key_prefix)
            step = self.state.global_step
            due = step // self.state.eval_steps % self.args.sample_every == 0 or step >= self.args.max_steps
            if self.args.eval_samples and due:
                results |= self._judge_samples(generator, metric_key_prefix)
        results = self.conclude_evaluation(results)
        self._write_progress()
        return results

    def _write_progress(self) -> None:
        """Write every evaluation so far to ``output_dir/progress.json``, against the volumes seen in training."""
        if not self.is_world_process_zero():
            return
        rows = progress(self.state.log_history, self.args.train_batch_size * self.args.world_size)
        write_json(Path(self.args.output_dir) / PROGRESS, rows)
        self.log_figure("progress", progress_figure(rows))

    def _sample(self, rows: datasets.Dataset, generator: torch.Generator) -> Tensor:
        """One volume for each row of conditions, (N, C, X, Y, Z) on the CPU."""
        self.pipeline.set_progress_bar_config(disable=True)
        batch = self.args.per_device_eval_batch_size
        return torch.cat(
            [
                self.pipeline(
                    **call_arguments(self.pipeline, rows.select(range(first, min(first + batch, len(rows))))),
                    num_inference_steps=self.args.eval_inference_steps,
                    generator=generator,
                ).volumes.cpu()
                for first in range(0, len(rows), batch)
            ]
        )

    def film_figures(self) -> dict[str, Figure]:
        """Samples of the first conditions, from the same noise every time."""
        samples = self._sample(self.film_rows, torch.Generator().manual_seed(self.args.seed))
        return {
            "samples": viz.volume_rows(
                {"samples": samples}, spacing=self.pipeline.config.spacing, title=self.film_title
            )
        }

    def _judge_samples(self, generator: torch.Generator, prefix: str) -> dict[str, float]:
        count = self.args.eval_samples
        samples = self._sample(self.eval_rows.select([i % len(self.eval_rows) for i in range(count)]), generator)
        scans = self.eval_dataset.stack()
        usable = samples.isfinite().flatten(1).all(1)
        samples = samples[usable]
        results: dict[str, float] = {} if usable.all() else {f"{prefix}_unjudged": float((~usable).sum())}
        if len(samples) < 3:  # of which a KID could be taken
            warnings.warn(
                f"{count - len(samples)} of {count} samples are NaN or infinite: none is judged.", stacklevel=2
            )
            return results
        with torch.autocast(self.args.device.type, enabled=False):  # as precise as those of the scans
            for name, (extract, reference) in self._features.items():
                distance = metrics.kid(extract(samples), reference)
                results |= {f"{prefix}_kid{name}": distance.value, f"{prefix}_kid{name}_stderr": distance.stderr}
        shown = min(len(samples), 6)
        picture = {"scans": scans[:shown], "samples": samples[:shown]}
        spacing = self.pipeline.config.spacing
        self.log_figure("eval_samples", viz.volume_rows(picture, spacing=spacing))
        ratio = (metrics.sharpness(samples).mean() / metrics.sharpness(scans).mean()).item()
        return results | {f"{prefix}_sharpness_ratio": ratio}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole pipeline, and beside it which subjects it was trained on."""
        self.pipeline.save_pretrained(folder)
        write_json(Path(folder) / TRAINING_SUBJECTS, sorted(self.training_subjects))


def _validation_loss(losses: Tensor, prefix: str) -> dict[str, float]:
    """Mean of the losses (N,) of the scans that have one, and the number of those whose loss is NaN or infinite, which
    a warning names; where no scan has one the mean is infinite, because NaN would pass for the best checkpoint."""
    usable = losses.isfinite()
    if usable.all():
        return {f"{prefix}_loss": losses.mean().item()}
    lost = (~usable).nonzero()[:, 0].tolist()
    warnings.warn(
        f"The loss of {len(lost)} of {len(losses)} validation scans is NaN or infinite, the first is scan {lost[0]} "
        f"(counted from 0): they are left out of {prefix}_loss.",
        stacklevel=3,
    )
    mean = losses[usable].mean().item() if usable.any() else math.inf
    return {f"{prefix}_loss": mean, f"{prefix}_loss_left_out": float(len(lost))}


class _PatienceCallback(TrainerCallback):
    """Stops, with a checkpoint, where the validation loss has not fallen for ``patience`` evaluations. It looks at the
    logs, which a checkpoint holds, so a run may be resumed as often as needed."""

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        losses = [row["eval_loss"] for row in state.log_history if "eval_loss" in row]
        if losses and len(losses) - 1 - losses.index(min(losses)) >= args.patience:
            control.should_training_stop = control.should_save = True


def progress(log_history: Sequence[dict[str, float]], batch_size: int) -> list[dict[str, float]]:
    """Evaluations of a log, each with ``volumes_seen``: optimizer steps times ``batch_size``, the volumes per step.

    What is not finite is left out: JSON has no such numbers.
    """
    evaluations = [row for row in log_history if "eval_loss" in row]
    return [
        {"volumes_seen": int(row["step"] * batch_size)} | {k: v for k, v in row.items() if math.isfinite(v)}
        for row in evaluations
    ]


def progress_figure(rows: Sequence[dict[str, float]]) -> Figure:
    """Validation loss and kernel distances of ``progress`` against the volumes seen."""
    names = {"eval_loss": "validation loss", "eval_kid": "KID", "eval_kid_haar": "KID (Haar scattering)"}
    series = {}
    for key, name in names.items():
        points = [(row["volumes_seen"], row[key]) for row in rows if key in row]
        if points:
            series[name] = ([seen for seen, _ in points], [value for _, value in points])
    return viz.curves(series, xlabel="volumes seen")


def _under(unet: nn.Module, conditions: dict[str, Tensor] | None) -> Callable:
    """The network with its conditions besides the class filled in; as it is where it takes none."""
    return unet if conditions is None else partial(unet, conditions=conditions)


@torch.no_grad()
def decoder_gain(autoencoder: AutoencoderKL3D | VQModel3D, latents: Tensor, size: float = 0.1) -> Tensor:
    """How much each latent channel changes the image.

    Args:
        autoencoder: with latent statistics.
        latents: raw latents (B, c, x, y, z) around which it is measured.
        size: standard deviation of the white noise that is added to one normalised channel after the other.

    Returns:
        (c,) root mean square change of the decoded volume, divided by ``size``.
    """
    autoencoder.eval()
    latents = autoencoder.normalize_latents(latents.to(autoencoder.device))
    noise = torch.randn(latents[:, 0].shape, generator=torch.Generator().manual_seed(0)).to(latents) * size
    volume = autoencoder.decode(autoencoder.denormalize_latents(latents)).sample
    gains = []
    for channel in range(latents.shape[1]):
        perturbed = latents.clone()
        perturbed[:, channel] += noise
        change = autoencoder.decode(autoencoder.denormalize_latents(perturbed)).sample - volume
        gains.append(change.square().mean().sqrt().cpu() / size)
    return torch.stack(gains)


def default_scheduler(
    prediction_type: str = "flow", shift: float = 1.0
) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """A rectified flow; or 1000 scaled-linear steps, with every default that would hurt latents written out.

    The last of these steps is pure noise (Lin et al. 2024, arXiv 2305.08891, algorithm 1): a volume has so many voxels
    that the little signal which these betas leave would show where the anatomy lies, and sampling starts without it. A
    network that predicts the noise can say nothing about pure noise, so for it the little signal stays.

    Args:
        prediction_type: flow, v_prediction, sample or epsilon.
        shift: of a flow; other predictions have none.
    """
    if prediction_type == "flow":
        return flow_scheduler(shift)
    if shift != 1.0:
        raise ValueError(f"shift belongs to prediction_type='flow'; got shift={shift} for {prediction_type!r}.")
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=prediction_type != "epsilon",
    )
