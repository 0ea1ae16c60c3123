"""Laws of the evidence: its data are what is said of them, and README's table is what was found."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from moslora.evaluation.commonsense.questions import read_questions, write_answer_texts

ROOT = Path(__file__).parents[1]
FACTS = ROOT / "recipes" / "facts"


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"evidence_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FACTS / f"{name}.jsonl").read_text().splitlines()]


def test_the_committed_facts_are_what_the_generator_writes(tmp_path: Path) -> None:
    load(FACTS / "generate.py").write(tmp_path)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (FACTS / name).read_bytes()


def test_every_held_out_fact_is_trained_on_in_two_other_wordings() -> None:
    people = load(FACTS / "generate.py").PEOPLE
    train, heldout = read("train"), read("heldout")
    assert len(heldout) == 40 and len(train) == 80
    assert not {e["prompt"] for e in train} & {e["prompt"] for e in heldout}
    for asked in heldout:
        (person,) = (p for p in people if p in asked["prompt"])
        same = [e for e in train if person in e["prompt"] and e["kind"] == asked["kind"]]
        assert [e["completion"] for e in same] == [asked["completion"]] * 2


def test_the_right_answers_text_is_the_completion_and_a_label_never_is(tmp_path: Path) -> None:
    folder = tmp_path / "ARC-Easy"
    folder.mkdir()
    listed = (
        "Please choose the correct answer to the question: What is wet?\n\nAnswer1: fire Answer2: rain\n\n"
    )
    rows = [
        {"instruction": f"{listed}Answer format: answer1/answer2", "input": "", "answer": "answer2"},
        {"instruction": "Is it?\n\nAnswer format: answer1/answer2", "input": "", "answer": "answer1"},
    ]
    (folder / "train.json").write_text(json.dumps(rows))
    out = tmp_path / "train.jsonl"
    assert write_answer_texts(read_questions(tmp_path, "ARC-Easy", split="train"), out) == 1
    assert json.loads(out.read_text()) == {
        "prompt": "Question: What is wet?\nAnswer:",
        "completion": " rain",
    }


def test_readmes_evidence_is_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    evidence = load(ROOT / "benchmarks" / "evidence.py")
    copy = tmp_path / "README.md"
    shutil.copyfile(ROOT / "README.md", copy)
    evidence.write_table(copy)
    assert copy.read_bytes() == (ROOT / "README.md").read_bytes()
    assert "frozen-mixer" in copy.read_text()
