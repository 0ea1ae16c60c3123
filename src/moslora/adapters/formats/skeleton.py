"""What another project understood of a file: its own loader fills a model of the adapter's modules alone.

Its base weights are one zero, seen as a whole matrix, so it needs no memory whatever the model's size; only the factors
are real. What the loader put into its layers, names, ranks and scales, is what it would run.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from moslora.adapters.convolutions import CONVOLUTIONS, join_groups
from moslora.adapters.factors import LINEAR, Adapter, Factors, Form
from moslora.adapters.formats.experts import EXPERT, owner, separate
from moslora.errors import AdapterError
from moslora.wording import one_line

__all__ = ["build", "filled_factors", "load_with_peft", "misfits_by_peft"]


def _module(factors: Factors) -> nn.Module:
    n_in, n_out, form = factors.A.shape[1], factors.B.shape[0], factors.form
    module: Any
    if form.kind == "embedding":
        module = nn.Embedding(n_in, n_out, device="meta")
    elif form.kind == "conv":
        channels = n_in // torch.Size(form.kernel).numel()
        kind = CONVOLUTIONS[len(form.kernel)]
        module = kind(channels, n_out, form.kernel, groups=form.groups, bias=False, device="meta")
    else:
        module = nn.Linear(n_in, n_out, bias=False, device="meta")
    # Not on the meta device: loaders move factors to where the weight is.
    module.weight = nn.Parameter(torch.zeros(()).expand(module.weight.shape), requires_grad=False)
    return cast(nn.Module, module)


def build(modules: Mapping[str, Factors], root: type[nn.Module] = nn.Module) -> nn.Module:
    """Build a model of the modules that an adapter has.

    Args:
        modules: Factors by path.
        root: Class of the outermost module, called without arguments.

    Returns:
        The model, without any memory for its weights.
    """
    model = root()
    plain = {path: factors for path, factors in modules.items() if factors.form != EXPERT}
    for path, factors in plain.items():
        *parents, name = path.split(".")
        place = model
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, nn.Module())
            place = cast(nn.Module, place._modules[parent])
        place.add_module(name, _module(factors))
    return model


def add_experts(model: nn.Module, modules: Mapping[str, Factors], parameters: Iterable[str]) -> None:
    """Add the modules whose parameters are experts.

    Args:
        model: From ``build``; changed in place.
        modules: Factors by path.
        parameters: ``target_parameters`` of the configuration.
    """
    numbers = Counter(owner(path) for path, factors in modules.items() if factors.form == EXPERT)
    levels: dict[str, list[str]] = {}
    for path in sorted(
        numbers, key=len, reverse=True
    ):  # the innermost first: one ".base_layer" for each around
        levels.setdefault(path.replace(".base_layer", ""), []).append(path)
    for inner, paths in levels.items():
        names = [name for name in parameters if f".{inner}".endswith(f".{name}".rpartition(".")[0])]
        if len(names) != len(paths):
            raise AdapterError(
                f"{inner} has {len(paths)} adapted parameters, and target_parameters {list(parameters)} name "
                f"{len(names)}."
            )
        place = model
        for part in inner.split("."):
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = cast(nn.Module, place._modules[part])
        # PEFT nests them in the order in which a module has them. Which name is whose the base alone knows, and
        # neither what is loaded nor its scale depends on it, for all have one rank and alpha.
        for path, name in zip(paths, names, strict=True):
            factors = modules[f"{path}[0]"]
            shape = (numbers[path], factors.B.shape[0], factors.A.shape[1])
            zero = nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)
            place.register_parameter(name.rpartition(".")[2], zero)


def filled_factors(model: nn.Module) -> dict[str, Factors]:
    """Take from PEFT's layers what was loaded into them.

    Args:
        model: A skeleton with one LoRA adapter.

    Returns:
        Factors by path, with the scales that PEFT would use.

    Raises:
        AdapterError: If a layer got no values.
    """
    from peft.tuners.lora import LoraLayer

    found: dict[str, Factors] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        (name,) = layer.scaling
        embedding = name in layer.lora_embedding_A
        A: Tensor = layer.lora_embedding_A[name] if embedding else layer.lora_A[name].weight
        B: Tensor = layer.lora_embedding_B[name] if embedding else layer.lora_B[name].weight
        if A.is_meta or B.is_meta:
            raise AdapterError(f"{path}: the other project's loader left its factors empty.")
        A, B, form = A.detach(), B.detach(), LINEAR
        if layer.r[name] * getattr(layer, "num_experts", 1) != layer.r[name]:
            for expert, own in separate(path, {"A": A, "B": B}, layer.num_experts).items():
                eye = torch.eye(layer.r[name], dtype=A.dtype)
                found[expert] = Factors(own["A"], eye, own["B"], float(layer.scaling[name]), EXPERT)
            continue
        if embedding:
            form = Form("embedding")
        elif A.ndim > 2:
            form = Form("conv", tuple(A.shape[2:]), A.shape[0] // B.shape[1])
        magnitude: Tensor | None = None
        if name in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[name].weight.detach().flatten()
            if magnitude.is_meta:
                raise AdapterError(f"{path}: the other project's loader left its magnitude empty.")
        bias: Tensor | None = None if embedding else layer.lora_B[name].bias
        if bias is not None and bias.is_meta:
            raise AdapterError(f"{path}: the other project's loader left its bias on B empty.")
        A, B = A.flatten(1), B.flatten(1)
        B = join_groups(B, form.groups)
        M, scale = torch.eye(A.shape[0], dtype=A.dtype), float(layer.scaling[name])
        bias = bias if bias is None else bias.detach()
        found[path] = Factors(A, M, B, scale, form, magnitude, bias)
    return found


def load_with_peft(config: Any, tensors: Mapping[str, Tensor], like: Adapter) -> Adapter:
    """Let stock PEFT choose its modules, ranks and scales by a configuration, and load tensors into them.

    Args:
        config: PEFT's ``LoraConfig``, as read from a file.
        tensors: By path and part, as ``layers.0.q_proj.lora_A.weight``.
        like: Whose modules the base has.

    Returns:
        What PEFT would run.

    Raises:
        AdapterError: If PEFT passed over a tensor.
    """
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    config = copy.deepcopy(config)
    # Modules trained in full have no factors and are not in the skeleton; PEFT loads them from the file as they are.
    config.modules_to_save = config.trainable_token_indices = None
    config.bias, config.ensure_weight_tying = "none", False
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of what merging would need, and of flags for layers that are elsewhere
        model = build(like.modules)
        add_experts(model, like.modules, config.target_parameters or ())
        model = inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
        result = set_peft_model_state_dict(model, dict(tensors), low_cpu_mem_usage=True)
    passed_over = [key for key in result.unexpected_keys if "lora_" in key]
    if passed_over:
        raise AdapterError(f"PEFT would pass over {passed_over[:3]}.")
    return Adapter(filled_factors(model), like.config, like.extra)


def misfits_by_peft(model: nn.Module, folder: Path, beside: Iterable[str] = ()) -> list[str] | None:
    """Let stock PEFT load a plain LoRA into its base without values, and say what it passes over.

    Args:
        model: The base on the meta device; changed in place.
        folder: The adapter's directory.
        beside: Tensors of the file to leave out: heads of a task, whose sizes the base does not say.

    Returns:
        Names that PEFT has no place for, or no tensor; empty where it loads the adapter whole, None where it cannot be
        asked.
    """
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    config = LoraConfig.from_pretrained(folder)
    config.init_lora_weights = False  # a start from the base's weights needs values
    left_out = set(beside)
    in_full = [n for n in config.modules_to_save or () if not any(f".{n}." in f".{key}" for key in left_out)]
    config.modules_to_save = in_full or None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = PeftModel(model, config, low_cpu_mem_usage=True)
            read = load_peft_weights(folder, device="cpu")
            tensors = {key: tensor for key, tensor in read.items() if key not in left_out}
            result = set_peft_model_state_dict(adapted, tensors, low_cpu_mem_usage=True)
    except (RuntimeError, ValueError, KeyError) as error:
        is_misfit = isinstance(error, KeyError) or re.search(
            "size mismatch|not found in the base", str(error)
        )
        return [one_line(error)] if is_misfit else None
    # A module that is trained in full and left out here is adapted in its place, which it would not be.
    left = [
        name for name in (LoraConfig.from_pretrained(folder).modules_to_save or ()) if name not in in_full
    ]
    missing = [
        key
        for key in result.missing_keys
        if "lora_" in key and ".default" in key and not any(f".{name}." in key for name in left)
    ]
    return [*result.unexpected_keys, *missing]
