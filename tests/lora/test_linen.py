"""LoRA on Linen models: every layer, stacks at both axes, training, merging, what is refused."""

import dataclasses
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze, meta
from flax.training.train_state import TrainState

import loft_jax
from loft_jax import find_pairs, loft, paired_leaves
from loft_jax.errors import InputError
from loft_jax.lora import LoRAConfig
from loft_jax.lora.linen import add_lora, join_factors, split_factors

TOKENS = jnp.arange(6).reshape(2, 3)
X = jnp.linspace(-1, 1, 20).reshape(1, 5, 4)
EVERY = ("query", "key", "value", "out", "up", "down", "embed", "lm_head")


class Block(nn.Module):
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, _):
        kinds = {"dtype": self.dtype, "param_dtype": self.dtype}
        h = nn.MultiHeadDotProductAttention(num_heads=2, name="attention", **kinds)(x, x)
        h = nn.Dense(6, name="up", **kinds)(h)
        h = nn.Einsum((6, 4), "bti,io->bto", name="down", **kinds)(nn.gelu(h))
        return nn.LayerNorm(name="norm", **kinds)(x + h), None


class Model(nn.Module):
    """Four layers of width 4, so that no shape says which axis is the stack."""

    axis: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 4, dtype=self.dtype, param_dtype=self.dtype, name="embed")
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": self.axis},
            split_rngs={"params": True, "dropout": True},
            length=4,
        )(self.dtype, name="layers")
        x, _ = layers(embed(tokens), None)
        x = nn.LayerNorm(name="norm", dtype=self.dtype)(x)
        head = nn.DenseGeneral((1, 11), axis=(-1,), name="lm_head", param_dtype=self.dtype)
        return embed.attend(x) + head(x)[..., 0, :]


class Layers(nn.Module):
    """A scan of four linear layers of width 4."""

    axis: int = 1
    dtype: str = "float32"
    streams: tuple[str, ...] = ("params", "dropout")

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            Linear,
            variable_axes={"params": self.axis},
            split_rngs=dict.fromkeys(self.streams, True),
            length=4,
        )
        return scan(self.dtype, name="layers")(x, None)[0]


class Linear(nn.Module):
    dtype: str

    @nn.compact
    def __call__(self, x, _):
        layer = nn.Dense(4, name="up", dtype=self.dtype, param_dtype=self.dtype)
        return x + jnp.tanh(layer(x)), None


def every(**fields):
    return LoRAConfig(**{"rank": 2, "alpha": 4, "target_modules": EVERY, **fields})


def key():
    return jax.random.key(1)


def randomized(factors, seed=0):
    leaves, treedef = jax.tree.flatten(factors)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        treedef, [jnp.asarray(rng.normal(size=x.shape) / 2, x.dtype) for x in leaves]
    )


def moved(tree, start, to):
    """A tree of stacked layers with the stack at another axis."""
    return {**tree, "layers": jax.tree.map(lambda x: jnp.moveaxis(x, start, to), tree["layers"])}


@pytest.fixture(scope="module")
def model():
    return Model()


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]


@pytest.fixture(scope="module")
def lora(model):
    return add_lora(model, every(), TOKENS)


@pytest.fixture(scope="module")
def run(lora):
    return jax.jit(lora.apply)


@pytest.fixture(scope="module")
def base(model):
    return jax.jit(model.apply)


def test_shapes_have_the_stack_where_the_scan_has_it(lora):
    factors = lora.init(key())
    shapes = {
        path: (pair.a.stack_axes, pair.a.stack, pair.a.features, pair.b.features)
        for pair in find_pairs(factors, lora.spec)
        for path in [pair.path.removesuffix("/kernel").removeprefix("layers/")]
    }
    assert shapes == {
        "attention/key": ((1,), (4,), (4,), (2, 2)),
        "attention/out": ((1,), (4,), (2, 2), (4,)),
        "attention/query": ((1,), (4,), (4,), (2, 2)),
        "attention/value": ((1,), (4,), (4,), (2, 2)),
        "down": ((1,), (4,), (6,), (4,)),
        "embed/embedding": ((), (), (11,), (4,)),
        "lm_head": ((), (), (4,), (1, 11)),
        "up": ((1,), (4,), (4,), (6,)),
    }


def test_the_output_is_the_base_to_the_bit_until_the_factors_change(lora, params, run, base):
    factors = lora.init(key())
    found = run({"params": params, "lora": factors}, TOKENS)
    np.testing.assert_array_equal(found, base({"params": params}, TOKENS))
    assert not np.array_equal(found, run({"params": params, "lora": randomized(factors)}, TOKENS))


def test_the_base_is_initialized_to_the_bit(model, lora, params):
    @jax.jit
    def init(key):
        with lora.intercept():
            return model.init(key, TOKENS)["params"]

    jax.tree.map(np.testing.assert_array_equal, init(jax.random.key(0)), params)


def test_merging_gives_the_same_model(lora, params, run, base):
    factors = randomized(lora.init(key()))
    merged = lora.merge(freeze(params), freeze(factors))
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(
        base({"params": merged}, TOKENS),
        run({"params": params, "lora": factors}, TOKENS),
        rtol=1e-5,
        atol=1e-5,
    )
    # By hand, of one layer of the stack.
    up, own = params["layers"]["up"], factors["layers"]["up"]
    product = own["kernel_lora_a"][:, 2] @ own["kernel_lora_b"][:, 2]
    by_hand = up["kernel"][:, 2] + 2.0 * product
    np.testing.assert_allclose(merged["layers"]["up"]["kernel"][:, 2], by_hand, atol=1e-6)


def test_gradients_are_those_of_the_merged_weights(lora, params, run, base):
    factors = randomized(lora.init(key()))

    def loss(forward, variables):
        return jnp.sum(jnp.sin(forward(variables, TOKENS)))

    found = jax.grad(lambda f: loss(run, {"params": params, "lora": f}))(factors)
    dense = jax.grad(lambda p: loss(base, {"params": p}))(lora.merge(params, factors))
    # dL/dA = s G Bᵀ and dL/dB = s Aᵀ G
    for name, equations in {
        "up": ("ilo,rlo->ilr", "ilr,ilo->rlo"),
        "down": ("ilo,rlo->ilr", "ilr,ilo->rlo"),
    }.items():
        own, grad = factors["layers"][name], dense["layers"][name]["kernel"]
        a = 2.0 * jnp.einsum(equations[0], grad, own["kernel_lora_b"])
        b = 2.0 * jnp.einsum(equations[1], own["kernel_lora_a"], grad)
        ours = found["layers"][name]
        np.testing.assert_allclose(ours["kernel_lora_a"], a, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(ours["kernel_lora_b"], b, rtol=1e-4, atol=1e-5)
    grad = dense["embed"]["embedding"]
    a = 2.0 * grad @ factors["embed"]["embedding_lora_b"].T
    np.testing.assert_allclose(found["embed"]["embedding_lora_a"], a, rtol=1e-4, atol=1e-5)


def trained(axis, start, factors):
    """Trains in a TrainState that holds the factors alone."""
    lora = add_lora(Layers(axis), LoRAConfig(rank=2, alpha=4), X)
    tx = loft(1e-2, scaling=lora.spec.scaling, stack_axis=lora.spec.stack_axis)
    state = TrainState.create(apply_fn=lora.apply, params=factors, tx=tx)

    @jax.jit
    def step(state):
        def loss(factors):
            return jnp.mean((state.apply_fn({"params": start, "lora": factors}, X) - 1) ** 2)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    values = []
    for _ in range(5):
        state, value = step(state)
        values.append(float(value))
    return values, state.params


@pytest.fixture(scope="module")
def layers():
    """Model, parameters, with LoRA, factors."""
    model = Layers()
    lora = add_lora(model, LoRAConfig(rank=2, alpha=4), X)
    return model, jax.jit(model.init)(jax.random.key(0), X)["params"], lora, lora.init(key())


def test_both_axes_of_a_scan_train_alike(layers):
    _, params, _, factors = layers
    at_zero = add_lora(Layers(axis=0), LoRAConfig(rank=2, alpha=4), X)
    jax.tree.map(np.testing.assert_array_equal, at_zero.init(key()), moved(factors, 1, 0))
    ours, end = trained(1, params, factors)
    theirs, end_at_zero = trained(0, moved(params, 1, 0), moved(factors, 1, 0))
    assert ours[-1] < ours[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), end, moved(end_at_zero, 0, 1))


def test_one_tree_of_both_trains_the_factors_alone(layers):
    """Trainers that have a tree of their own: factors beside the weights, the rest frozen."""
    model, params, lora, factors = layers
    both = join_factors(params, factors)
    jax.tree.map(np.testing.assert_array_equal, split_factors(both), (params, factors))
    tx = optax.multi_transform(
        {True: loft(1e-2, stack_axis=lora.spec.stack_axis), False: optax.set_to_zero()},
        paired_leaves(both, lora.spec),
    )

    @jax.jit
    def step(both):
        def loss(both):
            with lora.intercept():
                return jnp.sum(jnp.sin(model.apply({"params": both}, X)))

        updates, _ = tx.update(jax.grad(loss)(both), tx.init(both), both)
        return optax.apply_updates(both, updates)

    base, after = split_factors(step(both))
    jax.tree.map(np.testing.assert_array_equal, base, params)
    assert after["layers"]["up"]["kernel_lora_b"].any()


def test_seeds_run_under_vmap(layers):
    _, params, lora, factors = layers
    seeds = randomized(jax.tree.map(lambda x: jnp.stack([x, x]), factors))
    found = jax.jit(jax.vmap(lambda f: lora.apply({"params": params, "lora": f}, X)))(seeds)
    second = jax.tree.map(lambda x: x[1], seeds)
    expected = lora.apply({"params": params, "lora": second}, X)
    np.testing.assert_allclose(found[1], expected, rtol=1e-5, atol=1e-5)


def test_half_precision_stays():
    model = Layers(dtype="bfloat16")
    lora = add_lora(model, LoRAConfig(rank=2), X)
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    factors = lora.init(key())
    assert {x.dtype for x in jax.tree.leaves(factors)} == {jnp.dtype("float32")}
    x = X.astype("bfloat16")
    expected = jax.jit(model.apply)({"params": params}, x)
    found = jax.jit(lora.apply)({"params": params, "lora": factors}, x)
    assert found.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, expected)
    merged = lora.merge(params, randomized(factors))
    assert merged["layers"]["up"]["kernel"].dtype == jnp.bfloat16


class Shaped(nn.DenseGeneral):
    """A subclass that changes what its layer gives."""

    def __call__(self, x):
        return 3.0 * super().__call__(x)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.DenseGeneral((2, 5), axis=(-2, -1)), (7, 3, 4)),
        (nn.DenseGeneral(5, axis=(-1, 1), use_bias=False), (7, 3, 4)),
        (nn.DenseGeneral(5, axis=-1, batch_dims=(0,)), (7, 3, 4)),
        (nn.Einsum((3, 4, 2, 5), "bna,nahd->bnhd"), (7, 3, 4)),
        (nn.Einsum((4, 5), "...a,ad->...d"), (7, 3, 4)),
        (Shaped((2, 5)), (3, 4)),
        (nn.Dense(5), (4,)),
    ],
    ids=["axes", "order", "batch", "einsum-batch", "ellipsis", "subclass", "vector"],
)
def test_a_layer_equals_its_merged_weight(layer, shape):
    x = jax.random.normal(jax.random.key(2), shape)
    params = layer.init(jax.random.key(0), x)["params"]
    lora = add_lora(layer, LoRAConfig(rank=2, alpha=1), x)
    factors = randomized(lora.init(key()))
    (pair,) = find_pairs(factors, lora.spec)
    assert pair.rank == 2
    found = lora.apply({"params": params, "lora": factors}, x)
    expected = layer.apply({"params": lora.merge(params, factors)}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(found - layer.apply({"params": params}, x)).max()) > 1e-2


class Boxed(nn.Module):
    """A layer whose parameter has names of axes, to which a scan adds its own."""

    @nn.compact
    def __call__(self, x, _):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        return nn.Dense(4, kernel_init=init, name="up")(x), None


def test_partitioned_parameters_keep_their_boxes():
    model = nn.scan(
        Boxed,
        variable_axes={"params": 1},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )()
    params = jax.jit(model.init)(jax.random.key(0), X, None)["params"]
    assert params["up"]["kernel"].names == ("embed", "layers", "mlp")
    lora = add_lora(model, LoRAConfig(rank=2), X, None)
    factors = randomized(lora.init(key()))
    merged = lora.merge(params, factors)
    assert isinstance(merged["up"]["kernel"], meta.Partitioned)
    found, _ = lora.apply({"params": params, "lora": factors}, X, None)
    expected, _ = model.apply({"params": merged}, X, None)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_dropout_is_active_where_there_is_a_stream(layers):
    model, params, without, factors = layers
    lora = add_lora(model, LoRAConfig(rank=2, alpha=4, dropout=0.5), X)
    variables = {"params": params, "lora": randomized(factors)}
    np.testing.assert_array_equal(lora.apply(variables, X), without.apply(variables, X))
    run = jax.jit(lambda key: lora.apply(variables, X, rngs={"dropout": key}))
    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    # Over many masks the branch of the first layer is that without dropout.
    one = add_lora(nn.Dense(4), LoRAConfig(rank=2, dropout=0.5), X)
    pair = randomized(one.init(key()))
    own = {"params": {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)}, "lora": pair}
    keys = jax.random.split(key(), 4000)
    mean = jax.vmap(lambda key: one.apply(own, X, rngs={"dropout": key}))(keys).mean(0)
    np.testing.assert_allclose(mean, one.apply(own, X), atol=0.1)


def test_ranks_and_scalings_follow_patterns():
    config = every(rank_pattern={"up": 3}, alpha_pattern={"down": 1}, use_rslora=True)
    lora = add_lora(Model(), config, TOKENS)
    scalings = {p.path: lora.spec.scaling_of(p) for p in find_pairs(lora.init(key()), lora.spec)}
    assert lora.layers["layers.up"].rank == 3
    assert scalings["layers/up/kernel"] == pytest.approx(4 / 3**0.5)
    assert scalings["layers/down/kernel"] == pytest.approx(1 / 2**0.5)


class Mixed(nn.Module):
    """Layers that take factors, and others."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3,), name="conv")(x)
        x = nn.Dense(4, name="up")(x)
        return nn.Dense(4, name="lm_head")(nn.LayerNorm(name="norm")(x))


class Replaced(nn.Dense):
    """A subclass that computes something else."""

    @nn.compact
    def __call__(self, x):
        return x * self.param("kernel", nn.initializers.ones, (x.shape[-1],))


class Attention(nnx.Module):
    """An NNX module inside of a Linen model, as MaxText has them."""

    def __init__(self, rngs):
        self.query = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.query(x)


class Bridged(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="up")(nnx.bridge.ToLinen(Attention, name="attention")(x))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": "conv"}, r"'conv': nn\.Conv is not supported; expected nn\.Dense"),
        ({"target_modules": ".*"}, r"'conv': nn\.Conv is not supported"),
        ({"target_modules": "upp"}, r"'upp' matches no layer of the model; near names: up"),
        ({"target_modules": "up", "exclude_modules": "up"}, "leaves no layer"),
        ({"target_modules": "up", "exclude_modules": "norm"}, "'norm' matches no layer"),
        ({"rank": 5}, r"up: rank 5 is above 4, the smaller side"),
        ({"rank_pattern": {"upp": 2}}, r"'upp' matches no target layer; near names: up"),
        ({"use_dora": True}, "use_dora: True is for NNX models"),
        ({"init": "pissa"}, "init: 'pissa' is for NNX models"),
        ({"init": "balanced"}, "init: 'balanced' is for NNX models"),
        ({"layers": [0]}, r"layers: \[0\] is for NNX models"),
    ],
)
def test_a_configuration_is_refused_by_name(config, message):
    with pytest.raises(InputError, match=message):
        add_lora(Mixed(), LoRAConfig(**{"rank": 2, **config}), X)


def test_all_linear_is_without_the_head_and_other_layers():
    assert list(add_lora(Mixed(), LoRAConfig(rank=2), X).layers) == ["up"]


class Dotted(nn.Module):
    def setup(self):
        self.named = {"a.b": nn.Dense(4)}

    def __call__(self, x):
        return self.named["a.b"](x)


def test_models_that_cannot_be_adapted_are_refused():
    with pytest.raises(InputError, match=r"no linear layer; Replaced: not supported"):
        add_lora(Replaced(4), LoRAConfig(rank=2), X)
    with pytest.raises(InputError, match=r"nn\.Einsum \(einsum .* has no low-rank factors"):
        add_lora(
            nn.Einsum((4,), "bta,a->bta", kernel_init=nn.initializers.ones), LoRAConfig(rank=1), X
        )
    with pytest.raises(InputError, match=r"'attention.query': ToLinen is not supported"):
        add_lora(Bridged(), LoRAConfig(rank=1, target_modules="query"), X)
    with pytest.raises(InputError, match=r"nn\.Dense whose path has a dot within a name: not sup"):
        add_lora(Dotted(), LoRAConfig(rank=2), X)
    with pytest.raises(InputError, match=r"expected a Linen module; loft_jax\.add_lora"):
        add_lora(object(), LoRAConfig(), X)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: loft_jax.add_lora(model, LoRAConfig(), rngs=nnx.Rngs(0)),
        loft_jax.lora_layers,
        loft_jax.merge_lora,
        lambda model: loft_jax.average_adapters([model]),
        lambda model: loft_jax.save_peft_adapter("adapter", model, alpha=1),
    ],
)
def test_functions_for_nnx_say_that_it_is_a_linen_model(use):
    with pytest.raises(
        InputError, match=r"Mixed: this is a Linen model, .* use loft_jax\.lora\.linen"
    ):
        use(Mixed())


def test_a_scan_without_the_stream_of_dropout_is_refused():
    with pytest.raises(InputError, match=r"up: dropout is 0.1, but the scan around it"):
        add_lora(Layers(streams=("params",)), LoRAConfig(rank=2, dropout=0.1), X)


def test_wrong_trees_are_told(lora, params):
    factors = lora.init(key())
    up = factors["layers"]["up"]
    turned = {
        **factors,
        "layers": {**factors["layers"], "up": dict(zip(up, reversed(up.values()), strict=True))},
    }
    for variables, message in [
        ({"lora": factors}, r"variables has no 'params'"),
        ({"params": params}, r"variables has no 'lora' \(factors\), found \['params'\]"),
        ({"params": {}, "lora": factors}, r"params has no 'embed.embedding', found nothing"),
        ({"params": {"params": params}, "lora": factors}, r"found 'params.embed.embedding'"),
        ({"params": params, "lora": {}}, r"factors has no 'embed.embedding_lora_a'"),
        ({"params": params, "lora": {**factors, "x": up}}, r"'x.kernel_lora_a', .* no layer"),
        ({"params": params, "lora": turned}, r"layers.up.kernel_lora_a is \(2, 4, 6\), expected"),
        ({"params": params, "lora": None}, r"found a NoneType, expected a nested dict"),
    ]:
        with pytest.raises(InputError, match=message):
            lora.apply(variables, TOKENS)
    with pytest.raises(InputError, match="params has no"):
        lora.merge({}, factors)
    with pytest.raises(ValueError, match="no layer of this model"):
        find_pairs({"other": up}, lora.spec)


def test_a_context_around_another_model_is_told(model, lora, params):
    missing = r"params has no 'embedding_lora_a'; join the factors"
    with pytest.raises(InputError, match=missing), lora.intercept():
        model.apply({"params": params}, TOKENS)
    with pytest.raises(InputError, match="none of the layers with"), lora.intercept():
        nn.Dense(3).init(key(), X)
    with lora.intercept():
        pass


class TwoParts(nn.Module):
    """A model with a method that calls no layer with factors."""

    def setup(self):
        self.encoder, self.decoder = nn.Dense(4), nn.Dense(4)

    def encode(self, x):
        return self.encoder(x)

    def __call__(self, x):
        return self.decoder(self.encoder(x))


def test_a_method_without_adapted_layers_runs():
    model = TwoParts()
    params = model.init(key(), X)["params"]
    lora = add_lora(model, LoRAConfig(rank=2, target_modules="decoder"), X)
    variables = {"params": params, "lora": lora.init(key())}
    expected = model.apply({"params": params}, X, method="encode")
    assert (lora.apply(variables, X, method="encode") == expected).all()


def test_a_spec_is_hashable(lora):
    assert len({lora.spec, lora.spec, dataclasses.replace(lora.spec)}) == 1


def test_the_page_runs():
    page = (Path(__file__).parents[2] / "docs/how-to/linen-model.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    names = {}
    exec("\n".join(blocks), names)
    assert set(names["factors"]) == {"layers_0", "layers_2"}


def test_factors_do_not_replace_parameters():
    params, factors = {"up": {"kernel": 1}}, {"up": {"kernel_lora_a": 2, "kernel_lora_b": 3}}
    with pytest.raises(InputError, match=r"up\.kernel_lora_a.*expected parameters without"):
        join_factors(join_factors(params, factors), factors)
