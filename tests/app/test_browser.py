"""The page as a person sees it, in headless Chromium with WebGL in software."""

import re
import shutil

import nibabel
import numpy as np
import pytest

from conftest import SPACING
from diffusers_med3d import MedDiffusion3DPipeline

pytest.importorskip("gradio", reason="needs the extra app")
pytest.importorskip("ipyniivue", reason="needs the extra app")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")

from serving import CHROMIUM_FLAGS, served  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)"),
]
PATIENCE = 120_000  # milliseconds


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, tiny_pipeline, tiny_pipeline_folder, tmp_path):
    """The page with two generators; every request of the browser must go to this machine."""
    other = MedDiffusion3DPipeline.from_pretrained(tiny_pipeline_folder)
    for parameter in other.unet.parameters():
        parameter.data *= 1.1
    other.save_pretrained(tmp_path / "other")
    asked = []
    with served([tiny_pipeline_folder, str(tmp_path / "other")]) as address:
        page = browser.new_page(viewport={"width": 1280, "height": 1100})
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        steps = page.get_by_label("number input for Denoising steps")
        steps.fill("2")
        steps.press("Tab")
        yield page
        page.close()
    assert asked and not [url for url in asked if not re.match(rf"{address}|data:|blob:", url)]
    assert not errors


def place(page, slot: str):
    """Where a volume is shown, once it is."""
    shown = page.locator(f'.med3d-viewer[data-slot="{slot}"][data-shown]')
    shown.wait_for()
    return shown


def scores(page) -> str:
    """The table of scores on the page."""
    return page.get_by_role("table").filter(has_text="sharpness").inner_text()


def download(page, slot: str, folder) -> nibabel.Nifti1Image:
    with page.expect_download() as started:
        place(page, slot).get_by_text("Download NIfTI").click()
    path = folder / started.value.suggested_filename
    started.value.save_as(path)
    return nibabel.load(path)


def picture(page, slot: str) -> bytes:
    return page.locator(f'.med3d-viewer[data-slot="{slot}"] canvas').screenshot()


def test_generate_turn_window_and_download(page, tmp_path, tiny_pipeline):
    page.get_by_role("button", name="Generate", exact=True).click()
    viewer = place(page, "generate")
    assert re.search(r"brightness\s+0\.\d{3}", scores(page))
    image = download(page, "generate", tmp_path)
    np.testing.assert_array_equal(image.affine, tiny_pipeline.affine())
    assert image.get_filename().endswith("tiny-pipeline-young-seed0.nii.gz") and image.shape == (16, 16, 16)

    viewer.get_by_role("button", name="3D", exact=True).click()
    page.wait_for_timeout(500)
    before = picture(page, "generate")
    box = viewer.locator("canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 120, box["y"] + box["height"] / 2, steps=3)
    page.mouse.up()
    page.wait_for_timeout(500)
    turned = picture(page, "generate")
    assert turned != before
    azimuth = "window.med3d.viewers.generate.nv.scene.renderAzimuth"
    start = page.evaluate(azimuth)
    viewer.get_by_role("button", name="Turn").click()
    page.wait_for_function(f"{azimuth} !== {start}")
    viewer.get_by_role("button", name="Turn").click()

    viewer.get_by_label("Level").fill("0.2")
    limits = page.evaluate("(({cal_min, cal_max}) => [cal_min, cal_max])(window.med3d.viewers.generate.nv.volumes[0])")
    np.testing.assert_allclose(limits, [-0.3, 0.7])


def test_compare_two_checkpoints_from_the_same_noise(page, tmp_path):
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("button", name="Compare", exact=True).click()
    left, right = (download(page, slot, tmp_path) for slot in ("left", "right"))
    assert "tiny-pipeline" in left.get_filename() and "other" in right.get_filename()
    assert not np.array_equal(left.get_fdata(), right.get_fdata())
    table = scores(page)
    assert re.search(r"score\s+tiny-pipeline\s+other\s+brightness\s+0\.\d+\s+0\.\d+\s+refuses\s+none\s+none", table)
    assert re.search(r"sharpness\s+\d\.\d+\s+\d\.\d+", table)
    place(page, "left").get_by_role("button", name="Axial").click()
    pressed = place(page, "right").get_by_role("button", name="Axial").get_attribute("aria-pressed")
    assert pressed == "true"  # both show the same


def test_score_a_scan_and_start_from_another(page, tmp_path, tiny_volumes):
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = [-80, -100, 300]
    nibabel.save(nibabel.Nifti1Image(tiny_volumes[0, 0].numpy(), affine), tmp_path / "head.nii.gz")
    page.get_by_role("tab", name="Score a scan").click()
    page.get_by_text("Scan to score (NIfTI)").wait_for()
    page.locator("input[type=file]").last.set_input_files(tmp_path / "head.nii.gz")
    page.get_by_text("head.nii.gz (16 x 16 x 16 voxels of 12 x 12 x 12 mm) is in memory").wait_for()
    page.get_by_role("button", name="Score the uploaded scan").click()
    assert download(page, "score", tmp_path).affine[2, 3] == pytest.approx(300, abs=13)
    assert re.search(r"brightness\s+0\.\d{3}", scores(page))
    page.get_by_role("tab", name="Compare").click()
    page.get_by_text("Both start from the same noise.").wait_for()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "head.nii.gz")
    page.get_by_text("Both start from your scan, with the same noise added.").wait_for()
    page.get_by_role("tab", name="Generate").click()
    page.get_by_role("button", name="Generate", exact=True).click()
    made = download(page, "generate", tmp_path)
    assert made.affine[2, 3] == pytest.approx(300, abs=13) and "strength0.5" in made.get_filename()
    page.get_by_role("button", name="Start from noise again").click()
    page.get_by_role("tab", name="Compare").click()
    page.get_by_text("Both start from the same noise.").wait_for()


def test_a_bad_upload_is_answered_with_one_sentence_beside_an_empty_box(page, tmp_path):
    (tmp_path / "bad.nii.gz").write_bytes(b"no scan")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "bad.nii.gz")
    page.get_by_text("bad.nii.gz cannot be read as NIfTI: it is damaged or no NIfTI file.", exact=True).wait_for()
    playwright.expect(page.locator("a[download^='bad']")).to_have_count(0)
    page.get_by_role("tab", name="Score a scan").click()
    page.get_by_role("button", name="Score the uploaded scan").click()
    page.get_by_text("there is no scan to score; upload one first.").wait_for()


def test_on_a_narrow_screen_the_button_comes_before_the_settings(page):
    page.set_viewport_size({"width": 800, "height": 600})
    button, seed = page.get_by_role("button", name="Generate", exact=True), page.get_by_label("Seed")
    assert button.bounding_box()["y"] < min(600, seed.bounding_box()["y"])
    page.set_viewport_size({"width": 1280, "height": 1100})
    assert button.bounding_box()["x"] > seed.bounding_box()["x"]
    assert page.get_by_label("Checkpoint", exact=True).bounding_box()["y"] < 250  # both columns begin at the top
