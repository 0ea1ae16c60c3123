"""One offline HTML page from a template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moslora.reports.formatting import clipped
from moslora.wording import printable

__all__ = ["render"]


def render(template: str, **values: Any) -> str:
    """Fill a template.

    Args:
        template: Its name in ``templates/``, without ``.html.jinja``.
        **values: What it shows. Text is escaped; a name that the template needs and that is missing is an error.

    Returns:
        The page. The same values give the same page.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_harmless,
    )
    environment.filters["clipped"] = clipped
    return environment.get_template(f"{template}.html.jinja").render(**values)


def _harmless(value: Any) -> Any:
    """Show what would turn the order of a page's text around, in text and in the drawings inside the page."""
    return type(value)(printable(value)) if isinstance(value, str) else value
