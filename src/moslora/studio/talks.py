"""Conversations on the page, and the answers that were marked as better, kept as preference data."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

from moslora.api.chatting import chat, kind_of_run, open_gallery, open_viewing
from moslora.conversation.chat import Chat, Reply, Turn
from moslora.conversation.pictures import Gallery, Viewing
from moslora.conversation.subjects import Subjects
from moslora.conversation.transcript import Transcript
from moslora.display import Display
from moslora.errors import UsageError
from moslora.studio.answers import ONE_AT_A_TIME, PageDisplay
from moslora.studio.workspace import Workspace

__all__ = ["MOST", "PictureTalk", "Talk", "Talks", "reply_text"]

MOST = 4  # models side by side, the base among them
ENDED = {"length": " … (longest answer reached)", "interrupted": " … (stopped)"}


@dataclass
class Talk:
    """One page's conversation.

    Attributes:
        made: Who answers, and what was said.
        stop: Set to end the answer that is being written.
        histories: Before each turn, the messages that each model had heard.
        marked: Of each turn that was marked, which answer.
    """

    made: Chat
    stop: threading.Event = field(default_factory=threading.Event)
    histories: list[dict[str, list[tuple[str, str]]]] = field(default_factory=list)
    marked: dict[int, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Who answers."""
        return self.made.subjects.names

    def ask(self, text: str) -> Iterator[dict[str, str]]:
        """Put a question to all models.

        Args:
            text: The question.

        Yields:
            The answers so far, by model.

        Raises:
            EncodingError, UsageError: As for ``Chat.ask``.
        """
        if not text.strip():
            raise UsageError("Write a question first.")
        self.stop.clear()
        before = {
            name: [(message.role, message.content) for message in history]
            for name, history in self.made.histories.items()
        }
        said: Queue[tuple[str, str] | None] = Queue()
        failed: list[BaseException] = []

        def work() -> None:
            try:
                with ONE_AT_A_TIME:
                    self.made.ask(text, lambda name, so_far: said.put((name, so_far)), self.stop.is_set)
            except BaseException as error:
                failed.append(error)
            finally:
                said.put(None)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        answers: dict[str, str] = {}
        try:
            while (piece := said.get()) is not None:
                answers[piece[0]] = piece[1]
                if said.empty():  # what came meanwhile is drawn at once
                    yield dict(answers)
        except GeneratorExit:  # the page was closed
            self.stop.set()
            raise
        finally:
            thread.join()
        if failed:
            raise failed[0]
        self.histories.append(before)

    def begin_anew(self) -> None:
        """Forget what was said; the system turn stays."""
        self.made.reset()
        self.made.turns.clear()
        self.histories.clear()
        self.marked.clear()

    def is_comparable(self, number: int) -> bool:
        """Say whether all models had heard the same before a turn, so that their answers are to one question.

        Args:
            number: Of the turn.
        """
        heard = list(self.histories[number].values())
        return all(one == heard[0] for one in heard)

    def pairs(self, number: int, better: str) -> list[dict[str, Any]]:
        """Return what a mark says, as rows of preference data: the better answer against each other one.

        Args:
            number: Of the turn.
            better: The model whose answer is better.

        Raises:
            UsageError: If the answers are not comparable, or equal.
        """
        turn: Turn = self.made.turns[number]
        replies = {reply.model: reply for reply in turn.replies}
        if better not in replies:
            raise UsageError(f"{better} did not answer.")
        if not self.is_comparable(number):
            raise UsageError(
                "Before this question the models had given other answers each, so their answers are not to one "
                "conversation, and cannot be kept as a preference. Begin anew, and mark the first answers."
            )
        chosen = replies[better]
        others = [reply for name, reply in replies.items() if name != better and reply.text != chosen.text]
        if turn.was_interrupted or not chosen.text:
            raise UsageError("An answer that was stopped, or is empty, is not kept as the better one.")
        if not others:
            raise UsageError("The answers are the same, so none is better.")
        return [self._row(number, chosen, other) for other in others if other.text]

    def _row(self, number: int, chosen: Reply, other: Reply) -> dict[str, Any]:
        turn = self.made.turns[number]
        if not self.made.encoder.uses_chat:
            return {"prompt": turn.prompt, "chosen": chosen.text, "rejected": other.text}
        heard = self.histories[number][chosen.model]
        system = [("system", self.made.system)] if self.made.system else []
        prompt = [{"role": role, "content": text} for role, text in [*system, *heard, ("user", turn.prompt)]]
        return {
            "prompt": prompt,
            "chosen": [{"role": "assistant", "content": chosen.text}],
            "rejected": [{"role": "assistant", "content": other.text}],
        }


@dataclass
class PictureTalk:
    """One page's pictures: drawn side by side, or asked about.

    Attributes:
        kind: ``"image"`` or ``"vision"``.
        made: Who draws or answers.
        head: What was loaded, a line each.
        stop: Set to end before the next model.
        turns: What was asked, the picture that was shown, and what each model gave: a text, or a PNG file.
    """

    kind: str
    made: Gallery | Viewing
    head: list[str]
    stop: threading.Event = field(default_factory=threading.Event)
    turns: list[tuple[str, bytes, dict[str, str | bytes]]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Who draws or answers."""
        return self.made.names

    def ask(self, text: str, picture: bytes, seed: int) -> Iterator[dict[str, str | bytes]]:
        """Let every model draw a prompt, or answer about a picture.

        Args:
            text: The prompt or the question.
            picture: The picture that is asked about; empty for drawing.
            seed: Of the noise.

        Yields:
            What there is so far, by model.

        Raises:
            PictureError, UsageError: If something cannot be used.
        """
        self.stop.clear()
        found: dict[str, str | bytes] = {}
        if self.kind == "vision" and not picture:
            raise UsageError("Put a picture in first.")
        given: Iterator[tuple[str, Any]]
        if isinstance(self.made, Gallery):
            given = self.made.draw(text, seed, self.stop.is_set)
        else:
            given = self.made.ask(text, picture, self.stop.is_set)
        while True:
            with ONE_AT_A_TIME:
                step = next(given, None)
            if step is None:
                break
            found[step[0]] = step[1]
            yield dict(found)
        self.turns.append((text, picture, found))

    def begin_anew(self) -> None:
        """Forget what was asked."""
        self.turns.clear()


class Talks:
    """Loads models to talk to, one base with its adapters at a time.

    Args:
        workspace: The folders.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.loaded: tuple[Any, Subjects, int] | None = None
        self.pictured: tuple[Any, PictureTalk] | None = None

    @property
    def marks(self) -> Path:
        """The file that marks are kept in."""
        return self.workspace.root / "data" / "preferences.jsonl"

    def open(
        self,
        adapters: Sequence[str],
        base: str,
        display: Display,
        system: str = "",
        seed: int = 0,
        temperature: float = 0.0,
        max_new_tokens: int | None = None,
    ) -> Talk:
        """Load a base with adapters, each proven active, and begin a conversation.

        Args:
            adapters: Runs or adapters, by their names on the page.
            base: The base; empty for that of the first run.
            display: Where to tell of it.
            system: A system turn.
            seed, temperature, max_new_tokens: As for ``moslora.chat``.

        Raises:
            UsageError: If there are too many, or none; what else ``moslora.chat`` raises.
        """
        if not adapters:
            raise UsageError("Choose a run or an adapter to talk to.")
        if len(adapters) >= MOST:
            raise UsageError(f"{len(adapters)} adapters are too many side by side; choose up to {MOST - 1}.")
        paths = [self.workspace.find(name) for name in adapters]
        if base and ((self.workspace.root / base).exists() or base.startswith(("/", "~", "."))):
            base = str(self.workspace.find(base))
        key = (tuple(map(str, paths)), base, tuple(_stamp(path) for path in paths))
        options: dict[str, Any] = {"seed": seed, "temperature": temperature, "max_new_tokens": max_new_tokens}
        with ONE_AT_A_TIME:
            if self.loaded is None or self.loaded[0] != key:
                self.loaded = self.pictured = None  # so that the old model's memory can go first
                first = chat(paths, base or None, progress=display, **options)
                self.loaded = (key, first.subjects, first.max_new_tokens)
            _, subjects, usual = self.loaded
            made = Chat(subjects, seed=seed, temperature=temperature, max_new_tokens=max_new_tokens or usual)
            if system.strip():
                made.set_system(system.strip())
        return Talk(made)

    def open_pictures(self, adapters: Sequence[str], display: Display) -> PictureTalk | None:
        """Load models that draw or see with the adapters of runs; None if the first one is of another kind.

        Args:
            adapters: Runs, by their names on the page.
            display: Where to tell of it.

        Raises:
            UsageError: If there are too many, or they do not go together.
        """
        paths = [self.workspace.find(name) for name in adapters]
        kind = kind_of_run(paths[0]) if paths else "text"
        if kind not in ("image", "vision"):
            return None
        if len(paths) >= MOST:
            raise UsageError(f"{len(paths)} adapters are too many side by side; choose up to {MOST - 1}.")
        key = tuple((str(path), _stamp(path)) for path in paths)
        with ONE_AT_A_TIME:
            if self.pictured is None or self.pictured[0] != key:
                self.loaded = self.pictured = None  # so that the old models' memory can go first
                lines = PageDisplay()
                made: Gallery | Viewing = (
                    open_gallery(paths, lines) if kind == "image" else open_viewing(paths, lines)
                )
                self.pictured = (key, PictureTalk(kind, made, lines.lines))
            known = self.pictured[1]
        for line in known.head:
            display.say(line)
        return PictureTalk(kind, known.made, known.head)

    def mark(self, talk: Talk, number: int, better: str) -> int:
        """Keep that an answer is better, as preference data.

        Args:
            talk: The conversation.
            number: Of the turn.
            better: The model whose answer is better.

        Returns:
            How many pairs were kept.

        Raises:
            UsageError: If it cannot be kept, or the turn is marked already.
        """
        if number in talk.marked:
            raise UsageError(f"This answer is marked already: {talk.marked[number]} is better.")
        rows = talk.pairs(number, better)
        self.marks.parent.mkdir(exist_ok=True)
        kept = Transcript(self.marks)
        for row in rows:
            kept.append(row)
        talk.marked[number] = better
        return len(rows)

    def count_marks(self) -> int:
        """Return how many pairs are kept."""
        try:
            with self.marks.open("rb") as file:
                return sum(1 for line in file if line.strip())
        except OSError:
            return 0


def _stamp(path: Path) -> tuple[tuple[str, int], ...]:
    """Return what changes when an adapter is written anew."""
    files = [file for folder in (path, path / "lora") for file in folder.glob("*.safetensors")]
    return tuple(sorted((str(file), file.stat().st_mtime_ns) for file in files))


def reply_text(reply: Reply) -> str:
    """Return an answer with how it ended, where that is not by itself.

    Args:
        reply: The answer.
    """
    return reply.text + ENDED.get(reply.ended, "")
