"""What a chat template leaves out of what was said: refused or warned of, with the row."""

from __future__ import annotations

import pytest

from moslora.data.encoding import encode_all
from moslora.data.rendering import missing_turns, spells
from moslora.data.shapes import Example, Message
from moslora.data.tokenization import IGNORED, Encoder
from moslora.errors import EncodingError
from test_tokenization import ASK, CHATML, EACH, OPEN, TURN, chat, decode, tokenizer

USER = "<|im_start|>user\n{{ m['content'] }}<|im_end|>\n"
ANSWERS = (
    "{% elif m['role'] == 'assistant' %}<|im_start|>assistant\n{{ said }}<|im_end|>\n{% endif %}{% endfor %}"
)


def answering(expression):
    """A template that writes answers in its own way, and system turns not at all."""
    return f"{EACH}{{% if m['role'] == 'user' %}}{USER}{ANSWERS}{ASK}".replace(
        "{{ said }}", f"{{{{ {expression} }}}}"
    )


AFTER_THOUGHTS = answering("m['content'].split('</think>')[-1]")
# As Qwen3's: thoughts of the last answer alone.
EARLIER_CUT = answering("m['content'] if loop.last else m['content'].split('</think>')[-1]")
THOUGHT = "<think>add one</think>It is 2."


def quoted(*texts):
    messages = chat(*texts).messages
    return Example(
        "line 1", messages=(*(Message(m.role, m.content, False) for m in messages[:-1]), messages[-1])
    )


@pytest.mark.parametrize("train_on", ["completions", "all"])
@pytest.mark.parametrize(
    "expression",
    [
        "m['content'].split('</think>')[-1]",
        "m['content'] | upper",
        "m['content'] | replace('add', 'subtract')",
        "m['content'] | tojson",
        "m['content'] | truncate(9, True)",
        "'fine'",
    ],
)
def test_an_answer_that_a_template_changes_is_refused_with_a_way_out(expression, train_on):
    with pytest.raises(EncodingError, match=r"line 1: .*turn 1 \(assistant\): .*model\.tokenizer"):
        Encoder(tokenizer(answering(expression)), train_on=train_on).encode(
            chat("hi", 'say "<think>add</think>" now')
        )


def test_the_refusal_s_way_out_works():
    tok = tokenizer(AFTER_THOUGHTS)
    with pytest.raises(EncodingError, match=r"'<think>add one</think>It is 2\.' is not in what it writes"):
        Encoder(tok).encode(chat("1 + 1?", THOUGHT))
    assert Encoder(tok).encode(chat("1 + 1?", "It is 2."))
    assert Encoder(tokenizer(CHATML)).encode(chat("1 + 1?", THOUGHT))


@pytest.mark.parametrize("text", ["be kind", "a", "hi"])
def test_a_system_turn_without_a_branch_is_refused_however_short_it_is(text):
    system = Example("line 1", messages=(Message("system", text), *chat("hi a", "yo").messages))
    with pytest.raises(EncodingError, match=r"turn 0 \(system\).*next question"):
        Encoder(tokenizer(answering("m['content']"))).encode(system)
    assert Encoder(tokenizer(CHATML)).encode(system)


def test_a_question_that_loses_text_is_refused():
    template = CHATML.replace(TURN, TURN.replace("m['content']", "m['content'].split('#')[0]"))
    with pytest.raises(EncodingError, match=r"turn 0 \(user\): '# two'"):
        Encoder(tokenizer(template)).encode(chat("one\n# two", "yo"))


def test_earlier_answers_that_are_learned_may_not_lose_text_and_those_that_are_not_are_counted():
    tok = tokenizer(EARLIER_CUT)
    turns = ("1 + 1?", THOUGHT, "2 + 1?", "<think>one more</think>It is 3.")
    with pytest.raises(EncodingError, match=r"turn 1 \(assistant\).*train_on=each.*train_on=all"):
        Encoder(tok).encode(chat(*turns))
    for example, train_on in ((quoted(*turns), "completions"), (chat(*turns), "all")):
        _, summary = encode_all([example, chat("hi", THOUGHT)], Encoder(tok, train_on=train_on))
        assert summary.loses_context == 1
        assert any(
            "1 of 2 examples the chat template leaves out text of an earlier answer" in warning
            and "first: line 1" in warning
            for warning in summary.warnings()
        )


def test_white_space_that_a_template_changes_is_no_loss():
    for expression in ("m['content'] | trim", "m['content'] | replace('>', '>\\n') | replace('<', '\\n<')"):
        encoded = Encoder(tokenizer(answering(expression))).encode(chat(" hi\n", f"  {THOUGHT}\n"))
        assert not encoded.loses_context and not encoded.misspelt


def test_turns_are_looked_for_in_their_order_and_a_system_turn_anywhere():
    ask, answer = chat("one", "two").messages
    assert missing_turns((ask, answer), "one two") == set()
    assert missing_turns((ask, answer), "two one") == {1}
    assert missing_turns((Message("system", "be kind"), ask, answer), "one be  kind two") == set()
    assert missing_turns((Message("user", "<image>what?"), answer), "<|picture|> what? two") == set()


# ---- tokens ----------------------------------------------------------------------------------------------


def test_marks_that_leave_out_a_part_of_the_answer_are_refused():
    two = "{% generation %}{{ m['content'][:2] }}{% endgeneration %}{{ m['content'][2:] }}"
    tok = tokenizer(
        f"{EACH}{OPEN}{{% if m['role'] == 'assistant' %}}{two}{{% else %}}{{{{ m['content'] }}}}{{% endif %}}"
        f"<|im_end|>\n{{% endfor %}}{ASK}"
    )
    assert Encoder(tok).encode(chat("hi", "yo"))
    with pytest.raises(EncodingError, match="marks leave out a part"):
        Encoder(tok).encode(chat("hi", "yonder"))


MARKED_BY = "{% generation %}{{ m['content'].split('<think>')[-1] }}<|im_end|>{% endgeneration %}"


@pytest.mark.parametrize("answer", ["{{ m['content'].split('<think>')[-1] }}<|im_end|>", MARKED_BY])
def test_an_answer_that_generation_begins_inside_is_learned_from_there(answer):
    tok = tokenizer(
        f"{EACH}{OPEN}{{% if m['role'] == 'assistant' %}}<think>\n{answer}{{% else %}}{{{{ m['content'] }}}}<|im_end|>"
        f"{{% endif %}}\n{{% endfor %}}{ASK.replace('assistant', 'assistant' + chr(10) + '<think>')}"
    )
    encoded = Encoder(tok).encode(chat("1 + 1?", THOUGHT))
    assert (
        decode([t for t in encoded.labels if t != IGNORED], tok)
        == THOUGHT.removeprefix("<think>") + "<|im_end|>"
    )
    assert not encoded.misspelt


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m['content'] }} {% endfor %}"])
def test_characters_that_a_tokenizer_lacks_or_changes_are_warned_of(template):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({"<unk>": 0, "the": 1, "lamp": 2, "is": 3, "on": 4}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.normalizer = normalizers.Lowercase()
    tok = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", chat_template=template)
    texts = ("is on", "is ñandú", "ON")
    examples = [Example(f"line {n}", prompt="the lamp ", completion=text) for n, text in enumerate(texts, 1)]
    kept, summary = encode_all(examples, Encoder(tok))
    assert [encoded.misspelt for encoded in kept] == [False, True, True]
    assert any(
        "in 2 of 3 examples the tokens spell another text" in w and "first: line 2" in w
        for w in summary.warnings()
    )


def test_compatible_characters_and_white_space_spell_the_same():
    assert spells("the  lamp ﬁne", ["the lamp", "fine"])
    assert not spells("fine the lamp", ["the lamp", "fine"])


def test_what_is_learned_is_the_data_s_own_text():
    encoded = Encoder(tokenizer(CHATML)).encode(chat("hi", THOUGHT))
    assert decode([t for t in encoded.labels if t != IGNORED], tokenizer(CHATML)) == THOUGHT + "<|im_end|>"
