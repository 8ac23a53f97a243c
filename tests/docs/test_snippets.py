"""Every Python and shell block of the README, the docs and the cards' sources.

Python blocks run as printed, in the order of their page, with few denoising and optimizer steps. A block that cannot
run is preceded by the line `*Not run in the tests: REASON.*`, which the reader sees too. Shell blocks run in bash with
stand-ins for the programs, which write down how they were called; every call of a script is then parsed by that
script's own parser.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from sybil import Document
from sybil.parsers.markdown import CodeBlockParser
from transformers import HfArgumentParser
from trl import TrlParser

from conftest import REPOSITORY, run_example

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
CARDS = sorted((REPOSITORY / "model_cards").glob("*.md"))
NOT_RUN = re.compile(r"\*Not run in the tests: (?P<reason>[^*]+)\.\*\n$")
SHORT = "max_steps=1, per_device_train_batch_size=2, num_generations=2, num_inference_steps=3, "
FEWER = {  # what a page prints -> what the test runs instead
    r"num_inference_steps=\d+": "num_inference_steps=2",
    r"strength=0\.\d+, num_inference_steps=2": "strength=0.5, num_inference_steps=4",
    r", max_steps=\d+": "",
    r"DDPOConfig\(": f"DDPOConfig({SHORT}",
    r"num_samples=8, class_labels=\[name\] \* 8": "num_samples=2, class_labels=[name] * 2",
}
PROGRAMS = (
    "accelerate",
    "python",
    "torchrun",
    "sbatch",
    "pip",
    "pytest",
    "hf",
    "git",
    "tar",
    "cp",
    "mkdocs",
    "tensorboard",
    "ruff",
)
PROGRAMS += ()


def blocks(path: Path, language: str) -> list[tuple[str, int, str | None]]:
    """(code, line, reason why it is not run or None) of every block of a language."""
    text = path.read_text()
    document = Document(text, str(path))
    found = []
    for region in CodeBlockParser(language, evaluator=lambda example: None)(document):
        skipped = NOT_RUN.search(text[: region.start])
        found.append((region.parsed, text[: region.start].count("\n") + 1, skipped and skipped["reason"]))
    return found


def having(language: str, paths: list[Path]) -> list[Path]:
    return [path for path in paths if blocks(path, language)]


def identifier(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


# --- Python ---


@pytest.fixture
def workplace(tmp_path, monkeypatch, brains_folder) -> Path:
    """A folder to run in, with what the pages call DATA and split.json, and a reward in my_rewards.py."""
    monkeypatch.chdir(tmp_path)
    os.symlink(brains_folder, tmp_path / "DATA")
    split = {"train": ["sub-01", "sub-04", "sub-06"], "validation": ["sub-02"], "test": ["sub-03"]}
    split["folds"] = {"a": ["sub-01", "sub-06"], "b": ["sub-04"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    (tmp_path / "my_rewards.py").write_text(
        "def symmetry(volumes, **conditions):\n    return volumes.mean((1, 2, 3, 4))\n"
    )
    return tmp_path


LONGEST = REPOSITORY / "docs" / "quickstart.md"  # it has what the README has, and more


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.long] * (path == LONGEST)) for path in having("python", PAGES)],
    ids=identifier,
)
def test_the_python_of_a_page_runs(path, workplace):
    scope: dict[str, object] = {}
    for code, line, reason in blocks(path, "python"):
        if reason:
            continue
        for printed, run in FEWER.items():
            code = re.sub(printed, run, code)
        exec(compile("\n" * line + code, str(path), "exec"), scope)
    trainer = scope.get("trainer")
    assert trainer is None or type(trainer).__name__ == "DDPOTrainer"


def test_few_blocks_are_not_run_and_each_says_why():
    reasons = [(identifier(path), reason) for path in PAGES for _, _, reason in blocks(path, "python") if reason]
    assert len(reasons) <= 4, reasons


# --- shell ---


def calls(code: str, folder: Path) -> list[list[str]]:
    """Every program that a shell block calls, with its arguments, after bash has done its expansions.

    Raises:
        AssertionError: the block is no valid bash or calls a program that has no stand-in.
    """
    stand_ins, log = folder / "bin", folder / "calls"
    stand_ins.mkdir(exist_ok=True)
    log.write_text("")
    for program in PROGRAMS:
        script = stand_ins / program
        script.write_text(f'#!/bin/bash\nprintf "%q " {program} "$@" >> {shlex.quote(str(log))}\necho >> {log}\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    done = subprocess.run(
        ["/bin/bash", "-euc", code],
        cwd=folder,
        env={"PATH": str(stand_ins), "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"{done.stderr}\nin\n{code}"
    return [shlex.split(line.replace("$'", "'")) for line in log.read_text().splitlines()]


class Parsed(Exception):
    """A script's parser has accepted its arguments."""


def check_call(call: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Name of the script of the repository that is called, once its own parser has taken the flags."""
    words = [word for word in call if word.endswith(".py") and word.startswith(("examples/", "benchmarks/"))]
    if call[0] not in ("accelerate", "python", "torchrun") or not words:
        return None
    script, arguments = words[0], call[call.index(words[0]) + 1 :]
    assert (REPOSITORY / script).is_file(), f"{script} does not exist"

    def stop_after(parse):
        def parse_and_stop(self, *args, **kwargs):
            found = parse(self, *args, **kwargs)
            unknown = found[-1] if kwargs.get("return_remaining_strings") else []
            if unknown:
                raise SystemExit(f"unknown arguments: {' '.join(unknown)}")
            raise Parsed

        return parse_and_stop

    with monkeypatch.context() as patch:
        for parser in (HfArgumentParser, TrlParser):  # TRL has its own copy of the former
            patch.setattr(parser, "parse_args_into_dataclasses", stop_after(parser.parse_args_into_dataclasses))
        patch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(Parsed):
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
    return script


@pytest.mark.parametrize("path", having("bash", PAGES + CARDS), ids=identifier)
def test_the_commands_of_a_page_are_taken_by_their_scripts(path, workplace, monkeypatch):
    for folder in ("outputs", "mr-brain", "examples"):
        (workplace / folder).mkdir()
    (workplace / "rows.json").write_text('{"class_label": [0]}')
    shutil.copy(REPOSITORY / "examples" / "ixi_t1_split.json", workplace / "examples")
    for code, _, _ in blocks(path, "bash"):
        for call in calls(code, workplace):
            try:
                check_call(call, monkeypatch)
            except SystemExit as error:
                raise AssertionError(f"refused: {shlex.join(call)}") from error


def test_a_wrong_flag_in_a_block_is_found(workplace, monkeypatch):
    (call,) = calls("python examples/make_split.py --data_dir DATA --split_fil x --test 1 --validation 1", workplace)
    with pytest.raises(SystemExit):
        check_call(call, monkeypatch)
    (call,) = calls("python examples/generate.py --num_modes 0", workplace)  # unknown, and nothing is missing
    with pytest.raises(SystemExit, match="unknown arguments: --num_modes 0"):
        check_call(call, monkeypatch)
    with pytest.raises(AssertionError, match="no_such.py does not exist"):
        check_call(["python", "examples/no_such.py"], monkeypatch)


@pytest.mark.slow
def test_the_quick_commands_of_the_guides_run(workplace, monkeypatch, capsys):
    """Those that need no training: draw a split, generate."""
    (workplace / "split.json").unlink()
    text = (REPOSITORY / "docs" / "own_scans.md").read_text()
    (split,) = re.findall(r"^python examples/make_split.py (.*)$", text, re.MULTILINE)
    flags = re.sub(r"--test .*", "--test 1 0 0 --validation 0 1 0", split)
    run_example(monkeypatch, "make_split.py", *shlex.split(flags))
    assert json.loads((workplace / "split.json").read_text())["folds"]
    text = (REPOSITORY / "docs" / "quickstart.md").read_text()
    generate = re.findall(r"^python examples/generate.py (.*)$", text, re.MULTILINE)[0]
    run_example(monkeypatch, "generate.py", *shlex.split(generate), "--num_inference_steps", "2")
    made = sorted(path.name for path in (workplace / "outputs" / "samples").rglob("*") if path.is_file())
    assert sum(name.endswith(".nii.gz") for name in made) == 4 and any(name.endswith(".png") for name in made), made


# --- the README's promises ---


def test_the_two_commands_of_the_readme_stay_one_liners():
    first, second = (
        code.strip() for code, _, _ in blocks(REPOSITORY / "README.md", "bash") if code.startswith("pip install")
    )
    assert first == "pip install -e . -c constraints.txt && accelerate launch examples/ppo_finetune.py"
    assert second == 'pip install -e ".[test]" -c constraints.txt && pytest'


def test_the_readme_and_the_cards_stay_short():
    assert (REPOSITORY / "README.md").stat().st_size <= 7000
    for card in CARDS:
        assert card.stat().st_size <= 6000, card.name


@pytest.mark.parametrize("path", [*PAGES, *CARDS, REPOSITORY / "CONTRIBUTING.md"], ids=identifier)
def test_links_to_files_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_citations_of_pitfalls_in_code_and_tests_have_an_anchor():
    anchors = set(re.findall(r"\{#(\w+)\}", (REPOSITORY / "docs" / "pitfalls.md").read_text()))
    assert {str(n) for n in range(1, 27)} | {f"p{n}" for n in range(1, 22)} | {f"m{n}" for n in range(1, 6)} <= anchors
    for path in [*(REPOSITORY / "src").rglob("*.py"), *(REPOSITORY / "tests").rglob("*.py")]:
        for cited in re.findall(r"docs/pitfalls\.md, ([PM]?\d+)", path.read_text()):
            assert cited.lower() in anchors, f"{path}: {cited}"
