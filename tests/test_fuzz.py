"""Damaged adapters and bases through every verb: a message or a proven result, never a traceback, never half a file.

``MOSLORA_FUZZ=20000 pytest tests/test_fuzz.py`` tries that many; a few hundred run with the other tests.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

import tiny
from moslora import MoSLoRAConfig
from moslora.adapters.combine import combine
from moslora.adapters.doctor import diagnose
from moslora.adapters.export import export_adapter
from moslora.adapters.inspection import inspect_adapter
from moslora.adapters.merge import merge
from moslora.errors import AdapterError, ModelError, ProofError

COUNT = int(os.environ.get("MOSLORA_FUZZ", "240"))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ODD = (
    None,
    True,
    -1,
    0,
    10**30,
    1e308,
    float("nan"),
    "",
    "x",
    "../../x",
    [],
    {},
    [None],
    {"a": {}},
    [[1]],
    "(" * 40,
)

Chance = random.Random


def overwrite(file: Path, chance: Chance) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(min(len(data), chance.choice((16, 2000, 10**9))))] = chance.randrange(256)
    file.write_bytes(bytes(data))


def cut(file: Path, chance: Chance) -> None:
    file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])


def append(file: Path, chance: Chance) -> None:
    file.write_bytes(file.read_bytes() + chance.randbytes(chance.randint(1, 99)))


def lie(file: Path, chance: Chance) -> None:
    """Change what a safetensors header says of a tensor."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = chance.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    key, value = chance.choice(
        (
            ("shape", [10**12, 10**12]),
            ("shape", [0]),
            ("shape", [-1, 4]),
            ("shape", entry["shape"][::-1]),
            ("shape", []),
            ("shape", [math_product(entry["shape"])]),
            ("dtype", chance.choice(("F16", "BF16", "F64", "I32", "BOOL", "F8_E4M3", "C64", "X"))),
            ("data_offsets", [0, 10**15]),
            ("data_offsets", entry["data_offsets"][::-1]),
            ("data_offsets", None),
        )
    )
    entry[key] = value
    if chance.random() < 0.3:
        header[chance.choice(("../../x", "", name + ".weight", name.upper(), "a\x00b"))] = header.pop(name)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def math_product(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())


def retensor(file: Path, chance: Chance) -> None:
    """Drop, rename, reshape or replace whole tensors; the file itself is sound."""
    tensors = load_file(file)
    for _ in range(chance.randint(1, 3)):
        name = chance.choice(sorted(tensors))
        old = tensors.pop(name)
        change = chance.randrange(8)
        if change == 0 and tensors:
            continue
        new_name = name
        if change == 1:
            new_name = name.replace(chance.choice(("moslora_", "layers.0", ".weight", "base_model.")), "x")
        made = {
            2: lambda o=old: o.T,
            3: lambda o=old: o[..., None],
            4: lambda o=old: o.to(torch.int8),
            5: lambda o=old: o * float("inf"),
            6: lambda o=old: o[:1],
            7: lambda o=old: o.new_zeros(0),
        }.get(change, lambda o=old: o)()
        tensors[new_name] = made.contiguous().clone()
    save_file(tensors, file)


def reconfigure(file: Path, chance: Chance) -> None:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return
    key = chance.choice(sorted(config))
    if chance.random() < 0.2:
        del config[key]
    else:
        config[key] = chance.choice(ODD)
    file.write_text(json.dumps(config), encoding="utf-8")


def replace_by_folder(file: Path, chance: Chance) -> None:
    file.unlink()
    file.mkdir()


def replace_by_link(file: Path, chance: Chance) -> None:
    file.unlink()
    file.symlink_to(chance.choice((file.name, "../../nothing", os.devnull)))


BYTES = (overwrite, cut, append, replace_by_folder, replace_by_link)
WAYS: dict[str, tuple[Callable[[Path, Chance], None], ...]] = {
    WEIGHTS: (*BYTES, lie, lie, retensor, retensor, retensor),
    CONFIG: (overwrite, cut, append, replace_by_link, *(reconfigure,) * 6),
}
BASE_WAYS = {
    "model.safetensors": (*BYTES, lie, lie, lie, retensor, retensor),
    "config.json": (overwrite, cut, append, replace_by_link, *(reconfigure,) * 4),
}
VERBS: dict[str, Callable[[Path, Path, Path], object]] = {
    "lora": lambda adapter, base, out: export_adapter(adapter, out),
    "native": lambda adapter, base, out: export_adapter(adapter, out, "native"),
    "rank": lambda adapter, base, out: export_adapter(adapter, out, rank=2),
    "gguf": lambda adapter, base, out: export_adapter(
        adapter, out.with_suffix(".gguf"), "gguf", base=str(base)
    ),
    "combine": lambda adapter, base, out: combine([adapter, adapter], [1, 0.5], out),
    "merge": lambda adapter, base, out: merge(base, adapter, out),
    "doctor": lambda adapter, base, out: diagnose(adapter, str(base), ["vllm"]),
    "inspect": lambda adapter, base, out: inspect_adapter(adapter, str(base)),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a native adapter and its plain LoRA."""
    folder = tmp_path_factory.mktemp("sound")
    tiny.save_chat_model(folder / "base")
    torch.manual_seed(1)
    config = MoSLoRAConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, rank_pattern={"down_proj": 2}
    )
    model = get_peft_model(tiny.llama(vocab_size=259, max_position_embeddings=256), config)
    model.save_pretrained(folder / "native")
    export_adapter(folder / "native", folder / "lora")
    return folder


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers, about what was damaged
def test_damage_ends_in_a_message_and_leaves_nothing(tmp_path: Path, sound: Path, verb: str) -> None:
    import gguf  # noqa: F401  (its writer is what the gguf verb needs)

    place = tmp_path / "work"
    refused = 0
    for number in range(COUNT // len(VERBS)):
        chance = random.Random(f"{verb} {number}")
        shutil.copytree(sound, place)
        adapter, base = place / chance.choice(("native", "native", "lora")), place / "base"
        on_base = verb in ("merge", "doctor", "inspect", "gguf") and chance.random() < 0.4
        ways, folder = (BASE_WAYS, base) if on_base else (WAYS, adapter)
        name = chance.choice(sorted(ways))
        done = [chance.choice(ways[name])]
        done[0](folder / name, chance)
        before = sorted(p.name for p in place.iterdir())
        told: Any = f"{verb} {number}: {done[0].__name__} of {folder.name}/{name}"
        try:
            VERBS[verb](adapter, base, place / "out")
        except (AdapterError, ModelError, ProofError, OSError) as error:
            refused += 1
            assert str(error), told
            assert sorted(p.name for p in place.iterdir()) == before, told
        except Exception as error:
            pytest.fail(f"{told}: {type(error).__name__}: {error}")
        else:
            assert not [p.name for p in place.iterdir() if p.name.startswith(".")], told
        shutil.rmtree(place)
    assert refused or verb == "doctor", "nothing was refused, so nothing was damaged"
