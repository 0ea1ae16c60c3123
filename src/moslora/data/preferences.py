"""Rows as preferences: a prompt with a chosen and a rejected answer, or with one answer and whether it is wanted.

prompt, chosen, rejected      text, or lists of messages
chosen, rejected              conversations or texts that begin with the same prompt
prompt, completion, label     one answer; true: wanted, false: not
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moslora.data.columns import OF_TEMPLATES, Unread, unread_keys
from moslora.data.faults import Faults, kind_of, listed
from moslora.data.files import Records
from moslora.data.shapes import Example, FieldError, Message, read_template_arguments, read_text, read_turns
from moslora.errors import DataError

__all__ = ["PREFERENCE_FORMATS", "Preference", "to_preferences"]

# Columns of each form, by what ``data.format`` calls it.
FORMS = {"preference": ("chosen", "rejected"), "labeled": ("completion", "label")}
PREFERENCE_FORMATS = ("auto", *FORMS)
# Where the answer begins in a text of Anthropic's form, if both texts have it in common.
MARKER = "\n\nAssistant:"


@dataclass(frozen=True)
class Preference:
    """A prompt with two answers, or with one that is wanted or not.

    Attributes:
        place: Where it stands in the file.
        chosen: The prompt with the answer that is preferred, or wanted; None for one that is not wanted.
        rejected: The prompt with the answer that is not; None for one that is wanted.
        extra: The other columns, untouched.
    """

    place: str
    chosen: Example | None
    rejected: Example | None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def example(self) -> Example:
        """The prompt with the chosen answer, or with the only one."""
        found = self.chosen or self.rejected
        assert found is not None
        return found

    @property
    def is_pair(self) -> bool:
        """Whether it has both answers."""
        return self.chosen is not None and self.rejected is not None


_Row = Mapping[str, Any]


def to_preferences(records: Records, format: str = "auto") -> list[Preference]:
    """Interpret rows as preferences.

    Args:
        records: Rows, as :func:`read_records` gives them.
        format: One of ``PREFERENCE_FORMATS``; ``"auto"`` decides by the columns.

    Returns:
        One preference per row, in order.

    Raises:
        DataError: If a row does not fit, naming place and field, or has keys that nobody reads; or if all labels are
            the same.
    """
    form = _recognize(records) if format == "auto" else format
    faults, unread = Faults(records.source), Unread()
    found = []
    own = {"prompt", *FORMS[form]}
    for place, row in zip(records.places, records.rows, strict=True):
        try:
            found.append(_preference(place, row, form))
        except RecursionError:
            faults.add(place, "has too many nested levels")
        except FieldError as problem:
            other = [name for name, columns in FORMS.items() if name != form and _fits(row, columns)]
            mixed = (
                f" (the row has the columns of {other[0]} rows, the file has {form} rows)" if other else ""
            )
            faults.add(place, f"{problem}{mixed}")
        else:
            unread.add(place, unread_keys(row, {*own, *OF_TEMPLATES}))
    advice = f"Correct or remove these rows (read as data.format={form}); none was skipped."
    if unread:
        advice = f"{advice if faults.count else 'Rename or remove these fields.'} {unread.advice()}"
    for fault in unread.faults():
        faults.add("", fault)
    faults.raise_if_any(advice)
    _check_labels(records, found, form)
    return found


def _fits(row: _Row, columns: Sequence[str]) -> bool:
    return all(row.get(column) is not None for column in columns)


def _recognize(records: Records) -> str:
    counts = Counter(name for row in records.rows for name, columns in FORMS.items() if _fits(row, columns))
    both = next(
        (
            place
            for place, row in zip(records.places, records.rows, strict=True)
            if all(_fits(row, columns) for columns in FORMS.values())
        ),
        None,
    )
    if both is not None:
        raise DataError(
            records.source,
            [f"{both}: has the columns of a pair and of a labeled answer"],
            "Choose one: data.format=preference or data.format=labeled.",
        )
    if counts:
        return counts.most_common(1)[0][0]
    row = records.rows[0]
    if any(column in row for column in FORMS["labeled"]) and not any(c in row for c in FORMS["preference"]):
        return "labeled"
    if any(column in row for column in FORMS["preference"]):
        return "preference"
    raise DataError(
        records.source,
        [f"{records.places[0]}: the columns {listed(row)} are not those of preferences"],
        "Rows need prompt, chosen and rejected (the prompt may stand in both), or prompt, completion and label.",
    )


def _preference(place: str, row: _Row, form: str) -> Preference:
    arguments: dict[str, Any] = {}
    if any(row.get(column) is not None for column in OF_TEMPLATES):
        arguments = read_template_arguments(row)
    own = {"prompt", *FORMS[form], *OF_TEMPLATES}
    extra = {key: value for key, value in row.items() if key not in own}

    def example(which: str, **fields: Any) -> Example:
        where = place if form == "labeled" else f"{place} ({which})"
        return Example(where, **fields, template_arguments=arguments, extra=extra)

    if form == "labeled":
        label = row.get("label")
        if not isinstance(label, bool):
            found = "missing" if "label" not in row else kind_of(label)
            raise FieldError(f"field 'label' is {found}; expected true (wanted) or false (not wanted)")
        if row.get("prompt") is None:
            raise FieldError(f"field 'prompt' is missing; found {listed(row)}")
        answered = example("", **_with_prompt(row, "completion"))
        return Preference(place, answered if label else None, None if label else answered, extra)
    for name in FORMS[form]:
        if row.get(name) is None:
            raise FieldError(f"field {name!r} is missing; found {listed(row)}")
    if isinstance(row["chosen"], list) != isinstance(row["rejected"], list):
        kinds = f"{kind_of(row['chosen'])} and {kind_of(row['rejected'])}"
        raise FieldError(f"fields 'chosen' and 'rejected' are {kinds}; expected both text or both lists")
    if row.get("prompt") is not None and not _repeats_prompt(row):
        fields = [_with_prompt(row, name) for name in FORMS[form]]
    elif isinstance(row["chosen"], list):
        fields = _of_conversations(row)
    else:
        fields = _of_texts(row)
    chosen, rejected = fields
    if _answer(chosen).strip() == _answer(rejected).strip():
        raise FieldError(
            "fields 'chosen' and 'rejected' say the same, so nothing is preferred; remove the row"
        )
    return Preference(place, example("chosen", **chosen), example("rejected", **rejected), extra)


def _answer(fields: Mapping[str, Any]) -> str:
    return str(fields["messages"][-1].content if "messages" in fields else fields["completion"])


def _with_prompt(row: _Row, column: str) -> dict[str, Any]:
    """Return the fields of an example whose prompt has a column of its own."""
    prompt, answer = row["prompt"], row.get(column)
    if answer is None:
        raise FieldError(f"field {column!r} is missing; found {listed(row)}")
    if isinstance(answer, list):
        asked = (
            (Message("user", read_text(row, "prompt"), False),)
            if isinstance(prompt, str)
            else _quoted(read_turns(row, "prompt", in_prompt=True))
        )
        _check_asked(asked, "prompt")
        return {"messages": (*asked, _one_answer(read_turns(row, column), column))}
    if isinstance(prompt, list):
        raise FieldError(
            f"fields 'prompt' and {column!r} are a list and {kind_of(answer)}; expected both text or both lists"
        )
    return {"prompt": read_text(row, "prompt"), "completion": read_text(row, column)}


def _quoted(turns: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(Message(m.role, m.content, False, m.flag) for m in turns)


def _check_asked(turns: Sequence[Message], column: str) -> None:
    if not any(message.role == "user" for message in turns):
        raise FieldError(f"field {column!r} has no user turn, so there is no question that is answered")
    if turns[0].role == "assistant":
        raise FieldError(
            f"field {column!r} opens with an assistant turn, which answers no question; remove it"
        )


def _one_answer(turns: Sequence[Message], column: str) -> Message:
    """Return the only turn, an answer that is learned."""
    if len(turns) != 1 or turns[0].role != "assistant":
        roles = listed(message.role for message in turns)
        raise FieldError(
            f"field {column!r} has the turns {roles} after the prompt; expected one assistant turn. Where it repeats "
            "the prompt, drop that column: data.ignore=[prompt]"
        )
    if not turns[0].trained:
        raise FieldError(f"field {column!r} marks its answer as not to be learned; remove the row")
    return turns[0]


def _repeats_prompt(row: _Row) -> bool:
    """Tell whether a prompt's text is the question that both conversations begin with, as some data sets have it."""
    prompt = row["prompt"]
    if not isinstance(prompt, str) or not isinstance(row["chosen"], list):
        return False
    asked = [
        [
            turn.get("content", turn.get("value"))
            for turn in row[name]
            if isinstance(turn, Mapping) and turn.get("role", turn.get("from")) in ("user", "human")
        ]
        for name in FORMS["preference"]
    ]
    return all(prompt in questions for questions in asked)


def _of_conversations(row: _Row) -> list[dict[str, Any]]:
    """Split conversations that begin with the same turns."""
    turns = [read_turns(row, name) for name in FORMS["preference"]]
    pairs = zip(*turns, strict=False)
    same = next(
        (i for i, (one, two) in enumerate(pairs) if (one.role, one.content) != (two.role, two.content)),
        min(map(len, turns)),
    )
    if all(len(own) == same for own in turns):
        raise FieldError(
            "fields 'chosen' and 'rejected' say the same, so nothing is preferred; remove the row"
        )
    asked = _quoted(turns[0][:same])
    if not asked:
        raise FieldError(
            "fields 'chosen' and 'rejected' begin with different turns; expected the same prompt in both"
        )
    _check_asked(asked, "chosen")
    return [
        {"messages": (*asked, _one_answer(own[same:], name))}
        for name, own in zip(FORMS["preference"], turns, strict=True)
    ]


def _of_texts(row: _Row) -> list[dict[str, Any]]:
    """Split texts that begin with the same prompt: at Anthropic's marker, or after the last word that they share."""
    texts = [read_text(row, name) for name in FORMS["preference"]]
    if texts[0].strip() == texts[1].strip():
        raise FieldError(
            "fields 'chosen' and 'rejected' say the same, so nothing is preferred; remove the row"
        )
    shared = os.path.commonprefix(texts)  # noqa: RUF071 - of texts, not of paths
    at = shared.rfind(MARKER)
    if at >= 0:
        end = at + len(MARKER)
    else:
        end = max((i for i, letter in enumerate(shared) if letter.isspace()), default=0)
        end = len(shared[:end].rstrip())
    if not shared[:end].strip():
        raise FieldError(
            "fields 'chosen' and 'rejected' do not begin with the same words; expected the same prompt in both, or a "
            "field 'prompt'"
        )
    empty = [name for name, text in zip(FORMS["preference"], texts, strict=True) if not text[end:].strip()]
    if empty:
        raise FieldError(f"field {empty[0]!r} has no answer after the prompt that both share")
    return [{"prompt": text[:end], "completion": text[end:]} for text in texts]


def _check_labels(records: Records, found: Sequence[Preference], form: str) -> None:
    """Refuse a file of labeled answers of which all have the same label."""
    if form == "labeled" and found and len({p.chosen is None for p in found}) == 1:
        only = "false" if found[0].chosen is None else "true"
        raise DataError(
            records.source,
            [f"all {len(found)} rows have label {only}"],
            "Wanted and unwanted answers are learned against each other: give some of both. To learn wanted answers "
            "alone, use task=text.",
        )
