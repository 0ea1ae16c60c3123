"""The command ``moslora``: one verb per file, heavy imports inside each.

Exit codes: 0 proven, 1 a failed proof or run, 2 wrong usage or unusable input, 130 and 143 interrupted by
Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from moslora.adapters.findings import Diagnosis
    from moslora.adapters.inspection import Inspection
    from moslora.memory.plan import Plan

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Mixture-of-Subspaces LoRA: train with a mixer, ship a plain LoRA, know whether it helped.\n\n"
        "Exit codes: 0 proven, 1 a failed proof or run, 2 wrong usage, 130 interrupted."
    ),
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
FORMAT_HELP = "Format: [bold]lora[/], [bold]native[/], [bold]gguf[/], [bold]diffusers[/] or [bold]kohya[/]."
Rank = Annotated[
    int | None,
    typer.Option(help="Bring every module to this rank by its singular values, and say what that cost."),
]
Dtype = Annotated[
    str | None, typer.Option(help="Of the factors: [bold]float32[/], [bold]float16[/] or [bold]bfloat16[/].")
]
Base = Annotated[
    str | None, typer.Option(help="Base model, for gguf; the one that the adapter names by default.")
]
Alpha = Annotated[
    float | None,
    typer.Option(help="lora_alpha of the training, for a diffusers or kohya file that does not say it."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"moslora {version('moslora')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Hold the options that belong to no verb."""


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind what is being done, so that what was half written is removed.

    Training has its own way of stopping, which takes over while it lasts.
    """

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(action: Callable[[], None], debug: bool, together: bool = False) -> None:
    """Run a verb, and turn what it raises into a message and an exit code; ``together`` knows of other processes."""
    from moslora.distributed import launched
    from moslora.errors import ProofError, Stopped, TrainingError

    # PEFT asks transformers 5 for a property under its old name: news for PEFT, not for who runs this.
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )
    with _ended_by_sigterm():
        try:
            if not together and launched() > 1:
                raise ValueError(
                    f"{launched()} processes were launched, and each would do all of this; moslora train alone "
                    "shares its work between processes. Start this one without torchrun or accelerate launch."
                )
            action()
        except typer.Exit:
            raise
        except Stopped as stopped:
            raise typer.Exit(128 + stopped.signal_number) from None
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            raise typer.Exit(128 + signal.SIGINT) from None
        except (ProofError, TrainingError) as error:
            code, problem = 1, error
        except (ValueError, FileNotFoundError, FileExistsError, ImportError) as error:
            code, problem = 2, error  # type: ignore[assignment]
        except Exception as error:
            code, problem = 1, error  # type: ignore[assignment]
        else:
            return
    if debug:
        raise problem
    known = type(problem).__module__.startswith("moslora") or isinstance(problem, ValueError | OSError)
    name = "" if known else f"{type(problem).__name__}: "
    print(f"Error: {name}{problem}", file=sys.stderr)
    if not known:
        print("Run again with --debug to see where it happened.", file=sys.stderr)
    raise typer.Exit(code)


@app.command()
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
                raise ValueError(
                    "--resume takes nothing beside it: the run's own recipe.yaml says what it is. To train "
                    "with other settings, start a new run."
                )
            run = resume_run(resume, display)
        elif not arguments:
            raise ValueError("Nothing to train: name a recipe file, or at least model=NAME and data=FILE.")
        elif dry_run:
            check(arguments, display)
            return
        else:
            run = train_run(arguments, display, shlex.join(["moslora", "train", *arguments]))
        if as_json and not isinstance(run, FollowedRun):
            print(json.dumps({"run": str(run.path), **run.read()}, indent=2))

    _run(action, debug, together=True)


@app.command()
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
        from moslora.memory.plan import plan as count

        found = count(
            arguments,
            length=length,
            scored=scored,
            quantize=quantize,
            say=lambda line: print(line, file=sys.stderr),
        )
        if as_json:
            print(json.dumps(dataclasses.asdict(found), indent=2))
            return
        from moslora.display import Display

        kind = f"{found.base}, adapter {found.trained / 1e6:.1f} M trained numbers"
        print(f"{found.model}: {found.architecture}, {found.parameters / 1e9:.2f} G parameters in {kind}.")
        steps = f", {found.accumulation} batches to a step" if found.accumulation > 1 else ""
        print(
            f"On each GPU {found.rows} × {found.length} tokens, {found.scored} of each row trained on{steps}; "
            f"{found.optimiser}; logits {found.logits / 1e9:.2f} GB at a time."
        )
        Display().show(_memory_table(found))
        print(
            "GB of 10⁹ bytes at the fullest moment of a step; state is the optimiser's. "
            f"The recipe has checkpointing {'on' if found.checkpointing else 'off'}."
        )

    _run(action, debug)


@app.command()
def compare(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE|KEY=VALUE...", help="A recipe and/or settings, as for training."),
    ],
    methods: Annotated[
        str, typer.Option(help="Names separated by commas, or paths of adapter_config.json.")
    ] = "lora,moslora",
    seeds: Annotated[int, typer.Option(help="How many; the same for every method.")] = 3,
    learning_rates: Annotated[
        str,
        typer.Option(
            help="Tried for every method, separated by commas; a third, one and three times the recipe's."
        ),
    ] = "",
    baseline: Annotated[str | None, typer.Option(help="Compared with all others; the first method.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps of every training; the recipe's.")
    ] = None,
    validation: Annotated[int, typer.Option(help="Training examples set aside to choose rates by.")] = 64,
    examples: Annotated[int | None, typer.Option(help="Held-out examples to judge by; all.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to keep it in; one that is there goes on.")] = None,
    together: Annotated[
        int, typer.Option(help="Cells trained at once over one base; each gives what it gives alone.")
    ] = 1,
    workers: Annotated[
        int | None, typer.Option(help="Processes side by side, each with its own base; 1, or Ray's GPUs.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: the cluster that Ray finds.")] = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare methods on your data: tuned learning rates, paired seeds, intervals, a verdict.

    [bold]moslora compare recipes/compare-demo.yaml[/]
    [bold]moslora compare my.yaml --methods lora,lora-matched,moslora --seeds 5 --learning-rates 2e-4,6e-4,2e-3[/]

    Methods: lora, lora-matched, frozen-mixer, moslora, moslora-orthogonal, two-subspace, dora, rslora, pissa, recipe,
    full. Data, order, steps and seeds are shared; a learning rate is chosen for each method on validation examples, and
    judged on held-out ones. "No difference could be shown" is an answer. The same command goes on where it was stopped.
    Exit code 1 says that a method has no result.
    """

    def action() -> None:
        from moslora.comparison.compare import compare as compare_methods
        from moslora.display import Display

        try:
            rates = [float(rate) for rate in learning_rates.split(",") if rate]
        except ValueError:
            raise ValueError(
                f"--learning-rates {learning_rates} is no list of numbers, as 1e-4,1e-3 is."
            ) from None
        folder, verdict = compare_methods(
            arguments,
            Display(sys.stderr if as_json else sys.stdout),
            methods=[name.strip() for name in methods.split(",") if name.strip()],
            seeds=seeds,
            rates=rates,
            baseline=baseline,
            steps=steps,
            validation=validation,
            examples=examples,
            out=out,
            engine=engine,
            workers=workers,
            together=together,
            command=shlex.join(["moslora", *sys.argv[1:]]),
            plan_only=dry_run,
        )
        if verdict is None:
            return
        if as_json:
            print(json.dumps({"comparison": str(folder), **dataclasses.asdict(verdict)}, indent=2))
        if not verdict.complete:
            raise typer.Exit(1)

    _run(action, debug)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Base model: folder, hub id, GGUF file or packaged name.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE...", help="Over the recipe.", show_default=False),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter directory, judged beside the base.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Whose held-out data and metric are used.")] = None,
    data: Annotated[str | None, typer.Option(help="File of examples; with --task the tasks' folder.")] = None,
    task: Annotated[
        str,
        typer.Option(help="Commonsense tasks separated by commas, or [bold]commonsense[/] for all eight."),
    ] = "",
    protocol: Annotated[
        str,
        typer.Option(help="For tasks: [bold]answer-text[/], [bold]label[/], [bold]published[/], or several."),
    ] = "answer-text",
    lm_eval: Annotated[
        str,
        typer.Option(help="Tasks of EleutherAI's lm-eval separated by commas, or paths of its YAML files."),
    ] = "",
    limit: Annotated[int | None, typer.Option(help="Items at most, of each task.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="JSONL to write every item to.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Evaluate base and adapter side by side on the same items, with intervals.

    [bold]moslora evaluate smollm2-135m-instruct --adapter runs/demo/adapter --recipe recipes/demo.yaml[/]
    [bold]moslora evaluate my-model --adapter my-lora --data heldout.jsonl --predictions items.jsonl[/]
    [bold]moslora evaluate my-model --adapter my-lora --task ARC-Easy,boolq --data commonsense --protocol published[/]
    [bold]moslora evaluate my-model --adapter my-lora --lm-eval arc_easy,gsm8k --limit 200[/]
    [bold]moslora evaluate my-llava --adapter my-lora --recipe recipes/shapes-vision.yaml[/]

    First it is proven that the adapter takes part: logits with and without it must differ. One that learned nothing is
    said to; one that is not felt ends with exit code 1.
    """

    def action() -> None:
        from moslora.display import Display
        from moslora.evaluation.evaluate import evaluate as evaluate_model
        from moslora.evaluation.evaluate import show

        display = Display(sys.stderr if as_json else sys.stdout)
        report = evaluate_model(
            model,
            display,
            adapter=adapter,
            recipe=recipe,
            data=data,
            settings=settings or (),
            tasks=[name.strip() for name in task.split(",") if name.strip()],
            protocol=protocol,
            harness=[name.strip() for name in lm_eval.split(",") if name.strip()],
            limit=limit,
            predictions=predictions,
        )
        if as_json:
            print(json.dumps(dataclasses.asdict(report), indent=2))
        else:
            show(report, display)
        if predictions is not None:
            display.say(f"Wrote {predictions}.")

    _run(action, debug)


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="Adapter of any format that is read.")],
    out: Annotated[Path, typer.Argument(help="Directory or file to write; must not exist yet.")],
    to: Annotated[str | None, typer.Option(help=f"{FORMAT_HELP} [bold]lora[/] by default.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--for", help="Instead of --to, where it shall run: comfyui, diffusers, llama.cpp, vllm, …"
        ),
    ] = None,
    rank: Rank = None,
    dtype: Dtype = None,
    base: Base = None,
    alpha: Alpha = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write an adapter in another format, proven by reading back what was written.

    [bold]moslora export runs/demo/adapter my-lora[/]
    [bold]moslora export runs/demo/adapter my-lora.gguf --to gguf[/]
    [bold]moslora export runs/style/adapter style.safetensors --for comfyui --dtype float16[/]
    [bold]moslora export runs/demo/adapter small --rank 4[/]

    All but [bold]native[/] fold the mixers. What was written is read back through the project it is for, where that
    is installed (PEFT, diffusers, gguf). The proof is the largest relative error of ΔW over all modules, in float64.
    Above the tolerance nothing is left at OUT and the exit code is 1.
    """

    def action() -> None:
        _convert(adapter, out, to, as_json, engine=engine, rank=rank, dtype=dtype, base=base, alpha=alpha)

    _run(action, debug)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Adapter of another program, a directory or a file.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist yet.")],
    alpha: Alpha = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Read an adapter of another program and write it natively, to train it further or export it.

    [bold]moslora import authors-checkpoint my-adapter[/]
    [bold]moslora import style.safetensors my-style[/]

    Read are checkpoints of MoSLoRA's authors ([bold]lora_AB[/], in their SDXL files [bold]lora.downB[/]; also pickled
    ones, of which only tensors are opened) and of PEFT pull request 2294 ([bold]lora_mixer[/]), PaddleNLP's in
    safetensors, kohya's and diffusers' files, and plain LoRA, whose mixers become the identity. The adapter of a
    pipeline becomes one directory for each of its models. Proven as [bold]export[/] is, by reading back what was
    written.
    """
    _run(lambda: _convert(source, out, "native", as_json, alpha=alpha), debug)


@app.command()
def combine(
    adapters: Annotated[
        list[Path], typer.Argument(help="Adapter directories, for one base.", metavar="ADAPTER...")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory or file to write; must not exist yet.")],
    weights: Annotated[
        str, typer.Option(help="A factor for each, separated by commas; all 1 by default.")
    ] = "",
    to: Annotated[str, typer.Option(help=FORMAT_HELP)] = "lora",
    rank: Rank = None,
    dtype: Dtype = None,
    base: Base = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the weighted sum of adapters as one, exact on ΔW.

    [bold]moslora combine math code --weights 1,0.5 --out both[/]

    Factors are laid side by side, never added to each other: the ranks of a module add up. Each adapter's ΔW is
    subtracted from what was written; if anything is left, nothing stays at OUT and the exit code is 1.
    """

    def action() -> None:
        from moslora.adapters.combine import combine as combine_adapters

        try:
            numbers = [float(part) for part in weights.split(",")] if weights else [1.0] * len(adapters)
        except ValueError:
            raise ValueError(f"--weights {weights} is no list of numbers, as 1,0.5 would be.") from None
        proof = combine_adapters(adapters, numbers, out, to, rank=rank, dtype=dtype, base=base)
        if as_json:
            print(json.dumps({"out": str(out), **dataclasses.asdict(proof)}, indent=2))
            return
        for folder, weight in zip(adapters, proof.weights, strict=True):
            print(f"Read {folder}, weight {weight:g}.")
        print(f"Wrote {out}: {to}, {proof.modules} modules, rank up to {proof.rank}.")
        if proof.rank_error is not None:
            print(
                f"Rank {rank}: relative error of ΔW {proof.rank_error:.1e} over all modules, against the exact sum."
            )
        print(
            f"Proven: largest relative error of ΔW against the sum {proof.max_relative_error:.1e} "
            f"(at most {proof.tolerance:.2g} allowed), in {proof.worst_module}; read back by {proof.reader}."
        )

    _run(action, debug)


@app.command()
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

    Factors are laid side by side and frozen; only the mixer over all of them is trained, which starts as the weighted
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
            print(json.dumps({"run": str(run.path), **run.read()}, indent=2))

    _run(action, debug)


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="Base model: folder, hub id, GGUF file or packaged name.")],
    adapter: Annotated[Path, typer.Argument(help="Adapter directory of any format that is read.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist yet.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into the full weights of its base, without loading the model.

    [bold]moslora merge HuggingFaceTB/SmolLM2-135M-Instruct runs/demo/adapter merged[/]

    Shards are copied and the adapted weights rewritten, a block at a time, in the base's own dtype: W + ΔW is
    summed in float32 and rounded once. Written weights are read back and compared with float64; a weight that is
    wrong or unchanged leaves nothing at OUT and the exit code is 1.
    """

    def action() -> None:
        from moslora.adapters.merge import KEPT
        from moslora.adapters.merge import merge as merge_into

        proof = merge_into(base, adapter, out, lambda line: print(line, file=sys.stderr))
        if as_json:
            print(json.dumps({"out": str(out), **dataclasses.asdict(proof)}, indent=2))
            return
        print(f"Read {base} and {adapter}: {proof.modules} modules.")
        print(
            f"Wrote {out}: {proof.bytes:,} bytes of weights. Every adapted weight changed, the rest is a copy."
        )
        print(
            f"Proven: {proof.checked:,} entries of all {proof.modules} modules read back, largest relative error "
            f"{proof.max_relative_error:.1e}; each entry within its rounding (at worst {proof.error_ratio:.2f} of it, "
            f"in {proof.worst_module})."
        )
        if proof.least_kept < KEPT:
            print(
                f"Rounding to the base's dtype kept {proof.least_kept:.0%} of ΔW in {proof.least_kept_module}: it is "
                "small beside the weights. To keep it all, merge into the base in float32, or ship the adapter."
            )

    _run(action, debug)


@app.command("inspect")
def inspect_(
    adapter: Annotated[Path, typer.Argument(help="Adapter of any format that is read.")],
    base: Annotated[str | None, typer.Option(help="Base model, to compare ΔW with its weights.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write heat maps as a page; must not exist yet.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what an adapter learned, by kind of module.

    [bold]moslora inspect runs/demo/adapter[/]
    [bold]moslora inspect runs/demo/adapter --base HuggingFaceTB/SmolLM2-135M-Instruct --html demo.html[/]

    Medians over the modules of a kind: the effective rank of ΔW (of at most r), its size, how far the mixer M is
    from the identity (plain LoRA) and from orthogonal, and how it scales A. --json and --html have every module.
    """

    def action() -> None:
        from moslora.adapters.inspection import inspect_adapter
        from moslora.reports.inspection import write_page

        found = inspect_adapter(adapter, base, lambda line: print(line, file=sys.stderr))
        if html is not None:
            write_page(found, html)
        if as_json:
            print(json.dumps(dataclasses.asdict(found), indent=2))
            return
        from moslora.display import Display

        Display().show(_groups_table(found))
        mixer = f", mixer {found.mixer}" if found.mixer else ""
        print(
            f"Read {adapter}: {found.format}{mixer}, {len(found.modules)} modules, {found.parameters:,} parameters."
        )
        if found.note:
            print(found.note)
        if found.learned_nothing:
            named = ", ".join(found.learned_nothing[:3]) + (", …" if len(found.learned_nothing) > 3 else "")
            print(f"Learned nothing: {len(found.learned_nothing)} of {len(found.modules)} modules ({named}).")
        if html is not None:
            print(f"Wrote {html}.")

    _run(action, debug)


@app.command()
def doctor(
    adapter: Annotated[Path, typer.Argument(help="Adapter of any format that is read.")],
    base: Annotated[str | None, typer.Option(help="Base model, to hold the adapter against.")] = None,
    engines: Annotated[
        str, typer.Option("--for", help="Where it shall run, separated by commas: vllm, sglang, llama.cpp, …")
    ] = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say whether an adapter is sound, fits its base, and will run where it is meant to.

    [bold]moslora doctor runs/demo/lora[/]
    [bold]moslora doctor runs/demo/adapter --base HuggingFaceTB/SmolLM2-135M-Instruct --for vllm,llama.cpp[/]

    Engines: peft, vllm, sglang, llama.cpp, diffusers, comfyui. The adapter is written as each loads it, in a temporary
    place, and read back. The exit code is 1 if it is not usable as asked; each fault has its fix.
    """

    def action() -> None:
        from moslora.adapters.doctor import diagnose
        from moslora.adapters.findings import to_json

        names = [name.strip() for name in engines.split(",") if name.strip()]
        found = diagnose(adapter, base, names, lambda line: print(line, file=sys.stderr))
        if as_json:
            print(json.dumps(to_json(found), indent=2))
        else:
            from moslora.display import Display

            Display().show(_findings_table(found))
            print(found.verdict)
        if not found.is_usable:
            raise typer.Exit(1)

    _run(action, debug)


def _memory_table(found: Plan) -> Table:
    """Lay out what each way of training takes of a GPU, in GB."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("GPUs", no_wrap=True)
    table.add_column("ckpt", no_wrap=True)
    parts = ("weights", "gathered", "gradients", "optimiser", "activations", "total")
    for name in (*parts, "card"):
        table.add_column("state" if name == "optimiser" else name, justify="right", no_wrap=True)
    for one in found.placements:
        if one.strategy == "DDP" and one.gpus > 2:
            continue  # each holds the same, however many there are
        where = {"one": "1", "DDP": "DDP, 2+", "FSDP": f"FSDP, {one.gpus}"}[one.strategy]
        cells = [f"{getattr(one, name) / 1e9:.2f}" for name in parts]
        card = f"{one.card} GB" if one.card else "none"
        table.add_row(where, "on" if one.checkpointing else "off", *cells, card)
    return table


def _findings_table(found: Diagnosis) -> Table:
    """Lay out findings, each with its fix below it."""
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}
    table = Table(box=None, show_header=False, padding=(0, 1))
    for column in ("level", "check"):
        table.add_column(column, no_wrap=True)
    table.add_column("what", overflow="fold")
    for finding in found.findings:
        what = Text(finding.what)
        if finding.fix:
            what.append(f"\n→ {finding.fix}", style="bold")
        table.add_row(Text(finding.level, style=colours[finding.level]), Text(finding.check), what)
    return table


def _groups_table(found: Inspection) -> Table:
    """Lay out medians by kind of module, leaving out what no module has."""
    from rich.table import Table

    from moslora.reports.inspection import shown

    columns = {
        "modules": [str(group.modules) for group in found.groups],
        "rank": [str(group.rank) for group in found.groups],
        "eff. rank": [shown(group.effective_rank) for group in found.groups],
        "‖ΔW‖": [shown(group.norm) for group in found.groups],
        "÷ ‖W0‖": [shown(group.relative_norm) for group in found.groups],
        "M - I": [shown(group.from_identity) for group in found.groups],
        "M - orth.": [shown(group.from_orthogonal) for group in found.groups],
        "moved": [shown(group.moved) for group in found.groups],
        "‖MA‖/‖A‖": [shown(group.mixed_scale) for group in found.groups],
    }
    told = {name: cells for name, cells in columns.items() if any(cell != "–" for cell in cells)}
    table = Table(box=None, header_style="bold")
    table.add_column("kind", overflow="fold")
    for name in told:
        table.add_column(name, justify="right", no_wrap=True)
    for index, group in enumerate(found.groups):
        table.add_row(group.kind, *(cells[index] for cells in told.values()))
    return table


def _convert(
    source: Path,
    out: Path,
    to: str | None,
    as_json: bool,
    *,
    engine: str | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    base: str | None = None,
    alpha: float | None = None,
) -> None:
    """Write an adapter in another format and say what was proven."""
    from moslora.adapters.export import export_adapter
    from moslora.adapters.formats.table import FORMATS

    proof = export_adapter(source, out, to, engine=engine, rank=rank, dtype=dtype, base=base, alpha=alpha)
    if as_json:
        print(json.dumps({"out": str(out), **dataclasses.asdict(proof)}, indent=2))
        return
    said = "" if alpha is None else f", alpha {alpha:g} as given"
    print(f"Read {source}: {proof.source}, {proof.modules} modules{said}.")
    if FORMATS[proof.source].warning:
        print(FORMATS[proof.source].warning)
    print(f"Wrote {out}: {proof.target}, {FORMATS[proof.target].purpose}.")
    if proof.has_magnitudes:
        print(
            "It has DoRA's magnitude: PEFT reads it, most engines do not; moslora doctor --for says which, and why."
        )
    if proof.rank_error is not None:
        worst = max(proof.rank_errors, key=lambda name: proof.rank_errors[name])
        print(
            f"Rank {rank}: relative error of ΔW {proof.rank_error:.1e} over all modules, at most "
            f"{proof.rank_errors[worst]:.1e}, in {worst}. --json and moslora_proof.json have every module's."
        )
    print(
        f"Proven: largest relative error of ΔW {proof.max_relative_error:.1e} "
        f"(at most {proof.tolerance:.2g} allowed), in {proof.worst_module}; read back by {proof.reader}."
    )


def main() -> None:
    """Run the command; what the shell calls."""
    app()


if __name__ == "__main__":
    main()
