"""The tab Runs: the list, one run live, its report, stop and go on, another run beside it, delete with a question."""

from __future__ import annotations

from typing import Any

import gradio as gr

from moslora.errors import NotFoundError, UsageError
from moslora.studio.answers import error_box, whole
from moslora.studio.context import Studio
from moslora.studio.jobs import Job, stop_process
from moslora.studio.markup import empty, frame, notice
from moslora.studio.runs import RunState, size_of
from moslora.studio.watching import job_detail, job_of, pending_jobs, run_detail, run_list
from moslora.wording import size_in_words

__all__ = ["PICKED", "build"]

EVERY = 2.0  # seconds between two looks
NONE = "(none)"
# A press on an entry says which; what had the focus has it again when the list was drawn anew.
PICKED = """
let at = null;
element.addEventListener('click', (event) => {
  const found = event.target.closest('[data-pick]');
  if (found) trigger('select', {name: found.dataset.pick});
});
element.addEventListener('focusin', (event) => { at = event.target.dataset.pick ?? null; });
element.addEventListener('focusout', (event) => { if (event.relatedTarget) at = null; });
new MutationObserver(() => {
  if (at !== null && (document.activeElement === document.body || document.activeElement === null)) {
    [...element.querySelectorAll('[data-pick]')].find((one) => one.dataset.pick === at)?.focus({preventScroll: true});
  }
}).observe(element, {childList: true, subtree: true});
"""


def build(studio: Studio) -> None:
    """Make the tab."""
    chosen = gr.State("")
    drawn: Any = gr.State(())
    with gr.Row(elem_classes="split"):
        with gr.Column(scale=2, min_width=280):
            listing = gr.HTML(
                _listing(studio, ""),
                js_on_load=PICKED,
                apply_default_css=False,
                elem_classes="listing",
                elem_id="runs",
            )
        with gr.Column(scale=5, min_width=300):
            with gr.Row(visible=False, elem_classes="actions") as actions:
                stop = gr.Button("Stop", size="sm", min_width=90)
                go_on = gr.Button("Go on", size="sm", min_width=90)
                steps = gr.Textbox("", label="Train until step", max_lines=1, min_width=130, scale=1)
                again = gr.Button("Use its recipe", size="sm", min_width=110)
                delete = gr.Button("Delete …", size="sm", min_width=90)
            with gr.Row(visible=False, elem_classes="question") as question:
                asked = gr.HTML(apply_default_css=False)
                surely = gr.Button("Delete it", variant="stop", size="sm")
                rather_not = gr.Button("Keep it", size="sm")
            said = gr.HTML(apply_default_css=False, elem_id="runs-said")
            with gr.Tabs(visible=False) as parts:
                with gr.Tab("Progress"):
                    beside = gr.Dropdown([NONE], value=NONE, label="Another run beside it", filterable=True)
                    detail = gr.HTML(apply_default_css=False, elem_id="run", min_height=420)
                with gr.Tab("Report") as report_tab:
                    report = gr.HTML(apply_default_css=False, elem_id="report")
                    report_file = gr.DownloadButton("Download the report", size="sm", visible=False)
            nothing = gr.HTML(
                empty("Nothing is chosen.", "Choose a run in the list to see it live."),
                apply_default_css=False,
            )

    views = [listing, detail, actions, parts, nothing, stop, go_on, steps, again, beside, drawn, chosen]

    def look(name: str, other: str, before: Any) -> list[Any]:
        """Return what changed since the last look; nothing is drawn again for nothing."""
        states = studio.library.runs()
        jobs = studio.jobs.all()
        pending = pending_jobs(states, jobs)
        known = {state.name: state for state in states}
        asked = name
        name = _followed(name, states, jobs)
        shown = _shown(
            studio,
            known.get(name),
            next((j for j in pending if f"job:{j.name}" == name), None),
            jobs,
            known.get(other),
        )
        page = run_list(states, pending, name)
        names = [NONE, *(one for one in known if one != name)]
        state = known.get(name)
        is_job = name.startswith("job:") and shown != ""
        status = state.status if state is not None else "job" if is_job else ""
        now = (hash(page), hash(shown), status, tuple(names), name)
        if now == before:
            return [gr.skip()] * len(views)
        was = before or (None,) * 5
        is_running = status == "running" or is_job
        return [
            page if now[0] != was[0] else gr.skip(),
            shown if now[1] != was[1] else gr.skip(),
            gr.update(visible=bool(status)),
            gr.update(visible=bool(status)),
            gr.update(visible=not status),
            gr.update(visible=is_running),
            gr.update(visible=bool(state) and not is_running),
            gr.update(visible=bool(state) and not is_running),
            gr.update(visible=bool(state)),
            gr.update(choices=names, value=other if other in names else NONE)
            if now[3] != was[3]
            else gr.skip(),
            now,
            # A look that began before another entry was pressed must not take the choice back.
            name if name != asked else gr.skip(),
        ]

    def pick(event: gr.EventData) -> tuple[str, str, Any, Any]:
        return str(event._data.get("name", "")), "", gr.update(visible=False), ()

    looking = {"fn": look, "inputs": [chosen, beside, drawn], "outputs": views, "show_progress": "hidden"}
    # Pages ask every other second, each for itself, and what did not change costs a stat.
    timer = gr.Timer(EVERY)
    timer.tick(**looking, concurrency_limit=None)
    studio.shared["page"].load(**looking, concurrency_limit=None)
    picked = listing.select(pick, None, [chosen, said, question, drawn], show_progress="hidden")
    picked.then(**looking, concurrency_limit=None).then(
        lambda name: _report(studio, name), chosen, [report, report_file], show_progress="hidden"
    )
    beside.input(**looking)
    report_tab.select(
        lambda name: _report(studio, name), chosen, [report, report_file], show_progress="hidden"
    )

    def do_stop(name: str) -> str:
        try:
            return _stop(studio, name)
        except Exception as error:
            return error_box(error)

    def do_go_on(name: str, until: str) -> str:
        try:
            return _go_on(studio, name, whole(until, "Train until step"))
        except Exception as error:
            return error_box(error)

    stop.click(do_stop, chosen, said).then(**looking)
    go_on.click(do_go_on, [chosen, steps], said).then(lambda: "", None, steps).then(**looking)

    def ask(name: str) -> tuple[Any, Any]:
        try:
            return gr.update(visible=True), _question(studio, name)
        except Exception as error:
            return gr.update(visible=True), error_box(error)

    def do_delete(name: str) -> tuple[str, str, Any, Any]:
        try:
            answer = _delete(studio, name)
        except Exception as error:
            return name, error_box(error), gr.update(visible=False), ()
        return "", answer, gr.update(visible=False), ()

    delete.click(ask, chosen, [question, asked])
    rather_not.click(lambda: gr.update(visible=False), None, question)
    surely.click(do_delete, chosen, [chosen, said, question, drawn]).then(**looking)
    studio.shared |= {"chosen": chosen, "again": again, "runs_said": said, "look": looking}


def _followed(name: str, states: list[RunState], jobs: list[Job]) -> str:
    """Return what is chosen: of a command that has a run by now, that run."""
    job = next((job for job in jobs if f"job:{job.name}" == name), None)
    if job is None:
        return name
    own = (job.pid, job.process_started)
    found = [s.name for s in states if (s.record.get("pid"), s.record.get("process_started")) == own]
    return found[0] if found else name


def _listing(studio: Studio, name: str) -> str:
    states = studio.library.runs()
    return run_list(states, pending_jobs(states, studio.jobs.all()), name)


def _shown(
    studio: Studio, state: RunState | None, job: Job | None, jobs: list[Job], other: RunState | None
) -> str:
    try:
        if state is not None:
            return run_detail(studio.library, state, job_of(state, jobs), other)
        return "" if job is None else job_detail(job)
    except Exception as error:
        return error_box(error)


def _report(studio: Studio, name: str) -> tuple[str, Any]:
    nothing = gr.update(visible=False, value=None)
    if not name or name.startswith("job:"):
        return empty("No report yet.", "It is written when the run ends or is stopped."), nothing
    try:
        file = studio.library.run(name).path / "report.html"
        if not file.is_file():
            return empty("No report yet.", "It is written when the run ends or is stopped."), nothing
        copy = studio.downloads / f"{file.parent.name}-report.html"
        page = file.read_text(encoding="utf-8")
        copy.write_text(page, encoding="utf-8")
        return frame(page, f"Report of {name}"), gr.update(visible=True, value=str(copy))
    except Exception as error:
        return error_box(error), nothing


def _stop(studio: Studio, name: str) -> str:
    if name.startswith("job:"):
        job = studio.jobs.find(name.removeprefix("job:"))
        stop_process(job.pid, job.process_started)
    else:
        import socket

        state = studio.library.run(name)
        if state.status != "running":
            raise UsageError(f"{name} is not running.")
        if state.record.get("host") != socket.gethostname():
            raise UsageError(f"It runs on {state.record.get('host')}, which this page cannot stop.")
        stop_process(state.record["pid"], state.record.get("process_started"))
    return notice(
        "note", "It was asked to stop, and does so after the step that it is at, with a checkpoint."
    )


def _go_on(studio: Studio, name: str, until: int | None) -> str:
    state = studio.library.run(name)
    if state.status == "running":
        raise UsageError(f"{name} is running.")
    if state.status == "completed" and until is None:
        proofs = state.record.get("proofs") or {}
        if all((proof or {}).get("passed") is not None for proof in proofs.values()):
            raise UsageError(
                f"{name} is completed. To train it longer, say until which step (more than {state.step})."
            )
    more = [] if until is None else [f"trainer.max_steps={until}"]
    job = studio.jobs.start(f"go on with {name}", ["train", "--resume", str(state.path), *more])
    return notice("note", f"Started: {job.command}")


def _question(studio: Studio, name: str) -> str:
    if name.startswith("job:"):
        return notice("warning", "Remove this entry from the list? Nothing else is removed.")
    state = studio.library.run(name)
    files, size = size_of(state.path)
    return notice(
        "warning",
        f"Delete {name} with its adapter, checkpoints and report: {files} files, {size_in_words(size)}? This cannot be "
        "undone.",
    )


def _delete(studio: Studio, name: str) -> str:
    if name.startswith("job:"):
        job = studio.jobs.find(name.removeprefix("job:"))
        if job.is_running:
            raise UsageError("It is running. Stop it first.")
        studio.jobs.forget(job)
        return notice("done", "Removed from the list.")
    if not name:
        raise NotFoundError("No run is chosen.")
    studio.library.delete(name)
    return notice("done", f"{name} is deleted.")
