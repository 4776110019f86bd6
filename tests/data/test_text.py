import pytest

from loft_jax.data.text import check_tokens, decoded, encode_continuations, encode_starts
from loft_jax.errors import InputError
from tests.tiny import tiny_sentencepiece_tokenizer, tiny_tokenizer


def test_start_has_bos_once_as_the_tokenizer_adds_it():
    tokenizer = tiny_tokenizer()
    plain, marked, empty = encode_starts(tokenizer, ["a joy", "<s>a joy", ""])
    assert plain == marked == tokenizer("a joy")["input_ids"]
    assert plain.count(tokenizer.bos_token_id) == 1
    assert empty == [tokenizer.bos_token_id]


def test_start_has_no_bos_if_the_tokenizer_adds_none():
    tokenizer = tiny_tokenizer(bos=False)
    assert encode_starts(tokenizer, ["a joy", ""]) == [tokenizer("a joy")["input_ids"], []]


def test_start_has_no_eos_though_the_tokenizer_adds_it():
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert tokenizer("a joy")["input_ids"][-1] == tokenizer.eos_token_id
    assert encode_starts(tokenizer, ["a joy"]) == [tokenizer("a joy")["input_ids"][:-1]]


@pytest.mark.parametrize(
    ("single", "first", "last"),
    [("<s> $A", 1, 0), ("<s> <|start|> $A", 2, 0), ("<s>:0 <s>:0 <|start|> $A </s>", 3, 1)],
)
def test_start_has_all_that_the_tokenizer_puts_first(single, first, last):
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2), ("<|start|>", 3)]
    )
    for text in ("a joy", "", " a"):
        whole = tokenizer(text)["input_ids"]
        expected = whole[: len(whole) - last]
        typed = tokenizer.decode(expected[:first]) + text
        assert encode_starts(tokenizer, [text, typed]) == [expected, expected]


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("decode", lambda tokenizer: decoded(tokenizer, [5])),
        ("convert_ids_to_tokens", lambda tokenizer: encode_continuations(tokenizer, ["a"])),
        ("convert_ids_to_tokens", lambda tokenizer: check_tokens([9], tokenizer, 5, where="x")),
    ],
)
def test_tokenizer_that_fails(monkeypatch, method, call):
    def fail(*args, **kwargs):
        raise RuntimeError("lost")

    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(tokenizer, method, fail)
    with pytest.raises(InputError, match=r"the tokenizer cannot \w+ (a token|tokens): lost"):
        call(tokenizer)


@pytest.mark.parametrize("make", [tiny_tokenizer, tiny_sentencepiece_tokenizer])
@pytest.mark.parametrize("continuation", [" positive", "positive", "\n\nfour", " ", "", "é 漢"])
def test_start_and_continuation_spell_the_text_between_them(make, continuation):
    tokenizer = make()
    (start,), (end,) = (
        encode_starts(tokenizer, ["Sentiment:"]),
        encode_continuations(tokenizer, [continuation]),
    )
    decoder = tokenizer.backend_tokenizer.decoder
    spelled = decoder.decode(tokenizer.convert_ids_to_tokens([*start[1:], *end]))
    assert spelled == "Sentiment:" + continuation


def test_no_texts():
    assert encode_starts(tiny_tokenizer(), []) == encode_continuations(tiny_tokenizer(), []) == []
