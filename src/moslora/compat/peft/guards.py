"""Every place of PEFT that asks for a type or class of LoRA, and what this package does about it.

For a MoSLoRA adapter the answer is no, so that what LoRA is refused, spared or warned of would pass it by.
``tests/test_guards.py`` reads the installed PEFT and fails where it asks at a place that is not here. Seen in PEFT 0.18
to 0.21.2. An entry can go when PEFT asks for what a tuner can do instead of what it is called.
"""

from __future__ import annotations

__all__ = ["ASKED", "MODULES", "OF_OTHER_METHODS"]

# The files that are read; the tuners' own folders hold what is run for their own adapters alone.
MODULES = ("*.py", "utils/*.py", "tuners/tuners_utils.py", "tuners/lora/eva.py", "tuners/lora/conversion.py")
# Types whose questions concern no other adapter: a place that asks for these alone is passed over.
OF_OTHER_METHODS = (
    *("PREFIX_TUNING", "CARTRIDGE", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "CPT", "POLY"),
    *("UNILORA", "IA3", "XLORA", "TRAINABLE_TOKENS", "VBLORA", "RANDLORA", "SHIRA", "OSF", "TINYLORA"),
)
# File and function → what it does for LoRA, and what is done here.
ASKED = {
    "config.py:PeftConfigMixin.from_peft_type": "wants a registered type; registration.py registers it",
    "helpers.py:rescale_adapter_scale": "scales LoRA's layers; layer.py answers for its own (patches.py)",
    "helpers.py:MontecloraTrainerMixin.compute_loss": "adds MonteCLoRA's loss; refused.py refuses it",
    "mapping.py:inject_adapter_in_model": "wants a registered type; registration.py registers it",
    "mapping_func.py:get_peft_model": "advises low_cpu_mem_usage for an EVA start; advice only",
    "mixed_model.py:_check_config_compatible": "refuses what is not known to mix; refused, as it should be",
    "mixed_model.py:PeftMixedModel.from_pretrained": "the same",
    "peft_model.py:PeftModel.save_pretrained": "converts PiSSA's and OLoRA's start when saving; refused by PEFT for a "
    "tuner that does not do it, and needless, because the base keeps its weights",
    "peft_model.py:PeftModel.add_adapter": "refuses a second adapter of another type; so it is",
    "peft_model.py:PeftModel._get_peft_specific_model_tags": "tags a model card with lora; only a plain LoRA is one",
    "peft_model.py:PeftModel.create_or_update_model_card": "the same, in PEFT before 0.21",
    "tuners/lora/conversion.py:convert_to_lora": "warns of a LoRA that is converted to LoRA; there is moslora export",
    "tuners/lora/eva.py:_load_eva_state_dict": "writes EVA's start into LoRA's layers; eva.py does for its own",
    "tuners/tuners_utils.py:_check_lora_target_modules_mamba": "refuses modules whose weights Mamba reads past their "
    "forward; asked here as of a LoRA (base_tuner.py)",
    "utils/hotswap.py:_convert_scalings_to_tensor": "makes LoRA's scales tensors; swapping.py does for its own",
    "utils/hotswap.py:check_hotswap_configs_compatible": "wants a known type; registration.py enters it",
    "utils/peft_types.py:register_peft_method": "wants a name of PEFT's enum; registration.py does without it",
    "utils/save_and_load.py:get_peft_model_state_dict": "warns of factors that are shards; sharding.py refuses them",
    "utils/save_and_load.py:_maybe_shard_state_dict_for_tp": "shards LoRA's factors for old transformers; "
    "sharding.py shards its own as the base is, and refuses what it cannot",
    "utils/save_and_load.py:set_peft_model_state_dict": "wants a registered type; registration.py registers it",
    "utils/transformers_weight_conversion.py:build_peft_weight_mapping": "wants a registered prefix; it is",
    "utils/transformers_weight_conversion.py:convert_peft_config_for_transformers": "renames targets that became "
    "parameters in transformers 5; compat/transformers.py does",
    "utils/transformers_weight_conversion.py:convert_peft_adapter_state_dict_for_transformers": "renames its tensors "
    "of transformers 4; state_dict.py refuses them, because they do not fit",
}
