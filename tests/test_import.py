"""The import: a build that does not fit is refused by name, and a fitting one runs its kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import softmax_ext
from softmax_ext import _loader

FITTING = {"torch": "2.13.0+cpu", "cuda": None, "architectures": None}


@pytest.mark.parametrize(
    ("record", "version", "cuda"),
    [
        (FITTING, "2.13.0+cpu", None),
        (FITTING, "2.13.1", "13.0"),  # patch releases share their binary interface
        ({**FITTING, "cuda": "13.0"}, "2.13.0", "13.2"),
    ],
)
def test_a_fitting_build_is_taken(record, version, cuda):
    _loader.check(record, version, cuda)


@pytest.mark.parametrize(
    ("record", "version", "cuda", "named"),
    [
        ({}, "2.13.0", None, ["has not been built", "2.13.0"]),
        (FITTING, "2.14.1", None, ["built for torch 2.13.0+cpu", "torch 2.14.1"]),
        ({**FITTING, "cuda": "13.0"}, "2.13.0+cpu", None, ["CUDA 13.0", "CUDA None"]),
        ({**FITTING, "cuda": "13.0"}, "2.13.0", "12.8", ["CUDA 13.0", "CUDA 12.8"]),
    ],
)
def test_another_build_is_refused_with_what_mends_it(record, version, cuda, named):
    with pytest.raises(ImportError) as error:
        _loader.check(record, version, cuda)
    for text in [*named, "pip install --no-build-isolation"]:
        assert text in str(error.value)


def import_copy(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", "import softmax_ext"],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    """The package without its compiled part."""
    package = tmp_path / "softmax_ext"
    package.mkdir()
    for source in Path(softmax_ext.__file__).parent.glob("*.py"):
        (package / source.name).write_text(source.read_text())
    return package


def test_a_missing_library_is_an_import_error(package_copy):
    result = import_copy(package_copy.parent)
    assert "ImportError: softmax_ext._C has not been built" in result.stderr
    assert torch.__version__ in result.stderr


def test_a_library_that_does_not_load_is_an_import_error(package_copy):
    record = {"torch": torch.__version__, "cuda": None, "architectures": None}
    (package_copy / "_build.json").write_text(json.dumps(record))
    (package_copy / "_C.py").write_text("raise ImportError('undefined symbol: _ZN2at5emptyE')")
    result = import_copy(package_copy.parent)
    assert f"built for torch {torch.__version__}, could not be loaded" in result.stderr
    assert "undefined symbol: _ZN2at5emptyE" in result.stderr
    assert "pip install --no-build-isolation" in result.stderr


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "softmin"])
def test_the_kernels_run_and_not_torchs(name, device):
    """Without this, a mistake in the choice between the two would show in nothing but the speed."""

    def operators(function):
        x = torch.randn(4, 33, device=device, requires_grad=True)
        with profile(activities=[ProfilerActivity.CPU]) as record:
            function(x, dim=1).sum().backward()
        return {event.key for event in record.key_averages()}

    def softmaxes(function):
        return {key for key in operators(function) if "softmax" in key and key.startswith("aten::")}

    assert softmaxes(getattr(torch.nn.functional, name))
    assert not softmaxes(getattr(softmax_ext, name))
