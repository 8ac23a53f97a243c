"""Which samplers need few steps: KID of a generator's samples for several schedulers and numbers of steps.

    python benchmarks/few_steps.py --model_name_or_path brain-t1 --data_dir DATA --split_file examples/ixi_t1_split.json

All samplers start from the same noise and ask for the same classes. The features, the distance and its 95 % intervals
are those of examples/evaluate.py, against the validation subjects of the split; the test subjects are never read. The
first sampler is what the others are compared with. Goes on where a killed run stopped.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from diffusers_med3d import MedDiffusion3DPipeline
from diffusers_med3d.data import DataArguments, VolumeDataset, settings_of
from diffusers_med3d.evaluation.evaluate import kid_draws
from diffusers_med3d.evaluation.report import FLOOR, REFERENCE
from diffusers_med3d.evaluation.sampling import check_pipeline, check_unseen, matched_labels, sample_volumes, volume_set
from diffusers_med3d.evaluation.sets import Sets
from diffusers_med3d.metrics import extractor, features_of
from diffusers_med3d.schedulers.flow import is_flow
from diffusers_med3d.utils.arguments import ScriptParser, refused_in_one_line
from diffusers_med3d.utils.files import write_json

DIFFUSION = ("ddim:50", "ddim:12", "dpm++:12", "unipc:12")
FLOW = ("euler:50", "euler:12", "dpm++:12", "unipc:12")


@dataclass
class FewStepsArguments:
    """What is sampled, and how."""

    model_name_or_path: str = field(default="brain-t1", metadata={"help": "Bundled name, folder or Hub id."})
    samplers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Schedulers with their steps, as dpm++:12; the first is the baseline. Known: ddim, dpm++, "
            "unipc, euler. Not set: 50 and 12 steps of the generator's own kind, and 12 of dpm++ and unipc."
        },
    )
    num_samples: int = field(default=48, metadata={"help": "Volumes per sampler."})
    batch_size: int = field(default=4, metadata={"help": "Volumes at a time."})
    extractor: str = field(default="efficientnet-lite0", metadata={"help": "Of features, as in evaluate.py."})
    num_resamples: int = field(default=1000, metadata={"help": "Resamples of the bootstrap."})
    output_dir: str = field(default="outputs/few_steps", metadata={"help": "Where samples and figures go."})


def scheduler_of(name: str, own: SchedulerMixin) -> SchedulerMixin:
    """A scheduler by its short name, with the noise schedule and the prediction type of ``own``."""
    config = dict(own.config)
    if is_flow(own):
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": config["shift"]}
        made = {
            "euler": lambda: own,
            "dpm++": lambda: DPMSolverMultistepScheduler(solver_order=2, **flow),
            "unipc": lambda: UniPCMultistepScheduler(solver_order=2, **flow),
        }
    else:
        config["timestep_spacing"] = "trailing"
        made = {
            "ddim": lambda: DDIMScheduler.from_config(own.config),
            "dpm++": lambda: DPMSolverMultistepScheduler.from_config(config, solver_order=2),
            "unipc": lambda: UniPCMultistepScheduler.from_config(config, solver_order=2),
            "euler": lambda: EulerDiscreteScheduler.from_config(config),
        }
    if name not in made:
        kind = "a rectified flow" if isinstance(own, FlowMatchEulerDiscreteScheduler) else "a diffusion"
        raise ValueError(f"{name!r} is no sampler of {kind}; expected one of {sorted(made)}.")
    return made[name]()


def main() -> None:
    """Sample, measure, print."""
    args, data = ScriptParser(FewStepsArguments, DataArguments, description=__doc__).parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output = Path(args.output_dir)
    with refused_in_one_line():
        pipeline = MedDiffusion3DPipeline.from_pretrained(args.model_name_or_path).to(device)
        data.adopt(settings_of(pipeline), f"the generator {args.model_name_or_path}")
        check_pipeline(pipeline, data)
        own = pipeline.scheduler
        samplers = {}
        for sampler in args.samplers or (FLOW if is_flow(own) else DIFFUSION):
            name, _, steps = sampler.partition(":")
            samplers[sampler] = (scheduler_of(name, own), int(steps))
        reference = volume_set(VolumeDataset.from_arguments(data, "validation"))
        train = volume_set(VolumeDataset.from_arguments(data, "train"))
        check_unseen(args.model_name_or_path, reference.subjects)
        labels = matched_labels(reference.labels, args.num_samples)
        measure = extractor(args.extractor, device)

    sets, seconds = {}, {}
    for sampler, (scheduler, steps) in samplers.items():
        pipeline.scheduler = scheduler
        start = time.process_time()
        folder = output / "samples" / sampler.replace(":", "-")
        sets[sampler] = sample_volumes(pipeline, labels, folder, data, steps, batch_size=args.batch_size)
        seconds[sampler] = time.process_time() - start
        print(f"{sampler}: sampled in {seconds[sampler]:.0f} s of processor time", flush=True)
    compared = Sets(sets, reference, train, args.num_resamples, seed=0)
    features = {name: features_of(measure, one.volumes, 8) for name, one in compared.all.items() if name != FLOOR}
    blocks = {block: {name: own[:, place] for name, own in features.items()} for block, place in measure.blocks.items()}
    parts = [kid_draws(compared, block) for block in blocks.values()]
    draws = {sampler: np.mean([part[sampler] for part in parts], axis=0) for sampler in samplers}
    figure = compared.figure("KID", "lower", FLOOR, draws, measure.extractor)

    first = next(iter(samplers))
    baseline = figure.sets[first]
    start = sets[first].volumes
    print(f"KID ({measure.extractor}) of {args.num_samples} samples against {len(features[REFERENCE])} unseen scans")
    print("| sampler | KID | 95 % | KID less the first | 95 % | voxel difference from the first | in its interval |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for sampler, interval in figure.sets.items():
        row = {"sampler": sampler, "kid": interval.value, "low": interval.low, "high": interval.high}
        row["voxel_difference"] = (sets[sampler].volumes - start).abs().mean().item()
        row["within"] = interval.value <= baseline.high
        row["seconds_of_processor"] = seconds[sampler]
        paired = figure.differences.get(f"{sampler} - {first}")
        more = "| |" if paired is None else f"{paired.value:+.4f} | {paired.low:+.4f} to {paired.high:+.4f}"
        if paired is not None:
            row |= {"difference": paired.value, "difference_low": paired.low, "difference_high": paired.high}
        rows.append(row)
        print(
            f"| {sampler} | {interval.value:.4f} | {interval.low:.4f} to {interval.high:.4f} | {more} | "
            f"{row['voxel_difference']:.4f} | {'yes' if row['within'] else 'no'} |"
        )
    write_json(output / "few_steps.json", json.loads(json.dumps(rows)))


if __name__ == "__main__":
    with torch.no_grad():
        main()
