"""Every layout: the right scans of the right people with the right side on the right, and a reason for the rest."""

import re

import nibabel
import numpy as np
import pytest

import trees
from diffusers_med3d.data.layouts import Options, analyze, find_scans, load_scan


def reasons(found) -> dict[str, str]:
    return {entry.path: entry.reason for entry in found.left_out}


# --- BraTS 2019 ---


def test_brats_cases_become_scans_with_the_asked_modalities_as_channels_and_their_grade(tmp_path):
    folder = trees.brats(tmp_path, people=2)
    found = find_scans("brats2019", folder, Options(modalities=("flair", "t1ce")))
    assert [scan.columns["grade"] for scan in found.scans] == ["HGG", "HGG", "LGG", "LGG"]
    assert found.class_names == ("HGG", "LGG") and found.channel_names == ("flair", "t1ce")
    array, affine = load_scan(found.scans[0])
    assert array.shape == (*trees.SHAPE, 2) and (array[..., 1] == array[..., 0] // 3).all()
    assert trees.spot_is_right_front_top(array[..., 0], affine)


def test_brats_leaves_out_what_is_incomplete_or_contradicts_its_table(tmp_path):
    folder = trees.brats(tmp_path, people=2)
    (folder / "HGG" / "BraTS19_CBICA_A00_1" / "BraTS19_CBICA_A00_1_t1.nii.gz").unlink()
    table = (folder / "name_mapping.csv").read_text()
    (folder / "name_mapping.csv").write_text(table.replace("LGG,NA,Brats18_CBICA_A01", "HGG,NA,Brats18_CBICA_A01"))
    found = find_scans("brats2019", folder)
    assert len(found.scans) == 2
    assert reasons(found) == {
        "HGG/BraTS19_CBICA_A00_1": "no t1; there are ['flair', 'seg', 't1ce', 't2']",
        "LGG/BraTS19_CBICA_A01_1": "the folder says LGG, name_mapping.csv says HGG",
    }
    with pytest.raises(ValueError, match="has the modalities .*got --modalities .'seg'"):
        find_scans("brats2019", folder, Options(modalities=("seg",)))


def test_channels_on_different_grids_are_refused_by_name(tmp_path):
    folder = trees.brats(tmp_path, people=1)
    odd = folder / "HGG" / "BraTS19_CBICA_A00_1" / "BraTS19_CBICA_A00_1_t2.nii.gz"
    trees.save(odd, trees.anatomy(0)[:-1], axes="LPS")
    found = find_scans("brats2019", folder, Options(modalities=("t1", "t2")))
    with pytest.raises(ValueError, match="_t2.nii.gz is not on the grid of .*_t1.nii.gz"):
        load_scan(found.scans[0])


# --- OASIS-1 ---


def test_oasis_diagnoses_come_from_the_rating_and_the_unrated_are_left_out_unless_asked_for(tmp_path):
    folder = trees.oasis1(tmp_path, people=4)
    found = find_scans("oasis1", folder)
    assert [(scan.participant_id, scan.columns["diagnosis"]) for scan in found.scans] == [
        ("OAS1_0002", "CN"),
        ("OAS1_0004", "CN"),
        ("OAS1_0001", "AD"),
        ("OAS1_0003", "AD"),
    ]
    assert found.class_names == ("CN", "AD")
    assert reasons(found) == {
        "disc1/OAS1_0099_MR1": "no rating (CDR) in the table (kept with --keep_unlabelled)",
        "disc2/OAS1_0100_MR1": "no PROCESSED/MPRAGE/T88_111/*_t88_masked_gfc.hdr",
    }
    assert len(find_scans("oasis1", folder, Options(keep_unlabelled=True)).scans) == 5


def test_oasis_table_may_be_a_workbook(tmp_path):
    import openpyxl

    folder = trees.oasis1(tmp_path, people=3)
    book = openpyxl.Workbook()
    for line in (folder / "oasis_cross-sectional.csv").read_text().splitlines():
        cells = line.split(",")
        book.active.append([float(cell) if cell.replace(".", "").isdigit() else cell or None for cell in cells])
    (folder / "oasis_cross-sectional.csv").unlink()
    book.save(folder / "oasis_cross-sectional.xlsx")
    found = find_scans("oasis1", folder)
    assert {scan.columns["cdr"] for scan in found.scans} == {"0.5", "0", "1"}
    assert found.scans[0].columns["age"] == "62"


def test_oasis_images_have_right_on_the_right(tmp_path):
    found = find_scans("oasis1", trees.oasis1(tmp_path, people=3))
    array, affine = load_scan(found.scans[0])
    assert nibabel.aff2axcodes(affine) == ("L", "A", "S") and array.shape == trees.SHAPE
    assert trees.spot_is_right_front_top(array, affine)


@pytest.mark.parametrize(("orient", "axes"), list(enumerate(analyze.ORIENTATIONS)))
def test_analyze_images_are_read_in_each_storage_order_that_their_header_may_state(tmp_path, orient, axes):
    ras = nibabel.orientations.axcodes2ornt(("R", "A", "S"))
    to = nibabel.orientations.ornt_transform(ras, nibabel.orientations.axcodes2ornt(tuple(axes)))
    stored = nibabel.orientations.apply_orientation(trees.anatomy(1), to)
    trees.analyze(tmp_path / "scan", stored, 8.0, orient)
    array, affine = analyze.read(tmp_path / "scan.hdr")
    assert "".join(nibabel.aff2axcodes(affine)) == axes
    assert trees.spot_is_right_front_top(array, affine)


def test_the_sagittal_order_agrees_with_the_affine_that_clinica_gives_oasis_images(tmp_path):
    trees.analyze(tmp_path / "scan", np.ones((256, 256, 160)), 1.0, orient=2)
    _, affine = analyze.read(tmp_path / "scan.hdr")
    assert affine[:3, :3].tolist() == [[0, 0, -1], [1, 0, 0], [0, 1, 0]]
    assert np.abs(affine[:3, 3] - [80, -128, -128]).max() <= 0.5


def test_an_analyze_header_of_an_unknown_storage_order_is_refused(tmp_path):
    trees.analyze(tmp_path / "scan", trees.anatomy(1), 8.0, orient=77)
    with pytest.raises(ValueError, match="orient is 77, expected 0 to 5"):
        analyze.read(tmp_path / "scan.hdr")


# --- IXI ---


def test_ixi_ages_come_from_the_workbook_of_excel_97_and_people_without_one_are_left_out(tmp_path):
    found = find_scans("ixi", trees.ixi(tmp_path, people=3))
    assert [(scan.participant_id, scan.columns["age"], scan.columns["sex"]) for scan in found.scans] == [
        ("sub-IXI001", "47.25", "F"),
        ("sub-IXI002", "71.00", "M"),
        ("sub-IXI003", "25.50", "F"),
    ]
    assert found.label_column == "age" and found.class_edges == (35.0, 60.0)
    assert reasons(found) == {
        "IXI001-HH-1201-T2.nii.gz": "modality T2 was not asked for",
        "IXI050-Guys-0900-T1.nii.gz": "no age in the table (kept with --keep_unlabelled)",
    }
    assert trees.spot_is_right_front_top(*load_scan(found.scans[0]))
    assert (tmp_path / "IXI.xls").read_bytes().startswith(b"\xd0\xcf\x11\xe0")  # as it is distributed


def test_ixi_people_with_two_ages_have_none(tmp_path):
    trees.save(tmp_path / "IXI001-HH-1201-T1.nii.gz", trees.anatomy(1))
    trees.save(tmp_path / "IXI002-HH-1202-T1.nii.gz", trees.anatomy(2))
    rows = [["IXI_ID", "SEX_ID (1=m, 2=f)", "AGE"], [1, 1, 30.5], [1, 1, 60], [2, 2, 41]]
    trees.write_csv(tmp_path / "IXI.csv", rows)
    found = find_scans("ixi", tmp_path)
    assert [scan.participant_id for scan in found.scans] == ["sub-IXI002"]
    assert found.notes == ("1 people stand in IXI.csv with two ages; both are ignored.",)


@pytest.mark.parametrize(
    ("layout", "header", "row", "column", "value"),
    [
        (
            "ixi",
            ["IXI_ID", "SEX_ID (1=m, 2=f)", "AGE"],
            [1, 1, "35,8"],
            "AGE",
            "'35,8' is no number (a decimal comma?)",
        ),
        ("ixi", ["IXI_ID", "SEX_ID (1=m, 2=f)", "AGE"], ["one", 1, 35], "IXI_ID", "'one' is no number"),
        ("oasis1", ["ID", "M/F", "Age", "CDR"], ["OAS1_0001_MR1", "F", 61, "0,5"], "CDR", "'0,5' is no number"),
    ],
)
def test_a_value_that_is_no_number_is_refused_with_file_row_and_column(tmp_path, layout, header, row, column, value):
    folder = trees.oasis1(tmp_path, people=1) if layout == "oasis1" else tmp_path
    table = folder / ("oasis_cross-sectional.csv" if layout == "oasis1" else "IXI.csv")
    trees.save(folder / "IXI001-HH-1201-T1.nii.gz", trees.anatomy(1))
    other = ["OAS1_0002_MR1", "F", 70, "1"] if layout == "oasis1" else [7, 2, 40]
    trees.write_csv(table, [header, other, row])
    with pytest.raises(ValueError, match=re.escape(f"{table.name}, row 2, column {column}: {value}")):
        find_scans(layout, folder)


# --- BIDS ---


def test_bids_sessions_and_runs_are_scans_of_one_person_and_derivatives_are_none(tmp_path):
    found = find_scans("bids", trees.bids(tmp_path), Options(label_column="group"))
    counts: dict[str, int] = {}
    for scan in found.scans:
        counts[scan.participant_id] = counts.get(scan.participant_id, 0) + 1
    assert counts == {"sub-01": 2, "sub-02": 3, "sub-03": 1, "sub-04": 1, "sub-05": 1, "sub-06": 1}
    assert [scan.files[0].name for scan in found.scans if scan.participant_id == "sub-02"] == [
        f"sub-02_run-{run}_T1w.nii.gz" for run in (1, 2, 10)
    ]
    first, second = (scan for scan in found.scans if scan.participant_id == "sub-01")
    assert first.columns["age"] == "31" and second.columns["age"] == "32.5"  # the sessions' table wins
    assert first.columns["group"] == second.columns["group"] == "control"
    assert set(reasons(found).values()) == {"suffix FLAIR was not asked for"}


def test_bids_suffixes_become_channels_and_scans_that_lack_one_are_left_out(tmp_path):
    found = find_scans("bids", trees.bids(tmp_path), Options(modalities=("T1w", "FLAIR")))
    assert [scan.participant_id for scan in found.scans] == ["sub-03", "sub-04", "sub-05", "sub-06"]
    assert load_scan(found.scans[0])[0].shape == (*trees.SHAPE, 2)
    assert "sub-02/anat/sub-02_run-1_T1w.nii.gz" in reasons(found)


def test_bids_without_the_label_says_which_columns_there_are(tmp_path):
    with pytest.raises(ValueError, match="no scan has a value of the column 'diagnosis'.*'group'"):
        find_scans("bids", trees.bids(tmp_path), Options(label_column="diagnosis", keep_unlabelled=True))


# --- niftifolder ---


def test_niftifolder_takes_the_rows_of_the_table_and_names_the_rest(tmp_path):
    for name in ("a", "b", "c"):
        trees.save(tmp_path / "images" / f"{name}.nii.gz", trees.anatomy(ord(name)))
    rows = [
        ["file_name", "participant_id", "group", "remark"],
        ["images/a.nii.gz", "001", "x", "born 1957"],
        ["images\\b.nii.gz", "1", "", ""],
        ["images/d.nii.gz", "2", "y", ""],
    ]
    trees.write_csv(tmp_path / "metadata.csv", rows, ";")
    found = find_scans("niftifolder", tmp_path, Options(label_column="group"))
    assert [(scan.participant_id, scan.columns) for scan in found.scans] == [("001", {"group": "x"})]
    assert reasons(found) == {
        "images/b.nii.gz": "no group (kept with --keep_unlabelled)",
        "d.nii.gz": "row 4: no such file",
        "images/c.nii.gz": "not in metadata.csv",
    }


# --- DICOM ---


def test_dicom_series_become_volumes_with_right_on_the_right(tmp_path):
    trees.dicom_series(tmp_path / "x", "MRN-2", trees.anatomy(1))
    trees.dicom_series(tmp_path / "y", "MRN-1", trees.anatomy(2))
    (tmp_path / "DICOMDIR").write_bytes(b"nothing")
    found = find_scans("dicom", tmp_path)
    assert [scan.participant_id for scan in found.scans] == ["sub-0001", "sub-0002"]
    assert found.scans[0].columns == {"age": "48", "sex": "F"} and found.notes == ("1 files are no DICOM images",)
    array, affine = load_scan(found.scans[1])
    assert nibabel.aff2axcodes(affine) == ("L", "P", "S")
    assert trees.spot_is_right_front_top(array, affine)
    assert (nibabel.as_closest_canonical(nibabel.Nifti1Image(array, affine)).get_fdata() == trees.anatomy(1)).all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"drop": (9,)}, "a gap: slices 9 and 10 are 16.00 mm apart, the others 8.00 mm"),
        ({"turned": (3, 4)}, "mixed orientations: 2 in one series"),
        ({"drop": tuple(range(5, 20))}, "5 slices, at least 8 are wanted"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "a localizer"),
        ({"NumberOfFrames": 3}, "a multi-frame (enhanced) file, which is not read; convert it with dcm2niix"),
        ({"ImagePositionPatient": [0, 0, 0]}, "19 slices lie where another one does"),
        ({"PatientID": "", "PatientName": ""}, "no patient id, so people cannot be told apart"),
    ],
)
def test_dicom_series_that_make_no_regular_volume_are_left_out_with_the_reason(tmp_path, options, reason):
    trees.dicom_series(tmp_path, "MRN-1", trees.anatomy(1), **options)
    found = find_scans("dicom", tmp_path)
    assert not found.scans and len(found.left_out) == 1
    assert found.left_out[0].path == "sub-0001, study 1, series 1" and reason in found.left_out[0].reason


def test_of_several_dicom_series_one_must_be_named(tmp_path):
    trees.dicom_series(tmp_path, "MRN-1", trees.anatomy(1), number=1)
    trees.dicom_series(tmp_path / "t2", "MRN-1", trees.anatomy(1) // 2, number=2, SeriesDescription="T2 tse")
    found = find_scans("dicom", tmp_path)
    assert not found.scans
    assert "2 series (20, 20 slices) could be meant; name one by --modalities TEXT" in found.left_out[0].reason
    assert len(find_scans("dicom", tmp_path, Options(modalities=("MPRAGE",))).scans) == 1


def test_dicom_studies_of_one_person_are_sessions_in_order_of_time(tmp_path):
    trees.dicom_series(tmp_path / "later", "MRN-1", trees.anatomy(2), study=2)
    trees.dicom_series(tmp_path / "sooner", "MRN-1", trees.anatomy(1), study=1)
    scans = find_scans("dicom", tmp_path).scans
    assert [(scan.participant_id, scan.session, scan.files[0].parent.name) for scan in scans] == [
        ("sub-0001", "1", "sooner"),
        ("sub-0001", "2", "later"),
    ]


def test_hounsfield_units_are_moved_so_that_air_is_0(tmp_path):
    trees.dicom_series(tmp_path, "MRN-1", trees.anatomy(1), Modality="CT", RescaleSlope=1, RescaleIntercept=-1024)
    array, _ = load_scan(find_scans("dicom", tmp_path).scans[0])
    assert array.min() == 0 and array.max() == trees.anatomy(1).max()


def test_an_unknown_layout_and_a_missing_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown layout 'brats', expected one of"):
        find_scans("brats", tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_scans("bids", tmp_path / "x")
