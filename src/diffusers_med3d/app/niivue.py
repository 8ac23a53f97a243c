"""NiiVue, the viewer of the page, from the Python package that ships it: nothing is fetched when the page runs."""

import re
from functools import cache
from importlib.metadata import files
from pathlib import Path
from urllib.parse import unquote

PACKAGE = "ipyniivue"

_MODULE = re.compile(r'"(var%20[\w.!~*\'()%-]{1000000,})"')
"""NiiVue's ES module as ipyniivue's widget carries it: one percent-encoded string, which it puts into saved pages."""


@cache
def niivue_module() -> str:
    """Return the source of NiiVue's ES module, which exports the class ``Niivue``.

    Raises:
        FileNotFoundError: ipyniivue is not installed, or holds no such module.
    """
    found = _MODULE.search(_text_of("static/widget.js"))
    module = unquote(found.group(1)) if found else ""
    if "Niivue" not in module.rpartition("export{")[2]:
        raise FileNotFoundError(
            f"this version of {PACKAGE} holds no NiiVue module; install the one in constraints.txt."
        )
    return module


@cache
def niivue_licence() -> str:
    """Return the text of the licence that NiiVue's module comes with."""
    return _text_of("LICENSE")


def _text_of(name: str) -> str:
    for file in files(PACKAGE) or []:
        if file.as_posix().endswith(f"/{name}"):
            return Path(file.locate()).read_text(encoding="utf-8")
    raise FileNotFoundError(f"the installed {PACKAGE} has no file {name}.")
