"""Where an adapter or a model is."""

import socket

import huggingface_hub
import pytest
from huggingface_hub.utils import HFValidationError, validate_repo_id

from merge_engine.errors import AdapterError, OutputError
from merge_engine.files import locate
from merge_engine.files.hub import check_push
from merge_engine.files.locate import is_hub_id
from merge_engine.formats.open import open_adapters


@pytest.mark.quick
@pytest.mark.parametrize(
    "source", ["user/repo", "User-1/r.e-p_o", "_user/_repo", "-user/repo", "user/-repo", "user/.repo"]
)
def test_a_hub_id_is_what_the_hub_takes_for_one(source):
    try:
        validate_repo_id(source)
    except HFValidationError:
        assert not is_hub_id(source)
    else:
        assert is_hub_id(source)


@pytest.mark.quick
def test_a_file_of_the_hub_is_in_its_repository(tmp_path, monkeypatch):
    (tmp_path / "repo" / "sub").mkdir(parents=True)
    for name in ("secret", "repo/a", "repo/sub/a"):
        (tmp_path / f"{name}.safetensors").touch()
    monkeypatch.setattr(locate, "_fetched", lambda *_: tmp_path / "repo")
    for name in ("a.safetensors", "sub/a.safetensors"):
        assert locate.find_file(f"user/repo:{name}", None, AdapterError) == tmp_path / "repo" / name
    for name in ("../secret.safetensors", "sub/../../secret.safetensors", f"{tmp_path}/secret.safetensors"):
        assert locate.find_file(f"user/repo:{name}", None, AdapterError) is None


def test_a_home_of_nobody_is_a_folder_that_does_not_exist():
    with pytest.raises(AdapterError, match=r"^~nobody_has_this_name/a does not exist, wanted a folder"):
        open_adapters(["~nobody_has_this_name/a"])


def test_a_hub_that_does_not_answer(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(locate, "PATIENCE", 0.3)
        real = huggingface_hub.HfApi
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda **options: real(endpoint=address, **options))
        with pytest.raises(AdapterError, match=r"^user/repo is no local folder .*: it has not answered in 0\.3 s$"):
            open_adapters(["user/repo"])
        with pytest.raises(OutputError, match=r"^push: the hub does not say who asks: it has not answered in 0\.3 s$"):
            check_push("user/repo", token="hf_x")
