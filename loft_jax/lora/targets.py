"""Selects modules by names and patterns of their dotted paths."""

import difflib
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import linen, nnx

from loft_jax.errors import InputError, cut, shown
from loft_jax.lora.config import ALL_LINEAR, LoRAConfig
from loft_jax.lora.layers import LORA_CLASSES, LoRALayer
from loft_jax.patterns import ends_of

# Usual name of the head; models of a family have their own list.
HEADS = ("lm_head",)
_SHOWN = 8

Value = TypeVar("Value")


def named_modules(model: nnx.Module) -> dict[str, nnx.Module]:
    """Gives every module of a model by dotted path; a shared one under each of its paths."""
    refuse_linen(model)
    if not isinstance(model, nnx.Module):
        raise InputError(f"model is a {type(model).__name__}, expected an nnx.Module")
    return dict(_walk(model, "", ()))


def refuse_linen(model: object) -> None:
    """Refuses a Linen model where an NNX model is expected.

    Args:
        model: Anything.

    Raises:
        InputError: It is a Linen model.

    Example:
        >>> refuse_linen(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
    """
    if isinstance(model, linen.Module):
        raise InputError(
            f"{type(model).__name__}: this is a Linen model, expected an nnx.Module; use "
            "loft_jax.lora.linen, and its tree of factors where an adapter is written"
        )


def is_adaptable(module: nnx.Module) -> bool:
    """Whether a module is a layer that LoRA factors can be added to."""
    return isinstance(module, tuple(LORA_CLASSES))


def lora_layers(model: nnx.Module) -> dict[str, LoRALayer]:
    """Gives the LoRA layers of a model by dotted path; a shared layer has its first path.

    They are those of `add_lora`, not Flax's own `nnx.LoRA` or layers of other libraries.

    Args:
        model: Any NNX model.

    Returns:
        Instances of `LoRALayer` (and of their base class), in the order of their paths.

    Example:
        >>> linear = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
        >>> lora_layers(nnx.Sequential(linear))
        {}
    """
    first: dict[int, tuple[str, LoRALayer]] = {}
    for path, module in named_modules(model).items():
        if isinstance(module, LoRALayer):
            first.setdefault(id(module), (path, module))
    return dict(first.values())


def stack_axis_of(model: nnx.Module) -> Callable[[str], tuple[int, ...]]:
    """Gives the stacked axes of each adapter of a model, as optimizers take them.

    They are needed where the shapes of two factors can be read in several ways, which
    `loft_jax.find_pairs` refuses: an adapter knows its axes.

    Args:
        model: With its adapters.

    Returns:
        A function from the path of a pair to the positions of the axes of its stack, and of its
        batch, in both factors: the `stack_axis` of `loft_jax.loft` and of other optimizers.

    Example:
        >>> from loft_jax.lora import LoRAConfig, add_lora
        >>> heads = nnx.LinearGeneral((2, 3), (3, 4), axis=(-2, -1), rngs=nnx.Rngs(0))
        >>> model = add_lora(nnx.Sequential(heads), LoRAConfig(rank=2), rngs=nnx.Rngs(1))
        >>> stack_axis_of(model)("layers/0")
        ()
    """

    def stack_axis(layer: Any) -> tuple[int, ...]:
        axes = layer.lora_axes(layer)
        return tuple(range(len(axes.stack) + len(axes.batch)))

    return _by_pair("stack_axis", model, stack_axis)


def scaling_of(model: nnx.Module) -> Callable[[str], float]:
    """Gives the scaling of each adapter of a model, as optimizers take it.

    Args:
        model: With its adapters.

    Returns:
        A function from the path of a pair to the s of `W = W0 + s A B`: the `scaling` of
        `loft_jax.loft` and of other optimizers.

    Example:
        >>> from loft_jax.lora import LoRAConfig, add_lora
        >>> linear = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
        >>> model = add_lora(nnx.Sequential(linear), LoRAConfig(2, alpha=6), rngs=nnx.Rngs(1))
        >>> scaling_of(model)("layers/0")
        3.0
    """
    return _by_pair("scaling", model, lambda layer: layer.lora_scaling)


def _by_pair(field: str, model: nnx.Module, of: Callable[[Any], Value]) -> Callable[[str], Value]:
    """Makes a function from the path of a pair to a value of its layer."""
    # A pair at the root of a tree has the path of its factor A.
    values = {
        path.replace(".", "/") or "lora_a": of(layer) for path, layer in lora_layers(model).items()
    }

    def value(path: str) -> Value:
        if path not in values:
            raise InputError(
                f"{field} of {path!r}: no adapter of the model has this path, expected one of "
                f"{', '.join(map(repr, list(values)[:_SHOWN])) or 'none, it has no LoRA layer'}"
            )
        return values[path]

    return value


def select(model: nnx.Module, config: LoRAConfig) -> dict[str, nnx.Module]:
    """Selects the layers that a configuration targets, each once, by dotted path.

    Args:
        model: The model.
        config: Targets, exclusions, and the rank and alpha patterns.

    Returns:
        Layers in the order of their paths.

    Raises:
        InputError: A name or pattern matches no layer (similar names are listed), or a module with
            parameters that LoRA does not support; no layer is left; or it is no NNX model.

    Example:
        >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.relu)
        >>> list(select(model, LoRAConfig(rank=1)))
        ['layers.0']
    """
    modules = named_modules(model)
    if config.target_modules != ALL_LINEAR:
        _check_not_tied(model, config.target_modules, modules)
    layers = {path: module for path, module in modules.items() if is_adaptable(module)}
    selected = select_paths(
        modules,
        {path: id(layer) for path, layer in layers.items()},
        config,
        linear=[path for path, layer in layers.items() if not isinstance(layer, nnx.Embed)],
        heads=getattr(model, "output_modules", HEADS),
        unsupported={
            path: _name(type(module))
            for path, module in modules.items()
            if path not in layers and _holds_parameters(module)
        },
        supported=f"{', '.join(map(_name, LORA_CLASSES))} or a class given to register_lora_layer",
    )
    return {path: layers[path] for path in selected}


def select_paths(
    modules: Iterable[str],
    layers: Mapping[str, Hashable],
    config: LoRAConfig,
    *,
    linear: Collection[str],
    heads: Sequence[str],
    unsupported: Mapping[str, str],
    supported: str,
) -> list[str]:
    """Selects the layers that a configuration targets, among dotted paths.

    Args:
        modules: Paths of all modules.
        layers: Those of layers that take factors, with what tells a layer from others: a shared
            layer has several paths, is selected once, and is excluded by any of them.
        config: Targets, exclusions, and the rank and alpha patterns.
        linear: The layers that `"all-linear"` names, unless they are heads.
        heads: Paths of output heads; a head may be several layers.
        unsupported: What is at paths that hold parameters and take no factors.
        supported: The layers that take factors, for the message.

    Returns:
        Paths of layers, in the order of `layers`.

    Raises:
        InputError: As for `select`.

    Example:
        >>> paths = ["mlp", "mlp.up", "mlp.norm"]
        >>> select_paths(paths, {"mlp.up": 0}, LoRAConfig(target_modules="up"), linear=["mlp.up"],
        ...              heads=(), unsupported={"mlp.norm": "nn.LayerNorm"}, supported="nn.Dense")
        ['mlp.up']
    """
    paths = dict.fromkeys((*modules, *layers, *unsupported))
    by_end: dict[str, list[str]] = {}
    for path in paths:
        for end in ends_of(path):
            by_end.setdefault(end, []).append(path)
    around = {path[:at] for path in layers for at, x in enumerate(path) if not at or x == "."}

    def matching(field: str, targets: str | Sequence[str]) -> set[str]:
        chosen: set[str] = set()
        if isinstance(targets, str) and not re.fullmatch(r"[\w.]+", targets):
            found = {targets: [path for path in paths if config.patterns.fullmatch(targets, path)]}
        else:
            names = [targets] if isinstance(targets, str) else targets
            found = {name: by_end.get(name, []) for name in names}
        for given, matched in found.items():
            for path in matched:
                if field == "target_modules" and path in unsupported and path not in around:
                    raise InputError(
                        f"{field}: {path!r}: {unsupported[path]} is not supported; expected "
                        f"{supported}"
                    )
            named = [path for path in matched if path in layers]
            if not named:
                shorter = cut(given.replace("\\", ""))
                outer = [path for path in matched if path in around]
                inside = f" ({outer[0]!r} is a module, name the layers inside)" if outer else ""
                raise InputError(
                    f"{field}: {shorter!r} matches no layer of the model{inside}; "
                    f"{_near(shorter, list(layers))}"
                )
            chosen.update(named)
        return chosen

    if config.target_modules == ALL_LINEAR:
        outputs = tuple(f"{path}." for path in heads)  # left out, as PEFT does
        targets = {path for path in linear if not f"{path}.".startswith(outputs)}
        if not targets:
            kinds = ", ".join(sorted(set(unsupported.values()))[:_SHOWN])
            found = f"; {kinds}: not supported, expected {supported}" if kinds else ""
            raise InputError(
                f"target_modules: {ALL_LINEAR!r}, but the model has no linear layer{found}"
            )
    else:
        targets = matching("target_modules", config.target_modules)
    excluded = {layers[path] for path in matching("exclude_modules", config.exclude_modules)}
    first: dict[Hashable, str] = {}
    for path, layer in layers.items():
        if path in targets and layer not in excluded:
            first.setdefault(layer, path)
    selected = list(first.values())
    if not selected:
        raise InputError("exclude_modules leaves no layer of target_modules")
    for name in ("rank_pattern", "alpha_pattern"):
        values, first_end = getattr(config, name), config.patterns.first_end
        matched = {first_end(values, path) for path in selected}
        for key in values:
            if key not in matched and not any(first_end([key], path) for path in selected):
                raise InputError(
                    f"{name}: {shown(key)} matches no target layer; {_near(cut(key), selected)}"
                )
    return selected


def _check_not_tied(
    model: nnx.Module, targets: str | Sequence[str], modules: dict[str, nnx.Module]
) -> None:
    """Refuses a head that has no weight of its own."""
    tied = getattr(model, "tied_modules", ())
    named = [targets] if isinstance(targets, str) else targets
    for head in getattr(model, "output_modules", ()):
        if tied and head in named and head not in modules:
            raise InputError(
                f"target_modules: {head!r} has no weight of its own in this model, it is tied to "
                f"{', '.join(tied)} (config.tie_word_embeddings)"
            )


def _name(cls: type[nnx.Module]) -> str:
    return f"nnx.{cls.__name__}" if cls.__module__.startswith("flax.nnx.") else cls.__qualname__


def _near(pattern: str, paths: list[str]) -> str:
    """Lists names that the user may have meant, or else the names of the layers."""
    names = sorted({path.rpartition(".")[2] for path in paths} | set(paths))
    plain = re.sub(r"[^\w.]+", "", pattern)
    near = difflib.get_close_matches(plain, names, n=_SHOWN)
    if near:
        return f"near names: {', '.join(near)}"
    short = sorted({path.rpartition(".")[2] for path in paths})
    more = ", ..." if len(short) > _SHOWN else ""
    return f"its layers: {', '.join(short[:_SHOWN])}{more}" if short else "it has no layers"


def _holds_parameters(module: nnx.Module) -> bool:
    return any(isinstance(value, nnx.Param) for value in vars(module).values())


def _walk(
    module: nnx.Module, path: str, ancestors: tuple[int, ...]
) -> Iterator[tuple[str, nnx.Module]]:
    if id(module) in ancestors:
        return
    yield path, module
    for name, child in _children(module):
        inner = f"{path}.{name}" if path else name
        yield from _walk(child, inner, (*ancestors, id(module)))


def _children(module: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Yields modules in attributes, also in lists and dicts; numbers in numerical order."""
    for name, value in sorted(vars(module).items(), key=_numerically):
        if name.startswith("_pytree__"):
            continue
        for keys, leaf in jax.tree_util.tree_flatten_with_path(value, is_leaf=_is_module)[0]:
            if _is_module(leaf):
                inner = jax.tree_util.keystr(keys, simple=True, separator=".")
                yield (f"{name}.{inner}" if inner else name), leaf


def _numerically(item: tuple[str, object]) -> tuple[int, str]:
    return (int(item[0]) if item[0].isdecimal() else -1), item[0]


def _is_module(value: object) -> bool:
    return isinstance(value, nnx.Module)
