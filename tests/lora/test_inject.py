"""Adding, folding and taking off over whole models: stacks, shared weights, training."""

import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from loft_jax import find_pairs
from loft_jax.errors import InputError
from loft_jax.lora import LoRAConfig, add_lora, lora_layers, merge_lora, remove_lora
from loft_jax.lora.inject import LayerFactors, insert_lora
from loft_jax.models.llama import Llama, LlamaConfig

from .models import Stacked

TOKENS = jnp.arange(10).reshape(2, 5)
UP, DOWN = "layers.up_proj", "layers.down_proj"


def stacked(**fields):
    config = LoRAConfig(**{"rank": 2, **fields})
    return add_lora(Stacked(rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(1))


def randomize(model, seed=3):
    rng = np.random.default_rng(seed)
    for layer in lora_layers(model).values():
        for factor in (layer.lora_a, layer.lora_b):
            factor[...] = jnp.asarray(rng.normal(size=factor.shape), factor.dtype)
    return model


def leaves(model):
    return {
        ".".join(map(str, path)): np.asarray(value[...])
        for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


@nnx.jit
def run(model, tokens):
    return model(tokens)


def test_a_stack_is_found_and_starts_as_the_base():
    model = stacked()
    assert {p: (v.lora_a.shape, v.lora_b.shape) for p, v in lora_layers(model).items()} == {
        DOWN: ((3, 12, 2), (3, 2, 6)),
        UP: ((3, 6, 2), (3, 2, 12)),
    }
    base = Stacked(rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(run(model, TOKENS), run(base, TOKENS))
    assert list(leaves(base)) == [path for path in leaves(model) if "lora" not in path]


@pytest.mark.parametrize("init", ["kaiming_uniform", "gaussian", jax.nn.initializers.orthogonal()])
def test_every_layer_of_a_stack_draws_its_own_factor(init):
    a = np.asarray(stacked(init=init).layers.up_proj.lora_a[...])  # (stack, in, r)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(a[i] - a[j]).min() > 0


@pytest.mark.parametrize("init", ["kaiming_uniform", "gaussian"])
def test_initial_scale_is_that_of_peft(init):
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    theirs = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(400, 300)),
        LoraConfig(
            r=50, target_modules=["0"], init_lora_weights=(init == "gaussian" and init) or True
        ),
    ).base_model.model[0]
    layer = nnx.Linear(400, 300, rngs=nnx.Rngs(0))
    add_lora(layer, LoRAConfig(50, init=init), rngs=nnx.Rngs(1))
    theirs_a = theirs.lora_A["default"].weight.detach().numpy()
    np.testing.assert_allclose(np.std(layer.lora_a[...]), theirs_a.std(), rtol=0.03)
    if init == "kaiming_uniform":
        assert np.abs(layer.lora_a[...]).max() == pytest.approx(1 / math.sqrt(400), rel=1e-3)


def test_an_initializer_sees_the_matrix_of_one_layer():
    shapes = []

    def init(key, shape, dtype):
        shapes.append((shape, dtype))
        return jnp.ones(shape, dtype)

    layer = nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=nnx.Rngs(0))
    add_lora(layer, LoRAConfig(2, init=init, dtype=jnp.bfloat16), rngs=nnx.Rngs(1))
    assert shapes == [((6, 2), jnp.bfloat16)]
    assert layer.lora_a.dtype == jnp.bfloat16


def test_ranks_and_alphas_by_pattern():
    model = stacked(alpha=3.0, rank_pattern={"up_proj": 4}, alpha_pattern={r"layers\..*": 1.5})
    assert (model.layers.up_proj.lora_rank, model.layers.down_proj.lora_rank) == (4, 2)
    assert model.layers.up_proj.lora_scaling == 1.5 / 4
    assert model.layers.up_proj.lora_a.shape == (3, 6, 4)


def test_rank_stabilized_scaling():
    fields = {"use_rslora": True, "rank_pattern": {"up_proj": 4}}
    model = stacked(alpha=3.0, **fields)
    assert model.layers.up_proj.lora_scaling == 3.0 / 4**0.5
    assert model.layers.down_proj.lora_scaling == 3.0 / 2**0.5
    model = stacked(**fields)  # alpha is the rank
    assert (model.layers.up_proj.lora_alpha, model.layers.up_proj.lora_scaling) == (4.0, 2.0)
    plain = stacked(
        alpha_pattern={"down_proj": 2.0 * 2**0.5, "up_proj": 8.0},
        rank_pattern=fields["rank_pattern"],
    )
    np.testing.assert_allclose(
        run(randomize(model), TOKENS), run(randomize(plain), TOKENS), rtol=1e-5
    )
    assert nnx.split(remove_lora(model))[0] == nnx.split(Stacked(rngs=nnx.Rngs(0)))[0]


def test_merge_is_the_sum_in_float64_of_every_layer():
    model = randomize(stacked(alpha=5.0, target_modules=["up_proj", "down_proj", "embed"]))
    before, adapted = leaves(model), run(model, TOKENS)
    merge_lora(model)
    after = leaves(model)
    for path in (f"{UP}.kernel", f"{DOWN}.kernel", "embed.embedding"):
        module = path.rpartition(".")[0]
        a, b = (np.float64(before[f"{module}.lora_{x}"]) for x in "ab")
        np.testing.assert_allclose(after[path], before[path] + 2.5 * (a @ b), rtol=1e-6, atol=1e-6)
    assert nnx.split(model)[0] == nnx.split(Stacked(rngs=nnx.Rngs(0)))[0]
    np.testing.assert_allclose(run(model, TOKENS), adapted, rtol=1e-4, atol=1e-4)


def test_merge_into_bfloat16_rounds_once():
    layer = nnx.Linear(64, 48, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    kernel = np.asarray(layer.kernel[...], np.float32)
    add_lora(layer, LoRAConfig(8), rngs=nnx.Rngs(1))
    randomize(layer)
    a, b = np.asarray(layer.lora_a[...]), np.asarray(layer.lora_b[...])
    merge_lora(layer)
    assert layer.kernel.dtype == jnp.bfloat16
    exact = kernel + np.float64(a) @ np.float64(b)
    error = np.abs(np.asarray(layer.kernel[...], np.float64) - exact)
    assert (error <= np.abs(exact) * 2.0**-8 * 1.001 + 1e-6).all()  # half a unit in the last place


def test_removal_restores_the_model_to_the_bit():
    base = Stacked(rngs=nnx.Rngs(0))
    model = remove_lora(randomize(stacked(dropout=0.3, target_modules=["up_proj", "embed"])))
    (graphdef, state), (expected_graphdef, expected) = nnx.split(model), nnx.split(base)
    assert graphdef == expected_graphdef
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(state), nnx.to_pure_dict(expected))
    assert lora_layers(model) == {}


@pytest.mark.parametrize("take_off", [merge_lora, remove_lora])
def test_nothing_to_take_off(take_off):
    with pytest.raises(InputError, match="no LoRA layer"):
        take_off(Stacked(rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 7}, r"layers\.down_proj: rank 7 is above 6, .*in 12, out 6"),
        ({"rank_pattern": {"up_proj": 9}}, r"layers\.up_proj: rank 9 is above 6"),
        ({"target_modules": ["up_proj", "nothing"]}, "'nothing' matches no layer"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(fields, message):
    model = Stacked(rngs=nnx.Rngs(0))
    before = nnx.split(model)[0]
    with pytest.raises(InputError, match=message):
        add_lora(model, LoRAConfig(**{"rank": 2, **fields}), rngs=nnx.Rngs(1))
    assert nnx.split(model)[0] == before


@pytest.mark.parametrize("wrapper", [nnx.WeightNorm, nnx.SpectralNorm])
def test_weights_that_a_wrapper_replaces_are_refused(wrapper):
    """Merged, the factors would be normalized as well."""
    rngs = nnx.Rngs(0)
    wrapped = wrapper(nnx.Sequential(nnx.Linear(4, 8, rngs=rngs)), rngs=rngs)
    model = nnx.Sequential(wrapped, nnx.Linear(8, 4, rngs=rngs))
    with pytest.raises(
        InputError, match=rf"layers\.0: is under nnx\.{wrapper.__name__}, .*exclude"
    ):
        add_lora(model, LoRAConfig(2), rngs=rngs)
    add_lora(model, LoRAConfig(2, target_modules=[r"layers.1"]), rngs=rngs)
    assert list(lora_layers(model)) == ["layers.1"]


def test_an_error_about_a_lone_layer_names_its_class():
    with pytest.raises(InputError, match=r"^Linear: rank 5 is above 4"):
        add_lora(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), LoRAConfig(5), rngs=nnx.Rngs(1))


def test_the_same_layer_twice_is_refused_others_may_follow():
    model = stacked(target_modules="up_proj")
    with pytest.raises(InputError, match=r"layers\.up_proj: has LoRA factors already"):
        add_lora(model, LoRAConfig(2), rngs=nnx.Rngs(2))
    assert list(lora_layers(model)) == [UP]
    add_lora(model, LoRAConfig(3, target_modules="down_proj"), rngs=nnx.Rngs(2))
    assert {path: layer.lora_rank for path, layer in lora_layers(model).items()} == {DOWN: 3, UP: 2}


@pytest.mark.parametrize("rngs", [0, jax.random.key(0), None])
def test_what_is_no_rngs_is_refused(rngs):
    with pytest.raises(InputError, match=r"^rngs is .*, expected nnx\.Rngs"):
        add_lora(Stacked(rngs=nnx.Rngs(0)), LoRAConfig(2), rngs=rngs)


def test_missing_streams_are_named():
    with pytest.raises(InputError, match="'params'"):
        add_lora(Stacked(rngs=nnx.Rngs(0)), LoRAConfig(2), rngs=nnx.Rngs(dropout=0))
    with pytest.raises(InputError, match="'dropout'"):
        add_lora(Stacked(rngs=nnx.Rngs(0)), LoRAConfig(2, dropout=0.1), rngs=nnx.Rngs(params=0))


def test_a_stack_whose_axis_does_not_lead_is_refused():
    layer = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(jnp.zeros((4, 3, 5)))
    with pytest.raises(
        InputError, match=r"layers\.0: its weight is \(4, 3, 5\), expected \(4, 5\)"
    ):
        add_lora(nnx.Sequential(layer), LoRAConfig(2), rngs=nnx.Rngs(1))


def test_dropout_in_a_scanned_stack():
    model = randomize(stacked(dropout=0.5))
    streams = model.layers.up_proj.lora_dropout.rngs
    assert streams.key.shape == streams.count.shape == (3,)
    assert len(np.unique(jax.random.key_data(streams.key[...]), axis=0)) == 3
    model.train()
    first, second = run(model, TOKENS), run(model, TOKENS)
    assert (np.asarray(first) != np.asarray(second)).any()
    np.testing.assert_array_equal(model.layers.up_proj.lora_dropout.rngs.count[...], [2, 2, 2])
    model.eval()
    np.testing.assert_array_equal(run(model, TOKENS), run(randomize(stacked()), TOKENS))
    assert not nnx.to_flat_state(nnx.state(stacked(), nnx.RngState))


def test_copies_of_a_stacked_model_compute_the_same():
    model = randomize(stacked(dropout=0.5))
    model.eval()
    expected = run(model, TOKENS)
    for copied in (nnx.merge(*nnx.split(model)), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(run(copied, TOKENS), expected)


def test_only_factors_get_gradients_and_optimizer_state():
    model = randomize(stacked())
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    before = leaves(model)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return (model(TOKENS) ** 2).mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return value, grads

    losses = []
    for _ in range(5):
        value, grads = step(model, optimizer)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    factors = {path for path in before if ".lora_" in path}
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(grads)}
    assert names == factors
    sizes = sum(before[path].size for path in factors)
    state = [leaf for leaf in jax.tree.leaves(nnx.state(optimizer)) if leaf.ndim]
    assert sum(leaf.size for leaf in state) == 2 * sizes
    after = leaves(model)
    for path in before:
        assert np.array_equal(before[path], after[path]) == (path not in factors)


def test_shared_layers_are_adapted_and_merged_once():
    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 4, rngs=rngs)
            self.second = self.first

        def __call__(self, x):
            return self.second(self.first(x))

    model = randomize(add_lora(Shared(nnx.Rngs(0)), LoRAConfig(2), rngs=nnx.Rngs(1)))
    assert list(lora_layers(model)) == ["first"]
    x = jnp.ones((2, 4))
    expected = model(x)
    np.testing.assert_allclose(merge_lora(model)(x), expected, rtol=1e-5)


def test_a_weight_used_by_two_layers_cannot_be_merged():
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
    model.layers[1].kernel = model.layers[0].kernel
    add_lora(model, LoRAConfig(2, target_modules=["layers.0"]), rngs=nnx.Rngs(2))
    with pytest.raises(InputError, match=r"layers\.0: its weight is shared with layers\.1\.kernel"):
        merge_lora(model)
    assert list(lora_layers(model)) == ["layers.0"]


def test_abstract_models():
    model = nnx.eval_shape(lambda: stacked(dropout=0.1))
    assert model.layers.up_proj.lora_a.shape == (3, 6, 2)


def test_the_optimizer_finds_the_same_axes():
    class Many(nnx.Module):
        def __init__(self, rngs):
            self.stacked = Stacked(rngs=rngs)
            self.attention = nnx.MultiHeadAttention(num_heads=3, in_features=12, rngs=rngs)
            self.einsum = nnx.Einsum("...a,hab->...hb", (5, 4, 6), rngs=rngs)
            self.experts = nnx.LinearGeneral(4, (5, 3), batch_axis={0: 7}, rngs=rngs)

    model = Many(nnx.Rngs(0))
    add_lora(model, LoRAConfig(2, target_modules=r"(?!.*lm_head).*"), rngs=nnx.Rngs(1))
    layers = lora_layers(model)
    pairs = find_pairs(nnx.state(model, nnx.LoRAParam))
    assert {pair.path.replace("/", ".") for pair in pairs} == set(layers)
    for pair in pairs:
        axes = layers[pair.path.replace("/", ".")].lora_axes(layers[pair.path.replace("/", ".")])
        assert pair.a.stack == (*axes.stack, *axes.batch)
        assert (pair.a.features, pair.b.features) == (axes.ins, axes.outs)


def llama(**fields):
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        **fields,
    )
    return Llama(config, dtype=jnp.bfloat16, remat="full", rngs=nnx.Rngs(0))


def test_all_linear_layers_of_a_llama():
    model = add_lora(llama(), LoRAConfig(2), rngs=nnx.Rngs(1))
    attention = [f"layers.self_attn.{name}_proj" for name in "qkvo"]
    mlp = [f"layers.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert set(lora_layers(model)) == {*attention, *mlp}


def test_a_llama_with_dropout_remat_and_bfloat16():
    config = LoRAConfig(2, dropout=0.5, target_modules=["q_proj", "down_proj"])
    model = randomize(add_lora(llama(), config, rngs=nnx.Rngs(1)))

    @nnx.jit
    def grads(model):
        wrt = nnx.DiffState(0, nnx.LoRAParam)
        return nnx.grad(lambda model: (model(TOKENS) ** 2).mean(), argnums=wrt)(model)

    first, second = grads(model), grads(model)
    leaves_of = [jax.tree.leaves(nnx.to_pure_dict(g)) for g in (first, second)]
    assert len(leaves_of[0]) == 4
    for a, b in zip(*leaves_of, strict=True):
        assert a.dtype == jnp.float32
        assert np.isfinite(a).all()
        assert (np.abs(a).reshape(3, -1).max(-1) > 0).all()  # in every layer of the stack
        assert (a != b).any()
    model.eval()
    np.testing.assert_array_equal(run(model, TOKENS), run(model, TOKENS))


def test_an_adapted_embedding_that_is_also_the_head_is_merged_alone():
    """The head, which the factors leave alone, keeps the weight of the base."""
    model = llama(tie_word_embeddings=True)
    base = model.embed_tokens.embedding[...]
    add_lora(model, LoRAConfig(2, target_modules="embed_tokens"), rngs=nnx.Rngs(1))
    logits = run(randomize(model), TOKENS)
    merge_lora(model)
    np.testing.assert_allclose(run(model, TOKENS), logits, atol=4e-3)  # it computes in bfloat16
    np.testing.assert_array_equal(model.lm_head.kernel[...].T, base)
    assert (model.embed_tokens.embedding[...] != base).any()


def test_separate_layers_are_drawn_without_vmap(monkeypatch):
    """Each call of it leaves more in JAX's caches, and makes the next one slower."""
    monkeypatch.setattr("jax.vmap", None)
    layers = (nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2))
    model = add_lora(nnx.Sequential(*layers), LoRAConfig(2, init="balanced"), rngs=nnx.Rngs(2))
    assert len(lora_layers(model)) == 2


def test_factors_for_a_layer_that_is_not_there_are_refused():
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    factors = LayerFactors(2, 2.0, None, jnp.ones((4, 2)), jnp.zeros((2, 4)))
    with pytest.raises(InputError, match=r"layers\.7: the model has no such layer"):
        insert_lora(model, {"layers.0": factors, "layers.7": factors})
    assert not lora_layers(model)
