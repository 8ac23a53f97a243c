"""Arguments of `DDPOTrainer`, in TRL's words where TRL has them."""

import math
from dataclasses import dataclass, field

from ..utils.checks import check_least
from .base import Med3DConfig

EPSILON = {"ddpo": 3e-5, "awm": 1e-2}  # clip range by loss_type
DDPO_ONLY = ("eta", "sde_window_size", "sde_window_range", "timestep_fraction")
AWM_ONLY = ("forward_times",)


@dataclass
class DDPOConfig(Med3DConfig):
    """`transformers.TrainingArguments` plus what the rollout, the objective and the reference policy need.

    How a rollout is laid out: it holds

        num_processes x per_device_train_batch_size x steps_per_generation   samples,

    a multiple of `num_generations`, which gives the number of conditions that one rollout asks for. An optimizer step
    takes

        num_processes x per_device_train_batch_size x gradient_accumulation_steps   samples, at all their trained steps,

    so a rollout makes `num_iterations * steps_per_generation / gradient_accumulation_steps` optimizer steps. With one
    of them the policy that is updated is the policy that sampled: the ratio is 1 and `epsilon` cannot act.

    The defaults are those by which `brain-t1-ppo` was made from `brain-t1`, where 54 steps, two minutes on two CPU
    cores with bfloat16, raised the rewards by 0.03 and 0.05 (from 0.29 and 0.24), with a clip fraction of 0.12 and a KL
    of 2e-3. A rollout holds 24 samples, 8 of each of 3 conditions, and makes 3 steps; 300 steps are 100 rollouts.
    Change `max_steps` first; where `clip_ratio` stays at 0, raise `learning_rate`, and where it passes 0.3, lower it.
    """

    # Defaults of TrainingArguments that fine-tuning by reward wants otherwise
    output_dir: str = field(default="outputs/ddpo", metadata={"help": "Where everything is written."})
    max_steps: int = field(
        default=300, metadata={"help": "Optimizer steps; -1 counts in num_train_epochs, passes over the conditions."}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})
    picture_steps: int = field(
        default=15,
        metadata={
            "help": "Optimizer steps between two pictures of the same samples, by which a run can be watched like a "
            "film: they go to report_to and, one file each, to output_dir/film. 0 makes none."
        },
    )
    save_steps: float = field(default=60, metadata={"help": "Optimizer steps between two checkpoints."})
    logging_steps: float = field(default=1, metadata={"help": "Optimizer steps between two log entries."})
    per_device_train_batch_size: int = field(
        default=8, metadata={"help": "Samples per forward pass, the same in rollout and update."}
    )
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Samples per forward pass in evaluation."})
    ema_decay: float = field(
        default=0.9, metadata={"help": "Decay of the average of the weights that is evaluated and saved; 0 is off."}
    )

    # Rollout
    num_generations: int = field(
        default=8, metadata={"help": "Samples per condition, whose rewards are compared with one another. At least 2."}
    )
    steps_per_generation: int | None = field(
        default=None,
        metadata={
            "help": "Batches of per_device_train_batch_size that one rollout holds per process, a multiple of "
            "gradient_accumulation_steps. Not set: 3 times that, so that a rollout makes 3 steps."
        },
    )
    num_inference_steps: int = field(
        default=10, metadata={"help": "Denoising steps of a rollout; fewer than in evaluation are enough."}
    )
    guidance_scale: float = field(
        default=1.0, metadata={"help": "Classifier-free guidance, in rollout, update and evaluation alike; 1 is off."}
    )
    eta: float = field(
        default=1.0,
        metadata={
            "help": "Noise of a stochastic step, in (0, 1]: eta of DDIM (DDPM is 1 and takes no other); for a flow the "
            "a of Flow-GRPO's sigma_t = a sqrt(t / (1 - t)), where 0.7 is usual."
        },
    )
    sde_window_size: int = field(
        default=2,
        metadata={
            "help": "Consecutive stochastic steps of a rollout, the others are deterministic; 0 makes all stochastic."
        },
    )
    sde_window_range: list[int] | None = field(
        default=None,
        metadata={
            "help": "First and one-past-last step in which the stochastic window is drawn. Not set: all but the last "
            "step, which is deterministic and never trained."
        },
    )
    timestep_fraction: float = field(
        default=1.0, metadata={"help": "Share of the stochastic steps that is trained, drawn anew for each rollout."}
    )
    share_initial_noise: bool | None = field(
        default=None,
        metadata={
            "help": "Start all samples of a condition from one noise, so that their rewards differ by the stochastic "
            "steps alone: less variance, and what comes before the window is computed once. Not set: with ddpo, unless "
            "a reward carries state, for which a dozen noises are too few. With awm a sampler without noise would make "
            "equal samples, and it is refused."
        },
    )
    offload_trajectories: bool = field(
        default=False, metadata={"help": "Keep trajectories and volumes in CPU memory until they are needed."}
    )
    decode_batch_size: int = field(default=4, metadata={"help": "Latents decoded at once."})
    decode_num_splits: int = field(
        default=1,
        metadata={
            "help": "Slabs in which a volume is decoded (AutoencoderKL3D, AutoencoderKLMaisi3D): less memory, the same "
            "volumes. Where MAISI's network cannot have so many for its size, the largest number that fits."
        },
    )

    # Objective
    loss_type: str = field(
        default="ddpo",
        metadata={
            "help": "ddpo: log-probabilities of the stochastic sampling steps. awm: minus the denoising loss of the "
            "clean samples, noised again, in their place; any sampler, and only clean latents are kept."
        },
    )
    forward_times: int = field(
        default=4, metadata={"help": "Random times at which awm noises every sample of a rollout."}
    )
    num_iterations: int = field(default=1, metadata={"help": "Passes over each rollout."})
    epsilon: float | None = field(
        default=None,
        metadata={
            "help": "Clip range of the probability ratio. Log-probabilities are means over the latent, so it is small; "
            "watch clip_ratio, and change it with learning_rate. Not set: 3e-5 with ddpo, 1e-2 with awm."
        },
    )
    beta: float = field(
        default=0.01, metadata={"help": "Weight of the KL to the reference policy; 0 loads no reference at all."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per reward function. Not set: all 1."}
    )
    multi_objective_aggregation: str = field(
        default="normalize_then_sum",
        metadata={"help": "normalize_then_sum (each reward alone, then weighed) or sum_then_normalize."},
    )
    scale_rewards: str = field(
        default="batch",
        metadata={"help": "Divide centred rewards by the std of the whole 'batch', of the own 'group', or by 'none'."},
    )
    reward_timeout: float = field(
        default=1800.0,
        metadata={"help": "Seconds that one reward may take for the volumes of a process; inf: any time."},
    )
    max_failed_rollouts: int = field(
        default=3,
        metadata={
            "help": "Rollouts in a row for which one reward fails, or scores nothing, before the run stops. Samples "
            "without a score have no influence. A reward that never worked stops the run at once."
        },
    )
    advantage_clip: float = field(default=5.0, metadata={"help": "Advantages are clipped to plus and minus this."})
    sync_ref_model: bool = field(
        default=False,
        metadata={"help": "Let the reference policy follow every ref_model_sync_steps steps (full fine-tuning only)."},
    )
    ref_model_sync_steps: int = field(default=50, metadata={"help": "Optimizer steps between two such refreshes."})

    # Evaluation
    num_generations_eval: int = field(default=1, metadata={"help": "Samples per condition in evaluation."})
    eval_num_inference_steps: int = field(default=20, metadata={"help": "Denoising steps in evaluation."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps_per_generation is None:
            self.steps_per_generation = 3 * self.gradient_accumulation_steps
        if self.epsilon is None:
            self.epsilon = EPSILON.get(self.loss_type, 1.0)
        choices = {
            "loss_type": tuple(EPSILON),
            "multi_objective_aggregation": ("normalize_then_sum", "sum_then_normalize"),
            "scale_rewards": ("batch", "group", "none"),
        }
        for name, allowed in choices.items():
            if vars(self)[name] not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {vars(self)[name]!r}.")
        least = {
            "num_generations": 2,
            "num_iterations": 1,
            "num_inference_steps": 2,
            "eval_num_inference_steps": 1,
            "num_generations_eval": 1,
            "decode_batch_size": 1,
            "decode_num_splits": 1,
            "ref_model_sync_steps": 1,
            "max_failed_rollouts": 1,
            "sde_window_size": 0,
            "forward_times": 1,
            "steps_per_generation": 1,
            "beta": 0.0,
            "guidance_scale": 0.0,
        }
        check_least(vars(self), least)
        if not all(map(math.isfinite, self.reward_weights or [])):
            raise ValueError(f"reward_weights must be finite, got {self.reward_weights}.")
        for name in ("epsilon", "advantage_clip", "reward_timeout"):
            if vars(self)[name] <= 0:
                raise ValueError(f"{name} must be positive, got {vars(self)[name]}.")
        if not 0 < self.timestep_fraction <= 1:
            raise ValueError(f"timestep_fraction must lie in (0, 1], got {self.timestep_fraction}.")
        if self.sde_window_range is not None and len(self.sde_window_range) != 2:
            raise ValueError(f"sde_window_range must be two steps, got {self.sde_window_range}.")
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation ({self.steps_per_generation}) must be a multiple of gradient_accumulation_steps "
                f"({self.gradient_accumulation_steps}), so that no optimizer step mixes two rollouts."
            )
        foreign = AWM_ONLY if self.loss_type == "ddpo" else DDPO_ONLY
        changed = [name for name in foreign if vars(self)[name] != type(self).__dataclass_fields__[name].default]
        if self.loss_type == "awm" and self.share_initial_noise:
            changed.append("share_initial_noise")
        if changed:
            raise ValueError(
                f"{', '.join(changed)} cannot act with loss_type={self.loss_type!r}; leave out what is set."
            )
        if self.sync_ref_model and self.beta == 0:
            raise ValueError(
                "sync_ref_model needs beta > 0: without a KL term there is no reference policy to refresh."
            )
