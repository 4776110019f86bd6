import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loft_jax.data.chat import encode_chats
from loft_jax.data.templates import Chat
from loft_jax.errors import InputError
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "two plus two?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "quite sure"},
]
# The same format with the marks that transformers itself reads the assistant's tokens from.
MARKED_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ m['content'] }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def encode_chat(tokenizer, messages, *, where="row 0"):
    (encoded,) = encode_chats(tokenizer, [Chat(where, messages)])
    return encoded


def said(ids, flags):
    return TOKENIZER.decode([token for token, flag in zip(ids, flags, strict=True) if flag])


def test_what_the_assistant_says_and_the_token_that_ends_it():
    ids, flags = encode_chat(TOKENIZER, CHAT)
    assert TOKENIZER.decode(ids) == TOKENIZER.apply_chat_template(CHAT, tokenize=False)
    assert said(ids, flags) == "four<|end|>quite sure<|end|>"
    assert ids.count(TOKENIZER.bos_token_id) == 1


def test_same_tokens_and_mask_as_transformers_finds_by_generation_marks():
    marked = tiny_tokenizer(chat_template=MARKED_TEMPLATE)
    expected = marked.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    ids, flags = encode_chat(TOKENIZER, CHAT)
    assert ids == expected["input_ids"]
    assert [int(flag) for flag in flags] == expected["assistant_masks"]


words = st.text(st.sampled_from("ab \né<|>x"), max_size=8)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), words), min_size=1))
def test_any_conversation_is_spelled_whole_and_marked_by_role(turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    ids, flags = encode_chat(TOKENIZER, messages)
    assert TOKENIZER.decode(ids) == TOKENIZER.apply_chat_template(messages, tokenize=False)
    assert said(ids, flags) == "".join(
        message["content"] + "<|end|>" for message in messages if message["role"] == "assistant"
    )


def test_conversation_opened_by_the_assistant_behind_a_default_system_prompt():
    template = (
        "{% if messages[0]['role'] != 'system' %}<|start|>system\nbe kind<|end|>\n{% endif %}"
        + CHAT_TEMPLATE
    )
    tokenizer = tiny_tokenizer(chat_template=template)
    ids, flags = encode_chat(tokenizer, [{"role": "assistant", "content": "hello"}])
    assert said(ids, flags) == "hello<|end|>"


def test_template_without_generation_prompt_teaches_the_header_too():
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer = tiny_tokenizer(chat_template=template)
    ids, flags = encode_chat(tokenizer, CHAT[1:3])
    assert said(ids, flags) == "assistant: four\n"


def test_no_chat_template():
    with pytest.raises(InputError, match="row 7: the tokenizer has no chat template"):
        encode_chat(tiny_tokenizer(chat_template=None), CHAT, where="row 7")


def test_template_that_rewrites_earlier_turns():
    template = (
        "{% for m in messages %}<|start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and "
        "not loop.last %}(gone){% else %}{{ m['content'] }}{% endif %}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    tokenizer = tiny_tokenizer(chat_template=template)
    with pytest.raises(InputError, match="row 7: the chat template does not write turn 2 the same"):
        encode_chat(tokenizer, CHAT, where="row 7")


def test_many_conversations_are_each_encoded_as_alone():
    chats = [CHAT[:2], CHAT, CHAT[2:3], [*CHAT[1:3]] * 3] * 40
    together = list(encode_chats(TOKENIZER, [Chat("row", messages) for messages in chats]))
    alone = {len(messages): encode_chat(TOKENIZER, messages) for messages in chats[:4]}
    assert together == [alone[len(messages)] for messages in chats]


THINKING = (
    "{% for m in messages %}{% if m.role == 'user' %}<|start|>{{ m.content }}{% else %}<|end|>"
    "{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|end|>PROMPT{% endif %}"
)
REASONED = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "<think>\neasy\n</think>\n2"},
]


def test_generation_prompt_that_opens_a_think_block():
    tokenizer = tiny_tokenizer(chat_template=THINKING.replace("PROMPT", "<think>\n"))
    message = r"row 7: .*generation prompt does not begin turn 1: it has '<think>\\n' \(it opens"
    with pytest.raises(InputError, match=message):
        encode_chat(tokenizer, REASONED, where="row 7")


@pytest.mark.parametrize("where", ["content", "reasoning_content", "thinking"])
def test_reasoning_that_a_template_leaves_out_is_told(caplog, where):
    tokenizer = tiny_tokenizer(chat_template=THINKING.replace("PROMPT", ""))
    turn = {"role": "assistant", "content": "2", where: REASONED[1]["content"]}
    for _ in range(2):
        ids, flags = encode_chat(tokenizer, [REASONED[0], turn])
        assert "easy" not in said(ids, flags)
    assert caplog.text.count("leaves out or rewrites some of what the assistant says") == 1
    assert "in 1 of 1 turns" in caplog.text
    assert "easy" in caplog.text


def test_reasoning_that_a_template_writes_in_its_own_way_is_not_told(caplog):
    template = CHAT_TEMPLATE.replace(
        "{{ message['content'] }}",
        "{% if message.reasoning_content %}<think> {{ message.reasoning_content }} </think>"
        "{% endif %}{{ message['content'] | trim }}",
    )
    tokenizer = tiny_tokenizer(chat_template=template)
    turn = {"role": "assistant", "content": " 2\n", "thinking": "easy"}
    ids, flags = encode_chat(tokenizer, [REASONED[0], turn])
    assert said(ids, flags) == "<think> easy </think>2<|end|>"
    assert caplog.text == ""


UNCLOSED = (
    "{% for m in messages %}{% if m.role == 'user' %}### Q:\n{{ m.content }}\n\n{% else %}"
    "START### A:\n{{ m.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}PROMPT### A:\n{% endif %}"
)


def test_template_that_closes_no_turn_is_told(caplog):
    tokenizer = tiny_tokenizer(chat_template=UNCLOSED.replace("START", "").replace("PROMPT", ""))
    for _ in range(2):
        ids, flags = encode_chat(tokenizer, CHAT[1:])
        assert said(ids, flags) == "four\n\nquite sure\n\n"
    assert caplog.text.count("so no end is learned") == 1
    assert "{{ eos_token }} ('</s>')" in caplog.text


def test_special_token_that_opens_a_turn_does_not_close_it(caplog):
    template = UNCLOSED.split("{% if add_generation")[0].replace("START", "<|start|>")
    ids, flags = encode_chat(tiny_tokenizer(chat_template=template), CHAT[1:3])
    assert said(ids, flags) == "<|start|>### A:\nfour\n\n"
    assert "so no end is learned" in caplog.text


def test_fields_that_the_template_does_not_use_are_told(caplog):
    calling = {"role": "assistant", "content": "four", "name": None}
    calling["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    list(encode_chats(TOKENIZER, [Chat("row 0", [CHAT[1], calling], tools)]))
    assert "the chat template does not use ['tool_calls', 'tools'] of" in caplog.text


def test_a_turn_whose_calls_the_template_leaves_out_is_not_learned(caplog):
    calling = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "find"}}]}
    written = "{{ message['content'] }}{% for call in message['tool_calls'] or [] %}"
    written += "{{ call['function']['name'] }}{% endfor %}"
    chat = Chat("row 0", [CHAT[1], calling, CHAT[1], {"role": "assistant", "content": "four"}])
    [(ids, said)] = encode_chats(TOKENIZER, [chat])
    assert TOKENIZER.decode([i for i, own in zip(ids, said, strict=True) if own]).startswith("four")
    assert "leaves out the tool calls of 1 turns" in caplog.text
    template = TOKENIZER.chat_template.replace("{{ message['content'] }}", written)
    [(ids, said)] = encode_chats(tiny_tokenizer(chat_template=template), [chat])
    learned = TOKENIZER.decode([i for i, own in zip(ids, said, strict=True) if own])
    assert "find" in learned


def test_template_that_closes_its_turns_is_not_spoken_of(caplog):
    encode_chat(TOKENIZER, CHAT)
    assert caplog.text == ""


def test_template_that_refuses():
    tokenizer = tiny_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match=r"row 7: the chat template refuses.*roles must alternate"):
        encode_chat(tokenizer, CHAT, where="row 7")
