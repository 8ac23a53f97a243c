"""Whether a long run leaks: many PPO iterations of a tiny generator, with checkpoints, evaluations, logs and pictures.

    python benchmarks/long_run.py
    python benchmarks/long_run.py --iterations 5000 --device cuda

Prints memory and open files after the warm-up and at the end, and the slope of the time of an iteration with its 95 %
interval. On a CPU it is the processor's time, because other programs may share the machine.
"""

import gc
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import psutil
import torch
from measure import Settings, now
from scipy.stats import linregress
from scipy.stats import t as student_t
from suites.networks import make_pipeline
from transformers import TrainerCallback

from diffusers_med3d import DDPOConfig, DDPOTrainer
from diffusers_med3d.utils.arguments import ScriptParser
from diffusers_med3d.utils.files import write_json

WARM_UP = 0.2
"""Share of the iterations that is not judged: caches fill, threads start, the first checkpoints are written."""
BLOCKS = 20


@dataclass
class LongRunArguments:
    """How long, and where."""

    iterations: int = field(default=500, metadata={"help": "PPO iterations: rollout, rewards, update."})
    device: str = field(default="cpu", metadata={"help": "Device of the networks.", "choices": ["cpu", "cuda"]})
    output_dir: str = field(default="outputs/long_run", metadata={"help": "Where long_run.json goes."})

    def __post_init__(self) -> None:
        if self.iterations < 2 * BLOCKS:
            raise ValueError(f"iterations must be at least {2 * BLOCKS}, got {self.iterations}.")


class Gauge(TrainerCallback):
    """Reads the clock around the work of every iteration, and memory and open files in steps."""

    def __init__(self, device: str, every: int) -> None:
        self.device, self.every = device, every
        self.seconds: list[float] = []
        self.readings: list[dict[str, float]] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.start = now(self.device)

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.seconds.append((now(self.device) - self.start).on(self.device))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.every == 0:
            gc.collect()
            process = psutil.Process()
            reading = {"iteration": state.global_step, "mib": process.memory_info().rss / 2**20}
            reading |= {"files": process.num_fds(), "threads": process.num_threads()}
            self.readings.append(reading)


def slope(seconds: list[float], blocks: int = BLOCKS) -> tuple[float, float, float]:
    """Change of the time per 100 iterations in percent of the mean, and the bounds of its 95 % interval.

    A line through the medians of blocks of iterations, which are independent of one another as single ones are not.
    """
    size = len(seconds) // blocks
    medians = torch.tensor(seconds[: size * blocks]).view(blocks, size).median(1).values.double()
    fit = linregress(torch.arange(blocks).numpy() * size, medians.numpy())
    unit = 100 * 100 / medians.mean().item()
    half = student_t.ppf(0.975, blocks - 2) * fit.stderr
    return fit.slope * unit, (fit.slope - half) * unit, (fit.slope + half) * unit


def brightness(volumes, **conditions):
    return volumes.flatten(1).mean(1)


async def contrast(volumes, **conditions):
    return volumes.flatten(1).std(1)


def main() -> None:
    """Train, read the gauges, print and write what they say."""
    (args,) = ScriptParser(LongRunArguments, description=__doc__).parse()
    torch.set_num_threads(1)
    gauge = Gauge(args.device, max(1, args.iterations // 50))
    often = max(1, args.iterations // 25)
    with tempfile.TemporaryDirectory() as folder:
        config = DDPOConfig(
            output_dir=folder, max_steps=args.iterations, per_device_train_batch_size=4, num_generations=4,
            steps_per_generation=1, num_inference_steps=4, eval_num_inference_steps=2, logging_steps=1,
            save_strategy="steps", save_steps=often, eval_strategy="steps", eval_steps=often, picture_steps=often,
            report_to="tensorboard", use_cpu=args.device == "cpu",
        )  # fmt: skip
        conditions = datasets.Dataset.from_dict({"number": [0, 1]})
        pipeline = make_pipeline(Settings(device=args.device, size="tiny"))
        trainer = DDPOTrainer(pipeline, [brightness, contrast], config, conditions, callbacks=[gauge])
        trainer.train()

    warm = int(WARM_UP * args.iterations)
    change, low, high = slope(gauge.seconds[warm:])
    after = next(reading for reading in gauge.readings if reading["iteration"] >= warm)
    end = gauge.readings[-1]
    found = {
        "iterations": args.iterations,
        "seconds_per_iteration": torch.tensor(gauge.seconds[warm:]).median().item(),
        "slope_percent_per_100_iterations": [change, low, high],
        "seconds": gauge.seconds,
        "readings": gauge.readings,
    }
    write_json(Path(args.output_dir) / "long_run.json", found)
    print(f"| | after {after['iteration']} iterations | after {end['iteration']} |\n|---|---|---|")
    for name, title in (("mib", "resident memory, MiB"), ("files", "open files"), ("threads", "threads")):
        print(f"| {title} | {after[name]:.0f} | {end[name]:.0f} |")
    kind = "wall" if args.device == "cuda" else "processor"
    print(
        f"\n{found['seconds_per_iteration']:.3f} s of {kind} time per iteration (median); change per 100 iterations "
        f"{change:+.2f} % (95 % interval {low:+.2f} to {high:+.2f} %)."
    )


if __name__ == "__main__":
    main()
