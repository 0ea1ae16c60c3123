"""A card: the README.md of an adapter, its metadata as the Hub reads it, and whether it is ours to replace."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moslora.adapters.cards.base_name import BaseName, bare_name, base_name
from moslora.adapters.cards.markdown import code, plain, table
from moslora.adapters.cards.measured import numbers, texts
from moslora.adapters.cards.usage import Loading, how_to_load
from moslora.adapters.factors import Adapter
from moslora.bounded import read_text
from moslora.files import write_text
from moslora.models.names import HUB_ID
from moslora.wording import figure, printable

__all__ = ["README", "Card", "is_replaceable", "render_card", "write_card"]

README = "README.md"
MARK = re.compile(r"<!-- written by moslora, sha256 (?P<digest>[0-9a-f]{64}) -->\s*\Z")
LARGEST = 4 << 20
# Our metrics, as the Hub calls them.
METRICS: Mapping[str, str] = {
    "exact_match": "exact_match",
    "accuracy": "accuracy",
    "loss": "loss",
    "f1": "f1",
    "mcc": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}
PIPELINES: Mapping[str, tuple[str, str]] = {  # task → the Hub's pipeline tag, and the task of its results
    "text": ("text-generation", "text-generation"),
    "preference": ("text-generation", "text-generation"),
    "classification": ("text-classification", "text-classification"),
    "vision": ("image-text-to-text", "image-text-to-text"),
    "image": ("text-to-image", "text-to-image"),
}
LIBRARIES: Mapping[str, str | None] = {
    "lora": "peft",
    "native": "peft",
    "diffusers": "diffusers",
    "kohya": "diffusers",
    "original": "diffusers",
    "gguf": None,
}
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        title: What the adapter is called: the last part of its path.
        format: One of ``formats.table.WRITTEN``.
        adapter: The adapter.
        measured: What a run measured on it, from ``read_measured``; None if nothing is known.
        proofs: What was proven of these files, as sentences.
        file: Name of the weights, where the format is a single file.
        hub_base: The base's id on the Hub, where the caller knows it.
        origin: How it was made, where no run is known: a sentence.
    """

    title: str
    format: str
    adapter: Adapter
    measured: Mapping[str, Any] | None = None
    proofs: Sequence[str] = ()
    file: str = ""
    hub_base: str | None = None
    origin: str = ""

    @property
    def base(self) -> BaseName:
        """What the base is called: as the run recorded it, else by the configuration."""
        recorded = (self.measured or {}).get("base")
        if isinstance(recorded, Mapping) and self.hub_base is None:
            return BaseName.from_json(recorded)
        parts = self.adapter.config.get("components", {"": self.adapter.config}).values()
        names = [str(name) for part in parts if (name := part.get("base_model_name_or_path"))]
        return base_name(names[0] if names else "", self.hub_base)

    @property
    def task(self) -> str | None:
        """The task of the run; else what the format and the configuration tell."""
        kind = (self.measured or {}).get("task")
        if isinstance(kind, str):
            return kind
        if self.format in ("diffusers", "kohya", "original") or "components" in self.adapter.config:
            return "image"
        causal = self.adapter.config.get("task_type") == "CAUSAL_LM" or self.format == "gguf"
        return "text" if causal else None

    @property
    def auto_class(self) -> str | None:
        """The class that loads the base."""
        named = (self.measured or {}).get("auto_class")
        return named if isinstance(named, str) and re.fullmatch(r"Auto[A-Za-z0-9]+", named) else None


def write_card(folder: Path, card: Card) -> bool:
    """Write a card into an adapter's folder, unless there is one that somebody wrote.

    Args:
        folder: The adapter's.
        card: What to say.

    Returns:
        Whether it was written.
    """
    if not is_replaceable(folder / README):
        return False
    write_text(folder / README, render_card(card))
    return True


def is_replaceable(path: Path) -> bool:
    """Return whether nothing of a person's is lost if a README is replaced.

    So it is if there is none, if it is a card of ours that nobody changed, or PEFT's template that nobody filled in.

    Args:
        path: The README.
    """
    if not path.exists() and not path.is_symlink():
        return True
    try:
        text = read_text(path, LARGEST)
    except (OSError, ValueError):
        return False
    return is_ours(text) or is_pefts_template(text)


def is_ours(text: str) -> bool:
    """Return whether a README is a card of ours, as it was written.

    Args:
        text: All of it.
    """
    mark = MARK.search(text)
    return mark is not None and _digest(text[: mark.start()]) == mark["digest"]


def is_pefts_template(text: str) -> bool:
    """Return whether a README is the template that PEFT's ``save_pretrained`` writes, with nothing filled in.

    Args:
        text: All of it.
    """
    from huggingface_hub import ModelCard, ModelCardData

    if "[More Information Needed]" not in text:
        return False
    try:
        body = ModelCard(text, ignore_metadata_errors=True).text
        template = ModelCard.from_template(ModelCardData()).text
    except Exception:  # whatever YAML or jinja raise for a card that somebody wrote
        return False
    lines, known = ({line.strip() for line in t.splitlines() if line.strip()} for t in (body, template))
    own = re.compile(
        r"#+ (Training procedure|Framework versions)|- PEFT:? .*|- \w+: .*|The following `bitsandbytes` .*"
    )
    return known <= lines and all(own.fullmatch(line) for line in lines - known)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


# --- The text -----------------------------------------------------------------------------------------------


def render_card(card: Card) -> str:
    """Return a card's text: YAML that the Hub reads, and Markdown. No path of this machine is in it.

    Args:
        card: What to say.
    """
    base, measured = card.base, card.measured or {}
    loading = Loading(card.format, card.adapter, base, card.auto_class, card.file)
    lines = [
        f"# {plain(bare_name(card.title))}",
        "",
        *_about(card, base),
        "",
        *_results(measured),
        *_data(measured),
        *how_to_load(loading),
        *_proven(card, measured),
        *_training(measured),
        "Made with moslora (Mixture-of-Subspaces LoRA, [arXiv:2406.11909](https://arxiv.org/abs/2406.11909)).",
    ]
    text = f"---\n{_metadata(card, base).strip()}\n---\n\n" + "\n".join(lines) + "\n\n"
    return f"{text}<!-- written by moslora, sha256 {_digest(text)} -->\n"


def _metadata(card: Card, base: BaseName) -> str:
    """Return what the Hub reads, as YAML; entries that are not known are left out.

    It is what huggingface_hub's ``ModelCardData`` reads and writes, whose import takes longer than an export.
    """
    import yaml

    measured = card.measured or {}
    pipeline = PIPELINES.get(card.task or "")
    tags = ["lora", "moslora", *([f"base_model:adapter:{base.hub}"] if base.hub else [])]
    tags += ["gguf"] * (card.format == "gguf") + ["transformers"] * (card.task == "text")
    results = _eval_results(measured, pipeline[1]) if pipeline else []
    kinds = {metric["type"] for result in results for metric in result["metrics"]}
    values = {
        "base_model": base.hub,
        "base_model_relation": "adapter" if base.hub else None,
        "library_name": LIBRARIES.get(card.format),
        "license": base.license,
        "pipeline_tag": pipeline[0] if pipeline else None,
        "tags": tags,
        "datasets": sorted({part["hub"] for part in _parts(measured) if part["hub"]}),
        "metrics": sorted(kinds - {"loss"}),
        "model-index": [{"name": printable(bare_name(card.title)), "results": results}] if results else None,
    }
    known = {key: value for key, value in values.items() if value}
    return str(yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=1000))


def _parts(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of the data, each with role, name, hub id or None, hash or None and loader."""
    found = []
    for part in measured.get("data") or [] if isinstance(measured.get("data"), list) else []:
        if not isinstance(part, Mapping) or not isinstance(part.get("role"), str):
            continue
        hub, digest = part.get("hub"), part.get("sha256")
        found.append(
            {
                "role": part["role"],
                "name": bare_name(str(part.get("name") or "")),
                "hub": hub if isinstance(hub, str) and HUB_ID.fullmatch(hub) else None,
                "sha256": digest if isinstance(digest, str) and SHA256.fullmatch(digest) else None,
                "loader": part.get("loader") if isinstance(part.get("loader"), str) else None,
            }
        )
    return found


def _eval_results(measured: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    """Return results as the Hub's model index has them: of these weights as they are, on named held-out data."""
    metrics = measured.get("metrics")
    if not isinstance(metrics, Mapping) or texts(measured.get("changes")):
        return []
    parts = _parts(measured)
    heldout = [part for part in parts if part["role"] == "heldout"] or [
        p for p in parts if p["role"] == "train"
    ]
    unit = str(metrics.get("unit") or "held-out examples")
    if not heldout or not unit.startswith("held-out"):
        return []  # what was trained on is not a result
    kind = heldout[0]["hub"] or heldout[0]["loader"]
    found = []
    for name, value in numbers(metrics.get("after")).items() if kind else ():
        if name in METRICS:
            ends = _interval(metrics, "after", name)
            within = f", 95 % interval {ends[0]:.4f} to {ends[1]:.4f}" if ends else ""
            called = f"{name.replace('_', ' ')} on {_count(metrics, name)}{within}"
            found.append({"type": METRICS[name], "value": round(value, 6), "name": called})
    names = [part["hub"] or part["name"] for part in heldout]
    data = {"type": kind, "name": printable(", ".join(name for name in names if name) or unit)}
    return [{"task": {"type": task}, "dataset": data, "metrics": found}] if found else []


def _count(metrics: Mapping[str, Any], name: str) -> str:
    unit = printable(metrics.get("unit") or "held-out examples")
    counted = (
        metrics.get("answers") if name != "loss" and _is_share(metrics, name) else metrics.get("examples")
    )
    return f"{counted} {unit}" if isinstance(counted, int) else unit


def _is_share(metrics: Mapping[str, Any], name: str) -> bool:
    return _interval(metrics, "after", name) is not None


def _interval(metrics: Mapping[str, Any], stage: str, name: str) -> tuple[float, float] | None:
    intervals = metrics.get("intervals")
    of_stage = intervals.get(stage) if isinstance(intervals, Mapping) else None
    ends = of_stage.get(name) if isinstance(of_stage, Mapping) else None
    if isinstance(ends, list | tuple) and len(ends) == 2 and all(isinstance(e, int | float) for e in ends):
        return float(ends[0]), float(ends[1])
    return None


def _about(card: Card, base: BaseName) -> list[str]:
    ranks = sorted({factors.r for factors in card.adapter.modules.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    what = {
        "native": "A MoSLoRA adapter, its mixers learned and not folded,",
        "gguf": "A LoRA adapter for llama.cpp",
    }.get(card.format, "A LoRA adapter")
    of = f" of {code(base.name)}" if base.name else ""
    named = f" ([{plain(base.hub)}](https://huggingface.co/{base.hub}))" if base.hub else ""
    lines = [
        f"{what}{of}{named}: {len(card.adapter.modules)} modules, {rank}, {card.adapter.parameters:,} parameters."
    ]
    if card.origin:
        lines += ["", card.origin]
    if base.remark:
        lines += ["", plain(base.remark)]
    if base.license:
        lines += ["", f"The license is the one that the base's card names: {code(base.license)}."]
    return lines


def _results(measured: Mapping[str, Any]) -> list[str]:
    metrics = measured.get("metrics")
    if not isinstance(metrics, Mapping):
        return []
    before, after = numbers(metrics.get("before")), numbers(metrics.get("after"))
    rows = []
    for name, value in after.items():
        cells = [plain(name.replace("_", " "))]
        for stage, found in (("before", before.get(name)), ("after", value)):
            ends = _interval(metrics, stage, name)
            text = "" if found is None else f"{found:.1%}" if ends else f"{found:.4f}"
            cells.append(f"{text} ({ends[0]:.1%} to {ends[1]:.1%})" if ends and found is not None else text)
        rows.append([*cells, plain(_count(metrics, name))])
    if not rows:
        return []
    lines = ["## What was measured", "", *table(["", "base", "tuned", "on"], rows), ""]
    if any(_is_share(metrics, name) for name in after):
        lines += ["In brackets: 95 % intervals.", ""]
    changes = texts(measured.get("changes"))
    if changes:
        lines += ["This was measured **before** the adapter was changed; it was not measured again:", ""]
        lines += [*(f"- {plain(change)}" for change in changes), ""]
    return lines


def _data(measured: Mapping[str, Any]) -> list[str]:
    rows = []
    for part in _parts(measured):
        hub = f"[{plain(part['hub'])}](https://huggingface.co/datasets/{part['hub']})" if part["hub"] else ""
        name = hub or (code(part["name"]) if part["name"] else "")
        digest = code(part["sha256"]) if part["sha256"] else ""
        rows.append([plain(part["role"]), name, digest])
    if not rows:
        return []
    return ["## Data", "", *table(["part", "name", "SHA-256"], rows), ""]


def _proven(card: Card, measured: Mapping[str, Any]) -> list[str]:
    sentences = [*card.proofs, *([] if texts(measured.get("changes")) else _reloaded(measured))]
    if not sentences:
        return []
    return ["## What was proven", "", *(f"- {plain(sentence)}" for sentence in sentences), ""]


def _reloaded(measured: Mapping[str, Any]) -> list[str]:
    """Say what the run proved in a fresh process."""
    proof = measured.get("reload")
    if not isinstance(proof, Mapping):
        return []
    found, name, what = numbers(proof), str(proof.get("reader") or ""), str(proof.get("what") or "logit")
    if proof.get("passed") is None:
        return [f"Not proven: that a fresh process with {name} computes the same could not be tried."]
    if "max_logit_difference" not in found or proof.get("passed") is not True:
        return []
    moved = (
        f" (the adapter moves them by up to {figure(found['adapter_effect'])})"
        if "adapter_effect" in found
        else ""
    )
    return [
        f"The plain LoRA of this training, loaded by {name} in a fresh process: largest {what} difference "
        f"{found['max_logit_difference']:.1e}{moved}."
    ]


def _training(measured: Mapping[str, Any]) -> list[str]:
    settings = measured.get("training")
    if not isinstance(settings, Mapping) or not settings:
        return []
    rows = [
        [plain(key), code(value)] for key, value in settings.items() if isinstance(value, str | int | float)
    ]
    return ["## How it was trained", "", *table(["setting", "value"], rows), ""]
