"""The page: its tabs, its colors, and what stands around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from moslora.studio.context import Studio
from moslora.studio.markup import escape
from moslora.studio.views import adapters, chat, compare, runs, train

__all__ = ["make_page", "make_theme"]

STYLE = Path(__file__).parent / "style.css"
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def make_theme() -> Any:
    """Return the page's theme: the system's own typefaces, so that none is asked for elsewhere."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=list(SANS),
        font_mono=list(MONO),
    )


def make_page(studio: Studio, opens: str = "runs") -> Any:
    """Build the page.

    Args:
        studio: What it works in.
        opens: The tab that is shown first.
    """
    page = gr.Blocks(title="moslora studio", analytics_enabled=False, fill_width=True)
    studio.shared["page"] = page
    with page:
        gr.HTML(
            f'<header class="top"><b>moslora studio</b><code>{escape(studio.workspace.root)}</code></header>',
            apply_default_css=False,
        )
        with gr.Tabs(selected=opens, elem_id="tabs") as tabs:
            studio.shared["tabs"] = tabs
            for name, title, build in (
                ("runs", "Runs", runs.build),
                ("train", "Train", train.build),
                ("compare", "Compare", compare.build),
                ("adapters", "Adapters", adapters.build),
                ("chat", "Chat", chat.build),
            ):
                with gr.Tab(title, id=name):
                    build(studio)
    return page
