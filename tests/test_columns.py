"""Keys of rows and messages: each is used, known to be harmless, or refused with the way to drop it."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from moslora.data.columns import FLAGS, HARMLESS, without_keys
from moslora.data.shapes import to_examples
from moslora.data.splitting import prompt_of, split_heldout
from moslora.data.tokenization import IGNORED, Encoder
from moslora.errors import DataError, EncodingError, PictureError, RecipeError
from moslora.recipe.loading import load_recipe
from moslora.tasks.image.folders import read_folder
from moslora.tasks.vision.reading import split_off_images
from test_records import ANSWER, ASK, error, records
from test_tokenization import CHATML, decode, tokenizer

TOK = tokenizer(CHATML, eos="<|im_end|>")
GOOD = {"role": "assistant", "content": "good"}


def flagged(**flags):
    return {"messages": [ASK, {"role": "assistant", "content": "BAD", **flags}, ASK, GOOD]}


def learned(row, encoder=None):
    """The text of what is learned of a row."""
    encoded = (encoder or Encoder(TOK)).encode(to_examples(records(row))[0])
    return decode([token for token in encoded.labels if token != IGNORED], TOK)


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"messages": [ASK, ANSWER], "thinking": "hm"}, "thinking"),
        ({"messages": [ASK, ANSWER], "tool_calls": [{"name": "f"}]}, "tool_calls"),
        ({"messages": [{**ASK, "name": "Ada"}, ANSWER]}, "messages.name"),
        ({"messages": [ASK, {**ANSWER, "mask": 1}]}, "messages.mask"),
        ({"messages": [ASK, {**ANSWER, "never_heard_of": 0}]}, "messages.never_heard_of"),
        ({"conversations": [{**ASK, "x": False}, ANSWER]}, "conversations.x"),
        ({"prompt": [{**ASK, "x": 1}], "completion": [ANSWER]}, "prompt.x"),
        ({"prompt": [ASK], "completion": [{**ANSWER, "x": 1}]}, "completion.x"),
        ({"prompt": "a", "completion": "b", "weight": 0}, "weight"),
        ({"prompt": "a", "completion": "b", "label": False}, "label"),
        ({"messages": [ASK, ANSWER], "documents": [{"text": "a"}]}, "documents"),
        ({"messages": [ASK, ANSWER], "enable_thinking": False}, "enable_thinking"),
        ({"messages": [ASK, ANSWER], "prompt": "a copy"}, "prompt"),
        ({"instruction": "a", "output": "b", "context": "c"}, "context"),
        ({"text": "a", "loss_mask": [0, 1]}, "loss_mask"),
        ({"text": "a", "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
    ],
)
def test_a_key_that_nobody_reads_is_refused_until_it_is_dropped_by_name(row, key):
    message = error({**row, "id": 7}, row)
    assert "would be ignored (and in 1 more row)" in message
    assert message.endswith(f"data.ignore=[{key}].")
    rest, present = without_keys(records(row), [key, "not.there"])
    assert present == {key}
    assert len(to_examples(rest)) == 1
    assert key not in str(rest.rows)


def test_each_unread_key_is_one_fault_however_many_rows_have_it():
    message = error(*[{"text": "a", "x": 1, "y": 2}] * 30)
    assert "2 faults" in message
    assert "(and in 29 more rows)" in message
    assert "data.ignore=[x, y]" in message


def test_nulls_and_empty_values_with_which_tables_fill_gaps_are_no_keys():
    empty = {"weight": None, "tool_calls": [], "name": "", "function_call": {"name": None, "arguments": None}}
    row = {
        "messages": [{**ASK, **empty}, {**ANSWER, **empty}],
        "tools": None,
        "images": [],
        "x": [{"a": None}],
    }
    [example] = to_examples(records(row))
    assert example.messages == to_examples(records({"messages": [ASK, ANSWER]}))[0].messages
    assert example.template_arguments == {}


def test_harmless_keys_stay_in_rows_and_messages_and_each_has_its_reason():
    assert all(HARMLESS.values())
    row = dict.fromkeys(HARMLESS, 1)
    message = dict.fromkeys(HARMLESS, 1)
    [example] = to_examples(records({"messages": [{**ASK, **message}, {**ANSWER, **message}], **row}))
    assert example.extra == row
    assert not {"weight", "score", "label", "reward", "name", "system", "tools"} & HARMLESS.keys()


def test_a_named_format_says_that_the_columns_of_the_others_are_not_meant():
    row = {"messages": [ASK, ANSWER], "prompt": "a copy", "x": 1}
    with pytest.raises(DataError, match=r"data\.ignore=\[x\]"):
        to_examples(records(row), "messages")
    del row["x"]
    assert len(to_examples(records(row), "messages")) == 1


def test_a_column_may_have_dots_in_its_own_name():
    rest, present = without_keys(records({"text": "a", "meta.score": 1}), ["meta.score"])
    assert (rest.rows, present) == ([{"text": "a"}], {"meta.score"})


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image", "crop": [1]}, r"\[0\]\.crop' would be ignored.*\[messages\.content\.crop\]"),
        ({"type": "image", "index": 3}, r"content\[0\]\.index' would be ignored"),
        ({"type": "text", "text": "a", "cache": {"x": 1}}, r"data\.ignore=\[messages\.content\.cache\]"),
        ({"type": "text", "text": None}, r"content\[0\]\.text' is not text"),
    ],
)  # fmt: skip
def test_keys_of_a_turn_s_parts_are_refused_but_those_that_say_nothing_new(part, said):
    fine = {"type": "image", "index": 0, "text": None}
    row = {"images": ["a.png"], "messages": [{"role": "user", "content": [fine]}, ANSWER]}
    assert split_off_images(row)[0]["messages"][0]["content"] == "<image>"
    with pytest.raises(PictureError, match=said):
        split_off_images({**row, "messages": [{"role": "user", "content": [part, fine]}, ANSWER]})


def test_pictures_of_prompt_and_completion_have_their_placeholders():
    text_row, names = split_off_images({"images": ["a.png"], "prompt": "what?", "completion": "a cat"})
    assert (text_row["prompt"], names) == ("<image>\nwhat?", ["a.png"])
    with pytest.raises(PictureError, match="1 pictures, but <image> occurs 2 times"):
        split_off_images({"images": ["a.png"], "prompt": [{"role": "user", "content": "<image><image>"}]})


def test_keys_of_a_picture_s_caption_are_refused_until_they_are_dropped(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    line = {"file_name": "a.png", "text": "a cat", "caption": "a dog", "weight": 0, "source": "me"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match=r"(?s)'caption' would be ignored.*data\.ignore=\[caption, weight\]"):
        read_folder(tmp_path, None, 10_000, False)
    dropped = read_folder(tmp_path, None, 10_000, False, ignore=["caption", "weight"])
    assert [picture.prompt for picture in dropped.pictures] == ["a cat"]


def test_a_run_drops_what_its_recipe_ignores_and_says_which_entry_does_nothing(tmp_path, monkeypatch):
    from moslora.display import Display
    from moslora.tasks.text.task import TextTask

    rows = [
        {"messages": [ASK, {**ANSWER, "content": str(n), "name": "x"}], "score": n, "source": "me"}
        for n in range(20)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = io.StringIO()

    def read(*ignore):
        recipe = load_recipe(
            ["model=m", f"data={tmp_path / 'data.jsonl'}", f"data.ignore=[{', '.join(ignore)}]"]
        )
        task = TextTask(recipe, Display(said), lambda: None)
        monkeypatch.setattr(task.base_model, "find", lambda _: None)
        task.read()
        return task

    with pytest.raises(DataError, match=r"data\.ignore=\[messages\.name, score\]"):
        read()
    assert len(read("messages.name", "score").train_examples) > 10
    assert "no row has" not in said.getvalue()
    read("messages.name", "score", "sourse")
    assert "'sourse', which no row has. Did you mean 'source'?" in " ".join(said.getvalue().split())


def test_other_data_on_the_command_line_forget_what_the_old_ones_ignored(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: m\ndata: {train: a.jsonl, ignore: [score]}\n")
    assert load_recipe([str(tmp_path / "recipe.yaml")]).data.ignore == ["score"]
    assert load_recipe([str(tmp_path / "recipe.yaml"), "data=b.jsonl"]).data.ignore is None
    with pytest.raises(RecipeError, match=r"data\.drop_columns is unknown; set data\.ignore"):
        load_recipe(["model=m", "data=b.jsonl", "data.drop_columns=[x]"])
    with pytest.raises(RecipeError, match=r"data\.ignor is unknown\. Did you mean 'ignore'"):
        load_recipe(["model=m", "data=b.jsonl", "data.ignor=[x]"])


# ---- flags -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", FLAGS)
@pytest.mark.parametrize("number", [bool, int, float])
def test_an_answer_that_a_flag_excludes_is_read_and_not_learned(key, number):
    learns = FLAGS[key]
    assert learned(flagged(**{key: number(not learns)})) == "good<|im_end|>"
    assert learned(flagged(**{key: number(learns)})) == "BAD<|im_end|>good<|im_end|>"
    # A question may say that it is not learned, for it is not.
    assert learned({"messages": [{**ASK, key: number(not learns)}, GOOD]}) == "good<|im_end|>"


def test_generation_and_the_split_go_by_the_last_answer_that_is_learned():
    row = {"messages": [ASK, GOOD, ASK, {"role": "assistant", "content": "BAD", "weight": 0}]}
    encoded = Encoder(TOK).encode(to_examples(records(row))[0])
    assert encoded.answer == "good"
    assert "BAD" not in decode(encoded.input_ids, TOK)
    assert prompt_of(to_examples(records(row))[0]) == prompt_of(
        to_examples(records({"messages": [ASK, GOOD]}))[0]
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (flagged(weight=0.5), "'messages[1].weight' is 0.5; expected 0, 1, true or false"),
        (flagged(weight=2), "expected 0, 1, true or false"),
        (flagged(weight=10**5000), "expected 0, 1, true or false"),
        (flagged(train="no"), "'messages[1].train' is text; expected 0, 1"),
        (flagged(loss_mask=[0, 1]), "'messages[1].loss_mask' is a list; expected 0, 1"),
        (flagged(weight=1, train=False), "'messages[1]' has weight, train, which contradict each other"),
        ({"messages": [{**ASK, "weight": 1}, GOOD]}, "asks to learn it, but user turns are not learned"),
        (
            {"prompt": [ASK, {**GOOD, "train": True}, ASK], "completion": [GOOD]},
            "but the answers that a prompt quotes are not learned",
        ),
        ({"messages": [ASK, {**GOOD, "weight": 0}]}, "marks every answer as not to be learned; remove the row"),
        ({"messages": [{**ASK, "from": "gpt"}, GOOD]}, "fields 'messages[0].role' and 'from' differ"),
        ({"messages": [{**ASK, "value": "other"}, GOOD]}, "fields 'messages[0].content' and 'value' differ"),
    ],
)  # fmt: skip
def test_a_flag_that_cannot_be_obeyed_is_refused(row, said):
    assert said in error(row)


def test_flags_and_learning_every_token_contradict_each_other():
    with pytest.raises(
        EncodingError, match=r"by messages\.weight that it is not learned.*data\.ignore=\[messages\.weight\]"
    ):
        learned(flagged(weight=0), Encoder(TOK, train_on="all"))
    rest, _ = without_keys(records(flagged(weight=0)), ["messages.weight"])
    assert Encoder(TOK, train_on="all").encode(to_examples(rest)[0])


# ---- variables of the template ---------------------------------------------------------------------------

READING = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% if mood is defined %}[{{ mood }}]{% endif %}" + CHATML
)
TOOLS = [{"type": "function", "function": {"name": "lamp_on", "parameters": {}}}]


def test_a_row_s_template_arguments_and_tools_give_the_tokens_that_trl_learns():
    tok = tokenizer(READING, eos="<|im_end|>")
    row = {
        "messages": [ASK, GOOD],
        "tools": json.dumps(TOOLS),
        "chat_template_kwargs": {"mood": "kind", "x": None},
    }
    [example] = to_examples(records(row))
    encoded = Encoder(tok).encode(example)
    theirs = tok.apply_chat_template(row["messages"], tools=TOOLS, mood="kind", return_dict=True)["input_ids"]
    assert encoded.input_ids == theirs
    assert encoded.prompt_ids == theirs[: len(encoded.prompt_ids)]
    assert "[kind]" in decode(encoded.prompt_ids, tok)
    assert [token for token in encoded.labels if token != IGNORED] == tok.encode("good<|im_end|>")
    as_objects = to_examples(records({**row, "tools": [{**TOOLS[0], "strict": None}]}))[0]
    assert as_objects.template_arguments == example.template_arguments
    # Another variable is another prompt, and rows without any stay on their side of the split.
    assert prompt_of(example) != prompt_of(to_examples(records({"messages": [ASK, GOOD]}))[0])


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (
            {"chat_template_kwargs": {"mod": 1}},
            r"'chat_template_kwargs\.mod' is not read by the chat template.*'mood'",
        ),
        (
            {"chat_template_kwargs": {"add_generation_prompt": True}},
            "cannot be set, because encoding sets it",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "cannot be set, because encoding sets it"),
        ({"chat_template_kwargs": {"tokenize": False}}, "cannot be set, because encoding sets it"),
    ],
)
def test_template_arguments_that_would_do_nothing_are_refused(extra, said):
    [example] = to_examples(records({"messages": [ASK, GOOD], **extra}))
    with pytest.raises(EncodingError, match=said):
        Encoder(tokenizer(READING)).encode(example)


def test_tools_that_a_template_leaves_out_are_refused():
    [example] = to_examples(records({"messages": [ASK, GOOD], "tools": TOOLS}))
    with pytest.raises(
        EncodingError, match=r"'tools' is not read by the chat template.*data\.ignore=\[tools\]"
    ):
        Encoder(TOK).encode(example)
    first_only = READING.replace("tools | tojson", "tools[0] | tojson")
    [two] = to_examples(
        records({"messages": [ASK, GOOD], "tools": [*TOOLS, {"function": {"name": "lamp_off"}}]})
    )
    with pytest.raises(EncodingError, match="leaves out the tool 'lamp_off'"):
        Encoder(tokenizer(first_only)).encode(two)


def test_template_arguments_without_a_template_are_refused():
    row = {"prompt": "a", "completion": "b", "chat_template_kwargs": {"mood": 1}}
    with pytest.raises(EncodingError, match=r"sets mood for a chat template, and none is used here"):
        Encoder(TOK, template="plain").encode(to_examples(records(row))[0])


def test_the_split_of_data_without_variables_is_that_of_earlier_versions():
    examples = to_examples(
        records(*({"messages": [ASK, {**ANSWER, "content": f"yo {n}"}]} for n in range(40)))
    )
    _, held_out = split_heldout(examples, 0.1, 0)
    assert [example.place for example in held_out] == ["line 2", "line 27"]  # as 0.1.0 split them
