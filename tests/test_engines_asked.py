"""The rules of engines against the engines: their own readers are asked what they make of an adapter.

Each engine needs an environment of its own, without a GPU: ``MOSLORA_ASK_VLLM`` and ``MOSLORA_ASK_SGLANG`` name an
interpreter that can import its wheel (``docs/serving.md`` says how to make one). Without them these tests are skipped.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from moslora.adapters.engines.predict import predict
from moslora.adapters.engines.rules import read_engine
from moslora.adapters.export import export_adapter
from moslora.adapters.factors import Adapter
from moslora.adapters.formats.reading import read_adapter
from tolerances import MODEL, relative_error

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, of the odd adapters that are asked about
HERE = Path(__file__).parent / "engines"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """A base by its class, what is adapted, and how the adapter is written.

    Attributes:
        kind: Prefix of the class of the configuration.
        targets: ``target_modules``.
        parameters: ``target_parameters``.
        form: The engine for which it is exported, or "" for the adapter as PEFT saves it.
        settings: Other arguments of the LoRA.
        config: Arguments of the base's configuration.
    """

    kind: str
    targets: list[str] | str
    parameters: list[str] | None = None
    form: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_local_experts": 4}
GPT = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2}
VISION = {
    "text_config": {**SIZES, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
    "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32},
}  # fmt: skip
LANGUAGE = r".*language_model.*\.(q_proj|v_proj|down_proj)"
CASES = {
    "llama, all": Case("Llama", PROJECTIONS),
    "llama, q alone": Case("Llama", ["q_proj", "down_proj"]),
    "llama, head and embedding": Case("Llama", ["q_proj", "v_proj", "lm_head", "embed_tokens"]),
    "llama, ranks and alphas": Case(
        "Llama",
        ["q_proj", "k_proj", "v_proj", "down_proj"],
        settings={"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 16}, "use_rslora": True},
    ),
    "llama, bias": Case("Llama", ["q_proj", "v_proj"], settings={"lora_bias": True}),
    "llama, DoRA": Case("Llama", ["q_proj", "v_proj"], settings={"use_dora": True}),
    "llama, up alone": Case("Llama", ["up_proj"]),
    "llama, rank 20": Case("Llama", PROJECTIONS, settings={"r": 20}),
    "qwen2, head": Case("Qwen2", ["q_proj", "v_proj", "lm_head"]),
    "qwen3-moe as PEFT saves it": Case("Qwen3Moe", ["q_proj", "v_proj"], BOTH, config=MOE),
    "qwen3-moe for the engine": Case("Qwen3Moe", ["q_proj", "v_proj"], BOTH, "engine", config=MOE),
    "qwen3-moe, down alone": Case("Qwen3Moe", ["q_proj", "v_proj"], BOTH[1:], "engine", config=MOE),
    "mixtral for the engine": Case("Mixtral", ["q_proj", "v_proj"], BOTH, "engine", config=MOE),
    "gpt-oss as PEFT saves it": Case("GptOss", ["q_proj", "v_proj"], BOTH, config=GPT),
    "gpt-oss for the engine": Case("GptOss", ["q_proj", "v_proj"], BOTH, "engine", config=GPT),
    "gpt-oss, down alone": Case("GptOss", ["q_proj"], BOTH[1:], config=GPT),
    "qwen2.5-vl, language": Case("Qwen2_5_VL", LANGUAGE, config=VISION),
    "qwen2.5-vl, old names": Case("Qwen2_5_VL", LANGUAGE, form="transformers-4", config=VISION),
}
AUTO = {"Qwen2_5_VL": "ForConditionalGeneration"}


def base_of(case: Case) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{case.kind}Config")
    sizes = {} if "text_config" in case.config else SIZES
    return getattr(transformers, f"{case.kind}{AUTO.get(case.kind, 'ForCausalLM')}")(
        config(**{**sizes, **case.config})
    )


def saved(case: Case, engine: str, folder: Path) -> tuple[Path, Path]:
    """Write base and adapter."""
    model = base_of(case)
    model.save_pretrained(folder / "base")
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **case.settings}
    lora = LoraConfig(target_modules=case.targets, target_parameters=case.parameters, **settings)
    get_peft_model(model, lora).save_pretrained(folder / "peft", save_embedding_layers=False)
    if not case.form:
        return folder / "base", folder / "peft"
    about = {"engine": engine} if case.form == "engine" else {"names": case.form}
    export_adapter(folder / "peft", folder / "out", base=str(folder / "base"), **about)
    return folder / "base", folder / "out"


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """What the engine answered, for all cases at once, for its imports take a minute."""
    engine = str(request.param)
    python = os.environ.get(f"MOSLORA_ASK_{engine.upper()}")
    if not python:
        pytest.skip(f"MOSLORA_ASK_{engine.upper()} names no interpreter that has {engine}")
    place = tmp_path_factory.mktemp(engine)
    questions = []
    for number, case in enumerate(CASES.values()):
        base, adapter = saved(case, engine, place / str(number))
        flags = {"max_lora_rank": 32} if engine == "vllm" and case.settings.get("r", 0) > 16 else {}
        questions.append({"base": str(base), "adapter": str(adapter), "flags": flags})
    (place / "questions.json").write_text(json.dumps(questions))
    command = [
        python,
        str(HERE / f"ask_{engine}.py"),
        str(place / "questions.json"),
        str(place / "answers.json"),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(command, check=True, timeout=1500, env=environment, capture_output=True)
    return engine, place, json.loads((place / "answers.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_the_engine_does_what_its_rules_say(asked: Any, name: str) -> None:
    engine, place, answers = asked
    number = list(CASES).index(name)
    answer, folder = answers[number], place / str(number)
    adapter = read_adapter(folder / ("out" if CASES[name].form else "peft"))
    config = json.loads((folder / "base/config.json").read_text())
    found = predict(engine, adapter, config)
    if "error" in answer:
        assert not found.is_whole and set(found.lost.values()) & {"refused", "wrong"}, answer["error"]
        return
    assert answer["version"] == read_engine(engine).version
    held = load_file(f"{place}/answers.json.{number}.safetensors")
    right = {path: _is_held(path, adapter, held) for path in adapter.modules}
    assert {path for path, is_right in right.items() if not is_right} == set(found.lost), found.findings


def _is_held(path: str, adapter: Adapter, held: dict[str, torch.Tensor]) -> bool:
    """Tell whether ΔW of a module, which is random, lies in the engine's buffers, wherever in its layer."""
    if adapter.modules[path].bias is not None:
        return False  # whatever is held, a bias has no buffer
    delta = adapter.delta_weight(path)
    layer = re.search(r"layers\.\d+\.", path)
    return (
        any(
            tensor.shape == delta.shape and relative_error(tensor, delta) < MODEL
            for name, tensor in held.items()
            if layer is None or layer[0] in name
        )
        or not delta.any()
    )
