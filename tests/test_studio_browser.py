"""The studio in a real browser: from an empty folder to a report and a chat, and everything that may happen meanwhile.

It needs gradio, Playwright and a Chromium of the system; ``make test-studio`` installs the first two.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import tiny

pytest.importorskip("gradio", reason="the page needs gradio (make test-studio)")
sync_api = pytest.importorskip("playwright.sync_api", reason="the browser is driven by Playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.trial,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
PATIENCE = 300_000  # milliseconds; a busy machine takes its time, and nothing here is timed
RECIPE = {
    "task": {"kind": "text", "max_new_tokens": 4},
    "model": "base",
    "data": "train.jsonl",
    "trainer": {"max_steps": 6, "learning_rate": 1e-2},
    "evaluation": {"also": []},
    "output": {"name": "first"},
}


@dataclass
class Server:
    """A page in a process of its own, as the command opens it."""

    root: Path
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    process: Any = None
    url: str = ""
    said: str = ""

    def start(self) -> Server:
        command = [sys.executable, "-m", "moslora", "studio", str(self.root), "--port", "0", *self.arguments]
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", **self.environment}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables
        )
        self.said = ""
        for line in self.process.stdout:
            self.said += line
            if found := re.search(r"opens in a browser:\s+(http\S+)", line):
                self.url = found[1].replace("0.0.0.0", "127.0.0.1")
                return self
        raise AssertionError(f"the page did not open: {self.said}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@contextlib.contextmanager
def serving(root: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    server = Server(root, arguments, environment).start()
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()
        server.process.stdout.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studio") / "work"


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    with serving(root) as started:
        yield started
    for record in root.glob("runs/*/run.json"):  # what a failed test left running
        found = json.loads(record.read_text(encoding="utf-8"))
        if found["status"] == "running":
            with contextlib.suppress(OSError):
                os.kill(found["pid"], signal.SIGKILL)


@dataclass
class Visit:
    """A page in the browser with every request it made and every error it met."""

    page: Any
    requests: list[str]
    errors: list[str]


@contextlib.contextmanager
def visiting(browser: Any, url: str, **how: Any) -> Iterator[Visit]:
    context = browser.new_context(**how)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    visit = Visit(page, [], [])
    page.on("request", lambda request: visit.requests.append(request.url))
    page.on("pageerror", lambda error: visit.errors.append(str(error)))
    page.goto(url)
    page.get_by_role("tab", name="Train").wait_for()
    yield visit
    context.close()
    assert visit.errors == []
    elsewhere = [one for one in visit.requests if not one.startswith((url, "data:", "blob:", "about:"))]
    assert elsewhere == [], "the page asked for something elsewhere"


def open_tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).first.click()


def fill_form(page: Any, root: Path, name: str, steps: int = 6) -> None:
    """Write the recipe into the text, as a person pastes it, and let the form follow."""
    open_tab(page, "Train")
    recipe = {**RECIPE, "output": {"name": name}, "trainer": {**RECIPE["trainer"], "max_steps": steps}}  # type: ignore[dict-item]
    page.get_by_label("Name of the run").wait_for()
    page.locator("#yaml textarea").fill(json.dumps(recipe))
    page.get_by_role("button", name="Fill the form from the text").click()
    sync_api.expect(page.get_by_label("Name of the run")).to_have_value(name, timeout=PATIENCE)


def status_of(root: Path, name: str) -> str:
    with contextlib.suppress(OSError, ValueError):
        return str(json.loads((root / "runs" / name / "run.json").read_text(encoding="utf-8"))["status"])
    return ""


def wait_for(condition: Any, what: str) -> None:
    end = time.monotonic() + PATIENCE / 1000
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def status_when_refused(refused: Any) -> int:
    with refused.value as answer:
        return int(answer.code)


# The tests below are one story, in order: what one leaves, the next begins with.


def test_an_empty_folder_says_what_to_do_first(browser: Any, server: Server) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.page
        page.get_by_text("No runs yet.").wait_for()
        open_tab(page, "Train")
        page.get_by_text("Not looked at yet.").wait_for()
        page.get_by_label("Name of the run").wait_for()
        page.get_by_role("button", name="Start training").click()
        page.locator("#started").get_by_text("nothing is chosen yet").first.wait_for()
        open_tab(page, "Compare")
        page.get_by_text("Which method is better on your data?").wait_for()
        open_tab(page, "Adapters")
        page.get_by_role("button", name="Look it over").click()
        page.locator("#adapters-said").get_by_text("No file or folder is named.").wait_for()
        open_tab(page, "Chat")
        page.get_by_role("button", name="Load").click()
        page.get_by_text("Choose a run or an adapter to talk to.").wait_for()


def test_bad_data_are_an_answer_by_line_and_field(
    browser: Any, server: Server, root: Path, tmp_path: Path
) -> None:
    tiny.save_chat_model(root / "base")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(
        '{"prompt": "<img src=x onerror=alert(1)>", "completion": "a"}\n{"prompt": 3}\n', encoding="utf-8"
    )
    with visiting(browser, server.url) as visit:
        page = visit.page
        fill_form(page, root, "bad")
        with page.expect_file_chooser() as chooser:
            page.locator("#upload").click()
        chooser.value.set_files(bad)
        page.get_by_text("Kept as data/bad.jsonl.").wait_for()
        page.get_by_role("button", name="Look at the data").click()
        box = page.locator("#data .notice.error")
        box.wait_for()
        assert "line 2" in box.inner_text() and "prompt" in box.inner_text()
        assert page.locator("#data img").count() == 0 and "Traceback" not in page.content()


def test_from_the_form_to_a_report_and_a_chat(browser: Any, server: Server, root: Path) -> None:
    tiny.save_chat_data(root / "train.jsonl", 40)
    with visiting(browser, server.url) as visit:
        page = visit.page
        fill_form(page, root, "other")
        page.get_by_label("Name of the run").fill("first")  # and straight to the button
        page.get_by_role("button", name="Look at the data").click()
        page.locator("#data .output .green").first.wait_for()
        page.locator("#data svg").first.wait_for()
        assert "name: first" in page.locator("#yaml textarea").input_value()
        page.get_by_role("button", name="Start training").click()
        page.locator("#started .notice.done").wait_for()
        open_tab(page, "Runs")
        page.locator("#runs").get_by_text("runs/first").wait_for()
        page.locator("#runs").get_by_text("runs/first").click()
        page.locator("#run .badge.completed").wait_for()
        page.locator("#run svg").first.wait_for()
        open_tab(page, "Report")
        page.frame_locator("iframe.report").get_by_text("Before and after").wait_for()
        assert page.locator("iframe.report").get_attribute("sandbox") == ""
        open_tab(page, "Chat")
        page.get_by_label("Runs or adapters").click()
        page.get_by_role("option", name="runs/first", exact=True).click()
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Load").click()
        page.get_by_text("proven active").wait_for()
        page.locator("#question textarea").fill("say <b>3</b>")
        page.locator("#question textarea").press("Enter")
        page.locator("#talk .mark").last.wait_for()
        assert page.locator("#talk .asked").inner_text() == "say <b>3</b>"
        page.locator("#talk .mark").last.click()
        page.locator("#talk .better").wait_for()
    row = json.loads((root / "data" / "preferences.jsonl").read_text(encoding="utf-8"))
    assert row["prompt"][0]["content"] == "say <b>3</b>" and row["chosen"] != row["rejected"]


def test_an_adapter_is_looked_over_exported_with_its_proof_and_downloaded(
    browser: Any, server: Server, root: Path
) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.page
        open_tab(page, "Adapters")
        page.get_by_label("Adapter", exact=True).click()
        page.get_by_role("option", name="runs/first/adapter").click()
        page.get_by_role("button", name="Look it over").click()
        page.locator("#adapters-said").get_by_text("Usable for peft").wait_for()
        page.get_by_text("Export", exact=True).first.click()
        page.get_by_role("button", name="Export and prove").click()
        page.locator("#adapters-said").get_by_text("Proven: largest relative error").wait_for()
        page.get_by_text("What did it learn?").click()
        page.get_by_role("button", name="Draw heat maps").click()
        page.frame_locator("iframe.report").get_by_text("Effective rank").first.wait_for()
        with page.expect_download() as download:
            page.get_by_role("button", name="Download", exact=True).click()
        assert download.value.suggested_filename.endswith(".zip")
    assert (root / "exports" / "first-adapter-lora" / "adapter_config.json").is_file()


def test_a_run_is_stopped_and_goes_on_in_two_pages_that_see_the_same(
    browser: Any, server: Server, root: Path
) -> None:
    with visiting(browser, server.url) as one, visiting(browser, server.url) as two:
        fill_form(one.page, root, "long", steps=1_000_000)
        one.page.get_by_role("button", name="Start training").click()
        one.page.locator("#started .notice.done").wait_for()
        for page in (one.page, two.page):
            open_tab(page, "Runs")
            page.locator("#runs").get_by_text("runs/long").click()
            page.locator("#run .badge.running").wait_for()
            page.locator("#run svg").first.wait_for()
        two.page.get_by_role("button", name="Stop", exact=True).first.click()
        for page in (one.page, two.page):
            page.locator("#run .badge.interrupted").wait_for()
        assert status_of(root, "long") == "interrupted"
        step = json.loads((root / "runs" / "long" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        one.page.get_by_role("button", name="Go on", exact=True).first.click()
        one.page.get_by_text("moslora train --resume").first.wait_for()
        wait_for(lambda: status_of(root, "long") == "running", "it did not go on")

        def is_further() -> bool:
            lines = (root / "runs" / "long" / "metrics.jsonl").read_text().splitlines()
            return len(lines) > 1 and json.loads(lines[-2])["step"] > step + 20

        wait_for(is_further, "it did not get further")
        two.page.locator("#run .badge.running").wait_for()


def test_a_training_outlives_its_page_and_the_next_page_finds_it(
    browser: Any, server: Server, root: Path
) -> None:
    record = json.loads((root / "runs" / "long" / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "running"
    server.kill()
    os.kill(record["pid"], 0)  # it is there still
    server.start()
    with visiting(browser, server.url) as visit:
        page = visit.page
        page.locator("#runs").get_by_text("runs/long").click()
        page.locator("#run .badge.running").wait_for()
        page.get_by_role("button", name="Stop", exact=True).first.click()
        page.locator("#run .badge.interrupted").wait_for()
        page.get_by_role("button", name="Delete …").click()
        page.get_by_text("This cannot be undone").wait_for()
        page.get_by_role("button", name="Keep it").click()
        assert (root / "runs" / "long").is_dir()
        page.get_by_role("button", name="Delete …").click()
        page.get_by_role("button", name="Delete it").click()
        page.get_by_text("runs/long is deleted.").wait_for()
        sync_api.expect(page.locator("#runs").get_by_text("runs/long")).to_have_count(0)
    assert not (root / "runs" / "long").exists() and (root / "runs" / "first").is_dir()


def test_the_page_serves_no_file_of_the_machine(server: Server) -> None:
    for path in ("/etc/passwd", str(Path(__file__)), str(server.root / "train.jsonl"), "../../etc/passwd"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server.url}gradio_api/file={path}", timeout=60)
        assert status_when_refused(refused) in (403, 404)


def test_another_sites_page_is_refused(server: Server) -> None:
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(server.url, headers=headers), timeout=60)
        assert status_when_refused(refused) == 403


def test_a_keyboard_alone_gets_to_a_run(browser: Any, server: Server) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.page
        page.locator("#runs button").first.wait_for()
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.dataset.pick ?? ''") == "runs/first":
                break
        page.keyboard.press("Enter")
        page.locator("#run svg").first.wait_for()
        wide, window = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= window


def test_on_a_telephone_nothing_is_wider_than_the_screen(browser: Any, server: Server) -> None:
    with visiting(browser, server.url, viewport={"width": 390, "height": 800}, color_scheme="dark") as visit:
        for name in ("Runs", "Train", "Compare", "Adapters", "Chat"):
            tab = visit.page.get_by_role("tab", name=name, exact=True)
            if not tab.first.is_visible():
                visit.page.locator(".overflow-menu > button").first.click()
                visit.page.get_by_role("button", name=name, exact=True).last.click()
            else:
                tab.first.click()
            wide = visit.page.evaluate("document.documentElement.scrollWidth")
            assert wide <= 390, f"{name} is {wide} pixels wide"


def test_beyond_this_machine_nothing_is_seen_without_the_password(browser: Any, tmp_path: Path) -> None:
    with serving(tmp_path, "--host", "0.0.0.0") as server:
        found = re.search(r"asks for a password: (\S+)", server.said + server.process.stdout.readline())
        assert found is not None
        for path in ("config", "gradio_api/info", "gradio_api/queue/data?session_hash=x"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(server.url + path, timeout=60)
            assert status_when_refused(refused) == 401
        with urllib.request.urlopen(server.url, timeout=60) as answer:
            assert str(tmp_path) not in answer.read().decode()
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        for password, is_in in (("wrong-password", False), (found[1], True)):
            page.goto(server.url)
            page.get_by_label("username").fill("ada")
            page.get_by_label("password").fill(password)
            page.get_by_role("button", name="Login").click()
            if is_in:
                page.get_by_text("No runs yet.").wait_for()
            else:
                page.get_by_text("Incorrect").first.wait_for()
        context.close()


def test_it_ends_when_it_is_asked_to(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 143
        assert "Traceback" not in server.process.stdout.read()
