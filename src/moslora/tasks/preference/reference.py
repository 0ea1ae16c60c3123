"""Log-probabilities of the reference on the training rows: computed once, before the first step, and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.distributed import launched
from moslora.files import replaced_file
from moslora.tasks.preference.collating import Row

if TYPE_CHECKING:
    from moslora.display import Display

__all__ = ["FILE", "add_reference", "rows_digest"]

FILE = "reference.safetensors"
# What TRL calls them, by the trainer, in the order in which ``compute_ref_log_probs`` returns them.
COLUMNS = {"dpo": ("ref_chosen_logps", "ref_rejected_logps"), "kto": ("ref_logps", "ref_KL_logps")}

Columns = dict[str, list[float]]


def rows_digest(rows: Sequence[Row], about: Mapping[str, Any]) -> str:
    """Return a hash of rows and of what else their log-probabilities depend on.

    Args:
        rows: As ``rows_of`` makes them.
        about: Whatever else decides the numbers.
    """
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for row in rows:
        digest.update(json.dumps({k: v for k, v in row.items() if not k.startswith("ref_")}).encode())
    return digest.hexdigest()


def add_reference(
    trainer: Any,
    kind: str,
    from_start: bool,
    known: dict[str, Columns],
    folder: Path | None,
    display: Display,
    check: Callable[[], None],
    about: Mapping[str, Any],
) -> None:
    """Give a trainer's rows the log-probabilities of the reference, and let it use these.

    They are computed by the trainer itself, so that by the same kernels a fresh adapter's rewards are exactly 0.

    Args:
        trainer: A ``DPOTrainer`` or ``KTOTrainer`` whose model has not been trained.
        kind: ``"dpo"`` or ``"kto"``.
        from_start: Whether the reference is the model as it is now; otherwise it is the model with its adapter off.
        known: What was computed before, by the rows' hash; added to.
        folder: Where they are kept, in ``FILE``; None to keep them in ``known`` alone.
        display: Where progress is shown.
        check: Called between batches; raises if the run was asked to stop.
        about: Whatever else decides the numbers.
    """
    for name in ("train_dataset", "eval_dataset"):
        data = getattr(trainer, name)
        if data is None:
            continue
        size = trainer.args.per_device_train_batch_size
        rows = list(data)
        digest = rows_digest(rows, about)
        found = _agreed(known.get(digest) or _read(folder, name, digest))
        if found is None:
            found = _compute(trainer, kind, rows, size, from_start, display, check)
            _keep(folder, name, digest, found)
        known[digest] = found
        for column, values in found.items():
            data = data.add_column(column, values)
        setattr(trainer, name, data)
    trainer.precompute_ref_logps = True


def _agreed(found: Columns | None) -> Columns | None:
    """Return what the first process knows: files of it may be out of the others' reach."""
    if launched() == 1:
        return found
    from accelerate.utils import broadcast_object_list

    box: list[Any] = [found]
    broadcast_object_list(box, from_process=0)
    return box[0]  # type: ignore[no-any-return]


def _compute(
    trainer: Any,
    kind: str,
    rows: Sequence[Row],
    size: int,
    from_start: bool,
    display: Display,
    check: Callable[[], None],
) -> Columns:
    """Compute them, each process its share of the batches."""
    import torch
    from accelerate.utils import gather_object

    accelerator, model = trainer.accelerator, trainer.model
    starts = list(range(0, len(rows), size))
    own = starts[accelerator.process_index :: accelerator.num_processes]
    found: list[tuple[int, list[list[float]]]] = []
    was_training, ref_model = model.training, trainer.ref_model
    model.eval()
    if from_start:
        trainer.ref_model = model  # TRL then leaves the adapter on
    try:
        with display.progress("Log-probabilities of the reference", len(own)) as progress:
            for start in own:
                batch = trainer.data_collator(rows[start : start + size])
                batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
                with torch.no_grad():
                    parts = trainer.compute_ref_log_probs(model, batch)
                found.append((start, [part.float().tolist() for part in parts if part is not None]))
                progress.advance()
                if accelerator.num_processes == 1:
                    check()
    finally:
        trainer.ref_model = ref_model
        model.train(was_training)
    if accelerator.num_processes > 1:
        found = gather_object(found)
    columns: Columns = {}
    for _, parts in sorted(found):
        for name, part in zip(COLUMNS[kind], parts, strict=False):
            columns.setdefault(name, []).extend(part)
    return columns


def _read(folder: Path | None, name: str, digest: str) -> Columns | None:
    from safetensors import SafetensorError, safe_open

    file = None if folder is None else folder / f"{name.removesuffix('_dataset')}-{FILE}"
    if file is None or not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            if (opened.metadata() or {}).get("of") != digest:
                return None
            return {key: opened.get_tensor(key).tolist() for key in opened.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError):
        return None  # computed again


def _keep(folder: Path | None, name: str, digest: str, columns: Columns) -> None:
    import torch
    from safetensors.torch import save_file

    if folder is None or (launched() > 1 and not _is_first()):
        return
    tensors = {key: torch.tensor(values, dtype=torch.float32) for key, values in columns.items()}
    with replaced_file(folder / f"{name.removesuffix('_dataset')}-{FILE}") as part:
        save_file(tensors, part, metadata={"of": digest})


def _is_first() -> bool:
    from moslora.distributed import in_main_process

    return in_main_process()
