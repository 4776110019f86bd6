import pytest

from loft_jax.data import DataConfig
from loft_jax.errors import InputError
from loft_jax.training.config import (
    FinetuneConfig,
    check_same_run,
    config_from_dict,
    config_to_dict,
    load_config,
    save_config,
)


def config(**changes):
    fields = {"model": "m", "data": DataConfig("d.jsonl", buckets=(1024,)), "output": "o"}
    return FinetuneConfig(**{**fields, **changes})


def test_yaml_round_trip(tmp_path):
    saved = config(
        eval_path="e", choices=(" a", " b"), rank_pattern={"q_proj": 4}, learning_rate=1e-5
    )
    save_config(saved, tmp_path / "config.yaml")
    assert config_from_dict(load_config(tmp_path / "config.yaml")) == saved


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown field learning_rat; expected some of"),
        ("data: {pth: x}", r"unknown field data\.pth"),
        ("- 1", "holds a list, expected fields and values"),
        ("a: [", "cannot be read as YAML"),
        ("data: 3", "field data is 3, expected a mapping"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(tmp_path / "c.yaml")


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: cannot be read"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, expected a positive"),
        ({"b2": 1.0}, r"b2 is 1.0, expected a number in \[0, 1\)"),
        ({"epochs": 0}, "epochs is 0"),
        ({"accumulation_steps": 3}, "batch_size is 16, not a multiple of accumulation_steps 3"),
        ({"choices": ("a",)}, "choices are given without eval_path"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm is nan"),
    ],
)
def test_values_out_of_range(changes, message):
    with pytest.raises(InputError, match=message):
        config(**changes)


def test_what_a_resumed_run_may_change():
    saved = config_to_dict(config())
    check_same_run(saved, config_to_dict(config(save_every=7, output="elsewhere")))
    with pytest.raises(InputError, match=r"another learning_rate: .* 0\.0003, now it is 0\.1"):
        check_same_run(saved, config_to_dict(config(learning_rate=0.1)))
    elsewhere = config_to_dict(config(data=DataConfig("x", buckets=(1024,))))
    with pytest.raises(InputError, match=r"another data\.path: .*'d.jsonl', now it is 'x'"):
        check_same_run(saved, elsewhere)
