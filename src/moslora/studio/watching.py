"""The tab of runs in HTML: the list, and one run with its progress, curves, pictures and figures."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

from moslora.files import is_running
from moslora.reports.pictures import picture_rows
from moslora.studio.curves import run_curve, two_curves
from moslora.studio.jobs import Job
from moslora.studio.markup import attributes, badge, empty, escape, facts, notice, output
from moslora.studio.runs import Library, RunState
from moslora.training.run_directory import RunDirectory
from moslora.wording import duration, figure, one_line, size_in_words

__all__ = ["job_detail", "job_of", "pending_jobs", "run_detail", "run_list"]

RECENT = 24 * 3600  # seconds for which a command that failed before it had a run is shown


def job_of(state: RunState, jobs: list[Job]) -> Job | None:
    """Return the command of the page that a run is of, the newest.

    Args:
        state: The run.
        jobs: All commands, the newest first.
    """
    for job in jobs:
        same = job.pid == state.record.get("pid")
        if same and job.process_started == state.record.get("process_started"):
            return job
        if str(state.path) in job.arguments:
            return job
    return None


def pending_jobs(states: list[RunState], jobs: list[Job]) -> list[Job]:
    """Return commands that have no run yet, or failed before they had one.

    Args:
        states: All runs.
        jobs: All commands.
    """
    taken = {(state.record.get("pid"), state.record.get("process_started")) for state in states}
    paths = {str(state.path) for state in states}
    return [
        job
        for job in jobs
        if job.arguments[:1] != ("compare",)
        and (job.pid, job.process_started) not in taken
        and paths.isdisjoint(job.arguments[1:])
        and (job.is_running or (time.time() - job.time < RECENT and job.exit_code != 0 and job.error))
    ]


def run_list(states: list[RunState], pending: list[Job], chosen: str) -> str:
    """Return the list of runs, as buttons.

    Args:
        states: All runs, the newest first.
        pending: Commands without a run.
        chosen: Name of the run that is shown beside it, or of the command as ``job:NAME``.
    """
    if not states and not pending:
        return empty(
            "No runs yet.",
            "Go to Train: it is filled with a recipe to start from, or choose a model and your data there.",
        )
    items = [_job_item(job, f"job:{job.name}" == chosen) for job in pending]
    items += [_item(state, state.name == chosen) for state in states]
    return f'<ul class="runs" aria-label="Runs">{"".join(items)}</ul>'


def _item(state: RunState, is_chosen: bool) -> str:
    before, after = state.held_out
    if after is not None and before is not None:
        figures = f"held-out loss {figure(before)} → {figure(after)}"
    elif state.loss is not None:
        figures = f"loss {figure(state.loss)}"
    else:
        figures = ""
    steps = f"step {state.step}{f' of {state.steps}' if state.steps else ''}" if state.step else ""
    when = _when(state.started)
    line = " · ".join(part for part in (steps, figures, when) if part)
    bar = _bar(state.share) if state.status == "running" else ""
    return _button(state.name, state.name, badge(state.status, state.word), escape(line), bar, is_chosen)


def _job_item(job: Job, is_chosen: bool) -> str:
    status, word = ("running", "starting") if job.is_running else ("failed", "could not start")
    line = escape(one_line(job.error or _when(job.time), 90))
    return _button(f"job:{job.name}", job.title, badge(status, word), line, "", is_chosen)


def _button(name: str, title: str, mark: str, line: str, bar: str, is_chosen: bool) -> str:
    about = attributes({"data-pick": name, "aria-pressed": str(is_chosen).lower()})
    return (
        f'<li><button type="button" class="pick"{about}><span class="head"><b>{escape(title)}</b>{mark}</span>'
        f"<small>{line}</small>{bar}</button></li>"
    )


def _bar(share: float | None) -> str:
    if share is None:
        return ""
    return (
        f'<span class="bar" role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{share * 100:.0f}">'
        f'<i style="width: {share * 100:.1f}%"></i></span>'
    )


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M") if seconds else ""


def run_detail(library: Library, state: RunState, job: Job | None, beside: RunState | None) -> str:
    """Return a run as it is now.

    Args:
        library: Where its log is.
        state: The run.
        job: The page's command that it is of; None if it was started elsewhere.
        beside: Another run whose curve is drawn, too.
    """
    if state.problem:
        return notice("error", state.problem)
    parts = [_head(state), _warnings(state), facts(_facts(library, state))]
    log = library.metrics(state.path)
    curve = run_curve(state, log)
    if beside is not None:
        both = [(state.name, log), (beside.name, library.metrics(beside.path))]
        curve = two_curves(both) or curve
        parts.append(_beside(state, beside))
    if curve:
        parts.append(f'<div class="card plot">{curve}</div>')
    elif state.status == "running":
        parts.append('<div class="card plot waiting">The curve begins with the first logged step.</div>')
    parts.append(_pictures(state))
    if job is not None and state.status in ("failed", "ended", "running"):
        parts.append(f"<h4>What it wrote</h4>{output(job.output[-6000:])}")
    return "".join(parts)


def _head(state: RunState) -> str:
    stage = str(state.record.get("stage") or "")
    word = escape(stage) if state.status == "running" and stage else ""
    bar = _bar(state.share) if state.status != "completed" else ""
    return (
        f'<div class="title"><h3>{escape(state.name)}</h3>{badge(state.status, state.word)}'
        f'<span class="muted">{word}</span></div>{bar}'
    )


def _warnings(state: RunState) -> str:
    found = ""
    if state.status == "failed":
        found += notice("error", state.record.get("error") or "It failed.", "Failed.")
    elif state.status == "ended":
        found += notice(
            "warning",
            "Its process is gone, and did not say why, as after a kill or when the machine was switched off. Go on "
            "continues from its last checkpoint.",
        )
    elif state.status == "interrupted":
        found += notice("note", "It was stopped. Go on continues from its last checkpoint.")
    for remark in state.record.get("remarks") or ():
        found += notice("warning", remark)
    return found


def _facts(library: Library, state: RunState) -> list[tuple[str, object]]:
    record = state.record
    before, after = state.held_out
    steps = f"{state.step} of {state.steps}" if state.steps else state.step or ""
    rates = library.metrics(state.path).rates
    timing = record.get("timing") or {}
    seconds = timing.get("train_seconds")
    pace, left = library.pace(state.path), None
    if pace is None and isinstance(seconds, int | float) and state.step:
        pace = seconds / state.step
    if state.status == "running" and pace and state.steps:
        left = duration(max(0, state.steps - state.step) * pace)
    trained, base = record.get("trainable_parameters"), (record.get("base") or {}).get("name")
    return [
        ("step", steps),
        ("loss", None if state.loss is None else figure(state.loss)),
        ("learning rate", f"{rates[-1][1]:.2g}" if rates else None),
        ("held-out loss before", None if before is None else figure(before)),
        ("held-out loss after", None if after is None else figure(after)),
        ("a step takes", None if not pace else f"{figure(pace)} s"),
        ("training ends in", left),
        ("memory", _memory(state)),
        ("trained parameters", None if not isinstance(trained, int) else f"{trained:,}"),
        ("base", None if not base else library.workspace.shown(Path(str(base)))),
        ("started", _when(state.started)),
    ]


def _memory(state: RunState) -> str | None:
    """Return what the process of a run holds now, if that is on this machine."""
    import socket

    import psutil

    pid, started = state.record.get("pid"), state.record.get("process_started")
    if (
        state.status != "running"
        or state.record.get("host") != socket.gethostname()
        or not isinstance(pid, int)
    ):
        return None
    if not is_running(pid, started):
        return None
    try:
        return size_in_words(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def _beside(state: RunState, other: RunState) -> str:
    rows = ""
    for name, index in (("held-out loss before", 0), ("held-out loss after", 1)):
        values = [one.held_out[index] for one in (state, other)]
        cells = "".join(f"<td>{'–' if value is None else escape(figure(value))}</td>" for value in values)
        rows += f'<tr><th scope="row">{name}</th>{cells}</tr>'
    names = "".join(f'<th scope="col">{escape(one.name)}</th>' for one in (state, other))
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{names}</tr></thead><tbody>{rows}</tbody></table></div>'
        '<p class="muted">Losses compare only where both runs have the same held-out data. Whether a difference is '
        "more than chance is said by Compare.</p>"
    )


def _pictures(state: RunState) -> str:
    pictures = state.record.get("pictures")
    if not isinstance(pictures, dict):
        return ""
    found = ""
    for row in picture_rows(RunDirectory(state.path), pictures)[:8]:
        cells = "".join(
            f'<figure><img src="{data}" alt="{escape(who)}: {escape(row["prompt"])}" loading="lazy">'
            f"<figcaption>{escape(who)}</figcaption></figure>"
            for who, data in row["cells"]
            if data
        )
        seed = f" · seed {escape(row['seed'])}"
        found += f'<p class="muted">{escape(row["prompt"])}{seed}</p><div class="pictures">{cells}</div>'
    return f"<h4>Pictures on the way</h4>{found}" if found else ""


def job_detail(job: Job) -> str:
    """Return a command that has no run, with what it wrote.

    Args:
        job: The command.
    """
    if job.is_running:
        head = notice("note", "It reads the data and checks the recipe; the run appears when that is done.")
    else:
        head = notice("error", (job.error or "It ended.").removeprefix("Error: "), "It could not start.")
    title = f'<div class="title"><h3>{escape(job.title)}</h3></div>'
    return f"{title}{head}<p><code>{escape(job.command)}</code></p>{output(job.output)}"
