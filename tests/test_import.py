from __future__ import annotations

import subprocess
import sys

import pytest

import moslora

# However the two come together, PEFT knows the method once both are imported.
ORDERS = {
    "moslora first": "import moslora, peft",
    "peft first": "import peft, moslora",
    "a public name only": "from moslora import MoSLoRAConfig",
    "a part of peft": "import moslora; from peft.config import PeftConfig",
    "PEFT looked for before": "import moslora, importlib.util as u; u.find_spec('peft'); import peft",
    "transformers in between": "import moslora, transformers.integrations.peft, peft",
}


@pytest.mark.parametrize("order", ORDERS)
def test_importing_registers_with_peft(order: str) -> None:
    script = (
        f"{ORDERS[order]}\n"
        "import peft.mapping as m\n"
        "assert m.PEFT_TYPE_TO_CONFIG_MAPPING['MOSLORA'].__name__ == 'MoSLoRAConfig'\n"
        "assert m.PEFT_TYPE_TO_TUNER_MAPPING['MOSLORA'].__name__ == 'MoSLoRAModel'\n"
        "assert m.PEFT_TYPE_TO_PREFIX_MAPPING['MOSLORA'] == 'moslora_'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_importing_alone_loads_nothing_heavy() -> None:
    script = "import moslora, sys; assert not {'torch', 'peft', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_public_names_are_sorted_present_and_documented() -> None:
    assert moslora.__all__ == sorted(moslora.__all__)
    for name in moslora.__all__:
        assert getattr(moslora, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'MoSLoRA'"):
        moslora.MoSLoRA  # noqa: B018
