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


# One process for all, forked where what both need is there, and neither PEFT, transformers nor this package is.
IN_EACH_ORDER = """
import os, sys
import accelerate, torch._dynamo, torch.distributed.tensor
assert not {'moslora', 'peft', 'transformers'} & sys.modules.keys()
failed = []
for order in sys.argv[1:]:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            exec(order)
            import peft.mapping as m
            assert m.PEFT_TYPE_TO_CONFIG_MAPPING['MOSLORA'].__name__ == 'MoSLoRAConfig'
            assert m.PEFT_TYPE_TO_TUNER_MAPPING['MOSLORA'].__name__ == 'MoSLoRAModel'
            assert m.PEFT_TYPE_TO_PREFIX_MAPPING['MOSLORA'] == 'moslora_'
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(order)
print(*failed, sep='\\n')
"""


def test_importing_registers_with_peft() -> None:
    command = [sys.executable, "-c", IN_EACH_ORDER, *ORDERS.values()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not done.stdout.split(), done.stderr


def test_importing_alone_loads_nothing_heavy() -> None:
    script = "import moslora, sys; assert not {'torch', 'peft', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_public_names_are_sorted_present_and_documented() -> None:
    assert moslora.__all__ == sorted(moslora.__all__)
    for name in moslora.__all__:
        assert getattr(moslora, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'MoSLoRA'"):
        moslora.MoSLoRA  # noqa: B018
