"""Samples of one generator or several, class by class, beside real scans of the same classes: the picture in a model
card. All generators start from the same noise.

    python examples/sample_sheet.py --pipeline brain-t1 --data_dir DATA --split_file split.json --output sheet.png

Scans come from the training subjects, so that nothing is looked at on the test set.
"""

from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser

from diffusers_med3d import MedDiffusion3DPipeline
from diffusers_med3d.data import DataArguments, VolumeDataset
from diffusers_med3d.evaluation.figures import orthogonal_views, save
from diffusers_med3d.evaluation.sampling import short_names


@dataclass
class SheetArguments:
    """What is sampled and where it is written."""

    output: str = field(metadata={"help": "PNG file."})
    pipeline: list[str] = field(
        default_factory=lambda: ["brain-t1"], metadata={"help": "Bundled names, folders or Hub ids, a row for each."}
    )
    per_class: int = field(default=8, metadata={"help": "Samples and scans per class."})
    num_inference_steps: int = field(default=50, metadata={"help": "Denoising steps."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance; 1 is off."})
    eta: float = field(default=0.0, metadata={"help": "Noise of DDIM in sampling, from 0 (deterministic) to 1."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples; none is picked by hand."})


def main() -> None:
    """Sample, draw, write."""
    data, args = HfArgumentParser([DataArguments, SheetArguments]).parse_args_into_dataclasses()
    names = short_names(args.pipeline)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipelines = {names[one]: MedDiffusion3DPipeline.from_pretrained(one).to(device) for one in args.pipeline}
    scans = VolumeDataset.from_arguments(data, "train")
    rows = {}
    for index, name in enumerate(data.class_names):
        for model, pipeline in pipelines.items():
            rows[f"{name}, {model}"] = (
                pipeline(
                    class_labels=[index] * args.per_class,
                    num_inference_steps=args.num_inference_steps,
                    guidance_scale=args.guidance_scale,
                    eta=args.eta,
                    generator=[torch.Generator().manual_seed(args.seed + i) for i in range(args.per_class)],
                )
                .volumes[:, :1]
                .cpu()
            )
        real = [item["volume"].as_tensor() for item in scans if item["class_label"] == index][: args.per_class]
        rows[f"{name}, scans"] = torch.stack(real)[:, :1]
    save(orthogonal_views(rows, data.spacing), args.output)


if __name__ == "__main__":
    main()
