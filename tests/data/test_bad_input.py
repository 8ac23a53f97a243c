"""Bad input of every kind is refused in one line, with an error of a documented type: docs/reliability.md."""

import gzip
import json
import struct
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import SPLIT, run_example
from diffusers_med3d import AutoencoderKL3D, MedDiffusion3DPipeline
from diffusers_med3d.data import VolumeDataset, load_split, prepare
from diffusers_med3d.data.settings import read_settings

pytestmark = pytest.mark.slow

GRID = {"volume_shape": (16, 16, 16), "spacing": (12.0, 12.0, 12.0)}
DOCUMENTED = (ValueError, TypeError, OSError)


def refused(function, *args, **kwargs) -> str:
    """The message of a refusal, after a look at its form."""
    with pytest.raises(DOCUMENTED) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message and "\n" not in message.strip() and len(message) < 600, message
    assert not isinstance(caught.value, UnicodeError | json.JSONDecodeError), "say what file it is"
    return message


def ball(side: int = 20) -> np.ndarray:
    axes = np.meshgrid(*[np.linspace(-1, 1, side)] * 3, indexing="ij")
    inside = sum(axis**2 for axis in axes) < 0.8
    return np.where(inside, 100 + 20 * np.sin(9 * axes[0]), 0).astype(np.float32)


def nifti(folder: Path, voxels: np.ndarray | None = None, affine: np.ndarray | None = None, name="a.nii.gz") -> Path:
    path = folder / name
    affine = np.diag([6.0, 6.0, 6.0, 1.0]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(ball() if voxels is None else voxels, affine), path)
    return path


def header_of(path: Path) -> bytearray:
    content = path.read_bytes()
    return bytearray(gzip.decompress(content) if path.suffix == ".gz" else content)


def rewrite(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# Files that are cut off or that lie


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kept", [0, 1, 4, 10, 100, 347, 352, 500, -200, -1])
def test_a_file_that_was_cut_off_is_refused_by_name(tmp_path, name, kept):
    path = nifti(tmp_path, name=name)
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    assert name in refused(prepare, path, **GRID)


@pytest.mark.parametrize("position", [0.3, 0.5, 0.7, 0.9])
def test_a_flipped_bit_in_an_archive_is_refused_or_changes_nothing(tmp_path, position):
    path = nifti(tmp_path)
    sound, content = prepare(path, **GRID), bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 16
    path.write_bytes(content)
    try:
        assert torch.equal(prepare(path, **GRID), sound)
    except ValueError as error:
        assert "a.nii.gz" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("kept", [348, 352, 5000, -1])
def test_voxels_that_end_early_inside_a_sound_archive_are_refused(tmp_path, kept):
    path = nifti(tmp_path)
    rewrite(path, header_of(path)[:kept])
    assert "a.nii.gz" in refused(prepare, path, **GRID)


@pytest.mark.parametrize("position", [*range(0, 348, 12), 40, 41, 42, 70, 71, 72, 76, 80, 108, 110, 123, 252, 254, 344])
def test_a_flipped_bit_in_the_header_is_refused_or_read_as_finite_voxels(tmp_path, position):
    path = nifti(tmp_path)
    content = header_of(path)
    for bit in (1, 64, 128):
        damaged = bytearray(content)
        damaged[position] ^= bit
        rewrite(path, damaged)
        try:
            volume = prepare(path, **GRID, fit="shrink")
        except DOCUMENTED as error:
            assert "\n" not in str(error)
        else:
            assert volume.shape == (1, 16, 16, 16) and torch.isfinite(volume).all()


SHAPES = {
    "one axis is longer": [3, 30, 20, 20, 1],
    "thousands of voxels a side": [3, 30000, 30000, 30000, 1],
    "a terabyte": [3, 10000, 10000, 10000, 1],
    "no voxels": [3, 0, 20, 20, 1],
    "a negative side": [3, -20, 20, 20, 1],
    "seven axes": [7, 2, 2, 2, 2, 2, 2, 2],
    "nine axes": [9, 20, 20, 20, 1],
    "no axes": [0, 20, 20, 20, 1],
}


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_header_that_lies_about_the_shape_is_refused_without_the_memory_for_it(tmp_path, name, shape):
    path = nifti(tmp_path, name=name)
    content, dim = header_of(path), SHAPES[shape] + [1] * 8
    content[40:56] = struct.pack("<8h", *dim[:8])
    rewrite(path, content)
    before = memory()
    assert "a.nii" in refused(prepare, path, **GRID)
    assert memory() - before < 500e6


def test_an_archive_that_unpacks_to_gigabytes_is_refused_by_its_header(tmp_path):
    path = nifti(tmp_path)
    content = header_of(path)
    content[40:56] = struct.pack("<8h", 3, 2000, 2000, 2000, 1, 1, 1, 1)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(bytes(content[:352]))
        for _ in range(64):  # of the 32 GB that it promises
            file.write(bytes(2**20))
    assert "2000" in refused(prepare, path, **GRID)


def memory() -> float:
    """Bytes of memory that this process uses now."""
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


# Voxels and shapes


VOXELS = {
    "all NaN": (np.full((20, 20, 20), np.nan, np.float32), "8000 NaN or infinite"),
    "one NaN": (np.where(np.arange(8000).reshape(20, 20, 20) == 7, np.nan, ball()).astype(np.float32), "1 NaN"),
    "infinite": (np.where(ball() > 0, np.inf, 0).astype(np.float32), "NaN or infinite"),
    "zeros": (np.zeros((20, 20, 20), np.float32), "every voxel is 0"),
    "constant": (np.full((20, 20, 20), 5, np.int16), "every voxel is 5"),
    "one voxel": (np.ones((1, 1, 1), np.float32), "flat picture"),
    "a picture": (np.ones((20, 20), np.float32), "3 or 4 axes"),
    "one slice": (ball()[:, :, 10:11], "flat picture"),
    "a line": (np.ones(20, np.float32), "3 or 4 axes"),
    "a series": (np.repeat(ball()[..., None], 40, 3), "series of 40 volumes"),
    "two more axes": (np.ones((8, 8, 8, 2, 2), np.float32), "3 or 4 axes"),
    "six axes": (np.ones((8, 8, 8, 1, 2, 2), np.float32), "3 or 4 axes"),
    "no voxels": (np.ones((0, 8, 8), np.float32), "shape"),
}


@pytest.mark.parametrize("kind", VOXELS)
def test_voxels_that_are_no_scan_are_refused_with_the_value_found(tmp_path, kind):
    voxels, message = VOXELS[kind]
    assert message in refused(prepare, nifti(tmp_path, voxels), **GRID)


def affine(**entries) -> np.ndarray:
    matrix = np.diag([6.0, 6.0, 6.0, 1.0])
    for name, value in entries.items():
        matrix[int(name[1]), int(name[2])] = value
    return matrix


AFFINES = {
    "zero spacing": affine(a00=0),
    "all zero": np.diag([0.0, 0, 0, 1]),
    "singular": affine(a00=6, a01=6, a10=6, a11=6),
    "NaN": affine(a03=np.nan),
    "infinite": affine(a22=np.inf),
    "huge voxels": np.diag([1e6, 1e6, 1e6, 1.0]),
    "two axes alike": affine(a11=0, a01=6),
}


@pytest.mark.parametrize("kind", AFFINES)
def test_an_affine_that_spans_no_space_is_refused_with_its_numbers(tmp_path, kind):
    path = nifti(tmp_path)
    content = header_of(path)
    content[280:328] = struct.pack("<12f", *AFFINES[kind][:3].flatten())
    message = refused(prepare, rewrite(path, content), **GRID)
    assert "affine" in message or "voxels of" in message


@pytest.mark.parametrize("sign", [(-1, 1, 1), (-1, -1, -1), (1, -1, 1)])
def test_negative_spacing_is_a_direction_and_is_read(tmp_path, sign):
    path = nifti(tmp_path, affine=np.diag([*(6.0 * s for s in sign), 1.0]))
    assert prepare(path, **GRID).shape == (1, 16, 16, 16)


def test_no_affine_at_all_is_refused(tmp_path):
    path = nifti(tmp_path)
    content = header_of(path)
    content[252:256] = bytes(4)  # both codes
    assert "no affine" in refused(prepare, rewrite(path, content), **GRID)


# Paths


@pytest.mark.parametrize("name", ["пациент 1.nii.gz", "脳.nii.gz", "a b\tc.nii.gz", "é" * 60 + ".nii.gz", "-rf.nii.gz"])
def test_any_name_is_read(tmp_path, name):
    assert prepare(nifti(tmp_path, name=name), **GRID).shape == (1, 16, 16, 16)


def loop(folder: Path) -> Path:
    path = folder / "a.nii.gz"
    path.symlink_to(path)
    return path


def broken_link(folder: Path) -> Path:
    path = folder / "a.nii.gz"
    path.symlink_to(folder / "gone.nii.gz")
    return path


def text(content: bytes):
    def write(folder: Path) -> Path:
        path = folder / "a.nii.gz"
        path.write_bytes(content)
        return path

    return write


def directory(folder: Path) -> Path:
    path = folder / "a.nii.gz"
    path.mkdir()
    return path


FILES = {
    "link to itself": loop,
    "broken link": broken_link,
    "folder": directory,
    "text": text(b"not a scan"),
    "picture": text(b"\x89PNG\r\n\x1a\n" + bytes(200)),
    "JSON": text(b'{"a": 1}'),
    "archive of text": text(gzip.compress(b"not a scan" * 100)),
    "archive in an archive": text(gzip.compress(gzip.compress(bytes(1000)))),
    "nothing": lambda folder: folder / "nowhere.nii.gz",
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_scan_is_refused_by_its_name(tmp_path, kind):
    path = FILES[kind](tmp_path)
    assert path.name in refused(prepare, path, **GRID)


def test_a_bad_scan_among_good_ones_is_named_with_its_person(tmp_path):
    nifti(tmp_path, name="a.nii.gz")
    nifti(tmp_path, np.zeros((20, 20, 20), np.float32), name="b.nii.gz")
    (tmp_path / "metadata.csv").write_text("file_name,participant_id,age\na.nii.gz,p1,30\nb.nii.gz,p2,40\n")
    assert "scan of p2 (b.nii.gz) is empty" in refused(VolumeDataset, tmp_path, **GRID)


# Arguments


@pytest.mark.parametrize(
    "grid",
    [
        {"volume_shape": (16, 16), "spacing": (1, 1, 1)},
        {"volume_shape": (16, 16, 0), "spacing": (1, 1, 1)},
        {"volume_shape": (16, 16, -16), "spacing": (1, 1, 1)},
        {"volume_shape": (16, 16, 16), "spacing": (1, 1)},
        {"volume_shape": (16, 16, 16), "spacing": (0, 1, 1)},
        {"volume_shape": (16, 16, 16), "spacing": (-1, 1, 1)},
        {"volume_shape": (16, 16, 16), "spacing": (float("nan"), 1, 1)},
        {"volume_shape": (16, 16, 16), "spacing": (float("inf"), 1, 1)},
        {"volume_shape": (16, 16, 16)},
        {"spacing": (1, 1, 1)},
        {**GRID, "fit": "stretch"},
        {**GRID, "num_channels": 2},
        {**GRID, "num_channels": 0},
    ],
)
def test_a_grid_that_cannot_be_meant_is_refused(tmp_path, grid):
    refused(prepare, nifti(tmp_path), **grid)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_samples": 0},
        {"num_samples": -1},
        {"num_samples": True},
        {"num_samples": "2"},
        {"num_samples": 1.5},
        {"class_labels": "elderly"},
        {"class_labels": 99},
        {"class_labels": -1},
        {"class_labels": 1.5},
        {"class_labels": [0, "x"]},
        {"class_labels": [[0]]},
        {"class_labels": torch.tensor([0.5])},
        {"class_labels": []},
        {"class_labels": {"a": 1}},
        {"num_inference_steps": 0},
        {"num_inference_steps": 2000},
        {"num_inference_steps": 2.5},
        {"num_inference_steps": "2"},
        {"guidance_scale": -1.0},
        {"guidance_scale": float("nan")},
        {"guidance_scale": "high"},
        {"eta": 2.0},
        {"eta": "much"},
        {"generator": 0},
        {"generator": [torch.Generator()] * 2, "num_samples": 3},
        {"volume_shape": (16, 16)},
        {"volume_shape": (17, 16, 16)},
        {"volume_shape": (0, 16, 16)},
        {"volume_shape": "16"},
        {"spacing": (1.0, 1.0, 1.0)},
        {"conditions": {"age": 1}},
        {"output_type": "nifti"},
        {"latents": torch.zeros(1, 4, 4, 4)},
        {"volumes": torch.zeros(1, 1, 16, 16, 16), "strength": "half"},
        {"volumes": torch.zeros(16, 16, 16), "strength": 0.5},
        {"volumes": [], "strength": 0.5},
        {"volumes": "scan.nii.gz", "strength": 0.5},
    ],
)
def test_arguments_of_a_pipeline_that_cannot_be_used_are_refused(tiny_pipeline, arguments):
    refused(tiny_pipeline, **{"num_inference_steps": 2} | arguments)


# Files of settings


JSONS = {
    "no JSON": "{",
    "empty": "",
    "a list": "[1, 2]",
    "a number": "3",
    "a text": '"train"',
    "nothing": "null",
    "binary": b"\xff\xfe\x00\x01",
    "a tower of lists": "[" * 100000,
    "unknown keys": '{"no_such_key": 1}',
}
SPLITS = {
    **JSONS,
    "no folds": '{"train": ["a"], "validation": ["b"], "test": ["c"]}',
    "folds of another type": '{"train": ["a"], "validation": ["b"], "test": ["c"], "folds": ["a"]}',
    "a part that is a text": '{"train": "ab", "validation": ["d"], "test": ["e"], "folds": {"a": ["a"], "b": ["b"]}}',
    "a part that is a number": '{"train": 3, "validation": ["d"], "test": ["e"], "folds": {"a": [], "b": []}}',
    "one person twice": '{"train": ["a", "b"], "validation": ["a"], "test": [], "folds": {"a": ["a"], "b": ["b"]}}',
    "nothing but settings": '{"settings": 3}',
}


@pytest.mark.parametrize("kind", SPLITS)
def test_a_split_that_is_none_is_refused_by_its_path(tmp_path, kind):
    path, content = tmp_path / "split.json", SPLITS[kind]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "split.json" in refused(load_split, path)


SETTINGS = {
    **JSONS,
    "a shape of texts": '{"volume_shape": ["a", "b", "c"]}',
    "a shape that is a number": '{"volume_shape": 64}',
    "two sides": '{"volume_shape": [64, 64]}',
    "no spacing": '{"spacing": [0, 1, 1]}',
    "spacing that is a text": '{"spacing": "3 3 3"}',
    "classes that are a number": '{"class_names": 3}',
    "edges of texts": '{"class_edges": ["a"], "class_names": ["x", "y"]}',
    "edges that fall": '{"class_edges": [60, 35], "class_names": ["x", "y", "z"]}',
    "another orientation": '{"orientation": "LPS"}',
    "a shape of broken voxels": '{"volume_shape": [16, 16, 0.5]}',
    "spacing beyond all numbers": '{"spacing": [1, 1, 1%s]}' % ("0" * 400),
    "edges beyond all numbers": '{"class_edges": [1%s]}' % ("0" * 400),
    "an edge that is NaN": '{"class_edges": [NaN], "class_names": ["x", "y"]}',
    "a label that is a list": '{"label_column": ["age"]}',
    "antialiasing that is a text": '{"antialias": "no"}',
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_that_are_none_are_refused_by_their_path(tmp_path, kind):
    content = SETTINGS[kind]
    (tmp_path / "dataset.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "dataset.json" in refused(read_settings, tmp_path)


TABLES = {
    "rows that are no objects": ("metadata.jsonl", b'["a.nii.gz"]\n'),
    "a file name that is a number": ("metadata.jsonl", b'{"file_name": 3}\n{"file_name": "a.nii.gz"}\n'),
    "a file name that is a list": ("metadata.jsonl", b'{"file_name": ["a.nii.gz"]}\n'),
    "a row that is no JSON": ("metadata.jsonl", b'{"file_name": "a.nii.gz"}\n{"file_name":\n'),
    "half of UTF-16": ("metadata.csv", "file_name,age\na.nii.gz,3\n".encode("utf-16")[:-1]),
    "a value of a megabyte": ("metadata.csv", b'file_name,age\na.nii.gz,"' + b"3" * 2**20 + b'"\n'),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_that_is_none_is_refused_by_its_path(tmp_path, kind):
    name, content = TABLES[kind]
    nifti(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert name in refused(VolumeDataset, tmp_path, **GRID)


# Saved models


WEIGHTS = "diffusion_pytorch_model.safetensors"


def cut(share: float):
    def harm(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[: int(share * len(content))])

    return harm


def written(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def config(**changes):
    def harm(folder: Path) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value != "gone"}))

    return harm


def another_shape(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    name = sorted(state)[0]
    save_file(state | {name: torch.zeros(3, 3)}, folder / WEIGHTS)


MODELS = {
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "empty weights": written(WEIGHTS, b""),
    "cut off in the header": written(WEIGHTS, b"\x10\x00\x00\x00\x00\x00\x00\x00{"),
    "a header of exabytes": written(WEIGHTS, struct.pack("<Q", 2**62) + b"{}"),
    "text": written(WEIGHTS, b"not weights at all"),
    "half of the weights": cut(0.5),
    "all but a little": cut(0.99),
    "another shape": another_shape,
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config no JSON": written("config.json", b"{"),
    "config a list": written("config.json", b"[1]"),
    "config empty": written("config.json", b""),
    "config null": written("config.json", b"null"),
    "config binary": written("config.json", b"\xff\xfe\x00"),
    "no class": config(_class_name="gone"),
    "no class in a list": config(_class_name=[]),
    "a class that is a list": config(_class_name=[[]]),
    "another class": config(_class_name="UNet2DModel"),
    "channels a text": config(channels="wide"),
    "channels nothing": config(channels=None),
    "channels negative": config(channels=[-8, 8, 8]),
    "a class with a line break": config(_class_name="g\t\n"),
    "groups do not divide": config(norm_num_groups=3),
    "no groups": config(norm_num_groups=0.0),
    "more channels than there are numbers": config(in_channels=2**70),
    "statistics of another length": config(latents_mean=[0.0]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_model_that_is_damaged_is_refused(tiny_vae, tmp_path, kind):
    tiny_vae.save_pretrained(tmp_path)
    MODELS[kind](tmp_path)
    refused(AutoencoderKL3D.from_pretrained, tmp_path)


@pytest.mark.parametrize("position", [8, 9, 20, 50, 100, 200])
def test_a_flipped_bit_in_the_header_of_weights_is_refused_or_changes_nothing(tiny_vae, tmp_path, position):
    tiny_vae.save_pretrained(tmp_path)
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    content[position] ^= 1
    (tmp_path / WEIGHTS).write_bytes(content)
    try:
        AutoencoderKL3D.from_pretrained(tmp_path)
    except DOCUMENTED as error:
        assert "\n" not in str(error)


INDEX = {
    **{kind: value for kind, value in JSONS.items() if kind != "unknown keys"},
    "a component of another type": {"unet": 3},
    "a component that is nothing": {"vae": [None, None]},
    "an unknown class": {"unet": ["diffusers_med3d", "NoSuchUNet"]},
    "an unknown library": {"unet": ["no_such_library", "UNet"]},
    "two sides": {"volume_shape": [16, 16]},
    "spacing of texts": {"spacing": ["a", "b", "c"]},
    "too few classes": {"class_names": {"young": 0}},
}


@pytest.mark.parametrize("kind", INDEX)
def test_a_saved_pipeline_with_a_damaged_index_is_refused(tiny_pipeline_folder, kind):
    path, content = Path(tiny_pipeline_folder) / "model_index.json", INDEX[kind]
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(MedDiffusion3DPipeline.from_pretrained, tiny_pipeline_folder)


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler"])
def test_a_pipeline_without_one_of_its_parts_is_refused(tiny_pipeline_folder, part):
    for path in (Path(tiny_pipeline_folder) / part).iterdir():
        path.unlink()
    refused(MedDiffusion3DPipeline.from_pretrained, tiny_pipeline_folder)


# Scripts: one line, an exit code that is not 0, nothing half-written


SCRIPTS = {
    "no scans": ("train_autoencoder.py", "--data_dir", "nowhere", "--split_file", "split.json"),
    "no split": ("train_autoencoder.py", "--data_dir", "{brains}", "--split_file", "nowhere.json"),
    "a split of other people": ("train_autoencoder.py", "--data_dir", "{brains}", "--split_file", "{other}"),
    "a flag that is none": ("train_autoencoder.py", "--learning_rat", "1"),
    "a number that is none": ("train_autoencoder.py", "--learning_rate", "fast"),
    "an architecture that is none": ("train_autoencoder.py", "--architecture", "gan"),
    "no autoencoder": ("train_diffusion.py", "--autoencoder", "nowhere", "--data_dir", "{brains}"),
    "an autoencoder that is none": ("train_diffusion.py", "--autoencoder", "{brains}", "--data_dir", "{brains}"),
    "no generator": ("generate.py", "--model_name_or_path", "./nowhere"),
    "a class that is none": ("generate.py", "--model_name_or_path", "{pipeline}", "--class_labels", "elderly"),
    "no generator to fine-tune": ("ppo_finetune.py", "--model_name_or_path", "./nowhere"),
    "a reward that is none": ("ppo_finetune.py", "--model_name_or_path", "{pipeline}", "--reward_funcs", "nothing"),
    "two rewards, one weight": (
        *("ppo_finetune.py", "--model_name_or_path", "{pipeline}"),
        *("--reward_funcs", "brain-t1-reward-3d", "brain-t1-reward-2d", "--reward_weights", "1"),
    ),
    "no folder to prepare": ("prepare_dataset.py", "--layout", "bids", "--data_dir", "nowhere"),
    "no reward to report on": ("reward_report.py", "--reward_funcs", "nothing", "--data_dir", "{brains}"),
    "nothing to evaluate": ("evaluate.py", "--model_name_or_path", "./nowhere", "--data_dir", "{brains}"),
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_script_ends_with_one_line_and_a_code_and_writes_nothing(
    kind, tmp_path, brains_folder, tiny_pipeline_folder, monkeypatch, capsys
):
    (tmp_path / "other.json").write_text(json.dumps(SPLIT | {"test": ["somebody"]}).replace("sub-", "person-"))
    names = {"brains": brains_folder, "pipeline": tiny_pipeline_folder, "other": tmp_path / "other.json"}
    script, *flags = (word.format(**names) for word in SCRIPTS[kind])
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        run_example(monkeypatch, script, *flags)
    code = ended.value.code
    said = code if isinstance(code, str) else capsys.readouterr().err.strip().splitlines()[-1]
    assert code not in (0, None) and script in said and "\n" not in said, said
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.is_file()]
    assert left == [], left
    assert sys.exc_info() == (None, None, None)
