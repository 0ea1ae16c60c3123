"""Experts in the two forms that files have: together, in one tensor of all, and apart, each projection a module.

Together is PEFT's ``target_parameters`` of transformers 5: ``…mlp.experts`` for ``down_proj`` and, around which it
nests, ``…mlp.experts.base_layer`` for ``gate_up_proj``. Apart is transformers 4's, vLLM's, SGLang's and that of the
bridges from Megatron: ``…mlp.experts.0.gate_proj``. Both hold the same ΔW:

- **apart**: gate and up share the A of ``gate_up_proj``, and each has its rows of B;
- **together**: the A of gate and up lie one above the other and B is block-diagonal, of twice the rank; of one A, where
  both have the same, nothing is doubled. PEFT's files hold one rank for all experts, so zeros fill smaller ones up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moslora.adapters.factors import LINEAR, Adapter, Factors
from moslora.adapters.formats.experts import EXPERT, PLACE
from moslora.errors import AdapterError

__all__ = [
    "LAYOUTS",
    "ExpertLayout",
    "are_apart",
    "are_together",
    "expert_count",
    "layout_error",
    "layout_of",
    "put_together",
    "take_apart",
]

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


@dataclass(frozen=True)
class ExpertLayout:
    """How a family of models holds its experts.

    Attributes:
        together: The module of all experts in transformers 5, by the end of its path.
        apart: The same in files that have experts apart.
        parts: What gate, up and down are called there.
        interleaved: Whether the rows of ``gate_up_proj`` alternate between gate and up, as gpt-oss has them, instead
            of gate's before up's.
    """

    together: str = "mlp.experts"
    apart: str = "mlp.experts"
    parts: tuple[str, str, str] = (GATE, UP, DOWN)
    interleaved: bool = False

    def pattern(self) -> re.Pattern[str]:
        """Return the regular expression of an expert's module, apart: ``owner``, ``index`` and ``part``."""
        own = "|".join(map(re.escape, dict.fromkeys((*self.parts, GATE, UP, DOWN))))
        owners = "|".join(re.escape(name) for name in dict.fromkeys((self.apart, self.together)))
        return re.compile(rf"(?P<before>.*\.)?(?:{owners})\.(?P<index>\d+)\.(?P<part>{own})")


_USUAL = ExpertLayout()
# By what config.json says in "model_type". tests/test_expert_layouts.py holds each against the installed transformers.
LAYOUTS: Mapping[str, ExpertLayout] = {
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe"), _USUAL
    ),
    "mixtral": ExpertLayout(apart="block_sparse_moe.experts", parts=("w1", "w3", "w2")),
    "gpt_oss": ExpertLayout(interleaved=True),
}


def layout_of(config: Mapping[str, Any] | None) -> ExpertLayout:
    """Return how a base holds its experts.

    Args:
        config: Its ``config.json``; None where it is not known.

    Raises:
        AdapterError: If it is not known.
    """
    kind = _said(config, "model_type", LAYOUTS.__contains__) or (config or {}).get("model_type")
    if kind in LAYOUTS:
        return LAYOUTS[str(kind)]
    what = f"a {kind}, whose experts are" if kind else "not known, so its experts may be"
    raise AdapterError(
        f"The adapter has experts, and its base is {what} in an order that was not looked up; known are "
        f"{', '.join(sorted(LAYOUTS))}. Give --base MODEL, or load the adapter on its base with PEFT, "
        "merge_and_unload() and ship the full model."
    )


def expert_count(config: Mapping[str, Any] | None) -> int | None:
    """Return how many experts a layer of a base has; None where its ``config.json`` does not say.

    Args:
        config: The base's ``config.json``.
    """
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        found = _said(config, name, lambda value: isinstance(value, int) and not isinstance(value, bool))
        if found is not None:
            return int(found)
    return None


def _said(config: Mapping[str, Any] | None, name: str, fits: Callable[[Any], bool]) -> Any:
    """Return a field of a configuration, or of its language model's, that is as it should be."""
    text = (config or {}).get("text_config")
    for part in (text if isinstance(text, dict) else {}, config or {}):
        value = part.get(name)
        if isinstance(value, str | int) and fits(value):
            return value
    return None


def layout_error(one: Adapter, two: Adapter, layout: ExpertLayout) -> float:
    """Compare the experts of two adapters of the same base, whatever form each has.

    Args:
        one: The first.
        two: The second; projections that one of them lacks are zero there.
        layout: How the base holds its experts.

    Returns:
        The largest relative error of ΔW over all projections, Frobenius, float64.
    """
    first, second = _grouped(one, layout), _grouped(two, layout)
    worst = 0.0
    for before in first.keys() | second.keys():
        for index in first.get(before, {}).keys() | second.get(before, {}).keys():
            parts = first.get(before, {}).get(index, {}), second.get(before, {}).get(index, {})
            for part in parts[0].keys() | parts[1].keys():
                deltas = [own[part].delta_weight() if part in own else None for own in parts]
                known = [delta for delta in deltas if delta is not None]
                size = max(float(delta.norm()) for delta in known)
                off = float((known[0] - known[1]).norm()) if len(known) == 2 else size
                worst = max(worst, off / size if size else 0.0)
    return worst


def are_together(adapter: Adapter) -> bool:
    """Tell whether an adapter has experts in one tensor of all."""
    return any(factors.form == EXPERT for factors in adapter.modules.values())


def are_apart(adapter: Adapter, layout: ExpertLayout) -> bool:
    """Tell whether an adapter has experts as modules of their own."""
    pattern = layout.pattern()
    return any(pattern.fullmatch(path) for path in adapter.modules)


def take_apart(
    adapter: Adapter,
    layout: ExpertLayout,
    complete: bool = False,
    number: int | None = None,
    called: tuple[str, str, str] | None = None,
) -> Adapter:
    """Write the experts of an adapter as modules of their own, of the same ΔW.

    Args:
        adapter: With experts together, apart, or without any.
        layout: How its base holds them.
        complete: Whether every expert gets all three projections, those that were not adapted factors of zero.
        number: How many experts a layer has; None for as many as the adapter has.
        called: What to call gate, up and down, if not as ``layout`` does.

    Returns:
        The adapter; unchanged where it has no experts.

    Raises:
        AdapterError: If it cannot be told which parameter is which.
    """
    groups = _grouped(adapter, layout)
    if not groups:
        return adapter
    modules = {
        path: f
        for path, f in adapter.modules.items()
        if f.form != EXPERT and not layout.pattern().fullmatch(path)
    }
    sizes = _sizes(groups.values()) if complete else {}
    for before, experts in groups.items():
        count = _checked(experts, number)
        like = next(iter(experts[min(experts)].values()))
        for index in range(count) if complete else sorted(experts):
            parts = dict(experts.get(index, {}))
            parts |= {part: _zero(size, like) for part, size in sizes.items() if part not in parts}
            for part, factors in parts.items():
                own = (called or layout.parts)[(GATE, UP, DOWN).index(part)]
                modules[f"{before}{layout.apart}.{index}.{own}"] = factors
    return replace(adapter, modules=modules, config=_targets_apart(adapter.config, modules))


def put_together(adapter: Adapter, layout: ExpertLayout, number: int | None = None) -> Adapter:
    """Write the experts of an adapter in one tensor of all, of the same ΔW.

    Args:
        adapter: With experts apart; one with experts together comes back with both parameters of each layer.
        layout: How its base holds them.
        number: How many experts a layer has; None for as many as the adapter has.

    Returns:
        The adapter; unchanged where it has no experts. Experts and projections that were not adapted get factors of
        zero.

    Raises:
        AdapterError: If sizes differ between experts, or there are more than the base has.
    """
    groups = _grouped(adapter, layout)
    if not groups:
        return adapter
    pattern = layout.pattern()
    modules = {
        path: f for path, f in adapter.modules.items() if f.form != EXPERT and not pattern.fullmatch(path)
    }
    sizes = _sizes(groups.values())
    made: dict[str, dict[str, dict[int, Factors]]] = {}
    for before, experts in groups.items():
        count = _checked(experts, number)
        like = next(iter(experts[min(experts)].values()))
        for index in range(count):
            parts = {
                part: experts.get(index, {}).get(part) or _zero(sizes[part], like)
                for part in (GATE, UP, DOWN)
            }
            both = _join(parts[GATE], parts[UP], layout.interleaved)
            places = made.setdefault(before, {"gate_up": {}, "down": {}})
            places["gate_up"][index], places["down"][index] = both, parts[DOWN]
    rank = max(f.r for places in made.values() for own in places.values() for f in own.values())
    for before, places in made.items():
        for name, own in places.items():
            path = f"{before}{layout.together}{'.base_layer' if name == 'gate_up' else ''}"
            for index, factors in own.items():
                modules[f"{path}[{index}]"] = replace(_padded(factors, rank), form=EXPERT)
    return replace(adapter, modules=modules, config=_targets_together(adapter.config, modules, layout))


# --- Reading both forms into one: by layer, expert and projection -------------------------------------------


def _grouped(adapter: Adapter, layout: ExpertLayout) -> dict[str, dict[int, dict[str, Factors]]]:
    """Return factors by what is before the experts' module, expert, and gate, up or down; scales are in B."""
    found: dict[str, dict[int, dict[str, Factors]]] = {}
    pattern = layout.pattern()
    parameters: dict[str, dict[str, dict[int, Factors]]] = {}
    for path, factors in adapter.modules.items():
        plain = replace(factors.fold().unscaled(), form=LINEAR)
        if factors.form == EXPERT:
            place = PLACE.fullmatch(path)
            assert place, "an expert's path says which it is"
            owner = place[1].replace(".base_layer", "")
            depth = place[1].count(".base_layer")
            parameters.setdefault(owner, {}).setdefault(str(depth), {})[int(place[2])] = plain
        elif match := pattern.fullmatch(path):
            part = match["part"]
            own = layout.parts.index(part) if part in layout.parts else (GATE, UP, DOWN).index(part)
            before = match["before"] or ""
            found.setdefault(before, {}).setdefault(int(match["index"]), {})[(GATE, UP, DOWN)[own]] = plain
    for owner, levels in parameters.items():
        if not owner.endswith(layout.together):
            raise AdapterError(
                f"{owner} is not where this family of models has its experts, which is …{layout.together}. Name the "
                "base that the adapter was trained on."
            )
        before = owner.removesuffix(layout.together)
        for name, numbered in _told_apart(owner, levels, adapter.config).items():
            for index, factors in numbered.items():
                parts = found.setdefault(before, {}).setdefault(index, {})
                if name == "down_proj":
                    parts[DOWN] = factors
                else:
                    parts[GATE], parts[UP] = _split(factors, layout.interleaved)
    return found


def _told_apart(
    owner: str, levels: Mapping[str, Mapping[int, Factors]], config: Mapping[str, Any]
) -> dict[str, Mapping[int, Factors]]:
    """Say which of a module's parameters each level of nesting is of: the inner one is the module's first."""
    if len(levels) == 2:
        both = {"gate_up_proj": levels["1"], "down_proj": levels["0"]}
        first, second = (next(iter(own.values())) for own in both.values())
        if first.A.shape[1] == second.B.shape[0] and first.B.shape[0] == 2 * second.A.shape[1]:
            return both
        raise AdapterError(
            f"{owner}: its parameters are of (out, in) {(first.B.shape[0], first.A.shape[1])} and "
            f"{(second.B.shape[0], second.A.shape[1])}, which are not gate_up_proj and down_proj of experts."
        )
    named = {
        str(name).rpartition(".")[2]
        for name in config.get("target_parameters") or ()
        if f".{owner}".endswith(f".{str(name).rpartition('.')[0]}")
    }
    if len(named & {"gate_up_proj", "down_proj"}) != 1 or len(levels) != 1:
        raise AdapterError(
            f"{owner}: its configuration names the parameters {sorted(named)}, so it cannot be told whose factors "
            "these are. Take the adapter from where it was saved with PEFT."
        )
    return {named.pop(): next(iter(levels.values()))}


def _checked(experts: Mapping[int, object], number: int | None) -> int:
    """Return how many experts a layer has; refuse one beyond."""
    if number is not None and max(experts) >= number:
        raise AdapterError(
            f"The adapter has an expert {max(experts)}, and its base {number} of them in a layer, counted from 0. Name "
            "the base that the adapter was trained on."
        )
    return number or max(experts) + 1


def _split(factors: Factors, interleaved: bool) -> tuple[Factors, Factors]:
    B = factors.B
    if B.shape[0] % 2:
        raise AdapterError(f"gate_up_proj of an expert has {B.shape[0]} outputs, which are not two halves.")
    gate, up = (B[0::2], B[1::2]) if interleaved else B.chunk(2)
    return replace(factors, B=gate.contiguous()), replace(factors, B=up.contiguous())


def _join(gate: Factors, up: Factors, interleaved: bool) -> Factors:
    if gate.B.shape[0] != up.B.shape[0] or gate.A.shape[1] != up.A.shape[1]:
        raise AdapterError(
            "gate_proj and up_proj of an expert have different sizes, so they are not of one model."
        )
    if torch.equal(gate.A, up.A):
        A, halves = gate.A, (gate.B, up.B)
    else:
        A = torch.cat((gate.A, up.A))
        halves = (
            torch.cat((gate.B, torch.zeros_like(gate.B[:, :1]).expand(-1, up.r)), dim=1),
            torch.cat((torch.zeros_like(up.B[:, :1]).expand(-1, gate.r), up.B), dim=1),
        )
    B: Tensor = torch.stack(halves, dim=1).flatten(0, 1) if interleaved else torch.cat(halves)
    return Factors(A, torch.eye(len(A), dtype=A.dtype), B.contiguous(), 1.0)


def _padded(factors: Factors, r: int) -> Factors:
    more = r - factors.r
    if not more:
        return factors
    A = torch.cat((factors.A, factors.A.new_zeros(more, factors.A.shape[1])))
    B = torch.cat((factors.B, factors.B.new_zeros(factors.B.shape[0], more)), dim=1)
    return replace(factors, A=A, M=torch.eye(r, dtype=A.dtype), B=B)


def _zero(size: tuple[int, int], like: Factors) -> Factors:
    out, inner = size
    A, B = like.A.new_zeros(like.r, inner), like.B.new_zeros(out, like.r)
    return replace(like, A=A, M=torch.eye(like.r, dtype=A.dtype), B=B)


def _sizes(groups: Iterable[Mapping[int, Mapping[str, Factors]]]) -> dict[str, tuple[int, int]]:
    """Return (out, in) of each projection, which all experts of a model share."""
    found: dict[str, tuple[int, int]] = {}
    for experts in groups:
        for parts in experts.values():
            for part, factors in parts.items():
                size = (factors.B.shape[0], factors.A.shape[1])
                if found.setdefault(part, size) != size:
                    raise AdapterError(
                        f"{part} of the experts has (out, in) {found[part]} and {size}, so they are not of one model."
                    )
    return found | (_inferred(found, [p for p in (GATE, UP, DOWN) if p not in found]) if found else {})


def _inferred(sizes: Mapping[str, tuple[int, int]], missing: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return the sizes of projections that no expert has: gate and up are alike, and down is their mirror."""
    known = next(iter(sizes))
    own = sizes[known]
    return {part: own if (part == DOWN) == (known == DOWN) else own[::-1] for part in missing}


# --- Configurations -----------------------------------------------------------------------------------------


def _targets_apart(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """Name experts by expert and projection, in all layers, and drop the parameters."""
    ends = {".".join(path.split(".")[-3:]) for path in modules if re.search(r"\.experts\.\d+\.\w+$", path)}
    plain = [path for path in modules if ".".join(path.split(".")[-3:]) not in ends]
    return {**_without_ranks(config), "target_modules": sorted({*plain, *ends}), "target_parameters": None}


def _targets_together(
    config: Mapping[str, Any], modules: Mapping[str, Factors], layout: ExpertLayout
) -> dict[str, Any]:
    plain = sorted(path for path, factors in modules.items() if factors.form != EXPERT)
    return {
        **_without_ranks(config),
        "target_modules": plain or None,
        "target_parameters": [f"{layout.together}.gate_up_proj", f"{layout.together}.down_proj"],
    }


def _without_ranks(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave ranks and alphas to be settled anew, and what chose among the old names."""
    left = ("exclude_modules", "layers_to_transform", "layers_pattern")
    return {**config, "rank_pattern": {}, "alpha_pattern": {}, **dict.fromkeys(left)}
