"""Proof that the shipped adapter is what was trained: fresh process, another's loader, the same outputs.

Language models are loaded by stock PEFT and compared by their logits, pipelines by diffusers and what their denoiser
and adapted text encoders give.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.distributed import environment_alone
from moslora.errors import ProofError
from moslora.files import lifeline, scratch
from moslora.wording import first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "READERS",
    "RELOAD_TOLERANCE",
    "CouldNotRun",
    "Reader",
    "ReloadProof",
    "live_logits",
    "live_outputs",
    "prove_reload",
    "run_script",
]

# How the fresh process ends where the base ran and the adapter is at fault: see the scripts.
REFUSED = 3
# Seconds between two looks at whether the run was asked to stop.
LOOKS = 0.2

# Largest difference of a logit, relative to the largest logit. Folding reorders the sums of every adapted
# layer, so the rounding of the dtype accumulates over the depth; a dropped adapter costs orders more.
RELOAD_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass(frozen=True)
class Reader:
    """Who loads what was shipped.

    Attributes:
        name: As messages have it.
        script: The program that is run.
        what: What is compared.
    """

    name: str
    script: str
    what: str


READERS = {
    "peft": Reader("stock PEFT", "stock_peft.py", "logit"),
    "diffusers": Reader("diffusers", "stock_diffusers.py", "output"),
}


@dataclass(frozen=True)
class ReloadProof:
    """What a fresh process found. "Logit" stands for the denoiser's output where the base is a pipeline.

    Attributes:
        max_logit_difference: Largest difference between the logits of the live model and of the adapter
            that the reader loaded, on the input where it is largest for the size of the logits.
        max_logit: Largest logit of that input, to judge it by.
        adapter_effect: Largest difference that the adapter makes to the base's logits.
        tolerance: Largest difference allowed: the dtype's share of the largest logit.
        inputs: How many held-out inputs were compared.
        reader: Who loaded it, a key of ``READERS``.
    """

    max_logit_difference: float
    max_logit: float
    adapter_effect: float
    tolerance: float
    inputs: int
    reader: str = "peft"

    @property
    def passed(self) -> bool:
        """Whether the difference is a number within the tolerance."""
        return self.max_logit_difference <= self.tolerance


class CouldNotRun(Exception):  # noqa: N818 - says nothing of the adapter
    """The proof could not be carried out: no memory, no base, no process. It says nothing about the adapter."""


def run_script(
    command: Sequence[str], environment: Mapping[str, str], check: Callable[[], None]
) -> subprocess.CompletedProcess[str]:
    """Run the fresh process to its end, or end it where the run is asked to stop.

    Args:
        command: What to start.
        environment: Its environment.
        check: Called a few times a second; raises where the run was asked to stop.

    Returns:
        How it ended, and what it wrote.

    Raises:
        Stopped: If ``check`` raised it. The process is gone then, as after any other exception.
        OSError: If it could not be started.
    """
    with lifeline() as alive:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            text=True,
            stdin=alive,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            while True:
                check()
                try:
                    out, err = process.communicate(timeout=LOOKS)
                except subprocess.TimeoutExpired:
                    continue
                check()  # Ctrl-C on a terminal reaches both, and says nothing about the adapter
                return subprocess.CompletedProcess(command, process.returncode, out, err)
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()


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


def live_outputs(pipeline: Any, inputs: Sequence[Mapping[str, Tensor]], device: str) -> dict[str, Tensor]:
    """Run models of a pipeline that has been trained.

    Args:
        pipeline: With the native adapters in it.
        inputs: Arguments by name, as ``unet.sample``, each.
        device: Where the pipeline is.

    Returns:
        Float32 outputs on the CPU by name.
    """
    from moslora.training.reload_proof.stock_diffusers import outputs

    return {
        f"input{index}": outputs(pipeline, {name: tensor.to(device) for name, tensor in given.items()})
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
    reader: str = "peft",
    variant: str | None = None,
    check: Callable[[], None] = lambda: None,
) -> ReloadProof:
    """Load ``adapter`` in a fresh process in which nothing of this package is imported, and compare logits.

    Args:
        live: What ``live_logits`` gave, or ``live_outputs``.
        inputs: The same inputs.
        base: Folder or hub id of the base model.
        dtype: Its dtype, as ``float32``.
        device: Where the live model ran.
        adapter: Directory or file of the plain LoRA.
        say: Told when the adapter has no effect.
        auto_class: Class of transformers or diffusers that loads the base.
        quantization: Arguments of ``BitsAndBytesConfig`` for the base, if it is quantized.
        reader: A key of ``READERS``.
        variant: Of the base's files, as ``fp16``; for pipelines.
        check: Called a few times a second; raises where the run was asked to stop.

    Returns:
        What was found.

    Raises:
        ProofError: If the reader refuses the adapter, or the logits differ.
        CouldNotRun: If the base did not run in the fresh process, or that process did not come to its end.
        Stopped: If ``check`` raised it.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    try:
        with scratch("moslora-proof") as folder:
            asked, answered = folder / "inputs.safetensors", folder / "logits.safetensors"
            save_file(
                {
                    f"input{index}.{name}": tensor.contiguous()
                    for index, given in enumerate(inputs)
                    for name, tensor in _named(given).items()
                },
                asked,
            )
            script = Path(__file__).with_name(READERS[reader].script)
            arguments = [base, dtype, device, str(adapter), str(asked), str(answered), auto_class]
            if quantization:
                arguments.append(json.dumps(dict(quantization)))
            if variant:
                arguments.append(variant)
            # -P keeps this folder, whose modules share names with the standard library's, off the path.
            command = [sys.executable, "-P", str(script), *arguments]
            environment = {**environment_alone(), "HF_HUB_DISABLE_TELEMETRY": "1"}
            result = run_script(command, environment, check)
            _judge_end(result, READERS[reader].name, adapter)
            found = load_file(answered)
    except (OSError, SafetensorError) as error:  # no process, no memory, no room for what it writes
        raise CouldNotRun(f"{type(error).__name__}: {first_line(error)}") from error

    def largest(two: Callable[[str], Tensor]) -> Tensor:
        # max() of a tensor keeps NaN, so a broken logit cannot pass.
        return torch.stack([(live[name] - two(name)).abs().max() for name in live])

    differences, sizes = largest(lambda name: found[name]), largest(lambda name: torch.zeros_like(live[name]))
    # Inputs may be of models whose outputs are of other sizes; argmax takes NaN for the largest.
    worst = int((differences / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)).argmax())
    proof = ReloadProof(
        max_logit_difference=float(differences[worst]),
        max_logit=float(sizes[worst]),
        adapter_effect=float(largest(lambda name: found[f"base.{name}"]).max()),
        tolerance=RELOAD_TOLERANCE[dtype] * float(sizes[worst]),
        inputs=len(inputs),
        reader=reader,
    )
    if not proof.passed:
        name, what = READERS[reader].name, READERS[reader].what
        raise ProofError(
            f"The proof failed: {name}'s {what}s differ by "
            f"{proof.max_logit_difference:.2e}, more than the {proof.tolerance:.1e} that rounding explains "
            f"(largest {what} {proof.max_logit:.1f})."
        )
    if proof.adapter_effect <= proof.tolerance:
        what = READERS[reader].what
        say(
            f"The adapter changes the base's {what}s by no more than rounding: it has learned next to nothing."
        )
    return proof


def _judge_end(result: subprocess.CompletedProcess[str], name: str, adapter: Path) -> None:
    """Tell a reader that refuses the adapter from one that never came so far.

    Raises:
        ProofError: If the base ran, and with the adapter it did not.
        CouldNotRun: If the process ended for another reason.
    """
    if result.returncode == 0:
        return
    last = "\n  ".join(result.stderr.strip().splitlines()[-4:])
    if result.returncode == REFUSED:
        raise ProofError(
            f"{name[0].upper()}{name[1:]} could not run the exported adapter {adapter}:\n  {last}"
        )
    ended = f"signal {-result.returncode}" if result.returncode < 0 else f"exit code {result.returncode}"
    raise CouldNotRun(f"the fresh process ended with {ended}{':' if last else ''}\n  {last}".rstrip())


def dtype_name(model: Any) -> str:
    """Return the dtype of a model's weights, as ``float32``."""
    return str(model.dtype).removeprefix("torch.")
