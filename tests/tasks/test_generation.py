import dataclasses
import gc
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from transformers import AutoModelForCausalLM

from loft_jax import generation as module
from loft_jax.data.encode import encode_prompts
from loft_jax.errors import InputError
from loft_jax.generation import Sampling, generate, generate_text, stream_text
from loft_jax.lora import LoRAConfig, add_lora
from tests.tiny import tiny_sentencepiece_tokenizer, tiny_tokenizer

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(5, 400, length).tolist() for length in (3, 17, 8)]


def torch_greedy(folder, prompt, count, eos):
    model = AutoModelForCausalLM.from_pretrained(folder)
    new = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return new[0, len(prompt) :].tolist()


def test_greedy_equals_transformers_in_a_batch_of_unequal_prompts(tiny_llama):
    folder, model = tiny_llama
    found = generate(model, PROMPTS, max_new_tokens=25, eos_token_ids=())
    assert found == [torch_greedy(folder, prompt, 25, None) for prompt in PROMPTS]


def test_each_row_ends_at_its_own_ending_token(tiny_llama):
    folder, model = tiny_llama
    free = generate(model, PROMPTS, max_new_tokens=25, eos_token_ids=())
    ends = [free[0][4], free[2][9]]
    found = generate(model, PROMPTS, max_new_tokens=25, eos_token_ids=ends)
    assert found == [torch_greedy(folder, prompt, 25, ends) for prompt in PROMPTS]
    assert len(found[0]) <= 5


def test_stop_tokens_of_the_configuration_are_those_of_transformers(tiny_llama):
    folder, model = tiny_llama
    free = generate(model, PROMPTS, max_new_tokens=25, eos_token_ids=())
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, state)
    for ends in ((free[0][4], free[2][9]), (400, free[0][2]), free[1][0]):  # 400 has no weights
        model.config = dataclasses.replace(model.config, eos_token_id=ends)
        expected = list(ends) if isinstance(ends, tuple) else ends
        found = generate(model, PROMPTS, max_new_tokens=25)
        assert found == [torch_greedy(folder, prompt, 25, expected) for prompt in PROMPTS]
        assert min(map(len, found)) <= 5


def test_one_compilation_serves_lengths_of_one_bucket(tiny_llama):
    _, model = tiny_llama
    gc.collect()  # models that die later would be counted off the cleared cache
    module._advance.clear_cache()
    for prompts, count in ((PROMPTS, 3), ([[1], [2, 3], [4]], 7), (PROMPTS[::-1], 9)):
        new = generate(model, prompts, max_new_tokens=count, eos_token_ids=())
        assert [len(row) for row in new] == [count] * 3
    assert module._advance._cache_size() == 1


def test_sampling_follows_its_seed(tiny_llama):
    _, model = tiny_llama
    draw = lambda seed: generate(  # noqa: E731
        model, PROMPTS, max_new_tokens=8, sampling=Sampling(1.0, seed=seed), eos_token_ids=()
    )
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_narrow_sampling_is_greedy(tiny_llama):
    _, model = tiny_llama
    greedy = generate(model, PROMPTS, max_new_tokens=8, eos_token_ids=())
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}):
        sampling = Sampling(**{"temperature": 1.0} | narrow)
        found = generate(model, PROMPTS, max_new_tokens=8, eos_token_ids=(), sampling=sampling)
        assert found == greedy


@pytest.mark.parametrize(("top_k", "top_p", "kept"), [(400, 0.7, 2), (3, 1.0, 3), (2, 0.99, 2)])
def test_only_the_likely_tokens_can_be_drawn(top_k, top_p, kept):
    probabilities = np.array([[0.1, 0.4, 0.05, 0.35, 0.1 - 1e-3, 1e-3]])
    left = left_of(np.log(probabilities), top_k=top_k, top_p=top_p)
    order = np.argsort(-probabilities[0], kind="stable")[: np.isfinite(left).sum()]
    assert np.isfinite(left).sum() == kept
    np.testing.assert_allclose(left[0, order], np.log(probabilities[0, order]), rtol=1e-6)


def left_of(logits, *, temperature=1.0, top_k=10**6, top_p=1.0, min_p=0.0, penalty=1.0, seen=None):
    """Logits after all that a sampling does to them, -inf for tokens that cannot be drawn."""
    choice = module._Choice(temperature, top_k, top_p, min_p, penalty, None, None)
    seen = np.zeros(np.shape(logits), bool) if seen is None else seen
    logits = module._penalized(jnp.asarray(logits, jnp.float32), seen, penalty)
    return np.asarray(module._truncated(logits / temperature, choice))


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"penalty": 1.4},
        {"top_k": 12, "top_p": 0.7},
        {"temperature": 0.6, "top_k": 30, "top_p": 0.9, "min_p": 0.05, "penalty": 1.2},
        {"temperature": 1.7, "top_p": 0.95, "min_p": 0.1, "penalty": 0.8},
    ],
    ids=str,
)
def test_what_can_be_drawn_is_that_of_the_logits_processors_of_transformers(options):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3, 60), scale=2.0).astype(np.float32)
    prompts = rng.integers(0, 60, (3, 20))
    seen = np.zeros((3, 60), bool)
    np.put_along_axis(seen, prompts, True, axis=-1)
    processors = [
        transformers.RepetitionPenaltyLogitsProcessor(options.get("penalty", 1.0)),
        transformers.TemperatureLogitsWarper(options.get("temperature", 1.0)),
        transformers.TopKLogitsWarper(options.get("top_k", 60)),
        transformers.TopPLogitsWarper(options.get("top_p", 1.0)),
        transformers.MinPLogitsWarper(options.get("min_p", 0.0)),
    ]
    expected = transformers.LogitsProcessorList(processors)(
        torch.tensor(prompts), torch.tensor(logits)
    )
    found = left_of(logits, **options, seen=seen)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
    assert np.any(found != logits)


def test_a_penalty_of_repetition_is_that_of_transformers(tiny_llama):
    folder, model = tiny_llama
    options = {"max_new_tokens": 25, "eos_token_ids": ()}
    found = generate(model, PROMPTS, sampling=Sampling(repetition_penalty=1.5), **options)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    for prompt, new in zip(PROMPTS, found, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=25,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            repetition_penalty=1.5,
        )
        assert new == expected[0, len(prompt) :].tolist()
    assert found != generate(model, PROMPTS, **options)


def test_dropout_is_off_and_stays_as_it_was(tiny_llama):
    _, model = tiny_llama
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, state)
    add_lora(model, LoRAConfig(rank=2, dropout=0.9, target_modules=["v_proj"]), rngs=nnx.Rngs(0))
    model.layers.self_attn.v_proj.lora_b[...] += 0.1
    once = generate(model, PROMPTS, max_new_tokens=5)
    assert once == generate(model, PROMPTS, max_new_tokens=5)
    assert not model.layers.self_attn.v_proj.lora_dropout.deterministic


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(tiny_llama, bad):
    _, whole = tiny_llama
    graphdef, state = nnx.split(whole)
    model = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))
    new = generate(model, PROMPTS, max_new_tokens=5, eos_token_ids=())
    seen = {token for prompt in PROMPTS for token in prompt}
    late = next(token for token in new[0] if token not in seen)
    model.embed_tokens.embedding[...] = model.embed_tokens.embedding[...].at[late].set(bad)
    with pytest.raises(InputError, match="the model's output is no number; expected finite"):
        generate(model, PROMPTS, max_new_tokens=5, eos_token_ids=())


def test_more_likely_tokens_than_there_are(tiny_llama):
    _, model = tiny_llama
    draw = lambda top_k: generate(  # noqa: E731
        model, PROMPTS, max_new_tokens=5, sampling=Sampling(1.0, top_k=top_k)
    )
    assert draw(2**70) == draw(None)


def test_text_in_and_out(tiny_llama):
    folder, model = tiny_llama
    tokenizer = tiny_tokenizer()
    texts = ["a joy", "Review: dull"]
    expected = [
        tokenizer.decode(
            torch_greedy(folder, tokenizer(text)["input_ids"], 6, 2), skip_special_tokens=True
        )
        for text in texts
    ]
    assert generate_text(model, tokenizer, texts, max_new_tokens=6) == expected


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=3)], ids=str)
def test_a_streamed_text_is_the_same(tiny_llama, sampling):
    _, model = tiny_llama
    tokenizer = tiny_tokenizer()
    options = {"max_new_tokens": 12, "sampling": sampling}
    pieces = list(stream_text(model, tokenizer, "a joy", **options))
    assert generate_text(model, tokenizer, ["a joy"], **options) == ["".join(pieces)]
    assert len(pieces) > 1


def test_a_piece_is_decoded_beside_the_end_of_the_prompt_only(tiny_llama, monkeypatch):
    _, model = tiny_llama
    tokenizer, lengths, decoded = tiny_tokenizer(), [], module.decoded

    def counted(tokenizer, ids, **options):
        lengths.append(len(ids))
        return decoded(tokenizer, ids, **options)

    monkeypatch.setattr(module, "decoded", counted)
    prompt = "a joy " * 30
    pieces = list(stream_text(model, tokenizer, prompt, max_new_tokens=4))
    assert max(lengths) <= module._NEAR + 4
    assert generate_text(model, tokenizer, [prompt], max_new_tokens=4) == ["".join(pieces)]


def test_a_character_of_several_tokens_is_streamed_whole(tiny_llama, monkeypatch):
    _, model = tiny_llama
    tokenizer = tiny_tokenizer()
    ids = tokenizer("né!")["input_ids"][1:]
    assert len(ids) == 4  # two of them for the second letter
    done = []
    monkeypatch.setattr(module._Generation, "advance", lambda *_: done.append(1) or len(done) < 4)
    monkeypatch.setattr(module._Generation, "tokens", lambda *_: [ids[: len(done)]])
    assert list(stream_text(model, tokenizer, "a", max_new_tokens=9)) == ["n", "é", "!"]


def test_the_space_before_the_first_word_is_kept(monkeypatch):
    """Which tokenizers with a space before every text drop from new tokens alone."""
    tokenizer = tiny_sentencepiece_tokenizer()
    ids = tokenizer("a joy of a film")["input_ids"]
    known = tokenizer("a joy")["input_ids"]
    assert ids[: len(known)] == known
    new = ids[len(known) :]
    assert tokenizer.decode(new) == "of a film"
    generation = SimpleNamespace(advance=lambda _: False, tokens=lambda: [new])
    monkeypatch.setattr(module, "_Generation", lambda *_: generation)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=500, eos_token_id=None))
    assert generate_text(model, tokenizer, ["a joy"], max_new_tokens=9) == [" of a film"]
    assert list(stream_text(model, tokenizer, "a joy", max_new_tokens=9)) == [" of a film"]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = [{"role": "user", "content": "a joy"}]
    assert generate_text(model, tokenizer, [chat], max_new_tokens=9) == ["of a film"]


def bytes_tokenizer():
    """Of two letters and all bytes, with a space before every text, as that of Llama 2."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    known = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    vocabulary = {token: number for number, token in enumerate(known)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*spaces, decoders.Strip(content=" ", left=1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        *[("a", " a"), ("a ", " a"), ("a 😀", "😀a"), ("a中", "文"), ("a😀", " a")],
        *[("a" + "中" * 9, "文"), ("a" + "中" * 9, " a"), ("a " * 20, " a")],  # long
    ],
)
def test_a_continuation_is_what_the_whole_text_has_more(monkeypatch, prompt, text):
    """Also where tokens of one character are next to those of another."""
    tokenizer = bytes_tokenizer()
    before = tokenizer(prompt)["input_ids"]
    new = tokenizer(prompt + text)["input_ids"][len(before) :]
    generation = SimpleNamespace(done=0)

    def advance(count):
        generation.done = count
        return count < len(new)

    generation.advance, generation.tokens = advance, lambda: [new[: generation.done]]
    monkeypatch.setattr(module, "_Generation", lambda *_: generation)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=500, eos_token_id=None))
    assert "".join(stream_text(model, tokenizer, prompt, max_new_tokens=9)) == text
    generation.advance(len(new))
    assert generate_text(model, tokenizer, [prompt], max_new_tokens=9) == [text]


def test_prompts_are_encoded_as_in_training(tiny_llama):
    from tokenizers import processors

    folder, model = tiny_llama
    plain, ending = tiny_tokenizer(), tiny_tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert ending("a joy")["input_ids"][-1] == 2
    ids = plain("a joy")["input_ids"]
    expected = plain.decode(torch_greedy(folder, ids, 6, 2), skip_special_tokens=True)
    for tokenizer, text in ((plain, "<s>a joy"), (ending, "a joy"), (ending, "<s>a joy")):
        assert generate_text(model, tokenizer, [text], max_new_tokens=6) == [expected]


REASONING = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def test_conversations_go_on_where_a_template_changes_earlier_turns():
    """As those do that leave out the reasoning of all turns but the last."""
    tokenizer = tiny_tokenizer(chat_template=REASONING)
    said = ["two?", "2", "three?", "3", "four?"]
    roles = ["user", "assistant"] * 3
    chat = [{"role": r, "content": c} for r, c in zip(roles, said, strict=False)]
    (found,) = encode_prompts(tokenizer, [chat])
    assert found == tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )


def test_token_that_the_model_has_no_weights_for(tiny_llama):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<|{i}|>" for i in range(401 - len(tokenizer))], special_tokens=True)
    last = tokenizer.convert_ids_to_tokens([400])[0]
    with pytest.raises(InputError, match=r"prompt 1: .* token 400 .*the weights have 400 rows"):
        generate_text(tiny_llama[1], tokenizer, ["a", f"b {last}"], max_new_tokens=2)


def test_no_prompts_no_texts(tiny_llama):
    assert generate(tiny_llama[1], [], max_new_tokens=5) == []


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([[1, 400]], {}, "prompt 0 has tokens outside the vocabulary, 0 to 399"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"max_new_tokens": 2**40}, "expected 1 to 1048576 (2^20)"),
        ([[1]], {"max_new_tokens": 10**5000}, "max_new_tokens is <int>"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny_llama, prompts, options, said):
    with pytest.raises(InputError) as raised:
        generate(tiny_llama[1], prompts, **{"max_new_tokens": 2} | options)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1e-45}, "temperature is 1e-45, expected 0, or 1e-06 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"min_p": 1.5}, "min_p is 1.5, expected 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, expected a positive number"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"top_k": 5}, "top_k is 5 at temperature 0"),
        ({"min_p": 0.1}, "min_p is 0.1 at temperature 0"),
    ],
)
def test_a_sampling_that_makes_no_sense_is_refused(options, said):
    with pytest.raises(InputError) as raised:
        Sampling(**options)
    assert said in str(raised.value)
