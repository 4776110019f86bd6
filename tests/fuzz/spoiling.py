"""Ways to spoil a file: edits of its bytes, and of the values of its JSON."""

import json
from typing import Any

from hypothesis import strategies as st

_DEEP = 20_000

# What readers stumble over, whatever the format.
_FRAGMENTS = [
    b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"[" * _DEEP, b'{"a":' * _DEEP, b"(" * _DEEP, b"- " * 5000,
    b"9" * 400, b"1e999", b"NaN", b"-Infinity", b"\r", b'"', b",", b"\xef\xbb\xbf", b"\n\n",
    b"&a [*a, *a]", b"*a", b"<<: *a", b"!!python/object/apply:os.system ['true']", b"? ",
    b"a: &a [x]\nb: &b [*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b]\nd: [*c,*c,*c,*c,*c,*c]\n",
    b"{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    b"{{ 'a' * 10**10 }}", b"{{ 10 ** 10 ** 9 }}", b"{{ 1 / 0 }}", b"{{ [1]['x'] }}",
    b"{{ 'a' + 1 }}", b"{{ messages.__class__.__mro__ }}", b"{% if %}", b"{{ lipsum(n=10**7) }}",
    b"{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", b"{{ '%9999999999d' % 1 }}",
    b"{{ 'a'.ljust(10**10) }}", b"{{ raise_exception('no') }}", b"{{ strftime_now('%Y') }}",
    b"{% set x = messages %}",
]  # fmt: skip

_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**9, 10**400, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "\0", "../x", "/dev/zero", "/etc/passwd", "x" * 100_000, "é\u2028", [],
    {}, [None], [[]], {"": None}, [1] * 10_000, "(?:.|..|...|....)+[^a-z._0-9]", "(", "a{99999}{9}",
    ["x"] * 1000, {"x": {"x": {"x": 1}}}, "{{ 'a' * 10**10 }}", "LlamaForCausalLM", "lora", "BPE",
    {"type": "Replace", "pattern": {"Regex": "(a|aa)+$"}, "content": "aa"}, {"type": "Sequence"},
    {"type": "Split", "pattern": {"Regex": "(.|..)+b"}, "behavior": "Isolated", "invert": False},
]  # fmt: skip

_nested: Any = [[]]
for _ in range(300):
    _nested = [_nested]
_VALUES.append(_nested)

_value = st.sampled_from(_VALUES) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@st.composite
def spoilt(draw: st.DrawFn, good: bytes) -> bytes:
    """The bytes of a file with one to four things wrong."""
    content = good
    values = _decoded(good)
    if values is not None and draw(st.integers(0, 3)):
        for _ in range(draw(st.integers(1, 3))):
            place = draw(st.integers(0, len(values) - 1))
            values[place] = _edited(draw, values[place])
        text = "\n".join(json.dumps(value) for value in values)
        content = text.encode("utf-8", "surrogatepass")
        if draw(st.booleans()):
            return content
    for _ in range(draw(st.integers(1, 3))):
        content = _bytes_edited(draw, content)
    return content


def _decoded(content: bytes) -> list[Any] | None:
    """The JSON values of a file, one a line or one in all; None where it is no JSON."""
    try:
        return [json.loads(content)]
    except ValueError:
        pass
    try:
        return [json.loads(line) for line in content.splitlines()]
    except ValueError:
        return None


def _edited(draw: st.DrawFn, value: Any) -> Any:
    """A value with something in it replaced, removed or added."""
    if not isinstance(value, (dict, list)) or not value or not draw(st.integers(0, 7)):
        return draw(_value)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[draw(st.integers(0, len(keys) - 1))]
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    what = draw(st.integers(0, 9))
    if what == 0:
        del copy[key]
    elif what == 1 and isinstance(copy, dict):
        copy[draw(st.text(max_size=10))] = draw(_value)
    elif what == 2 and isinstance(copy, list):
        copy.insert(key, draw(_value))
    else:
        copy[key] = _edited(draw, value[key])
    return copy


def _bytes_edited(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes cut off, flipped, overwritten, doubled, removed, or with a fragment put between."""
    place = draw(st.integers(0, len(content)))
    size = draw(st.integers(1, 16))
    what = draw(st.integers(0, 6))
    if what == 0:
        return content[:place]
    if what == 1:
        return content[:place] + content[place + size :]
    if what == 2:
        return content[:place] + content[place : place + 64] + content[place:]
    if what == 3:
        return content[:place] + draw(st.sampled_from(_FRAGMENTS)) + content[place:]
    if what == 4:
        return draw(st.sampled_from(_FRAGMENTS)) + content
    new = draw(st.binary(min_size=size, max_size=size))
    if what == 5:  # a header holds its counts here
        place = min(place, draw(st.integers(0, 64)))
    return content[:place] + new + content[place + size :]
