"""GGUF adapters: what llama.cpp runs is what the live adapter gave. llama.cpp itself is asked where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from typer.testing import CliRunner

import tiny
from moslora import MoSLoRAConfig
from moslora.adapters.arithmetic import FOLD_TOLERANCE, distance
from moslora.adapters.export import export_adapter
from moslora.adapters.factors import Adapter, Factors, Form
from moslora.adapters.formats import gguf
from moslora.adapters.formats.table import FORMATS
from moslora.cli import app
from moslora.errors import AdapterError
from tolerances import MODEL, relative_error

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def saved(model: Any, folder: Path, **settings: Any) -> Any:
    """Adapt a model with random factors and mixers; save base and adapter."""
    model.save_pretrained(folder / "base")
    torch.manual_seed(1)
    values = {"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS, "init_lora_weights": False, **settings}
    adapted = get_peft_model(model, MoSLoRAConfig(**values)).eval()
    adapted.save_pretrained(folder / "native", save_embedding_layers=False)
    return adapted


# ---- the file


@given(
    st.integers(0, 2**16),
    st.lists(st.integers(1, 4), min_size=3, max_size=3),
    st.sampled_from(["Llama", "Qwen2"]),
)
def test_gguf_reads_back_what_was_written_whatever_the_ranks(
    tmp_path_factory: pytest.TempPathFactory, seed: int, ranks: list[int], family: str
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(n_in: int, n_out: int, r: int, form: Form = Form()) -> Factors:  # noqa: B008  frozen
        A, M, B = (torch.randn(*s, generator=generator) for s in ((r, n_in), (r, r), (n_out, r)))
        return Factors(A, M, B, 0.7, form)

    before = Adapter(
        {
            "model.layers.0.self_attn.q_proj": draw(8, 16, ranks[0]),
            "model.layers.1.self_attn.k_proj": draw(8, 8, ranks[1]),
            "model.layers.1.mlp.down_proj": draw(12, 8, ranks[2]),
            "model.embed_tokens": draw(20, 8, ranks[0], Form("embedding")),
            "lm_head": draw(8, 20, ranks[1]),
        }
    )
    base = {**BASE, "architectures": [f"{family}ForCausalLM"]}
    places = [tmp_path_factory.mktemp("gguf") / f"{n}.gguf" for n in (1, 2)]
    at = before
    for place in places:
        gguf.write(at, place, base=base)
        at, reader = gguf.read_with_gguf(place, before, base=base)
        assert reader.startswith("gguf ") and distance(before, at).max_relative_error <= FOLD_TOLERANCE
    assert places[0].read_bytes() == places[1].read_bytes()


def test_rows_move_to_pairs_and_back() -> None:
    # The two halves of a head, 0 1 2 | 3 4 5, become pairs 0 3 | 1 4 | 2 5; each head by itself.
    B = torch.arange(12.0).view(12, 1)
    moved = gguf._move_rows(B, 2)
    assert moved[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(gguf._move_rows(moved, 2, back=True), B)


def test_the_verb_takes_the_base_that_the_adapter_names_or_that_is_given(tmp_path: Path) -> None:
    saved(tiny.llama(), tmp_path)
    run = CliRunner().invoke
    arguments = ["export", str(tmp_path / "native"), str(tmp_path / "a.gguf"), "--to", "gguf"]
    done = run(app, arguments)
    assert done.exit_code == 2 and "Give --base MODEL" in done.output and not (tmp_path / "a.gguf").exists()
    done = run(app, [*arguments, "--base", str(tmp_path / "base"), "--dtype", "float16", "--json"])
    assert done.exit_code == 0, done.output
    proof = json.loads(done.stdout)
    assert (
        proof["reader"].startswith("gguf")
        and proof["modules"] == 14
        and 0 < proof["max_relative_error"] < 2e-3
    )
    config = json.loads((tmp_path / "native" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "native" / "adapter_config.json").write_text(json.dumps(config))
    named = export_adapter(tmp_path / "native", tmp_path / "b.gguf", "gguf")
    assert named.max_relative_error <= FOLD_TOLERANCE
    done = run(app, [*arguments[:2], str(tmp_path / "b.gguf"), "--to", "gguf"])
    assert done.exit_code == 2 and "exists already" in done.output


def test_a_base_that_is_gguf_itself_says_what_it_is(tmp_path: Path) -> None:
    adapted = saved(tiny.llama(), tmp_path)
    write_base(adapted.unload(), tmp_path / "model.gguf", vocabulary=True)
    proof = export_adapter(
        tmp_path / "native", tmp_path / "a.gguf", "gguf", base=str(tmp_path / "model.gguf")
    )
    assert proof.max_relative_error <= FOLD_TOLERANCE


def one(path: str, n_out: int = 8, form: Form = Form()) -> dict[str, Factors]:  # noqa: B008  frozen
    return {path: Factors(torch.ones(2, 8), torch.eye(2), torch.ones(n_out, 2), 1.0, form)}


Q = "model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[Adapter, dict[str, Any], str]] = {
    "architecture": (
        Adapter(one(Q)),
        {"architectures": ["GPT2LMHeadModel"]},
        "mapping to llama.cpp is not verified",
    ),
    "no architecture": (Adapter(one(Q)), {"architectures": None}, "a model without a name"),
    "tied embedding": (
        Adapter(one("model.embed_tokens", form=Form("embedding"))),
        {"tie_word_embeddings": True},
        "ties its embedding to its head",
    ),
    "tied head": (Adapter(one("lm_head")), {"tie_word_embeddings": True}, "ties its embedding to its head"),
    "unknown module": (Adapter(one("model.vision.q_proj")), {}, "has no name in llama.cpp"),
    "layer beyond": (Adapter(one("model.layers.7.mlp.up_proj")), {}, "has no name in llama.cpp"),
    "heads": (Adapter(one(Q, n_out=6)), {}, "6 outputs, which are no 4 heads"),
    "more than factors": (Adapter(one(Q), {}, {"lm_head.weight": torch.ones(1)}), {}, "no place for it"),
    "unlike LoRA": (Adapter(one(Q), {"unlike_lora": {Q: "a reason"}}), {}, "a reason"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_would_refuse_or_misread_is_not_written(tmp_path: Path, name: str) -> None:
    adapter, changes, message = REFUSED[name]
    with pytest.raises(AdapterError, match=message):
        gguf.write(adapter, tmp_path / "a.gguf", base={**BASE, **changes})
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_base_or_with_more_in_it_fails_the_proof(tmp_path: Path) -> None:
    q = Adapter(one(Q))
    two = Adapter({**one(Q), **one("model.layers.1.mlp.up_proj")})
    gguf.write(two, tmp_path / "a.gguf", base=BASE)
    with pytest.raises(AdapterError, match="also holds"):
        gguf.read_with_gguf(tmp_path / "a.gguf", q, base=BASE)
    gguf.write(q, tmp_path / "b.gguf", base=BASE)
    with pytest.raises(AdapterError, match="lacks"):
        gguf.read_with_gguf(tmp_path / "b.gguf", two, base=BASE)
    with pytest.raises(AdapterError, match="not an adapter of qwen2"):
        gguf.read_with_gguf(tmp_path / "b.gguf", q, base={**BASE, "architectures": ["Qwen2ForCausalLM"]})


# ---- llama.cpp itself


def qwen(kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **({"head_dim": 16} if kind == "Qwen3" else {}),
    }
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    return model.eval()


MODELS = {
    "Llama": tiny.llama,
    "Mistral": lambda: qwen("Mistral"),
    "Qwen2": lambda: qwen("Qwen2"),
    "Qwen3": lambda: qwen("Qwen3"),
}


def write_base(model: Any, path: Path, vocabulary: bool = False) -> None:
    """A model as F32 GGUF without a vocabulary, the rows of Llama's q and k moved as llama.cpp's converter does."""
    import gguf as package

    config = model.config
    architecture = gguf.ARCHITECTURES[type(model).__name__]
    arch = getattr(package.MODEL_ARCH, architecture.name)
    names = package.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = package.GGUFWriter(None, package.MODEL_ARCH_NAMES[arch])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(config.vocab_size)
    if vocabulary:  # which transformers asks for, and llama.cpp would check
        writer.add_tokenizer_model("llama")
        writer.add_token_list([f"t{n}" for n in range(config.vocab_size)])
    else:
        writer.add_tokenizer_model("no_vocab")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, tensor in model.state_dict().items():
        module = key.split(".")[-2]
        if architecture.moves_rows and module in heads:
            half = tensor.shape[0] // heads[module] // 2
            tensor = tensor.reshape(heads[module], 2, half, -1).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(
            names.get_name(key, try_suffixes=(".weight", ".bias")), tensor.float().contiguous().numpy()
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits_in_llama_cpp(base: Path, adapter: Path | None, ids: list[int]) -> torch.Tensor:
    """What llama.cpp computes in F32 throughout, shape ``(len(ids), vocab)``."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(
        str(base),
        lora_path=None if adapter is None else str(adapter),
        n_ctx=64,
        n_threads=1,
        logits_all=True,
        type_k=0,
        type_v=0,
        verbose=False,
    )
    model.eval(ids)
    found = torch.from_numpy(model.scores[: len(ids)].copy())
    model.close()
    return found


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("extra", [[], ["embed_tokens", "lm_head"]], ids=["projections", "all"])
def test_llama_cpp_runs_the_adapter_to_the_same_logits(tmp_path: Path, family: str, extra: list[str]) -> None:
    pytest.importorskip("llama_cpp")
    model = MODELS[family]()
    write_base(model, tmp_path / "base.gguf")
    ids = tiny.tokens(1, 12)
    with torch.no_grad():
        plain = model(ids).logits[0]
        # Ranks and scales that differ between modules, as a GGUF's one alpha cannot say.
        settings = {"use_rslora": True, "rank_pattern": {"k_proj": 2, "down_proj": 6}}
        adapted = saved(model, tmp_path, target_modules=[*PROJECTIONS, *extra], **settings)
        expected = adapted(ids).logits[0]
    export_adapter(tmp_path / "native", tmp_path / "a.gguf", "gguf", base=str(tmp_path / "base"))
    found = logits_in_llama_cpp(tmp_path / "base.gguf", tmp_path / "a.gguf", ids[0].tolist())
    base = logits_in_llama_cpp(tmp_path / "base.gguf", None, ids[0].tolist())
    error = relative_error(found, expected)
    print(f"{family} {extra}: {float((found - expected).abs().max()):.1e} in logits, relative {error:.1e}")
    assert relative_error(base, plain) < MODEL, "the base itself is another"
    assert error < MODEL
    assert relative_error(plain, expected) > 100 * MODEL


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_llama_cpp_sees_rows_that_were_moved_wrongly(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp")
    model = MODELS[family]()
    write_base(model, tmp_path / "base.gguf")
    ids = tiny.tokens(1, 12)
    with torch.no_grad():
        expected = saved(model, tmp_path)(ids).logits[0]
    right = gguf.ARCHITECTURES[f"{family}ForCausalLM"]
    wrong = gguf.Architecture(right.name, not right.moves_rows)
    monkeypatch.setitem(gguf.ARCHITECTURES, f"{family}ForCausalLM", wrong)
    export_adapter(tmp_path / "native", tmp_path / "a.gguf", "gguf", base=str(tmp_path / "base"))
    found = logits_in_llama_cpp(tmp_path / "base.gguf", tmp_path / "a.gguf", ids[0].tolist())
    assert relative_error(found, expected) > 100 * MODEL


def test_gguf_is_only_written() -> None:
    assert FORMATS["gguf"].read is None and FORMATS["gguf"].needs_base


def test_a_full_disk_leaves_no_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf as package

    def full(self: object, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    saved(tiny.llama(), tmp_path)
    monkeypatch.setattr(package.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="No space"):
        export_adapter(tmp_path / "native", tmp_path / "a.gguf", "gguf", base=str(tmp_path / "base"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "native"]
