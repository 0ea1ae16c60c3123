"""MoSLoRAModel: puts adapted layers in the place of a model's own."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moslora.adapters.factors import exact_pattern
from moslora.compat import diffusers as compat_diffusers
from moslora.compat.peft.base_tuner import Tuner
from moslora.compat.peft.quantization import get_quantization_kwargs
from moslora.compat.torch import leave_fast_paths, restore_fast_paths
from moslora.compat.transformers import convert_targets
from moslora.core.notices import tell_once
from moslora.errors import UsageError
from moslora.patterns import check_patterns
from moslora.terminal import warn
from moslora.tuner import bias, dora, loftq
from moslora.tuner.attention import MoSLoRAAttention
from moslora.tuner.config import MoSLoRAConfig
from moslora.tuner.embedding import MoSLoRAEmbedding
from moslora.tuner.experts import ParamWrapper
from moslora.tuner.held_mixer import is_narrow
from moslora.tuner.kinds import KINDS, find_layer_class
from moslora.tuner.layer import MoSLoRALayer
from moslora.tuner.matching import UnfitSettingWarning, find_misfits, settle_overlaps
from moslora.tuner.mixed_batches import check_names, handing_over
from moslora.tuner.names import PREFIX
from moslora.tuner.sharding import check_mergeable_when_sharded, warn_of_whole_factors
from moslora.tuner.state_dict import check_fit, gather_beside, tensors_for_file, tensors_from_file
from moslora.tuner.weighted import REFUSED_IN_SUMS, How, check_summable, combine_factors

__all__ = ["MoSLoRAModel"]

logger = logging.getLogger(__name__)


class MoSLoRAModel(Tuner):  # type: ignore[misc]
    """A model whose target modules carry MoSLoRA adapters (arXiv:2406.11909).

    It is made by ``peft.get_peft_model(model, MoSLoRAConfig(...))``; use that.

    Args:
        model: The base model; its target modules are replaced in place.
        config: The adapter's configuration.
        adapter_name: Its name.
        low_cpu_mem_usage: Make the factors on the meta device, to be loaded into.

    Raises:
        TypeError: If a target module is of a kind that has no adapted layer.
        ValueError: If a target module already carries an adapter of another method.
    """

    prefix: str = PREFIX
    tuner_layer_cls = MoSLoRALayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        config: MoSLoRAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(parent, MoSLoRAAttention):
            return  # adapted with the attention that it is a part of
        if isinstance(parent, nn.MultiheadAttention) and parameter_name is None:
            raise UsageError(
                f"{current_key} is a part of a MultiheadAttention, which reads its weight and never calls it, so "
                f"an adapter on it would do nothing. Name {current_key.rpartition('.')[0]!r} in target_modules "
                f"to adapt both projections, or {target_name!r} in exclude_modules."
            )
        rank_key = get_pattern_key(config.rank_pattern.keys(), current_key)
        alpha_key = get_pattern_key(config.alpha_pattern.keys(), current_key)
        r = config.rank_pattern.get(rank_key, config.r)
        lora_alpha = config.alpha_pattern.get(alpha_key, config.lora_alpha)
        # A module of which several parameters are adapted has a layer around it for each.
        is_around_another = isinstance(target, ParamWrapper) and target.parameter_name != parameter_name
        own = config.of_module(current_key)
        if isinstance(target, MoSLoRALayer) and not is_around_another:
            target.update_layer(adapter_name, r, lora_alpha, own)
            self._tie(config, adapter_name, current_key, target)
            self._keep_why_unlike_lora(config, current_key, target)
            return
        if isinstance(target, BaseTunerLayer) and not is_around_another:
            raise UsageError(
                f"{current_key} already carries an adapter of another method ({type(target).__name__}); a "
                "second one inside it would see the first one's weights. Merge and unload that adapter first."
            )
        kwargs = get_quantization_kwargs(self)
        layer_class = find_layer_class(target)
        if parameter_name is not None:
            layer_class, kwargs["parameter_name"] = ParamWrapper, parameter_name
        if layer_class is None:
            raise TypeError(
                f"{current_key} is a {type(target).__module__}.{type(target).__name__}, which MoSLoRA cannot "
                f"adapt. It adapts {', '.join(kind.__name__ for kind in KINDS)} and quantized linear layers. "
                f"Leave the module out of target_modules, name {target_name!r} in exclude_modules, or train it "
                "whole through modules_to_save; a parameter that is not a module's weight goes into "
                "target_parameters."
            )
        if isinstance(target, Conv1D):
            config.fan_in_fan_out = True  # for readers of the configuration; the layer does not need it
        new_module = layer_class(target, adapter_name, config=own, r=r, lora_alpha=lora_alpha, **kwargs)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)  # an additional adapter is not trained until it is chosen
        self._replace_module(parent, target_name, new_module, target)
        self._tie(config, adapter_name, current_key, new_module)
        self._keep_why_unlike_lora(config, current_key, new_module)

    @staticmethod
    def _keep_why_unlike_lora(config: MoSLoRAConfig, module_name: str, layer: MoSLoRALayer) -> None:
        reason = layer.why_unlike_lora()
        if reason is not None:
            config.unlike_lora[module_name] = reason

    def _prepare_adapter_config(
        self, peft_config: MoSLoRAConfig, model_config: dict[str, Any]
    ) -> MoSLoRAConfig:
        """Name the targets as the installed transformers does, or take PEFT's list for the architecture.

        Transformers 5 holds the experts of some models as parameters. PEFT rewrites the names that older
        scripts use (Mixtral's ``w1``) for its LoRA alone; the rules are the same here.
        """
        convert_targets(peft_config, self.model, model_config.get("model_type"))
        known = model_config.get("model_type") in self.target_module_mapping
        if peft_config.target_modules is None and peft_config.target_parameters and not known:
            return peft_config
        return cast(MoSLoRAConfig, super()._prepare_adapter_config(peft_config, model_config))

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adapt the target modules; PEFT calls this for every adapter.

        Args:
            model: The base model.
            adapter_name: The adapter's name; its configuration is known by it.
            *args: As in PEFT's own.
            **kwargs: As in PEFT's own.

        Raises:
            TypeError: If a target module is of a kind that has no adapted layer.
            ValueError: If a target module cannot carry the adapter; the message names the way out.
        """
        names = (name for name, _ in model.named_modules())
        check_patterns(vars(self.peft_config[adapter_name]), names, "The configuration")
        problems = self._settings_that_do_not_fit(model, adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for problem in problems:
            warn(problem, UnfitSettingWarning, stacklevel=2)
        if compat_diffusers.is_of_diffusers(model):
            compat_diffusers.install()
        leave_fast_paths(model, lambda module: isinstance(module, MoSLoRALayer))
        warn_of_whole_factors(model, adapter_name)
        loftq.check_base(model, self.peft_config[adapter_name])
        self._tell_of_components(adapter_name)
        unlike_lora = self.peft_config[adapter_name].unlike_lora
        if unlike_lora:
            name, reason = next(iter(unlike_lora.items()))
            more = f" and {len(unlike_lora) - 1} more" if len(unlike_lora) > 1 else ""
            warn(
                f"{name!r}{more}: {reason}. The adapter trains and merges exactly, but cannot be exported as a "
                "plain LoRA; merge it into the base instead, or leave such modules out.",
                stacklevel=2,
            )

    def _tell_of_components(self, adapter_name: str) -> None:
        """Log how closely principal components were found, where they were searched for."""
        errors = [
            layer.component_errors[adapter_name]
            for layer in self.model.modules()
            if isinstance(layer, MoSLoRALayer) and layer.component_errors.get(adapter_name)
        ]
        if errors:
            tell_once(
                logger,
                "Principal components were found by a block Krylov method %s.",
                f"in {len(errors)} layers; their residual is at most {max(errors):.0e} of their norm",
            )

    def _settings_that_do_not_fit(self, model: nn.Module, adapter_name: str) -> list[str]:
        """Return what to warn of, and settle what two keys of a pattern say of one module."""
        config = self.peft_config[adapter_name]
        if config.is_saved:
            return []  # what it fits, the tensors of its file say
        found = [str(misfit) for misfit in find_misfits(config, model) if not misfit.is_harmless]
        settle_overlaps(config, model)
        return found

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Hold an adapter in float32, or all of it in the dtype that its layers gave to its factors.

        Warns:
            UserWarning: If a magnitude is going to be trained in 16 bits.
        """
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        layers = [module for module in self.modules() if isinstance(module, MoSLoRALayer)]
        held = {dora.cast_like_factors(layer, adapter_name) for layer in layers} - {None}
        narrow = [dtype for dtype in held if dtype is not None and is_narrow(dtype)]
        if narrow and not self.peft_config[adapter_name].inference_mode:
            warn(
                f"DoRA's magnitude is held in {narrow[0]}, as autocast_adapter_dtype=False asks for. Its entries are "
                "about as large as the norms of the base's rows, so most steps of training round to nothing there. "
                "Leave autocast_adapter_dtype out to train it in float32.",
                stacklevel=2,
            )

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = cast(nn.Module, super()._unload_and_optionally_merge(*args, **kwargs))
        restore_fast_paths(model)
        return model

    def _check_new_adapter_config(self, config: MoSLoRAConfig) -> None:
        """Refuse an adapter whose parameters would be nested otherwise than another's.

        Raises:
            ValueError: If two adapters target different parameters, or an argument is set that cannot be used.
        """
        super()._check_new_adapter_config(config)
        config.check_arguments()  # again, for what was set after it was made
        targets = {
            name: sorted(other.target_parameters)
            for name, other in self.peft_config.items()
            if other.target_parameters
        }
        if len({tuple(names) for names in targets.values()}) > 1:
            raise UsageError(
                "All adapters that use target_parameters must name the same ones, because a tensor's name in "
                f"the file tells its parameter by the nesting; found {targets}."
            )

    def _add_targets_to_tie(self, peft_config: MoSLoRAConfig, tied_weight_keys: list[str]) -> None:
        """Let the embedding be adapted, and the modules that share its weight have its factors.

        Raises:
            ValueError: If the adapter has what cannot be shared.
        """
        if peft_config.use_dora:
            raise UsageError(
                "ensure_weight_tying with use_dora=True cannot tie the adapters of the embedding and "
                f"{sorted(tied_weight_keys)}: a magnitude goes along the outputs, which are the one's inputs. Set "
                "use_dora=False, or adapt one of the two and set ensure_weight_tying=False."
            )
        # Where a former adapter is, PEFT names the layer inside; its LoRA leaves the second adapter untied (seen 0.21).
        names = [name.removesuffix(".base_layer") for name in tied_weight_keys]
        super()._add_targets_to_tie(peft_config, names)

    def _tie(self, config: MoSLoRAConfig, adapter_name: str, key: str, layer: MoSLoRALayer) -> None:
        """Tie a layer's adapter to the embedding's, if the configuration has that.

        Raises:
            ValueError: If the embedding has no such adapter.
        """
        ties = getattr(config, "target_modules_to_tie", None) or ()
        if not any(key == name or key.endswith(f".{name}") for name in ties):
            return
        source = self.model.get_input_embeddings()
        if not isinstance(source, MoSLoRAEmbedding) or adapter_name not in source.scaling:
            raise UsageError(
                f"{key} cannot be tied to the adapter of the embedding, a {type(source).__name__} that has none. Take "
                "the embedding out of exclude_modules, or set ensure_weight_tying=False."
            )
        layer.tie(adapter_name, source, config)

    def _check_merge_allowed(self) -> None:
        """Refuse to merge into a weight that two modules share, or of which each process holds a part.

        Raises:
            RuntimeError: If a parameter is sharded.
            ValueError: If a target module's weight is tied to the embedding, or a bias has none to go to.
        """
        check_mergeable_when_sharded(self.model)
        layers = [module for module in self.model.modules() if isinstance(module, MoSLoRALayer)]
        bias.check_mergeable(layers, self.active_adapters)
        tied = self._get_tied_target_modules(self.model)
        if tied and not self._are_tied():
            raise UsageError(
                f"Cannot merge: {sorted(tied)} shares its weight with another module, so merging would "
                "change both, or untie them without a word. Untie the base first (load it with "
                "tie_word_embeddings=False, copy the embedding into the head), or leave the adapter as it is."
            )

    def _are_tied(self) -> bool:
        """Tell whether every adapter of the embedding is also the adapter of all that shares its weight."""
        source = self.model.get_input_embeddings()
        if not isinstance(source, MoSLoRAEmbedding):
            return False
        inside = {id(m.get_base_layer()) for m in self.modules() if isinstance(m, MoSLoRALayer)}
        sharing = [
            module
            for module in self.modules()
            if getattr(module, "weight", None) is source.weight
            and module is not source
            and id(module) not in inside
        ]
        return all(
            isinstance(m, MoSLoRALayer) and m.tied.keys() == m.scaling.keys() == source.scaling.keys()
            for m in sharing
        )

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Hand the adapter of each row to every layer, for as long as the model runs.

        Raises:
            ValueError: If ``adapter_names`` was passed and cannot be obeyed.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        check_names(self, names)
        with handing_over(self, self.model, names, kwargs.get("num_beams") or 1):
            yield

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter whose ΔW is the weighted sum of others'.

        The sum is taken of ΔW, never of the factors, so a single adapter at weight 1 comes back as it is.

        Args:
            adapters: Names of adapters of this model.
            weights: A factor for each, unitless; may be negative.
            adapter_name: Name of the new adapter; it is not made active.
            combination_type: ``"cat"`` (or ``"linear"``, the same here): exact, ranks add up. ``"svd"``: the
                nearest sum of a rank. ``"magnitude_prune"``, ``"ties"`` (arXiv:2306.01708), ``"dare_linear"`` and
                ``"dare_ties"`` (arXiv:2311.03099) prune each ΔW entry by entry first, and take the nearest matrix of
                a rank to what comes out; with ``"_svd"`` behind them they are the same here. DARE draws from torch's
                generator.
            svd_rank: Rank of what is nearest; the largest of the adapters' if None.
            svd_clamp: Refused unless None, because clipped factors are not the nearest any more.
            svd_full_matrices: Ignored: singular vectors beyond the rank are not used.
            svd_driver: Refused unless None; torch chooses.
            density: Share of the entries of each ΔW that are kept, in (0, 1], for what prunes.
            majority_sign_method: For ``"ties"`` and ``"dare_ties"``, what elects the sign of an entry: ``"total"``, its
                sum, or ``"frequency"``, the number of adapters.

        Raises:
            ValueError: If the sum cannot be had; the message names the way out. The model is as before then.
        """
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown:
            raise UsageError(f"adapters has {unknown[0]!r}; the model has {sorted(self.peft_config)}.")
        if adapter_name in self.peft_config:
            raise UsageError(f"The model has an adapter {adapter_name!r} already. Choose another name.")
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, MoSLoRALayer)}
        check_summable(adapters, self.peft_config, layers)
        for name, value in (("svd_clamp", svd_clamp), ("svd_driver", svd_driver)):
            if value is not None:
                raise UsageError(f"{name}={value!r} cannot be used: {REFUSED_IN_SUMS[name]}")
        how = How(combination_type, svd_rank, density, majority_sign_method)
        combined = combine_factors(layers, adapters, weights, how)
        ranks = {path: factors.A.shape[0] for path, factors in combined.items()}
        # What is inside an attention is adapted with it, and is not a target of its own.
        inside = {
            f"{path}.base_layer.out_proj"
            for path, layer in layers.items()
            if isinstance(layer, MoSLoRAAttention)
        }
        patterns = {exact_pattern(path): r for path, r in ranks.items() if path not in inside}
        tied = [{path for path, layer in layers.items() if name in layer.tied} for name in adapters]
        self.peft_config[adapter_name] = replace(
            self.peft_config[adapters[0]],
            r=max(ranks.values()),
            lora_alpha=max(ranks.values()),
            rank_pattern=patterns,
            alpha_pattern=dict(patterns),  # alpha = r, so the scale is 1
            use_rslora=False,
            target_modules=set(ranks) - inside,
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            mixer="identity",
            train_mixer=True,
            match_scale=False,
            init_lora_weights=True,
            inference_mode=True,
            unlike_lora={},
            lora_bias=any(self.peft_config[name].lora_bias for name in adapters),
            eva_config=None,
            loftq_config={},
            ensure_weight_tying=bool(tied[0]) and all(paths == tied[0] for paths in tied),
        )
        try:
            self.inject_adapter(self.model, adapter_name)
            got = {n: m.r[adapter_name] for n, m in layers.items() if adapter_name in m.r}
            if got != ranks:
                raise UsageError(
                    f"The name of {(sorted(got.keys() ^ ranks.keys()) or sorted(ranks))[0]!r} fits other modules "
                    "too, so that a configuration cannot tell them apart. Give the module another name."
                )
            for path, factors in combined.items():
                if adapter_name not in layers[path].tied:
                    layers[path].set_factors(adapter_name, factors.A, factors.M, factors.B, factors.bias)
        except BaseException:
            self.delete_adapter(adapter_name)
            raise

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: MoSLoRAConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Select what belongs to an adapter, whole: PEFT would hand on the shards of a sharded model.

        Raises:
            RuntimeError: If factors are parts of factors, which cannot be gathered here.
        """
        gather_beside(model, state_dict)
        selected: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, *args, **kwargs
        )
        selected = tensors_for_file(model, adapter_name, state_dict, selected)
        compat_diffusers.remember(selected, config)
        config.note_saving()
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MoSLoRAConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check a checkpoint against the model before anything is loaded, then rename its keys.

        Raises:
            AdapterError: If a factor is missing, left over, of the wrong shape, or not finite.
        """
        state_dict, problems = tensors_from_file(
            model,
            adapter_name,
            compat_diffusers.restore_mixers(state_dict),
            cls._remove_adapter_name_from_key,
        )
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        return check_fit(model, adapter_name, remapped, problems)
