"""Every transform under every combinator of Optax, over every kind of parameter tree.

After the manner of Optax's own common tests: one table of transforms, and each test runs over all
of it. Values are compared without compilation (`jax.disable_jit`): an update is then a sequence of
small operations that all transforms share, and a combinator has to give the very same numbers.
"""

import dataclasses
import functools
import inspect

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import loft_jax

LR = 0.1


def clipped(max_norm, first):
    clip = loft_jax.clip_by_projected_norm(max_norm, first=first)
    return optax.chain(loft_jax.project_gradients(), clip)


def calibrated(b1, b2, eps, second_moment):
    return optax.chain(
        loft_jax.project_gradients(),
        loft_jax.calibrate_moments(b1, b2, second_moment=second_moment),
        loft_jax.project_updates(eps),
    )


def balanced(learning_rate):
    return optax.chain(
        loft_jax.project_gradients(),
        loft_jax.calibrate_moments(),
        loft_jax.project_updates(1e-3),
        optax.scale_by_learning_rate(learning_rate),
        loft_jax.balance_factors(),
    )


# How to make each transform: a factory, its numbers, its other arguments. Each link of a chain
# stands alone, or in the least chain that it can stand in.
MOMENTS = {"b1": 0.8, "b2": 0.9, "eps": 1e-3}
ADAMW = {"learning_rate": LR, **MOMENTS, "weight_decay": 0.1}
MUON = {"learning_rate": LR, "beta": 0.9, "weight_decay": 0.1}
AT_ONCE = {"warmup_steps": 0}
TRANSFORMS = {
    "project_gradients": (loft_jax.project_gradients, {"scaling": 2.0}, {}),
    "clip_by_projected_norm": (clipped, {"max_norm": 0.5}, {"first": "a"}),
    "full moments": (calibrated, MOMENTS, {"second_moment": "full"}),
    "factored moments": (calibrated, MOMENTS, {"second_moment": "factored"}),
    "diagonal moments": (calibrated, MOMENTS, {"second_moment": "diagonal"}),
    "alternate_factors": (loft_jax.alternate_factors, {}, {}),
    "assign_overlap": (loft_jax.assign_overlap, {}, {}),
    "balance_factors": (balanced, {"learning_rate": LR}, {}),
    "loft": (loft_jax.loft, ADAMW, {}),
    "loft, full": (loft_jax.loft, ADAMW, {"second_moment": "full"}),
    "loft, diagonal": (loft_jax.loft, ADAMW, {"second_moment": "diagonal"}),
    "loft, bfloat16": (loft_jax.loft, ADAMW, {"state_dtype": "bfloat16", "mu_dtype": "bfloat16"}),
    "loft, clipped": (
        loft_jax.loft,
        {**ADAMW, "max_grad_norm": 0.5, "scaling": 2.0},
        {"second_moment": "full"},
    ),
    "loft, alternate": (loft_jax.loft, ADAMW, {"move": "alternate"}),
    "loft, a first": (loft_jax.loft, ADAMW, {"first": "a"}),
    "loft, balanced": (loft_jax.loft, ADAMW, {"balance": True}),
    "loft_muon": (loft_jax.loft_muon, MUON, {}),
    "precondition_by_reflora": (loft_jax.precondition_by_reflora, {}, {**AT_ONCE, "interval": 2}),
    "reflora": (loft_jax.reflora, ADAMW, AT_ONCE),
    "reflora_s": (loft_jax.reflora_s, ADAMW, AT_ONCE),
    "lora_plus": (loft_jax.lora_plus, {**ADAMW, "ratio": 4.0}, {}),
    "lora_fa": (loft_jax.lora_fa, {**ADAMW, "scaling": 2.0}, {}),
    "riemannian_lora": (loft_jax.riemannian_lora, {**ADAMW, "damping": 1e-2}, {}),
    "alt_lora_plus": (loft_jax.alt_lora_plus, {**ADAMW, "scaling": 2.0}, {}),
}
# Where Optax's Adam has its state in the dtype of the parameters.
ADAM_OF_OPTAX = ("reflora", "reflora_s", "lora_plus", "lora_fa", "riemannian_lora")
ALIASES = [
    name
    for name in TRANSFORMS
    if name.startswith("loft") or name in (*ADAM_OF_OPTAX, "alt_lora_plus")
]
# Where the state is in bfloat16, other rounding of a number may move it by a unit of that.
ROUNDING = {"loft, bfloat16": (2e-2, 2e-2)}
# Links whose results go on to the moments, in no less than float32.
PROJECTED_GRADIENTS = ("project_gradients", "clip_by_projected_norm")
# What stands in others here: in "loft, clipped" the full moments, say.
SLOW = (
    "full moments",
    "factored moments",
    "loft, bfloat16",
    "loft, balanced",
    "loft, full",
    "loft, diagonal",
    "loft, alternate",
    "loft, a first",
    "precondition_by_reflora",
    "alt_lora_plus",
)


def each_of(names):
    marked = [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names
    ]
    return pytest.mark.parametrize("name", marked)


every_transform, every_alias = each_of(TRANSFORMS), each_of(ALIASES)


def make(name):
    factory, numbers, others = TRANSFORMS[name]
    return factory(**numbers, **others)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def pair(seed, m=5, n=4, r=2, stack=()):
    return {"lora_a": normal(seed, *stack, m, r), "lora_b": normal(seed + 1, *stack, r, n)}


PARAMS = {"head": normal(5, 3), "q": pair(0)}


def gradients(params):
    return jax.tree.map(lambda p: jnp.sin(3 * p) + 0.3, params)


def follow(tx, params, steps, **extra):
    """Parameters after each update, computed without compilation."""
    with jax.disable_jit():
        state, path = tx.init(params), []
        for _ in range(steps):
            updates, state = tx.update(gradients(params), state, params, **extra)
            params = optax.apply_updates(params, updates)
            path.append(params)
    return path


@functools.cache
def path_of(name):
    """Where a transform goes by itself: each factor has moved once."""
    return follow(make(name), PARAMS, 2)


def assert_close(x, y, rtol=1e-5, atol=1e-6):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), x, y)


def kinds(tree):
    """Structure, shapes, dtypes and weak types."""
    leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda: tree))
    return treedef, [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves]


def assert_stable(tx, params):
    """A traced update keeps the form of its state, and gives updates of the form of parameters."""
    state = tx.init(params)
    updates, new_state = jax.eval_shape(tx.update, gradients(params), state, params)
    assert [x.dtype for x in jax.tree.leaves(updates)] == [x.dtype for x in jax.tree.leaves(params)]
    treedef, leaves = jax.tree.flatten(new_state)[::-1]
    assert kinds(state) == (treedef, [(x.shape, x.dtype, x.weak_type) for x in leaves])


# Under the combinators


@every_transform
def test_inject_hyperparams(name):
    factory, numbers, others = TRANSFORMS[name]
    # As for optax.contrib.muon: a number of iterations is no traced value.
    static = {"ns_steps"} & set(inspect.signature(factory).parameters)
    tx = optax.inject_hyperparams(factory, static)(**numbers, **others)
    assert set(tx.init(PARAMS).hyperparams) >= set(numbers)
    assert_stable(tx, PARAMS)
    # Numbers in float32 instead of float64 round otherwise.
    assert_close(follow(tx, PARAMS, 2), path_of(name), *ROUNDING.get(name, (1e-5, 1e-5)))


@every_transform
def test_multi_steps(name):
    """Two half gradients are one."""
    tx = optax.MultiSteps(make(name), 2)
    assert_stable(tx, PARAMS)
    path = follow(tx, PARAMS, 4)
    assert_close(path[0], PARAMS)
    assert_close(path[1::2], path_of(name))


@every_transform
@pytest.mark.parametrize("wrap", ["masked", "partition"])
def test_whole_pairs_left_out(name, wrap):
    """What is left out does not matter: in front, between and behind, a plain leaf or a pair."""
    params = {"a": normal(6, 2), **PARAMS, "k": pair(2), "z": normal(7, 2)}
    ours = {key: key in PARAMS for key in params}
    if wrap == "masked":
        theirs = {key: not own for key, own in ours.items()}
        tx = optax.chain(optax.masked(make(name), ours), optax.masked(optax.set_to_zero(), theirs))
    else:
        labels = {key: "ours" if own else "frozen" for key, own in ours.items()}
        tx = optax.partition({"ours": make(name), "frozen": optax.set_to_zero()}, labels)
    assert_stable(tx, params)
    path = follow(tx, params, 2)
    assert_close([{key: p[key] for key in PARAMS} for p in path], path_of(name))
    assert_close({key: path[-1][key] for key in "akz"}, {key: params[key] for key in "akz"}, 0, 0)


@every_transform
def test_apply_if_finite(name):
    """A gradient with a NaN is passed over as if it had not been."""
    tx = optax.apply_if_finite(make(name), max_consecutive_errors=3)
    assert_stable(tx, PARAMS)
    params, path = PARAMS, []
    with jax.disable_jit():
        state = tx.init(params)
        for bad in (False, True, False):
            grads = gradients(params)
            if bad:
                grads["q"]["lora_a"] = grads["q"]["lora_a"].at[0, 0].set(jnp.nan)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            path.append(params)
    assert_close(path[1], path[0], 0, 0)
    assert_close(path[::2], path_of(name))


@every_transform
def test_chain_with_a_schedule_and_extra_arguments(name):
    """Links with and without extra arguments, before and behind; a step size that changes."""

    def update(updates, state, params=None, *, value, **extra):
        return jax.tree.map(lambda u: u * value, updates), state

    by_value = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.0})
    tx = optax.named_chain(
        ("value", by_value), ("ours", make(name)), ("size", optax.scale_by_schedule(schedule))
    )
    path = follow(tx, PARAMS, 2, value=1.0, unexpected=2)
    assert_close(path, [path_of(name)[0]] * 2)


@every_alias
def test_learning_rate_schedule(name):
    factory, numbers, others = TRANSFORMS[name]
    schedule = optax.constant_schedule(numbers["learning_rate"])
    tx = factory(**{**numbers, "learning_rate": schedule}, **others)
    assert_stable(tx, PARAMS)
    assert_close(follow(tx, PARAMS, 2), path_of(name))


# Compiled


@functools.cache
def compiled_twice(name):
    """Two updates by one compiled function that takes the state and the parameters over."""
    tx = optax.with_extra_args_support(make(name))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, value):
        updates, state = tx.update(gradients(params), state, params, unexpected=value)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    given, path = [(params, state)], []
    for _ in range(2):
        params, state = step(params, state, 1.0)
        path.append(jax.tree.map(jnp.copy, params))
        given.append((params, state))
    return step._cache_size(), given, path


@every_transform
def test_compiled_once_with_extra_arguments(name):
    programs, _, path = compiled_twice(name)
    assert programs == 1
    rtol, atol = ROUNDING.get(name, (1e-3, 1e-4))
    assert_close(path, path_of(name), rtol, atol)


@every_transform
def test_donated_buffers_are_used(name):
    """All of the old state and parameters: none is left, none was of no use to the new ones.

    But for the norm that a clip found at the last step, which is there to be read only.
    """
    _, (*given, last), _ = compiled_twice(name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(given):
        assert leaf.is_deleted() or "projected_norm" in jax.tree_util.keystr(path)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(last))


@every_transform
def test_scan_and_cond(name):
    """The state may be carried by a scan, and chosen by a condition: no type may change."""
    tx = make(name)

    def body(carry, skip):
        params, state = carry
        updates, state = jax.lax.cond(
            skip,
            lambda: (params, state),
            lambda: tx.update(gradients(params), state, params),
        )
        return (optax.apply_updates(params, updates), state), None

    def run(params, skips):
        return jax.lax.scan(body, (params, tx.init(params)), skips)

    jax.eval_shape(run, PARAMS, jnp.zeros(3, bool))


@every_transform
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes(name, dtype):
    """Updates come in the dtype of the parameters, and states in float32 at least unless asked."""
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
        tx = make(name)
        if name in PROJECTED_GRADIENTS:
            updates, _ = jax.eval_shape(tx.update, gradients(params), tx.init(params), params)
            wide = jnp.promote_types(dtype, jnp.float32)
            assert {x.dtype for x in jax.tree.leaves(updates["q"])} == {wide}
            return
        assert_stable(tx, params)
        state = jax.tree_util.tree_leaves_with_path(jax.eval_shape(tx.init, params))
        for path, leaf in state:
            # Muon's plain leaves take Optax's Adam, whose state is in the dtype of the parameters.
            where = jax.tree_util.keystr(path)
            optax_s = name == "loft_muon" and "head" in where
            optax_s |= name in ADAM_OF_OPTAX and ("mu" in where or "nu" in where)
            if jnp.issubdtype(leaf.dtype, jnp.floating) and not optax_s:
                asked = name == "loft, bfloat16" and leaf.dtype == jnp.bfloat16
                assert asked or leaf.dtype == jnp.promote_types(dtype, jnp.float32)


# The state as trees of parameters


@every_transform
def test_map_params(name):
    """Optax tells the parts of a state that belong to parameters, and to which one each belongs."""
    tx = make(name)
    state = tx.init(PARAMS)
    ones = optax.tree.map_params(tx, jnp.ones_like, state)
    assert kinds(ones) == kinds(state)
    for leaf in jax.tree.leaves(ones):
        assert bool((leaf == (leaf.ndim > 0)).all())  # all but counters

    found = []

    def compare(leaf, param):
        if not is_masked(leaf):
            found.append(sum(x != y for x, y in zip(leaf.shape, param.shape, strict=True)))

    optax.tree.map_params(tx, compare, state, PARAMS, is_leaf=is_masked)
    keeps_moments = name not in (*PROJECTED_GRADIENTS, "alternate_factors", "assign_overlap")
    assert set(found) <= {0, 1}  # something else in the place of the rank, at most
    assert bool(found) == keeps_moments


def is_masked(x):
    return isinstance(x, optax.MaskedNode)


@every_transform
def test_empty_trees(name):
    tx = make(name)
    state = tx.init({})
    updates, state = tx.update({}, state, {})
    assert updates == {}


# Without pairs


@every_transform
def test_no_pair_is_an_error(name):
    with pytest.raises(ValueError, match=r"no factor pair.*kernel.*factors=\(\)"):
        make(name).init({"kernel": jnp.zeros((3, 3))})


@every_transform
def test_half_a_pair_is_an_error(name):
    """A mask may not go through a pair."""
    mask = {"head": True, "q": {"lora_a": True, "lora_b": False}}
    with pytest.raises(ValueError, match="half a factor pair: found 'q/lora_a' but not 'q/lora_b'"):
        optax.masked(make(name), mask).init(PARAMS)


def parabola(dtype):
    final = jnp.array([1.0, -1.0, 1.0], dtype) * (1 + 1j if dtype == "complex64" else 1)
    return jnp.array([-1.0, 10.0, 1.0], dtype), final, lambda p: squares(p - final)


def rosenbrock(dtype):
    a = 1 + 1j if dtype == "complex64" else 1.0

    def loss(p):
        return squares(a - p[0]) + 100 * squares(p[1] - p[0] ** 2)

    return jnp.zeros(2, dtype), jnp.array([a, a**2], dtype), loss


def matrix_parabola(dtype):
    final = jnp.array([[3.0, -2.0], [1.0, 4.0]], dtype)
    return jnp.zeros((2, 2), dtype), final, lambda p: squares(p - final)


def mixed_tensors(dtype):
    final = (jnp.array([1.0, -1.0, 2.0], dtype), jnp.array([[1.0, 0.0], [-1.0, 1.0]], dtype))
    start = jax.tree.map(jnp.zeros_like, final)
    return start, final, lambda p: squares(p[0] - final[0]) + squares(p[1] - final[1])


def squares(x):
    return jnp.sum((x * x.conj()).real)


@pytest.mark.parametrize(
    ("problem", "dtype"),
    [
        (parabola, "float32"),
        (parabola, "complex64"),
        (rosenbrock, "float32"),
        (rosenbrock, "complex64"),
        (matrix_parabola, "float32"),
        (mixed_tensors, "float32"),
    ],
)
def test_problems_of_optax_without_pairs(problem, dtype):
    """Those of its common tests, with their numbers of steps and tolerance."""
    start, final, loss = problem(dtype)
    tx = loft_jax.loft(1e-1, factors=())

    def body(carry, _):
        params, state = carry
        grads = jax.tree.map(jnp.conj, jax.grad(loss)(params))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda: jax.lax.scan(body, (start, tx.init(start)), length=10_000))()
    assert_close(params, final, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("name", ["loft", "loft, alternate", "loft, a first", "loft, balanced"])
def test_no_pairs_on_purpose_is_adamw(name):
    factory, numbers, others = TRANSFORMS[name]
    params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
    ours = follow(factory(**numbers, **others, factors=()), params, 3)
    assert_close(ours, follow(optax.adamw(**numbers), params, 3))


# Parameter trees


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


@every_alias
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
    expected = follow(make(name), params, 2)
    path = follow(make(name), shaped, 2)
    assert_close(
        [[x.ravel() for x in jax.tree.leaves(p)] for p in path],
        [[x.ravel() for x in jax.tree.leaves(p)] for p in expected],
    )
