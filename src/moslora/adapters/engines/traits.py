"""What engines ask of an adapter: each trait names the modules that have it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from moslora.adapters.factors import Adapter
from moslora.adapters.formats import comfyui, experts
from moslora.errors import AdapterError
from moslora.models.shards import EMBEDDINGS, HEADS

__all__ = ["TOWER", "TRAITS"]

# A vision or audio tower, or what joins one to the language model.
TOWER = re.compile(
    r"(^|[._])(vision|visual|projector|multi_modal|audio_tower|image_newline|merger|connector)"
)
# An expert that is a module of its own, as vLLM and SGLang name them.
APART = re.compile(r"(?P<owner>.+\.experts)\.(?P<index>\d+)\.(?P<part>\w+)")
PARTS = ({"gate_proj", "up_proj", "down_proj"}, {"w1", "w2", "w3"})
ROUTERS = ("gate", "router", "shared_expert_gate")


def _all(adapter: Adapter) -> list[str]:
    return list(adapter.modules)


def _if(condition: Callable[[Adapter], bool]) -> Callable[[Adapter], list[str]]:
    """Make a trait of all modules, where the adapter as a whole has it."""
    return lambda adapter: _all(adapter) if condition(adapter) else []


def _of_kind(kind: str) -> Callable[[Adapter], list[str]]:
    return lambda adapter: [path for path, f in adapter.modules.items() if f.form.kind == kind]


def _named(*names: str) -> Callable[[Adapter], list[str]]:
    return lambda adapter: [path for path in adapter.modules if path.rpartition(".")[2] in names]


def _apart(adapter: Adapter) -> list[str]:
    return [path for path in adapter.modules if APART.fullmatch(path)]


def _shared_experts(adapter: Adapter) -> list[str]:
    return [path for path in adapter.modules if re.search(r"(^|\.)shared_experts?\.", path)]


def _tower(adapter: Adapter) -> list[str]:
    return [path for path in adapter.modules if TOWER.search(path)]


def _incomplete_experts(adapter: Adapter) -> list[str]:
    """Experts apart of which some lack a projection, or that are not all of a layer."""
    groups: dict[str, dict[str, set[int]]] = {}
    for path in _apart(adapter):
        found = APART.fullmatch(path)
        assert found
        groups.setdefault(found["owner"], {}).setdefault(found["part"], set()).add(int(found["index"]))
    bad = {
        owner
        for owner, parts in groups.items()
        if set(parts) not in PARTS
        or len({frozenset(numbers) for numbers in parts.values()}) > 1
        or any(numbers != set(range(len(numbers))) for numbers in parts.values())
    }
    return [path for path in _apart(adapter) if path.rpartition(".experts.")[0] + ".experts" in bad]


def _half_experts(adapter: Adapter) -> list[str]:
    """Experts together of which one of the two parameters alone is adapted."""
    owners = {experts.owner(path) for path, f in adapter.modules.items() if f.form.kind == "expert"}
    half = {
        path for path in owners if not path.endswith(".base_layer") and f"{path}.base_layer" not in owners
    }
    return [path for path in adapter.modules if experts.owner(path) in half]


def _unknown_to_comfyui(adapter: Adapter) -> list[str]:
    try:
        lost = comfyui.passed_over(adapter, comfyui.best_format(adapter))
    except AdapterError:
        return []  # there is no format that it would read, which is said of the format
    return [
        path
        for path in adapter.modules
        if path in lost or any(name.partition(".")[2] == path for name in lost)
    ]


def _lonely(kept: Iterable[str], needed: Iterable[str]) -> Callable[[Adapter], list[str]]:
    """Make a trait of modules beside which another of their layer is missing."""
    group, wanted = tuple(kept), tuple(needed)

    def trait(adapter: Adapter) -> list[str]:
        found = []
        for path in adapter.modules:
            before, _, last = path.rpartition(".")
            if last in group and any(f"{before}.{name}" not in adapter.modules for name in wanted):
                found.append(path)
        return found

    return trait


TRAITS: Mapping[str, Callable[[Adapter], list[str]]] = {
    "any": _all,
    "DoRA": _if(lambda adapter: adapter.has_magnitudes),
    "bias on B": _if(lambda adapter: adapter.has_biases),
    "tensors beside": _if(lambda adapter: bool(adapter.extra)),
    "ranks that differ": _if(lambda adapter: len({f.r for f in adapter.modules.values()}) > 1),
    "scale of rsLoRA": _if(lambda adapter: bool(adapter.config.get("use_rslora"))),
    "alphas that differ": _if(
        lambda adapter: (
            len({round(f.scale, 9) for f in adapter.modules.values()}) > 1
            and bool(adapter.config.get("alpha_pattern"))
        )
    ),
    "targets as a pattern": _if(
        lambda adapter: (
            isinstance(adapter.config.get("target_modules"), str)
            and adapter.config["target_modules"] != "all-linear"
        )
    ),
    "start": _if(lambda adapter: adapter.begun is not None),
    "convolution": _of_kind("conv"),
    "embedding": lambda adapter: sorted({*_of_kind("embedding")(adapter), *_named(*EMBEDDINGS)(adapter)}),
    "head": _named(*HEADS),
    "experts together": _of_kind("expert"),
    "experts apart": _apart,
    "incomplete experts": _incomplete_experts,
    "half of the experts": _half_experts,
    "shared experts": _shared_experts,
    "router": _named(*ROUTERS),
    "tower": _tower,
    "layers of a tower": lambda adapter: [
        path for path in _tower(adapter) if re.search(r"layers\.\d+\.", path)
    ],
    "q, k or v without q and v": _lonely(("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj")),
    "unknown to ComfyUI": _unknown_to_comfyui,
    "up without gate": _lonely(("up_proj",), ("gate_proj",)),
}
