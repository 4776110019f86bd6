"""Files of an adapter that are missing, unreadable, or written in part."""

import shutil

import pytest

from loft_jax.errors import InputError
from loft_jax.hub import load_peft_adapter, save_peft_adapter
from tests.hub.peft_adapters import CONFIG, WEIGHTS, adapted_llama, assert_same_files


def refused(folder, base, message):
    with pytest.raises(InputError, match=message):
        load_peft_adapter(folder, base)


def test_a_missing_folder(base, tmp_path):
    refused(tmp_path / "nowhere", base, "no such folder")


def test_an_empty_folder(base, tmp_path):
    refused(tmp_path, base, CONFIG)


def test_a_configuration_without_weights(base, good_adapter, tmp_path):
    shutil.copy(good_adapter / CONFIG, tmp_path)
    refused(tmp_path, base, WEIGHTS)


def test_weights_in_a_pickle(base, good_adapter, tmp_path):
    shutil.copy(good_adapter / CONFIG, tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    refused(tmp_path, base, r"holds adapter_model\.bin")


def test_weights_that_are_cut_off(base, good_adapter, tmp_path):
    shutil.copy(good_adapter / CONFIG, tmp_path)
    (tmp_path / WEIGHTS).write_bytes((good_adapter / WEIGHTS).read_bytes()[:100])
    refused(tmp_path, base, WEIGHTS)


def test_a_configuration_that_is_cut_off(base, good_adapter, tmp_path):
    shutil.copy(good_adapter / WEIGHTS, tmp_path)
    (tmp_path / CONFIG).write_text("{")
    refused(tmp_path, base, CONFIG)


def test_a_file_in_the_place_of_the_folder(llama_folder, tmp_path):
    (tmp_path / "adapter").write_text("{")
    with pytest.raises(InputError, match="cannot write"):
        save_peft_adapter(tmp_path / "adapter", adapted_llama(llama_folder))


def test_an_interrupted_save_leaves_no_adapter(llama_folder, good_adapter, tmp_path, monkeypatch):
    shutil.copytree(good_adapter, tmp_path, dirs_exist_ok=True)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("loft_jax.hub.safetensors_io.os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        save_peft_adapter(tmp_path, adapted_llama(llama_folder))
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]
    assert_same_files(tmp_path, good_adapter)
