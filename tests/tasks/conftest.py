import pytest

from loft_jax.hub.pretrained import load_pretrained
from tests.tiny import save_tiny_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A random Llama: the folder transformers wrote, and the model loaded from it."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")
    return folder, load_pretrained(folder)
