"""loft-jax average."""

from dataclasses import dataclass

import tyro

from loft_jax.training.config import check_output


@dataclass(frozen=True)
class Average:
    """Write the weighted mean of adapters of one base, as the best adapter of a rank."""

    adapters: tyro.conf.Positional[tuple[str, ...]]
    """Folders of PEFT adapters."""
    output: str
    """Folder to write to; an existing adapter is replaced."""
    weights: tuple[float, ...] | None = None
    """One for each adapter, such as its number of examples; by default equal."""
    rank: int | None = None
    """Largest rank of the result; by default all ranks together, so that it is exact."""

    def __call__(self) -> int:
        """Runs the command."""
        from loft_jax.hub.peft_average import average_peft_adapters

        check_output(self.output)
        average_peft_adapters(self.adapters, self.output, weights=self.weights, rank=self.rank)
        print(self.output)
        return 0
