import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from loft_jax.tasks import token_losses as module
from loft_jax.tasks.token_losses import token_losses, token_losses_in_parts

ROWS, LENGTH, WIDTH, VOCAB, COUNT = 2, 6, 4, 11, 5


class Head:
    def __init__(self, table):
        self.table = table

    def logits(self, hidden):
        return hidden @ self.table


def problem():
    rng = np.random.default_rng(0)
    hidden = 3 * rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    table = rng.normal(size=(WIDTH, VOCAB)).astype(np.float32)
    places = rng.integers(0, LENGTH, (ROWS, COUNT)).astype(np.int32)
    targets = rng.integers(0, VOCAB, (ROWS, COUNT)).astype(np.int32)
    return hidden, table, places, targets


def weighted(hidden, table, places, targets):
    return (token_losses(Head(table), hidden, places, targets) * jnp.arange(COUNT)).sum()


def test_losses_and_gradients_are_those_of_torch():
    hidden, table, places, targets = problem()
    theirs = [torch.tensor(x, requires_grad=True) for x in (hidden, table)]
    chosen = theirs[0].gather(1, torch.tensor(places).long()[..., None].expand(-1, -1, WIDTH))
    losses = torch.nn.functional.cross_entropy(
        (chosen @ theirs[1]).transpose(1, 2), torch.tensor(targets).long(), reduction="none"
    )
    found = token_losses(Head(table), hidden, places, targets)
    np.testing.assert_allclose(found, losses.detach(), rtol=1e-5)
    (losses * torch.arange(COUNT)).sum().backward()
    gradients = jax.grad(weighted, argnums=(0, 1))(hidden, table, places, targets)
    for ours, other in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(ours, other.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limit", [1, 3 * ROWS * VOCAB, 2**25], ids=["one", "three", "all"])
def test_in_parts_they_are_the_same_and_never_all_logits(limit, monkeypatch):
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", limit)
    hidden, table, places, targets = problem()

    def evaluated(hidden):
        return token_losses_in_parts(Head(table), hidden, places, targets)

    found = evaluated(hidden)
    np.testing.assert_allclose(found, token_losses(Head(table), hidden, places, targets), rtol=1e-6)
    has_all = f"{ROWS},{COUNT},{VOCAB}]" in str(jax.make_jaxpr(evaluated)(hidden))
    assert has_all == (limit == 2**25)


def test_shards_of_rows_share_the_limit_of_logits_at_once(monkeypatch):
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", ROWS * VOCAB)
    hidden, table, places, targets = problem()

    def largest_part():
        made = jax.make_jaxpr(
            lambda hidden: token_losses_in_parts(Head(table), hidden, places, targets)
        )(hidden)
        return max(k for k in range(1, COUNT + 1) if f"{ROWS},{k},{VOCAB}]" in str(made))

    assert largest_part() == 1
    mesh = jax.sharding.AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
    with jax.sharding.use_abstract_mesh(mesh):
        assert largest_part() == 4
