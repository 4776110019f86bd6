"""Where compiled programs are kept, and whose settings count."""

import jax
import pytest

from loft_jax.cli.compilation_cache import keep_compiled_programs


@pytest.fixture
def unset(monkeypatch, tmp_path):
    """JAX as it is where nobody has set a cache."""
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    names += ("jax_enable_compilation_cache",)
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", True)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_a_folder_of_the_user(unset):
    folder = keep_compiled_programs()
    assert folder.is_relative_to(unset / "loft_jax" / "programs")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_compilation_cache_max_size == 2**31


def test_the_users_settings_count(unset, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    assert keep_compiled_programs() is None
    assert jax.config.jax_compilation_cache_dir == "/elsewhere"
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    assert keep_compiled_programs() is None
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    jax.config.update("jax_enable_compilation_cache", False)
    assert keep_compiled_programs() is None
    jax.config.update("jax_enable_compilation_cache", True)
    assert not (unset / "loft_jax").exists()


def test_processes_of_one_run_have_none(unset, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert keep_compiled_programs() is None


def test_a_folder_that_others_can_write_to_is_not_used(unset, monkeypatch):
    folder = keep_compiled_programs()
    jax.config.update("jax_compilation_cache_dir", None)
    folder.chmod(0o777)
    assert keep_compiled_programs() is None
    assert jax.config.jax_compilation_cache_dir is None
    folder.parent.rename(unset / "before")
    folder.parent.touch()  # a file in its place
    assert keep_compiled_programs() is None
