"""What a run trains."""

import pytest

from loft_jax.data import DataConfig
from loft_jax.errors import InputError
from loft_jax.models.bert import FAMILY, BertConfig
from loft_jax.tasks import Classification
from loft_jax.training.model import abstract_model
from tests.flat_config import flat_config


def test_a_head_that_trains_whole_takes_no_adapter():
    """An adapter in `modules_to_save` has no place in PEFT's format."""
    sizes = BertConfig(64, 32, 2, 4, 48)
    run = flat_config(
        model="",
        data=DataConfig(""),
        output="",
        rank=2,
        target_modules=("query", "classifier"),
    )
    with pytest.raises(InputError, match="'classifier' is of the head, which trains whole"):
        abstract_model(FAMILY, sizes, run, Classification(["no", "yes"]))
