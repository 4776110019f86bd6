import inspect
import json

import gguf
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from loft_jax.errors import InputError
from loft_jax.hub.gguf_io import open_gguf
from loft_jax.hub.gguf_tokenizer import tokenizer_metadata
from loft_jax.hub.pretrained import load_tokenizer
from tests.hub.test_gguf_io import FIELDS
from tests.tiny import SENTENCES

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


LLAMA_3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]


@pytest.fixture(scope="module")
def llama_3():
    """A small tokenizer with the steps of Llama 3's, as transformers has them."""
    pattern = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=LLAMA_3,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [*SENTENCES, "I'VE it's 1234 123 \n\n  x = {1: '!!'}\r\n"], trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{LLAMA_3[0]} $A",
        pair=f"{LLAMA_3[0]} $A {LLAMA_3[0]}:1 $B:1",
        special_tokens=[(LLAMA_3[0], 0)],
    )
    return tokenizer


def write_tokenizer(path, tokenizer, *, splitting="llama-bpe", **flags):
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in FIELDS.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((400, 32), np.float32))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in LLAMA_3 else 1 for token in tokens])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_tokens_of_llama_3_are_those_of_transformers(tmp_path, llama_3):
    ours = load_tokenizer(write_tokenizer(tmp_path / "x.gguf", llama_3))
    for text in [*TEXTS, "12345 I'VE 1234", "<|eot_id|>\n\n  a\r\n", "x" * 50]:
        expected = llama_3.encode(text).ids
        assert ours(text)["input_ids"] == expected
        assert ours.decode(expected[1:]) == text
    assert ours("a b", "c")["input_ids"] == llama_3.encode("a b", "c").ids
    assert (ours.bos_token, ours.eos_token) == ("<|begin_of_text|>", "<|eot_id|>")


def test_a_file_says_whether_a_text_starts_with_bos(tmp_path, llama_3):
    without = write_tokenizer(tmp_path / "x.gguf", llama_3, add_bos_token=False)
    assert load_tokenizer(without)("a b")["input_ids"] == llama_3.encode("a b").ids[1:]
    smollm = write_tokenizer(tmp_path / "y.gguf", llama_3, splitting="smollm", add_bos_token=True)
    assert load_tokenizer(smollm)("a b")["input_ids"][0] == 0


def test_tokens_of_qwen2_are_those_of_transformers(tmp_path, llama_3):
    trained = json.loads(llama_3.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    theirs = Qwen2Tokenizer(vocab=trained["vocab"], merges=merges, eos_token=LLAMA_3[1])
    ours = load_tokenizer(write_tokenizer(tmp_path / "x.gguf", llama_3, splitting="qwen2"))
    for text in [*TEXTS, "12345 I'VE 1234", "<|end_of_text|>\n\n  a\r\n", "e\u0301te\u0301"]:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours("1234")["input_ids"] == ours(list("1234"), is_split_into_words=True)["input_ids"]


@pytest.mark.parametrize("splitting", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_tokenizer_is_described_as_the_file_that_it_was_built_from(tmp_path, llama_3, splitting):
    path = write_tokenizer(tmp_path / "x.gguf", llama_3, splitting=splitting, add_bos_token=True)
    described = tokenizer_metadata(load_tokenizer(path), 400)
    stored = {k: v for k, v in open_gguf(path).metadata.items() if k.startswith("tokenizer.")}
    assert described == stored


def test_another_splitting_is_refused_by_name(tmp_path, llama_3):
    path = write_tokenizer(tmp_path / "x.gguf", llama_3, splitting="falcon")
    with pytest.raises(InputError, match="kind 'gpt2' with splitting 'falcon', only 'gpt2' with"):
        load_tokenizer(path)
