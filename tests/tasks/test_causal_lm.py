import gc
import math

import numpy as np
import pytest
from flax import nnx

from loft_jax.data import DataConfig, eval_batches, tokenize
from loft_jax.errors import InputError
from loft_jax.tasks import causal_lm as module
from loft_jax.tasks.causal_lm import Perplexity, perplexity, predicted
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CONFIG = DataConfig("rows", max_length=40)
ROWS = [
    {"prompt": "Review: a joy\nSentiment:", "completion": " positive"},
    {"prompt": "Review: dull, loud and far too long\nSentiment:", "completion": " negative"},
    {"prompt": "two plus two?", "completion": " four, quite sure"},
    {"prompt": "", "completion": "the plot goes nowhere"},
    {"prompt": "the", "completion": " acting"},
]


def torch_losses(folder, data):
    """Negative log-likelihood of every token that carries the loss, one example at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    losses = []
    for tokens, mask in data:
        ids = torch.tensor(np.asarray(tokens)[None]).long()
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].double().log_softmax(-1)
        losses += (-scores.gather(1, ids[0, 1:, None])[:, 0][mask[1:]]).tolist()
    return losses


def test_mean_over_tokens_is_that_of_torch(tiny_llama):
    folder, model = tiny_llama
    data = tokenize(ROWS, TOKENIZER, CONFIG)
    expected = torch_losses(folder, data)
    for batch_size in (2, 5, 8):
        batches = eval_batches(data, CONFIG, batch_size=batch_size)
        found = perplexity(model, batches, progress=False)
        np.testing.assert_allclose(found.nll, np.mean(expected), rtol=1e-5)
        assert found.tokens == len(expected)
        np.testing.assert_allclose(found.perplexity, math.exp(np.mean(expected)), rtol=1e-4)


class Bigram(nnx.Module):
    """Logits that depend on the last token alone, behind dropout."""

    def __init__(self, vocab):
        table = np.random.default_rng(0).normal(0, 2, (vocab, vocab))
        self.table = nnx.Param(table.astype(np.float32))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def hidden_states(self, tokens, *, positions, segment_ids):
        return self.dropout(self.table[...][tokens]), None

    def logits(self, hidden):
        return hidden


def test_evaluation_is_without_dropout_and_leaves_the_model_training():
    model = Bigram(len(TOKENIZER))
    data = tokenize(ROWS, TOKENIZER, CONFIG)
    found = perplexity(model, eval_batches(data, CONFIG, batch_size=2), progress=False)
    table = np.asarray(model.table[...], np.float64)
    scores = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    expected = [-scores[ids[:-1], ids[1:]][mask[1:]] for ids, mask in data]
    np.testing.assert_allclose(found.nll, np.concatenate(expected).mean(), rtol=1e-6)
    assert model.dropout.deterministic is False


def test_compiled_once_a_shape_over_several_evaluations():
    model = Bigram(len(TOKENIZER))
    data = tokenize(ROWS, TOKENIZER, CONFIG)
    batches = eval_batches(data, CONFIG, batch_size=3)
    gc.collect()  # models that die later would be counted off
    before = module._sums._cache_size()
    for _ in range(2):
        perplexity(model, batches, progress=False)
        model.table[...] *= 0.9  # as training does between evaluations
    compiled = module._sums._cache_size() - before
    shapes = {(batch["tokens"].shape, predicted(batch)["places"].shape) for batch in batches}
    assert compiled == len(shapes)


def test_nothing_to_predict():
    with pytest.raises(InputError, match="no token to predict"):
        perplexity(Bigram(8), [], progress=False)


def test_perplexity_of_a_hopeless_model_is_infinite():
    assert Perplexity(nll=1e4, tokens=1).perplexity == math.inf
