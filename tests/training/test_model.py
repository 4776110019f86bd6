"""What a run trains."""

import dataclasses

import pytest
from flax import nnx

from loft_jax.data import DataConfig
from loft_jax.errors import InputError
from loft_jax.models.bert import FAMILY, BertConfig
from loft_jax.models.llama import LlamaConfig
from loft_jax.models.registry import family_of
from loft_jax.tasks import Classification
from loft_jax.training.model import abstract_model, base_fingerprint
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


@pytest.mark.parametrize(("model_type", "told"), [("bert", False), ("roberta", True)])
def test_a_base_is_told_from_others_by_its_padding_where_positions_start_there(model_type, told):
    family = family_of(model_type)
    sizes = family.config.from_hf(
        {
            "model_type": model_type,
            "vocab_size": 64,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 32,
        }
    )
    one, other = (
        family.model("sequence-classification")(
            dataclasses.replace(sizes, pad_token_id=token), rngs=nnx.Rngs(0)
        )
        for token in (1, 2)
    )
    assert (base_fingerprint(one) != base_fingerprint(other)) == told


def test_a_base_is_told_from_others_by_the_positions_that_scale_its_rotation():
    sizes = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    dynamic = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    for scaling, told in (({}, False), (dynamic, True)):
        one, other = (
            family_of("llama").model("causal-lm")(
                LlamaConfig.from_hf({**sizes, **scaling, "max_position_embeddings": positions}),
                rngs=nnx.Rngs(0),
            )
            for positions in (32, 64)
        )
        assert (base_fingerprint(one) != base_fingerprint(other)) == told


def test_what_was_drawn_is_no_part_of_a_base():
    """It trains, so checkpoints have it; drawn on another platform, it differs."""
    config = BertConfig(64, 16, 1, 2, 24)
    one, other = (
        FAMILY.model("sequence-classification")(config, rngs=nnx.Rngs(0)) for _ in range(2)
    )
    other.classifier.kernel.set_value(other.classifier.kernel[...] + 1e-7)
    assert base_fingerprint(one) != base_fingerprint(other)
    one.drawn = other.drawn = ("classifier.bias", "classifier.kernel")
    assert base_fingerprint(one) == base_fingerprint(other)
