"""Objects where the command takes names: quantized models, published tasks, pictures within turns, checks and plans."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import moslora
import tiny
from moslora.display import Display
from moslora.errors import PictureError
from moslora.recipe.building import build_recipe
from moslora.tasks.vision.reading import split_off_images
from moslora.training.borrowed import borrowed
from test_api import QUICK, rows, save_adapter, state_of
from test_evaluate import row


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer; published prompts have hundreds of bytes."""
    return tiny.save_chat_model(tmp_path_factory.mktemp("objects") / "base", max_position_embeddings=1024)


@pytest.fixture
def here(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- A model of the caller's ---------------------------------------------------------------------------------


def test_what_a_parameter_holds_beside_its_values_is_given_back() -> None:
    model = torch.nn.Linear(2, 2)
    scales = torch.ones(2)
    model.weight.quant_state = state = SimpleNamespace(absmax=scales, state2="nested")  # type: ignore[attr-defined]
    with borrowed(model):
        state.absmax, state.packed = torch.zeros(2), True
        del state.state2
        model.weight.quant_state = None  # type: ignore[attr-defined]
    assert model.weight.quant_state is state  # type: ignore[attr-defined]
    assert vars(state) == {"absmax": scales, "state2": "nested"} and state.absmax is scales


@pytest.mark.filterwarnings("ignore")
def test_a_four_bit_model_is_handed_over_and_computes_the_same_afterwards(here: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    # Its kernels want multiples of 32.
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 4, "vocab_size": 259}
    tiny.llama(max_position_embeddings=256, bos_token_id=None, **sizes).save_pretrained("four")
    # Scales are not quantized again: on some CPUs bitsandbytes rounds such scales anew at every state_dict().
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained("four", quantization_config=settings, device_map="cpu")
    ids = tiny.tokens()
    with torch.no_grad():
        logits = model(ids).logits
    run = moslora.train(
        model=model,
        tokenizer=tiny.tokenizer(),
        data=rows(),
        adapter={"r": 2},
        trainer=QUICK,
        output="runs/four",
    )
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    assert run.proofs["reload"]["passed"] and "quantization: nf4" in (run.path / "recipe.yaml").read_text()
    report = moslora.evaluate(model, tiny.tokenizer(), rows(4), adapter=run.lora)
    assert report["loss"].difference
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


def test_a_model_that_is_quantized_otherwise_is_refused_with_the_way_out() -> None:
    model = tiny.llama()
    model.config.quantization_config = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    with pytest.raises(moslora.UsageError, match="another way than bitsandbytes' nf4"):
        moslora.plan(model=model)


def test_a_loaded_model_answers_published_tasks_as_its_folder_does(here: Path, base: Path) -> None:
    import json

    (here / "tasks" / "ARC-Easy").mkdir(parents=True)
    questions = [row("ARC-Easy", answer) for answer in ("answer2", "answer1", "answer3")]
    (here / "tasks" / "ARC-Easy" / "test.json").write_text(json.dumps(questions))
    adapter = save_adapter(here / "adapter")
    model = LlamaForCausalLM.from_pretrained(base)
    state = state_of(model)
    options: dict[str, Any] = {"data": here / "tasks", "tasks": ["ARC-Easy"], "adapter": adapter}
    report = moslora.evaluate(model, tiny.tokenizer(), **options)
    assert state_of(model) == state
    again = moslora.evaluate(base, **options)
    assert report.measures == again.measures and list(report.predictions) == list(again.predictions)
    assert report.activity == again.activity and report.activity is not None and report.activity.modules == 4


# --- What is only checked or counted -------------------------------------------------------------------------


def test_a_check_of_objects_shows_what_would_be_trained_and_leaves_nothing(here: Path, base: Path) -> None:
    model = tiny.llama(3, vocab_size=259, max_position_embeddings=256, bos_token_id=None)
    state, shown = state_of(model), io.StringIO()
    given: dict[str, Any] = {"tokenizer": tiny.tokenizer(), "trainer": QUICK, "output": "runs/none"}
    moslora.check(model=model, data=rows(), progress=Display(shown), **given)
    assert "Recipe and data are fine" in shown.getvalue() and state_of(model) == state
    with pytest.raises(moslora.DataError, match="completion"):
        moslora.check(model=model, data=[{"prompt": "a"}] * 3, **given)
    with pytest.raises(moslora.RecipeError, match=r"trainer\.learning_rate"):
        moslora.check(model=str(base), data=rows(), settings=["trainer.lr=1"])
    assert not list(here.iterdir())


def test_a_check_of_a_comparison_counts_its_cells_and_leaves_nothing(here: Path, base: Path) -> None:
    shown = io.StringIO()
    given: dict[str, Any] = {"model": LlamaForCausalLM.from_pretrained(base), "data": rows(), "steps": 2}
    options: dict[str, Any] = {"seeds": 2, "learning_rates": [1e-2], "validation": 4, "out": "runs/c"}
    moslora.check_comparison(**given, **options, progress=Display(shown))
    assert "2 methods × 1 learning rates (0.01) × 2 seeds = 4 cells of 2 steps" in shown.getvalue()
    with pytest.raises(moslora.UsageError, match="none of the methods"):
        moslora.check_comparison(**given, **options, baseline="dora")
    assert not list(here.iterdir())


def test_a_plan_counts_a_loaded_model_as_its_folder(base: Path) -> None:
    config = moslora.MoSLoRAConfig(r=2, target_modules=["q_proj"])
    by_name = moslora.plan(model=base, adapter=config, length=16)
    by_object = moslora.plan(
        model=LlamaForCausalLM.from_pretrained(base),
        adapter=config,
        data=rows(),
        settings=["seed=3"],
        length=16,
    )
    assert by_object.placements == by_name.placements and by_object.trained == by_name.trained > 0
    assert by_object.model == str(base)


def test_a_setting_goes_over_every_section_and_is_checked_with_them() -> None:
    sections: dict[str, Any] = {"model": "org/base", "data": "org/rows", "trainer": {"max_length": 8}}
    assert build_recipe(None, sections, settings=["trainer.max_length=16"]).trainer["max_length"] == 16
    with pytest.raises(moslora.RecipeError) as error:
        build_recipe(None, sections, {"adapter": {"rank": 2}}, settings=["trainer.lr=1", "no setting"])
    assert len(error.value.problems) == 3
    with pytest.raises(moslora.RecipeError, match="one text; give a list"):
        moslora.train(**sections, settings="seed=3")
    with pytest.raises(moslora.UsageError, match="section mix"):
        moslora.mix(["a", "b"], settings=["mix.weights=[1, 2]"])


# --- Pictures within turns -----------------------------------------------------------------------------------


def turn(*parts: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


ANSWER = {"role": "assistant", "content": "red"}
PICTURE, QUESTION = {"type": "image", "image": "a.png"}, {"type": "text", "text": "which?"}


def test_pictures_within_turns_are_those_of_the_row_in_their_order() -> None:
    other = {"type": "image", "path": "b.png", "text": None}
    row, names = split_off_images({"messages": [turn(PICTURE, QUESTION, other), ANSWER]})
    assert names == ["a.png", "b.png"]
    assert row["messages"][0]["content"] == "<image>which?<image>"
    bare = {"type": "image"}
    row, names = split_off_images({"images": ["c.png"], "messages": [turn(QUESTION, bare), ANSWER]})
    assert names == ["c.png"] and row["messages"][0]["content"] == "which?<image>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"images": ["b.png"], "messages": [turn(PICTURE, QUESTION)]}, "remove one"),
        ({"messages": [turn(PICTURE, {"type": "image"}, QUESTION)]}, "name all or none"),
        ({"messages": [turn(PICTURE), turn({"type": "image"})]}, "1 pictures, but <image> occurs 2 times"),
        ({"messages": [turn({**PICTURE, "path": "b.png"})]}, "one file"),
        ({"messages": [turn({"type": "image", "image": {"bytes": None}})]}, "one file"),
        ({"messages": [turn({"type": "image", "url": "https://a.b/c.png"})]}, "names a URL"),
        ({"messages": [turn({"type": "text", "text": None})]}, "is not text"),
        ({"messages": [turn({**QUESTION, "image": "a.png"})]}, "would be ignored"),
        ({"messages": [turn(QUESTION), turn(PICTURE, role="assistant")]}, "not the user's"),
        ({"messages": [turn({"type": "audio"})]}, "type text or image"),
    ],
)
def test_a_picture_that_would_be_dropped_or_guessed_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(PictureError, match=message):
        split_off_images(row)


def test_objects_may_have_pictures_within_their_turns(tmp_path: Path) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    import tiny_vision

    tiny_vision.save_llava(tmp_path / "llava")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava")
    pictures = [Image.new("RGB", (16, 16), (n * 9, 0, 0)) for n in range(8)]
    examples = [
        {"messages": [turn({"type": "image", "image": picture}, QUESTION), ANSWER]} for picture in pictures
    ]
    shown = io.StringIO()
    given = {"processor": AutoProcessor.from_pretrained(tmp_path / "llava"), "trainer": QUICK}
    data = {"data": examples[:6], "heldout": examples[6:]}
    moslora.check(task="vision", model=model, progress=Display(shown), **data, **given)
    assert "Recipe and data are fine" in shown.getvalue()
    with pytest.raises(moslora.DataError, match="name all or none"):
        bad = [
            {"messages": [turn({"type": "image"}, {"type": "image", "image": p}), ANSWER]} for p in pictures
        ]
        moslora.check(task="vision", model=model, data=bad, heldout=bad, **given)
