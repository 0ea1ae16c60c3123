"""The adapter and its exports on disk, each with its proof."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from moslora.adapters.export import export_adapter
from moslora.adapters.formats.native import keep_start, read_start
from moslora.adapters.formats.pipeline import folders
from moslora.errors import ProofError, TrainingError
from moslora.files import new_directory
from moslora.tasks.task import Task
from moslora.training.context import RunContext


def save_adapter(run: RunContext, task: Task, adapted: Any) -> None:
    """Save the native adapter, then its fold with the proof on the written files."""
    import torch

    directory = run.directory
    broken = [n for n, p in adapted.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
    if broken:
        raise TrainingError(
            f"Training diverged: {broken[0]} has NaN or infinite values, so nothing was saved. Lower "
            "trainer.learning_rate, or set trainer.max_grad_norm."
        )
    # A run that was stopped after this stage has trained nothing since; what it saved is written anew.
    for place in (directory.adapter, *exported_paths(run, task)):
        remove(place)
    with new_directory(directory.adapter) as folder:
        adapted.save_pretrained(folder)
        if run.start.exists():
            _save_start_beside(folder, read_start(run.start))
    if run.mix is not None:
        frozen = run.mix.prove(directory.adapter)
        directory.update(proofs={"frozen": {**dataclasses.asdict(frozen), "passed": True}})
    for (name, (_, format_)), place in zip(task.exports.items(), exported_paths(run, task), strict=True):
        place.parent.mkdir(exist_ok=True)
        proof = export_adapter(directory.adapter, place, format_)
        directory.update(proofs={name: {**dataclasses.asdict(proof), "passed": proof.passed}})


def _save_start_beside(folder: Path, mixers: dict[str, Any]) -> None:
    """Keep what the mixers started as beside the adapter, or beside each part of a pipeline's."""
    parts = folders(folder)
    if not parts:
        keep_start(folder, mixers)
    for name, part in parts.items():
        own = {path.removeprefix(f"{name}."): M for path, M in mixers.items() if path.startswith(f"{name}.")}
        keep_start(part, own)


def exported_paths(run: RunContext, task: Task) -> list[Path]:
    """Return where the run's exports lie, the one that the proof loads first."""
    return [run.directory.path / place for place, _ in task.exports.values()]


def remove(place: Path) -> None:
    """Remove a file or a directory, if it exists."""
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def prove_reloaded(run: RunContext, task: Task, adapted: Any) -> None:
    """Compare with another's loader in a fresh process; a fold that fails is not left lying about."""
    from moslora.training.reload_proof import proof as proofs

    directory = run.directory
    inputs = task.probe()
    device = str(adapted.device)
    reader = proofs.READERS[task.reader]
    run.display.say(f"Proving: loading the exported LoRA in a fresh process with {reader.name} only.")
    outputs = proofs.live_logits if task.reader == "peft" else proofs.live_outputs
    live = outputs(task.live(adapted), inputs, device)
    shipped = exported_paths(run, task)
    try:
        proof = proofs.prove_reload(
            live,
            inputs,
            task.place,
            proofs.dtype_name(adapted),
            device,
            shipped[0],
            run.display.warn,
            task.auto_class,
            task.quantization,
            task.reader,
            task.variant,
        )
    except ProofError:
        for place in shipped:
            remove(place)
        raise
    directory.update(proofs={"reload": {**dataclasses.asdict(proof), "passed": proof.passed}})
