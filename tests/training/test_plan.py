"""Plans: compiled for TPUs by libtpu, without one."""

import dataclasses
import importlib.util
import json
import os
import shutil

import jax
import pytest

from loft_jax.cli import main
from loft_jax.data import DataConfig
from loft_jax.errors import InputError
from loft_jax.methods import LoFT, LoRA
from loft_jax.models.registry import WELL_KNOWN
from loft_jax.training import topology
from loft_jax.training.config import MeshConfig
from loft_jax.training.plan import plan_method, plan_model, plan_step, plan_table
from loft_jax.training.topology import chip_of, gpu_count, load_topology
from tests.flat_config import flat_config

HIDDEN, MLP, LAYERS, VOCAB, RANK = 64, 128, 2, 400, 4
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@pytest.fixture(scope="module")
def config_json(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "config.json"
    sizes = {"hidden_size": HIDDEN, "intermediate_size": MLP, "vocab_size": VOCAB}
    layers = {"num_hidden_layers": LAYERS, "num_attention_heads": 4}
    path.write_text(json.dumps({"model_type": "llama", **sizes, **layers}))
    return path


def config(model, **changes):
    """The configuration of a run of 4 rows of 16 tokens."""
    fields = {"model": str(model), "data": DataConfig("", max_length=16), "output": ""}
    sizes = {"rank": RANK, "batch_size": 4, "remat": "full"}
    return flat_config(**{**fields, **sizes, **changes})


@pytest.fixture(scope="module")
def plans(config_json):
    common = {"target_modules": ("q_proj", "k_proj"), "mesh": MeshConfig(1, 2, 2)}
    return [
        plan_step(config(config_json.parent, method=method, **common), "v5e:2x2")
        for method in ("lora", "loft")
    ]


@needs_libtpu
def test_stored_bytes_are_those_of_the_shapes(plans):
    lora, loft = plans
    matrices = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * MLP) + 2 * VOCAB * HIDDEN
    norms = (2 * LAYERS + 1) * HIDDEN
    assert lora.weights == loft.weights == 2 * (matrices // 4 + norms)  # bfloat16, four devices
    factors = LAYERS * 2 * 2 * HIDDEN * RANK // 4
    assert lora.adapter == loft.adapter == 4 * factors  # float32
    grams = LAYERS * 2 * 2 * RANK**2  # whole on every device
    for plan, numbers in ((lora, 2 * factors), (loft, (2 + 1 / RANK) * factors + grams)):
        assert 0 <= plan.optimizer_state - 4 * numbers <= 64  # counters


@needs_libtpu
def test_the_parts_add_up_to_the_total(plans):
    for plan in plans:
        parts = (plan.weights, plan.adapter, plan.optimizer_state, plan.other)
        assert sum(parts) + plan.temporaries + plan.program == plan.total
        assert min(*parts, plan.temporaries, plan.program) >= 0
        assert plan.total < plan.memory == 16 * 2**30
        assert plan.mesh == (1, 2, 2)
        assert {c.kind for c in plan.collectives} >= {"all-gather", "all-reduce"}


@needs_libtpu
@pytest.mark.slow
def test_a_quantized_base_and_a_state_on_the_hosts_over_two_slices(plans, config_json):
    changes = {"quantization": "nf4", "offload_optimizer": True, "mesh": MeshConfig(2, 2, 2)}
    targets = plans[1].config.lora.target_modules
    run = config(config_json.parent, target_modules=targets, **changes)
    plan = plan_step(run, "v5e:2x2", slices=2)
    kernels = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * MLP)
    scales = 2 * kernels // 64  # bfloat16, one for 64 inputs; some stay whole on an axis
    others = 2 * (2 * VOCAB * HIDDEN // 4 + (2 * LAYERS + 1) * HIDDEN)
    assert scales // 4 <= plan.weights - (kernels // 2 // 4 + others) <= scales
    assert plan.adapter == plans[1].adapter
    assert plan.optimizer_state < 64 < plans[1].optimizer_state  # counters
    assert plan.mesh == (2, 2, 2)


@needs_libtpu
def test_the_table_compares_methods(plans):
    text = plan_table(plans)
    lora, loft = (line.split() for line in text.splitlines()[2:4])
    assert lora[:3] == ["v5e:2x2", "1x2x2", "lora"]
    assert loft[:3] == ["v5e:2x2", "1x2x2", "loft"]
    more = plans[1].total - plans[0].total
    assert f"{more / 2**20:+,.1f} ({more / plans[0].total:+.1%})" in text
    assert "v5e:2x2 loft: " in text
    assert " all-gather (" in text


@needs_libtpu
def test_a_program_that_cannot_be_read_has_no_collectives(plans, monkeypatch, recwarn):
    """Nor is it in the cache that tests share: without its chips JAX would warn of it."""

    def unreadable(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", unreadable)
    plan = plan_step(plans[0].config, "v5e:2x2")
    assert plan.total == plans[0].total
    assert plan.collectives is None
    assert "v5e:2x2 lora: unknown, this jaxlib cannot read" in plan_table([plan])
    assert not [str(warning.message) for warning in recwarn]


@needs_libtpu
def test_what_is_compiled_is_shown_when_the_next_is_stopped(plans, capsys, monkeypatch):
    done = [plans[0]]

    def plan_one(*case):
        if not done:
            raise KeyboardInterrupt
        return done.pop()

    monkeypatch.setattr("loft_jax.training.plan.plan_step", plan_one)
    flags = ["--topology", "v5e:2x2", "--batch", "4x16", "--target-modules", "q_proj"]
    assert main(["plan", "--model", plans[0].config.model.path, "--rank", "4", *flags]) == 130
    assert "v5e:2x2   1x2x2  lora" in capsys.readouterr().out


@needs_libtpu
def test_a_step_that_does_not_fit_says_so(capsys):
    """By name, with the network off."""
    flags = ["--topology", "v5e:2x2", "--method", "full", "--batch", "4x16"]
    assert main(["plan", "--model", "llama-2-7b", *flags]) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert "exceeds available" in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topology": "v9:2x2"}, "unknown TPU or GPU 'v9', expected one of v4, v5e, v5p, v6e"),
        ({"topology": "0xh100"}, "expected one of .*, or of a100-40gb, .* as in h100 or 8xh100"),
        ({"topology": "v5e"}, "its grid is ''"),
        ({"topology": "v5e:0x2"}, "its grid is '0x2'"),
        ({"model": "no/such/folder/model"}, "no/such/folder/model: .*known by name: .*llama-2-7b"),
        ({"rank": 1000}, "rank 1000 is above 64"),
        ({"target_modules": ("q_prj",)}, "q_proj"),
        ({"accumulation_steps": 3}, "not a multiple of accumulation_steps 3"),
        pytest.param({"topology": "v5e:3x5"}, "libtpu refuses it", marks=needs_libtpu),
        pytest.param({"batch_size": 6}, "6 rows do not divide over 4", marks=needs_libtpu),
        pytest.param({"mesh": MeshConfig(3, 1, 1)}, "do not make up 4", marks=needs_libtpu),
    ],
)
def test_mistakes_are_named(config_json, changes, message):
    given = {"model": config_json, **changes}
    topology = given.pop("topology", "v5e:2x2")
    with pytest.raises(InputError, match=message):
        plan_step(config(**given), topology)


@pytest.mark.parametrize("batch", ["16", "0x16"])
def test_a_batch_is_rows_and_tokens(config_json, batch, capsys):
    flags = ["--topology", "v5e:2x2", "--batch", batch]
    assert main(["plan", "--model", str(config_json), *flags]) == 2
    assert f"batch is '{batch}', expected rows x tokens" in capsys.readouterr().err


def test_a_setting_goes_to_the_methods_that_have_it(config_json, capsys, monkeypatch):
    planned = []
    monkeypatch.setattr("loft_jax.training.plan.check_plan", lambda run, *_: planned.append(run))
    monkeypatch.setattr("loft_jax.training.plan.plan_step", lambda run, *_: run)
    monkeypatch.setattr("loft_jax.training.plan.plan_table", lambda plans: "")
    flags = ["plan", "--model", str(config_json), "--topology", "v5e:2x2", "--move", "alternate"]
    assert main(flags) == 0
    assert [run.method for run in planned] == [LoRA(), LoFT(move="alternate")]
    assert plan_method(planned[1].method) == "loft alternate"
    assert main([*flags, "--damping", "0.1"]) == 2
    assert "damping is 0.1, but only method riemannian has it" in capsys.readouterr().err


def test_the_command_ends_with_the_message(config_json, capsys):
    assert main(["plan", "--model", str(config_json), "--topology", "v9:2x2"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "loft-jax plan: topology 'v9:2x2': unknown TPU or GPU 'v9', expected one of v4, v5e, v5p, "
        "v6e, as in v5e:2x4, or of a100-40gb, a100-80gb, h100, h200, rtx-3090, rtx-4090, as in "
        "h100 or 8xh100"
    )


@needs_libtpu
def test_every_case_is_checked_before_the_first_is_compiled(config_json, capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr("loft_jax.training.plan.plan_step", lambda *case: compiled.append(case))
    flags = ["--topology", "v5e:2x2", "v5e:2x4", "--batch", "4x16"]
    assert main(["plan", "--model", str(config_json), *flags]) == 2
    assert "4 rows do not divide over 8 devices" in capsys.readouterr().err
    assert not compiled


def test_no_topology_is_refused(capsys):
    assert main(["plan", "--model", "llama-2-7b", "--topology"]) == 2
    assert "topology or method is empty" in capsys.readouterr().err


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'loft-jax\[tpu\]'"):
        load_topology("v5e:2x2")


@needs_libtpu
def test_the_users_environment_stays(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_ID", "7")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    assert len(load_topology("v4:2x2x2").devices) == 8  # chips, not cores
    assert os.environ["TPU_WORKER_ID"] == "7"
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"


def test_a_folder_goes_before_a_model_that_is_known_by_name(config_json, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plan_model("gpt2")[1].vocab_size == 50_257
    shutil.copytree(config_json.parent, tmp_path / "gpt2")
    assert plan_model("gpt2")[1].vocab_size == VOCAB


def test_models_by_name_have_their_published_sizes():
    def parameters(name):
        c = WELL_KNOWN[name][1]
        width, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        layer = c.hidden_size * (2 * width + 2 * kv + 3 * c.intermediate_size + 2)
        return c.num_hidden_layers * layer + c.hidden_size * (2 * c.vocab_size + 1)

    published = {
        "llama-2-7b": 6_738_415_616,
        "llama-2-13b": 13_015_864_320,
        "llama-2-70b": 68_976_648_192,
        "llama-3-8b": 8_030_261_248,
        "llama-3-70b": 70_553_706_496,
    }
    assert {name: parameters(name) for name in published} == published
    assert plan_model("Llama-2-7B") is WELL_KNOWN["llama-2-7b"]


@pytest.fixture(scope="module")
def gpu_plan(config_json):
    return plan_step(config(config_json, target_modules=("q_proj",)), "h100")


def test_a_plan_for_a_gpu_has_the_bytes_of_the_shapes_and_estimates_the_rest(gpu_plan):
    matrices = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * MLP) + 2 * VOCAB * HIDDEN
    assert gpu_plan.weights == 2 * (matrices + (2 * LAYERS + 1) * HIDDEN)  # bfloat16
    assert gpu_plan.adapter == 4 * LAYERS * 2 * HIDDEN * RANK
    assert gpu_plan.memory == 80 * 2**30
    # The logits of a batch in float32 at least, and not much more of what is in all layers.
    assert 4 * 4 * 16 * VOCAB < gpu_plan.temporaries < gpu_plan.weights + 2**22
    assert gpu_plan.is_estimate
    table = plan_table([gpu_plan])
    assert f"~{gpu_plan.total / 2**20:,.1f}" in table
    assert "of 80 GiB" in table
    assert "~ is an estimate" in table
    small = dataclasses.replace(gpu_plan, memory=gpu_plan.total - 1)
    assert "GiB, does not fit" in plan_table([small])


@pytest.mark.slow
def test_state_on_the_host_is_not_counted_as_that_of_a_gpu(gpu_plan):
    optimizer = dataclasses.replace(gpu_plan.config.optimizer, offload=True)
    plan = plan_step(dataclasses.replace(gpu_plan.config, optimizer=optimizer), "rtx-4090")
    assert plan.optimizer_state < 64 < gpu_plan.optimizer_state  # counters
    assert abs(plan.other - gpu_plan.other) < 64
    assert plan.memory == 24 * 2**30


@pytest.mark.parametrize(
    ("name", "count", "memory"),
    [("h100", 1, 80), ("8xH100", 8, 80), ("2xrtx-3090", 2, 24), ("a100-40gb", 1, 40)],
)
def test_gpus_are_known_by_name(name, count, memory):
    assert gpu_count(name) == count
    assert chip_of(name).memory == memory * 2**30


def test_several_gpus_need_as_many_cpu_devices():
    with pytest.raises(InputError, match="JAX has 1 CPU devices to compile for, expected 8"):
        load_topology("8xh100")
    with pytest.raises(InputError, match="slices is 2, expected 1 for the GPUs of one host"):
        load_topology("h100", slices=2)


@pytest.mark.parametrize(("file", "set_"), [(None, True), ("accel0", False), ("vfio/0", False)])
def test_libtpu_is_silent_where_there_is_no_tpu(file, set_, monkeypatch, tmp_path):
    monkeypatch.setattr(topology, "Path", lambda path: tmp_path / path.lstrip("/"))
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    for name, text in (("sys/bus/pci/devices/0/vendor", "0x8086\n"), (f"dev/{file}", "")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    topology.silence_libtpu()
    assert ("TPU_SKIP_MDS_QUERY" in os.environ) == set_


@pytest.mark.slow
def test_a_base_in_nf4_on_a_gpu_takes_what_one_in_int8_does_but_for_its_weights(gpu_plan):
    plans = [
        plan_step(config(gpu_plan.config.model.path, target_modules=("q_proj",), **changes), "h100")
        for changes in ({"quantization": "int8"}, {"quantization": "nf4"})
    ]
    kernels = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * MLP)
    scales = 2 * kernels // 64  # bfloat16, one for 64 inputs
    assert gpu_plan.weights - plans[1].weights == 2 * kernels - kernels // 2 - scales
    assert plans[1].temporaries == plans[0].temporaries
    assert plans[1].config.model.quantization == "nf4"
