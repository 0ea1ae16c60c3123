"""Data in files: the same tokens, labels, splits and errors as in memory, found again, and never an old answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

import tiny
from moslora.data.batched import batched
from moslora.data.files import read_records
from moslora.data.shapes import to_examples
from moslora.data.stored import cache, encoding, reading, shards, workers
from moslora.data.stored.encoding import EncodedSet, tokenizer_hash
from moslora.data.tokenization import Encoder
from moslora.display import Display
from moslora.errors import DataError, EncodingError, TrainingError, UsageError
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


# ---- the cache -------------------------------------------------------------------------------------------------


def made(monkeypatch):
    """What is read and tokenized from now on, as it happens."""
    told = []
    for module, name in ((reading, "check_rows"), (encoding, "write_batches")):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, own=own, name=name: (told.append(name), own(*a))[1])
    return told


def test_a_second_start_reads_and_tokenizes_nothing_and_another_split_tokenizes_nothing(
    model, tmp_path, monkeypatch
):
    train = write(tmp_path / "train.jsonl", SHAPES["messages"])
    first = task_of(model, train)
    told = made(monkeypatch)
    again = task_of(model, train)
    assert list(first.train_set) == list(again.train_set) and not told
    other = task_of(model, train, "seed=1", "data.heldout_fraction=0.3")
    assert [e.place for e in other.heldout_set] != [e.place for e in first.heldout_set] and not told
    same(task_of(model, train, "seed=1", "data.heldout_fraction=0.3", cache="never"), other)


def test_a_changed_file_setting_template_or_code_is_never_answered_from_an_old_entry(
    model, tmp_path, monkeypatch
):
    train = write(tmp_path / "train.jsonl", SHAPES["messages"])
    status = train.stat()
    first = task_of(model, train)
    text = train.read_text()
    train.write_text(text.replace("it is 7", "it is 8"))
    os.utime(train, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert train.stat().st_size == status.st_size and train.stat().st_mtime_ns == status.st_mtime_ns
    changed = task_of(model, train)
    same(task_of(model, train, cache="never"), changed)
    assert first.data_hashes != changed.data_hashes and list(first.train_set) != list(changed.train_set)
    told = made(monkeypatch)
    task_of(model, train, "trainer.max_length=60")
    assert told == ["write_batches"] * len(told) and told
    told.clear()
    other = tmp_path / "model"
    shutil.copytree(model, other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + "{# #}\n")
    same(task_of(other, train, cache="never"), task_of(other, train))
    assert told
    told.clear()
    monkeypatch.setattr(cache, "_code", lambda: "another version")
    task_of(model, train)
    assert "check_rows" in told and "write_batches" in told


def test_a_tokenizer_that_tokenizes_otherwise_has_another_hash():
    one, two = tiny.tokenizer(), tiny.tokenizer()
    assert tokenizer_hash(one) == tokenizer_hash(two)
    two.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    assert tokenizer_hash(one) != tokenizer_hash(two)
    three = tiny.tokenizer()
    three.chat_template += " "
    assert tokenizer_hash(one) != tokenizer_hash(three)


def test_a_damaged_entry_is_made_again(model, tmp_path):
    train = write(tmp_path / "train.jsonl", SHAPES["messages"])
    first = list(task_of(model, train).train_set)
    for pattern in ("*/tokens-00000.arrow", "*/examples-00000.arrow", "*/entry.json", "*/split-*.npy"):
        [path, *_] = (tmp_path / "cache" / "data").glob(pattern)
        path.write_bytes(path.read_bytes()[:-9])
        assert list(task_of(model, train).train_set) == first, pattern


def test_entries_that_nobody_used_for_long_go_and_others_stay(tmp_path, monkeypatch):
    root = cache.data_cache()

    def make(name, size=10):
        cache.entry(name, lambda folder: (folder / "a").write_bytes(b"x" * size) and {}, lambda: None)

    for name in ("old", "used", "new"):
        make(name)
    ago = (root / "old" / "entry.json").stat().st_mtime - cache.UNUSED - 10
    os.utime(root / "old" / "entry.json", (ago, ago))
    make("another")
    assert {p.name for p in root.iterdir()} == {"used", "new", "another", "locks"}
    monkeypatch.setattr(cache, "LIMIT", 200)
    yesterday = ago + cache.UNUSED - cache.IN_USE
    os.utime(root / "used" / "entry.json", (yesterday, yesterday))
    make("large", 190)
    assert {p.name for p in root.iterdir()} == {"new", "another", "large", "locks"}


def test_where_the_cache_is_follows_the_variables_of_others(tmp_path, monkeypatch):
    monkeypatch.delenv("MOSLORA_CACHE")
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache.data_cache() == tmp_path / "x" / "moslora" / "data"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "h"))
    assert cache.data_cache() == tmp_path / "h" / "moslora"
    monkeypatch.setenv("MOSLORA_CACHE", str(tmp_path / "m"))
    assert cache.data_cache() == tmp_path / "m" / "data"


MAKER = """
import sys, time
from pathlib import Path
from moslora.data.stored import cache
def make(folder):
    with open(sys.argv[1], "a") as told: told.write("made\\n")
    (folder / "a").write_text("half")
    print("making", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "a").write_text("whole")
    return {}
folder, _ = cache.entry("key", make, lambda: None)
print((folder / "a").read_text(), flush=True)
"""


def test_of_several_processes_one_makes_an_entry_and_a_killed_one_leaves_nothing_half_written(tmp_path):
    script, told = tmp_path / "maker.py", tmp_path / "told"
    script.write_text(MAKER)

    def start(seconds):
        command = [sys.executable, script, told, str(seconds)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    killed = start(60)
    assert killed.stdout.readline() == "making\n"
    waiting = start(0.2)
    killed.kill()
    killed.communicate()
    others = [waiting, start(0.2)]
    assert {one.communicate()[0].splitlines()[-1] for one in others} == {"whole"}
    assert told.read_text() == "made\n" * 2  # by the killed one, and by one of the others
    assert not list(cache.data_cache().glob(".*.part"))


def test_a_request_to_stop_ends_the_preparation_and_leaves_no_entry(model, tmp_path):
    train = write(tmp_path / "train.jsonl", SHAPES["turns"])

    class Asked(Exception):  # noqa: N818 - not an error
        pass

    looks = iter(range(99))

    def check():
        if next(looks) > 4:
            raise Asked

    arguments = [f"model={model}", f"data.train={train}", "evaluation.also=[]", "data.cache=always"]
    for processes in (1, 2):
        recipe = load_recipe([*arguments, f"trainer.dataset_num_proc={processes}"])
        task = find_task("text")(recipe, Display(quiet=True), check)
        with pytest.raises(Asked):
            task.read()
            task.prepare()
    left = [path for path in cache.data_cache().rglob("*") if path.name.endswith(".part")]
    assert not left and not list(cache.data_cache().glob("*/tokens-*.arrow"))


def test_a_process_that_dies_is_said_and_leaves_nothing(tmp_path):
    def die(part, check):
        os._exit(9)

    with pytest.raises(TrainingError, match="died, perhaps out of memory"):
        list(workers.Workers(2, Display(quiet=True), lambda: None).run("Dying", die, [1, 2, 3], [1, 1, 1]))


# ---- where data are --------------------------------------------------------------------------------------------


def test_a_pattern_and_the_shards_of_a_folder_are_one_source(model, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        write(folder / f"train-{number:05}-of-00003.jsonl", SHAPES["messages"][8 * number : 8 * number + 8])
    for source in (folder, f"{folder}/*.jsonl"):
        one, two = (task_of(model, source, "data.limit=19", cache=c) for c in ("never", "always"))
        same(one, two)
        places = {e.place.partition(",")[0] for e in (*one.train_set, *one.heldout_set)}
        assert places == {f"train-{number:05}-of-00003.jsonl" for number in range(3)}
    (folder / "train-00001-of-00003.jsonl").unlink()
    with pytest.raises(
        DataError, match=r"2 files hold the split 'train'.*name all by a pattern: .*train\*\.jsonl"
    ):
        read_records(str(folder))
    with pytest.raises(DataError, match="no file fits the pattern"):
        read_records(f"{folder}/*.csv")
    write(folder / "notes.txt", [])
    with pytest.raises(DataError, match=r"notes\.txt: files with \.txt are not supported"):
        read_records(f"{folder}/*")
    write(folder / "other.jsonl", SHAPES["alpaca"])
    with pytest.raises(DataError, match="its rows have format"):
        task_of(model, f"{folder}/*.jsonl")


def test_a_configuration_and_a_revision_of_a_hub_data_set_are_asked_for(model, tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, subset, **options):
        asked.append((name, subset, options))
        return datasets.Dataset.from_list([{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(30)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    settings = ("data.subset=main", "data.revision=abc")
    one, two = (task_of(model, "org/name", *settings, cache=c) for c in ("never", "always"))
    same(one, two)
    assert set(map(str, asked)) == {str(("org/name", "main", {"split": "train", "revision": "abc"}))}
    train = write(tmp_path / "train.jsonl", SHAPES["messages"])
    for kind in ("text", "preference", "reward"):
        with pytest.raises(UsageError, match=r"data\.revision='abc' does not apply to .*train\.jsonl"):
            recipe = load_recipe([f"task={kind}", f"model={model}", f"data={train}", "data.revision=abc"])
            find_task(kind)(recipe, Display(quiet=True), lambda: None).read()


def test_only_large_data_leave_memory_and_what_is_asked_for_decides(model, tmp_path, monkeypatch):
    train = write(tmp_path / "train.jsonl", SHAPES["messages"])
    assert not isinstance(task_of(model, train, cache="auto").train_set, EncodedSet)
    monkeypatch.setattr(reading, "LARGE", 100)
    assert isinstance(task_of(model, train, cache="auto").train_set, EncodedSet)
    assert not isinstance(task_of(model, train, "data.limit=10", cache="auto").train_set, EncodedSet)


def test_a_run_trains_from_files_stops_and_goes_on_without_tokenizing_again(model, tmp_path, monkeypatch):
    from moslora.training.run import resume, train_recipe

    rows = write(tmp_path / "train.jsonl", SHAPES["messages"])
    found = []
    for cache_ in ("never", "always"):
        recipe = load_recipe(
            [
                *(f"model={model}", f"data.train={rows}", "evaluation.also=[]", f"data.cache={cache_}"),
                *("trainer.max_steps=2", "trainer.use_cpu=true", "adapter.r=2", "task.generate_examples=2"),
                *("trainer.per_device_train_batch_size=2", f"output.dir={tmp_path / cache_}"),
            ]
        )
        run = train_recipe(recipe, Display(quiet=True))
        told = made(monkeypatch)
        run = resume(run.path, Display(quiet=True), settings=["trainer.max_steps=3"])
        assert not told or cache_ == "never"
        found.append([run.read()["metrics"], (run.path / "predictions.jsonl").read_text()])
    assert found[0] == found[1]
