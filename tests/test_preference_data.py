"""Rows of preferences: every form is read, and every fault is named by row and field before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moslora.data.files import read_records
from moslora.data.preferences import Preference, to_preferences
from moslora.errors import DataError

Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def read(tmp_path: Path, *rows: Row, format: str = "auto") -> list[Preference]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return to_preferences(read_records(str(path)), format)


def shown(preference: Preference) -> list[tuple[Any, Any]]:
    """Prompt and answer of both sides."""
    found = []
    for example in (preference.chosen, preference.rejected):
        assert example is not None
        if example.messages is None:
            found.append((example.prompt, example.completion))
        else:
            *asked, answer = example.messages
            assert answer.trained and not any(m.trained for m in asked)
            found.append(([(m.role, m.content) for m in asked], answer.content))
    return found


ASKED = [("user", "2+2?")]
FORMS: dict[str, tuple[Row, list[tuple[Any, Any]]]] = {
    "text": (
        {"prompt": "2+2=", "chosen": "4", "rejected": "5"},
        [("2+2=", "4"), ("2+2=", "5")],
    ),
    "messages": (
        {"prompt": [user("2+2?")], "chosen": [assistant("4")], "rejected": [assistant("5")]},
        [(ASKED, "4"), (ASKED, "5")],
    ),
    "a prompt of text before messages": (
        {"prompt": "2+2?", "chosen": [assistant("4")], "rejected": [assistant("5")]},
        [(ASKED, "4"), (ASKED, "5")],
    ),
    "the prompt in both": (
        {"chosen": [user("2+2?"), assistant("4")], "rejected": [user("2+2?"), assistant("5")]},
        [(ASKED, "4"), (ASKED, "5")],
    ),
    "the prompt in both and in a column": (
        {
            "prompt": "2+2?",
            "chosen": [user("2+2?"), assistant("4")],
            "rejected": [user("2+2?"), assistant("5")],
        },
        [(ASKED, "4"), (ASKED, "5")],
    ),
    "several turns": (
        {
            "chosen": [user("hi"), assistant("hello"), user("2+2?"), assistant("4")],
            "rejected": [user("hi"), assistant("hello"), user("2+2?"), assistant("5")],
        },
        [([("user", "hi"), ("assistant", "hello"), *ASKED], answer) for answer in "45"],
    ),
    "Anthropic's text": (
        {
            "chosen": "\n\nHuman: 2+2?\n\nAssistant: It is 4",
            "rejected": "\n\nHuman: 2+2?\n\nAssistant: It is 5",
        },
        [("\n\nHuman: 2+2?\n\nAssistant:", f" It is {n}") for n in "45"],
    ),
    "the prompt in both texts": (
        {"chosen": "2+2 is 4", "rejected": "2+2 is 5"},
        [("2+2 is", " 4"), ("2+2 is", " 5")],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_pair_is_read_in_every_form(form: str, tmp_path: Path) -> None:
    row, expected = FORMS[form]
    [found] = read(tmp_path, row)
    assert shown(found) == expected and found.is_pair


def test_labeled_answers_are_wanted_or_not(tmp_path: Path) -> None:
    one, two = read(
        tmp_path,
        {"prompt": "2+2=", "completion": "4", "label": True},
        {"prompt": [user("2+2?")], "completion": [assistant("5")], "label": False},
    )
    assert one.chosen is not None and one.rejected is None and one.chosen.completion == "4"
    assert two.chosen is None and two.rejected is not None and two.rejected.messages is not None


def test_variables_of_the_template_and_notes_are_kept(tmp_path: Path) -> None:
    row = {**FORMS["text"][0], "chat_template_kwargs": {"enable_thinking": False}, "kind": "sum", "id": 7}
    [found] = read(tmp_path, row)
    assert found.chosen is not None and found.rejected is not None
    assert found.chosen.template_arguments == found.rejected.template_arguments == {"enable_thinking": False}
    assert found.example.extra["kind"] == "sum"


GOOD: Row = FORMS["text"][0]
LABELED: Row = {"prompt": "2+2=", "completion": "4", "label": True}
FAULTS: dict[str, tuple[Row, str]] = {
    "the same": ({**GOOD, "rejected": "4 "}, r"line 2: fields 'chosen' and 'rejected' say the same"),
    "an empty answer": ({**GOOD, "chosen": " "}, r"line 2: field 'chosen' is empty"),
    "no answer": ({**GOOD, "rejected": None}, r"line 2: field 'rejected' is missing"),
    "an empty prompt": ({**GOOD, "prompt": ""}, r"line 2: field 'prompt' is empty"),
    "no prompt": (
        {"chosen": "yes", "rejected": "no"},
        r"line 2: fields 'chosen' and 'rejected' do not begin",
    ),
    "other kinds": ({**GOOD, "chosen": [assistant("4")]}, r"are a list and text; expected both"),
    "a number": ({**GOOD, "chosen": 4}, r"line 2: field 'chosen' is a number"),
    "other prompts": (
        {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
        r"begin with different turns",
    ),
    "no answer in turns": (
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a")]},
        r"field 'rejected' has the turns  after the prompt|field 'rejected' has the turns",
    ),
    "two answers": (
        {"prompt": "a", "chosen": [assistant("b"), user("c"), assistant("d")], "rejected": [assistant("e")]},
        r"expected one assistant turn",
    ),
    "an answer not learned": (
        {"prompt": "a", "chosen": [{**assistant("b"), "weight": 0}], "rejected": [assistant("e")]},
        r"not to be learned",
    ),
    "another form": (LABELED, r"the row has the columns of labeled rows, the file has preference rows"),
    "an unread column": ({**GOOD, "score_chosen": 0.5}, r"field 'score_chosen' would be ignored"),
    "an unread key": (
        {"prompt": "a", "chosen": [{**assistant("b"), "name": "x"}], "rejected": [assistant("c")]},
        r"field 'chosen\[0\]\.name' would be ignored",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_by_row_and_field(fault: str, tmp_path: Path) -> None:
    row, message = FAULTS[fault]
    with pytest.raises(DataError, match=message):
        read(tmp_path, GOOD, row, GOOD)


@pytest.mark.parametrize("label", [1, 0, "true", None, 0.5])
def test_labels_that_are_not_booleans_are_refused(label: object, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: field 'label' is .*; expected true \(wanted\) or false"):
        read(tmp_path, {**LABELED, "label": label}, LABELED, {**LABELED, "label": False})


@pytest.mark.parametrize("label", [True, False])
def test_one_label_alone_is_refused(label: bool, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"all 2 rows have label {str(label).lower()}"):
        read(tmp_path, *[{**LABELED, "label": label}] * 2)


def test_columns_that_fit_both_forms_need_a_choice(tmp_path: Path) -> None:
    row = {**GOOD, **LABELED}
    with pytest.raises(DataError, match=r"line 1: has the columns of a pair and of a labeled answer"):
        read(tmp_path, row)


def test_columns_of_neither_form_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: the columns prompt, answer are not those of preferences"):
        read(tmp_path, {"prompt": "a", "answer": "b"})


def test_every_fault_of_a_file_is_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1") as raised:
        read(tmp_path, *[{**GOOD, "chosen": ""}] * 9, GOOD)
    assert "4 more" in str(raised.value) or "and 4" in str(raised.value)
