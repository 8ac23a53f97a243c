"""Generate volumes as NIfTI files and draw them in one picture.

    python examples/generate.py                                                  # four of every class of brain-t1
    python examples/generate.py --model_name_or_path outputs/ppo_finetune --class_labels young old --num_samples 8
    python examples/generate.py --model_name_or_path brain-t1 outputs/ppo_finetune \\
        --data_dir DATA --split_file split.json                                  # two models and scans, side by side

Sample i of every class and every model starts from the noise of --seed + i, so that models are compared on equal terms.
With scans, the picture also has rows of training scans of the same classes. Writes <class>-0000.nii.gz and on into a
folder for each model, and samples.png.
"""

from collections.abc import Callable, Mapping
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
from diffusers_med3d.pipelines.med_diffusion_3d import check_guidance_and_eta
from diffusers_med3d.rewards.learned import LearnedReward
from diffusers_med3d.rewards.loading import load_rewards
from diffusers_med3d.rewards.scoring import score
from diffusers_med3d.rl import reward_names
from diffusers_med3d.utils.arguments import ScriptParser, refused_in_one_line
from diffusers_med3d.utils.checks import check_least
from diffusers_med3d.utils.files import check_output_folder

PICTURED = 8  # volumes of a row of the picture


@dataclass
class GenerateArguments:
    """What is generated, and where it is written."""

    model_name_or_path: list[str] = field(
        default_factory=lambda: ["brain-t1"], metadata={"help": "Generators: bundled names, folders or Hub ids."}
    )
    class_labels: list[str] | None = field(
        default=None,
        metadata={
            "help": "Classes by name or index of the first model, None for the null class; further models are asked "
            "for the same names. Not set: all that have a name."
        },
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
        check_least(vars(self), dict.fromkeys(("num_samples", "num_inference_steps", "batch_size", "best_of"), 1))
        check_guidance_and_eta(self.guidance_scale, self.eta)
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
        encode_rows(pipeline, rows)
        columns = rows.to_dict()
        if LABEL_COLUMN in columns:
            columns[LABEL_COLUMN] = by_name(pipeline, columns[LABEL_COLUMN])
    else:
        columns = {LABEL_COLUMN: by_name(pipeline, [as_label(pipeline, word) for word in args.class_labels])}
    rows = datasets.Dataset.from_dict(columns)
    encode_rows(pipeline, rows)
    return rows


def as_label(pipeline: MedDiffusion3DPipeline, word: str) -> int | str | None:
    """A word of the command line as a label: a name where there is one such, else None or an index."""
    if word in names_by_index(pipeline).values():
        return word
    return None if word == "None" else int(word) if word.isdecimal() else word


def by_name(pipeline: MedDiffusion3DPipeline, labels: list[int | str | None]) -> list[int | str | None]:
    """Labels as names, since another model may have its classes in another order; as indices where one has no name."""
    names, encoded = names_by_index(pipeline), pipeline.encode_class_labels(labels, len(labels))
    if encoded is None:
        return labels
    indices = [None if i == pipeline.unet.null_class and i not in names else i for i in encoded.tolist()]
    named = all(index is None or index in names for index in indices)
    return [names.get(index) for index in indices] if named else indices


def check_classes(pipelines: Mapping[str, MedDiffusion3DPipeline], rows: datasets.Dataset) -> None:
    """Refuse rows for the first model that another one cannot make: it lacks a class, or takes other conditions."""
    first, *others = pipelines
    labels = rows[LABEL_COLUMN] if LABEL_COLUMN in rows.column_names else []
    for other in others:
        known, own = (names_by_index(pipelines[name]) for name in (first, other))
        for label in labels:
            if own.get(label) != known.get(label) if isinstance(label, int) else label not in (None, *own.values()):
                raise ValueError(
                    f"{other} lacks the class {label!r} of {first}: its classes are {list(own.values())}, those of "
                    f"{first} are {list(known.values())}."
                )
        encode_rows(pipelines[other], rows)


def names_of_rows(rows: datasets.Dataset, args: GenerateArguments) -> list[str]:
    """What each row is called, in the picture and without spaces in the names of its files; twins are refused."""
    names: list[str] = []
    for index, row in enumerate(rows):
        label = row.get(LABEL_COLUMN)
        named = "sample" if label is None else f"class {label}" if isinstance(label, int) else str(label)
        named = f"row {index}, {named}" if args.conditions else named
        if named in names:
            raise ValueError(f"--class_labels must name every class once, got {args.class_labels}.")
        twin = next((other for other in names if file_prefix(other).lower() == file_prefix(named).lower()), None)
        if twin is not None:
            raise ValueError(
                f"the classes {twin!r} and {named!r} would both be written to {file_prefix(named)}-0000.nii.gz; make "
                "them one at a time with --class_labels and another --output_dir."
            )
        names.append(named)
    return names


def file_prefix(named: str) -> str:
    return named.replace(", ", "-").replace(" ", "-").replace("/", "-")


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


def check_finite(volumes: torch.Tensor, description: str) -> None:
    """Refuse to write volumes that hold NaN or infinity (ValueError)."""
    broken = int((~volumes.isfinite().flatten(1).all(1)).sum())
    if broken:
        raise ValueError(
            f"{description}: {broken} of {len(volumes)} volumes hold NaN or infinity and none is written; try a "
            "--guidance_scale near 1 or --dtype float32."
        )


def main() -> None:
    """Sample, write, draw."""
    args, data = ScriptParser(GenerateArguments, ScanArguments, description=__doc__).parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output = Path(args.output_dir)
    with refused_in_one_line():
        check_output_folder(args.output_dir, [data.data_dir])
        models = short_names(args.model_name_or_path)
        for folder in (output / name for name in models.values()):
            if not args.overwrite and any(folder.glob("*.nii.gz")):
                raise FileExistsError(f"{folder} holds volumes already; use --overwrite or another --output_dir.")
        dtype = getattr(torch, args.dtype)
        pipelines = {
            name: MedDiffusion3DPipeline.from_pretrained(model, dtype=dtype).to(device)
            for model, name in models.items()
        }
        for pipeline in pipelines.values():
            pipeline.check_sampling(args.num_inference_steps, args.guidance_scale, args.eta)
        asked = rows_asked_for(next(iter(pipelines.values())), args)
        check_classes(pipelines, asked)
        names = names_of_rows(asked, args)
        reward = total_reward(args.reward_funcs, device)
        if data.data_dir:
            data.adopt(settings_of(next(iter(pipelines.values()))), f"the generator {next(iter(pipelines))}")
        scans = VolumeDataset.from_arguments(data, "train") if data.data_dir else None
    pictures = {}
    for index, named in enumerate(names):
        for name, pipeline in pipelines.items():
            made = sample(pipeline, asked.select([index]), args, reward, f"{named}, {name}")
            if made.scores is not None:
                kept, every = made.scores.nan_to_num(-torch.inf).amax(1).mean(), made.scores.nanmean()
                print(f"{named}, {name}: mean reward of the kept {kept:.4f}, of all {every:.4f}")
            with refused_in_one_line():
                check_finite(made.volumes, f"{named}, {name}")
                made.save_nifti(output / name, file_prefix(named), overwrite=args.overwrite)
            pictures[named if len(pipelines) == 1 else f"{named}, {name}"] = made.volumes[:PICTURED]
        if scans is not None:
            pipeline = next(iter(pipelines.values()))
            labels = labels_of_scans(pipeline, [item["class_label"] for item in scans], scans.class_names)
            label = asked[index].get(LABEL_COLUMN)
            same = [i for i, own in enumerate(labels) if own == label][: min(PICTURED, args.num_samples)]
            if same:
                pictures[f"{named}, scans"] = torch.stack([scans[i]["volume"].as_tensor() for i in same])
    figure = viz.volume_rows(pictures, spacing=next(iter(pipelines.values())).config.spacing)
    viz.save(figure, output / "samples.png")
    print(f"wrote samples.png and {len(names) * args.num_samples * len(pipelines)} volume(s) to {output}")


if __name__ == "__main__":
    main()
