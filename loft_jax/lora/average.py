"""Sums and means of adapters of one base, as adapters of low rank."""

import operator
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loft_jax.errors import InputError, shown
from loft_jax.lora.inject import LayerFactors, insert_lora, remove_lora
from loft_jax.lora.layers import LoRALayer
from loft_jax.lora.targets import lora_layers

Model = TypeVar("Model", bound=nnx.Module)

_WHOLE_SUM = 1e-6
"""How far from 1 weights may sum, where modules are whole: rounding of the weights."""


def average_adapters(
    models: Sequence[Model], weights: Sequence[float] | None = None, *, rank: int | None = None
) -> Model:
    """Computes the weighted mean of adapters, as the best adapter of a rank.

    The product of each layer is the best approximation of `Σ wᵢ sᵢ Aᵢ Bᵢ / Σ wᵢ` of that rank. This
    is not the product of the means of A and of B, which depends on how each product is split into
    factors. Modules that the models trained whole, such as a head, become the mean of their arrays.

    Args:
        models: Models with adapters of one base, such as clones of it (`nnx.clone`), which share
            its arrays. Ranks and adapted layers may differ; a layer without an adapter counts as
            zero.
        weights: One for each model, 0 or more, such as its number of examples; by default equal.
        rank: Largest rank of the result; by default all ranks together, so that it is exact. No
            rank is above the smaller side of its weight.

    Returns:
        A new model that shares the base of the first one, without dropout. The scaling of its
        products is 1, and its factors are balanced, `AᵀA = BBᵀ`; a direction that the product does
        not need has zeros in B only, so that it can be trained.

    Raises:
        InputError: There is no model, a model has no LoRA layer or has DoRA, whose weights are not
            linear in the product; weights do not fit the models; or the bases differ.

    Example:
        >>> from loft_jax.lora import LoRAConfig, add_lora
        >>> base = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
        >>> clients = [add_lora(nnx.clone(base), LoRAConfig(2), rngs=nnx.Rngs(i)) for i in range(3)]
        >>> average_adapters(clients, [10, 20, 30], rank=2).layers[0].lora_a.shape
        (4, 2)

    Source:
        Federated averaging: McMahan et al., arXiv 1602.05629. Best approximation: Eckart and Young,
        Psychometrika 1, 1936.
    """
    weights = [1.0] * len(models) if weights is None else list(weights)
    total = check_weights(weights, len(models))
    return sum_adapters(models, [weight / total for weight in weights], rank=rank)


def sum_adapters(
    models: Sequence[Model], weights: Sequence[float], *, rank: int | None = None
) -> Model:
    """Computes the weighted sum of adapters, as the best adapter of a rank.

    Args:
        models: As for `average_adapters`.
        weights: One for each model, of any sign. If the models have modules that were trained
            whole, weights must sum to 1.
        rank: As for `average_adapters`.

    Returns:
        As for `average_adapters`.

    Raises:
        InputError: As for `average_adapters`.

    Example:
        >>> from loft_jax.lora import LoRAConfig, add_lora
        >>> base = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
        >>> skills = [add_lora(nnx.clone(base), LoRAConfig(2), rngs=nnx.Rngs(i)) for i in range(2)]
        >>> sum_adapters(skills, [1.0, -0.5]).layers[0].lora_b.shape
        (4, 8)
    """
    if not models:
        raise InputError("no models are given, expected at least one")
    if len(weights) != len(models):
        raise InputError(f"{len(weights)} weights for {len(models)} models, expected one for each")
    if rank is not None and rank < 1:
        raise InputError(f"rank is {rank}, expected 1 or more")
    layers = [_plain_layers(model, place) for place, model in enumerate(models)]
    whole = _whole_parameters(models, weights)
    combined = {
        path: _combined(path, [some.get(path) for some in layers], weights, rank)
        for path in dict.fromkeys(path for some in layers for path in some)
    }
    result = insert_lora(remove_lora(nnx.clone(models[0])), combined)
    variables = dict(nnx.to_flat_state(nnx.state(result, nnx.Param)))
    for name, value in whole.items():
        variables[name].set_value(value)
    nnx.update(result, nnx.from_flat_state(list(variables.items())))
    return result


def best_factors(a: jax.Array, b: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """Gives the factors of the best approximations of products, without the products.

    With `A = Q R` and `Bᵀ = P S`, `A B = Q (R Sᵀ) Pᵀ`, and the singular values of the small matrix
    `R Sᵀ` are those of the product.

    Args:
        a: (..., m, k).
        b: (..., k, n).
        rank: Rank of the approximation; less where m, n or k is.

    Returns:
        (..., m, r) and (..., r, n), float32 or wider, with `AᵀA = BBᵀ`. Where the product has a
        lower rank, the rest of A is orthonormal, and the rest of B is zero.

    Example:
        >>> a, b = best_factors(jnp.ones((3, 4)), jnp.ones((4, 5)), rank=1)
        >>> bool(jnp.allclose(a @ b, 4.0, rtol=1e-5))
        True
    """
    dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
    rank = min(rank, *a.shape[-2:], b.shape[-1])
    q, r = jnp.linalg.qr(a.astype(dtype))  # (..., m, k), (..., k, k)
    p, s = jnp.linalg.qr(jnp.swapaxes(b.astype(dtype), -1, -2))  # (..., n, k), (..., k, k)
    u, sigma, vt = jnp.linalg.svd(_matmul(r, jnp.swapaxes(s, -1, -2)), full_matrices=False)
    sigma = sigma[..., :rank]
    floor = 4 * max(r.shape[-1], s.shape[-1]) * jnp.finfo(dtype).eps * sigma[..., :1]
    root = jnp.where(sigma > floor, jnp.sqrt(sigma), 0)
    left = u[..., :rank] * jnp.where(root > 0, root, 1)[..., None, :]
    right = root[..., :, None] * vt[..., :rank, :]
    return _matmul(q, left), _matmul(right, jnp.swapaxes(p, -1, -2))


def check_weights(weights: Sequence[float], count: int) -> float:
    """Checks the weights of a mean.

    Args:
        weights: Of a mean.
        count: Number of adapters.

    Returns:
        Their sum.

    Raises:
        InputError: There are no adapters, or the weights are not as many, or not numbers of 0 or
            more with a positive sum.
    """
    if not count:
        raise InputError("no adapters are given, expected at least one")
    if len(weights) != count:
        raise InputError(f"{len(weights)} weights for {count} adapters, expected one for each")
    total = float(sum(weights))
    if not np.isfinite(total) or total <= 0 or min(weights) < 0:
        raise InputError(f"weights are {shown(list(weights))}, expected 0 or more, and not all 0")
    return total


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _plain_layers(model: nnx.Module, place: int) -> dict[str, Any]:
    layers: dict[str, Any] = lora_layers(model)
    if not layers:
        raise InputError(f"model {place} has no LoRA layer of add_lora")
    for path, layer in layers.items():
        if layer.lora_magnitude is not None:
            raise InputError(
                f"model {place}: {path} has DoRA, whose weights are not linear in the product of "
                "its factors; expected plain LoRA"
            )
    return layers


def _combined(
    path: str, layers: Sequence[Any], weights: Sequence[float], rank: int | None
) -> LayerFactors:
    """Gives the factors of the sum of the products of a layer, with a scaling of 1."""
    first = next(layer for layer in layers if layer is not None)
    axes = first.lora_axes(first)
    given = [(layer, weight) for layer, weight in zip(layers, weights, strict=True) if layer]
    every: tuple[int, ...] = tuple(range(*axes.stack)) if len(axes.stack) == 1 else ()
    numbers = {number for layer, _ in given for number in layer.lora_numbers or every}
    union = None if sorted(numbers) == list(every) else tuple(sorted(numbers))
    a_parts, b_parts = [], []
    for layer, weight in given:
        if layer.lora_axes(layer) != axes:
            raise InputError(f"{path}: weights differ in shape, expected adapters of one base")
        a, b = layer.lora_factors()
        dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
        own = axes.of_layers(layer.lora_numbers)
        rows = (*own.stack, *own.batch)
        a = a.astype(dtype).reshape(*rows, axes.fan_in, -1) * (weight * layer.lora_scaling)
        b = b.astype(dtype).reshape(*rows, -1, axes.fan_out)
        if layer.lora_numbers != union:
            places = jnp.array([(union or every).index(n) for n in layer.lora_numbers or every])
            a, b = (
                jnp.zeros((len(union or every), *x.shape[1:]), dtype).at[places].set(x)
                for x in (a, b)
            )
        a_parts.append(a)
        b_parts.append(b)
    a, b = jnp.concatenate(a_parts, -1), jnp.concatenate(b_parts, -2)
    a, b = best_factors(a, b, a.shape[-1] if rank is None else rank)
    whole, found = axes.of_layers(union), a.shape[-1]
    stored = jnp.result_type(*(layer.lora_a[...].dtype for layer, _ in given))
    return LayerFactors(
        found,
        float(found),
        union,
        a.reshape(whole.a_shape(found)).astype(stored),
        b.reshape(whole.b_shape(found)).astype(stored),
    )


def _whole_parameters(
    models: Sequence[nnx.Module], weights: Sequence[float]
) -> dict[tuple[Any, ...], jax.Array]:
    """Combines the parameters that are not those of one base, by their paths in NNX's state."""
    parameters = [
        {
            path: variable.get_value()
            for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
            if path[-1] not in LoRALayer.__annotations__
        }
        for model in models
    ]
    combined = {}
    for path in dict.fromkeys(path for some in parameters for path in some):
        name = ".".join(map(str, path))
        values = [some.get(path) for some in parameters]
        if all(_is_same(other, values[0]) for other in values):
            continue
        arrays = [other for other in values if isinstance(other, jax.Array)]
        if len(arrays) != len(models) or len({array.shape for array in arrays}) > 1:
            raise InputError(
                f"{name}: differs between models, or some lack it, as a tied head; expected "
                "adapters of one base"
            )
        if abs(sum(weights) - 1) > _WHOLE_SUM:
            raise InputError(
                f"weights sum to {sum(weights):g}, and {name} is not one array that the models "
                "share; expected a sum of 1, or clones of one base"
            )
        dtype = jnp.promote_types(arrays[0].dtype, jnp.float32)
        total = sum(w * array.astype(dtype) for w, array in zip(weights, arrays, strict=True))
        combined[path] = jnp.asarray(total).astype(arrays[0].dtype)
    return combined


def _is_same(value: Any, other: Any) -> bool:
    """Whether two models share a value; a clone wraps quantized arrays anew."""
    structure: Any = jax.tree.structure(value)
    return structure == jax.tree.structure(other) and all(
        map(operator.is_, jax.tree.leaves(value), jax.tree.leaves(other))
    )
