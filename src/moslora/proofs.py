"""Proof that the shipped adapter is what was trained: fresh process, stock PEFT, the same logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.export import ProofError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["RELOAD_TOLERANCE", "ReloadProof", "live_logits", "prove_reload"]

# Largest difference of a logit, relative to the largest logit. Folding reorders the sums of every adapted
# layer, so the rounding of the dtype accumulates over the depth; a dropped adapter costs orders more.
RELOAD_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass(frozen=True)
class ReloadProof:
    """What a fresh process found.

    Attributes:
        max_logit_difference: Largest difference between the logits of the live model and of the adapter
            that stock PEFT loaded.
        max_logit: Largest logit, to judge it by.
        adapter_effect: Largest difference that the adapter makes to the base's logits.
        tolerance: Largest difference allowed: the dtype's share of the largest logit.
        inputs: How many held-out inputs were compared.
    """

    max_logit_difference: float
    max_logit: float
    adapter_effect: float
    tolerance: float
    inputs: int

    @property
    def passed(self) -> bool:
        """Whether the difference is a number within the tolerance."""
        return self.max_logit_difference <= self.tolerance


def _named(inputs: Any) -> Mapping[str, Tensor]:
    """Return a model's arguments by name; bare token ids are ``input_ids``."""
    return inputs if isinstance(inputs, Mapping) else {"input_ids": inputs}


def live_logits(model: nn.Module, inputs: Sequence[Any], device: str) -> dict[str, Tensor]:
    """Run the trained model.

    Args:
        model: The adapted model.
        inputs: Token ids ``(1, length)``, or all arguments by name, each.
        device: Where the model is.

    Returns:
        Float32 logits on the CPU by name.
    """
    import torch

    model.eval()
    with torch.inference_mode():
        return {
            f"input{index}": model(**{name: tensor.to(device) for name, tensor in _named(given).items()})
            .logits.float()
            .cpu()
            for index, given in enumerate(inputs)
        }


def prove_reload(
    live: dict[str, Tensor],
    inputs: Sequence[Any],
    base: str,
    dtype: str,
    device: str,
    adapter: Path,
    say: Callable[[str], None],
    auto_class: str = "AutoModelForCausalLM",
    quantization: Mapping[str, Any] | None = None,
) -> ReloadProof:
    """Load ``adapter`` in a fresh process in which only stock PEFT is imported, and compare logits.

    Args:
        live: What ``live_logits`` gave.
        inputs: The same inputs.
        base: Folder or hub id of the base model.
        dtype: Its dtype, as ``float32``.
        device: Where the live model ran.
        adapter: Directory of the plain LoRA.
        say: Told when the adapter has no effect.
        auto_class: Class of transformers that loads the base.
        quantization: Arguments of ``BitsAndBytesConfig`` for the base, if it is quantised.

    Returns:
        What was found.

    Raises:
        ProofError: If the process failed, or the logits differ.
    """
    import torch
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(prefix="moslora-proof-") as folder:
        asked, answered = Path(folder) / "inputs.safetensors", Path(folder) / "logits.safetensors"
        save_file(
            {
                f"input{index}.{name}": tensor.contiguous()
                for index, given in enumerate(inputs)
                for name, tensor in _named(given).items()
            },
            asked,
        )
        script = Path(__file__).with_name("reload_in_stock_peft.py")
        # -P keeps this folder, whose modules share names with the standard library's, off the path.
        arguments = [base, dtype, device, str(adapter), str(asked), str(answered), auto_class]
        if quantization:
            arguments.append(json.dumps(dict(quantization)))
        command = [sys.executable, "-P", str(script), *arguments]
        environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1"}
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if result.returncode != 0 or not answered.exists():
            last = "\n  ".join(result.stderr.strip().splitlines()[-4:])
            raise ProofError(f"Stock PEFT could not run the exported adapter {adapter}:\n  {last}")
        found = load_file(answered)

    def largest(one: dict[str, Tensor], two: Callable[[str], Tensor]) -> float:
        # max() of a tensor keeps NaN, so a broken logit cannot pass.
        return float(torch.stack([(one[name] - two(name)).abs().max() for name in one]).max())

    max_logit = largest(live, lambda name: torch.zeros_like(live[name]))
    proof = ReloadProof(
        max_logit_difference=largest(live, lambda name: found[name]),
        max_logit=max_logit,
        adapter_effect=largest(live, lambda name: found[f"base.{name}"]),
        tolerance=RELOAD_TOLERANCE[dtype] * max_logit,
        inputs=len(inputs),
    )
    if not proof.passed:
        raise ProofError(
            f"The proof failed: stock PEFT's logits differ by {proof.max_logit_difference:.2e}, more than "
            f"the {proof.tolerance:.1e} that rounding explains (largest logit {proof.max_logit:.1f})."
        )
    if proof.adapter_effect <= proof.tolerance:
        say("The adapter changes the base's logits by no more than rounding: it has learned next to nothing.")
    return proof


def dtype_name(model: Any) -> str:
    """Return the dtype of a model's weights, as ``float32``."""
    return str(model.dtype).removeprefix("torch.")
