"""The prompt of Stanford's Alpaca, https://github.com/tatsu-lab/stanford_alpaca."""


def alpaca_prompt(instruction: str, further: str = "", *, begin: str = "") -> str:
    """Gives the prompt of an instruction, as Alpaca puts it.

    Args:
        instruction: What is asked.
        further: The input of the instruction; empty for none.
        begin: What stands in the place of the first sentences.

    Returns:
        The text that the response follows.

    Example:
        >>> print(alpaca_prompt("Add.", "2, 3", begin="You count."))
        You count.
        <BLANKLINE>
        ### Instruction:
        Add.
        <BLANKLINE>
        ### Input:
        2, 3
        <BLANKLINE>
        ### Response:
        <BLANKLINE>
    """
    context = ", paired with an input that provides further context" if further else ""
    begin = begin or (
        f"Below is an instruction that describes a task{context}. "
        "Write a response that appropriately completes the request."
    )
    given = f"### Input:\n{further}\n\n" if further else ""
    return f"{begin}\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n"
