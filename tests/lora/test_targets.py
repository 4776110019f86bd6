import pytest
from flax import linen, nnx

from loft_jax import find_pairs
from loft_jax.errors import InputError
from loft_jax.lora import LoRAConfig, add_lora, stack_axis_of
from loft_jax.lora.targets import named_modules, scaling_of, select

from .models import Block, Stacked


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.blocks = nnx.List([Block(4, rngs=rngs) for _ in range(11)])
        self.norm = nnx.RMSNorm(4, rngs=rngs)
        self.extra = nnx.data({"side": nnx.Linear(4, 4, rngs=rngs)})
        self.lm_head = nnx.Linear(4, 7, rngs=rngs)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(nnx.Rngs(0))


def paths(model, target, exclude=()):
    return list(select(model, LoRAConfig(2, target_modules=target, exclude_modules=exclude)))


UP = [f"blocks.{i}.up_proj" for i in range(11)]
DOWN = [f"blocks.{i}.down_proj" for i in range(11)]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("up_proj", UP),
        (["up_proj"], UP),
        (r"blocks\.\d+\.up_proj", UP),
        (r"blocks\.(2|10)\..*", ["blocks.2.down_proj", UP[2], "blocks.10.down_proj", UP[10]]),
        ("blocks.1.up_proj", [UP[1]]),
        (["1.up_proj"], [UP[1]]),
        (["embed", "side"], ["embed", "extra.side"]),
        ("lm_head", ["lm_head"]),
    ],
)
def test_names_and_patterns(model, target, expected):
    assert paths(model, target) == expected


def test_names_are_not_matched_as_patterns(model, monkeypatch):
    """As many names as a model has layers would take time that grows with their square."""
    monkeypatch.setattr("loft_jax.patterns.Patterns.match", None)
    monkeypatch.setattr("loft_jax.patterns.Patterns.fullmatch", None)
    assert paths(model, UP, DOWN[:1]) == UP


def test_all_linear_leaves_out_the_head_and_embeddings(model):
    assert sorted(paths(model, "all-linear")) == sorted([*UP, *DOWN, "extra.side"])


def test_all_linear_leaves_out_a_head_of_several_layers():
    class Classifier(nnx.Module):
        output_modules = ("head",)

        def __init__(self, rngs):
            self.head = Block(4, rngs=rngs)
            self.header = nnx.Linear(4, 4, rngs=rngs)

    model = Classifier(nnx.Rngs(0))
    assert paths(model, "all-linear") == ["header"]
    assert paths(model, "up_proj") == ["head.up_proj"]


@pytest.mark.parametrize("exclude", ["down_proj", ["down_proj"], r".*\.down_proj"])
def test_exclusion(model, exclude):
    assert paths(model, "all-linear", exclude) == [*UP, "extra.side"]


@pytest.mark.parametrize("target", [["up_proj"], r"blocks\.\d+\.(up|down)_proj", ["embed"]])
def test_matches_what_peft_matches(model, target):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(target_modules=target)
    candidates = named_modules(model)
    theirs = [path for path in candidates if check_target_module_exists(config, path)]
    assert paths(model, target) == theirs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": "up_porj"}, "'up_porj' matches no layer.*near names: up_proj"),
        ({"target_modules": ["up_proj", "dwn_proj"]}, "'dwn_proj' matches no layer.*down_proj"),
        ({"target_modules": r"layers\.\d+\.up_proj"}, "matches no layer.*up_proj"),
        ({"target_modules": ["zzz"]}, "'zzz' matches no layer.*down_proj, embed, lm_head"),
        ({"target_modules": ["blocks"]}, "'blocks' is a module, name the layers inside"),
        ({"target_modules": ["up_proj", "norm"]}, "'norm': nnx.RMSNorm is not supported"),
        ({"target_modules": r".*(norm|up_proj)"}, "'norm': nnx.RMSNorm is not supported"),
        ({"exclude_modules": ["side", "sidee"]}, "exclude_modules: 'sidee'.*near names: side"),
        ({"target_modules": "side", "exclude_modules": "side"}, "exclude_modules leaves no layer"),
        ({"rank_pattern": {"up_prj": 1}}, "rank_pattern: 'up_prj'.*near names: up_proj"),
        ({"alpha_pattern": {"lm_head": 1}}, "alpha_pattern: 'lm_head' matches no target layer"),
    ],
)
def test_what_matches_nothing_is_refused_with_near_names(model, fields, message):
    with pytest.raises(InputError, match=f"(?s){message}"):
        select(model, LoRAConfig(2, **fields))


def test_a_model_without_linear_layers():
    with pytest.raises(InputError, match=r"no linear layer; nnx\.RMSNorm: not supported"):
        select(nnx.RMSNorm(4, rngs=nnx.Rngs(0)), LoRAConfig(2))


def test_a_layer_that_is_not_supported_and_what_is_no_nnx_model():
    conv = nnx.Sequential(nnx.Conv(1, 2, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match=r"nnx\.Conv is not supported; .*register_lora_layer"):
        select(conv, LoRAConfig(2, target_modules=["layers.0"]))
    with pytest.raises(InputError, match=r"Dense: this is a Linen model.*loft_jax\.lora\.linen"):
        select(linen.Dense(4), LoRAConfig(2))
    with pytest.raises(InputError, match=r"model is a dict, expected an nnx\.Module"):
        select({}, LoRAConfig(2))
    with pytest.raises(InputError, match=r"model is a str, expected an nnx\.Module"):
        add_lora("x", LoRAConfig(2), rngs=nnx.Rngs(0))


def test_a_shared_layer_is_selected_once_by_any_of_its_paths():
    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(3, 3, rngs=rngs)
            self.b = nnx.List([self.a])

    model = Shared(nnx.Rngs(0))
    assert paths(model, "all-linear") == ["a"]
    assert paths(model, ["b.0"]) == ["b.0"]
    with pytest.raises(InputError, match="leaves no layer"):
        paths(model, "all-linear", ["b.0"])


def test_the_stack_of_what_is_no_adapter_is_told():
    linear = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    stack_axis = stack_axis_of(add_lora(linear, LoRAConfig(2), rngs=nnx.Rngs(1)))
    assert stack_axis("layers/0") == ()
    with pytest.raises(InputError, match=r"'model/layers/0': no adapter .* of 'layers/0'"):
        stack_axis("model/layers/0")
    with pytest.raises(InputError, match=r"scaling of 'layers/1': no adapter .* of 'layers/0'"):
        scaling_of(linear)("layers/1")


def test_a_layer_alone_has_a_stack_and_a_scaling():
    layer = add_lora(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), LoRAConfig(2, alpha=6), rngs=nnx.Rngs(1))
    [pair] = find_pairs(nnx.state(layer, nnx.LoRAParam))
    assert stack_axis_of(layer)(pair.path) == ()
    assert scaling_of(layer)(pair.path) == 3


def test_a_cycle_ends():
    model = Stacked(rngs=nnx.Rngs(0))
    model.layers.parent = model
    assert paths(model, "up_proj") == ["layers.up_proj"]
