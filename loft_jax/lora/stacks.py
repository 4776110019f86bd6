"""Adapters on some of the layers of a stack: their numbers, and their factors within the stack."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from loft_jax.errors import InputError, shown
from loft_jax.lora.axes import WeightAxes
from loft_jax.lora.config import LoRAConfig
from loft_jax.lora.targets import lora_layers, named_modules

_NUMBER = re.compile(r"(?P<list>.*?)\.(?P<number>\d+)\.")
"""The first number in a path: that of a layer, as PEFT has it."""

_OF_ADAPTED_LAYERS = ("lora_a", "lora_b", "lora_start_a", "lora_start_b", "lora_magnitude")


def with_full_stacks(model: nnx.Module, state: nnx.State[Any, Any]) -> nnx.State[Any, Any]:
    """Gives the factors of every layer of each stack, for a scan over the stack.

    Layers without an adapter get zeros, which add nothing and whose gradients are dropped. A stack
    with an adapter on all of its layers is not changed.

    Args:
        model: A model, or a part of one that is run by a scan.
        state: Its state, from `nnx.split` or `nnx.state`.

    Returns:
        A state with arrays of whole stacks.

    Example:
        >>> from loft_jax.lora import add_lora
        >>> stack = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
        >>> stack.kernel, stack.bias = nnx.Param(jnp.zeros((3, 4, 8))), nnx.Param(jnp.zeros((3, 8)))
        >>> stack = add_lora(stack, LoRAConfig(rank=2, layers=[0, -1]), rngs=nnx.Rngs(1))
        >>> stack.lora_a.shape, with_full_stacks(stack, nnx.state(stack))["lora_a"].shape
        ((2, 4, 2), (3, 4, 2))
    """
    partial = {
        path: layer for path, layer in lora_layers(model).items() if layer.lora_numbers is not None
    }
    if not partial:
        return state
    full = []
    for path, variable in nnx.to_flat_state(state):
        layer = partial.get(".".join(map(str, path[:-1])))
        if layer is not None and path[-1] in _OF_ADAPTED_LAYERS:
            some, stack = variable.get_value(), layer.lora_axes(layer).stack
            zeros = jnp.zeros((*stack, *some.shape[1:]), some.dtype)
            variable = variable.replace(zeros.at[jnp.array(layer.lora_numbers)].set(some))
        full.append((path, variable))
    return nnx.from_flat_state(full)


def numbered_layers(
    targets: Mapping[str, WeightAxes], model: nnx.Module, config: LoRAConfig
) -> dict[str, tuple[int, ...] | None]:
    """Finds which layers of each target a configuration names in `layers`.

    Args:
        targets: Axes of the weights of the selected modules, by path.
        model: The model.
        config: Its `layers` is not None.

    Returns:
        For every target, the numbers of its layers, ascending: those of a stack, or of the one
        layer that it is part of. None if these are all of its layers, and empty if there are none.

    Raises:
        InputError: A number is of no layer, or no layer is left of a target that is named.
    """
    assert config.layers is not None
    last: dict[str, int] = {}  # number of each list of layers
    for path in named_modules(model):
        if found := _NUMBER.match(f"{path}."):
            last[found["list"]] = max(last.get(found["list"], 0), int(found["number"]))
    chosen: dict[str, tuple[int, ...] | None] = {}
    for path, axes in targets.items():
        if len(axes.stack) > 1:
            raise InputError(f"layers: {path} is a stack of stacks, whose layers have no numbers")
        if axes.stack:
            own, count = tuple(range(axes.stack[0])), axes.stack[0]
        elif found := _NUMBER.match(f"{path}."):
            own, count = (int(found["number"]),), 1 + last[found["list"]]
        else:  # not part of any layer
            chosen[path] = ()
            continue
        for number in config.layers:
            if not -count <= number < count:
                raise InputError(
                    f"layers: {number} is no layer of {path}, expected {-count} to {count - 1}"
                )
        wanted = {number % count for number in config.layers}
        kept = tuple(number for number in own if number in wanted)
        chosen[path] = None if kept == own else kept
    names = config.target_modules
    for name in [names] if isinstance(names, str) else names:
        ending = [path for path in targets if f".{path}".endswith(f".{name}")] or list(targets)
        if all(chosen[path] == () for path in ending):
            raise InputError(
                f"layers: {shown(list(config.layers))} leaves nothing of target_modules "
                f"{shown(name)}; expected modules inside of numbered layers"
            )
    return chosen
