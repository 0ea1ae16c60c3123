"""A conversation: every model hears the same questions and its own answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moslora.conversation.subjects import Subjects
from moslora.data.rendering import Template
from moslora.data.shapes import Example, Message
from moslora.data.tokenization import Encoder
from moslora.display import Display, Printable
from moslora.errors import EncodingError, UsageError
from moslora.tasks.text.room import POSITIONS

__all__ = ["Chat", "Reply", "Turn"]

DEFAULT_TOKENS = 256


@dataclass(frozen=True)
class Reply:
    """What one model answered.

    Attributes:
        model: ``"base"``, or an adapter's name.
        text: The answer, without special tokens.
        tokens: How many tokens it has.
        ended: ``"stop"`` at an end of turn, ``"length"`` at the largest number of tokens, ``"interrupted"`` by Ctrl-C.
    """

    model: str
    text: str
    tokens: int
    ended: str


@dataclass(frozen=True)
class Turn:
    """A question and the answers to it.

    Attributes:
        prompt: The question.
        replies: One of each model.
    """

    prompt: str
    replies: tuple[Reply, ...]

    @property
    def was_interrupted(self) -> bool:
        """Whether an answer was stopped; such a turn is not part of the conversation."""
        return any(reply.ended == "interrupted" for reply in self.replies)


@dataclass(repr=False)
class Chat(Printable):
    """A conversation with a base and its adapters.

    Attributes:
        subjects: Who answers.
        system: The system turn; None for none.
        seed: Of the sampling; every model draws with the same numbers in a turn.
        temperature: 0 for the most likely token at each step.
        max_new_tokens: Of an answer, at most.
        turns: What was said.
    """

    subjects: Subjects
    system: str | None = None
    seed: int = 0
    temperature: float = 0.0
    max_new_tokens: int = DEFAULT_TOKENS
    turns: list[Turn] = field(default_factory=list)
    histories: dict[str, list[Message]] = field(default_factory=dict)
    asked: int = 0

    def __post_init__(self) -> None:
        self.encoder = Encoder(self.subjects.tokenizer, self.subjects.template)
        self.template = Template(self.subjects.tokenizer)
        self.reset()

    def reset(self) -> None:
        """Forget what was said; the system turn stays."""
        self.histories = {name: [] for name in self.subjects.names}

    def set_system(self, text: str | None) -> None:
        """Begin anew with another system turn.

        Args:
            text: Its text; None or empty for none.

        Raises:
            UsageError: If the model has no place for one.
        """
        text = text or None
        if text is not None and not self.encoder.uses_chat:
            raise UsageError("This model has no chat template in use, so it has no place for a system turn.")
        if text is not None:
            self._render([Message("system", text), Message("user", "Hello")])
        self.system = text
        self.reset()

    def ask(
        self,
        text: str,
        on_text: Callable[[str, str], None] = lambda *_: None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Turn:
        """Put a question to every model.

        Args:
            text: The question.
            on_text: Called with a model's name and its answer so far, each time that grows.
            is_stopped: Asked after each token; True ends the turn.

        Returns:
            The answers. A turn that was stopped is not part of the conversation.

        Raises:
            EncodingError: If the chat template leaves the question out.
            UsageError: If the conversation has become longer than the model takes.
        """
        prompts = {name: self._prompt(name, text) for name in self.subjects.names}
        replies = []
        for name, ids in prompts.items():
            if is_stopped():
                replies.append(Reply(name, "", 0, "interrupted"))
                continue
            replies.append(self._answer(name, ids, on_text, is_stopped))
        turn = Turn(text, tuple(replies))
        self.asked += 1
        self.turns.append(turn)
        if not turn.was_interrupted and self.encoder.uses_chat:
            for reply in replies:
                self.histories[reply.model] += [
                    Message("user", text),
                    Message("assistant", reply.text, False),
                ]
        return turn

    # ---- prompts -----------------------------------------------------------------------------------------

    def _prompt(self, name: str, text: str) -> list[int]:
        """Return the token ids that a model answers to, as training made them."""
        if self.encoder.uses_chat:
            start = [Message("system", self.system)] if self.system else []
            ids = self._render([*start, *self.histories[name], Message("user", text)])
        else:
            # The completion is only there for the encoder, which closes the prompt before it.
            ids = self.encoder.encode_whole(Example("the question", prompt=text, completion="x")).prompt_ids
        config = self.subjects.model.config
        limit = next((n for key in POSITIONS if isinstance(n := getattr(config, key, None), int)), None)
        if limit is not None and len(ids) + self.max_new_tokens > limit:
            raise UsageError(
                f"The conversation has {len(ids)} tokens and an answer may have {self.max_new_tokens}, more than the "
                f"{limit} that the model takes. Begin anew with /reset, or lower --max-new-tokens."
            )
        if not ids:
            raise EncodingError("The question has no token; write something.")
        return ids

    def _render(self, messages: list[Message]) -> list[int]:
        rendered = self.template.text(messages, {}, ask=True)
        lost = self.template.left_out(messages, {}, rendered)
        said = [m for i, m in enumerate(messages) if i in lost and m.role != "assistant"]
        if said:
            raise EncodingError(
                f"The chat template leaves out the {said[0].role} turn, so no model would read it."
            )
        return self.template.ids(messages, {}, ask=True)

    # ---- answers -----------------------------------------------------------------------------------------

    def _answer(
        self, name: str, ids: list[int], on_text: Callable[[str, str], None], is_stopped: Callable[[], bool]
    ) -> Reply:
        import torch
        from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
        from transformers.generation.streamers import BaseStreamer

        tokenizer, device = self.subjects.tokenizer, self.subjects.device
        stops = sorted(self.encoder.stop_ids)
        written: list[int] = []

        class Stream(BaseStreamer):  # type: ignore[misc]
            has_prompt = False

            def put(self, value: Any) -> None:
                if not self.has_prompt:  # which generate sends first
                    self.has_prompt = True
                    return
                written.extend(int(token) for token in value.flatten().tolist())
                text = str(tokenizer.decode(written, skip_special_tokens=True))
                on_text(name, text.rstrip("\ufffd"))  # a character may take several tokens

            def end(self) -> None: ...

        class Stop(StoppingCriteria):  # type: ignore[misc]
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                return torch.full((len(input_ids),), is_stopped(), dtype=torch.bool, device=input_ids.device)

        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        pad = tokenizer.pad_token_id
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            eos_token_id=stops or None,
            pad_token_id=(stops[0] if stops else 0) if pad is None else pad,
            **sampling,
        )
        given = torch.tensor([ids], device=device)
        with self.subjects.speaking(name), torch.inference_mode(), _seeded(self.seed + self.asked):
            self.subjects.model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                generation_config=config,
                streamer=Stream(),
                stopping_criteria=StoppingCriteriaList([Stop()]),
            )
        ended = "stop" if written and written[-1] in stops else "interrupted" if is_stopped() else "length"
        text = str(tokenizer.decode(written, skip_special_tokens=True)).strip()
        return Reply(name, text, len(written), ended)

    # ---- what is shown -----------------------------------------------------------------------------------

    def show(self, display: Display) -> None:
        """Write who answers, what was proven, and what was said."""
        self.show_head(display)
        for turn in self.turns:
            display.say(f"> {turn.prompt}")
            for reply in turn.replies:
                display.say(f"{reply.model}: {reply.text}")

    def show_head(self, display: Display) -> None:
        """Write who answers, and what was proven."""
        subjects = self.subjects
        display.say(f"base: {subjects.base}")
        for name, path in subjects.adapters.items():
            activity = subjects.activity[name]
            if activity.learned is False:
                display.say(f"{name}: {path}, whose ΔW is zero: it answers as the base does.")
            else:
                display.say(
                    f"{name}: {path}, proven active: it moves logits by up to {activity.effect:.2g} "
                    f"({activity.modules} modules)."
                )
        for note in (*subjects.notes, *subjects.warnings):
            display.say(note)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {**self.identity(), "turns": [dataclasses.asdict(turn) for turn in self.turns]}

    def identity(self) -> dict[str, Any]:
        """Return who answers and how, of JSON's types."""
        subjects = self.subjects
        return {
            "base": subjects.base,
            "adapters": {name: str(path) for name, path in subjects.adapters.items()},
            "activity": {name: dataclasses.asdict(one) for name, one in subjects.activity.items()},
            "template": subjects.template,
            "system": self.system,
            "seed": self.seed,
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "notes": [*subjects.notes, *subjects.warnings],
        }


class _seeded:  # noqa: N801 - a context manager, used as a function
    """Draw with a seed inside the block, and leave the process's own random numbers as they were."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        import torch

        self.fork = torch.random.fork_rng()
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *error: Any) -> None:
        self.fork.__exit__(*error)
