"""LoRA for module classes that are not Flax's: those with a weight of their own, used in any way.

An einsum of the input and the weight gets the low-rank branch beside it. Of any other module the
weight is replaced, wherever it is read, by `W + s A B`.
"""

import contextvars
import functools
import inspect
import string
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from loft_jax.errors import InputError
from loft_jax.lora.axes import EinsumParts, WeightAxes, einsum_parts
from loft_jax.lora.layers import LORA_CLASSES, LoRALayer, combined_class

M = TypeVar("M", bound=nnx.Module)
AxisNumbers: TypeAlias = int | Sequence[int] | Callable[[M], int | Sequence[int]]


def register_lora_layer(
    module_class: type[M],
    *,
    weight: str,
    equation: str | None = None,
    ins: AxisNumbers[M] = (),
    outs: AxisNumbers[M] = (),
    stack: AxisNumbers[M] = (),
    batch: AxisNumbers[M] = (),
) -> None:
    """Lets `add_lora` adapt modules of a class that has a weight of its own.

    Either the module computes an einsum of its input and the weight, and `equation` is given: then
    `y = f(x) + s dropout(x) A B`, computed in two steps and in the dtype of y. What else f does to
    its result, such as adding a bias, is left alone; what it does to x or to the weight before the
    einsum, except for casts, would make the branch wrong.

    Or the roles of the axes are given, and the module may use the weight in any way: whoever reads
    the attribute gets `W + s A B`, in the weight's dtype. The product costs `in·out·r`
    multiplications at each use, and its gradient as much memory as the weight's. For a weight of
    bfloat16 the sum is rounded to bfloat16, which loses updates below 1/512 of an element: prefer
    the equation, or float32. Dropout is refused, since there is no input to drop. Assigning to the
    array of the attribute is an error while the layer has LoRA; `nnx.update` works.

    Axes are numbered as in the weight that the constructor makes; axes that `nnx.vmap` puts in
    front of them are a stack; a stack that it puts elsewhere is not supported, nor noticed. One
    weight of a class is adapted. Subclasses are registered with it. Layers of registered classes
    are linear layers for `"all-linear"` and in PEFT's format.

    Args:
        module_class: A subclass of `nnx.Module`.
        weight: Name of the attribute that holds the weight, an `nnx.Variable` of floating dtype.
        equation: `"input,weight->output"`, the input first whatever the module's own order, or the
            name of the attribute that holds it.
        ins: Axes of the weight that are contracted with the input: a number, numbers, or a function
            of the module that gives them.
        outs: Axes of the output.
        stack: Axes of layers; as in `nnx.vmap`'s stacks, each has factors and a name of its own.
        batch: Axes along which every index has factors of its own, such as that of experts.

    Raises:
        InputError: It is no class of modules; it is an NNX layer that is supported without, or was
            registered otherwise; neither or both of equation and axes are given; or an axis is not
            named exactly once. Whether they fit a module is checked by `add_lora`.

    Example:
        >>> from loft_jax.lora import LoRAConfig, add_lora
        >>> class Einsum(nnx.Module):  # as Tunix has it
        ...     def __init__(self, einsum_str, shape, rngs):
        ...         self.einsum_str = einsum_str
        ...         self.w = nnx.Param(rngs.params.normal(shape))
        ...     def __call__(self, x):
        ...         return jnp.einsum(self.einsum_str, x, self.w[...])
        >>> register_lora_layer(Einsum, weight="w", equation="einsum_str")
        >>> layer = Einsum("BTD,NDH->BTNH", (2, 8, 4), nnx.Rngs(0))
        >>> layer = add_lora(layer, LoRAConfig(rank=3), rngs=nnx.Rngs(1))
        >>> layer.lora_a.shape, layer.lora_b.shape, layer(jnp.ones((1, 5, 8))).shape
        ((8, 3), (3, 2, 4), (1, 5, 2, 4))

    Source:
        The sum is that of PEFT's `target_parameters`.
    """
    name = getattr(module_class, "__qualname__", repr(module_class))
    if not isinstance(module_class, type) or not issubclass(module_class, nnx.Module):
        raise InputError(f"{name} is no subclass of nnx.Module")
    roles = {"ins": ins, "outs": outs, "stack": stack, "batch": batch}
    given = {"weight": weight, "equation": equation, **roles}
    known = LORA_CLASSES.get(module_class)
    if known is not None:
        before = getattr(known, "lora_registration", None)
        if before == given:
            return
        how = f"with {_shown(before)}" if before else "supported as it is"
        raise InputError(f"{name} is {how}{' already' if before else ''}, not with {_shown(given)}")
    if issubclass(module_class, LoRALayer):
        raise InputError(f"{name} has LoRA; register the class without")
    named = [role for role, numbers in roles.items() if numbers != ()]
    if equation is not None and named:
        raise InputError(f"{name}: equation gives the roles of all axes, so {named[0]} cannot")
    if equation is None and not {"ins", "outs"} <= set(named):
        raise InputError(f"{name}: expected the equation of an einsum, or its axes ins and outs")
    if equation is None and not any(callable(numbers) for numbers in roles.values()):
        _numbers(None, roles)
    if equation is not None and "->" in equation:
        einsum_parts(equation)
    namespace: dict[str, Any] = {"lora_weight": weight, "lora_registration": given}
    if equation is None:
        namespace[weight] = _Adapted(weight)
        namespace["lora_axes"] = staticmethod(lambda layer: _axes(layer, weight, roles))
        parent: type[LoRALayer] = LoRAWeight
    else:
        namespace["lora_equation"] = equation
        namespace["lora_axes"] = staticmethod(lambda layer: _einsum_axes(layer, weight, equation))
        parent = LoRAEquation
    LORA_CLASSES[module_class] = combined_class(
        module_class, parent, module_class, __doc__=parent.__doc__, **namespace
    )


class LoRAEquation(LoRALayer):
    """A module that computes an einsum of its input and a weight, with the branch beside it."""

    lora_equation: ClassVar[str]
    lora_registration: ClassVar[dict[str, Any]]

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Applies the module."""
        forward: Callable[..., jax.Array] = super().__call__
        y = forward(*args, **kwargs)
        inputs = next(iter(inspect.signature(forward).bind(*args, **kwargs).arguments.values()))
        parts = _parts(self, self.lora_equation)
        x = self._dropped(jnp.asarray(inputs, y.dtype))
        a, b = self._factors(y.dtype)
        down = jnp.einsum(parts.down, x, a)  # (..., r)
        up = jnp.einsum(parts.up, down * self.lora_scaling, b)
        if up.shape != y.shape:
            raise InputError(
                f"{self.lora_base.__qualname__}: its output is {y.shape}, but {up.shape} by the "
                f"equation it was registered with"
            )
        return y + up


class LoRAWeight(LoRALayer):
    """A module whose weight is read as `W + s A B`."""

    lora_registration: ClassVar[dict[str, Any]]

    def lora_adapted(self, weight: jax.Array) -> jax.Array:
        """Gives `W + s A B`, computed in float32 or wider and rounded to the weight's dtype."""
        axes = self.lora_axes(self)
        a, b = self.lora_factors()
        dtype = jnp.promote_types(weight.dtype, jnp.float32)
        factors, kernel = axes.product.split("->")
        product = f"...{factors.replace(',', ',...')}->...{kernel}"
        update = jnp.einsum(product, a.astype(dtype), b.astype(dtype), precision="highest")
        update *= self.lora_scaling
        if self.lora_numbers is not None and axes.stack and update.shape[0] != axes.stack[0]:
            zeros = jnp.zeros((*axes.stack, *update.shape[1:]), dtype)
            update = zeros.at[jnp.array(self.lora_numbers)].set(update)
        return (weight.astype(dtype) + axes.stack_in_place(update)).astype(weight.dtype)


# Whether a module is being asked for its axes: it may look at W for them, and W + s A B needs them.
_ASKED = contextvars.ContextVar("asked", default=False)


class _Adapted:
    """The attribute of a `LoRAWeight`: set and stored as W, and read as `W + s A B`.

    An attribute and not a changed call, since any method, and other modules too, may read it.
    """

    def __init__(self, name: str):
        self.name = name

    def __get__(self, layer: Any, owner: Any = None) -> Any:
        if layer is None:
            return self
        if self.name not in vars(layer):
            raise AttributeError(f"{type(layer).__name__!r} object has no attribute {self.name!r}")
        weight = vars(layer)[self.name]
        if _ASKED.get() or "lora_a" not in vars(layer) or not isinstance(weight, nnx.Variable):
            return weight
        if isinstance(weight.get_value(), jax.ShapeDtypeStruct):
            return weight
        adapted = layer.lora_adapted(weight[...])
        return _read_only(type(weight)).from_metadata(adapted, weight.get_metadata())

    def __set__(self, layer: Any, value: Any) -> None:
        vars(layer)[self.name] = value

    def __delete__(self, layer: Any) -> None:
        del vars(layer)[self.name]


@functools.cache
def _read_only(kind: type[nnx.Variable[Any]]) -> type[nnx.Variable[Any]]:
    """Makes the class of a variable that is computed when it is read."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise InputError("the weight of a layer with LoRA is set before add_lora, not by attribute")

    return type(kind.__name__, (kind,), {"set_value": refuse, "update_from_state": refuse})


def _shown(given: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}={value!r}" for name, value in given.items() if value not in ((), None)
    )


def _shape(layer: Any, weight: str) -> tuple[int, ...]:
    variable = vars(layer).get(weight)
    if not isinstance(variable, nnx.Variable):
        raise InputError(
            f"its {weight!r} is a {type(variable).__name__}, expected the nnx.Variable that "
            f"{type(layer).__name__} was registered with"
        )
    value: Any = variable.get_value()
    dtype = getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        kind = dtype or type(value).__name__
        raise InputError(f"its {weight!r} is {kind}, expected an array of floating dtype")
    return tuple(value.shape)


def _parts(layer: Any, equation: str) -> EinsumParts:
    if "->" in equation:
        return einsum_parts(equation)
    found = getattr(layer, equation, None)
    if not isinstance(found, str):
        raise InputError(f"its {equation!r} is {found!r}, expected the equation of an einsum")
    return einsum_parts(found)


def _einsum_axes(layer: Any, weight: str, equation: str) -> WeightAxes:
    parts, shape = _parts(layer, equation), _shape(layer, weight)
    count = len(parts.batch) + len(parts.ins) + len(parts.outs)
    return parts.axes(shape[: len(shape) - count], _own(weight, shape, count))


def _own(weight: str, shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Gives the axes of a weight after those of a stack that vmap made."""
    if len(shape) < count:
        raise InputError(f"its {weight!r} is {shape}, expected {count} axes or more")
    return shape[len(shape) - count :]


def _axes(layer: Any, weight: str, roles: dict[str, AxisNumbers[Any]]) -> WeightAxes:
    numbers, shape = _numbers(layer, roles), _shape(layer, weight)
    count = sum(map(len, numbers.values()))
    own = _own(weight, shape, count)
    leading = len(shape) - count
    letters = dict(zip(range(count), string.ascii_lowercase, strict=False))
    batch, ins, outs = ("".join(letters[n] for n in numbers[r]) for r in ("batch", "ins", "outs"))
    kernel = "".join(letters[n] for n in range(count) if n not in numbers["stack"])
    sizes = {role: tuple(own[n] for n in axes) for role, axes in numbers.items()}
    return WeightAxes(
        (*shape[:leading], *sizes["stack"]),
        sizes["batch"],
        sizes["ins"],
        sizes["outs"],
        f"{batch}{ins}R,{batch}R{outs}->{kernel}",
        (*range(leading), *(leading + n for n in numbers["stack"])),
    )


def _numbers(layer: Any, roles: dict[str, AxisNumbers[Any]]) -> dict[str, tuple[int, ...]]:
    """Gives the axes of one module by role."""
    numbers = {}
    for role, given in roles.items():
        asked = _ASKED.set(True)
        try:
            found = given(layer) if callable(given) else given
        finally:
            _ASKED.reset(asked)
        numbers[role] = (found,) if isinstance(found, int) else tuple(found)
    every = [number for axes in numbers.values() for number in axes]
    if sorted(every) != list(range(len(every))):
        raise InputError(
            f"{_shown(numbers)} name axes {sorted(every)} of the weight, expected each of "
            f"0 to {len(every) - 1} once"
        )
    if not numbers["ins"] or not numbers["outs"]:
        raise InputError(f"{_shown(numbers)}: expected an axis in and one out")
    return numbers
