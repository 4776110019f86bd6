"""The kernels of the direction: interpreted against plain JAX, and lowered for the real devices."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import loft_jax
from loft_jax.optim import full_moment
from loft_jax.optim.fused_direction import on_cuda, on_tpu
from loft_jax.optim.linear_algebra import FactorMatrix, orthonormal_basis
from loft_jax.optim.packed_matrices import packed_size, symmetric_squares
from loft_jax.optim.second_moments import AdamStep
from loft_jax.training.topology import load_topology

# Edges of the tiles of both kernels lie inside: 64 x 64 on GPUs, at least 128 x 128 on TPUs.
SIZES = (2, 70, 130)  # stack, rows, columns


def arguments(stack, rows, columns, r, rank_last, dtype=jnp.float32):
    """What a direction is made of: second moments as of r + 3 gradients, and the rest random."""
    rng = np.random.default_rng(r)

    def laid_out(x, rank_last):
        x = x if rank_last else np.swapaxes(x, -1, -2)
        return FactorMatrix(jnp.asarray(x, jnp.float32), rank_last)

    gradients = rng.normal(size=(r + 3, stack, rows, r)).astype(np.float32)
    squares = symmetric_squares(FactorMatrix(jnp.asarray(gradients))).array
    p = laid_out(np.mean(squares, axis=0)[None], rank_last)
    mu = laid_out(rng.normal(size=(1, stack, rows, r)), rank_last)
    partner = laid_out(rng.normal(size=(1, stack, columns, r)), not rank_last)
    step = AdamStep(mu, orthonormal_basis(partner), 0.5, 1e-8, 3.0)
    return p.like(p.array.astype(dtype)), mu, step.basis.q, step


def in_plain_jax(p, mu, q, step):
    p = p.like(p.array.astype(jnp.float32))
    return full_moment._direction(p, mu, q, step, elements=full_moment._TILE_ELEMENTS)


def numbers(step):
    return jnp.array([step.correction**-0.5, step.eps, step.limit], jnp.float32)


def distance(kernel, p, mu, q, step):
    """Of the interpreted kernel from plain JAX, relative to the largest element."""
    found = jax.jit(functools.partial(kernel, interpret=True))(p, mu, q, numbers(step))
    expected = in_plain_jax(p, mu, q, step)
    assert found.shape == expected.shape
    return float(jnp.abs(found - expected).max() / jnp.abs(expected).max())


@pytest.mark.parametrize(
    ("kernel", "rank_last", "dtype"),
    [(on_tpu, True, "float32"), (on_cuda, False, "bfloat16"),
     pytest.param(on_tpu, False, "bfloat16", marks=pytest.mark.slow),
     pytest.param(on_cuda, True, "float32", marks=pytest.mark.slow)],
)  # fmt: skip
def test_is_plain_jax(kernel, rank_last, dtype):
    assert distance(kernel, *arguments(*SIZES, 2, rank_last, dtype)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "r"), [((1, 7, 5), 1), (SIZES, 3), ((3, 100, 150), 16), ((1, 140, 132), 64)]
)
@pytest.mark.parametrize("rank_last", [True, False])
@pytest.mark.parametrize("kernel", [on_tpu, on_cuda])
def test_is_plain_jax_at_every_rank(kernel, rank_last, sizes, r):
    assert distance(kernel, *arguments(*sizes, r, rank_last)) < 1e-6


def test_vmap_adds_an_axis():
    p, mu, q, step = arguments(1, 6, 5, 2, True)
    both = mu.like(jnp.stack([mu.array, -mu.array]))
    for kernel in (on_tpu, on_cuda):
        call = functools.partial(kernel, interpret=True)
        x = jax.vmap(call, (None, 0, None, None))(p, both, q, numbers(step))
        np.testing.assert_allclose(x[0], in_plain_jax(p, mu, q, step), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(x[1], -x[0])


def shapes(stack, rows, columns, r, rank_last, sharding=None):
    def laid_out(n, k, last):
        shape = (1, stack, n, k) if last else (1, stack, k, n)
        return FactorMatrix(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding), last)

    three = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=sharding)
    size = packed_size(r)
    return (
        laid_out(rows, size, rank_last), laid_out(rows, r, rank_last),
        laid_out(columns, r, not rank_last), three,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "r"),
    [
        ((1, 100, 77), 3),
        *(
            pytest.param(sizes, r, marks=pytest.mark.slow)
            for sizes, r in [((1, 4096, 11008), 16), ((8, 1024, 1024), 16), ((8, 1024, 1024), 8),
                             ((1, 1000, 1030), 64), ((1, 1024, 1024), 128)]
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rank_last", [True, False])
def test_mosaic_compiles_it_without_temporaries(sizes, r, rank_last):
    """By libtpu, ahead of time, for one chip."""
    device = load_topology("v5e:2x2").devices[0]
    given = shapes(*sizes, r, rank_last, jax.sharding.SingleDeviceSharding(device))
    memory = jax.jit(on_tpu).lower(*given).compile().memory_analysis()
    assert memory.generated_code_size_in_bytes < 1 << 20
    assert memory.temp_size_in_bytes == 0


# Newer versions of JAX ask which card a kernel is for.
ASKS = jax.__version_info__ >= (0, 11)
CARD = jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu") if ASKS else None


def lowered(function, platform, *given):
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=CARD)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(function).trace(*given)
        return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("r", [1, 16, 64])
@pytest.mark.parametrize("rank_last", [True, False])
def test_lowers_to_triton(r, rank_last):
    assert "xla.gpu.triton" in lowered(on_cuda, "cuda", *shapes(2, 100, 77, r, rank_last))


def test_too_many_numbers_for_triton():
    too_many = r" of shape \(1, 64, {}\) are 5816451072 numbers, expected at most 2147483647"
    with pytest.raises(ValueError, match="second moments" + too_many.format("11008, 8256")):
        jax.eval_shape(on_cuda, *shapes(64, 11008, 2048, 128, True))
    with pytest.raises(ValueError, match="squares of a basis" + too_many.format("8256, 11008")):
        jax.eval_shape(on_cuda, *shapes(64, 2048, 11008, 128, True))


@pytest.mark.parametrize("move", ["tangent", pytest.param("alternate", marks=pytest.mark.slow)])
def test_the_device_of_the_program_decides(move):
    params = {
        "lora_a": jax.ShapeDtypeStruct((24, 4), jnp.float32),
        "lora_b": jax.ShapeDtypeStruct((4, 18), jnp.float32),
    }
    tx = loft_jax.loft(1e-3, second_moment="full", fused=True, move=move)
    state = jax.eval_shape(tx.init, params)
    texts = {
        platform: lowered(tx.update, platform, params, state, params)
        for platform in ("cpu", "tpu", "cuda")
    }
    found = {
        platform: [kernel for kernel in ("tpu_custom_call", "xla.gpu.triton") if kernel in text]
        for platform, text in texts.items()
    }
    assert found == {"cpu": [], "tpu": ["tpu_custom_call"], "cuda": ["xla.gpu.triton"]}


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="second_moment is 'factored', expected 'full'"):
        loft_jax.loft(1e-3, fused=True)
    tx = loft_jax.loft(1e-3, second_moment="full", fused=True)
    big = {"q": {"lora_a": jnp.ones((130, 129)), "lora_b": jnp.ones((129, 131))}}
    with pytest.raises(ValueError, match="the rank of q is 129, expected at most 128"):
        tx.init(big)
    small = {"q": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 3))}}
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: x.astype(jnp.float64), small)
        with pytest.raises(ValueError, match="of q is float64, expected float32"):
            tx.init(double)
    moments = loft_jax.calibrate_moments().update(small, loft_jax.calibrate_moments().init(small),
                                                  small)[0]  # fmt: skip
    link = loft_jax.project_updates(fused=True)
    with pytest.raises(ValueError, match="second_moment of q is 'factored', expected 'full'"):
        link.update(moments, link.init(small), small)
    mesh = jax.sharding.AbstractMesh((2,), ("fsdp",), axis_types=(AxisType.Auto,))
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(ValueError, match=r"the mesh in use is \{'fsdp': 2\}"),
    ):
        jax.eval_shape(tx.update, small, jax.eval_shape(tx.init, small), small)


def spread(kernel, mesh, rank_last, check):
    """The kernel under `shard_map`: layers over "x", rows over "y", columns over "z" and summed."""
    own = P(None, "x", "y", None) if rank_last else P(None, "x", None, "y")
    other = P(None, "x", None, "z") if rank_last else P(None, "x", "z", None)
    return jax.shard_map(
        lambda *given: jax.lax.psum(kernel(*given), "z"),
        mesh=mesh, in_specs=(own, own, other, P()), out_specs=own, check_vma=check,
    )  # fmt: skip


@pytest.mark.parametrize(("kernel", "platform"), [(on_tpu, "tpu"), (on_cuda, "cuda")])
def test_lowers_under_shard_map(kernel, platform):
    """With the types of shard_map checked, which interpreted kernels do not pass."""
    mesh = jax.sharding.AbstractMesh((2, 2, 2), ("x", "y", "z"), axis_types=(AxisType.Auto,) * 3)
    given = shapes(2, 64, 96, 4, True)
    jax.eval_shape(spread(kernel, mesh, True, True), *given)
    one = jax.sharding.AbstractMesh(
        (1, 1, 1), ("x", "y", "z"), axis_types=(AxisType.Auto,) * 3, abstract_device=CARD
    )
    assert "custom_call" in lowered(spread(kernel, one, True, True), platform, *given)


@pytest.mark.slow
def test_is_plain_jax_under_shard_map():
    """On 8 devices, in a process of their own: this module, run as a script."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, "-m", "tests.optim.test_fused_direction"],
        env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found) == 4
    assert max(found) < 1e-6


def main():
    mesh = jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=(AxisType.Auto,) * 3)
    found = []
    for rank_last in (True, False):
        given = arguments(2, 70, 130, 3, rank_last)
        for kernel in (on_tpu, on_cuda):
            call = spread(functools.partial(kernel, interpret=True), mesh, rank_last, False)
            x, expected = jax.jit(call)(*given[:3], numbers(given[3])), in_plain_jax(*given)
            found.append(float(jnp.abs(x - expected).max() / jnp.abs(expected).max()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
