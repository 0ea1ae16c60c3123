"""Ask SGLang's own reader of adapters, on a CPU, what it makes of adapters. Run by an interpreter that has SGLang.

    python ask_sglang.py QUESTIONS ANSWERS

QUESTIONS is a JSON list of ``{"base": folder, "adapter": folder}``. Its configuration reader, its reader of weights
with all that it renames and stacks, and its choice of a buffer by name are SGLang's; the rows of each buffer are taken
apart here as its memory pool lays them out, at the rank of the configuration. ANSWERS gets for each ``{"error": …}`` or
the file of safetensors ``ANSWERS.N.safetensors`` with ΔW, ``NAME.SLICE``.

Modules that are not installed and play no part (kernels, servers) are replaced by empty ones.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import torch
import transformers

ABSENT: set[str] = set()


class Nothing:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> Any:
        return _[0] if len(_) == 1 and callable(_[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()


class Empty(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012
    __version__ = "99.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (Nothing,), {})
        setattr(self, name, value)
        return value


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        known = name.split(".")[0] in ABSENT
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: Any) -> Empty:
        return Empty(spec.name)

    def exec_module(self, module: Any) -> None: ...


def import_reader() -> None:
    """Import SGLang's reader; what is not installed is replaced, one after the other."""
    sys.meta_path.append(Absent())
    while True:
        try:
            import sglang.srt.lora.lora  # noqa: F401

            return
        except ModuleNotFoundError as error:
            name = str(error.name).split(".")[0]
            if name in ABSENT or name == "sglang":
                raise
            ABSENT.add(name)
            for module in [module for module in sys.modules if module.startswith("sglang")]:
                del sys.modules[module]


def main() -> None:
    import_reader()
    from safetensors.torch import load_file, save_file
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_config import LoRAConfig
    from sglang.srt.lora.utils import (
        get_normalized_target_modules,
        get_stacked_multiply,
        get_target_module_name,
    )
    from sglang.version import __version__

    class Reader(LoRAAdapter):
        def initialize_weights(
            self,
        ) -> None:  # the file is read here, for its loader of weights wants a server
            self.initialize_weights_from_tensors(
                load_file(Path(self.config.path) / "adapter_model.safetensors")
            )

    questions, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]).resolve()
    answers: list[dict[str, Any]] = []
    for number, question in enumerate(questions):
        try:
            own = transformers.AutoConfig.from_pretrained(question["base"])
            text = own.get_text_config()
            config = LoRAConfig(question["adapter"], base_vocab_size=text.vocab_size)
            if config.use_dora or config.lora_added_tokens_size > 0:  # LoRAManager.validate_new_adapter
                raise ValueError("LoRA serving currently doesn't support DoRA adapters or added tokens")
            targets = get_normalized_target_modules(config.target_modules)
            adapter = Reader("asked", config, text, None, None)
            adapter.initialize_weights()
            weights = {name: t for layer in adapter.layers for name, t in layer.weights.items()}
            weights |= adapter.embedding_layers
            found = buffers(
                weights,
                targets,
                config.r,
                adapter.scaling,
                text,
                get_target_module_name,
                get_stacked_multiply,
            )
            save_file(found or {"none": torch.zeros(1)}, f"{out}.{number}.safetensors")
            answers.append({"modules": sorted(found), "version": __version__})
        except Exception as error:  # whatever it fails with
            answers.append({"error": f"{type(error).__name__}: {error}"[:600]})
    out.write_text(json.dumps(answers, indent=1))


def buffers(
    weights: dict[str, torch.Tensor],
    targets: set[str],
    r: int,
    scale: float,
    text: Any,
    target_of: Any,
    stacked: Any,
) -> dict[str, torch.Tensor]:
    """Lay weights into buffers as LoRAMemoryPool.load_lora_weight_to_buffer does, and multiply each slice."""
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.items():
        target_of(name, targets)  # raises where no buffer is for it
        letter = "A" if "lora_A" in name or "lora_embedding_A" in name else "B"
        key = re.sub(r"\.lora_(embedding_)?[AB](\.\w+)?$", "", name)
        pairs.setdefault(key, {})[letter] = tensor  # a bias of B comes where B was
    found = {}
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rows = {"qkv_proj": [text.num_attention_heads * head] + [text.num_key_value_heads * head] * 2}
    for key, pair in pairs.items():
        kind = key.rpartition(".")[2]
        count = stacked(kind)
        A, B = pair["A"], pair["B"]
        if A.shape[0] != count * r or B.shape[-1] != r:
            raise AssertionError(
                f"LoRA buffer shape of {key} does not match {tuple(A.shape)}, {tuple(B.shape)}"
            )
        sizes = rows.get(kind) or [B.shape[0] // count] * count
        for n, (part, own) in enumerate(zip(A.chunk(count), B.split(sizes), strict=True)):
            found[f"{key}.{n}"] = (scale * own.double() @ part.double()).contiguous()
    return found


if __name__ == "__main__":
    main()
