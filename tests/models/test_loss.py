import jax
import numpy as np
import torch

from loft_jax.models.loss import summed_loss, token_losses


def random_batch():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 5, (3, 6, 11)).astype(np.float32)
    tokens = rng.integers(0, 11, (3, 6)).astype(np.int32)
    loss_mask = (rng.random((3, 6)) > 0.4).astype(np.float32)
    loss_mask[2] = 0
    return logits, {"tokens": tokens, "loss_mask": loss_mask}


def torch_losses(logits, batch):
    return torch.nn.functional.cross_entropy(
        torch.tensor(logits)[:, :-1].transpose(1, 2),
        torch.tensor(batch["tokens"]).long()[:, 1:],
        reduction="none",
    ).numpy()


def test_losses_are_those_of_torch_where_the_mask_is():
    logits, batch = random_batch()
    found = np.asarray(token_losses(logits, batch))
    expected = torch_losses(logits, batch) * batch["loss_mask"][:, 1:]
    np.testing.assert_allclose(found[:, :-1], expected, rtol=1e-5, atol=1e-6)
    assert (found[:, -1] == 0).all()


def test_sum_and_count():
    logits, batch = random_batch()
    total, count = summed_loss(logits, batch)
    expected = torch_losses(logits, batch) * batch["loss_mask"][:, 1:]
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-6)
    assert count == batch["loss_mask"][:, 1:].sum()


def test_gradient_is_that_of_torch_and_zero_off_the_mask():
    logits, batch = random_batch()
    found = np.asarray(jax.grad(lambda x: summed_loss(x, batch)[0])(logits))
    leaf = torch.tensor(logits, requires_grad=True)
    losses = torch.nn.functional.cross_entropy(
        leaf[:, :-1].transpose(1, 2),
        torch.tensor(batch["tokens"]).long()[:, 1:],
        reduction="none",
    )
    (losses * torch.tensor(batch["loss_mask"][:, 1:])).sum().backward()
    np.testing.assert_allclose(found, leaf.grad.numpy(), atol=1e-6)


def test_low_precision_logits_are_summed_in_float32():
    logits, batch = random_batch()
    assert token_losses(jax.numpy.asarray(logits, "bfloat16"), batch).dtype == np.float32


def test_values_off_the_mask_do_not_matter():
    logits, batch = random_batch()
    spoilt = logits.copy()
    spoilt[:, :-1][batch["loss_mask"][:, 1:] == 0] = np.nan
    np.testing.assert_array_equal(token_losses(spoilt, batch), token_losses(logits, batch))
