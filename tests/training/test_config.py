from pathlib import Path

import numpy as np
import pytest

from loft_jax.data import DataConfig
from loft_jax.errors import InputError
from loft_jax.methods import RefLoRA
from loft_jax.training.config import FinetuneConfig, MeshConfig
from loft_jax.training.config_io import (
    check_same_run,
    config_from_dict,
    config_to_dict,
    load_config,
    save_config,
)
from tests.flat_config import flat_config


def config(**changes):
    fields = {"model": "m", "data": DataConfig("d.jsonl", buckets=(1024,)), "output": "o"}
    return flat_config(**{**fields, **changes})


def test_yaml_round_trip(tmp_path):
    saved = config(
        eval_path="e", choices=(" a", " b"), rank_pattern={"q_proj": 4}, learning_rate=1e-5
    )
    save_config(saved, tmp_path / "config.yaml")
    assert config_from_dict(load_config(tmp_path / "config.yaml")) == saved


@pytest.mark.parametrize("weights", ["balanced", (1.0, 2.5)])
def test_weights_are_a_word_or_numbers(tmp_path, weights):
    saved = config(data=DataConfig("SST-2", preset="sst2"), class_weights=weights)
    save_config(saved, tmp_path / "config.yaml")
    assert config_from_dict(load_config(tmp_path / "config.yaml")) == saved


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "learning_rat: 1",
            r"unknown field learning_rat \(did you mean schedule\.learning_rate\?\); expected",
        ),
        ("data: {pth: x}", r"unknown field data\.pth \(did you mean data\.path\?\); expected"),
        ("lr: 1", r"unknown field lr \(did you mean schedule\.learning_rate\?\); expected"),
        ("schedule: {max_steps: 1}", r"field schedule\.max_steps \(.* mean schedule\.steps\?\)"),
        ("max_seq_length: 1", r"unknown field max_seq_length \(.* mean data\.max_length\?\)"),
        ("eval_path: x", r"unknown field eval_path \(.* mean evaluation\.path\?\)"),
        ("lr: 1\nr: 2", r"unknown fields lr \(.*\), r \(did you mean lora\.rank\?\); expected"),
        ("lroa: {}", r"unknown field lroa \(did you mean lora\?\); expected"),
        ("zzzz: 1", r"unknown field zzzz; expected some of \[[^?]*\]$"),
        ("- 1", "holds a list, expected fields and values"),
        ("a: [", "cannot be read as YAML"),
        ("data: 3", "field data is 3, expected a mapping"),
        ("schedule: {steps: abc}", r"c\.yaml: field schedule\.steps is 'abc', expected an integer"),
        ("schedule: {steps: 1.5}", "field schedule.steps is 1.5, expected an integer"),
        ("schedule: {steps: true}", "field schedule.steps is True, expected an integer"),
        ("steps: 3", r"unknown field steps \(did you mean schedule\.steps\?\); expected some of"),
        ("output: 3", "field output is 3, expected a text"),
        ("model: 3", "field model is 3, expected a mapping such as path: "),
        ("model: {path: 3}", "field model.path is 3, expected a text"),
        (
            "method: {name: loft, balance: maybe}",
            "field method.balance is 'maybe', expected true or false",
        ),
        (
            "model: {remat: true}",
            r"field model\.remat is True, expected one of none, dots, full",
        ),
        (
            "schedule: {learning_rate: fast}",
            "field schedule.learning_rate is 'fast', expected a number",
        ),
        ("lora: {alpha: x}", "field lora.alpha is 'x', expected a number"),
        ("evaluation: {path: }", "field evaluation.path is None, expected a text"),
        (
            "method: {name: lofft}",
            r"field method\.name is 'lofft', expected one of \['loft', 'loft-muon', ",
        ),
        ("method: {name: [loft]}", r"field method\.name is \['loft'\], expected one of"),
        ("method: loft", "field method is 'loft', expected a mapping such as name: "),
        ("method: {move: alternate}", r"c\.yaml: field method\.name is missing"),
        (
            "method: {name: lora, move: alternate}",
            r"c\.yaml: field method\.move is 'alternate', but only method loft or loft-muon has it",
        ),
        (
            "method: {name: lora-plus, rate: 3}",
            r"unknown field method\.rate \(.* method\.ratio\?\); expected some of \['ratio'\]",
        ),
        (
            "task: {class_weights: balance}",
            r"field task.class_weights is 'balance', expected one of balanced",
        ),
        ("task: {class_weights: [x]}", r"task.class_weights\[0\] is 'x', expected a number"),
        ("data: {preset: sst}", r"field data.preset is 'sst', expected one of cola, sst2"),
        ("evaluation: {choices: 3}", "field evaluation.choices is 3, expected a list"),
        (
            "lora: {target_modules: q_proj}",
            "field lora.target_modules is 'q_proj', expected a list",
        ),
        ("evaluation: {choices: [1]}", r"field evaluation\.choices\[0\] is 1, expected a text"),
        ("lora: {rank_pattern: [1]}", r"field lora\.rank_pattern is \[1\], expected a mapping"),
        (
            "lora: {rank_pattern: {q: x}}",
            r"field lora\.rank_pattern\['q'\] is 'x', expected an integer",
        ),
        (
            "lora: {rank_pattern: {1: 2}}",
            r"field lora\.rank_pattern, key 1, is 1, expected a text",
        ),
        ("data: {buckets: 64}", r"field data\.buckets is 64, expected a list"),
        ("data: {max_length: x}", r"field data\.max_length is 'x', expected an integer"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(tmp_path / "c.yaml")


REQUIRED = "model: {path: m}, output: o, data: {path: d}"


def test_numbers_as_yaml_gives_them(tmp_path):
    schedule = "{learning_rate: 3e-4, epochs: 2}"
    text = f"{{{REQUIRED}, schedule: {schedule}, lora: {{alpha: 8}}}}"
    (tmp_path / "c.yaml").write_text(text)  # YAML 1.1 reads 3e-4 as a text
    read = config_from_dict(load_config(tmp_path / "c.yaml"))
    schedule = read.schedule
    assert (schedule.learning_rate, read.lora.alpha, schedule.epochs) == (3e-4, 8.0, 2.0)


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("{output: o, data: {path: d}}", r"model\.path"),
        ("{model: {path: m}, output: o}", r"data\.path"),
    ],
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
        ("evaluation: {choices: &a [[*a]]}", "a value holds itself"),
        ("[" * 100_000, "expected at most 10000 values, in 20 levels"),
        ("evaluation: {choices: [" + "a, " * 20_000 + "]}", "expected at most 10000 values"),
        ("x" * (2**18 + 1), "expected settings in YAML of at most"),
        ("output: !!python/object/apply:os.system ['true']", "cannot be read as YAML"),
        (
            "schedule: {learning_rate: 1" + "0" * 400 + "}",
            r"learning_rate is 10+\.\.\.0+, expected a number",
        ),
        (
            "data: {path: d}\nschedule: {steps: 0x" + "f" * 9000 + "}",
            r"steps is <int.*>, expected at most",
        ),
        ("data: {max_length: -0x" + "f" * 9000 + "}", r"data\.max_length is <int.*>, expected at"),
        (
            "logging: {profile_steps: [-0x" + "f" * 9000 + ", 1]}",
            r"profile_steps\[0\] is <int.*>, expected at",
        ),
        (
            "data: {path: d}\noutput: ://" + "x" * 9000,
            r"output is '://x+\.\.\.x+', expected a folder",
        ),
        ("seed: 1" + "0" * 5000, "cannot be read as YAML: Exceeds the limit"),
        ("? 0x" + "f" * 9000 + "\n: 3", "unknown field <int"),
        ("? [1, 2]\n: 3", "cannot be read as YAML: .*unhashable key .*line 1"),
        (f"{'x' * 900}: 3", "unknown field x+\\.\\.\\.;"),
        ("seed: &s 3\noutput: *t", "cannot be read as YAML: .*undefined alias"),
        ("output: \x00", "cannot be read as YAML"),
    ],
)
def test_files_that_are_meant_to_do_harm(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as told:
        config_from_dict(
            {"model": {"path": "m"}, "output": "o", **load_config(tmp_path / "c.yaml")}
        )
    assert len(str(told.value)) < 2000


def test_an_alias_stands_for_its_value(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: &s 3\nschedule: {steps: *s}\n")
    assert load_config(tmp_path / "c.yaml") == {"seed": 3, "schedule": {"steps": 3}}


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
        ({"profile_steps": (-(10**5000), 1)}, r"profile_steps is <int.*>, expected at least"),
        ({"output": "run\udcff"}, "output is .*, expected a name in UTF-8"),
        ({"seed": 2**32}, "seed is 4294967296, expected at most 4294967295"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": float("inf")}, "epochs is inf"),
        ({"accumulation_steps": 3}, "batch_size is 16, not a multiple of accumulation_steps 3"),
        ({"patience": 2}, r"patience is 2, but evaluation\.every is 0; expected a number of steps"),
        ({"learning_rate": "3e-4"}, r"schedule\.learning_rate is '3e-4', expected a number"),
        ({"rank": "8"}, r"lora\.rank is '8', expected an integer"),
        ({"steps": 1.5}, r"schedule\.steps is 1\.5, expected an integer"),
        ({"balance": "no"}, r"method\.balance is 'no', expected true or false"),
        ({"alpha_pattern": {"q": "8"}}, r"lora\.alpha_pattern is .*, expected a mapping, each a n"),
        ({"rank_pattern": {1: 2}}, r"lora\.rank_pattern is \{1: 2\}, expected a mapping"),
        ({"class_weights": "balance"}, "class_weights is 'balance', expected one of balanced or a"),
        ({"target_modules": "q_proj"}, r"target_modules is 'q_proj', expected a list, each a text"),
        ({"seed": True}, "seed is True, expected an integer"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm is nan"),
        (
            {"method": "lora", "second_moment": "full"},
            "second_moment is 'full', but only method loft has it",
        ),
        ({"method": "full", "state_dtype": "bfloat16"}, "state_dtype is 'bfloat16', but only"),
        ({"method": "lora", "balance": True}, "balance is True, but only"),
        ({"lora_plus_ratio": 4.0}, "ratio is 4.0, but only method lora-plus has it"),
        ({"method": "lora-plus", "lora_plus_ratio": 0.0}, "method.ratio is 0.0, expected a"),
        ({"method": "lora", "damping": 0.1}, "damping is 0.1, but only method riemannian has it"),
        ({"method": "riemannian", "damping": 0.0}, "damping is 0.0, expected a positive number"),
        ({"method": "reflora_s"}, "method is 'reflora_s', expected one of loft, loft-muon"),
        (
            {"schedule": "step"},
            "shape is 'step', expected one of cosine, linear, constant",
        ),
        ({"method": "reflora", "reflora_warmup_steps": -1}, "method.warmup_steps is -1"),
        (
            {"reflora_warmup_steps": 3},
            "warmup_steps is 3, but only method reflora or reflora-s has it",
        ),
        ({"method": "pissa", "init": "gaussian"}, "init is 'gaussian', but method pissa has a"),
    ],
)
def test_values_out_of_range(changes, message):
    with pytest.raises(InputError, match=message):
        config(**changes)


def test_reflora_begins_at_once_where_it_can():
    assert RefLoRA().warmup("kaiming_uniform") == 100
    assert RefLoRA().warmup("balanced") == 0
    assert RefLoRA(7).warmup("kaiming_uniform") == 7


def test_what_a_resumed_run_may_change():
    def check(same_content=True, **changes):
        saved = config_to_dict(config(rank_pattern={"q_proj": 4}))
        now = config(**{"rank_pattern": {"q_proj": 4}, **changes})
        check_same_run(saved, config_to_dict(now), same_content=same_content)

    check(save_every=7, output="elsewhere", mesh=MeshConfig(tensor=2))
    with pytest.raises(InputError, match=r"another schedule\.learning_rate: .* 0\.0003, now "):
        check(learning_rate=0.1)
    with pytest.raises(InputError, match=r"another lora\.rank_pattern\.k_proj: .* None, now "):
        check(rank_pattern={"q_proj": 4, "k_proj": 4})
    with pytest.raises(InputError, match=r"another method\.name: .* 'loft', now it is 'lora'"):
        check(method="lora")
    with pytest.raises(InputError, match=r"another method\.move: .* 'tangent', now it is 'alt"):
        check(move="alternate")
    with pytest.raises(InputError, match=r"another data\.max_length: .* 1024, now it is 512"):
        check(data=DataConfig("d.jsonl", max_length=512, buckets=(1024,)))
    for changes in ({"steps": 8}, {"epochs": 2.0}):
        told = (
            r"another schedule\.\w+: .* of a cosine schedule .* goes on from this one \(--adapter"
        )
        with pytest.raises(InputError, match=told):
            check(**changes)
    moved = DataConfig("x", split="train[:9]", name="y", buckets=(1024,))
    check(model="there", data=moved, eval_path="e", eval_split="test")
    with pytest.raises(InputError, match=r"another data\.path: .*'d.jsonl', now it is 'x'"):
        check(data=DataConfig("x", buckets=(1024,)), same_content=False)


def test_what_python_has_for_texts_lists_and_numbers():
    """Paths, lists and numbers of NumPy, which a file of YAML could not hold."""
    given = config(
        model=Path("m"),
        output=Path("o"),
        target_modules=["q_proj"],
        steps=np.int64(3),
        learning_rate=np.float32(0.5),
        data=DataConfig(Path("d.jsonl"), buckets=[1024]),
    )
    assert given == config(target_modules=("q_proj",), steps=3, learning_rate=0.5)
    assert all(type(value) is str for value in (given.model.path, given.output, given.data.path))
    assert type(given.schedule.steps) is int


def test_sections_in_the_wrong_place_are_refused():
    with pytest.raises(InputError, match="model is 'm', expected a ModelConfig"):
        FinetuneConfig("m", DataConfig("d"), "o")


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("", None), ("3", (3,)), ("0-2,-1", (0, 1, 2, -1)), ("-3--1", (-3, -2, -1)), ("1, 4", (1, 4))],
)
def test_numbers_of_layers(text, numbers):
    assert config(layers=text).lora.layer_numbers() == numbers


@pytest.mark.parametrize("text", ["x", "3-1", "1-", "0--1", "1,,2", "0-9999999", "0-999999"])
def test_what_is_not_of_layers_is_refused(text):
    with pytest.raises(InputError, match=r"lora\.layers is .*, expected numbers and ranges"):
        config(layers=text)
