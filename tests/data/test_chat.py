import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loft_jax.data.chat import encode_chat
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


def said(ids, flags):
    return TOKENIZER.decode([token for token, flag in zip(ids, flags, strict=True) if flag])


def test_what_the_assistant_says_and_the_token_that_ends_it():
    ids, flags = encode_chat(TOKENIZER, CHAT, where="row 0")
    assert TOKENIZER.decode(ids) == TOKENIZER.apply_chat_template(CHAT, tokenize=False)
    assert said(ids, flags) == "four<|end|>quite sure<|end|>"
    assert ids.count(TOKENIZER.bos_token_id) == 1


def test_same_tokens_and_mask_as_transformers_finds_by_generation_marks():
    marked = tiny_tokenizer(chat_template=MARKED_TEMPLATE)
    expected = marked.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    ids, flags = encode_chat(TOKENIZER, CHAT, where="row 0")
    assert ids == expected["input_ids"]
    assert [int(flag) for flag in flags] == expected["assistant_masks"]


words = st.text(st.sampled_from("ab \né<|>x"), max_size=8)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), words), min_size=1))
def test_any_conversation_is_spelled_whole_and_marked_by_role(turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    ids, flags = encode_chat(TOKENIZER, messages, where="row 0")
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
    ids, flags = encode_chat(tokenizer, [{"role": "assistant", "content": "hello"}], where="row 0")
    assert said(ids, flags) == "hello<|end|>"


def test_template_without_generation_prompt_teaches_the_header_too():
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer = tiny_tokenizer(chat_template=template)
    ids, flags = encode_chat(tokenizer, CHAT[1:3], where="row 0")
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


def test_template_that_refuses():
    tokenizer = tiny_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match=r"row 7: the chat template refuses.*roles must alternate"):
        encode_chat(tokenizer, CHAT, where="row 7")
