"""PEFT's `adapter_config.json`: the modules of an adapter, with their ranks and alphas."""

import functools
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import regex  # noqa: F401 - without it, nothing limits what the patterns of a stranger take

from loft_jax.errors import InputError, cut, explained, shown
from loft_jax.files import MOST_CONFIG, read_json
from loft_jax.lora.config import ALL_LINEAR
from loft_jax.patterns import Patterns, ends_of

# Settings that are read here, or that do not affect what a stored adapter computes: they are of its
# initialization, of how it was trained, or of how PEFT runs it.
_UNDERSTOOD = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_dtype",
    "lora_ga_config",
    "lora_plus_lr_ratio",
    "lorap_emb_lr",
    "lorap_lr_ratio",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
# Other initializations change the base weights when PEFT loads the adapter.
_INITS_LEAVING_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
_BIASES = (None, "none", "all", "lora_only")
_OFF: tuple[Any, ...] = (None, False, "none", "", [], {})

# The number of the layer that a module is part of, if a configuration has no `layers_pattern`.
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")

_MOST_RANK = 2**20
_MOST_ALPHA = 3e38  # of float32

# Types of settings, None where they are absent; of a list, also those of its items.
_NAMES = ((NoneType, str, list), "a text or a list of texts")
_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_pattern": _NAMES,
    "modules_to_save": _NAMES,
    "layers_to_transform": ((NoneType, int, list), "a number or a list of numbers"),
    "rank_pattern": ((NoneType, dict), "an object"),
    "alpha_pattern": ((NoneType, dict), "an object"),
    "ensure_weight_tying": ((NoneType, bool), "true or false"),
    "use_dora": ((NoneType, bool), "true or false"),
    "use_rslora": ((NoneType, bool), "true or false"),
}


class RankAlpha(NamedTuple):
    """Rank and alpha of one module: `alpha / rank * A B`, with rsLoRA `alpha / sqrt(rank)`."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class PeftConfig:
    """The configuration of an adapter on disk.

    Attributes:
        path: The file, for messages.
        settings: Content of the file.
    """

    path: Path
    settings: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "PeftConfig":
        """Reads the file.

        Args:
            path: `adapter_config.json`.

        Returns:
            The configuration.

        Raises:
            InputError: The file is missing or damaged, is not of a LoRA adapter, or has a setting
                that is not supported; the message names the setting.
        """
        settings = read_json(path, most_bytes=MOST_CONFIG)
        kind = settings.get("peft_type")
        if kind != "LORA":
            raise InputError(f"{path}: peft_type is {shown(kind)}, only 'LORA' is supported")
        for name, value in settings.items():
            if name not in _UNDERSTOOD and value not in _OFF:
                raise InputError(f"{path}: {cut(name)} is {shown(value)}, which is not supported")
        init = settings.get("init_lora_weights")
        if init not in _INITS_LEAVING_THE_BASE:
            raise InputError(
                f"{path}: init_lora_weights is {shown(init)}, which changes the base weights; "
                f"expected an adapter converted to plain LoRA"
            )
        if (bias := settings.get("bias")) not in _BIASES:
            raise InputError(f"{path}: bias is {shown(bias)}, expected 'none', 'all', 'lora_only'")
        config = cls(path, settings)
        with explained(f"{path}: cannot be read as settings of an adapter"):
            config._check_types()
        return config

    @functools.cached_property
    def _patterns(self) -> Patterns:
        return Patterns(str(self.path))

    @property
    def use_rslora(self) -> bool:
        """Whether all modules scale by `alpha / sqrt(rank)`."""
        return bool(self.settings.get("use_rslora"))

    @property
    def use_dora(self) -> bool:
        """Whether all modules have a magnitude beside their factors."""
        return bool(self.settings.get("use_dora"))

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """Names, or ends of names, of the modules that are saved whole."""
        names = self.settings.get("modules_to_save") or ()
        return (names,) if isinstance(names, str) else tuple(names)

    @property
    def bias(self) -> str:
        """Which biases of the base model are held too: `"none"`, `"all"` or `"lora_only"`."""
        return self.settings.get("bias") or "none"

    @property
    def ensure_weight_tying(self) -> bool:
        """Whether what is trained of a tied embedding is trained of the head too."""
        return bool(self.settings.get("ensure_weight_tying"))

    def is_saved(self, name: str) -> bool:
        """Whether a module of this name is held whole, by itself or as a part of another.

        PEFT matches any end of a name here: "norm" is also of "input_layernorm".
        """
        return any(around.endswith(self.modules_to_save) for around in _with_parents(name))

    def rank_alpha(self, name: str) -> RankAlpha:
        """Gives the rank and alpha of a module."""
        rank = self._by_pattern("rank_pattern", name, self.settings["r"])
        alpha = self._by_pattern("alpha_pattern", name, self.settings["lora_alpha"])
        return RankAlpha(rank, float(alpha))

    def is_target(self, name: str, *, linear: bool = False) -> bool:
        """Whether PEFT would adapt a module.

        Args:
            name: Its name.
            linear: Whether it is among those that PEFT means by "all-linear".
        """
        settings = self.settings
        if any(ends_with(around, self.modules_to_save) for around in _with_parents(name)):
            return False
        exclude, targets = settings.get("exclude_modules"), settings.get("target_modules") or []
        if exclude and self._is_matched(exclude, name):
            return False
        if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
            return linear
        matched = self._is_matched(targets, name)
        if not matched or isinstance(targets, str) or name in targets:
            return matched
        only = settings.get("layers_to_transform")
        if only is None or only == []:
            return True
        patterns = settings.get("layers_pattern") or []
        rules = [
            rf"(?:^|.*?\.){pattern}\.(\d+)\."
            for pattern in ([patterns] if isinstance(patterns, str) else patterns)
        ]
        for rule in rules or [_LAYER.pattern]:
            if found := self._patterns.match(rule, name):
                return int(found[1]) in ([only] if isinstance(only, int) else only)
        return False

    def _by_pattern(self, field: str, name: str, default: Any) -> Any:
        return _by_pattern(self.settings.get(field) or {}, name, default, self._patterns)

    def _is_matched(self, targets: str | Collection[str], name: str) -> bool:
        """Matches as PEFT does: a string is a pattern of whole names, a list holds their ends."""
        if isinstance(targets, str):
            return self._patterns.fullmatch(targets, name) is not None
        return ends_with(name, targets)

    def _check_types(self) -> None:
        for name, (kinds, expected) in _KINDS.items():
            value = self.settings.get(name)
            items = value if isinstance(value, list) else []
            inner = set(kinds) - {list, NoneType}
            if not (type(value) in kinds and all(type(item) in inner for item in items)):
                raise InputError(f"{self.path}: {name} is {shown(value)}, expected {expected}")
        ranks = {"r": self.settings.get("r"), **(self.settings.get("rank_pattern") or {})}
        for name, rank in ranks.items():
            if type(rank) is not int or not 1 <= rank <= _MOST_RANK:
                raise InputError(
                    f"{self.path}: rank {cut(name)} is {shown(rank)}, expected 1 to {_MOST_RANK}"
                )
        alphas = {
            "lora_alpha": self.settings.get("lora_alpha"),
            **(self.settings.get("alpha_pattern") or {}),
        }
        for name, alpha in alphas.items():
            if type(alpha) not in (int, float) or not 0 < alpha <= _MOST_ALPHA:
                raise InputError(
                    f"{self.path}: alpha {cut(name)} is {shown(alpha)}, expected a number > 0"
                )
        patterns = [*ranks, *alphas]
        for field in ("target_modules", "exclude_modules", "layers_pattern"):
            value = self.settings.get(field)
            patterns += [value] if isinstance(value, str) else []
        if isinstance(layers := self.settings.get("layers_pattern"), list):
            patterns += layers
        for pattern in patterns:
            self._patterns.check(pattern)


def peft_settings(
    modules: Mapping[str, RankAlpha],
    others: Collection[str] | None,
    *,
    base_model: str | None,
    task_type: str | None,
    dropout: float,
    use_rslora: bool,
    use_dora: bool,
    modules_to_save: Collection[str] = (),
    bias: str = "none",
    fan_in_fan_out: bool = False,
) -> dict[str, Any]:
    """Makes the settings with which PEFT adapts exactly these modules, at their ranks and alphas.

    Args:
        modules: Rank and alpha of every adapted module, by name.
        others: Names of the modules without an adapter; None if they are not known.
        base_model: Name or path of the base model.
        task_type: PEFT's task.
        dropout: Dropout rate of training.
        use_rslora: Whether all modules scale by `alpha / sqrt(rank)`.
        use_dora: Whether all modules have a magnitude.
        modules_to_save: Names of modules that are saved whole.
        bias: Which biases of the base model are saved too.
        fan_in_fan_out: Whether the adapted weights have the shape `(in, out)` in PyTorch.

    Returns:
        The content of `adapter_config.json`.
    """
    rank = Counter(each.rank for each in modules.values()).most_common(1)[0][0]
    alpha = Counter(each.alpha for each in modules.values()).most_common(1)[0][0]
    targets: list[str] | str = sorted(modules)
    numbers = None
    if others is not None:
        targets, numbers = _targets(list(modules), others)
    return {
        "alpha_pattern": _pattern(modules, "alpha", alpha),
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": bias,
        "exclude_modules": None,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": numbers,
        "lora_alpha": _whole(alpha),
        "lora_dropout": dropout,
        "modules_to_save": list(modules_to_save) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": _pattern(modules, "rank", rank),
        "revision": None,
        "target_modules": targets,
        "task_type": task_type,
        "use_dora": use_dora,
        "use_rslora": use_rslora,
    }


def ends_with(name: str, ends: Collection[str]) -> bool:
    """Whether a module's name equals one of `ends`, or ends with one of them after a dot."""
    return any(end in ends for end in ends_of(name))


def _with_parents(name: str) -> list[str]:
    """Gives the name of a module and of all that it is a part of."""
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _by_pattern(values: Mapping[str, Any], name: str, default: Any, patterns: Patterns) -> Any:
    key = patterns.first_end(values, name)
    return default if key is None else values[key]


def _targets(names: list[str], others: Collection[str]) -> tuple[list[str] | str, list[int] | None]:
    """Gives the shortest targets that match no other module, and the numbers of their layers.

    Targets are ends of names, with the numbers where they are not of all layers, or else names or a
    pattern.
    """
    inside = {name: found for name in names if (found := _LAYER.match(name))}
    layers = sorted({int(found[1]) for found in inside.values()})
    if len(inside) == len(names) and {_last(name) for name in names} & {_last(o) for o in others}:
        near = [o for o in others if (found := _LAYER.match(o)) and int(found[1]) in layers]
        ends = {
            name[found.end() :] if any(ends_with(o, [_last(name)]) for o in near) else _last(name)
            for name, found in inside.items()
        }
        settings = {"target_modules": sorted(ends), "layers_to_transform": layers}
        config = PeftConfig(Path(), settings)
        if all(map(config.is_target, names)) and not any(map(config.is_target, others)):
            return sorted(ends), layers
    taken = {_last(name) for name in names if ends_with(name, [_last(name)])}
    clashing = {last for last in taken if any(ends_with(other, [last]) for other in others)}
    short = sorted({name if _last(name) in clashing else _last(name) for name in names})
    if not any(ends_with(other, short) for other in others):
        return short, None
    return "|".join(re.escape(name) for name in sorted(names)), None


def _pattern(modules: Mapping[str, RankAlpha], field: str, default: float) -> dict[str, Any]:
    """Gives ranks or alphas that are not the default, by the last part of a name if possible."""
    values: dict[str, Any] = {name: getattr(s, field) for name, s in modules.items()}
    by_last: dict[str, set[Any]] = {}
    for name, value in values.items():
        by_last.setdefault(_last(name), set()).add(value)
    keys = {name: _last(name) if len(by_last[_last(name)]) == 1 else name for name in values}
    pattern = {keys[name]: _whole(v) for name, v in sorted(values.items()) if v != default}
    own = Patterns(f"{field}_pattern")
    if all(_by_pattern(pattern, name, default, own) == value for name, value in values.items()):
        return pattern
    # One name ends with another: anchored patterns match only their own module.
    return {f"^{re.escape(n)}": _whole(v) for n, v in sorted(values.items()) if v != default}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _whole(value: float) -> float | int:
    """Gives an int for an integral value, which readers of the format expect of alpha."""
    return int(value) if value == int(value) else value
