"""Modules of one's own: an einsum class as Tunix has it, and modules with raw weights."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from loft_jax import load_peft_adapter, loft, save_peft_adapter
from loft_jax.errors import InputError
from loft_jax.lora import (
    LoRAConfig,
    add_lora,
    lora_layers,
    merge_lora,
    register_lora_layer,
    remove_lora,
)


class Einsum(nnx.Module):
    def __init__(self, einsum_str, shape, *, rngs, dtype="float32"):
        self.einsum_str = einsum_str
        self.shape = shape
        self.w = nnx.Param(rngs.params.normal(shape, dtype))

    @jax.named_scope("einsum")
    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w[...])


class Scaled(Einsum):
    def __call__(self, x):
        return 2 * super().__call__(3 * x)


class Embedder(nnx.Module):
    """A weight that two methods read, and one of them within remat."""

    def __init__(self, vocab, width, *, rngs, dtype="float32"):
        self.table = nnx.Param(rngs.params.normal((vocab, width), dtype))

    def encode(self, tokens):
        return self.table[(tokens,)]

    def __call__(self, tokens):
        @nnx.remat
        def decode(self, x):
            return jnp.tanh(x) @ self.table.T

        return decode(self, self.encode(tokens))


class Experts(nnx.Module):
    """A weight for each expert, of layers that are at axis 1, and a nonlinear use of it."""

    def __init__(self, *, rngs):
        self.kernels = nnx.Param(rngs.params.normal((4, 3, 2, 6)))  # (in, layers, experts, out)

    def __call__(self, x):  # (..., 4)
        for layer in range(3):
            y = jnp.einsum("...i,ieo->...eo", x, jnp.sin(self.kernels[:, layer]))
            x = jnp.tanh(y.sum(-2))[..., :4]
        return x


register_lora_layer(Einsum, weight="w", equation="einsum_str")
register_lora_layer(Embedder, weight="table", ins=0, outs=1)
register_lora_layer(Experts, weight="kernels", ins=0, stack=1, batch=2, outs=3)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def einsum(equation, *shape):
    return lambda rngs: Einsum(equation, shape, rngs=rngs)


# Constructor, input, einsum of A and B to the weight.
KINDS = {
    "fused": (einsum("BTD,SNDH->SBTNH", 3, 2, 8, 4), (2, 3, 8), "dr,rsnh->sndh"),
    "output": (einsum("BTNH,NHD->BTD", 2, 4, 8), (2, 3, 2, 4), "nhr,rd->nhd"),
    "subclass": (lambda rngs: Scaled("bd,de->be", (8, 4), rngs=rngs), (3, 8), "dr,re->de"),
    "read": (lambda rngs: Embedder(9, 5, rngs=rngs), None, "ir,ro->io"),
    "experts": (lambda rngs: Experts(rngs=rngs), (7, 4), "leir,lero->ileo"),
}


def made(kind, *, trained=True, **fields):
    make, shape, product = KINDS[kind]
    base = make(nnx.Rngs(0))
    layer = add_lora(nnx.clone(base), LoRAConfig(2, alpha=6.0, **fields), rngs=nnx.Rngs(1))
    if trained:
        layer.lora_b[...] = normal(*layer.lora_b.shape, seed=2)
    x = jnp.arange(6).reshape(2, 3) if shape is None else normal(*shape, seed=3)
    return base, layer, x, product


def weight(layer):
    return vars(layer)[layer.lora_weight]


@pytest.mark.parametrize(
    "kind", [pytest.param(x, marks=pytest.mark.slow) if x == "output" else x for x in KINDS]
)
def test_it_computes_with_the_weight_and_the_product(kind):
    base, layer, x, product = made(kind, trained=False)
    start = base(x)
    np.testing.assert_array_equal(layer(x), start)
    layer.lora_b[...] = normal(*layer.lora_b.shape, seed=2)

    # Forward, gradients of the factors and the merged weight, from the plain module.
    graph, state = nnx.split(base)
    name = layer.lora_weight

    def expected(factors):
        update = 3.0 * jnp.einsum(product, *factors, precision="highest")
        changed = nnx.clone(state)
        changed[name][...] = state[name][...] + update
        return jnp.sum(jnp.sin(nnx.merge(graph, changed)(x)))

    def loss(layer):
        return jnp.sum(jnp.sin(layer(x)))

    factors = layer.lora_a[...], layer.lora_b[...]
    value, gradients = jax.value_and_grad(expected)(factors)
    ours, theirs = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(layer)
    np.testing.assert_allclose(ours, value, atol=1e-4)
    for gradient, ours in zip(gradients, (theirs.lora_a, theirs.lora_b), strict=True):
        np.testing.assert_allclose(ours[...], gradient, rtol=2e-4, atol=1e-4)

    merged = merge_lora(nnx.clone(layer))
    assert type(merged) is type(base)
    assert nnx.graphdef(merged) == graph
    np.testing.assert_allclose(loss(merged), value, atol=1e-4)
    removed = remove_lora(layer)
    assert nnx.graphdef(removed) == graph
    np.testing.assert_array_equal(removed(x), start)


@pytest.mark.parametrize("kind", ["output", "experts"])
def test_a_start_of_its_own_is_subtracted(kind):
    base, layer, x, _ = made(kind, trained=False, init="pissa")
    np.testing.assert_array_equal(layer(x), base(x))
    # The initial product is the best approximation of the weight as a matrix.
    first = base.w[...].reshape(8, 8) if kind == "output" else base.kernels[:, 0, 0]
    rows, columns = first.shape
    a = np.asarray(layer.lora_a[...]).reshape(-1, rows, 2)[0]
    b = np.asarray(layer.lora_b[...]).reshape(-1, 2, columns)[0]
    u, sigma, vt = np.linalg.svd(first)
    np.testing.assert_allclose(3.0 * a @ b, u[:, :2] * sigma[:2] @ vt[:2], atol=1e-5)


def test_half_precision():
    rngs = nnx.Rngs(0)
    layer = Embedder(9, 5, rngs=rngs, dtype="bfloat16")
    query = Einsum("bd,dh->bh", (5, 4), rngs=rngs, dtype="bfloat16")
    for module in (layer, query):
        add_lora(module, LoRAConfig(2), rngs=rngs)
        module.lora_b[...] = normal(*module.lora_b.shape)
    # The sum is rounded once; the branch beside an einsum is rounded by itself.
    exact = np.asarray(weight(layer)[...], np.float64) + layer.lora_a[...] @ layer.lora_b[...]
    np.testing.assert_array_equal(layer.table[...], jnp.asarray(exact, "bfloat16"))
    # Below half a unit in the last place of every weight, the sum is the weight: as documented.
    layer.lora_b[...] *= 1e-6
    np.testing.assert_array_equal(layer.table[...], weight(layer)[...])
    x = jnp.ones((2, 5), "bfloat16")
    assert query(x).dtype == layer(jnp.array([0])).dtype == jnp.bfloat16


class Block(nnx.Module):
    def __init__(self, *, rngs):
        self.up = Einsum("bd,de->be", (4, 6), rngs=rngs)
        self.down = Raw(6, 4, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Raw(nnx.Module):
    def __init__(self, fan_in, fan_out, *, rngs):
        self.matrix = nnx.Param(rngs.params.normal((fan_in, fan_out)))
        self.axes = 0, 1

    def __call__(self, x):
        return x @ self.matrix


register_lora_layer(Raw, weight="matrix", ins=lambda raw: raw.axes[0], outs=lambda raw: raw.axes[1])


class Stacked(nnx.Module):
    def __init__(self, *, rngs):
        self.layers = nnx.vmap(lambda rngs: Block(rngs=rngs))(rngs.split(3))

    def __call__(self, x):
        @nnx.remat
        def run(x, block):
            return block(x)

        return nnx.scan(run, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)

    def hf_name(self, path, layer):
        return path.replace("layers", f"layers.{layer}")


def test_a_stack_run_by_scan_trains_is_written_and_read(tmp_path):
    model = Stacked(rngs=nnx.Rngs(0))
    base = nnx.clone(model)
    add_lora(model, LoRAConfig(2), rngs=nnx.Rngs(1))
    assert {path: layer.lora_a.shape for path, layer in lora_layers(model).items()} == {
        "layers.down": (3, 6, 2),
        "layers.up": (3, 4, 2),
    }
    optimizer = nnx.Optimizer(model, loft(1e-2), wrt=nnx.LoRAParam)
    x, goal = normal(8, 4), normal(8, 4, seed=1)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return optax.l2_loss(model(x), goal).mean()

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(10)]
    assert losses[-1] < 0.9 * losses[0]
    for path, layer in lora_layers(model).items():
        kept = getattr(base.layers, path.removeprefix("layers."))
        np.testing.assert_array_equal(weight(layer)[...], vars(kept)[layer.lora_weight][...])

    save_peft_adapter(tmp_path, model)
    again = load_peft_adapter(tmp_path, nnx.clone(base))
    np.testing.assert_array_equal(again(x), model(x))
    np.testing.assert_allclose(merge_lora(again)(x), model(x), rtol=1e-4, atol=1e-5)


def test_some_layers_of_a_stack_of_its_own():
    base = Experts(rngs=nnx.Rngs(0))
    model = nnx.Sequential(nnx.clone(base))
    add_lora(model, LoRAConfig(2, layers=[0, -1]), rngs=nnx.Rngs(1))
    layer = model.layers[0]
    assert layer.lora_a.shape == (2, 2, 4, 2)
    layer.lora_b[...] = normal(*layer.lora_b.shape)
    update = layer.kernels[...] - base.kernels[...]
    changed = np.abs(update).max(axis=(0, 2, 3))
    assert changed[1] == 0
    assert min(changed[0], changed[2]) > 0.1
    merge_lora(model)
    np.testing.assert_array_equal(model.layers[0].kernels[...], base.kernels[...] + update)


def test_copies_states_and_pickles():
    _, layer, x, _ = made("read")
    out = layer(x)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), nnx.clone(layer)):
        np.testing.assert_array_equal(again(x), out)
    nnx.update(layer, jax.tree.map(jnp.zeros_like, nnx.state(layer, nnx.Param)))
    assert not weight(layer)[...].any()
    with pytest.raises(InputError, match="set before add_lora"):
        layer.table[...] = jnp.ones((9, 5))
    assert nnx.eval_shape(lambda: made("read")[1]).table.shape == (9, 5)


def test_dropout_is_of_the_branch():
    base, layer, x, _ = made("output", dropout=0.5)
    assert not np.array_equal(layer(x), layer(x))
    layer.eval()
    update = layer(x=x) - base(x)
    layer.lora_dropout = None
    np.testing.assert_array_equal(layer(x) - base(x), update)
    with pytest.raises(InputError, match=r"Embedder: dropout is 0\.1.*register.*equation"):
        made("read", dropout=0.1)


def test_a_class_is_registered_once():
    class Mine(nnx.Module):
        pass

    for _ in range(2):
        register_lora_layer(Mine, weight="w", ins=0, outs=1)
    with pytest.raises(InputError, match=r"with weight='w', ins=0, outs=1 already, not"):
        register_lora_layer(Mine, weight="w", ins=1, outs=0)


def of_class(base=nnx.Module):
    return type("Mine", (base,), {})


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (int, {"ins": 0, "outs": 1}, "int is no subclass of nnx.Module"),
        (nnx.Linear, {"ins": 0, "outs": 1}, "Linear is supported as it is"),
        (of_class(), {}, "expected the equation of an einsum, or its axes ins and outs"),
        (of_class(), {"equation": "a,ab->b", "outs": 1}, "so outs cannot"),
        (of_class(), {"equation": "ab->b"}, "not of the form"),
        (of_class(), {"equation": "a,b->ab"}, "no axis of its kernel is contracted"),
        (of_class(), {"ins": 0, "outs": 2}, r"name axes \[0, 2\].*each of 0 to 1 once"),
        (of_class(), {"ins": 0, "outs": (0, 1)}, r"name axes \[0, 0, 1\]"),
        (of_class(), {"ins": 0, "outs": [], "stack": 1}, "an axis in and one out"),
    ],
)
def test_what_cannot_be_registered(cls, fields, message):
    with pytest.raises(InputError, match=message):
        register_lora_layer(cls, weight="w", **fields)


@pytest.mark.parametrize(
    ("attributes", "registered", "message"),
    [
        ({}, {"ins": 0, "outs": 1}, "up: its 'w' is a NoneType"),
        ({"w": jnp.ones(3)}, {"ins": 0, "outs": 1}, "up: its 'w' is .*expected the nnx.Variable"),
        (
            {"w": nnx.Param(jnp.ones(3))},
            {"ins": 0, "outs": 1},
            r"\(3,\), expected 2 axes",
        ),
        ({"w": nnx.Param(jnp.ones((3, 3), int))}, {"ins": 0, "outs": 1}, "'w' is int32"),
        ({"w": nnx.Param(jnp.ones((3, 3)))}, {"equation": "e"}, "its 'e' is None, expected the eq"),
        (
            {"w": nnx.Param(jnp.ones((3, 3)))},
            {"ins": lambda _: 1, "outs": 1},
            r"name axes \[1, 1\]",
        ),
        ({"w": nnx.Param(jnp.ones((3, 1)))}, {"ins": 0, "outs": 1}, "rank 2 is above 1"),
    ],
)
def test_modules_that_do_not_fit_are_named(attributes, registered, message):
    cls = of_class()
    register_lora_layer(cls, weight="w", **registered)
    model = nnx.Dict(up=cls())
    for name, value in attributes.items():
        setattr(model.up, name, nnx.data(value))
    with pytest.raises(InputError, match=message):
        add_lora(model, LoRAConfig(2), rngs=nnx.Rngs(0))


def test_an_output_other_than_the_equations_is_noticed():
    class Turned(Einsum):
        def __call__(self, x):
            return super().__call__(x).T

    class Flat(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((4, 6)))

        def __call__(self, x):
            return (x @ self.w).reshape(-1)

    register_lora_layer(Flat, weight="w", equation="bd,de->be")
    layer = add_lora(Flat(), LoRAConfig(2), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=r"output is \(18,\), but \(3, 6\) by the equation"):
        layer(jnp.ones((3, 4)))
    # What a subclass does to the output is done to the sum.
    turned = add_lora(
        Turned("bd,de->be", (4, 6), rngs=nnx.Rngs(0)), LoRAConfig(2), rngs=nnx.Rngs(1)
    )
    assert turned(jnp.ones((3, 4))).shape == (6, 3)


def test_axes_may_be_found_by_looking_at_the_weight():
    class Raw(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((4, 2, 3)))

        def __call__(self, x):
            return jnp.tensordot(x, self.w[...], 1)

    register_lora_layer(Raw, weight="w", ins=0, outs=lambda layer: range(1, layer.w.ndim))
    model = add_lora(nnx.Sequential(Raw()), LoRAConfig(rank=2), rngs=nnx.Rngs(0))
    model.layers[0].lora_b.set_value(jnp.ones((2, 2, 3)))
    assert model(jnp.ones((5, 4))).shape == (5, 2, 3)
