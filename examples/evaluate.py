"""How close to real scans, how diverse and how original are the samples of one or more generators?

    accelerate launch examples/evaluate.py --model brain-t1 --model outputs/fine-tuned \
        --data_dir DATA --split_file split.json                       # against the validation subjects
    accelerate launch examples/evaluate.py --model org/name --reference UNSEEN --train TRAINING
    accelerate launch examples/evaluate.py --model brain-t1 --data_dir DATA --split_file split.json --gate

Every generator is sampled from the same seeds with the class mix of the reference, and samples go through the loader of
the scans. What a network takes besides class and spacing (MAISI) comes from columns of that name in the reference's
metadata. Prints one table; writes report.json, report.md and pictures to --output_dir, where samples are kept, so a
killed run goes on. With --gate the first model's spectrum is judged instead (is there a gap that fine-tuning could
close?), into gate.json and gate.md. Test subjects are read only with --reference_part test. See docs/evaluation.md.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import HfArgumentParser

from diffusers_med3d import MedDiffusion3DPipeline
from diffusers_med3d.data import DataArguments, VolumeDataset, read_scans
from diffusers_med3d.evaluation import check_mix, check_scans, evaluate
from diffusers_med3d.evaluation import sampling as evaluation
from diffusers_med3d.metrics import (
    EXTRACTORS,
    Extractor,
    NamedExtractor,
    extractor,
    features_of,
    intensity_tissues,
    tissue_volumes,
)
from diffusers_med3d.metrics.tissue import Segmenter
from diffusers_med3d.trainers.base import use_all_cores
from diffusers_med3d.utils.files import write_json

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

    model: list[str] = field(
        metadata={
            "help": "Bundled name, folder or Hub id; repeat for more. The first is the baseline.",
            "action": "extend",
        }
    )
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Where report, pictures and samples go."})
    num_samples: int | None = field(
        default=None, metadata={"help": "Samples per model and seed; as many as reference scans if not given."}
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
            "help": f"Of features: {', '.join(EXTRACTORS)} (the last three are downloaded), or 'module:function' from "
            "volumes (B, C, X, Y, Z) to features (B, D)."
        },
    )
    segmenter: str | None = field(
        default=None,
        metadata={
            "help": "Tissue volumes: 'intensity' (k-means of intensities), or 'module:function' from volumes "
            "(B, C, X, Y, Z) to label maps (B, X, Y, Z)."
        },
    )
    tissue_names: list[str] = field(
        default_factory=lambda: TISSUES, metadata={"help": "Names of the segmenter's labels 1, 2, ..."}
    )
    num_resamples: int = field(default=1000, metadata={"help": "Resamples of the bootstrap."})
    gate: bool = field(default=False, metadata={"help": "Judge the first model's spectrum of the reference scans."})
    severity: float = field(default=0.5, metadata={"help": "Severity of the gate's damages, in (0, 1]."})

    def __post_init__(self) -> None:
        plain = self.guidance_scale == 1 and self.eta == 0
        if self.gate and (self.num_samples is not None or len(self.seeds) > 1 or not plain):
            raise ValueError(
                "--gate makes one version of every scan, with one seed, without guidance and with eta 0; got "
                f"num_samples={self.num_samples}, seeds={self.seeds}, guidance_scale={self.guidance_scale}, "
                f"eta={self.eta}."
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


def imported(name: str) -> Callable[[Tensor], Tensor]:
    """A function by 'module:function'."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def read_extractor(name: str, device: torch.device) -> Extractor:
    """A name that `extractor` knows, or 'module:function'."""
    return NamedExtractor(imported(name), name) if ":" in name else extractor(name, device)


def read_segmenter(name: str | None) -> Segmenter | None:
    """'intensity', or 'module:function'."""
    if name in (None, "intensity"):
        return intensity_tissues if name else None
    if ":" not in name:
        raise ValueError(f"--segmenter must be 'intensity' or 'module:function', got {name!r}.")
    return imported(name)


@torch.no_grad()
def main() -> None:
    """Read, sample, measure, write. What cannot be measured is refused before hours of sampling."""
    data, args = HfArgumentParser([ScanArguments, EvaluationArguments]).parse_args_into_dataclasses()
    state, output = PartialState(), Path(args.output_dir)
    use_all_cores()
    names = evaluation.short_names(args.model)
    for model in names:
        evaluation.check_pipeline(MedDiffusion3DPipeline.from_pretrained(model), data)
    extractors = [read_extractor(name, state.device) for name in args.extractors]
    segmenter = read_segmenter(args.segmenter)
    if data.split_file:
        part = data.reference_part
        reference, train = (VolumeDataset.from_arguments(data, one) for one in (part, "train"))
    else:
        part = "folder"
        reference, train = read_folder(data.reference, data), read_folder(data.train, data)
    scans, train = reference, evaluation.volume_set(train, args.background)
    reference = evaluation.volume_set(scans, args.background)
    check_scans(reference, train)
    for model in names:
        evaluation.check_unseen(model, reference.subjects)
    for one in extractors:
        features_of(one, reference.volumes[:1])
    if segmenter is not None:
        tissue_volumes(reference.volumes[:1], segmenter, len(args.tissue_names), data.spacing)
    count = len(reference) if args.num_samples is None else args.num_samples
    labels = evaluation.matched_labels(reference.labels, count)
    check_mix(f"--num_samples {count} with {len(args.seeds)} seeds", labels * len(args.seeds), reference.labels)
    settings = {
        "reference": part,
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
    }
    measures = {
        "segmenter": segmenter,
        "tissue_names": args.tissue_names,
        "num_resamples": args.num_resamples,
        "batch_size": args.batch_size,
    }

    if args.gate:
        pipeline = MedDiffusion3DPipeline.from_pretrained(args.model[0]).to(state.device)
        if state.is_main_process:
            versions = evaluation.gate_versions(
                pipeline, reference, output / "gate", data, severity=args.severity, seed=args.seeds[0],
                num_inference_steps=args.num_inference_steps, batch_size=args.batch_size, background=args.background,
                like=scans,
            )  # fmt: skip
            report, verdicts = evaluation.gate(versions, reference, train, extractors, data.spacing, **measures)
            settings |= {"model": names[args.model[0]], "severity": args.severity}
            title = f"Gate before fine-tuning {names[args.model[0]]}"
            evaluation.write_report(
                report, output, {"reference": reference, **versions}, data.spacing, settings, title, "gate"
            )
            write_json(output / "gate-verdict.json", verdicts)
            print(report.table())
            for verdict in verdicts:
                outcome = "pass" if verdict["passes"] else "mend first: " + ", ".join(verdict["reasons"])
                print(f"{verdict['figure']} ({verdict['extractor']}): {outcome}")
        return

    samples = {}
    for model, name in names.items():
        pipeline = MedDiffusion3DPipeline.from_pretrained(model).to(state.device)
        samples[name] = evaluation.sample_volumes(
            pipeline, labels, output / "samples" / name, data, args.num_inference_steps, args.guidance_scale,
            args.seeds, args.batch_size, args.background, like=scans, eta=args.eta,
        )  # fmt: skip
        del pipeline
    if not state.is_main_process:
        return
    report = evaluate(samples, reference, train, extractors, data.spacing, **measures)
    evaluation.write_report(report, output, {"reference": reference, **samples}, data.spacing, settings)
    print(report.table())
    print("\n".join(report.notes) + f"\n\nReport and pictures: {output}")


if __name__ == "__main__":
    main()
