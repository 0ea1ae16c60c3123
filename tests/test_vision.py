"""Laws of task=vision, on a tiny random LLaVA whose pictures are drawn here."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    TrainerCallback,
)

import tiny
from moslora.answers import choice_equal, short_equal
from moslora.display import Display
from moslora.recipe import load_recipe
from moslora.rundir import RunDirectory
from moslora.tasks.text import scores_plainly
from moslora.tasks.vision import VisionTask, open_image
from moslora.train import Stopped, check, resume, train
from tolerances import MODEL, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_llava(folder: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    language = LlamaConfig(
        vocab_size=260, max_position_embeddings=256, bos_token_id=None, eos_token_id=2, **sizes
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **sizes),
        text_config=language,
        image_token_index=259,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    sides = {"height": 16, "width": 16}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=sides),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    save_llava(folder / "base")
    for index, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (20, 18), colour).save(folder / f"{colour}.png")
        rows = [
            {
                "image": f"{colour}.png",
                "conversations": [
                    {"from": "human", "value": f"<image>\nWhich? {n}"},
                    {"from": "gpt", "value": colour},
                ],
            }
            for n in range(2)
        ]
        name = "heldout" if index == 3 else "train"
        kept = json.loads((folder / f"{name}.json").read_text()) if (folder / f"{name}.json").exists() else []
        (folder / f"{name}.json").write_text(json.dumps(kept + rows))
    return folder


def arguments(world: Path, out: Path, *changes: str) -> list[str]:
    return [
        "task=vision", "task.metric=short", "task.max_new_tokens=4", f"model={world / 'base'}",
        f"data={world / 'train.json'}", f"data.heldout={world / 'heldout.json'}", "adapter.r=2",
        "scopes.vision=adapter", "scopes.vision_alpha=1", "scopes.vision_r=3", "scopes.projector=full",
        "trainer.max_steps=3", "trainer.learning_rate=1e-2", "trainer.per_device_train_batch_size=3",
        f"output.dir={out}", "output.name=run", *changes,
    ]  # fmt: skip


def test_a_run_trains_scopes_and_the_shipped_adapter_is_proven_in_stock_peft(
    world: Path, tmp_path: Path
) -> None:
    run: RunDirectory = train(arguments(world, tmp_path), Display(quiet=True))
    record = run.read()
    assert record["status"] == "completed" and record["proofs"]["reload"]["passed"]
    assert record["metrics"]["after"].keys() == {"loss", "accuracy", "accuracy_shuffled_images"}
    assert record["metrics"]["after"]["loss"] < record["metrics"]["before"]["loss"]
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    ranks = {name: t.shape[0] for name, t in tensors.items() if name.endswith("moslora_A.weight")}
    assert {r for n, r in ranks.items() if "vision_tower" in n} == {3}
    assert {r for n, r in ranks.items() if "language_model" in n} == {2}
    assert any("projector" in n and "moslora" not in n for n in tensors)


def test_tokens_of_pictures_are_never_learned_and_answers_are(world: Path, tmp_path: Path) -> None:
    task = VisionTask(load_recipe(arguments(world, tmp_path)), Display(quiet=True), lambda: None)
    task.read()
    task.prepare()
    assert task.train_summary.control_text == 0
    for example in task.train_set:
        assert example.input_ids.count(259) == 4 and 259 not in example.labels
        learned = [label for label in example.labels if label != -100]
        assert task.tokenizer.decode(learned) == f"{example.answer}<|im_end|>"


def test_bad_pictures_are_named_with_their_place_and_refused_or_skipped(world: Path, tmp_path: Path) -> None:
    rows = json.loads((world / "train.json").read_text())
    (world / "broken.png").write_bytes((world / "red.png").read_bytes()[:40])
    rows[1]["image"], rows[3]["image"] = "broken.png", "absent.png"
    (world / "bad.json").write_text(json.dumps(rows))
    changed = arguments(world, tmp_path, f"data.train={world / 'bad.json'}")
    with pytest.raises(ValueError, match=r"(?s)row 2: .*broken.*row 4: .*absent.png does not exist"):
        check(changed, Display(quiet=True))
    check([*changed, "data.bad_images=skip"], Display(quiet=True))
    assert not (tmp_path / "run").exists()


def test_a_picture_without_its_place_in_the_text_is_refused(world: Path, tmp_path: Path) -> None:
    rows = json.loads((world / "train.json").read_text())
    rows[2]["conversations"][0]["value"] = "<image><image> two?"
    (world / "places.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="row 3: 1 pictures, but <image> stands 2 times"):
        check(arguments(world, tmp_path, f"data.train={world / 'places.json'}"), Display(quiet=True))


def test_pictures_of_other_modes_become_rgb_on_white_and_huge_ones_are_refused(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png", 100).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match=r"more than data.max_pixels=15"):
        open_image(tmp_path / "clear.png", 15)


def test_short_answers_and_choices_are_judged_by_what_they_say() -> None:
    assert short_equal("The Cat.", "cat") and not short_equal("cats", "cat")
    assert choice_equal("(B) a dog", "B") and choice_equal("B.", "B") and not choice_equal("Because", "B")


def test_a_family_whose_pictures_were_not_tried_is_refused_with_the_way_out(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moslora.tasks.vision.TRIED", ("another",))
    with pytest.raises(ValueError, match=r"family 'llava'; task=vision was tried on another only"):
        check(arguments(world, tmp_path), Display(quiet=True))


def test_the_report_says_how_a_vision_model_is_loaded(world: Path, tmp_path: Path) -> None:
    run = train(arguments(world, tmp_path, "trainer.max_steps=1"), Display(quiet=True))
    page = (run.path / "report.html").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in page and "AutoModelForCausalLM" not in page


def test_the_loss_on_labels_only_is_the_models_own_in_value_and_gradients(
    world: Path, tmp_path: Path
) -> None:
    task = VisionTask(load_recipe(arguments(world, tmp_path)), Display(quiet=True), lambda: None)
    task.read()
    task.prepare()
    model = task.load()
    trainer: Any = task.build_trainer(model, task.adapter_config(model), tmp_path, [])
    assert scores_plainly(trainer)
    factors = [p for p in trainer.model.parameters() if p.requires_grad]
    torch.manual_seed(0)
    with torch.no_grad():
        for factor in factors:  # B is zero at first, which leaves A and M without gradients
            factor.add_(torch.randn_like(factor) * 0.05)
    inputs = next(iter(trainer.get_train_dataloader()))
    ours = trainer.compute_loss(trainer.model, dict(inputs))
    whole = trainer.model(**inputs).loss
    assert relative_error(ours, whole) < MODEL
    # The vision tower's last layer is not read, so that nothing of it has a gradient.
    pairs = list(
        zip(*(torch.autograd.grad(o, factors, allow_unused=True) for o in (ours, whole)), strict=True)
    )
    assert all((one is None) == (two is None) for one, two in pairs)
    used = [(one, two) for one, two in pairs if one is not None and two is not None]
    assert len(used) > len(pairs) / 2
    assert all(relative_error(one, two) < MODEL for one, two in used)
    batches = [task._batch("heldout", [row]) for row in task.heldout_set]
    with torch.no_grad():
        losses = [trainer.model(**batch).loss * (batch["labels"] != -100).sum() for batch in batches]
    tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert task._loss(trainer.model, "tuned") == pytest.approx(float(sum(losses)) / tokens, rel=MODEL)


def test_interrupted_and_resumed_ends_bit_for_bit_as_uninterrupted(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("trainer.max_steps=5", "task.generate_examples=0")
    whole = train(arguments(world, tmp_path / "whole", *changes), Display(quiet=True))
    with monkeypatch.context() as patch:
        build = VisionTask.build_trainer

        def stopping(self: VisionTask, *given: Any) -> Any:
            trainer = build(self, *given)

            class Stopper(TrainerCallback):  # type: ignore[misc]
                def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                    if state.global_step == 2:
                        os.kill(os.getpid(), signal.SIGTERM)

            trainer.callback_handler.callbacks.insert(0, Stopper())
            return trainer

        patch.setattr(VisionTask, "build_trainer", stopping)
        with pytest.raises(Stopped):
            train(arguments(world, tmp_path / "parts", *changes), Display(quiet=True))
    run = RunDirectory.open(tmp_path / "parts" / "run")
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None and checkpoint.step == 2
    resumed = resume(run.path, Display(quiet=True))
    one, two = (load_file(r.adapter / "adapter_model.safetensors") for r in (resumed, whole))
    assert one.keys() == two.keys() and any("projector" in n and "moslora" not in n for n in one)
    assert all(torch.equal(one[name], two[name]) for name in one)
