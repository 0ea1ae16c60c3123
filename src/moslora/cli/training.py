"""The verbs that train, and those that look ahead of a training: train, mix, plan, advise."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moslora.cli.options import Debug, Json
from moslora.cli.parsing import numbers_in, split_arguments
from moslora.cli.running import print_result, quick_import, run_verb
from moslora.display import Display
from moslora.distributed import in_main_process
from moslora.errors import UsageError


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE|KEY=VALUE...",
            help="A recipe file and/or settings such as [bold]adapter.r=8[/] or [bold]data=my.jsonl[/].",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Continue an interrupted run; with trainer.max_steps=N train one longer.",
            metavar="RUN",
            show_default=False,
        ),
    ] = None,
    continues: Annotated[
        bool,
        typer.Option(
            "--continue",
            help="Start the recipe's run, or go on with it if it was begun; never start a second one.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe and data, show an example, and stop.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model; evaluate before and after, fold, prove, report.

    [bold]moslora train recipes/demo.yaml[/]
    [bold]moslora train recipes/demo.yaml trainer.learning_rate=5e-4 output=slow[/]
    [bold]moslora train model=HuggingFaceTB/SmolLM2-135M-Instruct data=my.jsonl[/]
    [bold]moslora train --resume runs/demo[/]
    [bold]moslora train my.yaml --continue[/]   the same command before and after a restart

    The run directory holds the plain LoRA ([bold]lora/[/]), the native adapter ([bold]adapter/[/]),
    checkpoints, metrics and [bold]report.html[/]. A run never overwrites another. On several GPUs:
    [bold]torchrun --nproc-per-node 4 -m moslora train ...[/]
    """

    def action() -> None:
        with quick_import():
            from moslora.api.training import check
            from moslora.api.training import resume as resume_run
            from moslora.api.training import train as train_model

        display = Display(sys.stderr if as_json else sys.stdout)
        prints = (
            as_json and in_main_process()
        )  # asked now: when a team ends, its processes forget their place
        if resume is not None:
            if dry_run or continues or any("=" not in argument for argument in arguments or ()):
                raise UsageError(
                    "--resume cannot be combined with a recipe, --continue or --dry-run: it uses the run's own "
                    "recipe.yaml. To train longer, add trainer.max_steps=N; for other settings, start a new run."
                )
            run = resume_run(resume, display, settings=arguments or [])
        elif not arguments:
            raise UsageError("Nothing to train: name a recipe file, or at least model=NAME and data=FILE.")
        else:
            recipe, settings = split_arguments(arguments, Path.cwd())
            if dry_run:
                check(recipe, settings=settings, progress=display)
                return
            run = train_model(recipe, settings=settings, progress=display, continue_run=continues)
        if prints:
            print_result(run, as_json)  # what is for people was shown on the way

    run_verb(action, debug, together=True)


def plan(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE|KEY=VALUE...", help="As for training; data may be left out."),
    ],
    length: Annotated[
        int | None, typer.Option(help="Tokens of every row; the recipe's trainer.max_length.", min=1)
    ] = None,
    scored: Annotated[
        int | None, typer.Option(help="Tokens of every row that are trained on; all of them.", min=1)
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="Count the base in 4 bits: [bold]nf4[/], as bitsandbytes stores it.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Predict how much memory of each GPU a fine-tune needs, and which card is enough. Needs no weights and no GPU.

    [bold]moslora plan recipes/commonsense-llama3-8b.yaml model=recipes/architectures/llama-3-8b[/]
    [bold]moslora plan model=recipes/architectures/llama-3-70b trainer.per_device_train_batch_size=1 --quantize nf4[/]
    [bold]moslora plan my.yaml --length 512[/]

    The model is a folder with a config.json, a packaged model, or a hub id. One training step is run on tensors without
    values, with and without activation checkpointing, and everything that is allocated at the same time is counted: for
    one GPU, for DDP and for FSDP. A card is named if a tenth of the total and 1 GB stay free on it.
    """

    def action() -> None:
        with quick_import():
            from moslora.api.planning import plan as count

        recipe, settings = split_arguments(arguments, Path.cwd())
        display = Display(sys.stderr)
        counted = count(
            recipe, length=length, scored=scored, quantize=quantize, settings=settings, progress=display
        )
        print_result(counted, as_json)

    run_verb(action, debug)


def advise(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE|KEY=VALUE...", help="As for training; data may be left out."),
    ],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what to try: rate, rank, batch, targets, length and scale, with the reason and source of each.

    [bold]moslora advise recipes/demo.yaml[/]
    [bold]moslora advise model=HuggingFaceTB/SmolLM2-135M-Instruct data=my.jsonl adapter.r=64[/]

    Reads the recipe, the data and the base's configuration, no weights. What is our guess is called that, and results
    that disagree are told. The last line is ready to paste. [bold]train --dry-run[/] shows a short form.
    """

    def action() -> None:
        with quick_import():
            from moslora.api.advising import advise as advise_on

        recipe, settings = split_arguments(arguments, Path.cwd())
        print_result(advise_on(recipe, settings=settings, progress=Display(sys.stderr)), as_json)

    run_verb(action, debug)


def mix(
    arguments: Annotated[
        list[str],
        typer.Argument(
            help="Trained adapters of one base, then settings.", metavar="ADAPTER... [KEY=VALUE...]"
        ),
    ],
    recipe: Annotated[
        str, typer.Option(help="What to learn from: a recipe with the base and a few examples.")
    ],
    weights: Annotated[
        str,
        typer.Option(
            help="Initial weights: a factor for each adapter, separated by commas, or [bold]mean[/]; default: all 1."
        ),
    ] = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Learn one mixer over several trained adapters, from few examples; their factors do not change.

    [bold]moslora mix runs/when/adapter runs/many/adapter --recipe both.yaml[/]
    [bold]moslora mix runs/when/adapter runs/many/adapter --recipe both.yaml --weights mean trainer.max_steps=40[/]

    Factors are concatenated and frozen; only the mixer over all of them is trained, which starts as the weighted
    sum. The result is a run directory as of [bold]train[/], with one plain LoRA;
    [bold]train --resume[/] continues it.
    """

    def action() -> None:
        with quick_import():
            from moslora.api.training import mix as mix_adapters

        adapters = [word for word in arguments if "=" not in word or Path(word).exists()]
        settings = [word for word in arguments if word not in adapters]
        start = "mean" if weights == "mean" else numbers_in(weights, "--weights", "1,0.5", "mean")
        display = Display(sys.stderr if as_json else sys.stdout)
        run = mix_adapters(adapters, recipe, start, display, settings=settings)
        if as_json:
            print_result(run, as_json)  # what is for people was shown on the way

    run_verb(action, debug)
