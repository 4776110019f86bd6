import os
import signal
import sys
import time

import pytest
import transformers
from packaging.version import Version

from loft_jax.data import templates as module
from loft_jax.data.templates import Chat, Start, render_chats
from loft_jax.errors import InputError
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

CHAT = [
    {"role": "system", "content": "be brief", "name": None},
    {"role": "user", "content": "two <plus> 'two' é 漢?"},
    {"role": "assistant", "content": "four", "thinking": "2+2"},
]
PARAMETERS = {"n": 0.1, "big": 2**70, "none": None}
# What transformers 5.23 makes of CHAT. Older versions keep null fields, and give a template the
# reasoning under the name that it comes with; rows are rendered with any of them as with 5.23.
GIVEN = [
    {"role": "system", "content": "be brief"},
    CHAT[1],
    {"thinking": "2+2", "role": "assistant", "content": "four", "reasoning_content": "2+2"},
]
if Version(transformers.__version__) >= Version("5.23"):
    GIVEN = CHAT
TOOLS = [{"type": "function", "function": {"name": "é", "parameters": PARAMETERS}}]

TEMPLATES = {
    "plain": CHAT_TEMPLATE,
    "special tokens": "{{ bos_token ~ eos_token ~ pad_token }}{{ unk_token is defined }}",
    "tools": "{{ tools | tojson(indent=2) }}{{ messages | tojson }}",
    "no tools": "{% if tools is none %}none{% else %}{{ tools | length }}{% endif %}",
    "null is absent": "{{ messages[0].name is defined }}",
    "reasoning": "{{ messages[-1].reasoning_content }}{{ messages[-1].thinking }}",
    "loop": "{% for m in messages %}{{ m }}{% break %}{% endfor %}",
    "white space": "  {% if true %}\n  x\n  {% endif %}\n y ",
    "marks": "{% generation %}{{ messages[-1].content }}{% endgeneration %}",
    "generation prompt": "{{ add_generation_prompt }}",
    "named": {"default": "plain {{ tools }}", "tool_use": "with {{ tools | length }}"},
}


def render(template, messages=CHAT, *, tools=None, starts=(), where="row 3"):
    tokenizer = tiny_tokenizer(chat_template=template)
    ((_, rendered),) = render_chats(tokenizer, [(Chat(where, messages, tools), starts)])
    return rendered


@pytest.mark.parametrize("tools", [None, [], TOOLS])
@pytest.mark.parametrize("name", TEMPLATES)
def test_same_text_as_transformers(name, tools):
    tokenizer = tiny_tokenizer(chat_template=TEMPLATES[name])
    found = render(TEMPLATES[name], tools=tools, starts=[Start(2, prompted=True), Start(1)])

    def expected(messages, prompted=False):
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=prompted
        )

    assert found.whole == expected(GIVEN)
    texts = [found.whole[:one] if isinstance(one, int) else one for one in found.starts]
    assert texts == [expected(GIVEN[:2], True), expected(GIVEN[:1])]


def test_starts_are_told_by_their_length_where_the_whole_has_them():
    starts = [Start(1), Start(2, prompted=True), Start(2, "x"), Start(3)]
    found = render("{% for m in messages %}[{{ m.content }}]{% endfor %}", starts=starts)
    lengths = [len("[be brief]"), len("[be brief][two <plus> 'two' é 漢?]"), len(found.whole)]
    assert found.starts == [lengths[0], lengths[1], "[be brief][x]", lengths[2]]


def test_tails_are_told_where_the_whole_has_another_start():
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    starts = [Start(1, tail=True), Start(2, prompted=True, tail=True), Start(3)]
    found = render(template, starts=starts)
    assert (found.tails, found.prompt) == ([None] * 3, None)  # nothing more is rendered
    found = render(template + "{{ '>' if add_generation_prompt else '<end>' }}", starts=starts)
    half = CHAT[1]["content"][len(CHAT[1]["content"]) // 2 :]
    assert found.tails == [(5, "rief]>"), (found.whole.index(half), f"{half}]>"), None]
    assert found.prompt == [f"{half}]<end>", f"{half}]>"]


def test_the_day_is_always_the_same_and_told_once(caplog):
    template = "{{ strftime_now('%d %b %Y') }} {{ [1, 2, 3, 4, 5, 6, 7, 8] | random }}"
    tokenizer = tiny_tokenizer(chat_template=template)
    texts = [
        rendered.whole
        for _ in range(5)
        for _, rendered in render_chats(tokenizer, [(Chat("row 3", CHAT), ())])
    ]
    assert texts[0].startswith("26 Jul 2024 ")
    assert set(texts) == {texts[0]}
    assert caplog.text.count("the chat template writes the day") == 1
    assert render("{{ messages | length }}").whole == "3"


DEEP = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}"
DOUBLING = "{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
GROWING = "{% set ns = namespace(x='ab') %}" + DOUBLING
FAULTS = {
    "{{ raise_exception('roles must alternate') }}": "roles must alternate$",
    r"{{ raise_exception('one\n two') }}": ": one two$",
    "{% for m in messages %}{% endfr %}": "unknown tag 'endfr'",
    "{{ messages[0].content + 1 }}": "TypeError: ",
    "{{ 1 // 0 }}": "ZeroDivisionError: ",
    "{{ 10 ** 5000 }}": "ValueError: ",
    "{{ 2.0 ** 5000 }}": "OverflowError: ",
    "{{ [1][5] + 1 }}": "list object has no element 5",
    "{{ messages[9].content }}": "list object has no element 9",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    DEEP: "RecursionError: ",
    GROWING: "MemoryError",
    "{{ 'ab' * 10000000 }}": "it writes more than 16777216 characters",
    "{{ raise_exception('x' * 1000000) }}": "xxx",
}


@pytest.fixture(scope="module")
def _time_enough():
    """Which limit ends a template that grows is then the same on a busy machine."""
    with pytest.MonkeyPatch.context() as patch:
        module._end_idle()
        patch.setattr(module, "_SECONDS", 60.0)
        yield
        module._end_idle()


@pytest.mark.usefixtures("_time_enough")
@pytest.mark.parametrize("template", FAULTS)
def test_errors_of_a_template_are_one_message(template):
    message = f"^row 3: the chat template refuses the messages.*{FAULTS[template]}"
    with pytest.raises(InputError, match=message) as raised:
        render(template)
    assert len(str(raised.value)) < 300
    assert render("{{ messages | length }}").whole == "3"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("", "has no chat template"),
        ({"tool_use": "a", "rag": "b"}, r"names \['rag', 'tool_use'\]; expected one .* 'default'"),
        ({"default": 3}, "chat template is 3; expected a text"),
    ],
)
def test_no_template_to_use(template, message):
    with pytest.raises(InputError, match=f"row 3: the .*{message}"):
        render(template)


def test_messages_that_are_too_deep():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InputError, match=r"row 3: cannot be given to .*: RecursionError"):
        render("x", [{**CHAT[0], "more": deep}])


def test_a_template_that_does_not_end_is_stopped(monkeypatch):
    module._end_idle()
    monkeypatch.setattr(module, "_SECONDS", 0.5)
    # Half a second is for a row: many rows may take more.
    slow = "{% for i in range(9999) %}{% for j in range(40) %}{% endfor %}{% endfor %}x"
    chats = [(Chat(f"row {i}", CHAT), ()) for i in range(70)]
    started = time.monotonic()
    assert len(list(render_chats(tiny_tokenizer(chat_template=slow), chats))) == 70
    assert time.monotonic() - started > 0.5
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    for endless in (loop, "{{ 10 ** 1000000000 }}"):
        with pytest.raises(InputError, match=r"row 3: the chat template takes more than 0\.5 sec"):
            render(endless)
    assert not module._idle


def test_a_worker_that_dies_is_told_and_replaced():
    rows = render_chats(tiny_tokenizer(), ((Chat(f"row {i}", CHAT), ()) for i in range(200)))
    for _ in range(module._ROWS):
        next(rows)
    worker = rows.gi_frame.f_locals["worker"]
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(InputError, match=r"row 64: the process .* ended, with the code -9"):
        next(rows)
    assert render("x").whole == "x"


def test_what_is_left_unread_is_not_taken_for_the_next_answer():
    tokenizer = tiny_tokenizer(chat_template="{{ messages[0].content }}")
    chats = [(Chat("row", [{"role": "user", "content": f"old {i}"}]), ()) for i in range(150)]
    rows = render_chats(tokenizer, chats)
    assert next(rows)[1].whole == "old 0"
    rows.close()
    assert render("{{ messages[0].content }}").whole == "be brief"
    every = [rendered.whole for _, rendered in render_chats(tokenizer, chats)]
    assert every == [f"old {i}" for i in range(150)]


def test_two_at_once_do_not_mix():
    tokenizer = tiny_tokenizer(chat_template="{{ messages[0].content }}")
    one, other = (
        render_chats(
            tokenizer,
            [(Chat("row", [{"role": "user", "content": f"{name}{i}"}]), ()) for i in range(70)],
        )
        for name in "ab"
    )
    for i, ((_, a), (_, b)) in enumerate(zip(one, other, strict=True)):
        assert (a.whole, b.whole) == (f"a{i}", f"b{i}")


def test_the_worker_ends_with_its_parent():
    render("x")
    worker = module._idle[-1]
    if sys.platform == "linux":
        with open(f"/proc/{worker.pid}/maps") as maps:
            assert "jaxlib" not in maps.read()
    worker.stdin.close()  # as the end of the parent does
    assert worker.wait(timeout=10) == 0
    assert render("y").whole == "y"  # by another
