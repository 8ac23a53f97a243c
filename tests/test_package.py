"""What is shipped: a wheel that works elsewhere, and declarations that agree with the code."""

import ast
import doctest
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import REPOSITORY
from diffusers_med3d import MedDiffusion3DPipeline
from diffusers_med3d.hub.resolve import CHECKPOINTS, bundled_names

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def normalised(requirement: str) -> str:
    """Distribution name of a requirement, as PyPI compares them."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement).group()).lower()


@pytest.fixture(scope="module")
def installed_wheel(tmp_path_factory) -> Path:
    """The package, built from a copy of the sources and installed into a folder of its own."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, source], check=True, timeout=900)
    (wheel,) = wheels.glob("diffusers_med3d-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", target, wheel], check=True, timeout=900)
    return target


@pytest.mark.slow
def test_the_wheel_holds_the_licence_the_type_marker_and_every_module(installed_wheel):
    package = installed_wheel / "diffusers_med3d"
    assert (package / "py.typed").exists() and (package / "hub" / "card_template.md").exists()
    (licence,) = installed_wheel.glob("diffusers_med3d-*.dist-info/licenses/LICENSE")
    assert "Apache License" in licence.read_text()
    sources = REPOSITORY / "src" / "diffusers_med3d"
    shipped = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    assert shipped == {str(path.relative_to(sources)) for path in sources.rglob("*.py")}
    for name in bundled_names():
        files = {path.relative_to(sources) for path in (sources / "checkpoints" / name).rglob("*") if path.is_file()}
        assert all((package / file).exists() for file in files), name


@pytest.mark.slow
def test_the_installed_wheel_generates_from_its_own_bundled_checkpoint(installed_wheel, tiny_pipeline_folder):
    code = """
import sys
from importlib.metadata import version
from pathlib import Path
import diffusers_med3d
from diffusers_med3d import DDPOTrainer, MedDiffusion3DPipeline
from diffusers_med3d.hub import bundled_names
assert Path(diffusers_med3d.__file__).is_relative_to(sys.argv[1]), diffusers_med3d.__file__
assert diffusers_med3d.__version__ == version("diffusers-med3d")
name = "brain-t1" if "brain-t1" in bundled_names() else sys.argv[2]
pipeline = MedDiffusion3DPipeline.from_pretrained(name)
print(tuple(pipeline(num_inference_steps=1).volumes.shape)[:2])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(installed_wheel), tiny_pipeline_folder],
        env=os.environ | {"PYTHONPATH": str(installed_wheel)},
        cwd=installed_wheel,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "(1, 1)" in done.stdout


def imported_modules(folder: Path) -> set[str]:
    """Top-level names of everything that the Python files below ``folder`` import."""
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {"diffusers_med3d"}


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["src", "examples"])
def test_every_package_that_is_imported_is_declared(folder):
    extras = [lines for name, lines in PROJECT["optional-dependencies"].items() if name not in ("test", "docs")]
    declared = {normalised(line) for line in sum(extras, PROJECT["dependencies"])}
    distributions = importlib.metadata.packages_distributions()
    modules = imported_modules(REPOSITORY / folder)
    assert "torch" in modules
    missing = {
        module
        for module in modules
        if not {normalised(name) for name in distributions.get(module, [module])} & declared
    }
    assert not missing


def test_the_constraints_pin_everything_that_is_declared():
    pinned = {normalised(line) for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line}
    extras = PROJECT["optional-dependencies"]
    for line in sum((lines for name, lines in extras.items() if name != "inception"), PROJECT["dependencies"]):
        assert normalised(line) in pinned, f"{line} is not pinned in constraints.txt"


def test_the_files_of_the_repository_name_no_folder_of_a_machine():
    pattern = re.compile(r"(?<![\w.])/(work|root|home|farm|Users)/")
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True).stdout.split("\n")
    texts = [REPOSITORY / name for name in tracked if re.search(r"\.(py|md|toml|json|txt|yml|yaml|sh)$|/run$", name)]
    found = [
        str(path) for path in texts if path != Path(__file__) and path.exists() and pattern.search(path.read_text())
    ]
    assert not found


def sources() -> dict[str, str]:
    """Every module of the package, by its path below the package."""
    package = REPOSITORY / "src" / "diffusers_med3d"
    return {str(path.relative_to(package)): path.read_text() for path in package.rglob("*.py")}


@pytest.mark.parametrize(
    ("private", "place"),
    [
        ("pipeline_loading_utils", "__init__.py"),
        ("_BaseTrainer", "trainers/base.py"),
        ("_BaseConfig", "trainers/base.py"),
    ],
)
def test_private_interfaces_of_others_are_imported_in_one_place(private, place):
    assert [name for name, text in sources().items() if re.search(rf"import .*\b{private}\b", text)] == [place]


def test_nothing_in_the_package_or_its_scripts_unpickles():
    """docs/pitfalls.md, P10: foreign weights come as safetensors, our own training state with weights_only=True."""
    scripts = {path.name: path.read_text() for path in (REPOSITORY / "examples").glob("*.py")}
    assert scripts
    for name, text in {**sources(), **scripts}.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                harmless = ast.unparse(node) == "from pickle import UnpicklingError"  # to say what was refused
                assert harmless or "pickle" not in ast.unparse(node), name
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), name


def test_bundled_checkpoints_are_small_safetensors_in_fp16():
    """docs/pitfalls.md, P21: a small fine-tuning update would not survive bfloat16."""
    files = [path for path in CHECKPOINTS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".png"}
    assert sum(path.stat().st_size for path in files) <= 60 * 2**20
    for path in files:
        if path.suffix == ".safetensors":
            assert {tensor.dtype for tensor in load_file(path).values()} <= {torch.float16, torch.int64}, path


@pytest.mark.slow
@pytest.mark.skipif("brain-t1" not in bundled_names(), reason="no bundled generator in this checkout")
def test_the_example_in_the_docstring_of_the_pipelines_call_runs():
    text = MedDiffusion3DPipeline.__call__.__doc__.replace("num_inference_steps=30", "num_inference_steps=2")
    names = {"torch": torch, "MedDiffusion3DPipeline": MedDiffusion3DPipeline}
    example = doctest.DocTestParser().get_doctest(text, names, "example", None, None)
    assert doctest.DocTestRunner().run(example) == (0, 4)


def test_every_dependency_stands_with_its_reason_in_the_documentation():
    """docs/dependencies.md; the extra test repeats those of the other extras without a reason of its own."""
    rows = [re.findall(r"[^|]+", line) for line in (REPOSITORY / "docs" / "dependencies.md").read_text().split("\n")]
    table = [[cell.strip(" `") for cell in row] for row in rows if len(row) in (2, 3) and "`" in row[0]]
    assert all(row[-1] for row in table)
    given = {("", normalised(row[0])) if len(row) == 2 else (row[0], normalised(row[1])) for row in table}
    extras = PROJECT["optional-dependencies"]
    wanted = {("", normalised(line)) for line in PROJECT["dependencies"]}
    wanted |= {(name, normalised(line)) for name in extras if name != "test" for line in extras[name]}
    known = {package for _, package in wanted}
    wanted |= {("test", normalised(line)) for line in extras["test"] if normalised(line) not in known}
    assert len(given) == len(table) and given == wanted, given ^ wanted
