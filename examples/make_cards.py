"""Make model_cards/<name>.md of the bundled checkpoints from their sources.

    python examples/make_cards.py

A source is model_cards/sources/<name>.toml (the text of each section) with <name>.report.json beside it (the figures,
each with its floor, which go into the table and into the metadata); the template is in the package. From
<name>.progress.json, the progress.json of its training, the curve <name>-training.png is drawn.
tests/hub/test_cards.py fails while a card is not what its source makes.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from diffusers_med3d import viz
from diffusers_med3d.hub import cards
from diffusers_med3d.trainers.diffusion import progress_figure
from diffusers_med3d.utils.arguments import ScriptParser
from diffusers_med3d.utils.files import write_whole

CARDS = Path(__file__).parents[1] / "model_cards"


@dataclass
class CardArguments:
    """Where the cards are."""

    cards_dir: str = field(default=str(CARDS), metadata={"help": "Folder of the cards; sources/ is in it."})


def main() -> None:
    """Write every card that has a source, if it lacks nothing."""
    (args,) = ScriptParser(CardArguments, description=__doc__).parse()
    for source in sorted(Path(args.cards_dir, "sources").glob("*.toml")):
        text = str(cards.from_source(source).render()) + "\n"
        lacks = cards.missing(text)
        if lacks:
            raise ValueError(f"{source.name}: the card lacks {', '.join(lacks)}.")
        write_whole(Path(args.cards_dir) / f"{source.stem}.md", text)
        print(f"{source.stem}.md")
    for source in sorted(Path(args.cards_dir, "sources").glob("*.progress.json")):
        picture = Path(args.cards_dir) / f"{source.name.removesuffix('.progress.json')}-training.png"
        viz.save(progress_figure(json.loads(source.read_text())), picture)
        print(picture.name)


if __name__ == "__main__":
    main()
