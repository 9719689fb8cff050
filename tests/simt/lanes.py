"""Builds the host executor's programs with g++, in the lanes that the tests run them in.

Needs g++ and ninja; nothing of CUDA.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "build" / "simt"

# Not the checks for null pointers, whose use the address sanitizer reports too: they are two fifths
# of the time that the lane takes to compile.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=null", "-fno-sanitize-recover=all"]
LANES = {
    "o1": ["-O1", "-g1"],
    "gcov": ["-O1", "-g1", "--coverage"],
    "asan": ["-O1", "-g1", *SANITIZE],
    "tsan": ["-O1", "-g1", "-fsanitize=thread"],
    "debug": ["-O0", "-g3"],
    "ucontext": ["-O2", "-g1", "-DSIMT_UCONTEXT"],
}
# Sanitizers look at accesses to memory and their order: those of log_softmax are softmax's, and of
# bfloat16 float16's, so that these kernels are not compiled.
SANITIZERS = ("asan", "tsan")
TYPES = ["-DSOFTMAX_EXT_SIMT_TYPES=__half,float,double"]
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fno-omit-frame-pointer", "-DSOFTMAX_EXT_SIMT"]
FLAGS += [f"-I{ROOT / 'tests' / 'simt' / 'cuda'}", f"-I{ROOT / 'csrc' / 'include'}"]
# The kernels fill their arrays in unrolled loops, which g++ does not see through.
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]

EXECUTOR = [ROOT / "tests" / "simt" / f"{name}.cpp" for name in ("executor", "fiber", "report")]
# Calls of exp are counted.
LINK = {"kernels": ["-Wl,--wrap=exp"], "segments": [], "losses": [], "toys": []}
OF_SEGMENTS = sorted((ROOT / "csrc" / "cuda").glob("*segments*.cu"))
OF_LOSSES = sorted((ROOT / "csrc" / "cuda").glob("*losses*.cu"))
PROGRAMS = {
    "kernels": [
        ROOT / "tests" / "simt" / "kernels.cpp",
        ROOT / "tests" / "simt" / "scores.cpp",
        *sorted({*(ROOT / "csrc" / "cuda").glob("*.cu")} - {*OF_SEGMENTS, *OF_LOSSES}),
    ],
    "segments": [ROOT / "tests" / "simt" / "segments.cpp", *OF_SEGMENTS],
    "losses": [ROOT / "tests" / "simt" / "losses.cpp", *OF_LOSSES],
    "toys": [ROOT / "tests" / "simt" / "toys.cpp"],
}


def sources_of(program: str, lane: str) -> list[Path]:
    sources = EXECUTOR + PROGRAMS[program]
    return [s for s in sources if lane not in SANITIZERS or not s.stem.endswith("bfloat16")]


def write_rules() -> None:
    """build.ninja, for every lane."""
    lines = [
        f"compiler = {os.environ.get('CXX', 'g++')}",
        "rule compile",
        "  command = $compiler $flags -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        # Kernels are named in reports by what the dynamic linker knows of them.
        "  command = $compiler $flags -rdynamic $in -ldl -o $out",
    ]
    for lane, options in LANES.items():
        types = TYPES if lane in SANITIZERS else []
        sources = {program: sources_of(program, lane) for program in PROGRAMS}
        for source in dict.fromkeys(chain(*sources.values())):
            lines += [f"build {lane}/{source.stem}.o: compile {source}"]
            lines += [f"  flags = {' '.join(FLAGS + options + types)}"]
        for program in PROGRAMS:
            objects = [f"{lane}/{source.stem}.o" for source in sources[program]]
            lines += [f"build {lane}/{program}: link {' '.join(objects)}"]
            lines += [f"  flags = {' '.join(options + LINK[program])}"]
    rules = FOLDER / "build.ninja"
    text = "\n".join(lines) + "\n"
    if not rules.exists() or rules.read_text() != text:
        rules.write_text(text)


@contextmanager
def alone() -> Iterator[None]:
    """One process at a time in FOLDER: the next finds what the one before has built."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(lane: str, program: str) -> Path:
    """Compiles what is not up to date."""
    path = FOLDER / lane / program
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if ninja is None:
        raise FileNotFoundError("ninja is needed to build the host executor: pip install ninja")
    command = [ninja, "-C", str(FOLDER), f"{lane}/{program}"]
    with alone():
        write_rules()
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"the host executor's {lane} lane does not compile:\n{result.stdout}")
    return path
