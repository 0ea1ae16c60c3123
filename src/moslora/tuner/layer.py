"""Adapted layers: a frozen base layer, and per adapter the factors A, M and B.

``MoSLoRALayer`` is what all kinds share; ``MoSLoRALinear`` serves ``nn.Linear``, transformers' ``Conv1D`` and
every quantised linear layer that PEFT knows a backend for. The other kinds have a file each, and the table
that chooses between them is ``kinds.py``.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moslora.compat import peft as compat
from moslora.core import functional, ops
from moslora.core.mixers import forked_generator
from moslora.tuner import bias, dora, starts
from moslora.tuner.config import MoSLoRAConfig
from moslora.tuner.held_mixer import MixerStarts, is_narrow, matrix, split, take_state
from moslora.tuner.reading import check_present, is_called, is_present, loaded, read_matrix
from moslora.tuner.sharding import check_mergeable

__all__ = ["MoSLoRALayer", "MoSLoRALinear"]

logger = logging.getLogger(__name__)
_told: set[str] = set()


def _tell_once(reason: str) -> None:
    """Say why the fused path is not taken; once per reason, for there are hundreds of layers."""
    if not torch.compiler.is_compiling() and reason not in _told:
        _told.add(reason)
        logger.info("MoSLoRA runs base product and update apart: %s.", reason)


class MoSLoRALayer(compat.TunerLayer, nn.Module):  # type: ignore[misc]
    """What every adapted layer has: factors by adapter name, scales, and merging.

    A kind of layer adds how its factors are held (``_make_factors``), how ΔW lies in its base's weight
    (``_lay``), and its ``forward``.

    The factors are modules as LoRA's are, so that what finds ``lora_A.NAME.weight`` by its form (hot-swapping,
    sharding policies) finds ``moslora_A.NAME.weight`` too; B has a bias where that is asked for.

    Args:
        base_layer: The frozen layer.
        adapter_name: The first adapter's name.
        config: Its configuration.
        r: Its rank in this layer.
        lora_alpha: Its alpha in this layer.
        **kwargs: What PEFT says about quantisation.

    Raises:
        ValueError: If the layer's settings leave ΔW without a meaning; the message names the way out.
    """

    # A, M and B come first; a kind that holds them under other names says so here.
    adapter_layer_names: tuple[str, ...] = ("moslora_A", "moslora_M", "moslora_B")
    other_param_names = ("r", "lora_alpha", "scaling", "moslora_dropout")
    container: type[nn.ModuleDict] | type[nn.ParameterDict] = nn.ModuleDict
    # PEFT's word for the kind of layer whose weight a quantisation backend can write.
    quantized_kind = ""
    # How many dimensions the base weight has, where a layer may have a magnitude.
    weight_dims = 2
    # Whether the input is numbers, of which dropout can drop some.
    has_droppable_input = True
    # Whether factors may start from the base weight, or orthogonal.
    takes_starts = False
    # Whether an update is made row by row of the input, so that each row may have an adapter of its own.
    is_rowwise = True

    # What PEFT's mixin brings, told to the type checker.
    get_base_layer: Callable[[], Any]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[..., None]
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]
    _get_embed_scale: Callable[[], Tensor | None]
    quantization_backend: Any
    moslora_A: nn.ModuleDict  # noqa: N815
    moslora_B: nn.ModuleDict  # noqa: N815
    moslora_dropout: nn.ModuleDict
    active_adapters: list[str]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: MoSLoRAConfig,
        r: int,
        lora_alpha: float,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self._init_adapters(base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def _init_adapters(self, base_layer: nn.Module, **kwargs: Any) -> None:
        """Hold no adapter yet.

        Args:
            base_layer: The layer to adapt, or another MoSLoRA layer's base.
            **kwargs: ``get_apply_tensor_subclass`` for torchao bases, as PEFT hands it over.

        Raises:
            TypeError: If the sizes of the layer cannot be told.
        """
        self.base_layer = base_layer
        self.quantization_backend = compat.resolve_quantization_backend(
            self.get_base_layer(),
            get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass", _unknown_quantization),
        )
        self.mixer_start = MixerStarts()
        for name in self.adapter_layer_names:
            setattr(self, name, self.container())
        self.moslora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self._unscaled: dict[str, float] = {}
        self.merged_gains: dict[str, Tensor] = {}  # of adapters with a magnitude, while they are merged
        self._unfilled: dict[str, str] = {}  # adapters whose M is NaN yet, with what has to be done
        # Adapters whose factors are another layer's, as the weights of the two base layers are. In tuples, which hide
        # that layer from torch: its parameters are counted, moved and saved where they are.
        self.tied: dict[str, tuple[MoSLoRALayer]] = {}
        # A class attribute in PEFT; an own dict keeps one layer's frozen mixer from freezing another's.
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self.in_features, self.out_features = self._sizes()

    def _sizes(self) -> tuple[int, int]:
        """Return the inputs and outputs that A and B have."""
        return cast(tuple[int, int], _get_in_out_features(self.get_base_layer()))

    def _make_factors(self, adapter_name: str, r: int, has_bias: bool) -> None:
        """Put A, M and B in their places, B with a bias or without. A and B draw what LoRA's draw; M draws nothing."""
        raise NotImplementedError

    def _lay(self, delta: Tensor) -> Tensor:
        """Lay ΔW, made of what ``factors`` returns, as the base weight lies."""
        raise NotImplementedError

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: MoSLoRAConfig,
        *,
        components: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Add an adapter, or start it anew.

        Args:
            adapter_name: Its name.
            r: Rank in this layer.
            lora_alpha: Alpha in this layer.
            config: Everything that does not differ between layers.
            components: Where A starts, shape ``(r, in)``, if that is not drawn; B is zero then.
            **kwargs: Ignored; PEFT hands over more than is needed.
        """
        dora.check(self, config)
        starts.check(self, config)
        bias.check(self, config)
        self._check_adapter(r, config)
        starts.forget(self, adapter_name)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = functional.scaling(lora_alpha, r, config.use_rslora)
        self._unscaled[adapter_name] = self.scaling[adapter_name]
        self.moslora_dropout[adapter_name] = (
            nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        )
        self._make_factors(adapter_name, r, config.lora_bias)
        self._start_factors(adapter_name, config, components)
        if config.train_mixer:
            self.frozen_peft_weight_names.pop(adapter_name, None)
        else:
            self.frozen_peft_weight_names[adapter_name] = (self.adapter_layer_names[1],)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        starts.begin(self, adapter_name, config)
        dora.begin(self, adapter_name, config)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def why_unlike_lora(self) -> str | None:
        """Tell why PEFT's LoRA of this layer computes another output from the same factors; None if it does not."""
        return None

    def why_no_magnitude(self) -> str | None:
        """Tell why this layer cannot have DoRA's magnitude; None if it can."""
        return "DoRA's magnitude is there for linear layers, convolutions and embeddings"

    def why_no_bias(self) -> str | None:
        """Tell why B cannot have a bias in this layer; None if it can."""
        return "a bias on B is there for linear layers and convolutions"

    def low_rank(self, x: Tensor, name: str) -> Tensor:
        """Return ``s·B·M·A·x``, dropping nothing; of layers that may have a magnitude."""
        raise NotImplementedError

    def base_product(self, x: Tensor) -> Tensor:
        """Return the base layer's output without its bias; of layers that may have a magnitude."""
        raise NotImplementedError

    def _check_adapter(self, r: int, config: MoSLoRAConfig) -> None:
        """Refuse an adapter that has no meaning in this layer.

        Raises:
            ValueError: With the reason and the way out.
        """

    def _hold(self, adapter_name: str, *factors: nn.Module | nn.Parameter) -> None:
        """Keep A, M and B under an adapter's name."""
        for name, factor in zip(self.adapter_layer_names, factors, strict=False):
            getattr(self, name)[adapter_name] = factor
        self.mixer_start.pop(adapter_name)
        self.tied.pop(adapter_name, None)
        if len(self.mixer_start._modules):  # TRL copies one adapter into another, parameter by parameter
            self.mixer_start.begin(adapter_name, self._weight_of_mixer(adapter_name), self._weight_beside())

    @torch.no_grad()
    def tie(self, adapter_name: str, source: MoSLoRALayer, config: MoSLoRAConfig) -> None:
        """Take another layer's factors for an adapter's, for good: ``ΔW`` is the other's, as the weight is.

        In PEFT's LoRA tied factors start as the later layer's do, a head's: small, as A is elsewhere, and not as large
        as embeddings are. So they do here.

        Args:
            adapter_name: Its name, in both layers.
            source: The layer that holds the factors.
            config: Its configuration.

        Raises:
            ValueError: If the two layers' weights are not of one shape.
        """
        if self._is_transposed(source):
            sizes = source.out_features, source.in_features
        else:
            sizes = source.in_features, source.out_features
        if sizes != (self.in_features, self.out_features):
            raise ValueError(
                f"A layer of {self.in_features} inputs and {self.out_features} outputs cannot be tied to one of "
                f"{source.in_features} and {source.out_features}. Set ensure_weight_tying=False."
            )
        A, _, B = self._held(adapter_name)
        if config.init_lora_weights and not A.is_meta and self._is_transposed(source):
            held_A, M, held_B = source._held(adapter_name)
            held_A.copy_(B.T)
            held_B.copy_(A.reshape(held_B.shape))  # drawn into its memory, row after row
            if config.match_scale:
                source.set_mixer(adapter_name, M * (held_B.norm() / (held_B.to(M.dtype) @ M).norm()))
        for name in self.adapter_layer_names:
            if adapter_name in getattr(self, name):
                del getattr(self, name)[adapter_name]
        self.mixer_start.pop(adapter_name)
        self._unfilled.pop(adapter_name, None)
        self.frozen_peft_weight_names.pop(adapter_name, None)
        for own, others in (
            (self.r, source.r),
            (self.lora_alpha, source.lora_alpha),
            (self.scaling, source.scaling),
            (self._unscaled, source._unscaled),
        ):
            cast(dict[str, Any], own)[adapter_name] = cast(dict[str, Any], others)[adapter_name]
        self.tied[adapter_name] = (source,)

    def _is_transposed(self, source: MoSLoRALayer) -> bool:
        """Tell whether another layer's inputs are this one's outputs: a head's are the embedding's."""
        return self.adapter_layer_names[:3] != source.adapter_layer_names[:3]

    def _is_merged_with(self, adapter_name: str) -> bool:
        """Tell whether merging an adapter elsewhere changes this layer's weight, too, because they share it."""
        if adapter_name not in self.tied:
            return False
        source = self.tied[adapter_name][0].get_base_layer()
        return getattr(self.get_base_layer(), "weight", None) is getattr(source, "weight", None)

    def _weight_of_mixer(self, adapter_name: str) -> Any:
        """Return what is trained of an adapter's M."""
        held = getattr(self, self.adapter_layer_names[1])[adapter_name]
        return held if isinstance(held, Tensor) else held.weight

    def _weight_beside(self) -> Tensor | None:
        """Return the base parameter in whose group a sharded model has the start of a mixer."""
        return cast("Tensor | None", getattr(self.get_base_layer(), "weight", None))

    def _own(self) -> list[str]:
        """Return the adapters whose factors are held here."""
        return [name for name in self.scaling if name not in self.tied]

    def _split_mixers(self) -> None:
        """Split those mixers that are going to be trained in 16 bits.

        Not within FSDP: in a forward its parameters are copies, in 16 bits of float32 shards under mixed precision.
        """
        if torch.compiler.is_compiling() or getattr(self, "_is_fsdp_managed_module", False):
            return
        for name in self._own():
            if self.mixer_start.get(name) is None:
                weight = self._weight_of_mixer(name)
                if weight.requires_grad and is_narrow(weight.dtype):
                    split(weight, self.mixer_start, name, self._weight_beside())

    def train(self, mode: bool = True) -> Any:
        """Set the mode. Trainers call it before they shard or copy what is trained."""
        if mode:
            self._split_mixers()
            self._warn_of_sharded_mixers()
        return super().train(mode)

    def _warn_of_sharded_mixers(self) -> None:
        """Say that mixers were sharded in 16 bits before they could be split, so that most of their steps are lost."""
        if not getattr(self, "_is_fsdp_managed_module", False):
            return
        for name in self.scaling:
            weight = self._weight_of_mixer(name)
            if weight.requires_grad and is_narrow(weight.dtype) and self.mixer_start.get(name) is None:
                warnings.warn(
                    f"The mixer of adapter {name!r} was sharded in {weight.dtype}, where most steps of training round "
                    "to nothing. Call model.train() after casting and before sharding, or keep it in float32.",
                    stacklevel=3,
                )

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._split_mixers()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        of_M = self.adapter_layer_names[1]
        suffix = ".weight" if self.container is nn.ModuleDict else ""
        held = {f"{of_M}.{name}{suffix}": self._weight_of_mixer(name) for name in self._own()}
        take_state(state_dict, prefix, held, self.mixer_start, self._weight_beside())
        for key in [key for key in state_dict if key.startswith(f"{prefix}{dora.IN_OLD_FILES}.")]:
            state_dict[key.replace(f".{dora.IN_OLD_FILES}.", f".{dora.HELD}.")] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @torch.no_grad()
    def set_mixer(self, adapter_name: str, M: Tensor) -> None:
        """Put values into an adapter's mixer, in the dtype that they come in.

        Args:
            adapter_name: Its name.
            M: As many entries as it has, in its order.
        """
        weight = self._weight_of_mixer(adapter_name)
        start = self.mixer_start.get(adapter_name)
        if start is not None:
            start.weight.zero_()
        weight.data = M.detach().clone().reshape(weight.shape).to(weight.device)

    def _held(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return the factors A, M and B in the shapes in which they are held.

        Where something hangs on calling what holds them and they are not there without it, they are read by a call.
        A split M is in float32 at least.
        """
        if adapter_name in self.tied:
            source = self.tied[adapter_name][0]
            A, M, B = source._held(adapter_name)
            return (B.T, M.T, A.T) if self._is_transposed(source) else (A, M, B)
        A, M, B = (self._read(name, adapter_name) for name in self.adapter_layer_names[:3])
        if is_narrow(M.dtype) and torch.is_grad_enabled() and isinstance(M, nn.Parameter) and M.requires_grad:
            self._split_mixers()
        start = self.mixer_start.get(adapter_name)
        if start is not None:
            if is_present(start.weight) or not is_called(start):
                M = matrix(M, start)
            else:
                M = M + read_matrix(start, self.r[adapter_name], M).view(M.shape)
        if adapter_name in self._unfilled:
            starts.check_filled(self, adapter_name, M)
        return A, M, B

    def _read(self, dictionary: str, adapter_name: str) -> Tensor:
        """Return A or B as it is held."""
        held: Any = getattr(self, dictionary)
        entry: Any = held[adapter_name]
        if isinstance(entry, Tensor):
            if is_present(entry) or not (hasattr(held, "_hf_hook") or hasattr(entry, "ds_id")):
                return entry
            with loaded(held):
                return cast(Tensor, held[adapter_name]).clone()
        is_wrapped = "_fsdp_wrapped_module" in entry._modules
        weight = cast(Tensor, entry.weight)
        if not is_called(entry) or (is_present(weight) and not is_wrapped):
            return weight
        inner: Any = getattr(entry, "_fsdp_wrapped_module", entry)
        if isinstance(inner, nn.Linear):
            base = self._device_of_run()
            return read_matrix(entry, inner.in_features, torch.empty((), dtype=weight.dtype, device=base))
        with loaded(entry):
            return cast(Tensor, entry.weight).clone()

    def _device_of_run(self) -> torch.device:
        """Return where this layer computes; offloaded parameters do not tell."""
        hook = getattr(self.base_layer, "_hf_hook", None) or getattr(self, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
        return next((p.device for p in self.parameters() if not p.is_meta), torch.device("cpu"))

    def _is_called(self, adapter_name: str) -> bool:
        """Tell whether an adapter's factors must be called as modules, for something hangs on their call."""
        start = self.mixer_start.get(adapter_name)
        if start is not None and is_called(start):
            return True
        for name in self.adapter_layer_names:
            entry = getattr(self, name)
            if (
                adapter_name in entry
                and isinstance(module := entry[adapter_name], nn.Module)
                and is_called(module)
            ):
                return True
        return False

    def _by_calls(self, x: Tensor, name: str) -> Tensor:
        """Return ``s·B·M·A·x`` by calling what holds the factors; dropping nothing."""
        first, mix, last = (cast(Any, getattr(self, d)[name]) for d in self.adapter_layer_names[:3])
        start = self.mixer_start.get(name)
        H = first(self._cast_input_dtype(x, first.weight.dtype))
        H = mix(self._cast_input_dtype(H, mix.weight.dtype)) + (0 if start is None else start(H))
        update = last(self._cast_input_dtype(H, last.weight.dtype))
        if starts.has_start(self, name):
            update = update - starts.start_by_calls(self, x, name).to(update.dtype)
        return cast(Tensor, update * self.scaling[name])

    @torch.no_grad()
    def _start_factors(self, adapter_name: str, config: MoSLoRAConfig, components: Tensor | None) -> None:
        """Give the factors their initial values.

        A and B draw what LoRA's draw, in the same order, from torch's default generator; M draws from a
        fork of it. With one seed, LoRA and MoSLoRA therefore start with the same A in every layer.
        """
        if self._held(adapter_name)[0].is_meta:
            return
        self._start_like_lora(adapter_name, config)
        if components is not None:
            held_A, _, held_B = self._held(adapter_name)
            held_A.copy_(components)
            nn.init.zeros_(held_B)
        if config.lora_bias and config.init_lora_weights is not False:
            nn.init.zeros_(cast(Tensor, bias.bias_of(self, adapter_name)))
        way_out = starts.why_later(self, config)
        if way_out is not None:
            starts.leave_unfilled(self, adapter_name, way_out)
            return
        A, M, B = self._held(adapter_name)
        M = M.detach().clone()
        matrices = self._as_matrices(adapter_name, A, M, B)
        r, generator = self.r[adapter_name], forked_generator()
        for one_A, one_M, one_B in zip(*map(_matrices, matrices), strict=True):
            start = config.start_mixer(r, generator)
            if start is None:
                starts.leave_unfilled(self, adapter_name, starts.SAVED)
                return
            one_M.copy_(start)
            if config.match_scale:
                # Where A starts at zero (embeddings), it is B that the mixer must not shrink.
                alone, mixed = (one_A, one_M @ one_A) if one_A.any() else (one_B, one_B @ one_M)
                if mixed.norm() == 0:
                    raise ValueError(
                        "match_scale=True cannot rescale this mixer: its product with A is zero. Choose another mixer."
                    )
                one_M.mul_(alone.norm() / mixed.norm())
            if config.init_lora_weights == "orthogonal":
                starts.make_orthogonal(one_A, one_M, one_B)
        self.set_mixer(adapter_name, M)

    def _start_like_lora(self, adapter_name: str, config: MoSLoRAConfig) -> None:
        """Give A and B the values that LoRA's start with."""
        A, _, B = self._held(adapter_name)
        if config.init_lora_weights == "orthogonal":
            starts.draw_orthogonal(A, B)
            return
        if config.init_lora_weights == "olora":
            if not config.is_saved:
                starts.take_qr(self, A, B, config)
            return
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(A, std=1 / self.r[adapter_name])
        elif config.init_lora_weights and config.init_lora_weights != "eva":
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if config.init_lora_weights:
            nn.init.zeros_(B)

    def _as_matrices(
        self, adapter_name: str, A: Tensor, M: Tensor, B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return factors as they are held as matrices, or stacks of matrices; views of them wherever possible."""
        return A, M, B

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor, float]:
        """Return what an adapter holds in this layer, as matrices.

        Args:
            adapter_name: Its name.

        Returns:
            A ``(r, in)``, M ``(r, r)``, B ``(out, r)`` and the scale; views of the parameters, but for an M that is
            trained in 16 bits, which is a sum in float32. A layer of experts has one more dimension in front. With a
            start from the base weight, which is subtracted, the rank is 2r and they are no views.

        Raises:
            KeyError: If the layer has no adapter of this name.
        """
        matrices = self._as_matrices(adapter_name, *self._held(adapter_name))
        return *starts.with_start(self, adapter_name, *matrices), self.scaling[adapter_name]

    def bias_on_B(self, adapter_name: str) -> Tensor | None:  # noqa: N802
        """Return an adapter's bias on B.

        Args:
            adapter_name: Its name.

        Returns:
            Shape ``(out,)``, to be scaled as B is; None if it has none.
        """
        return bias.bias_of(self, adapter_name)

    @torch.no_grad()
    def set_factors(
        self, adapter_name: str, A: Tensor, M: Tensor, B: Tensor, bias_on_B: Tensor | None = None
    ) -> None:
        """Put values into an adapter's factors, in the dtype they come in.

        Args:
            adapter_name: Its name.
            A: Shape ``(r, in)``, as ``factors`` returns it.
            M: Shape ``(r, r)``.
            B: Shape ``(out, r)``.
            bias_on_B: Shape ``(out,)``, for an adapter that has one.

        Raises:
            ValueError: If they are another layer's, to which the adapter is tied.
        """
        if adapter_name in self.tied:
            raise ValueError(
                f"The factors of adapter {adapter_name!r} are tied to another layer's here. Put values into those."
            )
        self._unfilled.pop(adapter_name, None)
        held_A, _, held_B = self._held(adapter_name)
        for held, value in ((held_A, A), (held_B, B)):
            held.data = value.detach().contiguous().clone().view(held.shape).to(held.device)
        own_bias = self.bias_on_B(adapter_name)
        if own_bias is not None and bias_on_B is not None:
            own_bias.data = bias_on_B.detach().clone().to(own_bias.device)
        self.set_mixer(adapter_name, M)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Build ΔW as it lies in the base layer.

        Args:
            adapter: The adapter's name.

        Returns:
            The shape of the base weight; float32 where the factors are of lower precision, else their dtype. Of an
            adapter with DoRA's magnitude, the whole change of the weight, ``W' - W0``.

        Raises:
            ValueError: If this layer has no such weight; the message says why.
        """
        has_magnitude = dora.has_magnitude(self, adapter)
        return dora.delta_weight(self, adapter) if has_magnitude else self.low_rank_delta(adapter)

    def low_rank_delta(self, adapter: str) -> Tensor:
        """Build ``s·B·M·A`` as it lies in the base layer, whatever magnitude there is.

        Args:
            adapter: The adapter's name.

        Returns:
            The shape of the base weight; float32 where the factors are of lower precision, else their dtype.

        Raises:
            ValueError: If this layer has no such weight; the message says why.
        """
        A, M, B, scale = self.factors(adapter)
        dtype = torch.promote_types(A.dtype, torch.float32)
        delta = [
            functional.delta_weight(a, m, b, scale)
            for a, m, b in zip(*(_matrices(factor.to(dtype)) for factor in (A, M, B)), strict=True)
        ]
        return self._lay(delta[0] if A.ndim == 2 else torch.stack(delta))

    def delta_in_norm(self, adapter: str) -> Tensor:
        """Build what DoRA's norm takes to be added to the base weight.

        Args:
            adapter: The adapter's name.

        Returns:
            The shape of the base weight; float32 where the factors are of lower precision, else their dtype.
        """
        return self.low_rank_delta(adapter)

    def get_base_weight(self) -> Tensor:
        """Return the base weight, dequantised if it is quantised."""
        base = self.get_base_layer()
        state = getattr(getattr(base, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            # To run, bitsandbytes reorders 4-bit weights on some CPUs, and PEFT would read them as if it had
            # not. Asking for what is stored puts them back.
            base.state_dict()
        if not _is_empty(base):
            return cast(Tensor, super().get_base_weight())
        with loaded(base):
            weight = cast(Tensor, super().get_base_weight())
            if weight.is_meta or weight.numel() == 0:
                raise RuntimeError(
                    f"The weight of a {type(base).__name__} has no values here ({tuple(weight.shape)} on "
                    f"{weight.device}), and this adapter needs it (DoRA, a start from the weight, or merging). Load "
                    "the base first, or leave use_dora and such a start out."
                )
            return weight.clone()

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Put a base weight in place, quantising it as it was."""
        own_bias = getattr(self.get_base_layer(), "bias", None)
        super().set_base_weight(weight_data)
        base = self.get_base_layer()
        if own_bias is not None and base.bias is None:
            base.bias = own_bias  # PEFT makes a new layer for HQQ, without it

    def _check_mergeable(self) -> None:
        """Refuse what cannot be merged.

        Raises:
            RuntimeError: If the base's weight is sharded between processes.
            ValueError: If the base's quantisation cannot be written.
        """
        check_mergeable(self.get_base_layer())
        backend = self.quantization_backend
        if isinstance(backend, compat.ReadOnlyBackend):
            raise ValueError(backend.why_not_merged(self.get_base_layer()))
        if backend is not None and not (backend.supports_merge and backend.layer_type == self.quantized_kind):
            raise ValueError(
                f"Cannot merge into a {type(self.get_base_layer()).__name__}: PEFT's {backend.backend_name} "
                "backend cannot quantise its weight anew. Leave the adapter beside the base, export it as a "
                "plain LoRA, or load the base in 16 or 32 bits and merge there."
            )
        if getattr(backend, "get_apply_tensor_subclass", None) is _unknown_quantization:
            raise ValueError(
                "Cannot merge: how the base was quantised by torchao is not known. Load it through transformers "
                "with quantization_config=TorchAoConfig(...), or leave the adapter beside the base."
            )

    def _add_to_weight(self, adapter: str, sign: int, safe: bool) -> None:
        if self._is_merged_with(adapter):
            return  # done in the layer whose weight it is, too
        weight = self.get_base_weight()
        delta = self.get_delta_weight(adapter).to(weight.device)
        # Summed in the wider of the two dtypes and rounded once.
        merged = (weight + sign * delta).to(weight.dtype)
        if safe and not torch.isfinite(merged).all():
            raise ValueError(
                f"Merging adapter {adapter!r} would put NaN or infinite values into the weight; nothing was "
                "changed. Load an earlier checkpoint of the adapter."
            )
        merged_bias = bias.add_to_base(self, adapter, sign, safe)
        self.set_base_weight(merged)
        if merged_bias is not None:
            self.get_base_layer().bias.data = merged_bias

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW into the base weight.

        Args:
            safe_merge: Refuse to write NaN or infinite values.
            adapter_names: Which adapters; the active ones if None.

        Raises:
            ValueError: If ``safe_merge`` found NaN or infinite values, or the layer cannot be merged.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.scaling:
                self._check_mergeable()
                bias.check_mergeable([self], [adapter])
                gain = dora.gain(self, adapter)  # before, for from the merged weight it cannot be told
                self._add_to_weight(adapter, 1, safe_merge)
                self.merged_gains.update({} if gain is None else {adapter: gain})
                self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take every merged ΔW out of the base weight again, up to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            adapter = self.merged_adapters[-1]
            if adapter in self.scaling:
                self._add_to_weight(adapter, -1, safe=False)
            self.merged_adapters.pop()
            self.merged_gains.pop(adapter, None)

    def _is_base_alone(self) -> bool:
        """Tell whether the base layer's output is the answer: adapters are disabled, or merged into it."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        return bool(self.disable_adapters or self.merged)

    def _active_here(self) -> list[str]:
        """Return the active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.scaling]

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Run the base layer and the active adapters.

        Args:
            x: The base layer's input.
            *args: Handed to the base layer.
            adapter_names: One per row of a mixed batch; None runs the active adapters on all rows.
            **kwargs: Handed to the base layer.

        Returns:
            Shape and dtype of the base layer's output.
        """
        if adapter_names is not None:
            return self._forward_mixed(x, adapter_names, *args, **kwargs)
        active = [] if self._is_base_alone() else self._active_here()
        return self._add_updates(x, self.base_layer(x, *args, **kwargs), active)

    def _present(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor, float]:
        """Return the factors to compute with on ``x``.

        Raises:
            RuntimeError: If they have no values.
        """
        A, M, B, scale = self.factors(name)
        check_present(x, A, M, B)
        return A, M, B, scale

    def _update(self, x: Tensor, name: str) -> Tensor:
        """Return what adapter ``name`` adds to the base layer's output for the input ``x``."""
        raise NotImplementedError

    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer, and for each row of the batch the adapter that is named for it.

        Args:
            x: The base layer's input, the batch first.
            adapter_names: One name per row; ``"__base__"``, or an adapter that this layer does not have,
                leaves the row as the base makes it.
            *args: Handed to the base layer.
            **kwargs: Handed to the base layer.

        Returns:
            Shape and dtype of the base layer's output.

        Raises:
            ValueError: If adapters are merged, or the first dimension of ``x`` is not the batch.
        """
        if self.disable_adapters:
            self._is_base_alone()  # takes merged adapters out
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        if self.merged:
            raise ValueError(
                "adapter_names was given while adapters are merged, so no row could be without them. Call "
                "unmerge_adapter() first."
            )
        if len(x) != len(adapter_names):
            raise ValueError(
                f"{len(adapter_names)} adapter_names for an input of shape {tuple(x.shape)} in a "
                f"{type(self.get_base_layer()).__name__}: one name per row is needed. (A layer that sees tokens "
                "instead of rows, as an expert does, cannot serve mixed batches: split the batch.)"
            )
        result = base_out = cast(Tensor, self.base_layer(x, *args, **kwargs))
        for name in dict.fromkeys(adapter_names):
            if name in self.scaling:
                rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name])
                rows = rows.to(x.device)
                update = self._update_beside(x[rows], name, base_out[rows])
                result = result.index_add(0, rows, update.to(result.dtype))
        return result

    def _update_beside(self, x: Tensor, name: str, base_out: Tensor) -> Tensor:
        """Return what adapter ``name`` adds to the base layer's output for x, which is ``base_out``."""
        if dora.has_magnitude(self, name):
            return dora.update(self, x, name, base_out)
        return self._update(x, name)

    def _add_updates(self, x: Tensor, result: Tensor, adapters: list[str]) -> Tensor:
        """Add the updates of ``adapters`` to the base layer's output."""
        base_out = result
        for name in adapters:
            result = result + self._update_beside(x, name, base_out).to(result.dtype)
        return result

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale of an adapter to ``scale`` times its own.

        Args:
            adapter: Its name; nothing happens if the layer does not have it.
            scale: Factor, unitless.
        """
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._unscaled[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of every active adapter.

        Args:
            scale: Factor, unitless.
        """
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of every active adapter, or set it back.

        Args:
            scale: Divisor, unitless; None restores the scale of the configuration.
        """
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] = (
                    self._unscaled[adapter] if scale is None else self.scaling[adapter] / scale
                )

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter.

        Args:
            adapter_name: Its name.
        """
        super().delete_adapter(adapter_name)
        self._unscaled.pop(adapter_name, None)
        self._unfilled.pop(adapter_name, None)
        self.mixer_start.pop(adapter_name)
        self.tied.pop(adapter_name, None)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell PEFT whether ΔW, of low rank, is all there is, so that the adapter can be converted to LoRA."""
        return not dora.has_magnitude(self, adapter_name) and not bias.has_bias(self, adapter_name)

    def __repr__(self) -> str:
        return f"moslora.{super().__repr__()}"


def _unknown_quantization() -> None:
    """Stand for the torchao configuration that a base without one cannot tell; merging looks for it."""


def _without_values(kind: type[nn.Module], *sizes: int, like: nn.Module) -> nn.Module:
    """Make a bias-free module where ``like`` is (maybe on the meta device), drawing no random numbers."""
    device = next(like.parameters()).device
    return nn.utils.skip_init(kind, *sizes, bias=False, device=device)  # type: ignore[no-untyped-call, no-any-return]


def _is_empty(base: nn.Module) -> bool:
    """Tell whether a base layer's weight is offloaded or partitioned at the moment."""
    weight = getattr(base, "weight", None)
    return isinstance(weight, Tensor) and (weight.is_meta or weight.numel() == 0)


def _matrices(factor: Tensor) -> Tensor:
    """Return a factor as a stack of matrices: one, or one for each expert."""
    return factor if factor.ndim == 3 else factor[None]


class MoSLoRALinear(MoSLoRALayer):
    """A linear layer (or Conv1D, or a quantised one) with ``ΔW = s·B·M·A`` beside its weight."""

    quantized_kind = "linear"
    takes_starts = True

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the weight lies as ``(in, out)``. The layer knows; a flag in the configuration may be wrong."""
        return isinstance(self.get_base_layer(), Conv1D)

    def _make_factors(self, adapter_name: str, r: int, has_bias: bool) -> None:
        A = nn.Linear(self.in_features, r, bias=False)
        B = nn.Linear(r, self.out_features, bias=has_bias)
        self._hold(adapter_name, A, _without_values(nn.Linear, r, r, like=A), B)

    def _lay(self, delta: Tensor) -> Tensor:
        return delta.T if self.fan_in_fan_out else delta

    def why_no_magnitude(self) -> str | None:
        """Tell why this layer cannot have DoRA's magnitude; None, for it can."""
        return None

    def why_no_bias(self) -> str | None:
        """Tell why B cannot have a bias in this layer; None, for it can."""
        return None

    def low_rank(self, x: Tensor, name: str) -> Tensor:
        """Return ``s·B·M·A·x``, dropping nothing; of an adapter with a magnitude, so there is no bias on B."""
        if self._is_called(name):
            return self._by_calls(x, name)
        return ops.low_rank_update(x, *self._present(x, name))  # (..., out)

    def base_product(self, x: Tensor) -> Tensor:
        """Return the base layer's output without its bias."""
        weight = self.get_base_weight().to(x.dtype)
        return nn.functional.linear(x, weight.T if self.fan_in_fan_out else weight)  # (..., out)

    def _why_apart(self, x: Tensor, base: Any, name: str, dropout: float) -> str | None:
        """Tell why base product and update cannot run as one Function; None if they can.

        Only a plain layer qualifies: a quantised or sharded weight has no such product, hooks on the base
        layer (offloading, another adapter library) must see its call.
        """
        weight: Any = getattr(base, "weight", None)
        if not ops.is_fusing():
            return "fusing is switched off"
        if any(dora.has_magnitude(self, active) for active in self._active_here()):
            return "DoRA's magnitude rescales the base layer's own output"
        if type(base) not in (nn.Linear, Conv1D) or type(weight) not in (nn.Parameter, Tensor):
            return f"the base layer is a {type(base).__name__} with a {type(weight).__name__}"
        if (
            base._forward_hooks
            or base._forward_pre_hooks
            or base._backward_hooks
            or "forward" in base.__dict__
        ):
            return "the base layer has hooks"
        if self._is_called(name):
            return "the factors are wrapped or have hooks, so they must be called"
        if weight.dtype != x.dtype and not ops.is_autocasting(x.device.type):
            return f"the base weight is {weight.dtype}, its input {x.dtype}"
        return ops.why_no_fused_dropout(x, dropout) if dropout else None

    def _dropout(self, name: str) -> float:
        """Return the probability with which entries of the update's input are dropped now."""
        dropout = self.moslora_dropout[name]
        return float(cast(Any, dropout).p) if self.training and isinstance(dropout, nn.Dropout) else 0.0

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Run the base layer and the active adapters.

        Args:
            x: Input, shape ``(..., in)``.
            *args: Handed to the base layer.
            adapter_names: One per row of a mixed batch; None runs the active adapters on all rows.
            **kwargs: Handed to the base layer.

        Returns:
            Shape ``(..., out)``, dtype of the base layer's output.
        """
        if adapter_names is not None:
            return self._forward_mixed(x, adapter_names, *args, **kwargs)
        if self._is_base_alone():
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        active = self._active_here()
        if active:
            name, base = active[0], cast(Any, self.base_layer)
            dropout = self._dropout(name)
            reason = (
                "the call has more arguments" if args or kwargs else self._why_apart(x, base, name, dropout)
            )
            if reason is None:
                weight = base.weight.T if type(base) is Conv1D else base.weight  # (out, in)
                result = ops.adapted_linear(x, weight, base.bias, *self._present(x, name), dropout=dropout)
                return self._add_updates(x, self._with_bias(result, name), active[1:])
            _tell_once(reason)
        return self._add_updates(x, self.base_layer(x, *args, **kwargs), active)

    def _update(self, x: Tensor, name: str) -> Tensor:
        if self._is_called(name):
            return self._by_calls(self.moslora_dropout[name](x), name)
        dropout = self._dropout(name)
        if dropout and (not ops.is_fusing() or ops.why_no_fused_dropout(x, dropout) is not None):
            x, dropout = self.moslora_dropout[name](x), 0.0
        update = ops.low_rank_update(x, *self._present(x, name), dropout=dropout)  # (..., out)
        return self._with_bias(update, name)

    def _with_bias(self, out: Tensor, name: str) -> Tensor:
        """Add an adapter's bias on B, scaled, if it has one."""
        own = bias.bias_of(self, name)
        return out if own is None else out + (own * self.scaling[name]).to(out.dtype)
