import pytest

from loft_jax.errors import InputError
from loft_jax.hub.repository import open_repository, push_folder
from tests.hub.hub_server import hub_server


@pytest.fixture
def hub(monkeypatch):
    with hub_server(monkeypatch) as hub:
        yield hub


def test_a_new_repository_is_private_and_gets_the_files(hub, tmp_path):
    (tmp_path / "README.md").write_text("# x\n")
    (tmp_path / "adapter_config.json").write_text("{}\n")
    (tmp_path / ".adapter.partial").write_text("cut off")
    open_repository("org/name")
    assert [hub.created[0][key] for key in ("organization", "name")] == ["org", "name"]
    assert hub.created[0].get("private") or hub.created[0].get("visibility") == "private"
    push_folder(tmp_path, "org/name")
    assert hub.files == {"org/name/README.md": b"# x\n", "org/name/adapter_config.json": b"{}\n"}


def test_a_repository_that_cannot_be_written_to_is_refused_at_once(hub):
    hub.forbidden = ("org/name",)
    with pytest.raises(InputError, match="org/name: the Hugging Face hub gives no repository"):
        open_repository("org/name")


def test_a_failed_upload_says_how_to_try_again(hub, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("# x\n")
    monkeypatch.setattr(hub, "reply", lambda *_: (400, {}))
    with pytest.raises(InputError) as raised:
        push_folder(tmp_path, "org/name")
    assert f"not uploaded; `hf upload org/name {tmp_path}` tries again" in str(raised.value)


def test_without_a_network_the_run_does_not_start():
    with pytest.raises(InputError, match=r"org/name: the Hugging Face hub gives no .*offline mode"):
        open_repository("org/name")
