"""Preferences as rows of a data set, and rows as the batches that TRL's trainers of preferences take."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from moslora.data.tokenization import IGNORED
from moslora.tasks.preference.encoding import Judged
from moslora.tasks.text.padding import pad_rows

if TYPE_CHECKING:
    from moslora.data.tokenization import Encoded

__all__ = ["COLLATE", "Row", "Rows", "rows_of"]

Row = dict[str, Any]


class Rows(list[Row]):
    """Rows for a trainer that tokenizes what it is given, by a method of data sets: these are tokens already."""

    def map(self, *_: Any, **__: Any) -> Rows:
        """Return the rows as they are."""
        return self


def rows_of(
    judged: Sequence[Judged], trainer: str, seed: int, batch: int, max_length: int | None
) -> list[Row]:
    """Make a trainer's rows.

    Args:
        judged: Encoded preferences.
        trainer: Of ``LOSSES``.
        seed: Of the order where the trainer keeps the rows' own: KTO's.
        batch: Rows of a batch, within which KTO pairs prompts with each other's answers.
        max_length: Most tokens of such a pair.
    """
    if trainer != "kto":
        return [
            {
                "chosen_ids": one.chosen.input_ids,
                "chosen_labels": one.chosen.labels,
                "rejected_ids": one.rejected.input_ids,
                "rejected_labels": one.rejected.labels,
            }
            for one in judged
            if one.chosen is not None and one.rejected is not None
        ]
    answers: list[tuple[Encoded, bool]] = [
        (row, wanted)
        for one in judged
        for row, wanted in ((one.chosen, True), (one.rejected, False))
        if row is not None
    ]
    random.Random(seed).shuffle(answers)
    rows = []
    for start in range(0, len(answers), batch):
        group = answers[start : start + batch]
        others = [group[-1], *group[:-1]]
        for (row, wanted), (other, _) in zip(group, others, strict=True):
            asked = _answer_start(row)
            ids = [*row.input_ids[:asked], *other.input_ids[_answer_start(other) :]]
            labels = [*[IGNORED] * asked, *other.labels[_answer_start(other) :]]
            rows.append(
                {
                    "ids": row.input_ids,
                    "labels": row.labels,
                    "KL_ids": ids[:max_length],
                    "KL_labels": labels[:max_length],
                    "label": wanted,
                }
            )
    return rows


def _answer_start(row: Encoded) -> int:
    return next(at for at, label in enumerate(row.labels) if label != IGNORED)


def _padded(
    ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], pad_id: int, prefix: str = ""
) -> Row:
    return {
        f"{prefix}input_ids": pad_rows(ids, pad_id),
        f"{prefix}attention_mask": pad_rows([[1] * len(row) for row in ids], 0),
        f"{prefix}completion_mask": pad_rows([[int(label != IGNORED) for label in row] for row in labels], 0),
    }


def _of_dpo(pad_id: int, rows: Sequence[Row]) -> Row:
    """Chosen rows first, then rejected ones."""
    import torch

    sides = ("chosen", "rejected")
    batch = _padded(
        [row[f"{side}_ids"] for side in sides for row in rows],
        [row[f"{side}_labels"] for side in sides for row in rows],
        pad_id,
    )
    for side in sides:
        if f"ref_{side}_logps" in rows[0]:
            batch[f"ref_{side}_logps"] = torch.tensor([row[f"ref_{side}_logps"] for row in rows])
    return batch


def _of_kto(pad_id: int, rows: Sequence[Row]) -> Row:
    import torch

    batch = {
        **_padded([row["ids"] for row in rows], [row["labels"] for row in rows], pad_id),
        **_padded([row["KL_ids"] for row in rows], [row["KL_labels"] for row in rows], pad_id, "KL_"),
        "label": torch.tensor([row["label"] for row in rows]),
    }
    for name in ("ref_logps", "ref_KL_logps"):
        if name in rows[0]:
            batch[name] = torch.tensor([row[name] for row in rows])
    return batch


def _of_cpo(pad_id: int, rows: Sequence[Row]) -> Row:
    batch = {}
    for side in ("chosen", "rejected"):
        ids = [row[f"{side}_ids"] for row in rows]
        batch[f"{side}_input_ids"] = pad_rows(ids, pad_id)
        batch[f"{side}_attention_mask"] = pad_rows([[1] * len(row) for row in ids], 0)
        batch[f"{side}_labels"] = pad_rows([row[f"{side}_labels"] for row in rows], IGNORED)
    return batch


# By the trainer: from a token to pad with, and rows, to a batch.
COLLATE: dict[str, Callable[[int, Sequence[Row]], Row]] = {
    "dpo": _of_dpo,
    "kto": _of_kto,
    "cpo": _of_cpo,
    "orpo": _of_cpo,
}
