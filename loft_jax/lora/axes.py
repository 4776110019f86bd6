"""The roles of the axes of a layer's weight: stack, batch, input, output."""

import dataclasses
import math
import string
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from loft_jax.errors import InputError


@dataclass(frozen=True)
class WeightAxes:
    """Sizes of a weight's axes by role, and the product of two factors in its shape.

    Args:
        stack: Axes of scanned layers; in front, unless `stack_axes` says otherwise.
        batch: Axes along which every index has its own matrix, as in `batch_axis`.
        ins: Axes contracted with the input.
        outs: Axes of the output.
        product: Einsum of A and B of one layer of the stack to the shape of its weight.
        stack_axes: Where the axes of the stack are in the weight; None if they are in front. In the
            factors they always are.
    """

    stack: tuple[int, ...]
    batch: tuple[int, ...]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    product: str
    stack_axes: tuple[int, ...] | None = None

    @property
    def fan_in(self) -> int:
        """The number of rows of the weight as a matrix."""
        return math.prod(self.ins)

    @property
    def fan_out(self) -> int:
        """The number of columns of the weight as a matrix."""
        return math.prod(self.outs)

    @property
    def unfold(self) -> str:
        """The einsum of the weight of one layer of the stack to `(*batch, *ins, *outs)`."""
        factors, kernel = self.product.split("->")
        a, b = factors.split(",")  # (*batch, *ins, rank) and (*batch, rank, *outs)
        return f"{kernel}->{a[:-1]}{b[len(self.batch) + 1 :]}"

    def of_layers(self, numbers: tuple[int, ...] | None) -> "WeightAxes":
        """Gives the axes of some layers of a stack; None is all of them."""
        return self if numbers is None else dataclasses.replace(self, stack=(len(numbers),))

    def stack_in_front(self, weight: jax.Array) -> jax.Array:
        """Gives a weight with the axes of the stack in front."""
        axes = self.stack_axes
        return weight if axes is None else jnp.moveaxis(weight, axes, range(len(axes)))

    def stack_in_place(self, weight: jax.Array) -> jax.Array:
        """Gives a weight with the axes of the stack in front the order that its layer has."""
        axes = self.stack_axes
        return weight if axes is None else jnp.moveaxis(weight, range(len(axes)), axes)

    def check_rank(self, name: str, rank: int) -> None:
        """Refuses a rank above what the weight of a layer can have."""
        if rank > (most := min(self.fan_in, self.fan_out)):
            raise InputError(
                f"{name}: rank {rank} is above {most}, the smaller side of its weight "
                f"(in {self.fan_in}, out {self.fan_out})"
            )

    def a_shape(self, rank: int) -> tuple[int, ...]:
        """Gives the shape of factor A."""
        return (*self.stack, *self.batch, *self.ins, rank)

    def b_shape(self, rank: int) -> tuple[int, ...]:
        """Gives the shape of factor B."""
        return (*self.stack, *self.batch, rank, *self.outs)


class EinsumParts(NamedTuple):
    """An einsum of an input and a kernel, split in two at the rank.

    `batch`, `ins` and `outs` are axis numbers of the kernel, `down` maps (input, A) to
    the rank, `up` maps (that, B) to the output, `product` (A, B) to the kernel's shape.
    """

    batch: tuple[int, ...]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    down: str
    up: str
    product: str

    def axes(self, stack: tuple[int, ...], kernel: tuple[int, ...]) -> WeightAxes:
        """Gives the axes of a kernel of this shape, after those of a stack."""
        batch, ins, outs = (tuple(kernel[axis] for axis in axes) for axes in self[:3])
        return WeightAxes(stack, batch, ins, outs, self.product)


def matrix_axes(shape: tuple[int, ...], fan_in: int, fan_out: int) -> WeightAxes:
    """Gives the axes of a `(*stack, in, out)` weight: a linear layer or an embedding."""
    stack = _stack(shape, (fan_in, fan_out))
    return WeightAxes(stack, (), (fan_in,), (fan_out,), "ir,ro->io")


def general_axes(layer: nnx.LinearGeneral) -> WeightAxes:
    """Gives the axes of `LinearGeneral`, whose kernel is `(*stack, *batch, *in, *out)`."""
    batch = tuple(layer.batch_axis.values())
    ins, outs = tuple(layer.in_features), tuple(layer.out_features)
    stack = _stack(layer.kernel.shape, (*batch, *ins, *outs))
    return plain_axes(stack, batch, ins, outs)


def plain_axes(
    stack: tuple[int, ...], batch: tuple[int, ...], ins: tuple[int, ...], outs: tuple[int, ...]
) -> WeightAxes:
    """Gives the axes of a kernel `(*stack, *batch, *in, *out)`."""
    letters = iter(string.ascii_lowercase)
    b, i, o = ("".join(next(letters) for _ in axes) for axes in (batch, ins, outs))
    return WeightAxes(stack, batch, ins, outs, f"{b}{i}R,{b}R{o}->{b}{i}{o}")


def einsum_axes(layer: nnx.Einsum) -> WeightAxes:
    """Gives the axes of `Einsum`, whose equation gives each axis of the kernel its role."""
    shape = tuple(layer.kernel_shape)
    stack = _stack(layer.kernel.shape, shape)
    parts = einsum_parts(layer.einsum_str)
    if len(parts.batch) + len(parts.ins) + len(parts.outs) != len(shape):
        raise InputError(f"einsum {layer.einsum_str!r} does not fit a kernel of shape {shape}")
    return parts.axes(stack, shape)


def einsum_parts(equation: str) -> EinsumParts:
    """Splits `input,kernel->output` into `input,A->h` and `h,B->output`.

    An axis of the kernel is contracted if only the input has it, produced if only the output has
    it, and batched (a pair of factors for each index) if both have it.

    Args:
        equation: Explicit einsum of two operands.

    Returns:
        The kernel's axes by role and the three equations.

    Raises:
        InputError: An update of this kernel cannot be a product of two factors.

    Example:
        >>> einsum_parts("nta,hab->nthb").down, einsum_parts("nta,hab->nthb").up
        ('nta,aA->ntA', 'ntA,Ahb->nthb')
    """
    equation = equation.replace(" ", "")
    if equation.count("->") != 1 or equation.partition("->")[0].count(",") != 1:
        raise InputError(f"einsum {equation!r} is not of the form 'input,kernel->output'")
    operands, output = equation.split("->")
    inputs, kernel = operands.split(",")

    def refuse(why: str) -> InputError:
        return InputError(f"einsum {equation!r} has no low-rank factors: {why}")

    if "..." in kernel:
        raise refuse("its kernel has an ellipsis")
    if len(set(kernel)) != len(kernel):
        raise refuse("its kernel repeats an axis")
    roles: dict[str, list[int]] = {"batch": [], "ins": [], "outs": []}
    for axis, letter in enumerate(kernel):
        if letter not in inputs and letter not in output:
            raise refuse(f"axis {letter!r} of its kernel is in neither input nor output")
        role = "ins" if letter not in output else "outs" if letter not in inputs else "batch"
        roles[role].append(axis)
    if not roles["ins"]:
        raise refuse("no axis of its kernel is contracted with the input")
    if not roles["outs"]:
        raise refuse("no axis of its kernel is left in the output alone")
    batch, ins, outs = ("".join(kernel[axis] for axis in axes) for axes in roles.values())
    rank = next(letter for letter in string.ascii_uppercase if letter not in equation)
    dots = "..." if "..." in inputs and "..." in output else ""
    named = inputs.replace("...", "")
    kept = dots + "".join(dict.fromkeys(letter for letter in named if letter in output))
    return EinsumParts(
        tuple(roles["batch"]),
        tuple(roles["ins"]),
        tuple(roles["outs"]),
        down=f"{inputs},{batch}{ins}{rank}->{kept}{rank}",
        up=f"{kept}{rank},{batch}{rank}{outs}->{output}",
        product=f"{batch}{ins}{rank},{batch}{rank}{outs}->{kernel}",
    )


def _stack(shape: tuple[int, ...], own: tuple[int, ...]) -> tuple[int, ...]:
    """Gives the axes before the layer's own: those of a stack made by vmap and run by scan."""
    leading = len(shape) - len(own)
    if leading < 0 or tuple(shape[leading:]) != own:
        raise InputError(f"its weight is {tuple(shape)}, expected {own} after the axes of a stack")
    return tuple(shape[:leading])
