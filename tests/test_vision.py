"""Laws of task=vision, on a tiny random LLaVA whose pictures are drawn here."""

from __future__ import annotations

import base64
import gc
import io
import json
import os
import re
import runpy
import shutil
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

from moslora.comparison.bench import Bench
from moslora.comparison.compare import compare
from moslora.data.encoding import encode_all
from moslora.data.pictures import open_image
from moslora.data.tokenization import Encoded, Encoder
from moslora.display import Display
from moslora.errors import Stopped
from moslora.evaluation.evaluate import evaluate
from moslora.metrics.answers import choice_equal, short_equal
from moslora.models.loading import build_skeleton, quantization_options
from moslora.models.names import resolve_model
from moslora.recipe.loading import load_recipe
from moslora.tasks.text.loss import scores_plainly
from moslora.tasks.vision.scopes import scope_of
from moslora.tasks.vision.shuffling import pair_with_other_images
from moslora.tasks.vision.task import VisionTask
from moslora.training.run import check, resume, train
from moslora.training.run_directory import RunDirectory
from tiny_vision import save_llava
from tolerances import MODEL, TRAINED, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    save_llava(folder / "base")
    for index, colour in enumerate(("red", "green", "blue", "white", "black")):
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
        name = "heldout" if index >= 3 else "train"
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
    with pytest.raises(ValueError, match="row 3: 1 pictures, but <image> occurs 2 times"):
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
    monkeypatch.setattr("moslora.tasks.vision.task.PROCESSOR_FAMILIES", {"another": None})
    with pytest.raises(ValueError, match=r"family 'llava'; task=vision was tested on another only"):
        check(arguments(world, tmp_path), Display(quiet=True))


def test_the_report_says_how_a_vision_model_is_loaded(world: Path, tmp_path: Path) -> None:
    run = train(arguments(world, tmp_path, "trainer.max_steps=1"), Display(quiet=True))
    page = (run.path / "report.html").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in page and "AutoModelForCausalLM" not in page
    # What a question is about stands beside it, and goes with the run.
    lines = [json.loads(line) for line in run.predictions.read_text().splitlines()]
    assert lines and all(len(line["thumbnails"]) == len(line["pictures"]) == 1 for line in lines)
    shown = re.findall(r'<img src="data:image/webp;base64,([^"]+)"', page)
    kept = {(run.path / name).read_bytes() for line in lines for name in line["thumbnails"]}
    assert {base64.b64decode(data) for data in shown} == kept and len(kept) == 2
    for line in lines:
        with Image.open(line["pictures"][0]) as one, Image.open(run.path / line["thumbnails"][0]) as two:
            colours = (one.convert("RGB").getpixel((9, 9)), two.convert("RGB").getpixel((9, 9)))
        assert max(abs(a - b) for a, b in zip(*colours, strict=True)) < 8  # WEBP keeps colours nearly
    assert not list(run.path.glob("pictures/*.part"))


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
    heldout = task.heldout_set
    batches = [task.encoder.batch(*heldout.take([at])) for at in range(len(heldout))]
    with torch.no_grad():
        losses = [trainer.model(**batch).loss * (batch["labels"] != -100).sum() for batch in batches]
    tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert task.loss(trainer.model, "tuned") == pytest.approx(float(sum(losses)) / tokens, rel=MODEL)


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


def test_a_four_bit_base_trains_in_float32_and_what_ships_is_proven_on_the_same_base(
    world: Path, tmp_path: Path
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    save_llava(tmp_path / "base", width=64)  # its kernels want multiples of 32
    given = [*arguments(world, tmp_path, "model.quantization=nf4"), f"model={tmp_path / 'base'}"]
    task = VisionTask(load_recipe(given), Display(quiet=True), lambda: None)
    task.read()
    task.prepare()
    model: Any = task.load()
    quantised = {n for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert quantised and {scope_of(name) for name in quantised} == {"language"} and "lm_head" not in quantised
    trainer: Any = task.build_trainer(model, task.adapter_config(model), tmp_path, [])
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    record = train(given, Display(quiet=True)).read()
    assert record["proofs"]["reload"]["passed"]
    assert record["metrics"]["after"]["loss"] < record["metrics"]["before"]["loss"]


def test_a_four_bit_base_without_its_package_is_refused_with_the_extra_that_brings_it(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'moslora\[quant\]'"):
        quantization_options("nf4", "auto", "cpu")


def test_what_is_trained_whole_learns_in_float32_on_a_bfloat16_base(world: Path, tmp_path: Path) -> None:
    given = arguments(world, tmp_path, "model.dtype=bfloat16", "trainer.learning_rate=1e-5")
    task = VisionTask(load_recipe(given), Display(quiet=True), lambda: None)
    task.read()
    task.prepare()
    model: Any = task.load()
    trainer: Any = task.build_trainer(model, task.adapter_config(model), tmp_path, [])
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "modules_to_save" in n}
    assert before and {p.dtype for p in before.values()} == {torch.float32}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    # Steps this small would be lost on bfloat16 in most places.
    moved = [float((after[n] != p).float().mean()) for n, p in before.items()]
    assert min(moved) > 0.9
    assert task.loss(trainer.model, "tuned") > 0


@pytest.fixture(scope="module")
def configured(world: Path) -> Path:
    """The base without its weights."""
    folder = world / "configured"
    shutil.copytree(world / "base", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_a_dry_run_counts_by_scope_what_a_run_trains_without_weights(
    world: Path, configured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(world, tmp_path)
    task = VisionTask(load_recipe(given), Display(quiet=True), lambda: None)
    task.read()
    task.prepare()
    model: Any = task.load()
    base, trained = Counter[str](), Counter[str]()
    for name, parameter in model.named_parameters():
        base[scope_of(name)] += parameter.numel()
    trainer: Any = task.build_trainer(model, task.adapter_config(model), tmp_path, [])
    for name, parameter in trainer.model.named_parameters():
        trained[scope_of(name)] += parameter.numel() * parameter.requires_grad
    counts = VisionTask(load_recipe(given), Display(quiet=True), lambda: None).count()
    assert {c.part: (c.base, c.trained) for c in counts} == {s: (base[s], trained[s]) for s in base}
    check([*given, f"model={configured}"], Display())
    shown = capsys.readouterr().out
    assert "<image>×4" in shown and "<image><image>" not in shown
    assert f"Training {sum(trained.values()):,} parameters beside a base of {sum(base.values()):,}" in shown
    with pytest.raises(ValueError, match="no weights"):
        train([*given, f"model={configured}"], Display(quiet=True))


def test_a_dry_run_without_the_hub_says_so_and_looks_at_the_data_all_the_same(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = [*arguments(world, tmp_path), "model=nobody/nothing", f"data.train={tmp_path / 'absent.json'}"]
    with pytest.raises(ValueError, match=r"(?s)nor can the hub be reached.*HF_HUB_OFFLINE.*absent\.json"):
        check(given, Display(quiet=True))


# arXiv:2406.11909: ranks and alphas of language model and vision tower.
PUBLISHED = {
    "llava-llama3-8b": (64, 128, 64, 16, "none", 2e-5, True),
    "llava-internlm2-qlora": (512, 256, 64, 16, "nf4", 2e-4, False),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_recipes_hold_its_settings_and_pass_a_dry_run_on_their_shape_in_small(
    name: str, world: Path, configured: Path
) -> None:
    file = Path(__file__).parents[1] / "recipes" / f"{name}.yaml"
    language_r, language_alpha, vision_r, vision_alpha, quantization, rate, vision_mixes = PUBLISHED[name]
    given = [
        str(file), f"model={configured}", f"data={world / 'train.json'}",
        f"data.heldout={world / 'heldout.json'}", "data.images=null",
    ]  # fmt: skip
    recipe: Any = load_recipe(given)
    trainer = recipe.trainer
    rows = trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"]
    assert (trainer["learning_rate"], trainer["num_train_epochs"], rows) == (rate, 1, 64)
    assert (recipe.data.square, trainer["train_sampling_strategy"]) == ("pad", "group_by_length")
    assert recipe.model.quantization == quantization
    shown = io.StringIO()
    check(given, Display(shown))
    text = " ".join(shown.getvalue().split())
    for line in (
        f"learning rate {rate:g}, cosine",
        "pictures made square pad",
        "order of rows group_by_length",
        f"scopes.language_r {language_r}",
        f"scopes.vision_alpha {float(vision_alpha)}",
        *([] if vision_mixes else ["scopes.vision_mixer none"]),
    ):
        assert line in text, line
    task = VisionTask(recipe, Display(quiet=True), lambda: None)
    task.needs_weights = False
    model = build_skeleton(resolve_model(str(configured), weights=False), task.auto_class)
    task.read()
    config: Any = task.adapter_config(model)
    adapted: Any = get_peft_model(model, config, low_cpu_mem_usage=True)
    found = {"language": set(), "vision": set()}  # type: ignore[var-annotated]
    mixes = {"language": set(), "vision": set()}  # type: ignore[var-annotated]
    for module_name, module in adapted.named_modules():
        if hasattr(module, "moslora_A"):
            r, scale = module.r["default"], module.scaling["default"]
            found[scope_of(module_name)].add((r, scale * r))
            mixes[scope_of(module_name)].add("default" not in module.frozen_peft_weight_names)
    assert found == {"language": {(language_r, language_alpha)}, "vision": {(vision_r, vision_alpha)}}
    assert mixes == {"language": {True}, "vision": {vision_mixes}}
    assert config.modules_to_save == ["model.multi_modal_projector"]


def test_what_the_processor_cuts_off_is_said_and_square_pictures_lose_nothing(
    world: Path, tmp_path: Path
) -> None:
    """CLIP's processor keeps the middle; LLaVA was trained on pictures padded to a square with CLIP's mean color."""
    Image.new("RGB", (40, 20), "red").save(tmp_path / "wide.png")
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "red"}]
    rows = [{"image": "wide.png", "conversations": turns}] * 4
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = {}
    for square in ("none", "pad", "crop"):
        display = Display(io.StringIO())
        given = ["task=vision", f"model={world / 'base'}", f"data={tmp_path / 'rows.json'}"]
        given += [f"data.heldout={tmp_path / 'rows.json'}", f"data.square={square}", "data.images=null"]
        recipe: Any = load_recipe(given)
        task = VisionTask(recipe, display, lambda: None)
        task.read()
        task.prepare()
        found[square] = (task.remarks, task.pictures.open("train", task.train_examples[0])[0])
    said = "cuts a part off 1 of 1 pictures: (49|50)% of the area of all, (49|50)% of one of 40 × 20 pixels"
    assert re.search(said, str(found["none"][0]))
    assert found["pad"][0] == []
    assert "50%" in str(found["crop"][0])
    assert [found[s][1].size for s in ("none", "pad", "crop")] == [(40, 20), (40, 40), (20, 20)]
    padded = found["pad"][1]
    assert padded.getpixel((20, 20)) == (255, 0, 0)
    assert padded.getpixel((20, 5)) == (122, 116, 104), "CLIP's mean color"


def test_batches_of_similar_length_count_pictures(world: Path, tmp_path: Path) -> None:
    recipe: Any = load_recipe(
        [
            "task=vision", f"model={world / 'base'}", f"data={world / 'train.json'}",
            f"data.heldout={world / 'heldout.json'}", "trainer.train_sampling_strategy=group_by_length",
            "trainer.max_steps=1", "trainer.report_to=none",
        ]
    )  # fmt: skip
    task = VisionTask(recipe, Display(quiet=True), lambda: None)
    task.read()
    task.prepare()
    model = task.load()
    trainer = task.build_trainer(model, task.adapter_config(model), tmp_path, [])
    assert type(trainer._get_train_sampler()).__name__ == "LengthGroupedSampler"
    assert list(trainer.train_dataset["length"]) == [len(row.input_ids) for row in task.train_set]


def test_shuffled_pictures_are_of_other_examples_and_never_the_same(world: Path, tmp_path: Path) -> None:
    rows = json.loads((world / "heldout.json").read_text())
    rows.append(
        {"conversations": [{"from": "human", "value": "No picture?"}, {"from": "gpt", "value": "no"}]}
    )
    (world / "mixed.json").write_text(json.dumps(rows))
    given = arguments(world, tmp_path, f"data.heldout={world / 'mixed.json'}")
    task = VisionTask(load_recipe(given), Display(quiet=True), lambda: None)
    task.read()
    task.prepare()
    asked = [encoded.place for encoded in task.asked]
    examples = [task.by_place[place] for place in asked]
    pairs = {
        asked[number]: other.place
        for number, other in pair_with_other_images(examples, task.pictures).items()
    }
    assert len(pairs) == len(task.asked) - 1 == 4
    shown = {place.removeprefix("heldout "): paths for place, paths in task.pictures.paths.items()}
    assert all(shown[own] != shown[other] for own, other in pairs.items())
    measured = task.evaluate(task.load(), "base")
    assert measured.metrics["loss"] > 0 and len(measured.answers) == 5


@pytest.mark.parametrize(
    ("question", "said"), [("Which? 0", "same picture"), ("Else?", "training shows too")]
)
def test_pictures_on_both_sides_of_the_split_are_warned_of(
    question: str, said: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "red"}]
    (world / "both.json").write_text(json.dumps([{"image": "red.png", "conversations": turns}]))
    task = VisionTask(
        load_recipe(arguments(world, tmp_path, f"data.heldout={world / 'both.json'}")),
        Display(),
        lambda: None,
    )
    task.read()
    assert said in " ".join(capsys.readouterr().out.split())


def test_mixed_precision_reaches_the_loss_on_labels_only(world: Path, tmp_path: Path) -> None:
    given = arguments(world, tmp_path, "trainer.bf16=true")
    task = VisionTask(load_recipe(given), Display(quiet=True), lambda: None)
    task.read()
    task.prepare()
    model: Any = task.load()
    trainer: Any = task.build_trainer(model, task.adapter_config(model), tmp_path, [])
    seen: list[torch.dtype] = []
    layer = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
    layer.language_model.layers[0].mlp.register_forward_hook(lambda _m, _g, out: seen.append(out.dtype))
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert seen == [torch.bfloat16] and loss.dtype == torch.float32


def test_a_run_in_mixed_precision_is_measured_and_proven_in_the_bases_own(
    world: Path, tmp_path: Path
) -> None:
    run = train(arguments(world, tmp_path, "trainer.bf16=true", "trainer.max_steps=2"), Display(quiet=True))
    assert run.read()["proofs"]["reload"]["passed"]


def test_guessing_in_the_small_world_is_right_for_one_in_four() -> None:
    file = Path(__file__).parents[1] / "recipes" / "shapes" / "generate.py"
    world: Any = SimpleNamespace(**runpy.run_path(str(file)))
    made = world.examples("heldout", world.COUNT_OF["heldout"])
    answers = {kind: Counter(answer for k, *_, answer in made if k == kind) for kind in world.KINDS}
    assert all(set(a.values()) == {len(made) // 16} and len(a) == 4 for a in answers.values())
    assert all(picture.size == (world.SIZE, world.SIZE) for _, picture, *_ in made)
    # What is asked for is in the picture once, and the answer is what stands there.
    for kind, picture, things, _, answer in made:
        assert len({thing.place for thing in things}) == len(things)
        if kind == "count":
            assert world.COUNTS.index(answer) + 1 == len(things)
        if kind == "colour":
            place = next(t.place for t in things if t.colour == answer)
            half = world.SIZE // 2
            left, top = half * ("right" in place), half * ("bottom" in place)
            quarter = picture.crop((left, top, left + half, top + half))
            near = [
                sum(abs(a - b) for a, b in zip(p, world.COLOURS[answer], strict=True)) < 60
                for p in quarter.getdata()
            ]
            assert sum(near) > 40


def test_batches_made_when_wanted_are_those_of_examples_encoded_before_and_none_is_kept(
    world: Path, tmp_path: Path
) -> None:
    given = arguments(
        world, tmp_path, "trainer.train_sampling_strategy=group_by_length", "evaluation.also=[]"
    )
    gc.collect()
    # Of other tests and libraries; they are held here, so that none of ours gets the identity of one.
    before = [found for found in gc.get_objects() if type(found) in (Encoded, Image.Image)]
    known = {id(found) for found in before}
    task = VisionTask(load_recipe(given), Display(quiet=True), lambda: None)
    task.read()
    task.prepare()
    trainer: Any = task.build_trainer(task.load(), None, tmp_path, [])
    gc.collect()
    alive = [found for found in gc.get_objects() if type(found) in (Encoded, Image.Image)]
    ours = [found for found in alive if id(found) not in known]
    assert not [found for found in ours if getattr(found, "mode", "RGB") == "RGB"]  # others are matplotlib's
    assert trainer.train_dataset.column_names == ["row", "length", "split"]
    # Everything encoded and every picture prepared up front, and laid together here.
    known: dict[tuple[int, ...], tuple[Encoded, torch.Tensor]] = {}
    lengths = []
    for example in task.train_examples:
        images = task.pictures.open("train", example)
        with task.encoder.renderer.showing(images):
            (encoded,), _ = encode_all([example], Encoder(task.encoder.renderer, "chat"))
        pixels = task.encoder.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        known[tuple(encoded.input_ids)] = encoded, pixels
        lengths.append(len(encoded.input_ids))
    assert list(trainer._get_train_sampler().lengths) == lengths and len(set(lengths)) > 1
    seen = 0
    for batch in trainer.get_train_dataloader():
        rows = [
            known[tuple(ids[mask.bool()].tolist())]
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        seen += len(rows)
        pad = torch.nn.utils.rnn.pad_sequence
        for key, filler in (("input_ids", task.pad_id), ("labels", -100)):
            eager = pad([torch.tensor(getattr(e, key)) for e, _ in rows], True, filler)
            assert torch.equal(batch[key], eager)
        assert torch.equal(batch["pixel_values"], torch.cat([pixels for _, pixels in rows]))
    assert seen == len(task.train_examples)


def test_a_picture_that_goes_after_the_checks_is_named_with_its_example(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world, tmp_path / "world", ignore=shutil.ignore_patterns("base", "configured"))
    given = [
        *arguments(world, tmp_path),
        f"data={tmp_path / 'world' / 'train.json'}",
        f"data.heldout={tmp_path / 'world' / 'heldout.json'}",
    ]
    task = VisionTask(load_recipe(given), Display(quiet=True), lambda: None)
    task.read()
    task.prepare()
    (tmp_path / "world" / "green.png").unlink()
    with pytest.raises(ValueError, match=r"row 3: .*green\.png does not exist"):
        list(task.train_set)


def test_an_evaluation_gives_a_runs_numbers_and_says_what_each_item_and_other_pictures_gave(
    world: Path, tmp_path: Path
) -> None:
    given = arguments(world, tmp_path, "trainer.learning_rate=3e-2")
    run = train(given, Display(quiet=True))
    measured = run.read()["metrics"]
    (tmp_path / "moved.json").write_text(
        (world / "train.json").read_text()
    )  # what training reads is not read
    settings = [s for s in given if not s.startswith(("model=", "output", "data="))]
    # What was trained on is not read.
    settings += [f"data={tmp_path / 'absent.json'}", f"data.heldout={world / 'heldout.json'}"]
    found = evaluate(
        str(world / "base"),
        Display(quiet=True),
        adapter=run.lora,
        settings=[*settings, f"data.images={world}"],
        recipe=str(run.recipe),
        predictions=tmp_path / "items.jsonl",
    )
    own, costs = found.measures[:3], found.measures[3:]
    assert [m.name for m in own] == ["loss", "accuracy", "accuracy_shuffled_images"]
    for measure in costs:  # the language part, without a picture
        stage, name = ("after", "kl") if measure.name == "kl_general" else ("after", "loss")
        assert measure.tuned == pytest.approx(run.read()["also"]["general"][stage][name], rel=TRAINED)
    for measure in own[1:]:
        assert (measure.base, measure.tuned) == tuple(
            measured[stage][measure.name] for stage in ("before", "after")
        )
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert all(Path(p).is_file() for i in items for p in i["pictures"])
    assert all(i["other_pictures"] != i["pictures"] and i["base_shuffled"] is not None for i in items)
    # A run's loss is the mean over tokens; an evaluation's the mean over examples, each of its own tokens.
    tokens = [len(i["reference"].encode()) + 1 for i in items]
    for stage, key in (("before", "base_loss"), ("after", "tuned_loss")):
        mean = sum(i[key] * n for i, n in zip(items, tokens, strict=True)) / sum(tokens)
        assert mean == pytest.approx(measured[stage]["loss"], rel=MODEL)
    assert found.activity is not None and found.activity.effect > 0


def test_methods_are_compared_on_pictures_with_the_scopes_of_the_recipe_and_one_base(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reloads: list[None] = []
    monkeypatch.setattr(Bench, "_reload", lambda _: reloads.append(None))
    rows = json.loads((world / "train.json").read_text())
    asked = [
        {
            "image": "red.png",
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, rows[0]["conversations"][1]],
        }
    ]
    (world / "compared.json").write_text(json.dumps(rows + asked))
    given = arguments(
        world, tmp_path, f"data={world / 'compared.json'}", f"data.heldout={world / 'heldout.json'}"
    )
    folder, verdict = compare(
        given,
        Display(quiet=True),
        methods=["lora", "moslora"],
        seeds=2,
        rates=[1e-2],
        validation=3,
        out=tmp_path / "c",
        together=2,
    )
    assert verdict is not None and not reloads
    cells = {f.stem: json.loads(f.read_text()) for f in (folder / "cells").glob("*.json") if f.stem != "base"}
    assert {cell["status"] for cell in cells.values()} == {"done"} and len(cells) == 4
    assert all(len(cell["test"]) == len(cell["correct"]) == 4 for cell in cells.values())
    # What is trained is what a run of that recipe trains; a mixer has r² entries a module.
    task = VisionTask(load_recipe(given), Display(quiet=True), lambda: None)
    trained = sum(count.trained for count in task.count())
    adapted = task.adapter_arguments(task.load())
    ranks = [3 if "vision" in name else 2 for name in adapted["target_modules"]]
    assert cells["moslora_0.01_0"]["trainable_parameters"] == trained
    assert cells["lora_0.01_0"]["trainable_parameters"] == trained - sum(r * r for r in ranks)


def test_what_chooses_a_rate_shows_no_picture_that_is_trained_on(world: Path, tmp_path: Path) -> None:
    task = VisionTask(load_recipe(arguments(world, tmp_path)), Display(quiet=True), lambda: None)
    task.read()
    task.set_aside(2, 3)
    task.prepare()
    parts = {"train": task.train_examples, "validation": task.validation_examples}
    shown = [{p for e in examples for p in task.pictures.hashes_of(n, e)} for n, examples in parts.items()]
    assert all(shown) and shown[0].isdisjoint(shown[1])
    assert len(task.heldout_set) == 3 and len(task.train_set) + len(task.validation_set) == 6
    assert len(task.score(task.load(), task.validation_set, "base")) == len(task.validation_set)
