"""How many network evaluations an iteration of PPO fine-tuning needs, by its settings. Counted, not measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Evaluations:
    """Evaluations of one sample by the UNet in one iteration (a rollout and its updates).

    A backward pass counts as two evaluations, as is usual: it computes the gradient of the input and of the weights.
    """

    rollout: float
    update: float
    reference: float
    optimizer_steps: float

    @property
    def per_optimizer_step(self) -> float:
        """All of them over the optimizer steps that they give."""
        return (self.rollout + self.update + self.reference) / self.optimizer_steps


@dataclass(frozen=True)
class Iteration:
    """The settings of `DDPOConfig` that the count depends on, by their names; defaults are those of plain DDPO.

    Plain DDPO (Black et al. 2023, arXiv 2305.13301): 50 steps, all stochastic and trained but the last, which is
    deterministic here, advantages normalised over the batch, a KL to the first policy.
    """

    samples: int = 24
    num_generations: int = 8
    num_inference_steps: int = 50
    sde_window_size: int = 0
    timestep_fraction: float = 1.0
    share_initial_noise: bool = False
    guidance_scale: float = 1.0
    beta: float = 0.01
    loss_type: str = "ddpo"
    forward_times: int = 4
    num_iterations: int = 1
    optimizer_steps: int = 3

    def evaluations(self, start: float | None = None) -> Evaluations:
        """The count for a stochastic window that begins at step `start`; None: the mean, for it is drawn evenly."""
        window = self.sde_window_size or self.num_inference_steps - 1
        trained = max(1, round(window * self.timestep_fraction))
        shared = extra = 0.0
        if self.loss_type == "awm":  # the clean samples are noised at random times, also under the sampling policy
            trained = self.forward_times
            extra = self.samples * self.forward_times
        elif self.share_initial_noise:  # what lies before the window is computed once per condition
            before = (self.num_inference_steps - 1 - window) / 2 if start is None else start
            shared = before * (self.samples - self.samples / self.num_generations)
        passes = self.num_iterations * self.samples * trained
        guided = 1 if self.guidance_scale == 1 else 2
        return Evaluations(
            rollout=guided * (self.samples * self.num_inference_steps - shared + extra),
            update=guided * 3 * passes,
            reference=guided * passes if self.beta else 0.0,
            optimizer_steps=self.num_iterations * self.optimizer_steps,
        )


SWITCHES = {
    "plain DDPO: 50 steps, all trained, batch advantages": Iteration(),
    "--scale_rewards group (group advantages)": Iteration(),
    "--num_inference_steps 10": Iteration(num_inference_steps=10),
    "--sde_window_size 2": Iteration(sde_window_size=2),
    "--sde_window_size 2 --share_initial_noise true": Iteration(sde_window_size=2, share_initial_noise=True),
    "--loss_type awm (forward process) --num_inference_steps 10": Iteration(loss_type="awm", num_inference_steps=10),
    "--timestep_fraction 0.2": Iteration(timestep_fraction=0.2),
    "--beta 0 (no reference)": Iteration(beta=0.0),
    "--num_iterations 2": Iteration(num_iterations=2),
    "--guidance_scale 2": Iteration(guidance_scale=2.0),
    "defaults of ppo_finetune.py: 10 steps, window of 2, shared noise": Iteration(
        num_inference_steps=10, sde_window_size=2, share_initial_noise=True
    ),
}
