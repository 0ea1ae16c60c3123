"""The tab Chat: base and adapters side by side, word by word, and marks for the better answer."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from moslora.studio.answers import PageDisplay, error_box, whole
from moslora.studio.context import Studio
from moslora.studio.markup import attributes, empty, escape, notice
from moslora.studio.talks import MOST, PictureTalk, Talk, reply_text

__all__ = ["build"]

MOST_PIXELS = 50_000_000  # of a picture that is shown
PICKED = """
element.addEventListener('click', (event) => {
  const found = event.target.closest('[data-turn]');
  if (found) trigger('select', {turn: Number(found.dataset.turn), model: found.dataset.model});
});
"""
NOBODY = empty(
    "Nobody to talk to yet.",
    "Choose a run or an adapter, and press Load. The base and each adapter answer side by side.",
)


def build(studio: Studio) -> None:
    """Make the tab."""
    talks = studio.talks
    talk: Any = gr.State(None)
    with gr.Row(elem_classes="actions"):
        chosen = gr.Dropdown(
            _subjects(studio),
            value=[],
            multiselect=True,
            label=f"Runs or adapters, up to {MOST - 1}",
            scale=3,
            min_width=240,
        )
        base = gr.Dropdown(
            ["", *studio.recipes.models()],
            value="",
            label="Base (that of the run)",
            allow_custom_value=True,
            scale=2,
        )
        load = gr.Button("Load", variant="primary", scale=1, min_width=100)
    with gr.Accordion("How they answer", open=False), gr.Row(elem_classes="fields"):
        system = gr.Textbox("", label="System turn", lines=1, min_width=200)
        temperature = gr.Number(
            0.0, label="Temperature", minimum=0, info="0: the most likely token", min_width=120
        )
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=100)
        longest = gr.Textbox("", label="Tokens of an answer, at most", max_lines=1, min_width=120)
    said = gr.HTML(apply_default_css=False, elem_id="chat-said")
    picture = gr.Image(
        label="The picture you ask about",
        type="filepath",
        sources=["upload", "clipboard"],
        height=220,
        visible=False,
        elem_id="picture",
    )
    turns = gr.HTML(NOBODY, js_on_load=PICKED, apply_default_css=False, elem_id="talk", min_height=300)
    with gr.Row(elem_classes="actions", visible=False) as asking:
        question = gr.Textbox(
            "", label="Your question", lines=1, max_lines=6, scale=5, min_width=220, elem_id="question"
        )
        send = gr.Button("Ask", variant="primary", scale=1, min_width=80)
        halt = gr.Button("Stop", scale=1, min_width=80)
        anew = gr.Button("Begin anew", scale=1, min_width=100)

    chosen.focus(lambda: gr.update(choices=_subjects(studio)), None, chosen, show_progress="hidden")

    def do_load(*values: Any) -> Iterator[tuple[Any, ...]]:
        names, of, told, warmth, number, most = values
        display = PageDisplay()
        loading = notice("note", "Loading the models, and proving each adapter active …")
        yield gr.skip(), loading, gr.skip(), gr.skip(), gr.skip()
        try:
            pictured = talks.open_pictures(names or [], display)
            if pictured is not None:
                sees = gr.update(visible=pictured.kind == "vision", value=None)
                yield pictured, display.html, _pictures(pictured, {}, "", b""), gr.update(visible=True), sees
                return
            found = talks.open(
                names or [],
                of or "",
                display,
                told or "",
                int(number or 0),
                float(warmth or 0.0),
                whole(most, "Tokens of an answer"),
            )
        except Exception as error:
            yield None, error_box(error), NOBODY, gr.update(visible=False), gr.update(visible=False)
            return
        head = PageDisplay()
        found.made.show_head(head)
        yield found, head.html, _page(found, {}, ""), gr.update(visible=True), gr.update(visible=False)

    load.click(
        do_load,
        [chosen, base, system, temperature, seed, longest],
        [talk, said, turns, asking, picture],
        show_progress="hidden",
    )

    def do_ask(
        found: Talk | PictureTalk | None, text: str, shown: str | None, number: float | None
    ) -> Iterator[tuple[Any, Any, Any]]:
        if found is None:
            yield gr.skip(), text, notice("error", "Load a run or an adapter first.")
            return
        if isinstance(found, PictureTalk):
            yield from _ask_pictures(found, text, shown, int(number or 0))
            return
        yield _page(found, {}, text), "", ""
        try:
            for answers in found.ask(text):
                yield _page(found, answers, text), gr.skip(), gr.skip()
        except Exception as error:
            yield _page(found, {}, ""), text, error_box(error)
            return
        yield _page(found, {}, ""), gr.skip(), gr.skip()

    for event in (send.click, question.submit):
        event(do_ask, [talk, question, picture, seed], [turns, question, said], show_progress="hidden")

    def do_halt(found: Talk | PictureTalk | None) -> None:
        if found is not None:
            found.stop.set()

    halt.click(do_halt, talk, None, show_progress="hidden", concurrency_limit=None)

    def do_anew(found: Talk | PictureTalk | None) -> tuple[Any, str]:
        if found is None:
            return gr.skip(), ""
        found.begin_anew()
        if isinstance(found, PictureTalk):
            return _pictures(found, {}, "", b""), ""
        return _page(found, {}, ""), ""

    anew.click(do_anew, talk, [turns, said], show_progress="hidden")

    def do_mark(found: Talk | PictureTalk | None, event: gr.EventData) -> tuple[Any, str]:
        if not isinstance(found, Talk):
            return gr.skip(), ""
        try:
            count = talks.mark(found, int(event._data["turn"]), str(event._data["model"]))
        except Exception as error:
            return gr.skip(), error_box(error)
        file = studio.workspace.shown(talks.marks)
        total = talks.count_marks()
        kept = f"{count} pair{'s' * (count != 1)} kept; {total} in {file}. Train on it with task: preference."
        return _page(found, {}, ""), notice("done", kept)

    turns.select(do_mark, talk, [turns, said], show_progress="hidden")


def _subjects(studio: Studio) -> list[str]:
    """Return what can be talked to: runs that have a LoRA, and adapters that are not of a run."""
    runs = [state.name for state in studio.library.runs() if (state.path / "lora").is_dir()]
    of_runs = tuple(f"{name}/" for name in runs)
    return [*runs, *(name for name in studio.adapters.names() if not name.startswith(of_runs))]


def _ask_pictures(
    talk: PictureTalk, text: str, shown: str | None, seed: int
) -> Iterator[tuple[Any, Any, Any]]:
    """Let models draw or see, and show what there is so far."""
    try:
        content = Path(shown).read_bytes() if shown and talk.kind == "vision" else b""
        yield _pictures(talk, {}, text, content), "", ""
        for found in talk.ask(text, content, seed):
            yield _pictures(talk, found, text, content), gr.skip(), gr.skip()
    except Exception as error:
        yield _pictures(talk, {}, "", b""), text, error_box(error)
        return
    yield _pictures(talk, {}, "", b""), gr.skip(), gr.skip()


def _pictures(talk: PictureTalk, so_far: dict[str, str | bytes], asked: str, shown: bytes) -> str:
    """Return what was drawn or seen, with what is under way at its end."""
    turns = [*talk.turns, *([(asked, shown, so_far)] if asked else [])]
    if not turns:
        what = "Write a prompt" if talk.kind == "image" else "Put a picture in, and ask about it"
        return empty(
            f"{what}.", "Every model gets the same prompt and seed, or the same picture and question."
        )
    sections = []
    for text, picture, found in turns:
        columns = ""
        for name in talk.names:
            given = found.get(name)
            if isinstance(given, bytes):
                body = f'<img src="{_as_data(given)}" alt="{escape(f"{name}: {text}")}">'
            else:
                body = f'<div class="said">{escape(given or "")}</div>'
            state = "waiting" if given is None and found is so_far else ""
            columns += f'<article class="answer {state}"><h4>{escape(name)}</h4>{body}</article>'
        sections.append(_framed(text, columns, picture))
    return f'<div class="talk" aria-live="polite">{"".join(sections)}</div>'


def _as_data(picture: bytes) -> str:
    """Return a small form of a picture as a data URI."""
    from moslora.data.pictures import open_image

    small = open_image(picture, MOST_PIXELS)
    small.thumbnail((640, 640))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _page(talk: Talk, answers: dict[str, str], asked: str) -> str:
    """Return the conversation, with the turn that is being written at its end."""
    found = [_turn(talk, number) for number in range(len(talk.made.turns))]
    if asked:
        columns = "".join(
            _column(name, answers.get(name, ""), "writing" if name in answers else "waiting")
            for name in talk.names
        )
        found.append(_framed(asked, columns))
    if not found:
        found = [
            empty("Ask something.", "Every model gets the same question, and remembers its own answers.")
        ]
    return f'<div class="talk" aria-live="polite">{"".join(found)}</div>'


def _turn(talk: Talk, number: int) -> str:
    turn = talk.made.turns[number]
    can_mark = (
        not turn.was_interrupted
        and len({reply.text for reply in turn.replies}) > 1
        and talk.is_comparable(number)
    )
    columns = ""
    for reply in turn.replies:
        mark = ""
        if number in talk.marked:
            mark = '<b class="better">✓ marked as better</b>' if talk.marked[number] == reply.model else ""
        elif can_mark:
            about = attributes({"data-turn": number, "data-model": reply.model})
            mark = f'<button type="button" class="mark"{about}>This one is better</button>'
        columns += _column(reply.model, reply_text(reply), "", mark)
    return _framed(turn.prompt, columns)


def _framed(question: str, columns: str, picture: bytes = b"") -> str:
    seen = (
        f'<img class="seen" src="{_as_data(picture)}" alt="The picture that was asked about">'
        if picture
        else ""
    )
    asked = f'<p class="asked">{seen}{escape(question)}</p>'
    return f'<section class="turn">{asked}<div class="columns">{columns}</div></section>'


def _column(name: str, text: str, state: str, mark: str = "") -> str:
    said = f'<h4>{escape(name)}</h4><div class="said">{escape(text)}</div>'
    return f'<article class="answer {state}">{said}{mark}</article>'
