"""Pictures of the studio for the documentation: every tab, light and dark, on a screen and on a telephone.

A small world is trained first, through the page itself. It needs what ``make test-studio`` installs.

    python benchmarks/screenshots.py [--out docs/studio] [--all]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
SIZES = {"": (1280, 860), "-phone": (390, 844)}
# Those that the documentation shows.
SHOWN = ("runs-dark", "data-dark", "chat-light")
RECIPE: dict[str, Any] = {
    "model": "small-model",
    "data": "requests.jsonl",
    "task": {"kind": "text", "max_new_tokens": 12},
    "trainer": {"max_steps": 240, "learning_rate": 1e-2, "logging_steps": 2},
    "evaluation": {"also": []},
}


def prepare(root: Path) -> None:
    """Make a model, data, two runs and a comparison's recipe."""
    import tiny
    from moslora import train
    from moslora.recipe.building import build_recipe

    tiny.save_chat_model(root / "small-model")
    tiny.save_chat_data(root / "requests.jsonl", 120)
    for name, rate in (("requests", 1e-2), ("requests-slower", 3e-3)):
        recipe = {**RECIPE, "trainer": {**RECIPE["trainer"], "learning_rate": rate}}
        recipe |= {"output": {"name": name, "dir": str(root / "runs")}}
        train(build_recipe(recipe, base=root))


def take(page: Any, out: Path, name: str) -> None:
    """Take a picture, with few colors, so that it is small."""
    file = out / f"{name}.png"
    page.screenshot(path=str(file))
    with Image.open(file) as picture:
        picture.convert("RGB").quantize(96, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


def open_tab(page: Any, name: str) -> None:
    tab = page.get_by_role("tab", name=name, exact=True).first
    if tab.is_visible():
        tab.click()
    else:
        page.locator(".overflow-menu > button").first.click()
        page.get_by_role("button", name=name, exact=True).last.click()


def pictures(browser: Any, url: str, out: Path, scheme: str, size: str) -> None:
    """Go through all tabs, as a person does."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(300_000)
    end = f"-{scheme}{size}"
    page.goto(url)
    page.locator("#runs").get_by_text("runs/requests", exact=True).click()
    page.locator("#run svg").first.wait_for()
    page.wait_for_timeout(1500)
    take(page, out, f"runs{end}")
    page.get_by_role("tab", name="Report").click()
    page.frame_locator("iframe.report").get_by_text("Before and after").wait_for()
    page.wait_for_timeout(500)
    take(page, out, f"report{end}")
    open_tab(page, "Train")
    page.get_by_label("Name of the run").wait_for()
    page.locator("#yaml textarea").fill(json.dumps(RECIPE))
    page.get_by_role("button", name="Fill the form from the text").click()
    page.wait_for_timeout(3000)
    page.evaluate("window.scrollTo(0, 0)")
    take(page, out, f"train{end}")
    page.get_by_role("button", name="Look at the data").click()
    page.locator("#data .drawing svg").first.wait_for()
    page.locator("#data").scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    take(page, out, f"data{end}")
    page.evaluate("window.scrollTo(0, 0)")
    open_tab(page, "Compare")
    page.get_by_role("button", name="What it takes and can show").wait_for()
    page.wait_for_timeout(1500)
    take(page, out, f"compare{end}")
    open_tab(page, "Adapters")
    page.get_by_label("Adapter", exact=True).click()
    page.get_by_role("option", name="runs/requests/lora", exact=True).click()
    page.get_by_role("button", name="Look it over").click()
    page.locator("#adapters-said .output").wait_for()
    page.wait_for_timeout(500)
    take(page, out, f"adapters{end}")
    open_tab(page, "Chat")
    page.get_by_label("Runs or adapters").click()
    page.get_by_role("option", name="runs/requests", exact=True).click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Load").click()
    page.locator("#question textarea").wait_for()
    for question in ("say 3 5", "say 7 1"):
        page.locator("#question textarea").fill(question)
        page.locator("#question textarea").press("Enter")
        page.locator("#talk .answer.waiting, #talk .answer.writing").first.wait_for(state="detached")
        page.get_by_text(question, exact=True).wait_for()
    page.wait_for_timeout(1500)
    take(page, out, f"chat{end}")
    context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "studio")
    parser.add_argument("--all", action="store_true", help="every tab in both themes and sizes")
    parser.add_argument("--root", type=Path, help="a folder prepared before")
    asked = parser.parse_args()
    from playwright.sync_api import sync_playwright

    from moslora.display import Display
    from moslora.studio.serving import Settings, opened
    from moslora.studio.workspace import Workspace

    with tempfile.TemporaryDirectory(prefix="studio-") as folder:
        root = asked.root or Path(folder) / "my-project"
        root.mkdir(exist_ok=True)
        if not (root / "runs").is_dir():
            prepare(root)
        taken = Path(folder) / "pictures"
        taken.mkdir()
        chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
        with (
            opened(Workspace.open(root), Settings(port=0), Display()) as page,
            sync_playwright() as driver,
        ):
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for scheme in ("light", "dark"):
                for size in SIZES if asked.all else ("",):
                    pictures(browser, page.url, taken, scheme, size)
            browser.close()
        asked.out.mkdir(parents=True, exist_ok=True)
        for file in sorted(taken.glob("*.png")):
            if asked.all or file.stem in SHOWN:
                shutil.copyfile(file, asked.out / file.name)


if __name__ == "__main__":
    main()
