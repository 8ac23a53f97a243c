"""Samples of a generator, class by class, beside real scans of the same classes: the picture in a model card.

    python examples/sample_sheet.py --pipeline brain-t1 --data_dir DATA --split_file split.json --output sheet.png

Scans come from the training subjects, so that nothing is looked at on the test set.
"""

from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser

from diffusers_med3d import MedDiffusion3DPipeline
from diffusers_med3d.data import DataArguments, VolumeDataset
from diffusers_med3d.figures import orthogonal_views, save


@dataclass
class SheetArguments:
    """What is sampled and where it is written."""

    output: str = field(metadata={"help": "PNG file."})
    pipeline: str = field(default="brain-t1", metadata={"help": "Bundled name, folder or Hub id."})
    per_class: int = field(default=8, metadata={"help": "Samples and scans per class."})
    num_inference_steps: int = field(default=50, metadata={"help": "Denoising steps."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance; 1 is off."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples; none is picked by hand."})


def main() -> None:
    """Sample, draw, write."""
    data, args = HfArgumentParser([DataArguments, SheetArguments]).parse_args_into_dataclasses()
    pipeline = MedDiffusion3DPipeline.from_pretrained(args.pipeline)
    scans = VolumeDataset.from_arguments(data, "train")
    rows = {}
    for index, name in enumerate(data.class_names):
        samples = pipeline(
            class_labels=[index] * args.per_class,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(args.seed + i) for i in range(args.per_class)],
        ).volumes
        real = [item["volume"].as_tensor() for item in scans if item["class_label"] == index][: args.per_class]
        rows |= {f"{name}, generated": samples[:, :1], f"{name}, scans": torch.stack(real)[:, :1]}
    save(orthogonal_views(rows, data.spacing), args.output)


if __name__ == "__main__":
    main()
