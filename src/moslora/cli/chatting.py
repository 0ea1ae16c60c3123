"""The verb that talks: chat."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moslora.cli.options import Debug, Json
from moslora.cli.running import print_result, quick_import, run_verb
from moslora.display import Display


def chat(
    adapter: Annotated[Path, typer.Argument(help="A run directory, or an adapter that PEFT loads.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model; by default that of the run, or what the adapter names.", metavar="MODEL"
        ),
    ] = None,
    more: Annotated[
        list[Path] | None,
        typer.Option(
            "--adapter",
            help="Another run or adapter beside it; may be given several times.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system turn.")] = None,
    transcript: Annotated[
        Path | None, typer.Option(help="JSON Lines file that every turn is appended to.", metavar="FILE")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling; all models draw with the same numbers.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token at each step.")] = 0.0,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Of an answer, at most; the recipe's, or 256.", min=1)
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Talk to a base and its adapters side by side.

    [bold]moslora chat runs/demo[/]
    [bold]moslora chat runs/demo --adapter runs/slower --temperature 0.7 --transcript talk.jsonl[/]
    [bold]echo "Lights off at nine" | moslora chat my-lora --base HuggingFaceTB/SmolLM2-135M-Instruct[/]

    Every model gets the same question, in the chat template of the training, and remembers its own answers. Each
    adapter is proven active first. In a terminal type [bold]/help[/] for the commands; Ctrl-C stops an answer, twice
    leaves. Piped in, each line is a question.
    """

    def action() -> None:
        with quick_import():
            from moslora.api.chatting import chat as open_chat
            from moslora.api.chatting import converse, open_transcript

        kept = open_transcript(transcript)
        display = Display(sys.stderr if as_json else sys.stdout)
        talk = open_chat(
            [adapter, *(more or [])],
            base,
            system=system,
            seed=seed,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            progress=display,
        )
        if not as_json:
            talk.show_head(display)
        converse(talk, display, transcript=kept)
        if as_json:
            print_result(talk, as_json)

    run_verb(action, debug)
