"""The verbs that train, and the one that says what training takes: train, mix, plan."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from moslora.cli.options import Debug, Json
from moslora.cli.running import print_result, run_verb
from moslora.errors import UsageError
from moslora.terminal import print_json


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
        Path | None, typer.Option(help="Go on with an interrupted run.", metavar="RUN", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe and data, show what would be trained on, stop.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model; evaluate before and after, fold, prove, report.

    [bold]moslora train recipes/demo.yaml[/]
    [bold]moslora train recipes/demo.yaml trainer.learning_rate=5e-4 output=slow[/]
    [bold]moslora train model=HuggingFaceTB/SmolLM2-135M-Instruct data=my.jsonl[/]
    [bold]moslora train --resume runs/demo[/]

    The run directory holds the plain LoRA ([bold]lora/[/]), the native adapter ([bold]adapter/[/]),
    checkpoints, metrics and [bold]report.html[/]. A run never overwrites another. On several GPUs:
    [bold]torchrun --nproc-per-node 4 -m moslora train ...[/]
    """

    def action() -> None:
        from moslora.display import Display
        from moslora.training.run import check
        from moslora.training.run import resume as resume_run
        from moslora.training.run import train as train_run
        from moslora.training.run_directory import FollowedRun

        display = Display(sys.stderr if as_json else sys.stdout)
        if resume is not None:
            if arguments or dry_run:
                raise UsageError(
                    "--resume takes nothing beside it: the run's own recipe.yaml says what it is. To train "
                    "with other settings, start a new run."
                )
            run = resume_run(resume, display)
        elif not arguments:
            raise UsageError("Nothing to train: name a recipe file, or at least model=NAME and data=FILE.")
        elif dry_run:
            check(arguments, display)
            return
        else:
            run = train_run(arguments, display, shlex.join(["moslora", "train", *arguments]))
        if as_json and not isinstance(run, FollowedRun):
            print_json({"run": str(run.path), **run.read()})

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
    """Say what a fine-tune takes of each GPU's memory, and which card does. Needs no weights and no GPU.

    [bold]moslora plan recipes/commonsense-llama3-8b.yaml model=recipes/architectures/llama-3-8b[/]
    [bold]moslora plan model=recipes/architectures/llama-3-70b trainer.per_device_train_batch_size=1 --quantize nf4[/]
    [bold]moslora plan my.yaml --length 512[/]

    The model is a folder with a config.json, a packaged one, or a hub id whose configuration can be had. One training
    step is run on tensors without values, with and without activation checkpointing, and all that lives at once is
    counted: for one GPU, for DDP and for FSDP. A card is named where a tenth of the total and 1 GB stay free on it.
    """

    def action() -> None:
        from moslora.display import Display
        from moslora.memory.plan import plan as count

        found = count(arguments, length=length, scored=scored, quantize=quantize, say=Display(sys.stderr).say)
        print_result(found, as_json)

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
        typer.Option(help="Where to start: a factor for each, separated by commas, or [bold]mean[/]; all 1."),
    ] = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Learn one mixer over several trained adapters, from few examples; they stay as they are.

    [bold]moslora mix runs/when/adapter runs/many/adapter --recipe both.yaml[/]
    [bold]moslora mix runs/when/adapter runs/many/adapter --recipe both.yaml --weights mean trainer.max_steps=40[/]

    Factors are concatenated and frozen; only the mixer over all of them is trained, which starts as the weighted
    sum. What comes out is a run as [bold]train[/] leaves it, with one plain LoRA;
    [bold]train --resume[/] goes on with it.
    """

    def action() -> None:
        from moslora.display import Display
        from moslora.training.mix import arguments_of
        from moslora.training.run import train as train_run

        adapters = [Path(a) for a in arguments if "=" not in a or Path(a).exists()]
        overrides = [a for a in arguments if "=" in a and not Path(a).exists()]
        given = arguments_of(adapters, recipe, weights, overrides)
        display = Display(sys.stderr if as_json else sys.stdout)
        run = train_run(given, display, shlex.join(["moslora", "mix", *arguments, "--recipe", recipe]))
        if as_json:
            print_json({"run": str(run.path), **run.read()})

    run_verb(action, debug)
