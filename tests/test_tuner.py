from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
import upstream
from moslora import MoSLoRAConfig
from moslora.core import few_tokens, functional, notices, ops
from moslora.core.mixers import MIXERS
from tolerances import MODEL, MODEL_SNR_DB, RELATIVE, relative_error, snr_db
from upstream import WHOLE

ATTENTION = ["q_proj", "v_proj"]
BUILDERS = {
    "llama": (tiny.llama, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (tiny.gpt2, ["c_attn", "c_proj"]),
}


def config(**changes: object) -> MoSLoRAConfig:
    """Random B, so that the adapter does something."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "init_lora_weights": False}
    return MoSLoRAConfig(task_type="CAUSAL_LM", **{**settings, **changes})


def adapted(seed: int = 1, **changes: object) -> PeftModel:
    model = tiny.llama()
    torch.manual_seed(seed)
    return get_peft_model(model, config(**changes)).eval()


def train(model: nn.Module, steps: int = 3, rows: int = 2) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        ids = tiny.tokens(rows, seed=step % 5)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kind", BUILDERS)
@torch.no_grad()
def test_a_fresh_adapter_changes_nothing(kind: str) -> None:
    build, targets = BUILDERS[kind]
    before = build()(tiny.tokens()).logits
    model = get_peft_model(build(), config(target_modules=targets, init_lora_weights=True))
    assert relative_error(model(tiny.tokens()).logits, before) < RELATIVE[torch.float32]


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@torch.no_grad()
def test_saving_and_loading_gives_the_same_bits(kind: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    build, targets = BUILDERS[kind]
    model = get_peft_model(build(), config(target_modules=targets)).eval()
    expected = model(tiny.tokens()).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(tiny.tokens()).logits, expected)


@torch.no_grad()
def test_auto_model_finds_base_and_adapter(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    base = type(tiny.llama()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config()).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(tiny.tokens()).logits, model(tiny.tokens()).logits)


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("safe", [False, True])
@torch.no_grad()
def test_merging_keeps_the_output_and_unmerging_the_base(kind: str, safe: bool) -> None:
    build, targets = BUILDERS[kind]
    base = build()(tiny.tokens()).logits
    model = get_peft_model(build(), config(target_modules=targets)).eval()
    expected = model(tiny.tokens()).logits
    model.merge_adapter(safe_merge=safe)
    assert relative_error(model(tiny.tokens()).logits, expected) < MODEL
    model.unmerge_adapter()
    assert relative_error(model(tiny.tokens()).logits, expected) < MODEL
    merged = model.merge_and_unload(safe_merge=safe)
    assert type(merged) is type(build())
    assert relative_error(merged(tiny.tokens()).logits, expected) < MODEL
    assert relative_error(expected, base) > 100 * MODEL  # the adapter did something


@torch.no_grad()
def test_safe_merge_refuses_nan_and_changes_nothing() -> None:
    model = adapted()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.moslora_M["default"].weight[0, 0] = float("nan")
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)


@torch.no_grad()
def test_merging_into_a_tied_weight_is_refused_with_the_way_out() -> None:
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = get_peft_model(tiny.llama(tie_word_embeddings=True), config(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"shares its weight.*Untie"):
        model.merge_and_unload()


@torch.no_grad()
def test_disabled_adapters_leave_the_base() -> None:
    expected = tiny.llama()(tiny.tokens()).logits
    model = adapted()
    with model.disable_adapter():
        assert torch.equal(model(tiny.tokens()).logits, expected)
    assert not torch.equal(model(tiny.tokens()).logits, expected)


@torch.no_grad()
def test_several_adapters_are_switched_stacked_and_deleted() -> None:
    torch.manual_seed(3)
    model = adapted()
    one = model(tiny.tokens()).logits
    model.add_adapter("other", config(r=2, target_modules=["q_proj", "up_proj"]))
    assert torch.equal(model(tiny.tokens()).logits, one)
    model.set_adapter("other")
    other = model(tiny.tokens()).logits
    assert not torch.equal(other, one)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    model.base_model.set_adapter(["default", "other"])
    expected = (
        layer.base_layer(x) + x @ (layer.get_delta_weight("default") + layer.get_delta_weight("other")).T
    )
    assert relative_error(layer(x), expected) < RELATIVE[torch.float32]
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(model(tiny.tokens()).logits, one)
    assert not any("other" in name for name, _ in model.named_parameters())


def test_only_factors_are_trained_and_all_of_them_move() -> None:
    model = adapted(init_lora_weights=True).train()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = train(model, 4)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {n for n in start if "moslora_" in n}
    assert all(torch.isfinite(torch.tensor(losses)))


@pytest.mark.parametrize("mixer", sorted(MIXERS))
@pytest.mark.parametrize("learn", [False, True])
def test_a_frozen_mixer_stays_and_a_learned_one_moves(mixer: str, learn: bool) -> None:
    model = adapted(mixer=mixer, train_mixer=learn, init_lora_weights=True).train()
    model.set_adapter("default")  # switching must not thaw it
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    start = layer.moslora_M["default"].weight.detach().clone()
    train(model)
    assert torch.equal(layer.moslora_M["default"].weight, start) is not learn


def test_an_identity_mixer_held_fixed_trains_as_pefts_lora() -> None:
    losses, logits = [], []
    for cls, own in ((MoSLoRAConfig, {"mixer": "identity", "train_mixer": False}), (LoraConfig, {})):
        model = tiny.llama()
        torch.manual_seed(1)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"}
        model = get_peft_model(model, cls(**settings, **own)).train()
        losses.append(train(model, 5))
        with torch.no_grad():
            logits.append(model(tiny.tokens()).logits)
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < MODEL
    # AdamW divides by the gradient's own size, which lifts rounding of tiny gradients.
    assert relative_error(*logits) < 50 * MODEL


def test_a_module_without_a_mixer_trains_as_pefts_lora_beside_one_that_has_one(tmp_path: Path) -> None:
    model = adapted(mixer_pattern={"v_proj": "none"}, init_lora_weights=True)
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "moslora_M")}
    before = {name: m.factors("default")[1].detach().clone() for name, m in layers.items()}
    train(model)
    for name, layer in layers.items():
        M = layer.factors("default")[1].detach()
        identity = torch.eye(len(M))
        assert torch.equal(before[name], identity) == name.endswith("v_proj")
        assert torch.equal(M, before[name]) == name.endswith("v_proj")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert again.peft_config["default"].mixer_pattern == {"v_proj": "none"}
    with torch.no_grad():
        assert torch.equal(again(tiny.tokens()).logits, model.eval()(tiny.tokens()).logits)
    # Where no module has a mixer, it is LoRA.
    alone = adapted(mixer_pattern={"[qv]_proj": "none"}, init_lora_weights=True)
    base = tiny.llama()
    torch.manual_seed(1)
    lora = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, task_type="CAUSAL_LM")
    )
    assert train(alone) == pytest.approx(train(lora), rel=MODEL)
    with pytest.raises(ValueError, match=r"mixer_pattern\['v_proj'\]: .*'none', for no mixer"):
        config(mixer_pattern={"v_proj": "kaimin"})


def test_with_one_seed_lora_and_moslora_start_with_the_same_a() -> None:
    starts = []
    for cls in (MoSLoRAConfig, LoraConfig):
        model = tiny.llama()
        torch.manual_seed(1)
        model = get_peft_model(model, cls(r=4, target_modules=ATTENTION))
        starts.append([p for n, p in model.named_parameters() if "lora_A" in n])
    assert len(starts[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))


def test_match_scale_starts_with_the_norm_of_a() -> None:
    for module in adapted(match_scale=True).modules():
        if hasattr(module, "factors"):
            A, M, _, _ = module.factors("default")
            assert relative_error((M @ A).norm(), A.norm()) < RELATIVE[torch.float32]


@torch.no_grad()
def test_ranks_and_alphas_follow_their_patterns_as_in_lora() -> None:
    patterns = {
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3},
        "use_rslora": True,
    }
    ours = adapted(**patterns)
    theirs = get_peft_model(tiny.llama(), LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, **patterns))
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            found = ours.get_submodule(name)
            assert (found.r, found.scaling) == (module.r, module.scaling)


@pytest.mark.parametrize("few", [-1, few_tokens.FEW], ids=["Function", "few tokens"])
@pytest.mark.parametrize("kind", BUILDERS)
def test_the_fused_layer_equals_the_slow_one_in_loss_and_gradients(
    kind: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_tokens, "FEW", few)
    build, targets = BUILDERS[kind]
    torch.manual_seed(1)
    model = get_peft_model(build(), config(target_modules=targets)).eval()  # GPT-2 has dropout of its own
    results = []
    for enabled in (True, False):
        with ops.fusing(enabled):
            ids = tiny.tokens()
            loss = model(input_ids=ids, labels=ids).loss
            grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
            results.append([loss, *grads])
    assert all(relative_error(a, b) < MODEL for a, b in zip(*results, strict=True))


def oracle(x, weight, bias, A, M, B, scale, dropout=0.0):  # type: ignore[no-untyped-def]
    """The three factors one after the other, by torch's own autograd, on an input with the same entries dropped."""
    kept = x
    if dropout:
        dropped = ops.draw_dropped(x.numel(), dropout)
        kept = x * torch.ones(x.numel(), dtype=x.dtype).index_fill(0, dropped, 0).view_as(x)
    update = functional.low_rank_update(kept, A, M, B, scale / (1 - dropout))
    return nn.functional.linear(x, weight, bias) + update


# 24 and 96 tokens lie on both sides of the layers' 32 and 48 inputs: M is chained in the one, composed in the other.
@pytest.mark.parametrize(
    "dropout, rows, few", [(0.0, 2, -1), (0.0, 2, few_tokens.FEW), (0.2, 8, few_tokens.FEW)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fifty_steps_have_the_losses_of_the_slow_path(dtype, dropout, rows, few, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(few_tokens, "FEW", few)
    drops = []
    for is_slow in (False, True):
        with monkeypatch.context() as patch:
            if is_slow:
                patch.setattr(ops, "adapted_linear", oracle)
                patch.setattr(ops, "by_few_operations", oracle)
            model = tiny.llama().to(dtype)
            torch.manual_seed(1)
            targets = [*ATTENTION, "down_proj"]
            settings = config(target_modules=targets, lora_dropout=dropout, init_lora_weights=True)
            model = get_peft_model(model, settings).train()
            losses = torch.tensor(train(model, 50, rows), dtype=torch.float64)
        drops.append(losses - losses[0])
    # What is compared is how far the loss has come, some hundredths of itself.
    assert drops[0].min() < -0.05
    if dtype == torch.float32:
        assert relative_error(*drops) < MODEL
    else:
        assert snr_db(*drops) > MODEL_SNR_DB[dtype]


def test_a_hook_on_the_base_layer_is_still_called() -> None:
    model = adapted()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    seen = []
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    model(tiny.tokens())
    assert seen == [1]


def test_gradient_checkpointing_gives_the_same_gradients_with_dropout() -> None:
    results = []
    for enabled in (False, True):
        model = adapted(lora_dropout=0.3).train()
        if enabled:
            upstream.checkpoint_activations(model, use_reentrant=False)
            model.enable_input_require_grads()
        torch.manual_seed(4)
        ids = tiny.tokens()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        results.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    assert all(relative_error(a, b) < MODEL for a, b in zip(*results, strict=True))


def test_dropout_acts_in_training_only() -> None:
    model = adapted(lora_dropout=0.5)
    with torch.no_grad():
        assert torch.equal(model(tiny.tokens()).logits, model(tiny.tokens()).logits)
        model.train()
        assert not torch.equal(model(tiny.tokens()).logits, model(tiny.tokens()).logits)


def test_it_compiles_whole() -> None:
    model = adapted()
    compiled = torch.compile(model, fullgraph=WHOLE, backend="aot_eager")
    with torch.no_grad():
        expected = model(tiny.tokens(), use_cache=False).logits
        assert relative_error(compiled(tiny.tokens(), use_cache=False).logits, expected) < MODEL


def test_a_low_precision_base_keeps_float32_factors() -> None:
    model = get_peft_model(tiny.llama().to(torch.bfloat16), config()).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    ids = tiny.tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_autocast_trains() -> None:
    model = adapted().train()
    ids = tiny.tokens()
    exact = model(input_ids=ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert (
        abs(float(loss.detach()) - float(exact.detach())) < 0.02
    )  # bfloat16 keeps 3 digits of a loss near 4


def test_a_deep_copy_is_independent() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = twin(tiny.tokens()).logits
        for p in model.parameters():
            p.zero_()
        assert torch.equal(twin(tiny.tokens()).logits, expected)


def test_modules_to_save_and_biases_travel(tmp_path: Path) -> None:
    model = adapted(modules_to_save=["lm_head"]).train()
    train(model)
    model.save_pretrained(tmp_path)
    assert any(key.endswith("lm_head.weight") for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(tiny.tokens()).logits, model.eval()(tiny.tokens()).logits)


def test_bias_means_what_it_means_in_lora() -> None:
    def trained(cls: type, bias: str) -> set[str]:
        model = get_peft_model(
            tiny.gpt2(), cls(r=2, target_modules=["c_attn"], bias=bias, fan_in_fan_out=True)
        )
        return {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}

    for ours, theirs in (
        ("none", "none"),
        ("all", "all"),
        ("moslora_only", "lora_only"),
        ("lora_only", "lora_only"),
    ):
        assert trained(MoSLoRAConfig, ours) == trained(LoraConfig, theirs)


def test_transformers_own_adapter_methods_work(tmp_path: Path) -> None:
    model = tiny.llama()
    torch.manual_seed(1)
    model.add_adapter(config())
    with torch.no_grad():
        expected = model(tiny.tokens()).logits
    model.save_pretrained(tmp_path)
    again = tiny.llama()
    again.load_adapter(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again(tiny.tokens()).logits, expected)


def tamper(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


KEY = "base_model.model.model.layers.0.self_attn.q_proj.moslora_M.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY), "missing from the checkpoint"),
        (lambda t: t.update({KEY: torch.eye(3)}), r"is \(3, 3\), the model needs \(4, 4\)"),
        (lambda t: t.update({KEY: torch.full((4, 4), float("nan"))}), "NaN or infinite"),
        (lambda t: t.update({KEY.replace("q_proj", "k_proj"): torch.eye(4)}), "fits no adapted module"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_whole(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    adapted().save_pretrained(tmp_path)
    tamper(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)


def test_a_base_of_another_shape_is_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit this model; nothing was loaded"):
        PeftModel.from_pretrained(tiny.llama(hidden_size=16), tmp_path)


def test_without_this_package_peft_fails_loudly(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    adapted().save_pretrained(tmp_path / "adapter")
    script = (
        "import sys, transformers, peft\n"
        "base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert 'moslora' not in sys.modules\n"
        "peft.PeftModel.from_pretrained(base, sys.argv[2])\n"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path / "base"), str(tmp_path / "adapter")]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode != 0 and "KeyError: 'MOSLORA'" in result.stderr


def test_a_native_adapter_relabelled_as_lora_has_no_tensor_that_lora_knows(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert not [k for k in keys if k.rsplit(".", 2)[-2] in ("lora_A", "lora_B")]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MOSLORA"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixer": "zeros"}, "cannot learn"),
        ({"mixer": "kaimin"}, "Did you mean 'kaiming'"),
        ({"mixer": "two-subspace", "r": 3}, "odd"),
        ({"r": 0}, "not a rank"),
        ({"r": 2.5}, "not a rank"),
        ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\['q_proj'\]=-1"),
        ({"lora_dropout": 1.0}, r"must lie in \[0, 1\)"),
        ({"bias": "some"}, "choose one of"),
        ({"init_lora_weights": "sure"}, "not supported with a mixer"),
        ({"layers_pattern": "layers"}, "needs layers_to_transform"),
        ({"target_modules": "q_proj", "layers_to_transform": [0]}, "is a string"),
    ],
)
def test_arguments_without_a_meaning_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoSLoRAConfig(**arguments)


def test_a_layer_of_another_kind_is_refused_with_the_way_out() -> None:
    with pytest.raises(
        TypeError, match=r"norm is a .*RMSNorm, which MoSLoRA cannot adapt.*exclude_modules.*modules_to_save"
    ):
        get_peft_model(tiny.llama(), config(target_modules=["norm"]))


def test_a_layer_with_another_methods_adapter_is_refused() -> None:
    model = tiny.llama()
    model.add_adapter(LoraConfig(target_modules=ATTENTION), "lora")
    with (
        pytest.warns(UserWarning, match="second time"),
        pytest.warns(UserWarning, match="Already found a `peft_config`"),
        pytest.raises(ValueError, match="already carries an adapter of another method"),
    ):
        get_peft_model(model, config())


@torch.no_grad()
def test_scales_are_set_and_restored() -> None:
    model = adapted()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = layer.get_delta_weight("default").clone()
    layer.set_scale("default", 2.0)
    assert relative_error(layer.get_delta_weight("default"), 2 * before) < RELATIVE[torch.float32]
    layer.scale_layer(0.25)
    layer.unscale_layer()
    assert torch.equal(layer.get_delta_weight("default"), before)


def test_leaving_the_fused_path_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    notices.forget()
    model = adapted(lora_dropout=0.5).train()
    with caplog.at_level("INFO", logger="moslora.tuner.linear"):
        model(tiny.tokens())
        model(tiny.tokens())
    assert [r.getMessage() for r in caplog.records] == [
        "Fused path disabled: base layer and update run separately: dropout 0.5 is above 0.25, where a mask is smaller "
        "than positions."
    ]
