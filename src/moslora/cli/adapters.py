"""The verbs on adapters at rest: export, import, combine, merge, inspect, doctor."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from moslora.cli.options import FORMAT_HELP, Alpha, Base, Debug, Dtype, Json, Rank
from moslora.cli.running import run_verb
from moslora.cli.tables import findings_table, groups_table


def export(
    adapter: Annotated[Path, typer.Argument(help="Adapter of any format that is read.")],
    out: Annotated[Path, typer.Argument(help="Directory or file to write; must not exist yet.")],
    to: Annotated[str | None, typer.Option(help=f"{FORMAT_HELP} [bold]lora[/] by default.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="Instead of --to, the program that will run it: comfyui, diffusers, llama.cpp, vllm, …",
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

    run_verb(action, debug)


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

    Supported: checkpoints of MoSLoRA's authors ([bold]lora_AB[/], in their SDXL files [bold]lora.downB[/]; also pickled
    ones, of which only tensors are opened) and of PEFT pull request 2294 ([bold]lora_mixer[/]), PaddleNLP's in
    safetensors, kohya's and diffusers' files, and plain LoRA, whose mixers become the identity. The adapter of a
    pipeline becomes one directory for each of its models. Proven as [bold]export[/] is, by reading back what was
    written.
    """
    run_verb(lambda: _convert(source, out, "native", as_json, alpha=alpha), debug)


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

    Factors are concatenated, never added to each other: the ranks of a module add up. Each adapter's ΔW is
    subtracted from what was written; if anything is left, nothing stays at OUT and the exit code is 1.
    """

    def action() -> None:
        from moslora.adapters.combine import combine as combine_adapters

        try:
            numbers = [float(part) for part in weights.split(",")] if weights else [1.0] * len(adapters)
        except ValueError:
            raise ValueError(f"--weights {weights} is not a list of numbers, such as 1,0.5.") from None
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
        from moslora.adapters.merge import LEAST_SURVIVING
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
        if proof.least_kept < LEAST_SURVIVING:
            print(
                f"Rounding to the base's dtype kept {proof.least_kept:.0%} of ΔW in {proof.least_kept_module}: it is "
                "small beside the weights. To keep it all, merge into the base in float32, or ship the adapter."
            )

    run_verb(action, debug)


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

        Display().show(groups_table(found))
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

    run_verb(action, debug)


def doctor(
    adapter: Annotated[Path, typer.Argument(help="Adapter of any format that is read.")],
    base: Annotated[str | None, typer.Option(help="Base model, to hold the adapter against.")] = None,
    engines: Annotated[
        str,
        typer.Option(
            "--for", help="Programs that will run it, separated by commas: vllm, sglang, llama.cpp, …"
        ),
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

            Display().show(findings_table(found))
            print(found.verdict)
        if not found.is_usable:
            raise typer.Exit(1)

    run_verb(action, debug)


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
