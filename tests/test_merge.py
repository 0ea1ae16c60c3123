"""Merging into full weights on disk."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from typer.testing import CliRunner

import moslora.adapters.merge
import moslora.adapters.merge_blocks
import tiny
from moslora import MoSLoRAConfig
from moslora.adapters.export import PROOF_FILE, export_adapter
from moslora.adapters.merge import merge
from moslora.cli import app
from moslora.errors import AdapterError, ModelError, ProofError
from tolerances import MODEL, relative_error

TARGETS = {"llama": ["q_proj", "down_proj", "lm_head"], "gpt2": ["c_attn", "c_proj"]}
MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2}


def save_pair(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **saving: Any
) -> tuple[Path, Path]:
    """A base folder and a trained-looking native adapter on it."""
    MODELS[kind]().to(dtype).save_pretrained(folder / "base", **saving)
    (folder / "base" / "tokenizer_config.json").write_text("{}")
    (folder / "base" / "pytorch_model.bin").write_bytes(b"the unmerged weights")
    config = MoSLoRAConfig(
        r=4,
        lora_alpha=8,
        target_modules=TARGETS[kind],
        init_lora_weights=False,
        fan_in_fan_out=kind == "gpt2",
    )
    torch.manual_seed(3)
    adapted = get_peft_model(MODELS[kind](), config)
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "base", folder / "adapter"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("saving", [{}, {"max_shard_size": "20kB"}])
def test_the_merged_folder_gives_the_logits_of_peft(
    tmp_path: Path, kind: str, saving: dict[str, Any]
) -> None:
    base, adapter = save_pair(tmp_path, kind, **saving)
    assert len(list(base.glob("*.safetensors"))) == 1 or saving
    proof = merge(base, adapter, tmp_path / "out")
    expected = PeftModel.from_pretrained(MODELS[kind](), adapter).merge_and_unload().eval()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = tiny.tokens()
    assert relative_error(found(ids).logits, expected(ids).logits) < MODEL
    assert proof.error_ratio <= 1 and proof.max_relative_error < MODEL and abs(proof.least_kept - 1) < 1e-3
    assert json.loads((tmp_path / "out" / PROOF_FILE).read_text())["modules"] == proof.modules


def test_everything_else_is_carried_over_bit_for_bit(tmp_path: Path) -> None:
    base, adapter = save_pair(tmp_path, max_shard_size="20kB")
    proof = merge(base, adapter, tmp_path / "out")
    changed = 0
    for shard in base.glob("*.safetensors"):
        before, after = load_file(shard), load_file(tmp_path / "out" / shard.name)
        assert before.keys() == after.keys()
        changed += sum(not torch.equal(before[name], after[name]) for name in before)
        assert shard.stat().st_size == (tmp_path / "out" / shard.name).stat().st_size
    assert changed == proof.modules == 5
    kept = {p.name for p in base.iterdir()} - {"pytorch_model.bin"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == kept | {PROOF_FILE}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_and_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    base, adapter = save_pair(tmp_path, dtype=dtype)
    merge(base, adapter, tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    layer = PeftModel.from_pretrained(tiny.llama(), adapter).base_model.model.lm_head
    exact = before["lm_head.weight"].double() + layer.get_delta_weight("default").double()
    assert after["lm_head.weight"].dtype == dtype
    difference = (after["lm_head.weight"].double() - exact).abs()
    assert (difference <= torch.finfo(dtype).eps / 2 * exact.abs() + MODEL).all()


def test_a_plain_lora_merges_as_its_native_form_does(tmp_path: Path) -> None:
    base, adapter = save_pair(tmp_path)
    export_adapter(adapter, tmp_path / "lora")
    merge(base, adapter, tmp_path / "one")
    merge(base, tmp_path / "lora", tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(relative_error(two[name], one[name]) < MODEL for name in one)


def test_small_blocks_write_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = save_pair(tmp_path)
    merge(base, adapter, tmp_path / "one")
    monkeypatch.setattr(moslora.adapters.merge_blocks, "BLOCK", 100)
    monkeypatch.setattr(moslora.adapters.merge_blocks, "PIECE", 300)
    monkeypatch.setattr(moslora.adapters.merge_blocks, "COPIED", 500)
    merge(base, adapter, tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(relative_error(two[name], one[name]) < MODEL for name in one)


def test_threads_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = save_pair(tmp_path, dtype=torch.bfloat16)
    monkeypatch.setattr(moslora.adapters.merge_blocks, "PIECE", 300)
    monkeypatch.setattr(moslora.adapters.merge_blocks, "COPIED", 500)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = merge(base, adapter, tmp_path / "one")
        torch.set_num_threads(3)
        many = merge(base, adapter, tmp_path / "many")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (
        tmp_path / "many/model.safetensors"
    ).read_bytes()
    assert one == many


def test_the_first_error_of_a_thread_ends_the_others() -> None:
    done: list[int] = []

    def task(number: int) -> None:
        if number == 0:
            raise ModelError("it changed meanwhile")
        time.sleep(0.01)
        done.append(number)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ModelError, match="it changed meanwhile"):
            moslora.adapters.merge_blocks.in_threads([partial(task, number) for number in range(200)])
    finally:
        torch.set_num_threads(threads)
    assert len(done) < 199


def test_a_sum_beyond_the_dtype_is_a_failed_proof(tmp_path: Path) -> None:
    base, adapter = save_pair(tmp_path, dtype=torch.float16)

    def enlarge(tensors: Any) -> None:
        name = next(name for name in tensors if "q_proj" in name)
        tensors[name][0, 0] = 65504

    rewrite(base, enlarge)
    merge(base, adapter, tmp_path / "fits")  # 65504 and a little are rounded to 65504
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {n: t * 1e7 if "moslora_B" in n else t for n, t in tensors.items()},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(ProofError, match="NaN or infinite values in F16"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def edit_config(base: Path, adapter: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))


def tie(base: Path, adapter: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))


def rewrite(base: Path, change: Any) -> None:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


Q = "model.layers.0.self_attn.q_proj.weight"
BREAKAGES: dict[str, tuple[Any, type[Exception], str]] = {
    "quantised": (edit_config, ModelError, "quantized weights"),
    "integers": (
        lambda b, a: rewrite(b, lambda t: t.update({Q: torch.ones(32, 32, dtype=torch.int8)})),
        ModelError,
        "stored as I8",
    ),
    "another shape": (
        lambda b, a: rewrite(b, lambda t: t.update({Q: torch.ones(32, 16)})),
        ModelError,
        r"the base's is \(32, 16\)",
    ),
    "no such module": (lambda b, a: rewrite(b, lambda t: t.pop(Q)), ModelError, "has no weight for"),
    "tied": (tie, ModelError, "shares its weight"),
    "cut off": (
        lambda b, a: (b / "model.safetensors").write_bytes((b / "model.safetensors").read_bytes()[:-9]),
        ModelError,
        "damaged or cut off",
    ),
    "a header that lies": (
        lambda b, a: (b / "model.safetensors").write_bytes(b"\xff" * 64),
        ModelError,
        "damaged or cut off",
    ),
    "no weights": (lambda b, a: (b / "model.safetensors").unlink(), ModelError, "only as a pickle"),
    "a base with NaN": (
        lambda b, a: rewrite(b, lambda t: t[Q].fill_(float("nan"))),
        ProofError,
        "NaN or infinite",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_what_does_not_fit_is_named_and_nothing_is_left(tmp_path: Path, name: str) -> None:
    base, adapter = save_pair(tmp_path)
    change, error, message = BREAKAGES[name]
    change(base, adapter)
    with pytest.raises(error, match=message):
        merge(base, adapter, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def lie(base: Path, change: Any) -> None:
    """Rewrite the header of the base's shard and leave its bytes."""
    file = base / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


LIES: dict[str, Any] = {
    "a shape larger than its bytes": lambda h: h[Q].update(shape=[64, 32]),
    "one tensor over another": lambda h: h[Q].update(
        data_offsets=h["model.layers.1.self_attn.q_proj.weight"]["data_offsets"]
    ),
    "another dtype": lambda h: h[Q].update(dtype="BF16"),
    "no offsets": lambda h: h[Q].pop("data_offsets"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies_about_its_tensors_is_refused(tmp_path: Path, name: str) -> None:
    base, adapter = save_pair(tmp_path)
    lie(base, LIES[name])
    with pytest.raises(ModelError, match="damaged or cut off"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{"])
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
def test_a_damaged_json_of_the_base_is_named(tmp_path: Path, name: str, text: str) -> None:
    base, adapter = save_pair(tmp_path, max_shard_size="20kB")
    (base / name).write_text(text)
    with pytest.raises(ModelError, match=name):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_small_error_in_a_small_delta_fails_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = save_pair(tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors = {n: t * 1e-4 if "moslora_B" in n else t for n, t in tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    merge(base, adapter, tmp_path / "right")
    real = moslora.adapters.merge.write_shard

    def off(source: Path, target: Path, changes: Any) -> list[str]:
        return real(source, target, [replace(c, left=c.left * 1.05) for c in changes])

    monkeypatch.setattr(moslora.adapters.merge, "write_shard", off)
    with pytest.raises(ProofError, match="times what rounding explains"):
        merge(base, adapter, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_an_entry_that_is_not_a_number_fails_the_proof_whatever_comes_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = save_pair(tmp_path)
    real, count = moslora.adapters.merge.check_change, iter(range(1000))

    def broken(*given: Any) -> Any:
        seen = real(*given)
        return replace(seen, ratio=float("nan")) if next(count) == 0 else seen

    monkeypatch.setattr(moslora.adapters.merge, "check_change", broken)
    with pytest.raises(ProofError, match="is off by nan times"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_rounding_swallows_is_said(tmp_path: Path) -> None:
    base, adapter = save_pair(tmp_path, dtype=torch.bfloat16)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors = {n: t * 5e-4 if "moslora_B" in n else t for n, t in tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    shown = CliRunner().invoke(app, ["merge", str(base), str(adapter), str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output
    assert "Rounding to the base's dtype kept" in shown.output
    kept = json.loads((tmp_path / "out" / PROOF_FILE).read_text())["least_kept"]
    assert kept < 0.9


def test_an_untrained_adapter_is_not_merged(tmp_path: Path) -> None:
    base, _ = save_pair(tmp_path)
    get_peft_model(tiny.llama(), MoSLoRAConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "zero"
    )
    with pytest.raises(AdapterError, match="is zero: the adapter was not trained"):
        merge(base, tmp_path / "zero", tmp_path / "out")


def test_a_change_lost_in_rounding_is_a_failed_proof(tmp_path: Path) -> None:
    base, adapter = save_pair(tmp_path, dtype=torch.bfloat16)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors = {name: t * 1e-6 if "moslora_B" in name else t for name, t in tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ProofError, match="too small to change"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_or_wrong_merge_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = save_pair(tmp_path)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(moslora.adapters.merge, "_prove", stop)
        merge(base, adapter, tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(ProofError, match="times what rounding explains"):
        patch.setattr(
            moslora.adapters.merge,
            "write_shard",
            lambda source, target, _: shutil.copyfile(source, target) and [],
        )
        merge(base, adapter, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_too_small_a_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = save_pair(tmp_path)
    monkeypatch.setattr(
        moslora.adapters.merge.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})
    )
    with pytest.raises(OSError, match="1,000 are free"):
        merge(base, adapter, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_the_verb_says_what_it_proved(tmp_path: Path) -> None:
    base, adapter = save_pair(tmp_path)
    arguments = ["merge", str(base), str(adapter), str(tmp_path / "out")]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0 and "entries of all 5 modules read back" in shown.output
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "exists already" in again.output


def test_a_head_saved_with_its_own_base_weight_merges_and_with_another_is_refused(tmp_path: Path) -> None:
    base, adapter = save_pair(tmp_path)
    file = adapter / "adapter_model.safetensors"
    own = {
        "base_model.model.lm_head.base_layer.weight": load_file(base / "model.safetensors")["lm_head.weight"]
    }
    save_file({**load_file(file), **own}, file)
    merge(base, adapter, tmp_path / "out")
    other = {name: tensor + 1 for name, tensor in own.items()}
    save_file({**load_file(file), **other}, file)
    with pytest.raises(AdapterError, match="which is not a factor"):
        merge(base, adapter, tmp_path / "other")


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_conv1d_beside_a_linear_head_is_merged_the_right_way_round(tmp_path: Path) -> None:
    """PEFT writes of ``fan_in_fan_out`` what the last adapted layer was: here a head, after square Conv1D layers."""
    config = tiny.gpt2().config
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=["attn.c_proj", "lm_head"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora).eval()
    adapted.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    merge(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = tiny.tokens()
    assert relative_error(merged(ids).logits, adapted(ids).logits) < MODEL
