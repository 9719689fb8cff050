"""The CUDA kernels' machine code, from nvcc alone, without a GPU.

No instance spills registers to memory, and the vectorised ones access 16 bytes at a time.
"""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# A100, H100, B200 and RTX 50.
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]
FLAGS = ["-std=c++17", "-cubin", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra"]
FLAGS += ["-Xptxas", "-v", f"-I{ROOT / 'csrc' / 'include'}"]
# PyTorch's extensions are built so.
FLAGS += [f"-D__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS")]
FLAGS += [f"-D__CUDA_NO_{name}__" for name in ("BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")]
WORKERS = 2

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")


@dataclass(frozen=True)
class Instance:
    """A kernel as compiled for one architecture."""

    name: str  # mangled
    registers: int
    stack: int  # bytes
    spills: int  # bytes, stores and loads
    cubin: Path


def find_disassembler() -> str | None:
    """nvdisasm: beside nvcc, on PATH, or in the triton package."""
    folders = [Path(NVCC).resolve().parent] if NVCC else []
    triton = importlib.util.find_spec("triton")
    for location in (triton.submodule_search_locations or []) if triton else []:
        folders.append(Path(location) / "backends" / "nvidia" / "bin")
    for folder in folders:
        if (folder / "nvdisasm").is_file():
            return str(folder / "nvdisasm")
    return shutil.which("nvdisasm")


Build = Callable[[str], list[Instance]]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build(architecture): the instances of all files, compiled once."""
    folder = tmp_path_factory.mktemp("cubin")

    def compile_one(source: Path, architecture: str) -> list[Instance]:
        cubin = folder / f"{source.stem}.{architecture}.cubin"
        command = [str(NVCC), *FLAGS, f"-arch={architecture}", str(source), "-o", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        log = result.stdout + result.stderr
        return [
            Instance(entry[1], int(entry[5]), int(entry[2]), int(entry[3]) + int(entry[4]), cubin)
            for entry in re.finditer(
                r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, "
                r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
                log,
                re.DOTALL,
            )
        ]

    @cache
    def build_all(architecture: str) -> list[Instance]:
        with ThreadPoolExecutor(WORKERS) as pool:
            results = pool.map(lambda source: compile_one(source, architecture), SOURCES)
            return [instance for instances in results for instance in instances]

    return build_all


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_instance_spills(build: Build, architecture: str) -> None:
    instances = build(architecture)
    for schedule in ("registers", "streaming", "strided"):
        for direction in ("forward", "backward"):
            assert any(f"{schedule}_{direction}_kernel" in i.name for i in instances)
    assert [i for i in instances if i.stack or i.spills] == []


def elements(name: str) -> tuple[int, int, int]:
    """Bytes of an element read and of one written, and the tensors that are read."""
    types = {"f": 4, "d": 8, "6__half": 2, "13__nv_bfloat16": 2}
    read = re.search(r"5InputI(f|d|6__half|13__nv_bfloat16)E", name)
    written = re.search(r"6OutputI(f|d|6__half|13__nv_bfloat16|S\w_)Lb1EE", name)
    assert read and written, name
    size = types[read[1]]
    # S…_ stands for a type named before: the one read.
    return size, types.get(written[1], size), 2 if "backward" in name else 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vectorised_instances_access_16_bytes(build: Build, architecture: str) -> None:
    disassembler = find_disassembler()
    if disassembler is None:
        pytest.skip("no nvdisasm beside nvcc, on PATH or in the triton package")
    instances = [i for i in build(architecture) if "Cast" not in i.name]
    code: dict[str, str] = {}
    for cubin in {i.cubin for i in instances}:
        command = [disassembler, "-c", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]:
            code[re.split(r"[,\s]", section, maxsplit=1)[0]] = section

    for instance in instances:
        found = Counter(
            f"{access} {bits}"
            for access, bits in re.findall(
                r"\b(LDG|STG|LDS|STS)\.(?:[A-Z]\w*\.)*(64|128)\b", code[instance.name]
            )
        )
        read, written, inputs = elements(instance.name)
        bits = min(128, 128 * written // read)
        vectors = re.search(r"registers_\w+_kernelILNS_2OpE\dELi(\d+)E", instance.name)
        at_least = int(vectors[1]) if vectors else 1
        assert found["LDG 128"] >= at_least * inputs, (instance.name, found)
        assert found[f"STG {bits}"] >= at_least * max(1, written // read), (instance.name, found)
        if "streaming" in instance.name and "ELb1E" in instance.name:
            assert found["STS 128"] and found["LDS 128"], (instance.name, found)
