"""The base model of a text or vision task: found, converted, counted and loaded, as the recipe says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moslora.errors import ModelError, RecipeError
from moslora.models.fingerprint import fingerprint
from moslora.models.gguf import materialize
from moslora.models.loading import build_skeleton, load_config, load_model, quantization_options
from moslora.models.names import ModelSource, processor_source, resolve_model
from moslora.tasks.task import Count

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PretrainedConfig

    from moslora.recipe.schema import ModelSection

__all__ = ["BaseModel", "count_parameters", "refuse_misfits"]


class BaseModel:
    """The base model that a recipe names.

    Args:
        settings: The recipe's ``model`` section.
        auto_class: Class of transformers that loads it.
        unquantized: Patterns of modules that are not quantized; transformers' own by default.

    Attributes:
        source: Where the model is; set by ``find``, and replaced by ``convert``.
        handed_over: The model itself, if a script gave it; it is used instead of loading one.
    """

    source: ModelSource
    handed_over: Any = None

    def __init__(self, settings: ModelSection, auto_class: str, unquantized: Sequence[str] = ()) -> None:
        self.settings, self.auto_class, self.unquantized = settings, auto_class, unquantized

    def find(self, needs_weights: bool) -> None:
        """Find out what the model's name means; nothing is loaded.

        Args:
            needs_weights: Whether a folder without weights is an error.

        Raises:
            ModelError: If there is no such model.
        """
        name = self.settings.name
        try:
            self.source = resolve_model(name, self.settings.revision, needs_weights)
        except ModelError:
            if self.handed_over is None:
                raise
            self.source = ModelSource(name, "folder", name)

    def convert(self, say: Callable[[str], None]) -> None:
        """Make sure that the model is a folder or hub id that every program can load; GGUF files are converted once.

        Args:
            say: Receives progress, a line each.
        """
        if self.handed_over is not None:
            return
        dtype = "float32" if self.settings.dtype == "auto" else self.settings.dtype
        self.source = materialize(self.source, dtype, say=say)

    @property
    def tokenizer_source(self) -> ModelSource:
        """Where the tokenizer or processor is: the model's own, or what the recipe names instead."""
        name = self.settings.tokenizer
        if name is None:
            return self.source
        return processor_source(name)

    @property
    def is_spread(self) -> bool:
        """Whether the model is spread over all GPUs of this process."""
        return getattr(self.settings, "device_map", "none") == "auto"

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the model exactly."""
        return fingerprint(self.source)

    def quantization(self, device: str) -> dict[str, Any] | None:
        """Return the arguments of ``BitsAndBytesConfig``; None if the base is not quantized.

        Args:
            device: Where the model will be.
        """
        settings = self.settings
        return quantization_options(settings.quantization, settings.dtype, device, self.unquantized)

    def load(self, device: str, placement: str = "device") -> nn.Module:
        """Load the model in the recipe's dtype.

        Args:
            device: Where its weights go.
            placement: As of ``load_model``.
        """
        settings = self.settings
        if self.handed_over is not None:
            return self.prepared(device)
        model: nn.Module = load_model(
            self.source,
            settings.dtype,
            settings.trust_remote_code,
            settings.attn_implementation,
            device,
            self.auto_class,
            self.quantization(device),
            "auto" if self.is_spread else placement,
        )
        return model

    def prepared(self, device: str) -> nn.Module:
        """Return the model that was handed over, where and as a loaded one would be; who gave it restores it."""
        model = self.handed_over
        model.name_or_path = model.config._name_or_path = self.source.path  # PEFT writes it with the adapter
        if not getattr(model, "is_quantized", False) and getattr(model, "hf_device_map", None) is None:
            model.to(device)
        return model.eval()  # type: ignore[no-any-return]

    def config(self) -> PretrainedConfig:
        """Read the model's configuration; no weights are loaded."""
        return load_config(self.source, self.settings.trust_remote_code)

    def build_skeleton(self, settings: Mapping[str, Any] | None = None) -> nn.Module:
        """Build the model on the meta device from its configuration alone.

        Args:
            settings: Of the configuration, over those on disk, as the size of a head.
        """
        trust = self.settings.trust_remote_code
        skeleton: nn.Module = build_skeleton(self.source, self.auto_class, trust, settings)
        return skeleton


def refuse_misfits(config: PeftConfig, model: nn.Module, warn: Callable[[str], None]) -> None:
    """Refuse settings of a recipe's adapter that fit nothing in the base, or say two things of one module.

    Args:
        config: The adapter's configuration; it is not changed.
        model: The base, with or without weights; nor is it.
        warn: Told of what works, and is worth knowing.

    Raises:
        RecipeError: Names every such setting, with the nearest name that the base has.
    """
    from moslora.tuner.matching import find_misfits

    found = find_misfits(config, model)
    wrong = [f"adapter.{misfit}" for misfit in found if not misfit.is_harmless]
    if wrong:
        raise RecipeError(wrong)
    for misfit in found:
        warn(f"adapter.{misfit}")


def count_parameters(model: nn.Module, config: PeftConfig, part_of: Callable[[str], str]) -> list[Count]:
    """Count parameters of the base, and those that an adapter trains, by part of the model.

    Args:
        model: On the meta device; the adapter is put into it.
        config: The adapter's configuration; where its factors start is changed, because it changes no count.
        part_of: From the name of a module or parameter to the part that it belongs to.
    """
    from peft import get_peft_model

    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        sizes[part_of(name)] = sizes.get(part_of(name), 0) + parameter.numel()
    settings: Any = config
    settings.init_lora_weights = True  # other starts may need the weights
    adapted = get_peft_model(model, settings, low_cpu_mem_usage=True)
    trained = dict.fromkeys(sizes, 0)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            trained[part_of(name)] += parameter.numel()
    return [Count(part, size, trained[part]) for part, size in sizes.items()]
