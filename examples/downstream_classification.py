"""Does a classifier of young and old brains get better with generated scans, and with fine-tuned ones the more?

    python examples/downstream_classification.py --data_dir DATA --split_file split.json \\
        --model_name_or_path brain-t1 outputs/ppo_finetune --output_dir outputs/downstream

A small 3D DenseNet is trained on 5, 10 and 20 real scans per class, alone or with generated ones from before or after
RL, and judged on real scans that nothing was trained on: log-loss, AUC, balanced accuracy, F1, intervals over subjects
and seeds, differences paired. `diffusers_med3d.evaluation.downstream` holds the protocol. The validation subjects
judge; --part test is for the final proof only. A run that was stopped goes on where it stopped: every classifier's
answers are a file of their own. Writes report.json, report.md and downstream.png.

Mind what this can show: the generator was trained with the labels of *all* training scans, so "real + synthetic" at 5
scans per class holds information from many more. It is a test of what the volumes carry, not of saving labels.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm

from diffusers_med3d import MedDiffusion3DPipeline, viz
from diffusers_med3d.data import DataArguments, VolumeDataset, settings_of
from diffusers_med3d.evaluation import VolumeSet
from diffusers_med3d.evaluation.downstream import (
    ARMS,
    FIGURES,
    ClassifierSettings,
    draw_real,
    estimates,
    prepare,
    run_arm,
)
from diffusers_med3d.evaluation.sampling import check_pipeline, check_unseen, sample_volumes, volume_set
from diffusers_med3d.trainers.base import use_all_cores
from diffusers_med3d.utils.arguments import ScriptParser, refused_in_one_line
from diffusers_med3d.utils.files import once, write_json, write_whole
from diffusers_med3d.utils.hashing import pipeline_hash

SAMPLING_SEED = 2_000_003  # samples of no other script


@dataclass
class DownstreamArguments:
    """The two generators and the size of the trial."""

    model_name_or_path: list[str] = field(
        metadata={"help": "The generator before and after PPO fine-tuning: bundled names, folders or Hub ids."}
    )
    output_dir: str = field(default="outputs/downstream", metadata={"help": "Where everything is written."})
    part: str = field(
        default="validation",
        metadata={"help": "Unseen subjects that judge: validation or test.", "choices": ["validation", "test"]},
    )
    num_synthetic: int = field(default=64, metadata={"help": "Generated volumes per class, from the same noise."})
    num_inference_steps: int = field(default=50, metadata={"help": "Denoising steps."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance; 1 is off."})
    seeds: int = field(default=10, metadata={"help": "Classifiers per arm: seeds 0, 1, ..."})
    real_per_class: list[int] = field(default_factory=lambda: [5, 10, 20], metadata={"help": "Real scans per class."})
    repeats: int = field(default=2000, metadata={"help": "Draws of the bootstrap."})

    def __post_init__(self) -> None:
        if len(self.model_name_or_path) != 2:
            raise ValueError(f"--model_name_or_path takes two, before and after; got {self.model_name_or_path}.")
        for name, value, least in (
            ("num_synthetic", self.num_synthetic, 1),
            ("seeds", self.seeds, 1),
            ("repeats", self.repeats, 2),
            ("real_per_class", min(self.real_per_class), 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")


def two_classes(scans: VolumeSet, data: DataArguments) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Of a set, what belongs to the first or the last class: volumes (N, C, X, Y, Z), labels 0 and 1 (N,), names."""
    last = len(data.class_names) - 1
    rows = [row for row, label in enumerate(scans.labels) if label in (0, last)]
    labels = torch.tensor([int(scans.labels[row] == last) for row in rows])
    if len(set(labels.tolist())) < 2:
        raise ValueError(f"Both {data.class_names[0]} and {data.class_names[-1]} are needed, got {labels.tolist()}.")
    return scans.volumes[rows], labels, [scans.subjects[row] for row in rows]


def write_report(output: Path, setting: dict, labels: torch.Tensor, logits: dict, repeats: int) -> str:
    """Figures of all arms by number of real scans: report.json, report.md, downstream.png.

    Args:
        output: folder.
        setting: what was asked for and found.
        labels: of the unseen scans (M,).
        logits: real scans per class -> arm -> (S, M).
        repeats: draws of the bootstrap.
    """
    results = {}
    for count, own in logits.items():
        arms, contrasts = estimates(own, labels, setting["unseen_subjects"], repeats)
        results[str(count)] = {
            kind: {row: {name: (v.value, v.low, v.high) for name, v in values.items()} for row, values in own.items()}
            for kind, own in (("arms", arms), ("differences", contrasts))
        }
    counts = torch.bincount(labels, minlength=2).tolist()
    seeds = len(next(iter(logits.values()))["real only"])
    lines = [
        f"{counts[0]} + {counts[1]} unseen {setting['part']} scans, {seeds} seeds, {setting['num_synthetic']} "
        "generated volumes per class; value [95 % interval over subjects and seeds]. Log-loss: lower is better. "
        "The generator was trained with the labels of all training scans, whatever the number of real scans here. "
        "What a synthetic set is worth is its difference to the same set with shuffled labels.",
    ]
    for count, result in results.items():
        for kind, rows in result.items():
            lines += ["", f"### {count} real scans per class: {kind}", "", f"| | {' | '.join(FIGURES)} |"]
            lines.append("|---|" + "---|" * len(FIGURES))
            sign = "+" if kind == "differences" else ""
            for name, values in rows.items():
                cells = [f"{v:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]" for v, low, high in values.values()]
                lines.append(f"| {name} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    write_json(output / "report.json", {"setting": setting, "results": results})
    write_whole(output / "report.md", text)
    panels = {
        f"{name}, {count} real scans": {contrast: values[name] for contrast, values in result["differences"].items()}
        for count, result in results.items()
        for name in FIGURES
    }
    viz.save(viz.intervals(panels, xlabel="difference"), output / "downstream.png")
    return text


def main() -> None:
    """Sample, train every classifier that is still missing, report."""
    args, data, settings = ScriptParser(
        DownstreamArguments, DataArguments, ClassifierSettings, description=__doc__
    ).parse()
    use_all_cores()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output = Path(args.output_dir)
    models = dict(zip(("before", "after"), args.model_name_or_path, strict=True))
    with refused_in_one_line():  # before hours of sampling
        for model in models.values():
            pipeline = MedDiffusion3DPipeline.from_pretrained(model)
            data.adopt(settings_of(pipeline), f"the generator {model}")
            check_pipeline(pipeline, data)
        scans = VolumeDataset.from_arguments(data, "train")
        real_volumes, real_labels, real_subjects = two_classes(volume_set(scans), data)
        unseen_volumes, unseen_labels, unseen_subjects = two_classes(
            volume_set(VolumeDataset.from_arguments(data, args.part)), data
        )
        draw_real(real_labels.tolist(), max(args.real_per_class), seed=0)
        real, unseen = (prepare(real_volumes, settings), real_labels), prepare(unseen_volumes, settings)
        for model in models.values():
            check_unseen(model, unseen_subjects)
    classes, synthetic, generators = [0, len(data.class_names) - 1], {}, {}
    for name, model in models.items():
        pipeline = MedDiffusion3DPipeline.from_pretrained(model).to(device)
        samples = sample_volumes(
            pipeline,
            [label for label in classes for _ in range(args.num_synthetic)],
            output / "samples" / name,
            data,
            args.num_inference_steps,
            args.guidance_scale,
            seeds=[SAMPLING_SEED],
            like=scans,
        )
        volumes, labels, _ = two_classes(samples, data)
        synthetic[name], generators[name] = (prepare(volumes, settings), labels), pipeline_hash(pipeline)

    setting = {
        "part": args.part,
        "num_synthetic": args.num_synthetic,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "volume_shape": data.volume_shape,
        "spacing": data.spacing,
        "classifier": asdict(settings),
        "generators": generators,
        "training_subjects": real_subjects,
        "training_labels": real_labels.tolist(),
        "unseen_subjects": unseen_subjects,
        "unseen_labels": unseen_labels.tolist(),
        **(
            {"antialias": True} if data.antialias else {}
        ),  # left out where it is off, as in results of before there was a choice
    }
    found = once(output / "setting.json", lambda: setting)
    if found != setting:
        changed = sorted(name for name in setting if found.get(name) != setting[name])
        raise ValueError(f"{output} holds results of another trial (other {', '.join(changed)}); use another folder.")

    # Without real scans their number does not matter: these arms are trained once and stand in every table
    trials = [
        (n if ARMS[arm].real else 0, arm, s) for n in args.real_per_class for arm in ARMS for s in range(args.seeds)
    ]
    answers = {}
    for count, arm, seed in tqdm(list(dict.fromkeys(trials)), desc="classifiers"):
        name = f"{count}-{arm.replace(', ', '-').replace(' + ', '-').replace(' ', '-')}-{seed}.json"
        answers[count, arm, seed] = once(
            output / "classifiers" / name,
            lambda n=count, a=arm, s=seed: run_arm(ARMS[a], real, synthetic, unseen, n, settings, s, device),
        )
    logits = {
        n: {arm: torch.tensor([answers[n if ARMS[arm].real else 0, arm, s] for s in range(args.seeds)]) for arm in ARMS}
        for n in args.real_per_class
    }
    print(write_report(output, setting | {"seeds": args.seeds}, unseen_labels, logits, args.repeats))


if __name__ == "__main__":
    main()
