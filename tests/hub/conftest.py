import pytest

from loft_jax.hub import save_peft_adapter
from loft_jax.hub.pretrained import load_pretrained
from tests.hub.peft_adapters import adapted_llama, save_torch_llama
from tests.tiny import save_tiny_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A folder with a random Llama, as transformers writes it."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """A folder with a random Llama whose weights are large, so that every adapter shows."""
    folder = tmp_path_factory.mktemp("llama")
    save_torch_llama(folder)
    return folder


@pytest.fixture(scope="module")
def base(llama_folder):
    """The Llama of `llama_folder`, without adapters."""
    return load_pretrained(llama_folder)


@pytest.fixture(scope="session")
def good_adapter(llama_folder, tmp_path_factory):
    """A folder with an adapter on q_proj and o_proj of the Llama of `llama_folder`."""
    folder = tmp_path_factory.mktemp("adapter")
    save_peft_adapter(folder, adapted_llama(llama_folder, target_modules=["q_proj", "o_proj"]))
    return folder
