"""How close to real scans, how diverse and how original are the samples of one or more generators?

    accelerate launch examples/evaluate.py --model_name_or_path brain-t1 outputs/ppo_finetune \\
        --data_dir DATA --split_file split.json                       # against the validation subjects
    accelerate launch examples/evaluate.py --model_name_or_path org/name --reference UNSEEN --train TRAINING
    accelerate launch examples/evaluate.py --model_name_or_path brain-t1 --data_dir DATA --split_file split.json \\
        --breakdown

Every generator is sampled from the same seeds with the class mix of the reference, and samples go through the loader of
the scans. What a network takes besides class and spacing (MAISI) comes from columns of that name in the reference's
metadata. Prints one table; writes report.json, report.md and pictures to --output_dir, where samples are kept, so a
killed run goes on. --report FOLDER also writes report.html, one page to send to a colleague. With --breakdown one
generator's distance to the scans is broken down instead, into breakdown.json, breakdown.md and breakdown.png: what of
it comes from the autoencoder, what from the generator, and do its rewards tell its better samples from its worse ones?
Test subjects are read only with --reference_part test. See docs/evaluation.md.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState

from diffusers_med3d import MedDiffusion3DPipeline
from diffusers_med3d.data import DataArguments, VolumeDataset, read_scans, settings_of
from diffusers_med3d.evaluation import FeatureCache, check_mix, check_scans, evaluate, sampling, write_report
from diffusers_med3d.evaluation.breakdown import (
    STRENGTHS,
    breakdown,
    check_strengths,
    class_thirds,
    scan_versions,
    spaces_seen,
    write_breakdown,
)
from diffusers_med3d.evaluation.page import shareable_command, write_page
from diffusers_med3d.metrics import (
    EXTRACTORS,
    Extractor,
    NamedExtractor,
    extractor,
    intensity_tissues,
    tissue_volumes,
)
from diffusers_med3d.metrics.tissue import Segmenter
from diffusers_med3d.pipelines.med_diffusion_3d import check_guidance_and_eta
from diffusers_med3d.rewards.loading import DEFAULT_REWARDS_FOR, default_rewards, load_rewards
from diffusers_med3d.rewards.scoring import score
from diffusers_med3d.rl import reward_names
from diffusers_med3d.trainers.base import use_all_cores
from diffusers_med3d.utils.arguments import ScriptParser, refused_in_one_line
from diffusers_med3d.utils.checks import check_least
from diffusers_med3d.utils.files import check_output_folder
from diffusers_med3d.utils.importing import load_function

BREAKDOWN_SAMPLES = 60  # thirds of 20
TISSUES = ["dark (fluid)", "middle (grey)", "bright (white)"]


@dataclass
class ScanArguments(DataArguments):
    """Real scans: --data_dir with --split_file, or --reference and --train."""

    data_dir: str | None = field(default=None, metadata={"help": "Folder of NIfTI files with metadata.csv."})
    split_file: str | None = field(default=None, metadata={"help": "JSON file with the split by subject."})
    reference_part: str = field(
        default="validation",
        metadata={
            "help": "Part of the split that is the reference; test is for the final proof only.",
            "choices": ["validation", "test"],
        },
    )
    reference: str | None = field(
        default=None, metadata={"help": "Instead of a split: folder of scans that no model was trained on."}
    )
    train: str | None = field(
        default=None, metadata={"help": "Instead of a split: folder of the scans that the models were trained on."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        split, folders = (self.data_dir, self.split_file), (self.reference, self.train)
        if not (all(split) and not any(folders)) and not (all(folders) and not any(split)):
            raise ValueError(
                "give either --data_dir and --split_file, or --reference and --train; got "
                f"data_dir={self.data_dir}, split_file={self.split_file}, reference={self.reference}, "
                f"train={self.train}."
            )


@dataclass
class EvaluationArguments:
    """What is measured, and how."""

    model_name_or_path: list[str] = field(
        metadata={"help": "One or more generators: bundled names, folders or Hub ids. The first is the baseline."}
    )
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Where report, pictures and samples go."})
    num_samples: int | None = field(
        default=None,
        metadata={
            "help": "Samples per model and seed; if not given as many as reference scans, "
            f"{BREAKDOWN_SAMPLES} with --breakdown."
        },
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Each adds --num_samples samples."})
    num_inference_steps: int = field(default=50, metadata={"help": "Denoising steps."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance; 1 is off."})
    eta: float = field(default=0.0, metadata={"help": "Noise of DDIM in sampling, from 0 (deterministic) to 1."})
    batch_size: int = field(default=8, metadata={"help": "Volumes at a time."})
    background: float = field(
        default=0.02, metadata={"help": "Intensities below become 0, in scans and samples; 0 leaves them."}
    )
    extractors: list[str] = field(
        default_factory=lambda: ["efficientnet-lite0", "haar-scattering-3d"],
        metadata={
            "help": f"Of features: {', '.join(EXTRACTORS)} (the last three are downloaded), or a function "
            "(file.py:function, package.module:function) from volumes (B, C, X, Y, Z) to features (B, D)."
        },
    )
    pad_to: list[int] | None = field(
        default=None,
        metadata={
            "help": "Voxels X Y Z: scans and samples are measured in the middle of such a grid of background. For "
            "generators of different grids, whose distances cannot be compared otherwise."
        },
    )
    segmenter: str | None = field(
        default=None,
        metadata={
            "help": "Tissue volumes: 'intensity' (k-means of intensities), or a function (file.py:function, "
            "package.module:function) from volumes (B, C, X, Y, Z) to label maps (B, X, Y, Z)."
        },
    )
    tissue_names: list[str] = field(
        default_factory=lambda: TISSUES, metadata={"help": "Names of the segmenter's labels 1, 2, ..."}
    )
    num_resamples: int = field(default=1000, metadata={"help": "Resamples of the bootstrap."})
    feature_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which features are kept by the content of each volume, so that the next evaluation "
            "computes only what is new; several evaluations may share it. Not set: OUTPUT_DIR/features."
        },
    )
    report: str | None = field(
        default=None,
        metadata={
            "help": "Folder for report.html, one page with all pictures inside, to send to a colleague: it holds no "
            "local paths and no names of subjects."
        },
    )

    def __post_init__(self) -> None:
        check_least(vars(self), dict.fromkeys(("num_inference_steps", "batch_size", "num_resamples"), 1))
        check_guidance_and_eta(self.guidance_scale, self.eta)
        sampling.check_seeds(self.seeds)


@dataclass
class BreakdownArguments:
    """Where the distance comes from (--breakdown)."""

    breakdown: bool = field(
        default=False, metadata={"help": "Break the distance of one generator down instead of comparing generators."}
    )
    strengths: list[float] = field(
        default_factory=lambda: list(STRENGTHS),
        metadata={"help": "Of the partial noising of reference scans, between 0 and 1."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards whose best and worst third of the samples are measured: names of bundled reward models, "
            "folders, Hub ids, file.py:function or package.module:function. The bundled ones for a bundled generator "
            "if not given, else none."
        },
    )


def read_folder(folder: str, data: DataArguments) -> VolumeDataset:
    """All scans of a folder; without a label column they are one class, the null class."""
    rows = read_scans(folder)
    if data.class_names and data.label_column not in rows.column_names:
        print(f"{folder} has no column {data.label_column!r}: its scans have no class.")
        rows = rows.add_column(data.label_column, [None] * len(rows))
    if data.subject_column not in rows.column_names:
        raise ValueError(
            f"{folder} has no column {data.subject_column!r}, only {rows.column_names}; see --subject_column."
        )
    return VolumeDataset(rows, **data.reading())


def read_extractor(name: str, device: torch.device) -> Extractor:
    """A name that `extractor` knows, or a function by name."""
    return NamedExtractor(load_function(name), name) if ":" in name else extractor(name, device)


def read_segmenter(name: str | None) -> Segmenter | None:
    """'intensity', or a function by name."""
    if name in (None, "intensity"):
        return intensity_tissues if name else None
    return load_function(name)


@torch.no_grad()
def main() -> None:
    """Read, sample, measure, write. What cannot be measured is refused before hours of sampling."""
    parser = ScriptParser(EvaluationArguments, BreakdownArguments, ScanArguments, description=__doc__)
    args, parts, data = parser.parse()
    state, output = PartialState(), Path(args.output_dir)
    use_all_cores()
    with refused_in_one_line():
        check_output_folder(args.output_dir, [data.data_dir, data.reference, data.train])
        names = sampling.short_names(args.model_name_or_path)
        if parts.breakdown and args.report:
            raise ValueError("--report goes with the comparison of generators, not with --breakdown.")
        if parts.breakdown and len(names) > 1:
            raise ValueError(f"--breakdown takes one generator at a time, got {list(names)}.")
        for model in names:
            pipeline = MedDiffusion3DPipeline.from_pretrained(model)
            data.adopt(settings_of(pipeline), f"the generator {model}")
            sampling.check_pipeline(pipeline, data)
            pipeline.check_sampling(args.num_inference_steps, args.guidance_scale, args.eta)
        extractors = {name: read_extractor(name, state.device) for name in args.extractors}
        segmenter = read_segmenter(args.segmenter)
        if data.split_file:
            scans, train = (VolumeDataset.from_arguments(data, part) for part in (data.reference_part, "train"))
        else:
            scans, train = read_folder(data.reference, data), read_folder(data.train, data)
        reference, train = (sampling.volume_set(one, args.background) for one in (scans, train))
        check_scans(reference, train)
        if args.pad_to is not None:
            reference.padded(args.pad_to)
        for model in names:
            sampling.check_unseen(model, reference.subjects)
        cache = FeatureCache(args.feature_dir or output / "features")
        for one in extractors.values():
            cache.features_of(one, reference.volumes[:1])
        if segmenter is not None:
            tissue_volumes(reference.volumes[:1], segmenter, len(args.tissue_names), data.spacing)
        count = args.num_samples
        if count is None:
            count = BREAKDOWN_SAMPLES if parts.breakdown else len(reference)
        labels = sampling.matched_labels(reference.labels, count)
        all_labels = labels * len(args.seeds)
        check_mix(f"--num_samples {count} with {len(args.seeds)} seeds", all_labels, reference.labels)
        if parts.breakdown:
            check_strengths(parts.strengths, args.num_inference_steps)
            (model,) = names
            wanted = parts.reward_funcs
            if wanted is None:
                wanted = default_rewards(model) if model in DEFAULT_REWARDS_FOR else []
            rewards = load_rewards(wanted) if wanted else []
            called = reward_names(rewards)
            asked = sampling.asked_for(MedDiffusion3DPipeline.from_pretrained(model), labels, data, scans)
            if rewards:
                class_thirds([0.0] * len(all_labels), all_labels, reference.labels)
                score(rewards, called, reference.volumes[:1], asked.select([0]).to_dict())
    settings = {
        "reference": data.reference_part if data.split_file else "folder",
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "eta": args.eta,
        "seeds": args.seeds,
        "background": args.background,
        "volume_shape": data.volume_shape,
        "spacing": data.spacing,
        "antialias": data.antialias,
        "classes": data.class_names,
        "resamples": args.num_resamples,
        "pad_to": args.pad_to,
    }

    samples = {}
    for model, name in names.items():
        pipeline = MedDiffusion3DPipeline.from_pretrained(model).to(state.device)
        with refused_in_one_line():  # a folder of samples with other settings, samples of which none can be judged
            samples[name] = sampling.sample_volumes(
                pipeline, labels, output / "samples" / name, data, args.num_inference_steps, args.guidance_scale,
                args.seeds, args.batch_size, args.background, like=scans, eta=args.eta,
            )  # fmt: skip
            if parts.breakdown:
                versions = scan_versions(
                    pipeline, reference, output / "versions" / name, data, parts.strengths, args.num_inference_steps,
                    args.guidance_scale, args.eta, args.seeds[0], args.batch_size, args.background, like=scans,
                )  # fmt: skip
        del pipeline
    if not state.is_main_process:
        return
    unpadded = samples
    if args.pad_to is not None:
        reference, train = reference.padded(args.pad_to), train.padded(args.pad_to)
        samples = {name: one.padded(args.pad_to) for name, one in samples.items()}
        if parts.breakdown:
            versions = {name: one.padded(args.pad_to) for name, one in versions.items()}
    if parts.breakdown:
        (name,) = names.values()
        scores = torch.empty(len(all_labels), 0)
        if rewards:
            skipped = {one.row for one in samples[name].left_out}
            kept = [row for row in range(len(all_labels)) if row not in skipped]
            columns = {column: list(values) * len(args.seeds) for column, values in asked.to_dict().items()}
            conditions = {column: [values[row] for row in kept] for column, values in columns.items()}
            scores = score(rewards, called, unpadded[name].volumes, conditions)
        found = breakdown(
            versions,
            samples[name],
            {reward: scores[:, k].tolist() for k, reward in enumerate(called)},
            reference,
            train,
            extractors,
            {reward: spaces_seen(func) for reward, func in zip(called, rewards, strict=True)},
            num_resamples=args.num_resamples,
            batch_size=args.batch_size,
            cache=cache,
        )
        settings |= {"model": name, "strengths": parts.strengths}
        text = write_breakdown(found, output, settings, f"Where the distance of {name} to scans comes from")
        print(f"{text}\nTable, figure and JSON: {output}/breakdown.md, .png and .json")
        return
    report = evaluate(
        samples, reference, train, list(extractors.values()), data.spacing, segmenter, args.tissue_names,
        args.num_resamples, batch_size=args.batch_size, cache=cache,
    )  # fmt: skip
    write_report(report, output, {"reference": reference, **samples}, data.spacing, settings)
    if args.report:
        replaced = {data.data_dir: "DATA", data.split_file: "SPLIT", data.reference: "UNSEEN", data.train: "TRAINING"}
        replaced |= {args.output_dir: "OUTPUT", args.report: "REPORT", **names}
        write_page(
            report,
            Path(args.report) / "report.html",
            {"reference": reference, **samples},
            train,
            data.spacing,
            settings,
            shareable_command(["examples/evaluate.py", *sys.argv[1:]], replaced),
            {name: Path(model) for model, name in names.items()},
            f"Evaluation of {', '.join(names.values())}",
        )
    print(report.table())
    print("\n".join(report.notes) + f"\n\nReport and pictures: {output}")


if __name__ == "__main__":
    main()
