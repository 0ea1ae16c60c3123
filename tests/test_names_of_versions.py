"""Names of vision-language models by the version of transformers: read, and written for either, proven by loading.

``MOSLORA_OLD_TRANSFORMERS`` names an interpreter that has transformers 4.51 and PEFT 0.15: there a model and an adapter
are made, and what is written back is run. Without it, the names are held against those in the base's files.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

import upstream
from moslora.adapters.export import export_adapter
from moslora.errors import AdapterError
from tolerances import MODEL, relative_error

pytestmark = [
    upstream.needs("names are those of the files before", transformers="5"),
    pytest.mark.filterwarnings("ignore"),  # old configurations' names of fields
]
SCRIPT = Path(__file__).parent / "engines/old_transformers.py"
CLASSES = {"qwen2_vl": "Qwen2VLForConditionalGeneration", "llava": "LlavaForConditionalGeneration"}


def keys(folder: Path) -> set[str]:
    return {key.partition(".lora_")[0] for key in load_file(folder / "adapter_model.safetensors")}


@torch.no_grad()
def logits(folder: Path, base: Path, name: str) -> torch.Tensor:
    model = getattr(transformers, CLASSES[name]).from_pretrained(base)
    ids = torch.arange(3, 27).view(2, 12)
    adapted = PeftModel.from_pretrained(model, folder).eval()
    return adapted(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = os.environ.get("MOSLORA_OLD_TRANSFORMERS")
    if not python:
        pytest.skip("MOSLORA_OLD_TRANSFORMERS names no interpreter that has transformers 4.51")
    folder = tmp_path_factory.mktemp("old")
    run(python, "make", folder)
    for name in CLASSES:
        place = folder / name
        export_adapter(place / "adapter", place / "new", names="transformers-5", base=str(place / "base"))
        export_adapter(place / "new", place / "back", names="transformers-4", base=str(place / "base"))
    run(python, "run", folder)
    return folder


def run(python: str, what: str, folder: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([python, str(SCRIPT), what, str(folder)], check=True, timeout=600, env=environment)


@pytest.mark.parametrize("name", CLASSES)
def test_an_adapter_of_the_old_names_runs_here_and_there_again(old: Path, name: str) -> None:
    place = old / name
    expected = load_file(place / "expected.safetensors")["logits"]
    there = load_file(place / "found.safetensors")
    assert relative_error(logits(place / "new", place / "base", name), expected) < MODEL
    assert relative_error(there["logits"], expected) < MODEL
    assert relative_error(there["plain"], expected) > 100 * MODEL
    assert keys(place / "new").isdisjoint(keys(place / "adapter"))
    assert keys(place / "back") == keys(place / "adapter")


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "llava", "gemma3", "internvl", "paligemma"])
def test_the_old_names_are_those_of_the_files_and_come_back(name: str, tmp_path: Path) -> None:
    import tiny_vision

    getattr(tiny_vision, f"save_{name}")(tmp_path / "base")
    stored = {key.removesuffix(".weight") for key in load_file(tmp_path / "base/model.safetensors")}
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    from peft import LoraConfig, get_peft_model

    targets = r".*language_model.*layers\.\d+\.(self_attn\.q_proj|mlp\.down_proj)|.*(qkv|linear_1|fc1|merger\.mlp\.0)"
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    base = str(tmp_path / "base")
    export_adapter(tmp_path / "adapter", tmp_path / "old", names="transformers-4", base=base)
    found = {key.removeprefix("base_model.model.") for key in keys(tmp_path / "old")}
    assert found and found <= stored
    assert keys(tmp_path / "old") != keys(tmp_path / "adapter")
    export_adapter(tmp_path / "old", tmp_path / "new", names="transformers-5", base=base)
    assert keys(tmp_path / "new") == keys(tmp_path / "adapter")
    # Towers have no place in SGLang, and that is said.
    with pytest.raises(AdapterError, match="would not apply it whole"):
        export_adapter(tmp_path / "old", tmp_path / "served", engine="sglang", base=base)
