"""Options that several verbs have."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
FORMAT_HELP = "Format: [bold]lora[/], [bold]native[/], [bold]gguf[/], [bold]diffusers[/] or [bold]kohya[/]."
Rank = Annotated[
    int | None,
    typer.Option(help="Reduce every module to this rank by its singular values, and print the error."),
]
Dtype = Annotated[
    str | None, typer.Option(help="Of the factors: [bold]float32[/], [bold]float16[/] or [bold]bfloat16[/].")
]
Base = Annotated[
    str | None,
    typer.Option(
        help="Base model, for gguf and for a LoRA that began with PiSSA or OLoRA; by default what the adapter names."
    ),
]
Alpha = Annotated[
    float | None,
    typer.Option(help="lora_alpha of the training, for a diffusers or kohya file without it."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
