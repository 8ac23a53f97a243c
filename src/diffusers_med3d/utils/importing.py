"""Functions that are named on the command line."""

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def load_function(name: str) -> Callable[..., Any]:
    """Return the function, or other callable object, that ``file.py:function`` or ``package.module:function`` names.

    A module is looked up as Python does, and in the current folder.

    Raises:
        ValueError: no colon in ``name``, no such function in the file or module, or something that cannot be called;
            with the functions that there are.
        FileNotFoundError: no such file.
        ImportError: no such module.
    """
    source, _, function = name.rpartition(":")
    if not source or not function:
        raise ValueError(f"expected file.py:function or package.module:function, got {name!r}.")
    module = _load_file(Path(source)) if source.endswith(".py") else _load_module(source)
    found = vars(module).get(function)
    if not callable(found) or inspect.isclass(found):
        there = [
            one
            for one, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not one.startswith("_")
        ]
        what = "has no function" if found is None else f"has a {type(found).__name__} in place of a function"
        raise ValueError(f"{source} {what} {function!r}; its functions: {', '.join(there) or 'none'}.")
    return found


def _load_file(path: Path) -> ModuleType:
    """The module in a file, executed once per process."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    path = path.resolve()
    name = f"{path.stem}_{abs(hash(str(path))):x}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # the file is there and ends in .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        sys.path.insert(0, str(path.parent))  # what lies beside a script can be imported, as when Python runs it
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        finally:
            sys.path.remove(str(path.parent))
    return sys.modules[name]


def _load_module(name: str) -> ModuleType:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)
