"""Publish a saved pipeline, reward model or autoencoder on the Hub, with its card.

    hf auth login
    python examples/push_to_hub.py --model_name_or_path outputs/ppo_finetune --namespace YOU --dry_run
    python examples/push_to_hub.py --namespace ORG --tag v0.2.0            # all bundled checkpoints

Of a folder of yours goes what `from_pretrained` reads, its card and the pictures in it: no checkpoints, logs, scans or
names of subjects. A folder without a card gets one. The cards of bundled checkpoints come from model_cards/. Nothing is
uploaded when a card lacks a section, or when any file holds a local path or a token; docs/publishing.md has the list.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, ModelCard

from diffusers_med3d import __version__
from diffusers_med3d.hub import cards
from diffusers_med3d.hub.origin import license_of
from diffusers_med3d.hub.publish import check_publishable, model_files, publish, warn_without_audit
from diffusers_med3d.hub.resolve import CHECKPOINTS, bundled_names, resolve
from diffusers_med3d.utils.arguments import ScriptParser, refused_in_one_line

CARDS = Path(__file__).parents[1] / "model_cards"


@dataclass
class PushArguments:
    """What is published, and where."""

    model_name_or_path: list[str] = field(
        default_factory=bundled_names, metadata={"help": "Saved folders, or bundled names."}
    )
    namespace: str | None = field(
        default=None, metadata={"help": "User or organisation; repositories are called as the folders are."}
    )
    repo_id: str | None = field(
        default=None, metadata={"help": "For one model: NAMESPACE/NAME in place of --namespace and the folder's name."}
    )
    cards_dir: str = field(default=str(CARDS), metadata={"help": "Folder of the bundled checkpoints' cards."})
    private: bool = field(default=False, metadata={"help": "Make new repositories private."})
    tag: str | None = field(default=None, metadata={"help": "Tag for the commits, such as v0.2.0."})
    dry_run: bool = field(default=False, metadata={"help": "Only show what would be uploaded."})

    def __post_init__(self) -> None:
        if (self.namespace is None) == (self.repo_id is None):
            raise ValueError(f"give one of --namespace and --repo_id, got {self.namespace} and {self.repo_id}.")
        if self.repo_id is not None and (len(self.model_name_or_path) > 1 or self.repo_id.count("/") != 1):
            raise ValueError(
                f"--repo_id is NAMESPACE/NAME of one model, got {self.repo_id} for {self.model_name_or_path}."
            )


def stage_bundled(name: str, repo_id: str, cards_dir: Path, folder: Path) -> None:
    """Put a bundled checkpoint, its card as it stands on the Hub, and the card's pictures into ``folder``."""
    shutil.copytree(resolve(name), folder)
    text = (cards_dir / f"{name}.md").read_text()
    for picture in cards.pictures(text):
        shutil.copy(cards_dir / picture, folder / picture)
    (folder / "README.md").write_text(cards.for_hub(text, repo_id.split("/")[0], bundled_names()))


def stage_folder(source: Path, repo_id: str, folder: Path) -> None:
    """Put what is published of a user's folder into ``folder``, with a card if it has none."""
    for name in model_files(source):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, folder / name)
    card = folder / "README.md"
    if not card.is_file():
        made = cards.of_folder(folder, repo_id)
        made.license = license_of(str(source)) or made.license
        made.write(folder)
    card.write_text(cards.for_repository(card.read_text(), repo_id))


def check(name: str, folder: Path) -> list[str]:
    """Paths of the files below ``folder``; a card that lacks something and what must not leave are refused."""
    text = (folder / "README.md").read_text()
    lacks = cards.missing(text) + [f"picture {one}" for one in cards.pictures(text) if not (folder / one).is_file()]
    if lacks:
        raise ValueError(f"The card of {name} lacks: {', '.join(lacks)}.")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    check_publishable(folder, files)
    return files


def main() -> None:
    """Stage everything, show it, and upload it if nothing is wrong with any of it."""
    (args,) = ScriptParser(PushArguments, description=__doc__).parse()
    with tempfile.TemporaryDirectory() as temporary:
        staged = {}
        with refused_in_one_line():
            for number, name in enumerate(args.model_name_or_path):
                source, folder = Path(resolve(name)), Path(temporary) / str(number)
                if not source.is_dir():
                    raise FileNotFoundError(f"no such folder: {source}")
                repo_id = args.repo_id or f"{args.namespace}/{source.resolve().name}"
                if source.parent == CHECKPOINTS:
                    stage_bundled(name, repo_id, Path(args.cards_dir), folder)
                else:
                    stage_folder(source, repo_id, folder)
                staged[repo_id] = folder, check(name, folder)
                card = ModelCard.load(folder / "README.md").data
                print(f"{repo_id}: licence {card.license}, task {card.pipeline_tag}")
                for file in staged[repo_id][1]:
                    print(f"  {os.path.getsize(folder / file):>12,} {file}")
        if args.dry_run:
            for repo_id, (folder, files) in staged.items():
                warn_without_audit(folder, files, repo_id)
            print("Dry run: nothing was uploaded.")
            return
        api = HfApi()
        for repo_id, (folder, files) in staged.items():
            api.create_repo(repo_id, private=args.private, exist_ok=True)
            commit = publish(folder, repo_id, files, commit_message=f"diffusers-med3d {__version__}")
            if args.tag:
                api.create_tag(repo_id, tag=args.tag, revision=commit.oid, exist_ok=True)
            print(commit.commit_url)


if __name__ == "__main__":
    main()
