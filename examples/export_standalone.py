"""Write a pipeline together with its code, for people without diffusers-med3d, and put it on a branch of its own.

    python examples/export_standalone.py --pipeline brain-t1 --output_dir outputs/brain-t1-standalone
    python examples/export_standalone.py --pipeline ORG/brain-t1 --output_dir outputs/x --push_to ORG/brain-t1

They load it with DiffusionPipeline.from_pretrained("ORG/brain-t1", revision="standalone", trust_remote_code=True).
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import HfArgumentParser

from diffusers_med3d import MedDiffusion3DPipeline, cards, hub
from diffusers_med3d.export import export_standalone


@dataclass
class ExportArguments:
    """What is exported, and where to."""

    output_dir: str = field(metadata={"help": "Folder to write; must not exist or be empty."})
    pipeline: str = field(default="brain-t1", metadata={"help": "Bundled name, folder or Hub id."})
    dtype: str = field(
        default="float16", metadata={"help": "Type of the stored weights.", "choices": ["float16", "float32"]}
    )
    card: str | None = field(default=None, metadata={"help": "Card to go with it; its section 'Use' is replaced."})
    push_to: str | None = field(default=None, metadata={"help": "Hub id to upload to."})
    branch: str = field(default="standalone", metadata={"help": "Branch of that repository."})
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})


def main() -> None:
    """Load, export, upload."""
    (args,) = HfArgumentParser(ExportArguments).parse_args_into_dataclasses()
    pipeline = MedDiffusion3DPipeline.from_pretrained(args.pipeline, dtype=getattr(torch, args.dtype))
    name, revision = (args.push_to, args.branch) if args.push_to else (Path(args.output_dir).name, None)
    card, pictures = None, []
    if args.card:
        card = Path(args.card).read_text()
        pictures = cards.pictures(card)
        if args.push_to:
            card = cards.for_hub(card, args.push_to.split("/")[0], hub.bundled_names())
    files = export_standalone(pipeline, args.output_dir, name, card, revision)
    for picture in pictures:
        shutil.copy(Path(args.card).parent / picture, Path(args.output_dir) / picture)
    files += pictures
    print("\n".join(files))
    if args.push_to:
        api = HfApi()
        api.create_repo(args.push_to, private=args.private, exist_ok=True)
        api.create_branch(args.push_to, branch=args.branch, exist_ok=True)
        commit = hub.publish(args.output_dir, args.push_to, files, revision=args.branch)
        print(commit.commit_url)


if __name__ == "__main__":
    main()
