"""Learned tokens of published chat templates, against marks put in copies of them by hand."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast

from loft_jax.data.chat import encode_chats
from loft_jax.data.templates import Chat
from loft_jax.errors import InputError
from tests.tiny import tiny_sentencepiece_tokenizer, tiny_tokenizer

# Where a template has [[ and ]], its copy has {% generation %} and {% endgeneration %}.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}[[{{ message['content'] + '<|im_end|>' }}]]"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% if message['role'] == 'assistant' %}[[{{ message['content'] | trim + '<|eot_id|>' }}]]"
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if role == 'model' -%}
        [[{{ message['content'] | trim }}{{ '<end_of_turn>' }}]]
    {%- else -%}
        {{ message['content'] | trim }}{{ '<end_of_turn>' }}
    {%- endif -%}
    {{ '
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""
PHI3_MARKED = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n'}}{% if loop.last and not add_generation_prompt %}"
    "[[{{ message['content'] + '<|end|>\n' + eos_token }}]]"
    "{% else %}[[{{ message['content'] + '<|end|>' }}]]{{ '\n' }}{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% elif messages[-1]['role'] != 'assistant' %}{{ eos_token }}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n\nYou may call one or more functions to assist with the user query.\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object<|im_end|>\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>')
                and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n') %}
                {%- set reasoning_content = reasoning_content.split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\n' }}
        [[{%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<think>\n' + reasoning_content.strip('\n') }}
                {{- '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- content }}
            {%- endif %}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>' -}}]]{{- '\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
# It writes the tools before the last question, and the system message only in the last message.
MISTRAL = r"""{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] " + tools | tojson + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        [[{{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should have length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor -%}]]
    {%- elif message["role"] == "assistant" %}
        [[{{- " " + message["content"]|trim + eos_token -}}]]
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string }}
        {{- ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"""
TEMPLATES = {
    "chatml": CHATML, "llama3": LLAMA3, "gemma3": GEMMA3, "phi3": PHI3, "qwen3": QWEN3,
    "mistral": MISTRAL,
}  # fmt: skip
SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>",
    "<tool_call>", "</tool_call>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
)  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {}}}]


def with_template(template):
    tokenizer = tiny_tokenizer(chat_template=template, bos=False)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.eos_token = "<|endoftext|>"  # begins as Phi-3's other tokens do
    return tokenizer


def tokenizers(templates, begin, end):
    return {
        name: with_template(text.replace("[[", begin).replace("]]", end))
        for name, text in templates.items()
    }


TOKENIZERS = tokenizers(TEMPLATES, "", "")
MARKED = tokenizers(
    {**TEMPLATES, "phi3": PHI3_MARKED}, "{%- generation -%}", "{%- endgeneration -%}"
)


def user(content):
    return {"role": "user", "content": content}


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


def called(content="", **more):
    function = {"name": "find", "arguments": {"a": "b"}}
    calls = [{"type": "function", "function": function, "id": "abcdefghi"}]
    return said(content, tool_calls=calls, **more)


def answered(content):
    return {"role": "tool", "content": content, "tool_call_id": "abcdefghi"}


def expected(name, messages, tools=None, learned=None):
    """Token ids and the mask, by transformers; turns that are not learned are unmarked."""
    found = MARKED[name].apply_chat_template(
        messages, tools=tools, return_assistant_tokens_mask=True, return_dict=True
    )
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = iter(learned is None or learned[turn] for turn in turns)
    mask = []
    for marked, run in itertools.groupby(found["assistant_masks"]):
        mask += [bool(marked) and next(wanted)] * len(list(run))
    assert next(wanted, None) is None
    return found["input_ids"], mask


def encoded(tokenizer, messages, tools=None, learned=None):
    [(ids, mask)] = encode_chats(tokenizer, [Chat("row 7", messages, tools, learned)])
    return ids, mask


# Some are said again and again; some are trimmed, or look like marks, tags and reasoning.
words = st.sampled_from(
    ["", "a", "b", "a b ", " ok\n", "mark0", "mark", "<think>", "é<|", "a\n\nb"]
)
answers = st.builds(
    lambda content, thought, inside: (
        said(content)
        if thought is None
        else said(f"<think>\n{thought}\n</think>\n\n{content}")
        if inside
        else said(content, reasoning_content=thought)
    ),
    words,
    st.none() | st.sampled_from(["", "a", "hm\n", "b"]),
    st.booleans(),
)
CALLING = {"qwen3", "mistral"}


@st.composite
def chats(draw, name):
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(words)})
    for _ in range(draw(st.integers(1, 4))):
        messages.append(user(draw(words)))
        if name in CALLING and draw(st.booleans()):
            call = called(draw(words), **draw(st.sampled_from([{}, {"reasoning_content": "a"}])))
            messages += [call, answered(draw(words))]
        messages.append(draw(answers))
    if name == "qwen3" and draw(st.booleans()):  # it needs no alternation
        messages.append(draw(st.one_of(answers, st.builds(user, words))))
    tools = draw(st.sampled_from([None, TOOLS])) if name in CALLING else None
    return messages, tools, draw(st.lists(st.booleans(), min_size=20, max_size=20))


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_and_mask_are_those_of_marks_put_by_hand(name):
    @settings(max_examples=40, deadline=None)
    @given(chats(name), st.booleans())
    def check(chat, every):
        messages, tools, learned = chat
        learned = None if every else learned[: len(messages)]
        found = encoded(TOKENIZERS[name], messages, tools, learned)
        assert found == expected(name, messages, tools, learned)
        assert found[0] == TOKENIZERS[name].apply_chat_template(messages, tools=tools)["input_ids"]

    check()


def learned_text(name, messages, tools=None, learned=None):
    ids, mask = encoded(TOKENIZERS[name], messages, tools, learned)
    runs = itertools.groupby(zip(ids, mask, strict=True), lambda pair: pair[1])
    return [TOKENIZERS[name].decode([i for i, _ in run]) for own, run in runs if own]


def test_what_several_turns_learn_with_qwen3_and_phi3():
    chat = [user("a"), said("b", reasoning_content="hm"), user("a"), said("b")]
    assert learned_text("qwen3", chat) == ["b<|im_end|>", "<think>\n\n</think>\n\nb<|im_end|>"]
    assert learned_text("phi3", chat) == ["b<|end|>", "b<|end|>\n<|endoftext|>"]
    assert learned_text("phi3", chat[1:3]) == ["b<|end|>"]
    assert learned_text("phi3", chat, learned=[True, False, True, True]) == [
        "b<|end|>\n<|endoftext|>"
    ]


def test_reasoning_between_calls_that_is_dropped_once_a_question_follows():
    chat = [user("a"), called(reasoning_content="hm"), answered("5"), said("b")]
    call = '<tool_call>\n{"name": "find", "arguments": {"a": "b"}}\n</tool_call><|im_end|>'
    none = "<think>\n\n</think>\n\n"
    thought = f"<think>\nhm\n</think>\n\n{call}"
    assert learned_text("qwen3", chat, TOOLS) == [thought, f"{none}b<|im_end|>"]
    more = [*chat, user("c"), said("d")]
    assert learned_text("qwen3", more, TOOLS) == [call, "b<|im_end|>", f"{none}d<|im_end|>"]
    agent = [user("a"), said("<think>hm</think>x"), user("<tool_response>5</tool_response>")]
    agent = [*agent, said("b"), user("c"), said("d")]
    assert learned_text("qwen3", agent) == ["x<|im_end|>", "b<|im_end|>", f"{none}d<|im_end|>"]


def test_tools_that_are_written_before_the_last_question():
    chat = [user("a"), called("b"), answered("5"), said("b"), user("c"), said("d")]
    found = encoded(TOKENIZERS["mistral"], chat, TOOLS)
    assert found == expected("mistral", chat, TOOLS)
    assert sum(found[1]) > 9


def test_calls_that_a_template_of_several_ways_leaves_out_are_not_learned(caplog):
    chat = [user("a"), called("b"), answered("5"), said("c"), user("d"), said("e")]
    assert learned_text("phi3", chat) == ["c<|end|>", "e<|end|>\n<|endoftext|>"]
    assert "leaves out the tool calls of 1 turns" in caplog.text


CLOSED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.role == 'assistant' and loop.last and not add_generation_prompt %}<|endoftext|>"
    "{% else %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [user("a"), said("b"), user("a"), said("b")]


def test_the_last_turn_may_be_closed_by_another_token():
    tokenizer = with_template(CLOSED)
    ids, mask = encoded(tokenizer, CHAT)
    learned = tokenizer.decode([i for i, own in zip(ids, mask, strict=True) if own])
    assert learned == "b<|im_end|>b<|endoftext|>"


def test_a_turn_that_is_not_found_need_not_be_if_it_is_not_learned():
    gone = "{{ m.content if loop.last or m.role == 'user' else '(gone)' }}"
    tokenizer = with_template(CLOSED.replace("{{ m.content }}", gone))
    message = r"row 7: the chat template does not write turn 1 the same.* the weight 0 in the"
    with pytest.raises(InputError, match=message):
        encoded(tokenizer, CHAT)
    ids, mask = encoded(tokenizer, CHAT, learned=[True, False, True, True])
    assert "(gone)" in tokenizer.decode(ids)
    assert tokenizer.decode(ids[-sum(mask) :]) == "b<|endoftext|>"


def test_an_earlier_turn_without_the_think_block_of_the_prompt_is_refused():
    thinking = "\n    {{- '<|im_start|>assistant\\n<think>\\n' }}"
    template = TOKENIZERS["qwen3"].chat_template.replace(
        "\n    {{- '<|im_start|>assistant\\n' }}", thinking
    )
    tokenizer = with_template(template)
    message = "generation prompt does not begin turn 1: .*think block.*or the weight 0"
    with pytest.raises(InputError, match=message):
        encoded(tokenizer, CHAT)
    ids, mask = encoded(tokenizer, CHAT, learned=[True, False, True, True])
    learned = tokenizer.decode([i for i, own in zip(ids, mask, strict=True) if own])
    assert learned == "\n</think>\n\nb<|im_end|>"


@pytest.mark.parametrize("name", ["qwen3", "phi3", "llama3"])
def test_tokens_do_not_cross_where_a_learned_turn_begins(name):
    # This tokenizer has tokens for the end of a header with the beginning of what is said.
    tokenizer = with_template(TOKENIZERS[name].chat_template)
    tokenizer.add_tokens([AddedToken("\nq"), AddedToken("\n\nq")])
    chat = [user("q"), said("q"), user("\nq"), said("q")]
    ids, mask = encoded(tokenizer, chat)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(chat, tokenize=False)
    runs = itertools.groupby(zip(ids, mask, strict=True), lambda pair: pair[1])
    learned = [tokenizer.decode([i for i, _ in run]) for own, run in runs if own]
    assert all(text.lstrip("<think>\n/").startswith("q") for text in learned)
    assert len(learned) == 2


def test_a_space_that_a_tokenizer_puts_after_special_tokens_is_learned():
    """As Phi-3's own tokenizer puts it; the generation prompt ends with such a token."""
    backend = tiny_sentencepiece_tokenizer().backend_tokenizer
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    own = (*SPECIAL, "<|end|>")
    special = [AddedToken(t, rstrip=True, special=True, normalized=False) for t in own]
    backend.add_special_tokens(special)
    template = TOKENIZERS["phi3"].chat_template
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", chat_template=template
    )
    chat = [user("a"), said("fine it"), user("b"), said(" it is")]
    ids, mask = encoded(tokenizer, chat)
    assert ids == tokenizer.apply_chat_template(chat)["input_ids"]
    learned = [one for one, own in zip(ids, mask, strict=True) if own]
    text = "".join(tokenizer.convert_ids_to_tokens(learned))
    assert text == "▁fine▁it<|end|>▁it▁is<|end|><|endoftext|>"
