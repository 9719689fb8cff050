"""Builds softmax_ext._C: the CPU kernels always, the CUDA kernels where they can be.

Environment:
    FORCE_CUDA=1           build the CUDA kernels, or fail saying what is missing
    FORCE_CPU=1            do not build them
    TORCH_CUDA_ARCH_LIST   the GPU architectures, as for any torch extension
    CXX, CC                the C++ compiler, by default c++; CC is the one that nvcc calls
    MAX_JOBS               parallel compiler runs; by default as many as cores and memory allow
    SOFTMAX_EXT_ISAS       the instruction sets to compile the CPU kernels for, by default all: some
                           of baseline, avx2 and avx512, with a space in between
    SOFTMAX_EXT_DEBUG=1    -O1 with address and undefined-behaviour sanitizers; warnings are errors
    SOFTMAX_EXT_LOCAL_VERSION
                           what follows the + in the version, by default the torch and CUDA of the
                           build; empty: nothing, as pip wants it of an sdist installed by its name
    SOFTMAX_EXT_UNTRIED_TORCH=1
                           no warning where torch is newer than the newest that was tried
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.sdist import sdist


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
# For the ninja of a virtual environment that was not activated, behind the user's own programs.
os.environ["PATH"] = os.pathsep.join(
    filter(None, [os.environ.get("PATH"), sysconfig.get_path("scripts")])
)
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
VERSION = "0.2.0.dev0"  # a build adds what it was made for, see build_version()
OLDEST_TORCH = (2, 11)
NEWEST_TRIED_TORCH = (2, 15)

# Of csrc/cpu, what is compiled once for each instruction set; which one runs is decided at import.
KERNELS = tuple(
    f"{family}_{direction}"
    for family in ("softmax", "scores", "segments", "losses", "divergences", "probabilities")
    for direction in ("forward", "backward")
)
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


def release(version: str) -> tuple[int, int]:
    """Major and minor: the binary interface of torch changes between minor versions."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def check_torch(version: str) -> str | None:
    """Exits if torch is too old. A warning if it is newer than any that was tried."""
    found = release(version)
    if found < OLDEST_TORCH:
        sys.exit(
            f"softmax_ext: torch {version} was found, and {dotted(OLDEST_TORCH)} is the oldest "
            "that is supported. Install a newer one: pip install --upgrade torch"
        )
    if found <= NEWEST_TRIED_TORCH or flag("SOFTMAX_EXT_UNTRIED_TORCH"):
        return None
    return (
        f"warning: torch {version} is newer than {dotted(NEWEST_TRIED_TORCH)}, the newest that "
        "this source was tried with: run its tests. SOFTMAX_EXT_UNTRIED_TORCH=1 silences this"
    )


def build_version(torch_version: str, cuda: str | None) -> str:
    """Such as 0.2.0+torch2.14.cu130: the torch, and the CUDA kernels if any, of this build."""
    kernels = "cpu" if cuda is None else "cu" + cuda.replace(".", "")
    label = f"torch{dotted(release(torch_version))}.{kernels}"
    label = os.environ.get("SOFTMAX_EXT_LOCAL_VERSION", label)
    return f"{VERSION}+{label}" if label else VERSION


def build_requirement(torch_version: str) -> str:
    return f"torch=={dotted(release(torch_version))}.*"


def nvcc_version() -> str | None:
    """The version of the nvcc that torch would use, or None."""
    home = cpp_extension.CUDA_HOME
    nvcc = Path(home) / "bin" / "nvcc" if home else None
    if nvcc is None or not nvcc.exists():
        return None
    text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match.group(1) if match else None


def decide_cuda() -> tuple[bool, str]:
    """Whether to build for CUDA, and why. Exits if FORCE_CUDA cannot be met."""
    if flag("FORCE_CPU") and flag("FORCE_CUDA"):
        sys.exit("softmax_ext: FORCE_CPU and FORCE_CUDA are both set; set one of them")
    if flag("FORCE_CPU"):
        return False, "CPU only, as FORCE_CPU asks"
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
        return True, f"CPU and CUDA: torch {torch.__version__} (CUDA {wanted}), nvcc {found}"
    if flag("FORCE_CUDA"):
        sys.exit(f"softmax_ext: FORCE_CUDA cannot be met: {missing}")
    return False, f"CPU only: {missing}"


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that programs can still have: the caches given back, and no more than the container's
    limit. None where the system does not say."""
    sizes = []
    for name, pattern, unit in (
        ("proc/meminfo", r"^MemAvailable:\s*(\d+) kB$", 1024),
        ("sys/fs/cgroup/memory.max", r"^(\d+)$", 1),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", r"^(\d+)$", 1),
    ):
        try:
            match = re.search(pattern, (root / name).read_text(), re.MULTILINE)
        except OSError:
            continue
        if match:
            sizes.append(int(match.group(1)) * unit)
    return min(sizes, default=None)


def max_jobs(cores: int, memory: int | None) -> int:
    by_memory = cores if memory is None else memory // (GIB_PER_JOB << 30)
    return max(1, min(cores, by_memory))


def wanted_jobs(default: int) -> int:
    jobs = os.environ.setdefault("MAX_JOBS", str(default))
    if not jobs.isdecimal() or int(jobs) < 1:
        sys.exit(f"softmax_ext: MAX_JOBS is {jobs!r}, and has to be a number of 1 or more")
    return int(jobs)


def wanted_isas(known: dict[str, list[str]]) -> dict[str, list[str]]:
    """All instruction sets of this architecture, or those that SOFTMAX_EXT_ISAS names."""
    names = os.environ.get("SOFTMAX_EXT_ISAS", "").split() or list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(
            f"softmax_ext: SOFTMAX_EXT_ISAS names {', '.join(unknown)}; there are kernels for "
            + ", ".join(known)
        )
    return {name: known[name] for name in known if name in names}


def compiler(variable: str, default: str, language: str) -> list[str]:
    """The words of the compiler that the variable names. Exits if it does not run."""
    if not os.environ.get(variable):
        os.environ.pop(variable, None)  # torch would take an empty one for a name
    text = os.environ.get(variable, default)
    named = f'{variable}="{text}"' if variable in os.environ else text
    mend = f"Install a C++ compiler, or name yours in {variable}"
    try:
        words = shlex.split(text)
        command = [*words, "-x", language, "-fsyntax-only", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
    except (OSError, ValueError) as error:
        sys.exit(f"softmax_ext: the compiler, {named}, cannot be run: {error}. {mend}")
    if done.returncode != 0:
        sys.exit(
            f"softmax_ext: the compiler, {named}, does not work: {shlex.join(command)} ended with "
            f"status {done.returncode}:\n{done.stdout}{done.stderr}{mend}"
        )
    return words


WARNING = check_torch(torch.__version__)
DEBUG = flag("SOFTMAX_EXT_DEBUG")
WITH_CUDA, WHY = decide_cuda()
CUDA = torch.version.cuda if WITH_CUDA else None
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = wanted_isas(X86_ISAS if IS_X86 else {"baseline": []})

WARNINGS = ["-Wall", "-Wextra"]
if DEBUG or flag("CI"):
    WARNINGS.append("-Werror")
OPTIMIZE = ["-O3", "-g0"]  # Python's own -g costs two thirds more time, and is not linked
SANITIZE: list[str] = []
SANITIZE_TORCH: list[str] = []
if DEBUG:
    # A report names functions and lines. Checks that are called are a fraction of the code.
    OPTIMIZE = ["-O1", "-g1", "-fno-omit-frame-pointer"]
    # What a null pointer does, the address sanitizer says as well.
    SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=null"]
    SANITIZE += ["-fno-sanitize-recover=undefined"]
    SANITIZE += ["--param", "asan-instrumentation-with-call-threshold=0"]
    # Two thirds of the code that a file with torch's headers comes to, and most of it is theirs.
    SANITIZE_TORCH = ["-fno-sanitize=alignment,pointer-overflow,vptr"]


def translation_units(sources: list[str], folder: Path) -> dict[str, list[str]]:
    """What to compile for `sources`, each with those that it includes. Most of what a file of
    csrc/torch would take alone are torch's headers: those that share the first word of their names
    are one, in `folder`, and those that share it with none another."""
    of_torch = [source for source in sources if Path(source).parent.name == "torch"]
    words = {source: Path(source).stem.split("_")[0] for source in of_torch}
    shared = {word for word, number in Counter(words.values()).items() if number > 1}
    units: dict[str, list[str]] = {}
    for source in sources:
        word = words.get(source)
        unit = folder / f"{word if word in shared else 'others'}.cpp"
        units.setdefault(str(unit) if word else source, []).append(source)
    folder.mkdir(parents=True, exist_ok=True)
    for unit, files in units.items():
        if files == [unit]:
            continue
        text = "".join(f'#include "{os.path.relpath(file, folder)}"\n' for file in files)
        if not Path(unit).exists() or Path(unit).read_text() != text:
            Path(unit).write_text(text)
    return units


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
        say(WHY)
        if WARNING:
            say(WARNING)
        self.check_compilers()
        has_affinity = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
        jobs = wanted_jobs(max_jobs(cores, available_memory()))
        if WITH_CUDA:
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
            say(f"GPU architectures: {os.environ['TORCH_CUDA_ARCH_LIST']}")
        say(f"CPU instruction sets: {', '.join(ISAS)}; MAX_JOBS={jobs}")
        with ThreadPoolExecutor(jobs) as pool:
            commands = list(pool.map(self.compile_kernels, product(ISAS, KERNELS)))
        self.extensions[0].extra_objects += [command["output"] for command in commands]
        units = translation_units(self.extensions[0].sources, Path("build", "units"))
        self.extensions[0].depends += self.extensions[0].sources  # asked where there is no ninja
        self.extensions[0].sources = list(units)
        super().build_extensions()
        self.write_compile_commands(commands, units)

    def check_compilers(self) -> None:
        """Before anything is compiled. torch and nvcc expect one word of each: torch checks the
        first of CXX, and takes what follows the first of CC for options of C++."""
        self.cxx = compiler("CXX", "c++", "c++")
        if len(self.cxx) > 1:
            os.environ["TORCH_DONT_CHECK_COMPILER_ABI"] = "1"
        if not os.environ.get("CC"):
            return
        cc = compiler("CC", "cc", "c")
        if len(cc) > 1:
            host = [word for word in cc if not word.startswith("-")][-1]
            options = self.compiler.compiler_so[len(cc) :]
            self.compiler.set_executable("compiler_so", [host, *options])
            if WITH_CUDA:
                self.extensions[0].extra_compile_args["nvcc"].append(f"-ccbin={host}")

    def compile_kernels(self, isa_and_name: tuple[str, str]) -> dict[str, str]:
        """Compiles one of KERNELS for one instruction set, if anything in it is newer. It has
        nothing of torch or Python: builds for all of them share it."""
        isa, name = isa_and_name
        source = ROOT / "csrc" / "cpu" / f"{name}.cpp"
        output = ROOT / "build" / ("kernels-debug" if DEBUG else "kernels") / f"{name}_{isa}.o"
        output.parent.mkdir(parents=True, exist_ok=True)
        command = [*self.cxx, *OPTIMIZE, *SANITIZE, *WARNINGS, *ISA_WARNINGS]
        command += ["-fPIC", "-fvisibility=hidden", "-ffp-contract=off", f"-I{INCLUDE}"]
        command += [f"-DSOFTMAX_EXT_ISA={isa}", *ISAS[isa]]
        command += ["-c", str(source), "-o", str(output)]
        inputs = [*source.parent.glob("*"), *INCLUDE.rglob("*.h")]
        made_by = output.with_suffix(".command")
        text = shlex.join(command)
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
            "version": self.distribution.get_version(),
            "torch": torch.__version__,
            "cuda": CUDA,
            "architectures": os.environ["TORCH_CUDA_ARCH_LIST"] if WITH_CUDA else None,
            "isas": list(ISAS),
        }
        (library.parent / "_build.json").write_text(json.dumps(record, indent=2) + "\n")

    def write_compile_commands(
        self, commands: list[dict[str, str]], units: dict[str, list[str]]
    ) -> None:
        """compile_commands.json, for editors: of each source that of its unit."""
        listings = Path(self.build_temp).resolve().rglob("build.ninja") if self.use_ninja else ()
        for ninja in listings:
            listing = subprocess.run(
                ["ninja", "-C", str(ninja.parent), "-t", "compdb", "compile", "cuda_compile"],
                capture_output=True,
                text=True,
            )
            if listing.returncode == 0:
                for command in json.loads(listing.stdout):
                    unit = os.path.relpath(command["file"])
                    commands += [
                        command | {"file": os.path.abspath(source)}
                        for source in units.get(unit, [unit])
                    ]
        try:
            (ROOT / "compile_commands.json").write_text(json.dumps(commands, indent=2) + "\n")
        except OSError as error:
            say(f"compile_commands.json not written: {error}")


class Sdist(sdist):
    """The source is for any supported torch, not for the one at hand."""

    def run(self) -> None:
        of_build = self.distribution.metadata.version, self.distribution.install_requires
        self.describe(VERSION, [f"torch>={dotted(OLDEST_TORCH)}"])
        super().run()
        self.describe(*of_build)  # for `setup.py sdist bdist_wheel`

    def describe(self, version: str, requires: list[str]) -> None:
        self.distribution.metadata.version = version
        self.distribution.install_requires = requires
        self.distribution.metadata.install_requires = requires
        self.reinitialize_command("egg_info")


def extension() -> Any:
    sources = ["csrc/cpu/isa.cpp", "csrc/cpu/memory.cpp", "csrc/cpu/segments_order.cpp"]
    sources += [str(p) for p in sorted(Path("csrc/torch").glob("*.cpp"))]
    cxx = [*OPTIMIZE, *SANITIZE, *SANITIZE_TORCH, *WARNINGS, "-fvisibility=hidden"]
    # at::parallel_for is OpenMP code in a header. Its runtime is the one that torch has loaded:
    # linking another would give this extension a thread pool of its own.
    cxx += ["-fopenmp"]
    # Only our own code is to be free of warnings.
    for path in cpp_extension.include_paths("cuda" if WITH_CUDA else "cpu"):
        cxx += ["-isystem", path]
    macros: list[tuple[str, str | None]] = [(f"SOFTMAX_EXT_{isa.upper()}", None) for isa in ISAS]
    options: dict[str, Any] = {
        "include_dirs": [str(INCLUDE), str(ROOT / "csrc" / "torch" / "stubs")],
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
    # As torch's own library is; any driver for CUDA 13 reads it, not every one for CUDA 12.
    if release(nvcc_version() or "0.0") >= (13, 0):
        nvcc += ["--compress-mode=size"]
    if "-Werror" in WARNINGS:
        nvcc += ["-Werror=all-warnings"]
    return cpp_extension.CUDAExtension(
        "softmax_ext._C",
        sources,
        define_macros=[*macros, ("SOFTMAX_EXT_CUDA", None)],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        **options,
    )


setup(
    version=build_version(torch.__version__, CUDA),
    install_requires=[build_requirement(torch.__version__)],
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExt, "sdist": Sdist},
)
