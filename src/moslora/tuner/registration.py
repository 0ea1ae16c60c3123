"""Making PEFT know the type MOSLORA; ``import moslora`` does it."""

from __future__ import annotations

from moslora.compat.peft.patches import OwnMethods, patch
from moslora.compat.peft.registration import register_type
from moslora.tuner import eva, loftq, swapping
from moslora.tuner.config import MoSLoRAConfig, MoSLoRAType
from moslora.tuner.layer import MoSLoRALayer
from moslora.tuner.model import MoSLoRAModel
from moslora.tuner.names import MAGNITUDE, MAGNITUDE_IN_OLD_FILES, PREFIX

__all__ = ["OWN_METHODS", "register"]

OWN_METHODS = OwnMethods(
    config_class=MoSLoRAConfig,
    layer_class=MoSLoRALayer,
    swap=swapping.swap,
    load_in_place=swapping.load,
    widen=swapping.widen,
    put_components=eva.put_components,
    takes_components=eva.has_components,
    start_from_loftq=loftq.replace_lora_weights_loftq,
    magnitude_names=(MAGNITUDE_IN_OLD_FILES, MAGNITUDE),
)


def register() -> None:
    """Make PEFT know MOSLORA. Calling it again changes nothing."""
    patch(OWN_METHODS)
    register_type(MoSLoRAType.MOSLORA, MoSLoRAConfig, MoSLoRAModel, PREFIX, swapping.CHECKED)
