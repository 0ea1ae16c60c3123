"""The tab Chat: base and adapters side by side, word by word, and marks for the better answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from moslora.studio.answers import PageDisplay, error_box, whole
from moslora.studio.context import Studio
from moslora.studio.markup import attributes, empty, escape, notice
from moslora.studio.talks import MOST, Talk, reply_text

__all__ = ["build"]

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
    turns = gr.HTML(NOBODY, js_on_load=PICKED, apply_default_css=False, elem_id="talk", min_height=300)
    with gr.Row(elem_classes="actions", visible=False) as asking:
        question = gr.Textbox(
            "", label="Your question", lines=1, max_lines=6, scale=5, min_width=220, elem_id="question"
        )
        send = gr.Button("Ask", variant="primary", scale=1, min_width=80)
        halt = gr.Button("Stop", scale=1, min_width=80)
        anew = gr.Button("Begin anew", scale=1, min_width=100)

    chosen.focus(lambda: gr.update(choices=_subjects(studio)), None, chosen, show_progress="hidden")

    def do_load(*values: Any) -> Iterator[tuple[Any, str, Any, Any]]:
        names, of, told, warmth, number, most = values
        display = PageDisplay()
        yield (
            gr.skip(),
            notice("note", "Loading the models, and proving each adapter active …"),
            gr.skip(),
            gr.skip(),
        )
        try:
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
            yield None, error_box(error), NOBODY, gr.update(visible=False)
            return
        head = PageDisplay()
        found.made.show_head(head)
        yield found, head.html, _page(found, {}, ""), gr.update(visible=True)

    load.click(
        do_load,
        [chosen, base, system, temperature, seed, longest],
        [talk, said, turns, asking],
        show_progress="hidden",
    )

    def do_ask(found: Talk | None, text: str) -> Iterator[tuple[Any, Any, Any]]:
        if found is None:
            yield gr.skip(), text, notice("error", "Load a run or an adapter first.")
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
        event(do_ask, [talk, question], [turns, question, said], show_progress="hidden")

    def do_halt(found: Talk | None) -> None:
        if found is not None:
            found.stop.set()

    halt.click(do_halt, talk, None, show_progress="hidden", concurrency_limit=None)

    def do_anew(found: Talk | None) -> tuple[Any, str]:
        if found is None:
            return gr.skip(), ""
        found.begin_anew()
        return _page(found, {}, ""), ""

    anew.click(do_anew, talk, [turns, said], show_progress="hidden")

    def do_mark(found: Talk | None, event: gr.EventData) -> tuple[Any, str]:
        if found is None:
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


def _framed(question: str, columns: str) -> str:
    asked = f'<p class="asked">{escape(question)}</p>'
    return f'<section class="turn">{asked}<div class="columns">{columns}</div></section>'


def _column(name: str, text: str, state: str, mark: str = "") -> str:
    said = f'<h4>{escape(name)}</h4><div class="said">{escape(text)}</div>'
    return f'<article class="answer {state}">{said}{mark}</article>'
