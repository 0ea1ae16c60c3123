"""The report of a run: one HTML file that opens offline, made only from what the run left on disk.

It reads ``run.json``, and ``metrics.jsonl``, ``predictions.jsonl`` and ``recipe.yaml`` where they are: even
an interrupted or failed run has a report. The verdict comes first, the evidence below it, and the tuned
model's mistakes stand beside its successes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.files import write_text
from moslora.metrics.change import baseline_sentence
from moslora.reports.drawing import has_curve, loss_curve
from moslora.reports.formatting import UNIT, flattened, is_number, number, section_of
from moslora.reports.metric_rows import (
    CHANGES,
    chance_sentence,
    cost_rows,
    fidelity_rows,
    kind_rows,
    metric_rows,
    tables_of,
    verdict_sentence,
)
from moslora.reports.page import render
from moslora.reports.pictures import SERIES, picture_rows, with_thumbnails
from moslora.training.metrics_log import read_metrics
from moslora.training.run_directory import RunDirectory
from moslora.wording import duration, size_in_words

if TYPE_CHECKING:
    pass

__all__ = ["write_report"]


# Proof in run.json: the field that holds its number, and what the number means.
PROOFS = {
    "fold": ("max_relative_error", "The fold keeps ΔW: largest relative error over all modules, in float64"),
    "reload": (
        "max_logit_difference",
        "A fresh process with stock PEFT gives the same logits: largest difference on held-out prompts",
    ),
    "reload in diffusers": (
        "max_logit_difference",
        "A fresh process with diffusers gives the same outputs: largest difference on noised pictures",
    ),
    "kohya": (
        "max_relative_error",
        "The file for ComfyUI and A1111 keeps ΔW: largest relative error over all modules, in float64",
    ),
}

FILES = {
    "lora": "plain LoRA, loads anywhere",
    "kohya.safetensors": "the same for ComfyUI, A1111 and sd-scripts",
    "lora.rejected": "what the proof rejected: it does not compute what was trained",
    "unproven.safetensors": "for the proof that could not be carried out: moslora train --resume",
    "adapter": "native MoSLoRA, to continue training",
    "train-reference.safetensors": "log-probabilities of the reference, for a resumed run",
    "pictures": "what base, tuned model and the model on the way made of prompts, or what questions are about, small",
    "checkpoints": "to resume from",
    "recipe.yaml": "the recipe with every default written out",
    "run.json": "this report's figures, for programs",
    "metrics.jsonl": "one line per logged step",
    "predictions.jsonl": "every held-out answer, base and tuned",
}


PREDICTION = ("place", "prompt", "reference", "base", "tuned", "base_ok", "tuned_ok", "kind", "thumbnails")

# What was measured, unless the record of the run names something else.


def write_report(run_dir: Path, **fields: Any) -> Path:
    """Write ``report.html`` of a run, replacing an older one.

    Args:
        run_dir: The run's folder.
        **fields: Shown instead of what ``run.json`` says.

    Returns:
        Path of the report. The same files in give the same bytes out.

    Raises:
        FileNotFoundError: If ``run_dir`` is not a run.
        ValueError: If one of the run's files is damaged; names file and line.
    """
    run = RunDirectory.open(run_dir)
    record = {**run.read(), **fields}
    log = read_metrics(run.metrics) if run.metrics.exists() else []
    predictions = read_metrics(run.predictions) if run.predictions.exists() else []
    metrics = section_of(record, "metrics")
    rows = metric_rows(metrics, predictions)
    count = metrics.get("examples") or len(predictions)

    page = render(
        "run",
        name=record.get("name") or run.path.resolve().name,
        status=record.get("status", "unknown"),
        stage=record.get("stage"),
        error=record.get("error"),
        run_path=str(run_dir),
        last_step=max((line.get("step", 0) for line in log), default=0),
        verdict=verdict_sentence(rows, count, len(predictions), metrics.get("unit") or UNIT),
        unit=metrics.get("unit") or UNIT,
        pictures=picture_rows(run, section_of(record, "pictures")),
        costs=cost_rows(section_of(record, "also")),
        fidelity=fidelity_rows(section_of(record, "fidelity")),
        drawn_steps=len(section_of(section_of(record, "pictures"), "during")),
        shown_steps=SERIES,
        chance=chance_sentence(predictions),
        remarks=[str(remark) for remark in record.get("remarks") or ()],
        count=count,
        answered=len(predictions),
        glance=_glance(record),
        curves=[loss_curve(log, metrics, width) for width in (7.2, 4.0)] if has_curve(log) else [],
        diverged=[line.get("step") for line in log if "loss" in line.get("not_finite", [])],
        rows=rows,
        kinds=kind_rows(predictions),
        against=baseline_sentence(metrics),
        baseline=metrics.get("baseline_note") if "baseline" in metrics else None,
        tables=tables_of(section_of(record, "tables")),
        changes=with_thumbnails(run, _changes(predictions)),
        proofs=[_proof(name, proof) for name, proof in section_of(record, "proofs").items()],
        files=_files(run),
        snippet=_snippet(run, record) if run.lora.is_dir() else None,
        recipe=run.recipe.read_text(encoding="utf-8") if run.recipe.exists() else None,
        details={
            title: list(flattened(section_of(record, title.lower())))
            for title in ("Timing", "Versions", "Hardware", "Hashes")
        },
    )
    write_text(run.report, page)
    return run.report


def _changes(predictions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = []
    rest = [{**dict.fromkeys(PREDICTION), **line} for line in predictions]
    for marks, (title, shown) in CHANGES.items():
        lines = [line for line in rest if (line.get("base_ok"), line.get("tuned_ok")) == marks]
        rest = [line for line in rest if (line.get("base_ok"), line.get("tuned_ok")) != marks]
        if lines:
            groups.append({"title": title, "count": len(lines), "lines": lines[:shown]})
    if rest:
        groups.append({"title": "Not judged", "count": len(rest), "lines": rest[:6]})
    return groups


def _proof(name: str, proof: Any) -> dict[str, Any]:
    by_diffusers = isinstance(proof, Mapping) and proof.get("reader") == "diffusers"
    known = "reload in diffusers" if name == "reload" and by_diffusers else name
    field, label = PROOFS.get(known, (None, name.replace("_", " ").capitalize()))
    entries = proof if isinstance(proof, Mapping) else {"value": proof}
    if field is None:
        field = next(
            (key for key, value in entries.items() if key != "tolerance" and is_number(value)), "value"
        )
    value, tolerance = number(entries.get(field)), number(entries.get("tolerance"))
    # The mark is worked out here from the two numbers, not taken from whoever wrote them.
    if "passed" in entries and entries["passed"] is None:
        verdict: str | None = "not carried out"
    else:
        verdict = "no number" if value is None else "no tolerance recorded" if tolerance is None else None
    return {
        "label": label,
        "value": "—" if value is None else f"{value:.2g}",
        "tolerance": "—" if tolerance is None else f"{tolerance:.2g}",
        "mark": verdict
        or ("passed" if value is not None and tolerance is not None and value <= tolerance else "failed"),
    }


def _glance(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the few facts that go under the verdict."""
    facts = []
    base = section_of(record, "base").get("name") or section_of(record, "base").get("path")
    if base:
        facts.append(("base model", str(base)))
    start = section_of(record, "start_from").get("path")
    if start:
        facts.append(("started from", str(start)))
    longer = [
        f"{part.get('steps')} steps" for part in record.get("history") or () if isinstance(part, Mapping)
    ]
    if longer:
        facts.append(("trained longer after", ", ".join(longer)))
    trainable = number(record.get("trainable_parameters"))
    if trainable is not None:
        total = number(record.get("total_parameters"))
        share = f" ({100 * trainable / total:.2g}\u00a0% of all)" if total else ""
        facts.append(("trained parameters", f"{int(trainable):,}".replace(",", "\u202f") + share))
    seconds = number(section_of(record, "timing").get("train_seconds"))
    if seconds is not None:
        facts.append(("training time", duration(seconds)))
    hardware = section_of(record, "hardware")
    where = ", ".join(hardware.get("gpus") or []) or hardware.get("cpu")
    processes = record.get("processes", 1)
    if where:
        facts.append(("ran on", str(where) + (f", {processes} processes" if processes > 1 else "")))
    if record.get("seed") is not None:
        facts.append(("seed", str(record["seed"])))
    if record.get("ended"):
        facts.append(("ended", str(record["ended"])[:16].replace("T", " ") + " UTC"))
    return facts


def _files(run: RunDirectory) -> list[dict[str, str]]:
    found = []
    for name, purpose in FILES.items():
        path = run.path / name
        if path.exists():
            parts = [path] if path.is_file() else [part for part in path.rglob("*") if part.is_file()]
            shown = f"{name}/" if path.is_dir() else name
            size = sum(p.stat().st_size for p in parts)
            if size:
                found.append({"name": shown, "purpose": purpose, "size": size_in_words(size)})
    return found


def _snippet(run: RunDirectory, record: Mapping[str, Any]) -> str:
    """Return the lines that load the fold with stock PEFT."""
    base = section_of(record, "base")
    path = base.get("path")
    if base.get("reader") == "diffusers":
        file = next(
            (p.name for p in sorted(run.lora.glob("*.safetensors"))), "pytorch_lora_weights.safetensors"
        )
        kind = base.get("auto_class", "DiffusionPipeline")
        variant = f", variant={base['variant']!r}" if base.get("variant") else ""
        return "\n".join(
            [
                f"from diffusers import {kind}",
                "",
                f"pipe = {kind}.from_pretrained({str(path or 'BASE MODEL')!r}{variant})",
                f"pipe.load_lora_weights({str(run.lora)!r}, weight_name={file!r})",
            ]
        )
    config = run.lora / "adapter_config.json"
    if not path and config.is_file():
        path = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    gguf = f", gguf_file={base['gguf_file']!r}" if base.get("gguf_file") else ""
    auto_class = base.get("auto_class", "AutoModelForCausalLM")
    if (run.lora / "config.json").is_file():
        return _snippet_of_head(str(path or "BASE MODEL"), str(run.lora), auto_class)
    reads_text = auto_class == "AutoModelForCausalLM"
    reader, name = ("AutoTokenizer", "tokenizer") if reads_text else ("AutoProcessor", "processor")
    return "\n".join(
        [
            "from peft import PeftModel",
            f"from transformers import {auto_class}, {reader}",
            "",
            f"base = {str(path or 'BASE MODEL')!r}",
            f"{name} = {reader}.from_pretrained(base{gguf})",
            f"model = {auto_class}.from_pretrained(base{gguf})",
            f"model = PeftModel.from_pretrained(model, {str(run.lora)!r})",
        ]
    )


def _snippet_of_head(base: str, lora: str, auto_class: str) -> str:
    """Return the lines that load base and head, whose size and labels the adapter's own configuration says."""
    return "\n".join(
        [
            "from peft import PeftModel",
            f"from transformers import AutoConfig, {auto_class}, AutoTokenizer",
            "",
            f"base, lora = {base!r}, {lora!r}",
            "tokenizer = AutoTokenizer.from_pretrained(base)",
            "config = AutoConfig.from_pretrained(lora)  # labels, and the head's size",
            f"model = {auto_class}.from_pretrained(base, config=config, ignore_mismatched_sizes=True)",
            "model = PeftModel.from_pretrained(model, lora)",
        ]
    )
