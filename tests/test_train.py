from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback
from typer.testing import CliRunner

import moslora.training.callbacks
import moslora.training.reload_proof.proof
import moslora.training.run
import moslora.training.saving
import tiny
from moslora.adapters.formats.reading import read_adapter
from moslora.cli import app
from moslora.display import Display
from moslora.errors import BusyError, ProofError, Stopped, TrainingError
from moslora.training.run import check, resume, train
from moslora.training.run_directory import RunDirectory
from moslora.training.stop import StopRequest
from tolerances import MODEL, relative_error

pytestmark = pytest.mark.filterwarnings(
    # datasets forks a pool for nothing, TRL and accelerate use torch names that torch has renamed.
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_chat_model(folder / "base")
    tiny.save_chat_data(folder / "train.jsonl", 24)
    tiny.save_chat_data(folder / "heldout.jsonl", 5)
    return folder


def arguments(world: Path, out: Path, **changes: object) -> list[str]:
    settings: dict[str, object] = {
        "model": world / "base",
        "data": world / "train.jsonl",
        "data.heldout": world / "heldout.jsonl",
        "task.metric": "json",
        "task.max_new_tokens": 8,
        "adapter.r": 4,
        "adapter.lora_dropout": 0.1,
        "trainer.max_steps": 6,
        "trainer.learning_rate": "5e-3",
        "trainer.per_device_train_batch_size": 4,
        "trainer.save_steps": 100,
        "output.dir": out,
        "output.name": "run",
    }
    return [f"{key}={value}" for key, value in {**settings, **changes}.items()]


def quiet() -> Display:
    return Display(quiet=True)


def weights(run: RunDirectory) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process a real signal after a training step, once."""
    original = moslora.training.callbacks.Recorder

    def recorder(run: Any, log: Any) -> TrainerCallback:
        callback = original(run, log)
        end = callback.on_step_end

        def on_step_end(args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if state.global_step == step and "sent" not in sent:
                sent.append("sent")
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)
            return end(args, state, control, **kwargs)

        callback.on_step_end = on_step_end
        return callback

    sent: list[str] = []
    monkeypatch.setattr(moslora.training.callbacks, "Recorder", recorder)


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return train(arguments(world, tmp_path_factory.mktemp("runs")), quiet(), "moslora train ...")


def test_a_run_leaves_everything_it_promises(finished: RunDirectory) -> None:
    names = {p.name for p in finished.path.iterdir()}
    assert {
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "adapter",
        "lora",
        "checkpoints",
        "report.html",
    } <= names
    record = finished.read()
    assert record["status"] == "completed"
    assert record["metrics"]["before"].keys() == record["metrics"]["after"].keys() >= {"loss", "exact_match"}
    assert record["metrics"]["after"]["loss"] < record["metrics"]["before"]["loss"]
    assert record["proofs"]["fold"]["max_relative_error"] <= 1e-6
    assert record["proofs"]["reload"]["max_logit_difference"] < 1e-3
    assert record["proofs"]["reload"]["adapter_effect"] > 0.01
    assert record["timing"]["train_seconds"] > 0
    assert record["trainable_parameters"] == sum(t.numel() for t in weights(finished).values())
    assert {"torch", "peft", "moslora"} <= record["versions"].keys()
    assert record["hashes"]["data"]["train"] and record["hashes"]["chat_template"]
    lines = [json.loads(line) for line in finished.metrics.read_text().splitlines()]
    assert lines and all("step" in line for line in lines)


def test_the_shipped_lora_gives_the_trained_models_logits(finished: RunDirectory, world: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    ids = torch.tensor([tiny.tokenizer()("say 3")["input_ids"]])
    with torch.no_grad():
        lora = PeftModel.from_pretrained(base, finished.lora)(ids).logits
        base = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
        native = PeftModel.from_pretrained(base, finished.adapter)(ids).logits
    assert (lora - native).abs().max() < 1e-4
    assert read_adapter(finished.lora).is_folded and not read_adapter(finished.adapter).is_folded


def test_a_second_run_gets_its_own_place_and_the_same_weights(finished: RunDirectory, world: Path) -> None:
    again = train(arguments(world, finished.path.parent), quiet())
    assert again.path.name == "run-2"
    assert all(
        torch.equal(a, b) for a, b in zip(weights(again).values(), weights(finished).values(), strict=True)
    )


def test_interrupted_and_resumed_ends_bit_for_bit_as_uninterrupted(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(arguments(world, tmp_path / "whole", **{"trainer.max_steps": 10}), quiet())
    stop_at(monkeypatch, 5)
    with pytest.raises(Stopped) as stopped:
        train(arguments(world, tmp_path / "parts", **{"trainer.max_steps": 10}), quiet())
    assert stopped.value.signal_number == signal.SIGTERM
    run = RunDirectory.open(tmp_path / "parts" / "run")
    assert run.read()["status"] == "interrupted"
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None and checkpoint.step == 5
    assert not run.lora.exists()
    resumed = resume(run.path, quiet())
    assert resumed.read()["status"] == "completed"
    assert weights(resumed).keys() == weights(whole).keys()
    assert all(torch.equal(weights(resumed)[name], tensor) for name, tensor in weights(whole).items())
    steps = [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]
    assert steps == sorted(steps)


def test_an_interruption_while_measuring_is_resumed_too(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "check", lambda self: (_ for _ in ()).throw(Stopped(signal.SIGINT)))
        with pytest.raises(Stopped):
            train(arguments(world, tmp_path, **{"trainer.max_steps": 2}), quiet())
    assert RunDirectory.open(tmp_path / "run").read()["status"] == "interrupted"
    assert resume(tmp_path / "run", quiet()).read()["status"] == "completed"


def test_signals_are_given_back(world: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(quiet()) as stop:
        assert signal.getsignal(signal.SIGTERM) != before
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        with pytest.raises(Stopped):
            stop.check()
    assert signal.getsignal(signal.SIGTERM) == before


def test_resuming_with_other_data_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny.save_chat_data(tmp_path / "mine.jsonl", 12)
    stop_at(monkeypatch, 1)
    with pytest.raises(Stopped):
        train(arguments(world, tmp_path, data=data), quiet())
    tiny.save_chat_data(data, 13)
    with pytest.raises(ValueError, match="its data changed since it began"):
        resume(tmp_path / "run", quiet())
    assert RunDirectory.open(tmp_path / "run").read()["status"] == "interrupted"  # as it was


def test_a_completed_run_is_not_resumed(finished: RunDirectory) -> None:
    with pytest.raises(ValueError, match="is completed"):
        resume(finished.path, quiet())


def test_a_proof_that_fails_fails_the_run_and_ships_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = moslora.training.reload_proof.proof.live_logits

    def shifted(*args: Any) -> dict[str, torch.Tensor]:
        return {name: logits + 0.1 for name, logits in honest(*args).items()}

    monkeypatch.setattr(moslora.training.reload_proof.proof, "live_logits", shifted)
    with pytest.raises(ProofError, match=r"stock PEFT's logits differ by 1\.00e-01"):
        train(arguments(world, tmp_path, **{"trainer.max_steps": 2}), quiet())
    run = RunDirectory.open(tmp_path / "run")
    assert run.read()["status"] == "failed" and "logits differ" in run.read()["error"]
    assert not run.lora.exists() and run.adapter.exists()
    assert (run.path / "lora.rejected" / "adapter_model.safetensors").is_file()
    assert run.read()["proofs"]["reload"]["passed"] is False
    with pytest.raises(ProofError):  # the same again: nothing was made of it, and nothing is in the way
        resume(run.path, quiet())
    assert not run.lora.exists() and (run.path / "lora.rejected").is_dir()


def test_a_tampered_lora_is_caught_by_the_fresh_process(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = moslora.training.saving.export_adapter

    def tampering(source: Path, out: Path, to: str) -> Any:
        proof = honest(source, out, to)
        path = out / "adapter_model.safetensors"
        tensors = load_file(path)
        tensors[next(k for k in tensors if "lora_B" in k)] *= 3
        save_file(tensors, path)
        return proof

    monkeypatch.setattr(moslora.training.saving, "export_adapter", tampering)
    with pytest.raises(ProofError):
        train(arguments(world, tmp_path), quiet())


def test_divergence_is_named_and_nothing_is_saved(world: Path, tmp_path: Path) -> None:
    diverging = {"trainer.learning_rate": "1e30", "trainer.max_grad_norm": 0, "trainer.max_steps": 4}
    with pytest.raises(TrainingError, match=r"diverged.*learning_rate"):
        train(arguments(world, tmp_path, **diverging), quiet())
    run = RunDirectory.open(tmp_path / "run")
    assert run.read()["status"] == "failed" and not run.lora.exists() and not run.adapter.exists()


def test_bad_input_leaves_no_run(world: Path, tmp_path: Path) -> None:
    for changes in ({"data": tmp_path / "no.jsonl"}, {"model": world / "bas"}, {"adapter.lora_aplha": 3}):
        with pytest.raises(ValueError, match=r"(?i)did you mean|no such file"):
            train(arguments(world, tmp_path / "runs", **changes), quiet())
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_writes_nothing(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(arguments(world, tmp_path / "runs"), Display())
    shown = capsys.readouterr().out
    assert '⟦{"n": 0}<|im_end|>⟧' in shown.replace("⟧⟦", "") and "Nothing was trained" in shown
    assert not (tmp_path / "runs").exists()


def run_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moslora.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_command_trains_and_exports_and_says_so(world: Path, tmp_path: Path) -> None:
    done = run_command(
        "train", "--json", *arguments(world, tmp_path, **{"trainer.max_steps": 2}), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "completed"
    assert "Proven: fold" in done.stderr and "Held-out loss" in done.stderr
    done = run_command("export", "run/adapter", "shipped", cwd=tmp_path)
    assert done.returncode == 0 and "Proven: largest relative error" in done.stdout
    again = CliRunner().invoke(app, ["export", str(tmp_path / "run/adapter"), str(tmp_path / "shipped")])
    assert again.exit_code == 2


def test_a_killed_process_is_told_apart_and_resumed(world: Path, tmp_path: Path) -> None:
    many = arguments(world, tmp_path, **{"trainer.max_steps": 2000, "trainer.save_steps": 5})
    process = subprocess.Popen(
        [sys.executable, "-m", "moslora.cli", "train", *many],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    run = tmp_path / "run"
    for _ in range(600):
        if list((run / "checkpoints").glob("checkpoint-*/trainer_state.json")) or process.poll() is not None:
            break
        time.sleep(0.1)
    try:
        with pytest.raises(BusyError, match="still in progress"):
            resume(run, quiet())
    finally:
        process.kill()
        process.wait()
    directory = RunDirectory.open(run)
    assert directory.read()["status"] == "running"
    # Make it short: what is resumed is the recipe of the run.
    recipe = directory.recipe
    checkpoint = directory.latest_checkpoint(lambda _: None)
    assert checkpoint is not None
    recipe.write_text(recipe.read_text().replace("max_steps: 2000", f"max_steps: {checkpoint.step + 2}"))
    resume(run, quiet())
    assert directory.read()["status"] == "completed"


def test_the_loss_on_labels_only_is_trls_in_value_and_gradients(world: Path, tmp_path: Path) -> None:
    from moslora import MoSLoRAConfig
    from moslora.recipe.loading import load_recipe
    from moslora.tasks.text.loss import labeled_loss, scores_plainly
    from moslora.tasks.text.task import TextTask

    task = TextTask(load_recipe(arguments(world, tmp_path)), quiet(), lambda: None)
    task.read()
    task.prepare()
    config = MoSLoRAConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    trainer: Any = task.build_trainer(task.load(), config, tmp_path, [])
    assert scores_plainly(trainer)
    inputs = next(iter(trainer.get_train_dataloader()))
    factors = [p for p in trainer.model.parameters() if p.requires_grad]
    theirs = super(type(trainer), trainer).compute_loss(trainer.model, dict(inputs))
    ours = trainer.compute_loss(trainer.model, dict(inputs))
    total, count = labeled_loss(trainer.model.get_base_model(), inputs)
    assert torch.equal(ours, total / count)
    for one, two in zip(
        [ours, *torch.autograd.grad(ours, factors)],
        [theirs, *torch.autograd.grad(theirs, factors)],
        strict=True,
    ):
        assert relative_error(one, two) < MODEL
    trainer.args.label_smoothing_factor = 0.1
    assert not scores_plainly(trainer)


def test_mixed_precision_reaches_the_loss_on_labels_only(world: Path, tmp_path: Path) -> None:
    from moslora import MoSLoRAConfig
    from moslora.recipe.loading import load_recipe
    from moslora.tasks.text.task import TextTask

    seen = set()
    for precise in (True, False):
        changes = {"trainer.bf16": str(not precise).lower(), "trainer.max_steps": 1}
        task = TextTask(load_recipe(arguments(world, tmp_path, **changes)), quiet(), lambda: None)
        task.read()
        task.prepare()
        model: Any = task.load()
        config = MoSLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer: Any = task.build_trainer(model, config, tmp_path / str(precise), [])
        head = trainer.model.get_output_embeddings()
        head.register_forward_hook(lambda _, __, logits, precise=precise: seen.add((precise, logits.dtype)))
        trainer.train()
    assert seen == {(True, torch.float32), (False, torch.bfloat16)}


def test_a_recipe_may_ask_for_dora_and_a_start_from_principal_components(world: Path, tmp_path: Path) -> None:
    changes = {"adapter.use_dora": "true", "adapter.init_lora_weights": "pissa", "trainer.max_steps": 3}
    run = train(arguments(world, tmp_path, **changes), quiet())
    folded = json.loads((run.lora / "adapter_config.json").read_text())
    assert (folded["peft_type"], folded["use_dora"], folded["r"]) == ("LORA", True, 8)
    proofs = json.loads((run.path / "run.json").read_text())["proofs"]
    assert all(proof["passed"] for proof in proofs.values())


def gradients(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    from moslora.tasks.text.loss import labeled_loss

    total, count = labeled_loss(model.get_base_model(), inputs)
    loss = total / count
    return [loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


def adapted(model: Any) -> Any:
    from peft import get_peft_model

    from moslora import MoSLoRAConfig

    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, MoSLoRAConfig(**settings))


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_rows_laid_end_to_end_have_the_loss_and_gradients_of_padded_ones(make: Any) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from moslora.tasks.text.padding import why_rows_mix

    base = make()
    assert why_rows_mix(base, 0) is None
    model = adapted(base)
    rows = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (5, 12, 9)]
    examples = [{"input_ids": row, "labels": [-100] * 3 + row[3:]} for row in rows]
    padded, laid = (
        DataCollatorForLanguageModeling(pad_token_id=0, padding_free=free)(examples) for free in (False, True)
    )
    assert laid["input_ids"].shape == (1, 26) and padded["input_ids"].shape == (3, 12)
    for one, two in zip(gradients(model, laid), gradients(model, padded), strict=True):
        assert relative_error(one, two) < MODEL


def test_an_architecture_that_carries_rows_over_is_found_out() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    from moslora.tasks.text.padding import why_rows_mix

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    assert "padding-free" in (why_rows_mix(MambaForCausalLM(config).eval(), 0) or "")


def test_runs_lay_rows_end_to_end_unless_told_otherwise(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moslora.tasks.text.padding
    from moslora import MoSLoRAConfig
    from moslora.recipe.loading import load_recipe
    from moslora.tasks.text.task import TextTask

    # So narrow a model spends all on attention, and would be padded.
    monkeypatch.setattr(moslora.tasks.text.padding, "padding_cost", lambda *_: 2.0)

    def batch(**changes: object) -> Any:
        task = TextTask(load_recipe(arguments(world, tmp_path, **changes)), quiet(), lambda: None)
        task.read()
        task.prepare()
        config = MoSLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer: Any = task.build_trainer(task.load(), config, tmp_path, [])
        return next(iter(trainer.get_train_dataloader()))

    assert batch()["input_ids"].shape[0] == 1
    assert batch(**{"trainer.padding_free": "false"})["input_ids"].shape[0] == 4
    assert batch(**{"trainer.per_device_train_batch_size": 1})["input_ids"].shape[0] == 1


def test_end_to_end_is_not_chosen_where_attention_would_cost_more_than_padding() -> None:
    from moslora.tasks.text.padding import padding_cost

    model = tiny.llama()
    assert padding_cost(model, [8, 4, 8, 2], 4, 0) > 1
    assert padding_cost(model, [4096] * 8, 8, 0) < 1


def test_the_work_of_a_token_counts_whole_4_bit_weights_and_the_experts_that_it_meets() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from moslora.tasks.text.padding import _count, _weights_per_token

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    found = []
    for chosen in (1, 2, 4):
        config = MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=chosen)
        model = MixtralForCausalLM(config)
        found.append(_weights_per_token(model, model.config))
    assert found[1] - found[0] == 3 * 16 * 32 and found[2] - found[1] == 2 * 3 * 16 * 32
    packed: Any = torch.nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    assert _count(packed) == 32
    packed.quant_state = type("State", (), {"shape": torch.Size((8, 8))})()
    assert _count(packed) == 64


def test_padding_free_is_never_chosen_with_eager_attention(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moslora.tasks.text.padding as padding

    monkeypatch.setattr(padding, "padding_cost", lambda *_: 2.0)
    config = type("Config", (), {"per_device_train_batch_size": 4, "n_gpu": 1})()
    for implementation, chosen in (("eager", False), ("sdpa", True)):
        model = tiny.llama()
        model.set_attn_implementation(implementation)
        assert padding.choose_padding_free(model, config, [8, 4, 8, 2], 0, 0, quiet()) is chosen


def test_answers_are_generated_half_at_a_time_where_memory_does_not_take_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import moslora.tasks.text.generation as generation

    model, tok = tiny.llama(vocab_size=259), tiny.tokenizer()
    settings = generation.Generation(4, None, 0)
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14], [15, 16]]
    whole = generation.generate_from_prompts(model, tok, prompts, settings, "cpu", 8, lambda _: None)
    own, sizes = generation.generate, []

    def small(model: Any, tokenizer: Any, inputs: Any, *rest: Any) -> list[str]:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(model, tokenizer, inputs, *rest)

    monkeypatch.setattr(generation, "generate", small)
    counted: list[int] = []
    assert generation.generate_from_prompts(model, tok, prompts, settings, "cpu", 8, counted.append) == whole
    assert sizes == [5, 2, 3, 1, 2] and counted == [5]


def test_logits_taken_in_parts_give_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    import moslora.tasks.text.loss

    model = adapted(tiny.llama())
    ids = tiny.tokens(2, 20)
    whole = gradients(model, {"input_ids": ids, "labels": ids})
    monkeypatch.setattr(moslora.tasks.text.loss, "LOGIT_ROWS", 7)
    kept: list[tuple[int, ...]] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        parts = gradients(model, {"input_ids": ids, "labels": ids})
    for one, two in zip(parts, whole, strict=True):
        assert relative_error(one, two) < MODEL
    assert not [shape for shape in kept if shape[-1:] == (64,) and shape[0] > 7], (
        "logits of all positions kept"
    )


def test_a_dry_run_counts_what_the_run_trains_from_the_configuration_alone(
    finished: RunDirectory, world: Path, tmp_path: Path
) -> None:
    from moslora.recipe.loading import load_recipe
    from moslora.tasks.text.task import TextTask

    ignore = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(world / "base", tmp_path / "configured", ignore=ignore)
    recipe = load_recipe(arguments(world, tmp_path, model=tmp_path / "configured"))
    task = TextTask(recipe, quiet(), lambda: None)
    task.needs_weights = False
    (count,) = task.count()
    record = finished.read()
    assert count.trained == record["trainable_parameters"]
    assert count.base + count.trained == record["total_parameters"]


def test_a_four_bit_base_trains_in_float32_and_the_lora_is_proven_on_it(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    # Its kernels want multiples of 32.
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4, "vocab_size": 259}
    tiny.llama(max_position_embeddings=256, bos_token_id=None, eos_token_id=2, **sizes).save_pretrained(
        tmp_path / "base"
    )
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    run = train(arguments(world, tmp_path, model=tmp_path / "base", **{"model.quantization": "nf4"}), quiet())
    assert run.read()["proofs"]["reload"]["passed"]
    assert {tensor.dtype for tensor in weights(run).values()} == {torch.float32}


def test_a_run_stopped_after_its_last_step_is_resumed_without_another(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"trainer.max_steps": 4, "trainer.lr_scheduler_type": "constant", "task.generate_examples": 0}
    with monkeypatch.context() as patch:
        patch.setattr(
            moslora.training.run, "prove_reloaded", lambda *_: (_ for _ in ()).throw(Stopped(signal.SIGINT))
        )
        with pytest.raises(Stopped):
            train(arguments(world, tmp_path, **changes), quiet())
    run = RunDirectory.open(tmp_path / "run")
    before = weights(run)
    resumed = resume(run.path, quiet())
    assert resumed.read()["status"] == "completed"
    assert all(torch.equal(weights(resumed)[name], tensor) for name, tensor in before.items())
    assert max(json.loads(line)["step"] for line in run.metrics.read_text().splitlines()) == 4


@pytest.mark.parametrize("loss", ["nll", "dft"])  # ours on labels only, and TRL's own
def test_what_is_trained_whole_learns_in_float32_on_a_bfloat16_base_and_is_proven(
    loss: str, world: Path, tmp_path: Path
) -> None:
    from moslora.recipe.loading import load_recipe
    from moslora.tasks.text.task import TextTask

    changes = {"model.dtype": "bfloat16", "adapter.modules_to_save": "[lm_head,embed_tokens]"}
    changes |= {"trainer.learning_rate": "1e-5", "trainer.max_steps": 2, "trainer.loss_type": loss}
    given = arguments(world, tmp_path, **changes)
    task = TextTask(load_recipe(given), quiet(), lambda: None)
    task.read()
    task.prepare()
    model: Any = task.load()
    trainer: Any = task.build_trainer(model, task.adapter_config(model), tmp_path, [])
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "modules_to_save" in n}
    assert len(before) == 2 and {p.dtype for p in before.values()} == {torch.float32}
    assert {p.dtype for n, p in trainer.model.named_parameters() if not p.requires_grad} == {torch.bfloat16}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    # Steps this small would be lost on bfloat16 in most places. Of embeddings only those of tokens that occur move.
    moved = {n: (after[n] != p).any(dim=-1) for n, p in before.items()}
    head = next(n for n in moved if "lm_head" in n)
    assert float((after[head] != before[head]).float().mean()) > 0.9
    assert all(int(rows.sum()) > 10 for rows in moved.values())
    if loss == "nll":
        record = train([*given, "trainer.learning_rate=5e-3"], quiet()).read()
        assert record["proofs"]["reload"]["passed"]
        assert record["metrics"]["after"]["loss"] < record["metrics"]["before"]["loss"]
