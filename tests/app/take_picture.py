"""Take the pictures of the page in docs/app.md.

    python tests/app/take_picture.py

Needs the extras `app` and `test`, and Chromium. Writes docs/images/app.png, a volume of brain-t1, and
docs/images/app-compare.png, the same noise through brain-t1 and brain-t1-ppo.
"""

import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from diffusers_med3d.app.work import bundled_generators, load_rewards
from diffusers_med3d.rewards.loading import DEFAULT_REWARDS
from serving import CHROMIUM_FLAGS, served

IMAGES = Path(__file__).parents[2] / "docs" / "images"
STEPS = 8  # denoising steps of the volumes
PATIENCE = 1_200_000  # milliseconds


def take(page: Page, slots: list[str], name: str) -> None:
    """Wait until volumes are shown, then write the page as a picture of few colours."""
    for slot in slots:
        page.locator(f'.med3d-viewer[data-slot="{slot}"][data-shown]').wait_for()
    page.wait_for_timeout(3000)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(128)
    picture.save(IMAGES / name, optimize=True)
    print(f"wrote {name}")


def main() -> None:
    """Serve the page, use it, write the pictures."""
    rewards = load_rewards(DEFAULT_REWARDS)
    with sync_playwright() as started, served(bundled_generators(), rewards=rewards) as address:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1140})
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        page.get_by_label("number input for Denoising steps").fill(str(STEPS))
        page.get_by_label("number input for Denoising steps").press("Tab")
        page.get_by_role("button", name="Generate", exact=True).click()
        take(page, ["generate"], "app.png")
        page.get_by_role("tab", name="Compare").click()
        page.get_by_role("button", name="Compare", exact=True).click()
        page.set_viewport_size({"width": 1280, "height": 1060})
        take(page, ["left", "right"], "app-compare.png")
        browser.close()


if __name__ == "__main__":
    main()
