import pytest

from tests.tiny import save_tiny_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A folder with a random Llama, as transformers writes it."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")
