"""The tab Adapters: doctor, heat maps, export, merge, sums, mixes and downloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from moslora.studio.answers import ONE_AT_A_TIME, PageDisplay, error_box, shown, whole
from moslora.studio.context import Studio
from moslora.studio.markup import empty, frame, notice

__all__ = ["build"]


def build(studio: Studio) -> None:
    """Make the tab."""
    adapters = studio.adapters
    with gr.Row(elem_classes="actions"):
        chosen = gr.Dropdown(
            adapters.names(), value=None, label="Adapter", allow_custom_value=True, scale=3, min_width=220
        )
        base = gr.Dropdown(
            ["", *studio.recipes.models()],
            value="",
            label="Base model, where one is needed",
            allow_custom_value=True,
            scale=2,
            min_width=200,
        )
        fetch = gr.DownloadButton("Download", size="md", scale=1, min_width=120, interactive=False)
    with gr.Row(elem_classes="split"):
        with gr.Column(scale=2, min_width=300):
            with gr.Accordion("Is it sound, and will it run?", open=True):
                engines = gr.CheckboxGroup(
                    adapters.engines(), value=["peft"], label="Programs you serve with"
                )
                examine = gr.Button("Look it over", size="sm")
            with gr.Accordion("What did it learn?", open=False):
                maps = gr.Button("Draw heat maps", size="sm")
            with gr.Accordion("Export", open=False):
                to = gr.Radio(adapters.formats(), value="lora", label="Format", elem_classes="stacked")
                with gr.Row():
                    rank = gr.Textbox("", label="Rank", placeholder="as it is", max_lines=1, min_width=100)
                    dtype = gr.Dropdown(
                        ["", "float32", "float16", "bfloat16"], value="", label="dtype", min_width=100
                    )
                export_name = gr.Textbox("", label="Name", placeholder="made of adapter and format")
                export = gr.Button("Export and prove", size="sm", variant="primary")
            with gr.Accordion("Merge into the base", open=False):
                merge_name = gr.Textbox("", label="Name", placeholder="made of the adapter's")
                merge = gr.Button("Merge and prove", size="sm", variant="primary")
            with gr.Accordion("Several adapters", open=False):
                several = gr.Dropdown(
                    adapters.names(), value=[], multiselect=True, label="Adapters of one base"
                )
                weights = gr.Textbox("", label="Weights", placeholder="1 for each")
                sum_name = gr.Textbox("", label="Name of the sum", placeholder="combined")
                with gr.Row(elem_classes="actions"):
                    combine = gr.Button("Add up, exactly", size="sm")
                    mix = gr.Button("Learn a mixer, with the recipe in Train", size="sm")
            with gr.Accordion("An adapter of another program", open=False):
                alpha = gr.Textbox("", label="lora_alpha, where the file does not say it", max_lines=1)
                take_in = gr.Button("Read it and write it natively", size="sm")
        with gr.Column(scale=3, min_width=300):
            said = gr.HTML(
                empty(
                    "Nothing is done yet.",
                    "Choose an adapter; each run has one. Then look it over or export it.",
                ),
                apply_default_css=False,
                elem_id="adapters-said",
                min_height=300,
            )

    def refresh() -> tuple[Any, Any]:
        names = adapters.names()
        return gr.update(choices=names), gr.update(choices=names)

    for component in (chosen, several):
        component.focus(refresh, None, [chosen, several], show_progress="hidden")

    def done(work: Callable[[PageDisplay], str]) -> str:
        display = PageDisplay()
        try:
            with ONE_AT_A_TIME:
                return work(display)
        except Exception as error:
            return error_box(error)

    def after(result: Any) -> str:
        """Show a result, and look for what is new at the next question."""
        studio.library.find(is_fresh=True)
        return shown(result)

    examine.click(
        lambda name, of, programs: done(
            lambda to: shown(adapters.examine(name or "", of or "", programs, to))
        ),
        [chosen, base, engines],
        said,
    )
    maps.click(
        lambda name, of: done(
            lambda to: frame(adapters.heat_maps(name or "", of or "", to), f"Heat maps of {name}")
        ),
        [chosen, base],
        said,
    )
    export.click(
        lambda name, form, out, r, kind, of: done(
            lambda _: after(adapters.export(name or "", form, out, whole(r, "Rank"), kind or None, of or ""))
        ),
        [chosen, to, export_name, rank, dtype, base],
        said,
    )
    merge.click(
        lambda name, of, out: done(lambda to: after(adapters.merge(name or "", of or "", out, to))),
        [chosen, base, merge_name],
        said,
    )
    combine.click(
        lambda names, numbers, out: done(lambda _: after(adapters.combine(names or [], numbers, out))),
        [several, weights, sum_name],
        said,
    )
    mix.click(
        lambda names, numbers, text: done(
            lambda _: notice(
                "done", adapters.mix(names or [], numbers, text).command, "Started; see it under Runs."
            )
        ),
        [several, weights, studio.shared["recipe_text"]],
        said,
    )
    take_in.click(
        lambda name, number: done(lambda _: after(adapters.take_in(name or "", "", number))),
        [chosen, alpha],
        said,
    )

    def pack(name: str | None) -> Any:
        if not name:
            return gr.update(interactive=False, value=None)
        try:
            return gr.update(interactive=True, value=str(adapters.pack(name, studio.downloads)))
        except Exception:
            return gr.update(interactive=False, value=None)

    chosen.change(pack, chosen, fetch, show_progress="hidden")
