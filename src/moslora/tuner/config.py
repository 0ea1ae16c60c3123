"""MoSLoRAConfig: LoRA's arguments with LoRA's meaning, and three of its own."""

from __future__ import annotations

import copy
import enum
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional, Union

from peft import EvaConfig, LoftQConfig
from peft.config import PeftConfig
from peft.tuners.lora.config import LoraRuntimeConfig
from peft.utils.other import get_pattern_key
from torch import Generator, Tensor

from moslora.adapters.formats.configuration import NO_MIXER, subtracts_start
from moslora.core.mixers import CUSTOM, DEFAULTS, SINGULAR_VALUES, draw_mixer, find_mixer, initial_mixer
from moslora.errors import UsageError
from moslora.terminal import warn
from moslora.tuner.refused import REFUSED_ARGUMENTS, REFUSED_STARTS, check_arguments

__all__ = ["MoSLoRAConfig", "MoSLoRAType"]


class MoSLoRAType(str, enum.Enum):  # noqa: UP042  PEFT's get_model_status takes the name off "Type.NAME"
    """The PEFT type. An enum of its own, because PEFT's is closed and transformers asks for ``.value``."""

    MOSLORA = "MOSLORA"


# Values of init_lora_weights, beside True, False and "pissa_niter_N".
STARTS = ("gaussian", "orthogonal", "pissa", "olora", "eva", "loftq")


def _was_read_from_json(config: PeftConfig) -> bool:
    """Tell whether a configuration was made from a file: JSON has the type's name, a script the enum's member."""
    return type(config.peft_type) is str


@dataclass
class MoSLoRAConfig(PeftConfig):  # type: ignore[misc]
    """Configuration of a MoSLoRA adapter (arXiv:2406.11909).

    Change ``LoraConfig`` to ``MoSLoRAConfig`` in a working PEFT script and nothing else: the arguments that
    both have mean the same.

    Args:
        r: Rank, at least 1.
        lora_alpha: Numerator of the scaling ``lora_alpha / r``.
        lora_dropout: Probability with which inputs of the update are dropped in training, in ``[0, 1)``.
        target_modules: Names or suffixes of the modules to adapt, a regular expression, or ``"all-linear"``.
            None takes PEFT's list for the architecture.
        exclude_modules: Names, suffixes or a regular expression of modules to leave alone.
        mixer: How M starts: ``"orthogonal"`` (the paper's SDXL runs; LoRA's learning rates fit it as they are),
            ``"kaiming"`` (its language runs; starts at 0.58 of LoRA's scale, see match_scale), ``"gaussian"``,
            ``"identity"`` (starts as LoRA) or ``"two-subspace"`` (fixed, r even). Or M itself, a tensor ``(r, r)``,
            copied; or a callable that makes it of the rank, ``r -> tensor`` or ``(r, generator) -> tensor``. Such a
            configuration, and what is saved of it, says ``"custom"``: the values are in the adapter's file once it is
            trained, and what they started from is not kept.
        train_mixer: Whether M is learned. None means yes, except for ``"two-subspace"``.
        mixer_pattern: Mixers of modules that differ, by name or regular expression: a name as for ``mixer``, or
            ``"none"`` for a module without a mixer, which trains as LoRA's does.
        match_scale: Rescale the initial M so that ‖M·A‖ equals ‖A‖, as LoRA's would be. A kaiming mixer
            otherwise starts at about 0.58 of it.
        init_lora_weights: True: A kaiming-uniform and B zero. ``"gaussian"``: A normal with standard
            deviation 1/r, B zero. False: B random too, so that the adapter changes the output (for tests). Of linear
            layers also ``"orthogonal"``: A and B random with B·M·A = 0, r even; and ``"pissa"``: the r leading
            singular vectors of the base weight, with M the diagonal of its singular values (arXiv:2404.02948),
            or ``"pissa_niter_4"``, by that many iterations of a randomized decomposition; and ``"olora"``: A and B
            from a QR decomposition of the base weight (arXiv:2406.01775), M as mixer says. The base weight is left
            as it is by both; the start is saved with the adapter and subtracted, so its fold has rank 2r. With
            ``"pissa"`` mixer and match_scale must be left at their defaults, and mixer becomes ``"singular-values"``.
            ``"eva"``: A from what the layers see of your data, B zero (arXiv:2410.07170). Call PEFT's
            ``initialize_lora_eva_weights(model, dataloader)`` after ``get_peft_model``; until then the adapter does not
            run.
            ``"loftq"``, of a quantized base: what quantization took from the weights, with M the diagonal of its
            singular values (arXiv:2310.08659). Call ``moslora.replace_lora_weights_loftq(model, path)`` after
            ``get_peft_model``; until then the adapter does not run. mixer and match_scale as with ``"pissa"``.
        loftq_config: PEFT's ``LoftQConfig``, of one iteration; the bits are the base's own.
        eva_config: How ``"eva"`` computes and shares out its components: PEFT's ``EvaConfig``, with defaults if None.
        bias: ``"none"``, ``"all"`` or ``"moslora_only"``: which biases of the base are trained.
            ``"lora_only"`` is accepted as the same.
        use_rslora: Scale by ``lora_alpha / sqrt(r)`` (arXiv:2312.03732).
        fan_in_fan_out: Kept for LoRA's scripts; which way a weight lies is read from the layer itself.
        rank_pattern, alpha_pattern: Ranks and alphas of modules that differ, by name or regular expression.
        layers_to_transform, layers_pattern: Adapt only these layer indices.
        modules_to_save: Modules trained in full and saved with the adapter.
        ensure_weight_tying: Keep a head that is tied to the embedding so, where either is in modules_to_save,
            trainable_token_indices or target_modules: the head's factors are the embedding's, transposed.
        unlike_lora: Filled in by the model: the modules where stock PEFT's LoRA would compute a different output
            with these weights, with the reason. Such an adapter can be merged, but is not a plain LoRA.
        target_parameters: Names or suffixes of parameters to adapt that are not the weight of a module, as the experts
            of a mixture are: a matrix, or one matrix for each expert (which then has its own mixer).
        trainable_token_indices: Token ids whose embeddings are trained in full, as in LoRA; for layers other
            than the input embedding, by the layer's name.
        use_dora: DoRA's magnitude on top (arXiv:2402.09353), of linear layers, convolutions and embeddings: the update
            turns the rows of the weight, and a vector that is learned says how long they are.
        lora_bias: A trained bias on B, of linear layers and convolutions, which starts at zero. Merging adds it to the
            base's own bias.
        values_in_file: Filled in when the adapter is saved: the values of its factors lie in a file beside the
            configuration, so a start that costs or needs something is left to that file. A configuration that was saved
            alone says false, and starts as a new one does.
        layer_replication, corda_config, lora_ga_config, runtime_config,
            velora_config, alora_invocation_tokens, use_qalora, qalora_group_size, monteclora_config, use_bdlora,
            arrow_config, kasa_config, megatron_config, megatron_core: LoRA's arguments that are accepted where they
            change nothing and else refused, with the reason and the way out.

    Raises:
        ValueError: If a value has no meaning; the message names the way out.

    Example:
        >>> MoSLoRAConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]).mixer
        'orthogonal'
    """

    r: int = field(default=8, metadata={"help": "Rank."})
    target_modules: Optional[Union[list[str], set[str], str]] = field(default=None)  # noqa: UP007, UP045
    exclude_modules: Optional[Union[list[str], set[str], str]] = field(default=None)  # noqa: UP007, UP045
    lora_alpha: float = field(default=8, metadata={"help": "Numerator of the scaling, lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the update's input, in [0, 1)."})
    mixer: Union[str, Tensor, Callable[..., Tensor]] = field(  # noqa: UP007
        default=DEFAULTS[0], metadata={"help": "How M starts."}
    )
    train_mixer: Optional[bool] = field(default=None, metadata={"help": "Whether M is learned."})  # noqa: UP045
    match_scale: bool = field(default=False, metadata={"help": "Start with ‖M·A‖ = ‖A‖."})
    init_lora_weights: Union[bool, str] = field(  # noqa: UP007
        default=True, metadata={"help": "How A and B start."}
    )
    bias: str = field(default="none")
    use_rslora: bool = field(default=False)
    fan_in_fan_out: bool = field(default=False)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    mixer_pattern: dict[str, str] = field(default_factory=dict)
    layers_to_transform: Optional[Union[list[int], int]] = field(default=None)  # noqa: UP007, UP045
    layers_pattern: Optional[Union[list[str], str]] = field(default=None)  # noqa: UP007, UP045
    modules_to_save: Optional[list[str]] = field(default=None)  # noqa: UP045
    target_parameters: Optional[list[str]] = field(default=None)  # noqa: UP045
    trainable_token_indices: Optional[Union[list[int], dict[str, list[int]]]] = field(default=None)  # noqa: UP007, UP045
    ensure_weight_tying: bool = field(default=False)
    unlike_lora: dict[str, str] = field(default_factory=dict)
    use_dora: bool = field(default=False, metadata={"help": "DoRA's magnitude on top."})
    loftq_config: Union[LoftQConfig, dict[str, int]] = field(default_factory=dict)  # noqa: UP007
    eva_config: Optional[EvaConfig] = field(default=None)  # noqa: UP045
    lora_bias: bool = field(default=False, metadata={"help": "A trained bias on B."})
    values_in_file: Optional[bool] = field(default=None)  # noqa: UP045
    # Of LoRA alone: see refused.py. They are in no file that is written.
    layer_replication: Any = field(default=None, repr=False)
    corda_config: Any = field(default=None, repr=False)
    lora_ga_config: Any = field(default=None, repr=False)
    runtime_config: Any = field(default_factory=LoraRuntimeConfig, repr=False)
    velora_config: Any = field(default=None, repr=False)
    alora_invocation_tokens: Any = field(default=None, repr=False)
    use_qalora: Any = field(default=False, repr=False)
    qalora_group_size: Any = field(default=16, repr=False)
    monteclora_config: Any = field(default=None, repr=False)
    use_bdlora: Any = field(default=None, repr=False)
    arrow_config: Any = field(default=None, repr=False)
    kasa_config: Any = field(default=None, repr=False)
    megatron_config: Any = field(default=None, repr=False)
    megatron_core: Any = field(default="megatron.core", repr=False)

    def __post_init__(self) -> None:
        """Check every value, and turn lists of names into sets, as PEFT does."""
        super().__post_init__()
        # Decided once, before the type is set below, whatever is done with the configuration later.
        self._is_saved = self._is_of_saved_adapter(is_from_json=_was_read_from_json(self))
        self.values_in_file = self._is_saved
        self._has_been_saved = False
        self.peft_type = MoSLoRAType.MOSLORA
        self.check_arguments()
        if not isinstance(self.runtime_config, LoraRuntimeConfig):
            self.runtime_config = LoraRuntimeConfig()  # PEFT's from_pretrained writes into it
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        self.mixer_pattern = self.mixer_pattern or {}
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self._take_mixer()
        self.bias = "moslora_only" if self.bias == "lora_only" else self.bias
        self._take_eva_config()
        self._take_loftq_config()
        if str(self.init_lora_weights).lower() in ("gaussian", "olora"):  # as PEFT reads them
            self.init_lora_weights = str(self.init_lora_weights).lower()
        if self.ensure_weight_tying:
            # Where PEFT keeps the names that it finds.
            self.modules_to_tie: set[str] | None = None
            self.target_modules_to_tie: set[str] | None = None
        self._check()

    def _is_of_saved_adapter(self, is_from_json: bool) -> bool:
        """Tell whether this is a saved adapter's configuration, and not one that starts an adapter.

        The difference matters for starts that cost or need something (a decomposition, data, a tensor that the user
        gave): a saved adapter's values come from its file instead. The configuration tells in one of three ways. PEFT
        saves ``inference_mode=True``. Since moslora 0.2 every file says ``values_in_file``. Before that transformers
        saved neither, but putting the adapter onto a model wrote the base's name. In doubt it is a new adapter's: that
        costs a decomposition, and the file's values replace the result.
        """
        if self.inference_mode or self.values_in_file:
            return True
        if not is_from_json:
            return False
        was_on_a_model = self.values_in_file is None and self.base_model_name_or_path is not None
        return self.mixer == CUSTOM or (self.mixer == SINGULAR_VALUES and was_on_a_model)

    def check_arguments(self) -> None:
        """Refuse arguments of LoRA's that are set and cannot be used.

        Raises:
            ValueError: With the reason and the way out.
        """
        check_arguments(lambda name: getattr(self, name))

    def note_saving(self) -> None:
        """Note that the factors' values are being saved, so that what is written of this says so from now on."""
        self._has_been_saved = True

    def _take_mixer(self) -> None:
        """Move a mixer that is a tensor or a callable out of the field, into ``_given_mixer``.

        JSON cannot hold it and ``==`` cannot compare it, so the field says ``"custom"`` from here on.
        """
        self._given_mixer: Tensor | Callable[..., Tensor] | None = None
        if not isinstance(self.mixer, str):
            if not isinstance(self.mixer, Tensor) and not callable(self.mixer):
                raise UsageError(
                    f"mixer={self.mixer!r} is a {type(self.mixer).__name__}; it must be a name, a torch.Tensor of "
                    "shape (r, r), or a callable r -> tensor."
                )
            self._given_mixer = self.mixer.detach().clone() if isinstance(self.mixer, Tensor) else self.mixer
            self.mixer = CUSTOM
        if self.starts_from_components:
            is_default = self.mixer in (*DEFAULTS, SINGULAR_VALUES) and not self.match_scale
            if not is_default:
                raise UsageError(
                    f"init_lora_weights={self.init_lora_weights!r} makes M singular values, so "
                    f"mixer={self.mixer!r} with match_scale={self.match_scale} has no meaning with it. Leave both out."
                )
            self.mixer = SINGULAR_VALUES
            self.train_mixer = True if self.train_mixer is None else self.train_mixer
            return
        is_custom = self._given_mixer is not None or (self.mixer == CUSTOM and self._is_saved)
        learned = is_custom or find_mixer(str(self.mixer)).learned
        self.train_mixer = learned if self.train_mixer is None else self.train_mixer

    def _take_eva_config(self) -> None:
        """Make the object of what a file has, or of nothing; a file of LoRA has it at its defaults too."""
        given: Any = self.eva_config
        if given and not isinstance(given, dict | EvaConfig):
            raise UsageError(f"eva_config={given!r} must be a peft.EvaConfig, or a dict of its arguments.")
        config = EvaConfig(**given) if isinstance(given, dict) else given or EvaConfig()
        self.eva_config = config if self.init_lora_weights == "eva" else None
        if self.eva_config is None and config != EvaConfig():
            warn(
                f"eva_config is without effect, for init_lora_weights={self.init_lora_weights!r} is not 'eva'.",
                stacklevel=4,
            )

    def _take_loftq_config(self) -> None:
        """Make the dict that a file has; a file of LoRA may have it at its defaults too."""
        given: Any = self.loftq_config
        values = dict(vars(given)) if isinstance(given, LoftQConfig) else given or {}
        if not isinstance(values, dict):
            raise UsageError(
                f"loftq_config={given!r} must be a peft.LoftQConfig, or a dict of its arguments."
            )
        self.loftq_config = values if self.init_lora_weights == "loftq" else {}
        if values and not self.loftq_config and LoftQConfig(**values) != LoftQConfig():
            warn(
                f"loftq_config is without effect, for init_lora_weights={self.init_lora_weights!r} is not 'loftq'.",
                stacklevel=4,
            )
        if self.loftq_config.get("loftq_iter", 1) != 1:
            raise UsageError(
                f"loftq_iter={self.loftq_config['loftq_iter']!r}: more iterations quantize the base's weights anew, "
                "and MoSLoRA leaves the base as it is. Set loftq_iter=1."
            )

    def _register_custom_module(self, mapping: Any) -> None:
        """Refuse layers of a user's own, which PEFT takes for LoRA.

        Raises:
            ValueError: Always.
        """
        raise UsageError(
            "_register_custom_module cannot be used with MoSLoRA: such a layer is LoRA's, and would have no mixer. "
            "Leave the module out of target_modules, or adapt its weight through target_parameters."
        )

    @property
    def _custom_modules(self) -> None:
        """Refuse to be taken for a LoRA's configuration: PEFT's LoraModel asks for this first.

        Raises:
            ValueError: Always.
        """
        raise UsageError(
            "This is a MoSLoRA adapter, and what it was given to (PEFT's LoraModel, as X-LoRA is one) runs plain LoRA, "
            "without its mixers. Fold it first: moslora export ADAPTER OUT --to lora."
        )

    def of_module(self, module: str) -> MoSLoRAConfig:
        """Return the configuration of one module, whose mixer may be another.

        Args:
            module: Its path in the base model.

        Returns:
            This configuration, or a copy with the module's own mixer.
        """
        key = get_pattern_key(self.mixer_pattern.keys(), module)
        name = self.mixer_pattern.get(key)
        if name is None:
            return self
        own = copy.copy(self)
        own._given_mixer = None
        own.mixer = "identity" if name == NO_MIXER else name
        own.train_mixer = name != NO_MIXER and find_mixer(name).learned and self.train_mixer is not False
        own.match_scale = self.match_scale and name != NO_MIXER
        return own

    @property
    def starts_from_components(self) -> bool:
        """Whether A, M and B start as principal components of the base weight, or of what quantization took from it."""
        init = self.init_lora_weights
        return isinstance(init, str) and init.startswith(("pissa", "loftq"))

    @property
    def subtracts_start(self) -> bool:
        """Whether the factors start from the base weight, and what they start as is subtracted from the update."""
        return subtracts_start(self.init_lora_weights)

    @property
    def is_saved(self) -> bool:
        """Whether it is a saved adapter's, so that a start that costs or needs something is left to its file."""
        return self._is_saved

    @property
    def component_iterations(self) -> int | None:
        """Iterations of a randomized decomposition; None for an exact one."""
        found = re.fullmatch(r"pissa_niter_(\d+)", str(self.init_lora_weights))
        return int(found[1]) if found else None

    def start_mixer(self, r: int, generator: Generator) -> Tensor | None:
        """Make the initial M of a module.

        Args:
            r: Its rank.
            generator: What random starts are drawn from.

        Returns:
            M, shape ``(r, r)``, on the CPU; None if it has to come from a file, as the configuration of a saved
            adapter says of a mixer that was given as a tensor or callable.

        Raises:
            ValueError: If a given mixer has no meaning for this rank.
        """
        if not isinstance(self.mixer, str):
            self._take_mixer()  # the user set the field after the configuration was made
        if self._given_mixer is not None:
            return draw_mixer(self._given_mixer, r, generator)
        if self.starts_from_components:
            return initial_mixer("identity", r)  # until the base weight is decomposed
        return None if self.mixer == CUSTOM else initial_mixer(str(self.mixer), r, generator)

    def _check(self) -> None:
        self._check_mixer_pattern()
        for place, rank in [
            ("r", self.r),
            *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items()),
        ]:
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise UsageError(f"{place}={rank!r} is not a rank; it must be an integer of at least 1.")
            if self.mixer == "two-subspace" and rank % 2:
                raise UsageError(f'{place}={rank} is odd, but mixer="two-subspace" mixes two halves.')
            if isinstance(self._given_mixer, Tensor):
                try:
                    draw_mixer(self._given_mixer, rank)
                except ValueError as error:
                    raise UsageError(f"{place}={rank}: {error}") from error
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"lora_dropout={self.lora_dropout!r} must lie in [0, 1).")
        if self.bias not in ("none", "all", "moslora_only"):
            raise UsageError(f"bias={self.bias!r} is unknown; choose one of 'none', 'all', 'moslora_only'.")
        if self.lora_bias and self.use_dora:
            raise UsageError(
                "lora_bias=True cannot be used with use_dora=True: PEFT's LoRA refuses the two together, so nothing "
                "would read the adapter once it is folded. Leave one of them out."
            )
        init = self.init_lora_weights
        if isinstance(init, str) and init.lower() in REFUSED_STARTS:
            refused = REFUSED_STARTS[init.lower()]
            raise UsageError(
                f"init_lora_weights={init!r} cannot be used with MoSLoRA. {refused.reason} {refused.instead}"
            )
        if init not in (True, False, *STARTS) and self.component_iterations is None:
            raise UsageError(
                f"init_lora_weights={init!r} is not supported with a mixer; choose True, False, "
                f"{', '.join(map(repr, STARTS))} or 'pissa_niter_[number of iterations]'."
            )
        for place, rank in [("r", self.r), *self.rank_pattern.items()] if init == "orthogonal" else ():
            if rank % 2:
                raise UsageError(f"{place}={rank} is odd, but init_lora_weights='orthogonal' halves it.")
        if isinstance(self.target_parameters, str):
            raise UsageError(
                f"target_parameters={self.target_parameters!r} must be a list of names or suffixes; a regular "
                "expression is not read there."
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise UsageError("layers_to_transform cannot be used when target_modules is a string.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise UsageError("layers_pattern cannot be used when target_modules is a string.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise UsageError("layers_pattern needs layers_to_transform: it says where their indices stand.")

    def _check_mixer_pattern(self) -> None:
        for key, name in self.mixer_pattern.items():
            if name != NO_MIXER:
                try:
                    find_mixer(name)
                except (TypeError, ValueError) as error:
                    raise UsageError(f"mixer_pattern[{key!r}]: {error} Or 'none', for no mixer.") from error
        if self.mixer_pattern and self.starts_from_components:
            raise UsageError(
                f"init_lora_weights={self.init_lora_weights!r} makes M singular values, so mixer_pattern has no "
                "meaning with it. Leave it out."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON can hold it: sets sorted, refused arguments left out."""
        values: dict[str, Any] = super().to_dict()
        values["values_in_file"] = self._is_saved or self._has_been_saved
        return {
            name: sorted(value) if isinstance(value, set) else value
            for name, value in values.items()
            if name not in REFUSED_ARGUMENTS
        }
