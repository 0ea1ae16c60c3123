"""The tab Compare: methods, rates and seeds, what that takes and can show, and the verdict as it grows."""

from __future__ import annotations

from typing import Any

import gradio as gr

from moslora.studio.answers import ONE_AT_A_TIME, PageDisplay, error_box, whole
from moslora.studio.comparisons import Choices, cell_plot, cell_rows
from moslora.studio.context import Studio
from moslora.studio.jobs import stop_process
from moslora.studio.markup import badge, empty, escape, frame, notice, output, table

__all__ = ["build"]

EVERY = 3.0  # seconds between two looks
OF_TRAIN = "the recipe in Train"


def build(studio: Studio) -> None:
    """Make the tab."""
    comparisons = studio.comparisons
    with gr.Row(elem_classes="split"):
        with gr.Column(scale=2, min_width=300):
            recipe = gr.Dropdown(
                [OF_TRAIN, *studio.recipes.files()], value=OF_TRAIN, label="Recipe", allow_custom_value=True
            )
            methods = gr.CheckboxGroup(
                comparisons.methods(),
                value=["lora", "moslora-orthogonal"],
                label="Methods",
                elem_classes="stacked scrolling",
            )
            rates = gr.Textbox(
                "", label="Learning rates", placeholder="a third, one and three times the recipe's"
            )
            with gr.Row():
                seeds = gr.Number(3, label="Seeds", precision=0, minimum=2, min_width=90)
                steps = gr.Textbox("", label="Steps", placeholder="the recipe's", max_lines=1, min_width=110)
                validation = gr.Number(
                    64, label="Examples to choose rates by", precision=0, minimum=1, min_width=120
                )
            name = gr.Textbox("compare", label="Name")
            with gr.Row(elem_classes="actions"):
                foresee = gr.Button("What it takes and can show")
                start = gr.Button("Start comparing", variant="primary")
        with gr.Column(scale=3, min_width=300):
            said = gr.HTML(
                empty(
                    "Which method is better on your data?",
                    "Choose methods, then ask what the comparison takes and how small a difference it can show.",
                ),
                apply_default_css=False,
                elem_id="compare-said",
            )
            with gr.Row(elem_classes="actions"):
                chosen = gr.Dropdown(
                    comparisons.names(), value=None, label="Comparison", scale=3, min_width=180
                )
                stop = gr.Button("Stop", size="sm", min_width=80)
                go_on = gr.Button("Go on", size="sm", min_width=80)
            state = gr.HTML(apply_default_css=False, elem_id="comparison", min_height=200)
            verdict = gr.HTML(apply_default_css=False, elem_id="verdict")
    drawn: Any = gr.State(())

    def choices(*values: Any) -> Choices:
        listed, of_rates, of_seeds, of_steps, aside, called = values
        return Choices(
            tuple(listed or ()),
            of_rates or "",
            int(of_seeds or 0),
            whole(of_steps, "Steps"),
            int(aside or 64),
            called or "",
        )

    def text_of(which: str, in_train: str) -> str:
        return in_train if which == OF_TRAIN else studio.recipes.read(which)

    def do_foresee(which: str, in_train: str, *values: Any) -> str:
        display = PageDisplay()
        try:
            with ONE_AT_A_TIME:
                comparisons.foresee(text_of(which, in_train), choices(*values), display)
        except Exception as error:
            return error_box(error)
        return display.html

    def do_start(which: str, in_train: str, *values: Any) -> tuple[str, Any]:
        try:
            asked = choices(*values)
            job = comparisons.start(text_of(which, in_train), asked)
        except Exception as error:
            return error_box(error), gr.skip()
        path = studio.workspace.shown(comparisons.folder(asked))
        started = notice("done", f"{job.command}\nIt goes on if this page is closed.", "Started.")
        return started, gr.update(choices=[path, *comparisons.names()], value=path)

    asked = [recipe, studio.shared["recipe_text"], methods, rates, seeds, steps, validation, name]
    foresee.click(do_foresee, asked, said)
    start.click(do_start, asked, [said, chosen])

    def look(which: str | None, before: Any) -> tuple[Any, Any, Any]:
        if not which:
            now: Any = ("",)
            return ("", "", now) if before != now else (gr.skip(),) * 3
        try:
            page, report = _state(studio, which)
        except Exception as error:
            page, report = error_box(error), ""
        now = (hash(page), hash(report))
        if now == before:
            return (gr.skip(),) * 3
        was = before if isinstance(before, tuple | list) and len(before) == 2 else (None, None)
        return page if now[0] != was[0] else gr.skip(), report if now[1] != was[1] else gr.skip(), now

    looking: dict[str, Any] = {
        "fn": look,
        "inputs": [chosen, drawn],
        "outputs": [state, verdict, drawn],
        "show_progress": "hidden",
        "concurrency_limit": None,
    }
    gr.Timer(EVERY).tick(**looking)
    chosen.change(**looking)
    chosen.focus(lambda: gr.update(choices=comparisons.names()), None, chosen, show_progress="hidden")
    recipe.focus(
        lambda: gr.update(choices=[OF_TRAIN, *studio.recipes.files()]), None, recipe, show_progress="hidden"
    )

    def do_stop(which: str | None) -> str:
        try:
            job = comparisons.job(which or "")
            if job is None:
                return notice("warning", "It was not started from this page, so it is not stopped from here.")
            stop_process(job.pid, job.process_started)
            return notice(
                "note", "It was asked to stop. Finished cells are kept, and Go on continues with the others."
            )
        except Exception as error:
            return error_box(error)

    def do_go_on(which: str | None) -> str:
        try:
            return notice("done", comparisons.go_on(which or "").command, "Started.")
        except Exception as error:
            return error_box(error)

    stop.click(do_stop, chosen, said)
    go_on.click(do_go_on, chosen, said)


def _state(studio: Studio, name: str) -> tuple[str, str]:
    """Return a comparison as it is, and its report."""
    job = studio.comparisons.job(name)
    is_running = job is not None and job.is_running
    path = studio.workspace.find(name)
    log = output(job.output[-6000:]) if job is not None else ""
    if not (path / "compare.json").is_file():
        if job is None:
            return empty("It is gone.", "Choose another comparison."), ""
        if is_running:
            return notice("note", "It reads the data and checks the recipe.") + log, ""
        return notice(
            "error", (job.error or "It ended.").removeprefix("Error: "), "It could not start."
        ) + log, ""
    cells = studio.comparisons.cells(name)
    of = "" if cells.total is None else f" of {cells.total}"
    status, word = (
        ("running", "running")
        if is_running
        else ("completed", "ended")
        if cells.is_judged
        else ("interrupted", "stopped")
    )
    ended = f'<span class="muted">{len(cells.done)}{of} cells</span>'
    head = f'<div class="title"><h3>{escape(name)}</h3>{badge(status, word)}{ended}</div>'
    plot = cell_plot(cells)
    columns = ["method", "rate", "seeds", "validation loss", "held-out loss", "lost"]
    rows = table(columns, cell_rows(cells), "Cells so far") if cells.done else ""
    drawn = f'<div class="card plot">{plot}</div>' if plot else ""
    report = path / "report.html"
    verdict = frame(report.read_text(encoding="utf-8"), f"Verdict of {name}") if report.is_file() else ""
    return head + drawn + rows + ("" if cells.is_judged and not is_running else log), verdict
