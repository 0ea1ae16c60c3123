"""The commonsense tasks, by the published protocol and by likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moslora.display import Display
from moslora.errors import UsageError
from moslora.evaluation.active import PROBES, as_inputs, prove_active, with_adapter
from moslora.evaluation.commonsense.questions import (
    BEAMS,
    COMMONSENSE_TASKS,
    NEW_TOKENS,
    PUBLISHED,
    Question,
    answer_text_prompt,
    eval_prompt,
    extract,
    read_questions,
)
from moslora.evaluation.judge import Judge, Subject, load_judge
from moslora.evaluation.own_data import compare_shares
from moslora.evaluation.results import Report

__all__ = ["PROTOCOLS"]


# Questions generated at once; beams multiply it. The published script takes one, which gives the same beams.
QUESTION_BATCH = 8


Protocol = Callable[[Any, Judge, str, Sequence[Question]], list[tuple[str, str]]]


def _generate(model: Any, judge: Judge, task: str, questions: Sequence[Question]) -> list[tuple[str, str]]:
    """Ask as published: the exact prompt, four beams, and the first match of the task's pattern."""
    from moslora.tasks.language import pad_token_of
    from moslora.tasks.text.generation import Generation, generate_from_prompts

    tokenizer = judge.tokenizer
    stop_ids = model.generation_config.eos_token_id or tokenizer.eos_token_id
    settings = Generation(NEW_TOKENS, stop_ids, pad_token_of(tokenizer), BEAMS)
    prompts = [tokenizer(eval_prompt(question), verbose=False)["input_ids"] for question in questions]
    with judge.display.progress(f"{task}, answers", len(prompts)) as progress:
        texts = generate_from_prompts(
            model, tokenizer, prompts, settings, judge.device, QUESTION_BATCH, progress.advance
        )
    return [(extract(task, text), text) for text in texts]


def _likeliest(
    prompt: Callable[[Question], str], choice: Callable[[str, str], str], by_length: bool
) -> Protocol:
    """Make a protocol that takes the likeliest choice."""

    def judge_all(
        model: Any, judge: Judge, task: str, questions: Sequence[Question]
    ) -> list[tuple[str, str]]:
        from moslora.metrics.choices import score_choices

        found = []
        with judge.display.progress(f"{task}, choices", len(questions)) as progress:
            for question in questions:
                texts = [choice(label, text) for label, text in question.choices.items()]
                scores = score_choices(model, judge.tokenizer, prompt(question), texts, judge.device)
                if by_length:
                    scores = [s / len(t.encode()) for s, t in zip(scores, texts, strict=True)]
                best = max(range(len(scores)), key=lambda i: scores[i])
                label = list(question.choices)[best]
                found.append((label, question.choices[label]))
                progress.advance()
        return found

    return judge_all


PROTOCOLS: dict[str, Protocol] = {
    "published": _generate,
    # The same prompt; which of "the correct answer is answer1", "… answer2" is likeliest. No answer goes unread.
    "label": _likeliest(eval_prompt, lambda label, text: f"the correct answer is {label}", False),
    # The question alone; which answer's text is likeliest, per byte. For models that know no labels.
    "answer-text": _likeliest(answer_text_prompt, lambda label, text: f" {text}", True),
}


def evaluate_commonsense(
    subject: Subject,
    display: Display,
    adapter: Path | None,
    data: str | None,
    tasks: Sequence[str],
    protocols: Sequence[str],
    limit: int | None,
) -> Report:
    if data is None:
        raise UsageError(
            "Commonsense tasks need --data FOLDER, which holds one folder per task with its test.json."
        )
    names = _task_names(tasks, Path(data), display)
    questions = {name: read_questions(Path(data), name, limit) for name in names}
    judge, base = load_judge(subject, display)

    def judged(of: Any) -> dict[tuple[str, str], list[tuple[str, str]]]:
        """By protocol and task, each item's label and text."""
        return {(p, n): PROTOCOLS[p](of, judge, n, questions[n]) for p in protocols for n in names}

    before, after = judged(base), None
    activity = None
    if adapter is not None:
        adapted = with_adapter(base, adapter)
        probes = [
            judge.tokenizer(eval_prompt(q))["input_ids"] for q in next(iter(questions.values()))[:PROBES]
        ]
        activity = prove_active(adapted, adapter, as_inputs(probes), judge.device)
        after = judged(adapted)
    measures, lines = [], []
    for protocol, name in before:
        asked, found = questions[name], before[protocol, name]
        right = [label == q.answer for (label, _), q in zip(found, asked, strict=True)]
        found_then = None if after is None else after[protocol, name]
        then = None
        if found_then is not None:
            then = [label == q.answer for (label, _), q in zip(found_then, asked, strict=True)]
        last = found if found_then is None else found_then
        unread = sum(label == "" for label, _ in last) if protocol == "published" else None
        measures.append(
            compare_shares(name, right, then, published=PUBLISHED.get(name), protocol=protocol, unread=unread)
        )
        for index, q in enumerate(asked):
            lines.append(
                {
                    "place": q.place,
                    "protocol": protocol,
                    "prompt": q.instruction,
                    "reference": q.answer,
                    "base": found[index][1],
                    "base_label": found[index][0],
                    "base_ok": right[index],
                    "tuned": None if found_then is None else found_then[index][1],
                    "tuned_label": None if found_then is None else found_then[index][0],
                    "tuned_ok": None if then is None else then[index],
                }
            )
    said = ", ".join(protocols)
    return Report(subject.name, None if adapter is None else str(adapter), said, activity, measures, lines)


def _task_names(tasks: Sequence[str], data: Path, display: Display) -> list[str]:
    """Return the tasks asked for; ``commonsense`` alone means all whose data are there."""
    if list(tasks) != ["commonsense"]:
        return list(tasks)
    there = [name for name in COMMONSENSE_TASKS if (data / name / "test.json").is_file()]
    missing = [name for name in COMMONSENSE_TASKS if name not in there]
    if missing and there:
        display.warn(
            f"{data} has {len(there)} of the eight tasks; without {', '.join(missing)} their mean is not the published "
            "one."
        )
    return there or list(COMMONSENSE_TASKS)
