"""The containers, names and shapes that parameters come in: the path is the same in all of them."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import loft_jax
from tests.optim.transforms import (
    ADAMW,
    ALIASES,
    LR,
    PARAMS,
    TRANSFORMS,
    assert_close,
    assert_stable,
    each_of,
    follow,
    gradients,
    make,
    pair,
    path_of,
)

# A method with moments in bases, and one with those of Optax.
some_aliases = each_of(ALIASES, daily=("loft", "reflora_s"))


@flax.struct.dataclass
class Factors:
    lora_a: jax.Array
    lora_b: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["head", "q"], meta_fields=["name"]
)
@dataclasses.dataclass
class Model:
    head: jax.Array
    q: Factors
    name: str


def variables(tree):
    return nnx.State(
        {
            "head": nnx.Param(tree["head"]),
            "q": {key: nnx.LoRAParam(x) for key, x in tree["q"].items()},
        }
    )


@pytest.mark.parametrize(
    "container",
    [
        FrozenDict,
        lambda tree: {"params": tree},
        lambda tree: [tree["head"], tree["q"]],
        variables,
        lambda tree: nnx.as_pure(variables(tree)),
        lambda tree: Model(tree["head"], Factors(**tree["q"]), "model"),
    ],
    ids=["FrozenDict", "dict", "list", "nnx.State", "pure nnx.State", "dataclass"],
)
def test_containers(container):
    params = container(PARAMS)
    assert_stable(make("loft"), params)
    path = follow(make("loft"), params, 2)
    assert jax.tree.structure(path[-1]) == jax.tree.structure(params)
    assert_close([jax.tree.leaves(p) for p in path], [jax.tree.leaves(p) for p in path_of("loft")])


def test_nnx_optimizer():
    """As trainers on NNX hold it, Tunix's for one: variables around parameters and state."""
    layer = nnx.LoRA(5, 2, 4, rngs=nnx.Rngs(0))
    layer.lora_a[...], layer.lora_b[...] = PARAMS["q"]["lora_a"], PARAMS["q"]["lora_b"]
    optimizer = nnx.Optimizer(layer, make("loft"), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(layer, optimizer):
        optimizer.update(layer, gradients(nnx.state(layer, nnx.LoRAParam)))

    for expected in path_of("loft"):
        step(layer, optimizer)
        assert_close(nnx.to_pure_dict(nnx.state(layer)), expected["q"], 1e-3, 1e-4)


@pytest.mark.parametrize(
    ("place", "factors"),
    [
        # Flax: a LoRA module beside the base, a LoRALinear, layers in a list.
        (lambda a, b: {"q": {"kernel": {}, "lora": {"lora_a": a, "lora_b": b}}}, None),
        (lambda a, b: {"layers": [{"lora_a": a, "lora_b": b}]}, None),
        # Qwix: siblings of the weight, by its name.
        (lambda a, b: {"q": {"kernel_lora_a": a, "kernel_lora_b": b}}, None),
        (lambda a, b: {"q": {"w_lora_a": a, "w_lora_b": b}}, None),
        # PEFT's names, bare and as modules of their own with an adapter's name between.
        (lambda a, b: {"q": {"lora_A": a, "lora_B": b}}, None),
        (
            lambda a, b: {
                "q": {"lora_A": {"default": {"weight": a}}, "lora_B": {"default": {"weight": b}}}
            },
            (("lora_A/default/weight", "lora_B/default/weight"),),
        ),
        # Linen: two Dense modules.
        (
            lambda a, b: {"params": {"q": {"down": {"kernel": a}, "up": {"kernel": b}}}},
            (("down/kernel", "up/kernel"),),
        ),
    ],
)
def test_names(place, factors):
    params = place(PARAMS["q"]["lora_a"], PARAMS["q"]["lora_b"])
    expected = [jax.tree.leaves(p["q"]) for p in path_of("loft")]
    path = follow(loft_jax.loft(**ADAMW, factors=factors), params, 2)
    assert_close([jax.tree.leaves(p) for p in path], expected)


@some_aliases
def test_axes(name):
    """Factors of an einsum move as their folded forms, and stacked ones as separate ones do."""
    params = {"head": PARAMS["head"], "q": pair(0, m=6, n=4)}
    shaped = {
        **params,
        "q": {
            "lora_a": params["q"]["lora_a"].reshape(3, 2, 2),
            "lora_b": params["q"]["lora_b"].reshape(2, 2, 2),
        },
    }
    factory, numbers, others = TRANSFORMS[name]
    expected = follow(make(name), params, 2)
    path = follow(factory(**numbers, **others, stack_axis=()), shaped, 2)
    assert_close(
        [[x.ravel() for x in jax.tree.leaves(p)] for p in path],
        [[x.ravel() for x in jax.tree.leaves(p)] for p in expected],
    )


def second(tree):
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), tree)


@some_aliases
def test_stack_axis(name):
    """Layers stacked on an axis that is named, as MaxText has them, move as leading ones do."""
    leading = {"k": pair(2, m=6, n=4, stack=(3,)), "q": pair(0, m=6, n=4, stack=(3,))}
    mixed = leading | {"k": second(leading["k"])}
    factory, numbers, others = TRANSFORMS[name]
    tx = factory(**numbers, **others, stack_axis={"k": 1, "q": 0}.__getitem__)
    assert_stable(tx, mixed)
    expected = follow(make(name), leading, 2)
    assert_close(follow(tx, mixed, 2), [p | {"k": second(p["k"])} for p in expected])


def links(stack_axis=None):
    spec = loft_jax.FactorSpec(stack_axis=stack_axis)
    return optax.chain(loft_jax.project_gradients(spec=spec), optax.trace(0.9), optax.scale(-LR))


def whole(stack_axis=None):
    return loft_jax.loft(**ADAMW, stack_axis=stack_axis)


@pytest.mark.parametrize("make", [links, pytest.param(whole, marks=pytest.mark.slow)])
def test_seeds_and_steps_of_a_stack_on_axis_1(make):
    """Under `vmap` over seeds and `scan` over steps, with as many layers as input features."""

    def train(tx, params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(gradients(params), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, tx.init(params)), length=3)[1]

    seeds = [{"q": pair(seed, m=5, n=4, stack=(5,))} for seed in (0, 2)]
    leading = jax.tree.map(lambda *x: jnp.stack(x), *seeds)
    found, expected = (
        jax.jit(jax.vmap(lambda p, tx=tx: train(tx, p)))(params)
        for tx, params in (
            (make(stack_axis=1), jax.vmap(second)(leading)),
            (make(), leading),
        )
    )
    assert found["q"]["lora_a"].shape == (2, 3, 5, 5, 2)
    assert_close(found, jax.vmap(jax.vmap(second))(expected))


def test_a_leaf_may_be_a_number():
    params = {**pair(0), "scale": 1.0}
    grads = jax.tree.map(jnp.ones_like, params)
    tx = loft_jax.loft(**ADAMW)
    updates, _ = tx.update(grads, tx.init(params), params)
    expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert_close(updates, expected)
