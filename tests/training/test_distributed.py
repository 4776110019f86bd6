import jax
import pytest

from loft_jax.training.distributed import is_of_another_process


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (jax.errors.JaxRuntimeError("UNAVAILABLE: the coordinator is gone"), True),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
        (ValueError("Gloo is no name of a connection"), False),
        (OSError("UNAVAILABLE: Connection reset by peer"), False),
    ],
)
def test_errors_by_the_end_of_another_process(error, expected):
    """With the types and texts that JAX gives those of its runtime."""
    assert is_of_another_process(error) is expected
