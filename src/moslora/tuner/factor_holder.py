"""FactorHolder: what a layer holds of each adapter, and reading it wherever the parameters are.

The factors are modules as LoRA's are, so that what finds ``lora_A.NAME.weight`` by its form (hot-swapping, sharding
policies) finds ``moslora_A.NAME.weight`` too. Parameters may be offloaded, partitioned, or behind a wrapper that must
be called; ``reading.py`` tells why. ``layer.py`` builds on this class what an adapter does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from moslora.compat.offloading import execution_device, is_brought_in, loaded
from moslora.compat.peft import quantization
from moslora.compat.peft.base_layer import TunerLayer
from moslora.compat.peft.functions import sizes_of
from moslora.compat.torch import is_managed_by_fsdp, is_wrapped_by_fsdp, must_be_called, unwrapped_by_fsdp
from moslora.core import functional
from moslora.errors import UsageError
from moslora.tuner import kept_start
from moslora.tuner.held_mixer import MixerStarts, is_narrow, matrix, split, take_state
from moslora.tuner.names import FACTORS, MAGNITUDE, MAGNITUDE_IN_OLD_FILES
from moslora.tuner.reading import is_present, read_matrix

__all__ = ["FactorHolder", "matrices_of", "without_values"]


class FactorHolder(TunerLayer, nn.Module):  # type: ignore[misc]
    """A base layer, and per adapter A, M and B with their scale.

    A kind of layer says how its factors are held (``make_factors``), what matrices they are (``as_matrices``), and how
    ΔW lies in its base's weight (``lay``).
    """

    # A, M and B come first; a kind that holds them under other names says so here.
    adapter_layer_names: tuple[str, ...] = FACTORS
    other_param_names = ("r", "lora_alpha", "scaling", "moslora_dropout")
    container: type[nn.ModuleDict] | type[nn.ParameterDict] = nn.ModuleDict
    # PEFT's word for the kind of layer whose weight a quantization backend can write.
    quantized_kind = ""
    # How many dimensions the base weight has, where a layer may have a magnitude.
    weight_dims = 2
    # Whether the weight lies as ``(in, out)``.
    fan_in_fan_out = False
    # Whether the input is numbers, of which dropout can drop some.
    has_droppable_input = True
    # Whether factors may start from the base weight, or orthogonal.
    takes_starts = False
    # Whether an update is made row by row of the input, so that each row may have an adapter of its own.
    is_rowwise = True

    # PEFT's mixin has these, without types.
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
    merged: bool
    disable_adapters: bool

    def _init_adapters(self, base_layer: nn.Module, **kwargs: Any) -> None:
        """Hold no adapter yet.

        Args:
            base_layer: The layer to adapt, or another MoSLoRA layer's base.
            **kwargs: ``get_apply_tensor_subclass`` for torchao bases, as PEFT passes it.

        Raises:
            TypeError: If the sizes of the layer are not known.
        """
        self.base_layer = base_layer
        self.quantization_backend = quantization.resolve_quantization_backend(
            self.get_base_layer(),
            get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass", unknown_quantization),
        )
        self.mixer_start = MixerStarts()
        for name in self.adapter_layer_names:
            setattr(self, name, self.container())
        self.moslora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.unscaled: dict[
            str, float
        ] = {}  # the scales of the configurations, whatever set_scale changed since
        self.merged_gains: dict[str, Tensor] = {}  # of adapters with a magnitude, while they are merged
        self.unfilled: dict[str, str] = {}  # adapters whose M is NaN yet, with what has to be done
        # Adapters whose factors are another layer's, as the weights of the two base layers are. In tuples, which hide
        # that layer from torch: its parameters are counted, moved and saved where they are.
        self.tied: dict[str, tuple[FactorHolder]] = {}
        # A class attribute in PEFT; an own dict keeps one layer's frozen mixer from freezing another's.
        self.component_errors: dict[
            str, float
        ] = {}  # of starts from principal components: what the search left
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self.in_features, self.out_features = self._sizes()

    # --- What a kind of layer says ---

    def _sizes(self) -> tuple[int, int]:
        """Return the inputs and outputs that A and B have."""
        return sizes_of(self.get_base_layer())

    def make_factors(self, adapter_name: str, r: int, has_bias: bool) -> None:
        """Put A, M and B in their places. A and B draw what LoRA's draw; M draws nothing.

        Args:
            adapter_name: The adapter's name.
            r: Its rank in this layer.
            has_bias: Whether B has a bias.
        """
        raise NotImplementedError

    def lay(self, delta: Tensor) -> Tensor:
        """Return ΔW, made of what ``factors`` returns, in the shape of the base weight.

        Args:
            delta: Shape ``(out, in)``, or one matrix for each expert.
        """
        raise NotImplementedError

    def as_matrices(
        self, adapter_name: str, A: Tensor, M: Tensor, B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return factors as they are held as matrices, or stacks of matrices; views of them wherever possible.

        Args:
            adapter_name: The adapter's name.
            A, M, B: As ``held_factors`` returns them.
        """
        return A, M, B

    def weight_beside(self) -> Tensor | None:
        """Return the base parameter in whose group a sharded model has the start of a mixer."""
        return cast("Tensor | None", getattr(self.get_base_layer(), "weight", None))

    def why_unlike_lora(self) -> str | None:
        """Return why stock PEFT's LoRA would compute another output with these weights; None if it would not."""
        return None

    def why_no_magnitude(self) -> str | None:
        """Return why this layer cannot have DoRA's magnitude; None if it can."""
        return "DoRA's magnitude is there for linear layers, convolutions and embeddings"

    def why_no_bias(self) -> str | None:
        """Return why B cannot have a bias in this layer; None if it can."""
        return "a bias on B is there for linear layers and convolutions"

    def low_rank(self, x: Tensor, name: str) -> Tensor:
        """Return ``s·B·M·A·x`` without dropout, for layers that may have a magnitude.

        Args:
            x: The base layer's input.
            name: The adapter's name.
        """
        raise NotImplementedError

    def base_product(self, x: Tensor) -> Tensor:
        """Return the base layer's output without its bias, for layers that may have a magnitude.

        Args:
            x: The base layer's input.
        """
        raise NotImplementedError

    # --- Mixers in 16 bits: see held_mixer.py ---

    def _hold(self, adapter_name: str, *factors: nn.Module | nn.Parameter) -> None:
        """Keep A, M and B under an adapter's name."""
        for name, factor in zip(self.adapter_layer_names, factors, strict=False):
            getattr(self, name)[adapter_name] = factor
        self.mixer_start.pop(adapter_name)
        self.tied.pop(adapter_name, None)
        if len(self.mixer_start._modules):  # TRL copies one adapter into another, parameter by parameter
            self.mixer_start.begin(adapter_name, self.trained_mixer(adapter_name), self.weight_beside())

    def _own(self) -> list[str]:
        """Return the adapters whose factors are held here, and not in another layer."""
        return [name for name in self.scaling if name not in self.tied]

    def _split_mixers(self) -> None:
        """Split those mixers that are going to be trained in 16 bits. Not within FSDP, where parameters are copies."""
        if torch.compiler.is_compiling() or is_managed_by_fsdp(self):
            return
        for name in self._own():
            if self.mixer_start.get(name) is None:
                weight = self.trained_mixer(name)
                if weight.requires_grad and is_narrow(weight.dtype):
                    split(weight, self.mixer_start, name, self.weight_beside())

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._split_mixers()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        of_M = self.adapter_layer_names[1]
        suffix = ".weight" if self.container is nn.ModuleDict else ""
        mixers = {f"{of_M}.{name}{suffix}": self.trained_mixer(name) for name in self._own()}
        take_state(state_dict, prefix, mixers, self.mixer_start, self.weight_beside())
        old = f"{prefix}{MAGNITUDE_IN_OLD_FILES}."
        for key in [key for key in state_dict if key.startswith(old)]:
            state_dict[f"{prefix}{MAGNITUDE}.{key.removeprefix(old)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @torch.no_grad()
    def set_mixer(self, adapter_name: str, M: Tensor) -> None:
        """Put values into an adapter's mixer, in the dtype that they come in.

        Args:
            adapter_name: Its name.
            M: As many entries as it has, in its order.
        """
        weight = self.trained_mixer(adapter_name)
        start = self.mixer_start.get(adapter_name)
        if start is not None:
            start.weight.zero_()
        weight.data = M.detach().clone().reshape(weight.shape).to(weight.device)

    # --- Reading ---

    def parameter_of(self, dictionary: str, adapter_name: str) -> Any:
        """Return the parameter in which a factor is held, whether its values are there or not.

        Args:
            dictionary: What holds it, one of ``adapter_layer_names``.
            adapter_name: The adapter's name.
        """
        entry = getattr(self, dictionary)[adapter_name]
        return entry if isinstance(entry, Tensor) else entry.weight

    def trained_mixer(self, adapter_name: str) -> Any:
        """Return what is trained of an adapter's M.

        Args:
            adapter_name: The adapter's name.
        """
        return self.parameter_of(self.adapter_layer_names[1], adapter_name)

    def held_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return the factors A, M and B in the shapes in which they are held.

        Args:
            adapter_name: The adapter's name.

        Returns:
            The parameters; read by a call where they must be. A split M is a sum, in float32 at least.

        Raises:
            UsageError: If M has no values yet.
        """
        if adapter_name in self.tied:
            source = self.tied[adapter_name][0]
            A, M, B = source.held_factors(adapter_name)
            return (B.T, M.T, A.T) if self.is_transpose_of(source) else (A, M, B)
        A, M, B = (self.read_factor(name, adapter_name) for name in self.adapter_layer_names[:3])
        if is_narrow(M.dtype) and torch.is_grad_enabled() and isinstance(M, nn.Parameter) and M.requires_grad:
            self._split_mixers()
        start = self.mixer_start.get(adapter_name)
        if start is not None:
            if is_present(start.weight) or not must_be_called(start):
                M = matrix(M, start)
            else:
                M = M + read_matrix(start, self.r[adapter_name], M).view(M.shape)
        if adapter_name in self.unfilled:
            self._check_filled(adapter_name, M)
        return A, M, B

    def is_transpose_of(self, source: FactorHolder) -> bool:
        """Tell whether another layer's inputs are this one's outputs: a head's are the embedding's.

        Args:
            source: A layer that shares its weight with this one.
        """
        return self.adapter_layer_names[:3] != source.adapter_layer_names[:3]

    def read_factor(self, dictionary: str, adapter_name: str) -> Tensor:
        """Return A, B or what is trained of M as it is held.

        Args:
            dictionary: What holds it, one of ``adapter_layer_names``.
            adapter_name: The adapter's name.

        Returns:
            The parameter; a copy with its gradient where it had to be brought in.
        """
        holder: Any = getattr(self, dictionary)
        entry: Any = holder[adapter_name]
        if isinstance(entry, Tensor):
            if is_present(entry) or not is_brought_in(holder):
                return entry
            with loaded(holder):
                return cast(Tensor, holder[adapter_name]).clone()
        weight = cast(Tensor, entry.weight)
        if not must_be_called(entry) or (is_present(weight) and not is_wrapped_by_fsdp(entry)):
            return weight
        inner = unwrapped_by_fsdp(entry)
        if isinstance(inner, nn.Linear):
            like = torch.empty((), dtype=weight.dtype, device=self.run_device())
            return read_matrix(entry, inner.in_features, like)
        with loaded(entry):
            return cast(Tensor, entry.weight).clone()

    def run_device(self) -> torch.device:
        """Return where this layer computes. Offloaded parameters are elsewhere."""
        device = execution_device(self.base_layer, self)
        if device is not None:
            return device
        return next((p.device for p in self.parameters() if not p.is_meta), torch.device("cpu"))

    def factors_must_be_called(self, adapter_name: str) -> bool:
        """Tell whether an adapter's factors must be called as modules, because they are wrapped or have hooks.

        Args:
            adapter_name: The adapter's name.
        """
        start = self.mixer_start.get(adapter_name)
        if start is not None and must_be_called(start):
            return True
        for name in self.adapter_layer_names:
            entry = getattr(self, name)
            if (
                adapter_name in entry
                and isinstance(module := entry[adapter_name], nn.Module)
                and must_be_called(module)
            ):
                return True
        return False

    def leave_unfilled(self, adapter_name: str, way_out: str) -> None:
        """Leave an adapter's mixer to be filled later; until then it is NaN.

        Args:
            adapter_name: The adapter's name.
            way_out: Why it has no values, and what to do, as the end of a sentence.
        """
        self.set_mixer(adapter_name, torch.full_like(self.trained_mixer(adapter_name), float("nan")))
        self.unfilled[adapter_name] = way_out

    def _check_filled(self, adapter_name: str, M: Tensor) -> None:
        """Refuse to use a mixer that has no values yet.

        Raises:
            UsageError: If it is still NaN.
        """
        if torch.compiler.is_compiling():
            return  # values cannot be looked at in a graph; NaN would show in the output
        if torch.isnan(M.detach()).all():
            raise UsageError(
                f"The mixer of adapter {adapter_name!r} has no values: {self.unfilled[adapter_name]}"
            )
        del self.unfilled[adapter_name]

    # --- ΔW ---

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor, float]:
        """Return what an adapter holds in this layer, as matrices.

        Args:
            adapter_name: Its name.

        Returns:
            A ``(r, in)``, M ``(r, r)``, B ``(out, r)`` and the scale; views of the parameters, but for an M that is
            trained in 16 bits, which is a sum in float32. A layer of experts has one more dimension in front. With a
            start from the base weight, which is subtracted, the rank is 2r and they are not views.

        Raises:
            KeyError: If the layer has no adapter of this name.
        """
        matrices = self.as_matrices(adapter_name, *self.held_factors(adapter_name))
        return *kept_start.with_start(self, adapter_name, *matrices), self.scaling[adapter_name]

    def low_rank_delta(self, adapter: str) -> Tensor:
        """Build ``s·B·M·A`` in the shape of the base weight, whatever magnitude there is.

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
            for a, m, b in zip(*(matrices_of(factor.to(dtype)) for factor in (A, M, B)), strict=True)
        ]
        return self.lay(delta[0] if A.ndim == 2 else torch.stack(delta))

    def delta_in_norm(self, adapter: str) -> Tensor:
        """Build what DoRA's norm takes to be added to the base weight.

        Args:
            adapter: The adapter's name.

        Returns:
            The shape of the base weight; float32 where the factors are of lower precision, else their dtype.
        """
        return self.low_rank_delta(adapter)

    # --- The base's weight ---

    def get_base_weight(self) -> Tensor:
        """Return the base weight, dequantized if it is quantized."""
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
        """Put a base weight in place, quantizing it as it was.

        Args:
            weight_data: Shape of the base weight.
        """
        own_bias = getattr(self.get_base_layer(), "bias", None)
        super().set_base_weight(weight_data)
        base = self.get_base_layer()
        if own_bias is not None and base.bias is None:
            base.bias = own_bias  # PEFT makes a new layer for HQQ, without it


def unknown_quantization() -> None:
    """Stand for the torchao configuration that a base without one cannot tell; merging looks for it."""


def without_values(kind: type[nn.Module], *sizes: int, like: nn.Module) -> nn.Module:
    """Make a module without a bias, drawing no random numbers.

    Args:
        kind: Its class.
        *sizes: What the class takes.
        like: A module of the device to be on, maybe the meta device.
    """
    device = next(like.parameters()).device
    return nn.utils.skip_init(kind, *sizes, bias=False, device=device)  # type: ignore[no-untyped-call, no-any-return]


def _is_empty(base: nn.Module) -> bool:
    """Tell whether a base layer's weight is offloaded or partitioned at the moment."""
    weight = getattr(base, "weight", None)
    return isinstance(weight, Tensor) and (weight.is_meta or weight.numel() == 0)


def matrices_of(factor: Tensor) -> Tensor:
    """Return a factor as a stack of matrices: one, or one for each expert.

    Args:
        factor: Shape ``(rows, columns)``, or ``(E, rows, columns)``.
    """
    return factor if factor.ndim == 3 else factor[None]
