import jax
import pytest

from loft_jax.errors import InputError
from loft_jax.training.distributed import check_alike, is_of_another_process


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


def test_what_one_process_alone_has_is_a_difference_on_every_one():
    check_alike([{"rank": 8, "pattern": {"q": 4}}] * 3)
    for found, told in (
        ([{"a": 1}, {"a": 1, "b": 2}], "b is None on process 0 and 2 on process 1; expected the"),
        ([{"a": 1}, {"a": 1}, {}], "a is 1 on process 0 and None on process 2"),
    ):
        with pytest.raises(InputError, match=told):
            check_alike(found)
