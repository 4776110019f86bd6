"""Flags that a command does not have, and what is answered to them."""

import pytest

from loft_jax.cli import main
from loft_jax.cli.commands import METHOD_FLAGS
from loft_jax.cli.finetune import Finetune, finetune_default
from loft_jax.cli.unknown_flags import parser_of, refuse_unknown
from loft_jax.errors import InputError
from loft_jax.training.field_names import ELSEWHERE


@pytest.fixture(scope="module")
def parser():
    options = {"default": finetune_default([]), "registry": METHOD_FLAGS}
    return parser_of(Finetune, prog="loft-jax finetune", **options)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--lr", "--learning-rate"),
        ("--save-steps", "--save-every"),
        ("--save_steps", "--save-every"),
        ("--max-seq-length", "--data.max-length"),
        ("--per_device_train_batch_size", "--batch-size"),
        ("--lora_r", "--rank"),
        ("--num-train-epochs=3", "--epochs"),
        ("--optim", "--method"),
        ("--loraplus_lr_ratio", "--lora-plus-ratio"),
        ("--resume_from_checkpoint", "--resume"),
        ("--learning-rat", "--learning-rate"),
        ("--modle", "--model"),
        ("--data.pth", "--data.path"),
        ("--max-length", "--data.max-length"),
        ("--schedule.steps", "--steps"),
        ("--evaluation.path", "--eval-path"),
    ],
)
def test_the_option_that_was_meant_is_named(parser, given, meant):
    name = given.partition("=")[0]
    with pytest.raises(InputError, match=rf"unknown option {name}, did you mean {meant}\? "):
        refuse_unknown(parser, [given, "3"])


def test_known_options_negative_numbers_and_values_pass(parser):
    refuse_unknown(parser, ["--layers", "-1", "--learning_rate", "1e-3", "--no-resume", "--rank=4"])


def test_every_unknown_option_is_named_at_once(capsys):
    assert main(["finetune", "--lr", "1", "--zzzz", "2", "--rank", "4"]) == 2
    assert capsys.readouterr().err == (
        "loft-jax finetune: unknown option --lr, did you mean --learning-rate? unknown option "
        "--zzzz. loft-jax finetune --help lists all options\n"
    )


def test_the_names_of_other_tools_are_of_fields_that_exist(parser):
    fields = {a.dest.removeprefix("run.").replace("-", "_") for a in parser._actions}
    fields = {field.replace("method.method", "method.name") for field in fields}
    of_generate = {"max_new_tokens", "temperature"}
    assert set(ELSEWHERE.values()) - fields <= {"adapter"} | of_generate
