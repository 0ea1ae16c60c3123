"""HTML that the page shows. Whatever others wrote comes in as text and is escaped here, and nowhere else."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from moslora.wording import printable

__all__ = ["badge", "empty", "escape", "facts", "frame", "notice", "output", "table"]


def escape(value: object) -> str:
    """Return a text as HTML that shows it: no markup, no control characters, no text that turns its order around.

    Args:
        value: What others wrote.
    """
    return html.escape(printable(value), quote=True)


def notice(kind: str, text: object, title: str = "") -> str:
    """Return a box that says something.

    Args:
        kind: ``"error"``, ``"warning"``, ``"done"`` or ``"note"``.
        text: Its lines.
        title: In bold, before them.
    """
    role = "alert" if kind == "error" else "status"
    head = f"<b>{escape(title)}</b> " if title else ""
    lines = escape(text).strip().replace("\n", "<br>")
    return f'<div class="notice {kind}" role="{role}">{head}{lines}</div>'


def empty(title: str, text: str) -> str:
    """Return what stands where nothing is yet: what to do first.

    Args:
        title: What is not there.
        text: What to do.
    """
    return f'<div class="empty"><b>{escape(title)}</b><p>{escape(text)}</p></div>'


def badge(kind: str, text: object) -> str:
    """Return a word with the mark of a status, which does not depend on its color.

    Args:
        kind: A status of a run, or of a finding.
        text: The word.
    """
    return f'<span class="badge {escape(kind)}">{escape(text)}</span>'


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Return names with values, as a list of terms.

    Args:
        pairs: What is left out if the value is None or empty.
    """
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in pairs
        if value not in (None, "")
    )
    return f'<dl class="facts">{rows}</dl>'


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """Return a table of texts, which scrolls by itself where it is too wide.

    Args:
        columns: Heads.
        rows: Cells, as many as columns each.
        caption: What it is.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption or "Table")}">'
        f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def output(text: str, label: str = "Output") -> str:
    """Return what a process wrote.

    Args:
        text: Its lines.
        label: What it is.
    """
    if not text.strip():
        return ""
    return f'<pre class="output" tabindex="0" role="log" aria-label="{escape(label)}">{escape(text)}</pre>'


def frame(page: str, title: str) -> str:
    """Return a whole page inside the page: it runs no script, and reaches neither this page nor the network.

    Args:
        page: HTML, as a report has it.
        title: What it is.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    guarded = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    # Behind the doctype, without which a browser falls back to old rules of layout.
    start, mark, rest = page.partition(">") if page[:9].lower() == "<!doctype" else ("", "", page)
    whole = start + mark + guarded + rest
    return (
        f'<iframe class="report" sandbox="" title="{escape(title)}" '
        f'srcdoc="{html.escape(whole, quote=True)}"></iframe>'
    )


def attributes(values: Mapping[str, object]) -> str:
    """Return attributes of an element, escaped.

    Args:
        values: By name; those of None are left out.
    """
    return "".join(f' {name}="{escape(value)}"' for name, value in values.items() if value is not None)
