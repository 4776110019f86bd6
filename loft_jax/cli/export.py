"""loft-jax export."""

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from loft_jax.errors import InputError, shown
from loft_jax.training.config import ExportConfig, check_output
from loft_jax.training.config_io import load_config


@dataclass(frozen=True)
class Export:
    """Write a checkpoint of a run as a PEFT adapter (or as a whole model, for method full).

    Settings are those saved with the checkpoint. Only `model.path`, the base model, and
    `lora.adapter`, the adapter that the run went on from, are read from the run's config.yaml,
    since they may have moved.
    """

    run: tyro.conf.Positional[str]
    """Output folder of the run."""
    output: str
    """Folder that `adapter/` or `model/` is written to."""
    checkpoint: str = "last"
    """Which one: "last", "best" (by the run's best_metric), or a step."""
    base_model_name: str = ""
    """Name of the base model in the adapter, for PEFT to find it; by default that of the run."""
    push_to_hub: str = ""
    """Repository of the Hugging Face hub to upload the folder to; a new one is private."""

    def __call__(self) -> int:
        """Runs the command."""
        from loft_jax.hub import load_processor
        from loft_jax.hub.repository import open_repository
        from loft_jax.hub.tokenizer_folder import with_template_of
        from loft_jax.training.checkpoint import Checkpoints
        from loft_jax.training.export import export_trained, restore_model, trained_with

        check_output(self.output)
        if (Path(self.output) / "checkpoints").is_dir():
            raise InputError(
                f"{self.output}: is the folder of a run, and what it trained would be replaced; "
                "expected another folder"
            )
        run = Path(self.run)
        saved_as = run / "config.yaml"
        if run.is_dir() and not saved_as.exists() and (run.parent / "checkpoints").is_dir():
            raise InputError(f"{run}: is not a run, but is in the folder of one, {run.parent}")
        if self.push_to_hub:
            open_repository(self.push_to_hub)
        now = load_config(saved_as)
        with contextlib.closing(Checkpoints(run / "checkpoints", read_only=True)) as checkpoints:
            step = self._step(checkpoints.steps(), checkpoints.best_step())
            saved = checkpoints.run_of(step)
            config = trained_with(saved, f"{checkpoints.folder}/{step}")
            # Only the paths are read from the file: what they name may have moved.
            base = now.get("model", {}).get("path", config.model.path)
            start = now.get("lora", {}).get("adapter", config.lora.adapter)
            names = self.base_model_name or config.export.base_model_name
            config = dataclasses.replace(
                config,
                model=dataclasses.replace(config.model, path=base),
                lora=dataclasses.replace(config.lora, adapter=start),
                export=ExportConfig(names, self.push_to_hub),
            )
            model, task = restore_model(config, checkpoints, step)
        processor = with_template_of(load_processor(base), start, training=True)
        Path(self.output).mkdir(parents=True, exist_ok=True)
        written = export_trained(
            model,
            processor,
            config,
            task,
            self.output,
            step=step,
            run=self.run,
            chats=bool(saved.get("chats")),
        )
        print(written)
        return 0

    def _step(self, steps: Sequence[int], best: int | None) -> int:
        found: int | None = None
        if self.checkpoint == "last":
            found = max(steps, default=None)
        elif self.checkpoint == "best":
            found = best
        else:
            found = next((step for step in steps if str(step) == self.checkpoint), None)
        if found is None:
            raise InputError(
                f"{self.run}: no checkpoint {shown(self.checkpoint)}; there are those of steps "
                f"{sorted(steps)}, the best being {best}"
            )
        return found
