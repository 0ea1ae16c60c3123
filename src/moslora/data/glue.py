"""GLUE's nine tasks (A. Wang and others, arXiv:1804.07461): columns, labels, and the metric that papers report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["GLUE", "GlueTask"]


@dataclass(frozen=True)
class GlueTask:
    """One of the tasks.

    Attributes:
        columns: Its columns by ours, beside ``label``.
        labels: Names of its labels in order; None where a label is a number to be predicted.
        metric: What is reported, a metric of ``task.metric``.
        heldout_split: The split with public labels that papers report on.
    """

    columns: Mapping[str, str]
    labels: tuple[str, ...] | None
    metric: str
    heldout_split: str = "validation"


def _pair(one: str, two: str) -> dict[str, str]:
    return {"text": one, "text_pair": two}


ENTAILMENT = ("entailment", "not_entailment")
PARAPHRASE = ("not_equivalent", "equivalent")
# As huggingface.co/datasets/nyu-mll/glue has them. WNLI's 0 is "no".
GLUE: dict[str, GlueTask] = {
    "cola": GlueTask({"text": "sentence"}, ("unacceptable", "acceptable"), "mcc"),
    "sst2": GlueTask({"text": "sentence"}, ("negative", "positive"), "accuracy"),
    "mrpc": GlueTask(_pair("sentence1", "sentence2"), PARAPHRASE, "f1"),
    "qqp": GlueTask(_pair("question1", "question2"), ("not_duplicate", "duplicate"), "f1"),
    "stsb": GlueTask(_pair("sentence1", "sentence2"), None, "pearson"),
    "mnli": GlueTask(
        _pair("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        "validation_matched",
    ),
    "qnli": GlueTask(_pair("question", "sentence"), ENTAILMENT, "accuracy"),
    "rte": GlueTask(_pair("sentence1", "sentence2"), ENTAILMENT, "accuracy"),
    "wnli": GlueTask(_pair("sentence1", "sentence2"), ("not_entailment", "entailment"), "accuracy"),
}
