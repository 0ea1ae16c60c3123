"""What cannot be trained with is refused before a run directory exists, by name, and by a dry run, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny
from moslora.cli import app
from moslora.display import Display
from moslora.errors import EncodingError, RecipeError
from moslora.recipe.loading import load_recipe
from moslora.tasks.text.task import TextTask
from moslora.training.trainer_parts import try_trainer_parts

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_chat_model(folder / "base")
    tiny.save_chat_data(folder / "train.jsonl", 8)
    tiny.save_chat_data(folder / "heldout.jsonl", 3)
    return folder


def arguments(world: Path, *changes: str) -> list[str]:
    data = [f"data={world / 'train.jsonl'}", f"data.heldout={world / 'heldout.jsonl'}"]
    return [f"model={world / 'base'}", *data, "adapter.r=4", "trainer.max_steps=2", *changes]


BY_VALUE = {
    "trainer.learning_rate=0": "nothing is learned",
    "trainer.learning_rate=-1e-3": "above 0",
    "trainer.per_device_train_batch_size=0": "at least 1",
    "trainer.per_device_train_batch_size=-1": "at least 1",
    "trainer.gradient_accumulation_steps=0": "at least 1",
    "trainer.max_steps=0": "or -1 to train for",
    "trainer.max_steps=-5": "or -1 to train for",
    "trainer.warmup_steps=-1": "at least 0",
    "trainer.warmup_steps=1000": "never reached",
    "trainer.weight_decay=-1": "at least 0",
    "trainer.adam_beta1=2": "below 1",
    "trainer.adam_epsilon=-1": "at least 0",
    "trainer.label_smoothing_factor=1.5": "below 1",
    "trainer.neftune_noise_alpha=-1": "at least 0",
    "trainer.dataloader_num_workers=-1": "at least 0",
}
BY_TRYING = {
    "trainer.report_to=nothing": "nothing is not supported",
    "trainer.report_to=wandb": "requires wandb to be installed",
    "trainer.optim=galore_adamw": "galore_torch",
    "trainer.optim_args=x": "expected 2, got 1",
    "trainer.lr_scheduler_kwargs={a: 1}": "unexpected keyword argument 'a'",
    "trainer.load_best_model_at_end=true": "save and eval strategy",
    "trainer.logging_steps=0": "logging",
    "trainer.torch_compile_backend=foo": "FOO",
    "trainer.use_liger_kernel=true": "liger",
    "trainer.accelerator_config={foo: 1}": "foo",
}


@pytest.mark.parametrize("setting", BY_VALUE)
def test_a_value_that_trains_nothing_is_refused_with_the_recipe(world: Path, setting: str) -> None:
    with pytest.raises(RecipeError, match=rf"{setting.partition('=')[0]}=.*{BY_VALUE[setting]}"):
        load_recipe(arguments(world, setting))


def test_epochs_count_where_steps_do_not(world: Path) -> None:
    with pytest.raises(RecipeError, match="num_train_epochs=0 trains for no step"):
        load_recipe(arguments(world, "trainer.max_steps=-1", "trainer.num_train_epochs=0"))
    load_recipe(arguments(world, "trainer.num_train_epochs=0"))
    for sound in (
        "warmup_steps=0.5",
        "warmup_steps=2",
        "max_grad_norm=0",
        "save_total_limit=0",
        "save_steps=0",
    ):
        load_recipe(arguments(world, f"trainer.{sound}"))


@pytest.mark.parametrize("setting", BY_TRYING)
def test_what_the_trainer_could_not_make_is_refused_before_anything_is_loaded(
    world: Path, setting: str
) -> None:
    with pytest.raises(RecipeError, match=BY_TRYING[setting]):
        try_trainer_parts(load_recipe(arguments(world, setting)), "cpu")


def test_every_optimizer_and_schedule_that_works_is_let_through(world: Path) -> None:
    for sound in ("adamw_torch", "adafactor", "sgd", "rmsprop", "adagrad", "adamw_torch_fused"):
        try_trainer_parts(load_recipe(arguments(world, f"trainer.optim={sound}")), "cpu")
    for sound in (
        "linear",
        "constant_with_warmup",
        "cosine_with_restarts",
        "inverse_sqrt",
        "reduce_lr_on_plateau",
    ):
        more = ["trainer.eval_strategy=steps"] if "plateau" in sound else []
        try_trainer_parts(load_recipe(arguments(world, f"trainer.lr_scheduler_type={sound}", *more)), "cpu")


@pytest.mark.parametrize("verb", [["train"], ["train", "--dry-run"], ["compare"]])
@pytest.mark.parametrize("setting", ["trainer.max_steps=0", "trainer.report_to=nothing"])
def test_no_run_is_left_of_a_refusal(world: Path, verb: list[str], setting: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*verb, *arguments(world, setting, f"output.dir={tmp_path / 'runs'}")])
    assert done.exit_code == 2 and "Error: trainer." in done.output
    assert not list(tmp_path.iterdir())


# --- Rows and models ----------------------------------------------------------------------------------------


def task(world: Path, *changes: str) -> tuple[TextTask, list[str]]:
    warned: list[str] = []

    class Listening(Display):
        def warn(self, text: str) -> None:
            warned.append(text)

    made = TextTask(load_recipe(arguments(world, *changes)), Listening(quiet=True), lambda: None)
    made.read()
    return made, warned


def test_a_token_beyond_the_vocabulary_is_named_before_the_model_is_loaded(
    world: Path, tmp_path: Path
) -> None:
    tiny.save_chat_model(tmp_path / "small", vocab_size=100)
    made, _ = task(world, f"model={tmp_path / 'small'}")
    with pytest.raises(EncodingError, match=r"of the training data has the token \d+, and .* ends at 99"):
        made.prepare()


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    config: dict[str, Any] = {
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 2,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_positions=32, **config)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_a_row_beyond_looked_up_positions_is_refused_and_fits_when_it_is_cut(world: Path, gpt2: Path) -> None:
    no_answers = "task.generate_examples=0"
    made, _ = task(world, f"model={gpt2}", no_answers)
    with pytest.raises(
        EncodingError, match=r"takes \d+ tokens, and .* made for 32, .*trainer\.max_length=32"
    ):
        made.prepare()
    made, _ = task(world, f"model={gpt2}", no_answers, "trainer.max_length=32")
    made.prepare()
    made, _ = task(world, f"model={gpt2}", "trainer.max_length=32", "task.max_new_tokens=30")
    with pytest.raises(EncodingError, match=r"30 of them for the answer \(task\.max_new_tokens\)"):
        made.prepare()


def test_a_row_beyond_computed_positions_is_warned_of(world: Path, tmp_path: Path) -> None:
    tiny.save_chat_model(tmp_path / "short", max_position_embeddings=32)
    made, warned = task(world, f"model={tmp_path / 'short'}", "task.max_new_tokens=4")
    made.prepare()
    assert any("the model was made for 32: beyond them" in text for text in warned)
