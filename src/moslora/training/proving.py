"""The reload proof of a run: at its end, or later where it could not be carried out then.

A proof has three ends. It passes. It ran and what was shipped differs: the run has failed, and the exports are
renamed, so that nothing loads them by mistake. Or it could not be carried out, as where a second process finds no
memory: that says nothing about the adapter, so all of it stays, and what the trained model gave is kept to be compared
later.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.errors import ProofError, TrainingError, UsageError
from moslora.files import replaced_file
from moslora.tasks.task import Task
from moslora.training.context import RunContext
from moslora.training.run_directory import RunDirectory
from moslora.training.saving import UNPROVEN, exported_paths, reject
from moslora.wording import first_line

if TYPE_CHECKING:
    from torch import Tensor

    from moslora.display import Display

__all__ = ["Observed", "is_unproven", "observe", "prove_later", "prove_reloaded", "release"]


@dataclass(frozen=True)
class Observed:
    """What a trained model gave for some inputs, and how a fresh process repeats it.

    Attributes:
        inputs: Token ids ``(1, length)``, or all arguments by name, each.
        outputs: What the model gave, float32 on the CPU by name; None if it could not be run.
        arguments: How the base is loaded: base, dtype, device, auto_class, quantization, reader and variant.
        exports: The exports, from the run directory on; the proof loads the first.
        reason: Why there are no outputs.
    """

    inputs: Sequence[Any]
    outputs: dict[str, Tensor] | None
    arguments: Mapping[str, Any]
    exports: Sequence[str]
    reason: str = ""

    def write(self, path: Path) -> None:
        """Keep it in a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        tensors = {f"output.{name}": tensor.contiguous() for name, tensor in (self.outputs or {}).items()}
        for index, given in enumerate(self.inputs):
            named = given if isinstance(given, Mapping) else {"": given}
            tensors |= {f"input.{index}.{name}": tensor.cpu().contiguous() for name, tensor in named.items()}
        about = {"arguments": dict(self.arguments), "exports": list(self.exports)}
        with replaced_file(path) as part:
            save_file(tensors, part, metadata={"moslora": json.dumps(about)})

    @classmethod
    def read(cls, path: Path) -> Observed:
        """Read what ``write`` kept.

        Raises:
            UsageError: If the file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        inputs: dict[int, dict[str, Tensor]] = {}
        outputs = {}
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["moslora"])
                for key in file.keys():  # noqa: SIM118 - not a dict
                    kind, _, name = key.partition(".")
                    if kind == "output":
                        outputs[name] = file.get_tensor(key)
                    else:
                        index, _, argument = name.partition(".")
                        inputs.setdefault(int(index), {})[argument] = file.get_tensor(key)
            given: list[Any] = [named.get("", named) for _, named in sorted(inputs.items())]
            return cls(given, outputs, about["arguments"], about["exports"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path} is damaged: {first_line(error)}. Train again to prove the LoRA."
            ) from error


def observe(run: RunContext, task: Task, adapted: Any) -> Observed:
    """Run the trained model on the proof's inputs.

    Args:
        run: The run.
        task: Its task.
        adapted: The trained model.

    Returns:
        What it gave, on the CPU, so that the model can go.
    """
    from moslora.training.reload_proof import proof as proofs

    device = str(adapted.device)
    # What several GPUs held, one may not hold; the fresh process takes all of them.
    many = device.startswith("cuda") and (
        run.is_split or getattr(run.recipe.model, "device_map", "") == "auto"
    )
    arguments = {
        "base": task.place,
        "dtype": proofs.dtype_name(adapted),
        "device": "auto" if many else device,
        "auto_class": task.auto_class,
        "quantization": task.quantization,
        "reader": task.reader,
        "variant": task.variant,
    }
    exports = [str(place.relative_to(run.directory.path)) for place in exported_paths(run, task)]
    inputs = task.probe()
    find = proofs.live_logits if task.reader == "peft" else proofs.live_outputs
    try:
        outputs = find(task.live(adapted), inputs, device)
    except (MemoryError, RuntimeError) as error:  # of torch, memory among them
        return Observed(
            inputs, None, arguments, exports, f"the trained model did not run: {first_line(error)}"
        )
    return Observed(inputs, outputs, arguments, exports)


def release(task: Task, trainer: Any) -> None:
    """Let a trainer's memory go, so that a fresh process finds it: model, optimizer and gradients.

    The caller must hold no reference to the trainer or its model any more once this has returned.

    Args:
        task: Forgets the model, if it holds one.
        trainer: The trainer.
    """
    task.release()
    trainer.accelerator.free_memory()
    for name in ("model", "model_wrapped", "optimizer", "lr_scheduler", "callback_handler"):
        setattr(trainer, name, None)


def collect_garbage() -> None:
    """Give freed memory back, also that of a GPU, to whoever needs it next."""
    import torch

    gc.collect()  # models, trainers and their hooks know each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def prove_reloaded(run: RunContext, observed: Observed) -> None:
    """Compare with another's loader in a fresh process; a run whose proof cannot be carried out says so.

    Args:
        run: The run.
        observed: What its model gave.

    Raises:
        ProofError: If the exports compute something else; they are renamed then.
        Stopped: If the run was asked to stop.
    """
    directory, display = run.directory, run.display
    reason = _prove(directory, observed, display, run.stop.check)
    if reason is None:
        return
    how = f"moslora train --resume {directory.path}"
    try:
        if observed.outputs is None:
            raise OSError(observed.reason)
        observed.write(directory.path / UNPROVEN)
    except OSError:  # as a disk without room
        how = f"moslora evaluate BASE --adapter {directory.path / observed.exports[0]} --data FILE"
    reader = observed.arguments["reader"]
    directory.update(
        proofs={"reload": {"passed": None, "reader": reader, "reason": reason, "prove_with": how}}
    )
    display.warn(
        f"The reload proof could not be carried out: {reason}\n"
        "Nothing is known against the adapter and the exported LoRA, which stay; that the LoRA computes what was "
        f"trained has not been shown. To prove it, when there is room: {how}"
    )


def is_unproven(directory: RunDirectory) -> bool:
    """Tell whether a run is complete but for its reload proof, which can be made up for."""
    record = directory.read()
    reload = record.get("proofs", {}).get("reload")
    return (
        record.get("status") == "completed"
        and isinstance(reload, Mapping)
        and reload.get("passed") is None
        and (directory.path / UNPROVEN).is_file()
    )


def prove_later(directory: RunDirectory, display: Display, check: Callable[[], None]) -> None:
    """Make up for a reload proof that could not be carried out at the end of its run.

    Args:
        directory: The run, of which ``is_unproven`` is true.
        display: Where to tell of it.
        check: Called a few times a second; raises where it was asked to stop.

    Raises:
        ProofError: If the exports compute something else; they are renamed, and the run is ``failed``.
        TrainingError: If it could not be carried out this time either; everything is as it was.
        Stopped: If ``check`` raised it.
    """
    kept = directory.path / UNPROVEN
    try:
        reason = _prove(directory, Observed.read(kept), display, check)
    except ProofError as error:
        directory.update(status="failed", error=f"ProofError: {error}")
        raise
    if reason is not None:
        raise TrainingError(f"The reload proof could not be carried out again: {reason}\nAll is as it was.")
    kept.unlink()


def _prove(
    directory: RunDirectory, observed: Observed, display: Display, check: Callable[[], None]
) -> str | None:
    """Carry out a proof and note its number; return why it could not be carried out, or None."""
    from moslora.training.reload_proof import proof as proofs

    if observed.outputs is None:
        return observed.reason
    shipped = [directory.path / name for name in observed.exports]
    reader = proofs.READERS[observed.arguments["reader"]].name
    display.say(f"Proving: loading the exported LoRA in a fresh process with {reader} only.")
    try:
        proof = proofs.prove_reload(
            observed.outputs,
            observed.inputs,
            adapter=shipped[0],
            say=display.warn,
            check=check,
            **observed.arguments,
        )
    except proofs.CouldNotRun as reason:
        return str(reason)
    except ProofError as error:
        renamed = reject(directory.path, shipped)
        directory.update(proofs={"reload": {"passed": False, "reader": observed.arguments["reader"]}})
        names = " and ".join(str(place) for place in renamed)
        raise ProofError(f"{error} The adapter stays; what failed is now called {names}.") from error
    earlier = directory.read().get("proofs", {}).get("reload") or {}
    settled = {key: None for key in ("reason", "prove_with") if key in earlier}
    directory.update(proofs={"reload": {**dataclasses.asdict(proof), "passed": proof.passed, **settled}})
    return None
