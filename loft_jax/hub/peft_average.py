"""The weighted mean of adapters in PEFT's format, without their base model."""

import contextlib
import functools
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from loft_jax.errors import InputError, explained, shown
from loft_jax.files import inside
from loft_jax.hub.peft_base import check_folder, read_labels
from loft_jax.hub.peft_config import PeftConfig
from loft_jax.hub.peft_file import AdapterFile
from loft_jax.hub.peft_names import CONFIG_NAME, FACTOR, WEIGHTS_NAME
from loft_jax.hub.peft_save import write_adapter
from loft_jax.hub.tokenizer_folder import adapter_tokenizer, save_processor
from loft_jax.lora.average import best_factors, check_weights
from loft_jax.lora.config import product_scaling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

# Settings that must be the same; what adapters hold whole is compared by their tensors.
_COMMON = ("bias", "task_type")
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def average_peft_adapters(
    folders: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
) -> None:
    """Writes the weighted mean of adapters, as the best adapter of a rank.

    Products are averaged as `loft_jax.average_adapters` does it, module by module, and modules and
    biases that are held whole become the mean of their tensors. Base weights beside the factors of
    embeddings may be in some adapters only, if they are the same in these. The tokenizer is that of
    the first adapter, if it holds one, with the chat template by which it was trained. The base
    model is not read.

    Args:
        folders: Adapters of one base model.
        output: Folder to write to; an existing adapter is replaced.
        weights: One for each adapter, 0 or more; by default equal.
        rank: Largest rank of the result; by default all ranks together, so that it is exact.

    Raises:
        InputError: An adapter is missing, damaged or has DoRA, or would be replaced by the result;
            the adapters are of different tasks or of different base models; or weights do not fit.
            The message names the file and the setting or the tensor.

    Example:
        >>> import tempfile
        >>> from flax import nnx
        >>> from loft_jax import LoRAConfig, add_lora, save_peft_adapter
        >>> folder = Path(tempfile.mkdtemp())
        >>> for seed in range(2):
        ...     model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
        ...     model = add_lora(model, LoRAConfig(rank=2), rngs=nnx.Rngs(seed))
        ...     save_peft_adapter(folder / str(seed), model)
        >>> average_peft_adapters([folder / "0", folder / "1"], folder / "mean", rank=2)
        >>> sorted(path.name for path in (folder / "mean").iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    paths = [Path(folder) for folder in folders]
    weights = [1.0] * len(paths) if weights is None else list(weights)
    total = check_weights(weights, len(paths))
    if rank is not None and rank < 1:
        raise InputError(f"rank is {rank}, expected 1 or more")
    if Path(output).resolve() in [path.resolve() for path in paths]:
        raise InputError(f"{output}: is one of the adapters; expected another folder to write to")
    adapters = [_read(path) for path in paths]
    _check_alike(adapters)
    tokenizer = _first_tokenizer(paths)
    shares = [weight / total for weight in weights]
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for module in dict.fromkeys(module for adapter in adapters for module in adapter.factors):
        a, b = _mean_product(module, adapters, shares, rank)
        names = next(x.factors[module] for x in adapters if module in x.factors)
        tensors[names["A"]], tensors[names["B"]] = a, b
        ranks[module] = a.shape[0]
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.whole):
        tensors[name] = _mean_tensor(name, adapters, shares)
    with explained(f"{output}: cannot write the adapter"):
        save_processor(Path(output), tokenizer)
    write_adapter(Path(output), _settings(adapters, ranks), tensors, adapters[0].labels)


class _Adapter(NamedTuple):
    """An adapter on disk: names of its factors by module and letter, and of its other tensors."""

    config: PeftConfig
    file: AdapterFile
    factors: dict[str, dict[str, str]]
    whole: tuple[str, ...]
    labels: tuple[str, ...]


def _read(folder: Path) -> _Adapter:
    check_folder(folder)
    config = PeftConfig.read(inside(folder, CONFIG_NAME))
    if config.use_dora:
        raise InputError(
            f"{config.path}: use_dora is true, and weights with DoRA are not linear in the product "
            "of the factors; expected plain LoRA"
        )
    file = AdapterFile(inside(folder, WEIGHTS_NAME))
    factors: dict[str, dict[str, str]] = {}
    whole = []
    for name in file.shapes:
        found = FACTOR.fullmatch(name)
        if found and (letter := found["linear"] or found["embed"]):
            factors.setdefault(found["module"], {})[letter] = name
        else:
            whole.append(name)
    for module, names in factors.items():
        rank = config.rank_alpha(module).rank
        shapes = [file.shapes.get(names.get(letter, ""), ()) for letter in "AB"]
        matrices = [len(shape) for shape in shapes] == [2, 2]
        if not matrices or not shapes[0][0] == rank == shapes[1][1]:
            raise InputError(
                f"{file.path}: {module} has factors of shapes {shapes}, expected two of rank {rank}"
            )
    if not factors:
        raise InputError(f"{file.path}: holds no LoRA factors")
    return _Adapter(config, file, factors, tuple(whole), read_labels(folder))


def _check_alike(adapters: Sequence[_Adapter]) -> None:
    first = adapters[0]
    for other in adapters[1:]:
        bases = [x.config.settings.get("base_model_name_or_path") for x in (first, other)]
        if bases[0] != bases[1]:
            _log.warning(
                "%s names the base model %s and %s names %s; are they one model?",
                *(first.config.path, shown(bases[0]), other.config.path, shown(bases[1])),
            )
        for name in _COMMON:
            own, found = (x.config.settings.get(name) for x in (first, other))
            if own != found:
                raise InputError(
                    f"{other.config.path}: {name} is {shown(found)}, expected {shown(own)} as in "
                    f"{first.config.path}"
                )
        if other.labels != first.labels:
            raise InputError(
                f"{other.config.path.parent}: labels are {shown(other.labels)}, expected "
                f"{shown(first.labels)} as in {first.config.path.parent}"
            )
        different = sorted(x for x in set(first.whole) ^ set(other.whole) if not _of_base(x))
        if different:
            raise InputError(
                f"{other.file.path}: tensor {shown(different[0])} is in one adapter only, and is "
                f"not a LoRA factor; expected those of {first.file.path}"
            )


def _of_base(tensor: str) -> bool:
    """Whether it is a weight of the base, which PEFT writes beside factors of an embedding."""
    return tensor.endswith(".base_layer.weight")


def _first_tokenizer(folders: Sequence[Path]) -> "PreTrainedTokenizerBase | None":
    """Loads the tokenizer of the first adapter, and warns of others with another chat template."""
    first = adapter_tokenizer(folders[0])
    for folder in folders[1:]:
        with contextlib.suppress(InputError):  # it is not needed
            if _template(adapter_tokenizer(folder)) == _template(first):
                continue
        _log.warning(
            "%s: has another chat template than %s, or brings none; the mean has the latter's",
            *(folder, folders[0]),
        )
    return first


def _template(tokenizer: "PreTrainedTokenizerBase | None") -> Any:
    """The chat template that an adapter brings: "" for none, None where the base's counts."""
    return None if tokenizer is None else tokenizer.chat_template or ""


def _mean_product(
    module: str, adapters: Sequence[_Adapter], shares: Sequence[float], rank: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Gives PEFT's A (r, in) and B (out, r) of the mean of the products of a module."""
    rows, columns, sides, dtypes = [], [], set(), []
    for adapter, share in zip(adapters, shares, strict=True):
        if module not in adapter.factors:
            continue
        a, b = (adapter.file.read(adapter.factors[module][letter]) for letter in "AB")
        scale = product_scaling(*adapter.config.rank_alpha(module), adapter.config.use_rslora)
        rows.append(a.astype(np.promote_types(np.float32, a.dtype)))
        columns.append(b.astype(np.promote_types(np.float32, b.dtype)) * (share * scale))
        sides.add((b.shape[0], a.shape[1]))
        dtypes.append(a.dtype)
    if len(sides) > 1:
        raise InputError(
            f"{module}: weights are of shapes {sorted(sides)}, expected one base model"
        )
    dtype = functools.reduce(jnp.promote_types, dtypes)
    a, b = np.concatenate(rows, 0), np.concatenate(columns, 1)
    left, right = best_factors(jnp.asarray(a.T), jnp.asarray(b.T), len(a) if rank is None else rank)
    ours = np.asarray(left).T.astype(dtype), np.asarray(right).T.astype(dtype)
    return np.ascontiguousarray(ours[0]), np.ascontiguousarray(ours[1])


def _mean_tensor(name: str, adapters: Sequence[_Adapter], shares: Sequence[float]) -> np.ndarray:
    """Gives the mean of a tensor; one that is the same in all adapters is kept to the bit."""
    holders = [adapter for adapter in adapters if name in adapter.whole]
    values = [adapter.file.read(name) for adapter in holders]
    for adapter, value in zip(holders, values, strict=True):
        if value.shape != values[0].shape:
            raise InputError(
                f"{adapter.file.path}: tensor {shown(name)} is {value.shape}, expected "
                f"{values[0].shape} as in {holders[0].file.path}"
            )
    if all(np.array_equal(value, values[0]) for value in values):
        return values[0]
    if len(holders) < len(adapters):
        raise InputError(
            f"{holders[0].file.path}: tensor {shown(name)} is another one than in other adapters, "
            "and some have none; expected one base model"
        )
    total = sum(s * value.astype(np.float64) for s, value in zip(shares, values, strict=True))
    return np.asarray(total).astype(values[0].dtype)


def _settings(adapters: Sequence[_Adapter], ranks: dict[str, int]) -> dict[str, Any]:
    """Makes the configuration of the mean: that of the first adapter, at scaling 1."""
    settings = dict(adapters[0].config.settings)
    if any(set(adapter.factors) != set(ranks) for adapter in adapters):
        # No setting of one of them selects the modules of all.
        settings |= dict.fromkeys(_TARGETS) | {"target_modules": sorted(ranks)}
    largest = max(ranks.values())
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != largest}
    return settings | {
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "use_rslora": False,
    }
