"""Making a type of adapter known to PEFT.

PEFT's own ``register_peft_method`` takes members of its closed enum alone (seen 0.18 to 0.21.2), so the entries are put
into its tables. Without them PEFT raises "Unknown PEFT type". It can go when PEFT's enum is open.
"""

from __future__ import annotations

from collections.abc import Iterable

import peft.mapping
from peft.utils import hotswap

__all__ = ["register_type"]


def register_type(
    peft_type: str, config_class: type, tuner_class: type, prefix: str, hotswap_keys: Iterable[str]
) -> None:
    """Enter a type into PEFT's tables (0.18 to 0.21.2). Calling it again changes nothing.

    Args:
        peft_type: Its name, a string that is a member of an enum.
        config_class: Its configuration.
        tuner_class: What puts its layers into a model.
        prefix: Of the names of its layers' parameters.
        hotswap_keys: Fields of the configuration that must agree where one adapter takes another's place.
    """
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_class
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner_class
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = prefix
    hotswap.CONFIG_KEYS_TO_CHECK[peft_type] = list(hotswap_keys)
