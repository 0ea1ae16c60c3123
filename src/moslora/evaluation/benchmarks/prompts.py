"""What a model is asked: the prompts of VLMEvalKit, and the shorter ones of the LLaVA family, to the letter.

A score depends on the prompt. ``"kit"`` is what VLMEvalKit asks a model that brings no prompt of its own; ``"llava"``
is what its LLaVA wrappers ask (and XTuner's, by which the paper's models were judged): the form of LLaVA's training
data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from moslora.evaluation.benchmarks.table import Benchmark
from moslora.evaluation.benchmarks.tsv import Item
from moslora.tasks.vision.processors import IMAGE

__all__ = ["PROMPTS", "prompt_for", "question_of_item"]

PROMPTS = ("llava", "kit")
CHINESE = re.compile("[\u4e00-\u9fff]")
# Pictures of MMMU stand inside the text.
PLACED = re.compile(r"<image (\d)>")
LETTER_ONLY = {
    True: "请直接回答选项字母。",
    False: "Answer with the option's letter from the given choices directly.",
}


def prompt_for(model_type: str) -> str:
    """Return the prompt that a family of models was trained on.

    Args:
        model_type: Of its configuration.
    """
    return "llava" if model_type.startswith("llava") else "kit"


def question_of_item(benchmark: Benchmark, item: Item, prompt: str) -> str:
    """Return what is asked, with ``<image>`` where each picture stands.

    Args:
        benchmark: Which benchmark it is.
        item: One of its rows.
        prompt: One of ``PROMPTS``.
    """
    cells = item.cells
    question = cells.get("question", "")
    options = item.options
    if benchmark.kind == "choice":
        text = _llava_choice(cells, options) if prompt == "llava" else _kit_choice(cells, options)
    else:
        text = f"{question}\n{benchmark.sentence}" if benchmark.sentence else question
    return _with_pictures(text, item.pictures)


def _llava_choice(cells: Mapping[str, str], options: Mapping[str, str]) -> str:
    lines = [cells["hint"]] if "hint" in cells else []
    lines += [cells.get("question", ""), *(f"{letter}. {text}" for letter, text in options.items())]
    text = "\n".join(lines)
    is_chinese = CHINESE.search(text) is not None
    if options:
        return f"{text}\n{LETTER_ONLY[is_chinese]}"
    return text + ("\n请直接回答问题。" if is_chinese else "\nAnswer the question directly.")


def _kit_choice(cells: Mapping[str, str], options: Mapping[str, str]) -> str:
    text = f"Hint: {cells['hint']}\n" if "hint" in cells else ""
    text += f"Question: {cells.get('question', '')}\n"
    if options:
        text += "Options:\n" + "".join(f"{letter}. {option}\n" for letter, option in options.items())
        text += "Please select the correct answer from the options above. \n"
    return text


def _with_pictures(text: str, pictures: int) -> str:
    """Put placeholders where the text has numbered ones, otherwise before it."""
    # A file's own <image> would be taken for a placeholder.
    text = text.replace(IMAGE, "< image >")
    numbers = [int(number) for number in PLACED.findall(text)]
    if numbers == list(range(1, pictures + 1)):
        return PLACED.sub(IMAGE, text)
    return IMAGE * pictures + "\n" + PLACED.sub(lambda found: f"picture {found[1]}", text)
