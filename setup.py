"""Builds softmax_ext._C: the CPU kernels always, the CUDA kernels where they can be.

Environment:
    FORCE_CUDA=1           build the CUDA kernels, or fail saying what is missing
    FORCE_CPU=1            do not build them
    TORCH_CUDA_ARCH_LIST   the GPU architectures, as for any torch extension
    MAX_JOBS               parallel compiler runs; by default as many as cores and memory allow
    SOFTMAX_EXT_DEBUG=1    -O1 with address and undefined-behaviour sanitizers; warnings are errors
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import setup


def set_cuda_home() -> None:
    """Names the toolkit of the nvcc on the PATH, where that is a wrapper in another folder."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or "CUDA_HOME" in os.environ or "CUDA_PATH" in os.environ:
        return
    if (Path(nvcc).resolve().parent.parent / "include" / "cuda_runtime.h").exists():
        return
    trace = subprocess.run([nvcc, "-dryrun", "-E", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", trace, re.MULTILINE)
    if top:
        os.environ["CUDA_HOME"] = str(Path(top.group(1)).resolve())


set_cuda_home()  # before torch looks for it
try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit(
        "softmax_ext is compiled against the torch that it will run with, and none is installed "
        "for this build.\nInstall torch, then build without isolation:\n"
        "    pip install torch setuptools wheel ninja pybind11\n"
        "    pip install --no-build-isolation ."
    )

ROOT = Path(__file__).resolve().parent
INCLUDE = ROOT / "csrc" / "include"
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
GIB_PER_JOB = 3
SUPPORTED_TORCH = ((2, 11), (2, 14))  # as in pyproject.toml

# The CPU kernels are compiled once for each instruction set; which one runs is decided at import.
X86_ISAS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c"]
    + [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")],
}
# g++ warns about its own intrinsics' headers (GCC bug 105593) and about vector types' ABI, which
# nothing outside the file sees.
ISA_WARNINGS = ["-Wno-psabi", "-Wno-ignored-attributes", "-Wno-maybe-uninitialized"]
ISA_WARNINGS += ["-Wno-uninitialized"]


def say(message: str) -> None:
    print(f"softmax_ext: {message}", flush=True)


def flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() in ("1", "on", "true", "yes")


def check_torch() -> None:
    """Exits if the torch found is not one that pip would leave in place."""
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    low, high = (".".join(map(str, version)) for version in SUPPORTED_TORCH)
    if not SUPPORTED_TORCH[0] <= found <= SUPPORTED_TORCH[1]:
        sys.exit(
            f"softmax_ext: torch {torch.__version__} was found; torch {low} to {high} are "
            f"supported. Install one of them: pip install 'torch~={high}.0'"
        )


def nvcc_version() -> str | None:
    """The version of the nvcc that torch would use, or None."""
    home = cpp_extension.CUDA_HOME
    nvcc = Path(home) / "bin" / "nvcc" if home else None
    if nvcc is None or not nvcc.exists():
        return None
    text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match.group(1) if match else None


def decide_cuda() -> bool:
    """Whether to build for CUDA. Prints why; exits if FORCE_CUDA cannot be met."""
    if flag("FORCE_CPU") and flag("FORCE_CUDA"):
        sys.exit("softmax_ext: FORCE_CPU and FORCE_CUDA are both set; set one of them")
    if flag("FORCE_CPU"):
        say("CPU only, as FORCE_CPU asks")
        return False
    wanted, found = torch.version.cuda, nvcc_version()
    if wanted is None:
        missing = f"torch {torch.__version__} is not a CUDA build; install one that is"
    elif found is None:
        missing = (
            f"torch {torch.__version__} wants CUDA {wanted}, and no nvcc was found; install the "
            "CUDA toolkit, or name its folder in CUDA_HOME"
        )
    elif found.split(".")[0] != wanted.split(".")[0]:
        missing = (
            f"torch {torch.__version__} wants CUDA {wanted}, and {cpp_extension.CUDA_HOME} has "
            f"nvcc {found}; install CUDA {wanted.split('.')[0]}, or name its folder in CUDA_HOME"
        )
    else:
        say(f"CPU and CUDA: torch {torch.__version__} (CUDA {wanted}), nvcc {found}")
        return True
    if flag("FORCE_CUDA"):
        sys.exit(f"softmax_ext: FORCE_CUDA cannot be met: {missing}")
    say(f"CPU only: {missing}")
    return False


def max_jobs() -> int:
    """By cores and available memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return cores or 1
    return max(1, min(cores or 1, available // (GIB_PER_JOB << 30)))


check_torch()
DEBUG = flag("SOFTMAX_EXT_DEBUG")
WITH_CUDA = decide_cuda()
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = X86_ISAS if IS_X86 else {"baseline": []}

WARNINGS = ["-Wall", "-Wextra"]
if DEBUG or flag("CI"):
    WARNINGS.append("-Werror")
OPTIMIZE = ["-O3"]
SANITIZE: list[str] = []
if DEBUG:
    OPTIMIZE = ["-O1", "-g", "-fno-omit-frame-pointer"]
    SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


class BuildExt(cpp_extension.BuildExtension):  # type: ignore[misc]
    """torch's build, after the CPU kernels have been compiled for each instruction set."""

    def run(self) -> None:
        super().run()
        self.write_build_record()

    def finalize_options(self) -> None:
        """One folder of objects for each way to build, also for pip, which would start anew."""
        super().finalize_options()
        parts = [f"py{sys.version_info[0]}{sys.version_info[1]}", f"torch{torch.__version__}"]
        parts += ["cuda"] * WITH_CUDA + ["debug"] * DEBUG
        self.build_temp = str(ROOT / "build" / "-".join(parts))

    def build_extensions(self) -> None:
        os.environ.setdefault("MAX_JOBS", str(max_jobs()))
        if WITH_CUDA:
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
            say(f"GPU architectures: {os.environ['TORCH_CUDA_ARCH_LIST']}")
        say(f"CPU instruction sets: {', '.join(ISAS)}; MAX_JOBS={os.environ['MAX_JOBS']}")
        with ThreadPoolExecutor(int(os.environ["MAX_JOBS"])) as pool:
            commands = list(pool.map(self.compile_kernels, ISAS))
        self.extensions[0].extra_objects += [command["output"] for command in commands]
        super().build_extensions()
        self.write_compile_commands(commands)

    def compile_kernels(self, isa: str) -> dict[str, str]:
        """Compiles csrc/cpu/kernels.cpp for one instruction set, if anything in it is newer. It has
        nothing of torch or Python: builds for all of them share it."""
        source = ROOT / "csrc" / "cpu" / "kernels.cpp"
        output = ROOT / "build" / ("kernels-debug" if DEBUG else "kernels") / f"kernels_{isa}.o"
        output.parent.mkdir(parents=True, exist_ok=True)
        command = [*self.compiler.compiler_so[:1], *OPTIMIZE, *SANITIZE, *WARNINGS, *ISA_WARNINGS]
        command += ["-fPIC", "-fvisibility=hidden", "-ffp-contract=off", f"-I{INCLUDE}"]
        command += [f"-DSOFTMAX_EXT_ISA={isa}", *ISAS[isa]]
        command += ["-c", str(source), "-o", str(output)]
        inputs = [*source.parent.glob("*"), *INCLUDE.rglob("*.h")]
        made_by = output.with_suffix(".command")
        text = " ".join(command)
        if (
            not output.exists()
            or not made_by.exists()
            or made_by.read_text() != text
            or any(path.stat().st_mtime > output.stat().st_mtime for path in inputs)
        ):
            print(text, flush=True)
            subprocess.run(command, check=True)
            made_by.write_text(text)
        return {
            "directory": str(ROOT),
            "file": str(source),
            "output": str(output),
            "command": text,
        }

    def write_build_record(self) -> None:
        """What the loader compares with the torch it finds, before it loads the library."""
        library = Path(self.get_ext_fullpath("softmax_ext._C"))
        record = {
            "torch": torch.__version__,
            "cuda": torch.version.cuda if WITH_CUDA else None,
            "architectures": os.environ["TORCH_CUDA_ARCH_LIST"] if WITH_CUDA else None,
        }
        (library.parent / "_build.json").write_text(json.dumps(record, indent=2) + "\n")

    def write_compile_commands(self, commands: list[dict[str, str]]) -> None:
        """compile_commands.json, for editors."""
        for ninja in Path(self.build_temp).resolve().rglob("build.ninja"):
            listing = subprocess.run(
                ["ninja", "-C", str(ninja.parent), "-t", "compdb", "compile", "cuda_compile"],
                capture_output=True,
                text=True,
            )
            if listing.returncode == 0:
                commands = commands + json.loads(listing.stdout)
        try:
            (ROOT / "compile_commands.json").write_text(json.dumps(commands, indent=2) + "\n")
        except OSError as error:
            say(f"compile_commands.json not written: {error}")


def extension() -> Any:
    sources = ["csrc/cpu/dispatch.cpp", "csrc/cpu/memory.cpp"]
    sources += [str(p) for p in sorted(Path("csrc/torch").glob("*.cpp"))]
    cxx = [*OPTIMIZE, *SANITIZE, *WARNINGS, "-fvisibility=hidden"]
    # at::parallel_for is OpenMP code in a header. Its runtime is the one that torch has loaded:
    # linking another would give this extension a thread pool of its own.
    cxx += ["-fopenmp"]
    # Only our own code is to be free of warnings.
    for path in cpp_extension.include_paths("cuda" if WITH_CUDA else "cpu"):
        cxx += ["-isystem", path]
    macros: list[tuple[str, str | None]] = [("SOFTMAX_EXT_X86", None)] if IS_X86 else []
    options: dict[str, Any] = {
        "include_dirs": [str(INCLUDE)],
        "extra_link_args": [*SANITIZE, *([] if DEBUG else ["-Wl,-s"])],
    }
    if not WITH_CUDA:
        return cpp_extension.CppExtension(
            "softmax_ext._C",
            sources,
            define_macros=macros,
            extra_compile_args={"cxx": cxx},
            **options,
        )
    sources += [str(p) for p in sorted(Path("csrc/cuda").glob("*.cu"))]
    nvcc = ["-O3", "-Xcompiler=-fvisibility=hidden", "-Xfatbin=-compress-all"]
    if "-Werror" in WARNINGS:
        nvcc += ["-Werror=all-warnings"]
    return cpp_extension.CUDAExtension(
        "softmax_ext._C",
        sources,
        define_macros=[*macros, ("SOFTMAX_EXT_CUDA", None)],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        **options,
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExt})
