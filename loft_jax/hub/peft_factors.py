"""LoRA factors that other libraries made, as trees of arrays: their modules in PEFT's format."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loft_jax.errors import InputError, explained, shown
from loft_jax.files import inside
from loft_jax.hub.host_arrays import gather_to_host
from loft_jax.hub.peft_base import check_folder
from loft_jax.hub.peft_config import PeftConfig, RankAlpha
from loft_jax.hub.peft_file import AdapterFile, read_unchanged
from loft_jax.hub.peft_names import (
    CONFIG_NAME,
    PREFIX,
    WEIGHTS_NAME,
    FamilyNames,
    NameRule,
    listed,
    name_rule,
    tensor_name,
)
from loft_jax.lora import lora_layers
from loft_jax.lora.config import check_alpha, product_scaling
from loft_jax.lora.foreign import flax_lora
from loft_jax.optim.pairs import DEFAULT_SPEC, FactorSpec, Pair, find_pairs

_log = logging.getLogger(__name__)

Factors = TypeVar("Factors")

Alpha = float | Callable[[str], float]
"""The alpha of all modules, or a function of their dotted paths."""

# What the last step of a path is, if it is no module: the weight that has the factors beside it, or
# the module inside Flax's LoRALinear that holds them.
_WEIGHTS = ("kernel", "embedding", "weight", "w")
_INNER = "lora"

# Siblings of factors without which these are another adapter.
_MORE_THAN_FACTORS = ("lora_magnitude", "lora_start_a", "lora_start_b")

_DTYPES = ("float64", "float32", "float16", "bfloat16")


class FactorModule(NamedTuple):
    """A module in PyTorch, and where its factors are in a pair.

    Attributes:
        name: Of the module in PyTorch.
        path: Dotted path of the module in the tree.
        pair: The pair.
        number: Position in the stack; 0 if there is none.
        columns: Of the folded B.
        embedding: Whether it is an embedding, whose factors have other names.
    """

    name: str
    path: str
    pair: Pair
    number: int
    columns: slice
    embedding: bool

    def shape(self, letter: str) -> tuple[int, int]:
        """The shape of PEFT's A or B."""
        if letter == "A":
            return self.pair.rank, math.prod(self.pair.a.features)
        return self.columns.stop - self.columns.start, self.pair.rank


def factor_modules(
    factors: Any, hf_name: NameRule | str | None, spec: FactorSpec, embeddings: Sequence[str]
) -> list[FactorModule]:
    """Finds and names the modules of a tree of factors.

    Args:
        factors: As for `find_pairs`.
        hf_name: As in `save_peft_adapter`.
        spec: As for `find_pairs`.
        embeddings: As in `save_peft_adapter`.

    Returns:
        The modules, in the order of their A factors and of the layers of a stack.

    Raises:
        InputError: There is no pair, or something beside one that is not a factor, or PEFT's format
            has no place for one: an unnamed stack, a stack of stacks, two modules of one name.
    """
    _check_only_factors(factors)
    if not (pairs := find_pairs(factors, spec)):
        raise InputError("the tree has no factor pair: it is empty, or spec names none")
    rule = name_rule(hf_name)
    modules: dict[str, FactorModule] = {}
    for pair in pairs:
        path, weight = _module_path(pair)
        embedding = weight == "embedding" or (
            isinstance(rule, FamilyNames) and rule.is_embedding(path)
        )
        out = math.prod(pair.b.features)
        for number, names in enumerate(_names(rule, path, pair.a.stack)):
            if out % len(names):
                raise InputError(f"{path}: {out} outputs are not {len(names)} equal parts: {names}")
            size = out // len(names)
            for part, name in enumerate(names):
                if name in modules:
                    raise InputError(
                        f"{path}: its name {name!r} is that of {modules[name].path} too"
                    )
                columns = slice(part * size, (part + 1) * size)
                named = embedding or name in embeddings
                modules[name] = FactorModule(name, path, pair, number, columns, named)
    if unknown := [name for name in embeddings if name not in modules]:
        raise InputError(f"embeddings: {listed(unknown)} is no module of the adapter")
    return list(modules.values())


def factor_rank_alphas(
    factors: Any,
    modules: Sequence[FactorModule],
    rank: int | None,
    alpha: Alpha | None,
    spec: FactorSpec,
) -> dict[str, RankAlpha]:
    """Gives the rank and alpha of each module.

    Args:
        factors: The tree, or the model that has the factors.
        modules: From `factor_modules`.
        rank: As in `save_peft_adapter`.
        alpha: As in `save_peft_adapter`.
        spec: Its scaling, if it is not 1, has to be that of alpha.

    Returns:
        Ranks and alphas by name in PyTorch.

    Raises:
        InputError: Alpha is missing, or does not fit the scaling that is known; or the rank is
            another one. The message names the path.
    """
    plain = flax_lora(factors) if isinstance(factors, nnx.Module) else frozenset()
    rank_alphas: dict[str, RankAlpha] = {}
    for module in modules:
        pair, path = module.pair, module.path
        if rank is not None and pair.rank != rank:
            raise InputError(f"{path}: has rank {pair.rank}, expected {rank}")
        unscaled = pair.path.replace("/", ".") in plain
        value = alpha(path) if callable(alpha) else alpha
        if value is None and unscaled:
            value = float(pair.rank)
        if value is None:
            raise InputError(
                f"{path}: alpha is missing; pass the one with which the forward pass scales, "
                "alpha / rank"
            )
        check_alpha(f"alpha of {path}", value)
        scaling = value / pair.rank
        known = {"Flax's nnx.LoRA": 1.0} if unscaled else {}
        if callable(spec.scaling) or spec.scaling != 1:
            known["spec"] = float(spec.scaling_of(pair))
        for whose, other in known.items():
            if not _close(scaling, other):
                raise InputError(
                    f"{path}: alpha {value:g} at rank {pair.rank} scales by {scaling:g}, and "
                    f"{whose} scales by {other:g}"
                )
        rank_alphas[module.name] = RankAlpha(pair.rank, float(value))
    return rank_alphas


def factor_tensors(factors: Any, modules: Sequence[FactorModule]) -> dict[str, np.ndarray]:
    """Gives the tensors of an adapter.

    Args:
        factors: The tree.
        modules: From `factor_modules`.

    Returns:
        PEFT's `A (rank, in)` and `B (out, rank)` by PEFT's names, in the dtypes of the factors.

    Raises:
        InputError: A factor is not an array of a floating-point type that PEFT's file holds.
    """
    leaves = jax.tree.leaves(factors)
    folded: dict[int, np.ndarray] = {}
    tensors: dict[str, np.ndarray] = {}
    for module in modules:
        for letter, factor in (("A", module.pair.a), ("B", module.pair.b)):
            if factor.index not in folded:
                leaf = leaves[factor.index]
                if not isinstance(leaf, (jax.Array, np.ndarray)):
                    kind = type(leaf).__name__
                    raise InputError(f"{factor.path}: is a {kind}, expected an array")
                _check_dtype(factor.path, leaf.dtype)
                folded[factor.index] = factor.fold(gather_to_host(leaf))
            matrix = folded[factor.index][module.number]
            matrix = matrix if letter == "A" else matrix[:, module.columns]
            name = tensor_name(module.name, letter, embedding=module.embedding)
            tensors[name] = np.ascontiguousarray(matrix.T)
    return tensors


def load_peft_factors(
    folder: str | os.PathLike[str],
    factors: Factors,
    *,
    rank: int | None = None,
    alpha: Alpha | None = None,
    hf_name: NameRule | str | None = None,
    embeddings: Sequence[str] = (),
    spec: FactorSpec = DEFAULT_SPEC,
) -> Factors:
    """Reads an adapter in PEFT's format into a tree of factors, as `save_peft_adapter` writes it.

    The adapter must have the modules, ranks and scalings of the tree, no more and no fewer, since
    the forward pass is the caller's. Values are those of the file to the bit.

    Args:
        folder: Folder with `adapter_config.json` and `adapter_model.safetensors`.
        factors: A tree of arrays or `jax.ShapeDtypeStruct`, such as nested dicts or an `nnx.State`;
            or an NNX model with factors that `add_lora` did not make, which is updated in place.
            Leaves that are not factors are kept.
        rank: As in `save_peft_adapter`.
        alpha: As in `save_peft_adapter`: what the forward pass scales by, which the adapter's must
            be. It may be rsLoRA's `alpha / sqrt(rank)` in the file.
        hf_name: As in `save_peft_adapter`.
        embeddings: As in `save_peft_adapter`.
        spec: As in `save_peft_adapter`.

    Returns:
        The structure, dtypes and shardings of `factors` with the values of the file; the same model
        if it was one.

    Raises:
        InputError: The adapter is missing, damaged or not supported (DoRA, biases, whole modules);
            or its modules, ranks, scalings or dtypes are not those of the tree. The message names
            the file and the tensor or the module.

    Example:
        >>> import tempfile
        >>> from loft_jax import save_peft_adapter
        >>> folder = Path(tempfile.mkdtemp())
        >>> factors = {"fc": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 8))}}
        >>> save_peft_adapter(folder, factors, alpha=4)
        >>> again = load_peft_factors(folder, jax.tree.map(jnp.zeros_like, factors), alpha=4)
        >>> again["fc"]["lora_a"].sum().item()
        8.0
    """
    folder = Path(folder)
    check_folder(folder)
    if isinstance(factors, nnx.Module) and lora_layers(factors):
        raise InputError("the model has LoRA layers of add_lora: load_peft_adapter reads into them")
    tree = nnx.state(factors) if isinstance(factors, nnx.Module) else factors
    modules = factor_modules(tree, hf_name or getattr(factors, "hf_name", None), spec, embeddings)
    rank_alphas = factor_rank_alphas(factors, modules, rank, alpha, spec)
    tensors = read_unchanged(folder, lambda: _read(folder, modules, rank_alphas))
    leaves, treedef = jax.tree.flatten(tree)
    paths = {f.index: f.path for module in modules for f in (module.pair.a, module.pair.b)}
    for index, array in _assembled(modules, tensors).items():
        leaves[index] = _like(leaves[index], array, paths[index])
    loaded: Factors = jax.tree.unflatten(treedef, leaves)
    if not isinstance(factors, nnx.Module):
        return loaded
    nnx.update(factors, loaded)
    return factors


def _read(
    folder: Path, modules: Sequence[FactorModule], rank_alphas: dict[str, RankAlpha]
) -> dict[tuple[str, str], np.ndarray]:
    """Reads the tensors of an adapter, by module and letter, after all checks."""
    config = PeftConfig.read(inside(folder, CONFIG_NAME))
    file = AdapterFile(folder / WEIGHTS_NAME)
    for name, held in (
        ("use_dora", config.use_dora),
        ("modules_to_save", config.modules_to_save),
        ("bias", config.bias != "none" and config.bias),
    ):
        if held:
            raise InputError(
                f"{config.path}: {name} is {shown(held)}, which a tree of factors has no place for"
            )
    names = {
        tensor_name(module.name, letter, embedding=module.embedding): (module, letter)
        for module in modules
        for letter in "AB"
    }
    # Base weights, which PEFT writes beside the factors of an embedding.
    bases = {f"{PREFIX}{m.name}.base_layer.weight" for m in modules if m.embedding}
    if missing := [name for name in names if name not in file.shapes]:
        raise InputError(f"{file.path}: has no {listed(missing)}, which the tree has factors for")
    if more := [name for name in file.shapes if name not in names and name not in bases]:
        raise InputError(f"{file.path}: has {listed(more)}, which the tree has no place for")
    for module in modules:
        found, own = config.rank_alpha(module.name), rank_alphas[module.name]
        if found.rank != own.rank:
            raise InputError(
                f"{config.path}: {module.name} has rank {found.rank}, and {module.path} {own.rank}"
            )
        theirs = product_scaling(*found, config.use_rslora)
        ours = product_scaling(*own, use_rslora=False)
        if not _close(theirs, ours):
            raise InputError(
                f"{config.path}: {module.name} scales by {theirs:g}, and {module.path} by "
                f"{ours:g}, alpha {own.alpha:g} at rank {own.rank}; expected the same"
            )
    for name, (module, letter) in names.items():
        if file.shapes[name] != module.shape(letter):
            raise InputError(
                f"{file.path}: tensor {shown(name)} is {file.shapes[name]}, expected "
                f"{module.shape(letter)} by {module.path}"
            )
    for name in sorted(bases & set(file.shapes)):
        _log.warning("%s: %s is a base weight, which is not compared", file.path, shown(name))
    read = {(m.name, letter): file.read(name) for name, (m, letter) in names.items()}
    file.log_unknown_to_peft()
    return read


def _assembled(
    modules: Sequence[FactorModule], tensors: dict[tuple[str, str], np.ndarray]
) -> dict[int, np.ndarray]:
    """Puts the modules of each pair together again, by the indices of leaves."""
    pairs: dict[int, list[FactorModule]] = {}
    for module in modules:
        pairs.setdefault(module.pair.a.index, []).append(module)
    leaves: dict[int, np.ndarray] = {}
    for members in pairs.values():
        pair = members[0].pair
        layers: dict[int, list[FactorModule]] = {}
        for module in members:
            layers.setdefault(module.number, []).append(module)
        for first, *others in layers.values():
            for other in others:
                if not np.array_equal(tensors[first.name, "A"], tensors[other.name, "A"]):
                    raise InputError(
                        f"{first.path}: has one A for {first.name} and {other.name}, whose A differ"
                    )
        a = [tensors[parts[0].name, "A"].T for parts in layers.values()]
        b = [np.concatenate([tensors[m.name, "B"] for m in p]).T for p in layers.values()]
        leaves[pair.a.index] = pair.a.unfold(np.stack(a))
        leaves[pair.b.index] = pair.b.unfold(np.stack(b))
    return leaves


def _like(leaf: Any, array: np.ndarray, path: str) -> Any:
    """Converts an array to the kind, dtype and sharding of a leaf."""
    _check_dtype(path, leaf.dtype)
    if jnp.promote_types(leaf.dtype, array.dtype) != leaf.dtype:
        raise InputError(
            f"{path}: is {leaf.dtype}, which cannot hold the file's {array.dtype}; load into a "
            "tree of that dtype, and cast it"
        )
    array = array.astype(leaf.dtype)
    if isinstance(leaf, np.ndarray):
        return array
    sharding = getattr(leaf, "sharding", None)
    return jnp.asarray(array) if sharding is None else jax.device_put(array, sharding)


def _names(rule: NameRule | None, path: str, stack: tuple[int, ...]) -> list[tuple[str, ...]]:
    """Gives the names of each layer of a stack: one, or several whose outputs are one weight."""
    if len(stack) > 1:
        raise InputError(f"{path}: is a stack of stacks {stack}, which has no layer numbers")
    if rule is None:
        if stack:
            raise InputError(f"{path}: is a stack of {stack[0]} layers, pass hf_name to name them")
        if not path:
            raise InputError("the layer is the whole model: PEFT adapts modules inside one")
        return [(path,)]
    found: list[tuple[str, ...]] = []
    for number in range(*stack) if stack else (None,):
        with explained(f"{path}: hf_name({path!r}, {number})"):
            name = rule(path, number)
        names = (name,) if isinstance(name, str) else tuple(name or ())
        if not names or not all(isinstance(name, str) and name for name in names):
            raise InputError(
                f"{path}: hf_name({path!r}, {number}) is {shown(name)}, expected a name"
            )
        found.append(names)
    return found


def _module_path(pair: Pair) -> tuple[str, str]:
    """Gives the dotted path of the module of a pair, and the name of its weight if the path had it.

    Qwix's factors are `kernel_lora_a` beside `kernel`; those of Flax's `LoRALinear` are in a module
    `lora` of it.
    """
    if pair.path == pair.a.path:  # the factors are the tree
        return "", ""
    owner, _, last = pair.path.rpartition("/")
    if pair.a.path[len(pair.path)] == "_" and last in _WEIGHTS:
        return owner.replace("/", "."), last
    if last == _INNER:
        return owner.replace("/", "."), ""
    return pair.path.replace("/", "."), ""


def _check_only_factors(factors: Any) -> None:
    for keys, _ in jax.tree_util.tree_flatten_with_path(factors)[0]:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        steps = path.removesuffix("/value").split("/")
        if steps[-1].endswith(_MORE_THAN_FACTORS):
            raise InputError(
                f"{path}: is no factor but changes what the factors beside it mean; pass the model "
                "itself, or fold it into them"
            )


def _check_dtype(path: str, dtype: Any) -> None:
    if str(jnp.dtype(dtype)) not in _DTYPES:
        raise InputError(f"{path}: is {dtype}, expected one of {', '.join(_DTYPES)}")


def _close(left: float, right: float) -> bool:
    """Whether two scalings are the same up to rounding in float32."""
    return math.isclose(left, right, rel_tol=1e-6)
