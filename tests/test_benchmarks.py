"""Each benchmark runs at tiny sizes and leaves a whole result. What it measures is not judged here."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = {
    "layer.py": "--sizes 32 --tokens 8 --ranks 4 --rounds 2",
    "step.py": "--layers 1 --hidden 32 --inner 48 --heads 4 --kv-heads 2 --rounds 2 --rows 1 --length 8 --rank 4",
}


def table_script() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_table", BENCHMARKS / "table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table = table_script()


@pytest.mark.parametrize("script", TINY)
def test_a_benchmark_writes_a_result_that_says_where_it_was_measured(script: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [
        sys.executable,
        str(BENCHMARKS / script),
        *TINY[script].split(),
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert {"question", "device_name", "versions", "hardware", "seed"} <= result.keys()
    for case in result.get("cases", [result]):
        assert case["contenders"]["MoSLoRA"]["saved_bytes"] > 0
        assert all(found["over_floor"] > 0 for found in case["contenders"].values())


@pytest.mark.trial
def test_generating_is_measured_beside_the_base_and_merged(tmp_path: Path) -> None:
    base = tiny.save_chat_model(tmp_path / "base")
    command = [
        sys.executable,
        str(BENCHMARKS / "decode.py"),
        "--quick",
        "--model",
        str(base),
        "--device",
        "cpu",
    ]
    done = subprocess.run([*command, "--out", str(tmp_path / "d.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "d.json").read_text())
    assert [(c["model"], c["batch"]) for c in result["cases"]] == [
        ("text", 1),
        ("text", 8),
        ("LLaVA", 1),
        ("LLaVA", 8),
    ]
    for case in result["cases"]:
        assert set(case["contenders"]) == {"base", "PEFT LoRA", "MoSLoRA", "MoSLoRA, merged"}
        for found in case["contenders"].values():
            assert found["range"][0] <= found["over_floor"] <= found["range"][1]
    (row,) = table.decode_rows(result)
    assert "LLaVA, batch 8" in row[1] and "/tmp" not in json.dumps(result)


@pytest.mark.trial
def test_the_scale_is_measured_along_every_axis_and_drawn(tmp_path: Path) -> None:
    out, figure = tmp_path / "result.json", tmp_path / "scale.svg"
    command = [sys.executable, str(BENCHMARKS / "scale.py"), "--device", "cpu", "--out", str(out)]
    for more in (["--quick"], ["--plot", "--figure", str(figure)]):
        done = subprocess.run([*command, *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert result["axes"].keys() == {"tokens", "rank", "width", "depth", "loaded", "active"}
    for axis, points in result["axes"].items():
        assert points[0][axis] < points[1][axis]
        assert all(0 < point["mixer_share"] < 1 for point in points)
    assert figure.read_text().startswith("<?xml")
    (tmp_path / "scale-cpu.json").write_text(out.read_text())
    assert "a training step from rank 4 to 8" in table.measured(tmp_path)


def test_what_a_qlora_moves_is_counted_for_every_factor(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base, out = tiny.save_chat_model(tmp_path / "base"), tmp_path / "moves-cpu.json"
    command = [
        sys.executable,
        str(BENCHMARKS / "moves.py"),
        "--base",
        str(base),
        "--rank",
        "4",
        "--steps",
        "2",
    ]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for method, found in json.loads(out.read_text())["contenders"].items():
        wanted = {"A", "B", *("M" * ("MoSLoRA" in method)), *(["magnitude"] * ("DoRA" in method))}
        assert found["moved"].keys() == wanted and found["moved"]["B"]["share"] == 1
    assert "QLoRA: entries that moved" in table.measured(tmp_path)


@pytest.mark.trial
def test_trainings_over_one_base_are_timed_beside_one_alone(tmp_path: Path) -> None:
    base, data = tiny.save_chat_model(tmp_path / "base"), tiny.save_chat_data(tmp_path / "data.jsonl")
    out = tmp_path / "result.json"
    flags = [
        "--cells",
        "1,2",
        "--rounds",
        "2",
        "--rank",
        "2",
        "--rows",
        "2",
        "--model",
        str(base),
        "--data",
        str(data),
    ]
    command = [sys.executable, str(BENCHMARKS / "together.py"), *flags, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert (
        result["contenders"].keys() == {"alone", "1", "2"}
        and result["contenders"]["alone"]["over_floor"] == 1
    )
    assert {"device_name", "versions", "hardware", "seed"} <= result.keys()


@pytest.mark.trial
def test_a_job_has_the_losses_of_trl_with_peft_lora_when_the_adapter_is_the_same(tmp_path: Path) -> None:
    base, data = tiny.save_chat_model(tmp_path / "base"), tiny.save_chat_data(tmp_path / "data.jsonl")
    out = tmp_path / "result.json"
    flags = ["--steps", "2", "--rows", "2", "--rounds", "1", "--rank", "4", "--device", "cpu"]
    command = [sys.executable, str(BENCHMARKS / "job.py"), *flags, "--model", str(base), "--data", str(data)]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert result["largest_loss_difference"] < 5e-5
    assert result["contenders"].keys() == {"MoSLoRA", "TRL + PEFT LoRA"}
    assert all(found["peak_bytes"] > 0 for found in result["contenders"].values())


@pytest.mark.parametrize("page", table.TABLES)
def test_a_page_says_what_the_results_say(page: str) -> None:
    text = (table.ROOT / page).read_text(encoding="utf-8")
    assert table.fill(text, table.TABLES[page], table.RESULTS) == text, "run: python benchmarks/table.py"


def test_every_result_has_a_row_or_a_reason_why_not() -> None:
    assert table.without_row(table.RESULTS) == [], "add it to ROWS or WITHOUT_ROW of benchmarks/table.py"


def test_a_result_that_changes_changes_its_row_and_one_that_is_gone_has_none(tmp_path: Path) -> None:
    found = json.loads((table.RESULTS / "step-cpu.json").read_text())
    for name in ("MoSLoRA", "PEFT LoRA"):
        found["contenders"][name] |= {"over_floor": 7.25, "saved_bytes": 3_000_000}
    (tmp_path / "step-cpu.json").write_text(json.dumps(found))
    made = table.measured(tmp_path)
    assert "7.25 × the frozen base's, keeping 3 MB; PEFT's LoRA 7.25 ×, 3 MB" in made
    assert "merge" not in made and "7.25" not in table.measured(table.RESULTS)
    (tmp_path / "new.json").write_text("{}")
    assert table.without_row(tmp_path) == ["new.json"]


def test_a_page_without_its_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="found 0 pairs of <!-- table step"):
        table.fill("nothing", {"step": table.steps}, table.RESULTS)


def test_pictures_of_a_subject_are_scored_by_what_their_prompts_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    subject: Any = importlib.import_module("subject")
    prompts = subject.asked()
    assert len(prompts) == 32 and sum(one.subject for one in prompts) == 16
    for one in prompts:
        assert one.prompt.endswith(f" on a {one.ground} background")
        elsewhere = next(g for g in subject.GROUNDS if g != one.ground)
        if not one.subject:
            shape, colour = one.other
            assert "ikat" not in one.prompt and f"a {colour} {shape} on" in one.prompt
            right = subject.judging.Reading({"top left": one.other}, {"top left": 0.1}, one.ground)
            assert subject.score(one, right) == {"kept": 1}
            for wrong in (
                replace(right, subject={"top left": 0.9}), replace(right, things={}), replace(right, ground=elsewhere)
            ):  # fmt: skip
                assert subject.score(one, wrong) == {"kept": 0}
            continue
        assert "ikat star" in one.prompt
        right = subject.judging.Reading({"top left": ("star", "other")}, {"top left": 0.9}, one.ground)
        assert subject.score(one, right) == {"subject": 1, "followed": 1, "both": 1}
        plain = replace(right, subject={"top left": 0.1})
        assert subject.score(one, plain) == {"subject": 0, "followed": 1, "both": 0}
        assert subject.score(one, replace(right, ground=elsewhere)) == {
            "subject": 1,
            "followed": 0,
            "both": 0,
        }
        circle = replace(plain, things={"top left": ("circle", "red")})
        assert subject.score(one, circle) == {"subject": 0, "followed": 0, "both": 0}


def test_the_start_of_a_verb_is_measured_beside_importing_torch(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [
        sys.executable,
        str(BENCHMARKS / "start.py"),
        "--rounds",
        "3",
        "--only",
        "help",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert {"question", "versions", "hardware", "seed", "note"} <= result.keys()
    assert result["sources"]["now"]["verbs"]["help"]["over_floor"] > 0
