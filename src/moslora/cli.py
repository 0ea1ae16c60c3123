"""The command ``moslora``: one verb per file, heavy imports inside each.

Exit codes: 0 proven, 1 a failed proof or run, 2 wrong usage or unusable input, 130 and 143 interrupted by
Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

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


def _run(action: Callable[[], None], debug: bool) -> None:
    """Run a verb, and turn what it raises into a message and an exit code."""
    from moslora.export import ProofError
    from moslora.train import Stopped, TrainingError

    # PEFT asks transformers 5 for a property under its old name: news for PEFT, not for who runs this.
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )
    try:
        action()
    except Stopped as stopped:
        raise typer.Exit(128 + stopped.signal_number) from None
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
    checkpoints, metrics and [bold]report.html[/]. A run never overwrites another.
    """

    def action() -> None:
        from moslora.display import Display
        from moslora.train import check
        from moslora.train import resume as resume_run
        from moslora.train import train as train_run

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
        if as_json:
            print(json.dumps({"run": str(run.path), **run.read()}, indent=2))

    _run(action, debug)


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="Adapter directory of any format that is read.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist yet.")],
    to: Annotated[str, typer.Option(help="Format: [bold]lora[/] or [bold]native[/].")] = "lora",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write an adapter in another format, proven by reading back what was written.

    [bold]moslora export runs/demo/adapter my-lora --to lora[/]

    The proof is the largest relative error of ΔW over all modules, in float64. Above the tolerance nothing
    is left at OUT and the exit code is 1.
    """

    def action() -> None:
        import difflib

        from moslora.formats import WRITTEN

        if to not in WRITTEN:
            near = difflib.get_close_matches(to, WRITTEN, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"--to {to} is unknown; choose one of {', '.join(WRITTEN)}.{hint}")
        _convert(adapter, out, to, as_json)

    _run(action, debug)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Adapter directory of another program.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist yet.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Read an adapter of another program and write it natively, to train it further or export it.

    [bold]moslora import authors-checkpoint my-adapter[/]

    Read are checkpoints of MoSLoRA's authors ([bold]lora_AB[/]; also pickled ones, of which only tensors are
    opened) and of PEFT pull request 2294 ([bold]lora_mixer[/]), PaddleNLP's in safetensors, and plain LoRA, whose
    mixers become the identity. Proven as [bold]export[/] is, by reading back what was written.
    """
    _run(lambda: _convert(source, out, "native", as_json), debug)


@app.command()
def combine(
    adapters: Annotated[
        list[Path], typer.Argument(help="Adapter directories, for one base.", metavar="ADAPTER...")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write; must not exist yet.")],
    weights: Annotated[
        str, typer.Option(help="A factor for each, separated by commas; all 1 by default.")
    ] = "",
    to: Annotated[str, typer.Option(help="Format: [bold]lora[/] or [bold]native[/].")] = "lora",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the weighted sum of adapters as one, exact on ΔW.

    [bold]moslora combine math code --weights 1,0.5 --out both[/]

    Factors are laid side by side, never added to each other: the ranks of a module add up. Each adapter's ΔW is
    subtracted from what was written; if anything is left, nothing stays at OUT and the exit code is 1.
    """

    def action() -> None:
        from moslora.combine import combine as combine_adapters

        try:
            numbers = [float(part) for part in weights.split(",")] if weights else [1.0] * len(adapters)
        except ValueError:
            raise ValueError(f"--weights {weights} is no list of numbers, as 1,0.5 would be.") from None
        proof = combine_adapters(adapters, numbers, out, to)
        if as_json:
            print(json.dumps({"out": str(out), **dataclasses.asdict(proof)}, indent=2))
            return
        for folder, weight in zip(adapters, proof.weights, strict=True):
            print(f"Read {folder}, weight {weight:g}.")
        print(f"Wrote {out}: {to}, {proof.modules} modules, rank up to {proof.rank}.")
        print(
            f"Proven: largest relative error of ΔW against the sum {proof.max_relative_error:.1e} "
            f"(at most {proof.tolerance:.0e} allowed), in {proof.worst_module}."
        )

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
        from moslora.merge import merge as merge_into

        proof = merge_into(base, adapter, out, lambda line: print(line, file=sys.stderr))
        if as_json:
            print(json.dumps({"out": str(out), **dataclasses.asdict(proof)}, indent=2))
            return
        print(f"Read {base} and {adapter}: {proof.modules} modules.")
        print(f"Wrote {out}: {proof.bytes:,} bytes of weights; every adapted weight changed, no other.")
        print(
            f"Proven: {proof.checked} of {proof.modules} modules read back, largest relative error "
            f"{proof.max_relative_error:.1e} (at most {proof.tolerance:.1e} allowed), in {proof.worst_module}."
        )

    _run(action, debug)


def _convert(source: Path, out: Path, to: str, as_json: bool) -> None:
    """Write an adapter in another format and say what was proven."""
    from moslora.export import export_adapter
    from moslora.formats import FORMATS

    proof = export_adapter(source, out, to)
    if as_json:
        print(json.dumps({"out": str(out), **dataclasses.asdict(proof)}, indent=2))
        return
    print(f"Read {source}: {proof.source}, {proof.modules} modules.")
    if FORMATS[proof.source].warning:
        print(FORMATS[proof.source].warning)
    print(f"Wrote {out}: {proof.target}, {FORMATS[to].purpose}.")
    print(
        f"Proven: largest relative error of ΔW {proof.max_relative_error:.1e} "
        f"(at most {proof.tolerance:.0e} allowed), in {proof.worst_module}."
    )


def main() -> None:
    """Run the command; what the shell calls."""
    app()


if __name__ == "__main__":
    main()
