import socket

import datasets
import huggingface_hub
import pytest

from loft_jax.data import log_once


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets_cache"))
    )
    datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def nothing_told_before():
    log_once._logged.clear()


@pytest.fixture
def no_network(monkeypatch):
    """No connection is asked for, though the libraries are told that there is a network."""
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("a local path reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield
    assert not asked
