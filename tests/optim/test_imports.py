"""The optimizers need jax and optax alone, LoRA layers flax beside them; what is missing is named.

Names of the package are imported when they are used.
"""

import os
import pkgutil
import subprocess
import sys

import pytest

import loft_jax
import loft_jax.optim

# What else the package installs, and the rest of it.
REFUSED = {
    "flax",
    "transformers",
    "tokenizers",
    "datasets",
    "orbax",
    "safetensors",
    "gguf",
    "grain",
    "huggingface_hub",
    "tyro",
    "yaml",
    "regex",
    "tqdm",
    "tensorboardX",
    *(
        f"loft_jax.{module.name}"
        for module in pkgutil.iter_modules(loft_jax.__path__)
        if module.name != "optim"
    ),
}
# Flax brings two of them.
WITH_FLAX = {"flax", "orbax", "yaml", "loft_jax.lora", "loft_jax.errors", "loft_jax.patterns"}

HOOK = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = ".".join(name.split(".")[: 2 if name.startswith("loft_jax.") else 1])
        if top in refused:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""


def run(program, refused=REFUSED):
    """What a program prints in which nothing but jax, optax and the optimizers can be imported."""
    found = subprocess.run(
        [sys.executable, "-c", f"refused = {refused!r}\n{HOOK}{program}"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_every_optimizer_runs_with_jax_and_optax_alone():
    out = run("""
import inspect
import jax, jax.numpy as jnp
import loft_jax, loft_jax.optim

assert loft_jax.loft is loft_jax.optim.loft
params = {"lora_a": jnp.eye(4, 2), "lora_b": jnp.ones((2, 3)), "bias": jnp.ones(3)}
for name in loft_jax.optim.__all__:
    factory = getattr(loft_jax.optim, name)
    if "learning_rate" in getattr(inspect.signature(factory), "parameters", ()):
        tx = factory(0.1)
        updates, _ = jax.eval_shape(lambda: tx.update(params, tx.init(params), params))
        assert updates.keys() == params.keys()
        print(name)
""")
    assert set(out.split()) == {
        "alt_lora_plus",
        "loft",
        "loft_muon",
        "lora_fa",
        "lora_plus",
        "reflora",
        "reflora_s",
        "riemannian_lora",
    }


def test_lora_layers_run_with_flax_beside_them():
    out = run(
        """
import jax, jax.numpy as jnp
from flax import nnx
import loft_jax, loft_jax.lora

assert loft_jax.add_lora is loft_jax.lora.add_lora
model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(1)))
for targets in (["0"], r"layers\\.[01]"):
    config = loft_jax.LoRAConfig(rank=2, target_modules=targets)
    model = loft_jax.add_lora(model, config, rngs=nnx.Rngs(2))
    print(*loft_jax.lora_layers(model))
    loft_jax.merge_lora(model)
tree = nnx.state(loft_jax.add_lora(model, config, rngs=nnx.Rngs(2)), nnx.LoRAParam)
tx = loft_jax.loft(0.1)
jax.eval_shape(lambda: tx.update(tree, tx.init(tree), tree))
""",
        REFUSED - WITH_FLAX,
    )
    assert out.splitlines() == ["layers.0", "layers.0 layers.1"]


def test_the_top_level_imports_nothing_by_itself():
    out = run("""
import loft_jax
print(*(name for name in ("jax", "optax", "numpy") if name in sys.modules))
assert {"loft", "add_lora", "__version__"} <= set(dir(loft_jax))
assert "jax" not in sys.modules
""")
    assert out.split() == []


@pytest.mark.parametrize("name", ["add_lora", "LoRAConfig", "load_pretrained"])
def test_what_is_not_installed_is_named_with_its_command(name):
    out = run(f"""
import loft_jax
try:
    loft_jax.{name}
except ImportError as error:
    print(error)
try:
    from loft_jax import {name}
except ImportError as error:
    print(error)
""")
    first, second = out.splitlines()
    assert first == second
    assert first.startswith(f"loft_jax.{name} needs ")
    assert first.endswith("which is not installed: pip install loft-jax")


def test_all_of_the_optimizers_names_are_at_the_top():
    assert set(loft_jax.optim.__all__) < set(loft_jax.__all__)
    for name in loft_jax.__all__:
        assert getattr(loft_jax, name) is not None
    with pytest.raises(AttributeError, match="module 'loft_jax' has no attribute 'nothing'"):
        _ = loft_jax.nothing


def test_no_module_of_the_optimizers_has_the_name_of_a_function():
    modules = {module.name for module in pkgutil.iter_modules(loft_jax.optim.__path__)}
    assert not modules & set(loft_jax.optim.__all__)
