"""Makes the pictures of the README and of the pages on concepts: `python -m scripts.pictures`.

Takes the extra `experiments`. Each picture is one module, which computes what it draws.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib.figure import Figure

from scripts.pictures import calibration, rates, reflora, step, subspace, whole_step
from scripts.pictures.style import save

FOLDER = Path(__file__).parents[2] / "docs" / "concepts"


PICTURES: Mapping[str, Callable[[], Figure]] = {
    "step.svg": lambda: step.draw(step.compute()),
    "rates.svg": lambda: rates.draw(rates.compute()),
    "subspace.svg": lambda: subspace.draw(subspace.compute()),
    "calibration.svg": lambda: calibration.draw(calibration.compute()),
    "whole-step.svg": lambda: whole_step.draw(whole_step.compute()),
    "reflora.svg": lambda: reflora.draw(reflora.compute()),
}


def main() -> None:
    """Makes them all."""
    for name, make in PICTURES.items():
        save(make(), FOLDER / name)


if __name__ == "__main__":
    main()
