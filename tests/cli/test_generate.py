"""`loft-jax generate`: chat and continuation, from flags, files, standard input and a session."""

import io
import shutil
import signal
import sys

import pytest
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

from loft_jax import generation
from loft_jax.cli import main
from loft_jax.cli.generate import Generate
from loft_jax.cli.source import Source
from loft_jax.errors import InputError
from loft_jax.hub import load_pretrained, save_peft_adapter
from loft_jax.lora import LoRAConfig, add_lora
from tests.tiny import save_tiny_llama, tiny_tokenizer

NEW = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny_llama(tmp_path_factory.mktemp("model") / "chat")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(model):
    """What transformers answers to messages, or how it continues a text."""
    torch_model, tokenizer = AutoModelForCausalLM.from_pretrained(model), tiny_tokenizer()

    def answer(asked):
        ids = (
            tokenizer(asked)["input_ids"]
            if isinstance(asked, str)
            else tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        )
        new = torch_model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)
        return tokenizer.decode(new[0, len(ids) :], skip_special_tokens=True)

    return answer


def said(role, content):
    return {"role": role, "content": content}


def generate(model, *flags):
    return main(["generate", "--model", str(model), "--max-new-tokens", str(NEW), *flags])


def test_a_prompt_is_a_message_where_there_is_a_template(model, theirs, capsys):
    assert generate(model, "--prompt", "two\\nplus two?") == 0
    assert capsys.readouterr().out == theirs([said("user", "two\nplus two?")]) + "\n"
    assert generate(model, "--prompt", "two?", "--system", "be\\nbrief") == 0
    asked = [said("system", "be\nbrief"), said("user", "two?")]
    assert capsys.readouterr().out == theirs(asked) + "\n"


def test_without_chat_a_prompt_is_continued(model, theirs, capsys):
    assert generate(model, "--prompt", "a\\njoy", "--no-chat") == 0
    assert capsys.readouterr().out == "a\njoy" + theirs("a\njoy") + "\n"
    assert generate(model, "--prompt", "a", "--no-chat", "--system", "be brief") == 2
    assert "system is 'be brief', but --no-chat is given" in capsys.readouterr().err


def test_a_model_without_a_template_continues_and_says_so(model, theirs, tmp_path, capsys):
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink()
    assert generate(tmp_path, "--prompt", "a joy") == 0
    shown = capsys.readouterr()
    assert shown.out == "a joy" + theirs("a joy") + "\n"
    assert "no chat template, so prompts are texts to continue" in shown.err


def test_an_adapter_is_asked_as_it_was_trained(model, theirs, tmp_path, capsys):
    network = load_pretrained(model)
    add_lora(network, LoRAConfig(rank=2, target_modules=("q_proj",)), rngs=nnx.Rngs(0))
    save_peft_adapter(tmp_path, network, base_model=str(model))
    asked = [said("user", "a joy")]
    tokenizer = tiny_tokenizer()
    for template, expected in ((tokenizer.chat_template, theirs(asked)), (None, None)):
        tokenizer.chat_template = template
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(tmp_path)
        flags = ["--adapter", str(tmp_path), "--max-new-tokens", str(NEW), "--prompt", "a joy"]
        assert main(["generate", *flags]) == 0
        shown = capsys.readouterr()
        assert shown.out == (expected or "a joy" + theirs("a joy")) + "\n"
        assert (f"{tmp_path}: has no chat template" in shown.err) == (template is None)


def test_prompts_are_the_lines_of_a_file(model, theirs, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.txt").write_text("two?\n\nwhat is\\nfour\n", encoding="utf-8")
    expected = "".join(
        f"> {prompt}\n{theirs([said('user', prompt)])}\n\n" for prompt in ("two?", "what is\nfour")
    )
    assert generate(model, "--prompts", str(tmp_path / "prompts.txt")) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("two?\nwhat is\\nfour"))
    assert generate(model, "--prompts", "-") == 0
    assert capsys.readouterr().out == expected


def test_only_line_feeds_end_a_prompt(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("a\u2028b\x85c\r\nd\n".encode())
    assert Generate(Source("m"), prompts=str(file))._prompts() == ["a\u2028b\x85c", "d"]


def test_standard_input_is_one_prompt(model, theirs, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is\ntwo?\n"))
    assert generate(model) == 0
    assert capsys.readouterr().out == theirs([said("user", "what is\ntwo?")]) + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert generate(model) == 2
    assert "standard input: holds no prompt" in capsys.readouterr().err


class Typed:
    """A user at a terminal."""

    def __init__(self, monkeypatch, *lines):
        self.lines = iter(lines)
        monkeypatch.setattr(sys, "stdin", self)
        monkeypatch.setattr("builtins.input", self)

    def isatty(self):
        return True

    def __call__(self, prompt):
        line = next(self.lines, EOFError())
        if isinstance(line, Exception):
            raise line
        return line


def test_a_session_is_a_conversation(model, theirs, capsys, monkeypatch):
    Typed(monkeypatch, "two?", "", "and four?", "/clear", "two?")
    assert generate(model, "--system", "be brief") == 0
    first = [said("system", "be brief"), said("user", "two?")]
    second = [*first, said("assistant", theirs(first)), said("user", "and four?")]
    answers = [theirs(first), theirs(second), theirs(first)]
    assert answers[0] != answers[1]
    assert capsys.readouterr().out == "\n".join([*answers, "", ""])


def test_a_session_survives_a_text_that_cannot_be_answered(model, theirs, capsys, monkeypatch):
    Typed(monkeypatch, "two?", "four?", "a joy")
    errors, answered = [KeyboardInterrupt, InputError("too long")], generation.stream_text

    def interrupted(*arguments, **options):
        error = errors.pop(0) if errors else None
        if error is KeyboardInterrupt:  # as typed at a terminal
            signal.raise_signal(signal.SIGINT)
            yield from ("begun", "not shown")
        elif error:
            raise error
        else:
            yield from answered(*arguments, **options)

    monkeypatch.setattr("loft_jax.cli.generate.stream_text", interrupted)
    assert generate(model) == 0
    shown = capsys.readouterr()
    assert shown.out == f"begun\n{theirs([said('user', 'a joy')])}\n\n"
    assert "loft-jax generate: too long\n" in shown.err


def test_an_empty_answer_is_said(model, capsys, monkeypatch):
    monkeypatch.setattr("loft_jax.cli.generate.stream_text", lambda *_, **__: iter(()))
    assert generate(model, "--prompt", "two?") == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("\n", "the answer is empty: the model ended it at once\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "a", "--prompts", "f.txt"], "prompt is ['a'] and prompts is 'f.txt'"),
        (["--prompts", "none.txt"], "none.txt: no such file, expected a text with prompts"),
        (["--prompt", "a", "--top-p", "0.9"], "top_p is 0.9 at temperature 0"),
        (["--prompt", "a", "--min-p", "2"], "min_p is 2.0, expected 0 to 1"),
        (["--prompt", "a", "--no-chat", "--max-new-tokens", "0"], "max_new_tokens is 0, expected"),
    ],
)
def test_flags_that_do_not_fit_are_refused(model, flags, message, capsys):
    assert generate(model, *flags) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert not shown.out


def test_sampling_follows_its_flags(model, capsys):
    texts = []
    for flags in (["--seed", "1"], ["--seed", "2"], ["--seed", "2", "--top-k", "1"]):
        assert generate(model, "--prompt", "a joy", "--temperature", "1.5", *flags) == 0
        texts.append(capsys.readouterr().out)
    assert generate(model, "--prompt", "a joy") == 0
    assert texts[0] != texts[1]
    assert texts[2] == capsys.readouterr().out
