"""loft-jax finetune."""

import itertools
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from loft_jax.cli.compilation_cache import keep_compiled_programs
from loft_jax.errors import InputError, shown
from loft_jax.training.config import FinetuneConfig
from loft_jax.training.config_io import config_from_dict, load_config
from loft_jax.training.distributed import DistributedConfig, is_main, join

if TYPE_CHECKING:
    from loft_jax.training.callbacks import RunResult

_log = logging.getLogger(__name__)

INTERRUPTED = 130
"""Exit code of a run that was asked to stop, as of any command after Ctrl-C."""


@dataclass(frozen=True)
class Finetune:
    """Fine-tune a model; see the output folder for metrics, plot, checkpoints and adapter."""

    run: Annotated[FinetuneConfig, tyro.conf.arg(name="")]
    config: Annotated[str, tyro.conf.arg(metavar="FILE.yaml")] = ""
    """Read settings from a YAML file, such as a run's config.yaml; flags override it."""
    resume: bool = False
    """Continue from the newest checkpoint in the output folder."""
    distributed: Annotated[DistributedConfig, tyro.conf.arg(name="")] = field(
        default_factory=DistributedConfig
    )
    """How several processes find each other."""

    def __call__(self) -> int:
        """Runs the command; with several processes, only the first one prints."""
        from loft_jax.training.loop import finetune

        join(self.distributed)
        if folder := keep_compiled_programs():
            _log.info("compiled programs are kept in %s", folder)
        if not is_main():
            logging.getLogger("loft_jax").setLevel(logging.ERROR)
        result = finetune(self.run, resume=self.resume)
        if is_main():
            self._report(result)
        return INTERRUPTED if result.interrupted else 0

    def _report(self, result: "RunResult") -> None:
        for name, values in (("before", result.before), ("after", result.after)):
            if values:
                print(f"{name + ':':8}" + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))
        if result.interrupted:
            print(f"stopped at step {result.steps}; continue with --resume", file=sys.stderr)
        else:
            print(f"trained: {result.trained}")


def finetune_default(arguments: Sequence[str]) -> Finetune:
    """Finds the defaults of the flags, from a --config file and the dataclasses.

    The model is by default the one that a given --adapter names.

    Args:
        arguments: As typed after `loft-jax finetune`.

    Returns:
        The command, with `tyro.MISSING` for required flags.

    Raises:
        InputError: The file cannot be read, a value in it is wrong, or a run is to be resumed whose
            folder is another one by now.
    """
    path = _typed(arguments, "--config")
    fields: dict[str, Any] = {"output": tyro.MISSING, **(load_config(path) if path else {})}
    if path and "--resume" in arguments and not _typed(arguments, "--output"):
        _check_place(Path(path).parent, fields["output"])
    adapter = _typed(arguments, "--adapter") or fields.get("lora", {}).get("adapter")
    named = adapter and not _typed(arguments, "--model") and "path" not in fields.get("model", {})
    for section in ("model", "data"):
        fields[section] = {"path": tyro.MISSING, **fields.get(section, {})}
    if named:
        from loft_jax.hub.peft_base import base_model_of

        fields["model"]["path"] = base_model_of(adapter)
    return Finetune(run=config_from_dict(fields), config=path)


def _check_place(folder: Path, output: Any) -> None:
    """Refuses the file of a run that was copied or moved, which names the folder of before."""
    if (folder / "checkpoints").is_dir() and folder.resolve() != Path(str(output)).resolve():
        raise InputError(
            f"{folder / 'config.yaml'}: names the output {shown(output)}, and not the run that it "
            f"lies in; expected --output {folder}, to resume that one, or --output {output}"
        )


def _typed(arguments: Sequence[str], flag: str) -> str:
    """Gives the last value of a flag as it was typed; empty without it."""
    found = ""
    for word, value in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if word == flag:
            found = value
        elif word.startswith(f"{flag}="):
            found = word.removeprefix(f"{flag}=")
    return found
