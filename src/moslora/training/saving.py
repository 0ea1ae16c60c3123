"""The adapter and its exports on disk, each with its proof."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moslora.adapters.export import export_adapter
from moslora.adapters.formats.native import keep_start, read_start
from moslora.adapters.formats.pipeline import folders
from moslora.adapters.lineage import keep_lineage
from moslora.core.finite import all_finite
from moslora.errors import TrainingError
from moslora.files import new_directory
from moslora.tasks.task import Task
from moslora.training.cards import drop_pefts_cards
from moslora.training.context import RunContext
from moslora.versions import installed

# What a proof that could not be carried out needs to be made up for: inputs, and what the trained model gave.
UNPROVEN = "unproven.safetensors"


def save_adapter(run: RunContext, task: Task, adapted: Any, steps: int) -> None:
    """Save the native adapter, then its fold with the proof on the written files.

    Where each process holds a part of the adapter, all of them call it, and the first writes.

    Args:
        run: The run.
        task: Its task.
        adapted: The trained model.
        steps: Optimizer steps that it was trained for.
    """
    from moslora.tuner.sharding import gathered

    directory = run.directory
    if not run.team.is_main_process:
        if run.is_split:
            with gathered(adapted):
                adapted.save_pretrained(directory.adapter, is_main_process=False)
        return
    if not run.is_split:
        _refuse_diverged([n for n, p in adapted.named_parameters() if p.requires_grad and not all_finite(p)])
    # A run that was stopped after this stage has trained nothing since; what it saved is written anew.
    exported = exported_paths(run, task)
    for place in (directory.adapter, *exported, *(rejected(directory.path, each) for each in exported)):
        remove(place)
    (directory.path / UNPROVEN).unlink(missing_ok=True)
    with new_directory(directory.adapter) as folder:
        with gathered(adapted):
            adapted.save_pretrained(folder)
        if run.is_split:
            _refuse_diverged(_broken_in(folder))
        drop_pefts_cards(folder)
        task.write_beside(adapted, folder)
        if run.start.exists():
            _save_start_beside(folder, read_start(run.start))
        keep_lineage(folder, _lineage(run, task, steps))
    if run.mix is not None:
        frozen = run.mix.prove(directory.adapter)
        directory.update(proofs={"frozen": {**dataclasses.asdict(frozen), "passed": True}})
    for (name, (_, format_)), place in zip(task.exports.items(), exported, strict=True):
        place.parent.mkdir(exist_ok=True)
        proof = export_adapter(directory.adapter, place, format_)
        directory.update(proofs={name: {**dataclasses.asdict(proof), "passed": proof.passed}})


def _refuse_diverged(broken: Sequence[str]) -> None:
    if broken:
        raise TrainingError(
            f"Training diverged: {broken[0]} has NaN or infinite values, so nothing was saved. Lower "
            "trainer.learning_rate, or set trainer.max_grad_norm."
        )


def _broken_in(folder: Path) -> list[str]:
    """Return the tensors of a saved adapter with NaN or infinite values."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    return [name for name, tensor in tensors.items() if not all_finite(tensor)]


def _lineage(run: RunContext, task: Task, steps: int) -> dict[str, Any]:
    """Return where the run's adapter comes from."""
    hashes = run.directory.read().get("hashes", {})
    loss = getattr(run.recipe.task, "loss", None)
    return {
        "task": run.recipe.task.kind,
        **({} if loss is None else {"loss": loss}),
        "base": {"name": run.recipe.model.name, "fingerprint": hashes.get("base", {})},
        "data": hashes.get("data", {}),
        "steps": steps,
        "run": run.directory.path.name,
        "moslora": installed("moslora"),
        **({} if run.mix is None else {"mixed": [str(source) for source in run.mix.sources]}),
        **({} if run.start_from is None else {"start": run.start_from.story}),
    }


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


def rejected(folder: Path, exported: Path) -> Path:
    """Return what an export's file or folder in a run directory is called once a proof has failed."""
    top = exported.relative_to(folder).parts[0]
    return folder / f"{top}.rejected"


def reject(folder: Path, exported: Sequence[Path]) -> list[Path]:
    """Rename exports that a proof has rejected, so that nothing loads them by mistake and nothing is lost.

    Args:
        folder: The run directory.
        exported: Files or folders in it.

    Returns:
        What they are called now.
    """
    renamed = []
    for place in exported:
        there, new = folder / place.relative_to(folder).parts[0], rejected(folder, place)
        if there.exists():
            remove(new)
            there.replace(new)
            renamed.append(new)
    return renamed


def remove(place: Path) -> None:
    """Remove a file or a directory, if it exists."""
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)
