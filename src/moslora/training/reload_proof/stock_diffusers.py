"""Load an exported adapter as anyone would, with diffusers and without this package, and write what its models give.

Run as a program of its own by ``proofs.py``: what it shows must not depend on anything of ours, so it
imports nothing of ours and fails if something else did.

    python -P stock_diffusers.py BASE DTYPE DEVICE ADAPTER INPUTS OUTPUTS CLASS [VARIANT]

It ends with 0 if it wrote them, with 3 if the base ran and with the adapter it did not, and otherwise, as where memory
is short, with something else: then nothing is known about the adapter.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file, save_file

REFUSED = 3


def is_of_machine(error: Exception) -> bool:
    """Tell whether an error says nothing about the adapter: memory, disk, the driver."""
    if isinstance(error, FileNotFoundError):
        return False
    if isinstance(error, MemoryError | OSError | torch.cuda.OutOfMemoryError):
        return True
    return any(word in str(error) for word in ("CUDA", "allocate memory", "out of memory"))


def end_with_asker() -> None:
    """End this process when the one that asked dies: its end of standard input is closed then."""

    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def outputs(pipeline: Any, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Run one model of a pipeline.

    Args:
        pipeline: The pipeline.
        given: The model's arguments, as ``unet.sample``; one inside a dictionary as
            ``unet.added_cond_kwargs.time_ids``, inside a list as ``transformer.x.0``; whole numbers as tensors
            without a dimension.

    Returns:
        Float32 on the CPU: a denoiser's prediction, or all hidden states of a text encoder, stacked.
    """
    arguments: dict[str, Any] = {}
    component = ""
    for name, tensor in given.items():
        component, *keys = name.split(".")
        place = arguments
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = tensor.item() if tensor.ndim == 0 and not tensor.is_floating_point() else tensor
    arguments = as_lists(arguments)
    model = getattr(pipeline, component)
    model.eval()
    with torch.inference_mode():
        if component.startswith("text_encoder"):
            states = model(**arguments, output_hidden_states=True).hidden_states
            return torch.stack(states).float().cpu()
        found = model(**arguments, return_dict=False)[0]
        whole: torch.Tensor = torch.stack(found) if isinstance(found, list | tuple) else found
        return whole.float().cpu()


def as_lists(value: Any) -> Any:
    """Turn dictionaries whose keys are all numbers back into the lists that they were."""
    if not isinstance(value, dict):
        return value
    inner = {key: as_lists(one) for key, one in value.items()}
    if not all(key.isdigit() for key in inner):
        return inner
    return [inner[key] for key in sorted(inner, key=int)]


def main(
    base: str,
    dtype: str,
    device: str,
    adapter: str,
    inputs: str,
    results: str,
    kind: str,
    variant: str | None = None,
) -> None:
    """Write what the adapted models give.

    Args:
        base: Folder or hub id of the pipeline.
        dtype: Of its weights, as ``float32``.
        device: Where to run, as ``cpu``.
        adapter: File of the plain LoRA.
        inputs: Safetensors file of arguments, as ``input0.unet.sample``.
        results: Safetensors file to write: outputs under the same names, and under ``base.NAME`` those of the
            base alone.
        kind: The pipeline's class.
        variant: Which files of the base, as ``fp16``.
    """
    import diffusers
    import peft

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    pipeline = getattr(diffusers, kind).from_pretrained(
        base,
        torch_dtype=getattr(torch, dtype),
        use_safetensors=True,
        **({"variant": variant} if variant else {}),
    )
    pipeline.to(device)
    asked: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(inputs).items():
        asked.setdefault(name.partition(".")[0], {})[name.partition(".")[2]] = tensor.to(device)
    found = {f"base.{name}": outputs(pipeline, given) for name, given in asked.items()}
    folder, file = os.path.split(adapter)
    try:
        pipeline.load_lora_weights(folder, weight_name=file)
        for component in {name.partition(".")[0] for given in asked.values() for name in given}:
            config = getattr(getattr(pipeline, component), "peft_config", {})
            if not config or any(type(one) is not peft.LoraConfig for one in config.values()):
                raise TypeError(f"{component} has no plain LoRA")
        found |= {name: outputs(pipeline, given) for name, given in asked.items()}
    except Exception as error:
        if is_of_machine(error):
            raise
        traceback.print_exc()
        raise SystemExit(REFUSED) from error
    if "moslora" in sys.modules:
        raise SystemExit("moslora was imported; the proof would prove nothing")
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, results)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this decides what Ctrl-C ends
    end_with_asker()
    main(*sys.argv[1:])
