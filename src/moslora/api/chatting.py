"""Talking to a base and its adapters side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from moslora.display import Display, Silence, find_display
from moslora.errors import UsageError
from moslora.failures import verb

if TYPE_CHECKING:
    from moslora.conversation.chat import Chat
    from moslora.conversation.pictures import Gallery, Viewing

__all__ = ["chat", "converse", "kind_of_run", "open_gallery", "open_transcript", "open_viewing"]

PathLike = str | os.PathLike[str]


@verb("chat")
def chat(
    adapters: PathLike | Sequence[PathLike],
    base: str | None = None,
    *,
    system: str | None = None,
    seed: int = 0,
    temperature: float = 0.0,
    max_new_tokens: int | None = None,
    progress: str | Display | None = None,
) -> Chat:
    """Load a base with one adapter or several, to ask all of them the same questions.

    Args:
        adapters: Run directories, whose plain LoRA is meant, or folders that PEFT loads; one, or a list.
        base: Hub id, folder, GGUF file or packaged name; None for the one of the first adapter's run, or that it names.
        system: A system turn.
        seed: Of the sampling. Every model draws with the same numbers.
        temperature: 0 for the most likely token at each step.
        max_new_tokens: Of an answer, at most; None for the recipe's, or 256.
        progress: None for silence, ``"terminal"`` or ``"notebook"``.

    Returns:
        The conversation: ``ask(text)`` returns a turn with one reply of each model, ``reset()`` begins anew.

    Raises:
        AdapterError, ModelError: If something cannot be read.
        ProofError: If an adapter does not fit the base, or is not active.
        UsageError: If an argument makes no sense.

    Example:
        >>> talk = moslora.chat("my-adapter", "base-model", max_new_tokens=4)
        >>> [reply.model for reply in talk.ask("Hello!").replies]
        ['base', 'my-adapter']
    """
    from moslora.conversation.chat import DEFAULT_TOKENS, Chat
    from moslora.conversation.subjects import load_subjects

    paths = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    if not paths:
        raise UsageError("adapters is empty; name an adapter or a run.")
    if not temperature >= 0 or temperature == float("inf"):
        raise UsageError(f"temperature={temperature} must be 0 (the most likely token) or above.")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UsageError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed={seed} must lie between 0 and 2**32 - 1.")
    display = find_display(progress)
    subjects = load_subjects([Path(path) for path in paths], base, display.say)
    if isinstance(display, Silence):
        for note in subjects.warnings:
            display.warn(note)
    longest = max_new_tokens or subjects.max_new_tokens or DEFAULT_TOKENS
    made = Chat(subjects, seed=seed, temperature=temperature, max_new_tokens=longest)
    if system:
        made.set_system(system)
    return made


def open_transcript(path: PathLike | None) -> object | None:
    """Return a transcript to keep turns in, before anything is loaded.

    Args:
        path: The file; None for none.

    Raises:
        UsageError: If it cannot be one.
    """
    from moslora.conversation.transcript import Transcript

    return None if path is None else Transcript(Path(path))


def converse(
    made: Chat, display: Display, stream: TextIO | None = None, transcript: object | None = None
) -> None:
    """Read questions until there are no more, and show the answers; as ``conversation.loop.converse``."""
    from moslora.conversation.loop import converse as talk
    from moslora.conversation.transcript import Transcript

    talk(made, display, stream, transcript if isinstance(transcript, Transcript) else None)


def kind_of_run(run: PathLike) -> str:
    """Return the kind of a run's task, as ``conversation.pictures.kind_of_run``."""
    from moslora.conversation.pictures import kind_of_run as kind_of

    return kind_of(Path(run))


@verb("chat")
def open_gallery(runs: Sequence[PathLike], progress: str | Display | None = None) -> Gallery:
    """Load a pipeline with the adapters of runs, to draw one prompt and seed with each.

    Args:
        runs: Directories of ``task: image`` with one base.
        progress: None for silence, ``"terminal"`` or ``"notebook"``.

    Returns:
        The gallery: ``draw(prompt, seed)`` yields each model's name and picture.
    """
    from moslora.conversation.pictures import open_gallery as load

    return load([Path(run) for run in runs], find_display(progress).say)


@verb("chat")
def open_viewing(runs: Sequence[PathLike], progress: str | Display | None = None) -> Viewing:
    """Load a vision-language model with the adapters of runs, each proven active, to ask about pictures.

    Args:
        runs: Directories of ``task: vision`` with one base.
        progress: None for silence, ``"terminal"`` or ``"notebook"``.

    Returns:
        The viewing: ``ask(text, picture)`` yields each model's name and answer.
    """
    from moslora.conversation.pictures import open_viewing as load

    return load([Path(run) for run in runs], find_display(progress).say)
