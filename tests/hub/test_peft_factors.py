"""Adapters of other libraries: Flax's own, Qwix's, hand-written; written for PEFT, read from it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import torch
from flax import nnx
from peft import LoraConfig, PeftModel
from safetensors.numpy import load_file, save_file

from loft_jax.errors import InputError
from loft_jax.hub import load_peft_adapter, load_peft_factors, save_peft_adapter
from loft_jax.lora import LoRAConfig, add_lora, lora_layers, merge_lora, remove_lora
from loft_jax.optim import FactorSpec
from tests.hub.peft_adapters import (
    CONFIG,
    CPU,
    WEIGHTS,
    adapted_llama,
    assert_same_files,
    our_logits,
    randomized_peft,
    torch_logits,
)
from tests.hub.twin import TorchTwin, Twin

RANK, ALPHA = 2, 6  # a scaling of 3
pytestmark = pytest.mark.filterwarnings("ignore")

# Shapes of factors in the layouts of hand-written pairs, of Qwix's einsums and of Linen's modules.
TREE = {
    "embed": {"embedding_lora_a": (64, RANK), "embedding_lora_b": (RANK, 8)},
    "blocks": {"lora_a": (2, 8, RANK), "lora_b": (2, RANK, 8)},
    "heads": {"w_lora_a": (8, RANK), "w_lora_b": (RANK, 2, 3)},
    "out": {"kernel_lora_a": (2, 3, RANK), "kernel_lora_b": (RANK, 8)},
    "side": [{"lora_A": (8, RANK), "lora_B": (RANK, 5)}],
}
TREE_AT_1 = {"blocks": {"lora_a": (8, 2, RANK), "lora_b": (RANK, 2, 8)}}
AT_1 = FactorSpec(stack_axis=1)
TREES = [(TREE, FactorSpec()), (TREE_AT_1, AT_1)]


def names(path, number):
    return {"blocks": f"blocks.{number}.fc", "side.0": "side.out"}.get(path, path)


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    is_leaf = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32),
        shapes,
        is_leaf=is_leaf,
    )


def twin_with(factors, at_1=False):
    """The twin whose weights are those that the forward pass of these factors has."""
    model = Twin(nnx.Rngs(0))
    equations = {
        "embed": "vr,rd->vd",
        "blocks": "ilr,rlo->lio" if at_1 else "lir,lro->lio",
        "heads": "ir,rhd->ihd",
        "out": "hdr,re->hde",
        "side": "ir,ro->io",
    }
    for name, pair in factors.items():
        a, b = jax.tree.leaves(pair)
        layer = model.side.out if name == "side" else getattr(model, name)
        weight = layer.embedding if name == "embed" else layer.kernel
        weight[...] += ALPHA / RANK * jnp.einsum(equations[name], a, b)
    return model


def peft_twin(folder):
    return PeftModel.from_pretrained(TorchTwin(Twin(nnx.Rngs(0))).eval(), folder, **CPU)


def assert_trees_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize(("shapes", "spec"), TREES, ids=["axis 0", "axis 1"])
def test_peft_computes_what_a_tree_does(tmp_path, shapes, spec):
    factors = drawn(shapes)
    save_peft_adapter(
        tmp_path, factors, rank=RANK, alpha=ALPHA, hf_name=names, spec=spec, task_type=None
    )
    expected = our_logits(twin_with(factors, at_1=spec == AT_1))
    np.testing.assert_allclose(torch_logits(peft_twin(tmp_path)), expected, atol=1e-5)
    nothing = jax.tree.map(jnp.zeros_like, factors)
    again = load_peft_factors(tmp_path, nothing, alpha=ALPHA, hf_name=names, spec=spec)
    assert_trees_equal(again, factors)


@pytest.mark.parametrize(("shapes", "spec"), TREES, ids=["axis 0", "axis 1"])
def test_a_tree_computes_what_peft_does(tmp_path, shapes, spec):
    targets = [name for name in ("embed", "fc", "heads", "out") if spec != AT_1 or name == "fc"]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
    theirs = randomized_peft(TorchTwin(Twin(nnx.Rngs(0))), config)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    empty = drawn(shapes)
    factors = load_peft_factors(
        tmp_path / "theirs", empty, rank=RANK, alpha=ALPHA, hf_name=names, spec=spec
    )
    expected = torch_logits(theirs)
    np.testing.assert_allclose(our_logits(twin_with(factors, spec == AT_1)), expected, atol=1e-5)
    save_peft_adapter(tmp_path / "ours", factors, alpha=ALPHA, hf_name=names, spec=spec)
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")


class Stranger(nnx.Module):
    """Layers of Flax's own LoRA: a layer that has it, and a layer inside of it."""

    def __init__(self, rngs):
        self.fc = nnx.LoRALinear(4, 8, lora_rank=RANK, rngs=rngs)
        self.out = nnx.LoRA(8, 3, 5, base_module=nnx.Linear(8, 5, rngs=rngs), rngs=rngs)
        for pair in (self.fc.lora, self.out):
            pair.lora_b[...] = jax.random.normal(rngs.params(), pair.lora_b.shape)

    def __call__(self, x):
        return self.out(nnx.tanh(self.fc(x)))


class TorchStranger(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.fc, self.out = torch.nn.Linear(4, 8), torch.nn.Linear(8, 5)
        for ours, theirs in ((model.fc, self.fc), (model.out.base_module, self.out)):
            theirs.weight.data = torch.tensor(np.array(ours.kernel[...].T))
            theirs.bias.data = torch.tensor(np.array(ours.bias[...]))

    def forward(self, x):
        return self.out(torch.tanh(self.fc(x)))


X = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)


def test_peft_computes_what_flax_does(tmp_path):
    model = Stranger(nnx.Rngs(0))
    save_peft_adapter(tmp_path, model, task_type=None)
    theirs = PeftModel.from_pretrained(TorchStranger(model).eval(), tmp_path, **CPU)
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.tensor(X)), model(X), atol=1e-5)
    settings = json.loads((tmp_path / CONFIG).read_text())
    assert settings["target_modules"] == ["fc", "out"]
    assert {settings["r"], *settings["rank_pattern"].values()} == {2, 3}
    again = Stranger(nnx.Rngs(7))
    assert load_peft_factors(tmp_path, again) is again
    assert_trees_equal(*(nnx.state(m, nnx.LoRAParam) for m in (again, model)))
    with pytest.raises(InputError, match=r"fc: alpha 4 at rank 2 scales by 2, and Flax's nnx.LoRA"):
        save_peft_adapter(tmp_path, model, alpha=4)


class OwnEinsum(nnx.Module):
    """An einsum with a raw weight, as models of Tunix have it."""

    def __init__(self, equation, shape, rngs):
        self.equation = equation
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape) * 0.5)

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w[...])


class Block(nnx.Module):
    def __init__(self, rngs):
        self.q_einsum = OwnEinsum("BTD,NDH->BTNH", (2, 4, 3), rngs)
        self.kv_einsum = OwnEinsum("BSD,CKDH->CBSKH", (2, 2, 4, 3), rngs)
        self.o_einsum = OwnEinsum("BTNH,NHD->BTD", (2, 3, 4), rngs)
        self.up_proj = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        keys, values = self.kv_einsum(x)
        return self.up_proj(self.o_einsum(jnp.tanh(self.q_einsum(x) + keys) * values))


class Blocks(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Block(rngs)])

    def __call__(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


class TorchBlock(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        kernels = {
            "q_proj": block.q_einsum.w[...].transpose(1, 0, 2).reshape(4, 6),
            "k_proj": block.kv_einsum.w[0].transpose(1, 0, 2).reshape(4, 6),
            "v_proj": block.kv_einsum.w[1].transpose(1, 0, 2).reshape(4, 6),
            "o_proj": block.o_einsum.w[...].reshape(6, 4),
            "up_proj": block.up_proj.kernel[...],
        }
        for name, kernel in kernels.items():
            layer = torch.nn.Linear(*kernel.shape, bias=name == "up_proj")
            layer.weight.data = torch.tensor(np.array(kernel.T))
            setattr(self, name, layer)
        self.up_proj.bias.data = torch.tensor(np.array(block.up_proj.bias[...]))

    def forward(self, x):
        attended = torch.tanh(self.q_proj(x) + self.k_proj(x)) * self.v_proj(x)
        return self.up_proj(self.o_proj(attended))


class TorchBlocks(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.layers = torch.nn.ModuleList(map(TorchBlock, model.layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def einsum_names(path, number):
    assert number is None
    layer, _, module = path.rpartition(".")
    if module == "kv_einsum":  # keys and values are one weight
        return f"{layer}.k_proj", f"{layer}.v_proj"
    return path.replace("_einsum", "_proj")


@pytest.fixture(scope="module")
def qwix_model():
    provider = qwix.LoraProvider(module_path=".*(einsum|up_proj)", rank=RANK, alpha=float(ALPHA))
    model = qwix.apply_lora_to_model(
        Blocks(nnx.Rngs(0)), provider, jnp.ones((1, 2, 4)), rngs=nnx.Rngs(1)
    )
    factors = nnx.state(model, nnx.LoRAParam)
    nnx.update(
        model,
        jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), factors),
    )
    return model


def test_peft_computes_what_qwix_does(tmp_path, qwix_model):
    save_peft_adapter(tmp_path, qwix_model, alpha=ALPHA, hf_name=einsum_names, task_type=None)
    x = np.random.default_rng(2).normal(size=(2, 3, 4)).astype(np.float32)
    torch_model = TorchBlocks(Blocks(nnx.Rngs(0))).eval()
    theirs = PeftModel.from_pretrained(torch_model, tmp_path, **CPU)
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.tensor(x)), qwix_model(x), atol=1e-5)
    factors = nnx.state(qwix_model, nnx.LoRAParam)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), factors)
    again = load_peft_factors(tmp_path, shapes, alpha=ALPHA, hf_name=einsum_names)
    assert_trees_equal(again, factors)
    # Another A for the values than for the keys is no pair of this einsum.
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.model.layers.0.v_proj.lora_A.weight"] += 1
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=r"layers\.0\.kv_einsum: has one A for layers\.0\.k_proj"):
        load_peft_factors(tmp_path, shapes, alpha=ALPHA, hf_name=einsum_names)


@pytest.mark.parametrize("unrolled", [False, True])
def test_the_names_of_a_family(tmp_path, llama_folder, unrolled):
    """The tree of our factors is written as the model with them is, whose files PEFT judges."""
    targets = ["embed_tokens", "q_proj", "down_proj"]
    model = adapted_llama(llama_folder, target_modules=targets, alpha=8)
    save_peft_adapter(tmp_path / "model", model)
    factors = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    if unrolled:
        stacks = factors.pop("layers")
        factors["layers"] = [jax.tree.map(lambda x, i=i: x[i], stacks) for i in range(3)]
    save_peft_adapter(tmp_path / "tree", factors, alpha=lambda path: 8, hf_name="llama")
    assert_same_files(tmp_path / "tree", tmp_path / "model")


def test_dtypes_shardings_and_other_leaves(tmp_path):
    """float64 of NumPy stays; so do the sharding of an array and all that is no factor."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    rng = np.random.default_rng(0)
    factors = {
        "x": {"lora_a": rng.normal(size=(4, 2)), "lora_b": rng.normal(size=(2, 3))},
        "y": {
            "lora_a": jax.device_put(jnp.ones((4, 2), jnp.bfloat16), sharding),
            "lora_b": jnp.ones((2, 3), jnp.bfloat16),
            "kernel": jnp.ones((4, 3), jnp.complex64),
        },
        "step": 3,
    }
    save_peft_adapter(tmp_path, factors, alpha=2)
    stored = load_file(tmp_path / WEIGHTS)
    assert {str(tensor.dtype) for tensor in stored.values()} == {"float64", "bfloat16"}
    blank = jax.tree.map(lambda x: x * 0, factors) | {"step": 3}
    blank["y"]["lora_a"] = jax.ShapeDtypeStruct((4, 2), jnp.bfloat16, sharding=sharding)
    again = load_peft_factors(tmp_path, blank, alpha=2)
    assert again["y"]["lora_a"].sharding == sharding
    assert isinstance(again["x"]["lora_a"], np.ndarray)
    assert again["y"].pop("kernel").sum() == 0
    del factors["y"]["kernel"]
    assert_trees_equal(again, factors)
    blank["x"] = jax.tree.map(lambda x: x.astype(np.float32), blank["x"])
    with pytest.raises(
        InputError, match="x/lora_a: is float32, which cannot hold the file's float"
    ):
        load_peft_factors(tmp_path, blank, alpha=2)


PAIR = {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 3))}
STACK = jax.tree.map(lambda x: jnp.stack([x] * 3), PAIR)
REFUSED = {
    "no alpha": ({"fc": PAIR}, {"alpha": None}, r"fc: alpha is missing"),
    "alpha below 0": ({"fc": PAIR}, {"alpha": -1.0}, r"alpha of fc is -1\.0, expected"),
    "another rank": ({"fc": PAIR}, {"rank": 4}, r"fc: has rank 2, expected 4"),
    "another scaling": (
        {"fc": PAIR},
        {"spec": FactorSpec(scaling=1.5)},
        r"fc: alpha 4 at rank 2 scales by 2, and spec scales by 1\.5",
    ),
    "half a pair": (
        {"fc": {"lora_a": PAIR["lora_a"]}},
        {},
        "half a factor pair: found 'fc/lora_a'",
    ),
    "empty": ({}, {}, "the tree has no factor pair"),
    "no factors": ({"fc": {"kernel": jnp.ones(3)}}, {}, "no factor pair in the parameters"),
    "whole model": (PAIR, {}, "the layer is the whole model"),
    "unnamed stack": ({"fc": STACK}, {}, "fc: is a stack of 3 layers, pass hf_name to name them"),
    "stack of stacks": (
        {"fc": jax.tree.map(lambda x: x[None], STACK)},
        {},
        r"fc: is a stack of stacks \(1, 3\)",
    ),
    "one name": (
        {"fc": PAIR, "up": PAIR},
        {"hf_name": lambda path, number: "x"},
        "up: its name 'x' is that of fc too",
    ),
    "no name": (
        {"fc": PAIR},
        {"hf_name": lambda path, number: None},
        r"fc: hf_name\('fc', None\) is None, expected a name",
    ),
    "rule that fails": (
        {"fc": PAIR},
        {"hf_name": lambda path, number: {}[path]},
        r"fc: hf_name\('fc', None\): KeyError: 'fc'",
    ),
    "parts": (
        {"fc": PAIR},
        {"hf_name": lambda path, number: ("k", "v")},
        r"fc: 3 outputs are not 2 equal parts",
    ),
    "not of the family": (
        {"fc": PAIR},
        {"hf_name": "llama"},
        "fc: llama has no such module; it has 'embed_tokens'",
    ),
    "no family": ({"fc": PAIR}, {"hf_name": "lama"}, "model_type is 'lama'"),
    "embedding": ({"fc": PAIR}, {"embeddings": ["wte"]}, "embeddings: 'wte' is no module"),
    "int": ({"fc": jax.tree.map(jnp.int32, PAIR)}, {}, "fc/lora_a: is int32, expected one of"),
    "complex": ({"fc": jax.tree.map(jnp.complex64, PAIR)}, {}, "'fc/lora_a' is complex64"),
    "abstract": (
        {"fc": jax.eval_shape(lambda: PAIR)},
        {},
        "fc/lora_a: is a ShapeDtypeStruct, expected an array",
    ),
    "magnitude": (
        {"fc": PAIR | {"lora_magnitude": jnp.ones(3)}},
        {},
        "fc/lora_magnitude: is no factor but changes",
    ),
    "head": (
        {"fc": PAIR},
        {"modules_to_save": ["head"]},
        "modules_to_save and bias need the model",
    ),
}


@pytest.mark.parametrize(("tree", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_trees_that_are_refused(tmp_path, tree, options, message):
    with pytest.raises(ValueError, match=message):
        save_peft_adapter(tmp_path / "adapter", tree, **{"alpha": 4, **options})
    assert not (tmp_path / "adapter").exists()


def test_adapters_that_do_not_fit(tmp_path):
    def refused(message, factors, **options):
        with pytest.raises(InputError, match=message):
            load_peft_factors(tmp_path, factors, **{"alpha": 4, **options})

    refused("adapter_config.json", {"fc": PAIR})
    save_peft_adapter(tmp_path, {"fc": PAIR}, alpha=4)
    refused(r"has no 'base_model\.model\.up\.lora_A\.weight'", {"fc": PAIR, "up": PAIR})
    refused(r"has no 'base_model\.model\.fc\.lora_embedding_A'", {"fc": PAIR}, embeddings=["fc"])
    refused("fc scales by 2, and fc by 4, alpha 8 at rank 2", {"fc": PAIR}, alpha=8)
    wide = {"lora_a": jnp.ones((5, 2)), "lora_b": jnp.ones((2, 3))}
    refused(r"fc\.lora_A\.weight' is \(2, 4\), expected \(2, 5\) by fc", {"fc": wide})
    one = {"lora_a": jnp.ones((4, 1)), "lora_b": jnp.ones((1, 3))}
    refused("fc has rank 2, and fc 1", {"fc": one})
    settings = json.loads((tmp_path / CONFIG).read_text())
    for name, value, message in (
        ("use_rslora", True, r"fc scales by 2\.8"),
        ("use_dora", True, "use_dora is True, which a tree"),
        ("bias", "all", "bias is 'all', which a tree"),
        ("modules_to_save", ["head"], r"modules_to_save is \('head',\), which a tree"),
    ):
        (tmp_path / CONFIG).write_text(json.dumps(settings | {name: value}))
        refused(message, {"fc": PAIR})
    (tmp_path / CONFIG).write_text(json.dumps(settings | {"use_rslora": True}))
    load_peft_factors(tmp_path, {"fc": PAIR}, alpha=4 * 2**0.5)
    save_peft_adapter(tmp_path, {"fc": PAIR, "up": PAIR}, alpha=4)
    refused(r"has 'base_model\.model\.up\.lora_A\.weight', 'base.*no place for", {"fc": PAIR})


def test_a_model_with_lora_of_two_libraries(tmp_path):
    config = LoRAConfig(1, target_modules="base_module")
    with pytest.raises(
        InputError, match=r"out\.base_module: has LoRA factors already, since it is"
    ):
        add_lora(Stranger(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    with pytest.raises(InputError, match="fc: has LoRA factors already, since it is Flax's"):
        add_lora(Stranger(nnx.Rngs(0)), LoRAConfig(1, target_modules="fc"), rngs=nnx.Rngs(1))
    with pytest.raises(InputError, match=r"fc: is Flax's .*; load_peft_factors reads into it"):
        load_peft_adapter(tmp_path, Stranger(nnx.Rngs(0)))
    ours = nnx.Dict(a=nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    add_lora(ours, LoRAConfig(1), rngs=nnx.Rngs(1))
    with pytest.raises(InputError, match="alpha: is for factors that add_lora did not make"):
        save_peft_adapter(tmp_path, ours, alpha=4)
    with pytest.raises(InputError, match="load_peft_adapter reads into them"):
        load_peft_factors(tmp_path, ours, alpha=4)
    ours.b = nnx.LoRALinear(4, 4, lora_rank=1, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=r"b: is Flax's nnx\.LoRALinear, beside LoRA layers"):
        save_peft_adapter(tmp_path, ours)


def test_merging_and_removing_layers_of_flax(qwix_model):
    model = nnx.Sequential(Stranger(nnx.Rngs(0)).fc)
    before, without = model(X), nnx.Linear.__call__(model.layers[0], X)
    assert not lora_layers(model)
    removed = remove_lora(nnx.clone(model))
    np.testing.assert_array_equal(removed(X), without)
    merged = merge_lora(model)
    np.testing.assert_allclose(merged(X), before, atol=1e-5)
    for each in (removed, merged):
        assert type(each.layers[0]) is nnx.Linear
        assert (
            nnx.split(each)[0] == nnx.split(nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0))))[0]
        )
    message = "out: is Flax's nnx.LoRA, which keeps its factors; save_peft_adapter writes them"
    for change in (merge_lora, remove_lora):
        with pytest.raises(InputError, match=message):
            change(Stranger(nnx.Rngs(0)))
        with pytest.raises(
            InputError, match=r"with factors (w|kernel)_lora_a and (w|kernel)_lora_b"
        ):
            change(qwix_model)
