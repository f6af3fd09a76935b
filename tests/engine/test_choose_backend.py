"""Which backend merges, and why."""

import builtins
import sys

import pytest
import torch
from plain_adapters import save_three
from pretended_gpus import pretend_gpus

from merge_engine.cli.main import main
from merge_engine.engine.choose_backend import VARIABLE, choose, triton_device
from merge_engine.engine.cpu_backend import TorchBackend
from merge_engine.errors import RecipeError

pytest.importorskip("triton")
HAS_GPU = torch.cuda.is_available()


@pytest.mark.quick
def test_auto_takes_triton_on_a_gpu_only(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert choose().name == choose("auto").name == ("triton" if HAS_GPU else "torch")
    assert choose("torch").name == "torch" and choose("triton").name == "triton"
    monkeypatch.setenv(VARIABLE, "triton")
    assert choose().name == "triton"
    assert choose("torch").name == "torch"
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(RecipeError, match=r"^backend: wanted one of auto, triton, torch, got 'cuda'$"):
        choose()


@pytest.mark.skipif(HAS_GPU, reason="triton runs here")
def test_triton_asked_for_by_name_where_it_cannot_run(monkeypatch, tmp_path, capsys):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert isinstance(choose("auto"), TorchBackend)
    code = main(["merge", *map(str, save_three(tmp_path)), "-o", str(tmp_path / "out"), "--backend", "triton"])
    assert code == 2
    reason = f"triton {triton.__version__} sees no CUDA or ROCm device"
    assert capsys.readouterr().err == f"merge-engine: error: --backend: triton cannot run here: {reason}\n"
    assert not (tmp_path / "out").exists()


def test_without_triton(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **options):
        if name == "triton":
            raise ImportError("No module named 'triton'")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert choose("auto").name == "torch"
    with pytest.raises(RecipeError, match=r"triton cannot be imported \(No module named 'triton'\)$"):
        choose("triton")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("gpus", "current", "local", "want"),
    [
        (4, 0, None, 0),  # no torchrun
        (4, 2, None, 2),
        (4, 0, 0, 0),
        (4, 0, 3, 3),
        (2, 0, 5, 1),  # more processes than GPUs
        (1, 0, 3, 0),  # as where each process sees but its own GPU
        (4, 2, 3, 2),  # the caller's choice stands
    ],
)
def test_every_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch, gpus, current, local, want):
    pretend_gpus(monkeypatch, gpus, current, local)
    device, reason = triton_device()
    assert device == torch.device("cuda", want) and reason.endswith(f" on GPU {want}")


@pytest.mark.parametrize(("capability", "arch"), [((7, 5), "sm_75"), ((7, 0), "sm_70")])
def test_a_gpu_that_the_kernels_have_no_launch_for_merges_by_torch(monkeypatch, capability, arch):
    pretend_gpus(monkeypatch, 1, 0, None, capability)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert choose().name == "torch"
    with pytest.raises(RecipeError, match=rf"the kernels have no launch for {arch}: wanted sm_80 or later, or gfx9"):
        choose("triton")


def test_which_gpus_the_kernels_have_a_launch_for():
    from merge_engine.kernels.launch import has_launch

    assert all(map(has_launch, ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "cpu")))
    assert not any(map(has_launch, ("sm_75", "gfx1100", "gfx1201")))


@pytest.mark.skipif(HAS_GPU, reason="triton is imported here")
def test_without_a_gpu_triton_is_not_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert choose().name == "torch"
    assert triton_device()[1].endswith("sees no CUDA or ROCm device")
    assert "triton" not in sys.modules
