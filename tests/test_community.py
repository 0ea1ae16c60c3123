"""What strangers find beside the code is true of it: files parse, and the commands and tests that they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_workflow_runs_make_targets_that_exist() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    jobs = workflow["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    named = {command.split()[1] for command in commands}
    assert all(command.startswith("make ") for command in commands)
    named = (named - {"${{"}) | set(jobs["versions"]["strategy"]["matrix"]["target"])
    assert named <= TARGETS and {"check", "test", "docs", "test-lowest", "test-latest"} <= named
    assert all("timeout-minutes" in job for job in jobs.values())


def test_forms_and_settings_parse() -> None:
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    assert len(files) == 6
    assert all(yaml.safe_load(file.read_text()) for file in files)


def test_the_line_that_the_form_asks_for_says_nothing_of_the_user(capsys) -> None:  # type: ignore[no-untyped-def]
    form = (ROOT / ".github/ISSUE_TEMPLATE/wrong.yml").read_text()
    found = re.search(r'`python -c "(.*)"`', form)
    assert found is not None
    exec(found[1], {})
    printed = capsys.readouterr().out
    assert '"torch"' in printed and '"gpus"' in printed
    assert str(Path.home()) not in printed and str(ROOT) not in printed


def test_tests_and_targets_that_the_pages_name_exist() -> None:
    for page in ("SECURITY.md", "AGENTS.md", ".github/pull_request_template.md"):
        text = (ROOT / page).read_text()
        assert all((ROOT / name).is_file() for name in re.findall(r"`?(tests/\w+\.py)", text))
        named = {word for words in re.findall(r"`make ([a-z -]+)`", text) for word in words.split()}
        assert named <= TARGETS, page
