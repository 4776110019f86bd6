import math

import jax.numpy as jnp
import pytest

from loft_jax.errors import InputError
from loft_jax.lora import LoRAConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 0),
        ("rank", -1),
        ("rank", 2.0),
        ("rank", True),
        ("rank", "4"),
        ("alpha", 0),
        ("alpha", -1.0),
        ("alpha", math.inf),
        ("alpha", math.nan),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", math.nan),
        ("dtype", jnp.int32),
        ("init", "olora"),
        ("use_rslora", 1),
        ("use_dora", "yes"),
        ("target_modules", ""),
        ("target_modules", None),
        ("target_modules", []),
        ("target_modules", [3]),
        ("target_modules", "(q_proj"),
        ("exclude_modules", "["),
        ("exclude_modules", iter(["q_proj"])),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"(": 1}),
        ("alpha_pattern", {"q_proj": 0.0}),
    ],
)
def test_a_wrong_value_is_refused_by_field(field, value):
    with pytest.raises(InputError, match=f"^{field}"):
        LoRAConfig(**{field: value})


def test_alpha_is_the_layers_rank_unless_given():
    config = LoRAConfig(rank=8, rank_pattern={"v_proj": 4}, alpha_pattern={"o_proj": 2})
    assert config.alpha_of("layers.q_proj") == 8
    assert config.alpha_of("layers.v_proj") == 4
    assert config.alpha_of("layers.o_proj") == 2
    assert LoRAConfig(rank=8, alpha=16, rank_pattern={"v": 4}).alpha_of("v") == 16


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 1, "attn.q_proj": 2},
        {"layers.1.q_proj": 1},
        {"^a.layers.1.attn.q_proj": 1},
        {r"layers\.[01]\.attn\.[qk]_proj": 1, "q_proj": 3},
        {"proj": 1, ".*k_proj": 2},
    ],
)
def test_rank_patterns_match_as_peft_matches_them(patterns):
    from peft.utils.other import get_pattern_key

    config = LoRAConfig(rank=7, rank_pattern=patterns)
    for path in ("q_proj", "a.layers.1.attn.q_proj", "layers.0.attn.k_proj", "xq_proj", "proj"):
        assert config.rank_of(path) == patterns.get(get_pattern_key(patterns, path), 7)
