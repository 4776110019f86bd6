"""What the configurations of all families have in common."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from loft_jax.errors import InputError, shown
from loft_jax.models import config_checks


@dataclasses.dataclass(frozen=True)
class FamilyConfig:
    """The common part of the configurations of all families, which has no fields itself.

    Attributes:
        model_type: Hugging Face's name of the family.
        architecture: Name of Hugging Face's class of the model.
        others: Names of their classes without its head, whose checkpoints are read too.
        only: Fields that change the computation, with the one value that is implemented.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    others: ClassVar[tuple[str, ...]] = ()
    only: ClassVar[Mapping[str, Any]]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads the contents of a Hugging Face `config.json`.

        Absent fields take the defaults transformers gives them; fields that transformers' own model
        does not read either (a version, a cache switch) have no effect.

        Args:
            config: The parsed JSON.

        Returns:
            The configuration.

        Raises:
            InputError: Another architecture, or a field whose value is not supported.
        """
        _check_kind(config, cls)
        return cls(**cls.fields_from_hf(config))

    @classmethod
    def fields_from_hf(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Gives the fields that the contents of a `config.json` of the family set."""
        names = [field.name for field in dataclasses.fields(cls)]
        fields = {name: config[name] for name in names if config.get(name) is not None}
        if "eos_token_id" in fields:
            fields["eos_token_id"] = config_checks.tokens(fields["eos_token_id"])
        return fields

    def to_hf(self) -> dict[str, Any]:
        """Gives the contents of a `config.json` that transformers loads."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **self.fields_to_hf(),
        }

    def fields_to_hf(self) -> dict[str, Any]:
        """Gives the fields as `config.json` has them, with lists in the place of tuples."""
        fields = dataclasses.asdict(self).items()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields}


def _check_kind(config: Mapping[str, Any], cls: type[FamilyConfig]) -> None:
    """Checks that a `config.json` is of a family, and sets nothing that is not implemented."""
    if config.get("model_type") != cls.model_type:
        raise InputError(
            f"config: model_type is {shown(config.get('model_type'))}, expected {cls.model_type!r}"
        )
    named = config.get("architectures") or ()
    if not isinstance(named, (list, tuple)):
        raise InputError(f"config: architectures is {shown(named)}, expected a list")
    architectures = (cls.architecture, *cls.others)
    known = {name.lower() for name in architectures}
    for name in named:
        if str(name).lower() not in known:
            raise InputError(
                f"config: architectures names {shown(name)}, only "
                f"{', '.join(map(repr, architectures))} is supported"
            )
    for name, value in cls.only.items():
        found = config.get(name, value)
        if found is not None and found != value:
            raise InputError(f"config: {name} is {shown(found)}, only {value!r} is supported")
