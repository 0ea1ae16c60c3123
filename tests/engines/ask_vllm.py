"""Ask vLLM's own manager of adapters, on a CPU, what it makes of adapters. Run by an interpreter that has vLLM.

    python ask_vllm.py QUESTIONS ANSWERS

QUESTIONS is a JSON list of ``{"base": folder, "adapter": folder, "flags": {…}}``. Bases are built with random weights
by vLLM's own classes; nothing of the model is run. ANSWERS gets, for each, ``{"error": …}`` or the file of safetensors
``ANSWERS.N.safetensors`` with ΔW as it lies in the buffers of each layer: ``NAME.SLICE``, or ``NAME[expert].SLICE``.

The wheel's kernels are not needed: it takes the CPU platform where its version ends in ``+cpu``. What else is missing
and plays no part (torchvision, torchaudio, timm) is replaced by an empty module.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
import traceback
import types
from pathlib import Path
from typing import Any

import torch
import transformers  # noqa: F401  before the empty modules, which it must not take for real ones

ABSENT = ("torchvision", "torchaudio", "timm", "torchcodec")


class Nothing:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> Nothing:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()


class Empty(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (Nothing,), {})
        setattr(self, name, value)
        return value


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True)
            if name.split(".")[0] in ABSENT
            else None
        )

    def create_module(self, spec: Any) -> Empty:
        return Empty(spec.name)

    def exec_module(self, module: Any) -> None: ...


def delta(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return B.double() @ A.double()


def in_buffers(name: str, layer: Any, index: int) -> dict[str, torch.Tensor]:
    """ΔW as a layer's buffers have it for one adapter."""
    found: dict[str, torch.Tensor] = {}
    if hasattr(layer, "w13_lora_a_stacked"):
        slices = [
            (f"w13_{n}", a, b)
            for n, (a, b) in enumerate(zip(layer.w13_lora_a_stacked, layer.w13_lora_b_stacked, strict=True))
        ]
        slices.append(("w2", layer.w2_lora_a_stacked[0], layer.w2_lora_b_stacked[0]))
        for part, A, B in slices:
            for expert in range(A.shape[1]):
                found[f"{name}[{expert}].{part}"] = delta(A[index, expert], B[index, expert])
    elif type(layer).__name__ == "VocabParallelEmbeddingWithLoRA":
        found[f"{name}.0"] = delta(layer.lora_a_stacked[index].T, layer.lora_b_stacked[index, 0])
    else:
        stacks = [s if isinstance(s, tuple) else (s,) for s in (layer.lora_a_stacked, layer.lora_b_stacked)]
        for n, (A, B) in enumerate(zip(*stacks, strict=True)):
            found[f"{name}.{n}"] = delta(A[index, 0], B[index, 0])
    return {key: tensor for key, tensor in found.items() if tensor.abs().max() > 0}


def without_kernels(model: torch.nn.Module) -> None:
    """Let the layers around experts be built where no kernel runs them: their buffers are all that is looked at."""
    import vllm.lora.layers.fused_moe as layers
    from vllm.model_executor.layers.fused_moe import MoERunner

    layers.FusedMoEModularMethod = lambda old, _: old
    experts = type("Kernelless", (layers.LoRAExpertsMixin,), {"__init__": lambda _: None})
    layers.FusedMoEWithLoRA.set_mapping = lambda *_: None
    for runner in (module for module in model.modules() if isinstance(module, MoERunner)):
        routed = runner.routed_experts
        kernel = types.SimpleNamespace(
            impl=layers.FusedMoEKernelModularImpl.__new__(layers.FusedMoEKernelModularImpl),
            supports_lora=lambda: True,
            fused_experts=experts.__new__(experts),
        )
        kind = type(routed.quant_method)
        kind.supports_internal_mk, kind.is_monolithic = True, False
        routed.quant_method.moe_kernel = kernel
        routed._ensure_moe_quant_config_init = lambda: None
        runner._replace_quant_method = lambda _: None


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    sys.meta_path.insert(0, Absent())
    import vllm
    from safetensors.torch import save_file
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()  # where the empty modules are not
    questions, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]).resolve()
    answers: list[dict[str, Any]] = []
    started = False
    for number, question in enumerate(questions):
        try:
            config = EngineArgs(
                model=question["base"],
                tokenizer=question["base"],
                skip_tokenizer_init=True,
                enable_lora=True,
                dtype="float32",
                enforce_eager=True,
                load_format="dummy",
                max_model_len=64,
                **question.get("flags", {}),
            ).create_engine_config()
            with set_current_vllm_config(config):
                if not started:
                    rendezvous = (out.parent / "rendezvous").as_uri()
                    init_distributed_environment(1, 0, rendezvous, 0, "gloo")
                    started = True
                ensure_model_parallel_initialized(1, 1)
                model = initialize_model(vllm_config=config, model_config=config.model_config)
                without_kernels(model)
                manager = WorkerLoRAManager(
                    config, torch.device("cpu"), getattr(model, "embedding_modules", {})
                )
                manager.create_lora_manager(model, config)
                extra = {"is_3d_lora_weight": True} if question.get("is_3d") else {}
                manager.add_adapter(LoRARequest("asked", 1, question["adapter"], **extra))
                own = manager._adapter_manager
                found: dict[str, torch.Tensor] = {}
                for name, layer in own.modules.items():
                    found |= in_buffers(name, layer, own.lora_index_to_id.index(1))
                save_file(
                    {key: tensor.contiguous() for key, tensor in found.items()} or {"none": torch.zeros(1)},
                    f"{out}.{number}.safetensors",
                )
            about = {"modules": sorted(found), "layers": sorted(own.modules)}
            answers.append({**about, "version": vllm.__version__.partition("+")[0]})
        except Exception as error:  # whatever it refuses an adapter with
            answers.append({"error": f"{type(error).__name__}: {error}"[:600]})
            if question.get("debug"):
                traceback.print_exc()
        destroy_model_parallel()
    out.write_text(json.dumps(answers, indent=1))


if __name__ == "__main__":
    main()
