"""At rest means at rest: which verb loads which library, and a configuration without PEFT is what PEFT writes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, TaskType
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

import upstream
from moslora.adapters.factors import Adapter, Factors
from moslora.adapters.formats import native
from moslora.adapters.formats.configuration import (
    LORA,
    MOSLORA,
    SHARED,
    TASK_TYPES,
    lora_config,
    moslora_config,
    pattern_key,
    selects,
)
from moslora.adapters.formats.pipeline import join
from moslora.adapters.formats.table import FORMATS
from moslora.errors import AdapterError
from moslora.tuner.config import MoSLoRAConfig

# --- What a verb loads --------------------------------------------------------------------------------------

NOTHING: frozenset[str] = frozenset()
PEFT = frozenset({"peft", "transformers"})  # PEFT imports transformers
DIFFUSERS = PEFT | {"diffusers"}
LOADERS = DIFFUSERS
# Libraries that take time to import and that no verb at rest needs.
HEAVY = LOADERS | {"accelerate", "datasets", "gguf", "huggingface_hub", "matplotlib", "tokenizers", "trl"}

# What is run → which loaders it imports, and why. Equal, not at most: a proof that no longer asks the other project's
# loader is as much a fault as a verb that imports it for nothing.
VERBS: dict[str, tuple[frozenset[str], str]] = {
    "--help": (NOTHING, "it computes nothing"),
    "inspect ADAPTER": (NOTHING, "figures are of the factors"),
    "inspect ADAPTER --base BASE --html OUT.html": (NOTHING, "weights are read from the shards"),
    "doctor ADAPTER": (NOTHING, "the checks of the adapter are our own"),
    "doctor ADAPTER --base BASE": (NOTHING, "shapes and, without a class, names are in the shards' headers"),
    "doctor ADAPTER --for vllm": (PEFT, "it tries the export, with its proof"),
    "export ADAPTER OUT --to native": (NOTHING, "our own reader reads it back"),
    "export ADAPTER OUT": (PEFT, "the proof of plain LoRA: PEFT loads it"),
    "export UNET OUT.safetensors --to diffusers": (DIFFUSERS, "the proof of an image format: diffusers loads it"),
    "export UNET OUT.safetensors --to kohya": (DIFFUSERS, "the proof of an image format: diffusers loads it"),
    "import AUTHORS OUT": (NOTHING, "our own reader reads it back"),
    "combine ADAPTER ADAPTER --out OUT --to native": (NOTHING, "our own reader reads it back"),
    "combine ADAPTER ADAPTER --out OUT": (PEFT, "the proof of plain LoRA: PEFT loads it"),
    "merge BASE ADAPTER OUT": (NOTHING, "rows are read back and compared in float64"),
}  # fmt: skip


def adapter(module: str = "model.layers.0.self_attn.q_proj") -> Adapter:
    generator = torch.Generator().manual_seed(0)
    A, M, B = (torch.randn(shape, generator=generator) for shape in ((4, 8), (4, 4), (12, 4)))
    config = {"r": 4, "lora_alpha": 8, "target_modules": [module.rpartition(".")[2]]}
    return Adapter({module: Factors(A, M, B, 2.0)}, {**config, "mixer": "kaiming"})


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("at-rest")
    made = {name: root / name.lower() for name in ("ADAPTER", "AUTHORS", "BASE", "UNET")}
    for path in made.values():
        path.mkdir()
    native.write(adapter(), made["ADAPTER"])
    FORMATS["native"].write(  # type: ignore[misc]
        join({"unet": adapter("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")}), made["UNET"]
    )
    factors = next(iter(adapter().modules.values()))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    parts = {"lora_A": factors.A, "lora_AB": factors.M, "lora_B": factors.B}
    save_file(
        {f"{prefix}.{part}.weight": tensor for part, tensor in parts.items()},
        made["AUTHORS"] / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (made["AUTHORS"] / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {"model.layers.0.self_attn.q_proj.weight": torch.randn(12, 8)}, made["BASE"] / "model.safetensors"
    )
    (made["BASE"] / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return {name: str(path) for name, path in made.items()}


@pytest.mark.parametrize("command", VERBS)
def test_a_verb_loads_what_the_table_says(command: str, places: Mapping[str, str], tmp_path: Path) -> None:
    wanted, reason = VERBS[command]
    if "diffusers" in wanted:
        pytest.importorskip("diffusers")
    outs = {name: str(tmp_path / name.lower()) for name in ("OUT", "OUT.html", "OUT.safetensors")}
    arguments = [{**places, **outs}.get(word, word) for word in command.split()]
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('LOADED', *{m.partition('.')[0] for m in sys.modules}))\n"
        "from moslora.cli import main\n"
        "sys.argv = ['moslora', *sys.argv[1:]]\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    loaded = set(done.stdout.rpartition("LOADED")[2].split())
    assert loaded & LOADERS == wanted, reason
    if wanted == NOTHING:
        assert not loaded & HEAVY, "it costs time before the verb begins"
    if command == "--help":
        assert not loaded & {"torch", "numpy", "safetensors", "pydantic"}


# --- A configuration without PEFT ---------------------------------------------------------------------------


def as_json(config: Mapping[str, Any]) -> Any:
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    return json.loads(json.dumps(plain))


VALUES: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "some/base",
    "revision": "main",
    "auto_mapping": {"base_model_class": "Net", "parent_library": "nets"},
    "r": 6,
    "lora_alpha": 12.5,
    "lora_dropout": 0.25,
    "target_modules": ["v_proj", "q_proj", "v_proj"],
    "exclude_modules": ["lm_head"],
    "layers_to_transform": [1, 2],
    "layers_pattern": ["layers"],
    "modules_to_save": ["score"],
    "target_parameters": ["experts.gate_up_proj"],
    "trainable_token_indices": [1, 2],
    "ensure_weight_tying": True,
    "fan_in_fan_out": True,
    "bias": "all",
    "rank_pattern": {"^a": 2},
    "alpha_pattern": {"^a": 4.0},
    "use_rslora": True,
    "use_dora": True,
}
SETS = [{}, VALUES, {"lora_bias": True}, {"target_modules": r".*\.q_proj"}, {"task_type": None, "r": 2}]


@pytest.mark.parametrize("values", SETS)
def test_the_configuration_of_a_plain_lora_is_what_the_installed_peft_writes(values: dict[str, Any]) -> None:
    assert as_json(lora_config(values)) == as_json(LoraConfig(inference_mode=True, **values).to_dict())


@pytest.mark.parametrize(
    "values",
    [
        *SETS,
        {"mixer": "two-subspace"},
        {"mixer": "orthogonal", "train_mixer": False, "match_scale": True},
        {"mixer": "custom", "unlike_lora": {"a": "its padding"}},
        {"rank_pattern": None, "alpha_pattern": None},
    ],
)
def test_the_configuration_of_an_adapter_is_what_its_own_class_writes(values: dict[str, Any]) -> None:
    assert as_json(moslora_config(values)) == as_json(MoSLoRAConfig(inference_mode=True, **values).to_dict())


@pytest.mark.parametrize(
    "values",
    [
        {"r": 0},
        {"r": True},
        {"rank_pattern": {"a": 0}},
        {"r": 3, "mixer": "two-subspace"},
        {"rank_pattern": {"a": 3}, "mixer": "two-subspace"},
        {"mixer": "kaimin"},
        {"mixer": "zeros"},
        {"mixer": "singular-values"},
        {"mixer": None},
        {"lora_dropout": 1.0},
        {"lora_dropout": None},
        {"bias": "some"},
        {"task_type": "GUESSING"},
        {"lora_bias": True, "use_dora": True},
        {"target_parameters": "experts"},
        {"target_modules": "a", "layers_to_transform": [1]},
        {"target_modules": "a", "layers_pattern": "layers"},
        {"layers_pattern": "layers"},
        {"rang": 4},
    ],
)
def test_what_its_own_class_refuses_has_no_native_form(values: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        MoSLoRAConfig(inference_mode=True, **values)
    with pytest.raises(AdapterError, match="has no native form"):
        moslora_config(values)


def test_both_configurations_have_what_an_adapter_carries_and_no_more() -> None:
    assert set(SHARED) <= LORA.keys() & MOSLORA.keys()
    known = {field.name for field in dataclasses.fields(LoraConfig)} - {"runtime_config", "peft_version"}
    assert set(lora_config({})) - {"peft_version"} == known


def test_task_types_are_those_of_peft() -> None:
    assert set(TASK_TYPES) == {kind.value for kind in TaskType}


PART = st.sampled_from(["q_proj", "layers", "0", "1", "10", "model", "o"])
PATH = st.lists(PART, min_size=1, max_size=4).map(".".join)
PATTERN = st.one_of(
    PATH, PATH.map(lambda path: f"^{path}"), st.sampled_from([".*_proj", r"layers\.\d+.*", "q|o"])
)


@given(st.lists(PATTERN, max_size=4), PATH)
def test_patterns_are_looked_up_as_peft_does(patterns: list[str], module: str) -> None:
    assert pattern_key(patterns, module) == get_pattern_key(patterns, module)


CHOICES = st.fixed_dictionaries(
    {
        "target_modules": st.one_of(st.lists(PATH, min_size=1, max_size=3), PATTERN),
        "exclude_modules": st.one_of(st.none(), st.lists(PATH, max_size=2), PATH),
        "modules_to_save": st.one_of(st.none(), st.lists(PART, max_size=1)),
    },
    optional={
        "layers_to_transform": st.one_of(
            st.none(), st.integers(0, 10), st.lists(st.integers(0, 10), max_size=2)
        ),
        "layers_pattern": st.one_of(st.none(), st.just("layers"), st.just(["model", "layers"])),
    },
)


@upstream.needs("the first index of a path counts", peft="0.21")
@given(CHOICES, st.lists(PART, min_size=1, max_size=6).map(".".join))
def test_modules_are_chosen_as_peft_does(config: dict[str, Any], module: str) -> None:
    if isinstance(config["target_modules"], str):
        config = {**config, "layers_to_transform": None, "layers_pattern": None}
    chosen = check_target_module_exists(SimpleNamespace(target_parameters=None, **config), module)
    assert selects(config, module) == bool(chosen)
