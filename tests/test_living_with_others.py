"""The libraries that people train with: torch.compile, transformers' and diffusers' own methods, TRL's trainers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn

import laws
import tiny
import upstream
from ecosystem_scripts import arguments
from moslora import MoSLoRAConfig
from moslora.adapters.export import export_adapter
from moslora.adapters.formats.diffusers import METADATA
from moslora.adapters.formats.reading import read_adapter
from moslora.errors import AdapterError
from tolerances import MODEL, relative_error

ATTENTION = ["q_proj", "v_proj"]
# With M = I held fixed, and one seed, training is LoRA's.
AS_LORA = ((MoSLoRAConfig, {"mixer": "identity", "train_mixer": False}), (LoraConfig, {}))


# ---- torch.compile -------------------------------------------------------------------------------------------


def counted(model: nn.Module) -> tuple[Any, list[int]]:
    """The model compiled whole, and a list that grows with every compilation."""
    compilations: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        compilations.append(1)
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=backend), compilations


def two_adapters(**other: Any) -> PeftModel:
    model = laws.adapt(tiny.llama, target_modules=ATTENTION)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "init_lora_weights": False, **other}
    model.add_adapter("other", MoSLoRAConfig(**settings))
    return model.eval()


@torch.no_grad()
def test_hot_swapping_an_adapter_compiles_nothing_anew(tmp_path: Path) -> None:
    model, ids = two_adapters(), tiny.tokens()
    model.set_adapter("other")
    expected = model(ids, use_cache=False).logits
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    fresh = laws.adapt(tiny.llama, target_modules=ATTENTION)
    compiled, compilations = counted(fresh)
    before = compiled(ids, use_cache=False).logits
    assert relative_error(before, expected) > 100 * MODEL
    hotswap_adapter(fresh, str(tmp_path / "other"), adapter_name="default")
    assert relative_error(compiled(ids, use_cache=False).logits, expected) < MODEL
    assert len(compilations) == 1


@torch.no_grad()
def test_switching_compiles_once_for_each_adapter_and_never_again() -> None:
    """The active name is a constant of the graph, as in LoRA: who has many adapters of one shape swaps them."""
    model, ids = two_adapters(), tiny.tokens()
    compiled, compilations = counted(model)
    for names, expected in ((["default", "other"], 2), (["default", "other"] * 3, 2)):
        for name in names:
            model.set_adapter(name)
            found = compiled(ids, use_cache=False).logits
            assert relative_error(found, model(ids, use_cache=False).logits) < MODEL
        assert len(compilations) == expected
    with model.disable_adapter():
        base = tiny.llama()(ids, use_cache=False).logits
        assert relative_error(compiled(ids, use_cache=False).logits, base) < MODEL


def test_a_compiled_model_trains_as_an_eager_one() -> None:
    gradients = []
    for compile_it in (False, True):
        model = laws.adapt(tiny.llama, target_modules=ATTENTION).train()
        run = counted(model)[0] if compile_it else model
        ids = tiny.tokens()
        run(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in laws.factors_by_key(model).values()])
    for one, two in zip(*gradients, strict=True):
        assert relative_error(two, one) < MODEL


# ---- gradient checkpointing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_of_both_kinds_gives_the_same_gradients(use_reentrant: bool) -> None:
    gradients = []
    for enabled in (False, True):
        model = laws.adapt(tiny.llama, target_modules=ATTENTION).train()
        if enabled:
            upstream.checkpoint_activations(model, use_reentrant=use_reentrant)
            model.enable_input_require_grads()
        ids = tiny.tokens()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in laws.factors_by_key(model).values()])
    for one, two in zip(*gradients, strict=True):
        assert relative_error(two, one) < MODEL


# ---- transformers --------------------------------------------------------------------------------------------


@upstream.needs("load_adapter has no hotswap before", transformers="5")
@torch.no_grad()
def test_transformers_own_hot_swap_takes_another_rank_and_scale_and_refuses_what_does_not_fit(
    tmp_path: Path,
) -> None:
    ids, outputs = tiny.tokens(), {}
    for name, changes in (("one", {}), ("two", {"r": 2, "lora_alpha": 32}), ("big", {"r": 8})):
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "init_lora_weights": False}
        torch.manual_seed(len(outputs))
        saved = tiny.llama()
        saved.add_adapter(MoSLoRAConfig(**{**settings, **changes}))
        saved.save_pretrained(tmp_path / name)
        outputs[name] = saved(ids).logits
    model = tiny.llama()
    model.load_adapter(str(tmp_path / "one"), adapter_name="default")
    compiled, compilations = counted(model)
    assert relative_error(compiled(ids, use_cache=False).logits, outputs["one"]) < MODEL
    report = model.load_adapter(str(tmp_path / "two"), adapter_name="default", hotswap=True)
    assert not report.missing_keys and not report.error_msgs
    assert relative_error(compiled(ids, use_cache=False).logits, outputs["two"]) < MODEL
    assert len(compilations) == 1
    with pytest.raises(ValueError, match=r"rank 8 does not fit into rank 4"):
        model.load_adapter(str(tmp_path / "big"), adapter_name="default", hotswap=True)
    with pytest.raises(ValueError, match="already exists"):
        model.load_adapter(str(tmp_path / "one"), adapter_name="default")
    assert relative_error(model(ids).logits, outputs["two"]) < MODEL


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT's, with LoRA too
@torch.no_grad()
def test_transformers_own_methods_hold_several_adapters(tmp_path: Path) -> None:
    ids, base = tiny.tokens(), tiny.llama()(tiny.tokens()).logits
    model = tiny.llama()
    torch.manual_seed(1)
    outputs = {}
    for name, r in (("one", 4), ("two", 2)):
        model.add_adapter(MoSLoRAConfig(r=r, target_modules=ATTENTION, init_lora_weights=False), name)
        model.set_adapter(name)
        outputs[name] = model(ids).logits
        model.save_pretrained(tmp_path / name)
    assert relative_error(outputs["one"], outputs["two"]) > 100 * MODEL
    model.disable_adapters()
    assert relative_error(model(ids).logits, base) < MODEL
    model.enable_adapters()
    model.set_adapter("one")
    assert relative_error(model(ids).logits, outputs["one"]) < MODEL
    again = tiny.llama()
    for name in outputs:
        again.load_adapter(str(tmp_path / name), adapter_name=name)
        again.set_adapter(name)
        assert relative_error(again(ids).logits, outputs[name]) < MODEL
    again.set_adapter("one")
    again.delete_adapter("two")
    assert relative_error(again(ids).logits, outputs["one"]) < MODEL
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "two")
    assert relative_error(loaded(ids).logits, outputs["two"]) < MODEL


# ---- diffusers -----------------------------------------------------------------------------------------------


def trained_unet() -> Any:
    """An SDXL pipeline whose U-Net carries an adapter, as the scripts of diffusers add it, after one step."""
    import tiny_pipelines

    pipeline = tiny_pipelines.sdxl()
    pipeline.unet.requires_grad_(False)
    torch.manual_seed(1)
    targets = ["to_q", "to_v", "to_out.0", "conv1"]
    settings = {"r": 4, "lora_alpha": 6, "rank_pattern": {"to_v": 2}, "init_lora_weights": False}
    pipeline.unet.add_adapter(MoSLoRAConfig(target_modules=targets, **settings))
    trained = [p for p in pipeline.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    noise = torch.randn(1, 4, 8, 8)
    added = {"text_embeds": torch.randn(1, 16), "time_ids": torch.randn(1, 6)}
    found = pipeline.unet(noise, torch.tensor(9), torch.randn(1, 8, 32), added_cond_kwargs=added).sample
    (found - noise).square().mean().backward()
    before = [p.detach().clone() for p in trained]
    optimizer.step()
    assert all(not torch.equal(p, start) for p, start in zip(trained, before, strict=True))
    return pipeline


@pytest.mark.filterwarnings("ignore:.*torchvision.*")
def test_an_adapter_of_diffusers_own_method_is_loaded_by_diffusers_as_it_was_saved(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    import tiny_pipelines

    pipeline = trained_unet()
    expected = tiny_pipelines.outputs(pipeline)["unet"]
    tensors = get_peft_model_state_dict(pipeline.unet)
    pipeline.save_lora_weights(
        tmp_path / "trained", unet_lora_layers=tensors, **_collate_lora_metadata({"unet": pipeline.unet})
    )
    trained = tmp_path / "trained" / "pytorch_lora_weights.safetensors"
    fresh = tiny_pipelines.sdxl()
    assert relative_error(tiny_pipelines.outputs(fresh)["unet"], expected) > 100 * MODEL
    fresh.load_lora_weights(trained.parent)
    assert relative_error(tiny_pipelines.outputs(fresh)["unet"], expected) < MODEL

    # What moslora 0.1 left there: the adapter itself, which stock loaders run without its mixers.
    save_file(
        {f"unet.{key}": tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "bare.safetensors"
    )
    with pytest.raises(AdapterError, match=r"rank and alpha of unet.*--alpha"):
        read_adapter(tmp_path / "bare.safetensors")
    said = {f"unet.{key}": value for key, value in pipeline.unet.peft_config["default"].to_dict().items()}
    save_file(
        load_file(tmp_path / "bare.safetensors"), tmp_path / "told.safetensors", {METADATA: json.dumps(said)}
    )
    for source in (tmp_path / "told.safetensors", trained.parent / "moslora_checkpoint"):
        export_adapter(source, tmp_path / "style.safetensors", "diffusers")
        fresh = tiny_pipelines.sdxl()
        fresh.load_lora_weights(tmp_path, weight_name="style.safetensors")
        assert relative_error(tiny_pipelines.outputs(fresh)["unet"], expected) < MODEL
        (tmp_path / "style.safetensors").unlink()

    pipeline.unet.save_lora_adapter(tmp_path / "nameless")
    with pytest.raises(AdapterError, match=r"not the name of the model.*save_for_diffusers"):
        read_adapter(tmp_path / "nameless" / "pytorch_lora_weights.safetensors")


# TRL asks transformers for what it calls otherwise now.
trl_is_behind = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")


# ---- TRL -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_chat_model(tmp_path_factory.mktemp("trl") / "base")


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def peft_config(cls: type, **own: Any) -> Any:
    return cls(r=4, lora_alpha=8, target_modules=ATTENTION, task_type="CAUSAL_LM", **own)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def log_probabilities(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of each row's completion; ``mask`` tells its tokens."""
    scores = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    return (scores.gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum(1)


@upstream.needs(
    "arguments have other names, and logged losses are rounded, before", trl="1.16", transformers="5"
)
@trl_is_behind
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_trls_dpo_trainer_takes_the_base_as_its_reference(
    chat_model: Path, tmp_path: Path, use_reentrant: bool
) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": f"say {n} ", "chosen": "yes", "rejected": "no no"} for n in range(8)]
    found = []
    for cls, own in AS_LORA:
        torch.manual_seed(1)
        kwargs = {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": use_reentrant},
        }
        trainer = DPOTrainer(
            load(chat_model),
            args=DPOConfig(**arguments(tmp_path / cls.__name__, **kwargs)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny.tokenizer(),
            peft_config=peft_config(cls, **own),
        )
        trainer.train()
        found.append(losses(trainer))
        batch = next(iter(trainer.get_train_dataloader()))
        reference = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
        ids, mask = batch["input_ids"], batch["completion_mask"]
        assert relative_error(reference, log_probabilities(load(chat_model), ids, mask)) < MODEL
        policy = log_probabilities(trainer.model.eval(), ids, mask)
        assert relative_error(policy, reference) > 100 * MODEL
    assert found[0][0] == pytest.approx(math.log(2), rel=MODEL)  # policy and reference are one at the start
    assert found[0][-1] < math.log(2) - 100 * MODEL
    assert found[0] == pytest.approx(found[1], rel=50 * MODEL)


@upstream.needs("logged losses are rounded before", transformers="5")
@trl_is_behind
def test_dpo_continues_an_adapter_against_a_frozen_copy_of_it(chat_model: Path, tmp_path: Path) -> None:
    """TRL copies the factors of "default" into "ref": mixers, too."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    torch.manual_seed(1)
    model = get_peft_model(load(chat_model), peft_config(MoSLoRAConfig, init_lora_weights=False))
    start = {n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n}
    rows = [{"prompt": f"say {n} ", "chosen": "yes", "rejected": "no no"} for n in range(8)]
    trainer = DPOTrainer(
        model,
        args=DPOConfig(**arguments(tmp_path)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), rel=MODEL)
    parameters = dict(trainer.model.named_parameters())
    assert any("moslora_M" in name for name in start)
    for name, value in start.items():
        assert torch.equal(parameters[name.replace(".default.", ".ref.")], value)
        assert not torch.equal(parameters[name], value)
