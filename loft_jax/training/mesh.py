"""How the arrays of a run lie on the devices: a mesh of three axes, and rules for every array.

- `data`: copies of the model, each with its own rows of the batch.
- `fsdp`: rows of the batch too, and weights split over the same devices; a layer's weights are
  gathered when it runs.
- `tensor`: weights split by heads, MLP features and vocabulary, which compute side by side.

Models name the axes of their parameters (`loft_jax.models.llama_layout.logical_axes`); here these
names meet those of the mesh. All is GSPMD: the compiled step is the one of a single device, with
shardings at its borders and on the residual stream.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from loft_jax.errors import InputError
from loft_jax.models import LlamaConfig
from loft_jax.models.activations import BATCH_AXES
from loft_jax.models.llama_layout import logical_axes
from loft_jax.optim.state import state_shardings
from loft_jax.training.config import MeshConfig
from loft_jax.training.step import Parts, StepShardings, TrainState

Tree = Any

# Logical axis of a parameter -> axis of the mesh. Other axes stay whole: a scan runs over
# "layers", and norms are small.
_RULES: Mapping[str | None, str] = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays a mesh over devices, neighbours on the torus of a TPU slice next to each other.

    Args:
        config: Its sizes.
        devices: By default all that there are.

    Returns:
        A mesh of the axes data, fsdp, tensor.

    Raises:
        InputError: The sizes do not make up the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    grid = (
        mesh_utils.create_device_mesh(sizes, list(devices))
        if devices[0].platform == "tpu"
        else np.asarray(devices).reshape(sizes)
    )
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def step_shardings(
    parts: Parts, tx: optax.GradientTransformation, config: LlamaConfig, mesh: Mesh
) -> StepShardings:
    """The shardings of a run.

    Weights are split by `parameter_spec`, the optimizer's state like the parameters it is about
    (`loft_jax.optim.state.state_shardings`); random streams, counters and metrics are on every
    device.

    Args:
        parts: From `split_model`; shapes are enough.
        tx: The optimizer.
        config: Of the model.
        mesh: From `make_mesh`.

    Returns:
        The shardings, for `make_step` and for `jax.device_put`.
    """
    whole: Any = NamedSharding(mesh, PartitionSpec())

    def of(tree: Tree) -> Tree:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: NamedSharding(
                mesh,
                parameter_spec(
                    jax.tree_util.keystr(path, simple=True, separator="."),
                    leaf.shape,
                    config,
                    mesh,
                ),
            ),
            tree,
        )

    params = of(parts.params)
    state = TrainState(
        step=whole,
        params=params,
        opt_state=state_shardings(tx, parts.params, params),
        streams=jax.tree.map(lambda _: whole, parts.streams),
    )
    return StepShardings(state, of(parts.frozen), NamedSharding(mesh, PartitionSpec(BATCH_AXES)))


def parameter_spec(
    path: str, shape: Sequence[int], config: LlamaConfig, mesh: Mesh
) -> PartitionSpec:
    """How one array of a model is split.

    The side of a weight that meets the residual stream ("embed") is split over fsdp, the other one
    (heads, MLP features, vocabulary) over tensor. A LoRA factor has one long side and takes the
    mesh axes of both there, so that it has as many shards as the weight it adapts: a factor, and
    with it the optimizer's state, that followed its own side only would be whole on every device
    of the other axis. Its rank is never split.

    An axis that cannot be split stays whole: one whose size the mesh axis does not divide, and the
    heads (or key heads) of an attention that has no multiple of `tensor` of them, since a head is
    computed on one device. Norms, and what is no parameter (random keys), are whole everywhere.

    Args:
        path: Dotted path of the array.
        shape: Its shape.
        config: Of the model.
        mesh: From `make_mesh`.

    Returns:
        A mesh axis, several, or None for each axis of the array.

    Example:
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                      num_hidden_layers=2, num_attention_heads=4,
        ...                      num_key_value_heads=2, head_dim=8)
        >>> mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        >>> parameter_spec("layers.mlp.up_proj.kernel", (2, 32, 48), config, mesh)
        P(None, 'fsdp', 'tensor')
        >>> parameter_spec("layers.mlp.up_proj.lora_b", (2, 4, 48), config, mesh)
        P(None, None, ('tensor', 'fsdp'))
    """
    module, _, name = path.rpartition(".")
    if name not in ("kernel", "embedding", "bias", "scale", "lora_a", "lora_b"):
        return PartitionSpec()
    own = logical_axes(path)
    split = [_mesh_axes(axis) for axis in own]
    if name in ("lora_a", "lora_b"):
        long = -2 if name == "lora_a" else -1
        (other,) = set(logical_axes(f"{module}.kernel")[-2:]) - {own[long]}
        split[long] += _mesh_axes(other)
        heads = {}
    else:
        heads = {"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads}
    spec: list[Any] = []
    for axis, size, names in zip(own, shape, split, strict=True):
        units = heads.get(axis or "", size)
        while names and units % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        spec.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*spec)


def _mesh_axes(axis: str | None) -> tuple[str, ...]:
    return (_RULES[axis],) if axis in _RULES else ()


def check_batch(rows: int, accumulation_steps: int, mesh: Mesh) -> None:
    """Refuses a batch whose rows cannot be split evenly.

    Args:
        rows: Of a step, over all devices.
        accumulation_steps: Parts that they are computed in.
        mesh: From `make_mesh`.

    Raises:
        InputError: Names the nearest number of rows that can be.
    """
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    unit = shards * accumulation_steps
    if rows % unit:
        nearest = max(unit, round(rows / unit) * unit)
        parts = f" in {accumulation_steps} parts" if accumulation_steps > 1 else ""
        raise InputError(
            f"batch: {rows} rows{parts} do not divide over {shards} devices (data "
            f"{mesh.shape['data']} x fsdp {mesh.shape['fsdp']}), expected a multiple of {unit} "
            f"such as {nearest}"
        )
