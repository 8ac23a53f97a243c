"""Generate volumes as NIfTI files and draw them in one picture.

    python examples/generate.py                                                  # four of every class of brain-t1
    python examples/generate.py --model_name_or_path outputs/ppo_finetune --class_labels young old --num_samples 8
    python examples/generate.py --model_name_or_path brain-t1 outputs/ppo_finetune \\
        --data_dir DATA --split_file split.json                                  # two models and scans, side by side

Sample i of every class and every model starts from the noise of --seed + i, so that models are compared on equal terms.
With scans, the picture also has rows of training scans of the same classes. Writes <class>-0000.nii.gz and on into a
folder for each model, and samples.png.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch

from diffusers_med3d import MedDiffusion3DPipeline, MedDiffusion3DPipelineOutput, viz
from diffusers_med3d.data import DataArguments, VolumeDataset, settings_of
from diffusers_med3d.evaluation.sampling import short_names
from diffusers_med3d.pipelines.conditions import (
    LABEL_COLUMN,
    call_arguments,
    encode_rows,
    labels_of_scans,
    names_by_index,
    rows_to_sample,
)
from diffusers_med3d.rewards.learned import LearnedReward
from diffusers_med3d.rewards.loading import load_rewards
from diffusers_med3d.rewards.scoring import score
from diffusers_med3d.rl import reward_names
from diffusers_med3d.utils.arguments import ScriptParser, refused_in_one_line

PICTURED = 8  # volumes of a row of the picture


@dataclass
class GenerateArguments:
    """What is generated, and where it is written."""

    model_name_or_path: list[str] = field(
        default_factory=lambda: ["brain-t1"], metadata={"help": "Generators: bundled names, folders or Hub ids."}
    )
    class_labels: list[str] | None = field(
        default=None, metadata={"help": "Classes by name or index. Not set: all that have a name."}
    )
    conditions: str | None = field(
        default=None,
        metadata={
            "help": 'JSON file of columns, such as {"class_label": ["ct", "mri"], "age": [0.2, 0.7]}, for networks '
            "that take more than a class: one row in place of each class."
        },
    )
    num_samples: int = field(default=4, metadata={"help": "Volumes per class (or row of --conditions) and model."})
    seed: int = field(default=0, metadata={"help": "Seed of the first sample; sample i has seed + i."})
    num_inference_steps: int = field(default=50, metadata={"help": "Denoising steps."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance; 1 is off."})
    eta: float = field(default=0.0, metadata={"help": "Noise of DDIM in sampling, from 0 (deterministic) to 1."})
    batch_size: int = field(default=8, metadata={"help": "Volumes at a time."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "What the networks compute in. bfloat16 halves their memory and is faster on GPUs since Ampere and "
            "on CPUs with AMX or AVX512-BF16, slower on others; its volumes differ a little.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    best_of: int = field(
        default=1, metadata={"help": "Make so many samples in the place of each and keep the best by --reward_funcs."}
    )
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Rewards of --best_of, whose scores are added: bundled name, folder or Hub id of a reward model, "
            "file.py:function or package.module:function."
        },
    )
    output_dir: str = field(default="outputs/generated", metadata={"help": "Where volumes and picture go."})
    overwrite: bool = field(default=False, metadata={"help": "Replace volumes of an earlier run."})

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_inference_steps", "batch_size", "best_of"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {vars(self)[name]}.")
        if (self.best_of > 1) != bool(self.reward_funcs):
            raise ValueError(
                f"--best_of 2 or more and --reward_funcs belong together, got {self.best_of} and {self.reward_funcs}."
            )
        if self.class_labels and self.conditions:
            raise ValueError("give --class_labels or --conditions, whose file has a column class_label, not both.")


@dataclass
class ScanArguments(DataArguments):
    """Scans beside the samples, for the picture; none without --data_dir."""

    data_dir: str | None = field(default=None, metadata={"help": "Folder of NIfTI files with metadata.csv."})
    split_file: str | None = field(default=None, metadata={"help": "JSON file with the split by subject."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.data_dir is None) != (self.split_file is None):
            raise ValueError(f"--data_dir and --split_file belong together, got {self.data_dir}, {self.split_file}.")


def rows_asked_for(pipeline: MedDiffusion3DPipeline, args: GenerateArguments) -> datasets.Dataset:
    """The classes asked for, or the rows of the file of conditions; what the network cannot take is refused."""
    if args.class_labels is None:
        rows = rows_to_sample(pipeline, args.conditions)
    else:
        names = {str(index): name for index, name in names_by_index(pipeline).items()}
        labels = [names.get(label, label) for label in args.class_labels]
        rows = datasets.Dataset.from_dict({LABEL_COLUMN: labels if names else list(map(int, labels))})
    encode_rows(pipeline, rows)
    return rows


def total_reward(reward_funcs: list[str], device: str) -> Callable[..., torch.Tensor] | None:
    """The sum of rewards as one function `f(volumes, **conditions)`; None for none."""
    if not reward_funcs:
        return None
    rewards = load_rewards(reward_funcs)
    names = reward_names(rewards)
    for func in rewards:
        if isinstance(func, LearnedReward):
            func.to(device)
    return lambda volumes, **conditions: score(rewards, names, volumes, conditions).sum(1)


def sample(
    pipeline: MedDiffusion3DPipeline,
    row: datasets.Dataset,
    args: GenerateArguments,
    reward: Callable[..., torch.Tensor] | None,
    description: str,
) -> MedDiffusion3DPipelineOutput:
    """``num_samples`` volumes of one row, on the CPU."""
    made = []
    for first in range(0, args.num_samples, args.batch_size):
        count = min(args.batch_size, args.num_samples - first)
        pipeline.set_progress_bar_config(desc=f"{description} {first + 1}-{first + count} of {args.num_samples}")
        made.append(
            pipeline(
                **call_arguments(pipeline, row.select([0] * count)),
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                eta=args.eta,
                best_of=args.best_of,
                reward=reward,
                generator=[torch.Generator().manual_seed(args.seed + first + i) for i in range(count)],
            )
        )
    volumes = torch.cat([output.volumes.cpu() for output in made])
    scores = torch.cat([output.scores for output in made]) if reward is not None else None
    return MedDiffusion3DPipelineOutput(volumes, made[0].affine, made[0].spacing, scores)


def main() -> None:
    """Sample, write, draw."""
    args, data = ScriptParser(GenerateArguments, ScanArguments, description=__doc__).parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output = Path(args.output_dir)
    with refused_in_one_line():
        models = short_names(args.model_name_or_path)
        for folder in (output / name for name in models.values()):
            if not args.overwrite and any(folder.glob("*.nii.gz")):
                raise FileExistsError(f"{folder} holds volumes already; use --overwrite or another --output_dir.")
        dtype = getattr(torch, args.dtype)
        pipelines = {
            name: MedDiffusion3DPipeline.from_pretrained(model, dtype=dtype).to(device)
            for model, name in models.items()
        }
        reward = total_reward(args.reward_funcs, device)
        asked = {name: rows_asked_for(pipeline, args) for name, pipeline in pipelines.items()}
        if data.data_dir:
            data.adopt(settings_of(next(iter(pipelines.values()))), f"the generator {next(iter(pipelines))}")
        scans = VolumeDataset.from_arguments(data, "train") if data.data_dir else None
    first = next(iter(asked.values()))
    pictures = {}
    for index, row in enumerate(first):
        label = row.get(LABEL_COLUMN)
        named = "sample" if label is None else f"class {label}" if isinstance(label, int) else str(label)
        named = f"row {index}, {named}" if args.conditions else named
        for name, pipeline in pipelines.items():
            made = sample(pipeline, asked[name].select([index]), args, reward, f"{named}, {name}")
            if made.scores is not None:
                kept, every = made.scores.nan_to_num(-torch.inf).amax(1).mean(), made.scores.nanmean()
                print(f"{named}, {name}: mean reward of the kept {kept:.4f}, of all {every:.4f}")
            prefix = named.replace(", ", "-").replace(" ", "-").replace("/", "-")
            made.save_nifti(output / name, prefix, overwrite=args.overwrite)
            pictures[named if len(pipelines) == 1 else f"{named}, {name}"] = made.volumes[:PICTURED]
        if scans is not None:
            pipeline = next(iter(pipelines.values()))
            labels = labels_of_scans(pipeline, [item["class_label"] for item in scans], scans.class_names)
            same = [i for i, own in enumerate(labels) if own == label][: min(PICTURED, args.num_samples)]
            if same:
                pictures[f"{named}, scans"] = torch.stack([scans[i]["volume"].as_tensor() for i in same])
    figure = viz.volume_rows(pictures, spacing=next(iter(pipelines.values())).config.spacing)
    viz.save(figure, output / "samples.png")
    print(f"wrote samples.png and {len(first) * args.num_samples * len(pipelines)} volume(s) to {output}")


if __name__ == "__main__":
    main()
