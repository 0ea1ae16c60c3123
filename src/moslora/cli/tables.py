"""Tables that verbs print."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from moslora.adapters.findings import Diagnosis
    from moslora.adapters.inspection import Inspection
    from moslora.memory.plan import Plan


def memory_table(found: Plan) -> Table:
    """Lay out what each way of training takes of a GPU, in GB."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("GPUs", no_wrap=True)
    table.add_column("ckpt", no_wrap=True)
    parts = ("weights", "gathered", "gradients", "optimiser", "activations", "total")
    for name in (*parts, "card"):
        table.add_column("state" if name == "optimiser" else name, justify="right", no_wrap=True)
    for one in found.placements:
        if one.strategy == "DDP" and one.gpus > 2:
            continue  # each holds the same, however many there are
        where = {"one": "1", "DDP": "DDP, 2+", "FSDP": f"FSDP, {one.gpus}"}[one.strategy]
        cells = [f"{getattr(one, name) / 1e9:.2f}" for name in parts]
        card = f"{one.card} GB" if one.card else "none"
        table.add_row(where, "on" if one.checkpointing else "off", *cells, card)
    return table


def findings_table(found: Diagnosis) -> Table:
    """Lay out findings, each with its fix below it."""
    from rich.table import Table
    from rich.text import Text

    colors = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}
    table = Table(box=None, show_header=False, padding=(0, 1))
    for column in ("level", "check"):
        table.add_column(column, no_wrap=True)
    table.add_column("what", overflow="fold")
    for finding in found.findings:
        what = Text(finding.what)
        if finding.fix:
            what.append(f"\n→ {finding.fix}", style="bold")
        table.add_row(Text(finding.level, style=colors[finding.level]), Text(finding.check), what)
    return table


def groups_table(found: Inspection) -> Table:
    """Lay out medians by kind of module, leaving out what no module has."""
    from rich.table import Table

    from moslora.reports.inspection import figure_or_dash

    columns = {
        "modules": [str(group.modules) for group in found.groups],
        "rank": [str(group.rank) for group in found.groups],
        "eff. rank": [figure_or_dash(group.effective_rank) for group in found.groups],
        "‖ΔW‖": [figure_or_dash(group.norm) for group in found.groups],
        "÷ ‖W0‖": [figure_or_dash(group.relative_norm) for group in found.groups],
        "M - I": [figure_or_dash(group.from_identity) for group in found.groups],
        "M - orth.": [figure_or_dash(group.from_orthogonal) for group in found.groups],
        "moved": [figure_or_dash(group.moved) for group in found.groups],
        "‖MA‖/‖A‖": [figure_or_dash(group.mixed_scale) for group in found.groups],
    }
    told = {name: cells for name, cells in columns.items() if any(cell != "–" for cell in cells)}
    table = Table(box=None, header_style="bold")
    table.add_column("kind", overflow="fold")
    for name in told:
        table.add_column(name, justify="right", no_wrap=True)
    for index, group in enumerate(found.groups):
        table.add_row(group.kind, *(cells[index] for cells in told.values()))
    return table
