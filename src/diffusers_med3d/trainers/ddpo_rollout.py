"""The samples of PPO: what is sampled is a function of (seed, rollout, sample) and of the weights, of nothing else."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import datasets
import torch
from accelerate import Accelerator
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from ..pipelines.conditions import Conditions, call_arguments, encode_rows
from ..pipelines.med_diffusion_3d import MedDiffusion3DPipeline, guided_prediction
from ..rl import (
    Trajectory,
    Transition,
    deterministic_steps,
    forward_timesteps,
    log_prob,
    matching,
    rollout,
    rollout_window,
    transition,
)
from ..schedulers.noising import noised
from ..utils.seeding import derive_seed, generators_for
from ..utils.wrappers import unwrapped
from .ddpo_config import DDPOConfig

INITIAL, SHARED_INITIAL, STEP, EVALUATION, FORWARD = range(5)  # what a random stream is for; part of its seed
PIPELINE_CONFIG = (
    "volume_shape", "spacing", "orientation", "class_names", "channel_names", "intensity", "data_settings",
)  # fmt: skip


class ForwardSamples(NamedTuple):
    """What a forward-process update needs of B samples: the noise is drawn again from its keys."""

    timesteps: tuple[float, ...]  # W
    keys: list[tuple[int, ...]]  # of the noise of each sample, to which the number of the timestep is added
    log_probs: torch.Tensor  # (W, B), under the policy that sampled
    final: torch.Tensor  # (B, c, x, y, z)


def pipeline_with(pipeline: MedDiffusion3DPipeline, unet: nn.Module) -> MedDiffusion3DPipeline:
    """A pipeline of its own that shares everything but the UNet with the user's, which is left as it is."""
    config = {name: pipeline.config[name] for name in PIPELINE_CONFIG}
    return type(pipeline)(**{**pipeline.components, "unet": unet}, **config)


class RolloutSampler:
    """Makes samples with the network that is trained, and says what its steps mean for the update.

    Args:
        pipeline: everything but the network.
        scheduler: of the rollouts, with its timesteps.
        args: of the trainer.
        accelerator: each of its processes makes its share.
    """

    def __init__(
        self,
        pipeline: MedDiffusion3DPipeline,
        scheduler: SchedulerMixin,
        args: DDPOConfig,
        accelerator: Accelerator,
    ) -> None:
        self.pipeline, self.scheduler, self.args, self.accelerator = pipeline, scheduler, args, accelerator
        self.storage = "cpu" if args.offload_trajectories else None
        vae = pipeline.vae
        self.latent_shape = (vae.latent_channels, *vae.latent_shape(tuple(pipeline.config.volume_shape)))

    def window(self, index: int) -> tuple[range, tuple[int, ...]]:
        """Stochastic steps of rollout `index`, and those of them that are trained; see `rollout_window`."""
        return rollout_window(
            len(self.scheduler.timesteps),
            self.args.sde_window_size,
            self.args.timestep_fraction,
            derive_seed(self.args.seed, index),
            self.args.sde_window_range,
        )

    def predict(self, model: nn.Module, sample: torch.Tensor, timestep: int | float, asked: Conditions) -> torch.Tensor:
        """The one way to ask a policy, in rollout, update and reference: same guidance, same autocast, float32 out."""
        scale = self.args.guidance_scale
        with self.accelerator.autocast():
            return guided_prediction(model, sample, timestep, asked.class_labels, scale, asked.others).float()

    def noise(self, keys: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """Standard normal latents (B, c, x, y, z), one for each key."""
        shape = (len(keys), *self.latent_shape)
        return randn_tensor(shape, generator=generators_for(keys), device=self.accelerator.device)

    @torch.no_grad()
    def latents(
        self, unet: nn.Module, rows: datasets.Dataset, keys: Sequence[tuple[int, ...]], steps: int
    ) -> torch.Tensor:
        """Normalised latents (B, c, x, y, z), one sample per row, by the pipeline with this network."""
        sampler = pipeline_with(self.pipeline, unet)
        sampler.set_progress_bar_config(disable=True)
        with self.accelerator.autocast():
            return sampler(
                **call_arguments(self.pipeline, rows),
                latents=self.noise(keys),
                num_inference_steps=steps,
                guidance_scale=self.args.guidance_scale,
                generator=generators_for([(*key, STEP) for key in keys]),
                output_type="latent",
            ).volumes

    def trajectories(
        self, model: nn.Module, index: int, rows: datasets.Dataset, chunks: list[tuple[range, Conditions]]
    ) -> list[Trajectory | ForwardSamples]:
        """Samples of rollout `index` with the stochastic steps that made them.

        Args:
            rows: the P conditions of the rollout; sample i belongs to row i modulo P.
            chunks: numbers of the samples that go through the network together, with their conditions.
        """
        args, seed = self.args, self.args.seed
        window, trained = self.window(index)
        shared = self._until_window(model, index, rows, window) if args.share_initial_noise else None
        trajectories: list[Trajectory | ForwardSamples] = []
        for chunk, own in chunks:
            if shared is not None:
                initial = shared[[i % len(rows) for i in chunk]]
            else:
                initial = self.noise([(seed, index, INITIAL, i) for i in chunk])
            trajectories.append(
                rollout(
                    partial(self.predict, model, asked=own),
                    self.scheduler,
                    initial,
                    generators_for([(seed, index, STEP, i) for i in chunk]),
                    window,
                    trained,
                    args.eta,
                    self.storage,
                    first_step=0 if shared is None else window.start,
                )
            )
        return trajectories

    @torch.no_grad()
    def forward_samples(
        self, model: nn.Module, index: int, rows: datasets.Dataset, chunks: list[tuple[range, Conditions]]
    ) -> list[Trajectory | ForwardSamples]:
        """Samples of rollout `index` by the pipeline's own sampler, with the log-densities of their noised versions.

        Args: as for `trajectories`.
        """
        seed, steps = self.args.seed, self.args.num_inference_steps
        times = forward_timesteps(self.scheduler, self.args.forward_times, derive_seed(seed, index))
        made: list[Trajectory | ForwardSamples] = []
        for chunk, own in chunks:
            asked = rows.select([i % len(rows) for i in chunk])
            keys = [(seed, index, INITIAL, i) for i in chunk]
            final = self.latents(unwrapped(model), asked, keys, steps).float()
            samples = ForwardSamples(times, [(seed, index, FORWARD, i) for i in chunk], torch.empty(0), final)
            log_probs = []
            for w in range(len(times)):
                timestep, states, actions = self.action(samples, w)
                step = self.policy(self.predict(model, states, timestep, own), timestep, states)
                log_probs.append(log_prob(actions, step))
            kept = final.to(self.storage or final.device)
            made.append(samples._replace(log_probs=torch.stack(log_probs), final=kept))
        return made

    def action(self, samples: Trajectory | ForwardSamples, w: int) -> tuple[int | float, torch.Tensor, torch.Tensor]:
        """Timestep, states and actions of the trained step `w`: the next states, or the targets of the prediction."""
        device = self.accelerator.device
        if isinstance(samples, Trajectory):
            timestep = self.scheduler.timesteps[samples.steps[w]].item()
            return timestep, samples.states[w].to(device), samples.next_states[w].to(device)
        noise, timestep = self.noise([(*key, w) for key in samples.keys]), samples.timesteps[w]
        times = torch.full((len(noise),), timestep, device=device)
        return timestep, *noised(self.scheduler, samples.final.to(device), noise, times)

    def policy(self, output: torch.Tensor, timestep: int | float, states: torch.Tensor) -> Transition:
        """The Gaussian of the actions that a prediction stands for."""
        if self.args.loss_type == "awm":
            return matching(output)
        return transition(self.scheduler, output, timestep, states, self.args.eta)

    def _until_window(self, model: nn.Module, index: int, rows: datasets.Dataset, window: range) -> torch.Tensor:
        """States (P, c, x, y, z) at which the samples of each condition part; what comes before is shared.

        Each process computes its share of the conditions, and all get all.
        """
        share = -(-len(rows) // self.accelerator.num_processes)
        positions = [min(self.accelerator.process_index * share + i, len(rows) - 1) for i in range(share)]
        noise = self.noise([(self.args.seed, index, SHARED_INITIAL, p) for p in positions])
        asked = encode_rows(self.pipeline, rows.select(positions))
        states = []
        for first in range(0, share, self.args.per_device_train_batch_size):
            part = slice(first, first + self.args.per_device_train_batch_size)
            own = asked.take(part)
            states.append(
                deterministic_steps(
                    partial(self.predict, model, asked=own),
                    self.scheduler,
                    noise[part],
                    range(window.start),
                )
            )
        return self.accelerator.gather(torch.cat(states))[: len(rows)]
