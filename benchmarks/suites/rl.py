"""One iteration of PPO fine-tuning (rollout, rewards, update) against the bare network calls and plain DDPO.

Then what each switch saves in network evaluations, counted.
"""

import math
import tempfile
from collections.abc import Iterator

import datasets
import torch
from measure import Row, Settings, Times, now, row_of_pairs, timed
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import TrainerCallback

from diffusers_med3d import DDPOConfig, DDPOTrainer, VolumeReward
from suites.evaluations import SWITCHES, Iteration
from suites.networks import make_pipeline, make_reward, monai_networks

BATCH, GENERATIONS, CHUNKS, STEPS, WINDOW = 4, 4, 2, 6, 2
LEARNING_RATE, EPSILON, BETA = 1e-5, 3e-5, 0.01
MOST_PAIRS = 3  # an iteration of all three takes one and a half minutes of a slow core


def rows(settings: Settings) -> Iterator[Row]:
    """Our trainer against two others, in turn within one training run; then one row of counts per switch."""
    bare = {"what": "one iteration, against bare calls", "peer": "the bare network calls that it needs", "bar": 1.05}
    plain = {
        "what": "one iteration, against plain DDPO",
        "peer": "plain DDPO on MONAI's network, training the same steps",
        "bar": 0.7,
    }
    pairs = _alternate(settings, [_BareCalls, _PlainDDPO])
    for own, description in zip(pairs, (bare, plain), strict=True):
        yield row_of_pairs(own, settings.device, suite="rl", **description)
    peer = "plain DDPO"
    base = Iteration().evaluations().per_optimizer_step
    for switch, iteration in SWITCHES.items():
        count = iteration.evaluations()
        note = f"rollout {count.rollout:.0f}, update {count.update:.0f}, reference {count.reference:.0f} an iteration"
        own = count.per_optimizer_step
        what = f"evaluations per optimizer step, {switch}"
        yield Row("rl", what, peer, "", own, base, own / base, note=f"counted; {note}")


class _Peer:
    """The other side's networks and optimizer; `iterate` is one iteration on a window that begins at `first`."""

    def __init__(self, settings: Settings) -> None:
        pipeline = make_pipeline(settings)
        self.device = settings.device
        self.reward = make_reward(settings)
        self.schedule = pipeline.scheduler
        self.schedule.set_timesteps(STEPS)
        self.timesteps = self.schedule.timesteps.tolist()
        self.latent = (pipeline.vae.latent_channels, *pipeline.vae.latent_shape(pipeline.config.volume_shape))
        self.networks(pipeline)
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), LEARNING_RATE)

    def networks(self, pipeline) -> None:
        self.unet, self.vae, self.reference = pipeline.unet, pipeline.vae, make_pipeline_reference(pipeline)

    def noise(self, count: int) -> torch.Tensor:
        return torch.randn(count, *self.latent, device=self.device)

    def iterate(self, first: int) -> None:
        raise NotImplementedError


def make_pipeline_reference(pipeline):
    """A frozen copy of the UNet."""
    reference = type(pipeline.unet).from_config(pipeline.unet.config).to(pipeline.device).eval()
    reference.load_state_dict(pipeline.unet.state_dict())
    return reference.requires_grad_(False)


class _BareCalls(_Peer):
    """Every forward and backward pass of our iteration with nothing around them."""

    def iterate(self, first: int) -> None:
        conditions = BATCH * CHUNKS // GENERATIONS
        with torch.no_grad():
            for _ in range(first):
                self.unet(self.noise(conditions), 500)
            for _ in range(CHUNKS):
                for _ in range(STEPS - first):
                    self.unet(self.noise(BATCH), 500)
            volumes = [self.vae.decode_latents(self.noise(1)) for _ in range(BATCH * CHUNKS)]
            self.reward(torch.cat(volumes))
        for _ in range(CHUNKS):
            states = self.noise(BATCH)
            for _ in range(WINDOW):
                with torch.no_grad():
                    target = self.reference(states, 500).sample
                (self.unet(states, 500).sample - target).square().mean().backward()
            clip_grad_norm_(self.unet.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


class _PlainDDPO(_Peer):
    """DDPO (Black et al. 2023, arXiv 2305.13301) written down step by step, with its KL to the first policy.

    All steps but the last are sampled with noise; the trained ones are kept.
    """

    def networks(self, pipeline) -> None:
        self.unet, self.vae = monai_networks(pipeline)
        self.reference = monai_networks(pipeline)[0].requires_grad_(False)

    def mean_and_std(self, output: torch.Tensor, sample: torch.Tensor, step: int) -> tuple[torch.Tensor, float]:
        """DDIM with eta = 1."""
        timestep = self.timesteps[step]
        previous = timestep - 1000 // STEPS
        alpha = float(self.schedule.alphas_cumprod[timestep])
        before = float(self.schedule.alphas_cumprod[previous]) if previous >= 0 else 1.0
        clean = (sample - math.sqrt(1 - alpha) * output) / math.sqrt(alpha)
        std = math.sqrt((1 - before) / (1 - alpha) * (1 - alpha / before))
        return math.sqrt(before) * clean + math.sqrt(max(1 - before - std**2, 0.0)) * output, std

    def predict(self, network: torch.nn.Module, sample: torch.Tensor, step: int) -> torch.Tensor:
        return network(sample, torch.full((len(sample),), self.timesteps[step], device=self.device))

    @staticmethod
    def log_prob(value: torch.Tensor, mean: torch.Tensor, std: float) -> torch.Tensor:
        return (-((value - mean) ** 2) / (2 * std**2) - math.log(std * math.sqrt(2 * math.pi))).flatten(1).mean(1)

    def iterate(self, first: int) -> None:
        chunks, rewards = [], []
        with torch.no_grad():
            for _ in range(CHUNKS):
                sample, kept = self.noise(BATCH), []
                for step in range(STEPS):
                    mean, std = self.mean_and_std(self.predict(self.unet, sample, step), sample, step)
                    following = mean + std * torch.randn_like(mean)
                    if step in range(first, first + WINDOW):
                        kept.append((step, sample, following, self.log_prob(following, mean, std)))
                    sample = following
                volumes = self.vae.decode_stage_2_outputs(sample).clamp(0, 1)
                rewards.append(self.reward(volumes))
                chunks.append(kept)
        everything = torch.cat(rewards)
        advantages = (everything - everything.mean()) / (everything.std() + 1e-4)
        for kept, advantage in zip(chunks, advantages.split(BATCH), strict=True):
            for step, sample, following, old in kept:
                mean, std = self.mean_and_std(self.predict(self.unet, sample, step), sample, step)
                with torch.no_grad():
                    target, _ = self.mean_and_std(self.predict(self.reference, sample, step), sample, step)
                ratio = torch.exp(self.log_prob(following, mean, std) - old)
                clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
                kl = ((mean - target) ** 2).mean() / (2 * std**2)
                loss = torch.maximum(-advantage * ratio, -advantage * clipped).mean() + BETA * kl
                (loss / len(kept)).backward()
            clip_grad_norm_(self.unet.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


class _Alternate(TrainerCallback):
    """After each of our iterations, runs and times one of every peer's."""

    def __init__(self, peers: list[_Peer], settings: Settings) -> None:
        self.peers, self.settings = peers, settings
        self.trainer: DDPOTrainer | None = None
        self.pairs: list[list[tuple[Times, Times]]] = [[] for _ in peers]

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.bar = tqdm(total=args.max_steps // CHUNKS, desc="iterations of all", leave=False, position=1)
        self.start = now(self.settings.device)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        assert self.trainer is not None
        iteration, rest = divmod(state.global_step, self.trainer.round_steps)
        if rest:
            return
        ours = now(self.settings.device) - self.start
        window, _ = self.trainer.sampler.window(iteration - 1)
        for pairs, peer in zip(self.pairs, self.peers, strict=True):
            theirs = timed(lambda: peer.iterate(window.start), self.settings.device)  # noqa: B023
            if iteration > 1:  # the first warms up
                pairs.append((ours, theirs))
        self.bar.update()
        self.start = now(self.settings.device)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.close()


def _alternate(settings: Settings, kinds: list[type[_Peer]]) -> list[list[tuple[Times, Times]]]:
    callback = _Alternate([kind(settings) for kind in kinds], settings)
    reward = make_reward(settings)
    with tempfile.TemporaryDirectory() as folder:
        args = DDPOConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            num_generations=GENERATIONS,
            steps_per_generation=CHUNKS,
            num_inference_steps=STEPS,
            sde_window_size=WINDOW,
            max_steps=CHUNKS * (min(settings.repeats, MOST_PAIRS) + 1),
            learning_rate=LEARNING_RATE,
            epsilon=EPSILON,
            beta=BETA,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=settings.device == "cpu",
        )
        trainer = DDPOTrainer(
            model=make_pipeline(settings),
            reward_funcs=[VolumeReward(reward)],
            args=args,
            train_dataset=datasets.Dataset.from_dict({"number": [0, 1]}),
            callbacks=[callback],
        )
        callback.trainer = trainer
        trainer.train()
    return callback.pairs
