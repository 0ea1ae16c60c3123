"""The benchmarks that are known: how each is asked, read and scored, and by what its file is recognized.

A file is known by its checksum, else by its name, else by what the user says; what is unknown is refused, because a
benchmark's name alone decides how VLMEvalKit scores it.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moslora.errors import UsageError
from moslora.evaluation.benchmarks.tsv import LETTERS, BenchmarkFile, Item
from moslora.wording import did_you_mean, one_line

__all__ = ["BENCHMARKS", "NINE", "Benchmark", "find_benchmark", "read_choices"]


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is asked, read and scored.

    Attributes:
        name: As VLMEvalKit names it.
        kind: ``"choice"``, ``"yes-no"``, ``"text"``, or ``"judged"`` by another model.
        score: What its headline number is, a key of ``scores.SCORES``.
        rule: For texts a key of ``rules.TEXT_RULES``.
        circular: Whether a question is asked once per rotation of its options, and right if all rotations are.
        sentence: What the published prompt adds to a question on a line of its own.
        new_tokens: Most tokens of an answer.
        unit: What is drawn at random, and what an interval is over: ``"question"``, ``"picture"``, ``"set"`` or
            ``"row"``.
        md5: Of published files.
        note: What to know about its score.
    """

    name: str
    kind: str
    score: str = "accuracy"
    rule: str = ""
    circular: bool = False
    sentence: str = ""
    new_tokens: int = 5
    unit: str = "row"
    md5: frozenset[str] = field(default=frozenset(), repr=False)
    note: str = ""


ONE_WORD = "Answer the question using a single word or phrase."
# VLMEvalKit's LLaVA-XTuner wrapper takes 5 new tokens for choices and yes or no, and 512 for the rest. Asked for a word
# or a phrase, an answer of more than 128 tokens is not right by any of the rules, and is not waited for.
PHRASE_TOKENS = 128
LONG_TOKENS = 512


def _choice(name: str, *md5: str, **more: object) -> Benchmark:
    return replace(Benchmark(name, "choice", md5=frozenset(md5)), **more)  # type: ignore[arg-type]


def _circular(name: str, *md5: str) -> Benchmark:
    return _choice(name, *md5, score="circular", circular=True, unit="question")


def _text(name: str, rule: str, *md5: str, **more: object) -> Benchmark:
    base = Benchmark(name, "text", rule, rule, new_tokens=PHRASE_TOKENS, md5=frozenset(md5), unit="picture")
    return replace(base, **more)  # type: ignore[arg-type]


# Checksums are those of VLMEvalKit's DATASET_MD5 (image_mcq.py, image_yorn.py, image_vqa.py).
_ALL = (
    _circular("MMBench_DEV_EN", "b6caf1133a01c6bb705cf753bb527ed8"),
    _circular("MMBench_TEST_EN", "6939fadb0ce626fefc0bdc9c64efc528"),
    _circular("MMBench_DEV_CN", "08b8fc3324a5ed74155350f57be69fbd"),
    _circular("MMBench_TEST_CN", "7e1239baf0ee4c8b513e19705a0f317e"),
    _circular("MMBench", "4115aea3383f3dd0083be6a633e0f820"),
    _circular("MMBench_CN", "2e053ffc90ea598b1feae13c36dc13ee"),
    _circular("MMBench_DEV_EN_V11", "30c05be8f2f347a50be25aa067248184"),
    _circular("MMBench_TEST_EN_V11", "26f0f15381a21720255091d3e0316ce6"),
    _circular("MMBench_DEV_CN_V11", "593f9b5f6bea453d870a798b34ae4f37"),
    _circular("MMBench_TEST_CN_V11", "74bbe4556dac745613c7cbe5ad787050"),
    _circular("MMBench_V11", "b9276414f57af1308dcc4d0cd9b42e7c"),
    _circular("MMBench_CN_V11", "95f6980dd1b4de38e3cbffe0305a3f25"),
    _circular("CCBench", "f5dde47f24dc5a6fb6e595b409b466ac"),
    _choice("SEEDBench_IMG", "68017231464752261a2526d6ca3a10c0", unit="picture"),
    _choice("AI2D_TEST", "0f593e0d1c7df9a3d69bf1f947e71975", unit="picture"),
    _choice("AI2D_TEST_NO_MASK", "fd8f463634d4fe9fbd23b876e8eea5be", unit="picture"),
    _choice("ScienceQA_VAL", "96320d05e142e585e7204e72affd29f3"),
    _choice("ScienceQA_TEST", "e42e9e00f9c59a80d8a5db35bc32b71f"),
    _choice("MMStar", "e1ecd2140806c1b1bbf54b43372efb9e"),
    _choice("RealWorldQA", "4de008f55dc4fd008ca9e15321dc44b7"),
    _choice(
        "MMMU_DEV_VAL",
        "585e8ad75e73f75dcad265dfd0417d64",
        note="Questions without options count as right if the answer's text occurs.",
    ),
    _choice("MMMU_TEST", "c19875d11a2d348d07e5eb4bdf33166d"),
    Benchmark("MME", "yes-no", "mme", unit="picture", md5=frozenset({"b36b43c3f09801f5d368627fb92187c3"})),
    Benchmark("POPE", "yes-no", "f1", unit="picture", md5=frozenset({"c12f5acb142f2ef1f85a26ba2fbe41d5"})),
    Benchmark(
        "HallusionBench",
        "yes-no",
        "hallusion",
        unit="set",
        md5=frozenset({"0c23ac0dc9ef46832d7a24504f2a0c7c"}),
    ),
    _text("TextVQA_VAL", "vqa", "b233b31f551bbf4056f2f955da3a92cd", sentence=ONE_WORD),
    _text("DocVQA_VAL", "anls", "d5ee77e1926ff10690d469c56b73eabf", sentence=ONE_WORD),
    _text("DocVQA_TEST", "anls", "6a2f28cac26ef2d3447374e8c6f6c8e9", sentence=ONE_WORD),
    _text("InfoVQA_VAL", "anls", "2342e9c225222f0ef4dec545ebb126fe", sentence=ONE_WORD),
    _text("InfoVQA_TEST", "anls", "df535bf51b88dc9718252c34131a6227", sentence=ONE_WORD),
    _text("ChartQA_TEST", "relaxed", "c902e0aa9be5582a7aad6dcf52734b42", sentence=ONE_WORD),
    _text("OCRBench", "contains", "e953d98a987cc6e26ef717b61260b778", new_tokens=LONG_TOKENS),
    Benchmark(
        "MathVista_MINI",
        "judged",
        "mathvista",
        new_tokens=LONG_TOKENS,
        md5=frozenset({"f199b98e178e5a2a20e7048f5dcb0464"}),
        note="Only its questions with options are scored by rule; the published score needs a judge for the others.",
    ),
    Benchmark(
        "MMVet",
        "judged",
        "judged",
        new_tokens=LONG_TOKENS,
        md5=frozenset({"748aa6d4aa9d4de798306a63718455e3"}),
        note="Its answers are graded by GPT-4.",
    ),
    Benchmark(
        "LLaVABench",
        "judged",
        "judged",
        new_tokens=LONG_TOKENS,
        md5=frozenset({"d382a093f749a697820d3dadd61c8428"}),
        note="Its answers are graded by GPT-4.",
    ),
)
BENCHMARKS: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}

# What the paper's mean is over, any of each line's files; MME in percent of 2800 (arXiv:2406.11909, section 4.2).
NINE: Mapping[str, tuple[str, ...]] = {
    "MMBench EN": ("MMBench_TEST_EN", "MMBench", "MMBench_DEV_EN"),
    "MMBench CN": ("MMBench_TEST_CN", "MMBench_CN", "MMBench_DEV_CN"),
    "SEED-Bench": ("SEEDBench_IMG",),
    "AI2D": ("AI2D_TEST",),
    "ScienceQA": ("ScienceQA_TEST", "ScienceQA_VAL"),
    "TextVQA": ("TextVQA_VAL",),
    "MathVista": ("MathVista_MINI",),
    "MM-Vet": ("MMVet",),
    "MME": ("MME",),
}

# What users may call a kind of benchmark that has no name here; ``--as`` takes these, too.
GENERIC: Mapping[str, Benchmark] = {
    "choice": _choice("choice"),
    "circular": _circular("circular"),
    "yes-no": Benchmark("yes-no", "yes-no"),
    **{rule: _text(rule, rule, sentence=ONE_WORD) for rule in ("vqa", "anls", "relaxed")},
    "contains": _text("contains", "contains", new_tokens=LONG_TOKENS),
}


def find_benchmark(file: BenchmarkFile, named: str | None = None) -> tuple[Benchmark, str]:
    """Find out which benchmark a file holds.

    Args:
        file: The file.
        named: What the user calls it, a key of ``BENCHMARKS`` or ``GENERIC``; None to find out.

    Returns:
        The benchmark, and how it was recognized: ``"checksum"``, ``"name"`` or ``"as named"``.

    Raises:
        UsageError: If it is none that is known, or its columns are not that benchmark's.
    """
    known = {**BENCHMARKS, **GENERIC}
    if named is not None:
        if named not in known:
            hint = did_you_mean(named, known)
            raise UsageError(
                f"{named} is not a benchmark that is known.{hint} Choose from {', '.join(known)}."
            )
        found, how = known[named], "as named"
    else:
        by_md5 = next((benchmark for benchmark in _ALL if file.md5 in benchmark.md5), None)
        by_name = BENCHMARKS.get(file.path.stem.removesuffix("_local"))
        chosen = by_md5 or by_name
        if chosen is None:
            raise UsageError(
                f"{file.path.name} is not a benchmark that is known, by its checksum or its name. Say what it is: --as "
                f"NAME, one of {', '.join(known)}."
            )
        found, how = chosen, "checksum" if by_md5 else "name"
    _check_columns(found, file)
    return found, how


def _check_columns(benchmark: Benchmark, file: BenchmarkFile) -> None:
    needed = {"choice": ("A", "B"), "mme": ("category",), "mathvista": ("question_type",)}
    wanted = needed.get(benchmark.kind, ()) + needed.get(benchmark.score, ())
    missing = [name for name in wanted if name not in file.columns]
    if missing:
        raise UsageError(
            f"{file.path.name} is taken for {benchmark.name}, and has no column {missing[0]}; its columns are "
            f"{', '.join(file.columns)}. Say what it is with --as."
        )
    for item in file.items:
        fault = _fault_of(benchmark, item)
        if fault:
            raise UsageError(
                f"{file.path}, line {item.line}, index {item.index}: {fault}. {file.path.name} is taken for "
                f"{benchmark.name}; say what it is with --as, or correct the row."
            )


def _fault_of(benchmark: Benchmark, item: Item) -> str:
    """Return what would make a row count as wrong whatever is answered, or be grouped with others; empty if nothing."""
    answer = item.cells.get("answer")
    if benchmark.circular and not item.index.isdecimal():
        return "rotations of a question are told by the index, which is no whole number"
    if benchmark.score == "hallusion" and item.index.count("_") < 5:
        return "set, figure and question are parts four to six of the index, joined by underscores"
    if benchmark.kind == "yes-no" and answer not in (None, "Yes", "No"):
        return f"the answer {one_line(answer, 40)!r} is neither Yes nor No"
    if benchmark.kind == "choice" and answer is not None and item.options and answer not in item.options:
        return f"the answer {one_line(answer, 40)!r} is not among the options {', '.join(item.options)}"
    if benchmark.score == "mathvista" and item.cells.get("question_type") == "multi_choice":
        choices = read_choices(item.cells.get("choices", ""))
        letters = LETTERS[: len(choices)]
        if item.cells.get("answer_option") not in letters:
            return f"answer_option is not one of the letters of its {len(choices)} choices"
    return ""


def read_choices(cell: str) -> list[str]:
    """Return the texts of MathVista's column ``choices``, a Python list; empty if it is none.

    Args:
        cell: The cell.
    """
    try:
        found = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []  # which the check of the row refuses
    return [str(text) for text in found] if isinstance(found, list) else []
