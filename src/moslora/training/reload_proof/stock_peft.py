"""Load an exported adapter as anyone would, with stock PEFT and without this package, and write its logits.

Run as a program of its own by ``proofs.py``: what it shows must not depend on anything of ours, so it
imports nothing of ours and fails if something else did.

    python -P stock_peft.py BASE DTYPE DEVICE ADAPTER INPUTS OUTPUTS CLASS [QUANTIZATION]
"""

import json
import sys

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file


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
        device: Where to run, as ``cpu``.
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
    if quantized:
        options["quantization_config"] = transformers.BitsAndBytesConfig(**json.loads(quantized))
        options["device_map"] = {"": device}
    model = getattr(transformers, kind).from_pretrained(base, **options)
    if not quantized:
        model = model.to(device)
    asked: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(inputs).items():
        asked.setdefault(name.partition(".")[0], {})[name.partition(".")[2]] = tensor.to(device)
    logits = {}
    with torch.inference_mode():
        for name, given in asked.items():
            logits[f"base.{name}"] = model.eval()(**given).logits.float().cpu()
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
        found = model.load_adapter(adapter, "default")  # from_pretrained throws away what this one returns
        strange = [*found.missing_keys, *found.unexpected_keys]
        if strange:
            raise SystemExit(f"PEFT found no place, or no tensor, for {len(strange)} names, as {strange[0]}")
        if type(model.peft_config["default"]) is not peft.LoraConfig:
            raise SystemExit("the adapter is not a plain LoRA")
        for name, given in asked.items():
            logits[name] = model(**given).logits.float().cpu()
    if "moslora" in sys.modules:
        raise SystemExit("moslora was imported; the proof would prove nothing")
    save_file({name: tensor.contiguous() for name, tensor in logits.items()}, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
