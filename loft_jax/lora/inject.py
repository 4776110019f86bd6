"""Adds LoRA factors to a model in place, merges them into the weights, and removes them."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from loft_jax.errors import InputError, shown
from loft_jax.lora.axes import WeightAxes
from loft_jax.lora.config import Initializer, LoRAConfig, product_scaling
from loft_jax.lora.dora import magnitude_scale, weight_norms
from loft_jax.lora.foreign import foreign_lora
from loft_jax.lora.layers import LoRALayer, LoRALinear, LoRAMask, LoRAStart, lora_class
from loft_jax.lora.register import LoRAWeight
from loft_jax.lora.stacks import numbered_layers
from loft_jax.lora.targets import lora_layers, named_modules, select

Model = TypeVar("Model", bound=nnx.Module)

# Initializations whose product is not zero at the start, and is subtracted.
_PRODUCTS_NOT_ZERO = ("balanced", "pissa")


def add_lora(model: Model, config: LoRAConfig, *, rngs: nnx.Rngs) -> Model:
    """Adds LoRA factors to the layers that a configuration selects, in place.

    Each selected layer becomes an instance of a subclass of its class, with `lora_a` and `lora_b`
    beside its weights. Base parameters keep their paths and their values. The output of the model
    is bitwise the same (with DoRA, up to rounding) until the factors change. If an error is raised,
    the model is unchanged.

    The factors, and DoRA's `lora_magnitude`, are `nnx.LoRAParam`, a subclass of `nnx.Param`. With
    that filter a training step computes neither gradients nor optimizer state for the base (see the
    example). Put it before `nnx.Param` when splitting by both. If the initial product is not zero
    ("balanced", "pissa"), copies of the initial factors are kept in `lora_start_a` and
    `lora_start_b`, which are `LoRAStart` and not `nnx.Param`.

    A layer made by `nnx.vmap` and run by a scan has axes of the stack before its own, which are
    found from the shape of its weight. Every layer of the stack gets its own random A and, with
    dropout, its own stream. Dropout is active initially and after `model.train()`, and inactive
    after `model.eval()`. Without dropout no random state is added to the model.

    Layers are `nnx.Linear`, `LinearGeneral`, `Einsum`, `Embed`, their subclasses, and modules of
    classes given to `register_lora_layer`.

    Args:
        model: Any NNX model, or one layer.
        config: Which layers get factors, and of which kind.
        rngs: Stream `params` draws the factors and `dropout` seeds dropout; `default` replaces
            either.

    Returns:
        The same model.

    Raises:
        InputError: A target matches nothing or cannot be adapted, as layers under `nnx.WeightNorm`
            or `nnx.SpectralNorm`; a layer has LoRA already; a number of `layers` is of no layer; a
            rank is above `min(in, out)` of a layer; DoRA is requested for a layer other than
            `nnx.Linear`, or "balanced" or "pissa" for an embedding. The message names the path.

    Example:
        >>> import optax
        >>> mlp = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu,
        ...                      nnx.Linear(8, 4, rngs=nnx.Rngs(1)))
        >>> mlp = add_lora(mlp, LoRAConfig(rank=2), rngs=nnx.Rngs(2))
        >>> optimizer = nnx.Optimizer(mlp, optax.adam(1e-3), wrt=nnx.LoRAParam)
        >>> loss = lambda model: model(jnp.ones((1, 4))).sum()
        >>> grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(mlp)
        >>> _ = optimizer.update(mlp, grads)
        >>> {path: layer.lora_b.shape for path, layer in lora_layers(mlp).items()}
        {'layers.0': (2, 8), 'layers.2': (2, 4)}

    Source:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
    """
    planned = _planned(model, config)
    for plan in planned:
        plan.axes.check_rank(plan.name, plan.rank)
    _insert(((plan, _made(plan, config, rngs)) for plan in planned), config, rngs)
    return model


class LayerFactors(NamedTuple):
    """The factors of one layer, with their rank and alpha."""

    rank: int
    alpha: float
    numbers: tuple[int, ...] | None  # of the layers of a stack that have factors, or all
    a: jax.Array
    b: jax.Array
    magnitude: jax.Array | None = None  # of DoRA


def insert_lora(
    model: Model,
    layers: Mapping[str, LayerFactors],
    *,
    use_rslora: bool = False,
    dropout: float = 0.0,
    rngs: nnx.Rngs | None = None,
) -> Model:
    """Adds factors that are there already to layers whose paths are known, in place.

    They may have any rank. Training one above the smaller side of a weight is a mistake, but
    reading an adapter of such a rank is not: PEFT makes them, and an adapter whose initial product
    is not zero is written at twice its rank.

    Args:
        model: As for `add_lora`.
        layers: Factors by the dotted path of a layer; all with a magnitude, or none.
        use_rslora: As in `LoRAConfig`.
        dropout: As in `LoRAConfig`.
        rngs: As for `add_lora`, for dropout.

    Returns:
        The same model.

    Raises:
        InputError: As for `add_lora`, except for targets and ranks.

    Example:
        >>> linear = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
        >>> factors = LayerFactors(6, 6.0, None, jnp.ones((4, 6)), jnp.zeros((6, 8)))
        >>> insert_lora(linear, {"": factors}).lora_a.shape
        (4, 6)
    """
    use_dora = any(factors.magnitude is not None for factors in layers.values())
    config = LoRAConfig(dropout=dropout, use_rslora=use_rslora, use_dora=use_dora)
    plans = _plans(model, {path: (f.rank, f.alpha) for path, f in layers.items()}, config)
    _insert(((plan, layers[path]) for path, plan in plans.items()), config, rngs)
    return model


def merge_lora(model: Model) -> Model:
    """Merges the factors into the weights, in place: `W + s A B`.

    If the initial product is not zero, the merged weight is `W + s (A B - A0 B0)`; with DoRA it is
    `m (W + s A B) / ‖W + s A B‖`. It is computed in float32 (float64 for float64 weights) and
    rounded once to the weight's dtype. Layers get their original class back, without any LoRA
    attribute. A head that is tied to an embedding with LoRA, whose factors leave it alone, gets a
    weight of its own first.

    Flax's own `nnx.LoRALinear` becomes an `nnx.Linear`. Factors of other libraries stay apart, and
    are refused: `save_peft_adapter` writes them.

    Args:
        model: A model with LoRA layers.

    Returns:
        The same model.

    Raises:
        InputError: The model has no LoRA layer, or one of another library; or a weight with LoRA is
            shared with another layer, which merging would change. The message names them.

    Example:
        >>> linear = add_lora(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), LoRAConfig(2), rngs=nnx.Rngs(1))
        >>> type(merge_lora(linear)).__name__
        'Linear'
    """
    layers = _required_layers(model)
    _check_not_shared(model, layers)
    if any(path in layers for path in getattr(model, "tied_modules", ())):
        cast(Any, model).untie()
    for layer in layers.values():
        _adopt(layer)
        axes = layer.lora_axes(layer)
        weight = vars(layer)[layer.lora_weight]
        magnitude = layer.lora_magnitude
        whole, numbers = axes.stack_in_front(weight[...]), layer.lora_numbers
        folded = merge_weight(
            whole if numbers is None else whole[jnp.array(numbers)],
            *layer.lora_factors(),
            None if magnitude is None else magnitude[...],
            layer.lora_scaling,
            product=axes.product,
            stacked=len(axes.stack),
        )
        merged = folded if numbers is None else whole.at[jnp.array(numbers)].set(folded)
        weight.set_value(axes.stack_in_place(merged))
        _detach(layer)
    return model


def remove_lora(model: Model) -> Model:
    """Removes the factors in place; the model is bitwise the same as before they were added.

    Args:
        model: A model with LoRA layers.

    Returns:
        The same model.

    Raises:
        InputError: The model has no LoRA layer, or one of another library.

    Example:
        >>> linear = add_lora(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), LoRAConfig(2), rngs=nnx.Rngs(1))
        >>> type(remove_lora(linear)).__name__
        'Linear'
    """
    for layer in _required_layers(model).values():
        _adopt(layer)
        _detach(layer)
    return model


class _Plan(NamedTuple):
    name: str
    layer: Any
    lora_class: type[LoRALayer]
    axes: WeightAxes
    rank: int
    alpha: float
    numbers: tuple[int, ...] | None = None  # of the layers of a stack that get factors, or all

    @property
    def factor_axes(self) -> WeightAxes:
        """The axes of the weights that get factors."""
        return self.axes.of_layers(self.numbers)


def _planned(model: nnx.Module, config: LoRAConfig) -> list[_Plan]:
    selected = select(model, config)
    ranks = {path: (config.rank_of(path), config.alpha_of(path)) for path in selected}
    plans = list(_plans(model, ranks, config).values())
    if config.layers is None:
        return plans
    numbers = numbered_layers({plan.name: plan.axes for plan in plans}, model, config)
    chosen = [plan._replace(numbers=numbers[plan.name]) for plan in plans]
    return [plan for plan in chosen if plan.numbers != ()]


def _plans(
    model: nnx.Module, ranks: Mapping[str, tuple[int, float]], config: LoRAConfig
) -> dict[str, _Plan]:
    """Checks the layers that get factors, given their ranks and alphas by path."""
    foreign = foreign_lora(model)
    layers = {path: layer for path, layer in named_modules(model).items() if path in ranks}
    if missing := [path for path in ranks if path not in layers]:
        raise InputError(f"{missing[0]}: the model has no such layer")
    _check_not_normalized(model, layers.items())
    return {
        path: _plan(path, layer, config, foreign.get(path), *ranks[path])
        for path, layer in layers.items()
    }


def _check_not_normalized(model: nnx.Module, selected: Iterable[tuple[str, nnx.Module]]) -> None:
    """Refuses layers whose wrapper puts other weights in place at each call."""
    wrapper_of = {
        id(module): wrapper
        for wrapper in named_modules(model).values()
        if isinstance(wrapper, nnx.WeightNorm | nnx.SpectralNorm)
        for module in named_modules(wrapper).values()
    }
    for path, layer in selected:
        if (wrapper := wrapper_of.get(id(layer))) is not None:
            raise InputError(
                f"{path}: is under nnx.{type(wrapper).__name__}, which computes with other weights "
                "than it holds, so that factors could not be merged; exclude it"
            )


def _plan(
    path: str, layer: nnx.Module, config: LoRAConfig, foreign: str | None, rank: int, alpha: float
) -> _Plan:
    name = path or type(layer).__name__  # the model may be the layer
    if isinstance(layer, LoRALayer):
        raise InputError(f"{name}: has LoRA factors already; merge or remove them first")
    if foreign is not None:
        raise InputError(
            f"{name}: has LoRA factors already, since it is {foreign}; train these, or exclude it"
        )
    try:
        cls = lora_class(type(layer))
        axes = cls.lora_axes(layer)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    if config.use_dora and not issubclass(cls, LoRALinear):
        raise InputError(
            f"{name}: use_dora is for nnx.Linear, and this is a {type(layer).__name__}"
        )
    if config.dropout and issubclass(cls, LoRAWeight):
        raise InputError(
            f"{name}: dropout is {config.dropout}, but what the weight of a "
            f"{type(layer).__name__} multiplies is not known; register the class with its equation"
        )
    if config.init in _PRODUCTS_NOT_ZERO and isinstance(layer, nnx.Embed):
        raise InputError(
            f"{name}: init {config.init!r} is for linear layers, and this is a "
            f"{type(layer).__name__}; exclude it, or give it LoRA with another init"
        )
    return _Plan(name, layer, cls, axes, rank, alpha)


def _insert(
    planned: Iterable[tuple[_Plan, LayerFactors]], config: LoRAConfig, rngs: nnx.Rngs | None
) -> None:
    """Makes all new arrays before the first layer is changed."""
    ready = [(plan, factors, _dropout(plan, config, rngs)) for plan, factors in planned]
    for plan, factors, dropout in ready:
        layer = plan.layer
        _set_class(layer, plan.lora_class)
        layer.lora_a = nnx.LoRAParam(factors.a)
        layer.lora_b = nnx.LoRAParam(factors.b)
        layer.lora_rank = factors.rank
        layer.lora_alpha = factors.alpha
        layer.lora_rslora = config.use_rslora
        if factors.numbers is not None:
            layer.lora_numbers = factors.numbers
            if config.use_dora:
                mask = [number in factors.numbers for number in range(*plan.axes.stack)]
                layer.lora_mask = LoRAMask(jnp.array(mask))
        if config.init in _PRODUCTS_NOT_ZERO:
            # Copies: a training step may donate the buffers of the factors.
            layer.lora_start_a = LoRAStart(jnp.array(factors.a, copy=True))
            layer.lora_start_b = LoRAStart(jnp.array(factors.b, copy=True))
        if factors.magnitude is not None:
            layer.lora_magnitude = nnx.LoRAParam(factors.magnitude)
        if dropout is not None:
            layer.lora_dropout = dropout


def _made(plan: _Plan, config: LoRAConfig, rngs: nnx.Rngs) -> LayerFactors:
    """Makes the initial factors of a layer."""
    a, b = _factors(plan, config, rngs)
    return LayerFactors(plan.rank, plan.alpha, plan.numbers, a, b, _magnitude(plan, config))


def _factors(plan: _Plan, config: LoRAConfig, rngs: nnx.Rngs) -> tuple[jax.Array, jax.Array]:
    """Makes the initial A and B."""
    axes, rank = plan.factor_axes, plan.rank
    if config.init == "pissa":
        return _principal(plan, config)
    stream = _stream(rngs, "params")
    key = stream()
    a_shape, b_shape = axes.a_shape(rank), axes.b_shape(rank)
    if isinstance(plan.layer, nnx.Embed):
        return jnp.zeros(a_shape, config.dtype), jax.random.normal(key, b_shape, config.dtype)
    a = draw_matrices(key, axes, axes.fan_in, config, rank).reshape(a_shape)
    if config.init != "balanced":
        return a, jnp.zeros(b_shape, config.dtype)
    b = draw_matrices(stream(), axes, axes.fan_out, config, rank)
    return a, b.swapaxes(1, 2).reshape(b_shape)


def draw_matrices(
    key: jax.Array, axes: WeightAxes, side: int, config: LoRAConfig, rank: int
) -> jax.Array:
    """Draws one factor of every layer of a stack, each with a key of its own.

    Args:
        key: A PRNG key.
        axes: The stack and batch axes of the weight.
        side: The number of rows, so that initializers scale by their true size.
        config: Its initialization and dtype.
        rank: The number of columns.

    Returns:
        `(stack * batch, side, rank)`.

    Example:
        >>> axes = WeightAxes((3,), (), (4,), (8,), "ir,ro->io")
        >>> draw_matrices(jax.random.key(0), axes, axes.fan_in, LoRAConfig(), 2).shape
        (3, 4, 2)
    """
    draw = _initializer(config, rank)
    keys = jax.random.split(key, (*axes.stack, *axes.batch)).reshape(-1)
    if len(keys) == 1:  # what jax.vmap leaves in JAX's caches makes each further call slower
        return draw(keys[0], (side, rank), config.dtype)[None]
    return jax.vmap(lambda key: draw(key, (side, rank), config.dtype))(keys)


def _principal(plan: _Plan, config: LoRAConfig) -> tuple[jax.Array, jax.Array]:
    """Computes PiSSA's A and B: `s A B` is the best approximation of that rank of a weight."""
    axes, rank = plan.factor_axes, plan.rank
    scale = product_scaling(rank, plan.alpha, config.use_rslora)

    def factors(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        dtype = jnp.promote_types(weight.dtype, jnp.float32)
        matrices = jnp.einsum(axes.unfold, weight).reshape(-1, axes.fan_in, axes.fan_out)
        u, sigma, vt = jnp.linalg.svd(matrices.astype(dtype), full_matrices=False)
        root = jnp.sqrt(sigma[:, :rank] / scale)  # (batch, r)
        a, b = u[..., :rank] * root[:, None], root[..., None] * vt[:, :rank]
        return a.astype(config.dtype), b.astype(config.dtype)

    a, b = _each_weight(plan, factors)
    return a.reshape(axes.a_shape(rank)), b.reshape(axes.b_shape(rank))


def _magnitude(plan: _Plan, config: LoRAConfig) -> jax.Array | None:
    if not config.use_dora:
        return None
    norms = _each_weight(plan, weight_norms)
    # In half precision norms would be rounded, and the initial output would change.
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    axes = plan.factor_axes
    magnitude: jax.Array = norms.reshape(*axes.stack, axes.fan_out).astype(dtype)
    return magnitude


def _each_weight(plan: _Plan, of: Callable[[jax.Array], Any]) -> Any:
    """Maps a function over the weights of a stack, so that only one is dequantized at a time."""
    weight = getattr(plan.layer, plan.lora_class.lora_weight)
    stacked = len(plan.axes.stack)

    def one_axis(whole: jax.Array) -> jax.Array:  # of the stack
        whole = plan.axes.stack_in_front(whole)
        return whole.reshape(-1, *whole.shape[stacked:])

    layers = jax.tree.map(one_axis, weight.get_value())
    if plan.numbers is None:
        return lax.map(lambda value: of(weight.replace(value)[...]), layers)

    def numbered(number: jax.Array) -> Any:
        return of(weight.replace(jax.tree.map(lambda x: x[number], layers))[...])

    return lax.map(numbered, jnp.array(plan.numbers))


def _initializer(config: LoRAConfig, rank: int) -> Initializer:
    if callable(config.init):
        return config.init
    if config.init == "gaussian":
        return jax.nn.initializers.normal(1.0 / rank)
    # Kaiming's bound sqrt(6 / ((1 + a²) in)) with PEFT's a = sqrt(5): 1 / sqrt(in).
    return jax.nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


def _dropout(plan: _Plan, config: LoRAConfig, rngs: nnx.Rngs | None) -> nnx.Dropout | None:
    if config.dropout == 0.0 or isinstance(plan.layer, nnx.Embed):
        return None
    dropout = nnx.Dropout(config.dropout)
    stream = _stream(rngs, "dropout")
    dropout.rngs = stream.split(plan.axes.stack) if plan.axes.stack else stream.fork()
    return dropout


def _stream(rngs: nnx.Rngs | None, name: str) -> nnx.RngStream:
    if not isinstance(rngs, nnx.Rngs):
        raise InputError(f"rngs is {shown(rngs)}, expected nnx.Rngs")
    try:
        stream: nnx.RngStream = rngs[name]
    except KeyError as error:
        raise InputError(f"rngs has no stream {name!r} and no default one") from error
    return stream


def _required_layers(model: nnx.Module) -> dict[str, Any]:
    """Gives the LoRA layers by path, Flax's own `LoRALinear` among them."""
    layers: dict[str, Any] = lora_layers(model)
    known = {id(layer) for layer in layers.values()}
    for path, module in named_modules(model).items():
        if type(module) is nnx.LoRALinear and id(module) not in known:
            layers[path] = module
            known |= {id(module), id(module.lora)}
    modules = named_modules(model)
    for path, kind in foreign_lora(model).items():
        if id(modules[path]) not in known:
            raise InputError(
                f"{path or 'the model'}: is {kind}, which keeps its factors; save_peft_adapter "
                "writes them"
            )
    if not layers:
        raise InputError("the model has no LoRA layer")
    return layers


def _adopt(layer: Any) -> None:
    """Makes Flax's `LoRALinear` a layer as `add_lora` makes it, in place."""
    if isinstance(layer, LoRALayer):
        return
    a, b = layer.lora.lora_a, layer.lora.lora_b
    del layer.lora
    _set_class(layer, lora_class(nnx.Linear))
    layer.lora_a, layer.lora_b = a, b
    layer.lora_rank, layer.lora_alpha = a.shape[-1], float(a.shape[-1])  # it does not scale


def _check_not_shared(model: nnx.Module, layers: dict[str, Any]) -> None:
    """Refuses to merge into a weight that another layer shares."""
    adapted = {
        id(vars(layer)[getattr(layer, "lora_weight", "kernel")]): path
        for path, layer in layers.items()
    }
    modules = {id(module): (path, module) for path, module in named_modules(model).items()}
    for path, module in modules.values():
        for name, value in vars(module).items():
            owner = adapted.get(id(value))
            if owner is not None and layers[owner] is not module:
                raise InputError(f"{owner}: its weight is shared with {path}.{name}; cannot merge")


@functools.partial(jax.jit, static_argnames=("product", "stacked"))
def merge_weight(
    weight: jax.Array,
    a: jax.Array,
    b: jax.Array,
    magnitude: jax.Array | None,
    scaling: jax.Array | float,
    *,
    product: str,
    stacked: int,
) -> jax.Array:
    """Computes the merged weight layer by layer, so that one update at a time is in memory.

    Args:
        weight: `(*stack, ...)`.
        a: `(*stack, *batch, *in, r)`.
        b: `(*stack, *batch, r, *out)`.
        magnitude: DoRA's, or None.
        scaling: The s of `W + s A B`.
        product: Einsum of A and B of one layer to the shape of its weight.
        stacked: The number of axes of the stack.

    Returns:
        The shape and dtype of `weight`.
    """
    dtype = jnp.promote_types(weight.dtype, jnp.float32)

    def fold(layer: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        weight, a, b, magnitude = layer
        update = jnp.einsum(product, a.astype(dtype), b.astype(dtype), precision="highest")
        folded = weight.astype(dtype) + scaling * update
        if magnitude is not None:
            folded *= magnitude_scale(magnitude, weight_norms(folded))
        return folded.astype(weight.dtype)

    layers = jax.tree.map(lambda x: x.reshape(-1, *x.shape[stacked:]), (weight, a, b, magnitude))
    folded: jax.Array = lax.map(fold, layers)
    return folded.reshape(weight.shape)


def _detach(layer: Any) -> None:
    for name in [name for name in LoRALayer.__annotations__ if name in vars(layer)]:
        delattr(layer, name)
    _set_class(layer, layer.lora_base)


def _set_class(layer: nnx.Module, cls: Callable[..., Any]) -> None:
    # Not plain assignment: NNX would record the class among the attributes of the module.
    object.__setattr__(layer, "__class__", cls)
