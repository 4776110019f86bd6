"""Command line: measures what is asked for, and writes the page."""

import sys
from collections.abc import Sequence

import jax
import tyro
from tqdm import tqdm

from benchmarks import growth
from benchmarks.growth.measure import Options, sweep
from benchmarks.growth.page import draw, latest, lines, page
from benchmarks.history import History
from loft_jax.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, adds what was measured to the results, and writes the page.

    Args:
        arguments: As typed; by default those of the process.

    Returns:
        The exit code.
    """
    about = (growth.__doc__ or "").partition("\n")[0]
    options = tyro.cli(
        Options, args=arguments, prog="python -m benchmarks.growth", description=about
    )
    jax.config.update("jax_platforms", "cpu")
    history = History(options.results, "growth")
    target = options.page or options.results / "growth.md"
    try:
        for size in options.against:
            rows = sweep(size, options)
            for point, name, row in tqdm(rows, desc=size, unit="row"):
                case = {"against": size, "quick": options.quick, **point._asdict()}
                history.append(case | {"optimizer": name}, row)
        found = latest(history.read())
        text = page(found, target.stem)
        target.write_text(text, encoding="utf-8")
    except (InputError, OSError) as error:
        print(f"growth: {error}", file=sys.stderr)
        return 2
    print(text)
    for size, entries in found.items():
        if not draw(size, lines(size, entries), target.with_name(f"{target.stem}-{size}.png")):
            print("no figures: matplotlib is not installed (extra `plot`)", file=sys.stderr)
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
