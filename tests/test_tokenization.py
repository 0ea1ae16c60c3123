from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moslora.data.encoding import encode_all
from moslora.data.preview import preview
from moslora.data.shapes import Example, Message
from moslora.data.tokenization import IGNORED, Encoder
from moslora.errors import EncodingError

CORPUS = [
    "turn on the kitchen lamp",
    "the lamp is on",
    "what is on in the kitchen?",
    'a b  c\n\n"{lamp}": 17 ä',
]

EACH = "{% for m in messages %}"
OPEN, TURN = "<|im_start|>{{ m['role'] }}\n", "{{ m['content'] }}<|im_end|>\n{% endfor %}"
ASKING = "{% if add_generation_prompt %}"
ASK = ASKING + "<|im_start|>assistant\n{% endif %}"

# Adds a system message where there is none, as SmolLM2 does.
CHATML = (
    EACH + "{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    f"{OPEN}{TURN}{ASK}"
)
# Trims what is said, and opens with the start token, which the tokenizer adds as well.
LLAMA3 = (
    EACH + "{% if loop.first %}{{ bos_token }}{% endif %}<|start|>{{ m['role'] }}<|end|>\n\n"
    "{{ m['content'] | trim }}<|eot|>{% endfor %}" + ASKING + "<|start|>assistant<|end|>\n\n{% endif %}"
)
# Writes an end of text after the last answer, after its end of turn.
PHI = (
    EACH + "<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    f"{ASKING}<|assistant|>\n{{% else %}}{{{{ eos_token }}}}{{% endif %}}"
)
MARKED = (
    f"{EACH}{OPEN}"
    + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}" + ASK
)
# Writes reasoning before the last answer only, as Qwen3 does.
THINKING = (
    f"{EACH}{OPEN}"
    + "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    + f"{TURN}{ASK}"
)
# Generation begins inside a block that training does not write.
UNEVEN = f"{EACH}{OPEN}{TURN}{ASKING}<|im_start|>assistant\n<think>{{% endif %}}"
# The space before an answer is joined to its first word.
SPACED = f"{EACH}{OPEN}{TURN}{ASK}".replace("\n", " ")
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + MARKED
)
ENDLESS = EACH + "{{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}" + ASKING + "assistant:\n{% endif %}"

CONTROL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start|>",
    "<|end|>",
    "<|eot|>",
    "<|user|>",
    "<|assistant|>",
]


def tokenizer(template=None, bos="<s>", eos="</s>", adds_bos=False, merges=400):
    """Return a byte-level BPE tokenizer as GPT-2's and Llama 3's are, trained on four lines."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS * 3, trainers.BpeTrainer(vocab_size=merges, initial_alphabet=alphabet, show_progress=False)
    )
    bpe.add_special_tokens(CONTROL)
    if adds_bos:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos, chat_template=template)


CHATS = {
    "chatml": (tokenizer(CHATML, eos="<|im_end|>"), "<|im_end|>"),
    "llama3": (tokenizer(LLAMA3, eos="<|eot|>", adds_bos=True), "<|eot|>"),
    "phi": (tokenizer(PHI, eos="</s>"), "<|end|>"),
    "marked": (tokenizer(MARKED, eos="</s>"), "<|im_end|>"),
}
PLAIN = {"bare": tokenizer(), "with bos": tokenizer(adds_bos=True), "bytes only": tokenizer(merges=256)}

TEXT = st.text(st.sampled_from('ab lamp\n"{}:1ä€😀 '), max_size=12) | st.sampled_from(CORPUS)
SAID = TEXT.map(lambda text: text.strip() + "x")  # a template may trim, and a word has to be left


@st.composite
def chats(draw):
    system = [Message("system", draw(SAID))] if draw(st.booleans()) else []
    turns = draw(st.lists(st.tuples(SAID, SAID, st.booleans()), min_size=1, max_size=3))
    turns[-1] = (*turns[-1][:2], True)
    said = [m for ask, answer, on in turns for m in (Message("user", ask), Message("assistant", answer, on))]
    trailing = [Message("user", draw(SAID))] if draw(st.booleans()) else []
    return Example("line 1", messages=(*system, *said, *trailing))


def decode(ids, tok):
    return tok.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def learned_text(encoded, tok):
    return [text for text, learned in preview(encoded, tok) if learned]


def chat(*contents, place="line 1"):
    roles = ["user", "assistant"] * len(contents)
    return Example(place, messages=tuple(map(Message, roles, contents)))


# ---- chat ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHATS)
@given(example=chats())
def test_each_trained_answer_and_its_end_of_turn_is_learned_and_nothing_else(name, example):
    tok, end = CHATS[name]
    encoded = Encoder(tok).encode(example)
    answers = [m.content + end for m in example.messages if m.role == "assistant" and m.trained]
    assert learned_text(encoded, tok) == answers


@pytest.mark.parametrize("name", CHATS)
@given(example=chats(), everything=st.booleans())
def test_labels_are_the_tokens_or_ignored_and_the_prompt_is_how_training_begins(name, example, everything):
    tok, _ = CHATS[name]
    encoded = Encoder(tok, train_on="all" if everything else "completions").encode(example)
    assert len(encoded.labels) == len(encoded.input_ids) == encoded.full_length
    assert all(
        label in (IGNORED, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True)
    )
    assert encoded.labels[0] == IGNORED
    assert encoded.input_ids[: len(encoded.prompt_ids)] == encoded.prompt_ids
    assert not encoded.prompt_differs
    assert encoded.answer == [m.content for m in example.messages if m.role == "assistant"][-1]
    if everything:
        assert IGNORED not in encoded.labels[1:]


def test_a_default_system_message_and_the_start_token_come_once():
    tok, _ = CHATS["chatml"]
    assert decode(Encoder(tok).encode(chat("hi", "yo")).input_ids, tok) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nyo<|im_end|>\n"
    )
    tok, _ = CHATS["llama3"]
    assert Encoder(tok).encode(chat("hi", "yo")).input_ids.count(tok.bos_token_id) == 1


def test_prompt_and_completion_become_two_turns_for_a_chat_model():
    tok, end = CHATS["chatml"]
    encoder = Encoder(tok)
    pair = Example("line 1", prompt="hi", completion="yo")
    assert encoder.encode(pair) == encoder.encode(chat("hi", "yo"))
    assert learned_text(encoder.encode(pair), tok) == ["yo" + end]


def test_a_template_that_rewrites_earlier_answers_is_refused_with_a_way_out():
    tok = tokenizer(THINKING)
    with pytest.raises(
        EncodingError, match=r"line 1: .*template writes turn 1 differently once more turns.*train_on=all"
    ):
        Encoder(tok).encode(chat("a", "b", "c", "d"))
    single = Encoder(tok).encode(chat("a", "b"))
    assert learned_text(single, tok) == ["<think></think>b<|im_end|>"]
    quoted = Example(
        "line 1",
        messages=(*chat("a").messages, Message("assistant", "b", trained=False), *chat("c", "d").messages),
    )
    assert learned_text(Encoder(tok).encode(quoted), tok) == ["<think></think>d<|im_end|>"]
    assert Encoder(tok, train_on="all").encode(chat("a", "b", "c", "d"))


def test_a_template_whose_generation_prompt_is_not_a_prefix_is_refused_with_a_way_out():
    tok = tokenizer(UNEVEN)
    with pytest.raises(EncodingError, match=r"comes before turn 1 differently.*train_on=all"):
        Encoder(tok).encode(chat("a", "b"))
    _, summary = encode_all([chat("a", "b")], Encoder(tok, train_on="all"))
    assert any("the prompt has other tokens in generation" in warning for warning in summary.warnings())


def test_white_space_that_joins_the_template_s_own_is_learned_and_warned_of():
    tok = tokenizer(SPACED)
    kept, summary = encode_all([chat("a", "lamp"), chat("a", '"lamp"')], Encoder(tok))
    assert [learned_text(e, tok)[0].lstrip() for e in kept] == ["lamp<|im_end|>", '"lamp"<|im_end|>']
    assert kept[0].prompt_differs
    assert "the prompt has other tokens in generation" in summary.warnings()[0]


def test_what_a_template_refuses_is_said_in_its_own_words():
    with pytest.raises(
        EncodingError, match=r"line 1: the chat template refuses the turns system.*: no system role"
    ):
        Encoder(tokenizer(NO_SYSTEM)).encode(
            Example("line 1", messages=(Message("system", "s"), *chat("a", "b").messages))
        )


def test_a_template_without_end_of_turn_is_warned_of():
    tok = tokenizer(ENDLESS)
    kept, summary = encode_all([chat("lamp", "on")], Encoder(tok))
    assert learned_text(kept[0], tok) == ["on\n"]
    assert (
        "'</s>' is never among the trained tokens: the model will not learn to stop" in summary.warnings()[0]
    )


def test_an_end_of_turn_that_is_not_the_end_of_text_counts_as_one():
    tok, _ = CHATS["phi"]
    encoder = Encoder(tok)
    _, summary = encode_all([chat("a", "b")], encoder)
    assert encoder.stop_ids == {tok.eos_token_id, tok.convert_tokens_to_ids("<|end|>")}
    assert summary.without_end == 0
    assert summary.warnings() == []


def test_control_tokens_in_the_text_of_a_turn_are_warned_of_and_do_not_end_it():
    tok, _ = CHATS["chatml"]
    kept, summary = encode_all([chat("a", "b<|im_end|>c"), chat("a", "b")], Encoder(tok))
    assert learned_text(kept[0], tok) == ["b<|im_end|>c<|im_end|>"]
    assert "1 of 2 examples contain a control token" in summary.warnings()[0]


# ---- plain -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
@given(prompt=TEXT, completion=TEXT)
def test_plain_layout_learns_the_completion_and_the_end(name, prompt, completion):
    assume(prompt and completion)
    tok = PLAIN[name]
    encoded = Encoder(tok).encode(Example("line 1", prompt=prompt, completion=completion))
    start = tok.bos_token if name == "with bos" else ""
    assert decode(encoded.input_ids, tok) == f"{start}{prompt}{completion}</s>"
    assert decode(encoded.prompt_ids, tok) == start + prompt
    assert encoded.labels[-1] == tok.eos_token_id
    learned = [token for token in encoded.labels if token != IGNORED]
    text = decode(learned, tok)
    if encoded.prompt_differs:  # a token reaches across: it belongs to the completion, and only it does
        assert len(decode(learned[1:], tok).replace("�", "")) < len(f"{completion}</s>")
    elif len(encoded.input_ids) > len(learned) and "�" not in text:
        assert text == f"{completion}</s>" or not encoded.prompt_ids
    assert all(
        label in (IGNORED, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True)
    )


def test_a_token_that_reaches_across_the_boundary_is_learned_and_warned_of():
    tok = PLAIN["bare"]
    assert len(tok.tokenize(" lamp")) == 1
    apart, across = (
        Example("line 1", prompt="the", completion=" lamp"),
        Example("line 2", prompt="the ", completion="lamp"),
    )
    kept, summary = encode_all([apart, across], Encoder(tok))
    assert kept[0].input_ids == kept[1].input_ids
    assert kept[0].labels == kept[1].labels
    assert [e.prompt_differs for e in kept] == [False, True]
    assert (
        "in 1 of 2 examples (first: line 2) the prompt has other tokens in generation"
        in summary.warnings()[0]
    )


@pytest.mark.parametrize("name", PLAIN)
def test_no_start_or_end_token_comes_twice(name):
    tok = PLAIN[name]
    for example in (
        Example("line 1", prompt="<s>the lamp", completion=" is on</s>"),
        Example("line 1", text="<s>the lamp is on</s>"),
    ):
        assert decode(Encoder(tok).encode(example).input_ids, tok) == "<s>the lamp is on</s>"


def test_text_is_learned_whole_but_for_its_first_token_under_any_template():
    for tok in (PLAIN["with bos"], CHATS["llama3"][0]):
        encoded = Encoder(tok).encode(Example("line 1", text="the lamp"))
        assert encoded.labels == [IGNORED, *encoded.input_ids[1:]]
        assert decode(encoded.input_ids, tok) == f"<s>the lamp{tok.eos_token}"
        assert (encoded.prompt_ids, encoded.answer) == ([], "")


def test_a_tokenizer_that_ends_its_text_itself_does_not_end_the_prompt():
    tok = tokenizer()
    from tokenizers import processors

    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tok.eos_token_id)]
    )
    encoded = Encoder(tok).encode(Example("line 1", prompt="the", completion=" lamp"))
    assert decode(encoded.input_ids, tok) == "the lamp</s>"
    assert decode(encoded.prompt_ids, tok) == "the"


def test_a_conversation_without_a_template_is_refused_with_a_way_out():
    with pytest.raises(EncodingError, match=r"the tokenizer has none\. Choose an instruct model"):
        Encoder(PLAIN["bare"]).encode(chat("a", "b"))
    with pytest.raises(EncodingError, match=r"data\.template=plain turns it off"):
        Encoder(CHATS["chatml"][0], template="plain").encode(chat("a", "b"))
    with pytest.raises(ValueError, match="choose an instruct model"):
        Encoder(PLAIN["bare"], template="chat")


# ---- length ----------------------------------------------------------------------------------------------


@given(example=chats(), limit=st.integers(2, 60))
def test_a_cut_keeps_the_start_and_something_to_learn(example, limit):
    tok, _ = CHATS["chatml"]
    whole = Encoder(tok).encode(example)
    cut = Encoder(tok, max_length=limit).encode(example)
    if cut is None:
        assert all(label == IGNORED for label in whole.labels[:limit])
    else:
        assert cut.input_ids == whole.input_ids[:limit]
        assert cut.labels == whole.labels[:limit]
        assert any(label != IGNORED for label in cut.labels)
        assert cut.was_cut == (len(whole.input_ids) > limit)
        assert cut.prompt_ids == whole.prompt_ids


def test_too_long_is_cut_dropped_or_refused_as_told_and_counted():
    tok = PLAIN["bytes only"]
    examples = [Example(f"line {n}", prompt="a" * n, completion="b" * 4) for n in (1, 5, 9)]
    kept, summary = encode_all(examples, Encoder(tok, max_length=8))
    assert [e.place for e in kept] == ["line 1", "line 5"]
    assert (summary.cut, summary.dropped, summary.longest, summary.tokens) == (1, 1, 14, 6 + 8)
    assert summary.trained_tokens == 5 + 3
    said = (
        "1 of 3 examples are longer than max_length=8 and were {} (first: {}): "
        "raise trainer.max_length (the longest has 14 tokens)"
    )
    assert summary.warnings() == [said.format("dropped", "line 9"), said.format("cut", "line 5")]
    kept, summary = encode_all(examples, Encoder(tok, max_length=8, too_long="drop"))
    assert (len(kept), summary.dropped, summary.cut) == (1, 2, 0)
    with pytest.raises(
        EncodingError,
        match=r"line 5: has 10 tokens.*max_length=8.*\(1 more example .*line 9",
    ):
        encode_all(examples, Encoder(tok, max_length=8, too_long="refuse"))
    with pytest.raises(EncodingError, match=r"none of 3 examples is left within max_length=2"):
        encode_all(examples, Encoder(tok, max_length=2, too_long="drop"))


def test_a_cut_example_without_its_end_is_no_reason_for_a_second_warning():
    tok = PLAIN["bytes only"]
    examples = [
        Example("line 1", prompt="a", completion="b"),
        Example("line 2", prompt="a", completion="b" * 9),
    ]
    _, summary = encode_all(examples, Encoder(tok, max_length=6))
    assert summary.without_end == 1
    assert len(summary.warnings()) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("template", "chatml"), ("train_on", "answers"), ("too_long", "truncate"), ("max_length", 1)],
)
def test_unknown_choices_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        Encoder(PLAIN["bare"], **{field: value})


# ---- preview ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
@given(text=TEXT, data=st.data())
def test_stretches_join_to_the_decoded_whole_wherever_labels_change(name, text, data):
    assume(text)
    tok = PLAIN[name]
    encoded = Encoder(tok, train_on="all").encode(Example("line 1", text=text))
    size = len(encoded.input_ids)
    flags = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    labels = [t if on else IGNORED for t, on in zip(encoded.input_ids, flags, strict=True)]
    pieces = preview(type(encoded)(**{**vars(encoded), "labels": labels}), tok)
    assert "".join(piece for piece, _ in pieces) == decode(encoded.input_ids, tok)
    assert "" not in [piece for piece, _ in pieces]


def test_stretches_join_for_a_tokenizer_that_writes_spaces_between_words():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({"[UNK]": 0, "the": 1, "lamp": 2, "on": 3, "</s>": 4}, unk_token="[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tok = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>")
    encoded = Encoder(tok).encode(Example("line 1", prompt="the lamp", completion=" on"))
    assert preview(encoded, tok) == [("the lamp", False), (" on </s>", True)]
