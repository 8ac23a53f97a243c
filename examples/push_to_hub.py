"""Publish the bundled checkpoints on the Hub, each with its card: one command for whoever holds the account.

    hf auth login
    python examples/push_to_hub.py --namespace ORG --dry_run      # shows what would go where
    python examples/push_to_hub.py --namespace ORG --tag v0.1.0

docs/publishing.md has the checklist. The cards come from model_cards/; names and links in them become Hub ids. Nothing
is uploaded when a card lacks a section, or when any file holds a local path or a token.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from transformers import HfArgumentParser

from diffusers_med3d import __version__
from diffusers_med3d.hub import cards
from diffusers_med3d.hub import publish as hub

CARDS = Path(__file__).parents[1] / "model_cards"


@dataclass
class PushArguments:
    """What is published, where."""

    namespace: str = field(metadata={"help": "User or organisation on the Hub."})
    names: list[str] = field(default_factory=hub.bundled_names, metadata={"help": "Bundled checkpoints; default all."})
    cards_dir: str = field(default=str(CARDS), metadata={"help": "Folder of <name>.md and their pictures."})
    private: bool = field(default=False, metadata={"help": "Make new repositories private."})
    tag: str | None = field(default=None, metadata={"help": "Tag for the commits, such as v0.1.0."})
    dry_run: bool = field(default=False, metadata={"help": "Only show what would be uploaded."})


def stage(name: str, namespace: str, cards_dir: Path, folder: Path) -> list[str]:
    """Put checkpoint ``name``, its card as it stands on the Hub, and the card's pictures into ``folder``.

    Returns:
        Paths of the files below ``folder``.

    Raises:
        ValueError: a card that lacks something, something that must not leave the machine.
    """
    shutil.copytree(hub.resolve(name), folder)
    text = (cards_dir / f"{name}.md").read_text()
    lacks = cards.missing(text)
    if lacks:
        raise ValueError(f"The card of {name} lacks: {', '.join(lacks)}.")
    for picture in cards.pictures(text):
        shutil.copy(cards_dir / picture, folder / picture)
    (folder / "README.md").write_text(cards.for_hub(text, namespace, hub.bundled_names()))
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    hub.check_publishable(folder, files)
    return files


def main() -> None:
    """Stage everything, show it, and upload it if nothing is wrong with any of it."""
    (args,) = HfArgumentParser(PushArguments).parse_args_into_dataclasses()
    with tempfile.TemporaryDirectory() as temporary:
        staged = {}
        for name in args.names:
            folder = Path(temporary) / name
            staged[name] = stage(name, args.namespace, Path(args.cards_dir), folder)
            card = ModelCard.load(folder / "README.md").data
            print(f"{args.namespace}/{name}: licence {card.license}, task {card.pipeline_tag}")
            for file in staged[name]:
                print(f"  {os.path.getsize(folder / file):>12,} {file}")
        if args.dry_run:
            print("Dry run: nothing was uploaded.")
            return
        api = HfApi()
        for name, files in staged.items():
            repo_id = f"{args.namespace}/{name}"
            api.create_repo(repo_id, private=args.private, exist_ok=True)
            message = f"diffusers-med3d {__version__}"
            commit = hub.publish(Path(temporary) / name, repo_id, files, commit_message=message)
            if args.tag:
                api.create_tag(repo_id, tag=args.tag, revision=commit.oid, exist_ok=True)
            print(commit.commit_url)


if __name__ == "__main__":
    main()
