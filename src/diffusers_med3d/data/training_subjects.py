"""Which subjects a generator was trained on, and refusing to judge it by them."""

import json
import warnings
from collections.abc import Collection
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError, RepositoryNotFoundError

from ..hub.resolve import resolve

TRAINING_SUBJECTS = "training_subjects.json"
"""File beside a generator: JSON list of the subjects that it was trained on."""


def training_subjects_file(generator: str | Path) -> Path | None:
    """The file beside a generator (bundled name, folder or Hub id) that tells which subjects it was trained on.

    None where there is none; with a warning where the Hub cannot be asked.
    """
    folder = Path(resolve(generator))
    if folder.is_dir():
        return path if (path := folder / TRAINING_SUBJECTS).is_file() else None
    try:
        return Path(hf_hub_download(str(generator), TRAINING_SUBJECTS))
    except (RemoteEntryNotFoundError, RepositoryNotFoundError, HFValidationError):
        return None
    except OSError as error:
        warnings.warn(f"nobody knows which subjects {generator} was trained on: {error}", stacklevel=2)
        return None


def read_training_subjects(generator: str | Path) -> set[str]:
    """Subjects that a generator (bundled name, folder or Hub id) was trained on, from the file beside it.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = training_subjects_file(generator)
    if path is None:
        folder = Path(generator) if Path(generator).is_dir() else Path("FOLDER")  # one from the Hub, downloaded
        raise FileNotFoundError(
            f"{generator} has no {TRAINING_SUBJECTS} (a JSON list of subject ids), so nobody can tell which subjects "
            "it has seen; examples/train_diffusion.py writes it. For a generator from elsewhere (a converted one, say) "
            "write it into its folder yourself: the ids that your metadata give to subjects it was trained on, or, if "
            f"there are none, echo '[]' > {folder / TRAINING_SUBJECTS}"
        )
    return set(map(str, json.loads(path.read_text())))


def refuse_seen_subjects(subjects: Collection[str], trained_on: Collection[str], generator: str) -> None:
    """Refuse a generator that was trained on subjects that are to judge it, or whose spectrum it is to make.

    It denoises the scans that it was trained on from memory: such a spectrum measures memorisation.

    Args:
        subjects, trained_on: ids.
        generator: its name, for the message.

    Raises:
        ValueError: with their number and the first of them.
    """
    seen = sorted(set(subjects) & set(trained_on))
    if seen:
        raise ValueError(
            f"{len(seen)} of {len(set(subjects))} subjects were in the training set of {generator}, the first is "
            f"{seen[0]!r}; they can neither judge it nor give it a spectrum to make (for that there is the generator "
            "of the other fold)."
        )
