"""Adapters on some of the layers of a stack."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from loft_jax import loft
from loft_jax.errors import InputError
from loft_jax.lora import LoRAConfig, add_lora, lora_layers, merge_lora
from loft_jax.lora.stacks import with_full_stacks
from loft_jax.models.llama import Llama, LlamaConfig
from tests.lora.models import Block, Stacked

TOKENS = jnp.arange(12).reshape(2, 6)
Q, DOWN = "layers.self_attn.q_proj", "layers.mlp.down_proj"
LAYERS = (0, 2)


def llama(**fields):
    model = Llama(LlamaConfig(32, 16, 24, 3, 2, 1, 8), rngs=nnx.Rngs(0))
    config = LoRAConfig(**{"rank": 2, "target_modules": ["q_proj", "down_proj"], **fields})
    return add_lora(model, config, rngs=nnx.Rngs(1))


def randomize(model):
    rng = np.random.default_rng(0)
    for layer in lora_layers(model).values():
        for factor in (layer.lora_a, layer.lora_b):
            factor[...] = jnp.asarray(rng.normal(size=factor.shape), factor.dtype)
        if layer.lora_magnitude is not None:
            layer.lora_magnitude[...] *= 1.5
    return model


@nnx.jit
def run(model):
    return model(TOKENS)


@pytest.fixture(scope="module")
def base_logits():
    return run(Llama(LlamaConfig(32, 16, 24, 3, 2, 1, 8), rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("layers", [(0, 2), (-1, 0), (2, 0, 0)])
def test_only_the_factors_of_these_layers_are_held(layers):
    shapes = {
        path: (layer.lora_numbers, layer.lora_a.shape, layer.lora_b.shape)
        for path, layer in lora_layers(llama(layers=layers)).items()
    }
    assert shapes == {
        Q: (LAYERS, (2, 16, 2), (2, 2, 16)),
        DOWN: (LAYERS, (2, 24, 2), (2, 2, 16)),
    }


def test_names_may_have_dots():
    stack = nnx.vmap(lambda rngs: nnx.Linear(4, 5, rngs=rngs))(nnx.Rngs(0).fork(split=3))
    model = nnx.Sequential(nnx.Dict({"x.y": stack}))
    add_lora(model, LoRAConfig(rank=2, layers=[0]), rngs=nnx.Rngs(1))
    full = nnx.to_flat_state(with_full_stacks(model, nnx.state(model, nnx.LoRAParam)))
    assert sorted(value.shape for _, value in full) == [(3, 2, 5), (3, 4, 2)]


def test_all_layers_are_those_of_no_numbers():
    all_of_them, unnamed = llama(layers=range(3)), llama()
    assert nnx.graphdef(all_of_them) == nnx.graphdef(unnamed)


@pytest.mark.parametrize("init", ["kaiming_uniform", "balanced", "pissa"])
def test_the_model_starts_as_the_base(base_logits, init):
    np.testing.assert_array_equal(run(llama(layers=LAYERS, init=init)), base_logits)


def test_pissa_takes_the_weights_of_its_layers():
    some, every = llama(layers=LAYERS, init="pissa"), llama(init="pissa")
    found, expected = (lora_layers(model)[Q].lora_a[...] for model in (some, every))
    np.testing.assert_array_equal(found, expected[jnp.array(LAYERS)])


@pytest.mark.parametrize("use_dora", [False, True])
def test_other_layers_are_those_of_the_base(use_dora):
    """Also with DoRA, and for the merged weights, bit for bit."""
    model = randomize(llama(layers=LAYERS, use_dora=use_dora))
    kernels = {path: layer.kernel[...] for path, layer in lora_layers(model).items()}
    logits = run(model)
    merge_lora(model)
    np.testing.assert_allclose(run(model), logits, atol=1e-4)
    for path, module in ((Q, model.layers.self_attn.q_proj), (DOWN, model.layers.mlp.down_proj)):
        np.testing.assert_array_equal(module.kernel[1], kernels[path][1])
        assert (module.kernel[0] != kernels[path][0]).any()


def loss_of(logits):
    logits = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logits, TOKENS[:, 1:, None], -1).mean()


def trained(loss, params, steps=3):
    tx = loft(1e-2, max_grad_norm=0.5, scaling=1.0)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


# Daily, other tests have LoFT on a stack beside separate pairs, and the model with these layers.
@pytest.mark.slow
def test_loft_trains_them_as_if_each_layer_had_its_own_pair():
    """Against adapters on all layers, whose other factors are constants of zero."""
    model = randomize(llama(layers=LAYERS, target_modules="q_proj"))
    graphdef, params, rest = nnx.split(model, nnx.LoRAParam, ...)
    found, state = trained(
        lambda params: loss_of(nnx.merge(graphdef, params, rest)(TOKENS)), params
    )
    full_def, full, full_rest = nnx.split(llama(target_modules="q_proj"), nnx.LoRAParam, ...)
    paths = [path for path, _ in nnx.to_flat_state(full)]
    pairs = {  # one pair for each layer and module, of matrices
        f"{number}/{'.'.join(path[:-1])}": {
            name: dict(nnx.to_flat_state(params))[(*path[:-1], name)][at]
            for name in ("lora_a", "lora_b")
        }
        for at, number in enumerate(LAYERS)
        for path in paths
    }

    def loss(pairs):
        stacked = []
        for path, variable in nnx.to_flat_state(full):
            value = jnp.zeros_like(variable.get_value())
            for number in LAYERS:
                own = pairs[f"{number}/{'.'.join(path[:-1])}"][path[-1]]
                value = value.at[number].set(own)
            stacked.append((path, variable.replace(value)))
        return loss_of(nnx.merge(full_def, nnx.from_flat_state(stacked), full_rest)(TOKENS))

    expected, expected_state = trained(loss, pairs)
    for path, variable in nnx.to_flat_state(found):
        for at, number in enumerate(LAYERS):
            own = expected[f"{number}/{'.'.join(path[:-1])}"][path[-1]]
            np.testing.assert_allclose(variable[at], own, rtol=2e-5, atol=2e-6)
            start = pairs[f"{number}/{'.'.join(path[:-1])}"][path[-1]]
            assert np.abs(own - start).max() > 1e-3
    sizes = [sum(x.size for x in jax.tree.leaves(s)) for s in (state, expected_state)]
    assert sizes[0] == sizes[1]  # of the optimizer: nothing for the other layers


def test_dropout_draws_for_the_whole_stack():
    model = llama(layers=LAYERS, dropout=0.5)
    assert not np.array_equal(run(randomize(model)), run(model))


class Listed(nnx.Module):
    """Blocks that are not stacked."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Block(4, rngs=rngs) for _ in range(3)])
        self.lm_head = nnx.Linear(4, 4, rngs=rngs)


@pytest.mark.parametrize(("layers", "expected"), [((1,), [1]), ((0, -1), [0, 2])])
def test_modules_in_a_list_are_chosen_by_their_number(layers, expected):
    model = Listed(nnx.Rngs(0))
    add_lora(model, LoRAConfig(2, layers=layers), rngs=nnx.Rngs(1))
    assert list(lora_layers(model)) == [
        f"blocks.{number}.{name}" for number in expected for name in ("down_proj", "up_proj")
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": [3]}, r"layers: 3 is no layer of layers\.down_proj, expected -3 to 2"),
        ({"layers": [-4]}, "layers: -4 is no layer"),
        (
            {"layers": [0], "target_modules": ["up_proj", "lm_head"]},
            r"layers: \[0\] leaves nothing of target_modules 'lm_head'",
        ),
        ({"layers": [0], "target_modules": "embed"}, "leaves nothing of target_modules 'embed'"),
    ],
)
def test_numbers_of_no_layer_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        add_lora(Stacked(rngs=nnx.Rngs(0)), LoRAConfig(2, **fields), rngs=nnx.Rngs(1))


@pytest.mark.parametrize("layers", [[], "0", [0.5], [True], 3])
def test_what_is_no_number_is_refused(layers):
    with pytest.raises(InputError, match=r"^layers is .*, expected numbers of layers"):
        LoRAConfig(2, layers=layers)
