"""The formats that people have their examples in, judged by transformers' chat templates."""

import json
import logging

import datasets
import pytest

from loft_jax.data import DataConfig, tokenize
from loft_jax.data.row_formats import are_chats
from loft_jax.errors import InputError
from loft_jax.evaluation import generated_answers
from loft_jax.models.registry import FAMILIES
from loft_jax.tasks import find_task
from loft_jax.tasks.task import Given
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

CALLING = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}",
    "{{ message['content'] }}{% for call in message['tool_calls'] %}"
    "{{ call['function']['name'] }}{{ call['function']['arguments'] | tojson }}{% endfor %}",
)
TOKENIZER = tiny_tokenizer(chat_template=CALLING)
PLAIN = tiny_tokenizer(chat_template=None)

USER, ASSISTANT = {"role": "user", "content": "two?"}, {"role": "assistant", "content": "four"}
SURE, YES = {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "yes"}
SYSTEM = {"role": "system", "content": "be brief"}


def encode(row, tokenizer=TOKENIZER, **options):
    (example,) = tokenize([row], tokenizer, DataConfig("rows", **options))
    return tokenizer.decode(example.tokens), tokenizer.decode(example.tokens[example.loss_mask])


def rendered(*messages):
    return TOKENIZER.apply_chat_template(messages, tokenize=False)


def turn(speaker, value):
    return {"from": speaker, "value": value}


CONVERSATION = [USER, ASSISTANT, SURE, YES]
ROWS = {
    "sharegpt": (
        {
            "conversations": [
                turn("human", "two?"),
                turn("gpt", "four"),
                turn("user", "sure?"),
                turn("assistant", "yes"),
            ],
            "system": "be brief",
        },
        [SYSTEM, *CONVERSATION],
        "four<|end|>yes<|end|>",
    ),
    "roles": (
        {"conversation": [SYSTEM, USER, ASSISTANT]},
        [SYSTEM, USER, ASSISTANT],
        "four<|end|>",
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "two?"}]}, ASSISTANT]},
        [USER, ASSISTANT],
        "four<|end|>",
    ),
    "weights": (
        {"messages": [USER, {**ASSISTANT, "weight": 0}, SURE, {**YES, "weight": 1}]},
        CONVERSATION,
        "yes<|end|>",
    ),
    "conversational": (
        {"prompt": [USER, ASSISTANT, SURE], "completion": [YES]},
        CONVERSATION,
        "yes<|end|>",
    ),
    "conversational text": (
        {"prompt": [USER], "completion": "four"},
        [USER, ASSISTANT],
        "four<|end|>",
    ),
    "chosen": (
        {"chosen": CONVERSATION, "rejected": [USER, ASSISTANT, SURE, ASSISTANT]},
        CONVERSATION,
        "yes<|end|>",
    ),
    "chosen after its prompt": (
        {"prompt": [USER, ASSISTANT, SURE], "chosen": [YES], "rejected": [ASSISTANT]},
        CONVERSATION,
        "yes<|end|>",
    ),
    "chosen with its prompt": (
        {"prompt": "two?", "chosen": [USER, ASSISTANT], "rejected": [USER, YES]},
        [USER, ASSISTANT],
        "four<|end|>",
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "2, 2", "output": "four", "text": "all of it"},
        [{"role": "user", "content": "Add.\n\n2, 2"}, ASSISTANT],
        "four<|end|>",
    ),
    "alpaca without input": (
        {"instruction": "two?", "output": "four", "system": "be brief"},
        [SYSTEM, USER, ASSISTANT],
        "four<|end|>",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_conversations_are_what_transformers_renders(name):
    row, messages, learned = ROWS[name]
    assert encode(row) == (rendered(*messages), learned)


WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Łódź"}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [WEATHER]}
RESULT = {"role": "tool", "content": "rain"}
AS_JSON = {"name": "weather", "arguments": json.dumps({"city": "Łódź"})}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [
            USER,
            {"role": "assistant", "content": None,
             "tool_calls": [{"id": "1", "type": "function", "function": AS_JSON}]},
            {"role": "tool", "tool_call_id": "1", "content": "rain"},
            YES,
        ]},
        {"messages": [
            USER,
            {"role": "assistant", "function_call": AS_JSON},
            {"role": "function", "name": "weather", "content": "rain"},
            YES,
        ]},
        {"conversations": [
            turn("human", "two?"), turn("function_call", json.dumps(AS_JSON)),
            turn("observation", "rain"), turn("gpt", "yes"),
        ]},
    ],
    ids=["openai", "openai's functions", "sharegpt"],
)  # fmt: skip
def test_calls_of_tools_are_learned_with_their_arguments_as_objects(row):
    whole, learned = encode(row)
    assert whole == rendered(USER, CALL, RESULT, YES)
    assert learned == 'weather{"city": "Łódź"}<|end|>yes<|end|>'


def test_alpaca_without_a_chat_template_has_the_prompt_of_alpaca():
    row = {"instruction": "Add.", "input": "2, 2", "output": "four"}
    whole, learned = encode(row, PLAIN)
    assert learned == "four</s>"
    assert whole == (
        "<s>Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n### Response:\nfour</s>"
    )
    whole, _ = encode({**row, "input": "", "system": "You add."}, PLAIN)
    assert whole == "<s>You add.\n\n### Instruction:\nAdd.\n\n### Response:\nfour</s>"


def test_of_texts_of_preferences_the_chosen_one_is_learned_and_that_is_told(caplog):
    row = {"prompt": "two?", "chosen": " four", "rejected": " five"}
    assert encode(row, PLAIN) == ("<s>two? four</s>", " four</s>")
    assert "the chosen side is learned" in caplog.text
    row = {"chosen": "H: two?\n\nA: It is four.", "rejected": "H: two?\n\nA: It isn't."}
    assert encode(row, PLAIN)[1] == " is four.</s>"


ORCA = {"system": "be brief", "question": "two?", "chosen": "four", "rejected": "five"}


def test_preferences_have_the_system_message_and_are_refused_without_a_question():
    with pytest.raises(InputError, match=r"row 0: has no 'prompt'.*'question'.* --data.prompt-fie"):
        encode(ORCA)
    named = {"prompt_field": "question"}
    assert encode(ORCA, **named) == ("<s>be brief\n\ntwo?four</s>", "four</s>")
    whole = rendered(SYSTEM, USER, ASSISTANT)
    assert encode(ORCA, **named, chat=True) == (whole, "four<|end|>")
    for chosen in ([ASSISTANT], [USER, ASSISTANT], [SYSTEM, USER, ASSISTANT]):
        row = {**ORCA, "chosen": chosen, "rejected": [*chosen[:-1], YES]}
        assert encode(row, **named) == (whole, "four<|end|>")
    with pytest.raises(InputError, match=r"row 0: has no 'prompt'"):
        encode({"chosen": [ASSISTANT], "rejected": [YES]})


def test_completions_to_avoid_are_left_out_and_counted(caplog):
    rows = [
        {"prompt": "two?", "completion": f" {word}", "label": label}
        for word, label in (("five", False), ("four", True), ("six", False))
    ]
    for given in (rows, datasets.Dataset.from_list(rows)):
        caplog.clear()
        (example,) = tokenize(given, tiny_tokenizer(chat_template=None), DataConfig("rows"))
        assert TOKENIZER.decode(example.tokens) == "<s>two? four</s>"
        (said,) = [one.getMessage() for one in caplog.records if "left out" in one.getMessage()]
        assert "left out 2 of 3 prompts and completions, whose field 'label' is false" in said
    texts = DataConfig("rows", prompt="{prompt}", completion="{completion}")
    assert len(tokenize(rows, PLAIN, texts)) == 3
    for kind in (int, str):  # these may be answers
        labels = [{**row, "label": kind(row["label"])} for row in rows]
        assert len(tokenize(labels, PLAIN, DataConfig("rows"))) == 3
    with pytest.raises(InputError, match="row 0: field 'label' is false"):
        generated_answers(rows, PLAIN, DataConfig("rows"))


def test_prompts_and_completions_are_given_to_the_chat_template_on_request(caplog):
    row = {"prompt": "two?", "completion": "four"}
    with caplog.at_level(logging.INFO):
        assert encode(row) == ("<s>two?four</s>", "four</s>")
    assert "tokenizer's chat template, which --data.chat does" in caplog.text
    assert encode(row, chat=True) == (rendered(USER, ASSISTANT), "four<|end|>")
    with pytest.raises(InputError, match="chat is true, but the tokenizer has no chat template"):
        encode(row, PLAIN, chat=True)


def test_templates_name_the_fields():
    row = {"question": "two?", "context": "", "n": 4, "text": "unused", "messages": [USER]}
    named = {"prompt": "Q: {question}\\n{context}", "completion": " {{{n}}}"}
    assert encode(row, **named) == ("<s>Q: two? {4}</s>", " {4}</s>")
    assert encode({**row, "context": "c"}, **named)[0] == "<s>Q: two?\nc {4}</s>"
    assert encode(row, **named, chat=True)[1] == " {4}<|end|>"
    renamed = {"prompt": "{question}", "completion_field": "text"}
    assert encode(row, **renamed) == ("<s>two?unused</s>", "unused</s>")
    with pytest.raises(InputError, match=r"field 'q' of data.prompt is missing; found the fields"):
        encode(row, prompt="{q}", completion="{n}")
    with pytest.raises(InputError, match=r"row 0: field 'messages' is list .* text or a number"):
        encode(row, prompt="{messages}", completion="{n}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "{a"}, r"data.prompt: .* has a single '{'"),
        ({"completion": "a}"}, r"data.completion: .* has a single '}'"),
        ({"prompt": "a"}, "names no field"),
        ({"prompt": "{a}", "prompt_field": "b"}, "prompt_field is 'b', but there is a template"),
        ({"prompt": "{a}", "preset": "boolq"}, "has columns of its own"),
        ({"columns": ("a", "a")}, "expected different names"),
    ],
)
def test_templates_and_columns_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        DataConfig("rows", **options)


def test_rows_of_several_formats_keep_their_order(caplog):
    rows = [
        {"text": "a"}, {"messages": [USER, ASSISTANT]}, {"prompt": "two?", "completion": " 4"},
        {"instruction": "two?", "output": "four"}, {"text": "b"},
    ]  # fmt: skip
    fields = dict.fromkeys(name for row in rows for name in row)
    table = datasets.Dataset.from_list([{name: row.get(name) for name in fields} for row in rows])
    for given in (rows, table):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            data = tokenize(given, tiny_tokenizer(), DataConfig("rows"))
        assert [TOKENIZER.decode(one.tokens[one.loss_mask]) for one in data] == [
            "a</s>", "four<|end|>", " 4</s>", "four<|end|>", "b</s>",
        ]  # fmt: skip
        assert "rows have several formats: 1 are messages" in caplog.text
        assert "are not used" not in caplog.text


def test_a_named_field_goes_before_formats_that_are_recognized(caplog):
    caplog.set_level(logging.INFO)
    row = {"instruction": "two?", "output": "four", "story": "a joy"}
    assert encode(row, text_field="story")[1] == "a joy</s>"
    assert "several formats" not in caplog.text
    fields = {"prompt_field": "instruction", "completion_field": "output"}
    assert encode(row, **fields) == ("<s>two?four</s>", "four</s>")
    row = {"messages": [USER, ASSISTANT], "prompt": "two?", "a": " five", "story": "a joy"}
    assert encode(row)[1] == "four<|end|>"
    assert encode(row, completion_field="a")[1] == " five</s>"
    assert encode(row, text_field="story")[1] == "a joy</s>"


def test_a_named_field_that_no_row_has_is_refused():
    rows = [{"chat": [USER, ASSISTANT], "text": "raw"}]
    for setting in ("messages", "prompt", "completion", "text"):
        data = DataConfig("rows", **{f"{setting}_field": "chats"})
        message = rf"field 'chats' of data.{setting}_field is missing; found .*'chat', 'text'"
        with pytest.raises(InputError, match=message):
            find_task("auto", FAMILIES["llama"], Given(data, rows))
        with pytest.raises(InputError, match=message):
            generated_answers(rows, PLAIN, data)
        for others in (
            {"held_out": [{"chats": "a", "choices": ["b"], "answer": 0}]},
            {"rows": [{"prompt": "a", "choices": ["b"], "answer": 0}]},
        ):
            find_task("auto", FAMILIES["llama"], Given(data, **{"rows": rows, **others}))
    find_task("auto", FAMILIES["llama"], Given(DataConfig("rows", label_field="y"), rows))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [turn("alien", "hi")]}, "from 'alien'; expected one of human, user"),
        ({"conversations": [turn("function_call", "weather")]}, "cannot be read as the JSON of"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": ["x"]}]}, "found the tool call"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [
                {"function": {"name": "weather", "arguments": "{"}}]}]},
            "arguments of 'weather' are no JSON",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "is 'image_url'"),
        ({"messages": [{**ASSISTANT, "weight": 2}]}, "weight of a message is 2; expected 0 or 1"),
        ({"instruction": "a", "output": 3}, r"row 0: field 'output' is int \(3\)"),
        ({"question": "a", "answer": "b"}, "--data.prompt '{question}' --data.completion"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_row_and_field(row, message):
    with pytest.raises(InputError, match=message):
        encode(row)


def test_long_texts_are_tokenized_in_parts_and_are_the_same(monkeypatch):
    text = "\n".join(f"row {i}, a joy  from start  to finish" for i in range(40)) + " the end"
    data = DataConfig("rows", max_length=17)
    whole = tokenize([{"text": text}], TOKENIZER, data)
    monkeypatch.setattr("loft_jax.data.text._LONG", 200)
    monkeypatch.setattr("loft_jax.data.text._PART", 100)
    parts = tokenize([{"text": text}, {"text": "b"}], TOKENIZER, data)
    assert parts.tokens[: len(whole.tokens)].tolist() == whole.tokens.tolist()
    assert len(parts) == len(whole) + 1
    monkeypatch.setattr("loft_jax.data.encode._MOST_OF_PAIR", 100)
    with pytest.raises(InputError, match=r"a prompt has \d+ characters; expected at most 100"):
        tokenize([{"prompt": text, "completion": "a"}], TOKENIZER, data)


@pytest.mark.parametrize(
    ("rows", "chats"),
    [
        ([{"instruction": "a", "output": ""}, {"instruction": "a", "output": "b"}], True),
        ([{"text": ""}, {"text": "a"}], False),
        ([{"prompt": "a", "completion": ""}], False),
        ([{"prompt": "a", "completion": ""}] * 100 + [{"messages": [USER, ASSISTANT]}], False),
    ],
)
def test_rows_are_what_the_first_with_something_to_learn_is(rows, chats):
    assert are_chats(rows, TOKENIZER, DataConfig()) is chats
