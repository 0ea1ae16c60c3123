"""Judging in one call: base and adapted model on the same items, or methods against each other."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moslora.api.benchmarking import evaluate_on_benchmarks, listed
from moslora.api.calling import command_or
from moslora.api.objects import as_metrics, as_rows, check_model, take_objects
from moslora.comparison.compare import compare as run_comparison
from moslora.comparison.results import Verdict
from moslora.comparison.showing import show_verdict
from moslora.data.writing import write_rows
from moslora.display import Display, Printable, find_display
from moslora.errors import UsageError
from moslora.evaluation.benchmarks.results import BenchmarkReport
from moslora.evaluation.evaluate import evaluate as evaluate_model
from moslora.evaluation.judge import Subject
from moslora.evaluation.results import Report
from moslora.failures import verb
from moslora.files import scratch, sha256
from moslora.models.in_memory import stored_name
from moslora.models.loading import load_tokenizer
from moslora.models.names import processor_source
from moslora.recipe.building import RecipeSource, build_recipe
from moslora.recipe.schema import Recipe
from moslora.training.borrowed import borrowed
from moslora.training.handed_over import HandedOver, save_processor

__all__ = ["ComparisonResult", "check_comparison", "compare", "evaluate"]


@verb("evaluate")
def evaluate(
    model: Any,
    tokenizer: Any = None,
    data: Any = None,
    *,
    adapter: str | os.PathLike[str] | None = None,
    recipe: RecipeSource = None,
    metrics: Mapping[str, Callable[[str, str], bool | float]] | None = None,
    tasks: Sequence[str] = (),
    protocol: str | None = None,
    lm_eval: Sequence[str] = (),
    benchmark: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    benchmark_as: str | None = None,
    prompt: str | None = None,
    exchange: bool = True,
    out: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    predictions: str | os.PathLike[str] | None = None,
    settings: Sequence[str] = (),
    progress: str | Display | None = None,
    **sections: Any,
) -> Report | BenchmarkReport:
    """Evaluate a base model, and an adapter on it, on the same items, with intervals.

    First the adapter is proven to be active: logits with and without it must differ.

    Args:
        model: A name (packaged, a folder, a hub id, a GGUF file), or a loaded model of transformers, which is
            afterwards as it was before.
        tokenizer: The tokenizer or processor, or its folder; None takes the one in the model's folder.
        data: A file or hub id of examples, a section, a ``datasets.Dataset`` or a list of dicts; with ``tasks`` the
            folder of their data.
        adapter: A directory that PEFT loads; None judges the base alone.
        recipe: Whose held-out data and metric are used; as for ``train``.
        metrics: By name, functions ``(answer, reference) -> bool or float`` of answers to your own data.
        tasks: Commonsense tasks, or ``["commonsense"]`` for all eight.
        protocol: For tasks: ``"answer-text"`` (the default), ``"label"``, ``"published"``, or several separated by
            commas; for benchmarks ``"published"`` (the default) or ``"letter"``.
        lm_eval: Tasks of EleutherAI's lm-eval, by name or as paths of their YAML files.
        benchmark: TSV files of vision-language benchmarks, as VLMEvalKit publishes them; see
            docs/picture-benchmarks.md.
        benchmark_as: Which benchmark the file is, where neither its checksum nor its name tells.
        prompt: For benchmarks: ``"llava"`` or ``"kit"``; None takes that of the model's family.
        exchange: For benchmarks: whether every item is asked about another item's pictures, too.
        out: For benchmarks: the folder of answers, scores and page; None for ``runs/benchmarks-MODEL-ADAPTER``. The
            same call continues there after an interruption.
        limit: Maximum number of items of each task or benchmark.
        predictions: A JSON Lines file to write every item to; must not exist yet.
        settings: Over all of it, ``section.key=value`` as on the command line.
        progress: None for silence, ``"terminal"`` or ``"notebook"``.
        **sections: Sections over the recipe's, such as ``task={"metric": "json"}``.

    Returns:
        The report: ``report["loss"]`` is a measure with ``base``, ``tuned``, ``difference`` and its interval; for
        benchmarks ``report["MME"].figures[0]`` likewise.

    Raises:
        RecipeError, DataError, ModelError, UsageError: If something cannot be used.
        ExistsError: If something exists at ``predictions``.
        ProofError: If the adapter's ΔW is not zero and the logits do not move.

    Example:
        >>> report = moslora.evaluate("base-model", data="data.jsonl", adapter="my-adapter")
        >>> report["loss"].items, report["loss"].tuned != report["loss"].base
        (24, True)
    """
    display = find_display(progress)
    functions = as_metrics(metrics)
    options: dict[str, Any] = {
        "adapter": None if adapter is None else Path(adapter),
        "limit": limit,
        "predictions": None if predictions is None else Path(predictions),
        "metrics": functions,
    }
    subject = _subject(model, tokenizer)
    if (tasks or lm_eval) and isinstance(tokenizer, str | os.PathLike):
        loaded = load_tokenizer(processor_source(os.fspath(tokenizer)))
        subject = dataclasses.replace(subject, tokenizer=loaded)
    files = listed(benchmark)
    if files:
        _refuse_beside_benchmarks(
            tasks=tasks, lm_eval=lm_eval, data=data, metrics=metrics, predictions=predictions
        )
    elif benchmark_as is not None or prompt is not None or out is not None:
        raise UsageError(
            "benchmark_as (--as), prompt and out are for benchmarks; give the files with benchmark."
        )
    with borrowed(subject.model), scratch("moslora-evaluation") as folder:
        if files:
            return evaluate_on_benchmarks(
                subject,
                files,
                display,
                options["adapter"],
                recipe,
                _own_layers(subject, tokenizer, None, sections, folder),
                settings,
                out,
                benchmark_as,
                limit,
                prompt,
                protocol,
                exchange,
            )
        if tasks or lm_eval or (recipe is None and data is None and "data" not in sections):
            if data is not None and not isinstance(data, str | os.PathLike):
                raise UsageError(
                    f"data is a {type(data).__name__}; with tasks it is the folder of their data, as a path."
                )
            return evaluate_model(
                subject,
                display,
                tasks=[tasks] if isinstance(tasks, str) else list(tasks),
                protocol=protocol or "answer-text",
                harness=[lm_eval] if isinstance(lm_eval, str) else [os.fspath(name) for name in lm_eval],
                data=None if data is None else os.fspath(data),
                # These tasks would ignore them, so they are refused.
                settings=[*(["recipe"] if recipe is not None else []), *sections, *settings],
                **options,
            )
        layers = _own_layers(subject, tokenizer, data, sections, folder)
        built = build_recipe(recipe, *layers, settings=settings)
        return evaluate_model(subject, display, recipe=built, **options)


def _refuse_beside_benchmarks(**given: Any) -> None:
    """Refuse what is about other evaluations, and would be ignored."""
    for name, value in given.items():
        if value is not None and not (isinstance(value, list | tuple) and not value):
            raise UsageError(
                f"{name} is not for benchmarks, which bring their own questions and rules; leave it out."
            )


def _subject(model: Any, tokenizer: Any) -> Subject:
    """Return what is evaluated, with a name."""
    own = tokenizer if not isinstance(tokenizer, str | os.PathLike) else None
    if isinstance(model, str | os.PathLike):
        return Subject(os.fspath(model), tokenizer=own)
    check_model(model)
    return Subject(getattr(model, "name_or_path", "") or type(model).__name__, model, own)


def _own_layers(
    subject: Subject, tokenizer: Any, data: Any, sections: Mapping[str, Any], folder: Path
) -> list[Mapping[str, Any]]:
    """Return what goes over the recipe of an evaluation; objects that it names are written into a folder."""
    second: dict[str, Any] = {"model": {}, "data": {}}
    if subject.tokenizer is not None:
        save_processor(subject.tokenizer, subject.model, folder / "tokenizer")
        second["model"]["tokenizer"] = str(folder / "tokenizer")
    elif tokenizer is not None:
        second["model"]["tokenizer"] = os.fspath(tokenizer)
    elif subject.model is not None and not getattr(subject.model, "name_or_path", ""):
        raise UsageError("The model was not loaded from a folder that has its tokenizer; hand it over too.")
    rows = None if data is None else as_rows(data, "data")
    if rows is not None:
        write_rows(rows, folder / "data.jsonl", "data")
        data = str(folder / "data.jsonl")
    if isinstance(data, str | os.PathLike):
        # Nothing is trained on, so a file of examples serves as both halves of a recipe.
        second["data"] = {"heldout": os.fspath(data)}
    elif isinstance(data, Mapping) and "heldout" not in data and "heldout_split" not in data:
        second["data"] = {"heldout": data.get("train")}
    return [
        {**sections, "model": subject.name, "data": data},
        {name: section for name, section in second.items() if section},
    ]


@dataclass(frozen=True, repr=False)
class ComparisonResult(Printable):
    """What a comparison showed.

    Attributes:
        path: Its folder.
        verdict: Every method at its best learning rate, the differences, and the conclusion in words.
    """

    path: Path
    verdict: Verdict

    @property
    def report(self) -> Path:
        """The page that shows the comparison; it opens offline."""
        return self.path / "report.html"

    @property
    def results(self) -> Path:
        """The verdict with every seed's points, for programs."""
        return self.path / "results.json"

    def show(self, display: Display) -> None:
        """Write the table of methods, the verdict, and where everything is."""
        show_verdict(self.verdict, display)
        display.say(f"Results, for programs:        {self.results}")
        display.say(f"Report, opens in a browser:   {self.report}")

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {"comparison": str(self.path), **dataclasses.asdict(self.verdict)}


@verb("compare")
def compare(
    recipe: RecipeSource = None,
    *,
    methods: Sequence[str] | None = None,
    seeds: int = 3,
    learning_rates: Sequence[float] | None = None,
    baseline: str | None = None,
    steps: int | None = None,
    validation: int = 64,
    examples: int | None = None,
    benchmark: str | os.PathLike[str] | None = None,
    benchmark_as: str | None = None,
    out: str | os.PathLike[str] | None = None,
    together: int = 1,
    workers: int | None = None,
    engine: str = "local",
    contrasts: Sequence[str] = (),
    rates_from: str | os.PathLike[str] | Mapping[str, float] | None = None,
    confirm: int | None = None,
    width: float | None = None,
    off_rates: Sequence[float] | None = None,
    off_seeds: int | None = None,
    settings: Sequence[str] = (),
    progress: str | Display | None = None,
    **sections: Any,
) -> ComparisonResult:
    """Compare methods on your data: tuned learning rates, paired seeds, intervals, a verdict.

    With ``confirm`` or ``width`` the methods are then trained at their best rates on fresh seeds, which chose nothing.
    The same call continues where it was stopped; with more seeds or a narrower width the second stage goes on.

    Args:
        recipe: As for ``train``.
        methods: Names such as ``"lora"``, ``"moslora"``, ``"dora"``, or paths of ``adapter_config.json`` files; None
            for ``"lora"`` and ``"moslora-orthogonal"``, which is the default mixer.
        seeds: How many, at least 2; the same for every method.
        learning_rates: Tried for every method; None for a third, one and three times the recipe's.
        baseline: Compared with all others; None for the first method.
        steps: Optimizer steps of every training; None for the recipe's.
        validation: Training examples set aside to choose rates by.
        examples: Held-out examples to judge by; None for all.
        benchmark: TSV file of a vision-language benchmark whose questions judge the methods, instead of the recipe's
            metric.
        benchmark_as: Which benchmark it is, where the file does not tell.
        out: The comparison's folder; None for ``compare-NAME`` beside the recipe's runs.
        together: Cells that are trained at once over one copy of the base.
        workers: Processes side by side, each with its own base.
        engine: ``"local"``, or ``"ray"``.
        contrasts: Pairs to compare beside each method with the baseline, such as ``"moslora:frozen-mixer"``.
        rates_from: Rates tuned elsewhere: a comparison's folder or ``results.json``, or a mapping by method. Methods
            without one are tuned here.
        confirm: Fresh seeds to confirm the methods on; with ``width`` at most.
        width: Fresh seeds are added until the interval of each difference of held-out loss is no wider than ± this, in
            nats per token: half of its length.
        off_rates: Multiples of each method's best rate at which it is trained, too, to see what a wrong rate costs.
        off_seeds: On how many of the fresh seeds; None for all, or with ``width`` for the first 8.
        settings: Over all of it, ``section.key=value`` as on the command line.
        progress: None for silence, ``"terminal"`` or ``"notebook"``.
        **sections: Sections and objects as for ``train``. Rows are written next to the comparison's folder; a loaded
            model must still have the weights of the folder that it was loaded from, because every process loads it.

    Returns:
        The verdict, and where results and report are.

    Raises:
        RecipeError, DataError, ModelError, UsageError: If something cannot be used.
        TrainingError: If a worker dies.
        Stopped: If Ctrl-C was pressed.

    Example:
        >>> result = moslora.compare(
        ...     model="base-model",
        ...     data="data.jsonl",
        ...     seeds=2,
        ...     learning_rates=[1e-2],
        ...     steps=2,
        ...     validation=4,
        ...     out="runs/comparison",
        ... )
        >>> [method.name for method in result.verdict.methods]
        ['lora', 'moslora-orthogonal']
    """
    built, objects, folder = _read_comparison(recipe, sections, settings, out)
    built = _with_files(built, objects, folder.with_name(f"{folder.name}-data"))
    options = _options(
        methods=methods,
        seeds=seeds,
        learning_rates=learning_rates,
        baseline=baseline,
        steps=steps,
        validation=validation,
        examples=examples,
        benchmark=benchmark,
        benchmark_as=benchmark_as,
        together=together,
        workers=workers,
        engine=engine,
        contrasts=contrasts,
        rates_from=rates_from,
        confirm=confirm,
        width=width,
        off_rates=off_rates,
        off_seeds=off_seeds,
    )
    command = command_or("moslora.compare")
    path, verdict = run_comparison(built, find_display(progress), out=folder, command=command, **options)
    assert verdict is not None, "only a plan has none"
    return ComparisonResult(path, verdict)


@verb("check_comparison")
def check_comparison(
    recipe: RecipeSource = None,
    *,
    out: str | os.PathLike[str] | None = None,
    settings: Sequence[str] = (),
    progress: str | Display | None = None,
    **arguments: Any,
) -> None:
    """Check everything that ``compare`` would use, and show what it would do; nothing is trained or kept.

    Args:
        recipe, out, settings: As for ``compare``.
        progress: Shows the number of cells and how small a difference they could show; None for silence.
        **arguments: The other arguments of ``compare``.

    Raises:
        RecipeError, DataError, ModelError, UsageError: If something cannot be used.

    Example:
        >>> moslora.check_comparison(model="base-model", data="data.jsonl", seeds=2, steps=2, validation=4)
    """
    options = _options(**{name: arguments.pop(name) for name in OPTIONS if name in arguments})
    built, objects, folder = _read_comparison(recipe, arguments, settings, out)
    with scratch("moslora-check") as place:
        built = _with_files(built, objects, place)
        run_comparison(built, find_display(progress), out=folder, plan_only=True, **options)


# Arguments of a comparison that no recipe has.
OPTIONS = (
    "methods",
    "seeds",
    "learning_rates",
    "baseline",
    "steps",
    "validation",
    "examples",
    "benchmark",
    "benchmark_as",
    "together",
    "workers",
    "engine",
    "contrasts",
    "rates_from",
    "confirm",
    "width",
    "off_rates",
    "off_seeds",
)


def _options(
    methods: Sequence[str] | None = None,
    learning_rates: Sequence[float] | None = None,
    contrasts: Sequence[str] = (),
    rates_from: str | os.PathLike[str] | Mapping[str, float] | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Return a comparison's options with paths as text."""
    others["off_rates"] = list(others.get("off_rates") or ())
    others["contrasts"] = [contrasts] if isinstance(contrasts, str) else list(contrasts)
    others["rates_from"] = os.fspath(rates_from) if isinstance(rates_from, os.PathLike) else rates_from
    names = [methods] if isinstance(methods, str) else methods
    if names is not None:
        names = [os.fspath(method) for method in names]
    return {"methods": names, "rates": list(learning_rates or ()), **others}


def _read_comparison(
    recipe: RecipeSource,
    sections: Mapping[str, Any],
    settings: Sequence[str],
    out: str | os.PathLike[str] | None,
) -> tuple[Recipe, HandedOver, Path]:
    """Return a comparison's recipe, the objects beside it, and its folder."""
    layers, objects = take_objects(**sections)
    built = build_recipe(recipe, *layers, settings=settings)
    name = built.output.name or built.task.kind
    folder = Path(out) if out is not None else Path(built.output.dir) / f"compare-{name}"
    return built, objects, folder.absolute()


def _with_files(recipe: Recipe, objects: HandedOver, folder: Path) -> Recipe:
    """Write the objects of a comparison into files that every process reads, and name these in the recipe."""
    if objects.callbacks or objects.metrics:
        raise UsageError(
            "compare takes no callbacks and no metrics; its recipe's task.metric judges answers."
        )
    objects.check(recipe.task.kind, 1)
    data, model = {}, {}
    if objects.model is not None:
        name = stored_name(objects.model)
        if name is None:
            raise UsageError(
                "No folder holds the weights of this model, and every training of a comparison loads them. Save it "
                "with model.save_pretrained(folder) and tokenizer.save_pretrained(folder), and pass model=folder."
            )
        model["name"] = str(Path(name).absolute()) if Path(name).is_dir() else name
    if objects.processor is not None:
        save_processor(objects.processor, objects.model, folder / "tokenizer")
        model["tokenizer"] = str(folder / "tokenizer")
    for part, rows in objects.rows.items():
        folder.mkdir(parents=True, exist_ok=True)
        with scratch(f".{part}", folder) as made:
            path = made / "rows.jsonl"
            write_rows(rows, path, "data" if part == "train" else part, folder / "pictures")
            # Named by content: other rows leave those of an earlier comparison alone, which then refuses to continue.
            place = folder / f"{part}-{sha256(path)[:16]}.jsonl"
            path.replace(place)
        data[part] = str(place)
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update=data),
            "model": recipe.model.model_copy(update=model),
        }
    )
