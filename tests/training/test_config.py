import pytest

from loft_jax.data import DataConfig
from loft_jax.errors import InputError
from loft_jax.training.config import FinetuneConfig, MeshConfig
from loft_jax.training.config_io import (
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
        ("steps: abc", r"c\.yaml: field steps is 'abc', expected an integer"),
        ("steps: 1.5", "field steps is 1.5, expected an integer"),
        ("steps: true", "field steps is True, expected an integer"),
        ("model: 3", "field model is 3, expected a text"),
        ("balance: maybe", "field balance is 'maybe', expected true or false"),
        ("remat: true", r"field remat is True, expected one of \['none', 'dots', 'full'\]"),
        ("learning_rate: fast", "field learning_rate is 'fast', expected a number"),
        ("alpha: x", "field alpha is 'x', expected a number"),
        ("eval_path:", "field eval_path is None, expected a text"),
        ("method: lofft", r"field method is 'lofft', expected one of \['loft', 'loft-muon', "),
        ("choices: 3", "field choices is 3, expected a list"),
        ("target_modules: q_proj", "field target_modules is 'q_proj', expected a list"),
        ("choices: [1]", r"field choices\[0\] is 1, expected a text"),
        ("rank_pattern: [1]", r"field rank_pattern is \[1\], expected a mapping"),
        ("rank_pattern: {q: x}", r"field rank_pattern\['q'\] is 'x', expected an integer"),
        ("rank_pattern: {1: 2}", r"field rank_pattern, key 1, is 1, expected a text"),
        ("data: {buckets: 64}", r"field data\.buckets is 64, expected a list"),
        ("data: {max_length: x}", r"field data\.max_length is 'x', expected an integer"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(tmp_path / "c.yaml")


def test_numbers_as_yaml_gives_them(tmp_path):
    text = "{model: m, output: o, data: {path: d}, learning_rate: 3e-4, alpha: 8, epochs: 2}"
    (tmp_path / "c.yaml").write_text(text)  # YAML 1.1 reads 3e-4 as a text
    read = config_from_dict(load_config(tmp_path / "c.yaml"))
    assert (read.learning_rate, read.alpha, read.epochs) == (3e-4, 8.0, 2.0)


@pytest.mark.parametrize(
    ("text", "missing"),
    [("{output: o, data: {path: d}}", "model"), ("{model: m, output: o}", r"data\.path")],
)
def test_missing_field(tmp_path, text, missing):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=f"field {missing} is missing"):
        config_from_dict(load_config(tmp_path / "c.yaml"))


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: no such file, expected settings in YAML"):
        load_config(tmp_path / "none.yaml")


BILLION = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BILLION, "expected at most 10000 values, in 20 levels"),
        ("&a [*a]", "a value holds itself"),
        ("choices: &a [[*a]]", "a value holds itself"),
        ("[" * 100_000, "expected at most 10000 values, in 20 levels"),
        ("choices: [" + "a, " * 20_000 + "]", "expected at most 10000 values"),
        ("x" * (2**18 + 1), "expected settings in YAML of at most"),
        ("model: !!python/object/apply:os.system ['true']", "cannot be read as YAML"),
        ("learning_rate: 1" + "0" * 400, r"learning_rate is 10+\.\.\.0+, expected a number"),
        ("data: {path: d}\nsteps: 0x" + "f" * 9000, r"steps is <int.*>, expected at most"),
        ("data: {max_length: -0x" + "f" * 9000 + "}", r"data\.max_length is <int.*>, expected at"),
        (
            "profile_steps: [-0x" + "f" * 9000 + ", 1]",
            r"profile_steps\[0\] is <int.*>, expected at",
        ),
        (
            "data: {path: d}\noutput: ://" + "x" * 9000,
            r"output is '://x+\.\.\.x+', expected a folder",
        ),
        ("steps: 1" + "0" * 5000, "cannot be read as YAML: Exceeds the limit"),
        ("? 0x" + "f" * 9000 + "\n: 3", "unknown field <int"),
        ("? [1, 2]\n: 3", "cannot be read as YAML: .*unhashable key .*line 1"),
        (f"{'x' * 900}: 3", "unknown field x+\\.\\.\\.;"),
        ("steps: &s 3\nbatch_size: *s\nmodel: *t", "cannot be read as YAML: .*undefined alias"),
        ("model: \x00", "cannot be read as YAML"),
    ],
)
def test_files_that_are_meant_to_do_harm(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as told:
        config_from_dict({"model": "m", "output": "o", **load_config(tmp_path / "c.yaml")})
    assert len(str(told.value)) < 2000


def test_an_alias_stands_for_its_value(tmp_path):
    (tmp_path / "c.yaml").write_text("steps: &s 3\nbatch_size: *s\n")
    assert load_config(tmp_path / "c.yaml") == {"steps": 3, "batch_size": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, expected a positive"),
        ({"b2": 1.0}, r"b2 is 1.0, expected a number in \[0, 1\)"),
        ({"learning_rate": float("inf")}, "learning_rate is inf, expected a finite"),
        ({"alpha_pattern": {"q": float("nan")}}, r"alpha_pattern\.q is nan, expected a finite"),
        ({"steps": 10**400}, r"steps is 10+\.\.\.0+, expected at most 2147483647"),
        ({"rank_pattern": {"q": 10**5000}}, r"rank_pattern\.q is <int.*>, expected at most"),
        ({"profile_steps": (1, 2**31)}, "profile_steps is 2147483648, expected at most"),
        ({"data": DataConfig("d", max_length=2**31)}, r"data\.max_length is 2147483648, expected"),
        ({"profile_steps": (-(10**5000), 1)}, r"profile_steps is <int.*>, expected at least"),
        ({"output": "run\udcff"}, "output is .*, expected a name in UTF-8"),
        ({"seed": 2**32}, "seed is 4294967296, expected at most 4294967295"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": float("inf")}, "epochs is inf"),
        ({"accumulation_steps": 3}, "batch_size is 16, not a multiple of accumulation_steps 3"),
        ({"choices": ("a",)}, "choices are given without eval_path"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm is nan"),
        (
            {"method": "lora", "second_moment": "full"},
            "second_moment is 'full', but only method loft has it",
        ),
        ({"method": "full", "state_dtype": "bfloat16"}, "state_dtype is 'bfloat16', but only"),
        ({"method": "lora", "balance": True}, "balance is True, but only"),
        ({"lora_plus_ratio": 4.0}, "lora_plus_ratio is 4.0, but only method lora-plus has it"),
        ({"method": "lora-plus", "lora_plus_ratio": 0.0}, "lora_plus_ratio is 0.0, expected a"),
        ({"method": "lora", "damping": 0.1}, "damping is 0.1, but only method riemannian has it"),
        ({"method": "riemannian", "damping": 0.0}, "damping is 0.0, expected a positive number"),
        ({"method": "reflora_s"}, "method is 'reflora_s', expected one of loft, loft-muon"),
        ({"schedule": "step"}, "schedule is 'step', expected one of cosine, linear, constant"),
        ({"method": "reflora", "reflora_warmup_steps": -1}, "reflora_warmup_steps is -1"),
        (
            {"reflora_warmup_steps": 3},
            "reflora_warmup_steps is 3, but only method reflora or reflora-s has it",
        ),
        ({"method": "pissa", "init": "gaussian"}, "init is 'gaussian', but method pissa has a"),
    ],
)
def test_values_out_of_range(changes, message):
    with pytest.raises(InputError, match=message):
        config(**changes)


def test_reflora_begins_at_once_where_it_can():
    assert config(method="reflora").reflora_warmup == 100
    assert config(method="reflora", init="balanced").reflora_warmup == 0
    assert config(method="reflora", reflora_warmup_steps=7).reflora_warmup == 7


def test_what_a_resumed_run_may_change():
    def check(same_content=True, **changes):
        saved = config_to_dict(config(rank_pattern={"q_proj": 4}))
        now = config(**{"rank_pattern": {"q_proj": 4}, **changes})
        check_same_run(saved, config_to_dict(now), same_content=same_content)

    check(save_every=7, output="elsewhere", mesh=MeshConfig(tensor=2))
    with pytest.raises(InputError, match=r"another learning_rate: .* 0\.0003, now it is 0\.1"):
        check(learning_rate=0.1)
    with pytest.raises(InputError, match=r"another rank_pattern\.k_proj: .* None, now it is 4"):
        check(rank_pattern={"q_proj": 4, "k_proj": 4})
    with pytest.raises(InputError, match=r"another data\.max_length: .* 1024, now it is 512"):
        check(data=DataConfig("d.jsonl", max_length=512, buckets=(1024,)))
    moved = DataConfig("x", split="train[:9]", name="y", buckets=(1024,))
    check(model="there", data=moved, eval_path="e", eval_split="test")
    with pytest.raises(InputError, match=r"another data\.path: .*'d.jsonl', now it is 'x'"):
        check(data=DataConfig("x", buckets=(1024,)), same_content=False)
