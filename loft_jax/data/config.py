"""What to read and how to turn it into rows of tokens."""

from dataclasses import dataclass

from loft_jax.errors import InputError, shown


@dataclass(frozen=True)
class DataConfig:
    """Where the examples are and how they become rows of tokens.

    Which fields are present decides how an example is read: `messages` first, then `prompt` with
    `completion`, then `text`.

    Args:
        path: A JSON, JSONL, CSV, TSV, Parquet or text file, a folder of such files, a folder
            written by `Dataset.save_to_disk`, or a dataset id on the Hugging Face hub.
        split: Which split, with slices as `datasets` writes them: `"train"`, `"train[:90%]"`.
            In a folder the split of a file is read from its name; a single file is `"train"`.
        name: The configuration of a hub dataset that has several.
        messages_field: Holds a list of `{"role", "content"}`; the loss is on assistant turns. The
            chat template is given the field `tools` too, if rows have it.
        prompt_field: Holds the text the model is given.
        completion_field: Holds the text the model is to give; the loss is on it and on EOS. It is
            tokenized apart from the prompt, so a space between the two belongs to the completion.
        text_field: Holds plain text; the loss is on all of it. For classification, the text that
            the label is of.
        text_pair_field: For classification, holds the second text of a pair, if rows have it.
        label_field: For classification, holds the label: a text, or a whole number from 0; a
            decimal number for regression.
        max_length: The longest row, in tokens. A longer text becomes several rows; a longer example
            of another kind loses the left of its prompt first (never BOS), then its end. Of a
            question with answers to compare, the prompt with the longest of them.
        packing: Put several examples into one row; attention and positions do not cross.
        buckets: The lengths to pad to, increasing; empty means a few lengths fitted to the data.

    Raises:
        InputError: A value is out of range.

    Example:
        >>> DataConfig("reviews.jsonl", split="train[:90%]", max_length=256).max_length
        256
    """

    path: str
    split: str = "train"
    name: str | None = None
    messages_field: str = "messages"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    text_field: str = "text"
    text_pair_field: str = "text_pair"
    label_field: str = "label"
    max_length: int = 1024
    packing: bool = False
    buckets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise InputError(f"max_length is {shown(self.max_length)}; expected at least 1 token")
        pairs = zip((0, *self.buckets), self.buckets, strict=False)
        if any(low >= high for low, high in pairs):
            raise InputError(
                f"buckets are {shown(self.buckets)}; expected positive, increasing lengths"
            )
        if self.buckets and self.buckets[-1] < self.max_length:
            raise InputError(
                f"the largest of buckets {shown(self.buckets)} is below max_length "
                f"{shown(self.max_length)}; rows of that length would fit nowhere"
            )

    @property
    def fields(self) -> frozenset[str]:
        """The names of the fields that examples are read from."""
        return frozenset(
            (self.messages_field, self.prompt_field, self.completion_field, self.text_field)
        )
