"""LoRA on Flax Linen models: factors beside the parameters, added by a method interceptor.

A Linen module is a description without arrays, so nothing is changed in place: `add_lora` gives an
object whose `apply` runs the model with `y + s (x A) B` at every selected layer. It works where
`nn.intercept_methods` does, so also inside of `nn.scan`, `nn.remat` and `nn.vmap`. The factors are
a tree of their own. They run as entries `kernel_lora_a` and `kernel_lora_b` beside `kernel` in the
collection "params", so that a scan takes them apart as it does the kernel, at its own axis.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.core import meta

from loft_jax.errors import InputError
from loft_jax.lora.axes import WeightAxes
from loft_jax.lora.config import LoRAConfig, product_scaling
from loft_jax.lora.inject import draw_matrices, merge_weight
from loft_jax.lora.linen_methods import METHODS, Branch, Method
from loft_jax.lora.targets import HEADS, select_paths
from loft_jax.optim.pairs import FactorSpec

Tree = Mapping[str, Any]

_A, _B = "_lora_a", "_lora_b"


class LinenLayer(NamedTuple):
    """A layer that has factors.

    Attributes:
        weight: Name of the parameter, "kernel" or "embedding".
        axes: Roles of the weight's axes; the sizes of the stack are those of the scans around it.
        weight_stack: Positions of the axes of the stack in the weight.
        factor_stack: The same in both factors.
        rank: Rank of the factors.
        scaling: The s of `W + s A B`.
    """

    weight: str
    axes: WeightAxes
    weight_stack: tuple[int, ...]
    factor_stack: tuple[int, ...]
    rank: int
    scaling: float

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the factors in the tree, by name."""
        axes = self.axes
        return {
            name: self._in_place(shape)
            for name, shape in {
                f"{self.weight}{_A}": axes.a_shape(self.rank),
                f"{self.weight}{_B}": axes.b_shape(self.rank),
            }.items()
        }

    def _in_place(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        rest = list(shape[len(self.axes.stack) :])
        for axis, size in zip(self.factor_stack, self.axes.stack, strict=True):
            rest.insert(axis, size)
        return tuple(rest)

    def to_tree(self, factor: jax.Array) -> jax.Array:
        """Moves the axes of the stack from the front to their positions."""
        return jnp.moveaxis(factor, range(len(self.factor_stack)), self.factor_stack)

    def from_tree(self, factor: jax.Array) -> jax.Array:
        """Moves the axes of the stack to the front."""
        return jnp.moveaxis(factor, self.factor_stack, range(len(self.factor_stack)))


# Not compared by value: a model and its configuration are not always hashable, and the functions of
# a `FactorSpec` have to be.
@dataclass(frozen=True, eq=False)
class LinenLoRA:
    """A Linen model with LoRA factors; made by `add_lora`.

    Attributes:
        model: The model, as it was given.
        config: The configuration.
        layers: The layers with factors, by dotted path.
    """

    model: nn.Module
    config: LoRAConfig
    layers: Mapping[str, LinenLayer]

    @property
    def spec(self) -> FactorSpec:
        """How the optimizer and the export read the factors: scaling and stacked axes by path."""
        return FactorSpec(scaling=self._scaling_of, stack_axis=self._stack_axis_of)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Draws initial factors: A at random and B zero, or A zero for embeddings.

        Args:
            key: A PRNG key. Parameters of the model need no part in this, and are not drawn.

        Returns:
            A nested dict with the paths of the layers, `{"mlp": {"kernel_lora_a": (*in, r),
            "kernel_lora_b": (r, *out)}}`, with axes of scanned layers where the scan has them.
        """
        factors = {}
        keys = jax.random.split(key, len(self.layers))
        for own, (path, layer) in zip(keys, self.layers.items(), strict=True):
            axes, rank, dtype = layer.axes, layer.rank, self.config.dtype
            a_shape, b_shape = axes.a_shape(rank), axes.b_shape(rank)
            if layer.weight == "embedding":
                a, b = jnp.zeros(a_shape, dtype), jax.random.normal(own, b_shape, dtype)
            else:
                a = draw_matrices(own, axes, axes.fan_in, self.config, rank).reshape(a_shape)
                b = jnp.zeros(b_shape, dtype)
            for name, factor in zip(layer.shapes, (a, b), strict=True):
                factors[(*_steps(path), name)] = layer.to_tree(factor)
        tree: dict[str, Any] = traverse_util.unflatten_dict(factors)
        return tree

    def apply(self, variables: Tree, *args: Any, **kwargs: Any) -> Any:
        """Runs the model with its factors, as `model.apply` does without.

        Dropout of the low-rank branch is active where `rngs` has a stream "dropout".

        Args:
            variables: The model's variables, and the factors as the collection "lora":
                `{"params": params, "lora": factors}`.
            *args: Passed to the model.
            **kwargs: Those of `model.apply`: `rngs`, `mutable`, `method` and the model's own.

        Returns:
            What `model.apply` returns.

        Raises:
            InputError: A collection is missing, or the factors are not those of this model; the
                message names the path.
        """
        self._check_collections(variables)
        rest = {name: value for name, value in variables.items() if name != "lora"}
        self._check(rest["params"], variables["lora"])
        rest["params"] = join_factors(rest["params"], variables["lora"])
        with self._branches():
            return self.model.apply(rest, *args, **kwargs)

    @contextlib.contextmanager
    def intercept(self) -> Iterator[None]:
        """Adds the low-rank branches to calls of the model inside of this context.

        It is for code that calls `model.apply` itself, with parameters from `join_factors`. Enter
        it inside of the function that is compiled: a compiled function does not run the model
        again, so that a context around it has no effect. `model.init` inside of it is as without.

        Raises:
            InputError: Parameters without factors, or with factors of other shapes; or calls of a
                model that has none of the layers.
        """
        with self._branches() as (called, modules):
            yield
        if modules and not called:
            raise InputError(
                f"none of the layers with factors was called, expected {_few(self.layers)}; found "
                f"modules {_few(sorted(modules))}"
            )

    @contextlib.contextmanager
    def _branches(self) -> Iterator[tuple[set[str], set[str]]]:
        """Adds the branches, and gives the layers and the modules that are called, as they are."""
        called: set[str] = set()
        modules: set[str] = set()

        def interceptor(
            next_fun: Callable[..., Any],
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            context: nn.module.InterceptorContext,
        ) -> Any:
            y = next_fun(*args, **kwargs)
            method = METHODS.get(_function(context))
            if context.module.scope is not None:
                modules.add(_dotted(context.module.path))
            if method is None or (path := _dotted(context.module.path)) not in self.layers:
                return y
            called.add(path)
            return self._adapted(path, method, context.module, y, args, kwargs)

        with nn.intercept_methods(interceptor):
            yield called, modules

    def merge(self, params: Tree, factors: Tree) -> dict[str, Any]:
        """Merges factors into parameters: `W + s A B`, for the model without this object.

        It is computed in float32 (float64 for float64 weights) and rounded once to the dtype of
        the weight.

        Args:
            params: Parameters of the model.
            factors: From `init`, trained.

        Returns:
            New parameters; the given ones do not change.

        Raises:
            InputError: Parameters or factors are not those of this model; the message names the
                path.
        """
        self._check(params, factors)
        merged = traverse_util.flatten_dict(_plain(params))
        flat = traverse_util.flatten_dict(_plain(factors))
        for path, layer in self.layers.items():
            a, b = (layer.from_tree(flat[(*_steps(path), name)]) for name in layer.shapes)
            key = (*_steps(path), layer.weight)
            stack = range(len(layer.axes.stack))
            weight = jnp.moveaxis(meta.unbox(merged[key]), layer.weight_stack, stack)
            folded = merge_weight(
                weight, a, b, None, layer.scaling, product=layer.axes.product, stacked=len(stack)
            )
            folded = jnp.moveaxis(folded, stack, layer.weight_stack)
            merged[key] = meta.replace_boxed(merged[key], folded)
        tree: dict[str, Any] = traverse_util.unflatten_dict(merged)
        return tree

    def _adapted(
        self,
        path: str,
        method: Method,
        module: nn.Module,
        y: jax.Array,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> jax.Array:
        layer = self.layers[path]
        found: dict[str, Any] = {n: module.get_variable("params", n) for n in layer.shapes}
        if None in found.values():
            if module.is_mutable_collection("params"):  # initialization
                return y
            raise InputError(
                f"{path}: params has no {next(n for n in found if found[n] is None)!r}; join the "
                f"factors with join_factors, or call apply with the collection 'lora'"
            )
        axes = method.axes(module, *args, **kwargs)
        wanted = axes.a_shape(layer.rank), axes.b_shape(layer.rank)
        for (name, factor), shape in zip(found.items(), wanted, strict=True):
            if factor.shape != shape:
                raise InputError(f"{path}: {name} is {factor.shape}, expected {shape}")
        a, b = found.values()
        weight = meta.unbox(module.get_variable("params", layer.weight))
        rate = self.config.dropout if method.drops and module.has_rng("dropout") else 0.0
        branch = Branch(module, weight, a, b, layer.scaling, rate)
        return y + method.branch(branch, *args, **kwargs).astype(y.dtype)

    def _check_collections(self, variables: Tree) -> None:
        for name, what in (("params", "parameters of the model"), ("lora", "factors")):
            if not isinstance(variables, Mapping) or name not in variables:
                kind = sorted(variables) if isinstance(variables, Mapping) else type(variables)
                raise InputError(
                    f"variables has no {name!r} ({what}), found {kind}; expected "
                    "{'params': params, 'lora': factors}"
                )

    def _check(self, params: Tree, factors: Tree) -> None:
        """Refuses trees that are not those of the model, with their stacks."""
        weights = traverse_util.flatten_dict(_plain(params))
        flat = traverse_util.flatten_dict(_plain(factors))
        wanted: dict[tuple[str, ...], tuple[int, ...]] = {}
        for path, layer in self.layers.items():
            key = (*_steps(path), layer.weight)
            if key not in weights:
                raise InputError(
                    f"params has no {'.'.join(key)!r}, found "
                    f"{_few('.'.join(map(str, found)) for found in weights)}; expected what "
                    f"model.init gives as 'params'"
                )
            wanted |= {(*_steps(path), name): shape for name, shape in layer.shapes.items()}
        for key, shape in wanted.items():
            if key not in flat:
                raise InputError(f"factors has no {'.'.join(key)!r}; expected what init gives")
            if tuple(flat[key].shape) != shape:
                raise InputError(
                    f"factors: {'.'.join(key)} is {tuple(flat[key].shape)}, expected {shape}"
                )
        if more := [".".join(map(str, key)) for key in flat if key not in wanted]:
            raise InputError(f"factors: {_few(more)} belong to no layer that has factors")

    def _layer_of(self, path: str) -> LinenLayer:
        """Gives the layer of a pair, whose path is that of its weight, `"mlp/up/kernel"`."""
        dotted = path.rpartition("/")[0].replace("/", ".")
        if dotted not in self.layers:
            raise InputError(f"{path}: no layer of this model; expected {_few(self.layers)}")
        return self.layers[dotted]

    def _scaling_of(self, path: str) -> float:
        return self._layer_of(path).scaling

    def _stack_axis_of(self, path: str) -> tuple[int, ...]:
        layer = self._layer_of(path)
        stack, batch = layer.factor_stack, len(layer.axes.batch)
        # The optimizer sees every index of a batch axis as a matrix, as it does layers.
        free = [axis for axis in range(len(stack) + batch) if axis not in stack]
        return tuple(sorted((*stack, *free[:batch])))


def add_lora(model: nn.Module, config: LoRAConfig, *args: Any, **kwargs: Any) -> LinenLoRA:
    """Adds LoRA factors to the layers of a Linen model that a configuration selects.

    The layers are found by an abstract trace of `model.init` on the given arguments; nothing is
    computed. They are `nn.Dense`, `DenseGeneral` (so the projections of attention), `Einsum`,
    `Embed`, and subclasses that call them. Neither the parameters of the model nor their
    initialization change, and its output is bitwise the same until the factors change.

    Layers that `nn.scan` stacks have their axis in the factors where the scan has it,
    `variable_axes={"params": 1}` for instance: A `(in, layers, r)` and B `(r, layers, out)`. An
    optimizer has to know that axis, which `spec` gives by path.

    Args:
        model: A Linen model.
        config: Which layers get factors, and of which kind. `"all-linear"` is all of the above
            except embeddings and a module `lm_head` at the top. `use_dora`, `layers` and the
            initializations `"balanced"` and `"pissa"` are for NNX models.
        *args: What `model.init` takes after its keys, for instance a batch; shapes are enough.
        **kwargs: Those of `model.init`.

    Returns:
        A `LinenLoRA`, with `init`, `apply`, `intercept`, `merge` and `spec`.

    Raises:
        InputError: A target matches nothing or cannot be adapted, a rank is above `min(in, out)`
            of a layer, or the configuration asks for what is for NNX models; the message names it.

    Example:
        >>> import optax
        >>> from loft_jax import loft
        >>> model, x = nn.Dense(8), jnp.ones((2, 4))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> lora = add_lora(model, LoRAConfig(rank=2), x)
        >>> factors = lora.init(jax.random.key(1))
        >>> jax.tree.map(jnp.shape, factors)
        {'kernel_lora_a': (4, 2), 'kernel_lora_b': (2, 8)}
        >>> y = lora.apply({"params": params, "lora": factors}, x)
        >>> bool((y == model.apply({"params": params}, x)).all())
        True
        >>> tx = loft(1e-3, scaling=lora.spec.scaling, stack_axis=lora.spec.stack_axis)
        >>> state = tx.init(factors)

    Source:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is a {type(model).__name__}, expected a Linen module; loft_jax.add_lora is for "
            "NNX models"
        )
    for name, value in (("use_dora", config.use_dora), ("layers", config.layers)):
        if value:
            raise InputError(f"{name}: {value!r} is for NNX models, and this is a Linen model")
    if config.init in ("balanced", "pissa"):
        raise InputError(f"init: {config.init!r} is for NNX models, and this is a Linen model")
    found = _trace(model, args, kwargs)
    linear = [path for path, layer in found.layers.items() if layer.weight == "kernel"]
    chosen = select_paths(
        found.modules,
        {path: path for path in found.layers},
        config,
        linear=linear,
        heads=getattr(model, "output_modules", HEADS),
        unsupported=found.unsupported,
        supported="nn.Dense, nn.DenseGeneral, nn.Einsum or nn.Embed",
    )
    layers = {}
    for path in chosen:
        rank = config.rank_of(path)
        found.layers[path].axes.check_rank(path, rank)
        if config.dropout and path in found.without_dropout and path in linear:
            raise InputError(
                f"{path}: dropout is {config.dropout}, but the scan around it passes no stream "
                "'dropout'; expected split_rngs={'params': True, 'dropout': True}"
            )
        scaling = product_scaling(rank, config.alpha_of(path), config.use_rslora)
        layers[path] = found.layers[path]._replace(rank=rank, scaling=scaling)
    return LinenLoRA(model, config, layers)


def join_factors(params: Tree, factors: Tree) -> dict[str, Any]:
    """Puts factors beside the parameters that they adapt, in one tree.

    Args:
        params: Parameters of a model.
        factors: From `LinenLoRA.init`.

    Returns:
        A nested dict with the leaves of both.

    Raises:
        InputError: A path is in both; the message names it.

    Example:
        >>> join_factors({"up": {"kernel": 1}}, {"up": {"kernel_lora_a": 2, "kernel_lora_b": 3}})
        {'up': {'kernel': 1, 'kernel_lora_a': 2, 'kernel_lora_b': 3}}
    """
    base, added = (traverse_util.flatten_dict(_plain(tree)) for tree in (params, factors))
    if twice := sorted(".".join(map(str, key)) for key in base.keys() & added.keys()):
        raise InputError(f"params has {_few(twice)} already, expected parameters without factors")
    joined: dict[str, Any] = traverse_util.unflatten_dict({**base, **added})
    return joined


def split_factors(params: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """Undoes `join_factors`: gives the parameters of the model, and the factors.

    Args:
        params: From `join_factors`.

    Returns:
        Two nested dicts.

    Example:
        >>> split_factors({"up": {"kernel": 1, "kernel_lora_a": 2, "kernel_lora_b": 3}})
        ({'up': {'kernel': 1}}, {'up': {'kernel_lora_a': 2, 'kernel_lora_b': 3}})
    """
    flat = traverse_util.flatten_dict(_plain(params))
    factors = {key: value for key, value in flat.items() if str(key[-1]).endswith((_A, _B))}
    base = {key: value for key, value in flat.items() if key not in factors}
    return traverse_util.unflatten_dict(base), traverse_util.unflatten_dict(factors)


# Sizes of arrays that exist in an abstract trace alone. A scan adds its axis to them as it does to
# parameters; no number of layers is that large, so its position is plain, whatever the features.
_UNLIKELY = 1 << 20


class _Traced(NamedTuple):
    """The modules of a model that were called, by dotted path.

    Attributes:
        modules: All of them.
        layers: Those that can have factors, with the rank and scaling still to be set.
        unsupported: What the others are that hold parameters.
        without_dropout: Layers that see no random stream "dropout".
    """

    modules: list[str]
    layers: dict[str, LinenLayer]
    unsupported: dict[str, str]
    without_dropout: set[str]


def _trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Traced:
    """Runs `model.init` abstractly, and puts an array of unlikely sizes beside every weight."""
    kinds: dict[str, str] = {}
    seen: dict[str, tuple[Method, WeightAxes]] = {}
    refused: dict[str, str] = {}
    without_dropout: set[str] = set()

    def interceptor(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        y = next_fun(*args, **kwargs)
        module = context.module
        if module.scope is None:
            return y
        path = _dotted(module.path)
        kinds[path] = _class_name(type(module))
        if (method := METHODS.get(_function(context))) is None:
            return y
        if any("." in step for step in module.path):
            refused[path] = f"{kinds[path]} whose path has a dot within a name"
            return y
        try:
            axes = method.axes(module, *args, **kwargs)
        except InputError as error:  # an equation without low-rank factors
            refused[path] = f"{kinds[path]} ({error})"
            return y
        if path in seen and seen[path][1] != axes:
            refused[path] = f"{kinds[path]} that uses its weight in two ways"
        seen[path] = method, axes
        if not module.has_rng("dropout"):
            without_dropout.add(path)
        for role, ndim in _dims(axes).items():
            sizes = tuple(_UNLIKELY + axis for axis in range(ndim))
            module.put_variable("params", f"lora_axes_{role}", jnp.zeros(sizes, jnp.int8))
        return y

    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")}

    def init(key: jax.Array, arrays: dict[int, Any]) -> Any:
        given = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(treedef, given)
        with nn.intercept_methods(interceptor):
            return model.init({"params": key, "dropout": key}, *args, **kwargs)

    variables = jax.eval_shape(init, jax.random.key(0), arrays)
    shapes = traverse_util.flatten_dict(_plain(variables.get("params", {})))
    layers = {}
    for path, (method, axes) in seen.items():
        if path in refused:
            continue
        sizes = {role: shapes[(*_steps(path), f"lora_axes_{role}")].shape for role in _dims(axes)}
        weight, a, b = (
            tuple(i for i, size in enumerate(shape) if size < _UNLIKELY) for shape in sizes.values()
        )
        if a != b:
            raise InputError(
                f"{path}: its layers would be at axes {a} of A and at {b} of B, since the axis is "
                "counted from the end; expected variable_axes={'params': n} with n >= 0"
            )
        stack = tuple(sizes["a"][i] for i in a)
        layers[path] = LinenLayer(
            method.weight, dataclasses.replace(axes, stack=stack), weight, a, rank=0, scaling=0.0
        )
    unsupported = {}
    for *steps, name in shapes:
        path = ".".join(steps)
        if path in layers or name.startswith("lora_axes_"):
            continue
        owner = next(p for n in range(len(steps), -1, -1) if (p := ".".join(steps[:n])) in kinds)
        unsupported[path] = refused.get(path, kinds[owner])
    return _Traced(list(kinds), layers, unsupported, without_dropout)


def _dims(axes: WeightAxes) -> dict[str, int]:
    """Gives the numbers of axes of the weight and of both factors, without a stack."""
    batch, ins, outs = (len(sizes) for sizes in (axes.batch, axes.ins, axes.outs))
    return {"weight": batch + ins + outs, "a": batch + ins + 1, "b": batch + 1 + outs}


def _function(context: nn.module.InterceptorContext) -> Any:
    """Gives the function of the class that is called, which `super()` may have chosen."""
    return getattr(context.orig_method, "func", None)


def _class_name(cls: type) -> str:
    return f"nn.{cls.__name__}" if cls.__module__.startswith("flax.linen.") else cls.__qualname__


def _plain(tree: Tree) -> dict[str, Any]:
    """Gives nested dicts for a FrozenDict too."""
    if not isinstance(tree, Mapping):
        raise InputError(f"found a {type(tree).__name__}, expected a nested dict of parameters")
    return {k: _plain(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _dotted(path: tuple[str, ...]) -> str:
    return ".".join(path)


def _steps(path: str) -> tuple[str, ...]:
    return tuple(path.split(".")) if path else ()


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "") or "nothing"
