from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moslora.data.files import FILE_READERS, Records, read_records
from moslora.data.shapes import DATA_FORMATS, Example, Message, to_examples
from moslora.data.splitting import overlap, split_heldout
from moslora.errors import DataError

ROWS = [
    {"prompt": "turn on the lamp", "completion": "on", "kind": "simple"},
    {"prompt": 'ä\n,"😀', "completion": "b", "kind": ""},
]
ASK, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def written(folder: Path, suffix: str) -> str:
    """Write ROWS in the format of ``suffix`` with another library where there is one."""
    import csv

    import pyarrow
    import pyarrow.parquet

    path = folder / f"train{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(ROWS[0]), delimiter="\t" if suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(ROWS)
    elif suffix == ".json":
        path.write_text(json.dumps({"data": ROWS}))
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return str(path)


def records(*rows) -> Records:
    return Records(list(rows), [f"line {n}" for n in range(1, len(rows) + 1)], "data.jsonl", "")


def error(*rows, format="auto") -> str:
    with pytest.raises(DataError) as caught:
        to_examples(records(*rows), format)
    return str(caught.value)


# ---- files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FILE_READERS)
def test_every_format_holds_the_same_rows(tmp_path, suffix):
    import hashlib

    source = written(tmp_path, suffix)
    read = read_records(source)
    assert read.rows == ROWS
    assert read.sha256 == hashlib.sha256(Path(source).read_bytes()).hexdigest()
    assert read_records(str(tmp_path)) == read  # the folder's training split
    short = read_records(source, limit=1)
    assert (short.rows, short.sha256) == (ROWS[:1], read.sha256)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_a_byte_order_mark_and_other_line_ends_change_nothing(tmp_path, suffix):
    rows = ROWS[:1]
    plain = Path(written(tmp_path, suffix)).read_bytes()
    source = write(
        tmp_path / f"marked{suffix}", b"\xef\xbb\xbf" + plain.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    )
    assert read_records(source).rows[:1] == rows


def test_blank_lines_are_passed_over_and_places_still_count_them(tmp_path):
    row = '{"text": "a"}'
    assert read_records(write(tmp_path / "a.jsonl", f"\n{row}\n  \n\n{row}")).places == ["line 2", "line 5"]
    assert read_records(write(tmp_path / "a.csv", 'text,n\n"a\nb",1\n\nc,2\n')).places == ["line 2", "line 5"]
    assert read_records(write(tmp_path / "a.json", f"[{row}, {row}]")).places == ["row 1", "row 2"]


def test_a_csv_field_may_be_longer_than_python_s_limit(tmp_path):
    import csv

    before = csv.field_size_limit()
    assert len(read_records(write(tmp_path / "a.csv", "text\n" + "a" * 200_000)).rows[0]["text"]) == 200_000
    assert csv.field_size_limit() == before


BAD = {
    "a.jsonl": [
        ("", "the file is empty"),
        ("\n \n", "holds no rows"),
        ('{"text": "a"}\n{"text": }', r"line 2: Expecting value \(column 10\)"),
        ('{"text": "a", "text": "b"}', "line 1: key 'text' appears twice"),
        ('{"text": NaN}', "line 1: NaN is not JSON"),
        ('{"text": -Infinity}', "line 1: -Infinity is not JSON"),
        ('{"n": 1e999}', "line 1: number 1e999 is too large"),
        (r'{"text": "\ud83d"}', "line 1: .*without its other half"),
        (b'{"text": "a"}\n{"text": "\xe4"}', "line 2: byte 0xe4 at offset 24 is not UTF-8"),
        (b"\xff\xfe{\x00", "line 1: byte 0xff at offset 0 is not UTF-8"),
        ("[" * 5000, "line 1: too many nested levels"),
        ("[1]\n", "line 1: is a list; expected an object"),
        ("null", "line 1: is null; expected an object"),
        ('[\n{"text": "a"}\n]', "line 1: .*name it .json"),
    ],
    "a.json": [
        ("[]", "holds no rows"),
        (" ", "holds no rows"),
        ('[{"a": 1},\n {"a" 1}]', r"Expecting ':' delimiter \(line 2, column 7\)"),
        ('{"rows": [1]}', "an object with keys rows; expected a list of objects"),
        ('{"a": 1}\n{"a": 2}', "name it .jsonl"),
        ('[{"a": 1}, 2]', "row 2: is a number; expected an object"),
    ],
    "a.csv": [
        ("a,b\n", "holds no rows"),
        ("a,b\n1,2\n1\n1,2,3\n", r"(?s)line 3: has 1 fields; the header has 2.*line 4: has 3"),
        ("a,a\n1,2\n", "line 1: column 'a' appears twice"),
        ("instruction;output\na;b\n", r"line 1: .*separator seems to be ';'"),
        ('a,b\n1,"2\n', "line 2: unexpected end of data"),
        (b"a\n\xff\n", "byte 0xff at offset 2 is not UTF-8"),
    ],
    "a.tsv": [("a,b\n1,2\n", "separator seems to be ',': name the file .csv")],
    "a.parquet": [("PAR1 not really", "not readable as Parquet")],
    "a.jsonl.gz": [("x", "compressed.*gunzip")],
    "a.jsnl": [("x", r"\.jsnl are not supported.*Did you mean '\.jsonl'\?")],
    "a": [("x", "no extension are not supported")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "said"), [(n, c, s) for n, cases in BAD.items() for c, s in cases]
)
def test_a_bad_file_is_named_with_the_place_and_what_was_found(tmp_path, name, content, said):
    with pytest.raises(DataError, match=said) as caught:
        read_records(write(tmp_path / name, content))
    assert str(caught.value).startswith(str(tmp_path / name))


def test_five_faults_are_shown_and_the_rest_counted(tmp_path):
    source = write(tmp_path / "a.jsonl", '{"text": "a"}\n' + "{\n" * 8)
    with pytest.raises(DataError) as caught:
        read_records(source)
    assert str(caught.value).splitlines()[0] == f"{source}: 8 faults"
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:7]] == [
        "line 2", "line 3", "line 4", "line 5", "line 6", "and 3 more",
    ]  # fmt: skip
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@given(
    st.sampled_from(sorted(FILE_READERS)),
    st.binary(max_size=60) | st.text('[]{}",:\\u\n\tNaN1e.').map(str.encode),
    st.data(),
)
def test_garbage_and_torn_files_raise_data_errors_alone(tmp_path_factory, suffix, garbage, data):
    folder = tmp_path_factory.mktemp("fuzz")
    whole = Path(written(folder, suffix)).read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    for content in (garbage, whole[:at], whole[:at] + garbage + whole[at:]):
        try:
            to_examples(read_records(write(folder / f"a{suffix}", content)))
        except DataError as problem:
            assert str(problem)


# ---- where data lies -------------------------------------------------------------------------------------


def test_a_missing_path_names_the_nearest_file(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"no such file or folder\. Did you mean .*train\.jsonl\?"):
        read_records(str(tmp_path / "trian.json"))
    with pytest.raises(DataError, match="there is no folder"):
        read_records(str(tmp_path / "nowhere" / "train.jsonl"))


def test_a_folder_holds_one_file_per_split(tmp_path):
    with pytest.raises(DataError, match=r"the folder is empty.*Put train\.jsonl into it"):
        read_records(str(tmp_path))
    write(tmp_path / "notes.md", "x")
    with pytest.raises(DataError, match="no file in the folder can be read"):
        read_records(str(tmp_path))
    write(tmp_path / "test-00000-of-00001.jsonl", '{"text": "a"}')
    assert read_records(str(tmp_path), split="test").rows == [{"text": "a"}]
    with pytest.raises(DataError, match=r"no file is named after the split 'train'; there are test-00000"):
        read_records(str(tmp_path))
    write(tmp_path / "train.json", "[]")
    write(tmp_path / "train.csv", "a")
    with pytest.raises(DataError, match=r"2 files hold the split 'train': train\.csv, train\.json"):
        read_records(str(tmp_path))


def test_a_folder_that_poses_as_a_file_or_cannot_be_opened_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_records(str(tmp_path / ("a" * 300 + ".jsonl")))
    for source in ("", "a\0b"):
        with pytest.raises(DataError):
            read_records(source)


def test_a_hub_id_is_loaded_only_when_no_path_could_be_meant(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, subset, **options):
        assert subset is None
        asked.append((name, options))
        if name == "org/gone":
            raise ConnectionError("offline")
        return [{"text": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    read = read_records("org/name", split="test", limit=3)
    assert (read.rows, read.places, read.source) == ([{"text": "a"}], ["row 1"], "org/name")
    assert read.sha256 == read_records("org/name").sha256
    with pytest.raises(DataError, match=r"org/gone: not on disk, and not loaded from the hub.*offline"):
        read_records("org/gone")
    assert asked[0] == ("org/name", {"split": "test[:3]"})
    (tmp_path / "data").mkdir()
    count = len(asked)
    for path in ("data/train", "org/train.jsonl", "train"):
        with pytest.raises(DataError, match="there is no"):
            read_records(path)
    assert len(asked) == count


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="limit=0"):
        read_records("x.jsonl", limit=0)


# ---- shapes ----------------------------------------------------------------------------------------------


def test_every_shape_becomes_an_example_and_keeps_its_other_columns():
    user, assistant = Message("user", "hi"), Message("assistant", "yo")
    cases = [
        ({"messages": [ASK, ANSWER]}, {"messages": (user, assistant)}),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
            {"messages": (user, assistant)},
        ),
        ({"prompt": "hi", "completion": "yo"}, {"prompt": "hi", "completion": "yo"}),
        ({"text": "hi"}, {"text": "hi"}),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            {
                "messages": (Message("user", "Add.\n\n1 2"), Message("assistant", "3")),
                "prompt": "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
                "completion": "3",
            },
        ),
        (
            {"instruction": "Add.", "input": "", "output": "3"},
            {
                "messages": (Message("user", "Add."), Message("assistant", "3")),
                "prompt": "### Instruction:\nAdd.\n\n### Response:\n",
                "completion": "3",
            },
        ),
    ]  # fmt: skip
    for row, fields in cases:
        assert to_examples(records({**row, "kind": 3})) == [Example("line 1", **fields, extra={"kind": 3})]


def test_answers_that_a_prompt_quotes_are_not_learned():
    [example] = to_examples(records({"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]}))
    assert [m.trained for m in example.messages if m.role == "assistant"] == [False, True]


def test_a_last_word_of_the_user_is_allowed_where_an_answer_came_before():
    assert len(to_examples(records({"messages": [ASK, ANSWER, ASK]}))[0].messages) == 3


def messages(*turns):
    return {"messages": list(turns)}


def said(content):
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"intruction": "a", "output": "b"}, "line 1: field 'instruction' is missing; rename 'intruction'"),
        ({"prompt": "a", "complettion": "b"}, "field 'completion' is missing; rename 'complettion'"),
        ({"instruction": "a", "response": "b"}, "field 'output' is missing; found instruction, response"),
        ({"x": 1}, "the columns x are not those of a known format"),
        ({"text": None}, "field 'text' is null; expected text"),
        ({"text": 3}, "field 'text' is a number; expected text"),
        ({"text": " "}, "field 'text' is empty; expected text"),
        ({"prompt": "a", "completion": ""}, "field 'completion' is empty"),
        ({"prompt": "", "completion": "a"}, "field 'prompt' is empty"),
        ({"prompt": [ASK], "completion": "a"}, "are a list and text; expected both text or both lists"),
        ({"prompt": [ASK], "completion": [ASK]}, "field 'completion' has no assistant turn (roles: user)"),
        ({"instruction": "a", "input": 3, "output": "b"}, "field 'input' is a number"),
        (messages(), "field 'messages' is an empty list"),
        ({"messages": "hi"}, "field 'messages' is text; expected a list of messages"),
        (messages("hi"), "field 'messages[0]' is text; expected an object"),
        (messages(ASK, said(None)), "field 'messages[1].content' is null; expected text"),
        (messages(ASK, said([1])), "field 'messages[1].content' is a list"),
        (messages(ASK, said("")), "field 'messages[1].content' is empty"),
        (messages({"rol": "user", "content": "a"}), "field 'messages[0].role' is missing; rename 'rol'"),
        (messages({**ASK, "role": "narrator"}), "'messages[0].role' is 'narrator'; expected one of system"),
        (messages(ASK, {"role": "tool", "content": "a"}), "has no assistant turn (roles: user, tool)"),
        (messages({**ASK, "reasoning_content": "hm"}, ANSWER), "is in a user turn; only an assistant thinks"),
        (messages(ASK, {**ANSWER, "weight": 0}), "field 'messages' marks every answer as not to be learned"),
        (messages(ASK), "has no assistant turn (roles: user); nothing could be learned"),
        (messages(ANSWER, ASK, ANSWER), "opens with an assistant turn"),
        ({**messages({**ASK, "role": "system"}, ASK, ANSWER), "system": "Be kind."}, "are both given; remove one"),
        ({"text": "a", "system": "Be kind."}, "field 'system' would be ignored; plain text has no system turn"),
        ({**messages(ASK, ANSWER), "tools": [1]}, "field 'tools' is not a list of objects"),
        ({**messages(ASK, ANSWER), "conversations": [ASK, ANSWER]}, "both given"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_with_line_field_and_what_was_found(row, expected):
    assert expected in error(row)
    assert "data.jsonl" in error(row)


def test_columns_that_fit_two_formats_are_refused_until_one_is_named():
    both = {"instruction": "a", "output": "b", "text": "c"}
    assert "data.format=alpaca or data.format=text" in error(both)
    assert to_examples(records(both), "text")[0].text == "c"
    assert to_examples(records(both), "alpaca")[0].completion == "b"
    # Tables fill what a row lacks with null, which makes nothing ambiguous.
    assert to_examples(records({"messages": None, "text": "c"}))[0].text == "c"


def test_mixed_formats_are_refused_and_the_odd_rows_named():
    said = error({"text": "a"}, {"text": "b"}, messages(ASK, ANSWER), {"txt": "c"})
    assert "line 3: field 'text' is missing" in said
    assert "(the row fits format 'messages', the file 'text')" in said
    assert "line 4: field 'text' is missing; rename 'txt'" in said


def test_an_unknown_format_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'alpaca'"):
        to_examples(records({"text": "a"}), "alpacca")
    assert DATA_FORMATS == ("auto", "messages", "prompt-completion", "alpaca", "text")


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(
                ["messages", "conversations", "prompt", "completion", "text", "instruction", "output", "x"]
            ),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.text("ab "),
                lambda inner: (
                    st.lists(inner, max_size=3)
                    | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), inner)
                    | st.just([ASK, ANSWER])
                ),
                max_leaves=6,
            ),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(DATA_FORMATS),
)
def test_rows_of_any_content_are_read_whole_or_refused(rows, format):
    try:
        assert len(to_examples(records(*rows), format)) == len(rows)
    except DataError as problem:
        assert str(problem)


# ---- held out --------------------------------------------------------------------------------------------

SOME = st.lists(st.text("ab", max_size=4), min_size=2, max_size=40).filter(lambda texts: len(set(texts)) > 1)


@given(SOME, st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_split_parts_the_examples_with_equals_on_one_side_and_none_empty(texts, fraction, seed):
    examples = [Example(f"line {n}", text=text) for n, text in enumerate(texts)]
    train, held = split_heldout(examples, fraction, seed)
    assert train
    assert held
    assert sorted(e.place for e in train + held) == sorted(e.place for e in examples)
    assert overlap(train, held) == 0
    assert (train, held) == split_heldout(examples, fraction, seed)


def test_more_examples_do_not_move_those_already_there():
    examples = [Example(f"line {n}", prompt=f"p{n}", completion="c") for n in range(400)]
    _, few = split_heldout(examples[:200], 0.2, 1)
    _, many = split_heldout(examples[::-1], 0.2, 1)
    assert [e for e in many[::-1] if e in examples[:200]] == few
    assert 50 < len(many) < 110  # 80 expected, standard deviation 8
    assert split_heldout(examples, 0.2, 2)[1] != many[::-1]


def test_overlap_counts_held_out_examples_whose_prompt_was_trained_on():
    ask = [Message("user", "a")]
    pair = Example("1", prompt="a", completion="b"), Example("2", prompt="a", completion="c")
    chats = [Example("3", messages=(*ask, Message("assistant", text))) for text in "xy"]
    assert overlap([pair[0], chats[0]], [pair[1], chats[1], Example("4", text="z")]) == 2


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_what_cannot_be_split_is_refused(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_heldout([Example("1", text="a"), Example("2", text="b")], fraction, 0)
    with pytest.raises(ValueError, match="2 examples with 1 distinct"):
        split_heldout([Example("1", text="a"), Example("2", text="a")], 0.5, 0)
