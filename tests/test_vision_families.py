"""Laws of every family that task=vision reads: tiny random models whose pictures are drawn here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import tiny_vision
from moslora.display import Display
from moslora.errors import ModelError
from moslora.models.names import resolve_model
from moslora.recipe.loading import load_recipe
from moslora.tasks.vision.cropping import kept_of
from moslora.tasks.vision.processors import IMAGE, PROCESSOR_FAMILIES, load_processor, parts_of
from moslora.tasks.vision.scopes import scope_of
from moslora.tasks.vision.task import VisionTask
from moslora.training.reload_proof import proof as proofs
from moslora.training.run import train
from tolerances import MODEL, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def turns(asked: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several shapes; rows with two, one and no picture, and rows that a few steps can learn."""
    folder = tmp_path_factory.mktemp("families")
    sizes = {"red": (20, 18), "green": (18, 20), "blue": (33, 16), "orange": (40, 18)}
    for colour, size in sizes.items():
        picture = Image.new("RGB", size, colour)
        picture.paste("white", (2, 3, 9, 11))
        picture.save(folder / f"{colour}.png")
    asked = [
        {"image": f"{c}.png", "conversations": turns(f"<image>\nWhich? {n}", c)} for c in sizes for n in "12"
    ]
    told = json.loads(json.dumps(asked).replace("Which?", "What is it?"))
    both = {"image": ["orange.png", "red.png"], "conversations": turns("<image><image>\nBoth?", "two")}
    none = {"conversations": turns("None?", "no picture")}
    for name, rows in {
        "train": [both, none, *asked],
        "with-pictures": [both, *asked],
        "heldout": told,
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each family's model."""
    folder = tmp_path_factory.mktemp("bases")
    for name, save in tiny_vision.FAMILIES.items():
        save(folder / name)
    return {name: folder / name for name in tiny_vision.FAMILIES}


def arguments(family: str, bases: dict[str, Path], pictures: Path, out: Path, *changes: str) -> list[str]:
    if family == "smolvlm":
        pytest.importorskip("num2words", reason="its processor wants it")
    train_rows = "with-pictures" if PROCESSOR_FAMILIES[family].prefix else "train"
    # Gemma's projector is a bare parameter.
    projector = "full" if family in ("gemma3", "qwen3_vl", "llava_next") else "adapter"
    return [
        "task=vision", "task.metric=short", "task.max_new_tokens=3", "task.generate_examples=4",
        f"model={bases[family]}", f"data={pictures / train_rows}.json",
        f"data.heldout={pictures / 'heldout.json'}", "adapter.r=2", "scopes.vision=adapter", "scopes.vision_r=3",
        f"scopes.projector={projector}", "trainer.max_steps=12", "trainer.learning_rate=1e-2",
        "trainer.per_device_train_batch_size=4", f"output.dir={out}", "output.name=run", *changes,
    ]  # fmt: skip


def prepared(family: str, bases: dict[str, Path], pictures: Path, out: Path, *changes: str) -> VisionTask:
    task = VisionTask(
        load_recipe(arguments(family, bases, pictures, out, *changes)), Display(quiet=True), lambda: None
    )
    task.read()
    task.prepare()
    return task


def own(task: VisionTask, name: str, place: str, answered: bool) -> dict[str, Any]:
    """What the model's own processor gives for one conversation, all of it."""
    examples = {"train": task.train_examples, "heldout": task.heldout_examples}[name]
    example = next(e for e in examples if e.place == place)
    images = task.pictures.open(name, example)
    messages = example.messages
    assert messages is not None
    if task.encoder.family.prefix:
        text = IMAGE * len(images) + messages[0].content.replace(IMAGE, "").strip()
        suffix = {"suffix": [messages[1].content]} if answered else {}
        return dict(task.encoder.processor(text=[text], images=[images], return_tensors="pt", **suffix))
    kept = messages if answered else messages[:-1]
    shown = iter(images)
    found = task.encoder.processor.apply_chat_template(
        [{"role": m.role, "content": parts_of(m.content, shown)} for m in kept],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=not answered,
    )
    return dict(found)


@pytest.mark.parametrize("family", PROCESSOR_FAMILIES)
def test_each_row_alone_through_the_models_own_processing_has_the_batchs_logits(
    family: str, bases: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    task = prepared(family, bases, pictures, tmp_path)
    model: Any = task.load()
    rows, images = task.train_set.take(range(4))
    assert len({len(row.input_ids) for row in rows}) > 1  # so that there is padding
    batch = task.encoder.batch(rows, images)
    with torch.no_grad():
        together = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    for at, row in enumerate(rows):
        # Tokens of pictures are never learned, the whole answer is.
        assert task.encoder.picture_ids.isdisjoint(row.labels)
        learned = [label for label in row.labels if label != -100]
        assert task.tokenizer.decode(learned) == f"{row.answer}<|im_end|>"
        alone = own(task, "train", row.place, answered=True)
        length = len(row.input_ids)
        assert alone["input_ids"][0, :length].tolist() == row.input_ids
        if "labels" in alone:  # PaliGemma's processor says itself what is learned
            assert alone.pop("labels")[0].tolist() == row.labels
        with torch.no_grad():
            logits = model(**alone).logits[0, :length]
        assert relative_error(together[at, :length], logits) < MODEL


@pytest.mark.parametrize("family", PROCESSOR_FAMILIES)
def test_answers_asked_in_a_batch_are_those_asked_alone_as_the_models_own_processing_has_them(
    family: str, bases: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    task = prepared(family, bases, pictures, tmp_path)
    model: Any = task.load()
    rows, images = task.train_set.take(range(4))
    prompts = task.encoder.batch(rows, images, prompts=True)
    options = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": task.pad_id}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    together = model.generate(**prompts, **options)
    for at, row in enumerate(rows):
        given = own(task, "train", row.place, answered=False)
        given.pop("labels", None)
        alone = model.generate(**given, **options)
        for step, logits in enumerate(alone.logits):
            assert relative_error(together.logits[step][at], logits[0]) < MODEL
            if together.sequences[at, prompts["input_ids"].shape[1] + step] != logits[0].argmax():
                break  # two tokens level to rounding; what follows is of another text


@pytest.mark.parametrize("family", PROCESSOR_FAMILIES)
def test_scopes_are_the_familys_own_modules(
    family: str, bases: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    task = prepared(family, bases, pictures, tmp_path, "scopes.projector=full")
    model: Any = task.load()
    config: Any = task.adapter_config(model)
    # The language model as transformers has it, not as its name says.
    language = {id(m) for m in [*model.get_decoder().modules(), model.get_output_embeddings()]}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert (scope_of(name) == "language") == (id(module) in language), name
    projector = set(config.modules_to_save)
    assert projector and all(scope_of(name) == "projector" for name in projector)
    # What is between the two, in the order of the forward pass: the last thing before the language model.
    seen: list[str] = []
    hooks = [
        m.register_forward_pre_hook(lambda _m, _g, name=n: seen.append(name))
        for n, m in model.named_modules()
        if n
    ]
    batch = task.encoder.batch(*task.train_set.take([0]))
    with torch.no_grad():
        model(**{k: v for k, v in batch.items() if k != "labels"})
    for hook in hooks:
        hook.remove()
    names = {id(m): n for n, m in model.named_modules()}
    begin = seen.index(f"{names[id(model.get_decoder())]}.layers.0")
    assert projector <= set(seen[:begin])


# A process that has imported what reads adapters, and nothing of this package; each proof runs in a child of it. So
# transformers and PEFT are imported once for all families.
READER = """
import json, os, runpy, sys, traceback
main = runpy.run_path(sys.argv[1])["main"]
for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            main(*json.loads(line))
        except SystemExit as ended:
            os._exit(ended.code)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def reader() -> Iterator[Any]:
    """Stands for ``run_script`` in proofs."""
    script = str(Path(proofs.__file__).with_name("stock_peft.py"))
    command = [sys.executable, "-P", "-W", "ignore", "-c", READER, script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None

        def run(asked: list[str], *_: Any) -> Any:
            assert asked[2] == script
            print(json.dumps(asked[3:]), file=process.stdin, flush=True)
            return subprocess.CompletedProcess(asked, int(process.stdout.readline()), "", "see above")

        yield run


@pytest.mark.parametrize(
    "family", [f for f in PROCESSOR_FAMILIES if f != "llava"]
)  # which tests/test_vision.py trains
def test_a_family_trains_folds_and_ships_what_stock_peft_reads(
    family: str,
    bases: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    reader: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moslora.training.reload_proof.proof.run_script", reader)
    record = train(arguments(family, bases, pictures, tmp_path), Display(quiet=True)).read()
    assert record["status"] == "completed"
    assert record["proofs"]["fold"]["passed"] and record["proofs"]["reload"]["passed"]
    assert record["metrics"]["after"]["loss"] < record["metrics"]["before"]["loss"]
    assert {"accuracy", "accuracy_shuffled_images"} <= record["metrics"]["after"].keys()


def test_a_processor_is_transformers_own_where_torchvision_is_installed(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(
        "transformers.AutoProcessor.from_pretrained", lambda path, **_: called.append(path) or "stock"
    )
    base = resolve_model(str(bases["qwen2_vl"]))
    assert load_processor(base, {}) == "stock" and called == [base.path]


def test_without_torchvision_only_the_part_for_videos_is_missing(bases: dict[str, Path]) -> None:
    if importlib.util.find_spec("torchvision"):
        pytest.skip("torchvision is installed")
    pytest.importorskip("num2words", reason="SmolVLM's processor wants it")
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm"):
        found: Any = load_processor(resolve_model(str(bases[family])), {})
        stock = type(found).whole
        assert stock.__module__.startswith("transformers.")
        assert set(stock.get_attributes()) - set(found.get_attributes()) == {"video_processor"}
        with pytest.raises(ValueError, match="Videos are not supported"):
            found.video_processor([])
    # What processor_config.json sets is set.
    assert found.image_seq_len == 4
    assert load_processor(resolve_model(str(bases["internvl"])), {}).image_seq_length == 4


def test_a_processor_that_wants_another_package_is_refused_with_its_name(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    with pytest.raises(ModelError, match="pip install num2words"):
        load_processor(resolve_model(str(bases["smolvlm"])), {})


@pytest.mark.parametrize(
    ("rows", "setting", "said"),
    [
        (
            [{"conversations": turns("None?", "no")}],
            "seed=0",
            "row 1: this family .* no question without a picture",
        ),
        (
            [{"image": "red.png", "conversations": [*turns("<image>One?", "1"), *turns("And?", "2")]}],
            "seed=0",
            "row 1: this family .* one question and one answer, but the turns are user, assistant, user, assistant",
        ),
        (
            [{"image": "red.png", "conversations": turns("<image>One?", "1")}],
            "data.train_on=all",
            "both directions.*data.train_on=completions",
        ),
    ],
)
def test_what_a_family_of_one_question_cannot_learn_is_refused_by_place(
    rows: list[Any], setting: str, said: str, bases: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    (pictures / "odd.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=f"(?s){said}"):
        prepared("paligemma", bases, pictures, tmp_path, f"data={pictures / 'odd.json'}", setting)


def test_only_the_families_that_cut_pictures_lose_a_part_of_them(bases: dict[str, Path]) -> None:
    """Of these, CLIP's processor as LLaVA has it: it scales the short side, and keeps the middle."""
    for family, folder in bases.items():
        processor = load_processor(resolve_model(str(folder)), {})
        kept = [kept_of(processor, *size) for size in ((32, 32), (64, 32), (32, 96))]
        expected = [1, 1 / 2, 1 / 3] if family == "llava" else [1, 1, 1]
        assert kept == pytest.approx(expected, abs=0.02), family
