"""setup.py: what it decides from torch, the compilers and the memory, and the metadata it gives."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from setuptools._distutils.unixccompiler import UnixCCompiler

ROOT = Path(__file__).resolve().parent.parent
GIB = 1 << 30


@pytest.fixture(scope="module")
def setup():
    """setup.py as a module, with nothing built."""
    spec = importlib.util.spec_from_file_location("softmax_ext_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"), mock.patch.dict(os.environ):
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", ["1.13.1", "2.9.0", "2.10.1+cpu"])
def test_an_older_torch_is_refused(setup, version):
    with pytest.raises(SystemExit, match=f"torch {version.replace('+', '.')} was found.*2.11"):
        setup.check_torch(version)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.15.1+cu132", "2.15.0a0+git1"])
def test_a_torch_that_was_tried_is_taken(setup, version):
    assert setup.check_torch(version) is None


@pytest.mark.parametrize("version", ["2.16.0", "2.100.0a0+git1", "3.0.0"])
def test_a_newer_torch_is_a_warning_that_can_be_silenced(setup, version, monkeypatch):
    warning = setup.check_torch(version)
    assert version in warning
    assert "2.15" in warning
    assert "SOFTMAX_EXT_UNTRIED_TORCH" in warning
    monkeypatch.setenv("SOFTMAX_EXT_UNTRIED_TORCH", "1")
    assert setup.check_torch(version) is None


@pytest.mark.parametrize(
    ("version", "cuda", "local"),
    [
        ("2.13.0+cpu", None, "torch2.13.cpu"),
        ("2.14.1+cu130", "13.0", "torch2.14.cu130"),
        ("2.14.1+cu130", None, "torch2.14.cpu"),  # a CUDA torch, and no nvcc
        ("2.16.0a0+git1", "12.8", "torch2.16.cu128"),
    ],
)
def test_a_build_says_and_requires_the_torch_that_it_is_for(setup, version, cuda, local):
    built = Version(setup.build_version(version, cuda))
    assert (built.public, built.local) == (setup.VERSION, local)
    required = Requirement(setup.build_requirement(version))
    major, minor = version.split(".")[:2]
    assert required.specifier.contains(version, prereleases=True)
    assert required.specifier.contains(f"{major}.{minor}.7+cu999")
    for other in (f"{major}.{int(minor) - 1}.9", f"{major}.{int(minor) + 1}.0", "3.0.0"):
        assert not required.specifier.contains(other)


@pytest.mark.parametrize(("label", "suffix"), [("", ""), ("lab.1", "+lab.1")])
def test_another_label_of_a_build(setup, monkeypatch, label, suffix):
    monkeypatch.setenv("SOFTMAX_EXT_LOCAL_VERSION", label)
    assert setup.build_version("2.13.0", None) == setup.VERSION + suffix


def metadata(text: str) -> tuple[str, list[str]]:
    """The version, and the requirements without the extras."""
    fields = [line.split(": ", 1) for line in text.split("\n\n")[0].splitlines() if ": " in line]
    required = [value for key, value in fields if key == "Requires-Dist" and "extra" not in value]
    return next(value for key, value in fields if key == "Version"), required


FOLDERS = (".ci", "benchmarks", "csrc", "docs", "examples", "softmax_ext", "tests")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "LICENSE", ".clang-format")
FILES += ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """This checkout, as neither git nor a build has left more in it."""
    made = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=made)
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_metadata(setup, checkout):
    """An sdist takes every torch that is supported; a build is for one, also after an sdist. The
    sdist has all files, a wheel those of the package."""
    (checkout / "wheel").mkdir()
    (checkout / "softmax_ext" / "_build.json").write_text("{}")  # as a build in place leaves it
    command = ["setup.py", "-q", "build_py", "--build-lib", "installed"]
    command += ["sdist", "dist_info", "--output-dir", "wheel"]
    subprocess.run([sys.executable, *command], cwd=checkout, check=True, capture_output=True)
    (file,) = (checkout / "wheel").glob("softmax_ext-*.dist-info/METADATA")
    assert metadata(file.read_text()) == (
        setup.build_version(torch.__version__, setup.CUDA),
        [setup.build_requirement(torch.__version__)],
    )

    (sdist,) = (checkout / "dist").iterdir()
    top = f"softmax_ext-{setup.VERSION}"
    assert sdist.name == f"{top}.tar.gz"
    with tarfile.open(sdist) as tar:
        assert metadata(tar.extractfile(f"{top}/PKG-INFO").read().decode()) == (
            setup.VERSION,
            ["torch>=2.11"],
        )
        names = {name.removeprefix(f"{top}/") for name in tar.getnames()}
    files = [path for name in FOLDERS for path in (checkout / name).rglob("*") if path.is_file()]
    wanted = {*FILES, *(str(path.relative_to(checkout)) for path in files)}
    assert wanted - names == {"softmax_ext/_build.json"}

    installed = [path for path in (checkout / "installed").rglob("*") if path.is_file()]
    folders = {str(path.parent.relative_to(checkout / "installed")) for path in installed}
    assert folders == {"softmax_ext", "softmax_ext/functional", "softmax_ext/modules"}
    assert {path.suffix for path in installed} == {".py", ".pyi", ".typed", ".json"}


@pytest.mark.parametrize(
    ("cores", "memory", "jobs"),
    [
        (8, None, 8),
        (8, 100 * GIB, 8),
        (8, 9 * GIB, 3),
        (8, 9 * GIB - 1, 2),
        (8, GIB, 1),
    ],
)
def test_jobs_by_cores_and_memory(setup, cores, memory, jobs):
    assert setup.max_jobs(cores, memory) == jobs


@pytest.mark.parametrize("jobs", ["many", "0", "-1", ""])
def test_jobs_that_are_no_number_are_named(setup, monkeypatch, jobs):
    monkeypatch.setenv("MAX_JOBS", jobs)
    with pytest.raises(SystemExit, match=f"MAX_JOBS is {jobs!r}"):
        setup.wanted_jobs(2)


MEMINFO = "MemTotal:  24000000 kB\nMemFree:  700000 kB\nMemAvailable:  20971520 kB\n"


@pytest.mark.parametrize(
    ("files", "bytes"),
    [
        ({"proc/meminfo": MEMINFO}, 20 * GIB),
        ({"proc/meminfo": MEMINFO, "sys/fs/cgroup/memory.max": "max\n"}, 20 * GIB),
        ({"proc/meminfo": MEMINFO, "sys/fs/cgroup/memory.max": f"{8 * GIB}\n"}, 8 * GIB),
        (
            {
                "proc/meminfo": MEMINFO,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
            },
            4 * GIB,
        ),
        ({}, None),
    ],
    ids=["free and caches", "no limit", "limit", "limit, cgroup 1", "unknown"],
)
def test_available_memory(setup, tmp_path, files, bytes):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert setup.available_memory(tmp_path) == bytes


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, ["c++"]),
        ("", ["c++"]),
        ("env c++", ["env", "c++"]),
        ("env LC_ALL=C c++ -DX='a b'", ["env", "LC_ALL=C", "c++", "-DX=a b"]),
    ],
)
def test_the_words_of_a_compiler(setup, monkeypatch, value, words):
    monkeypatch.delenv("CXX", raising=False)
    if value is not None:
        monkeypatch.setenv("CXX", value)
    assert setup.compiler("CXX", "c++", "c++") == words


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("no-such-compiler", "No such file"),
        ("env no-such-compiler", "status 127"),
        ("false", "status 1"),
        ("c++ -no-such-option", "no-such-option"),
        ("c++ 'unclosed", "No closing quotation"),
    ],
)
def test_a_compiler_that_does_not_run_is_named(setup, monkeypatch, value, said):
    monkeypatch.setenv("CXX", value)
    with pytest.raises(SystemExit) as error:
        setup.compiler("CXX", "c++", "c++")
    for text in (f'CXX="{value}"', said, "name yours in CXX"):
        assert text in str(error.value)


@pytest.mark.parametrize(("with_cuda", "options"), [(False, []), (True, ["-ccbin=gcc"])])
def test_several_words_reach_the_kernels_and_nvcc(setup, monkeypatch, tmp_path, with_cuda, options):
    monkeypatch.setenv("CXX", "env g++")
    monkeypatch.setenv("CC", "env gcc -m64")
    monkeypatch.setenv("TORCH_DONT_CHECK_COMPILER_ABI", "")
    monkeypatch.setattr(setup, "WITH_CUDA", with_cuda)
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.setattr(setup, "compiler", lambda name, *_: os.environ[name].split())
    arguments = {"nvcc": []}
    extension = SimpleNamespace(extra_compile_args=arguments)
    build = SimpleNamespace(extensions=[extension], compiler=UnixCCompiler())
    build.compiler.set_executable("compiler_so", "env gcc -m64 -O2 -fPIC")
    setup.BuildExt.check_compilers(build)
    assert arguments["nvcc"] == options
    assert build.compiler.compiler_so[1:] == ["-O2", "-fPIC"]
    assert os.environ["TORCH_DONT_CHECK_COMPILER_ABI"] == "1"
    with mock.patch("subprocess.run") as run:
        setup.BuildExt.compile_kernels(build, ("baseline", "softmax_forward"))
    assert run.call_args.args[0][:2] == ["env", "g++"]


def test_translation_units(setup, tmp_path):
    """Each source is in one of them; those of csrc/torch by the first words of their names."""
    torch_files = ["module.cpp", "losses.cpp", "losses_library.cpp", "tensors.cpp"]
    sources = ["csrc/cpu/isa.cpp", "csrc/cuda/losses_float32.cu"]
    sources += [f"csrc/torch/{file}" for file in torch_files]
    folder = tmp_path / "build" / "units"
    units = setup.translation_units(sources, folder)
    assert units == {
        "csrc/cpu/isa.cpp": ["csrc/cpu/isa.cpp"],
        "csrc/cuda/losses_float32.cu": ["csrc/cuda/losses_float32.cu"],
        str(folder / "others.cpp"): ["csrc/torch/module.cpp", "csrc/torch/tensors.cpp"],
        str(folder / "losses.cpp"): ["csrc/torch/losses.cpp", "csrc/torch/losses_library.cpp"],
    }
    for unit, files in units.items():
        if unit not in sources:
            included = re.findall(r'^#include "(.+)"$', Path(unit).read_text(), re.MULTILINE)
            assert [(folder / file).resolve() for file in included] == [
                Path(file).resolve() for file in files
            ]
    written = (folder / "losses.cpp").stat().st_mtime_ns
    setup.translation_units(sources, folder)
    assert (folder / "losses.cpp").stat().st_mtime_ns == written, "nothing to compile again"


def test_no_ninja_beside_what_it_left(setup, monkeypatch, tmp_path):
    """compile_commands.json, for editors, then has what ninja need not be asked for."""
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    (tmp_path / "build.ninja").touch()
    build = SimpleNamespace(use_ninja=False, build_temp=str(tmp_path))
    with mock.patch("subprocess.run", side_effect=FileNotFoundError):
        setup.BuildExt.write_compile_commands(build, [{"file": "kernels.cpp"}], {})
    assert "kernels.cpp" in (tmp_path / "compile_commands.json").read_text()


def make(*arguments: str) -> str:
    """What `make` prints, with the variables of no other make."""
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    command = ["make", "-C", str(ROOT), "--no-print-directory", *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_alone_prints_the_targets():
    printed = make()
    for target in ("demo", "test", "bench", "gpu-check", "lint", "format", "debug", "clean"):
        assert f"make {target} " in printed


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(("target", "extras"), [("demo", "[demo]"), ("test", "[test,demo]")])
def test_a_target_installs_what_it_needs(setup, tmp_path, target, extras):
    printed = make("-n", target, f"VENV={tmp_path}")
    assert f'"torch>={setup.dotted(setup.OLDEST_TORCH)}"' in printed
    assert printed.count(' -e ".') == 1
    assert f' -e ".{extras}"' in printed


def test_instruction_sets_by_choice(setup, monkeypatch):
    known = setup.X86_ISAS
    monkeypatch.delenv("SOFTMAX_EXT_ISAS", raising=False)
    assert setup.wanted_isas(known) == known
    monkeypatch.setenv("SOFTMAX_EXT_ISAS", "avx512 baseline")
    assert list(setup.wanted_isas(known)) == ["baseline", "avx512"]
    monkeypatch.setenv("SOFTMAX_EXT_ISAS", "avx2 sse9")
    with pytest.raises(SystemExit, match=r"SOFTMAX_EXT_ISAS names sse9; .* baseline, avx2, avx512"):
        setup.wanted_isas(known)
