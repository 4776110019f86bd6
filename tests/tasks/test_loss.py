"""The loss of a language model, against torch's."""

import jax
import numpy as np
import torch

from loft_jax.tasks.causal_lm import CausalLM, predicted


class Given:
    """A model that gives logits as they are."""

    def __init__(self, logits):
        self.given = logits

    def hidden_states(self, tokens, **_):
        return self.given, None

    def logits(self, hidden):
        return hidden


def random_batch():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 5, (3, 6, 11)).astype(np.float32)
    tokens = rng.integers(0, 11, (3, 6)).astype(np.int32)
    loss_mask = (rng.random((3, 6)) > 0.4).astype(np.float32)
    loss_mask[2] = 0
    batch = {"tokens": tokens, "loss_mask": loss_mask}
    return logits, batch | dict.fromkeys(("positions", "segment_ids"), np.ones_like(tokens))


def loss(logits, batch):
    return CausalLM().loss(Given(logits), predicted(batch))


def torch_loss(logits, batch):
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2),
        torch.tensor(batch["tokens"]).long()[:, 1:],
        reduction="none",
    )
    return (losses * torch.tensor(batch["loss_mask"][:, 1:])).sum()


def test_sum_and_count():
    logits, batch = random_batch()
    total, count = loss(logits, batch)
    np.testing.assert_allclose(total, torch_loss(torch.tensor(logits), batch), rtol=1e-6)
    assert count == batch["loss_mask"][:, 1:].sum()


def test_gradient_is_that_of_torch_and_zero_off_the_mask():
    logits, batch = random_batch()
    found = np.asarray(jax.grad(lambda x: loss(x, batch)[0])(logits))
    leaf = torch.tensor(logits, requires_grad=True)
    torch_loss(leaf, batch).backward()
    np.testing.assert_allclose(found, leaf.grad.numpy(), atol=1e-6)


def test_values_off_the_mask_do_not_matter():
    logits, batch = random_batch()
    spoilt = logits.copy()
    spoilt[:2, :-1][batch["loss_mask"][:2, 1:] == 0] = 1e6
    spoilt[:, -1] = np.nan
    np.testing.assert_array_equal(loss(spoilt, batch), loss(logits, batch))


def test_low_precision_logits_are_summed_in_float32():
    logits, batch = random_batch()
    rounded = jax.numpy.asarray(logits, "bfloat16")
    total, _ = loss(rounded, batch)
    assert total.dtype == np.float32
    np.testing.assert_array_equal(total, loss(rounded.astype("float32"), batch)[0])
