import json
import logging

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loft_jax.data import DataConfig, Example, tokenize
from loft_jax.data.encode import encode_prompts, truncate
from loft_jax.data.row_formats import RowReader
from loft_jax.errors import InputError
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def encode(rows, tokenizer=TOKENIZER, **options):
    return tokenize(rows, tokenizer, DataConfig("rows", **options))


def test_completion_tokens_and_eos_alone_carry_the_loss():
    rows = [
        {"prompt": "Review: a joy\nSentiment:", "completion": " positive"},
        {"prompt": "", "completion": "dull"},
    ]
    data = encode(rows)
    for example, row in zip((data[0], data[1]), rows, strict=True):
        prompt, completion = ids(row["prompt"]), ids(row["completion"])
        assert example.tokens.tolist() == [BOS, *prompt, *completion, EOS]
        assert example.loss_mask.tolist() == [False] * (len(prompt) + 1) + [True] * (
            len(completion) + 1
        )
    assert len(data) == 2
    assert data.lengths.tolist() == [len(data[0].tokens), len(data[1].tokens)]
    assert (data.tokens.dtype, data.loss_mask.dtype) == (np.int32, bool)


def test_text_carries_the_loss_from_the_second_token_on():
    (example,) = list(encode([{"text": "a joy"}]))
    assert example.tokens.tolist() == [BOS, *ids("a joy"), EOS]
    assert example.loss_mask.tolist() == [False] + [True] * (len(example.tokens) - 1)


def test_eos_is_not_doubled():
    (example,) = list(encode([{"prompt": "a", "completion": " joy</s>"}]))
    assert example.tokens.tolist() == [BOS, *ids("a"), *ids(" joy"), EOS]


def test_messages_from_a_dataset():
    chat = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "four"}]
    (example,) = list(encode(datasets.Dataset.from_list([{"messages": chat}])))
    assert TOKENIZER.decode(example.tokens) == TOKENIZER.apply_chat_template(chat, tokenize=False)
    assert TOKENIZER.decode(example.tokens[example.loss_mask]) == "four<|end|>"


TOOLED = "{% if tools %}<|start|>system\n{{ tools | tojson }}<|end|>\n{% endif %}" + CHAT_TEMPLATE
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"scale": 0.7}}}]


@pytest.mark.parametrize("template", [TOOLED, {"default": CHAT_TEMPLATE, "tool_use": TOOLED}])
def test_tools_beside_messages_are_rendered_as_transformers_does(template):
    tokenizer = tiny_tokenizer(chat_template=template)
    chat = [
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ]
    rows = [{"messages": chat, "tools": tools} for tools in (TOOLS, json.dumps(TOOLS), None, "")]
    for example, tools in zip(encode(rows, tokenizer), (TOOLS, TOOLS, None, None), strict=True):
        expected = tokenizer.apply_chat_template(chat, tools=tools, tokenize=False)
        assert tokenizer.decode(example.tokens) == expected
        learned = tokenizer.decode(example.tokens[example.loss_mask])
        assert learned == "four<|end|>yes<|end|>"


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("[{", "row 0, field 'tools': cannot be read as JSON: "),
        ("3", "row 0, field 'tools': found '3'; expected a list of objects"),
        ([["f"]], r"row 0, field 'tools': found \[\['f'\]\]; expected a list of objects"),
        ({"name": "f"}, "row 0, field 'tools': found {'name': 'f'}; expected a list"),
        ("[" * 20_000, "row 0, field 'tools': cannot be read as JSON: RecursionError"),
    ],
)
def test_tools_that_are_none(tools, message):
    with pytest.raises(InputError, match=message):
        encode([{"messages": [{"role": "assistant", "content": "four"}], "tools": tools}])


def test_field_names_and_their_precedence():
    chat = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "four"}]
    row = {"talk": chat, "question": "two?", "answer": " 4", "text": "plain"}
    fields = {"prompt_field": "question", "completion_field": "answer"}
    (example,) = list(encode([row], messages_field="talk", **fields))
    assert TOKENIZER.decode(example.tokens[example.loss_mask]) == "four<|end|>"
    (example,) = list(encode([row], **fields))
    assert TOKENIZER.decode(example.tokens[example.loss_mask]) == " 4</s>"
    (example,) = list(encode([row]))
    assert TOKENIZER.decode(example.tokens[example.loss_mask]) == "plain</s>"


def test_many_rows_keep_their_order():
    rows = [{"text": f"row {i}"} for i in range(2345)]
    data = encode(rows)
    texts = [TOKENIZER.decode(example.tokens[1:-1]) for example in data]
    assert texts == [row["text"] for row in rows]


def test_long_example_loses_the_left_of_its_prompt_first():
    prompt, completion = "one two three four five six", " a joy"
    keep = len(ids(completion)) + 1
    (example,) = list(encode([{"prompt": prompt, "completion": completion}], max_length=keep + 3))
    assert example.tokens.tolist() == [BOS, *ids(prompt)[-2:], *ids(completion), EOS]
    assert example.loss_mask.sum() == keep


def test_then_the_end_of_its_completion():
    (example,) = list(encode([{"prompt": "one two", "completion": " a joy from"}], max_length=3))
    assert example.tokens.tolist() == [BOS, *ids(" a joy from")[:2]]
    assert example.loss_mask.tolist() == [False, True, True]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(2, 30))
def test_truncation_never_drops_the_whole_completion(prompt, completion, max_length):
    tokens = np.arange(prompt + completion, dtype=np.int32)
    cut = truncate(Example(tokens, tokens >= prompt), max_length)
    learned = cut.tokens[cut.loss_mask].tolist()
    kept = cut.tokens[~cut.loss_mask].tolist()
    assert len(cut.tokens) == min(max_length, len(tokens))
    assert learned == list(range(prompt, prompt + min(completion, max_length - 1)))
    assert kept == [0, *range(prompt - len(kept) + 1, prompt)]


@settings(max_examples=20, deadline=None)
@given(st.text(min_size=1, max_size=60), st.integers(2, 40))
def test_a_long_text_becomes_rows_that_predict_every_token_once(text, max_length):
    (whole,) = list(encode([{"text": text}], max_length=1000))
    pieces = list(encode([{"text": text}], max_length=max_length))
    assert max(len(piece.tokens) for piece in pieces) <= max_length
    learned = np.concatenate([piece.tokens[piece.loss_mask] for piece in pieces])
    np.testing.assert_array_equal(learned, whole.tokens[1:])
    before = np.concatenate([piece.tokens[:-1] for piece in pieces])
    np.testing.assert_array_equal(before, whole.tokens[:-1])


def test_examples_with_nothing_to_learn_are_left_out_and_counted(caplog):
    rows = [{"prompt": "a", "completion": c} for c in ("", " joy", "")]
    with caplog.at_level(logging.WARNING):
        data = encode(rows)
    assert len(data) == 1
    assert "left out 2 of 3 examples: 2 with nothing to learn" in caplog.text


def test_blank_lines_and_chats_without_assistant_are_left_out(caplog):
    with caplog.at_level(logging.WARNING):
        assert len(encode([{"text": "a"}, {"text": ""}])) == 1
        chats = [[{"role": role, "content": "hi"}] for role in ("user", "assistant")]
        assert len(encode([{"messages": chat} for chat in chats])) == 1
    assert caplog.text.count("left out 1 of 2") == 2


def test_shortened_examples_are_counted(caplog):
    with caplog.at_level(logging.WARNING):
        pairs = (("one two", " three four"), ("a", " b"))
        encode([{"prompt": a, "completion": b} for a, b in pairs], max_length=5)
    assert "shortened 1 of 2 examples to max_length 5" in caplog.text


def test_nothing_is_said_about_clean_data(caplog):
    with caplog.at_level(logging.WARNING):
        encode([{"text": "a"}])
    assert caplog.text == ""


def test_every_completion_truncated_away():
    rows = [{"prompt": "one", "completion": " two"}, {"prompt": "a b c", "completion": " d e f"}]
    shortest = len(ids("one")) + len(ids(" two")) + 2
    message = rf"every completion was truncated away: max_length is 1; .* shortest .* {shortest}$"
    with pytest.raises(InputError, match=message):
        encode(rows, max_length=1)


def test_every_completion_empty():
    with pytest.raises(InputError, match="none of the 2 examples has anything to learn"):
        encode([{"prompt": "a", "completion": ""}] * 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "label": "b"}, r"field 'completion' is missing; .*\['label', 'prompt'\]"),
        ({"completion": "b"}, r"field 'prompt' is missing; found the fields \['completion'\]"),
        (
            {"review": "a"},
            r"no known field; found the fields \['review'\]; expected 'messages', or",
        ),
    ],
)
def test_missing_field(row, message):
    with pytest.raises(InputError, match=message):
        encode([row])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 3}],
         r"row 1: field 'completion' is int \(3\); expected text"),
        ([{"prompt": None, "completion": "b"}], "row 0: field 'prompt' is NoneType"),
        ([{"text": "a"}, {"text": ["b"]}], "row 1: field 'text' is list"),
        ([{"text": "a"}, {"words": "b"}], "row 1: field 'text' is NoneType"),
        ([{"text": ["b" * 9999] * 50}], r"row 0: field 'text' is list \(\['bbb.{1,200}; expected"),
        ([{"messages": "hi"}], "row 0, field 'messages': found 'hi'; expected a list of messages"),
        ([{"messages": []}], r"row 0, field 'messages': found \[\]"),
        ([{"messages": [{"role": "user"}]}], "each with the texts role and content"),
        ([{"messages": [{"role": "user", "content": None}]}], "each with the texts role"),
    ],
)  # fmt: skip
def test_value_that_is_not_text(rows, message):
    with pytest.raises(InputError, match=message):
        encode(rows)


def test_empty_dataset():
    with pytest.raises(InputError, match="the dataset is empty"):
        encode([])


def test_tokenizer_without_eos():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS token"):
        encode([{"text": "a"}], tokenizer)


def test_prompt_without_any_token_leaves_the_first_token_unlearned():
    (example,) = list(encode([{"prompt": "", "completion": "a joy"}], tiny_tokenizer(bos=False)))
    assert example.loss_mask.tolist() == [False] + [True] * (len(example.tokens) - 1)


def test_fields_that_are_passed_over_are_told_once(caplog):
    chat = [{"role": "assistant", "content": "four"}]
    row = {"messages": chat, "prompt": "a ", "completion": "b", "source": "web"}
    with caplog.at_level(logging.INFO, logger="loft_jax"):
        for _ in range(2):
            encode(datasets.Dataset.from_list([row]))
    warning, info = caplog.records
    assert (warning.levelname, info.levelname) == ("WARNING", "INFO")
    assert "['completion', 'prompt'] of the rows are not used: ['messages'] go" in warning.message
    assert "['source'] of the rows are not used" in info.message


def test_only_fields_that_are_used_are_decoded():
    class Undecodable(datasets.Json):
        def decode_example(self, value, token_per_repo_id=None):
            raise AssertionError("decoded")

    features = datasets.Features({"text": datasets.Value("string"), "meta": Undecodable()})
    rows = datasets.Dataset.from_dict({"text": ["a joy"], "meta": [{"a": 1}]}, features=features)
    assert len(encode(rows)) == 1


def test_words_that_run_together_in_most_rows_are_told_once_a_run(caplog):
    joined, apart = {"prompt": "Q?", "completion": "A"}, {"prompt": "Q? ", "completion": "A"}
    encode([{"prompt": "", "completion": "B"}, joined, apart])
    assert not caplog.records
    for tokenizer in (tiny_tokenizer(), tiny_tokenizer()):  # of a run each
        for _ in range(2):
            encode([joined, apart, joined], tokenizer)
    assert len(caplog.records) == 2
    assert "2 of 3 times there is no white space" in caplog.text
    assert "the first of them becomes 'Q?A'" in caplog.text


def test_token_that_the_model_has_no_weights_for():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|tool|>"], special_tokens=True)
    rows = [{"prompt": "a", "completion": " joy"}, {"prompt": "a", "completion": " <|tool|>"}]
    whole = len(tokenizer)
    assert len(tokenize(rows, tokenizer, DataConfig("rows"), vocab_size=whole)) == 2
    message = (
        rf"row 1: the tokenizer gives token {whole - 1} \('<\|tool\|>'\), and the weights have"
    )
    for field in ("prompt", "completion"):
        wrong = [rows[0], {"prompt": "a", "completion": " b", field: "<|tool|>"}]
        with pytest.raises(InputError, match=message):
            tokenize(wrong, tokenizer, DataConfig("rows"), vocab_size=whole - 1)
    tokenizer.pad_token = "<|tool|>"
    with pytest.raises(InputError, match=rf"padding: the tokenizer gives token {whole - 1}"):
        tokenize(rows[:1], tokenizer, DataConfig("rows"), vocab_size=whole - 1)


def test_prompts_to_continue_are_what_stands_before_an_answer_in_training():
    chats = [
        [{"role": "user", "content": "hi"}],
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "two?"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "three?"},
        ],
    ]
    found = encode_prompts(TOKENIZER, ["a text", *chats, "<s>another"])
    for chat, ids in zip(chats, found[1:3], strict=True):
        answered = [*chat, {"role": "assistant", "content": "three, I say"}]
        (example,) = encode([{"messages": answered}])
        assert ids == example.tokens[: len(ids)].tolist()
        assert example.loss_mask[len(ids)]
        assert ids == TOKENIZER.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False
        )
    rows = [{"prompt": text, "completion": "x"} for text in ("a text", "<s>another")]
    for ids, example in zip((found[0], found[3]), encode(rows), strict=True):
        assert ids == example.tokens[~example.loss_mask].tolist()


def test_a_conversation_of_a_row_is_continued_with_its_tools():
    tokenizer = tiny_tokenizer(chat_template=TOOLED)
    asked = [{"role": "user", "content": "two?"}]
    row = {"messages": [*asked, {"role": "assistant", "content": "2"}], "tools": TOOLS}
    chat = RowReader(list(row), tokenizer, DataConfig("rows")).read(0, row)
    (ids,) = encode_prompts(tokenizer, [chat._replace(messages=asked)])
    (example,) = encode([row], tokenizer)
    assert ids == example.tokens[: len(ids)].tolist()
    assert example.loss_mask[len(ids)]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "expected a text, or a list of messages"),
        ([{"role": "user"}], "expected a text, or a list of messages"),
        ([{"role": "assistant", "content": "hi"}], "expected one to answer"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(prompt, said):
    with pytest.raises(InputError, match=rf"prompt 1: .*{said}"):
        encode_prompts(TOKENIZER, ["x", prompt])
