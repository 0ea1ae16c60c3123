"""One offline HTML page from a template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moslora.reports.formatting import clipped

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
    )
    environment.filters["clipped"] = clipped
    return environment.get_template(f"{template}.html.jinja").render(**values)
