"""The end of a run, tried on the fresh adapter before the first step: save, fold, load into stock PEFT's structure.

What cannot be shipped for a reason that is known at the start fails here, and not after the training. Only the adapter
is written, and the base that stock PEFT loads it into is a skeleton without weights.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.adapters.export import export_adapter
from moslora.adapters.formats.reading import read_adapter
from moslora.errors import MoSLoRAError, ProofError, UsageError
from moslora.files import scratch
from moslora.tasks.task import Task
from moslora.training.context import RunContext

if TYPE_CHECKING:
    from torch import nn

__all__ = ["rehearse"]

# B starts as zero, and the fold of an update of zero proves nothing.
STAND_IN = 1e-2
ZERO_AT_FIRST = ("moslora_B", "moslora_embedding_B")


def rehearse(run: RunContext, task: Task, adapted: Any) -> None:
    """Save a fresh adapter, fold it and load it as anyone will; keep what its mixers start as.

    Args:
        run: The run; the file of its start is written.
        task: Its task.
        adapted: The model with its fresh adapter. It is not changed.

    Raises:
        UsageError: If what will be trained cannot be shipped; the message says why.
    """
    from safetensors.torch import save_file

    with scratch(".start", run.directory.path) as folder:
        adapted.save_pretrained(folder / "adapter")  # whose names are those of what is saved in the end
        mixers = {path: f.M.contiguous() for path, f in read_adapter(folder / "adapter").modules.items()}
        save_file(mixers, folder / run.start.name)
        _fill(folder / "adapter")
        try:
            for place, format_ in task.exports.values():
                out = folder / "out" / place
                out.parent.mkdir(parents=True, exist_ok=True)
                export_adapter(folder / "adapter", out, format_)
            _check_structure(task, folder / "out" / "lora")
        except (MoSLoRAError, ValueError) as error:
            raise UsageError(
                f"Nothing was trained, because the result could not be shipped as a plain LoRA: {error} Change the "
                "adapter section, or train with MoSLoRAConfig in a script of PEFT's, where merging is a way out."
            ) from error
        (folder / run.start.name).replace(run.start)


def _fill(folder: Path) -> None:
    """Put small random numbers in the place of a B of zeros, in the files."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)  # the run's own streams are left alone
    for path in sorted(folder.rglob("adapter_model.safetensors")):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        for key, tensor in tensors.items():
            if any(f".{part}" in key for part in ZERO_AT_FIRST) and not tensor.any():
                noise = torch.randn(tensor.shape, generator=generator) * STAND_IN
                tensors[key] = noise.to(tensor.dtype)
        save_file(tensors, path, metadata=metadata)


def _check_structure(task: Task, lora: Path) -> None:
    """Load a plain LoRA with stock PEFT into the base's own modules, without their weights.

    Raises:
        ProofError: If PEFT would pass over a tensor, or leave a factor at its start.
        ValueError: If PEFT refuses it.
    """
    skeleton = task.skeleton()
    if skeleton is None:
        return
    unused, empty = _load(skeleton, lora)
    if unused or empty:
        what = f"passes over {unused[0]}" if unused else f"leaves {empty[0]} empty"
        raise ProofError(f"stock PEFT {what} in this base.")


def _load(skeleton: nn.Module, lora: Path) -> tuple[list[str], list[str]]:
    """Return the tensors that PEFT passes over, and the factors that it does not fill."""
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    config = LoraConfig.from_pretrained(lora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the run's own model was warned of already
        model = PeftModel(skeleton, config, low_cpu_mem_usage=True)
        result = set_peft_model_state_dict(
            model, load_peft_weights(lora, device="cpu"), low_cpu_mem_usage=True
        )
    return list(result.unexpected_keys), [key for key in result.missing_keys if ".lora_" in key]
