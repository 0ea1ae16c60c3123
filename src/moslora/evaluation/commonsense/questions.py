"""Commonsense questions in the LLM-Adapters format, by the published protocol and by log-likelihood.

A task is a folder with ``test.json``: a list of ``instruction``, ``input``, ``output`` and ``answer``, as published
with LLM-Adapters (arXiv:2304.01933) and used by MoSLoRA's authors. Prompts, patterns and settings are theirs to the
letter, odd white space included, because a model is sensitive to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moslora.bounded import read_json
from moslora.errors import UsageError
from moslora.files import write_text

__all__ = [
    "COMMONSENSE_TASKS",
    "PUBLISHED",
    "REPORTED",
    "Question",
    "Reported",
    "answer_text_prompt",
    "eval_prompt",
    "extract",
    "read_questions",
    "write_answer_texts",
    "write_training_file",
]

TRAIN_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.  \n"
    "\n"
    "                ### Instruction:\n"
    "                {instruction}\n"
    "                \n"
    "                ### Response:\n"
    "                {output}"
)
TRAIN_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides "
    "further context. Write a response that appropriately completes the request. \n"
    "\n"
    "                ### Instruction:\n"
    "                {instruction}\n"
    "                \n"
    "                ### Input:\n"
    "                {input}\n"
    "                \n"
    "                ### Response:\n"
    "                {output}"
)
EVAL_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request. \n"
    "\n"
    "                ### Instruction:\n"
    "                {instruction}\n"
    "\n"
    "                ### Response:\n"
    "                "
)
EVAL_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides "
    "further context. Write a response that appropriately completes the request.\n"
    "\n"
    "                ### Instruction:\n"
    "                {instruction}\n"
    "\n"
    "                ### Input:\n"
    "                {input}\n"
    "\n"
    "                ### Response:\n"
    "                "
)
SPLIT_AT = "### Response:"
# Of the published evaluation; temperature, top-p and top-k are named there too, without effect on beams.
BEAMS, NEW_TOKENS = 4, 32

# What an answer looks like; the first match counts, none is wrong.
COMMONSENSE_TASKS: dict[str, str] = {
    "boolq": "true|false",
    "piqa": "solution1|solution2",
    "social_i_qa": "answer1|answer2|answer3|answer4|answer5",
    "ARC-Challenge": "answer1|answer2|answer3|answer4|answer5",
    "ARC-Easy": "answer1|answer2|answer3|answer4|answer5",
    "openbookqa": "answer1|answer2|answer3|answer4|answer5",
    "hellaswag": "ending1|ending2|ending3|ending4",
    "winogrande": "option1|option2",
}

# MoSLoRA on LLaMA-3-8B-Instruct as published, in percent (arXiv:2406.11909, table 2); HellaSwag follows from the mean.
PUBLISHED: dict[str, float] = {
    "boolq": 74.6,
    "piqa": 89.7,
    "social_i_qa": 81.0,
    "winogrande": 85.8,
    "ARC-Easy": 90.5,
    "ARC-Challenge": 81.5,
    "openbookqa": 86.8,
    "hellaswag": 94.9,
}


@dataclass(frozen=True)
class Reported:
    """Mean accuracy over the eight tasks, as others report it.

    Attributes:
        source: Who.
        model: Which base.
        setting: Rank, and how the learning rate was found.
        lora, moslora: In percent.
    """

    source: str
    model: str
    setting: str
    lora: float
    moslora: float


# By the authors, and by others who ran both methods.
REPORTED: tuple[Reported, ...] = (
    Reported("arXiv:2406.11909 (the authors)", "LLaMA-3-8B-Instruct", "r 16, one rate", 82.8, 85.6),
    Reported("StelLA, arXiv:2510.01938", "LLaMA-3-8B", "r 32, rate tuned, 3 runs", 85.27, 85.13),
    Reported("StelLA, arXiv:2510.01938", "LLaMA-2-7B", "r 32, rate tuned, 3 runs", 80.76, 80.44),
    Reported("D2MoRA, AAAI 2026", "LLaMA-7B", "r 64", 74.32, 76.01),
    Reported("D2MoRA, AAAI 2026", "LLaMA-2-7B", "r 64", 76.02, 78.11),
)


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        place: Where it stands in its file.
        instruction, given: What the prompt is made of; ``given`` is the format's ``input``.
        answer: The right label, as ``answer2``.
        stem: The question alone, without choices and format; empty if they could not be told apart.
        choices: Each label's text; a label stands for itself where the question lists no texts (true/false).
    """

    place: str
    instruction: str
    given: str
    answer: str
    stem: str
    choices: Mapping[str, str]


def read_questions(folder: Path, task: str, limit: int | None = None, split: str = "test") -> list[Question]:
    """Read a task's questions.

    Args:
        folder: Holds one folder per task.
        task: A key of ``COMMONSENSE_TASKS``.
        limit: How many at most, at even distances; None for all.
        split: ``"test"`` or ``"train"``, the file's name.

    Returns:
        The questions.

    Raises:
        ValueError: If task or file cannot be used; names the place.
    """
    if task not in COMMONSENSE_TASKS:
        raise UsageError(f"Task {task!r} is unknown; choose from {', '.join(COMMONSENSE_TASKS)}.")
    file = Path(folder) / task / f"{split}.json"
    try:
        rows = read_json(file)
    except FileNotFoundError:
        raise UsageError(f"{file} does not exist; it comes with LLM-Adapters' datasets.") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}.") from error
    if not isinstance(rows, list) or not rows:
        raise UsageError(f"{file} must be a list of at least one question.")
    found = [_question(task, file, index, row) for index, row in enumerate(rows, 1)]
    if limit is not None and limit < len(found):
        found = [found[i * len(found) // limit] for i in range(limit)]
    return found


def _question(task: str, file: Path, index: int, row: Any) -> Question:
    place = f"{task} {index}"
    if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in ("instruction", "answer")):
        raise UsageError(f"{file}, question {index}: instruction and answer must be texts.")
    labels = COMMONSENSE_TASKS[task].split("|")
    if row["answer"] not in labels:
        raise UsageError(f"{file}, question {index}: answer {row['answer']!r} is not one of {labels}.")
    stem, choices = _parts(row["instruction"], labels)
    if row["answer"] not in choices:
        raise UsageError(
            f"{file}, question {index}: the right answer {row['answer']!r} is not among its choices."
        )
    return Question(place, row["instruction"], row.get("input") or "", row["answer"], stem, choices)


def _parts(instruction: str, labels: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Take an instruction apart into its question and each choice's text."""
    body, _, form = instruction.rpartition("Answer format:")
    body = (body or instruction).strip()
    listed = [label for label in form.strip().split("/") if label in labels] or list(labels)
    # "Answer1: … Answer2: …": labels with a capital, in order, each once after the one before.
    places, at = [], 0
    for label in listed:
        mark = f"{label.capitalize()}:"
        start = body.find(mark, at)
        if start < 0:
            break
        places.append((start, start + len(mark)))
        at = start + len(mark)
    stem = re.sub(
        r"^Please [^:]*?: ?(?=\S)", "", body[: places[0][0]] if places else body, flags=re.DOTALL
    ).strip()
    if len(places) < len(listed):
        return re.sub(r"^Please [^:]*?question: ?", "", body).strip(), {label: label for label in listed}
    ends = [start for start, _ in places[1:]] + [len(body)]
    texts = [body[begin:end].strip() for (_, begin), end in zip(places, ends, strict=True)]
    return stem, dict(zip(listed, texts, strict=True))


def eval_prompt(question: Question) -> str:
    """Return the published prompt of a question, to the letter."""
    if question.given:
        return EVAL_PROMPT_WITH_INPUT.format(instruction=question.instruction, input=question.given)
    return EVAL_PROMPT.format(instruction=question.instruction)


def extract(task: str, text: str) -> str:
    """Find the answer in what a model wrote, as published: the first match, or nothing."""
    found = re.search(COMMONSENSE_TASKS[task], text.split(SPLIT_AT)[0].strip())
    return found[0] if found else ""


def answer_text_prompt(question: Question) -> str:
    """Return the question alone, as the protocol ``answer-text`` asks it."""
    return f"Question: {question.stem}\nAnswer:"


def write_answer_texts(questions: Sequence[Question], out: Path) -> int:
    """Write questions with the right choice's text as completion, for a recipe with ``data.template=plain``.

    Args:
        questions: Those whose choices have texts; others are left out.
        out: The JSONL to write, of ``prompt`` and ``completion``.

    Returns:
        How many examples.
    """
    lines = []
    for question in questions:
        text = question.choices[question.answer]
        if text != question.answer:
            example = {"prompt": answer_text_prompt(question), "completion": f" {text}"}
            lines.append(json.dumps(example, ensure_ascii=False) + "\n")
    write_text(Path(out), "".join(lines))
    return len(lines)


def write_training_file(source: Path, out: Path) -> int:
    """Write training data with the published prompts, for a recipe with ``data.template=plain``.

    Args:
        source: A list of ``instruction``, ``input`` and ``output``, as ``commonsense_170k.json``.
        out: The JSONL to write, of ``prompt`` and ``completion``.

    Returns:
        How many examples.
    """
    rows = json.loads(Path(source).read_text(encoding="utf-8"))
    lines = []
    for row in rows:
        form = TRAIN_PROMPT_WITH_INPUT if row.get("input") else TRAIN_PROMPT
        prompt, _, _ = form.partition("{output}")
        prompt = prompt.format(instruction=row["instruction"], input=row.get("input", ""))
        lines.append(json.dumps({"prompt": prompt, "completion": row["output"]}, ensure_ascii=False) + "\n")
    write_text(Path(out), "".join(lines))
    return len(lines)
