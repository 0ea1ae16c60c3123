"""Data as people have them: columns of their own names, several files, tools, thoughts, templates of many models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import trl
from hypothesis import given
from hypothesis import strategies as st

import tiny
from moslora.data.encoding import encode_all
from moslora.data.files import Records
from moslora.data.naming import parse_template, rename_columns
from moslora.data.shapes import answers_apart, to_examples
from moslora.data.sources import weighted
from moslora.data.tokenization import IGNORED, Encoder, decode
from moslora.display import Display
from moslora.errors import DataError, EncodingError, RecipeError, UsageError
from moslora.recipe.loading import load_recipe
from moslora.tasks import find_task

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SPECIAL = re.compile(r"<\|[^|<>]+\|>|<(?:start|end)_of_turn>")


def ask(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def records(*rows, source="data.jsonl"):
    return Records(list(rows), [f"line {n + 1}" for n in range(len(rows))], source, "")


def example(*turns, reasoning="keep", system_turn="keep", **columns):
    return to_examples(records({"messages": list(turns), **columns}), "auto", reasoning, system_turn)[0]


def tokenizer(template):
    """The byte-level tokenizer with a template and the control tokens that stand in it."""
    made = tiny.tokenizer()
    made.add_special_tokens({"additional_special_tokens": sorted(set(SPECIAL.findall(template)))})
    made.chat_template = template
    return made


def of_model(name):
    """The tokenizer of a family of models, by the template that TRL keeps of it."""
    file = TEMPLATES / f"{name}.jinja"
    if not file.is_file():
        pytest.skip(f"this TRL has no template {name}")
    return tokenizer(file.read_text(encoding="utf-8"))


def learned(shown, tok, train_on="completions"):
    encoded = Encoder(tok, "chat", train_on).encode(shown)
    return decode([token for token in encoded.labels if token != IGNORED], tok)


# ---- columns -----------------------------------------------------------------------------------------------


def named(row, **columns):
    return rename_columns(records(row), columns).rows[0]


def test_columns_are_read_under_names_of_ones_own_and_through_templates():
    row = {
        "question": "why?",
        "context": "it rains",
        "answers": {"text": ["so", "thus"]},
        "score": 3,
        "id": 7,
    }
    found = named(row, prompt="{question}\n\n{context} ({score})", completion="answers.text.1")
    assert found["prompt"] == "why?\n\nit rains (3)" and found["completion"] == "thus"
    assert "question" not in found and "answers" not in found, (
        "what was read is no column of its own any more"
    )
    assert found["id"] == 7, "what nobody named stays, to be judged like any other key"


def test_a_column_that_holds_a_conversation_stays_a_conversation():
    turns = [ask("a"), answer("b")]
    [made] = to_examples(rename_columns(records({"dialog": turns}), {"messages": "dialog"}))
    assert [turn.content for turn in made.messages] == ["a", "b"]


@given(st.text("ab{} ", max_size=12))
def test_braces_that_are_written_twice_stand_for_themselves(text):
    escaped = text.replace("{", "{{").replace("}", "}}")
    if "{" in text or "}" in text:
        assert "".join(part for part, is_column in parse_template(escaped) if not is_column) == text
        assert not any(is_column for _, is_column in parse_template(escaped))


@pytest.mark.parametrize("template", ["{a", "a}", "{}", "{ }", "{{a}", "{a}}"])
def test_a_brace_that_stands_alone_is_refused(template):
    with pytest.raises(ValueError, match="brace"):
        parse_template(template)


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        (
            {"qestion": "a", "answer": "b"},
            {"prompt": "question", "completion": "answer"},
            "did you mean 'qestion'",
        ),
        (
            {"q": "a", "answer": "b"},
            {"prompt": "{q} {ctx}", "completion": "answer"},
            "'ctx' is missing; found q, answer",
        ),
        ({"q": None, "answer": "b"}, {"prompt": "{q}", "completion": "answer"}, "field 'q' is null"),
        ({"q": ["a"], "answer": "b"}, {"prompt": "{q}", "completion": "answer"}, "field 'q' is a list"),
        (
            {"q": {"t": []}, "answer": "b"},
            {"prompt": "q.t.0", "completion": "answer"},
            "the list has 0 items",
        ),
        (
            {"q": "a", "prompt": "old", "answer": "b"},
            {"prompt": "q", "completion": "answer"},
            r"data.ignore=\[prompt\]",
        ),
    ],
)
def test_a_column_that_is_not_there_is_named_with_its_line_and_the_nearest(row, columns, said):
    with pytest.raises(DataError, match=said) as caught:
        rename_columns(records(row, row), columns)
    assert "line 1" in str(caught.value) and "line 2" in str(caught.value), "all rows are told at once"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("data.columns={promt: q}", "'promt' is none. Did you mean 'prompt'"),
        ("data.columns={prompt: '{q'}", "braces come in pairs"),
        ("data.columns=[a]", "data.columns is"),
        ("data.train=[]", "a list with a file in it"),
        ("data.train=[{path: a.jsonl, wieght: 2}]", "Did you mean 'weight'"),
        ("data.train=[{path: a.jsonl, weight: 0}]", "item 1 has weight"),
        ("data.train={a: b}", "a file or hub id, or a list of them"),
        ("data.reasoning=strip", "'keep', 'inline' or 'drop'"),
        ("data.weights=[1,2]", "data.train: a list of"),
    ],
)
def test_settings_of_the_data_are_checked_before_anything_is_read(setting, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        load_recipe(["model=m/m", "data=d/d", setting])


# ---- a system column, ShareGPT, thoughts ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ask("a"), answer("b")]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": "a", "completion": "b"},
        {"prompt": [ask("a")], "completion": [answer("b")]},
        {"instruction": "a", "output": "b"},
    ],
)
def test_a_system_column_is_the_first_turn_in_every_shape(row):
    [made] = to_examples(records({**row, "system": "Be brief."}))
    [written] = to_examples(
        records({"messages": [{"role": "system", "content": "Be brief."}, ask("a"), answer("b")]})
    )
    assert learned(made, tiny.tokenizer()) == learned(written, tiny.tokenizer())
    encoder = Encoder(tiny.tokenizer())
    assert encoder.encode(made).input_ids == encoder.encode(written).input_ids
    if made.prompt is not None:
        assert made.prompt.startswith("Be brief.\n\n"), "in plain layout too"


def test_a_system_turn_goes_into_the_question_where_a_template_has_no_branch_for_it():
    tok, turns = of_model("gemma"), ({"role": "system", "content": "Be brief."}, ask("a"), answer("b"))
    with pytest.raises(EncodingError, match=r"data\.system_turn=user"):
        Encoder(tok).encode(example(*turns))
    merged = example(*turns, system_turn="user")
    assert [turn.content for turn in merged.messages] == ["Be brief.\n\na", "b"]
    assert "Be brief." in decode(Encoder(tok).encode(merged).input_ids, tok)
    assert len(example(*turns, system_turn="drop").messages) == 2


THOUGHT = ask("two and two?"), answer("It is 4.", reasoning_content="Adding gives four.")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "thoughts"])
def test_thoughts_are_learned_as_the_template_writes_them_or_left_out_by_choice(key):
    turns = (THOUGHT[0], answer("It is 4.", **{key: "Adding gives four."}))
    tok = of_model("qwen3")
    assert learned(example(*turns), tok) == "<think>\nAdding gives four.\n</think>\n\nIt is 4.<|im_end|>"
    assert "Adding" not in learned(example(*turns, reasoning="drop"), tok)
    inline = example(*turns, reasoning="inline")
    assert learned(inline, tiny.tokenizer()) == "<think>\nAdding gives four.\n</think>\n\nIt is 4.<|im_end|>"
    written = example(THOUGHT[0], answer("<think>Adding.</think>\n\nIt is 4."), reasoning="drop")
    assert written.messages[1].content == "It is 4."


def test_thoughts_that_no_key_brings_to_a_template_are_refused_with_the_choices():
    with pytest.raises(EncodingError, match=r"line 1: turn 1 has thoughts.*reasoning=inline.*reasoning=drop"):
        Encoder(tiny.tokenizer()).encode(example(*THOUGHT))


def test_each_answer_is_learned_as_it_would_be_generated_where_a_template_rewrites_earlier_ones():
    tok = of_model("qwen3")
    turns = (*THOUGHT, ask("and three?"), answer("It is 7.", reasoning_content="Adding three."))
    with pytest.raises(EncodingError, match=r"turn 1 .*data\.train_on=each"):
        Encoder(tok).encode(example(*turns))
    parts = answers_apart(example(*turns))
    assert [part.place for part in parts] == ["line 1, turn 1", "line 1, turn 3"]
    said = [learned(part, tok, "each") for part in parts]
    assert said == [
        "<think>\nAdding gives four.\n</think>\n\nIt is 4.<|im_end|>",
        "<think>\nAdding three.\n</think>\n\nIt is 7.<|im_end|>",
    ]
    assert learned(example(*turns), tok, "last") == said[1]
    for part in parts:  # what is learned follows what generation starts from
        encoded = Encoder(tok, "chat", "each").encode(part)
        assert encoded.input_ids[: len(encoded.prompt_ids)] == encoded.prompt_ids
    _, summary = encode_all(parts, Encoder(tok, "chat", "each"))
    assert "in 1 of 2 examples the chat template leaves out" in "".join(summary.warnings())
    assert "first: line 1, turn 3" in "".join(summary.warnings())


def test_an_answer_that_is_not_learned_is_not_learned_apart_either():
    turns = (ask("a"), answer("BAD", train=False), ask("b"), answer("c"), ask("d"), answer("e", weight=1))
    tok = tiny.tokenizer()
    assert [learned(part, tok, "each") for part in answers_apart(example(*turns))] == [
        "c<|im_end|>",
        "e<|im_end|>",
    ]
    assert learned(example(*turns), tok) == "c<|im_end|>e<|im_end|>"


# ---- tools ---------------------------------------------------------------------------------------------------

ARGUMENTS = {"city": 'Zürich "Oerlikon"', "days": 3}
PROPERTIES = {"city": {"type": "string", "description": "the city"}, "days": {"type": "integer"}}
FUNCTION = {
    "name": "get_weather",
    "description": "Weather.",
    "parameters": {"type": "object", "properties": PROPERTIES},
}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
RESULT = {
    "role": "tool",
    "tool_call_id": "abcdefghi",
    "name": "get_weather",
    "content": '{"sky": "sunny, 21"}',
}


WITHOUT_RESULTS = "{% for m in messages if m.role != 'tool' %}"


def with_tools(call=CALL, **more):
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    return example(ask("weather in Zürich?"), calling, RESULT, answer("It is sunny."), tools=TOOLS, **more)


AS_JSON = '{"city": "Zürich \\"Oerlikon\\"", "days": 3}'
WRITTEN = {
    "qwen2_5": f'<tool_call>\n{{"name": "get_weather", "arguments": {AS_JSON}}}\n</tool_call><|im_end|>'
    "It is sunny.<|im_end|>",
    "llama3_2": f'{{"name": "get_weather", "parameters": {AS_JSON}}}<|eot_id|>It is sunny.<|eot_id|>',
    "gptoss": f" to=functions.get_weather<|channel|>commentary json<|message|>{AS_JSON}<|call|>"
    "<|channel|>final<|message|>It is sunny.<|return|>",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_calls_of_tools_are_learned_as_each_template_writes_them(name):
    assert learned(with_tools(), of_model(name)) == WRITTEN[name]


@pytest.mark.parametrize(
    "call",
    [
        {**CALL, "function": {**CALL["function"], "arguments": json.dumps(ARGUMENTS)}},
        {"name": "get_weather", "arguments": ARGUMENTS},
        {"function": {"name": "get_weather", "arguments": {**ARGUMENTS, "unit": None}}},
    ],
    ids=["arguments as JSON", "without function", "with a table's gap"],
)
def test_calls_mean_the_same_in_every_form(call):
    tok = of_model("qwen2_5")
    assert learned(with_tools(call), tok) == learned(with_tools(), tok)


def test_the_call_that_is_to_be_generated_is_the_reference_as_generation_gives_it():
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    encoded = Encoder(of_model("qwen2_5")).encode(example(ask("weather?"), calling, tools=TOOLS))
    assert encoded.answer.startswith("<tool_call>") and encoded.answer.endswith("</tool_call>")
    assert (
        json.loads(encoded.answer.removeprefix("<tool_call>").removesuffix("</tool_call>"))["arguments"]
        == ARGUMENTS
    )


def test_sharegpt_calls_functions_too():
    turns = [
        {"from": "human", "value": "weather?"},
        {"from": "function_call", "value": json.dumps({"name": "get_weather", "arguments": ARGUMENTS})},
        {"from": "observation", "value": '{"sky": "sunny, 21"}'},
        {"from": "gpt", "value": "It is sunny."},
    ]
    [made] = to_examples(records({"conversations": turns, "tools": json.dumps(TOOLS)}))
    tok = of_model("qwen2_5")
    assert learned(made, tok) == WRITTEN["qwen2_5"]


def test_calls_and_results_that_a_template_leaves_out_are_refused_by_row():
    plain = tiny.tokenizer()  # writes content, and nothing else
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    with pytest.raises(
        EncodingError, match=r"line 1: .*turn 1 \(assistant\): 'get_weather' of its tool calls"
    ):
        Encoder(plain).encode(example(ask("weather?"), calling, RESULT, answer("It is sunny.")))
    blind = tokenizer(plain.chat_template.replace("{% for m in messages %}", WITHOUT_RESULTS))
    with pytest.raises(EncodingError, match=r"turn 2 \(tool\).*Write this result into the next question"):
        Encoder(blind).encode(
            example(ask("weather?"), answer("Let me look."), RESULT, answer("It is sunny."))
        )


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"tool_calls": [{"function": {"nme": "f"}}]}, "function.nme' would be ignored"),
        (
            {"tool_calls": [{"function": {"arguments": {"a": 1}}}]},
            "function.name' is missing; found arguments",
        ),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "arguments' is not JSON"),
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": [1]}}]},
            "arguments' is a list; expected an object",
        ),
        ({"tool_calls": [{"name": "f", "strict": True}]}, "strict' would be ignored"),
        ({"tool_calls": [{"name": "f"}], "function_call": {"name": "f"}}, "are both given"),
        ({"tool_calls": [7]}, "is a number; expected an object with name and arguments"),
        ({"content": [{"type": "image", "image": "a.png"}]}, "needs task=vision"),
        ({"reasoning": "a", "thinking": "b"}, "reasoning, thinking, which differ"),
    ],
)
def test_a_turn_that_cannot_be_read_is_named_by_line_and_field(turn, said):
    with pytest.raises(DataError, match=said) as caught:
        example(ask("a"), {"role": "assistant", "content": "b", **turn})
    assert "line 1" in str(caught.value)


def test_parts_of_text_are_one_text():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert example(ask(parts), answer("b")).messages[0].content == "one two"


ROWS = {
    "one": (ask("hello there"), answer("good day")),
    "two": (ask("hello there"), answer("good day"), ask("and now"), answer("good night")),
    "thoughts": THOUGHT,
}


@pytest.mark.parametrize("name", sorted(file.stem for file in TEMPLATES.glob("*.jinja")) or ["none"])
def test_with_every_template_the_answer_is_learned_whole_or_the_row_refused(name):
    """No template makes an encoder learn a question, or less than the answer."""
    tok = of_model(name)
    for turns in ROWS.values():
        for part in answers_apart(example(*turns)):
            try:
                said = learned(part, tok, "each")
            except EncodingError:
                continue
            last = part.messages[-1]
            assert last.content in said and last.reasoning in said
            assert not any(turn.content in said for turn in part.messages[:-1])


# ---- several files -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    tiny.save_chat_model(folder / "model")
    for name, count in (("a", 20), ("b", 12)):
        rows = [{"q": f"{name} asks {n}", "a": f"{name} says {n}"} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def task_of(place, train, *settings):
    columns = "data.columns={prompt: q, completion: a}"
    recipe = load_recipe(
        [f"model={place / 'model'}", f"data.train={train}", columns, "evaluation.also=[]", *settings]
    )
    task = find_task("text")(recipe, Display(quiet=True), lambda: None)
    task.read()
    return task


def test_several_files_are_one_set_and_weights_say_how_often_each_row_is_in_an_epoch(place):
    plain = task_of(place, f"[{place / 'a.jsonl'}, {place / 'b.jsonl'}]")
    assert {e.place.partition(",")[0] for e in plain.train_examples} == {"a.jsonl", "b.jsonl"}
    weights = f"[{{path: {place / 'a.jsonl'}, weight: 0.5}}, {{path: {place / 'b.jsonl'}, weight: 2}}]"
    mixed, again = (task_of(place, weights) for _ in range(2))
    of = {name: [e for e in plain.train_examples if e.place.startswith(name)] for name in "ab"}
    found = {name: [e.place for e in mixed.train_examples if e.place.startswith(name)] for name in "ab"}
    assert len(found["a"]) == round(len(of["a"]) / 2) and len(found["b"]) == 2 * len(of["b"])
    assert [e.place for e in mixed.heldout_examples] == [e.place for e in plain.heldout_examples]
    assert [e.place for e in mixed.train_examples] == [e.place for e in again.train_examples]
    assert mixed.data_hashes.keys() == {"train, a.jsonl", "train, b.jsonl"}
    other = task_of(place, weights, "seed=1")
    assert sorted(e.place for e in other.train_examples) != sorted(e.place for e in mixed.train_examples)


def test_faults_of_several_files_are_told_at_once(place):
    with pytest.raises(UsageError, match=r"(?s)a\.jsonl.*'x' is missing.*b\.jsonl.*'x' is missing"):
        task_of(
            place, f"[{place / 'a.jsonl'}, {place / 'b.jsonl'}]", "data.columns={prompt: x, completion: a}"
        )


def test_each_file_may_have_settings_of_its_own_and_a_recipe_comes_back_from_its_yaml(place):
    (place / "c.jsonl").write_text(json.dumps({"messages": [ask("c"), answer("d")], "score": 1}) + "\n")
    own = f"{{path: {place / 'c.jsonl'}, columns: {{}}, ignore: [score], weight: 3}}"
    task = task_of(place, f"[{place / 'a.jsonl'}, {own}]", f"data.heldout={place / 'b.jsonl'}")
    assert sum(e.place.startswith("c.jsonl") for e in task.train_examples) == 3
    written = place / "recipe.yaml"
    written.write_text(task.recipe.to_yaml())
    assert load_recipe([str(written)]) == task.recipe


@given(st.integers(1, 30), st.floats(0.05, 3))
def test_a_share_grows_with_its_weight_and_never_loses_what_it_had(count, weight):
    examples = to_examples(records(*({"text": f"row {n}"} for n in range(count))))
    some, more = (weighted(examples, w, 0) for w in (weight, weight + 0.5))
    assert len(some) == int(weight) * count + round((weight - int(weight)) * count)
    places = [e.place for e in more]
    assert all(places.count(e.place) >= [s.place for s in some].count(e.place) for e in some)
