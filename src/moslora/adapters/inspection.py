"""Inspect: what an adapter learned, module by module, from its factors alone.

The effective rank is that of Roy and Vetterli (2007): ``exp(-Σ p·log p)`` of the singular values of ΔW, p being their
shares of the sum; r if all are equal, 1 if one stands alone.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moslora.adapters.factors import Adapter, Factors
from moslora.adapters.fit import Fit, fit_to_base
from moslora.adapters.formats.native import start_of
from moslora.adapters.formats.reading import detect, read_adapter
from moslora.adapters.lineage import describe_lineage, lineage_of
from moslora.display import Display, Printable
from moslora.errors import AdapterError, ModelError
from moslora.models.shards import StoredWeights, open_weights
from moslora.wording import figure_or_dash

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

__all__ = [
    "NOTHING",
    "Group",
    "Inspection",
    "ModuleReport",
    "inspect_adapter",
]

# Below this share of the median ‖ΔW‖ a module has learned nothing beside the others.
NOTHING = 1e-3
MAGNITUDES = (
    "It has DoRA's magnitude, which rescales each row of W0 + s·B·M·A; figures of ΔW are of s·B·M·A, before "
    "that."
)
BIASES = "It has a bias on B, which the figures leave out: h = W0·x + s·(B·M·A·x + b)."
COMPONENTS = (
    "It started from its base's weights, and the start is subtracted: ΔW = s·(B·M·A - B0·M0·A0), looked "
    "at as one product of twice the rank, so the figures of the mixer are of both."
)


@dataclass(frozen=True)
class ModuleReport:
    """What one module learned.

    Attributes:
        module: Path in the base model.
        form: ``"linear"``, ``"conv"``, ``"embedding"`` or ``"expert"``.
        shape: ``(out, in)`` of ΔW as a matrix.
        rank: r.
        scale: s of ``ΔW = s·B·M·A``.
        norm: ``‖ΔW‖``, Frobenius.
        relative_norm: ``‖ΔW‖ / ‖W0‖``; None without a base, or where its weight is not to be told.
        effective_rank: Of ΔW, between 1 and r; 0 if ΔW is zero.
        mixer_values: Singular values of M, largest first.
        from_identity: ``‖M - I‖ / ‖I‖``.
        from_orthogonal: Distance of M from the nearest orthogonal matrix, relative to ``‖I‖``.
        moved: ``‖M - M0‖ / ‖M0‖`` from its start; None where the start was not kept.
        mixed_scale: ``‖M·A‖ / ‖A‖``; a fresh kaiming mixer has about 0.58.
    """

    module: str
    form: str
    shape: tuple[int, int]
    rank: int
    scale: float
    norm: float
    relative_norm: float | None
    effective_rank: float
    mixer_values: tuple[float, ...]
    from_identity: float
    from_orthogonal: float
    moved: float | None
    mixed_scale: float

    @property
    def layer(self) -> str:
        """The part of the path up to its last number, as ``model.layers.3``; empty if it has none."""
        found = re.match(r"(.*\.\d+)\.", self.module)
        return found[1] if found else ""

    @property
    def kind(self) -> str:
        """The rest of the path, as ``self_attn.q_proj``; experts of a tensor together."""
        return re.sub(r"\[\d+\]$", "", self.module.removeprefix(f"{self.layer}."))


@dataclass(frozen=True)
class Group:
    """Modules of one kind, by their medians.

    Attributes:
        kind: Their path within a layer.
        modules: How many they are.
        rank: The largest.
        norm, relative_norm, effective_rank, from_identity, from_orthogonal, moved, mixed_scale: Medians; None where
            no module has one.
    """

    kind: str
    modules: int
    rank: int
    norm: float | None
    relative_norm: float | None
    effective_rank: float | None
    from_identity: float | None
    from_orthogonal: float | None
    moved: float | None
    mixed_scale: float | None


@dataclass(frozen=True, repr=False)
class Inspection(Printable):
    """An adapter, looked at.

    Attributes:
        adapter: Where it is.
        format: A key of ``formats.FORMATS``.
        base: The base it was compared with; None if with no base.
        mixer: What the configuration names; None for a plain LoRA.
        parameters: How many numbers A, M and B hold.
        modules: What each module learned, by path.
        groups: The same by kind of module.
        learned_nothing: Modules whose ``‖ΔW‖`` is below ``NOTHING`` of the median.
        note: What must be known to read the figures; empty if nothing.
        lineage: Where it came from, in sentences, the newest training first; empty where that was not kept.
    """

    adapter: str
    format: str
    base: str | None
    mixer: str | None
    parameters: int
    modules: tuple[ModuleReport, ...]
    groups: tuple[Group, ...]
    learned_nothing: tuple[str, ...]
    note: str = ""
    lineage: tuple[str, ...] = ()

    def show(self, display: Display) -> None:
        """Write the medians by kind of module, and what is to be known of them."""
        display.show(_groups_table(self.groups))
        mixer = f", mixer {self.mixer}" if self.mixer else ""
        display.say(
            f"Read {self.adapter}: {self.format}{mixer}, {len(self.modules)} modules, {self.parameters:,} parameters."
        )
        for sentence in self.lineage:
            display.say(sentence)
        if self.note:
            display.say(self.note)
        if self.learned_nothing:
            names = ", ".join(self.learned_nothing[:3]) + (", …" if len(self.learned_nothing) > 3 else "")
            display.say(
                f"Learned nothing: {len(self.learned_nothing)} of {len(self.modules)} modules ({names})."
            )


def inspect_adapter(
    adapter: str | Path, base: str | None = None, say: Callable[[str], None] = lambda _: None
) -> Inspection:
    """Look at what an adapter learned.

    Args:
        adapter: Adapter of any format that is read.
        base: Base model whose weights to compare with; None to look at the factors alone.
        say: Receives a line before long work.

    Returns:
        Every module's figures, in float64.

    Raises:
        AdapterError: If the adapter cannot be read.
        ModelError: If the base cannot be read, or has none of the adapter's modules.
    """
    found = read_adapter(adapter, base=base, say=say)
    if not found.modules:
        raise AdapterError(f"{adapter} has no modules, so there is nothing to inspect.")
    weights = open_weights(base, say) if base is not None else None
    fit = fit_to_base(found, weights, str(base)) if weights is not None else None
    own = found if fit is None else fit.adapter
    mixer = own.config.get("mixer")
    # A configuration names how a fresh mixer starts; what was imported, combined or mixed started elsewhere.
    starts = start_of(Path(adapter)) or {}
    before = {} if fit is None else {new: old for old, new in fit.renamed.items()}
    reports = tuple(
        _look(name, factors, fit, weights, starts.get(before.get(name, name)))
        for name, factors in sorted(own.modules.items(), key=lambda pair: natural(pair[0]))
    )
    if weights is not None and all(report.relative_norm is None for report in reports):
        raise ModelError(
            f"{base} has no weight of any module of {adapter}, as {reports[0].module}. Name the base that the adapter "
            "was trained on."
        )
    typical = statistics.median(report.norm for report in reports)
    return Inspection(
        str(adapter),
        detect(Path(adapter)),
        base,
        str(mixer) if mixer and not found.is_folded else None,
        found.parameters,
        reports,
        tuple(
            _group(kind, [r for r in reports if r.kind == kind])
            for kind in dict.fromkeys(r.kind for r in reports)
        ),
        tuple(r.module for r in reports if r.norm == 0 or r.norm < NOTHING * typical),
        " ".join(filter(None, (*(found.notes if fit is None else (*fit.notes, *fit.faults)), _note(found)))),
        tuple(describe_lineage(lineage_of(Path(adapter)) or {})),
    )


def _note(adapter: Adapter) -> str:
    parts = adapter.config.get("components", {"": adapter.config}).values()
    kept = adapter.begun is None and any("init_lora_weights" in part for part in parts)
    computed = f"It began with {adapter.begun}: ΔW = s·(B·A - B0·A0), of twice the rank."
    notes = (
        ([computed], adapter.begun is not None),
        ([MAGNITUDES], adapter.has_magnitudes),
        ([BIASES], adapter.has_biases),
        ([COMPONENTS], kept),
    )
    return " ".join(text for note, is_said in notes for text in note * is_said)


def _look(
    name: str, factors: Factors, fit: Fit | None, weights: StoredWeights | None, start: Tensor | None
) -> ModuleReport:
    import torch

    values = factors.singular_values()
    M = factors.M.double()
    identity = torch.eye(factors.r, dtype=M.dtype)
    mixing = torch.linalg.svdvals(M)
    A = factors.A.double()
    unit = factors.r**0.5  # ‖I‖
    return ModuleReport(
        module=name,
        form=factors.form.kind,
        shape=(factors.B.shape[0], factors.A.shape[1]),
        rank=factors.r,
        scale=factors.scale,
        norm=float(values.norm()),
        relative_norm=_relative(name, float(values.norm()), factors, fit, weights),
        effective_rank=effective_rank(values),
        mixer_values=tuple(mixing.tolist()),
        from_identity=float((M - identity).norm()) / unit,
        from_orthogonal=float((mixing - 1).norm()) / unit,
        moved=_moved(M, start),
        mixed_scale=float((M @ A).norm() / A.norm()) if A.any() else 0.0,
    )


def effective_rank(values: Tensor) -> float:
    """Return the effective rank of a matrix.

    Args:
        values: Its singular values, shape ``(n,)``.

    Returns:
        Between 1 and n; 0 if all are zero. (Roy and Vetterli, The effective rank, EUSIPCO 2007.)
    """
    total = float(values.sum())
    if total == 0:
        return 0.0
    shares = values[values > 0] / total
    return float((-(shares * shares.log()).sum()).exp())


def _moved(M: Tensor, start: Tensor | None) -> float | None:
    """Return how far a mixer is from its start, where that is known."""
    if start is None or start.shape != M.shape or not start.any():
        return None
    start = start.to(M)
    return float((M - start).norm() / start.norm())


def _relative(
    name: str, norm: float, factors: Factors, fit: Fit | None, weights: StoredWeights | None
) -> float | None:
    if fit is None or weights is None or factors.form.kind == "expert":
        return None
    try:
        weight = weights.read(fit.stored_name(name))
    except ModelError:
        return None
    if weight.numel() != factors.B.shape[0] * factors.A.shape[1] // factors.form.groups:
        return None
    size = float(weight.double().norm())
    return norm / size if size else None


def _group(kind: str, reports: Sequence[ModuleReport]) -> Group:
    def median(figure: str) -> float | None:
        known = [value for report in reports if (value := getattr(report, figure)) is not None]
        return statistics.median(known) if known else None

    figures = (
        "norm",
        "relative_norm",
        "effective_rank",
        "from_identity",
        "from_orthogonal",
        "moved",
        "mixed_scale",
    )
    return Group(kind, len(reports), max(r.rank for r in reports), *(median(figure) for figure in figures))


def natural(path: str) -> list[tuple[int, str]]:
    """Return a key that sorts ``layers.10`` after ``layers.9``.

    Args:
        path: Of a module.
    """
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def _groups_table(groups: Sequence[Group]) -> Table:
    """Lay out medians by kind of module, leaving out what no module has."""
    from rich.table import Table

    columns = {
        "modules": [str(group.modules) for group in groups],
        "rank": [str(group.rank) for group in groups],
        "eff. rank": [figure_or_dash(group.effective_rank) for group in groups],
        "‖ΔW‖": [figure_or_dash(group.norm) for group in groups],
        "÷ ‖W0‖": [figure_or_dash(group.relative_norm) for group in groups],
        "M - I": [figure_or_dash(group.from_identity) for group in groups],
        "M - orth.": [figure_or_dash(group.from_orthogonal) for group in groups],
        "moved": [figure_or_dash(group.moved) for group in groups],
        "‖MA‖/‖A‖": [figure_or_dash(group.mixed_scale) for group in groups],
    }
    shown = {name: cells for name, cells in columns.items() if any(cell != "–" for cell in cells)}
    table = Table(box=None, header_style="bold")
    table.add_column("kind", overflow="fold")
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for index, group in enumerate(groups):
        table.add_row(group.kind, *(cells[index] for cells in shown.values()))
    return table
