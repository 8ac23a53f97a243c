"""What all scripts share: --help, --config, refusals of one line; and examples/generate.py."""

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import pytest
import torch
import yaml
from matplotlib.image import imread
from PIL import Image

from conftest import EXAMPLES, SPACING, VOLUME_SHAPE, run_example
from diffusers_med3d import DDPOConfig, MedDiffusion3DPipeline, SliceRewardModel
from diffusers_med3d.utils.arguments import INHERITED, ScriptParser, refused_in_one_line

SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if "ScriptParser" in path.read_text())
A_SCREEN = 60  # lines, of 120 columns


def sections(text: str) -> dict[str, dict[str, str]]:
    """Title -> flag -> its help, of what --help printed."""
    found: dict[str, dict[str, str]] = {}
    for line in text.split("\n"):
        if re.match(r"\S.*:$", line):
            found[line.rstrip(":")] = section = {}
        elif flag := re.match(r"  --(\w+) \S+(?: \.\.\.)?(.*)", line):
            name = flag.group(1)
            section[name] = flag.group(2).strip()
        elif line.startswith(" " * 39) and found:
            section[name] += " " + line.strip()
    return {title: flags for title, flags in found.items() if flags}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_field_the_scripts_own_first_and_on_one_screen(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as ended:
        run_example(monkeypatch, script, "--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    found = sections(text)
    titles = list(found)
    own = {name: text for title in titles if title != INHERITED for name, text in found[title].items()}
    assert own and [name for name, text in own.items() if not re.sub(r"\[.*?\]$", "", text).strip()] == []
    assert INHERITED not in titles[:-1]
    if INHERITED in titles:
        assert {"learning_rate", "output_dir"} <= set(own) and "adam_beta1" in found[INHERITED]
    first = [line for line in text.split("\n")].index(f"{titles[1]}:") if len(titles) > 1 else len(text.split("\n"))
    assert first <= A_SCREEN


@dataclass
class Mine:
    """Of this test."""

    words: list[str] = field(default_factory=list, metadata={"help": "Words."})
    number: float = field(default=1.0, metadata={"help": "A number."})
    limit: float | None = field(default=2.0, metadata={"help": "A limit."})
    mode: str = field(default="a", metadata={"help": "A or b.", "choices": ["a", "b"]})

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ValueError(f"number must not be negative, got {self.number}.")


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Parse words, with a config file if one is given."""

    def run(*words: str, config: dict | None = None):
        if config is not None:
            (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
            words = ("--config", str(tmp_path / "config.yaml"), *words)
        monkeypatch.setattr(sys, "argv", ["script.py", *words])
        return ScriptParser(Mine, DDPOConfig).parse()

    return run


def test_a_config_file_sets_fields_of_every_dataclass_and_the_command_line_wins(parse, tmp_path):
    config = {
        "words": ["x", "y"], "number": 3, "limit": None, "learning_rate": "5e-3", "output_dir": str(tmp_path),
        "reward_weights": [1, "0.5"], "share_initial_noise": False, "lr_scheduler_kwargs": {"num_cycles": 2},
    }  # fmt: skip
    mine, args = parse("--number", "4", config=config)
    assert (mine.words, mine.number, mine.limit) == (["x", "y"], 4.0, None)
    assert (args.learning_rate, args.reward_weights, args.share_initial_noise) == (5e-3, [1.0, 0.5], False)
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert parse(config={"words": "x", "output_dir": str(tmp_path)})[0].words == ["x"]


@pytest.mark.parametrize(
    ("words", "config", "message"),
    [
        ((), {"nmber": 3}, "unknown keys in the config file: nmber (did you mean --number?)"),
        ((), {"number": "three"}, "argument --number: invalid float value: 'three'"),
        ((), {"mode": "c"}, "invalid choice: 'c' (choose from 'a', 'b')"),
        ((), {"number": [1, 2]}, "number in the config file takes one value, got [1, 2]"),
        ((), {"number": -1}, "number must not be negative, got -1.0"),
        (("--nmber", "3"), None, "unknown arguments: --nmber 3 (did you mean --number?)"),
        (("--numb", "3"), None, "unknown arguments: --numb 3"),
        (("--number", "three"), None, "argument --number: invalid float value: 'three'"),
        (("--learning_rate",), None, "argument --learning_rate/--learning-rate: expected one argument"),
        (("--epsilon", "-1"), None, "epsilon must be positive, got -1.0"),
        (("--config",), None, "--config needs the path of a YAML file"),
        (("--config=nowhere.yaml",), None, "No such file or directory: 'nowhere.yaml'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(parse, capsys, words, config, message):
    with pytest.raises(SystemExit) as ended:
        parse(*words, config=config)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.startswith("script.py: error: ")
    assert error.count("\n") == 1


def test_a_refusal_after_parsing_is_one_line_too(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["folder/script.py"])
    with pytest.raises(SystemExit, match="^script.py: error: a b$"), refused_in_one_line():
        raise ValueError("a\nb")


# --- examples/ppo_finetune.py ---


def test_an_own_generator_needs_its_own_rewards(tiny_pipeline_folder, monkeypatch, tmp_path):
    with pytest.raises(
        SystemExit, match="are for brain-t1 and brain-t1-ppo, not for .*tiny-pipeline; name its rewards"
    ):
        run_example(
            monkeypatch, "ppo_finetune.py", "--model_name_or_path", tiny_pipeline_folder, "--output_dir", tmp_path / "o"
        )
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_a_reward_from_a_file_named_on_the_command_line_moves(tiny_pipeline_folder, monkeypatch, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def brightness(volumes, **conditions):\n    return volumes.flatten(1).mean(1)\n\n"
        "def darkness(volumes, **conditions):\n    return -volumes.flatten(1).mean(1)\n"
    )
    config = {
        "model_name_or_path": tiny_pipeline_folder, "reward_funcs": [f"{mine}:brightness", f"{mine}:darkness"],
        "max_steps": 12, "learning_rate": 3e-3, "beta": 0.0, "num_generations": 8, "per_device_train_batch_size": 8,
        "num_inference_steps": 4, "eval_num_inference_steps": 4, "eval_volumes": 2, "ema_decay": 0.0, "bf16": False,
        "epsilon": 1.0e-4, "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none",
        "picture_steps": 0,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    moved = []
    for weights in ((1, 0), (0, 1)):  # the weights decide which of two opposite rewards rises
        out = tmp_path / str(weights[0])
        run_example(
            monkeypatch, "ppo_finetune.py", "--config", tmp_path / "config.yaml", "--reward_weights", *weights,
            "--output_dir", out,
        )  # fmt: skip
        results = json.loads((out / "results.json").read_text())["rewards"]
        assert list(results) == ["brightness", "darkness"] and "reward brightness" in (out / "README.md").read_text()
        moved.append(results["brightness"]["difference"][0])
    assert moved[0] > 0 > moved[1]


# --- examples/generate.py ---


def volumes_of(folder: Path) -> dict[str, torch.Tensor]:
    return {path.name: torch.from_numpy(nibabel.load(path).get_fdata()) for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_generate_writes_volumes_and_one_picture(tiny_pipeline, tiny_pipeline_folder, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--model_name_or_path", tiny_pipeline_folder, "--num_inference_steps", 2, "--output_dir", out]
    run_example(monkeypatch, "generate.py", *flags, "--num_samples", 3, "--seed", 5, "--batch_size", 2)
    found = volumes_of(out / "tiny-pipeline")
    assert list(found) == [f"{name}-000{i}.nii.gz" for name in ("middle", "old", "young") for i in range(3)]
    image = nibabel.load(out / "tiny-pipeline" / "old-0001.nii.gz")
    assert image.shape == VOLUME_SHAPE and image.header.get_zooms() == pytest.approx(SPACING)
    expected = tiny_pipeline(
        class_labels=["old"], num_inference_steps=2, generator=[torch.Generator().manual_seed(6)]
    ).volumes[0, 0]
    torch.testing.assert_close(found["old-0001.nii.gz"].float(), expected, atol=1e-3, rtol=0)
    assert imread(out / "samples.png").ndim == 3 and "9 volume(s)" in capsys.readouterr().out

    with pytest.raises(SystemExit, match="holds volumes already; use --overwrite"):
        run_example(monkeypatch, "generate.py", *flags)
    with pytest.raises(SystemExit, match="unknown class 'old-ish'"):
        run_example(monkeypatch, "generate.py", *flags, "--overwrite", "--class_labels", "old-ish")
    run_example(
        monkeypatch,
        "generate.py",
        *flags,
        "--overwrite",
        "--class_labels",
        2,
        "middle",
        "--num_samples",
        1,
        "--seed",
        6,
    )
    torch.testing.assert_close(
        volumes_of(out / "tiny-pipeline")["old-0000.nii.gz"].float(), expected, atol=1e-3, rtol=0
    )
    half = ["--overwrite", "--class_labels", 2, "--num_samples", 1, "--seed", 6, "--dtype", "bfloat16"]
    run_example(monkeypatch, "generate.py", *flags, *half)
    rounded = volumes_of(out / "tiny-pipeline")["old-0000.nii.gz"].float()
    assert 0 < (rounded - expected).abs().max() < 0.1

    SliceRewardModel(channels=(8, 8), norm_num_groups=4).save_pretrained(tmp_path / "reward")
    best = ["--overwrite", "--class_labels", "old", "--num_samples", 2, "--seed", 5, "--best_of", 3]
    with pytest.raises(SystemExit):
        run_example(monkeypatch, "generate.py", *flags, *best)
    assert "--best_of 2 or more and --reward_funcs belong together, got 3 and []" in capsys.readouterr().err
    run_example(monkeypatch, "generate.py", *flags, *best, "--reward_funcs", tmp_path / "reward")
    kept, every = re.search(r"mean reward of the kept (\S+), of all (\S+)", capsys.readouterr().out).groups()
    assert float(kept) > float(every)


def renamed(pipeline: MedDiffusion3DPipeline, folder: Path, names: list[str]) -> Path:
    """The pipeline, saved with other names of its classes."""
    pipeline.register_to_config(class_names=names)
    pipeline.save_pretrained(folder)
    return folder


def test_a_class_is_found_by_its_name_in_every_model(tiny_pipeline, tiny_pipeline_folder, monkeypatch, tmp_path):
    other = renamed(tiny_pipeline, tmp_path / "other", ["old", "young", "middle"])
    flags = ["--model_name_or_path", tiny_pipeline_folder, other, "--num_inference_steps", 1, "--num_samples", 1]
    for out, more in (("all", []), ("some", ["--class_labels", 2, "middle"])):
        run_example(monkeypatch, "generate.py", *flags, *more, "--output_dir", tmp_path / out)
    assert list(volumes_of(tmp_path / "some" / "other")) == ["middle-0000.nii.gz", "old-0000.nii.gz"]
    expected = tiny_pipeline(class_labels=[0], num_inference_steps=1, generator=[torch.Generator().manual_seed(0)])
    for out in ("all", "some"):
        found = volumes_of(tmp_path / out / "other")["old-0000.nii.gz"].float()
        torch.testing.assert_close(found, expected.volumes[0, 0], atol=1e-3, rtol=0)


def test_a_model_that_lacks_a_class_is_refused_with_both_lists(
    tiny_pipeline, tiny_pipeline_folder, monkeypatch, tmp_path
):
    other = renamed(tiny_pipeline, tmp_path / "other", ["young", "middle", "elderly"])
    message = r"other lacks the class 'old' of tiny-pipeline: .*'elderly'\], those of tiny-pipeline are .*'old'\]"
    with pytest.raises(SystemExit, match=message):
        run_example(
            monkeypatch, "generate.py", "--model_name_or_path", tiny_pipeline_folder, other, "--output_dir",
            tmp_path / "out",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [
        (["a b", "a/b", "c"], [], "classes 'a b' and 'a/b' would both be written to a-b-0000.nii.gz"),
        (["a", "A", "c"], [], "classes 'a' and 'A' would both be written to A-0000"),
        (["young", "middle", "old"], ["old", "old"], r"every class once, got \['old', 'old'\]"),
        (["young", "middle", "old"], ["old", 2], r"every class once, got \['old', '2'\]"),
        (["young", "middle", "old"], ["None", 3], r"every class once, got \['None', '3'\]"),
        (["young", "middle", "old"], [4], "class label 4 is no whole number from 0 to 3"),
    ],
)
def test_classes_that_would_be_written_to_one_file_are_refused(
    tiny_pipeline, monkeypatch, tmp_path, names, labels, message
):
    folder = renamed(tiny_pipeline, tmp_path / "model", names)
    more = ["--class_labels", *labels] if labels else []
    with pytest.raises(SystemExit, match=message):
        run_example(
            monkeypatch, "generate.py", "--model_name_or_path", folder, "--overwrite", "true", *more, "--output_dir",
            tmp_path / "out",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_the_null_class_and_a_class_whose_name_is_a_number_can_be_asked_for(tiny_pipeline, monkeypatch, tmp_path):
    folder = renamed(tiny_pipeline, tmp_path / "model", ["1", "2", "3"])
    run_example(
        monkeypatch, "generate.py", "--model_name_or_path", folder, "--class_labels", "None", "2", "--num_samples", 1,
        "--num_inference_steps", 1, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    found = volumes_of(tmp_path / "out" / "model")
    assert list(found) == ["2-0000.nii.gz", "sample-0000.nii.gz"]
    expected = tiny_pipeline(
        class_labels=[1, None], num_inference_steps=1, generator=[torch.Generator().manual_seed(0) for _ in range(2)]
    )
    for volume, made in zip(found.values(), expected.volumes, strict=True):
        torch.testing.assert_close(volume.float(), made[0], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--guidance_scale", "nan"], "guidance_scale must be a number >= 0 (1 is off), got nan"),
        (["--eta", "3"], "eta must be a number in [0, 1], got 3.0"),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--num_inference_steps", "100000"], "num_inference_steps must be a whole number from 1 to 1000, got 100000"),
        (["--output_dir", ""], "output_dir must name a folder, got ''"),
        (["--output_dir", "FILE"], "is a file"),
        (["--output_dir", "FILE/below"], "is a file"),
    ],
)
def test_what_cannot_be_sampled_or_written_is_refused_before(
    tiny_pipeline_folder, monkeypatch, tmp_path, capsys, flags, message
):
    (tmp_path / "FILE").write_text("kept")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        run_example(monkeypatch, "generate.py", "--model_name_or_path", tiny_pipeline_folder, *flags)
    error = capsys.readouterr().err if ended.value.code == 2 else str(ended.value)
    assert message in error and error.strip().count("\n") == 0 and ended.value.code
    assert sorted(tmp_path.rglob("*")) == before


def test_samples_of_nan_end_the_script_and_are_not_written(tiny_pipeline_folder, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"young, tiny-pipeline: 2 of 2 volumes hold NaN or infinity"):
        run_example(
            monkeypatch, "generate.py", "--model_name_or_path", tiny_pipeline_folder, "--guidance_scale", "1e30",
            "--num_inference_steps", 3, "--num_samples", 2, "--output_dir", tmp_path / "out",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_picture_has_a_row_for_every_model_and_the_scans_of_a_class(
    tiny_pipeline, tiny_pipeline_folder, brains_folder, monkeypatch, tmp_path
):
    tiny_pipeline.save_pretrained(tmp_path / "other")
    split = {"train": ["sub-01", "sub-04", "sub-06"], "validation": [], "test": [], "folds": {"a": ["sub-01"]}}
    split["folds"]["b"] = ["sub-04", "sub-06"]
    (tmp_path / "split.json").write_text(json.dumps(split))
    flags = ["--num_inference_steps", 1, "--num_samples", 1, "--volume_shape", *VOLUME_SHAPE, "--spacing", *SPACING]
    heights = []
    for number, more in enumerate(([], [tmp_path / "other"], ["--data_dir", brains_folder])):
        more = [*more, "--split_file", tmp_path / "split.json"] if number == 2 else more
        out = tmp_path / f"out-{number}"
        run_example(
            monkeypatch, "generate.py", "--model_name_or_path", tiny_pipeline_folder, *more, *flags, "--output_dir", out
        )
        heights.append(imread(out / "samples.png").shape[0])
    assert heights[1] / heights[0] == pytest.approx(2, rel=0.1) and heights[2] == heights[1]


def test_the_pictures_of_a_run_become_a_film_and_what_is_missing_is_named(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit, match="holds no pictures"):
        run_example(monkeypatch, "make_film.py", "--run_dir", tmp_path)
    (tmp_path / "film").mkdir()
    for step in (0, 10, 2):
        Image.new("L", (8, 8), 20 * step).save(tmp_path / "film" / f"samples-{step:06d}.png")
    run_example(monkeypatch, "make_film.py", "--run_dir", tmp_path)
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 3
        film.seek(2)
        assert film.convert("L").getpixel((4, 4)) == 200  # step 10 is the last
    assert "3 pictures" in capsys.readouterr().out
    Image.new("L", (8, 8)).save(tmp_path / "film" / "other-000000.png")
    with pytest.raises(SystemExit, match=r"--name must be one of \['other', 'samples'\], got None"):
        run_example(monkeypatch, "make_film.py", "--run_dir", tmp_path)
