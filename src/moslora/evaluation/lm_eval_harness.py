"""Tasks of EleutherAI's lm-evaluation-harness (``lm_eval``), base and adapter side by side on the same items.

The harness loads no model here: it receives the one whose adapter was proven to be active, because an evaluation that
loads the base alone looks like an adapter without effect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from moslora.bounded import read_text
from moslora.errors import UsageError
from moslora.recipe.yaml_core import load_bounded
from moslora.wording import did_you_mean, first_line

__all__ = ["Harness", "TaskScores"]

# Requests that the harness sends to the model at once.
HARNESS_BATCH = 8


class TaskScores:
    """What the harness found in one task.

    Args:
        name: Of the task.
        metrics: Value by name, of those that are numbers.
        errors: The harness's own standard errors, by the same names.
        samples: One per item, as the harness logs them.
    """

    def __init__(
        self,
        name: str,
        metrics: Mapping[str, float],
        errors: Mapping[str, float],
        samples: Sequence[Mapping[str, Any]],
    ) -> None:
        self.name, self.metrics, self.errors = name, dict(metrics), dict(errors)
        filters = list(dict.fromkeys(str(sample["filter"]) for sample in samples))
        self.samples = sorted(samples, key=lambda s: (filters.index(str(s["filter"])), int(s["doc_id"])))

    def items(self, metric: str) -> list[Mapping[str, Any]]:
        """Return the items that a metric was taken over; a task with several filters logs each item for each of them.

        Args:
            metric: A key of ``metrics``, ``NAME,FILTER``.
        """
        return [sample for sample in self.samples if sample["filter"] == metric.partition(",")[2]]

    def per_item(self, metric: str) -> list[float] | None:
        """Return the metric of every item; None where it is not the mean of single items' numbers, as a perplexity.

        Args:
            metric: A key of ``metrics``.
        """
        found = []
        for sample in self.items(metric):
            value: Any = sample.get(metric.partition(",")[0])
            if not hasattr(value, "__float__"):
                return None
            found.append(float(value))
        if not found or not math.isclose(fmean(found), self.metrics[metric], rel_tol=1e-6, abs_tol=1e-9):
            return None
        return found

    def outputs(self) -> list[Any]:
        """Return what the model gave for each item: likelihoods, or text."""
        return [sample["resps"] for sample in self.samples]

    def answers(self) -> list[tuple[str, str]]:
        """Return for each item, in words, what is right and what the model chose or wrote.

        Of several continuations the likeliest is what the model chose (as ``acc`` has it; ``acc_norm`` divides by
        their lengths).
        """
        found = []
        for sample in self.samples:
            target, given = sample.get("target"), sample["filtered_resps"]
            choices = _continuations(sample)
            if len(choices) == len(given) > 1 and all(_is_likelihood(one) for one in given):
                best = max(range(len(given)), key=lambda n: float(given[n][0]))
                if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(choices):
                    target = choices[target].strip()
                given = choices[best].strip()
            elif isinstance(given, list) and len(given) == 1 and isinstance(given[0], str):
                given = given[0]
            found.append((str(target), str(given)))
        return found

    def prompts(self) -> list[str]:
        """Return what the model was asked for each item."""
        return [_context(sample) for sample in self.samples]


def _requests(sample: Mapping[str, Any]) -> list[list[Any]]:
    """Return what each request was made of; the harness logs lists, or dictionaries in its files."""

    def values(of: Any) -> list[Any]:
        return list(of) if isinstance(of, list | tuple) else list(of.values())

    return [values(request) for request in values(sample["arguments"])]


def _context(sample: Mapping[str, Any]) -> str:
    """Return the first request's text."""
    return str(_requests(sample)[0][0])


def _continuations(sample: Mapping[str, Any]) -> list[str]:
    """Return what followed each request's text, where all share one; else nothing."""
    requests = _requests(sample)
    if len({str(request[0]) for request in requests}) != 1 or any(len(request) < 2 for request in requests):
        return []
    return [str(request[1]) for request in requests]


def _is_likelihood(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], float)


class Harness:
    """Tasks, found and ready to be run on several models.

    Args:
        tasks: Names that the harness knows, groups among them, or paths of its YAML files.
        limit: Items at most, of each task; the harness takes the first.

    Raises:
        ValueError: If ``lm_eval`` is not installed, or a task is unknown to it.
    """

    def __init__(self, tasks: Sequence[str], limit: int | None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UsageError(f"lm-eval is not installed ({error}): pip install 'moslora[lm-eval]'") from error
        self.limit = limit
        files = {name: Path(name) for name in tasks if Path(name).suffix in (".yaml", ".yml")}
        for name, file in files.items():
            if not file.is_file():
                raise UsageError(f"{name} does not exist; name a YAML file of lm-eval, or a task.")
        folders = sorted({str(file.absolute().parent) for file in files.values()})
        own = {name: _task_of(file) for name, file in files.items()}
        # Thousands of the harness's own files need not be read where none is asked for; a group may name some.
        needs_own = any(name not in own or own[name][1] == "group" for name in tasks)
        self.manager = TaskManager(include_path=folders or None, include_defaults=needs_own)
        self.names = [own[name][0] if name in own else name for name in tasks]
        known = set(self.manager.all_tasks)
        for name in self.names:
            if name not in known:
                raise UsageError(f"lm-eval has no task {name!r}.{did_you_mean(name, known)}")

    def run(self, model: Any, tokenizer: Any) -> list[TaskScores]:
        """Run the tasks on a model.

        Args:
            model: A causal language model, with its adapter or without.
            tokenizer: Its tokenizer.

        Returns:
            What was found, per task, and per group without items.

        Raises:
            ValueError: If a task's data cannot be had.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        from moslora.compat.lm_eval import quiet_lm_eval

        with quiet_lm_eval():
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=HARNESS_BATCH)
        if lm.model is not model:
            raise UsageError(
                "lm-eval ran a different model than it received; this version of lm-eval cannot be used."
            )
        try:
            with quiet_lm_eval():
                found = simple_evaluate(
                    lm, tasks=list(self.names), limit=self.limit, task_manager=self.manager, log_samples=True
                )
        except (OSError, ConnectionError) as error:
            first = first_line(error)
            raise UsageError(f"lm-eval could not get the data of {', '.join(self.names)}: {first}") from error
        samples = found.get("samples", {})
        return [_scores(name, values, samples.get(name, [])) for name, values in found["results"].items()]


def _scores(name: str, values: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> TaskScores:
    numbers = {key: float(v) for key, v in values.items() if "," in key and isinstance(v, int | float)}
    errors = {key.replace("_stderr,", ","): v for key, v in numbers.items() if "_stderr," in key}
    metrics = {key: v for key, v in numbers.items() if "_stderr," not in key}
    return TaskScores(name, metrics, errors, samples)


def _task_of(file: Path) -> tuple[str, str]:
    """Return what a file defines, and whether it is a task or a group."""
    import yaml

    try:
        # The harness's own tags (!function) name code; here only the name is read.
        found = load_bounded(_without_tags(read_text(file)))
        for kind in ("group", "task"):
            if isinstance(found.get(kind), str):
                return found[kind], kind
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UsageError(f"{file} cannot be read: {' '.join(str(error).split())}.") from error
    raise UsageError(f"{file} is not a task of lm-eval: it has no line task: NAME.")


def _without_tags(text: str) -> str:
    import re

    return re.sub(r"!\w+\s+", "", text)
