"""Load an exported adapter as anyone would, with stock PEFT and without this package, and write its logits.

Run as a program of its own by ``proofs.py``: what it shows must not depend on anything of ours, so it
imports nothing of ours and fails if something else did.

    python -P stock_peft.py BASE DTYPE DEVICE ADAPTER INPUTS OUTPUTS CLASS [QUANTIZATION]

It ends with 0 if it wrote them, with 3 if the base ran and with the adapter it did not, and otherwise, as where memory
is short, with something else: then nothing is known about the adapter.
"""

import json
import os
import pathlib
import signal
import sys
import threading
import traceback

import peft
import torch
import transformers
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


def main(
    base: str,
    dtype: str,
    device: str,
    adapter: str,
    inputs: str,
    outputs: str,
    kind: str,
    quantized: str = "",
) -> None:
    """Write the logits of the adapted model.

    Args:
        base: Folder or hub id of the base model.
        dtype: Its dtype, as ``float32``.
        device: Where to run, as ``cpu``; ``auto`` spreads the base over all GPUs.
        adapter: Directory of the plain LoRA.
        inputs: Safetensors file of arguments, as ``input0.input_ids``.
        outputs: Safetensors file to write: float32 logits under the same names, and under ``base.NAME``
            those of the base alone.
        kind: Class of transformers that loads the base.
        quantized: Arguments of ``BitsAndBytesConfig`` as JSON; empty for a base that is not quantized.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = {"dtype": getattr(torch, dtype), "use_safetensors": True}
    if pathlib.Path(adapter, "config.json").is_file():
        # Of a model with a head: its size and names, as whoever loads the adapter will read them.
        options["config"] = transformers.AutoConfig.from_pretrained(adapter)
        options["ignore_mismatched_sizes"] = True
        torch.manual_seed(0)  # a base without this head gets one by chance, which the adapter's replaces
    if quantized:
        options["quantization_config"] = transformers.BitsAndBytesConfig(**json.loads(quantized))
    if quantized or device == "auto":
        options["device_map"] = "auto" if device == "auto" else {"": device}
    model = getattr(transformers, kind).from_pretrained(base, **options)
    if "device_map" not in options:
        model = model.to(device)
    device = str(model.device)  # of the first layer, where there are several
    asked: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(inputs).items():
        asked.setdefault(name.partition(".")[0], {})[name.partition(".")[2]] = tensor.to(device)
    logits = {}
    with torch.inference_mode():
        for name, given in asked.items():
            logits[f"base.{name}"] = model.eval()(**given).logits.float().cpu()
        try:
            model = peft.PeftModel.from_pretrained(model, adapter).eval()
            found = model.load_adapter(
                adapter, "default"
            )  # from_pretrained throws away what this one returns
            strange = [*found.missing_keys, *found.unexpected_keys]
            if strange:
                raise ValueError(
                    f"PEFT found no place, or no tensor, for {len(strange)} names, as {strange[0]}"
                )
            if type(model.peft_config["default"]) is not peft.LoraConfig:
                raise TypeError("the adapter is not a plain LoRA")
            for name, given in asked.items():
                logits[name] = model(**given).logits.float().cpu()
        except Exception as error:
            if is_of_machine(error):
                raise
            traceback.print_exc()
            raise SystemExit(REFUSED) from error
    if "moslora" in sys.modules:
        raise SystemExit("moslora was imported; the proof would prove nothing")
    save_file({name: tensor.contiguous() for name, tensor in logits.items()}, outputs)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this decides what Ctrl-C ends
    end_with_asker()
    main(*sys.argv[1:])
