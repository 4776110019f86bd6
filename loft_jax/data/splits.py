"""The rows that a split names, in the syntax of `datasets`."""


def parts_of(split: str, sizes: dict[str, int]) -> list[tuple[str, slice]]:
    """Finds the rows that a split names.

    Args:
        split: Such as "train[:90%]" or "train+test"; "all" for every one.
        sizes: Number of rows of each split.

    Returns:
        The names of splits, and the slices of their rows.

    Raises:
        ValueError: It names no split.

    Example:
        >>> parts_of("train[:90%]", {"train": 20})
        [('train', slice(0, 18, None))]
    """
    from datasets import ReadInstruction

    spec = "+".join(sizes) if split == "all" else split
    parts = ReadInstruction.from_spec(spec).to_absolute(sizes)
    return [(part.splitname, slice(part.from_, part.to)) for part in parts]
