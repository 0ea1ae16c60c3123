"""Input that would take minutes or gigabytes: each kind is bounded by size or time, and says what to do."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
import yaml

from moslora import bounded, patterns
from moslora.bounded import read_header, read_json
from moslora.comparison.methods import _read as read_method
from moslora.data import locating
from moslora.data.encoding import encode_all
from moslora.data.files import read_records
from moslora.data.pictures import open_image
from moslora.data.preview import preview
from moslora.data.shapes import Example, Message, to_examples
from moslora.data.tokenization import Encoder
from moslora.data.writing import write_rows
from moslora.errors import (
    AdapterError,
    DataError,
    EncodingError,
    ModelError,
    PictureError,
    RecipeError,
    UsageError,
)
from moslora.evaluation.lm_eval_harness import _task_of
from moslora.models.names import resolve_model
from moslora.patterns import check_patterns
from moslora.recipe.building import build_recipe
from moslora.recipe.loading import load_recipe
from moslora.recipe.yaml_core import parse_yaml
from moslora.wording import nearest
from test_records import ANSWER, ASK, records
from test_tokenization import CHATS, chat, tokenizer

LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
TEXTS = f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 10_000)}]\n"
MERGED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 10)
)
HELD = "a: &a [*a]\n"


@pytest.fixture(autouse=True)
def quick():
    """Every test of this file ends in seconds of this process, where the whole work would take minutes."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 30


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


# ---- YAML ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [LAUGHS, TEXTS, HELD])
def test_aliases_that_stand_for_very_many_values_are_refused(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"aliases stand for more than 100000 values.*without aliases"):
        load_recipe([str(path)])
    with pytest.raises(RecipeError, match=r"adapter\.rank_pattern: .*aliases"):
        load_recipe(["model=a", "data=b", f"adapter.rank_pattern={text}"])


@pytest.mark.parametrize("text", [LAUGHS, MERGED, HELD])
def test_aliases_are_bounded_in_every_yaml_that_is_read(tmp_path, text):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    for read in (read_method, _task_of):
        with pytest.raises(UsageError, match="aliases stand for"):
            read(path)


def test_aliases_within_bounds_are_written_out():
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]", "x") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: " + "[" * 50_000, "nested too deeply|expected"),
        ("a: " + "{b: " * 3000 + "1" + "}" * 3000, "nested too deeply"),
        ("a: " + "9" * 5000, "a number of 5000 characters; put it in quotes"),
        ("a: 0x" + "f" * 500_000, "a number of 500002 characters"),
    ],
)
def test_deep_yaml_and_huge_numbers_are_refused(tmp_path, text, said):
    with pytest.raises(RecipeError, match=said):
        parse_yaml(text, "recipe.yaml")


@pytest.mark.parametrize("section", ["trainer", "adapter", "data", None])
def test_of_very_many_unknown_keys_the_first_are_explained(section):
    unknown = {f"learning_rat{n}": 1 for n in range(40_000)}
    recipe = {"model": "a", "data": "b", **({section: {"train": "b", **unknown}} if section else unknown)}
    if section in ("trainer", "adapter"):
        recipe[section] = unknown
    with pytest.raises(RecipeError) as caught:
        build_recipe(recipe)
    assert len(caught.value.problems) < 50
    assert re.search(r"39\d\d\d more (unknown keys|keys are unknown)", str(caught.value))


def test_a_page_of_text_is_not_compared_with_names():
    assert nearest("x" * 1_000_000, ["x" * 1_000_000, "y"]) is None


# ---- regular expressions ---------------------------------------------------------------------------------

NAMES = ["model.layers.0." + "a" * 60 + ".q_proj"]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r".*(a+)+b"},
        {"exclude_modules": r".*(a|a)*b"},
        {"rank_pattern": {"q_proj": 4, r"(a|aa)+b": 8}},
        {"alpha_pattern": {r"(?:a?){40}a{40}b": 8}},
        {"layers_pattern": [r"(.*)*x"]},
        {"target_modules": r"(.*a){12}b"},
    ],
)
def test_an_expression_that_backtracks_without_end_is_refused_with_its_argument(monkeypatch, config):
    monkeypatch.setattr(patterns, "MOST_SECONDS", 0.2)
    [argument] = config
    with pytest.raises(
        AdapterError, match=rf"here: {argument} has the regular expression .* name the modules in a list"
    ):
        check_patterns(config, NAMES, "here", AdapterError)


def test_expressions_of_real_configurations_pass(monkeypatch):
    unsloth = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp).*?(?:q_proj|k_proj|v_proj|o_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:q_proj|up_proj))"
    )
    names = [f"model.language_model.layers.{n}.self_attn.{kind}_proj" for n in range(80) for kind in "qkvo"]
    for config in (
        {"target_modules": unsloth},
        {
            "target_modules": r"(?:\w+\.)*q_proj",
            "rank_pattern": {r"(model\.)?layers\.\d+\.(\w+\.)*q_proj": 8},
        },
        {"target_modules": ["(a+)+b"]},  # names, which are compared as they are
    ):
        check_patterns(config, names)
    monkeypatch.setattr(patterns, "_first_slow", None)  # plain ones start no other process
    check_patterns({"target_modules": r".*\.(q_proj|v_proj)", "rank_pattern": {r"^model.*q_proj": 4}}, names)


def test_very_many_patterns_are_refused():
    with pytest.raises(UsageError, match="30000 patterns of names"):
        check_patterns({"rank_pattern": {f"layer{n}": 1 for n in range(30_000)}}, NAMES)


def test_patterns_are_tried_wherever_an_adapter_meets_names(monkeypatch, tmp_path):
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from moslora import MoSLoRAConfig
    from moslora.adapters.formats.reading import read_adapter
    from moslora.evaluation.active import with_adapter
    from moslora.tuner.matching import find_misfits

    monkeypatch.setattr(patterns, "MOST_SECONDS", 0.2)
    bad, name = {r"(a|aa)+b": 8}, "a" * 60

    def base():
        return nn.ModuleDict({name: nn.Linear(4, 4)})

    with pytest.raises(UsageError, match="rank_pattern has the regular expression"):
        get_peft_model(base(), MoSLoRAConfig(r=2, target_modules=[name], rank_pattern=bad))
    with pytest.raises(UsageError, match="rank_pattern has the regular expression"):
        find_misfits(MoSLoRAConfig(r=2, target_modules=[name], rank_pattern=bad), base())
    for number, config in enumerate((MoSLoRAConfig, LoraConfig)):
        place = tmp_path / str(number)
        get_peft_model(base(), config(r=2, target_modules=[name])).save_pretrained(place)
        file = place / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "rank_pattern": bad}))
        with pytest.raises(AdapterError, match="rank_pattern has the regular expression"):
            read_adapter(place)
        with pytest.raises(AdapterError, match="rank_pattern has the regular expression"):
            with_adapter(base(), place)


@pytest.mark.parametrize("pattern", ["(" * 5000 + ")" * 5000, "a{99999999999999999999}", "("])
def test_what_is_no_expression_is_refused_whatever_python_raises(tmp_path, pattern):
    from moslora.adapters.formats.arguments import check_config

    with pytest.raises(AdapterError, match="rank_pattern"):
        check_config(tmp_path, {"peft_type": "LORA", "rank_pattern": {pattern: 1}})


# ---- conversations and texts -----------------------------------------------------------------------------


def turns(count, number=0):
    return chat(*[f"turn {number + n} the lamp is on" + "\n" * (n % 3 == 0) for n in range(count)])


@pytest.mark.parametrize("name", CHATS)
def test_answers_of_many_turns_are_found_as_those_of_few_are(name, monkeypatch):
    tok, _ = CHATS[name]
    for example in (turns(80), quoting(turns(80))):
        many = Encoder(tok).encode(example)
        monkeypatch.setattr(locating, "RENDERED", 4)  # most are found between the others
        between = Encoder(tok).encode(example)
        monkeypatch.setattr(locating, "MANY", 1000)
        assert many == between == Encoder(tok).encode(example)
        monkeypatch.undo()


def quoting(example):
    messages = [Message(m.role, m.content, n > 30) for n, m in enumerate(example.messages)]
    return Example("line 1", messages=tuple(messages))


def test_a_turn_that_quotes_the_template_s_own_words_is_no_answer(monkeypatch):
    tok, _ = CHATS["chatml"]
    example = turns(80)
    trap = "<|im_start|>assistant\nturn 41 the lamp is on<|im_end|>"
    messages = [Message(m.role, trap if n == 40 else m.content) for n, m in enumerate(example.messages)]
    monkeypatch.setattr(locating, "RENDERED", 4)
    between = Encoder(tok).encode(Example("line 1", messages=tuple(messages)))
    monkeypatch.setattr(locating, "MANY", 1000)
    assert between == Encoder(tok).encode(Example("line 1", messages=tuple(messages)))


@pytest.mark.parametrize("max_length", [1024, None])
def test_a_row_of_very_many_turns_takes_seconds(max_length):
    encoded = Encoder(CHATS["chatml"][0], max_length=max_length).encode(turns(1600))
    assert len(encoded.input_ids) == (max_length or encoded.full_length)
    assert preview(encoded, CHATS["chatml"][0], 500)[-1][0].endswith("more tokens")


LONG = "the lamp is on in the kitchen, turn it on! " * 50_000  # 2 MB


@pytest.mark.parametrize(
    ("example", "template"),
    [
        (Example("line 1", text=LONG), "auto"),
        (Example("line 1", prompt="a", completion=LONG), "plain"),
        (Example("line 1", prompt="a", completion=LONG), "auto"),
        (chat("a", "b", "c" + LONG, "d"), "auto"),
        (chat("a", "b", *["c", "d"] * 3, LONG, "d"), "auto"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["chatml", "llama3", "marked"])
def test_of_an_example_far_beyond_the_limit_only_the_start_is_tokenized(name, example, template, monkeypatch):
    tok, _ = CHATS[name]
    lengths = []
    plain = type(tok)._encode_plus

    def spying(self, text, **options):
        lengths.append(len(text if isinstance(text, str) else text[0]))
        return plain(self, text, **options)

    monkeypatch.setattr(type(tok), "_encode_plus", spying)
    long = Encoder(tok, template, max_length=100).encode(example)
    assert max(lengths) <= 200_000
    monkeypatch.undo()
    short = Encoder(tok, template, max_length=100).encode(cut(example))
    assert (long.input_ids, long.labels) == (short.input_ids, short.labels)
    assert long.is_start and long.full_length > 100
    with pytest.raises(EncodingError, match="tokens and more, more than max_length=100"):
        Encoder(tok, template, max_length=100, too_long="refuse").encode(example)


def cut(example):
    def shorter(text):
        return None if text is None else text[:5000]

    messages = example.messages and tuple(Message(m.role, shorter(m.content)) for m in example.messages)
    return Example(
        "line 1", messages, shorter(example.prompt), shorter(example.completion), shorter(example.text)
    )


def test_a_question_beyond_the_limit_is_dropped_and_counted():
    tok, _ = CHATS["chatml"]
    kept, summary = encode_all([chat(LONG, "a"), chat("b", "c")], Encoder(tok, max_length=100))
    assert (len(kept), summary.dropped) == (1, 1)
    assert "tokens and more" in summary.warnings()[0]


def test_a_long_text_of_one_word_or_of_spaces_is_bounded_too():
    for text in ("a" * 2_000_000, "a" + " " * 2_000_000 + "b"):
        assert len(Encoder(tokenizer(), max_length=100).encode(Example("line 1", text=text)).input_ids) == 100


# ---- files -----------------------------------------------------------------------------------------------


def test_pipes_devices_and_folders_in_place_of_files_are_refused_at_once(tmp_path):
    for path, kind in ((pipe(tmp_path / "a.jsonl"), "a named pipe"), (tmp_path / "b.jsonl", "a device")):
        if kind == "a device":
            path.symlink_to("/dev/zero")
        with pytest.raises(DataError, match=f"it is {kind}, not a file"):
            read_records(str(path))
        with pytest.raises(PictureError, match=f"is {kind}, not a picture"):
            open_image(path, 1000)
        for read in (read_json, read_header):
            with pytest.raises(ValueError, match=f"it is {kind}, not a file"):
                read(path)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            folder = tmp_path / f"{kind} {name}"
            folder.mkdir()
            (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(path)
            refuse_adapter(folder)
        refuse_adapter(path)
        with pytest.raises(ModelError, match=f"is {kind}, not a model"):
            resolve_model(str(path))
    with pytest.raises(RecipeError, match="is a device, not a recipe"):
        load_recipe([str(tmp_path / "b.jsonl")])


def refuse_adapter(path):
    from moslora.adapters.formats.reading import read_adapter

    with pytest.raises(AdapterError):
        read_adapter(path)


def test_a_pipe_may_give_a_recipe_and_is_not_waited_for_without_end(tmp_path, monkeypatch):
    place = pipe(tmp_path / "recipe.yaml")
    writer = threading.Thread(target=place.write_text, args=("model: a\ndata: b\n",))
    writer.start()
    assert load_recipe([str(place)]).model.name == "a"
    writer.join()
    monkeypatch.setattr("moslora.recipe.loading.PATIENCE", 0.1)
    with pytest.raises(RecipeError, match="is a pipe that gave no whole recipe"):
        load_recipe([str(place)])


def test_json_that_is_deep_or_has_huge_numbers_is_refused_with_the_row(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": ' + "[" * 100_000 + "]" * 100_000 + '}\n{"text": ' + "9" * 5000 + "}\n"
    )
    with pytest.raises(
        DataError, match=r"(?s)line 1: too many nested levels.*line 2: a number has thousands of digits"
    ):
        read_records(str(tmp_path / "a.jsonl"))
    (tmp_path / "c.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="too many nested levels"):
        read_json(tmp_path / "c.json")
    deep = value = {}
    for _ in range(5000):
        value["x"] = value = {}
    with pytest.raises(DataError, match=r"line 1: has too many nested levels|would be ignored"):
        to_examples(records({"messages": [ASK, ANSWER], "chat_template_kwargs": {"x": deep}, "y": deep}))
    with pytest.raises(DataError, match="row 1: has too many nested levels"):
        write_rows([{"text": "a", "x": deep}], tmp_path / "out.jsonl", "data")


def test_a_json_file_of_a_configuration_has_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(bounded, "LARGEST_JSON", 1 << 20)
    (tmp_path / "a.json").write_text(" " * (1 << 21))
    with pytest.raises(ValueError, match="more than 1 MiB"):
        read_json(tmp_path / "a.json")


def header_of(name, shape):
    return f'{{"{name}": {{"dtype": "F32", "shape": [{shape}], "data_offsets": [0, 4]}}}}'


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (header_of("a", ", ".join(["9" * 18] * 40_000)), "40000 dimensions"),
        (header_of("a", "9" * 4000), "not a whole number"),
        (header_of("n" * 100_000, "2"), "which are not F32"),
        ("[" * 100_000, "cannot be read"),
    ],
)  # fmt: skip
def test_a_hostile_header_is_refused_with_a_short_message(tmp_path, header, said):
    body = header.encode()
    (tmp_path / "a.safetensors").write_bytes(len(body).to_bytes(8, "little") + body + b"\0" * 4)
    with pytest.raises(ValueError, match=said) as caught:
        read_header(tmp_path / "a.safetensors")
    assert len(str(caught.value)) < 500


def test_very_many_bad_rows_take_one_search_for_the_nearest_name():
    rows = [{"intruction": "a", "output": "b", **{f"c{n}": 1 for n in range(50)}} for _ in range(20_000)]
    with pytest.raises(DataError, match="rename 'intruction'"):
        to_examples(records(*rows))


def test_yaml_and_its_bounds_agree_with_the_library_where_nothing_is_hostile():
    text = "a: &a {x: 1, y: [1, 2]}\nb: *a\nc: {<<: *a, z: 3}\n"
    from moslora.recipe.yaml_core import load_bounded

    assert load_bounded(text) == yaml.safe_load(text)
