"""Recipes of mixtures of experts, on tiny models of their shape: trained, exported, served by rule, merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tiny
import upstream
from moslora import train
from moslora.adapters.engines.predict import predict
from moslora.adapters.export import export_adapter
from moslora.adapters.formats.reading import read_adapter
from moslora.adapters.merge import merge
from test_tuner_experts import build
from tolerances import MODEL, relative_error

pytestmark = [
    upstream.needs("the command needs newer ones", transformers="5.20"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]
RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_a_recipe_trains_and_what_it_made_is_served_and_merged(name: str, tmp_path: Path) -> None:
    base = tiny.save_chat_model(tmp_path / "base")
    model = build(name)
    model.resize_token_embeddings(259)
    model.save_pretrained(base)
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    rows = [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe["model"] = {"name": str(base), "dtype": "float32"}
    recipe["data"] = {"train": str(tmp_path / "rows.jsonl")}
    recipe["trainer"] |= {"max_steps": 2, "bf16": False, "use_cpu": True, "gradient_accumulation_steps": 1}
    recipe["output"] = {"dir": str(tmp_path), "name": "run"}
    run = train(recipe)
    native = read_adapter(run.adapter)
    ranks = {path.partition("mlp.experts")[1]: factors.r for path, factors in native.modules.items()}
    assert ranks == {"": 16, "mlp.experts": recipe["adapter"]["rank_pattern"]["down_proj"]}
    config = json.loads((base / "config.json").read_text())
    for engine in ("vllm", "sglang"):
        export_adapter(run.adapter, tmp_path / engine, engine=engine, base=str(base))
        assert predict(engine, read_adapter(tmp_path / engine), config).is_whole
    merge(str(base), run.adapter, tmp_path / "merged")
    ids = tiny.tokens()
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.lora).eval()
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert relative_error(merged(ids).logits, loaded(ids).logits) < MODEL
