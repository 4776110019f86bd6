"""LoFT in Tunix's PeftTrainer, on one device and on a mesh of eight: `make test-tunix`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file
from tunix.models.safetensors_saver import save_lora_merged_model_as_safetensors
from tunix.rl.reshard import reshard_model_to_mesh
from tunix.sft.peft_trainer import TrainingInput

from examples.tunix.counting import ALPHA, CONFIG, RANK, adapted, batches, model_input
from examples.tunix.finetune import LEARNING_RATE, hf_name, main, trainer
from loft_jax.hub import load_peft_adapter, load_peft_factors, load_pretrained, save_peft_adapter
from loft_jax.optim import loft

STEPS = 4
# Two projections, to have few programs to compile.
LAYERS = ".*(q|o)_proj"


def factors(model):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)))


def train(data, steps=STEPS, mesh=None, **config):
    model = adapted(LAYERS)
    if mesh is not None:
        model = reshard_model_to_mesh(model, mesh)
    run = trainer(model, max_steps=steps, **config)
    run.train(data)
    return run


@pytest.fixture(scope="module")
def unbroken():
    return train(batches(STEPS))


def assert_close(x, y, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), x, y)


def test_the_loss_falls(unbroken):
    loss = nnx.jit(unbroken.loss_fn)
    inputs = model_input(batches(1)[0])
    before, after = (loss(model, **inputs) for model in (adapted(LAYERS), unbroken.model))
    assert after < before


def test_it_is_a_loop_of_optax(unbroken):
    graph, params, rest = nnx.split(adapted(LAYERS), nnx.LoRAParam, ...)
    tx = loft(LEARNING_RATE, scaling=ALPHA / RANK, max_grad_norm=1.0)

    @jax.jit
    def step(params, state, inputs):
        def loss(params):
            return unbroken.loss_fn(nnx.merge(graph, params, rest), **inputs)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for batch in batches(STEPS):
        params, state = step(params, state, model_input(batch))
    assert_close(jax.tree.map(np.asarray, nnx.to_pure_dict(params)), factors(unbroken.model))


def test_a_killed_run_goes_on_to_the_same_bits(unbroken, tmp_path):
    options = ocp.CheckpointManagerOptions(save_interval_steps=1, enable_async_checkpointing=False)
    config = {"checkpoint_root_directory": str(tmp_path), "checkpointing_options": options}

    def killed():
        yield from batches(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(killed(), **config)
    run = train(batches(STEPS), **config)
    assert run.train_steps == STEPS
    jax.tree.map(np.testing.assert_array_equal, factors(run.model), factors(unbroken.model))


def test_accumulated_gradients_are_those_of_the_large_batch(unbroken):
    def halves():
        for batch in batches(STEPS):
            for rows in (slice(4), slice(4, None)):
                yield TrainingInput(
                    input_tokens=batch.input_tokens[rows], input_mask=batch.input_mask[rows]
                )

    run = train(halves(), gradient_accumulation_steps=2)
    assert_close(factors(run.model), factors(unbroken.model), rtol=1e-3, atol=1e-5)


def test_a_mesh_gives_the_same_factors(unbroken):
    mesh = jax.make_mesh((2, 4), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    with mesh:
        run = train(batches(STEPS), mesh=mesh)
    assert_close(factors(run.model), factors(unbroken.model), rtol=1e-3, atol=1e-5)
    split = nnx.state(run.model, nnx.LoRAParam).flat_state()
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(split))


def test_the_adapter_is_what_tunix_merges(unbroken, tmp_path):
    base, merged, folder = tmp_path / "base", tmp_path / "merged", tmp_path / "adapter"
    save_peft_adapter(folder, unbroken.model, alpha=ALPHA, hf_name=hf_name)
    tensors = load_file(folder / "adapter_model.safetensors")
    products = {
        name.removeprefix("base_model.model.").replace("lora_A.", ""): ALPHA
        / RANK
        * (tensors[name.replace("lora_A", "lora_B")] @ a)
        for name, a in tensors.items()
        if "lora_A" in name
    }
    assert len(products) == 4
    base.mkdir()
    save_file({name: np.zeros_like(x) for name, x in products.items()}, base / "model.safetensors")
    save_lora_merged_model_as_safetensors(
        str(base),
        str(merged),
        unbroken.model,
        RANK,
        ALPHA,
        lambda path: f"{hf_name(path, None)}.weight",
        transpose_rules={"weight": (1, 0)},
    )
    assert_close(load_file(merged / "model.safetensors"), products)
    again = load_peft_factors(folder, adapted(LAYERS), alpha=ALPHA, hf_name=hf_name)
    jax.tree.map(np.testing.assert_array_equal, factors(again), factors(unbroken.model))


def test_the_adapter_gives_the_same_logits_in_transformers_layout(unbroken, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    config = {
        "model_type": "llama",
        "vocab_size": CONFIG.vocab_size,
        "hidden_size": CONFIG.embed_dim,
        "intermediate_size": CONFIG.hidden_dim,
        "num_hidden_layers": CONFIG.num_layers,
        "num_attention_heads": CONFIG.num_heads,
        "num_key_value_heads": CONFIG.num_kv_heads,
        "head_dim": CONFIG.head_dim,
        "rms_norm_eps": CONFIG.norm_eps,
        "rope_theta": 1_000_000.0,  # Tunix 0.1.7 does not read that of its configuration
        "tie_word_embeddings": False,
    }
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    save_file(transformers_tensors(adapted(LAYERS)), base / "model.safetensors")
    save_peft_adapter(folder, unbroken.model, alpha=ALPHA, hf_name=hf_name)
    batch = batches(1)[0]
    inputs = model_input(batch)
    expected, _ = unbroken.model(
        inputs["input_tokens"], inputs["positions"], None, inputs["attention_mask"]
    )
    model = load_peft_adapter(folder, load_pretrained(base))
    logits = model(jnp.asarray(batch.input_tokens))
    assert_close(logits, expected, rtol=0, atol=1e-6)


def transformers_tensors(model):
    """The weights of Tunix's Llama under transformers' names, (out, in)."""
    tensors = {}
    for path, variable in nnx.state(model, nnx.Param).flat_state():
        name = ".".join(map(str, path))
        w = np.asarray(variable[...])
        if "lora" in name:
            continue
        if name.endswith("_proj.w"):
            w = w.reshape(-1, w.shape[-1]) if "o_proj" in name else w.reshape(w.shape[0], -1)
        if name == "embedder.input_embedding":
            name = "model.embed_tokens.w"
        elif w.ndim == 2:
            w = w.T
        prefix = "" if name.startswith(("model.", "lm_head")) else "model."
        module = name.rpartition(".")[0].replace(".attn.", ".self_attn.")
        module = module.replace("final_norm", "norm")
        tensors[f"{prefix}{module}.weight"] = np.ascontiguousarray(w)
    return tensors


def test_the_example_goes_on_where_it_was(tmp_path):
    main(tmp_path)
    adapter = tmp_path / "adapter" / "adapter_model.safetensors"
    first = load_file(adapter)
    main(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, load_file(adapter), first)
