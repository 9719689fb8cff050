"""The import: a build that does not fit is refused by name, and a fitting one runs its kernels."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from test_threads_and_isa import run
from torch.profiler import ProfilerActivity, profile

import softmax_ext
from softmax_ext import _loader
from softmax_ext._in_graph import in_graph
from softmax_ext.functional import scores

FITTING = {"version": "1.0", "torch": "2.13.0+cpu", "cuda": None, "architectures": None}


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


def remedy() -> str:
    with pytest.raises(ImportError) as error:
        _loader.check({}, "2.13.0", None)
    command = re.search(r"pip install --no-build-isolation (.+)", str(error.value))
    assert command, error.value
    return command[1]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """site-packages with the metadata of an installation, and the loader as if it were there."""
    site = tmp_path / "site-packages"
    (site / "softmax_ext").mkdir(parents=True)
    (site / "softmax_ext-1.0.dist-info").mkdir()
    (site / "softmax_ext-1.0.dist-info" / "METADATA").write_text(
        "Name: softmax_ext\nVersion: 1.0\n"
    )
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(_loader, "_PACKAGE", site / "softmax_ext")
    return site


@pytest.mark.parametrize(
    ("origin", "named"),
    [
        ({"url": "file://{tmp}/check%20out", "dir_info": {}}, '"{tmp}/check out"'),
        ({"url": "file://{tmp}/sdist.tar.gz", "archive_info": {}}, '"{tmp}/sdist.tar.gz"'),
        ({"url": "https://host/x.git", "vcs_info": {"vcs": "git"}}, '"git+https://host/x.git"'),
        # What cannot be built from: a wheel, a folder that has gone, an installation that says
        # nothing, as one from an index.
        ({"url": "file://{tmp}/built.whl", "archive_info": {}}, "."),
        ({"url": "file://{tmp}/gone", "dir_info": {}}, "."),
        (None, "."),
    ],
)
def test_the_remedy_names_the_source_and_no_package_of_an_index(installed, tmp_path, origin, named):
    (tmp_path / "check out").mkdir()
    for name in ("sdist.tar.gz", "built.whl"):
        (tmp_path / name).touch()
    if origin is not None:
        origin = {**origin, "url": origin["url"].replace("{tmp}", str(tmp_path))}
        record = installed / "softmax_ext-1.0.dist-info" / "direct_url.json"
        record.write_text(json.dumps(origin))
    assert remedy() == named.replace("{tmp}", str(tmp_path))


def test_the_remedy_in_a_checkout_names_its_folder(installed, tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    (checkout / "softmax_ext").mkdir(parents=True)
    (checkout / "setup.py").touch()
    monkeypatch.setattr(_loader, "_PACKAGE", checkout / "softmax_ext")
    assert remedy() == f'-e "{checkout}"'


def test_a_checkout_that_hides_a_built_package_says_so(installed, tmp_path, monkeypatch):
    (installed / "softmax_ext" / "_build.json").write_text(json.dumps(FITTING))
    checkout = tmp_path / "checkout" / "softmax_ext"
    checkout.mkdir(parents=True)
    monkeypatch.setattr(_loader, "_PACKAGE", checkout)
    with pytest.raises(ImportError) as error:
        _loader.check({}, "2.13.0", None)
    hiding = f"has not been built in {checkout}, which hides the package built in {installed}"
    assert hiding in str(error.value)


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
    record = {**FITTING, "torch": torch.__version__}
    (package_copy / "_build.json").write_text(json.dumps(record))
    (package_copy / f"_C{EXTENSION_SUFFIXES[0]}").write_text("no library")
    result = import_copy(package_copy.parent)
    assert f"built for torch {torch.__version__}, could not be loaded" in result.stderr
    assert f"_C{EXTENSION_SUFFIXES[0]}: " in result.stderr  # what the linker says of it
    assert "pip install --no-build-isolation" in result.stderr


def test_what_the_library_refuses_itself_is_no_fault_of_the_build(package_copy):
    (package_copy / "_build.json").write_text(json.dumps({**FITTING, "torch": torch.__version__}))
    (package_copy / "_C.py").write_text("raise ImportError('NAME is \"x\"; it can be: y')")
    result = import_copy(package_copy.parent)
    assert result.stderr.endswith('ImportError: NAME is "x"; it can be: y\n')


def test_it_does_not_import_dynamo():
    """Which takes longer than torch."""
    process = run("import softmax_ext, sys; sys.exit('torch._dynamo' in sys.modules)")
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("function", [scores._above_0, in_graph(lambda x: x)])
def test_dynamo_knows_what_to_have_in_a_graph(function):
    import torch._dynamo

    assert type(torch._dynamo.__spec__.loader).__module__ != "softmax_ext._in_graph"
    assert torch._dynamo.trace_rules.is_callable_allowed(function)
    later = in_graph(lambda x: x)
    assert torch._dynamo.trace_rules.is_callable_allowed(later)


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
