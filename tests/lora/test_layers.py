"""Every kind of layer against NumPy and against its own merged form."""

import copy
import pickle

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loft_jax.errors import InputError
from loft_jax.lora import LoRAConfig, add_lora, lora_layers, merge_lora, remove_lora

from .models import Doubled, Opaque, Renamed

ALPHA, RANK = 6.0, 2


def linear(rngs, **kwargs):
    return nnx.Linear(4, 6, rngs=rngs, **kwargs)


def general(rngs, **kwargs):
    return nnx.LinearGeneral((3, 4), (2, 5), axis=(1, -1), rngs=rngs, **kwargs)


def batched(rngs, **kwargs):
    return nnx.LinearGeneral(4, (2, 3), axis=-1, batch_axis={0: 5}, rngs=rngs, **kwargs)


def einsum(rngs, **kwargs):
    return nnx.Einsum("...ta,hab->...thb", (3, 4, 5), (3, 5), rngs=rngs, **kwargs)


def per_head(rngs, **kwargs):
    return nnx.Einsum("bthd,dhf->bthf", (4, 3, 5), rngs=rngs, **kwargs)


def attention_out(rngs, **kwargs):
    return nnx.Einsum("bthd,hde->bte", (3, 4, 6), rngs=rngs, **kwargs)


def embed(rngs, **kwargs):
    return nnx.Embed(9, 5, rngs=rngs, **kwargs)


def normal(*shape):
    return jax.random.normal(jax.random.key(7), shape)


# Kind -> constructor, input, einsum of A, B to the weight's shape.
KINDS = {
    "linear": (linear, normal(2, 3, 4), "ir,ro->io"),
    "general": (general, normal(2, 3, 6, 4), "abr,rcd->abcd"),
    "general_batched": (batched, normal(5, 2, 4), "xar,xrcd->xacd"),
    "einsum": (einsum, normal(2, 2, 3, 4), "ar,rhb->hab"),
    "einsum_shared_axis": (per_head, normal(2, 3, 3, 4), "hdr,hrf->dhf"),
    "einsum_two_in": (attention_out, normal(2, 3, 3, 4), "hdr,re->hde"),
    "embed": (embed, jnp.arange(8).reshape(2, 4), "ir,ro->io"),
    "subclass": (lambda rngs, **kw: Doubled(4, 6, rngs=rngs, **kw), normal(2, 4), "ir,ro->io"),
    "renamed": (lambda rngs, **kw: Renamed(4, 6, rngs=rngs, **kw), normal(2, 4), "ir,ro->io"),
}


def adapted(kind, target="", *, random=True, **fields):
    make, x, product = KINDS[kind]
    config = LoRAConfig(RANK, alpha=ALPHA, target_modules=r".*", **fields)
    layer = add_lora(make(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    if random:
        randomize(layer)
    return layer, x, product


def randomize(model, seed=3):
    rng = np.random.default_rng(seed)
    for layer in lora_layers(model).values():
        for factor in (layer.lora_a, layer.lora_b):
            factor[...] = jnp.asarray(rng.normal(size=factor.shape), factor.dtype)


def weight(layer):
    return layer.embedding if isinstance(layer, nnx.Embed) else layer.kernel


@pytest.mark.parametrize("kind", KINDS)
def test_identity_at_the_start_to_the_bit(kind):
    make, x, _ = KINDS[kind]
    base = make(nnx.Rngs(0))
    layer, _, _ = adapted(kind, random=False)
    assert isinstance(layer, type(base))
    before = np.asarray(nnx.jit(lambda m, x: m(x))(base, x))
    np.testing.assert_array_equal(np.asarray(nnx.jit(lambda m, x: m(x))(layer, x)), before)
    np.testing.assert_array_equal(np.asarray(layer(x)), np.asarray(base(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_output_is_that_of_the_updated_weight(kind):
    layer, x, product = adapted(kind)
    a, b = (np.asarray(v[...], np.float64) for v in (layer.lora_a, layer.lora_b))
    reference = KINDS[kind][0](nnx.Rngs(0))
    update = ALPHA / RANK * np.einsum(product, a, b)
    weight(reference)[...] = jnp.asarray(np.asarray(weight(reference)[...], np.float64) + update)
    np.testing.assert_allclose(layer(x), reference(x), rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(layer(x) - KINDS[kind][0](nnx.Rngs(0))(x))).max() > 0.1
    if kind == "embed":
        query = normal(3, 5)
        np.testing.assert_allclose(
            layer.attend(query), reference.attend(query), rtol=1e-5, atol=1e-5
        )
    merged = merge_lora(layer)
    assert type(merged) is type(reference)
    np.testing.assert_allclose(weight(merged)[...], weight(reference)[...], rtol=1e-6, atol=1e-6)
    assert nnx.split(merged)[0] == nnx.split(reference)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_removal_restores_everything(kind):
    layer, _, _ = adapted(kind, dropout=0.5)
    graphdef, state = nnx.split(KINDS[kind][0](nnx.Rngs(0)))
    after, restored = nnx.split(remove_lora(layer))
    assert after == graphdef
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(restored), nnx.to_pure_dict(state))


@pytest.mark.parametrize("kind", KINDS)
def test_base_paths_stay_and_only_factors_are_added(kind):
    layer, _, _ = adapted(kind)
    before = dict(nnx.to_flat_state(nnx.state(KINDS[kind][0](nnx.Rngs(0)))))
    after = dict(nnx.to_flat_state(nnx.state(layer)))
    assert set(after) - set(before) == {("lora_a",), ("lora_b",)}
    assert set(before) <= set(after)
    assert {path for path, v in after.items() if isinstance(v, nnx.LoRAParam)} == {
        ("lora_a",),
        ("lora_b",),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["pickle", "cloudpickle", "deepcopy", "split"])
def test_copies_compute_the_same(kind, how):
    layer, x, _ = adapted(kind)
    match how:
        case "split":
            copied = nnx.merge(*nnx.split(layer))
        case "deepcopy":
            copied = copy.deepcopy(layer)
        case _:
            module = pickle if how == "pickle" else cloudpickle
            copied = module.loads(module.dumps(layer))
            assert module.loads(module.dumps(nnx.split(layer)[0])) == nnx.split(layer)[0]
    assert type(copied) is type(layer)
    np.testing.assert_array_equal(copied(x), layer(x))


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        # Daily each kind, and each way for every other one.
        pytest.param(kind, how, marks=() if (i + j) % 2 == 0 else pytest.mark.slow)
        for i, kind in enumerate(KINDS)
        for j, how in enumerate(["dtype", "params"])
    ],
)
def test_bfloat16_base_keeps_float32_factors_and_computes_in_bfloat16(kind, how):
    make, x, _ = KINDS[kind]
    if how == "dtype":
        base = make(nnx.Rngs(0), dtype=jnp.bfloat16)
    else:
        base = make(nnx.Rngs(0), param_dtype=jnp.bfloat16)
        x = x if x.dtype == jnp.int32 else x.astype(jnp.bfloat16)
    expected = np.asarray(base(x))
    layer = add_lora(base, LoRAConfig(RANK, target_modules=r".*"), rngs=nnx.Rngs(1))
    assert layer.lora_a.dtype == layer.lora_b.dtype == jnp.float32
    assert expected.dtype == layer(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(layer(x)), expected)
    products = [
        eqn.outvars[0].aval.dtype
        for eqn in jax.make_jaxpr(lambda x: layer(x))(x).jaxpr.eqns
        if eqn.primitive.name == "dot_general"
    ]
    assert set(products) == {jnp.dtype(jnp.bfloat16)}


def test_preferred_element_type_holds_for_the_branch():
    layer = linear(nnx.Rngs(0), dtype=jnp.bfloat16, preferred_element_type=jnp.float32)
    layer = add_lora(layer, LoRAConfig(RANK, target_modules=r".*"), rngs=nnx.Rngs(1))
    assert layer(normal(2, 4)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("equation", "shape", "why"),
    [
        ("ab,...bc->ac", (4, 5), "ellipsis"),
        ("ab,bcd->ac", (4, 5, 3), "'d' of its kernel is in neither"),
        ("ab,cd->abcd", (4, 5), "no axis of its kernel is contracted"),
        ("abc,bc->a", (4, 5), "no axis of its kernel is left in the output"),
        ("ab,ab->ab", (3, 4), "no axis of its kernel is contracted"),
    ],
)
def test_an_einsum_without_low_rank_factors_is_refused_by_name(equation, shape, why):
    layer = nnx.Sequential(nnx.Einsum(equation, shape, rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match=rf"layers\.0: einsum .*{why}"):
        add_lora(layer, LoRAConfig(1), rngs=nnx.Rngs(1))


def test_an_einsum_called_with_another_equation():
    layer, x, _ = adapted("einsum")
    np.testing.assert_allclose(layer(x, "xzta,hab->xzthb"), layer(x), rtol=1e-6)
    with pytest.raises(InputError, match="otherwise than"):
        layer(normal(3, 5), "tb,hab->tha")


def test_a_layer_that_does_not_call_super_is_refused():
    with pytest.raises(InputError, match=r"layers\.0: Opaque\.__call__ replaces Linear's"):
        add_lora(nnx.Sequential(Opaque(4, 4, rngs=nnx.Rngs(0))), LoRAConfig(1), rngs=nnx.Rngs(1))


def test_attention():
    def attention():
        return nnx.MultiHeadAttention(
            num_heads=2, in_features=6, qkv_features=8, decode=False, rngs=nnx.Rngs(0)
        )

    x = normal(2, 5, 6)
    model = add_lora(attention(), LoRAConfig(RANK, alpha=ALPHA), rngs=nnx.Rngs(1))
    shapes = {p: (v.lora_a.shape, v.lora_b.shape) for p, v in lora_layers(model).items()}
    to_heads = ((6, 2), (2, 2, 4))
    assert shapes == {
        "key": to_heads,
        "out": ((2, 4, 2), (2, 6)),
        "query": to_heads,
        "value": to_heads,
    }
    np.testing.assert_array_equal(model(x), attention()(x))
    randomize(model)
    adapted = np.asarray(model(x))
    assert np.abs(adapted - attention()(x)).max() > 0.1
    np.testing.assert_allclose(merge_lora(model)(x), adapted, rtol=1e-4, atol=1e-4)


def test_dropout_on_the_branch_only_in_training_and_unbiased():
    layer, x, _ = adapted("linear", dropout=0.5)
    plain, _, _ = adapted("linear")
    layer.eval()
    np.testing.assert_array_equal(layer(x), plain(x))
    layer.train()
    first, second = np.asarray(layer(x)), np.asarray(layer(x))
    assert (first != second).any()
    x = jnp.broadcast_to(x[0, 0], (20_000, 4))
    np.testing.assert_allclose(layer(x).mean(0), plain(x[0]), atol=0.2)
    # Each dropped input takes its whole row of A with it; the base layer sees every input.
    rows = np.unique(np.round(np.asarray(layer(x[:500])), 4), axis=0)
    assert 2**3 < len(rows) <= 2**4


def test_explicit_sharding():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        spec = jax.sharding.PartitionSpec("data", None)
        layer = add_lora(linear(nnx.Rngs(0)), LoRAConfig(RANK), rngs=nnx.Rngs(1))
        randomize(layer)
        x = normal(2, 4)
        np.testing.assert_allclose(layer(x, out_sharding=spec), layer(x), rtol=1e-6)
