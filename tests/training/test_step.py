import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from loft_jax import clip_by_projected_norm, loft, project_gradients
from loft_jax.hub import load_pretrained
from loft_jax.lora import LoRAConfig, add_lora
from loft_jax.tasks.causal_lm import CausalLM, predicted
from loft_jax.training.partition import split_model
from loft_jax.training.step import initial_state, make_step

LOSS = CausalLM().loss


@pytest.fixture(scope="module")
def parts(workspace):
    config = LoRAConfig(rank=2, target_modules=("k_proj",))
    model = add_lora(load_pretrained(workspace / "model"), config, rngs=nnx.Rngs(0))
    for _, layer in nnx.iter_graph(model):
        if hasattr(layer, "lora_b"):
            layer.lora_b.set_value(0.1 * jnp.ones_like(layer.lora_b[...]))
    return split_model(model, nnx.LoRAParam)


def random_batch(seed, rows=8, length=16, learned=0.3):
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.integers(0, 400, (rows, length)).astype(np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": np.ones((rows, length), np.int32),
        "loss_mask": (rng.random((rows, length)) < learned).astype(np.float32),
    }


def plain_loss(parts, params, batch):
    """Mean cross entropy over every position, written out."""
    model = parts.merged(params, parts.streams)
    logits = model(jnp.asarray(batch["tokens"]))[:, :-1]
    targets, mask = batch["tokens"][:, 1:], batch["loss_mask"][:, 1:]
    logp = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(nll * mask) / mask.sum()


@pytest.mark.parametrize("learned", [0.1, pytest.param(1.0, marks=pytest.mark.slow)])
def test_loss_and_gradient_are_those_of_every_position(parts, learned):
    batch = random_batch(0, learned=learned)
    value, grads = jax.value_and_grad(lambda p: plain_loss(parts, p, batch))(parts.params)
    tx = optax.sgd(1.0)
    state = initial_state(parts, tx)
    after, metrics = make_step(parts, LOSS, tx)(state, parts.frozen, predicted(batch))
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - g, parts.params, grads)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), after.params, expected
    )
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)


def test_weights_are_relative(parts):
    """Those of a batch may sum to less than 1, as class weights of frequent labels do."""

    def lighter(*args, **kwargs):
        total, weight = LOSS(*args, **kwargs)
        return 1e-4 * total, 1e-4 * weight

    tx, batch = optax.sgd(1.0), predicted(random_batch(0))
    (plain, one), (light, other) = (
        make_step(parts, loss, tx)(initial_state(parts, tx), parts.frozen, batch)
        for loss in (LOSS, lighter)
    )
    np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        light.params,
        plain.params,
    )


@pytest.mark.parametrize(
    "tx",
    [optax.sgd(1.0), pytest.param(loft(1e-2, eps=1e-3), marks=pytest.mark.slow)],
    ids=["sgd", "loft"],
)
def test_accumulation_equals_the_large_batch(parts, tx):
    """Rows with very different numbers of tokens: means of means would differ."""
    batch = random_batch(1)
    batch["loss_mask"][:2] = 1
    batch["loss_mask"][2:] = 0
    batch["loss_mask"][2:, 5] = 1
    results = []
    for accumulation in (1, 4):
        state = initial_state(parts, tx)
        step = make_step(parts, LOSS, tx, accumulation)
        for seed in (None, 2, 3):
            rows = batch if seed is None else random_batch(seed)
            state, metrics = step(state, parts.frozen, predicted(rows))
        results.append((state.params, metrics["loss"]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), *results)


def test_predicted_lists_every_learned_token_once():
    batch = random_batch(5, rows=6, length=13)
    batch["loss_mask"][0] = 0
    batch["loss_mask"][1] = 1
    out = predicted(batch)
    assert out["places"].shape == out["targets"].shape == out["weights"].shape == (6, 13)
    for row in range(6):
        real = out["weights"][row] > 0
        places = out["places"][row][real]
        np.testing.assert_array_equal(places + 1, np.flatnonzero(batch["loss_mask"][row, 1:]) + 1)
        np.testing.assert_array_equal(out["targets"][row][real], batch["tokens"][row, places + 1])


def test_the_base_has_no_gradient_and_no_optimizer_state(parts):
    state = jax.eval_shape(lambda: initial_state(parts, loft(1e-3)))
    paths = jax.tree_util.tree_flatten_with_path(state.params)[0]
    assert {path[-1].key for path, _ in paths} == {"lora_a", "lora_b"}
    trained = sum(x.size for x in jax.tree.leaves(state.params))
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) < 5 * trained
    assert sum(x.size for x in jax.tree.leaves(parts.frozen)) > trained


def test_dropout_draws_anew_at_every_step(workspace):
    config = LoRAConfig(rank=2, dropout=0.5, target_modules=("q_proj",))
    model = add_lora(load_pretrained(workspace / "model"), config, rngs=nnx.Rngs(0))
    for _, layer in nnx.iter_graph(model):
        if hasattr(layer, "lora_b"):
            layer.lora_b.set_value(jnp.ones_like(layer.lora_b[...]))
    dropping = split_model(model, nnx.LoRAParam)
    tx = optax.sgd(0.0)
    step, state = make_step(dropping, LOSS, tx), initial_state(dropping, tx)
    losses = []
    for _ in range(3):
        state, metrics = step(state, dropping.frozen, predicted(random_batch(0)))
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3


def broken(batch):
    """A batch whose loss is no number."""
    batch = predicted(batch)
    return {**batch, "weights": batch["weights"] * np.float32("nan")}


def assert_equal(x, y):
    jax.tree.map(np.testing.assert_array_equal, x, y)


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(parts):
    tx = loft(1e-2, eps=1e-3, max_grad_norm=1.0)
    step = make_step(parts, LOSS, tx, max_skipped_steps=3)
    good = [predicted(random_batch(seed)) for seed in range(3)]
    bad = broken(random_batch(7))

    def run(batches):
        state, metrics = initial_state(parts, tx), {}
        for batch in batches:
            state, metrics = step(state, parts.frozen, batch)
        return state, metrics

    clean, told = run(good)
    assert clean.skipped.tolist() == [0, 0]
    assert np.isfinite(told["grad_norm"])
    mixed, _ = run([bad, good[0], bad, bad, *good[1:]])
    assert (mixed.skipped.tolist(), int(mixed.step)) == ([3, 0], 6)
    assert_equal((mixed.params, mixed.opt_state), (clean.params, clean.opt_state))
    last, told = run([*good, bad])
    assert last.skipped.tolist() == [1, 1]
    assert (np.isnan(told["loss"]), float(told["update_norm"])) == (True, 0.0)
    assert_equal((last.params, last.opt_state), (clean.params, clean.opt_state))


def test_behind_too_many_skipped_steps_nothing_moves(parts):
    """So that it does not matter when somebody looks."""
    tx = optax.sgd(1.0)
    step = make_step(parts, LOSS, tx, max_skipped_steps=2)
    state = initial_state(parts, tx)
    for batch in [broken(random_batch(0))] * 2 + [predicted(random_batch(1))]:
        state, _ = step(state, parts.frozen, batch)
    assert state.skipped.tolist() == [3, 3]
    assert_equal(state.params, parts.params)


def test_the_norm_told_is_the_one_that_clips(parts):
    """That of the full matrices, with LoFT."""
    batch = predicted(random_batch(0))
    norms = []
    for tx in (
        loft(1e-2, max_grad_norm=1e-3, second_moment="diagonal"),
        optax.chain(project_gradients(), clip_by_projected_norm(1.0)),
        optax.sgd(1.0),
    ):
        _, metrics = make_step(parts, LOSS, tx)(initial_state(parts, tx), parts.frozen, batch)
        norms.append(float(metrics["grad_norm"]))
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-6)
    assert abs(norms[2] / norms[0] - 1) > 0.1


def test_the_optimizer_is_compiled_once_for_all_lengths(parts):
    inner, traced = optax.adam(1e-2), []

    def update(grads, state, params):
        traced.append(jax.tree.leaves(grads)[0].shape)
        return inner.update(grads, state, params)

    tx = optax.GradientTransformation(inner.init, update)
    step, state = make_step(parts, LOSS, tx), initial_state(parts, tx)
    for length in (8, 16, 8):
        batch = predicted(random_batch(0, rows=2, length=length))
        state, _ = step(state, parts.frozen, batch)
    assert len(traced) == 1


def test_as_one_program_a_step_is_the_same(parts):
    tx = optax.adam(1e-2)
    step, batch = make_step(parts, LOSS, tx), predicted(random_batch(0, rows=2, length=8))
    whole = step.lower(initial_state(parts, tx), parts.frozen, batch).compile()
    found = step(initial_state(parts, tx), parts.frozen, batch)
    expected = whole(initial_state(parts, tx), parts.frozen, batch)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), *(found, expected)
    )
