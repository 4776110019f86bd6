"""Rules for the shardings of all arrays of a run on its mesh.

Models name the axes of their parameters (`ParameterTable.logical_axes`); the rules here map these
names to axes of the mesh. GSPMD does the rest: the program is that of a single device, with
shardings on its arguments, its results and the residual stream.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from loft_jax.models.activations import BATCH_AXES
from loft_jax.models.family import ParameterTable
from loft_jax.optim import state_shardings
from loft_jax.training.partition import ModelPartition
from loft_jax.training.step import HOST_MEMORY, StepShardings, TrainState

Tree = Any

# Logical axis of a parameter -> axis of the mesh. Other axes are not split: a scan runs over
# "layers", and norms are small.
_RULES: Mapping[str | None, str] = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}


def step_shardings(
    parts: ModelPartition,
    tx: optax.GradientTransformation,
    table: ParameterTable | None,
    mesh: Mesh,
    *,
    offload_optimizer: bool = False,
) -> StepShardings:
    """Makes the shardings of a run.

    Weights are split by `parameter_spec`, and the optimizer state like its parameters
    (`loft_jax.optim.state_shardings`). Random streams, counters and metrics are replicated.

    Args:
        parts: From `split_model`; shapes are enough.
        tx: The optimizer.
        table: Of the model's parameters; None for a model of no family, which is replicated.
        mesh: From `make_mesh`.
        offload_optimizer: Whether the optimizer state is kept in host memory.

    Returns:
        The shardings, for `make_step` and for `jax.device_put`.
    """
    everywhere: Any = NamedSharding(mesh, PartitionSpec())

    def of(tree: Tree) -> Tree:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: NamedSharding(
                mesh,
                parameter_spec(
                    jax.tree_util.keystr(path, simple=True, separator="."),
                    leaf.shape,
                    table,
                    mesh,
                ),
            ),
            tree,
        )

    params = of(parts.params)
    opt_state = state_shardings(tx, parts.params, params)
    if offload_optimizer:  # except counters: XLA needs scalars on the devices
        opt_state = jax.tree.map(
            lambda held, x: held.with_memory_kind(HOST_MEMORY) if x.ndim else held,
            opt_state,
            jax.eval_shape(tx.init, parts.params),
        )
    state = TrainState(
        step=everywhere,
        skipped=everywhere,
        params=params,
        opt_state=opt_state,
        streams=jax.tree.map(lambda _: everywhere, parts.streams),
    )
    return StepShardings(state, of(parts.frozen), NamedSharding(mesh, PartitionSpec(BATCH_AXES)))


def parameter_spec(
    path: str, shape: Sequence[int], table: ParameterTable | None, mesh: Mesh
) -> PartitionSpec:
    """Gives the partition spec of one array of a model.

    The "embed" axis of a weight, on the side of the residual stream, is split over fsdp, and the
    other axis (heads, MLP features, vocabulary) over tensor. A LoRA factor has one long axis, which
    is split over both, so that the factor has as many shards as the weight it adapts. Split over
    one of them only, the factor and its optimizer state would be replicated over the other. Its
    rank is never split. A magnitude of DoRA is split like a bias.

    An axis is not split if the mesh axis does not divide its size. Heads (and key heads) are not
    split if `tensor` does not divide their number, since a head is computed on one device. Norms
    and arrays that are not parameters (random keys) are replicated.

    Args:
        path: Dotted path of the array.
        shape: Its shape.
        table: Of the model's parameters; None for a model of no family, which is replicated.
        mesh: From `make_mesh`.

    Returns:
        One mesh axis, several, or None, for each axis of the array.

    Example:
        >>> from loft_jax.models.family import ParameterTable, linear
        >>> from loft_jax.training.config import MeshConfig
        >>> from loft_jax.training.mesh import make_mesh
        >>> table = ParameterTable(linear("layers.up", "model.layers.{}.up", ("embed", "mlp")))
        >>> mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        >>> parameter_spec("layers.up.kernel", (2, 32, 48), table, mesh)
        P(None, 'fsdp', 'tensor')
        >>> parameter_spec("layers.up.lora_b", (2, 4, 48), table, mesh)
        P(None, None, ('tensor', 'fsdp'))
    """
    path = re.sub(r"\.kernel\.(qvalue|scale)$", ".kernel", path)  # of a quantized one
    module, _, name = path.rpartition(".")
    factors = {"lora_a": -2, "lora_start_a": -2, "lora_b": -1, "lora_start_b": -1}  # its long axis
    known = ("kernel", "embedding", "bias", "scale", "lora_magnitude", *factors)
    if table is None or name not in known:
        return PartitionSpec()
    own = table.logical_axes(path)
    split = [_mesh_axes(axis) for axis in own]
    if name in factors:
        long = factors[name]
        weight = table.logical_axes(table.weight(module))
        split[long] += _mesh_axes(weight[-1] if long == -2 else weight[-2])
        counts: Mapping[str, int] = {}
    else:
        counts = table.units
    spec: list[Any] = []
    for axis, size, names in zip(own, shape, split, strict=True):
        units = math.gcd(size, counts.get(axis or "", size))
        while names and units % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        spec.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*spec)


def _mesh_axes(axis: str | None) -> tuple[str, ...]:
    return (_RULES[axis],) if axis in _RULES else ()
