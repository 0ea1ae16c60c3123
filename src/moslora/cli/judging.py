"""The verbs that judge, and the one that shows what came of it: compare, evaluate, report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moslora.cli.options import Debug, Json
from moslora.cli.parsing import names_in, numbers_in, split_arguments
from moslora.cli.running import print_result, quick_import, run_verb
from moslora.display import Display
from moslora.distributed import in_main_process


def compare(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE|KEY=VALUE...", help="A recipe and/or settings, as for training."),
    ],
    methods: Annotated[
        str,
        typer.Option(
            help="Names separated by commas, or paths of adapter_config.json; default: lora,moslora-orthogonal."
        ),
    ] = "",
    seeds: Annotated[int, typer.Option(help="Number of seeds, the same for every method.")] = 3,
    learning_rates: Annotated[
        str,
        typer.Option(
            help="Tried for every method, separated by commas; default: a third, one and three times the recipe's."
        ),
    ] = "",
    baseline: Annotated[
        str | None, typer.Option(help="Method that the others are compared with; default: the first.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps of every training; default: the recipe's.")
    ] = None,
    validation: Annotated[
        int, typer.Option(help="Training examples set aside to choose learning rates.")
    ] = 64,
    examples: Annotated[int | None, typer.Option(help="Held-out examples to judge by; default: all.")] = None,
    benchmark: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.tsv", help="Vision-language benchmark whose questions judge the methods, too."
        ),
    ] = None,
    benchmark_as: Annotated[
        str | None, typer.Option("--as", help="Which benchmark the file is, where it cannot be told.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the comparison; an existing one is continued.")
    ] = None,
    together: Annotated[
        int, typer.Option(help="Cells trained at once over one base; each gives the same result as alone.")
    ] = 1,
    workers: Annotated[
        int | None,
        typer.Option(help="Parallel processes, each with its own base; default: 1, or one per GPU of Ray."),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="[bold]local[/], or [bold]ray[/]: the cluster that Ray finds.")
    ] = "local",
    contrast: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD:METHOD",
            help="Compare these two as well, beside each method with the baseline; may be repeated.",
            show_default=False,
        ),
    ] = None,
    rates_from: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|METHOD=RATE,...",
            help="Rates tuned elsewhere: a comparison's results.json or folder, or by hand; not tuned again.",
        ),
    ] = None,
    confirm: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Second stage: train each method at its best rate on N fresh seeds; with --width at most N.",
        ),
    ] = None,
    width: Annotated[
        float | None,
        typer.Option(
            help="Second stage until the interval of each difference in held-out loss is no wider than ± this "
            "(half of its length), in nats per token."
        ),
    ] = None,
    off_rates: Annotated[
        str,
        typer.Option(
            metavar="FACTORS",
            help="In the second stage, train at these multiples of each method's best rate too, such as 0.333,3,10.",
        ),
    ] = "",
    off_seeds: Annotated[
        int | None, typer.Option(help="On how many fresh seeds; default: all, with --width the first 8.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print what would be done, and stop.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare methods on your data: tuned learning rates, paired seeds, intervals, a verdict.

    [bold]moslora compare recipes/compare-demo.yaml[/]
    [bold]moslora compare my.yaml --methods lora,lora-matched,moslora --seeds 5 --learning-rates 2e-4,6e-4,2e-3[/]
    [bold]moslora compare my.yaml --width 0.02 --confirm 60 --off-rates 0.333,3,10[/]

    Methods: lora, lora-matched, frozen-mixer, moslora, moslora-orthogonal, moslora-matched, moslora-slow-mixer,
    moslora-fast-mixer, moslora-mixer-decay, lora-xs, two-subspace, dora, rslora, pissa, recipe, full. Data,
    order, steps and seeds are shared; a learning rate is chosen for each method on validation examples, and judged on
    held-out ones. "No difference could be shown" is a possible result. The same command continues where it was
    stopped. With --confirm or --width methods are then confirmed at these rates on fresh seeds. Exit code 1 means
    that a method has no result.
    """

    def action() -> None:
        with quick_import():
            from moslora.api.judging import check_comparison
            from moslora.api.judging import compare as compare_methods

        display = Display(sys.stderr if as_json else sys.stdout)
        recipe, settings = split_arguments(arguments, Path.cwd())
        options: dict[str, Any] = {
            "methods": names_in(methods) if methods else None,
            "seeds": seeds,
            "learning_rates": numbers_in(learning_rates, "--learning-rates", "1e-4,1e-3"),
            "baseline": baseline,
            "steps": steps,
            "validation": validation,
            "examples": examples,
            "benchmark": benchmark,
            "benchmark_as": benchmark_as,
            "out": out,
            "together": together,
            "workers": workers,
            "engine": engine,
            "contrasts": contrast or [],
            "rates_from": rates_from,
            "confirm": confirm,
            "width": width,
            "off_rates": numbers_in(off_rates, "--off-rates", "0.333,3,10"),
            "off_seeds": off_seeds,
            "settings": settings,
            "progress": display,
        }
        if dry_run:
            check_comparison(recipe, **options)
            return
        result = compare_methods(recipe, **options)
        if as_json:
            print_result(result, as_json)  # what is for people was shown on the way
        second = result.verdict.confirmation
        if not result.verdict.complete or (second is not None and not second.complete):
            raise typer.Exit(1)

    run_verb(action, debug)


def evaluate(
    model: Annotated[str, typer.Argument(help="Base model: folder, hub id, GGUF file or packaged name.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE...", help="Settings over the recipe.", show_default=False),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter directory, compared with the base.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe whose held-out data and metric are used.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="File of examples; with --task the tasks' folder.")] = None,
    task: Annotated[
        str,
        typer.Option(help="Commonsense tasks separated by commas, or [bold]commonsense[/] for all eight."),
    ] = "",
    protocol: Annotated[
        str,
        typer.Option(
            help="For tasks: [bold]answer-text[/], [bold]label[/], [bold]published[/], or several; for benchmarks "
            "[bold]published[/] or [bold]letter[/]."
        ),
    ] = "",
    lm_eval: Annotated[
        str,
        typer.Option(help="Tasks of EleutherAI's lm-eval separated by commas, or paths of its YAML files."),
    ] = "",
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE.tsv...",
            help="Vision-language benchmarks in VLMEvalKit's TSV files; several, also separated by commas.",
            show_default=False,
        ),
    ] = None,
    benchmark_as: Annotated[
        str | None, typer.Option("--as", help="Which benchmark the file is, where it cannot be told.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="For benchmarks: [bold]llava[/] or [bold]kit[/]; that of the model's family."),
    ] = None,
    exchange: Annotated[
        bool, typer.Option(help="For benchmarks: ask every item about another item's pictures, too.")
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option(help="For benchmarks: folder of answers, scores and page; continued if there."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Maximum number of items of each task.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="JSON Lines file to write every item to.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Evaluate base and adapter side by side on the same items, with intervals.

    [bold]moslora evaluate smollm2-135m-instruct --adapter runs/demo/adapter --recipe recipes/demo.yaml[/]
    [bold]moslora evaluate my-model --adapter my-lora --data heldout.jsonl --predictions items.jsonl[/]
    [bold]moslora evaluate my-model --adapter my-lora --task ARC-Easy,boolq --data commonsense --protocol published[/]
    [bold]moslora evaluate my-model --adapter my-lora --lm-eval arc_easy,gsm8k --limit 200[/]
    [bold]moslora evaluate my-llava --adapter my-lora --recipe recipes/shapes-vision.yaml[/]
    [bold]moslora evaluate my-llava --adapter my-lora --benchmark MMBench_DEV_EN.tsv MME.tsv[/]

    First the adapter is proven to be active: logits with and without it must differ. An all-zero adapter is reported;
    one that does not change the logits is an error (exit code 1).
    """

    def action() -> None:
        with quick_import():
            from moslora.api.judging import evaluate as evaluate_model

        display = Display(sys.stderr if as_json else sys.stdout)
        words = settings or []
        files = [word for word in words if benchmark and "=" not in word]  # --benchmark A.tsv B.tsv
        report = evaluate_model(
            model,
            data=data,
            adapter=adapter,
            recipe=recipe,
            tasks=names_in(task),
            protocol=protocol or None,
            lm_eval=names_in(lm_eval),
            benchmark=[*(benchmark or []), *files],
            benchmark_as=benchmark_as,
            prompt=prompt,
            exchange=exchange,
            out=out,
            limit=limit,
            predictions=predictions,
            settings=[word for word in words if word not in files],
            progress=display,
        )
        if in_main_process():
            print_result(report, as_json)
        if predictions is not None:
            display.say(f"Wrote {predictions}.")

    run_verb(action, debug, together=bool(benchmark))


def report(
    run: Annotated[Path, typer.Argument(help="A run directory, or a comparison's folder.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a report again from what a run or a comparison recorded; nothing is trained or measured.

    [bold]moslora report runs/demo[/]
    [bold]moslora report runs/compare-demo[/]

    It replaces [bold]report.html[/], drawings included, as where a run was killed before it had one, or with the page
    of a newer version. A run that is not completed has a report too, of what it got to.
    """

    def action() -> None:
        from moslora.api.reporting import report as make_again

        print_result(make_again(run), as_json)

    run_verb(action, debug)
