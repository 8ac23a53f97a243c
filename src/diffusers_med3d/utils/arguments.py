"""The command line of every script: TRL's parser with a readable ``--help`` and refusals of one line."""

import argparse
import difflib
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers import TrainingArguments
from trl import TrlParser

INHERITED = "training arguments of transformers"
"""Title of the last section of ``--help``."""

_NAME_COLUMNS = 38


class ScriptParser(TrlParser):
    """TRL's parser: dataclasses become flags, and ``--config file.yaml`` gives them other defaults.

    What is added: ``--help`` lists the fields of each dataclass in the order given and those that are inherited from
    ``transformers.TrainingArguments`` last; values of the YAML file are checked as flags are; abbreviated flags are
    unknown flags; whatever is wrong ends the script with one line instead of a traceback.

    Args:
        dataclass_types: the dataclasses, the script's own first; the first sentence of a docstring is the title of its
            section.
        description: what ``--help`` begins with, such as the script's docstring.
    """

    def __init__(self, *dataclass_types: type, description: str | None = None) -> None:
        super().__init__(dataclass_types, description=description, allow_abbrev=False)

    def parse(self) -> tuple[Any, ...]:
        """One instance of each dataclass, from the command line and the file given with ``--config``."""
        words = [part for word in sys.argv[1:] for part in _split_config(word)]
        if words[-1:] == ["--config"]:
            self.error("--config needs the path of a YAML file.")
        try:
            *found, unknown = self.parse_args_and_config(words, return_remaining_strings=True)
        except (ValueError, OSError, yaml.YAMLError) as error:
            self.error(str(error))
        if unknown:
            self.error(f"unknown arguments: {' '.join(unknown)}{self._hint(unknown)}")
        return tuple(found)

    def error(self, message: str) -> NoReturn:
        """End the script with exit code 2 and the message in one line."""
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Take values of the YAML file as defaults, converted and checked as if they stood on the command line."""
        actions = {action.dest: action for action in reversed(self._actions)}
        unknown = [name for name in config if name not in actions]
        if unknown:
            self.error(f"unknown keys in the config file: {', '.join(unknown)}{self._hint(unknown)}")
        return super().set_defaults_with_config(
            **{name: self._from_yaml(actions[name], value) for name, value in config.items()}
        )

    def _from_yaml(self, action: argparse.Action, value: Any) -> Any:
        if value is None or isinstance(value, dict):
            return value
        if isinstance(value, list) and action.nargs != "+":
            self.error(f"{action.dest} in the config file takes one value, got {value}.")
        try:
            return self._get_values(action, [str(one) for one in value] if isinstance(value, list) else [str(value)])
        except argparse.ArgumentError as error:
            self.error(f"in the config file, {error}")

    def _hint(self, unknown: list[str]) -> str:
        names = [action.dest for action in self._actions]
        close = [difflib.get_close_matches(word.lstrip("-").replace("-", "_"), names, 1) for word in unknown]
        meant = [f"--{one}" for found in close for one in found]
        return f" (did you mean {', '.join(meant)}?)" if meant else ""

    def format_usage(self) -> str:
        """One line: some scripts have two hundred flags."""
        return f"usage: {self.prog} [--config FILE.yaml] [--FLAG VALUE ...]\n"

    def format_help(self) -> str:
        """Usage, description, then a section for every dataclass and one for what is inherited."""
        width = min(shutil.get_terminal_size().columns, 140)
        actions = {action.dest: action for action in reversed(self._actions)}  # the first of --name and --no_name
        lines = [self.format_usage(), (self.description or "").strip(), ""]
        for title, names in self._sections().items():
            lines.append(f"{title}:")
            for name, kind in names.items():
                lines += _entry(actions[name], kind, width)
            lines.append("")
        return "\n".join(lines)

    def _sections(self) -> dict[str, dict[str, Any]]:
        """Title -> name of a field -> its type."""
        sections: dict[str, dict[str, Any]] = {}
        inherited: dict[str, Any] = {}
        for dataclass_type in self.dataclass_types:
            types = get_type_hints(dataclass_type)
            title = str(dataclass_type.__doc__).split("\n")[0].split(". ")[0].rstrip(".").replace("`", "")
            names = [entry.name for entry in fields(dataclass_type) if entry.init]
            sections[title] = {name: types[name] for name in names if _is_own(dataclass_type, name)}
            inherited |= {name: types[name] for name in names if not _is_own(dataclass_type, name)}
        return sections | ({INHERITED: inherited} if inherited else {})


def _is_own(dataclass_type: type, name: str) -> bool:
    """Whether a field is written in this project: not inherited unchanged from transformers or TRL."""
    if not issubclass(dataclass_type, TrainingArguments):
        return True
    writer = next(base for base in dataclass_type.__mro__ if name in base.__dict__.get("__annotations__", {}))
    return writer.__module__.split(".")[0] not in ("transformers", "trl")


def _entry(action: argparse.Action, kind: Any, width: int) -> list[str]:
    """A flag, the kind of its value, its help and its default as lines of ``--help``."""
    default = action.default
    kinds = "|".join(map(str, action.choices)) if action.choices else _kind(kind)
    name = f"  --{action.dest} {kinds}{' ...' if action.nargs == '+' else ''}"
    text = (action.help or "").replace("%%", "%")
    if not action.required and default not in (None, "", []):
        text += f" [{' '.join(map(str, default)) if isinstance(default, list) else default}]"
    wrapped = textwrap.wrap(text, width - _NAME_COLUMNS - 1) or [""]
    first = [f"{name:{_NAME_COLUMNS}} {wrapped[0]}".rstrip()]
    if len(name) > _NAME_COLUMNS:
        first = [name, f"{'':{_NAME_COLUMNS}} {wrapped[0]}".rstrip()]
    return [*first, *(f"{'':{_NAME_COLUMNS}} {line}" for line in wrapped[1:])]


def _kind(kind: Any) -> str:
    """What a value is, in a word: FLOAT for ``float``, ``float | None`` and ``list[float]``."""
    for one in (bool, int, float):
        if one in (kind, *get_args(kind)):
            return one.__name__.upper()
    return next((found for inner in get_args(kind) if (found := _kind(inner)) != "TEXT"), "TEXT")


def _split_config(word: str) -> list[str]:
    return ["--config", word.removeprefix("--config=")] if word.startswith("--config=") else [word]


@contextmanager
def refused_in_one_line() -> Iterator[None]:
    """Inside, an error about what was asked for ends the script with its message in one line and exit code 1.

    For what a script does before its work begins: reading the model, the rewards and the scans that its flags name.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}") from error
