"""The trainer's arguments of ``task: classification``: transformers' own, and the limit of an example's length.

Imported inside functions: it imports transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from transformers import TrainingArguments

__all__ = ["ClassifierArguments"]


@dataclass
class ClassifierArguments(TrainingArguments):  # type: ignore[misc]
    """Arguments of transformers' trainer.

    Attributes:
        max_length: Tokens of an example at most, special tokens included; longer ones are handled as ``data.too_long``
            says. None for as many as the model has positions for.
    """

    max_length: Optional[int] = field(default=512)  # noqa: UP045 - TrainingArguments' parser reads it
