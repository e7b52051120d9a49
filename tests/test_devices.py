"""Devices and dtypes by torch's names, where this machine has a CPU alone."""

import platform
import shutil

import pytest
import torch

from qzo_diffusion import devices
from qzo_diffusion.core.errors import ConfigError
from qzo_diffusion.core.precision import where_float64_is
from qzo_diffusion.quant.available import bitsandbytes_problem
from qzo_diffusion.runs.style import doctor

CPU = torch.device("cpu")


@pytest.fixture
def no_gpu():
    if torch.cuda.is_available():
        pytest.skip("of a machine without a GPU")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", ["cuda", "cuda:7", "xpu", "mps", "meta", "tpu"])
def test_a_device_that_is_not_here_is_refused_and_the_names_are_told(name):
    with pytest.raises(ConfigError) as error:
        devices.choose_device(name)
    assert error.value.expected == "auto, cpu, cuda, xpu or mps"


@pytest.mark.parametrize(
    ("kind", "dtype", "native", "told"),
    [
        ("cuda", torch.bfloat16, False, "float16"),
        ("cuda", torch.bfloat16, True, None),
        ("cuda", torch.float16, False, None),
        ("cpu", torch.bfloat16, False, "float32"),
        ("cpu", torch.bfloat16, True, None),
        ("cpu", torch.float32, False, None),
    ],
)
def test_a_dtype_that_a_device_emulates_is_told(monkeypatch, kind, dtype, native, told):
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: native)
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    capability = "AVX512" if native else "AVX2"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    found = devices.slow_dtype(dtype, torch.device(kind))
    assert (found is None) if told is None else f"compute.dtype={told}" in found


@pytest.mark.parametrize("driver", [True, False])
def test_a_card_that_torch_does_not_see_is_told(monkeypatch, train, capsys, driver):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/nvidia-smi" if driver else None)
    assert train("--dry-run") == 0
    assert ("warning: a driver of NVIDIA is here" in capsys.readouterr().err) == driver
    assert any("sees no GPU" in one for one in doctor.examine()["problems"]) == driver


def test_devices_that_were_never_run_are_not_chosen_but_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.choose_device("auto") == CPU
    assert "mps" in devices.others()


@pytest.mark.parametrize(("has", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_without_bfloat16_runs_in_float16(monkeypatch, has, dtype):
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: has)
    assert devices.choose_dtype("auto", torch.device("cuda")) == dtype
    assert devices.choose_dtype("auto", CPU) == torch.float32
    assert devices.choose_dtype("float16", CPU) == torch.float16


class AppleTensor:
    device = torch.device("mps")

    def cpu(self):
        return torch.ones(2)


def test_what_needs_float64_goes_to_the_cpu_where_a_device_has_none():
    assert where_float64_is(AppleTensor()).device == CPU
    own = torch.ones(2)
    assert where_float64_is(own) is own


def test_bitsandbytes_is_asked_for_its_devices():
    assert bitsandbytes_problem(CPU) is None
    assert "vulkan" in bitsandbytes_problem(torch.device("vulkan"))
