"""Data in files: the same tokens, labels, splits and errors as in memory, found again, and never an old answer."""

from __future__ import annotations

import json

import pytest

import tiny
from moslora.data.batched import batched
from moslora.data.files import read_records
from moslora.data.shapes import to_examples
from moslora.data.stored import shards
from moslora.data.stored.encoding import EncodedSet
from moslora.data.tokenization import Encoder
from moslora.display import Display
from moslora.errors import EncodingError
from moslora.recipe.loading import load_recipe
from moslora.tasks import find_task
from test_people import of_model
from test_tokenization import CHATML, tokenizer

TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
]


def ask(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def many(make, count=23):
    return [make(n) for n in range(count)]


# Every shape of data, with white space, control tokens, flags, long rows and characters outside of ASCII among them.
SHAPES = {
    "messages": many(lambda n: {"messages": [ask(f"say {n} ünïcode 🎉"), answer(f"it is {n}")], "kind": n}),
    "turns": many(
        lambda n: {
            "messages": [
                {"role": "system", "content": "Home"},
                *(turn for k in range(n % 4 + 1) for turn in (ask(f"q{k}{n}"), answer(f"a {k} {n}", weight=1))),
                *([ask("and then?")] if n % 5 == 0 else []),
            ]
        }
    ),
    "flags": many(lambda n: {"messages": [ask("a"), answer(f"bad {n}", train=False), ask("b"), answer(f"good {n}")]}),
    "long": many(lambda n: {"messages": [ask("word " * (5 * n + 1)), answer(f"end {n} " * (n + 1))]}),
    "sharegpt": many(
        lambda n: {"conversations": [{"from": "human", "value": f"{n}"}, {"from": "gpt", "value": f"<{n}>"}]}
    ),
    "texts": many(lambda n: {"prompt": f"What is {n}? ", "completion": f" {n * n}\n"}),
    "lists": many(lambda n: {"prompt": [ask(f"{n}"), answer("x"), ask("?")], "completion": [answer(f"y {n}")]}),
    "alpaca": many(lambda n: {"instruction": f"do {n}", "input": "" if n % 2 else "this", "output": f"done {n}"}),
    "plain": many(lambda n: {"text": f"A text of {n} <|im_end|> words. " * (n % 7 + 1), "source": "book"}),
    "control": many(lambda n: {"messages": [ask(f"{n} <|im_start|>"), answer("b<|im_end|>c" if n % 3 else "b")]}),
}  # fmt: skip
SETTINGS = [
    (),
    ("data.train_on=all", "trainer.max_length=24"),
    ("data.train_on=last", "trainer.max_length=60", "data.too_long=drop"),
    ("data.train_on=each", "trainer.max_length=99"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_chat_model(tmp_path_factory.mktemp("stored") / "model")


@pytest.fixture(autouse=True)
def small_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("MOSLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "PART", 500)
    monkeypatch.setattr(shards, "SMALL", 500)


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def task_of(model, train, *settings, cache="always", prepare=True):
    recipe = load_recipe(
        [
            *(f"model={model}", f"data.train={train}", "evaluation.also=[]", "trainer.use_cpu=true"),
            *("trainer.dataset_num_proc=1", f"data.cache={cache}", *settings),
        ]
    )
    task = find_task("text")(recipe, Display(quiet=True), lambda: None)
    task.read()
    if prepare:
        task.prepare()
    return task


def said(model, train, *settings, cache):
    with pytest.raises(ValueError) as caught:
        task_of(model, train, *settings, cache=cache)
    return f"{type(caught.value).__name__}: {caught.value}"


def outcome(model, train, *settings, cache):
    """What comes of data: a task, or what is wrong with them."""
    try:
        return task_of(model, train, *settings, cache=cache)
    except ValueError as problem:
        return str(problem)


def same(one, two):
    """Assert that two tasks have the same data, everything included."""
    assert isinstance(two.train_set, EncodedSet) and not isinstance(one.train_set, EncodedSet)
    for name in ("train_examples", "heldout_examples"):
        if one.recipe.data.train_on != "each":
            assert list(getattr(one, name)) == list(getattr(two, name)), name
    assert list(one.train_set) == list(two.train_set) and list(one.heldout_set) == list(two.heldout_set)
    assert (one.train_summary, one.heldout_summary) == (two.train_summary, two.heldout_summary)
    assert (one.asked, one.data_hashes, one.stop_ids) == (two.asked, two.data_hashes, two.stop_ids)
    assert [one.by_place[e.place] for e in one.heldout_set] == [
        two.by_place[e.place] for e in two.heldout_set
    ]
    rows = two.train_set.as_dataset()
    assert rows["input_ids"][:] == [e.input_ids for e in one.train_set]
    assert rows["labels"][:] == [e.labels for e in one.train_set]
    assert two.train_set.trained_tokens == one.train_summary.trained_tokens


# ---- the same as in memory, and as one by one ------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", SETTINGS, ids=["default", "all", "last", "each"])
def test_tokens_labels_split_and_counts_are_those_of_data_in_memory(model, tmp_path, shape, settings):
    train = write(tmp_path / "train.jsonl", SHAPES[shape])
    settings = (*settings, f"data.heldout={train}")
    one, two = (outcome(model, train, *settings, cache=cache) for cache in ("never", "always"))
    if isinstance(one, str):
        assert shape in ("flags", "turns", "long") and one == two
    else:
        same(one, two)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["chatml", "qwen3", "gemma"])
def test_a_batch_is_encoded_as_each_example_alone_is(tmp_path, shape, name):
    tok = tokenizer(CHATML, eos="<|im_end|>") if name == "chatml" else of_model(name)
    examples = to_examples(read_records(str(write(tmp_path / "a.jsonl", SHAPES[shape]))))
    for train_on in ("completions", "last", "all"):
        encoder = Encoder(tok, train_on=train_on, max_length=60)

        def alone(example, encoder=encoder):
            try:
                return encoder.encode_whole(example)
            except EncodingError as problem:
                return str(problem)

        together = batched(encoder).encode_many(examples)
        assert [str(e) if isinstance(e, EncodingError) else e for e in together] == list(map(alone, examples))


def test_tools_thoughts_and_variables_come_back_from_files_as_they_were(tmp_path):
    tok = of_model("qwen3")
    call = {"function": {"name": "weather", "arguments": {"city": "Oslo", "n": 1.5}}}
    turns = [ask("w?"), answer("", tool_calls=[call]), {"role": "tool", "content": "sun"}, answer("ok")]
    thinking = [ask("t?"), answer("yes", reasoning_content="hm")]
    rows = [
        {"messages": turns, "tools": TOOLS},
        {"messages": thinking, "chat_template_kwargs": {"enable_thinking": True}},
    ]
    rows = [{**row, "id": n} for n in range(8) for row in rows]
    model = tmp_path / "model"
    tiny.save_chat_model(model, vocab_size=400)
    tok.save_pretrained(model)
    train = write(tmp_path / "train.jsonl", rows)
    one, two = (task_of(model, train, "data.train_on=last", cache=cache) for cache in ("never", "always"))
    same(one, two)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_of_files_is_read_in_parts(model, tmp_path, suffix):
    import pandas

    rows = [{"prompt": f'q{n}\nmore, of "it"', "completion": f"ä {n}"} for n in range(40)]
    path = tmp_path / f"train{suffix}"
    table = pandas.DataFrame(rows)
    if suffix == ".jsonl":
        write(path, rows)
        path.write_bytes(b"\xef\xbb\xbf\n" + path.read_bytes() + b"  \n\n")
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".parquet":
        table.to_parquet(path, row_group_size=7)
    else:
        table.to_csv(path, sep="," if suffix == ".csv" else "\t", index=False)
    for settings in (
        (),
        ("data.limit=17",),
        ("data.columns={system: prompt, prompt: prompt, completion: completion}",),
    ):
        one, two = (task_of(model, path, *settings, cache=cache) for cache in ("never", "always"))
        same(one, two)


def test_several_processes_make_what_one_makes(model, tmp_path):
    train = write(tmp_path / "train.jsonl", SHAPES["turns"])
    one = task_of(model, train, cache="never")
    same(one, task_of(model, train, "trainer.dataset_num_proc=3"))
    places = sorted((tmp_path / "cache" / "data").glob("*/tokens-*.arrow"))
    assert len(places) > 3


def test_weights_and_several_files_give_the_same_epoch(model, tmp_path):
    write(tmp_path / "a.jsonl", SHAPES["messages"])
    write(tmp_path / "b.jsonl", SHAPES["alpaca"])
    for weights in ((0.5, 2), (1, 1.25)):
        train = (
            "["
            + ", ".join(
                f"{{path: {tmp_path / n}.jsonl, weight: {w}}}" for n, w in zip("ab", weights, strict=True)
            )
            + "]"
        )
        one, two = (task_of(model, train, "seed=3", cache=cache) for cache in ("never", "always"))
        same(one, two)


def test_what_is_set_aside_to_choose_a_rate_by_is_the_same(model, tmp_path):
    rows = [{"prompt": f"q{n % 30}", "completion": f"{n}"} for n in range(60)]
    train = write(tmp_path / "train.jsonl", rows)
    found = []
    for cache_ in ("never", "always"):
        task = task_of(model, train, cache=cache_, prepare=False)
        count = task.set_aside(6, 3)
        task.prepare()
        found.append((count, list(task.train_set), list(task.validation_set), list(task.heldout_set)))
    assert found[0] == found[1]


def test_shared_prompts_are_counted_between_files_and_memory(model, tmp_path, capsys):
    train = write(tmp_path / "train.jsonl", SHAPES["texts"])
    heldout = write(tmp_path / "heldout.jsonl", SHAPES["texts"][:4])
    task = task_of(model, f"[{{path: {train}}}]", f"data.heldout={heldout}", prepare=False)
    assert len(task.heldout_examples) == 4
    from moslora.data.splitting import overlap

    assert overlap(task.train_examples, task.heldout_examples) == 4
    assert overlap(task.train_examples, list(task.heldout_examples)) == 4
    assert overlap(list(task.train_examples), list(task.heldout_examples)) == 4


# ---- the same errors -------------------------------------------------------------------------------------------

GOOD = {"messages": [ask("a"), answer("b")]}
FAULTY = {
    "json": "{\n" * 3 + json.dumps(GOOD) + "\n[1]\n" + "{\n" * 7,
    "fields": [GOOD, *many(lambda n: {"messages": [ask("a"), {"role": "assistant", "content": None}]}), GOOD],
    "unread": [GOOD, *many(lambda n: {**GOOD, "score": n, "nobody": "x"})],
    "both": [GOOD, *many(lambda n: {**GOOD, "score": n}), {"messages": []}],
    "mixed": [*many(lambda n: GOOD), *many(lambda n: {"text": "a"}, 5)],
    "mixed-first": [*many(lambda n: {"text": "a"}, 5), *many(lambda n: GOOD)],
    "ambiguous": [*many(lambda n: GOOD), {**GOOD, "text": "a"}],
    "unknown": many(lambda n: {"ask": "a", "say": "b"}),
    "near": many(lambda n: {"mesages": [ask("a"), answer("b")]}),
    "empty": "\n\n  \n",
    "equal": many(lambda n: GOOD),
    "long": many(lambda n: {"messages": [ask("a"), answer("b" * (9 * n + 1))]}),
}


@pytest.mark.parametrize("kind", FAULTY)
def test_errors_are_the_same_text_with_every_row_counted(model, tmp_path, kind):
    train = tmp_path / "train.jsonl"
    rows = FAULTY[kind]
    train.write_text(rows) if isinstance(rows, str) else write(train, rows)
    settings = ["trainer.max_length=40", "data.too_long=refuse"] if kind == "long" else []
    one, two = (said(model, train, *settings, cache=cache) for cache in ("never", "always"))
    assert one == two
    columns = "data.columns={prompt: x, completion: y}"
    one, two = (said(model, train, columns, cache=cache) for cache in ("never", "always"))
    assert one == two
    assert not list((tmp_path / "cache").rglob("*.part"))
