"""A film of pictures that a run wrote, as an animated GIF."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..utils.files import whole_file


def write_film(
    frames: Sequence[str | Path],
    path: str | Path,
    seconds_per_frame: float = 0.4,
    width: int | None = None,
    colours: int = 64,
) -> Path:
    """Write PNG files of one size, in their order, as an animated GIF that runs forever; the last frame stays longer.

    Args:
        frames: paths of PNG files.
        path: of the GIF.
        seconds_per_frame: how long a frame is seen.
        width: pixels; None keeps that of the frames.
        colours: of the GIF, common to all frames, at most 256; fewer make a smaller file.

    Returns:
        the path.

    Raises:
        ValueError: fewer than two frames, frames of different sizes, times or colours that a GIF cannot have.
    """
    if len(frames) < 2:
        raise ValueError(f"A film needs at least two frames, got {len(frames)}.")
    if not seconds_per_frame >= 0.02 or not 2 <= colours <= 256:
        raise ValueError(
            f"seconds_per_frame must be at least 0.02 and colours 2 to 256, got {seconds_per_frame} and {colours}."
        )
    pictures = []
    for frame in frames:
        with Image.open(frame) as opened:
            pictures.append(opened.convert("RGB"))
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) > 1:
        raise ValueError(f"The frames of a film must have one size, got {sizes}.")
    if width is not None:
        height = round(pictures[0].height * width / pictures[0].width)
        pictures = [picture.resize((width, height), Image.Resampling.LANCZOS) for picture in pictures]
    together = Image.new("RGB", (pictures[0].width, pictures[0].height * len(pictures)))
    for number, picture in enumerate(pictures):
        together.paste(picture, (0, number * picture.height))
    palette = together.quantize(colours)  # one for all frames: colours would flicker otherwise
    indexed = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    each = round(1000 * seconds_per_frame)
    path = Path(path)
    with whole_file(path) as temporary:
        indexed[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=indexed[1:],
            duration=[each] * (len(indexed) - 1) + [4 * each],
            loop=0,
        )
    return path
