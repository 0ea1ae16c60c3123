"""The quick start notebook: its cells run in order, on a tiny model, and what it shows was made by these cells."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import tiny

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "quick-start.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


class Handle:
    """Stands for what ``IPython.display.display`` returns."""

    def __init__(self, drawn: list[str]) -> None:
        self.drawn = drawn

    def update(self, shown: str) -> None:
        self.drawn.append(shown)


def test_every_cell_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    display: Any = types.ModuleType("IPython.display")
    display.HTML = str
    display.display = lambda shown, display_id: (drawn.append(shown), Handle(drawn))[1]
    package: Any = types.ModuleType("IPython")
    package.display = display
    package.get_ipython, package.version_info = (lambda: None), (9, 0)  # which matplotlib asks for
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tiny.save_chat_model(tmp_path / "base")
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(CODE):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        if number == 0:  # what a reader would change, too
            names |= {
                "MODEL": str(tmp_path / "base"),
                "STEPS": 2,
                "HOME": str(NOTEBOOK.parents[2] / "recipes" / "home"),
            }
    assert names["run"].proofs["reload"]["passed"] and names["merged"].path.is_dir()
    assert names["exported"].proof.passed and next(m.name for m in names["report"].measures) == "loss"
    assert any("Training" in shown and "2/2" in shown for shown in drawn), "the bar reached its end"


def test_the_notebook_was_run_to_its_end_and_names_no_machine() -> None:
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert '"output_type": "error"' not in text
    assert "image/png" in text, "the curve"
    assert not re.search(r"(?<![\w./])/(root|home|tmp|work|usr|opt)\b|site-packages", text), (
        "a path of a machine"
    )
