"""Stage 4: fine-tune a 3D diffusion model with PPO against any rewards (DDPO with group-relative advantages).

The denoising chain is a Markov decision process whose actions are the stochastic denoising steps (DDPO, Black et al.
2023, arXiv 2305.13301); the loop reads rollout -> rewards -> advantages -> clipped update.

Why this is still PPO although it has no critic: PPO (Schulman et al. 2017, arXiv 1707.06347) is the clipped surrogate
on samples of an older policy, for *any* advantage estimate. A critic is one way to get the baseline that is subtracted
from the return. Here the reward comes once, after the last step, so all actions of a chain share one return, and the
baseline is the mean reward of other samples of the same condition: a Monte-Carlo estimate of the value of that
condition, without the bias of a value network, that costs samples instead of a second 3D network (Shao et al. 2024,
arXiv 2402.03300). The KL to the pre-trained policy is a penalty of its own, in closed form, since every step is a
Gaussian of known variance.
"""

import math
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from matplotlib.figure import Figure
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import set_seed

from .. import viz
from ..data import check_same_settings, settings_of
from ..hub.origin import inherited_license, public_name
from ..metrics import diversity, sharpness
from ..models import VQModel3D
from ..pipelines.conditions import (
    LABEL_COLUMN,
    Conditions,
    as_conditions,
    encode_rows,
    names_by_index,
)
from ..pipelines.lora import lora_layers, write_lora
from ..pipelines.med_diffusion_3d import MedDiffusion3DPipeline
from ..rewards.learned import LearnedReward
from ..rewards.loading import Reward, load_rewards
from ..rewards.scoring import score
from ..rewards.stateful import StatefulReward
from ..rl import (
    Trajectory,
    check_scheduler,
    check_signature,
    clip_fraction,
    clipped_loss,
    gaussian_kl,
    group_advantages,
    log_prob,
    reward_names,
    rollout_window,
)
from ..schedulers.flow import set_timesteps
from ..utils.hashing import tensor_hash
from ..utils.seeding import derive_seed
from ..utils.stopping import TrainingStopped
from ..utils.wrappers import unwrapped
from .base import Med3DTrainer, keep_small_convolutions_exact
from .ddpo_config import DDPOConfig
from .ddpo_logging import CLIP_RATIO, FIRST_RATIO, LARGEST_RATIO, Recorder, Watch
from .ddpo_rollout import EVALUATION, ForwardSamples, RolloutSampler, pipeline_with
from .lora import add_lora, check_no_lora, enable_lora, merged
from .sharding import gathered_weights

REFERENCE_FILE = "reference.safetensors"
REWARD_FILE = "reward_{}.safetensors"  # state of the reward of that number
FILMED = 4  # conditions of the pictures by which a run is watched
DIVERSITY_OF = 8  # volumes; the number of pairs grows with its square


def usable(volumes: torch.Tensor) -> torch.Tensor:
    """Which of the volumes (N, C, X, Y, Z) hold neither NaN nor infinity: bool (N,)."""
    return volumes.isfinite().flatten(1).all(1)


class Chunk(NamedTuple):
    """B samples that go through the network together, in the rollout and in every update."""

    trajectory: Trajectory | ForwardSamples
    conditions: Conditions
    advantages: torch.Tensor  # (B,)


class Scored(NamedTuple):
    """Samples of all processes, on the CPU: `volumes` (N, C, X, Y, Z), `labels` (N,), `rewards` (N, R)."""

    volumes: torch.Tensor
    labels: torch.Tensor | None
    rewards: torch.Tensor


class _Boundaries(TrainerCallback):
    """Moves checkpoints between two rollouts (a rollout is not stored) and refreshes the reference after a step."""

    def __init__(self, trainer: "DDPOTrainer") -> None:
        self.trainer = trainer
        self.save_is_due = False

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.save_is_due = False
        self.trainer.forget_rollout()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.save_is_due |= control.should_save
        is_boundary = state.global_step % self.trainer.round_steps == 0 or state.global_step >= state.max_steps
        control.should_save = self.save_is_due and is_boundary
        self.save_is_due &= not control.should_save
        if args.sync_ref_model and state.global_step % args.ref_model_sync_steps == 0:
            self.trainer.sync_reference()


class DDPOTrainer(Med3DTrainer):
    """Fine-tunes the UNet of a pipeline with PPO.

    Args:
        model: pipeline with a DDIM, DDPM or FlowMatchEulerDiscrete scheduler, or what
            `MedDiffusion3DPipeline.from_pretrained` takes. Its UNet is trained in place.
        reward_funcs: one or more rewards, in any mixture: callables
            `f(volumes, **conditions) -> list[float | None] | Tensor[B]`, sync or async, reward models, and names as
            `load_reward` takes them ("brain-t1-reward-3d", a folder, "my_rewards.py:symmetry").
            `volumes` is float32 (B, C, X, Y, Z) in [0, 1]; `conditions` are the dataset's columns as lists of B. None
            or NaN means "could not score": that sample gets zero advantage.
        args: see `DDPOConfig`.
        train_dataset: conditions, one per row, as a `datasets.Dataset` or a list of dicts. Column `class_label` (index,
            name or None) conditions the generator, and so do the columns named in `unet.condition_names` of a
            `DiffusionUNetMaisi3D` (but spacing: the pipeline's); all columns go to the reward functions. Three rows are
            enough: rows are used again.
        eval_dataset: conditions of the evaluation, default `train_dataset`.
        peft_config: LoRA instead of full fine-tuning; with `target_modules=None` all linear layers and convolutions but
            the 1x1x1 ones. The reference policy is then the UNet with the adapters off.
        callbacks, optimizers: as in `transformers.Trainer`.

    Evaluation and `save_pretrained` use the average of the weights (`ema_decay`). Dropout is off in rollout and update.
    Noise is keyed by (seed, rollout, global sample index): a resumed run repeats exactly, and two processes draw what
    one process would have drawn.

    Raises:
        ValueError: for a scheduler without step densities, sizes that do not divide, missing or unknown conditions; for
            evaluations within a rollout when the best checkpoint is to be kept.
    """

    _name = "DDPO"
    _tag_names = ["diffusers-med3d", "reinforcement-learning", "ddpo", "ppo"]

    def __init__(
        self,
        model: MedDiffusion3DPipeline | str,
        reward_funcs: Reward | Sequence[Reward],
        args: DDPOConfig | None = None,
        train_dataset: datasets.Dataset | Sequence[dict[str, Any]] | None = None,
        eval_dataset: datasets.Dataset | Sequence[dict[str, Any]] | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
    ) -> None:
        args = DDPOConfig() if args is None else args
        pipeline = model if isinstance(model, MedDiffusion3DPipeline) else MedDiffusion3DPipeline.from_pretrained(model)
        self.pipeline = pipeline
        self.reward_funcs = load_rewards(reward_funcs)
        self.reward_names = reward_names(self.reward_funcs)
        for func, name in zip(self.reward_funcs, self.reward_names, strict=True):
            if isinstance(func, LearnedReward):
                own, known = settings_of(pipeline), settings_of(func.model)
                check_same_settings(own, known, ("the generator", f"the reward {name}"), func.same_settings)
                if known.volume_shape not in (None, own.volume_shape):
                    warnings.warn(
                        f"the reward {name} was trained on volumes of {known.volume_shape} voxels and scores "
                        f"{own.volume_shape}: it takes them, but nothing says that it judges them as well.",
                        stacklevel=2,
                    )
        self.stateful: dict[str, StatefulReward] = {}
        for name, func in zip(self.reward_names, self.reward_funcs, strict=True):
            if isinstance(func, StatefulReward):
                self.stateful[name] = func
        if args.share_initial_noise is None:
            args.share_initial_noise = args.loss_type == "ddpo" and not self.stateful
        if args.share_initial_noise and self.stateful:
            raise ValueError(
                f"share_initial_noise must be False with {', '.join(self.stateful)}: what such a reward learns from a "
                "rollout would come from one noise per condition."
            )
        if args.reward_weights is not None and len(args.reward_weights) != len(self.reward_funcs):
            raise ValueError(f"Found {len(args.reward_weights)} reward_weights for rewards {self.reward_names}.")
        tables = [as_conditions(train_dataset, "train_dataset")]
        if eval_dataset is not None:
            tables.append(as_conditions(eval_dataset, "eval_dataset"))
        train_dataset, eval_dataset = tables[0], tables[1] if eval_dataset is not None else None

        for rows in tables:
            if pipeline.unet.null_class is not None and LABEL_COLUMN not in rows.column_names:
                raise ValueError(
                    f"there is no column {LABEL_COLUMN!r}, only {rows.column_names}, and this generator has classes; "
                    f"{LABEL_COLUMN}=[None] asks for the null class."
                )
            encode_rows(pipeline, rows)  # what cannot be asked for is refused now, not after a rollout
            for func, name in zip(self.reward_funcs, self.reward_names, strict=True):
                check_signature(func, name, rows.column_names)
        pipeline.check_scheduler()
        self.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        if args.loss_type == "ddpo":
            check_scheduler(pipeline.scheduler, args.eta)
            set_timesteps(self.scheduler, args.num_inference_steps)
            rollout_window(
                args.num_inference_steps, args.sde_window_size, args.timestep_fraction, 0, args.sde_window_range
            )  # refuses a window that does not fit

        set_seed(args.seed)  # adapters start the same on every rank and in a resumed run
        unet = unwrapped(pipeline.unet).float()
        pipeline.vae.requires_grad_(False).eval()
        if args.decode_num_splits > 1:
            if isinstance(pipeline.vae, VQModel3D):
                raise ValueError(f"decode_num_splits must be 1 for a VQModel3D, got {args.decode_num_splits}.")
            latent_shape = pipeline.vae.latent_shape(tuple(pipeline.config.volume_shape))
            pipeline.vae.set_num_splits(pipeline.vae.fitting_splits(args.decode_num_splits, latent_shape))
        start = tensor_hash(unet.state_dict().items())
        self.reference: nn.Module | None = None
        if peft_config is not None:
            if args.sync_ref_model:
                raise ValueError(
                    "sync_ref_model is for full fine-tuning: with LoRA the reference is the frozen base itself."
                )
            add_lora(unet, peft_config)
        else:
            check_no_lora(unet)
            unet.requires_grad_(True)
            if args.beta > 0:
                self.reference = type(unet).from_config(unet.config)
                self.reference.load_state_dict(unet.state_dict())
                self.reference.requires_grad_(False).eval()
                keep_small_convolutions_exact(self.reference, args)  # as the policy's will be

        super().__init__(
            model=unet,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=train_dataset if eval_dataset is None else eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.origin = {"rewards": self.reward_names, "weights at the start (--model_name_or_path)": start}
        self.add_callback(_Boundaries(self))
        device = self.accelerator.device
        for module in (unet, pipeline.vae):  # FSDP and DeepSpeed place the network only when training begins
            module.to(device)
        if self.reference is not None:
            self.reference.to(device)
        for func in self.reward_funcs:
            if isinstance(func, LearnedReward):
                func.to(device)

        assert args.steps_per_generation is not None and args.epsilon is not None  # the config filled in their defaults
        self.samples_per_process = args.per_device_train_batch_size * args.steps_per_generation
        total = self.samples_per_process * self.accelerator.num_processes
        if total % args.num_generations:
            raise ValueError(
                f"A rollout of {self.accelerator.num_processes} processes x {args.per_device_train_batch_size} "
                f"per_device_train_batch_size x {args.steps_per_generation} steps_per_generation = {total} samples "
                f"must be a multiple of num_generations ({args.num_generations})."
            )
        self.conditions_per_rollout = total // args.num_generations
        self.rollouts_per_epoch = -(-len(train_dataset) // self.conditions_per_rollout)
        self.batches_per_rollout = args.num_iterations * args.steps_per_generation
        self.round_steps = self.batches_per_rollout // args.gradient_accumulation_steps
        chooses = args.load_best_model_at_end or args.save_strategy == "best"
        if chooses and args.eval_strategy == "steps" and args.eval_steps % self.round_steps:
            raise ValueError(
                f"eval_steps must be a whole multiple of {self.round_steps} to keep the best checkpoint, which lies "
                f"between two rollouts; got {args.eval_steps}."
            )
        self.sampler = RolloutSampler(pipeline, self.scheduler, args, self.accelerator)
        self._chunks: list[Chunk] = []
        self._rollout_index = -1
        self._record = Recorder()
        self._failed_rollouts: list[int | None] = [None] * len(self.reward_funcs)  # None: has never scored anything
        self._watch = Watch(args.epsilon)
        self.card_notes = f"Rewards: {', '.join(self.reward_names)}."
        self.card_base_model = public_name(pipeline)
        self.card_data = "Fine-tuning read no scans: the generator learned from scores of its own samples."
        self.inherited_license = inherited_license(pipeline, pipeline.unet, pipeline.vae)

    def forget_rollout(self) -> None:
        """Drop the stored rollout and what was recorded of it; the next batch makes a new one."""
        self._chunks, self._rollout_index = [], -1
        self._record.clear()

    # Rollout: what is sampled is a function of (seed, rollout index, sample index) and of the weights, of nothing else.

    def _condition_rows(self, index: int) -> list[int]:
        """Rows of `train_dataset` for rollout `index`: a new permutation every epoch, filled up by wrapping."""
        epoch, position = divmod(index, self.rollouts_per_epoch)
        generator = torch.Generator().manual_seed(derive_seed(self.args.seed, epoch))
        order = torch.randperm(len(self.train_dataset), generator=generator).tolist()
        first = position * self.conditions_per_rollout
        return [order[(first + i) % len(order)] for i in range(self.conditions_per_rollout)]

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents (B, c, x, y, z) to float32 volumes (B, C, X, Y, Z) in [0, 1], in chunks."""
        with self.accelerator.autocast():
            latents = latents.to(self.accelerator.device)
            return self.pipeline.decode_latents(latents, self.args.decode_batch_size).float()

    def _generate(self, model: nn.Module, index: int) -> list[Chunk]:
        """One rollout: sample, decode, score, compare. The layout of its P x G samples, here P = 3, G = 4, two
        processes:

        condition    0 1 2 0 1 2 | 0 1 2 0 1 2
        generation   0 0 0 1 1 1 | 2 2 2 3 3 3
        sample       0 1 2 3 4 5 | 6 7 8 9 .. 11
                     process 0   |   process 1      each cut into chunks of per_device_train_batch_size
        """
        args = self.args
        rows = self.train_dataset.select(self._condition_rows(index))
        start = self.accelerator.process_index * self.samples_per_process
        samples = range(start, start + self.samples_per_process)
        conditions = rows.select([i % len(rows) for i in samples])
        asked = encode_rows(self.pipeline, conditions)
        size, storage = args.per_device_train_batch_size, self.sampler.storage
        parts = [slice(first, first + size) for first in range(0, len(samples), size)]
        chunks = [(samples[part], asked.take(part)) for part in parts]

        with self._record.timed("rollout"):
            make = self.sampler.trajectories if args.loss_type == "ddpo" else self.sampler.forward_samples
            trajectories = make(model, index, rows, chunks)
        with self._record.timed("decode"):
            volumes = torch.cat([self.decode(t.final).to(storage or t.final.device) for t in trajectories])
        with self._record.timed("reward"):
            columns = {name: list(conditions[name]) for name in conditions.column_names}
            self._update_rewards(volumes, rows)
            own_rewards = self._score(volumes, columns)
            broken = ~usable(volumes).cpu()
            own_rewards[broken] = torch.nan  # whatever a reward made of them
        rewards = self.accelerator.gather(own_rewards.to(self.accelerator.device)).cpu()  # (G * P, R), by sample index
        self._count_failures(rewards, int(self.accelerator.gather(broken.to(self.accelerator.device)).sum()))

        by_condition = rewards.view(args.num_generations, len(rows), -1).transpose(0, 1).reshape(rewards.shape)
        advantages = group_advantages(
            by_condition,
            args.num_generations,
            args.reward_weights,
            args.multi_objective_aggregation,
            args.scale_rewards,
            args.advantage_clip,
        )
        values = advantages.values.view(len(rows), args.num_generations).T.reshape(-1)[start : start + len(samples)]
        with self._record.timed("metrics"):
            self._record_rollout(rewards, advantages.frac_zero_std, volumes, len(rows), samples)
        values = values.to(self.accelerator.device).split(args.per_device_train_batch_size)
        return [Chunk(made, own, some) for made, (_, own), some in zip(trajectories, chunks, values, strict=True)]

    def _update_rewards(self, volumes: torch.Tensor, rows: datasets.Dataset) -> None:
        """Give the samples of all processes, in their order, to the rewards that carry state."""
        if not self.stateful:
            return
        batches = volumes.split(self.args.decode_batch_size)  # not all volumes of all processes on the device at once
        gathered = [self.accelerator.gather(batch[None].to(self.accelerator.device)).cpu() for batch in batches]
        everyone = torch.cat(gathered, dim=1).flatten(0, 1)
        asked = rows.select([i % len(rows) for i in range(len(everyone))])
        for stateful in self.stateful.values():
            stateful.update(everyone.clone(), **{name: list(asked[name]) for name in asked.column_names})

    def _score(self, volumes: torch.Tensor, columns: dict[str, list[Any]]) -> torch.Tensor:
        limit = self.args.reward_timeout
        return score(
            self.reward_funcs,
            self.reward_names,
            volumes,
            columns,
            timeout=limit if math.isfinite(limit) else None,
            keep_going=True,
        )

    def _count_failures(self, rewards: torch.Tensor, broken: int) -> None:
        """Stop, in all processes alike, where a reward scores nothing in too many rollouts or never did."""
        for r, name in enumerate(self.reward_names):
            if not rewards[:, r].isnan().all():
                self._failed_rollouts[r] = 0
                continue
            never, count = self._failed_rollouts[r] is None, (self._failed_rollouts[r] or 0) + 1
            if never or count >= self.args.max_failed_rollouts:
                so_far = "any sample yet" if never else f"a sample in {count} rollouts in a row"
                raise TrainingStopped(
                    f"Reward {name!r} has not scored {so_far}; {broken} of {len(rewards)} samples are not finite, and "
                    "the warnings above say where the reward itself failed. The weights are as before this rollout."
                )
            warnings.warn(
                f"Reward {name!r} scored none of the samples of a rollout, which has no influence.", stacklevel=2
            )
            self._failed_rollouts[r] = count

    def _record_rollout(
        self,
        rewards: torch.Tensor,
        frac_zero_std: torch.Tensor,
        volumes: torch.Tensor,
        conditions: int,
        samples: range,
    ) -> None:
        for r, name in enumerate(self.reward_names):
            scored = rewards[:, r][~rewards[:, r].isnan()]
            if len(scored):
                self._record(f"rewards/{name}/mean", scored.mean().item())
                self._record(f"rewards/{name}/std", scored.std(correction=0).item())
            self._record(f"rewards/{name}/frac_zero_std", frac_zero_std[r].item())
            self._record(f"rewards/{name}/unscored", rewards[:, r].isnan().float().mean().item())
        self._record("rewards/unscored", rewards.isnan().any(dim=1).float().mean().item())
        # Never rewards: if these fall while rewards rise, the rewards are being cheated
        self._record("quality/sharpness", sharpness(volumes).nanmean().item())
        # of one condition; with share_initial_noise its samples differ by the stochastic steps alone
        first_condition = [j for j, i in enumerate(samples) if i % conditions == 0][: DIVERSITY_OF // 2]
        spread = diversity(volumes[first_condition]).mean if len(first_condition) > 1 else float("nan")
        self._record("quality/diversity", spread)

    # Update

    def get_train_dataloader(self) -> DataLoader:
        """Numbers of the batches of one epoch. Every process gets all of them: samples are divided in `_generate`."""
        count = self.rollouts_per_epoch * self.batches_per_rollout
        batches: Any = range(count)  # has __len__ and __getitem__, all that a DataLoader needs of a dataset
        return DataLoader(batches, batch_size=1, collate_fn=lambda items: {"batch": items[0]})

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One chunk of samples: the gradients of its trained steps add up, each step in a backward pass of its own."""
        accumulation = self.args.gradient_accumulation_steps
        batch = self.state.global_step * accumulation + inputs["batch"] % accumulation
        index, position = divmod(batch, self.batches_per_rollout)
        model.eval()  # dropout in the update and none in the rollout would be another policy
        if index != self._rollout_index:
            self._chunks = []  # frees the last rollout before the next one is made
            self._chunks = self._generate(model, index)
            self._rollout_index = index

        chunk = self._chunks[position % len(self._chunks)]
        samples, count = chunk.trajectory, len(chunk.trajectory.log_probs)
        synchronize = self.accelerator.sync_gradients
        total = torch.zeros((), device=self.accelerator.device)
        with self._record.timed("update"):
            for w in range(count):
                is_last = w == count - 1
                self.accelerator.gradient_state._set_sync_gradients(synchronize and is_last)
                with nullcontext() if is_last else self.accelerator.no_sync(model):
                    timestep, states, actions = self.sampler.action(samples, w)
                    transition_inputs = {
                        "timestep": timestep,
                        "states": states,
                        "actions": actions,
                        "log_probs": samples.log_probs[w],
                        "advantages": chunk.advantages,
                        "conditions": chunk.conditions,
                        "on_policy": position < accumulation,
                    }
                    loss = self.compute_loss(model, transition_inputs) / (count * accumulation)
                    self.accelerator.backward(loss, **self._backward_options())
                total += loss.detach()
        self.note_loss(total)
        return total

    def _backward_options(self) -> dict[str, bool]:
        return {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Clipped surrogate plus beta times KL, mean over B transitions at one timestep."""
        args, states, t = self.args, inputs["states"], inputs["timestep"]
        reference = self._reference_transition(states, t, inputs["conditions"])
        step = self.sampler.policy(self.sampler.predict(model, states, t, inputs["conditions"]), t, states)
        advantages = inputs["advantages"]
        losses, ratio = clipped_loss(log_prob(inputs["actions"], step), inputs["log_probs"], advantages, args.epsilon)
        loss = losses.mean()
        if reference is not None:
            kl = gaussian_kl(step, reference).mean()
            loss = loss + args.beta * kl
            self._record("kl", kl.item())
        ratio = ratio.detach()
        self._record("ratio/mean", ratio.mean().item())
        if inputs["on_policy"]:
            self._record(FIRST_RATIO, (ratio - 1).abs().max().item())
        else:
            self._record(CLIP_RATIO, clip_fraction(ratio, advantages, args.epsilon).item())
            self._record(LARGEST_RATIO, (ratio - 1).abs().max().item())
        return loss

    def _reference_transition(self, states: torch.Tensor, t: int | float, asked: Conditions):
        if self.args.beta == 0:
            return None
        with torch.no_grad():
            if self.reference is not None:
                output = self.sampler.predict(self.reference, states, t, asked)
            else:
                enable_lora(self.model, False)
                try:
                    output = self.sampler.predict(self.model, states, t, asked)
                finally:
                    enable_lora(self.model, True)
            return self.sampler.policy(output, t, states)

    def sync_reference(self) -> None:
        """Let the reference policy be the current one from here on."""
        if self.reference is None:
            raise ValueError("there is no reference policy to refresh: it needs beta > 0 and no adapters.")
        self.reference.load_state_dict(gathered_weights(self.model))

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to the entries of training what was recorded since the last one."""
        if "loss" in logs:
            logs |= self._record.flush(self.accelerator)
            self._watch(logs)
        super().log(logs, start_time)

    # Evaluation

    @torch.no_grad()
    def _sample(
        self, conditions: datasets.Dataset, own: Sequence[int], each: int, seed: int, bar: tqdm
    ) -> torch.Tensor:
        """Volumes of the samples `own` of this process, (N, C, X, Y, Z) on the CPU; `each` samples belong to a row."""
        self.model.eval()
        rows = conditions.select([i // each for i in own])
        volumes = []
        with self.ema_weights(), bar:
            for first in range(0, len(own), self.args.per_device_eval_batch_size):
                chunk = own[first : first + self.args.per_device_eval_batch_size]
                keys = [(seed, 0, EVALUATION, i) for i in chunk]
                own_rows = rows.select(range(first, first + len(chunk)))
                latents = self.sampler.latents(self.model, own_rows, keys, self.args.eval_num_inference_steps)
                volumes.append(self.decode(latents).cpu())
                bar.update(len(chunk))
        return torch.cat(volumes)

    @torch.no_grad()
    def sample_and_score(
        self,
        conditions: datasets.Dataset,
        num_generations: int = 1,
        seed: int | None = None,
        description: str = "Sampling",
    ) -> Scored:
        """Sample with the averaged weights, `eval_num_inference_steps` steps without noise, and score.

        Sample i belongs to row `i // num_generations`; its noise depends on the seed and i alone, so that calls before
        and after training can be compared in pairs. With several processes each makes its share and gets all.
        """
        seed = self.args.seed if seed is None else seed
        total, processes = len(conditions) * num_generations, self.accelerator.num_processes
        if total < 1:
            raise ValueError(f"Nothing to sample: {len(conditions)} condition(s), {num_generations} sample(s) of each.")
        share = -(-total // processes)
        own = [min(self.accelerator.process_index * share + i, total - 1) for i in range(share)]
        rows = conditions.select([i // num_generations for i in own])
        bar = tqdm(
            total=share,
            desc=description,
            unit="volume",
            disable=self.args.disable_tqdm or not self.is_world_process_zero(),
        )
        own_volumes = self._sample(conditions, own, num_generations, seed, bar)
        columns = {name: list(rows[name]) for name in rows.column_names}
        device = self.accelerator.device
        rewards = self._score(own_volumes.to(device), columns)
        rewards[~usable(own_volumes)] = torch.nan  # whatever a reward made of them
        rewards = self.accelerator.gather(rewards.to(device)).cpu()[:total]
        batches = own_volumes.split(self.args.per_device_eval_batch_size)
        # every batch (1, b, ...) becomes (processes, b, ...): not all volumes are on the device at once
        volumes = torch.cat([self.accelerator.gather(batch[None].to(device)).cpu() for batch in batches], dim=1)
        asked = encode_rows(self.pipeline, conditions.select([i // num_generations for i in range(total)]))
        labels = None if asked.class_labels is None else asked.class_labels.cpu()
        return Scored(volumes.flatten(0, 1)[:total], labels, rewards)

    def film_figures(self) -> dict[str, Figure]:
        """Two samples of each of the first conditions, from the same noise every time."""
        rows = self.eval_dataset.select(range(min(FILMED, len(self.eval_dataset))))
        samples = self._sample(rows, range(2 * len(rows)), 2, self.args.seed, tqdm(disable=True))
        names = names_by_index(self.pipeline)
        labels = rows[LABEL_COLUMN] if LABEL_COLUMN in rows.column_names else [None] * len(rows)
        pictured: dict[str, list[torch.Tensor]] = {}
        for label, pair in zip(labels, samples.split(2), strict=True):
            name = "samples" if label is None else names.get(label, str(label))
            pictured.setdefault(name, []).extend(pair)
        return {"samples": viz.volume_rows(pictured, spacing=self.pipeline.config.spacing, title=self.film_title)}

    def evaluate(
        self,
        eval_dataset: datasets.Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Rewards and quality of `num_generations_eval` samples per condition, from the same noise every time.

        Samples that are NaN or infinite are left out and counted as `unjudged`, those that a reward could not score as
        `rewards/<name>/unscored`, a share.
        """
        conditions = self.eval_dataset if eval_dataset is None else eval_dataset
        start = time.perf_counter()
        scored = self.sample_and_score(conditions, self.args.num_generations_eval)
        volumes = scored.volumes[usable(scored.volumes)]
        metrics = {}
        for r, name in enumerate(self.reward_names):
            metrics[f"rewards/{name}"] = scored.rewards[:, r].nanmean().item()
            if scored.rewards[:, r].isnan().any():
                metrics[f"rewards/{name}/unscored"] = scored.rewards[:, r].isnan().float().mean().item()
        if len(volumes) < len(scored.volumes):
            metrics["unjudged"] = float(len(scored.volumes) - len(volumes))
            warnings.warn(
                f"{len(scored.volumes) - len(volumes)} of {len(scored.volumes)} samples of an evaluation are NaN or "
                "infinite and are left out.",
                stacklevel=2,
            )
        metrics["quality/sharpness"] = sharpness(volumes).nanmean().item() if len(volumes) else math.nan
        if len(volumes) > 1:
            metrics["quality/diversity"] = diversity(volumes[:DIVERSITY_OF]).mean
        metrics["runtime"] = time.perf_counter() - start
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        picture = viz.volume_rows({"samples": scored.volumes[:4]}, spacing=self.pipeline.config.spacing)
        self.log_figure(f"{metric_key_prefix}_samples", picture)
        return self.conclude_evaluation(metrics)

    # Saving

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a whole pipeline that `MedDiffusion3DPipeline.from_pretrained(folder)` loads, with the averaged
        weights.

        With LoRA the adapters are *merged* into the UNet that is written, so that loading needs no PEFT, and written
        once more alone as `pytorch_lora_weights.safetensors`, for `load_lora_weights` of the base pipeline (not of this
        one, which has them). Only the main process writes and nobody waits, so it may be called on one process or on
        all.
        """
        if not self.is_world_process_zero():
            return
        with self.ema_weights():
            pipeline_with(self.pipeline, merged(self.model)).save_pretrained(folder)
            if lora_layers(self.model):
                write_lora(self.model, folder, "default")

    # The reference is the starting point, which a resumed run loads anyway, unless it has been refreshed. Rewards that
    # carry state are as they were after the last rollout.

    def _save_extras(self, folder: Path) -> None:
        super()._save_extras(folder)
        if self.reference is not None and self.args.sync_ref_model:
            save_file(self.reference.state_dict(), folder / REFERENCE_FILE)
        for name, stateful in self.stateful.items():
            state = {key: tensor.detach().cpu().contiguous() for key, tensor in stateful.state_dict().items()}
            save_file(state, folder / REWARD_FILE.format(self.reward_names.index(name)))

    def _load_extras(self, folder: Path) -> None:
        super()._load_extras(folder)
        if self.reference is not None and self.args.sync_ref_model:
            self.reference.load_state_dict(load_file(folder / REFERENCE_FILE))
        for name, stateful in self.stateful.items():
            path = folder / REWARD_FILE.format(self.reward_names.index(name))
            if not path.is_file():
                raise ValueError(f"{folder} holds no state of the reward {name!r} ({path.name}).")
            stateful.load_state_dict(load_file(path))
