"""The report: self-contained, escaped, honest about mistakes, and there for every run, finished or not."""

from __future__ import annotations

import base64
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moslora.errors import NotFoundError, UsageError
from moslora.reports.again import remake_report
from moslora.reports.drawing import loss_curve
from moslora.reports.metric_rows import sign_test
from moslora.reports.pictures import ALL_SEEN_BYTES, SEEN, SEEN_BYTES
from moslora.reports.run import write_report
from moslora.training.metrics_log import MetricsLog
from moslora.training.run_directory import RunDirectory

FETCHING = ("src", "srcset", "poster", "data", "action", "background", "xlink:href", "href")


class Page(HTMLParser):
    """What a browser would see: the visible text, the tags, and everything it would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self._pieces: list[str] = []
        self.feed(self.source)
        text = " ".join(self._pieces).replace("\u00a0", " ").replace("\u2060", "")
        self.text = re.sub(r"\s+", " ", text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in FETCHING]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        self._pieces.append(data)


def example(number: int, base_ok: bool, tuned_ok: bool, **fields: Any) -> dict[str, Any]:
    answers = {"base": "Sure!", "tuned": '{"on": true}', "reference": '{"on": true}'}
    marks = {"base_ok": base_ok, "tuned_ok": tuned_ok}
    return {"place": f"held.jsonl:{number}", "prompt": f"request {number}", **answers, **marks, **fields}


def make_run(parent: Path, predictions: list[dict[str, Any]], **record: Any) -> RunDirectory:
    run = RunDirectory.create(parent, "demo")
    with MetricsLog(run.metrics) as log:
        for step in range(1, 31):
            log.append(step, loss=2.5 * math.exp(-step / 5) + 0.1, learning_rate=1e-3 * (1 - step / 30))
    run.predictions.write_text("".join(json.dumps(line) + "\n" for line in predictions))
    run.recipe.write_text("model: base-model\nadapter:\n  r: 16\n")
    run.lora.mkdir()
    (run.lora / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base-model"}))
    run.update(**{"status": "completed", "seed": 0, **record})
    return run


def finished(parent: Path, **record: Any) -> RunDirectory:
    """8 fixed, 1 broken, 1 wrong both times."""
    predictions = [example(n, False, True, kind="single") for n in range(8)]
    predictions += [
        example(8, True, False, kind="several", tuned="oops"),
        example(9, False, False, kind="several"),
    ]
    metrics = {"before": {"loss": 2.31, "exact_match": 0.1}, "after": {"loss": 0.1234, "exact_match": 0.8}}
    return make_run(parent, predictions, **{"metrics": metrics, **record})


def test_the_verdict_comes_first_and_says_the_numbers(tmp_path):
    page = Page(write_report(finished(tmp_path).path))
    verdict = (
        "Held-out loss 2.31 → 0.123; exact match 10 % → 80 % (95 % interval 49–94 %) on 10 held-out examples."
    )
    assert verdict in page.text
    assert page.text.index(verdict) < page.text.index("Before and after")
    assert "Tuning fixed 8 answers and broke 1." in page.text


def test_a_page_fetches_nothing(tmp_path):
    page = Page(write_report(finished(tmp_path).path))
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    for link in page.links:
        local = (tmp_path / "demo" / link).exists() or link.lstrip("#") in page.ids
        assert local and ":" not in link, link
    assert "http" not in page.source.replace("http-equiv", "")
    assert "@import" not in page.source
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?(.)", page.source))


def test_small_pictures_of_the_run_stand_beside_their_questions_and_nothing_else_does(tmp_path):
    small, large, outside = b"small", b"x" * (SEEN_BYTES + 1), tmp_path / "outside.webp"
    outside.write_bytes(b"secret")
    lines = [
        example(0, False, True, thumbnails=["pictures/a.webp"] * (SEEN + 2)),
        example(
            1, True, False, thumbnails=["pictures/large.webp", "pictures/gone.webp", "recipe.yaml", None]
        ),
        example(2, True, True, thumbnails=["../../outside.webp", str(outside), "pictures/a.webp"]),
        example(3, False, False, thumbnails="pictures/a.webp"),
    ]
    run = make_run(tmp_path / "runs", lines)
    assert (run.path / "../../outside.webp").is_file()
    folder = run.path / "pictures"
    folder.mkdir()
    (folder / "a.webp").write_bytes(small)
    (folder / "large.webp").write_bytes(large)
    page = Page(write_report(run.path))
    uri = f"data:image/webp;base64,{base64.b64encode(small).decode()}"
    assert [link for link in page.links if link.startswith("data:")] == [uri] * (SEEN + 1)
    assert "2 more not shown" in page.text and "4 not shown" in page.text


def test_however_many_pictures_there_are_a_page_stays_small(tmp_path):
    lines = [example(n, n % 2 == 0, n % 3 == 0, thumbnails=["pictures/a.webp"] * SEEN) for n in range(40)]
    run = make_run(tmp_path, lines)
    (run.path / "pictures").mkdir()
    (run.path / "pictures" / "a.webp").write_bytes(b"y" * SEEN_BYTES)
    assert ALL_SEEN_BYTES / 2 < write_report(run.path).stat().st_size < ALL_SEEN_BYTES + 200_000


@pytest.mark.parametrize("status", ["completed", "failed", "interrupted", "running"])
def test_what_users_and_models_wrote_is_escaped(tmp_path, status):
    attack = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
    hostile = dict.fromkeys(("place", "prompt", "base", "tuned", "reference", "kind"), attack)
    run = make_run(
        tmp_path,
        [example(n, n % 2 == 0, n % 3 == 0, **hostile) for n in range(6)],
        status=status,
        stage=attack,
        error=attack,
        versions={attack: attack},
        base={"name": attack, "path": attack, "gguf_file": attack},
        metrics={"before": {attack: 1}, "after": {attack: 2}},
        proofs={attack: {"difference": 1.0, "tolerance": 2.0}},
    )
    run.recipe.write_text(attack)
    page = Page(write_report(run.path))
    assert not {"script", "img"} & set(page.tags)
    assert "alert(1)" in page.text


def test_the_tuned_model_s_mistakes_are_shown_with_what_was_expected(tmp_path):
    page = Page(write_report(finished(tmp_path).path))
    for group in ("Fixed by tuning · 8, 4 shown", "Broken by tuning · 1", "Still wrong · 1"):
        assert group in page.text
    assert "oops" in page.text
    assert page.text.count("expected {") == 2


def test_a_result_that_got_worse_says_so(tmp_path):
    metrics = {"before": {"loss": 0.5, "exact_match": 0.5}, "after": {"loss": 0.7, "exact_match": 0.4}}
    page = Page(write_report(finished(tmp_path, metrics=metrics).path))
    assert "Tuning made the held-out loss and the exact match worse." in page.text
    assert "−10 points worse" in page.text


def test_a_difference_that_chance_explains_is_not_sold_as_one(tmp_path):
    predictions = [example(0, False, True), example(1, False, True), example(2, True, False)]
    page = Page(write_report(make_run(tmp_path, predictions).path))
    assert "no difference shown (p = 1)" in page.text


def test_an_interval_is_only_given_to_a_share_the_marks_add_up_to(tmp_path):
    metrics = {
        "before": {"exact_match": 0.1, "accuracy": 0.5},
        "after": {"exact_match": 0.8, "accuracy": 0.9},
    }
    page = Page(write_report(finished(tmp_path, metrics=metrics).path))
    assert "Exact match 10 % 2–40 % 80 % 49–94 %" in page.text
    assert "Accuracy 50 % 90 % +40 points better" in page.text


def test_given_intervals_win_over_counted_ones(tmp_path):
    metrics = {
        "before": {"exact_match": 0.1},
        "after": {"exact_match": 0.8},
        "intervals": {"after": {"exact_match": [0.6, 0.9]}},
    }
    assert "80 % 60–90 %" in Page(write_report(finished(tmp_path, metrics=metrics).path)).text


@pytest.mark.parametrize(
    ("proof", "mark"),
    [
        ({"max_relative_error": 1e-9, "tolerance": 1e-6}, "✓ passed"),
        ({"max_relative_error": 1e-3, "tolerance": 1e-6, "passed": True}, "✗ failed"),
        ({"max_relative_error": 1e-9}, "no tolerance recorded"),
        ({"max_relative_error": None, "tolerance": 1e-6}, "no number"),
    ],
)
def test_a_proof_is_judged_by_its_numbers_not_by_a_claim(tmp_path, proof, mark):
    assert mark in Page(write_report(finished(tmp_path, proofs={"fold": proof}).path)).text


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"status": "interrupted"}, "Interrupted after step 30."),
        (
            {"status": "failed", "stage": "training", "error": "RuntimeError: no memory"},
            "RuntimeError: no memory",
        ),
        ({"status": "running"}, "its status was “running”"),
    ],
)
def test_an_unfinished_run_says_so_before_anything_else(tmp_path, record, said):
    metrics = {"before": {"loss": 2.0}}
    page = Page(write_report(make_run(tmp_path, [], metrics=metrics, **record).path))
    assert page.text.index(said) < page.text.index(
        "Held-out loss 2.00 before tuning. Nothing was measured after it."
    )


def test_a_run_that_has_only_just_begun_has_a_report(tmp_path):
    page = Page(write_report(RunDirectory.create(tmp_path, "bare").path))
    assert "nothing was measured" in page.text
    assert "No training step was logged." in page.text


def test_a_diverged_loss_is_said_and_does_not_break_the_curve(tmp_path):
    run = RunDirectory.create(tmp_path, "demo")
    with MetricsLog(run.metrics) as log:
        log.append(1, loss=2.0)
        log.append(2, loss=math.nan)
        log.append(3, loss=math.inf)
    assert "not a finite number at 2 logged steps, first at step 2" in Page(write_report(run.path)).text


def test_the_same_run_gives_the_same_bytes(tmp_path):
    run = finished(tmp_path)
    assert write_report(run.path).read_bytes() == write_report(run.path).read_bytes()


def test_identifiers_are_unique_in_the_page(tmp_path):
    ids = Page(write_report(finished(tmp_path).path)).ids
    assert sorted(ids) == sorted(set(ids))


def test_the_snippet_is_python_and_loads_the_base_the_adapter_names(tmp_path):
    page = Page(write_report(finished(tmp_path).path))
    snippet = re.search(r'<pre class="copy">(.*?)</pre>', page.source, re.DOTALL)
    assert snippet is not None
    code = snippet[1].replace("&#39;", "'")
    compile(code, "snippet", "exec")
    assert "base = 'base-model'" in code


@pytest.mark.parametrize("steps", [1, 2, 19, 20, 5000])
def test_a_curve_of_any_length_is_one_small_whole_drawing(steps):
    log = [{"step": step, "loss": 1 / step, "learning_rate": 1e-4} for step in range(1, steps + 1)]
    svg = loss_curve(log, {"before": {"loss": 1.0}, "after": {"loss": 0.01}}, width=7)
    assert ET.fromstring(svg.replace("xlink:href", "href")).tag == "svg"
    assert len(svg) < 120_000
    assert "#0" not in re.sub(r'(?:href="|url\()#\w+', "", svg), "every colour is left to the page"


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_sign_test_is_symmetric_and_is_a_probability(fixed, broken):
    assert 0 < sign_test(fixed, broken) <= 1
    assert sign_test(fixed, broken) == sign_test(broken, fixed)
    assert sign_test(fixed, fixed) == 1


# --- Made again


def test_a_report_is_made_again_with_the_figures_that_a_kill_kept_from_the_record(tmp_path):
    run = finished(tmp_path)
    page, whole = write_report(run.path).read_bytes(), run.read()
    for stage, values in whole["metrics"].items():
        measured = {"metrics": values, "examples": 10, "answers": [], "unit": "held-out examples"}
        (run.path / f"evaluation-{stage}.json").write_text(json.dumps(measured))
    run.record.write_text(json.dumps({**whole, "metrics": {"before": whole["metrics"]["before"]}}))
    run.report.unlink()
    assert remake_report(run.path) == run.report
    assert run.read()["metrics"]["after"] == whole["metrics"]["after"]
    assert Page(run.report).text.count("Held-out loss 2.31") == page.decode().count("Held-out loss")


def test_what_has_no_report_to_make_is_refused_by_name(tmp_path):
    finished(tmp_path)
    with pytest.raises(NotFoundError, match=r"Did you mean .*demo"):
        remake_report(tmp_path / "dmeo")
    with pytest.raises(NotFoundError, match="is a file"):
        remake_report(tmp_path / "demo" / "run.json")
    comparison = tmp_path / "compared"
    comparison.mkdir()
    (comparison / "compare.json").write_text("{}")
    with pytest.raises(UsageError, match="no results yet"):
        remake_report(comparison)
    (comparison / "results.json").write_text("{}")
    with pytest.raises(UsageError, match="damaged"):
        remake_report(comparison)
