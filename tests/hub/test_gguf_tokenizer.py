import pytest
from transformers import AutoTokenizer

from loft_jax.hub.gguf_io import open_gguf
from loft_jax.hub.pretrained import load_tokenizer

TEXTS = [
    "Review: it's a joy, from start to finish.\nSentiment:",
    "  spaces   and\n\n\nlines\t tabs ",
    "été, 你好, naïve — “quotes” 🙂",
    "def f(x):\n    return x ** 2  # don't\n",
    "<|im_start|>user\nhello<|im_end|>\n",
]


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return load_tokenizer(smollm2)


@pytest.fixture(scope="module")
def theirs(smollm2):
    return AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_transformers(tokenizer, theirs, text):
    assert tokenizer(text)["input_ids"] == theirs(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_stand_alone(tokenizer):
    """As SmolLM2 was trained: the space before a number is not part of its first digit."""
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("in  1984, 2²")["input_ids"])
    assert tokens == ["in", "ĠĠ", "1", "9", "8", "4", ",", "Ġ", "2", "Â²"]


def test_special_tokens_and_chat_template(smollm2, tokenizer):
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.unk_token == "<|endoftext|>"
    assert len(tokenizer) == 49152
    vocabulary = open_gguf(smollm2).field("tokenizer.ggml.tokens")
    assert tokenizer.convert_ids_to_tokens(range(49152)) == vocabulary
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_saved_tokenizer_is_the_same(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "1984"]:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    assert again.eos_token == tokenizer.eos_token
