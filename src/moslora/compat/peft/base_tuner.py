"""PEFT's ``BaseTuner`` as version 0.21 has it, for 0.18 to 0.21."""

from __future__ import annotations

import copy
from typing import Any, cast

import peft.tuners.tuners_utils as tuners_utils
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import nn

from moslora import versions
from moslora.compat.peft.state_hooks import HAS_STATE_HOOKS, StateHooks
from moslora.errors import UsageError
from moslora.terminal import warn

__all__ = ["HAS_TIES", "Tuner"]

# Ties of the adapters of an embedding and a head: PEFT 0.18 knows ties of modules that are trained whole alone.
HAS_TIES = hasattr(BaseTuner, "_add_targets_to_tie")


class _Ties:
    """What PEFT 0.18 has of ``ensure_weight_tying``. Lost there: tying the adapters of an embedding and a head."""

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """Refuse what would be left untied with a warning about something else.

        Raises:
            UsageError: If the embedding or what shares its weight is a target.
        """
        tuner: Any = self
        if peft_config.ensure_weight_tying and not HAS_TIES:
            tied = list(tuner._get_module_names_tied_with_embedding())
            embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
            names = [*tied, *(name for name, module in model.named_modules() if module is embedding)]
            targets = [n for n in names if tuner._check_target_module_exists(peft_config, n)] if tied else []
            if targets:
                raise UsageError(
                    versions.need(
                        "peft",
                        "0.19",
                        f"ensure_weight_tying=True with {targets[0]!r} in target_modules",
                        "Or leave it out of target_modules, or set ensure_weight_tying=False.",
                    )
                )
        super()._check_tied_modules(model, peft_config)  # type: ignore[misc]


class _OneOfParameters:
    """Refuses a second adapter with ``target_parameters``, for PEFT 0.18 and 0.19: they nest another layer for it."""

    def _check_new_adapter_config(self, config: Any) -> None:
        """Check an adapter that is added.

        Raises:
            UsageError: If it is the second that targets parameters.
        """
        super()._check_new_adapter_config(config)  # type: ignore[misc]
        configs: dict[str, Any] = cast(Any, self).peft_config
        if sum(bool(getattr(other, "target_parameters", None)) for other in configs.values()) > 1:
            raise UsageError(
                versions.need(
                    "peft",
                    "0.20",
                    "A second adapter with target_parameters",
                    "Or load the adapters one at a time.",
                )
            )


class _Deleting:
    """Refuses to delete an adapter that is merged, as PEFT does since 0.21: what it added would stay for good."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter.

        Args:
            adapter_name: Its name.

        Raises:
            UsageError: If it is merged.
        """
        tuner: Any = self
        layers = [module for module in tuner.model.modules() if isinstance(module, BaseTunerLayer)]
        if any(adapter_name in layer.merged_adapters for layer in layers):
            raise UsageError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first."
            )
        super().delete_adapter(adapter_name)  # type: ignore[misc]


class _Guarded:
    """Has PEFT ask of this adapter what it asks of LoRA before a module is adapted.

    PEFT 0.18 to 0.21 refuses LoRA on modules whose weights the model reads past their forward, by the type's name:
    Mamba's ``out_proj`` and ``conv1d``. An adapter on them does nothing wherever the fast kernels run, and PEFT
    refuses the plain LoRA that it is exported as.
    """

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Check a module that is going to be adapted.

        Raises:
            UsageError: If PEFT refuses LoRA there. Of an adapter that is saved already it is only warned.
        """
        as_lora = copy.copy(peft_config)
        as_lora.peft_type = PeftType.LORA
        try:
            super()._check_target_module_compatiblity(as_lora, model, target_name)  # type: ignore[misc]
        except ValueError as error:
            message = (
                f"{target_name} of this {type(model).__name__} cannot be adapted: the model reads its weight and may "
                f"never call it, so an adapter on it may do nothing, and PEFT refuses a plain LoRA there. Name "
                f"{target_name!r} in exclude_modules, or leave it out of target_modules."
            )
            if not peft_config.is_saved:
                raise UsageError(message) from error
            warn(message, stacklevel=2)


_TUNER_BASES: tuple[type, ...] = (
    _Guarded,
    *(() if HAS_TIES else (_Ties,)),
    *(() if versions.is_at_least("peft", "0.20") else (_OneOfParameters,)),
    *(() if hasattr(tuners_utils, "_check_adapters_not_merged") else (_Deleting,)),
    *(() if HAS_STATE_HOOKS else (StateHooks,)),
    BaseTuner,
)
# As LoRA has them: what is trained whole stays tied, for the factors have no part in it (0.18 calls that by the second
# name); and BaseTuner's _replace_module takes every unloaded module to have a weight, and an 8-bit one's adapter to be
# loaded already.
_OF_LORA = ("_add_modules_to_save_to_tie", "_add_modules_to_tie", "_add_targets_to_tie", "_replace_module")
Tuner: Any = type(
    "Tuner",
    _TUNER_BASES,
    {
        "__doc__": "PEFT's ``BaseTuner``, with what 0.21 has and the installed one lacks.",
        "__module__": __name__,
        **{name: getattr(LoraModel, name) for name in _OF_LORA if hasattr(LoraModel, name)},
    },
)
