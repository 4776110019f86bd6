"""Progress bars that tqdm's own environment variables, such as `TQDM_DISABLE`, still govern."""

from typing import Any

from tqdm.auto import tqdm


def progress_bar(items: Any = None, *, shown: bool, **options: Any) -> "tqdm[Any]":
    """Makes a bar of tqdm.

    Args:
        items: What it iterates over; by default nothing, for a bar that is moved by hand.
        shown: Whether it may be seen. False goes before the environment, True does not.
        **options: Of `tqdm.tqdm`.

    Returns:
        The bar.

    Example:
        >>> sum(progress_bar([1, 2, 3], shown=False))
        6
    """
    if not shown:
        options["disable"] = True
    return tqdm(items, **options)
