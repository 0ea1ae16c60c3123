"""The verbs on adapters at rest: export, import, combine, merge, inspect, doctor, push."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moslora.cli.options import FORMAT_HELP, Alpha, Base, Debug, Dtype, Json, Rank
from moslora.cli.parsing import names_in, numbers_in
from moslora.cli.running import print_result, quick_import, run_verb
from moslora.display import Display


def export(
    adapter: Annotated[Path, typer.Argument(help="Adapter of any format that is read.")],
    out: Annotated[Path, typer.Argument(help="Directory or file to write; must not exist yet.")],
    to: Annotated[str | None, typer.Option(help=f"{FORMAT_HELP} [bold]lora[/] by default.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="Instead of --to, the program that will load it: comfyui, diffusers, llama.cpp, vllm, …",
        ),
    ] = None,
    rank: Rank = None,
    dtype: Dtype = None,
    base: Base = None,
    alpha: Alpha = None,
    names: Annotated[
        str | None,
        typer.Option(
            help="Names of modules and form of experts: [bold]transformers-4[/] or [bold]transformers-5[/]."
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write an adapter in another format, proven by reading back what was written.

    [bold]moslora export runs/demo/adapter my-lora[/]
    [bold]moslora export runs/demo/adapter my-lora.gguf --to gguf[/]
    [bold]moslora export runs/style/adapter style.safetensors --for comfyui --dtype float16[/]
    [bold]moslora export runs/demo/adapter small --rank 4[/]
    [bold]moslora export runs/moe/adapter served --for vllm --base MODEL[/]

    --for writes what that program applies whole, or refuses with its reason ([bold]doctor[/] has the rules).
    All but [bold]native[/] fold the mixers. What was written is read back through the project it is for, where that
    is installed (PEFT, diffusers, gguf). The proof is the largest relative error of ΔW over all modules, in float64.
    Above the tolerance nothing is left at OUT and the exit code is 1.
    """

    def action() -> None:
        with quick_import():
            from moslora.api.adapters import export as export_adapter

        print_result(
            export_adapter(
                adapter,
                out,
                to,
                engine=engine,
                rank=rank,
                dtype=dtype,
                base=base,
                alpha=alpha,
                names=names,
            ),
            as_json,
        )

    run_verb(action, debug)


def import_(
    source: Annotated[Path, typer.Argument(help="Adapter of another program: a directory or a file.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist yet.")],
    base: Base = None,
    alpha: Alpha = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Read an adapter of another program and write it natively, to train it further or export it.

    [bold]moslora import authors-checkpoint my-adapter[/]
    [bold]moslora import style.safetensors my-style[/]

    Supported: checkpoints of MoSLoRA's authors ([bold]lora_AB[/], in their SDXL files [bold]lora.downB[/]; also pickled
    ones, of which only tensors are opened) and of PEFT pull request 2294 ([bold]lora_mixer[/]), PaddleNLP's in
    safetensors, files of diffusers, kohya, ComfyUI and other image tools, and plain LoRA: M = I. The adapter of a
    pipeline becomes one directory for each of its models. Proven as [bold]export[/] is, by reading back what was
    written.
    """

    def action() -> None:
        with quick_import():
            from moslora.api.adapters import import_adapter

        print_result(import_adapter(source, out, base=base, alpha=alpha), as_json)

    run_verb(action, debug)


def combine(
    adapters: Annotated[
        list[Path], typer.Argument(help="Adapter directories, for one base.", metavar="ADAPTER...")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory or file to write; must not exist yet.")],
    weights: Annotated[
        str, typer.Option(help="A factor for each adapter, separated by commas; default: all 1.")
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

    Factors are concatenated, never added to each other: the ranks of a module add up. Each adapter's ΔW is
    subtracted from what was written; if anything is left, nothing stays at OUT and the exit code is 1.
    """

    def action() -> None:
        with quick_import():
            from moslora.api.adapters import combine as combine_adapters

        numbers = numbers_in(weights, "--weights", "1,0.5")
        print_result(combine_adapters(adapters, out, numbers, to, rank=rank, dtype=dtype, base=base), as_json)

    run_verb(action, debug)


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
        with quick_import():
            from moslora.api.adapters import merge as merge_into

        print_result(merge_into(base, adapter, out, progress=Display(sys.stderr)), as_json)

    run_verb(action, debug)


def inspect_(
    adapter: Annotated[Path, typer.Argument(help="Adapter of any format that is read.")],
    base: Annotated[str | None, typer.Option(help="Base model, to compare ΔW with its weights.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="HTML file of heat maps to write; must not exist yet.")
    ] = None,
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
        with quick_import():
            from moslora.api.adapters import inspect as inspect_adapter

        print_result(inspect_adapter(adapter, base, html=html, progress=Display(sys.stderr)), as_json)
        if html is not None and not as_json:
            Display().say(f"Wrote {html}.")

    run_verb(action, debug)


def doctor(
    adapter: Annotated[Path, typer.Argument(help="Adapter of any format that is read.")],
    base: Annotated[str | None, typer.Option(help="Base model to check the adapter against.")] = None,
    engines: Annotated[
        str,
        typer.Option(
            "--for", help="Programs that will load it, separated by commas: vllm, sglang, llama.cpp, …"
        ),
    ] = "",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check whether an adapter is sound, fits its base, and will run in the programs that you name.

    [bold]moslora doctor runs/demo/lora[/]
    [bold]moslora doctor runs/demo/adapter --base HuggingFaceTB/SmolLM2-135M-Instruct --for vllm,llama.cpp[/]

    Engines: peft, transformers, vllm, sglang, llama.cpp, ollama, diffusers, comfyui. The adapter is written in the
    format that each loads, in a temporary folder, and read back; what the engine applies of it is told module by
    module by its rules at a named version, with the command that serves it. The exit code is 1 if it is not usable
    there; each fault has its fix.
    """

    def action() -> None:
        with quick_import():
            from moslora.api.adapters import doctor as diagnose

        diagnosis = diagnose(adapter, base, names_in(engines), progress=Display(sys.stderr))
        print_result(diagnosis, as_json)
        if not diagnosis.is_usable:
            raise typer.Exit(1)

    run_verb(action, debug)


def push(
    adapter: Annotated[Path, typer.Argument(help="Adapter of any format that is read, or a run directory.")],
    repo: Annotated[
        str, typer.Argument(help="Repository of the Hub, OWNER/NAME; made if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Only you see it.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch; made if it does not exist. [bold]main[/] by default.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Hub id of the base, where the adapter knows only a folder of this machine."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be uploaded, and ask the Hub nothing.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Upload an adapter and its card to the Hugging Face Hub, and nothing else that lies there.

    [bold]moslora push runs/demo ada/my-adapter --dry-run[/]
    [bold]moslora push runs/demo ada/my-adapter --private[/]
    [bold]moslora push style.safetensors ada/my-style --base stabilityai/stable-diffusion-xl-base-1.0[/]

    Of a run directory its plain LoRA is meant. Checkpoints, optimizer states, data and predictions are never uploaded,
    and paths of this machine are taken out. An adapter that [bold]doctor[/] finds broken is refused; a README that
    you wrote is not replaced, neither here nor there. Needs a token with write access (hf auth login, or HF_TOKEN).
    The proof is the hash of every file, as the Hub has it.
    """

    def action() -> None:
        with quick_import():
            from moslora.api.adapters import push as push_adapter

        print_result(
            push_adapter(
                adapter,
                repo,
                private=private,
                revision=revision,
                base=base,
                dry_run=dry_run,
                progress=Display(sys.stderr),
            ),
            as_json,
        )

    run_verb(action, debug)
