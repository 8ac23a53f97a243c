"""Coverage-guided fuzzing of everything that reads a file: damaged files must be refused in one line.

    pip install atheris
    python tests/slow/fuzz.py [TARGET ...] [--seconds 180] [--seed 0]

An input counts as refused when it ends in a ValueError, TypeError or OSError of one line; any other error is a finding,
printed once for each place in the code. Prints one JSON line with the figures of each target; the exit code is 1 if
there are findings.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import atheris

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "data")]
with atheris.instrument_imports(include=["diffusers_med3d", "nibabel", "pydicom"]):
    import nibabel
    import numpy as np
    import torch

    import conftest
    import trees
    from diffusers_med3d import AutoencoderKL3D, MedDiffusion3DPipeline
    from diffusers_med3d.data.layouts import find_scans
    from diffusers_med3d.data.nifti import decode_nifti
    from diffusers_med3d.data.settings import read_settings
    from diffusers_med3d.data.split import load_split, read_split_settings
    from diffusers_med3d.data.tables import as_numbers, read_folder
    from diffusers_med3d.data.writing import write_scan
    from diffusers_med3d.trainers.checkpoints import damage, last_checkpoint, mark_whole

WEIGHTS = "diffusion_pytorch_model.safetensors"
ODD = (
    None, True, 0, -1, 3, 2**40, 10**400, 1.5, -0.0, float("nan"), float("inf"), "", "a", "3", "../x", "\0", "ä" * 300,
    [], {}, [[]], [None], ["a"], [1, 2, 3], [0, 0, 0], {"a": 1}, [float("nan")] * 3,
)  # fmt: skip
Target = tuple[list[bytes], Callable[[bytes], None]]
"""Sound contents, and a function that reads one."""


def edited(text: bytes, data: bytes) -> bytes:
    """A JSON document in which up to three values are others, as the bytes choose; or the bytes themselves."""
    choices = atheris.FuzzedDataProvider(data)
    if choices.ConsumeIntInRange(0, 3) == 0:
        return choices.ConsumeBytes(choices.remaining_bytes())
    document = {"": json.loads(text)}
    for _ in range(choices.ConsumeIntInRange(1, 3)):
        at, key = document, ""
        while isinstance(at[key], dict | list) and at[key] and choices.ConsumeBool():
            at = at[key]
            key = choices.PickValueInList(sorted(at) if isinstance(at, dict) else list(range(len(at))))
        kind = choices.ConsumeIntInRange(0, 4)
        if kind == 0 and at is not document:
            at.pop(key)
        elif kind == 1:
            at[key] = choices.ConsumeUnicode(20)
        else:
            at[key] = choices.PickValueInList(list(ODD))
    return json.dumps(document[""]).encode()


def nifti(folder: Path) -> Target:
    seeds = []
    for dtype, shape in (
        ("int16", (6, 5, 4)),
        ("float32", (6, 5, 4)),
        ("uint8", (4, 4, 4, 2)),
        ("complex64", (4, 4, 4)),
    ):
        array = (np.arange(np.prod(shape)).reshape(shape) % 97).astype(dtype)
        seeds.append(nibabel.Nifti1Image(array, np.diag([2.0, 3.0, 4.0, 1.0])).to_bytes())
    path = folder / "a.nii"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        array, affine = decode_nifti({"path": str(path), "bytes": None}, "somebody")
        assert np.isfinite(array).all() and np.isfinite(affine).all() and array.ndim in (3, 4)

    return seeds, read


def metadata(folder: Path) -> Target:
    (folder / "a.nii.gz").write_bytes(b"")
    (folder / "b.nii.gz").write_bytes(b"")
    tables = ["file_name,participant_id,age\na.nii.gz,p1,30\nb.nii.gz,p2,40.5\n"]
    tables += ['file_name\tgroup\n"a.nii.gz"\tx\n', '{"file_name": "a.nii.gz", "age": 3}\n{"file_name": "b.nii.gz"}\n']

    def read(data: bytes) -> None:
        for name in ("metadata.csv", "metadata.tsv", "metadata.jsonl"):
            (folder / name).unlink(missing_ok=True)
        (folder / ("metadata.csv", "metadata.tsv", "metadata.jsonl")[data[:1].rjust(1)[0] % 3]).write_bytes(data[1:])
        paths, columns = read_folder(folder)
        assert all(len(as_numbers(values)) == len(paths) for values in columns.values())

    return [bytes([i]) + table.encode() for i, table in enumerate(tables)], read


def settings(folder: Path) -> Target:
    sound = {
        "volume_shape": [16, 16, 16], "spacing": [1.0, 1.0, 2.0], "orientation": "RAS", "antialias": True,
        "label_column": "age", "class_names": ["x", "y"], "class_edges": [50.0], "channel_names": ["t1"],
    }  # fmt: skip

    def read(data: bytes) -> None:
        (folder / "dataset.json").write_bytes(edited(json.dumps(sound).encode(), data))
        read_settings(folder).to_dict()

    return [bytes(range(n, n + 20)) for n in range(0, 200, 20)], read


def split(folder: Path) -> Target:
    sound = {
        "train": ["a", "b"], "validation": ["c"], "test": ["d"], "folds": {"a": ["a"], "b": ["b"]},
        "settings": {"class_names": ["x"]},
    }  # fmt: skip

    def read(data: bytes) -> None:
        (folder / "split.json").write_bytes(edited(json.dumps(sound).encode(), data))
        load_split(folder / "split.json")
        read_split_settings(folder / "split.json")

    return [bytes(range(n, n + 20)) for n in range(0, 200, 20)], read


def config(folder: Path) -> Target:
    conftest.tiny_vae._fixture_function().save_pretrained(folder)
    sound = (folder / "config.json").read_bytes()

    def read(data: bytes) -> None:
        (folder / "config.json").write_bytes(edited(sound, data))
        AutoencoderKL3D.from_pretrained(folder)

    return [bytes(range(n, n + 20)) for n in range(0, 200, 20)], read


def model_index(folder: Path) -> Target:
    parts = [
        fixture._fixture_function() for fixture in (conftest.tiny_vae, conftest.tiny_unet, conftest.tiny_scheduler)
    ]
    conftest.tiny_pipeline._fixture_function(*parts).save_pretrained(folder)
    sound = (folder / "model_index.json").read_bytes()

    def read(data: bytes) -> None:
        (folder / "model_index.json").write_bytes(edited(sound, data))
        MedDiffusion3DPipeline.from_pretrained(folder)

    return [bytes(range(n, n + 20)) for n in range(0, 200, 20)], read


def safetensors(folder: Path) -> Target:
    conftest.tiny_vae._fixture_function().save_pretrained(folder)
    sound = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(sound[:8], "little")

    def read(data: bytes) -> None:  # the mutations meet the header alone, which is where the structure is
        (folder / WEIGHTS).write_bytes(data + sound[end:])
        AutoencoderKL3D.from_pretrained(folder)

    return [sound[:end]], read


def marker(folder: Path) -> Target:
    checkpoint = folder / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    mark_whole(checkpoint)
    sound = (checkpoint / "complete").read_bytes()

    def read(data: bytes) -> None:
        (checkpoint / "complete").write_bytes(edited(sound, data))
        reason = damage(checkpoint)
        assert reason is None or ("\n" not in reason and reason)
        last_checkpoint(folder)

    return [bytes(range(n, n + 20)) for n in range(0, 200, 20)], read


def dicom(folder: Path) -> Target:
    source = folder / "in"
    trees.dicom_series(source, "MRN-1", trees.anatomy(1)[4:16, 6:18, 5:15].copy())
    path = sorted(source.iterdir())[5]
    sound = path.read_bytes()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = find_scans("dicom", source)
        for scan in found.scans:
            write_scan(scan, folder / "a.nii.gz", folder / "a.npy")
        for text in (str(found.left_out), str(found.notes)):
            assert "QUAGMIRE" not in text and "MRN-" not in text

    return [sound], read


TARGETS = {
    target.__name__: target
    for target in (nifti, metadata, settings, split, marker, dicom, safetensors, config, model_index)
}


def fault(error: BaseException) -> str | None:
    """What is wrong with an error as a refusal, with its place; None for a good one."""
    message = str(error).strip()
    documented = isinstance(error, ValueError | TypeError | OSError)
    vague = isinstance(error, UnicodeError | json.JSONDecodeError)
    if documented and not vague and message and "\n" not in message:
        return None
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno} ({place.name})"


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield


def fuzz(make: Callable[[Path], Target], seconds: float, seed: int, work: Path) -> NoReturn:
    """Fuzz one target for some seconds of processor time, then end the process: atheris never returns."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    for name in ("corpus", "files"):
        (work / name).mkdir()
    with silence():
        seeds, read = make(work / "files")
    for number, content in enumerate(seeds):
        (work / "corpus" / str(number)).write_bytes(content)
    counts, findings, start = {"executions": 0, "accepted": 0, "refused": 0}, {}, time.process_time()

    def one(data: bytes) -> None:
        if time.process_time() - start > seconds:
            found = [{"what": what, "example": text} for what, text in findings.items()]
            print(json.dumps({"target": make.__name__, "seconds": seconds, **counts, "findings": found}), flush=True)
            os._exit(bool(findings))
        counts["executions"] += 1
        try:
            with silence():
                read(data)
            counts["accepted"] += 1
        except Exception as error:
            counts["refused"] += 1
            if what := fault(error):
                findings.setdefault(what, f"{str(error)[:200]!r} from {data[:200]!r}")

    flags = [f"-seed={seed + 1}", "-rss_limit_mb=6000", "-timeout=300", "-verbosity=0"]
    flags.append(f"-max_len={max(4096, *map(len, seeds))}")
    atheris.Setup([sys.argv[0], *flags, str(work / "corpus")], one)
    atheris.Fuzz()
    raise AssertionError("unreachable")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help=f"of {' '.join(TARGETS)}; all if none is given")
    parser.add_argument("--seconds", type=float, default=180.0, help="of processor time for each target")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    failed = 0
    for name in args.targets or TARGETS:
        with tempfile.TemporaryDirectory() as work:
            pid = os.fork()  # one import for all
            if pid == 0:
                fuzz(TARGETS[name], args.seconds, args.seed, Path(work))
            _, status = os.waitpid(pid, 0)
            failed += status != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
