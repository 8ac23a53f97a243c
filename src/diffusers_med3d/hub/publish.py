"""Publishing: what goes to the Hub, with which card, and what never leaves the machine."""

import json
import logging
import os
import re
import shutil
import struct
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from glob import escape
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import CommitInfo, HfApi
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..utils.files import read_json
from ..utils.wrappers import without_prefixes
from . import cards
from .origin import inherited_license, source_folder, without_local_path
from .resolve import check_class, did_you_mean, resolve

if TYPE_CHECKING:
    from diffusers import ModelMixin as _DiffusersModel  # what the mixin is mixed into
else:
    _DiffusersModel = object

WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"
PUBLISHED_SUFFIXES = (".json", ".safetensors", ".md", ".png", ".py", ".txt")
"""Kinds of files that may be published; a pickle, a scan or a log is none of them."""

_MODEL_FILES = (
    "model_index.json",
    "config.json",
    "scheduler_config.json",
    "diffusion_pytorch_model*.safetensors",
    "diffusion_pytorch_model*.safetensors.index*.json",
)
_LOCAL_PATH = re.compile(r"(?<![\w.:/~<-])/(?:[\w.+-]+/)+[\w.+-]*|\b[A-Za-z]:\\[\w.\\-]+")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")


def model_files(folder: str | os.PathLike) -> list[str]:
    """Paths below a saved folder that ``from_pretrained`` reads, its card and the pictures in it, and nothing else.

    Args:
        folder: what ``save_pretrained`` of a pipeline or model wrote, possibly the folder of a whole training run.

    Raises:
        ValueError: weights as a pickle.
        FileNotFoundError: no saved pipeline or model.
    """
    folder = Path(folder)
    parts, index = [folder], folder / "model_index.json"
    if index.is_file():
        parts += [folder / name for name, value in json.loads(index.read_text()).items() if isinstance(value, list)]
    found = [path for part in parts for pattern in _MODEL_FILES for path in part.glob(pattern)]
    if not found:
        raise FileNotFoundError(f"{folder.name} holds no saved pipeline or model.")
    pickles = [path for part in parts for path in part.glob("diffusion_pytorch_model*.bin")]
    if pickles:
        raise ValueError(f"{pickles[0].name} is a pickle; save with safe_serialization=True.")
    found += [path for name in ("README.md", LORA_FILE) if (path := folder / name).is_file()]
    if (folder / "README.md").is_file():
        pictures = cards.pictures((folder / "README.md").read_text())
        found += [path for name in pictures if (path := folder / name).is_file()]
    return sorted({path.relative_to(folder).as_posix() for path in found})


def check_publishable(folder: str | os.PathLike, files: Iterable[str]) -> None:
    """Refuse to publish what belongs to one machine or one person.

    Args:
        folder: where the files are.
        files: paths below ``folder``.

    Raises:
        ValueError: a file of an unknown kind (pickles, logs, scans), an absolute path or a Hub token in a text or in
            the metadata of safetensors; names all that were found.
    """
    found = []
    for name in files:
        path = Path(folder) / name
        if path.suffix not in PUBLISHED_SUFFIXES:
            found.append(f"{name} is none of {', '.join(PUBLISHED_SUFFIXES)}")
        elif path.suffix != ".png":
            text = _safetensors_metadata(path) if path.suffix == ".safetensors" else path.read_text()
            found += [f"{name} holds the local path {match.group()!r}" for match in _LOCAL_PATH.finditer(text)]
            found += [f"{name} holds a Hub token" for _ in _TOKEN.finditer(text)]
    if found:
        raise ValueError("Nothing was uploaded, because this must not leave the machine: " + "; ".join(found) + ".")


def warn_without_audit(folder: str | os.PathLike, files: Iterable[str], repo_id: str) -> None:
    """Warn of a generator whose card does not say whether its samples are copies of training scans.

    Args:
        folder: where the files are.
        files: paths below ``folder`` that are published.
        repo_id: for the message.
    """
    card = Path(folder) / "README.md"
    if "model_index.json" in files and not (card.is_file() and cards.has_audit(card.read_text())):
        warnings.warn(
            f"Nobody has looked whether samples of {repo_id} are copies of training scans: run `python "
            "examples/evaluate.py --model_name_or_path FOLDER --data_dir DATA --split_file split.json` and write what "
            "its report says of copies under 'Memorisation audit' in the README.md of the folder.",
            stacklevel=3,
        )


def _safetensors_metadata(path: Path) -> str:
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        metadata = json.loads(file.read(size)).get("__metadata__", {})
    return "\n".join(str(value) for value in metadata.values())


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    files: Sequence[str],
    *,
    token: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    path_in_repo: str | None = None,
    run_as_future: bool = False,
) -> CommitInfo | Future[CommitInfo]:
    """Upload ``files`` of ``folder``, and nothing else, after `check_publishable` and `warn_without_audit`.

    Args:
        folder: where the files are.
        repo_id: an existing repository.
        files: paths below ``folder``.
        token, commit_message, revision, create_pr, path_in_repo, run_as_future: as in
            ``huggingface_hub.upload_folder``.

    Raises:
        ValueError: something that must not leave the machine.
    """
    check_publishable(folder, files)
    warn_without_audit(folder, files, repo_id)
    upload: Callable[..., Any] = HfApi().upload_folder  # whose overloads want to know run_as_future beforehand
    return upload(
        repo_id=repo_id,
        folder_path=folder,
        path_in_repo=path_in_repo,
        allow_patterns=[escape(name) for name in files],
        token=token,
        commit_message=commit_message,
        revision=revision,
        create_pr=create_pr,
        run_as_future=run_as_future,
    )


def _same_weights(first: Path, second: Path) -> bool:
    """Whether two saved folders hold the same tensors, compared in the lower of both precisions."""
    files = [name for name in model_files(first) if name.endswith(".safetensors")]
    if not all((second / name).is_file() for name in files):
        return False
    for name in files:
        with safe_open(first / name, "pt") as one, safe_open(second / name, "pt") as other:
            if set(one.keys()) != set(other.keys()):
                return False
            for key in one.keys():
                a, b = one.get_tensor(key), other.get_tensor(key)
                dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
                if a.shape != b.shape or not a.to(dtype).equal(b.to(dtype)):
                    return False
    return True


def _check_shards(source: str) -> None:
    """Refuse (ValueError) an index of weights in several files that names one outside of its folder."""
    if not os.path.isdir(source):
        return
    for path in Path(source).glob("**/*.index*.json"):
        names = read_json(path).get("weight_map")
        outside = (
            [name for name in names.values() if Path(str(name)).name != name] if isinstance(names, dict) else [names]
        )
        if outside:
            raise ValueError(f"{path} names weights that are no files beside it: {outside[0]!r}.")


def _weight_files(folder: str) -> list[Path]:
    """The one file of a model's weights or the index of several, where they are in a folder."""
    return [path for name in (WEIGHTS, f"{WEIGHTS}.index.json") if (path := Path(folder, name)).is_file()]


_UNREADABLE = (
    ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, JSONDecodeError, SafetensorError,
)  # fmt: skip
"""What networks raise whose config says something impossible, and files that are not what they should be."""


class PublishMixin(_DiffusersModel):
    """``push_to_hub`` of diffusers with our card, of the files that ``from_pretrained`` reads and of no others; and
    ``from_pretrained`` of bundled checkpoints by their bare names.

    It stands first among the bases of pipelines and models. The card is the README.md beside the weights in the folder
    that they were saved to, or loaded from and not changed since, with the pictures that it shows. Without one, a card
    that is on the Hub already stays when it has the clinical warning; else one is made that says what the config says.
    """

    _card_beside: str | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """As in diffusers, and a bare name is a bundled checkpoint.

        Args:
            pretrained_model_name_or_path: bundled name (``"brain-t1"``), local folder, or Hub id ``"org/name"``.
            **kwargs: diffusers' own, such as ``dtype``, ``subfolder``, or for a pipeline a component to put in place of
                the saved one.

        Raises:
            ValueError: a bare name that is neither bundled nor a local folder or file; a folder or repository of
                another class, which the message names.
            FileNotFoundError: a local path where nothing is.
        """
        source = resolve(pretrained_model_name_or_path)
        check_class(cls, source, kwargs)
        _check_shards(source)
        kwargs.setdefault("use_safetensors", True)  # never a pickle
        try:
            return cls._whole(source, kwargs)
        except _UNREADABLE as error:
            said = " ".join(str(error).split())
            raise ValueError(
                f"{source} cannot be loaded as {cls.__name__} ({type(error).__name__}: {said:.300})."
            ) from error
        except OSError as error:
            if os.path.exists(source) or not (hint := did_you_mean(source)):
                raise
            raise OSError(f"{error}{hint}") from error  # "outputs/generater" might have been a Hub id

    @classmethod
    def _whole(cls, source: str, options: dict[str, Any]) -> Self:
        """``from_pretrained`` of diffusers, which fills weights that it does not find with random numbers; a network
        whose weights bear the prefixes of ``torch.compile`` or DistributedDataParallel is read all the same."""
        if not issubclass(cls, ModelMixin) or options.get("output_loading_info"):
            return super().from_pretrained(source, **options)
        logger = logging.getLogger("diffusers.models.modeling_utils")
        quiet = logger.disabled
        logger.disabled = True  # its warning of weights that are missing, which is an error here
        try:
            model, info = super().from_pretrained(source, **options, output_loading_info=True)
        finally:
            logger.disabled = quiet
        missing, unexpected = info["missing_keys"], info["unexpected_keys"]
        if not missing:
            return model
        if set(without_prefixes(dict.fromkeys(unexpected))) == set(model.state_dict()) and os.path.isdir(source):
            folder = Path(source, options.get("subfolder") or "")
            state: dict[str, Any] = {}
            for path in folder.glob("diffusion_pytorch_model*.safetensors"):
                state |= load_file(path)
            plain = {key: tensor.to(model.dtype) for key, tensor in without_prefixes(state).items()}
            model.load_state_dict(plain, assign=True)  # diffusers leaves what it did not find without values
            return model
        raise ValueError(
            f"{source} lacks {len(missing)} of the weights of {cls.__name__}, such as {missing[0]}"
            + (f", and holds others, such as {unexpected[0]}." if unexpected else ".")
        )

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; weights of an earlier save in one file or in several do not stay beside the new ones."""
        folder = os.fspath(save_directory)
        before = {path: path.stat().st_mtime_ns for path in _weight_files(folder)}
        super().save_pretrained(folder, *args, **kwargs)
        written = [path for path in _weight_files(folder) if before.get(path) != path.stat().st_mtime_ns]
        if written:  # else a pipeline, or weights of another variant (fp16)
            for path in set(before) - set(written):
                path.unlink()

    def to_json_string(self) -> str:
        """As in diffusers, without the local folder that this was loaded from."""
        config = json.loads(super().to_json_string())
        if "_name_or_path" in config:
            config["_name_or_path"] = without_local_path(str(config["_name_or_path"] or ""))
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in diffusers; remembers the card that lies there, over which a push would write."""
        card = Path(save_directory) / "README.md"
        self._card_beside = card.read_text() if card.is_file() else None
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _upload_folder(
        self,
        working_dir: str | os.PathLike,
        repo_id: str,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> CommitInfo | Future[CommitInfo]:
        """The private method of diffusers that every push ends in, ``save_pretrained(..., push_to_hub=True)`` too."""
        if subfolder is None:
            self._write_card(Path(working_dir), repo_id)
        files = model_files(working_dir)
        return publish(
            working_dir,
            repo_id,
            [name for name in files if subfolder is None or name != "README.md"],
            token=token,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            create_pr=create_pr,
            path_in_repo=subfolder,
        )

    def _write_card(self, folder: Path, repo_id: str) -> None:
        """Put the card that is published into ``folder``, where diffusers has put that of the Hub or an empty one."""
        card, source = folder / "README.md", source_folder(self)
        text = self._card_beside
        if text is None and source is not None and (source / "README.md").is_file() and _same_weights(folder, source):
            text = (source / "README.md").read_text()
            for name in cards.pictures(text):
                if (source / name).is_file():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(source / name, folder / name)
        if text is not None:
            card.write_text(cards.for_repository(text, repo_id))
        elif not card.is_file() or cards.NOT_FOR_CLINICAL_USE not in card.read_text():
            made = cards.of_folder(folder, repo_id)
            parts = self.components.values() if isinstance(self, DiffusionPipeline) else ()
            made.license = inherited_license(self, *parts) or made.license
            made.write(folder)
