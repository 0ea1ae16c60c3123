"""The table of methods that ``moslora compare`` trains: one entry each, made from a recipe's ``adapter`` section.

Rank, alpha, dropout and target modules are the recipe's for all of them; only what a method *is* differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from moslora.adapters.formats.configuration import NO_MIXER
from moslora.bounded import read_json, read_text
from moslora.errors import UsageError
from moslora.recipe.yaml_core import load_bounded
from moslora.wording import did_you_mean

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["METHODS", "Method", "default_methods", "find_method"]

# Arguments of MoSLoRAConfig that LoRA has no name for.
MIXER_ARGUMENTS: tuple[str, ...] = (
    "mixer",
    "train_mixer",
    "mixer_pattern",
    "match_scale",
    "unlike_lora",
    "values_in_file",
)
# What a method's file may say beside its configuration: how the mixers are trained.
MIXER_TRAINING = ("mixer_lr_ratio", "mixer_weight_decay")


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: What the command calls it.
        about: What it is, in a line.
        library: Whose code trains it: ``"moslora"``, ``"peft"``, or ``"none"`` for the whole model.
        arguments: From a recipe's adapter section to the arguments of its configuration.
        adjust: Changes the start of a model that the adapter has been put into; None for most.
        changes_base: Whether base weights move, so that the base has to be loaded anew for the next run.
        origin: The file or folder that it was read from; None for the table's.
        mixer_lr_ratio: The mixers' learning rate is this times the others'.
        mixer_weight_decay: The mixers' weight decay; None for the trainer's.
    """

    name: str
    about: str
    library: str
    arguments: Callable[[Mapping[str, Any]], dict[str, Any]]
    adjust: Callable[[Any], None] | None = None
    changes_base: bool = False
    origin: str | None = None
    mixer_lr_ratio: float = 1.0
    mixer_weight_decay: float | None = None

    @property
    def mixer_training(self) -> dict[str, float]:
        """How the mixers are trained, where it is not as everything else is."""
        found = {} if self.mixer_lr_ratio == 1 else {"mixer_lr_ratio": self.mixer_lr_ratio}
        if self.mixer_weight_decay is not None:
            found["mixer_weight_decay"] = self.mixer_weight_decay
        return found

    def prepare(self, trainer: Any) -> None:
        """Change the start of a trainer's model, and how its mixers are trained, before it begins.

        Args:
            trainer: Of transformers, its adapter in the model.
        """
        if self.adjust is not None:
            self.adjust(trainer.model)
        if self.mixer_training:
            from moslora.tuner.param_groups import train_mixers_apart

            optimizer = trainer.create_optimizer()
            train_mixers_apart(optimizer, trainer.model, self.mixer_lr_ratio, self.mixer_weight_decay)

    def configure(self, adapter: Mapping[str, Any]) -> PeftConfig | None:
        """Make the adapter's configuration.

        Args:
            adapter: A checked recipe's ``adapter`` section.

        Returns:
            A fresh one, because PEFT writes into it; None for the whole model.

        Raises:
            ValueError: If the method has no such argument; names it.
        """
        if self.library == "none":
            return None
        arguments = {"task_type": "CAUSAL_LM", **self.arguments(adapter)}
        try:
            return _make(self.library, arguments)
        except (TypeError, ValueError) as error:
            raise UsageError(f"Method {self.name} cannot be made: {error}") from error


def _make(library: str, arguments: dict[str, Any]) -> PeftConfig:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from moslora.tuner.config import MoSLoRAConfig

    if library == "moslora":
        return MoSLoRAConfig(**arguments)
    kind = str(arguments.pop("peft_type", "LORA")).upper()
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = [str(getattr(k, "value", k)) for k in PEFT_TYPE_TO_CONFIG_MAPPING]
        raise UsageError(f"peft_type {kind} is unknown to the installed PEFT.{did_you_mean(kind, known)}")
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind](**arguments)


def _lora(**changes: Any) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    def arguments(adapter: Mapping[str, Any]) -> dict[str, Any]:
        shared = {name: value for name, value in adapter.items() if name not in MIXER_ARGUMENTS}
        if shared.get("bias") == "moslora_only":
            shared["bias"] = "lora_only"
        return shared | changes

    return arguments


def _moslora(**changes: Any) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    def arguments(adapter: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: v for name, v in adapter.items() if name not in MIXER_ARGUMENTS} | changes
        # A part that the recipe leaves without a mixer has none by any method.
        without = {
            key: name for key, name in (adapter.get("mixer_pattern") or {}).items() if name == NO_MIXER
        }
        return kept | ({"mixer_pattern": without} if without else {})

    return arguments


def _match_scale(model: Any) -> None:
    """Make LoRA of a frozen kaiming mixer: M the identity, and A (B, where A starts at zero) at the scale M gave it.

    The mixer is the one that ``moslora`` draws with this seed, so both start at one scale, module by module.
    """
    import torch

    from moslora.core.mixers import mixed_norms
    from moslora.tuner.layer import MoSLoRALayer

    with torch.no_grad():
        for layer in (module for module in model.modules() if isinstance(module, MoSLoRALayer)):
            # (r, in), (r, r), (out, r); experts have one dimension more
            A, M, B, _ = layer.factors("default")
            factor, before, after = mixed_norms(A, M, B)
            factor.mul_(after / before)
            identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
            layer.set_mixer("default", identity.expand_as(M))


def _freeze_all_but_mixers(model: Any) -> None:
    """Leave only M to be trained."""
    from moslora.tuner.names import factor_in

    for name, parameter in model.named_parameters():
        if factor_in(name) in ("A", "B"):
            parameter.requires_grad_(False)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("lora", "PEFT's LoRA", "peft", _lora()),
        Method(
            "lora-matched",
            "LoRA, its A at the scale at which M·A starts with a kaiming mixer (about 0.58 of it)",
            "moslora",
            _moslora(mixer="kaiming", train_mixer=False),
            adjust=_match_scale,
        ),
        Method(
            "frozen-mixer",
            "the kaiming mixer, never trained",
            "moslora",
            _moslora(mixer="kaiming", train_mixer=False),
        ),
        Method(
            "moslora",
            "the kaiming mixer, trained: the paper's language runs",
            "moslora",
            _moslora(mixer="kaiming"),
        ),
        Method(
            "moslora-orthogonal",
            "a mixer that starts orthogonal, trained: the default of MoSLoRAConfig",
            "moslora",
            _moslora(mixer="orthogonal"),
        ),
        Method(
            "moslora-matched",
            "the kaiming mixer, trained, M scaled so that M·A starts at the scale of LoRA's A (match_scale)",
            "moslora",
            _moslora(mixer="kaiming", match_scale=True),
        ),
        Method(
            "moslora-slow-mixer",
            "the kaiming mixer, trained at a tenth of the rate of A and B",
            "moslora",
            _moslora(mixer="kaiming"),
            mixer_lr_ratio=0.1,
        ),
        Method(
            "moslora-fast-mixer",
            "the kaiming mixer, trained at ten times the rate of A and B",
            "moslora",
            _moslora(mixer="kaiming"),
            mixer_lr_ratio=10.0,
        ),
        Method(
            "moslora-mixer-decay",
            "the kaiming mixer, trained with weight decay 0.1 on M",
            "moslora",
            _moslora(mixer="kaiming"),
            mixer_weight_decay=0.1,
        ),
        Method(
            "lora-xs",
            "A and B frozen at W0's principal components, only M trained (LoRA-XS, arXiv:2405.17604)",
            "moslora",
            _moslora(init_lora_weights="pissa"),
            adjust=_freeze_all_but_mixers,
        ),
        Method("two-subspace", "two halves mixed by hand, fixed", "moslora", _moslora(mixer="two-subspace")),
        Method("dora", "PEFT's DoRA (arXiv:2402.09353)", "peft", _lora(use_dora=True)),
        Method("rslora", "LoRA scaled by alpha ÷ √r (arXiv:2312.03732)", "peft", _lora(use_rslora=True)),
        Method(
            "pissa",
            "PEFT's PiSSA: LoRA from W0's principal components (arXiv:2404.02948)",
            "peft",
            _lora(init_lora_weights="pissa_niter_16"),
            changes_base=True,
        ),
        Method("recipe", "the recipe's own adapter section", "moslora", dict),
        Method("full", "every weight of the base", "none", dict, changes_base=True),
    )
}


# LoRA, and the default of MoSLoRAConfig; before 0.2 the default was a kaiming mixer.
DEFAULT_METHODS, FORMER_METHODS = ("lora", "moslora-orthogonal"), ("lora", "moslora")


def default_methods(folder: Path) -> Sequence[str]:
    """Return LoRA and the default mixer; for a comparison that was begun with an earlier default, that one.

    Args:
        folder: The comparison's, which need not be there.
    """
    try:
        begun = list(read_json(folder / "compare.json")["identity"]["methods"])
    except (OSError, ValueError, KeyError, TypeError):
        return DEFAULT_METHODS  # there is none, or it is refused later
    return FORMER_METHODS if begun == list(FORMER_METHODS) else DEFAULT_METHODS


def find_method(name: str) -> Method:
    """Look a method up, or read a user's own configuration of PEFT.

    Args:
        name: A key of ``METHODS``, or the path of an ``adapter_config.json``, of its folder, or of a YAML file of the
            same keys.

    Returns:
        The method. One read from a file is named after it and takes nothing from the recipe.

    Raises:
        ValueError: If there is no such method or file, or the file holds no configuration.
    """
    if name in METHODS:
        return METHODS[name]
    path = Path(name).expanduser()
    file = path / "adapter_config.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(
            f"Method {name!r} is unknown.{did_you_mean(name, METHODS)} Choose from {', '.join(METHODS)}, or name an "
            "adapter_config.json."
        )
    own = (
        path.name if path.is_dir() else path.parent.name if path.name == "adapter_config.json" else path.stem
    )
    if own in METHODS or not own:
        own = f"own-{own}"
    arguments = _read(file)
    library = "moslora" if str(arguments.get("peft_type", "")).upper() == "MOSLORA" else "peft"
    training = {key: arguments.pop(key) for key in MIXER_TRAINING if key in arguments}
    for key, value in training.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise UsageError(f"{file}: {key}={value!r} must be a number of at least 0.")
        if library != "moslora":
            raise UsageError(f"{file}: {key} is for mixers, which only peft_type: MOSLORA has.")
    return Method(
        own,
        f"the configuration in {file.name}",
        library,
        lambda _: dict(arguments),
        changes_base=True,
        origin=str(path.absolute()),
        **{key: float(value) for key, value in training.items()},  # type: ignore[arg-type]
    )


def _read(file: Path) -> dict[str, Any]:
    """Read a configuration as PEFT or a person writes it."""
    try:
        value = read_json(file) if file.suffix == ".json" else load_bounded(read_text(file))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{file} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(value, dict) or not any(key in value for key in ("peft_type", "r", "target_modules")):
        raise UsageError(
            f"{file} holds no configuration of PEFT: it needs peft_type, and what that type takes."
        )
    # What PEFT notes of where an adapter came from, and a flag that would train nothing.
    left_out = (
        *("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"),
        "values_in_file",
    )
    return {key: item for key, item in value.items() if key not in left_out and item is not None}
