"""Every cell of the matrix does what is declared of it, and the page shows what is declared."""

from __future__ import annotations

import pytest
from peft import PeftModel

import matrix


@pytest.fixture(autouse=True)
def without_model_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT compiles a template for each, which takes as long as the rest of saving."""
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)


@pytest.mark.parametrize(("kind", "feature"), matrix.CELLS)
def test_a_cell_works_as_with_lora_or_is_refused_as_declared(kind: str, feature: str) -> None:
    for who, error in matrix.differences(kind, feature):
        declared = matrix.declared(kind, feature)
        message = f"{who} {'did it' if error is None else 'raised'}; tests/matrix.py declares {declared}"
        raise AssertionError(message) from error


@pytest.mark.parametrize("name", matrix.HELPERS)
def test_a_helper_of_loras_works_as_with_lora_or_is_refused_as_declared(name: str) -> None:
    for who, error in matrix.helper_differences(name):
        says = matrix.HELPERS[name].says
        message = f"{who} {'did it' if error is None else 'raised'}; tests/matrix.py declares {says}"
        raise AssertionError(message) from error


def test_the_page_shows_what_is_declared() -> None:
    text = matrix.PAGE.read_text(encoding="utf-8")
    assert text == matrix.page(), "run: python tests/matrix.py"


def test_every_refusal_of_what_lora_can_names_a_way_out() -> None:
    """A message has a reason and a way out, so what is declared of it has two parts at least."""
    for cell in matrix.CELLS:
        outcome = matrix.declared(*cell)
        if outcome.sign == "✗":
            assert outcome.ours is not None and "…" in outcome.ours, cell
