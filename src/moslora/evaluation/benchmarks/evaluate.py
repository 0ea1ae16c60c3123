"""Evaluate a vision-language model, and an adapter beside it, on published benchmarks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.display import Display
from moslora.distributed import Team
from moslora.errors import UsageError
from moslora.evaluation.active import prove_active, with_adapter
from moslora.evaluation.benchmarks.asking import Answers, Asker, first_logits, other_pictures
from moslora.evaluation.benchmarks.grading import answered_publicly, grade, scored, unit_of
from moslora.evaluation.benchmarks.prompts import PROMPTS, prompt_for, question_of_item
from moslora.evaluation.benchmarks.results import (
    BenchmarkReport,
    BenchmarkResult,
    remarks,
    write_predictions,
)
from moslora.evaluation.benchmarks.rules import RULES_VERSION, UNREAD
from moslora.evaluation.benchmarks.scores import compare_scores
from moslora.evaluation.benchmarks.table import BENCHMARKS, Benchmark, find_benchmark
from moslora.evaluation.benchmarks.tsv import BenchmarkFile, Item, read_benchmark_file
from moslora.evaluation.judge import Subject
from moslora.files import sha256, write_text
from moslora.reports.benchmarks import write_benchmark_report
from moslora.wording import evenly_spaced

if TYPE_CHECKING:
    from moslora.recipe.schema import VisionRecipe

__all__ = ["PROTOCOLS", "Wanted", "evaluate_benchmarks"]

PROTOCOLS = ("published", "letter")
RECOGNIZED = {"checksum": "by its checksum", "name": "by its name", "as named": "as --as says"}
PROBES = 4  # items on which the adapter has to show itself
SUBMISSION = (
    "The answers of this split are not in the file, so there is no score. The prediction file has every row; the "
    "benchmark's site, or VLMEvalKit with its answers, scores it."
)
JUDGE = (
    "It is scored by another model: in an environment with VLMEvalKit, vlmutil eval {predictions} --judge NAME reads "
    "the prediction file."
)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is evaluated on.

    Attributes:
        files: TSV files of benchmarks.
        named: What the user calls the file; only with one.
        limit: Most items of each; rotations of a question count as one.
        out: The folder for answers, scores and pages.
        prompt: One of ``PROMPTS``; None for that of the model's family.
        protocol: One of ``PROTOCOLS``.
        exchange: Whether each item is also asked about another's pictures.
    """

    files: Sequence[Path]
    out: Path
    named: str | None = None
    limit: int | None = None
    prompt: str | None = None
    protocol: str = "published"
    exchange: bool = True

    def check(self) -> None:
        """Refuse what does not fit together.

        Raises:
            UsageError: If something does not.
        """
        if self.named is not None and len(self.files) != 1:
            raise UsageError("--as names one file; give one, or leave it out.")
        for name, value, known in (
            ("--prompt", self.prompt, PROMPTS),
            ("--protocol", self.protocol, PROTOCOLS),
        ):
            if value is not None and value not in known:
                raise UsageError(f"{name} {value} is unknown; choose from {', '.join(known)}.")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit {self.limit} asks nothing; give 1 or more.")


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """A benchmark, its file, and the items that are asked."""

    benchmark: Benchmark
    known_by: str
    file: BenchmarkFile
    items: Sequence[Item]
    named: str


def evaluate_benchmarks(
    subject: Subject,
    recipe: VisionRecipe,
    display: Display,
    adapter: Path | None,
    wanted: Wanted,
    raise_if_stopped: Callable[[], None] = lambda: None,
    team: Team | None = None,
) -> BenchmarkReport:
    """Ask base and adapter, score both by the benchmarks' rules, and write answers, scores and predictions.

    Processes that a launcher started share the items; the first of them scores.

    Args:
        subject: The base.
        recipe: Of ``task: vision``; how the model is loaded.
        display: Where progress is shown.
        adapter: A directory that PEFT loads; None for the base alone.
        wanted: What is evaluated on.
        raise_if_stopped: Called after each batch.
        team: The processes that share the items; those that a launcher started by default.

    Returns:
        The report; ``report.json`` in its folder says the same.

    Raises:
        DataError, UsageError: If a file or setting cannot be used; before a model is loaded.
        ExistsError: If the folder has the answers of another evaluation.
        ProofError: If the adapter does nothing, or the base cannot be had by switching it off.
    """
    wanted.check()
    chosen = [_choose(path, wanted, display) for path in wanted.files]
    names = [one.named for one in chosen]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(
            f"Two files are {twice}; evaluate them one after the other, each with its own --out."
        )
    if wanted.protocol == "letter":
        for one in chosen:
            if one.benchmark.kind not in ("choice", "yes-no"):
                raise UsageError(
                    f"--protocol letter takes the likeliest option, and {one.benchmark.name} has none; run it without."
                )
    team = team or Team.join()
    asker, activity, identity = _load(subject, recipe, display, adapter, chosen, wanted)
    given, cut = [], []
    for one in chosen:
        kept = asker.kept(one.file, one.items)
        cut.append(kept.sentence() if kept is not None else "")
        if cut[-1]:
            display.warn(f"{one.named}: {cut[-1]}.")
        exchanged = other_pictures(one.items) if wanted.exchange else {}
        of = {"file": one.file.sha256, "benchmark": one.benchmark.name, "items": len(one.items)}
        answers = Answers(wanted.out / one.named, {**of, **identity}, team.rank)
        answers.open()
        team.wait()  # what is answered already is shared anew, so all must have read it before any adds to it
        left = [item for item in one.items if item.index not in answers.by_index]
        own = left[team.rank :: team.size]
        asker.ask(one.benchmark, one.file, own, exchanged, answers, raise_if_stopped)
        given.append(answers)
    team.wait()
    report = None
    if team.is_main_process:
        results = []
        for one, answers, sentence in zip(chosen, given, cut, strict=True):
            answers.read()
            results.append(_score(one, answers, asker, wanted, sentence))
        report = _report(subject, recipe, adapter, chosen, wanted, activity, results)
    found = team.broadcast(report)
    assert found is not None, "the first process made it"
    return found


def _report(
    subject: Subject,
    recipe: VisionRecipe,
    adapter: Path | None,
    chosen: Sequence[_Chosen],
    wanted: Wanted,
    activity: Any,
    results: Sequence[BenchmarkResult],
) -> BenchmarkReport:
    """Write the scores and their page."""
    report = BenchmarkReport(
        subject.name, None if adapter is None else str(adapter), wanted.out, activity, results
    )
    _write_page(report, chosen, recipe.data.max_pixels)
    write_text(wanted.out / "report.json", json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n")
    return report


def _write_page(report: BenchmarkReport, chosen: Sequence[_Chosen], max_pixels: int) -> None:
    files = {one.named: one.file for one in chosen}
    items = {name: {item.index: item for item in file.items} for name, file in files.items()}

    def pictures(name: str, index: str) -> list[Any]:
        return files[name].pictures(items[name][index], max_pixels)

    results = [
        {**dataclasses.asdict(result), "remarks": remarks(result), "items_table": result.items_table}
        for result in report.results
    ]
    title = report.model if report.adapter is None else f"{report.model} with {report.adapter}"
    write_benchmark_report(report.path, title, report.sentences(), results, pictures)


def _choose(path: Path, wanted: Wanted, display: Display) -> _Chosen:
    file = read_benchmark_file(path)
    benchmark, known_by = find_benchmark(file, wanted.named)
    display.say(f"{path}: {benchmark.name}, {RECOGNIZED[known_by]}; {len(file.items)} items.")
    items = _limited(benchmark, file.items, wanted.limit)
    name = benchmark.name if benchmark.name in BENCHMARKS else path.stem  # of a file of one's own
    return _Chosen(benchmark, known_by, file, items, name)


def _limited(benchmark: Benchmark, items: Sequence[Item], limit: int | None) -> Sequence[Item]:
    """Return so many items, evenly spread; a question with all its rotations, a picture with all its questions."""
    units: dict[str, list[Item]] = {}
    for item in items:
        units.setdefault(unit_of(benchmark, item), []).append(item)
    if benchmark.circular:
        _check_rotations(units)
    if limit is None or limit >= len(units):
        return items
    kept = {id(item) for unit in evenly_spaced(list(units.values()), limit) for item in unit}
    return [item for item in items if id(item) in kept]


def _check_rotations(units: Mapping[str, Sequence[Item]]) -> None:
    for question, rotations in units.items():
        if all(item.index != question for item in rotations):
            first = rotations[0]
            raise UsageError(
                f"line {first.line}, index {first.index}: a rotation of question {question}, whose own row is not in "
                "the file. Take the whole file."
            )


def _load(
    subject: Subject,
    recipe: VisionRecipe,
    display: Display,
    adapter: Path | None,
    chosen: Sequence[_Chosen],
    wanted: Wanted,
) -> tuple[Asker, Any, dict[str, Any]]:
    """Load the base, put the adapter into it, and prove that it works and can be switched off."""
    from moslora.tasks.vision.task import VisionTask

    task = VisionTask(recipe, display if display.quiet else Display(display.stream, quiet=True), lambda: None)
    task.base_model.handed_over = subject.model
    task.base_model.find(task.needs_weights)
    task.base_model.convert(display.say)
    encoder = task.make_encoder(None)
    base: Any = task.load()
    prompt = wanted.prompt or prompt_for(base.config.model_type)
    asker = Asker(
        base,
        False,
        encoder,
        task.device,
        display,
        recipe.data.max_pixels,
        recipe.data.square,
        prompt,
        letters=wanted.protocol == "letter",
    )
    activity = None
    if adapter is not None:
        one = chosen[0]
        probes = asker.probes(one.benchmark, one.file, one.items[:PROBES])
        before = [first_logits(base, inputs, task.device) for inputs in probes]
        asker.model, asker.has_adapter = with_adapter(base, adapter), True
        activity = prove_active(asker.model, adapter, probes, task.device)
        asker.prove_base(before, probes)
    identity = {
        # What the model holds; a folder may be called by another name the next time.
        "model": {k: v for k, v in task.base_model.fingerprint().items() if k not in ("kind", "name")},
        "adapter": None if adapter is None else _hash_of(adapter),
        "prompt": prompt,
        "square": recipe.data.square,
        "protocol": wanted.protocol,
        "exchanged": wanted.exchange,
        "rules": RULES_VERSION,
    }
    return asker, activity, identity


def _hash_of(adapter: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(adapter.iterdir()) if path.name.startswith("adapter_")}


def _score(one: _Chosen, answers: Answers, asker: Asker, wanted: Wanted, cut: str) -> BenchmarkResult:
    """Score the answers to one benchmark, and write its prediction files.

    Args:
        one: The benchmark.
        answers: Of all processes.
        asker: Who asked.
        wanted: What was asked for.
        cut: What the processor cuts off its pictures, as a sentence; empty for nothing.
    """
    benchmark, lines = one.benchmark, answers.by_index
    items = scored(benchmark, one.items)
    public = answered_publicly(benchmark, one.items)
    grades: dict[str, Any] = {}
    for column in ("base", "tuned", "base_exchanged", "tuned_exchanged"):
        own = [item for item in items if column in lines[item.index]]
        if public and own:
            grades[column] = dict(
                zip(
                    [item.index for item in own],
                    grade(benchmark, own, [lines[item.index][column] for item in own]),
                    strict=True,
                )
            )
    figures, exchanged, categories = _compared(benchmark, items, grades)
    files: dict[str, str] = {}
    folder = wanted.out / one.named
    for column in ("base", "tuned"):
        texts = {item.index: lines[item.index][column] for item in one.items if column in lines[item.index]}
        if texts and wanted.protocol == "published":
            written = write_predictions(one.file, texts, folder / f"{column}_{one.named}")
            files |= {f"{what}, {column}": path for what, path in written.items()}
    notes = [text for text in (benchmark.note, cut and f"Of a few pictures looked at, {cut}.") if text]
    if not public:
        notes.append(SUBMISSION)
    if benchmark.kind == "judged" and files:
        notes.append(JUDGE.format(predictions=next(iter(files.values()))))
    if len(one.items) < len(one.file.items):
        notes.append(f"{len(one.items)} of {len(one.file.items)} items were asked, evenly spread (--limit).")
    unread = {
        column: sum(row.found == UNREAD for row in rows.values())
        for column, rows in grades.items()
        if column in ("base", "tuned") and benchmark.kind != "text" and wanted.protocol == "published"
    }
    return BenchmarkResult(
        name=one.named,
        known_by=one.known_by,
        file=str(one.file.path),
        sha256=one.file.sha256,
        protocol=wanted.protocol,
        rules=RULES_VERSION,
        prompt=asker.prompt,
        items=len(one.items),
        figures=figures,
        exchanged=exchanged,
        categories=categories,
        unread=unread,
        without_picture=one.file.without_picture,
        read_as_empty=one.file.read_as_empty,
        notes=notes,
        files=files,
        items_table=[_item_line(one, item, lines[item.index], grades, asker.prompt) for item in one.items],
    )


def _compared(benchmark: Benchmark, items: Sequence[Item], grades: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return the scores, those with other pictures, and those by category."""
    if "base" not in grades:
        return [], [], []
    rows = {
        column: [found[item.index] for item in items if item.index in found]
        for column, found in grades.items()
    }
    figures, categories = compare_scores(benchmark.score, rows["base"], rows.get("tuned"))
    exchanged: Sequence[Any] = []
    if "base_exchanged" in rows:
        exchanged = compare_scores(benchmark.score, rows["base_exchanged"], rows.get("tuned_exchanged"))[0][
            :1
        ]
    return figures, exchanged, categories


def _item_line(
    one: _Chosen, item: Item, answers: Mapping[str, Any], grades: Mapping[str, Any], prompt: str
) -> dict[str, Any]:
    """Return what is known about one item, as a line of JSON."""
    line: dict[str, Any] = {
        "index": item.index,
        "line": item.line,
        "category": item.cells.get("category", ""),
        "prompt": question_of_item(one.benchmark, item, prompt),
        "reference": item.cells.get("answer", ""),
    }
    for column in ("base", "tuned", "base_exchanged", "tuned_exchanged"):
        if column in answers:
            line[column] = answers[column]
            row = grades.get(column, {}).get(item.index)
            line |= {} if row is None else {f"{column}_grade": row.grade, f"{column}_found": row.found}
    return line
