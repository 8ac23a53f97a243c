"""Turn the pictures that a training made of the same samples into a film, an animated GIF.

    python examples/make_film.py --run_dir outputs/ppo_finetune                # outputs/ppo_finetune/film.gif

Every training writes such pictures to the folder film/ of its --output_dir, one every --picture_steps optimizer steps.
"""

from dataclasses import dataclass, field
from pathlib import Path

from diffusers_med3d import viz
from diffusers_med3d.utils.arguments import ScriptParser, refused_in_one_line


@dataclass
class FilmArguments:
    """Which film, and how it is written."""

    run_dir: str = field(default="outputs/ppo_finetune", metadata={"help": "The --output_dir of a training."})
    name: str | None = field(
        default=None, metadata={"help": "Which pictures, where a run has several: the name before the step."}
    )
    output_file: str | None = field(default=None, metadata={"help": "The GIF. Not set: film.gif in --run_dir."})
    seconds_per_frame: float = field(default=0.4, metadata={"help": "How long a picture is seen."})
    width: int | None = field(default=None, metadata={"help": "Width in pixels. Not set: that of the pictures."})
    colours: int = field(default=64, metadata={"help": "Colours of the GIF, 2 to 256; fewer make a smaller file."})


def frames_of(run_dir: Path, name: str | None) -> list[Path]:
    """The pictures of a run in the order of their steps.

    Raises:
        FileNotFoundError: there are none.
        ValueError: there are several kinds and none is named, or none of this name.
    """
    frames = sorted((run_dir / "film").glob("*-??????.png"))
    if not frames:
        raise FileNotFoundError(f"{run_dir} holds no pictures film/*.png; was it trained with --picture_steps 0?")
    names = sorted({frame.stem[:-7] for frame in frames})
    if name is None and len(names) > 1 or name is not None and name not in names:
        raise ValueError(f"--name must be one of {names}, got {name}.")
    return [frame for frame in frames if name is None or frame.stem[:-7] == name]


def main() -> None:
    """Read, write."""
    (args,) = ScriptParser(FilmArguments, description=__doc__).parse()
    with refused_in_one_line():
        frames = frames_of(Path(args.run_dir), args.name)
        output = Path(args.output_file or Path(args.run_dir) / "film.gif")
        viz.write_film(frames, output, args.seconds_per_frame, args.width, args.colours)
    print(f"{len(frames)} pictures, {output.stat().st_size / 1000:.0f} kB: {output}")


if __name__ == "__main__":
    main()
