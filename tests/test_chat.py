"""Laws of chat: prompts as in training, every model its own answers, a transcript that nothing is lost of."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import moslora
import tiny
from moslora.cli import app
from moslora.conversation.chat import Chat, Reply, Turn
from moslora.conversation.loop import converse
from moslora.conversation.screen import Screen
from moslora.conversation.transcript import Transcript
from moslora.data.shapes import Example, Message
from moslora.data.tokenization import Encoder
from moslora.display import Display
from moslora.terminal import make_console
from verbs import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("world"))


@pytest.fixture
def chat(world: World) -> Chat:
    return moslora.chat([world.lora, world.native], str(world.base), max_new_tokens=6)


def answer_of(model: Any, ids: list[int], stops: list[int], count: int) -> list[int]:
    """Decode greedily, without generate: the oracle."""
    written: list[int] = []
    with torch.inference_mode():
        while len(written) < count and not (written and written[-1] in stops):
            logits = model(input_ids=torch.tensor([[*ids, *written]])).logits[0, -1]
            written.append(int(logits.argmax()))
    return written


def test_each_answers_as_it_does_alone_to_the_prompt_of_the_training(chat: Chat, world: World) -> None:
    turn = chat.ask("say 3")
    encoder = Encoder(tiny.tokenizer())
    ids = encoder.encode_whole(Example("x", prompt="say 3", completion="y")).prompt_ids
    base = AutoModelForCausalLM.from_pretrained(world.base).eval()
    stops = sorted(encoder.stop_ids)
    merged = moslora.merge(str(world.base), world.native, world.folder / "merged").path
    expected = [
        answer_of(m, ids, stops, 6) for m in (base, AutoModelForCausalLM.from_pretrained(merged).eval())
    ]
    texts = [tiny.tokenizer().decode(e, skip_special_tokens=True).strip() for e in expected]
    assert [reply.text for reply in turn.replies] == [texts[0], texts[1], texts[1]]
    assert [reply.model for reply in turn.replies] == ["base", "lora", "native"] and texts[0] != texts[1]


def test_every_model_hears_its_own_answers_and_a_reset_forgets_them(chat: Chat) -> None:
    first = chat.ask("say 1")
    for reply in first.replies:
        messages = [Message("user", "say 1"), Message("assistant", reply.text), Message("user", "say 2")]
        wanted = chat.template.ids(messages, {}, ask=True)
        assert chat._prompt(reply.model, "say 2") == wanted
    chat.reset()
    assert chat.ask("say 1").replies == first.replies
    chat.set_system("Be brief.")
    head = chat.template.ids([Message("system", "Be brief."), Message("user", "say 1")], {}, ask=True)
    assert chat._prompt("base", "say 1") == head


def test_one_seed_gives_one_conversation_and_the_processs_own_numbers_stay(world: World) -> None:
    def talk(seed: int) -> list[Turn]:
        made = moslora.chat(world.lora, str(world.base), seed=seed, temperature=2.0, max_new_tokens=8)
        state = torch.get_rng_state()
        turns = [made.ask("say 1"), made.ask("say 1")]
        assert torch.equal(torch.get_rng_state(), state)
        return turns

    one = talk(1)
    assert one == talk(1) and one != talk(2)


def test_a_run_is_talked_to_with_its_own_base_and_template(world: World, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="held-out"):
        run = moslora.train(settings=world.recipe(tmp_path))
    made = moslora.chat(run.path)
    assert made.subjects.base == str(world.base) and made.max_new_tokens == 4 and not made.subjects.warnings
    assert made.subjects.names == ["base", "run"]
    template = world.base / "chat_template.jinja"
    before = template.read_text(encoding="utf-8")
    try:
        template.write_text(before.replace("assistant", "helper"), encoding="utf-8")
        with pytest.warns(UserWarning, match="not the one of the training"):
            moslora.chat(run.path)
    finally:
        template.write_text(before, encoding="utf-8")


def test_an_adapter_that_is_not_applied_is_not_talked_to(world: World, tmp_path: Path) -> None:
    other = tiny.save_chat_model(
        tmp_path / "other", hidden_size=16, num_attention_heads=2, num_key_value_heads=1
    )
    with pytest.raises(moslora.ProofError, match="does not fit this base"):
        moslora.chat(world.lora, str(other))
    with pytest.raises(moslora.AdapterError, match="does not exist"):
        moslora.chat(tmp_path / "nothing", str(world.base))


def test_a_conversation_that_outgrows_the_model_says_so(chat: Chat) -> None:
    with pytest.raises(moslora.UsageError, match="/reset"):
        chat.ask("x" * 300)


# --- The loop -------------------------------------------------------------------------------------------------


def invoke(*arguments: str, lines: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["chat", *arguments], input=lines, env={"COLUMNS": "120", "NO_COLOR": "1"})
    return done.exit_code, done.output


def test_lines_from_a_pipe_are_questions_and_commands(world: World, tmp_path: Path) -> None:
    kept = tmp_path / "talk.jsonl"
    code, shown = invoke(
        str(world.lora),
        "--base",
        str(world.base),
        "--max-new-tokens",
        "4",
        "--transcript",
        str(kept),
        lines="say 1\n\n/rest\n/reset\nsay 1\n//x\n/help\n/quit\nnever asked\n",
    )
    assert code == 0, shown
    lines = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert [line.get("prompt") for line in lines] == [None, "say 1", "say 1", "/x"]
    assert lines[1]["replies"] == lines[2]["replies"] and lines[0]["chat"]["base"] == str(world.base)
    assert "Did you mean '/reset'" in shown and "proven active" in shown and "never asked" not in shown
    assert all(f"{reply['model']}: " in shown for reply in lines[1]["replies"])


def test_the_answer_in_json_is_the_conversation(world: World) -> None:
    arguments = [str(world.lora), "--base", str(world.base), "--max-new-tokens", "3", "--json"]
    done = CliRunner().invoke(app, ["chat", *arguments], input="say 1")
    told = json.loads(done.stdout)
    assert [turn["prompt"] for turn in told["turns"]] == ["say 1"] and told["activity"]["lora"]["effect"] > 0


def test_a_transcript_grows_by_whole_lines_whatever_was_there(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    Transcript(path).append({"a": 1})
    with path.open("ab") as file:
        file.write(b'{"cut": "of')  # as a kill leaves it
    Transcript(path).append({"b": 2})
    assert path.read_bytes() == b'{"a": 1}\n{"cut": "of\n{"b": 2}\n'
    writers = [
        threading.Thread(target=Transcript(path).append, args=({"n": n, "x": "y" * 5000},)) for n in range(20)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[3:]]
    assert sorted(line["n"] for line in found) == list(range(20))


@pytest.mark.parametrize("content", [b"my notes\n", b"\x89PNG\n", b"[1]\n"])
def test_a_file_that_is_not_a_transcript_is_not_appended_to(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(moslora.UsageError, match="not a transcript"):
        Transcript(path)
    assert path.read_bytes() == content


class Scripted:
    """A conversation whose answers are given, and that Ctrl-C is pressed in."""

    def __init__(self, presses: int) -> None:
        self.presses, self.asked, self.system = presses, 0, None
        self.subjects = type("S", (), {"names": ["base", "tuned"]})()

    def ask(self, text: str, on_text: Any, is_stopped: Any) -> Turn:
        self.asked += 1
        on_text("base", "one \x1b[2J")
        for _ in range(self.presses if self.asked == 1 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        ended = "interrupted" if is_stopped() else "stop"
        return Turn(text, (Reply("base", "one \x1b[2J", 1, ended), Reply("tuned", "two", 1, ended)))


@pytest.mark.parametrize(("presses", "asked"), [(0, 2), (1, 2), (2, 1)])
def test_ctrl_c_stops_an_answer_and_twice_leaves(presses: int, asked: int) -> None:
    before = signal.getsignal(signal.SIGINT)
    talk, out = Scripted(presses), io.StringIO()
    lines = io.StringIO("a\nb\n")
    if presses == 2:
        with pytest.raises(KeyboardInterrupt):
            converse(talk, Display(out), lines)  # type: ignore[arg-type]
    else:
        converse(talk, Display(out), lines)  # type: ignore[arg-type]
    assert talk.asked == asked and ("Stopped" in out.getvalue()) is (presses == 1)
    assert signal.getsignal(signal.SIGINT) is before and "\x1b" not in out.getvalue()


@pytest.mark.parametrize(("width", "is_wide"), [(120, True), (50, False)])
def test_answers_stand_side_by_side_where_there_is_room(width: int, is_wide: bool) -> None:
    out = io.StringIO()
    display = Display(out)
    display.console = make_console(out, width=width, height=12, force_terminal=True, legacy_windows=False)
    screen = Screen(display, ["base", "tuned"])
    hostile = "first\x1b]0;owned\x07 answer"
    with screen.turn():
        for text in ("fir", "first", hostile):
            screen.write("base", text)
        screen.write("tuned", "second answer")
    screen.done(Turn("x", (Reply("base", hostile, 3, "stop"), Reply("tuned", "second answer", 2, "length"))))
    shown = out.getvalue()
    assert "\x1b]0" not in shown and "\\x1b]0;owned" in shown
    together = [line for line in shown.splitlines() if "first" in line and "second answer" in line]
    assert bool(together) is is_wide and "longest answer reached" in shown
