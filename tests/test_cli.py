"""The command line as users type it: exit codes, messages, files."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from loft_jax import LoRAConfig, add_lora, load_pretrained, save_peft_adapter
from loft_jax.cli import main
from loft_jax.data import DataConfig, eval_batches, load_examples, tokenize
from loft_jax.hub import load_tokenizer
from loft_jax.methods import LoFT, LoRAPlus
from loft_jax.tasks.causal_lm import Perplexity, perplexity
from loft_jax.training.callbacks import RunResult
from loft_jax.training.config_io import save_config
from tests.tiny import save_tiny_llama
from tests.training.conftest import make_config, workspace  # noqa: F401


@pytest.fixture
def flags(workspace, tmp_path):  # noqa: F811
    return [
        *("--model", str(workspace / "model"), "--output", str(tmp_path / "run")),
        *("--data.path", str(workspace / "train.jsonl"), "--data.max-length", "64"),
        *("--rank", "4", "--steps", "2", "--batch-size", "4", "--log-every", "1"),
        *("--target-modules", "q_proj", "o_proj"),
    ]


def test_finetune_export_evaluate_generate_merge(workspace, tmp_path, flags, capsys):  # noqa: F811
    test = str(workspace / "test.jsonl")
    choices = ["--choices", " negative", " positive"]
    assert main(["finetune", *flags, "--eval-path", test, *choices]) == 0
    out = capsys.readouterr().out
    assert "before:" in out
    assert "accuracy" in out
    assert str(tmp_path / "run" / "adapter") in out

    run, exported = str(tmp_path / "run"), str(tmp_path / "exported")
    assert main(["export", run, "--output", exported, "--checkpoint", "best"]) == 0
    weights = "adapter/adapter_model.safetensors"
    assert Path(exported, weights).read_bytes() == Path(run, weights).read_bytes()

    adapter = str(Path(run, "adapter"))
    assert main(["evaluate", "--adapter", adapter, "--data.path", test, *choices]) == 0
    adapted = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert adapted["count"] == 12
    assert main(["evaluate", "--adapter", adapter, "--data.path", test]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1

    merged = str(tmp_path / "merged")
    assert main(["merge", "--adapter", adapter, "--output", merged]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--model", merged, "--data.path", test, *choices]) == 0
    same = json.loads(capsys.readouterr().out)
    assert same["nll"] == pytest.approx(adapted["nll"], abs=1e-4)

    continued = ["generate", "--model", merged, "--prompt", "a\\nb", "--no-chat"]
    assert main([*continued, "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("a\nb")


def test_adapters_of_some_layers_are_trained_and_written(tmp_path, flags):
    assert main(["finetune", *flags, "--method", "lora", "--layers", "-1"]) == 0
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["layers_to_transform"] == [1]
    written = load_file(adapter / "adapter_model.safetensors")
    assert len(written) == 4
    assert all(".layers.1." in name and np.any(tensor) for name, tensor in written.items())


def test_merged_weights_are_stored_as_those_of_the_base(workspace, tmp_path, capsys):  # noqa: F811
    base = tmp_path / "base"
    shutil.copytree(workspace / "model", base)
    weights = load_file(base / "model.safetensors")
    save_file(
        {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in weights.items()},
        base / "model.safetensors",
    )
    model = add_lora(load_pretrained(base), LoRAConfig(rank=2), rngs=nnx.Rngs(0))
    save_peft_adapter(tmp_path / "adapter", model, base_model=str(base))
    adapter = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = {"base_model.model.model.norm.weight": weights["model.norm.weight"]}  # float32
    save_file({**load_file(adapter), **whole}, adapter)
    settings = adapter.with_name("adapter_config.json")
    saved = {**json.loads(settings.read_text()), "modules_to_save": ["model.norm"]}
    settings.write_text(json.dumps(saved))
    merge = ["merge", "--adapter", str(tmp_path / "adapter"), "--output"]
    for flags, dtype in (([], ml_dtypes.bfloat16), (["--dtype", "float32"], np.float32)):
        merged = tmp_path / np.dtype(dtype).name
        assert main([*merge, str(merged), *flags]) == 0
        found = load_file(merged / "model.safetensors")
        assert {tensor.dtype for tensor in found.values()} == {np.dtype(dtype)}
        for name, tensor in found.items():  # B is zero
            np.testing.assert_array_equal(
                tensor.astype(np.float32),
                weights[name].astype(ml_dtypes.bfloat16).astype(np.float32),
            )


def test_an_export_is_of_what_was_trained(workspace, tmp_path, flags, capsys):  # noqa: F811
    """Whatever config.yaml says since, but for the place of the base; and not of another base."""
    base = tmp_path / "base"
    shutil.copytree(workspace / "model", base)
    pissa = ["--model", str(base), "--method", "pissa", "--alpha", "4"]
    assert main(["finetune", *flags, *pissa]) == 0
    base = base.rename(tmp_path / "moved")
    settings = tmp_path / "run" / "config.yaml"
    text = settings.read_text().replace("alpha: 4.0", "alpha: 64.0").replace("rank: 4", "rank: 2")
    settings.write_text(text.replace(str(tmp_path / "base"), str(base)))
    export = ["export", str(tmp_path / "run"), "--output"]
    assert main([*export, str(tmp_path / "exported")]) == 0
    trained = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    exported = load_file(tmp_path / "exported" / "adapter" / "adapter_model.safetensors")
    for name, tensor in trained.items():
        np.testing.assert_array_equal(tensor, exported[name], err_msg=name)
    scalings = [
        json.loads(Path(folder, "adapter", "adapter_config.json").read_text())["lora_alpha"]
        for folder in (tmp_path / "run", tmp_path / "exported")
    ]
    assert scalings[0] == scalings[1]
    shutil.rmtree(base)
    save_tiny_llama(base, seed=1)
    capsys.readouterr()
    assert main([*export, str(tmp_path / "garbage")]) == 2
    assert "cannot export with another model: " in capsys.readouterr().err
    assert not (tmp_path / "garbage").exists()


def test_folders_around_an_adapter_and_bases_that_have_moved(
    workspace,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workspace / "model", "base")
    model = add_lora(load_pretrained("base"), LoRAConfig(rank=2), rngs=nnx.Rngs(0))
    save_peft_adapter("run/adapter", model, base_model="./base")
    Path("run", "checkpoints").mkdir()
    for command in (
        ["evaluate", "--data.path", str(workspace / "test.jsonl"), "--adapter", "run"],
        ["average", "run/adapter", "run", "--rank", "2", "--output", "mean"],
    ):
        assert main(command) == 2
        assert "run: is not an adapter, but has one in run/adapter" in capsys.readouterr().err
    assert main(["export", "run/adapter", "--output", "exported"]) == 2
    assert "run/adapter: is not a run, but is in the folder of one, run" in capsys.readouterr().err
    assert main(["export", "run/typo", "--output", "exported"]) == 2
    assert "run/typo/config.yaml: no such file" in capsys.readouterr().err
    assert main(["export", "run", "--output", "run"]) == 2
    assert "run: is the folder of a run, and what it trained" in capsys.readouterr().err
    for place, output in (("copy", "run"), ("copy", str(tmp_path / "run"))):
        Path(place, "checkpoints").mkdir(parents=True, exist_ok=True)
        Path(place, "config.yaml").write_text(f"output: {output}\n")
        assert main(["finetune", "--config", f"{place}/config.yaml", "--resume"]) == 2
        assert "expected --output copy, to resume that one" in capsys.readouterr().err

    evaluate = ["evaluate", "--data.path", str(workspace / "test.jsonl"), "--adapter"]
    assert main([*evaluate, "run/adapter"]) == 0
    assert f"run/adapter: its base model is {tmp_path / 'base'}" in capsys.readouterr().err
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert main([*evaluate, "../run/adapter"]) == 2
    message = capsys.readouterr().err
    assert "../run/adapter: names the base model './base', which cannot be read here" in message
    assert "If it is elsewhere, name it with --model" in message


def test_an_adapter_that_is_replaced_while_its_base_loads(
    workspace,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    adapter = tmp_path / "adapter"
    model = add_lora(load_pretrained(workspace / "model"), LoRAConfig(rank=2), rngs=nnx.Rngs(0))
    save_peft_adapter(adapter, model, base_model=str(workspace / "model"))

    def replaced_meanwhile(*arguments, **options):
        loaded = load_pretrained(*arguments, **options)
        save_peft_adapter(adapter, model, base_model="another")
        return loaded

    monkeypatch.setattr("loft_jax.hub.load_pretrained", replaced_meanwhile)
    assert main(["generate", "--adapter", str(adapter), "--prompt", "a"]) == 2
    assert "names the base model 'another', and " in capsys.readouterr().err


def test_a_perplexity_too_large_for_a_number_is_null(workspace, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(
        "loft_jax.tasks.causal_lm.perplexity",
        lambda *_, **__: Perplexity(nll=800.0, tokens=1),
    )
    evaluate = ["evaluate", "--model", str(workspace / "model")]
    assert main([*evaluate, "--data.path", str(workspace / "test.jsonl")]) == 0
    assert '"perplexity": null' in capsys.readouterr().out


def test_evaluating_on_a_quantized_base(workspace, capsys):  # noqa: F811
    path = str(workspace / "test.jsonl")
    evaluate = ["evaluate", "--model", str(workspace / "model"), "--data.path", path]
    assert main([*evaluate, "--quantization", "nf4"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = DataConfig(path)
    tokens = tokenize(load_examples(config), load_tokenizer(workspace / "model"), config)
    model = load_pretrained(workspace / "model", quantization="nf4")
    expected = perplexity(model, eval_batches(tokens, config, batch_size=16), progress=False)
    assert found["nll"] == pytest.approx(expected.nll, rel=1e-6)


def test_weights_that_are_no_numbers_are_told(workspace, tmp_path, capsys):  # noqa: F811
    shutil.copytree(workspace / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][0] = np.nan
    save_file(weights, tmp_path / "model" / "model.safetensors")
    evaluate = ["evaluate", "--model", str(tmp_path / "model")]
    assert main([*evaluate, "--data.path", str(workspace / "test.jsonl")]) == 2
    out = capsys.readouterr()
    assert "the loss is NaN" in out.err
    assert not out.out


def test_settings_are_flags_and_fields_of_the_config_file(flags, tmp_path, monkeypatch):
    """Flags go before the file."""
    runs = []

    def started(run, **_):
        runs.append(run)
        save_config(run, tmp_path / "config.yaml")
        return RunResult(Path(), 0, False, {}, {}, None)

    monkeypatch.setattr("loft_jax.training.loop.finetune", started)
    assert main(["finetune", *flags, "--second-moment", "full", "--balance"]) == 0
    config = ["finetune", "--config", str(tmp_path / "config.yaml")]
    assert main([*config, "--move", "alternate", "--no-balance", "--steps", "1"]) == 0
    assert main([*config, "--second-moment", "factored", "--move", "tangent"]) == 0
    assert main([*config, "--method", "lora-plus", "--lora-plus-ratio", "4"]) == 0
    assert main([*config, "--method", "reflora", "--reflora-warmup-steps", "7"]) == 2
    assert [run.method for run in runs] == [
        LoFT("full", balance=True),
        LoFT("full", move="alternate"),
        LoFT(),
        LoRAPlus(4.0),
    ]
    assert [run.schedule.steps for run in runs] == [2, 1, 1, 1]
    assert {run.lora.rank for run in runs} == {4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--model", "no/such/folder/x"], "no/such/folder/x"),
        (["--rank", "0"], "rank is 0"),
        (["--rank", "1000"], "rank"),
        (["--alpha", "0"], "alpha is 0"),
        (["--target-modules", "q_prj"], "q_proj"),
        (["--data.path", "missing.jsonl"], "missing.jsonl"),
        (["--data.prompt-field", "question"], "question"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--resume"], "no checkpoint to resume from"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--output", __file__], "cannot hold a run"),
        (["--data.path", __file__], "unknown ending"),
        (["--data.max-length", "1"], "truncated away"),
        (["--mesh.tensor", "3"], "do not make up 1 devices"),
        (["--output", "gs://bucket/run"], "output is 'gs://bucket/run', expected a folder"),
        (["--output", "~/run"], "output is '~/run', and only shells read the ~; expected /"),
        (["--process-id", "0"], "process_id is 0; expected all or none"),
        (["--process-count", "2"], "process_count is 2, process_id is None; expected all or none"),
        (["--profile-steps", "3", "1"], "profile_steps is [3, 1], expected a first and a last"),
        (["--method", "full", "--quantization", "nf4"], "method full trains the weights"),
        (
            ["--method", "lora", "--second-moment", "full"],
            "second_moment is 'full', but only method loft has it",
        ),
    ],
)
def test_bad_input_is_a_message_and_exit_code_2(flags, changes, message, capsys, tmp_path):
    assert main(["finetune", *flags, *changes]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "'model.norm.weight' is missing"),
        (lambda tensors: tensors.update(x=np.zeros(2, np.float32)), "tensor 'x' of shape (2,)"),
        (
            lambda tensors: tensors.update({"model.norm.weight": np.zeros(2, np.float32)}),
            "'model.norm.weight' has shape (2,), expected (32,)",
        ),
        (None, "not a readable safetensors file"),
    ],
    ids=["missing", "extra", "misshaped", "damaged"],
)
def test_weights_that_do_not_fit(flags, edit, message, workspace, tmp_path, capsys):  # noqa: F811
    model = tmp_path / "model"
    shutil.copytree(workspace / "model", model)
    file = model / "model.safetensors"
    if edit is None:
        file.write_bytes(file.read_bytes()[:-8])
    else:
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    assert main(["finetune", *flags, "--model", str(model)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_an_adapter_for_another_base(workspace, tmp_path, capsys):  # noqa: F811
    model = add_lora(load_pretrained(workspace / "model"), LoRAConfig(rank=2), rngs=nnx.Rngs(0))
    save_peft_adapter(tmp_path / "adapter", model)
    save_tiny_llama(tmp_path / "other", num_hidden_layers=3)
    source = ["--model", str(tmp_path / "other"), "--adapter", str(tmp_path / "adapter")]
    assert main(["merge", *source, "--output", str(tmp_path / "merged")]) == 2
    assert "for another base model" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("schedule: {steps: abc}", "field schedule.steps is 'abc', expected an integer"),
        ("evaluation: {choices: 3}", "field evaluation.choices is 3, expected a list"),
        ("method: {name: lofft}", "field method.name is 'lofft', expected one of"),
    ],
)
def test_a_config_file_with_a_wrong_value(flags, yaml, message, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(yaml)
    assert main(["finetune", *flags, "--config", str(tmp_path / "c.yaml")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_second_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("loft_jax.cli.source.Source.load", interrupted)
    assert main(["generate", "--model", "m", "--prompt", "a"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_an_empty_dataset(flags, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    assert main(["finetune", *flags, "--data.path", str(tmp_path / "empty.jsonl")]) == 2
    assert "empty.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["finetun"], ["finetune", "--no-such-flag"], ["evaluate"]])
def test_unknown_commands_and_flags(arguments):
    try:
        code = main(arguments)
    except SystemExit as exit_:  # the parser's own
        code = exit_.code
    assert code == 2


def test_finetune_with_nothing_lists_what_is_missing(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["finetune"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert all(flag in told for flag in ("--model", "--output", "--data.path"))


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"loft-jax {version('loft-jax')}\n"


def test_help(capsys):
    assert main([]) == 0
    assert "finetune" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["evaluate", "--data.path", "x.jsonl"], "x.jsonl"),
        (["generate", "--prompt", "a"], "neither model nor adapter"),
        (["merge", "--output", "o"], "neither model nor adapter"),
        (["merge", "--model", "no/m/x", "--output", "o"], "no/m/x: no such file or folder"),
        (["merge", "--adapter", "nowhere", "--output", "o"], "nowhere: no such folder"),
        (["export", "nowhere", "--output", "o"], "nowhere"),
        (["merge", "--model", "m", "--output", "m.gguf"], "m.gguf is named as a file of GGUF"),
    ],
)
def test_other_commands_refuse_too(command, message, capsys):
    assert main(command) == 2
    assert message in capsys.readouterr().err
