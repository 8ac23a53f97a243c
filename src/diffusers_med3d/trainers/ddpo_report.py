"""What PPO fine-tuning changed: the same samples before and after as a table and as pictures; a progress bar with the
rewards.
"""

import math
from collections.abc import Callable

import torch
from scipy.stats import t as student_t
from transformers import ProgressCallback

from .. import viz
from ..metrics import diversity, noise_level, sharpness
from ..pipelines.conditions import names_by_index
from .ddpo import DDPOTrainer, Scored, usable

PICTURED_PER_CLASS = 2
DIVERSITY_OF = 8  # volumes of a class; the number of pairs grows with its square


class RewardProgress(ProgressCallback):
    """The progress bar of training with the latest figures behind it, instead of a printed line per step."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs is not None:
            means = {
                name.split("/")[1]: v for name, v in logs.items() if name.startswith("rewards/") and "/mean" in name
            }
            kl = {"kl": f"{logs['kl']:.1e}"} if "kl" in logs else {}
            self.training_bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()} | kl)


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
    """Mean over classes of a measure of one class's volumes; those that hold NaN or infinity are left out."""
    kept = usable(scored.volumes)
    groups = (
        [scored.volumes[kept]]
        if scored.labels is None
        else [scored.volumes[kept & (scored.labels == c)] for c in scored.labels.unique()]
    )
    values = [function(group[:DIVERSITY_OF]) for group in groups if len(group) > 1]
    return sum(values) / len(values) if values else math.nan


def compare(trainer: DDPOTrainer, before: Scored, after: Scored, seconds: dict[str, float]) -> dict:
    """Return the figures of `table`: rewards and unrewarded measures before and after, training's last figures, times.

    Args:
        trainer: after training.
        before, after: of `trainer.sample_and_score` with the same conditions and seed.
        seconds: phase -> seconds, of what the trainer has no clock for.
    """
    results: dict = {"volumes": len(before.rewards), "rewards": {}, "quality": {}, "seconds": seconds}
    results |= {"steps": trainer.state.global_step, "max_steps": trainer.state.max_steps}
    for r, name in enumerate(trainer.reward_names):
        results["rewards"][name] = {
            "before": mean_and_interval(before.rewards[:, r]),
            "after": mean_and_interval(after.rewards[:, r]),
            "difference": mean_and_interval(after.rewards[:, r] - before.rewards[:, r]),
        }
    results["unusable"] = {
        "before": int((~usable(before.volumes)).sum()),
        "after": int((~usable(after.volumes)).sum()),
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
    rows: list[tuple[str, ...]] = [("", "before", "after", "difference")]
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
    lost = results["unusable"]
    if any(lost.values()):
        difference = f"{lost['after'] - lost['before']:+d}"
        rows.append(("samples with NaN, left out", str(lost["before"]), str(lost["after"]), difference))
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


def log_pictures(trainer: DDPOTrainer, before: Scored, after: Scored) -> None:
    """Write the reward curve and a picture of the same samples before and after to output_dir/figures."""
    history = [entry for entry in trainer.state.log_history if "rewards/unscored" in entry]
    series = {}
    for name in trainer.reward_names:
        scored = [entry for entry in history if f"rewards/{name}/mean" in entry]  # not a rollout that it failed on
        if scored:
            series[name] = [e["step"] for e in scored], [e[f"rewards/{name}/mean"] for e in scored]
    if series:
        trainer.log_figure("reward_curve", viz.curves(series, "optimizer step", "mean reward of the rollout"))
    config = trainer.pipeline.config
    names = names_by_index(trainer.pipeline)
    labels = torch.zeros(len(before.volumes)) if before.labels is None else before.labels
    first: dict[str, torch.Tensor] = {}
    second: dict[str, torch.Tensor] = {}
    for c in labels.unique().tolist():
        name = "sample" if before.labels is None else names.get(c, f"class {c}")
        first[name], second[name] = (s.volumes[labels == c][:PICTURED_PER_CLASS] for s in (before, after))
    trainer.log_figure("before_after", viz.before_after(first, second, spacing=config.spacing))
