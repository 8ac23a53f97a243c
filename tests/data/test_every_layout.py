"""Each layout: nothing that identifies a person in any file that is written, and two training steps from it."""

import base64
import gzip
import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import nibabel
import pytest

import trees
from conftest import run_example

pytestmark = pytest.mark.slow

SECRETS = (
    *("quagmire", "jane", "mrn-", "secret", "elsewhere", "acc4711", "093011", "1.2.826.0.1"),
    *(trees.BIRTH, trees.SCANNED, "1957-03-12", "2005-11", "2006-11", "20050312", "20061104"),
    *("/root", "/home", "/mnt/"),
)
"""What `trees` and `plant` write about people, in small letters."""
TEXT_FIELDS = ("descrip", "db_name", "aux_file", "intent_name")
PNG_CHUNKS = {b"IHDR", b"pHYs", b"IDAT", b"IEND"}  # tEXt, iTXt, zTXt, eXIf and tIME could tell something
LAYOUTS = {
    "brats2019": (trees.brats, ["--modalities", "t1", "t2"]),
    "oasis1": (trees.oasis1, []),
    "ixi": (lambda folder: trees.ixi(folder, people=12), []),
    "bids": (lambda folder: trees.bids(folder, people=12), ["--label_column", "group"]),
    "niftifolder": (trees.niftifolder, ["--label_column", "group"]),
    "dicom": (trees.dicom, ["--label_column", "finding"]),
    "phantom": (None, ["--num_subjects", 8]),
    "dicom, registered": (
        trees.dicom,
        ["--label_column", "finding", "--register", "group", "--rounds", 1, "--jittered_copies", 1],
    ),
}
REGISTERED = {"registration.json", ".registration/template.nii.gz"}


@dataclass
class Prepared:
    layout: str
    place: Path  # where input and output lie
    output: Path


def plant(folder: Path) -> None:
    """Write names and dates into the headers of all NIfTI files, an extension, and a file beside each."""
    for path in [path for path in folder.rglob("*.nii.gz")]:
        image = nibabel.load(path)
        image = nibabel.Nifti1Image(image.get_fdata().astype("int16"), image.affine, image.header)
        for name, text in zip(TEXT_FIELDS, (b"Quagmire 1957-03-12", b"JaneQ", b"/mnt/quagmire", b"jane"), strict=True):
            image.header[name] = text
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Jane Quagmire, MRN-7, 2005-11-02"))
        nibabel.save(image, path)
        path.with_name(path.name.replace(".nii.gz", ".json")).write_text('{"PatientName": "Quagmire"}')


@pytest.fixture(scope="module", params=LAYOUTS)
def prepared(request, tmp_path_factory) -> Prepared:
    layout, _, registered = request.param.partition(", ")
    if layout == "dicom":
        pytest.importorskip("pydicom")
    if registered:
        pytest.importorskip("SimpleITK")
    if layout == "phantom":
        pytest.importorskip("nilearn")
    make, flags = LAYOUTS[request.param]
    place = tmp_path_factory.mktemp("Quagmire_Jane")
    flags = ["--layout", layout, "--output", place / "out", "--max_voxels", 32**3, "--num_proc", 1, *flags]
    if make is not None:
        source = make(place / "quagmire_in")
        plant(source)
        flags += ["--input", source]
        if layout == "dicom":
            flags += ["--metadata", source / "labels.csv"]
    with pytest.MonkeyPatch.context() as patch:
        run_example(patch, "prepare_dataset.py", *flags)
    return Prepared(request.param, place, place / "out")


def without_pictures(page: str) -> tuple[str, list[bytes]]:
    """An HTML page without its embedded PNG files, and these."""
    found = re.findall(r"data:image/png;base64,([^\"]+)", page)
    return re.sub(r"data:image/png;base64,[^\"]+", "", page), [base64.b64decode(one) for one in found]


def chunks(png: bytes) -> set[bytes]:
    """Kinds of the chunks of a PNG file."""
    kinds, at = set(), 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kinds.add(png[at + 4 : at + 8])
        at += 12 + length
    return kinds


def test_nothing_that_identifies_a_person_or_a_machine_is_in_any_file(prepared):
    paths = [path for path in prepared.output.rglob("*") if path.is_file()]
    names = {path.relative_to(prepared.output).as_posix() for path in paths}
    written = {"metadata.csv", "dataset.json", "split.json", "report.md", "report.html", "montage.png"}
    written |= REGISTERED if "registered" in prepared.layout else set()
    assert {name for name in names if not name.startswith("images/")} == written
    secrets = [*SECRETS, str(prepared.place).lower(), prepared.place.name.lower()]
    for path in paths:
        content = path.read_bytes()
        if path.suffix == ".html":
            page, pictures = without_pictures(content.decode())
            content = page.encode()
            assert len(pictures) == 1 and chunks(pictures[0]) <= PNG_CHUNKS
        elif path.suffix == ".png":
            assert chunks(content) <= PNG_CHUNKS
        elif path.suffix == ".gz":
            assert content[3] == 0 and content[4:8] == bytes(4)  # neither a file name nor a time in the gzip header
            content = gzip.decompress(content)
            header = nibabel.load(path).header
            assert not header.extensions and all(not header[name].item() for name in TEXT_FIELDS)
        for secret in secrets:
            assert secret not in path.relative_to(prepared.output).as_posix().lower(), (path.name, secret)
            assert secret.encode() not in content.lower(), (path.name, secret)


def test_two_steps_train_an_autoencoder_that_knows_the_grid(prepared, tmp_path, monkeypatch):
    """No flag says anything about the scans."""
    data = prepared.output
    run_example(
        monkeypatch,
        "train_autoencoder.py",
        *("--data_dir", data, "--split_file", data / "split.json", "--output_dir", tmp_path / "vae"),
        *("--channels", 8, 8, "--latent_channels", 2, "--crop_size", 16, "--max_steps", 2, "--save_steps", 2),
        *("--per_device_train_batch_size", 2, "--report_to", "none", "--bf16", "false", "--adversarial_weight", 0),
    )
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    known = json.loads((data / "dataset.json").read_text())
    assert config["in_channels"] == len(known["channel_names"]) == (2 if prepared.layout == "brats2019" else 1)
    assert {name: config["data_settings"][name] for name in known} == known
    state = json.loads((tmp_path / "vae" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
