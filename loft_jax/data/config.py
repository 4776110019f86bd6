"""The configuration of examples: where they are and how they become rows of tokens."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from loft_jax.data.field_template import FieldTemplate
from loft_jax.data.presets import PresetName, find_preset
from loft_jax.errors import InputError, naming, shown
from loft_jax.settings import check_settings


@dataclass(frozen=True)
class DataConfig:
    """Where examples are and how they become rows of tokens.

    The fields of an example decide how it is read; docs/how-to/instruction-data.md lists the
    formats.

    Args:
        path: A JSON, JSONL, CSV, TSV, Parquet or text file, a folder of such files, a folder
            written by `Dataset.save_to_disk`, or a dataset id on the Hugging Face hub; of images
            also a folder with a subfolder for each label, or an `.npz` file. Empty if the examples
            are given as an object, in Python.
        split: Name of the split, with slices in the syntax of `datasets`: `"train"`, the default,
            `"train[:90%]"`, `"train+test"`, and `"all"` for every one. In a folder, the name of a
            file gives its split; a single file is `"train"`.
        name: The configuration of a hub dataset that has several.
        preset: The published data set that `path` holds, which says what its files and columns are,
            its labels, its task, and the metric of the best checkpoint;
            docs/how-to/classification.md lists them.
        messages_field: Field with a list of `{"role", "content"}`; the loss is on assistant turns.
            The chat template also gets the field `tools`, if rows have it.
        prompt_field: Field with the text that the model is given.
        completion_field: Field with the text that the model should generate; the loss is on it and
            on EOS. It is tokenized separately from the prompt, so a space between the two belongs
            to the completion.
        prompt: Text that the model is given, with names of fields in braces, used in place of
            `prompt_field`: "{instruction} {input}". A backslash with n is a line break, and a field
            that is empty leaves no white space.
        completion: Text that the model should generate, as `prompt`; used in place of
            `completion_field`.
        chat: Give prompts and completions to the chat template, as what the user and the assistant
            say. Conversations are given to it anyway.
        columns: Names of the columns of CSV and TSV files that have no header.
        text_field: Field with plain text; the loss is on all of it. For classification, the text to
            classify.
        text_pair_field: For classification, field with the second text of a pair, if rows have it.
        image_field: Field with the image to classify.
        label_field: For classification, field with the label: a text, or an integer from 0; for
            regression, a decimal number. Beside a prompt and a completion, false says that the
            completion is one to avoid, and the row is left out.
        random_resized_crop: Train on a part of each image, of random area (8 to 100 %) and aspect
            ratio (3:4 to 4:3), which is resized as evaluation resizes the whole.
        random_horizontal_flip: Train on half of the images mirrored.
        max_length: Largest length of a row, in tokens. A longer text becomes several rows; a longer
            example of another kind loses the left of its prompt first (never BOS), then its end.
            For a question with answers to compare, the length is that of the prompt with the
            longest answer.
        packing: Put several examples into one row; attention and positions do not cross examples.
        buckets: Lengths to pad to, increasing; if empty, a few lengths are fitted to the data.

    Raises:
        InputError: A value is out of range.

    Example:
        >>> DataConfig("reviews.jsonl", split="train[:90%]", max_length=256).max_length
        256
    """

    path: str = ""
    split: str | None = None
    name: str | None = None
    preset: PresetName | None = None
    messages_field: str = "messages"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    prompt: str = ""
    completion: str = ""
    chat: bool = False
    columns: tuple[str, ...] = ()
    text_field: str = "text"
    text_pair_field: str = "text_pair"
    image_field: str = "image"
    label_field: str = "label"
    random_resized_crop: bool = False
    random_horizontal_flip: bool = False
    max_length: int = 1024
    packing: bool = False
    buckets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_settings(self, "data", at_least={"max_length": 1})
        for name in ("prompt", "completion"):
            if template := getattr(self, name):
                with naming(f"data.{name}"):
                    FieldTemplate(template)
                if (field := getattr(self, f"{name}_field")) != name:
                    raise InputError(
                        f"{name}_field is {shown(field)}, but there is a template for the {name}; "
                        "expected one of the two"
                    )
        if len(set(self.columns)) < len(self.columns) or "" in self.columns:
            raise InputError(f"columns are {shown(list(self.columns))}; expected different names")
        if self.preset is not None:
            find_preset(self.preset)
            for field in dataclasses.fields(self):
                value = getattr(self, field.name)
                named = field.name in ("prompt", "completion", "columns")
                if (named or field.name.endswith("_field")) and value != field.default:
                    raise InputError(
                        f"{field.name} is {shown(value)}, but preset {self.preset} has columns of "
                        "its own; expected one of the two"
                    )
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

    @property
    def renamed_fields(self) -> tuple[str, ...]:
        """The settings that name one of `fields` other than by default."""
        settings = ("messages_field", "prompt_field", "completion_field", "text_field")
        return tuple(name for name in settings if getattr(self, name) != getattr(DataConfig, name))

    @property
    def has_splits(self) -> bool:
        """Whether there are splits of a preset, and not rows or a single file."""
        return self.preset is not None and not Path(self.path).expanduser().is_file()

    def held_out(self) -> Self:
        """Gives the same with the split that the preset is evaluated on, if no split is named."""
        if self.preset is None or not self.has_splits or self.split is not None:
            return self
        return dataclasses.replace(self, split=find_preset(self.preset).held_out)
