import ast
import functools
import math

import flax.core
import flax.struct
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from loft_jax.optim import loft
from loft_jax.optim.pairs import FactorSpec, find_pairs, leaf_paths, paired_leaves


def factors(m, n, r, stack=()):
    return {"lora_a": jnp.zeros((*stack, m, r)), "lora_b": jnp.zeros((*stack, r, n))}


@flax.struct.dataclass
class Adapter:
    lora_a: jax.Array
    lora_b: jax.Array


TREES = {
    "nested dicts": {"x": {"q": factors(8, 6, 2)}},
    "frozen": flax.core.freeze({"x": {"q": factors(8, 6, 2)}}),
    "dataclass": {"x": {"q": Adapter(**factors(8, 6, 2))}},
    "peft": {"x": {"q": {"lora_A": jnp.zeros((8, 2)), "lora_B": jnp.zeros((2, 6))}}},
    "qwix": {"x": {"q": {f"w_{k}": v for k, v in factors(8, 6, 2).items()}}},
    "nnx state": nnx.State(
        {"x": {"q": {k: nnx.LoRAParam(v) for k, v in factors(8, 6, 2).items()}}}
    ),
    "value steps": {"x": {"q": {k: {"value": v} for k, v in factors(8, 6, 2).items()}}},
    "list": {"x": {"q": factors(8, 6, 2)}, "y": [jnp.zeros(3)]},
}


@pytest.mark.parametrize("name", TREES)
def test_finds_the_pair_in(name):
    [pair] = find_pairs(TREES[name])
    assert pair.path.split("/")[:2] == ["x", "q"]
    assert pair.rank == 2
    leaves = jax.tree.leaves(TREES[name])
    assert leaves[pair.a.index].shape == (8, 2)
    assert leaves[pair.b.index].shape == (2, 6)
    assert pair.a.features == (8,)
    assert pair.b.features == (6,)
    assert pair.a.stack == ()


def test_a_module_that_is_called_value():
    """A step `value` is of Flax's variable only where it holds nothing else."""
    kinds = ("query", "key", "value")
    by_factor = {
        "lora_a": {k: jnp.zeros((8, 2)) for k in kinds},
        "lora_b": {k: jnp.zeros((2, 6)) for k in kinds},
    }
    with pytest.raises(ValueError, match="no factor pair"):
        find_pairs(by_factor)
    names = [(f"lora_a/{k}", f"lora_b/{k}") for k in kinds]
    assert len(find_pairs(by_factor, FactorSpec(names))) == 3
    # Of those that are masked, the name stays.
    tx = optax.masked(loft(0.1, factors=names[2:]), paired_leaves(by_factor, FactorSpec(names[2:])))
    updates, _ = tx.update(by_factor, tx.init(by_factor), by_factor)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, by_factor)
    [kernel] = leaf_paths({"kernel": {"value": 1.0}})
    assert kernel == "kernel"
    beside = leaf_paths({"kernel": {"value": 1.0, "b": {"c": 1.0}}})
    assert beside == ["kernel/b/c", "kernel/value"]


def test_two_pairs_of_one_module():
    tree = {"q": {"w_lora_a": jnp.zeros((8, 2)), "w_lora_b": jnp.zeros((2, 6)), **factors(4, 4, 1)}}
    assert [(pair.path, pair.rank) for pair in find_pairs(tree)] == [("q", 1), ("q/w", 2)]


def test_a_pair_at_the_root():
    [pair] = find_pairs(factors(3, 3, 1))
    assert pair.path == "lora_a"


@pytest.mark.parametrize(
    ("a", "b", "stack", "ins", "outs"),
    [
        ((5, 8, 2), (5, 2, 6), (5,), (8,), (6,)),
        ((2, 8, 2), (2, 2, 6), (2,), (8,), (6,)),  # as many layers as ranks
        ((3, 5, 8, 2), (3, 5, 2, 6), (3, 5), (8,), (6,)),
        ((8, 2), (2, 3, 4), (), (8,), (3, 4)),  # one input axis, two output axes
        ((3, 4, 2), (2, 8), (), (3, 4), (8,)),
        ((5, 8, 2), (5, 2, 3, 4), (5,), (8,), (3, 4)),
        ((3, 4, 2), (2, 5, 6), (), (3, 4), (5, 6)),
    ],
)
def test_axes(a, b, stack, ins, outs):
    rng = np.random.default_rng(0)
    tree = {"lora_a": rng.normal(size=a), "lora_b": rng.normal(size=b)}
    tree = jax.tree.map(lambda x: x.astype(np.float32), tree)
    [pair] = find_pairs(tree)
    assert (pair.a.stack, pair.a.features, pair.b.features) == (stack, ins, outs)
    folded_a, folded_b = pair.a.fold(tree["lora_a"]), pair.b.fold(tree["lora_b"])
    product = np.asarray(folded_a @ folded_b).reshape(*stack, *ins, *outs)
    letters = "".join("stu"[: len(stack)]), "ijk"[: len(ins)], "xyz"[: len(outs)]
    s, i, o = letters
    expected = np.einsum(f"{s}{i}r,{s}r{o}->{s}{i}{o}", tree["lora_a"], tree["lora_b"])
    np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(pair.b.unfold(folded_b), tree["lora_b"])
    np.testing.assert_array_equal(pair.a.unfold(folded_a), tree["lora_a"])


@pytest.mark.parametrize("module", ["q", "q_"])
def test_names_of_the_caller(module):
    tree = {module: {"down": {"kernel": jnp.zeros((8, 2))}, "up": {"kernel": jnp.zeros((2, 6))}}}
    for names in ((("down/kernel", "up/kernel"),), [["down/kernel", "up/kernel"]]):
        [pair] = find_pairs(tree, FactorSpec(names))
        assert pair.path == module


@pytest.mark.parametrize("names", [("lora_a", "lora_b"), [("lora_a",)]])
def test_names_that_are_no_pairs(names):
    with pytest.raises(ValueError, match=r"factors holds .*expected pairs of endings"):
        FactorSpec(names)


def test_one_ending_of_both_factors_is_refused():
    with pytest.raises(ValueError, match=r"factors holds \('w', 'w'\), expected two different"):
        FactorSpec((("w", "w"),))


def test_a_node_may_have_keys_of_its_own():
    class Layer:
        def __init__(self, a, b):
            self.lora_a, self.lora_b = a, b

    jax.tree_util.register_pytree_with_keys(
        Layer,
        lambda layer: ((("lora_a", layer.lora_a), ("lora_b", layer.lora_b)), None),
        lambda _, children: Layer(*children),
    )
    [pair] = find_pairs({"q": Layer(jnp.zeros((8, 2)), jnp.zeros((2, 6)))})
    assert (pair.path, pair.a.path) == ("q", "q/lora_a")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"q": {"lora_a": jnp.zeros((8, 2))}}, "'q/lora_a' but not 'q/lora_b'"),
        ({"q": factors(8, 6, 2) | {"lora_b": optax.MaskedNode()}}, "half a factor pair"),
        (
            {"q": {"lora_a": jnp.zeros((8, 2)), "lora_b": jnp.zeros((3, 6))}},
            r"'q'.*\(8, 2\).*\(3, 6\)",
        ),
        ({"q": {"lora_a": jnp.zeros((4, 8, 2)), "lora_b": jnp.zeros((5, 2, 6))}}, "do not fit"),
        ({"q": {"lora_a": jnp.zeros((8, 0)), "lora_b": jnp.zeros((0, 6))}}, "do not fit"),
        ({"q": factors(8, 6, 7)}, r"rank of 'q' is 7, above min\(in, out\) = 6"),
        ({"q": {"kernel": jnp.zeros((8, 6))}}, "no factor pair.*found q/kernel"),
        (jnp.zeros(8), "no factor pair.*found a single array"),
        (
            {"q": factors(8, 6, 2), "v": {"lora_A": {"weight": jnp.zeros((2, 8))}}},
            "'v/lora_A/weight' is named like a factor, but belongs to no pair",
        ),
        (
            {"q": factors(8, 6, 2) | {"lora_b_2": jnp.zeros((2, 6))}},
            "'q/lora_b_2' is named like a factor",
        ),
    ],
)
def test_errors_name_the_path(tree, message):
    with pytest.raises(ValueError, match=message):
        find_pairs(tree)


def test_leaves_that_are_no_factors_by_name():
    others = {"lora_alpha": jnp.zeros((2, 2)), "flora_b": jnp.zeros((2, 2))}
    tree = {"q": factors(8, 6, 2) | others | {"lora_b_bias": jnp.zeros(6)}}
    tree = {"lora_a": {"task": {**tree, "head": {"kernel": jnp.zeros((2, 2))}}}}
    assert len(find_pairs(tree)) == 1
    tree["q"] = {"lora_a_scale": jnp.zeros((2, 2))}
    assert len(find_pairs(tree, FactorSpec([("lora_a", "lora_b")]))) == 1


def test_no_pairs_on_purpose():
    assert find_pairs({"kernel": jnp.zeros((8, 6))}, FactorSpec(())) == []
    assert find_pairs({}) == []


def test_complex_factors_are_refused():
    params = {"q": {"lora_a": jnp.ones((4, 2), jnp.complex64), "lora_b": jnp.ones((2, 3))}}
    with pytest.raises(ValueError, match=r"'q/lora_a' is complex64, expected real factors"):
        find_pairs(params)


@pytest.mark.parametrize(
    ("a", "b", "axes", "stack", "ins", "outs"),
    [
        ((8, 5, 2), (2, 5, 6), (1,), (5,), (8,), (6,)),
        ((8, 2), (2, 6), (), (), (8,), (6,)),
        ((3, 4, 3), (3, 5, 2), (), (), (3, 4), (5, 2)),  # else three layers of (4, 3) and (5, 2)?
        ((5, 8, 2), (5, 2, 6), (0,), (5,), (8,), (6,)),
        ((7, 8, 5, 2), (7, 2, 5, 6), (2, 0), (7, 5), (8,), (6,)),
    ],
)
def test_stack_axis_that_are_named(a, b, axes, stack, ins, outs):
    rng = np.random.default_rng(0)
    tree = {"lora_a": rng.normal(size=a), "lora_b": rng.normal(size=b)}
    [pair] = find_pairs(tree, FactorSpec(stack_axis=axes))
    assert (pair.a.stack, pair.a.features, pair.b.features) == (stack, ins, outs)
    for factor, x in ((pair.a, tree["lora_a"]), (pair.b, tree["lora_b"])):
        folded = factor.fold(jnp.asarray(x))
        layers = np.moveaxis(x, sorted(axes), range(len(axes)))
        np.testing.assert_array_equal(np.ravel(folded), np.ravel(layers).astype(np.float32))
        np.testing.assert_array_equal(factor.unfold(folded), x.astype(np.float32))
        assert factor.shape(pair.rank) == x.shape


def test_stack_axis_that_do_not_fit():
    tree = {"q": factors(8, 6, 2, stack=(5,))}
    with pytest.raises(ValueError, match=r"'q' do not fit.*stack at axes \(1,\)"):
        find_pairs(tree, FactorSpec(stack_axis=1))
    with pytest.raises(ValueError, match=r"stack_axis is -1, expected different positions"):
        FactorSpec(stack_axis=-1)


def shapes(a, b):
    return {
        "q": {
            "lora_a": jax.ShapeDtypeStruct(a, "float32"),
            "lora_b": jax.ShapeDtypeStruct(b, "float32"),
        }
    }


@pytest.mark.parametrize(
    ("a", "b", "ways"),
    [
        # (in, layers, rank) and (rank, layers, out), or one weight of an einsum.
        (
            (8, 3, 4),
            (4, 3, 12),
            ["1 for 3 weights of shape (8, 12)", "() for one weight of shape (8, 3, 3, 12)"],
        ),
        ((5, 5, 2), (2, 5, 6), ["1 for 5 weights", "() for one weight"]),  # as many layers as in
        ((8, 4, 4), (4, 4, 12), ["1 for 4 weights", "() for one weight"]),  # as many as ranks
        ((4, 4, 4), (4, 4, 12), ["1 for 4 weights", "0 for 4 weights", "() for one weight"]),
        # Heads: of the queries, of the output, of an output whose layers may lead too.
        ((16, 3, 4), (4, 3, 2, 8), ["1 for 3 weights of shape (16, 2, 8)", "() for one weight"]),
        ((2, 3, 8, 4), (4, 3, 16), ["1 for 3 weights of shape (2, 8, 16)", "() for one weight"]),
        (
            (4, 4, 8, 4),
            (4, 4, 16),
            ["1 for 4 weights of shape (4, 8, 16)", "0 for 4 weights", "() for"],
        ),
        # Stages before, or two scans on axis 1.
        ((6, 8, 5, 2), (6, 2, 5, 9), ["(0, 2) for 30 weights of shape (8, 9)", "0 for 6 weights"]),
        ((8, 3, 5, 2), (2, 3, 5, 9), ["(1, 2) for 15 weights", "1 for 3 weights", "2 for 5", "()"]),
        ((8, 2, 2), (2, 6, 2), ["2 for 2 weights of shape (8, 6)", "() for one weight"]),
    ],
)
def test_shapes_that_can_be_read_in_several_ways(a, b, ways):
    with pytest.raises(ValueError, match="can be read in several ways") as error:
        find_pairs(shapes(a, b))
    told = str(error.value)
    assert told.startswith(f"factors of 'q' can be read in several ways: A has shape {a} and B {b}")
    assert [
        part.split("stack_axis=")[1].startswith(way)
        for part, way in zip(told.split(", or "), ways, strict=True)
    ] == [True] * len(ways)
    for way in ways:  # and each of them is read as it says
        axis = ast.literal_eval(way.split(" for")[0])
        [pair] = find_pairs(shapes(a, b), FactorSpec(stack_axis=axis))
        assert pair.a.stack_axes == (axis if isinstance(axis, tuple) else (axis,))


sizes = st.integers(1, 5)


@hypothesis.given(
    layers=st.lists(sizes, max_size=2),
    ins=sizes,
    outs=st.lists(sizes, min_size=1, max_size=2),
    data=st.data(),
)
def test_leading_stacks_and_heads_are_read(layers, ins, outs, data):
    """But for square factors (r = in), whatever sizes are equal."""
    rank = data.draw(st.integers(1, min(ins, math.prod(outs))))
    ins += rank == ins
    [pair] = find_pairs(shapes((*layers, ins, rank), (*layers, rank, *outs)))
    assert (pair.rank, pair.a.stack, pair.b.features) == (rank, tuple(layers), tuple(outs))


@hypothesis.given(
    layers=sizes, ins=st.lists(sizes, min_size=1, max_size=2), outs=sizes, data=st.data()
)
def test_no_stack_on_axis_1_is_read_as_another(layers, ins, outs, data):
    rank = data.draw(st.integers(1, min(math.prod(ins), outs)))
    params = shapes((ins[0], layers, *ins[1:], rank), (rank, layers, outs))
    with pytest.raises(ValueError, match="pass stack_axis=1 for"):
        find_pairs(params)
    [pair] = find_pairs(params, FactorSpec(stack_axis=lambda path: {"q": 1}[path]))
    assert (pair.rank, pair.a.stack, pair.a.features) == (rank, (layers,), tuple(ins))
    assert pair.b.shape(rank) == params["q"]["lora_b"].shape


@hypothesis.given(ins=sizes, outs=sizes, axis=st.none() | st.just(1), data=st.data())
def test_factors_as_torch_has_them_are_refused(ins, outs, axis, data):
    """But for square ones (r = in = out), which no shape tells apart."""
    rank = data.draw(st.integers(1, min(ins, outs)))
    outs += rank == ins == outs
    layers = data.draw(st.lists(sizes, min_size=axis or 0, max_size=axis or 2))
    a, b = (*layers, rank, ins), (*layers, outs, rank)
    if axis == 1:
        a, b = (rank, *layers, ins), (outs, *layers, rank)
    with pytest.raises(ValueError, match=r"transpose both, if they are torch's"):
        find_pairs(shapes(a, b), FactorSpec(stack_axis=axis))


def test_stack_axis_by_path():
    params = {"k": factors(8, 6, 2, stack=(3,)), **shapes((8, 3, 2), (2, 3, 6))}
    found = find_pairs(params, FactorSpec(stack_axis={"k": None, "q": 1}.__getitem__))
    assert [(pair.path, pair.a.stack_axes) for pair in found] == [("k", (0,)), ("q", (1,))]
    with pytest.raises(
        ValueError, match=r"stack_axis of 'k' is True, expected different positions"
    ):
        find_pairs(params, FactorSpec(stack_axis=lambda path: True))
    with pytest.raises(ValueError, match=r"stack_axis is an array.*static_args"):
        optax.inject_hyperparams(loft)(1e-3, stack_axis=1).init(factors(8, 6, 2))


def test_layers_of_other_stacks_are_computed_apart():
    params = {
        f"l{i}": {"lora_a": jnp.ones((2, 2, 4, 2)), "lora_b": jnp.ones((2, 2, 2, 5))}
        for i in (0, 1)
    }
    tx = loft(0.1, stack_axis=lambda path: (0, 1) if path == "l0" else 0)
    updates, _ = tx.update(params, tx.init(params), params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def test_a_spec_is_a_value():
    """Equal, and with one hash, however its names were written; usable as a static argument."""
    specs = [FactorSpec([["a", "b"]], 2.0, [1, 0]), FactorSpec((("a", "b"),), 2.0, (0, 1))]
    assert specs[0] == specs[1]
    assert len({*specs, FactorSpec()}) == 2
    traced = []

    @functools.partial(jax.jit, static_argnums=1)
    def scaled(x, spec):
        traced.append(spec)
        return x * spec.scaling

    assert [float(scaled(1.0, spec)) for spec in specs] == [2.0, 2.0]
    assert len(traced) == 1


def test_a_scaling_may_be_traced():
    """As `optax.inject_hyperparams` does; a spec with an array is made anew at each step."""

    @jax.jit
    def scaled(s):
        [pair] = find_pairs(factors(8, 6, 2), spec := FactorSpec(scaling=s))
        return spec.scaling_of(pair)

    assert float(scaled(3.0)) == 3.0


def test_a_factor_of_two_pairs_is_refused():
    endings = (("lora_a", "lora_b"), ("kernel_lora_a", "kernel_lora_b"))
    pair = {"kernel_lora_a": np.ones((6, 2)), "kernel_lora_b": np.ones((2, 4))}
    with pytest.raises(ValueError, match="'x/kernel_lora_a' is a factor of two pairs"):
        find_pairs({"x": pair}, FactorSpec(endings))
    shared = {"a": np.ones((6, 2)), "b1": np.ones((2, 4)), "b2": np.ones((2, 4))}
    with pytest.raises(ValueError, match="two pairs, a with b1 and a with b2"):
        find_pairs(shared, FactorSpec((("a", "b1"), ("a", "b2"))))


def test_names_may_come_once():
    assert FactorSpec(zip(["down"], ["up"], strict=True)) == FactorSpec((("down", "up"),))
