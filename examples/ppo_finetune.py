"""Fine-tune a bundled 3D brain generator against two learned rewards, and show what changed. Needs no flag, data or
network:

    accelerate launch examples/ppo_finetune.py
    accelerate launch examples/ppo_finetune.py --help               # every field of DDPOConfig is a flag
    accelerate launch examples/ppo_finetune.py --resume_from_checkpoint latest

Into --output_dir go the fine-tuned pipeline, its model card with the table that is printed at the end, a reward curve
and a before/after picture (figures/), TensorBoard logs (runs/), checkpoints, and results.json.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from peft import LoraConfig
from scipy.stats import t as student_t
from transformers import HfArgumentParser, ProgressCallback

from diffusers_med3d import DDPOConfig, DDPOTrainer, MedDiffusion3DPipeline, SliceReward, VolumeReward
from diffusers_med3d.data.training_subjects import TRAINING_SUBJECTS, training_subjects_file
from diffusers_med3d.evaluation.figures import curves, orthogonal_views
from diffusers_med3d.metrics import diversity, noise_level, sharpness
from diffusers_med3d.trainers.base import checkpoint_to_resume
from diffusers_med3d.trainers.ddpo import Scored
from diffusers_med3d.utils.files import write_whole

PICTURED_PER_CLASS = 2


@dataclass
class ScriptArguments:
    """What this script adds to `DDPOConfig`."""

    pipeline: str = field(default="brain-t1", metadata={"help": "Bundled name, folder or Hub id of the generator."})
    volume_reward: str = field(default="brain-t1-reward-3d", metadata={"help": "3D reward; empty leaves it out."})
    slice_reward: str = field(default="brain-t1-reward-2d", metadata={"help": "2D reward; empty leaves it out."})
    conditions: str | None = field(
        default=None,
        metadata={
            "help": 'JSON file of columns, such as {"class_label": ["ct", "mri"], "age": [0.2, 0.7]}: one row per '
            "condition to fine-tune under, with all that the network takes but the spacing, which is the pipeline's. "
            "One row per class if not given."
        },
    )
    lora_rank: int = field(default=0, metadata={"help": "Rank of LoRA adapters; 0 fine-tunes all weights."})
    eval_volumes: int = field(
        default=16, metadata={"help": "Volumes per class (or row of --conditions) in the comparison."}
    )
    eval_seed: int = field(
        default=1_000_003, metadata={"help": "Seed of the comparison; training never uses its noise."}
    )


@dataclass
class Arguments(DDPOConfig):
    """`DDPOConfig` with defaults that fill ten minutes on two CPU cores."""

    output_dir: str = field(default="outputs/ppo_finetune", metadata={"help": "Where everything is written."})
    max_steps: int = field(default=54, metadata={"help": "Optimizer steps."})
    max_minutes: float | None = field(
        default=10.0,
        metadata={"help": "Fine-tuning stops before so many minutes are over, however slow the processor."},
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Samples per forward pass."})
    steps_per_generation: int | None = field(
        default=3, metadata={"help": "Batches that one rollout holds per process."}
    )
    epsilon: float = field(
        default=3e-5, metadata={"help": "Clip range of the probability ratio; suits this learning rate."}
    )
    eval_num_inference_steps: int = field(default=6, metadata={"help": "Denoising steps in evaluation."})
    weights_license: str = field(
        default="cc-by-sa-3.0", metadata={"help": "Licence for the card: that of the generator's weights."}
    )
    save_steps: float = field(default=18, metadata={"help": "Optimizer steps between two checkpoints."})


class RewardProgress(ProgressCallback):
    """The progress bar of training with the latest figures behind it, instead of a printed line per step."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs is not None:
            shown = {
                n.removeprefix("rewards/").removesuffix("/mean"): v for n, v in logs.items() if n.endswith("/mean")
            }
            shown = {name: value for name, value in shown.items() if name != "ratio"}
            self.training_bar.set_postfix(
                {n: f"{v:.3f}" for n, v in shown.items()} | {"kl": f"{logs.get('kl', 0):.1e}"}
            )


def mean_and_interval(values: torch.Tensor) -> tuple[float, float]:
    """Mean of (N,) and the half-width of its 95 % confidence interval (Student's t); NaN is left out."""
    values = values[~values.isnan()]
    half = (
        student_t.ppf(0.975, len(values) - 1) * values.std().item() / math.sqrt(len(values))
        if len(values) > 1
        else math.nan
    )
    return values.mean().item(), float(half)


def by_class(scored: Scored, function: Callable[[torch.Tensor], float]) -> float:
    """Mean over classes of a measure of one class's volumes."""
    groups = (
        [scored.volumes]
        if scored.labels is None
        else [scored.volumes[scored.labels == c] for c in scored.labels.unique()]
    )
    values = [function(group[:8]) for group in groups if len(group) > 1]
    return sum(values) / len(values) if values else math.nan


def compare(trainer: DDPOTrainer, before: Scored, after: Scored, seconds: dict[str, float]) -> dict:
    """All figures of the closing table."""
    results: dict = {"volumes": len(before.rewards), "rewards": {}, "quality": {}, "seconds": seconds}
    results |= {"steps": trainer.state.global_step, "max_steps": trainer.state.max_steps}
    for r, name in enumerate(trainer.reward_names):
        results["rewards"][name] = {
            "before": mean_and_interval(before.rewards[:, r]),
            "after": mean_and_interval(after.rewards[:, r]),
            "difference": mean_and_interval(after.rewards[:, r] - before.rewards[:, r]),
        }
    measures = {
        "diversity (1 - MS-SSIM within a class)": lambda s: by_class(s, lambda v: diversity(v).mean),
        "sharpness": lambda s: sharpness(s.volumes).nanmean().item(),
        "noise level": lambda s: noise_level(s.volumes).nanmean().item(),
    }
    results["quality"] = {
        name: {"before": measure(before), "after": measure(after)} for name, measure in measures.items()
    }
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("kl", "clip_ratio"):
        values = [entry[name] for entry in history if name in entry][-10:]
        results[name] = sum(values) / len(values) if values else None
    phases: dict[str, float] = {}
    for entry in history:
        for name, value in entry.items():
            if name.startswith("seconds/"):
                phase = name.removeprefix("seconds/")
                phases[phase] = phases.get(phase, 0.0) + value
    results["seconds"] |= phases | {"fine-tuning": sum(phases.values())}  # of all sessions of a run that was resumed
    return results


def table(results: dict) -> str:
    """The results as a Markdown table."""
    rows = [("", "before", "after", "difference")]
    for name, figures in results["rewards"].items():
        rows.append(
            (
                f"reward {name}",
                *(f"{figures[k][0]:.4f} ± {figures[k][1]:.4f}" for k in ("before", "after", "difference")),
            )
        )
    for name, figures in results["quality"].items():
        difference = figures["after"] - figures["before"]
        rows.append((name, f"{figures['before']:.4f}", f"{figures['after']:.4f}", f"{difference:+.4f}"))
    rows.append(("optimizer steps", "", f"{results['steps']} of {results['max_steps']}", ""))
    rows.append(("KL to the start", "0", "not measured" if results["kl"] is None else f"{results['kl']:.2e}", ""))
    rows.append(
        (
            "clip fraction",
            "",
            "no second update" if results["clip_ratio"] is None else f"{results['clip_ratio']:.3f}",
            "",
        )
    )
    rows += [(f"seconds: {phase}", "", f"{value:.0f}", "") for phase, value in results["seconds"].items()]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def show(trainer: DDPOTrainer, pipeline: MedDiffusion3DPipeline, before: Scored, after: Scored) -> None:
    """Reward curve and before/after picture, as PNG under output_dir/figures."""
    history = [entry for entry in trainer.state.log_history if "rewards/unscored" in entry]
    series = {
        name: ([e["step"] for e in history], [e[f"rewards/{name}/mean"] for e in history])
        for name in trainer.reward_names
        if all(f"rewards/{name}/mean" in e for e in history)
    }
    if series:
        trainer.log_figure("reward_curve", curves(series, "optimizer step", "mean reward of the rollout"))
    rows = {}
    names = pipeline.config.class_names or []
    names = names if isinstance(names, dict) else {name: index for index, name in enumerate(names)}
    names = {index: name for name, index in names.items()}
    labels = torch.zeros(len(before.volumes)) if before.labels is None else before.labels
    for c in labels.unique().tolist():
        name = "sample" if before.labels is None else names.get(c, f"class {c}")
        for state, scored in (("before", before), ("after", after)):
            rows[f"{name}, {state}"] = scored.volumes[labels == c][:PICTURED_PER_CLASS, :1]
    trainer.log_figure("before_after", orthogonal_views(rows, pipeline.config.spacing))


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, Arguments)).parse_args_into_dataclasses()
    pipeline = MedDiffusion3DPipeline.from_pretrained(script.pipeline)
    rewards = [VolumeReward.from_pretrained(script.volume_reward)] if script.volume_reward else []
    rewards += [SliceReward.from_pretrained(script.slice_reward)] if script.slice_reward else []
    class_names = list(pipeline.config.class_names or [])
    columns = {"class_label": class_names} if class_names else {"sample": [0]}
    if script.conditions:
        columns = json.loads(Path(script.conditions).read_text())
    conditions = datasets.Dataset.from_dict(columns)

    trainer = DDPOTrainer(
        model=pipeline,
        reward_funcs=rewards,
        args=args,
        train_dataset=conditions,
        peft_config=LoraConfig(r=script.lora_rank, lora_alpha=2 * script.lora_rank) if script.lora_rank else None,
    )
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(RewardProgress)

    # A resumed run starts from the generator too: its checkpoint is read by `train`
    seconds, start = {}, time.perf_counter()
    before = trainer.sample_and_score(conditions, script.eval_volumes, script.eval_seed, "Evaluation before")
    seconds["evaluation before"] = time.perf_counter() - start
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(args))
    start = time.perf_counter()
    after = trainer.sample_and_score(conditions, script.eval_volumes, script.eval_seed, "Evaluation after")
    seconds["evaluation after"] = time.perf_counter() - start

    trainer.save_model()
    trainer.accelerator.end_training()
    if not trainer.is_world_process_zero():
        return
    known = training_subjects_file(script.pipeline)
    if known is not None:  # fine-tuning reads no scan: what the generator has seen is what it was made from
        write_whole(Path(args.output_dir) / TRAINING_SUBJECTS, known.read_text())
    results = compare(trainer, before, after, seconds)
    summary = table(results)
    show(trainer, pipeline, before, after)
    trainer.card_notes += (
        f"\n\nBase: `{Path(script.pipeline).name}`. Same {results['volumes']} fresh seeds before and after, "
        f"{args.eval_num_inference_steps} steps without noise; mean and 95 % interval, differences paired. KL and clip "
        "fraction: mean of the last 10 log entries of training.\n\n"
        f"{summary}\n\n"
        "![before and after](figures/before_after.png)\n\n![reward](figures/reward_curve.png)"
    )
    trainer.create_model_card()
    write_whole(Path(args.output_dir) / "results.json", json.dumps(results, indent=2))
    print(f"\n{summary}\n\nPipeline, card, pictures and logs: {args.output_dir}")


if __name__ == "__main__":
    main()
