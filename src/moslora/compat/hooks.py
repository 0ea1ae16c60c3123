"""Private methods of upstream classes that this package's classes override, and those that they call.

``tests/test_compat.py`` compares both tables with the code: a method that ``tuner`` or ``core`` overrides or calls and
that is missing here is an error. Seen in PEFT 0.18 to 0.21.2 and torch 2.6 to 2.13. An entry can go when the library
has a public name for it.
"""

from __future__ import annotations

__all__ = ["CALLED", "OVERRIDDEN"]

# Class → method → what it is called for.
OVERRIDDEN: dict[str, dict[str, str]] = {
    "peft.tuners.tuners_utils.BaseTuner": {
        "_add_targets_to_tie": "ensure_weight_tying; PEFT 0.19 and later",
        "_cast_adapter_dtype": "after an adapter was made or loaded",
        "_check_merge_allowed": "before merging",
        "_check_new_adapter_config": "before an adapter is made",
        "_create_and_replace": "for each target; abstract in PEFT",
        "_enable_peft_forward_hooks": "around each forward and generate, for adapter_names",
        "_get_adapter_state_dict": "when an adapter is saved; PEFT 0.21 and later, and state_dict.py before",
        "_prepare_adapter_config": "before targets are looked for",
        "_remap_adapter_state_dict_for_load": "when an adapter is loaded; likewise",
        "_unload_and_optionally_merge": "unload() and merge_and_unload()",
    },
    "peft.tuners.tuners_utils.BaseTunerLayer": {
        "_move_adapter_to_device_of_base_layer": "when an adapter was made",
    },
    "peft.config.PeftConfig": {
        # PEFT's LoraConfig has both, and asks a configuration that is taken for one.
        "_custom_modules": "by LoraModel, which must not run this adapter",
        "_register_custom_module": "by users, for layers of their own",
    },
    "torch.nn.Module": {
        "_apply": "by .to(), .half(), .cuda() and sharding",
        "_load_from_state_dict": "by load_state_dict, for each module",
    },
}
CALLED: dict[str, dict[str, str]] = {
    "peft.tuners.tuners_utils.BaseTuner": {
        "_get_tied_target_modules": "targets whose weight is tied to the embedding's",
        "_remove_adapter_name_from_key": "a tensor's name in a file",
        "_replace_module": "puts an adapted layer in a module's place; LoraModel's, see base_tuner.py",
    },
    "peft.tuners.tuners_utils.BaseTunerLayer": {
        "_active_adapter": "the adapter that is active at first",
        "_cast_input_dtype": "an input in the dtype of a factor, unless the user switched that off",
        "_disable_adapters": "state that PEFT reads",
        "_get_embed_scale": "the factor by which Gemma's embeddings multiply their rows",
        "_move_adapter_to_device_of_base_layer": "a new adapter's device and dtype",
    },
    "torch.nn.Module": {
        "_modules": "modules by name, without an error where there is none",
    },
}
