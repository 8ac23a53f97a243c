"""Data sets in the layouts in which they are distributed, with small made-up anatomy in them."""

import csv
import datetime
import struct
from pathlib import Path

import nibabel
import numpy as np

from conftest import synthetic_brain

SHAPE = (20, 24, 20)
BIRTH, SCANNED = "19570312", "20051102"


def anatomy(seed: int) -> np.ndarray:
    """int16 (20, 24, 20), RAS: a ball with texture and one bright spot to the right, in front and above the middle."""
    return (1000 * synthetic_brain(SHAPE, seed)).round().astype(np.int16)


def save(path: Path, array: np.ndarray, axes: str = "RAS", step: float = 8.0, **fields: bytes) -> None:
    """A NIfTI file of RAS ``array``, stored in other axes; ``fields`` go into its header."""
    affine = np.diag([step, step, step, 1.0])
    affine[:3, 3] = -step * (np.array(array.shape[:3]) - 1) / 2
    image = nibabel.Nifti1Image(array, affine)
    to = nibabel.orientations.axcodes2ornt(tuple(axes))
    image = image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), to))
    for name, value in fields.items():
        image.header[name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)


def write_csv(path: Path, rows: list[list[object]], delimiter: str = ",") -> None:
    """A table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def spot_is_right_front_top(array: np.ndarray, affine: np.ndarray) -> bool:
    """Whether the brightest voxels lie at positive x, y and z of the middle of the volume."""
    bright = np.argwhere(array >= 0.99 * array.max()).mean(0)
    middle = (np.array(array.shape) - 1) / 2
    return bool((affine[:3, :3] @ (bright - middle) > 0).all())


def brats(folder: Path, people: int = 5) -> Path:
    """``HGG|LGG/BraTS19_*/BraTS19_*_{flair,t1,t1ce,t2,seg}.nii.gz`` and ``name_mapping.csv``."""
    rows = [
        ["Grade", "BraTS_2017_subject_ID", "BraTS_2018_subject_ID", "TCGA_TCIA_subject_ID", "BraTS_2019_subject_ID"]
    ]
    for number in range(2 * people):
        grade, name = ("HGG", "LGG")[number % 2], f"BraTS19_CBICA_A{number:02d}_1"
        rows.append([grade, "NA", f"Brats18_CBICA_A{number:02d}_1", "NA", name])
        for channel, modality in enumerate(("flair", "t1", "t1ce", "t2", "seg")):
            array = anatomy(number) if modality != "seg" else (anatomy(number) > 900).astype(np.int16)
            save(folder / grade / name / f"{name}_{modality}.nii.gz", array // (1 + channel), axes="LPS")
    write_csv(folder / "name_mapping.csv", rows)
    return folder


def analyze(path: Path, array: np.ndarray, step: float, orient: int) -> None:
    """Analyze 7.5, big-endian int16 with a fourth axis of length 1, as OASIS-1's images are."""
    header = bytearray(348)
    struct.pack_into(">i", header, 0, 348)
    struct.pack_into(">i", header, 32, 16384)  # extents
    header[38:39] = b"r"
    struct.pack_into(">8h", header, 40, 4, *array.shape, 1, 0, 0, 0)
    struct.pack_into(">hh", header, 70, 4, 16)  # int16
    struct.pack_into(">8f", header, 76, 0, step, step, step, 0, 0, 0, 0)
    header[148:160] = b"secret descr"
    header[252] = orient
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".hdr").write_bytes(bytes(header))
    path.with_suffix(".img").write_bytes(array.astype(">i2").tobytes(order="F"))


def oasis1(folder: Path, people: int = 10) -> Path:
    """``disc*/OAS1_*_MR1/PROCESSED/MPRAGE/T88_111/*_masked_gfc.{hdr,img}`` and ``oasis_cross-sectional.csv``."""
    rows: list[list[object]] = [
        ["ID", "M/F", "Hand", "Age", "Educ", "SES", "MMSE", "CDR", "eTIV", "nWBV", "ASF", "Delay"]
    ]
    for number in range(1, people + 1):
        session = f"OAS1_{number:04d}_MR1"
        rating = ("0", "0.5", "0", "1")[number % 4]
        rows.append([session, "F", "R", 60 + number, 2, 3, 29, rating, 1344, 0.743, 1.306, "N/A"])
        base = folder / f"disc{1 + number % 2}" / session / "PROCESSED" / "MPRAGE" / "T88_111"
        stored = anatomy(number)[::-1]  # transverse: left, anterior, superior
        analyze(base / f"{session}_mpr_n4_anon_111_t88_masked_gfc", stored, 8.0, orient=0)
        analyze(base / f"{session}_mpr_n4_anon_111_t88_gfc", stored, 8.0, orient=0)
    young = "OAS1_0099_MR1"
    rows.append([young, "M", "R", 22, "", "", "", "", 1500, 0.8, 1.2, "N/A"])
    base = folder / "disc1" / young / "PROCESSED" / "MPRAGE" / "T88_111"
    analyze(base / f"{young}_mpr_n4_anon_111_t88_masked_gfc", anatomy(99)[::-1], 8.0, orient=0)
    (folder / "disc2" / "OAS1_0100_MR1" / "RAW").mkdir(parents=True)
    write_csv(folder / "oasis_cross-sectional.csv", rows)
    return folder


def ixi(folder: Path, people: int = 9) -> Path:
    """``IXI*-T1.nii.gz`` and ``IXI.xls``, a workbook of Excel 97 with dates in it."""
    import xlwt

    book = xlwt.Workbook()
    sheet = book.add_sheet("Table")
    day = xlwt.easyxf(num_format_str="YYYY-MM-DD")
    born, scanned = datetime.date(1957, 3, 12), datetime.date(2005, 11, 2)
    rows: list[list[object]] = [
        ["IXI_ID", "SEX_ID (1=m, 2=f)", "HEIGHT", "WEIGHT", "DOB", "DATE_AVAILABLE", "STUDY_DATE", "AGE"]
    ]
    for number in range(1, people + 1):
        age = (25.5, 47.25, 71.0)[number % 3]
        rows.append([number, 1 + number % 2, 170, 70, born, 1, scanned, age])
        save(folder / f"IXI{number:03d}-HH-{1200 + number}-T1.nii.gz", anatomy(number), axes="PSR")
    rows.append([50, 1, 170, 70, born, 1, scanned, None])
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if value is not None:
                sheet.write(i, j, value, *([day] if isinstance(value, datetime.date) else []))
    save(folder / "IXI050-Guys-0900-T1.nii.gz", anatomy(50), axes="PSR")
    save(folder / "IXI001-HH-1201-T2.nii.gz", anatomy(1), axes="PSR")
    book.save(str(folder / "IXI.xls"))
    return folder


def bids(folder: Path, people: int = 6) -> Path:
    """BIDS with sessions, runs, a sessions table, derivatives and dates in session labels."""
    rows = [["participant_id", "age", "sex", "group", "date_of_birth"]]
    for number in range(1, people + 1):
        subject = f"sub-{number:02d}"
        rows.append([subject, 30 + number, "F", ("patient", "control")[number % 2], "1957-03-12"])
        if number == 1:
            for session in ("20050312", "20061104"):
                base = folder / subject / f"ses-{session}" / "anat"
                save(base / f"{subject}_ses-{session}_T1w.nii.gz", anatomy(100 + int(session[-2:])), axes="LAS")
            write_csv(
                folder / subject / f"{subject}_sessions.tsv",
                [["session_id", "age", "acq_time"], ["ses-20061104", "32.5", "2006-11-04T09:30:00"]],
                "\t",
            )
        elif number == 2:
            for run in ("1", "2", "10"):
                save(folder / subject / "anat" / f"{subject}_run-{run}_T1w.nii.gz", anatomy(200 + int(run)))
        else:
            save(folder / subject / "anat" / f"{subject}_T1w.nii.gz", anatomy(number))
        save(folder / subject / "anat" / f"{subject}_FLAIR.nii.gz", anatomy(number))
    save(folder / "derivatives" / "strip" / "sub-01" / "anat" / "sub-01_T1w.nii.gz", anatomy(1))
    write_csv(folder / "participants.tsv", rows, "\t")
    (folder / "dataset_description.json").write_text('{"Name": "made up", "BIDSVersion": "1.10.0"}')
    return folder


def niftifolder(folder: Path, people: int = 10, first: int = 0) -> Path:
    """``images/*.nii.gz`` and ``metadata.csv`` with file_name, participant_id and group."""
    rows = [["file_name", "participant_id", "group"]]
    for number in range(first, first + people):
        save(folder / "images" / f"scan{number}.nii.gz", anatomy(number))
        rows.append([f"images/scan{number}.nii.gz", f"p{number:02d}", ("a", "b")[number % 2]])
    write_csv(folder / "metadata.csv", rows)
    return folder


def dicom_series(
    folder: Path,
    patient: str,
    array: np.ndarray,
    number: int = 1,
    study: int = 1,
    step: float = 8.0,
    drop: tuple[int, ...] = (),
    turned: tuple[int, ...] = (),
    **tags: object,
) -> None:
    """One axial series of single slices, of RAS ``array``, with much that identifies a person in it."""
    import pydicom
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    folder.mkdir(parents=True, exist_ok=True)
    root = f"1.2.826.0.1.{sum(patient.encode())}.{study}"
    stored = array[::-1, ::-1]  # columns run to the left, rows to the back
    for k in range(array.shape[2]):
        if k in drop:
            continue
        file = pydicom.Dataset()
        file.file_meta = FileMetaDataset()
        file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
        file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = f"{root}.{number}.{k + 1}"
        file.PatientID, file.PatientName = patient, f"QUAGMIRE^JANE{patient[-1]}"
        file.PatientBirthDate, file.PatientAge, file.PatientSex = BIRTH, "048Y", "F"
        file.StudyDate, file.StudyTime = f"{SCANNED[:-1]}{study}", "093011"
        file.InstitutionName, file.AccessionNumber = "Saint Elsewhere", "ACC4711"
        file.StudyInstanceUID, file.SeriesInstanceUID = root, f"{root}.{number}"
        file.SeriesNumber, file.InstanceNumber = number, k + 1
        file.SeriesDescription, file.Modality, file.ImageType = "t1 mprage of QUAGMIRE", "MR", ["ORIGINAL", "PRIMARY"]
        file.Rows, file.Columns = array.shape[1], array.shape[0]
        file.PixelSpacing = [step, step]
        corner = -step * (np.array(array.shape) - 1) / 2
        file.ImagePositionPatient = [float(corner[0]), float(corner[1]), float(corner[2] + k * step)]
        file.ImageOrientationPatient = [0, 1, 0, 1, 0, 0] if k in turned else [1, 0, 0, 0, 1, 0]
        file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
        file.BitsAllocated = file.BitsStored = 16
        file.HighBit, file.PixelRepresentation = 15, 1
        file.PixelData = np.ascontiguousarray(stored[:, :, k].T).astype("<i2").tobytes()
        for name, value in tags.items():
            setattr(file, name, value)
        file.save_as(folder / f"IM{array.shape[2] - k:04d}", enforce_file_format=True)


def dicom(folder: Path, people: int = 10) -> Path:
    """A series per patient in folders that are called after patients and dates, and ``labels.csv``."""
    rows = [["participant_id", "finding", "born"]]
    for number in range(people):
        patient = f"MRN-77881{number}"
        dicom_series(folder / f"quagmire^jane{number}" / SCANNED, patient, anatomy(number))
        rows.append([patient, ("clear", "tumour")[number % 2], BIRTH])
    write_csv(folder / "labels.csv", rows)
    return folder
