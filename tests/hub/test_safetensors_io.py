import json

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loft_jax.errors import InputError
from loft_jax.hub import safetensors_io as module
from loft_jax.hub.safetensors_io import Safetensors, write_checkpoint, write_safetensors


@pytest.mark.parametrize(
    ("torch_dtype", "numpy_dtype"),
    [
        (torch.float32, np.float32),
        (torch.float16, np.float16),
        (torch.bfloat16, ml_dtypes.bfloat16),
    ],
)
def test_reads_what_torch_wrote(tmp_path, torch_dtype, numpy_dtype):
    tensor = torch.randn(3, 4).to(torch_dtype)
    save_file({"a.b": tensor}, tmp_path / "x.safetensors")
    file = Safetensors(tmp_path / "x.safetensors")
    assert file.shapes == {"a.b": (3, 4)}
    assert file.read("a.b").dtype == numpy_dtype
    np.testing.assert_array_equal(file.read("a.b").astype(np.float32), tensor.float().numpy())


def test_torch_reads_what_is_written(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensors = {"a": array.T, "b": array.astype(ml_dtypes.bfloat16)}  # one that is not contiguous
    write_safetensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(found["a"].numpy(), array.T)
    assert found["b"].dtype == torch.bfloat16
    np.testing.assert_array_equal(found["b"].float().numpy(), array)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_shards_hold_at_most_what_they_may(tmp_path):
    arrays = {f"t{number}": np.full((4, 4), number, np.float32) for number in range(5)}  # 64 bytes
    shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    write_checkpoint(tmp_path, shapes, iter(arrays.items()), max_shard_bytes=150)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    assert sorted(load_file(tmp_path / "model-00002-of-00003.safetensors")) == ["t2", "t3"]
    file = Safetensors(tmp_path / "model.safetensors.index.json")
    assert file.shapes == dict.fromkeys(arrays, (4, 4))
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.read(name), array)


def test_nothing_stays_when_writing_fails(tmp_path, monkeypatch):
    def fail(tensors, path, metadata):
        path_written.append(path)
        raise OSError("no space left")

    path_written = []
    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(InputError, match=r"x\.safetensors: cannot be written: no space"):
        write_safetensors(tmp_path / "x.safetensors", {"a": np.zeros(2, np.float32)})
    assert path_written
    assert not list(tmp_path.iterdir())


def damaged(folder, kind):
    path = folder / "x.safetensors"
    if kind == "missing":
        return path
    save_file({"a": torch.zeros(64), "n": torch.zeros(2, dtype=torch.int64)}, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    if kind == "garbage":
        path.write_bytes(b"not a safetensors file at all")
    if kind == "folder":
        path.unlink()
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", ["missing", "truncated", "garbage", "folder"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, kind):
    with pytest.raises(InputError, match=r"x\.safetensors"):
        Safetensors(damaged(tmp_path, kind))


def test_a_tensor_that_holds_no_floats_is_named(tmp_path):
    file = Safetensors(damaged(tmp_path, "none"))
    with pytest.raises(InputError, match=r"tensor 'n' is stored as I64"):
        file.read("n")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected an object"),
        ("{}", "weight_map"),
        (json.dumps({"weight_map": {"a": ["x"]}}), "weight_map['a'] is ['x'], expected a file"),
        (json.dumps({"weight_map": {"a": "gone.safetensors"}}), "gone.safetensors: no such file"),
        (json.dumps({"weight_map": {"b": "x.safetensors"}}), "holds tensor 'b', it does not"),
    ],
)
def test_an_index_that_is_wrong_is_refused(tmp_path, index, said):
    damaged(tmp_path, "none")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(index)
    with pytest.raises(InputError) as raised:
        Safetensors(path)
    assert said in str(raised.value)
