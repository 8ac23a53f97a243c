"""Runs the fast tests with the oldest or the newest versions that pyproject.toml allows, in a new virtual environment.

    python tests/slow/versions.py {oldest,newest} [--folder FOLDER] [pytest's arguments]

Only what the package itself needs, with all extras, is held at its lower bound; the test tools and what others bring
along are the newest that fit. torch is the one of constraints.txt both times, for its other releases are gigabytes.
The environment is removed at the end; with --folder it stays there and is used again.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TOOLS = ("test", "docs")  # extras of developers
LEFT_OUT = ("docs", "inception")  # pytorch-fid needs torchvision, which needs another build of torch


def lower_bounds() -> dict[str, str]:
    """The lowest allowed version of each dependency and of each user's extra."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(one for name in extras if name not in TOOLS for one in extras[name])]
    return dict(re.match(r"([\w.-]+)(?:\[.*\])?>=([\d.]+)", one).groups() for one in wanted)


def constraints(which: str) -> list[str]:
    """Lines of a constraints file."""
    (torch,) = re.findall(r"^torch==.*$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    if which == "newest":
        return [torch]
    return [torch, *(f"{name}=={version}" for name, version in lower_bounds().items() if name != "torch")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=("oldest", "newest"))
    parser.add_argument("--folder", type=Path, help="where the environment is made and kept")
    args, pytest_arguments = parser.parse_known_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    python = folder / "bin" / "python"
    try:
        if not python.exists():
            venv.create(folder, with_pip=True)
        (folder / "constraints.txt").write_text("\n".join(constraints(args.which)) + "\n")
        extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        package = f"{REPOSITORY}[{','.join(name for name in extras if name not in LEFT_OUT)}]"
        install = [python, "-m", "pip", "install", "--disable-pip-version-check", "-q", "--upgrade"]
        subprocess.run([*install, "-c", folder / "constraints.txt", "-e", package], check=True)
        subprocess.run([python, "-m", "pip", "freeze", "--exclude-editable"], check=True)
        test = [python, "-m", "pytest", "-m", "not slow and not long", *pytest_arguments]
        return subprocess.run(test, cwd=REPOSITORY).returncode
    finally:
        if args.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
