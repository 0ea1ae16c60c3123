"""The tab Train: a form made from the recipe's schema, its YAML beside it, the data, advice, memory, and the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from moslora.errors import RecipeError, UsageError
from moslora.studio.answers import ONE_AT_A_TIME, PageDisplay, error_box, shown
from moslora.studio.context import Studio
from moslora.studio.curves import histogram
from moslora.studio.form import (
    KINDS,
    MISSING,
    UNSET,
    Field,
    fields_of_kind,
    merged_text,
    other_places,
    sections_of,
    value_at,
    with_task,
    with_value,
)
from moslora.studio.markup import empty, facts, notice

__all__ = ["build"]

# What is at the top of the form; everything else stands below it by section.
FIRST = ("model.name", "data.train", "data.heldout", "output.name")
TITLES = {
    "task": "What is learned, and how it is judged",
    "model": "Model",
    "data": "Data",
    "adapter": "Adapter",
    "scopes": "Which parts are adapted",
    "trainer": "Training",
    "evaluation": "What is measured beside it",
    "output": "Where the run goes",
    "seed": "Seed",
}
LABELS = {
    "model.name": "Model: a name, a folder or a hub id",
    "data.train": "Data to train on: a file, a folder or a hub id",
    "data.heldout": "Data to measure on (some of the other, if empty)",
    "output.name": "Name of the run",
}
NOT_LOOKED = empty(
    "Not looked at yet.",
    "Look at the data shows how many rows there are, bad lines, lengths, and one example.",
)


def build(studio: Studio) -> None:
    """Make the tab."""
    recipes = studio.recipes
    opened = _values(studio.opening)
    before = gr.State(opened)  # the sections that the form was made from
    extra: Any = gr.State([])  # keys that were asked for
    with gr.Row(elem_classes="actions"):
        kind = gr.Dropdown(list(KINDS), value=_kind_of(opened), label="Task", min_width=150, scale=1)
        file = gr.Dropdown(
            recipes.files(), value=None, label="Recipe", allow_custom_value=True, min_width=220, scale=3
        )
        upload = gr.UploadButton("Upload data", size="md", min_width=140, scale=1, elem_id="upload")
    said = gr.HTML(apply_default_css=False, elem_id="train-said")
    with gr.Row(elem_classes="split"):
        with gr.Column(scale=3, min_width=300):
            place = gr.Column(elem_classes="form")
        with gr.Column(scale=2, min_width=300):
            text = gr.Textbox(
                studio.opening,
                interactive=True,
                label="The recipe as YAML",
                lines=18,
                max_lines=40,
                elem_classes="mono",
                elem_id="yaml",
            )
            fill = gr.Button("Fill the form from the text", size="sm")
    with gr.Row(elem_classes="actions"):
        look = gr.Button("Look at the data")
        what = gr.Button("What to try")
        takes = gr.Button("What it takes")
        start = gr.Button("Start training", variant="primary", elem_id="start")
    started = gr.HTML(apply_default_css=False, elem_id="started")
    with gr.Tabs(elem_id="findings") as findings:
        with gr.Tab("Data", id="data"):
            data = gr.HTML(NOT_LOOKED, apply_default_css=False, elem_id="data", min_height=120)
        with gr.Tab("Advice", id="advice"):
            pieces = gr.CheckboxGroup([], label="Take", visible=False, elem_classes="stacked")
            take = gr.Button("Take what is ticked", size="sm", visible=False)
            advice = gr.HTML(
                empty("No advice yet.", "What to try compares the recipe with what is known, with sources."),
                apply_default_css=False,
                elem_id="advice",
            )
        with gr.Tab("Memory", id="memory"):
            memory = gr.HTML(
                empty(
                    "Nothing is counted yet.", "What it takes counts the memory, before anything is loaded."
                ),
                apply_default_css=False,
                elem_id="memory",
            )

    def form(sections: dict[str, Any], asked: list[str]) -> None:
        """Draw the form, and attach to the buttons what needs all of its fields."""
        outside = _Outside(text, extra, said, started, data, findings, look, start)
        _form(studio, sections, asked, outside)

    triggers = [studio.shared["page"].load, before.change, extra.change]
    with place:
        gr.render(inputs=[before, extra], triggers=triggers)(form)

    # ---- the text and the form ---------------------------------------------------------------------------------

    def refill(now: str, old: dict[str, Any]) -> tuple[Any, Any, str]:
        try:
            sections = sections_of(now)
        except RecipeError as error:
            return old, gr.skip(), error_box(error)
        return sections, _kind_of(sections), ""

    filling: dict[str, Any] = {"fn": refill, "inputs": [text, before], "outputs": [before, kind, said]}
    fill.click(**filling)
    text.blur(**filling, show_progress="hidden")

    def change_kind(now: str, wanted: str) -> tuple[Any, Any, str]:
        try:
            changed = with_task(now, wanted)
            return changed, sections_of(changed), ""
        except Exception as error:
            return gr.skip(), gr.skip(), error_box(error)

    kind.input(change_kind, [text, kind], [text, before, said])

    def open_file(name: str | None) -> tuple[Any, Any, Any, str]:
        if not name:
            return (gr.skip(),) * 4
        try:
            now = recipes.read(name)
            sections = sections_of(now)
            return now, sections, _kind_of(sections), notice("done", f"Read {name}.")
        except Exception as error:
            return gr.skip(), gr.skip(), gr.skip(), error_box(error)

    file.input(open_file, file, [text, before, kind, said])
    file.focus(lambda: gr.update(choices=recipes.files()), None, file, show_progress="hidden")

    def take_upload(path: str | None, now: str) -> tuple[Any, Any, str]:
        if not path:
            return gr.skip(), gr.skip(), ""
        try:
            name = recipes.take_upload(Path(path))
            sections = with_value(sections_of(now), "data.train", name)
            return (
                recipes.with_settings(now, [f"data.train={name}"]),
                sections,
                notice("done", f"Kept as {name}."),
            )
        except Exception as error:
            return gr.skip(), gr.skip(), error_box(error)

    upload.upload(take_upload, [upload, text], [text, before, said])

    # ---- advice and memory, which take the text as it stands -----------------------------------------------------

    def try_what(now: str) -> tuple[Any, ...]:
        try:
            with ONE_AT_A_TIME:
                found = recipes.advise(now)
            listed = [(piece.label, " ".join(piece.settings)) for piece in recipes.pieces(found)]
            has_some = bool(listed)
            shown_pieces = gr.update(choices=listed, value=[value for _, value in listed], visible=has_some)
            return shown(found), shown_pieces, gr.update(visible=has_some), gr.update(selected="advice")
        except Exception as error:
            hidden = gr.update(visible=False)
            return error_box(error), hidden, hidden, gr.update(selected="advice")

    what.click(try_what, text, [advice, pieces, take, findings])

    def take_it(now: str, taken: list[str]) -> tuple[Any, Any, str]:
        try:
            settings = [word for piece in taken for word in piece.split(" ")]
            changed = recipes.with_settings(now, settings)
            return changed, sections_of(changed), notice("done", f"Taken: {', '.join(settings)}")
        except Exception as error:
            return gr.skip(), gr.skip(), error_box(error)

    take.click(take_it, [text, pieces], [text, before, said])

    def count(now: str) -> tuple[str, Any]:
        try:
            with ONE_AT_A_TIME:
                return shown(recipes.plan(now)), gr.update(selected="memory")
        except Exception as error:
            return error_box(error), gr.update(selected="memory")

    takes.click(count, text, [memory, findings])

    # ---- from other tabs -------------------------------------------------------------------------------------------

    def use(name: str) -> tuple[Any, Any, Any, str, Any]:
        try:
            now = recipes.of_run(studio.library.run(name).path)
            sections = sections_of(now)
            return (
                now,
                sections,
                _kind_of(sections),
                notice("done", f"The recipe of {name}."),
                gr.update(selected="train"),
            )
        except Exception as error:
            return gr.skip(), gr.skip(), gr.skip(), error_box(error), gr.update(selected="train")

    studio.shared["again"].click(
        use, studio.shared["chosen"], [text, before, kind, said, studio.shared["tabs"]]
    )
    studio.shared |= {"recipe_text": text}


class _Outside:
    """Components that the form's listeners need, and that are made before it."""

    def __init__(self, *components: Any) -> None:
        (
            self.text,
            self.extra,
            self.said,
            self.started,
            self.data,
            self.findings,
            self.look,
            self.start,
        ) = components


def _form(studio: Studio, sections: dict[str, Any], asked: list[str], outside: _Outside) -> None:
    try:
        loss = value_at(sections, "task.loss")
        groups = fields_of_kind(_kind_of(sections), loss if isinstance(loss, str) else None)
    except Exception as error:
        gr.HTML(error_box(error), apply_default_css=False)
        return
    by_place = {one.place: one for group in groups.values() for one in group}
    fields: list[Field] = []
    widgets: list[Any] = []

    def add(field: Field) -> None:
        fields.append(field)
        widgets.append(_widget(studio, field, value_at(sections, field.place)))

    for first in FIRST:
        if first in by_place:
            add(by_place[first])
    for name, group in groups.items():
        shown_fields = [
            one
            for one in group
            if one.place not in FIRST
            and (one.is_usual or one.place in asked or value_at(sections, one.place) is not MISSING)
        ]
        if not shown_fields:
            continue
        with gr.Accordion(TITLES.get(name, name), open=False), gr.Row(elem_classes="fields"):
            for one in shown_fields:
                add(one)
    with gr.Row(elem_classes="actions"):
        more = gr.Dropdown(
            other_places(groups, sections),
            value=None,
            label="Another setting",
            filterable=True,
            scale=3,
            min_width=200,
        )
    more.input(
        lambda place, old: [*old, place] if place and place not in old else old,
        [more, outside.extra],
        outside.extra,
    )
    everything = [outside.text, *widgets]

    def merge(now: str, *values: Any) -> str:
        # Against what this form was drawn from: the text may have got another one's changes meanwhile.
        return merged_text(now, sections, fields, values)

    def mirror(now: str, *values: Any) -> tuple[Any, str]:
        try:
            return merge(now, *values), ""
        except Exception as error:
            return gr.skip(), error_box(error)

    for field, widget in zip(fields, widgets, strict=True):
        event = (
            widget.input if field.kind in ("switch", "choice") or field.place in FIRST[:2] else widget.blur
        )
        event(mirror, everything, [outside.text, outside.said], show_progress="hidden")

    # The fields themselves are inputs of both, so that nothing that was typed is missed, however fast the click.
    def looked(*values: Any) -> tuple[Any, ...]:
        try:
            text = merge(*values)
            return text, *_look(studio, text), gr.update(selected="data")
        except Exception as error:
            return gr.skip(), error_box(error), gr.update(selected="data")

    outside.look.click(looked, everything, [outside.text, outside.data, outside.findings])

    def begin(*values: Any) -> tuple[Any, str]:
        try:
            text = merge(*values)
            job = studio.recipes.start(text)
        except Exception as error:
            return gr.skip(), error_box(error)
        return text, notice(
            "done", f"{job.command}\nIt goes on if this page is closed. See it under Runs.", "Started."
        )

    outside.start.click(begin, everything, [outside.text, outside.started])


def _look(studio: Studio, text: str) -> tuple[str]:
    display = PageDisplay()
    try:
        with ONE_AT_A_TIME:
            found = studio.recipes.look(text, display)
    except Exception as error:
        return (error_box(error) + (display.html if display.pieces else ""),)
    pairs: list[tuple[str, object]] = [("rows to train on", found.rows), ("held out", found.heldout)]
    if found.lengths:
        middle = sorted(found.lengths)[len(found.lengths) // 2]
        pairs += [("tokens of the longest", max(found.lengths)), ("of the middle one", middle)]
        if found.limit is not None:
            pairs.append(("longer than the limit", sum(length > found.limit for length in found.lengths)))
    plot = histogram(found.lengths, found.limit)
    remarks = "".join(notice("warning", remark) for remark in found.remarks)
    drawn = f'<div class="card plot">{plot}</div>' if plot else ""
    return (facts(pairs) + remarks + drawn + "<h4>One example, as it is learned</h4>" + display.html,)


def _widget(studio: Studio, field: Field, value: Any) -> Any:
    label = LABELS.get(field.place, field.key)
    shown_value = field.to_widget(value)
    default = "" if field.default is None else _plainly(field.default)
    common: dict[str, Any] = {"label": label, "min_width": 160, "interactive": True}
    if field.place in FIRST[:2]:
        known = studio.recipes.models() if field.place == "model.name" else studio.recipes.data()
        return gr.Dropdown(known, value=shown_value or None, allow_custom_value=True, **common)
    info = field.help or None
    if field.kind == "switch":
        return gr.Checkbox(shown_value, info=info, **common)
    if field.kind == "choice":
        unset = f"{UNSET}: {default}" if default else UNSET
        choices = [(unset, UNSET), *((one, one) for one in field.choices)]
        return gr.Dropdown(choices, value=shown_value, info=info, allow_custom_value=False, **common)
    return gr.Textbox(shown_value, placeholder=default, info=info, max_lines=4, **common)


def _plainly(value: Any) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else ", ".join(map(str, value))
        if isinstance(value, list)
        else str(value)
    )


def _values(text: str) -> dict[str, Any]:
    try:
        return sections_of(text)
    except RecipeError:
        return {}


def _kind_of(sections: dict[str, Any]) -> str:
    kind = value_at(sections, "task.kind")
    if kind is MISSING:
        return KINDS[0]
    if kind not in KINDS:
        raise UsageError(f"task.kind is {kind!r}; choose one of {', '.join(KINDS)}.")
    return str(kind)
