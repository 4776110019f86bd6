"""What a Llama's parameters are called elsewhere, and along which axes they may be split."""

from collections.abc import Mapping

from loft_jax.errors import InputError

# Module path -> logical axes of its weight: the layer stack where there is one, then in, then out
# (norms have one axis). A mesh maps these names to its own axes.
MODULE_AXES: Mapping[str, tuple[str, ...]] = {
    "embed_tokens": ("vocab", "embed"),
    "layers.input_layernorm": ("layers", "norm"),
    "layers.self_attn.q_proj": ("layers", "embed", "heads"),
    "layers.self_attn.k_proj": ("layers", "embed", "kv_heads"),
    "layers.self_attn.v_proj": ("layers", "embed", "kv_heads"),
    "layers.self_attn.o_proj": ("layers", "heads", "embed"),
    "layers.post_attention_layernorm": ("layers", "norm"),
    "layers.mlp.gate_proj": ("layers", "embed", "mlp"),
    "layers.mlp.up_proj": ("layers", "embed", "mlp"),
    "layers.mlp.down_proj": ("layers", "mlp", "embed"),
    "norm": ("norm",),
    "lm_head": ("embed", "vocab"),
}

# Our parameter -> Hugging Face's, and whether theirs is the transpose.
_HF_PARAMETERS: Mapping[str, tuple[str, bool]] = {
    "embedding": ("weight", False),
    "scale": ("weight", False),
    "kernel": ("weight", True),
    "bias": ("bias", False),
}


def logical_axes(path: str) -> tuple[str | None, ...]:
    """Names the axes of a parameter, for a mesh to be laid over them.

    A LoRA factor is split like the axis of the base weight it shares; its rank is never split.

    Args:
        path: Dotted path of the parameter.

    Returns:
        One name per axis of the array, None for an axis that stays whole.

    Raises:
        InputError: No such parameter in a Llama.

    Example:
        >>> logical_axes("layers.self_attn.q_proj.kernel")
        ('layers', 'embed', 'heads')
        >>> logical_axes("layers.self_attn.q_proj.lora_b")
        ('layers', None, 'heads')
    """
    module, _, parameter = path.rpartition(".")
    axes = MODULE_AXES.get(module)
    if axes is None:
        raise InputError(f"{path}: not a parameter of a Llama")
    match parameter:
        case "kernel" | "embedding" | "scale":
            return axes
        case "bias" | "lora_magnitude":
            return (*axes[:-2], axes[-1])
        case "lora_a" | "lora_start_a":
            return (*axes[:-1], None)
        case "lora_b" | "lora_start_b":
            return (*axes[:-2], None, axes[-1])
        case _:
            raise InputError(f"{path}: not a parameter of a Llama")


def hf_module_name(path: str, layer: int | None) -> str:
    """Hugging Face's name of a module.

    Args:
        path: Dotted path of our module.
        layer: Which of the stacked layers; None for a module outside the stack.

    Returns:
        The dotted name.

    Raises:
        InputError: No such module, or a layer where there is none to choose.

    Example:
        >>> hf_module_name("layers.self_attn.q_proj", 3)
        'model.layers.3.self_attn.q_proj'
        >>> hf_module_name("lm_head", None)
        'lm_head'
    """
    if path not in MODULE_AXES:
        raise InputError(f"{path}: not a module of a Llama")
    inside = path.removeprefix("layers.")
    if (inside != path) != (layer is not None):
        raise InputError(f"{path}: layer is {layer}, expected a number for stacked modules only")
    if path == "lm_head":
        return path
    return f"model.{path}" if layer is None else f"model.layers.{layer}.{inside}"


def hf_tensor_name(path: str, layer: int | None) -> tuple[str, bool]:
    """Hugging Face's name of a parameter, and whether it is stored transposed.

    Args:
        path: Dotted path of our parameter.
        layer: Which of the stacked layers; None for a parameter outside the stack.

    Returns:
        The tensor's name, and True if it is ``(out, in)`` where ours is ``(in, out)``.

    Example:
        >>> hf_tensor_name("layers.mlp.up_proj.kernel", 0)
        ('model.layers.0.mlp.up_proj.weight', True)
    """
    module, _, parameter = path.rpartition(".")
    if parameter not in _HF_PARAMETERS:
        raise InputError(f"{path}: has no place in a Hugging Face Llama")
    name, transposed = _HF_PARAMETERS[parameter]
    return f"{hf_module_name(module, layer)}.{name}", transposed
