"""diffusers_med3d.evaluation and examples/evaluate.py on the tiny pipeline and the folder of small brains."""

import html
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from conftest import EXAMPLES, SPLIT, run_example
from diffusers_med3d.data import DataArguments, VolumeDataset
from diffusers_med3d.evaluation import VolumeSet
from diffusers_med3d.evaluation import sampling as evaluation
from diffusers_med3d.evaluation.page import shareable_command, training_curves, without_folders

EXAMPLE = EXAMPLES / "evaluate.py"


@pytest.fixture
def data(brains_folder, tmp_path) -> DataArguments:
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    return DataArguments(brains_folder, str(tmp_path / "split.json"), [16] * 3, [12.0] * 3)


# --- one loader for scans and samples ---


def test_samples_take_the_class_mix_of_the_reference():
    assert evaluation.matched_labels([0, 0, 1, 2, 2, 2], 12) == [0] * 4 + [1] * 2 + [2] * 6
    assert evaluation.matched_labels([2, 0, 0, 2, 2], 4) == [0, 0, 2, 2]
    with pytest.raises(ValueError, match="2 samples leave none"):
        evaluation.matched_labels([0, 1, 2], 2)


def test_padded_volumes_lie_in_the_middle_of_background():
    own = VolumeSet(torch.rand(2, 1, 3, 4, 5), [0, 1], ["a", "b"])
    larger = own.padded((6, 4, 7))
    assert larger.volumes.shape == (2, 1, 6, 4, 7) and larger.subjects == own.subjects
    assert torch.equal(larger.volumes[:, :, 1:4, :, 1:6], own.volumes)
    assert larger.volumes.count_nonzero() == own.volumes.count_nonzero()


def test_a_prepared_scan_taken_for_a_sample_becomes_what_the_scan_itself_becomes(data, tiny_pipeline, tmp_path):
    dataset = VolumeDataset.from_arguments(data, "validation")
    scans, names = evaluation.volume_set(dataset), [f"copy-{i}" for i in range(len(dataset))]
    again = evaluation.reload_volumes(
        dataset.stack(), scans.labels, names, tmp_path / "again", data, tiny_pipeline.affine()
    )
    assert again.subjects == names and again.labels == scans.labels == [0, 1, 2]
    assert torch.allclose(again.volumes, scans.volumes, atol=1e-5)
    assert ((scans.volumes > 0) & (scans.volumes < 0.02)).sum() == 0


def test_what_is_generated_off_centre_dark_and_hazy_is_cropped_scaled_and_cleared_like_a_scan(
    data, tiny_pipeline, tmp_path
):
    brain = evaluation.volume_set(VolumeDataset.from_arguments(data, "validation")).volumes[:1]
    brain = brain * torch.nn.functional.pad(torch.ones(1, 1, 10, 12, 12), (2, 2, 2, 2, 3, 3))
    made = 0.6 * brain.roll(2, 2) + 0.01
    kept = evaluation.reload_volumes(made, [1], ["a"], tmp_path / "a", data, tiny_pipeline.affine())
    assert kept.volumes.min() == 0 and kept.volumes.max() == 1
    occupied = (kept.volumes[0, 0] > 0).any(-1).any(-1).nonzero().flatten()
    assert int(occupied[0]) + int(occupied[-1]) in (14, 15, 16)  # 3 + 12 and its neighbours: in the middle again
    for voxel, message in ((0.0, "is empty: every voxel is 0"), (float("nan"), "holds 4096 NaN")):
        with pytest.raises(ValueError, match=f"scan of broken .*{message}"):
            broken = torch.full_like(made, voxel)
            evaluation.reload_volumes(broken, [1], ["broken"], tmp_path / "b", data, tiny_pipeline.affine())
    with pytest.raises(ValueError, match="different names"):
        evaluation.reload_volumes(made, [1], ["a", "b"], tmp_path, data, tiny_pipeline.affine())


@pytest.mark.slow
def test_sampling_goes_on_where_it_stopped_and_does_not_depend_on_the_batch(data, tiny_pipeline, tmp_path):
    def sample(folder: str, batch_size: int, labels=(0, 0, 2), **kwargs) -> VolumeSet:
        return evaluation.sample_volumes(
            tiny_pipeline, labels, tmp_path / folder, data, num_inference_steps=2, batch_size=batch_size, **kwargs
        )

    first = sample("a", 3)
    assert first.subjects == ["seed0-class0-0000", "seed0-class0-0001", "seed0-class2-0000"]
    assert first.labels == [0, 0, 2]
    files = sorted((tmp_path / "a").glob("*.nii.gz"))
    assert len(files) == 3 and np.allclose(nibabel.load(files[0]).affine, tiny_pipeline.affine())
    times = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    more = sample("a", 1, labels=(0, 0, 2, 2), seeds=(0, 1))
    assert [file.stat().st_mtime_ns for file in (files[0], files[2])] == [times[0], times[2]]
    assert len(more) == 8 and len(set(more.subjects)) == 8
    assert torch.allclose(more.volumes[:3], first.volumes, atol=1e-4)
    assert not torch.allclose(more.volumes[4:7], first.volumes, atol=1e-2)
    with pytest.raises(ValueError, match=r"other settings.*'guidance_scale': \(1.0, 2.0\)"):
        sample("a", 3, guidance_scale=2.0)
    noisy = sample("c", 3, eta=1.0)
    assert not torch.allclose(noisy.volumes, first.volumes, atol=1e-2)
    assert torch.allclose(sample("d", 1, eta=1.0).volumes, noisy.volumes, atol=1e-4)
    with pytest.raises(ValueError, match=r"seeds must differ.*\[0, 0\]"):
        sample("b", 3, seeds=(0, 0))
    with pytest.raises(ValueError, match="eta must be a number in"):
        sample("e", 3, eta=3.0)
    assert not (tmp_path / "e").exists()
    data.class_names, data.class_edges = ["young", "old"], [50.0]  # class 1 was middle
    with pytest.raises(ValueError, match=r"other settings.*'classes'"):
        sample("a", 3, labels=(0, 1))


def test_settings_of_a_run_that_made_no_volume_bind_no_later_run(tmp_path):
    for settings in ({"eta": 1.0}, {"eta": 0.5}):
        evaluation.check_settings(tmp_path, settings)
        assert json.loads((tmp_path / "settings.json").read_text()) == settings
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a-0000.nii.gz").touch()
    with pytest.raises(ValueError, match="made with other settings"):
        evaluation.check_settings(tmp_path, {"eta": 0.0})


def test_a_generator_of_another_grid_or_other_classes_is_refused(data, tiny_pipeline):
    data.spacing = [3.0] * 3
    with pytest.raises(ValueError, match=r"spacing \[12.0, 12.0, 12.0\].*read at \[3.0, 3.0, 3.0\]; pass --spacing"):
        evaluation.check_pipeline(tiny_pipeline, data)
    data.spacing, data.class_names = [12.0] * 3, ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"\['young', 'middle', 'old'\].*\['a', 'b', 'c'\]"):
        evaluation.check_pipeline(tiny_pipeline, data)


# --- the script ---


def launch(folder: Path, *flags: str, processes: int = 1) -> subprocess.CompletedProcess:
    (folder / "coarse.py").write_text(
        "import torch\n\n\ndef features(volumes):\n    return torch.nn.functional.avg_pool3d(volumes, 4).flatten(1)\n"
    )
    python_path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path}
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    command = [
        sys.executable,
        *(launcher if processes > 1 else []),
        str(EXAMPLE),
        "--volume_shape",
        "16",
        "16",
        "16",
        "--spacing",
        "12",
        "12",
        "12",
    ]
    command += ["--extractors", "coarse:features", "--num_inference_steps", "2", "--num_resamples", "20", *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.slow
def test_the_script_compares_two_models_and_writes_the_report_and_its_pictures(
    data, tiny_pipeline, tiny_pipeline_folder, tmp_path
):
    with torch.no_grad():
        for parameter in tiny_pipeline.unet.parameters():
            parameter.mul_(0.9)
    tiny_pipeline.save_pretrained(tmp_path / "other")
    out = tmp_path / "out"
    flags = ["--model_name_or_path", tiny_pipeline_folder, str(tmp_path / "other"), "--output_dir", str(out)]
    flags += ["--data_dir", data.data_dir, "--split_file", data.split_file, "--segmenter", "intensity"]
    flags += ["--num_samples", "3", "--seeds", "0", "1", "--report", str(tmp_path / "page")]
    flags += ["--pad_to", "20", "16", "16"]
    log = [{"step": step, "loss": 1.0, "rewards/mine/mean": 0.1 * step, "kl": 1e-4} for step in (1, 2, 3)]
    (tmp_path / "other" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    done = launch(tmp_path, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    for row in ("KID whole", "MS-SSIM, closest pair", "sharpness", "bright (white) in ml", "copies flagged"):
        assert row in done.stdout
    assert "other - tiny-pipeline" in done.stdout
    report = json.loads((out / "report.json").read_text())
    assert report["models"] == ["tiny-pipeline", "other"] and report["settings"]["reference"] == "validation"
    assert report["settings"]["pad_to"] == [20, 16, 16]
    assert report["counts"]["other"]["volumes"] == 6 and report["counts"]["reference"]["subjects"] == 3
    text = (out / "report.md").read_text()
    assert "clinical" in text and str(tmp_path) not in text and str(tmp_path) not in (out / "report.json").read_text()
    for kind in ("views", "distances", "spectra", "nearest"):
        assert (out / f"report-{kind}.png").stat().st_size > 1000 and f"report-{kind}.png" in text
    assert not [path for path in out.rglob("*") if path.name.startswith(".") or path.name.endswith(".tmp")]
    page = (tmp_path / "page" / "report.html").read_text()
    for text in ("Training of other", "Nearest training scans", "ratio", "diffusers-med3d", "--num_resamples 20"):
        assert text in page
    for row in report["figures"]:
        assert html.escape(row["name"]) in page
    assert page.count("data:image/png;base64,") == 7 and not re.search(r'(src|href)="(?!data:)', page)
    words = re.sub(r'src="[^"]*"', "", page)
    assert str(tmp_path) not in words and data.data_dir not in words and "/tmp" not in words
    assert "--data_dir DATA --split_file SPLIT" in words and not re.search(r"sub-\d", words)


def test_a_command_is_shown_without_the_folders_it_names(tmp_path):
    (tmp_path / "my.py").touch()
    words = [
        "run.py",
        "--data_dir",
        "scans/hospital",
        "--extractors",
        f"{tmp_path}/my.py:f",
        "--model",
        "org/name",
        "a/b",
    ]
    shown = shareable_command(words, {"scans/hospital": "DATA"})
    assert shown == "run.py --data_dir DATA --extractors my.py:f --model org/name a/b"
    assert without_folders("KID of /data/who/my.py:f, 1/2 of ~/x/y and ../z/w") == "KID of my.py:f, 1/2 of y and w"


def test_a_folder_without_a_log_has_no_curves_and_the_newest_checkpoint_is_read(tmp_path):
    assert training_curves(tmp_path) is None
    (tmp_path / "checkpoint-2").mkdir()
    log = [{"step": 1, "rewards/a/mean": 0.1, "rewards/b/mean": 0.3, "kl": 0.0}, {"step": 2, "rewards/a/mean": 0.2}]
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    figure = training_curves(tmp_path)
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["reward", "KL to the start"]
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[1, 0.1], [2, 0.2]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, message",
    [
        (("--model_name_or_path", "brain-t2"), "'brain-t2' is no bundled checkpoint"),
        (("--extractors", "coarse:features", "haar-scattering-3d"), "levels and 4 regions need 32 voxels a side"),
        (("--segmenter", "intensity", "--tissue_names", "fluid"), "Labels must lie in 0 to 1, got 0 to 3"),
        (("--num_samples", "4", "--seeds", "0", "1"), "'--num_samples 4 with 2 seeds' has the class mix"),
        (("--num_samples", "0"), "0 samples leave none for a class"),
        (("--pad_to", "20", "12", "16"), r"volumes of \(16, 16, 16\) cannot be padded to \(20, 12, 16\)"),
        (("--pad_to", "20"), r"cannot be padded to \(20,\): expected three sides"),
        (("--breakdown", "--strengths", "0.2", "--num_inference_steps", "2"), r"take a step of the 2, got \[0.2\]"),
        (("--breakdown", "--reward_funcs", "no-reward"), "'no-reward' is no reward"),
        (("--breakdown", "--reward_funcs", "coarse:features"), "gave shape .*; expected"),
        (
            ("--breakdown", "--num_samples", "3", "--reward_funcs", "coarse:mean"),
            "3 samples have no third with all 3 classes",
        ),
        (("--breakdown", "--model_name_or_path", "brain-t1", "brain-t1-ppo"), "one generator at a time, got"),
        ((), "1 of 3 subjects were in the training set of 'tiny-pipeline', the first is 'sub-05'"),
    ],
)
def test_what_could_not_be_measured_is_refused_before_anything_is_sampled(
    flags, message, data, tiny_pipeline_folder, tmp_path, monkeypatch
):
    if not flags:
        Path(tiny_pipeline_folder, "training_subjects.json").write_text('["sub-01", "sub-05"]')
    (tmp_path / "coarse.py").write_text(
        "def features(volumes, **conditions):\n    return volumes[..., 0].flatten(1)\n\n\n"
        "def mean(volumes, **conditions):\n    return volumes.flatten(1).mean(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "coarse", raising=False)
    words = ["--model_name_or_path", tiny_pipeline_folder, "--data_dir", data.data_dir, "--split_file", data.split_file]
    words += ["--volume_shape", *["16"] * 3, "--spacing", *["12"] * 3, "--extractors", "coarse:features"]
    words += ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=message):
        run_example(monkeypatch, "evaluate.py", *words, *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--seeds", "0", "0"), "seeds must differ, or the same samples would count twice; got [0, 0]"),
        (("--eta", "3"), "eta must be a number in [0, 1], got 3.0"),
        (("--batch_size", "0"), "batch_size must be at least 1, got 0"),
        (("--guidance_scale", "nan"), "guidance_scale must be a number >= 0 (1 is off), got nan"),
        (("--num_inference_steps", "100000"), "num_inference_steps must be a whole number from 1 to 1000, got 100000"),
        (("--output_dir", "SCANS"), "output_dir must lie outside the folder of scans"),
        (("--output_dir", "SCANS/below"), "output_dir must lie outside the folder of scans"),
        (("--output_dir", "split.json"), "is a file"),
    ],
)
def test_flags_that_cannot_be_used_are_refused_in_one_line_and_leave_nothing(
    flags, message, data, tiny_pipeline_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SCANS").symlink_to(data.data_dir)
    words = ["--model_name_or_path", tiny_pipeline_folder, "--data_dir", data.data_dir, "--split_file", data.split_file]
    words += ["--volume_shape", *["16"] * 3, "--spacing", *["12"] * 3]
    before = [sorted(Path(folder).rglob("*")) for folder in (tmp_path, data.data_dir)]
    with pytest.raises(SystemExit) as ended:
        run_example(monkeypatch, "evaluate.py", *words, *flags)
    error = capsys.readouterr().err if ended.value.code == 2 else str(ended.value)
    assert message in error and error.strip().count("\n") == 0 and ended.value.code
    assert [sorted(Path(folder).rglob("*")) for folder in (tmp_path, data.data_dir)] == before


@pytest.mark.slow
@pytest.mark.long
def test_the_script_breaks_the_distance_down_from_folders_without_a_split_alike_with_two_processes(
    data, tiny_pipeline_folder, brains_folder, tmp_path
):
    folders = {}
    rows = (Path(brains_folder) / "metadata.csv").read_text().splitlines()
    for part in ("train", "validation"):
        folder = folders[part] = tmp_path / part
        (folder / "images").mkdir(parents=True)
        kept = [row for row in rows[1:] if row.split(",")[1] in SPLIT[part]]
        for row in kept:
            name = row.split(",")[0]
            (folder / name).symlink_to(Path(brains_folder) / name)
        (folder / "metadata.csv").write_text("\n".join([rows[0], *kept]) + "\n")
    (tmp_path / "rewards.py").write_text(
        "def bright(volumes, class_label, **conditions):\n    assert len(class_label) == len(volumes)\n"
        "    return volumes.flatten(1).mean(1)\n\n\nbright.feature_space = 'coarse:features'\n"
    )
    flags = ["--model_name_or_path", tiny_pipeline_folder, "--breakdown", "--strengths", "0.5", "--num_samples", "9"]
    flags += ["--reference", str(folders["validation"]), "--train", str(folders["train"])]
    flags += ["--reward_funcs", f"{tmp_path}/rewards.py:bright"]
    reports = {}
    for processes in (1, 2):
        out = tmp_path / f"out-{processes}"
        done = launch(tmp_path, *flags, "--output_dir", str(out), processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("To be worked on:") == 1 and "bright is not judged" in done.stdout
        reports[processes] = json.loads((out / "breakdown.json").read_text())
        assert str(tmp_path) not in (out / "breakdown.md").read_text() + (out / "breakdown.json").read_text()
        assert (out / "breakdown.png").stat().st_size > 1000
    assert reports[1]["stages"] == [
        *("round-trips", "noised-0.5", "samples", "best third by bright", "worst third by bright")
    ]
    kids = [next(one for one in report["figures"] if one["name"] == "KID") for report in reports.values()]
    for name, own in kids[0]["sets"].items():
        assert kids[1]["sets"][name]["value"] == pytest.approx(own["value"], rel=1e-3, abs=1e-4)


def test_a_folder_of_scans_without_names_of_subjects_is_refused_and_one_without_classes_is_one_class(
    data, brains_folder, tmp_path
):
    read_folder = runpy.run_path(str(EXAMPLE))["read_folder"]
    shutil.copytree(brains_folder, tmp_path / "scans")
    table = tmp_path / "scans" / "metadata.csv"
    rows = [row.split(",") for row in table.read_text().splitlines()]

    def read(columns: list[list[str]]) -> VolumeDataset:
        table.write_text("".join(",".join(row) + "\n" for row in columns))
        return read_folder(str(tmp_path / "scans"), data)

    found = read([row[:2] for row in rows])
    assert {item["class_label"] for item in found} == {3} and len(found) == 9
    with pytest.raises(ValueError, match=r"1 scan\(s\) have no subject in the column 'participant_id'"):
        read([*rows[:-1], [rows[-1][0], "", "30"]])
    with pytest.raises(ValueError, match="has no column 'participant_id'.*see --subject_column"):
        read([row[::2] for row in rows])
    shutil.rmtree(tmp_path / "scans" / "images")
    with pytest.raises(FileNotFoundError, match="no NIfTI file"):
        read(rows)


@pytest.mark.parametrize("flags", [[], ["--data_dir", "x"], ["--reference", "x"], ["--data_dir", "x", "--train", "y"]])
def test_scans_are_named_in_one_of_two_ways(flags):
    sys.path.insert(0, str(EXAMPLE.parent))
    try:
        from evaluate import ScanArguments
    finally:
        sys.path.pop(0)
    given = dict(zip([flag.removeprefix("--") for flag in flags[::2]], flags[1::2], strict=True))
    with pytest.raises(ValueError, match="either --data_dir and --split_file, or --reference and --train"):
        ScanArguments(**given)


def test_models_are_named_by_as_much_of_their_path_as_tells_them_apart():
    assert list(evaluation.short_names(["brain-t1", "runs/a"]).values()) == ["brain-t1", "a"]
    assert list(evaluation.short_names(["/x/1/a", "/x/2/a"]).values()) == ["1/a", "2/a"]
    assert list(evaluation.short_names([".", "a"]).values()) == [Path.cwd().name, "a"]
    with pytest.raises(ValueError, match="differ in the last two parts"):
        evaluation.short_names(["/x/1/a", "/y/1/a"])
    with pytest.raises(ValueError, match="cannot be called 'floor'"):
        evaluation.short_names(["runs/a", "runs/floor"])
