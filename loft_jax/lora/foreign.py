"""LoRA factors in a model that `add_lora` did not make: Flax's own, Qwix's, hand-written ones."""

from flax import nnx

from loft_jax.lora.layers import LoRALayer
from loft_jax.lora.targets import named_modules
from loft_jax.optim.pairs import DEFAULT_SPEC


def foreign_lora(model: nnx.Module) -> dict[str, str]:
    """Finds the modules of a model with factors that `add_lora` did not make.

    Args:
        model: Any NNX model.

    Returns:
        By dotted path, what the module is, for messages. The module inside an `nnx.LoRA` is among
        them, and so is an `nnx.LoRALinear` with the `nnx.LoRA` inside it.

    Example:
        >>> layer = nnx.LoRALinear(4, 8, lora_rank=2, rngs=nnx.Rngs(0))
        >>> foreign_lora(nnx.Sequential(layer))
        {'layers.0': "Flax's nnx.LoRALinear", 'layers.0.lora': "Flax's nnx.LoRA"}
    """
    found: dict[str, str] = {}
    bases: set[int] = set()
    for path, module in named_modules(model).items():
        if isinstance(module, LoRALayer):
            continue
        if isinstance(module, nnx.LoRALinear):
            found[path] = "Flax's nnx.LoRALinear"
        elif isinstance(module, nnx.LoRA):
            found[path] = "Flax's nnx.LoRA"
            bases.add(id(module.base_module))
        elif id(module) in bases:
            found[path] = "inside Flax's nnx.LoRA"
        elif names := _factors(module):
            found[path] = f"a {type(module).__name__} with factors {names[0]} and {names[1]}"
    return found


def flax_lora(model: nnx.Module) -> frozenset[str]:
    """Gives the dotted paths of the `nnx.LoRA` in a model, which add `x A B` with no scaling."""
    modules = named_modules(model).items()
    return frozenset(path for path, module in modules if isinstance(module, nnx.LoRA))


def _factors(module: nnx.Module) -> tuple[str, str] | None:
    """Gives the names of the first factors that are attributes of a module."""
    attributes = vars(module)
    for a, b in DEFAULT_SPEC.names:
        for name in attributes:
            if name == a or name.endswith(f"_{a}"):
                partner = name.removesuffix(a) + b
                if isinstance(attributes.get(partner), nnx.Variable):
                    return name, partner
    return None
