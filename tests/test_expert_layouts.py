"""Experts together and apart: the same outputs in both forms, in each engine's form, and merged into either's files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import laws
import upstream
from moslora import MoSLoRAConfig
from moslora.adapters.arithmetic import FOLD_TOLERANCE
from moslora.adapters.engines.predict import predict
from moslora.adapters.expert_layouts import (
    LAYOUTS,
    expert_count,
    layout_error,
    layout_of,
    put_together,
    take_apart,
)
from moslora.adapters.export import export_adapter
from moslora.adapters.factors import Adapter, Factors
from moslora.adapters.formats.reading import read_adapter
from moslora.adapters.merge import merge
from moslora.errors import AdapterError, ModelError, UsageError
from test_tuner_experts import BOTH, MODELS, build, run
from tolerances import MODEL, relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
    *(
        []
        if upstream.versions.is_at_least("transformers", "5")
        else [pytest.mark.skip("experts were modules")]
    ),
]
CONFIGS = {
    "mixtral": {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4},
    "qwen3-moe": {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4},
    "gpt-oss": {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "num_local_experts": 4},
}


@pytest.fixture(scope="module", params=list(MODELS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def made(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and native adapter on disk, and what the adapter gives."""
    folder = tmp_path_factory.mktemp(kind)
    base = build(kind)
    base.save_pretrained(folder / "base")
    settings = {"target_modules": ["q_proj"], "target_parameters": BOTH, "r": 3}
    model = laws.adapt(lambda: build(kind), MoSLoRAConfig, 1, **settings)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "native")
    with torch.no_grad():
        torch.save(run(model), folder / "expected.pt")
    return folder


def expected(made: Path) -> torch.Tensor:
    found: torch.Tensor = torch.load(made / "expected.pt")
    return found


@torch.no_grad()
def by_hand(kind: str, folder: Path) -> torch.Tensor:
    """What a base gives to which the ΔW of an adapter with experts apart was added, projection by projection."""
    model, adapter, layout = build(kind), read_adapter(folder), layout_of(CONFIGS[kind])
    pattern, modules = layout.pattern(), dict(model.named_modules())
    for path, factors in adapter.modules.items():
        delta = factors.delta_weight().float()
        match = pattern.fullmatch(path)
        if match is None:
            modules[path].weight += delta
            continue
        experts = modules[f"{match['before']}{layout.together}"]
        usual = ("gate_proj", "up_proj", "down_proj")
        part = (layout.parts if match["part"] in layout.parts else usual).index(match["part"])
        weight = (experts.down_proj if part == 2 else experts.gate_up_proj)[int(match["index"])]
        rows = weight.T if kind == "gpt-oss" else weight
        half = len(rows) // 2
        place = {
            0: slice(0, None, 2) if kind == "gpt-oss" else slice(0, half),
            1: slice(1, None, 2) if kind == "gpt-oss" else slice(half, None),
            2: slice(None),
        }[part]
        rows[place] += delta
    return run(model)


def test_experts_apart_give_what_they_gave_together(kind: str, made: Path, tmp_path: Path) -> None:
    proof = export_adapter(made / "native", tmp_path / "apart", names="transformers-4")
    assert proof.max_relative_error <= FOLD_TOLERANCE and proof.modules == 2 * (1 + 3 * 4)
    assert any("module of its own" in note for note in proof.notes)
    names = {key.partition(".lora_")[0] for key in load_file(tmp_path / "apart/adapter_model.safetensors")}
    owner = "block_sparse_moe.experts.3.w2" if kind == "mixtral" else "mlp.experts.3.down_proj"
    assert f"base_model.model.model.layers.1.{owner}" in names
    assert relative_error(by_hand(kind, tmp_path / "apart"), expected(made)) < MODEL


@torch.no_grad()
def test_experts_apart_are_put_together_again(kind: str, made: Path, tmp_path: Path) -> None:
    """As an adapter of transformers 4, unsloth, ART or a bridge from Megatron comes in."""
    export_adapter(made / "native", tmp_path / "apart", names="transformers-4")
    proof = export_adapter(
        tmp_path / "apart", tmp_path / "lora", names="transformers-5", base=str(made / "base")
    )
    assert any("one tensor of all" in note for note in proof.notes) and proof.reader.startswith("peft")
    loaded = PeftModel.from_pretrained(build(kind), tmp_path / "lora").eval()
    assert relative_error(run(loaded), expected(made)) < MODEL
    # Gate and up had one A, so the rank is what it was.
    assert {factors.r for factors in read_adapter(tmp_path / "lora").modules.values()} == {3}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_gets_the_form_that_it_applies_whole(
    kind: str, made: Path, tmp_path: Path, engine: str
) -> None:
    native = read_adapter(made / "native")
    before = predict(engine, native, CONFIGS[kind])
    assert before.is_whole == (engine == "vllm" and kind == "gpt-oss")
    proof = export_adapter(made / "native", tmp_path / "out", engine=engine, base=str(made / "base"))
    assert proof.max_relative_error <= FOLD_TOLERANCE
    written = read_adapter(tmp_path / "out")
    assert predict(engine, written, CONFIGS[kind]).is_whole
    assert layout_error(native, written, layout_of(CONFIGS[kind])) <= FOLD_TOLERANCE
    assert isinstance(written.config["target_modules"], list)
    if not (engine == "vllm" and kind == "gpt-oss"):
        # SGLang's form has q's neighbor v, of zero, too.
        assert relative_error(by_hand(kind, tmp_path / "out"), expected(made)) < MODEL


def one(r: int, n_in: int, n_out: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(*shape, generator=generator) for shape in ((r, n_in), (n_out, r)))
    return Factors(A, torch.eye(r), B, 0.5)


def apart(count: int = 2, ranks: tuple[int, int, int] = (2, 3, 1)) -> Adapter:
    sizes = {"gate_proj": (6, 4), "up_proj": (6, 4), "down_proj": (4, 6)}
    return Adapter(
        {
            f"model.layers.0.mlp.experts.{e}.{part}": one(r, n_in, n_out, 10 * e + r)
            for e in range(count)
            for (part, (n_out, n_in)), r in zip(sizes.items(), ranks, strict=True)
        },
        {"r": 2, "lora_alpha": 1},
    )


QWEN = LAYOUTS["qwen3_moe"]


def test_gates_and_ups_of_their_own_are_joined_exactly_at_both_ranks() -> None:
    adapter = apart()
    for layout in (QWEN, LAYOUTS["gpt_oss"]):
        joined = put_together(adapter, layout)
        assert {factors.r for factors in joined.modules.values()} == {5}  # 2 + 3, and down filled up
        assert layout_error(adapter, joined, layout) <= FOLD_TOLERANCE
        again = take_apart(joined, layout)
        assert layout_error(adapter, again, layout) <= FOLD_TOLERANCE
        assert again.modules.keys() == adapter.modules.keys()


def test_an_error_is_seen_by_the_proof() -> None:
    adapter = apart()
    joined = put_together(adapter, QWEN)
    assert layout_error(adapter, joined, LAYOUTS["gpt_oss"]) > 0.1  # rows in turn, read as halves
    short = replace(adapter, modules=dict(list(adapter.modules.items())[1:]))
    assert layout_error(adapter, short, QWEN) == 1


def test_what_is_missing_is_filled_with_zeros() -> None:
    adapter = apart(3)
    some = {p: f for p, f in adapter.modules.items() if p.endswith(("0.gate_proj", "2.down_proj"))}
    whole = take_apart(replace(adapter, modules=some), QWEN, complete=True, number=4)
    assert len(whole.modules) == 12 and sum(f.norm() > 0 for f in whole.modules.values()) == 2
    assert len(put_together(replace(adapter, modules=some), QWEN, 4).modules) == 8
    alone = {p: f for p, f in adapter.modules.items() if p.endswith("1.up_proj")}
    sizes = {
        f.B.shape for f in take_apart(replace(adapter, modules=alone), QWEN, complete=True).modules.values()
    }
    assert {shape[0] for shape in sizes} == {6, 4}  # down is gate's mirror


REFUSED: dict[str, tuple[Any, str]] = {
    "an unknown family": (lambda: layout_of({"model_type": "of_my_own"}), "of_my_own, whose experts are"),
    "no family": (lambda: layout_of(None), "Give --base MODEL"),
    "an expert beyond the base's": (lambda: put_together(apart(3), QWEN, 2), "an expert 2, and its base 2"),
    "sizes of two models": (
        lambda: put_together(
            Adapter({**apart().modules, "model.layers.0.mlp.experts.1.gate_proj": one(2, 4, 8, 0)}), QWEN
        ),
        "not of one model",
    ),
    "parameters that the configuration does not name": (
        lambda: take_apart(
            replace(
                put_together(apart(), QWEN),
                modules={
                    p: f for p, f in put_together(apart(), QWEN).modules.items() if "base_layer" not in p
                },
                config={},
            ),
            QWEN,
        ),
        "cannot be told whose factors",
    ),
    "experts elsewhere": (
        lambda: take_apart(
            Adapter({f"blocks.{p}": f for p, f in put_together(apart(), QWEN).modules.items()}),
            LAYOUTS["mixtral"].__class__(together="moe.experts"),
        ),
        "is not where this family",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layout_that_cannot_be_told_is_refused_with_a_way_out(name: str) -> None:
    act, message = REFUSED[name]
    with pytest.raises(AdapterError, match=message):
        act()


def test_every_known_layout_is_that_of_the_installed_transformers() -> None:
    """Where transformers puts a checkpoint's experts: by its own conversion, asked of a tiny model of each family."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from moslora.compat.checkpoint_names import names_in_memory

    sizes = {
        "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "head_dim": 8,
        "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "first_k_dense_replace": 0,
        "q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
        "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "pad_token_id": 0,
    }  # fmt: skip
    for kind, layout in LAYOUTS.items():
        config = CONFIG_MAPPING[kind](**sizes)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        place = f"model.layers.1.{layout.together}"
        state = model.state_dict()
        both = [f"{place}.gate_up_proj", f"{place}.down_proj"]
        assert all(name in state for name in both), kind
        assert expert_count(config.to_dict()) == state[both[1]].shape[0], kind
        module = model.get_submodule(place)
        assert bool(getattr(module, "is_transposed", False)) == layout.interleaved, kind
        if layout.interleaved:
            continue  # its checkpoints have one tensor of all
        gate, up, down = (f"model.layers.1.{layout.apart}.0.{part}.weight" for part in layout.parts)
        found = names_in_memory(model, [gate, up, down])
        assert [found[name][0] for name in (gate, up, down)] == [(both[0],), (both[0],), (both[1],)], kind


# --- Merging


@torch.no_grad()
def test_a_merge_into_files_gives_what_the_adapter_gave(kind: str, made: Path, tmp_path: Path) -> None:
    """Mixtral's and Qwen3's files have each expert by itself, gpt-oss' one tensor of all."""
    export_adapter(made / "native", tmp_path / "apart", names="transformers-4", base=str(made / "base"))
    for number, source in enumerate((made / "native", tmp_path / "apart")):
        proof = merge(str(made / "base"), source, tmp_path / f"merged{number}")
        assert proof.error_ratio <= 1
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"merged{number}").eval()
        merged.set_experts_implementation("eager")
        assert relative_error(run(merged), expected(made)) < MODEL


@torch.no_grad()
def test_a_merge_into_fused_files_gives_the_same(tmp_path: Path) -> None:
    """Qwen3-MoE with one tensor of all experts, as some save it."""
    base, model = build("qwen3-moe"), None
    base.save_pretrained(tmp_path / "base")
    state = {k: v for k, v in load_file(tmp_path / "base/model.safetensors").items() if ".experts." not in k}
    state |= {k: v.contiguous() for k, v in base.state_dict().items() if ".experts." in k}
    save_file(state, tmp_path / "base/model.safetensors", {"format": "pt"})
    model = laws.adapt(
        lambda: build("qwen3-moe"), MoSLoRAConfig, 1, target_modules=["q_proj"], target_parameters=BOTH, r=3
    )
    model.save_pretrained(tmp_path / "native")
    merge(str(tmp_path / "base"), tmp_path / "native", tmp_path / "merged")
    with safe_open(tmp_path / "merged/model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.experts.gate_up_proj" in file.keys()  # noqa: SIM118
        judge = build("qwen3-moe")
        judge.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    assert relative_error(run(judge), run(model)) < MODEL


def test_a_family_whose_experts_were_not_looked_up_is_not_merged_into(made: Path, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(made / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    kind, config["model_type"] = config["model_type"], "minimax"
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    assert kind in LAYOUTS
    with pytest.raises((ModelError, AdapterError)):
        merge(str(tmp_path / "base"), made / "native", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- The verb


def test_names_are_refused_where_they_make_no_sense(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'transformers-4'"):
        export_adapter(made / "native", tmp_path / "a", names="transformer-4")
    with pytest.raises(UsageError, match="Give one"):
        export_adapter(made / "native", tmp_path / "a", engine="vllm", names="transformers-4")
    import json

    config = json.loads((made / "native/adapter_config.json").read_text())
    (tmp_path / "b").mkdir()
    (tmp_path / "b/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    (tmp_path / "b/adapter_model.safetensors").write_bytes(
        (made / "native/adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(AdapterError, match="Give --base MODEL"):
        export_adapter(tmp_path / "b", tmp_path / "a", names="transformers-4")
    with pytest.raises(AdapterError, match="Give --base MODEL"):
        export_adapter(tmp_path / "b", tmp_path / "a", engine="sglang")
