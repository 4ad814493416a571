"""Facts about the machine are found when asked for, and importing finds none."""

import logging
import math
import subprocess
import sys

import pytest
import torch

from dilated_attention_pytorch import core
from dilated_attention_pytorch.backends.kernel import is_installed
from dilated_attention_pytorch.core import constants


def test_importing_the_front_desk_probes_nothing():
    script = (
        "import sys, torch, importlib.util as u\n"
        "def never(*a): raise AssertionError('probed')\n"
        "torch.cuda.is_available = torch.cuda.get_device_name = torch.cuda.device_count = never\n"
        "import dilated_attention_pytorch.core as c\n"
        "from dilated_attention_pytorch.core import constants, GPU_TYPE, config, base, factory, presets\n"
        "c.HAS_SDPA, c.HAS_XFORMERS\n"
        "assert not {'flash_attn', 'xformers', 'deepspeed', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_is_installed_is_told_without_importing_it(monkeypatch):
    for name, package in (
        ("FLASH_ATTN", "flash_attn"),
        ("FLASH_ATTN_3", "flash_attn_interface"),
        ("XFORMERS", "xformers"),
        ("TRITON", "triton"),
        ("DEEPSPEED", "deepspeed"),
        ("FAIRSCALE", "fairscale"),
        ("APEX", "apex"),
    ):
        assert getattr(core, f"HAS_{name}") is is_installed(package)
    monkeypatch.setattr(constants, "is_installed", lambda package: package == "xformers")
    assert core.HAS_XFORMERS is True
    assert core.HAS_FLASH_ATTN is False
    assert core.HAS_SDPA is core.HAS_SDPA_KERNEL is True
    major, minor = core.TORCH_VERSION
    assert torch.__version__.startswith(f"{major}.{minor}")
    assert (core.TRITON_VERSION is None) == (not is_installed("triton"))
    versions = ("FLASH_ATTN", "XFORMERS", "DEEPSPEED", "FAIRSCALE", "APEX")
    monkeypatch.setattr("importlib.metadata.version", lambda package: f"1 of {package}")
    assert [getattr(core, f"{name}_VERSION") for name in versions][:2] == ["1 of flash_attn", "1 of xformers"]
    for module in (core, constants):
        with pytest.raises(AttributeError, match="HAS_NOTHING"):
            module.HAS_NOTHING  # noqa: B018


def test_every_name_of_the_front_desk_is_there():
    for name in core.__all__:
        assert getattr(core, name) is not None or name.endswith("_VERSION"), name
    assert dir(core) == sorted(core._LATER)
    assert sorted(core.__all__) == sorted(core._LATER)
    assert set(constants.LAZY) <= set(dir(constants))


@pytest.mark.parametrize(
    ("device", "family"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("AMD Instinct MI300X", "amd_instinct"), ("Tesla T4", "generic_cuda")],
)
def test_the_gpu_s_family_is_read_from_its_name(device, family, monkeypatch, caplog):
    assert constants.gpu_type_of(device) == family
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: device)
    core.detect_gpu_type.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert core.GPU_TYPE == family  # noqa: SIM300
            assert core.GPU_TYPE in {family}
            assert f"{core.GPU_TYPE} {core.GPU_TYPE!r}" == f"{family} {family!r}"
            assert core.detect_gpu_type() == family
        assert len(caplog.records) == 1  # looked up once, and logged
    finally:
        core.detect_gpu_type.cache_clear()


def test_settings_are_facts_by_the_old_keys(monkeypatch):
    assert core.get_current_optimal_settings() == core.CURRENT_OPTIMAL_SETTINGS
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert core.get_current_optimal_settings() == {
        "use_flash_attn": False,
        "use_tf32": False,
        "block_size": 128,
        "max_seq_len": math.inf,
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.setattr(constants, "is_installed", lambda package: package == "flash_attn")
    settings = core.get_current_optimal_settings()
    assert (settings["use_flash_attn"], settings["use_tf32"]) == (True, torch.version.hip is None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    assert core.get_current_optimal_settings()["use_flash_attn"] is False
