"""MoSLoRAModel: puts adapted layers in the place of a model's own, and registers the method with PEFT."""

from __future__ import annotations

import contextlib
import difflib
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import peft.mapping
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, hotswap
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moslora.adapters.factors import exact_pattern
from moslora.compat import diffusers as compat_diffusers
from moslora.compat import peft as compat
from moslora.tuner import bias, dora, loftq, swapping
from moslora.tuner.attention import MoSLoRAAttention, leave_fast_paths, restore_fast_paths
from moslora.tuner.config import MoSLoRAConfig, MoSLoRAType
from moslora.tuner.embedding import MoSLoRAEmbedding
from moslora.tuner.experts import ParamWrapper
from moslora.tuner.held_mixer import STARTS, MixerStart, for_file, from_file, is_narrow
from moslora.tuner.kinds import KINDS, find_layer_class
from moslora.tuner.layer import MoSLoRALayer
from moslora.tuner.patches import patch
from moslora.tuner.sharding import (
    check_mergeable,
    check_whole,
    gather,
    shard_like,
    sharded_parameters,
    warn_of_whole_factors,
)
from moslora.tuner.weighted import REFUSED_IN_SUMS, How, combine

__all__ = ["MoSLoRAModel", "register"]

PREFIX = "moslora_"


class MoSLoRAModel(compat.Tuner):  # type: ignore[misc]
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
            raise ValueError(
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
        if isinstance(target, MoSLoRALayer) and not is_around_another:
            target.update_layer(adapter_name, r, lora_alpha, config)
            self._tie(config, adapter_name, current_key, target)
            self._keep_why_unlike_lora(config, current_key, target)
            return
        if isinstance(target, BaseTunerLayer) and not is_around_another:
            raise ValueError(
                f"{current_key} already carries an adapter of another method ({type(target).__name__}); a "
                "second one inside it would see the first one's weights. Merge and unload that adapter first."
            )
        kwargs = compat.get_quantization_kwargs(self)
        layer_class = find_layer_class(target)
        if parameter_name is not None:
            layer_class, kwargs["parameter_name"] = ParamWrapper, parameter_name
        if layer_class is None:
            raise TypeError(
                f"{current_key} is a {type(target).__module__}.{type(target).__name__}, which MoSLoRA cannot "
                f"adapt. It adapts {', '.join(kind.__name__ for kind in KINDS)} and quantised linear layers. "
                f"Leave the module out of target_modules, name {target_name!r} in exclude_modules, or train it "
                "whole through modules_to_save; a weight that is no module of its own goes into "
                "target_parameters."
            )
        if isinstance(target, Conv1D):
            config.fan_in_fan_out = True  # for who reads the configuration; the layer knows by itself
        new_module = layer_class(target, adapter_name, config=config, r=r, lora_alpha=lora_alpha, **kwargs)
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
        compat.convert_targets(peft_config, self.model, model_config.get("model_type"))
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
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if compat_diffusers.is_of_diffusers(model):
            compat_diffusers.install()
        leave_fast_paths(model)
        warn_of_whole_factors(model, adapter_name)
        loftq.check_base(model, self.peft_config[adapter_name])
        unlike_lora = self.peft_config[adapter_name].unlike_lora
        if unlike_lora:
            name, reason = next(iter(unlike_lora.items()))
            more = f" and {len(unlike_lora) - 1} more" if len(unlike_lora) > 1 else ""
            warnings.warn(
                f"{name!r}{more}: {reason}. The adapter trains and merges exactly, but cannot be exported as a "
                "plain LoRA; merge it into the base instead, or leave such modules out.",
                stacklevel=2,
            )

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
            warnings.warn(
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
            raise ValueError(
                "All adapters that use target_parameters must name the same ones, because a tensor's name in "
                f"the file tells its parameter by the nesting; found {targets}."
            )

    def _add_targets_to_tie(self, peft_config: MoSLoRAConfig, tied_weight_keys: list[str]) -> None:
        """Let the embedding be adapted, and the modules that share its weight have its factors.

        Raises:
            ValueError: If the adapter has what cannot be shared.
        """
        if peft_config.use_dora:
            raise ValueError(
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
            raise ValueError(
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
        check_mergeable(self.model)
        layers = [module for module in self.model.modules() if isinstance(module, MoSLoRALayer)]
        bias.check_mergeable(layers, self.active_adapters)
        tied = self._get_tied_target_modules(self.model)
        if tied and not self._are_tied():
            raise ValueError(
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
        self._check_mixed_batch(names)
        beams = kwargs.get("num_beams") or 1
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        # An encoder sees each row once, its decoder once per beam. Some models without one name themselves.
        once = set(encoder.modules()) if encoder is not None and encoder is not self.model else set()
        repeated = [name for name in names for _ in range(beams)]

        def hand_over(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            return args, {**kwargs, "adapter_names": names if module in once else repeated}

        handles = [
            module.register_forward_pre_hook(hand_over, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, MoSLoRALayer | AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_mixed_batch(self, names: Any) -> None:
        """Refuse a mixed batch that some layer would run wrongly.

        Raises:
            ValueError: With the reason and the way out.
        """
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"adapter_names must be a list of names, one per row of the batch; got {names!r}."
            )
        if self.training:
            raise ValueError("adapter_names is for inference; call eval(), or train one adapter at a time.")
        layers = [module for module in self.modules() if isinstance(module, MoSLoRALayer)]
        known = {name for layer in layers for name in layer.scaling}
        unknown = sorted(set(names) - known - {"__base__"})
        if unknown:
            raise ValueError(
                f"adapter_names has {unknown[0]!r}; the model has {sorted(known)}, and '__base__' for none."
            )
        whole = [layer for layer in layers if not layer.is_rowwise and set(names) & set(layer.scaling)]
        if whole:
            raise ValueError(
                f"adapter_names cannot be served: the weight of a {type(whole[0].get_base_layer()).__name__} is "
                "adapted as a whole, for all rows alike. Split the batch and call set_adapter for each part."
            )

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
            raise ValueError(f"adapters has {unknown[0]!r}; the model has {sorted(self.peft_config)}.")
        if adapter_name in self.peft_config:
            raise ValueError(f"The model has an adapter {adapter_name!r} already. Choose another name.")
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, MoSLoRALayer)}
        self._check_summable(adapters, layers)
        for name, value in (("svd_clamp", svd_clamp), ("svd_driver", svd_driver)):
            if value is not None:
                raise ValueError(f"{name}={value!r} cannot be used: {REFUSED_IN_SUMS[name]}")
        how = How(combination_type, svd_rank, density, majority_sign_method)
        combined = combine(layers, adapters, weights, how)
        ranks = {path: factors.A.shape[0] for path, factors in combined.items()}
        # What is inside an attention is adapted with it, and is no target of its own.
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
                raise ValueError(
                    f"The name of {(sorted(got.keys() ^ ranks.keys()) or sorted(ranks))[0]!r} fits other modules "
                    "too, so that a configuration cannot tell them apart. Give the module another name."
                )
            for path, factors in combined.items():
                if adapter_name not in layers[path].tied:
                    layers[path].set_factors(adapter_name, factors.A, factors.M, factors.B, factors.bias)
        except BaseException:
            self.delete_adapter(adapter_name)
            raise

    def _check_summable(self, adapters: list[str], layers: dict[str, MoSLoRALayer]) -> None:
        """Refuse to sum what is more than factors, or factors that cannot be laid side by side.

        Raises:
            ValueError: With the way out.
        """
        for name in adapters:
            config = self.peft_config[name]
            if config.bias != "none" or config.modules_to_save or config.trainable_token_indices:
                raise ValueError(
                    f"Adapter {name!r} trains more than factors (bias, modules_to_save or "
                    "trainable_token_indices), of which a weighted sum has no meaning. Combine others."
                )
            if config.use_dora:
                raise ValueError(
                    f"Adapter {name!r} has DoRA's magnitude, so its change of the weight is no product of factors, and "
                    "the sum would be none either. Activate the adapters together (set_adapter with a list), which "
                    "adds their changes exactly, or merge them."
                )
        for path, layer in layers.items():
            grouped = getattr(layer.get_base_layer(), "groups", 1) != 1
            if set(adapters) & set(layer.scaling) and (isinstance(layer, ParamWrapper) or grouped):
                raise ValueError(
                    f"{path}: the factors of a {type(layer.get_base_layer()).__name__} cannot be laid side by "
                    "side here. Leave such modules out of the adapters, or let the adapters run together: "
                    f"model.base_model.set_adapter({adapters})."
                )

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
        if sharded_parameters(model):
            # What PEFT itself takes after this: modules trained whole, and embeddings that are targets.
            beside = tuple(
                f"{name}."
                for name, module in model.named_modules()
                if isinstance(module, AuxiliaryTrainingWrapper | MoSLoRAEmbedding)
            )
            state_dict.update(gather(state_dict, [key for key in state_dict if key.startswith(beside)]))
        selected: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, *args, **kwargs
        )
        if sharded_parameters(model):
            selected.update(gather(selected, selected))
        # With bias="all" PEFT takes every bias along, also those on other adapters' B.
        on_B = re.compile(rf"\.moslora_B\.(?!{re.escape(adapter_name)}\.bias$).*\.bias$")
        selected = {key: tensor for key, tensor in selected.items() if not on_B.search(key)}
        live = {name: start.weight for name, start in _starts(model).items()}
        selected = for_file(selected, {name: {**live, **state_dict, **selected}[name] for name in live})
        check_whole(selected)
        for name, source_name, transposed in _ties(model, adapter_name):
            value = selected[source_name]
            selected[name] = (value.T if transposed else value).clone(memory_format=torch.contiguous_format)
        compat_diffusers.remember(selected, config)
        config.note_saving()
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MoSLoRAConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check a checkpoint against the model before anything is loaded, then rename its keys.

        PEFT only warns of factors that are missing and says nothing of ones that fit no module; both leave
        a model that runs and is wrong.

        Raises:
            ValueError: If a factor is missing, left over, of the wrong shape, or not finite. A wrong shape is refused
                when it is loaded, because PEFT takes such tensors out in between for ``ignore_mismatched_sizes=True``,
                and warns of them.
        """
        state_dict = {
            key.replace(f".{dora.IN_OLD_FILES}.", f".{dora.HELD}."): t
            for key, t in compat_diffusers.restore_mixers(state_dict).items()
        }
        differing = _take_ties_out(
            state_dict,
            [
                (*(cls._remove_adapter_name_from_key(name, adapter_name) for name in names), transposed)
                for *names, transposed in _ties(model, adapter_name)
            ],
        )
        own = {cls._remove_adapter_name_from_key(name, adapter_name): s for name, s in _starts(model).items()}
        own = {name: start for name, start in own.items() if name.endswith(f".{STARTS}.weight")}
        weights = (
            {cls._remove_adapter_name_from_key(n, adapter_name): p for n, p in model.named_parameters()}
            if own
            else {}
        )
        state_dict = from_file(state_dict, own, weights)
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        factor = re.compile(rf"\.{PREFIX}\w+\.{re.escape(adapter_name)}(\.|$)")
        expected = {key: value for key, value in model.state_dict().items() if factor.search(key)}
        found = {key: value for key, value in remapped.items() if f".{PREFIX}" in key}
        problems = [f"{key}: missing from the checkpoint" for key in expected.keys() - found.keys()]
        problems += differing
        mismatched: dict[str, str] = {}
        for key, tensor in found.items():
            if key not in expected:
                near = difflib.get_close_matches(key, expected, n=1)
                problems.append(f"{key}: fits no adapted module" + (f" (nearest: {near[0]})" if near else ""))
            elif tensor.shape != expected[key].shape:
                mismatched[key] = (
                    f"{key}: is {tuple(tensor.shape)}, the model needs {tuple(expected[key].shape)}"
                )
            elif not tensor.is_meta and not torch.isfinite(tensor).all():
                problems.append(f"{key}: has NaN or infinite values")
        if problems:
            raise _misfit([*problems, *mismatched.values()])
        if mismatched:
            _refuse_to_load(model, mismatched)
        return (
            {**remapped, **shard_like(remapped, sharded)}
            if (sharded := sharded_parameters(model))
            else remapped
        )


def _ties(model: nn.Module, adapter_name: str) -> list[tuple[str, str, bool]]:
    """Return the tensors that a file has of tied layers: the name, that of the tensor it is, and whether transposed."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = []
    for path, layer in model.named_modules():
        if not isinstance(layer, MoSLoRALayer) or adapter_name not in layer.tied:
            continue
        source = layer.tied[adapter_name][0]
        transposed = layer._is_transposed(source)
        of_source = source.adapter_layer_names[:3]
        for own, others in zip(
            layer.adapter_layer_names[:3], reversed(of_source) if transposed else of_source, strict=True
        ):
            suffix = "" if layer.container is nn.ParameterDict else ".weight"
            found.append(
                (
                    f"{path}.{own}.{adapter_name}{suffix}",
                    f"{paths[id(source)]}.{others}.{adapter_name}",
                    transposed,
                )
            )
    return found


def _take_ties_out(tensors: dict[str, Tensor], ties: list[Any]) -> list[str]:
    """Take tensors of tied layers out of a checkpoint, and tell which are not what they are tied to."""
    problems = []
    for name, source_name, transposed in ties:
        own, source = tensors.pop(name, None), tensors.get(source_name)
        if own is None or source is None:
            continue
        if not torch.equal(own.to(source.dtype), source.T if transposed else source):
            problems.append(
                f"{name}: is not {source_name}, to which it is tied; the adapter was saved with "
                "ensure_weight_tying=False, so load it so"
            )
    return problems


def _misfit(problems: list[str]) -> ValueError:
    """Make the error of an adapter that does not fit its model."""
    shown = "\n  ".join(sorted(problems)[:5])
    rest = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
    return ValueError(
        f"The adapter does not fit this model; nothing was loaded.\n  {shown}{rest}\n"
        "Load it on the base model that its adapter_config.json names."
    )


def _refuse_to_load(model: nn.Module, mismatched: dict[str, str]) -> None:
    """Let the next state dict that is loaded fail, before anything is copied, if it has one of these tensors."""

    def refuse(_: nn.Module, state_dict: dict[str, Any], *__: Any) -> None:
        handle.remove()
        left = [
            reason
            for key, reason in mismatched.items()
            if key in state_dict or key.removeprefix("base_model.model.") in state_dict
        ]
        if left:
            raise _misfit(left)

    root: Any = model
    handle = root.register_load_state_dict_pre_hook(refuse)


def _starts(model: nn.Module) -> dict[str, MixerStart]:
    """Return the starts of split mixers by the names of their tensors."""
    return {
        f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, MixerStart)
    }


def register() -> None:
    """Make PEFT know MOSLORA; ``import moslora`` does it. Calling it again changes nothing."""
    patch()
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[MoSLoRAType.MOSLORA] = MoSLoRAConfig
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[MoSLoRAType.MOSLORA] = MoSLoRAModel
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[MoSLoRAType.MOSLORA] = PREFIX
    hotswap.CONFIG_KEYS_TO_CHECK[MoSLoRAType.MOSLORA] = list(swapping.CHECKED)
