"""What diffusers understood of a file of a pipeline: its own loader fills skeletons of the models."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moslora.adapters.factors import Adapter, Factors
from moslora.adapters.formats import skeleton
from moslora.adapters.formats.pipeline import by_component, name_clip
from moslora.compat.diffusers_loading import lora_config_of
from moslora.errors import AdapterError
from moslora.wording import first_line

__all__ = ["is_installed", "understood", "with_paths_of"]


def is_installed() -> bool:
    """Tell whether diffusers is here."""
    return importlib.util.find_spec("diffusers") is not None


def with_paths_of(found: Adapter, like: Adapter) -> Adapter:
    """Give modules the paths that they had before they were written.

    Args:
        found: What was read from a file of a pipeline.
        like: What was written.

    Returns:
        ``found`` with the paths of ``like`` where they mean the same; others as they are.
    """
    was: dict[str, str] = {}
    for component, part in by_component(like).items():
        for module in part.modules:
            whole = module if part is like else f"{component}.{module}"
            was[f"{component}.{name_clip(component, module)}"] = whole
    modules = {}
    for path, factors in found.modules.items():
        component, _, module = path.partition(".")
        modules[was.get(f"{component}.{name_clip(component, module)}", path)] = factors
    return Adapter(modules, like.config, like.extra)


def understood(
    tensors: Mapping[str, Tensor],
    alphas: Mapping[str, float] | None,
    metadata: dict[str, Any] | None,
    like: Adapter,
) -> tuple[Adapter, str]:
    """Load a state dict through diffusers' own code into skeletons of the models.

    Args:
        tensors, alphas, metadata: What a pipeline's ``lora_state_dict`` returned.
        like: What was written.

    Returns:
        What diffusers would run, with the paths of ``like``; and the reader's name.

    Raises:
        AdapterError: If diffusers passed over a tensor.
    """
    from diffusers.loaders.peft import PeftAdapterMixin
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft

    class Model(nn.Module, PeftAdapterMixin):  # type: ignore[misc]
        """What diffusers' loader is a method of."""

        device, dtype = torch.device("cpu"), torch.float32

    modules: dict[str, Factors] = {}
    for component, part in by_component(like).items():
        if component in ("unet", "transformer"):
            model: Any = skeleton.build(part.modules, Model)
            options = {"network_alphas": alphas} if alphas else {"metadata": metadata}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what merging into a skeleton would need
                model.load_lora_adapter(dict(tensors), prefix=component, low_cpu_mem_usage=True, **options)
            found = skeleton.filled_factors(model)
        else:
            prefix = f"{component}."
            own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            try:
                own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
            except ValueError as error:  # of a text encoder without an adapted attention, which it looks for
                raise AdapterError(
                    f"diffusers cannot load what was written of the {component}: {first_line(error)}. It looks for an "
                    "adapted attention there, q_proj for one. Write --to lora, which PEFT loads onto each model."
                ) from error
            flat = not any(path.startswith("text_model.") for path in part.modules)
            if flat:
                own = {key.removeprefix("text_model."): t for key, t in own.items()}
            own_alphas = {
                k.removeprefix(prefix): v for k, v in (alphas or {}).items() if k.startswith(prefix)
            }
            own_metadata = {
                k.removeprefix(prefix): v for k, v in (metadata or {}).items() if k.startswith(prefix)
            }
            ranks = {key: t.shape[1] for key, t in own.items() if key.endswith(".lora_B.weight")}
            config = lora_config_of(own, own_alphas or None, own_metadata or None, ranks)
            found = dict(skeleton.load_with_peft(config, own, part).modules)
        modules.update({f"{component}.{path}": factors for path, factors in found.items()})
    reader = f"diffusers {importlib.metadata.version('diffusers')}"
    return with_paths_of(Adapter(modules, {"components": {}}), like), reader
