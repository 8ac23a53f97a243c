"""The whole road once with the VQ autoencoder, on real scans at small size, and its figures as a table.

    python examples/vq_road.py --data_dir DATA                  # ten to 26 minutes on two CPU cores
    python examples/vq_road.py --data_dir DATA --report docs/vq_road.md

It runs the scripts of the four stages one after the other, each with what the one before wrote:

    train_autoencoder --kind vq -> train_diffusion on fold a, and on fold b -> train_reward 3d and 2d -> ppo_finetune

A run that was stopped goes on where it stopped: a finished stage left road.json, an unfinished one its checkpoints.
"""

import ast
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from diffusers_med3d.files import write_whole

EXAMPLES = Path(__file__).parent
DONE = "road.json"
"""Written into a stage's folder when it is finished: its figures, the seconds it took and its arguments."""


@dataclass
class RoadArguments:
    """Where the scans are and how long each stage may train."""

    data_dir: str = field(metadata={"help": "Folder of NIfTI files with metadata.csv, as `datasets`' niftifolder."})
    split_file: str = field(
        default=str(EXAMPLES / "ixi_t1_split.json"), metadata={"help": "JSON file with the split by subject."}
    )
    output_dir: str = field(default="outputs/vq_road", metadata={"help": "Where all stages write."})
    report: str | None = field(
        default=None, metadata={"help": "Markdown file for the table; pictures go into a folder beside it."}
    )
    size: int = field(default=32, metadata={"help": "Side of the volumes in voxels."})
    spacing: float = field(default=6.0, metadata={"help": "Voxel size in mm."})
    num_embeddings: int = field(default=256, metadata={"help": "Codebook size."})
    autoencoder_steps: int = field(default=1000, metadata={"help": "Optimizer steps of the autoencoder."})
    diffusion_steps: int = field(default=700, metadata={"help": "Optimizer steps of each of the two generators."})
    reward_steps: int = field(default=300, metadata={"help": "Optimizer steps of each of the two reward models."})
    ppo_steps: int = field(default=40, metadata={"help": "Optimizer steps of the fine-tuning."})
    batch_size: int = field(default=8, metadata={"help": "Batch size of the autoencoder and the generators."})
    eval_samples: int = field(default=12, metadata={"help": "Generated volumes for the KID; 0 leaves it out."})
    eval_volumes: int = field(default=8, metadata={"help": "Volumes per class before and after fine-tuning."})


def last_dictionary(output: str) -> dict[str, float]:
    """The figures that stages 1 and 2 print at the end: a dictionary on a line of its own."""
    return ast.literal_eval([line for line in output.splitlines() if line.startswith("{'eval_")][-1])


def named_values(output: str) -> dict[str, float]:
    """The figures that stage 3 prints at the end: a name and a number per line."""
    words = [line.split() for line in output.splitlines() if line.startswith("eval_")]
    return {line[0]: float(line[1]) for line in words if len(line) == 2}


def run_stage(
    name: str, folder: Path, script: str, arguments: list[str], read: Callable[[str], dict[str, float]]
) -> dict[str, float]:
    """Run a stage's script to its end, unless an earlier run did, and give its figures.

    Args:
        name: for the progress line.
        folder: the stage's output folder.
        script: file in examples/.
        arguments: its flags.
        read: takes the figures out of what the script printed.

    Raises:
        ValueError: an earlier run finished the stage with other flags.
    """
    done = folder / DONE
    if done.is_file():
        figures = json.loads(done.read_text())
        if figures.get("arguments") != arguments:
            raise ValueError(
                f"{folder} was not made with {' '.join(arguments)}; delete it or choose another --output_dir."
            )
        print(f"{name}: finished earlier")
        return figures
    print(f"{name}: examples/{script} {' '.join(arguments)}", flush=True)
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(EXAMPLES / script), *arguments, "--output_dir", str(folder)]
    command += ["--resume_from_checkpoint", "latest", "--logging_steps", "10"]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    figures = read(output) | {"seconds": time.perf_counter() - start, "arguments": arguments}
    write_whole(done, json.dumps(figures, indent=1) + "\n")
    return figures


def drive(args: RoadArguments) -> dict[str, dict[str, float]]:
    """All stages in order; figures by stage."""
    root = Path(args.output_dir)
    data = ["--data_dir", args.data_dir, "--split_file", args.split_file]
    data += ["--volume_shape", *[str(args.size)] * 3, "--spacing", *[str(args.spacing)] * 3]
    batch = ["--per_device_train_batch_size", str(args.batch_size)]
    road = {}

    autoencoder = ["--kind", "vq", "--channels", "32", "64", "--latent_channels", "8", "--crop_size", str(args.size)]
    autoencoder += ["--num_embeddings", str(args.num_embeddings), "--max_steps", str(args.autoencoder_steps)]
    autoencoder += ["--adversarial_start", str(args.autoencoder_steps * 3 // 4), "--save_steps", "200"]
    road["autoencoder"] = run_stage(
        "1 VQ-GAN", root / "autoencoder", "train_autoencoder.py", [*data, *batch, *autoencoder], last_dictionary
    )

    for fold in "ab":
        generator = ["--autoencoder", str(root / "autoencoder"), "--part", fold, "--channels", "32", "64"]
        generator += ["--num_res_blocks", "1", "--max_steps", str(args.diffusion_steps), "--save_steps", "300"]
        generator += ["--copies", "4", "--max_shift", "1", "--ema_decay", "0.995", "--learning_rate", "1e-3"]
        generator += ["--eval_samples", str(args.eval_samples)]
        road[f"generator-{fold}"] = run_stage(
            f"2 generator of fold {fold}",
            root / f"generator-{fold}",
            "train_diffusion.py",
            [*data, *batch, *generator],
            last_dictionary,
        )

    for kind in ("3d", "2d"):
        reward = ["--kind", kind, "--spectrum_dir", str(root / "spectrum"), "--max_steps", str(args.reward_steps)]
        reward += ["--generator_a", str(root / "generator-a"), "--generator_b", str(root / "generator-b")]
        reward += ["--channels", "8", "16", "32", "--num_members", "1", "--strengths", "0", "0.25", "0.5", "0.75", "1"]
        reward += ["--levels_per_subject", "4", "--spectrum_steps", "10", "--eval_strategy", "no", "--max_shift", "1"]
        road[f"reward-{kind}"] = run_stage(
            f"3 {kind} reward", root / f"reward-{kind}", "train_reward.py", [*data, *reward], named_values
        )

    ppo = ["--pipeline", str(root / "generator-a"), "--volume_reward", str(root / "reward-3d")]
    ppo += ["--slice_reward", str(root / "reward-2d"), "--max_steps", str(args.ppo_steps)]
    ppo += ["--eval_volumes", str(args.eval_volumes), "--max_minutes", "inf"]
    results = root / "ppo" / "results.json"
    road["ppo"] = run_stage(
        "4 PPO", root / "ppo", "ppo_finetune.py", ppo, lambda output: json.loads(results.read_text())
    )
    return road


def table(road: dict[str, dict]) -> str:
    """The figures as a Markdown table."""
    rows = [("stage", "figure", "value")]

    def add(stage: str, key: str, label: str, digits: int = 3) -> None:
        if key in road[stage]:
            rows.append((stage, label, f"{road[stage][key]:.{digits}f}"))

    add("autoencoder", "eval_psnr", "PSNR of unseen scans' round trips, whole volume (dB)", 1)
    add("autoencoder", "eval_psnr_foreground", "PSNR inside the brain (dB)", 1)
    add("autoencoder", "eval_high_frequency_ratio", "power above half Nyquist, over the scan's")
    add("autoencoder", "eval_codes_used", "share of the codebook in use")
    for stage in ("generator-a", "generator-b"):
        add(stage, "eval_loss", "validation loss (velocity)")
        add(stage, "eval_kid", "KID of samples to validation scans (efficientnet-lite0 features)")
        add(stage, "eval_kid_stderr", "its standard error")
    for stage in ("reward-3d", "reward-2d"):
        add(stage, "eval_rank_correlation", "rank correlation of score and noise level within a subject")
        add(stage, "eval_neighbours_in_order", "share of neighbouring levels in order")
        add(stage, "eval_damage_below_round_trip", "share of damaged scans below their round trip")
    for name, reward in road["ppo"]["rewards"].items():
        for state in ("before", "after", "difference"):
            mean, half = reward[state]
            rows.append(("ppo", f"{name}, {state}, mean and 95 % interval", f"{mean:.4f} ± {half:.4f}"))
    for name, quality in road["ppo"]["quality"].items():
        rows.append(("ppo", f"{name}, before and after", f"{quality['before']:.4f} and {quality['after']:.4f}"))
    rows.append(("ppo", "volumes compared", str(road["ppo"]["volumes"])))
    for stage, figures in road.items():
        rows.append((stage, "seconds", f"{figures['seconds']:.0f}"))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|---|---|", *lines[1:]])


def write_report(args: RoadArguments, summary: str) -> None:
    """Table and pictures for the docs."""
    report = Path(args.report)
    pictures = report.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    root = Path(args.output_dir)
    for source, name in (
        (root / "autoencoder" / "figures" / "reconstructions.png", "round_trips.png"),
        (root / "ppo" / "figures" / "before_after.png", "before_after.png"),
    ):
        shutil.copyfile(source, pictures / name)
    text = f"""# The whole road with the VQ autoencoder

Made by `examples/vq_road.py` on {args.size}^3 voxels of {args.spacing:g} mm: every stage is there, none is trained for
long. It shows that the stages fit together with `VQModel3D`; the bundled checkpoints are the ones to judge by.
Steps: autoencoder {args.autoencoder_steps}, each generator {args.diffusion_steps}, each reward {args.reward_steps},
fine-tuning {args.ppo_steps}. The generator of fold a is the one that is fine-tuned.

{summary}

Round trips of validation scans (above: scan, below: round trip):

![round trips]({pictures.name}/round_trips.png)

Samples before and after fine-tuning, from the same noise:

![before and after]({pictures.name}/before_after.png)
"""
    write_whole(report, text)


def main() -> None:
    """Drive, print, write."""
    (args,) = HfArgumentParser([RoadArguments]).parse_args_into_dataclasses()
    summary = table(drive(args))
    print(f"\n{summary}")
    write_whole(Path(args.output_dir) / "table.md", summary + "\n")
    if args.report:
        write_report(args, summary)


if __name__ == "__main__":
    main()
