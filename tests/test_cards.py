"""Laws of the cards: what the Hub reads of an adapter is true, nothing of a person's is lost, and no path leaks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import moslora
import tiny
from moslora.adapters.cards.base_name import bare_name, base_name, is_path
from moslora.adapters.cards.card import is_ours, is_pefts_template, is_replaceable
from moslora.adapters.cards.markdown import code, fenced, plain
from moslora.adapters.cards.measured import read_measured
from moslora.adapters.cards.scrubbing import scrub_text
from moslora.api.run import Run
from moslora.display import Silence
from moslora.training.cards import write_cards
from moslora.training.run_directory import RunDirectory
from verbs import World

HOSTILE = "]0;<script>alert(1)</script>|`*x*\n---\nlicense: mit\n[a](http://b)\x1b[2J"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    settings = world.recipe(tmp_path_factory.mktemp("runs"))
    with pytest.warns(UserWarning, match="held-out"):
        return moslora.train(settings=settings)


def test_a_run_describes_both_its_adapters_with_what_it_measured(run: Run, world: World) -> None:
    metrics = run.metrics
    for folder in (run.adapter, run.lora):
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert is_ours(text) and str(world.folder) not in text and "/tmp" not in text
        results = metadata_load(folder / "README.md")["model-index"][0]["results"]
        found = {m["type"]: m["value"] for r in results for m in r["metrics"]}
        assert found == pytest.approx({k: metrics["after"][k] for k in ("loss", "exact_match")}, abs=1e-6)
        low, high = metrics["intervals"]["after"]["exact_match"]
        assert f"95 % interval {low:.4f} to {high:.4f}" in text
        assert f"{metrics['before']['loss']:.4f}" in text and f"{metrics['after']['loss']:.4f}" in text
        for digest in run.record["hashes"]["data"].values():
            assert digest in text
        assert f"{run.proofs['reload']['max_logit_difference']:.1e}" in text
    assert not list(run.path.rglob("*.json.part"))


def test_the_card_is_metadata_that_the_hubs_own_reader_takes(run: Run) -> None:
    card = ModelCard.load(run.lora / "README.md")
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    read = metadata_load(run.lora / "README.md")
    assert ModelCardData(**read).to_dict() == card.data.to_dict()
    assert card.data.eval_results and card.data.to_dict()["model-index"] == read["model-index"]


@pytest.mark.parametrize(
    ("how", "is_same"), [({}, True), ({"rank": 2}, False), ({"dtype": "float16"}, False)]
)
def test_a_measurement_is_only_claimed_of_the_weights_it_was_made_on(
    run: Run, tmp_path: Path, how: dict[str, object], is_same: bool
) -> None:
    moslora.export(run.adapter, tmp_path / "out", **how)  # type: ignore[arg-type]
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert ("model-index" in metadata_load(tmp_path / "out" / "README.md")) is is_same
    assert ("**before** the adapter was changed" in text) is not is_same
    moslora.export(tmp_path / "out", tmp_path / "again")  # what changed once stays changed
    assert ("model-index" in metadata_load(tmp_path / "again" / "README.md")) is is_same


def test_nothing_is_said_of_weights_that_were_saved_over_the_measured_ones(run: Run, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run.lora, tmp_path / "other"))
    assert read_measured(other)
    base = tiny.llama(vocab_size=259, max_position_embeddings=256)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(
        other
    )
    assert read_measured(other) is None
    moslora.export(other, tmp_path / "out")
    assert "What was measured" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_readme_of_a_persons_is_never_written_over(run: Run, tmp_path: Path) -> None:
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "run")))
    text = (copy.lora / "README.md").read_text(encoding="utf-8")
    for mine in ("# Mine", text.replace("adapter", "thing", 1), text + "\nand this"):
        (copy.lora / "README.md").write_text(mine, encoding="utf-8")
        with pytest.warns(UserWarning, match="left as it is"):
            write_cards(copy, Silence())
        assert (copy.lora / "README.md").read_text(encoding="utf-8") == mine
    (copy.lora / "README.md").write_text(text, encoding="utf-8")
    write_cards(copy, Silence())
    assert (copy.lora / "README.md").read_text(encoding="utf-8") == text  # and the same again


def test_every_one_of_several_files_is_named(world: World, tmp_path: Path) -> None:
    more, heldout = tmp_path / "more.jsonl", tmp_path / "asked.jsonl"
    tiny.save_chat_data(more, 6)
    tiny.save_chat_data(heldout, 4)
    files = [
        f"data.train=[{world.data}, {{path: {more}, weight: 2}}]",
        f"data.heldout=[{heldout}, {more}]",
    ]
    settings = [one for one in world.recipe(tmp_path) if not one.startswith("data")]
    with pytest.warns(UserWarning, match="held-out"):
        run = moslora.train(settings=[*settings, *files, "task.metric=none"])
    text = (run.lora / "README.md").read_text(encoding="utf-8")
    hashes = run.record["hashes"]["data"]
    for role, file in (("train", world.data), ("train", more), ("heldout", heldout), ("heldout", more)):
        assert f"| {role} | `{file.name}` | `{hashes[f'{role}, {file.name}']}` |" in text
    (result,) = metadata_load(run.lora / "README.md")["model-index"][0]["results"]
    assert result["dataset"] == {"type": "json", "name": "asked.jsonl, more.jsonl"}


def test_pefts_template_is_replaced_unless_somebody_filled_it_in(tmp_path: Path) -> None:
    model = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert is_pefts_template(text) and is_replaceable(tmp_path / "README.md")
    for filled in (
        text.replace("[More Information Needed]", "It sorts mail.", 1),
        text + "\nIt sorts mail.\n",
        text.replace("# Model Card for Model ID", "# My model"),
    ):
        assert not is_pefts_template(filled)


def test_names_of_others_are_neither_markup_nor_metadata_nor_obeyed(run: Run, tmp_path: Path) -> None:
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "run")))
    record = copy.read()
    record["metrics"]["before"][HOSTILE] = 0.5
    record["metrics"]["after"][HOSTILE] = 0.25
    copy.record.write_text(json.dumps(record), encoding="utf-8")
    recipe = copy.recipe.read_text(encoding="utf-8")
    named = re.sub(r"(?m)^(  name: ).*$", lambda found: found[1] + json.dumps(HOSTILE), recipe, count=1)
    copy.recipe.write_text(named, encoding="utf-8")
    write_cards(copy, Silence())
    text = (copy.lora / "README.md").read_text(encoding="utf-8")
    assert "alert(1)" in text and "<script>" not in text.replace("`", "\x00<")[:0] + _outside_code(text)
    assert "\x1b" not in text and "license" not in metadata_load(copy.lora / "README.md")
    assert not re.search(r"^---$", text.split("\n---\n", 1)[1], re.MULTILINE)


def _outside_code(text: str) -> str:
    """Return a card's Markdown without its code."""
    body = text.split("\n---\n", 1)[1]
    body = re.sub(r"(?ms)^(`{3,}).*?^\1`*$", "", body)
    return re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", body)


@given(st.text(max_size=60))
def test_any_name_stays_on_its_line_and_inside_its_code(text: str) -> None:
    for shown in (plain(text), code(text)):
        assert "\n" not in shown and "\x1b" not in shown and not re.search(r"(?<!\\)\|", shown)
    assert not re.search(r"<(?!!)", plain(text)) and "](" not in plain(text)
    ticks = re.match(r"`+", code(text))
    assert ticks is not None and code(text).endswith(ticks[0])
    inner = code(text)[len(ticks[0]) : -len(ticks[0])]
    assert ticks[0] not in re.findall(r"`+", inner)
    block = fenced("sh", text.splitlines())
    assert block[0].removesuffix("sh") == block[-1] and block[-1] not in block[1:-1]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/ada/models/llama", "llama"),
        ("~/llama", "llama"),
        ("C:\\Users\\ada\\llama", "llama"),
        ("../up/llama/", "llama"),
        ("org/name", "org/name"),
        ("plain", "plain"),
        ("/", "local"),
    ],
)
def test_a_path_is_only_the_name_of_what_it_leads_to(name: str, shown: str) -> None:
    assert bare_name(name) == shown and is_path(name) is (shown != name)
    if name.startswith(("/h", "~", "C")):
        assert scrub_text(f"held against {name}, once") == f"held against {shown}, once"


def test_a_packaged_base_is_called_by_its_id_and_license_on_the_hub(tmp_path: Path) -> None:
    cache = (
        "/home/someone/moslora/models/smollm2-135m-instruct.q4_1-b179c9523d0e6a0f-float32-transformers-5.23.0"
    )
    for name in ("smollm2-135m-instruct", cache):
        found = base_name(name)
        assert (found.name, found.hub) == ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")
        assert found.license == "apache-2.0" and "Q4_1" in found.remark
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A base\n", encoding="utf-8")
    assert base_name(str(tmp_path)).license == "mit" and base_name(str(tmp_path)).hub is None


def test_each_format_says_how_it_is_loaded(world: World, tmp_path: Path) -> None:
    ways = {"lora": ("PEFT", "vLLM", "llama.cpp"), "native": ("import moslora", "moslora export")}
    for format_, words in ways.items():
        moslora.export(world.native, tmp_path / format_, format_, base=None)
        text = (tmp_path / format_ / "README.md").read_text(encoding="utf-8")
        assert all(word in text for word in words), format_
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert blocks
        for block in blocks:
            compile(block, format_, "exec")


def test_what_vllm_refuses_is_not_advised(world: World, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights=False)
    get_peft_model(tiny.llama(vocab_size=259), config).save_pretrained(tmp_path / "dora")
    moslora.export(tmp_path / "dora", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "vllm serve" not in text and "Not as it is" in text


def test_the_example_of_a_card_loads_what_it_describes(run: Run, world: World) -> None:
    text = (run.lora / "README.md").read_text(encoding="utf-8")
    block = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    block = block.replace("BASE", str(world.base)).replace("REPO", str(run.lora))
    scope: dict[str, object] = {}
    exec(compile(block, "card", "exec"), scope)
    assert scope["model"].peft_config["default"].peft_type == "LORA"  # type: ignore[attr-defined]
