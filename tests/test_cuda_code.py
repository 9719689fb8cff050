"""The CUDA kernels' machine code, without a GPU: with --cuda-code. From the extension where it has
that, otherwise from nvcc.

No instance has local memory or spills registers to it, the vectorised ones access 16 bytes at a
time, and each keeps to its line of benchmarks/cuda_budgets.txt.
"""

import importlib.util
import math
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

import softmax_ext

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
TABLE = ROOT / "benchmarks" / "cuda_budgets.txt"
# A100, H100, B200 and RTX 50.
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]
FLAGS = ["-std=c++17", "-cubin", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra"]
FLAGS += ["-Xptxas", "-v", f"-I{ROOT / 'csrc' / 'include'}"]
# PyTorch's extensions are built so.
FLAGS += [f"-D__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS")]
FLAGS += [f"-D__CUDA_NO_{name}__" for name in ("BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")]
WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
NVCC = shutil.which("nvcc")

# --- Instances and their names -------------------------------------------------------------------

# The template parameters of each schedule's kernels, in their order.
PARAMETERS = {
    "registers": ["op", "vectors", "in", "out"],
    "long": ["op", "in", "out"],
    "short": ["op", "vectors", "in", "out"],
    "packed": ["op", "in", "out"],
    "packed_short": ["op", "vectors", "in", "out"],
    "packed_columns": ["op", "in", "out"],
    "columns": ["op", "columns", "in", "out"],
    "scores": ["op", "type"],
    "short_scores": ["op", "type"],
    "segment_warp": ["op", "columns", "type"],
    "segment_block": ["op", "columns", "type"],
    "segment_combine": ["type"],
    "loss": ["type"],
    "probability": ["type"],
    "divergence": ["type"],
}
BY_ELEMENTS = (
    "scores",
    "short_scores",
    "segment_combine",
    "loss",
    "probability",
    "divergence",
)
OPS = {
    "(softmax_ext::Op)0": "softmax",
    "(softmax_ext::Op)1": "log_softmax",
    "(softmax_ext::ScoreOp)0": "softmax",
    "(softmax_ext::ScoreOp)1": "log_softmax",
    "(softmax_ext::ScoreOp)2": "logsumexp",
    "(softmax_ext::SegmentOp)0": "softmax",
    "(softmax_ext::SegmentOp)1": "log_softmax",
    "(softmax_ext::SegmentOp)2": "logsumexp",
}
# Kernels of a few numbers, which have no budget. What is printed where one finds wrong values takes
# a stack.
OF_NUMBERS = ("segment_list_kernel", "loss_target_kernel", "loss_sum_kernel", "loss_total_kernel")
DTYPES = {"__half": "float16", "__nv_bfloat16": "bfloat16", "float": "float32", "double": "float64"}
SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Instance:
    kernel: str
    direction: str
    op: str
    read: str  # a dtype
    written: str
    others: dict[str, str]

    @property
    def name(self) -> str:
        types = self.read if self.read == self.written else f"{self.read} -> {self.written}"
        others = [f"{parameter}={value}" for parameter, value in self.others.items()]
        op = [self.op] if self.op else []
        return " ".join([f"{self.kernel}_{self.direction}", *op, types, *others])

    @property
    def columns(self) -> int:
        """Neighbours that one access reads."""
        return int(self.others.get("columns", 16 // SIZE[self.read]))

    @property
    def wide(self) -> bool:
        """It reads 16 bytes at a time: all but the columns kernels for narrower accesses."""
        return self.kernel not in BY_ELEMENTS and self.columns * SIZE[self.read] == 16

    @property
    def store_bits(self) -> int:
        """Of the store of a vector that was read: 16 bytes, or 8 where it has become smaller. A
        packed kernel stores slabs, whatever the vectors that it read."""
        if self.kernel.startswith("packed"):
            return 128
        return min(128, self.columns * SIZE[self.written] * 8) if self.wide else 128


def instance_of(demangled: str) -> Instance:
    """Of a kernel's demangled name; ValueError for one that it does not understand."""

    def readable(argument: str) -> str:
        if argument.isdecimal():
            return argument
        return DTYPES[argument] if argument in DTYPES else OPS[argument]

    try:
        kernel = re.search(r"(\w+)_(forward|backward)_kernel<(.*)>\(", demangled)
        if kernel is None:
            raise ValueError("it is not NAME_forward_kernel or NAME_backward_kernel")
        values = {
            parameter: readable(argument.strip())
            for parameter, argument in zip(PARAMETERS[kernel[1]], kernel[3].split(","), strict=True)
        }
        both = values.pop("type", None)
        read, written = (values.pop(parameter, both) for parameter in ("in", "out"))
        op = values.pop("op", "")  # none of the combined states
        if read is None or written is None:
            raise ValueError("no type")
    except (KeyError, ValueError) as error:
        known = "PARAMETERS, OPS and DTYPES say what is understood"
        raise ValueError(f"no name for {demangled.strip()}: {error}; {known}") from error
    return Instance(kernel[1], kernel[2], op, read, written, values)


# --- Measurements --------------------------------------------------------------------------------

# Of an instance for one architecture: "registers"; "limit", those that its launch bounds leave;
# bytes of "stack" and "spills"; from a disassembler ACCESSES, and "local", those to local memory.
Figures = dict[str, int]
Build = Callable[[str], list[tuple[Instance, Figures]]]
ACCESSES = ["LDG", "STG", "LDS", "STS"]
FORBIDDEN = {"stack": 0, "spills": 0, "local": 0}
# Bytes, in float64 on sm_120: an SM has two units for it, and its kernels wait for those.
EXCUSED = {"stack": 32, "spills": 32, "local": 32}
# As where exp, tanh and a division have all of a row's registers.
EXCUSED_ANYWHERE = re.compile(r"scores_\w+ \w+ float64")
NO_DISASSEMBLER = "no nvdisasm beside nvcc, on PATH or in the triton package"


@cache
def find(program: str) -> str | None:
    """Of nvdisasm and cuobjdump: beside nvcc, on PATH, or in the triton package."""
    folders = [Path(NVCC).resolve().parent] if NVCC else []
    triton = importlib.util.find_spec("triton")
    for location in (triton.submodule_search_locations or []) if triton else []:
        folders.append(Path(location) / "backends" / "nvidia" / "bin")
    for folder in folders:
        if (folder / program).is_file():
            return str(folder / program)
    return shutil.which(program)


def built_for(architecture: str) -> Path | None:
    """The extension, if it is of the sources as they are, has code and PTX, and can be read."""
    library = Path(softmax_ext._C.__file__)
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()] + [ROOT / "setup.py"]
    if any(path.stat().st_mtime > library.stat().st_mtime for path in sources):
        return None
    known = softmax_ext.build_info().architectures or ""
    major, minor = architecture.removeprefix("sm_")[:-1], architecture[-1]
    is_built = f"{major}.{minor}+PTX" in known.replace(";", " ").split()
    return library if is_built and find("cuobjdump") and find("nvdisasm") else None


def run(*command: str | Path, cwd: str | None = None) -> str:
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def nvcc_release() -> str:
    release = re.search(r"release ([\d.]+)", run(str(NVCC), "--version"))
    assert release
    return release[1]


def registers_left(directives: str) -> int:
    """By the launch bounds in PTX: of 65536, given out by eights, and 255 at most."""
    bounds = re.findall(r"\.(?:maxntid|minnctapersm) ([\d, ]+)", directives)
    threads = math.prod(int(number) for bound in bounds for number in bound.split(","))
    return min(255, 65536 // threads // 8 * 8)


def count_accesses(instance: Instance, code: str) -> Figures:
    found = Counter(re.findall(r"\b(LDG|STG|LDS|STS)\.(?:[A-Z]\w*\.)*(64|128)\b", code))
    figures = {access: found[access, "128"] for access in ACCESSES}
    figures["STG"] = found["STG", str(instance.store_bits)]
    return figures | {"local": len(re.findall(r"\b(?:LDL|STL)\b", code))}


def measured(usage: dict[str, Figures], ptx: str, cubin: Path) -> list[tuple[Instance, Figures]]:
    """usage: what ptxas says of the kernels of a file, by their names in it."""
    disassembler = find("nvdisasm")
    assembly = run(disassembler, "-c", cubin) if disassembler else ""
    directives = dict(re.findall(r"\.entry (\w+)\([^)]*\)([^{]*)\{", ptx))
    code = {
        re.split(r"[,\s]", section, maxsplit=1)[0]: section
        for section in re.split(r"^\s*\.section\s+\.text\.", assembly, flags=re.MULTILINE)[1:]
    }
    instances = []
    for name, figures in usage.items():
        demangled = run("c++filt", name)
        if any(kernel in demangled for kernel in OF_NUMBERS):
            continue
        instance = instance_of(demangled)
        figures["limit"] = registers_left(directives[name])
        if disassembler:
            figures |= count_accesses(instance, code[name])
        instances.append((instance, figures))
    return instances


def compiled(source: Path, architecture: str) -> list[tuple[Instance, Figures]]:
    with TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        flags = [*FLAGS, "-keep", "-keep-dir", folder, f"-arch={architecture}"]
        log = run(str(NVCC), *flags, source, "-o", cubin)
        usage = {}
        for entry in log.split("Compiling entry function '")[1:]:
            # A line for the kernel, and one for each function that it calls.
            memory = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
            columns = zip(*re.findall(memory, entry), strict=True)
            stack, stores, loads = (sum(map(int, column)) for column in columns)
            usage[entry.split("'")[0]] = {
                "registers": int(re.findall(r"Used (\d+) registers", entry)[0]),
                "stack": stack,
                "spills": stores + loads,
            }
        return measured(usage, Path(folder, f"{source.stem}.ptx").read_text(), cubin)


def built(library: Path, architecture: str) -> list[tuple[Instance, Figures]]:
    """What is spilled is in the stack here, and has no figure of its own."""
    reader = str(find("cuobjdump"))
    with TemporaryDirectory() as folder:
        run(reader, "-xelf", "all", "-xptx", "all", library, cwd=folder)
        # cuobjdump numbers the files of all architectures, and PTX apart from machine code.
        ptx = "".join(path.read_text() for path in Path(folder).glob(f"*.{architecture}.ptx"))

        def of_cubin(cubin: Path) -> list[tuple[Instance, Figures]]:
            found = re.findall(
                r"Function (\w+):\s+REG:(\d+) STACK:(\d+) ", run(reader, "-res-usage", cubin)
            )
            usage = {name: {"registers": int(r), "stack": int(s)} for name, r, s in found}
            return measured(usage, ptx, cubin)

        with ThreadPoolExecutor(WORKERS) as pool:
            parts = list(pool.map(of_cubin, Path(folder).glob(f"*.{architecture}.cubin")))
    return [instance for part in parts for instance in part]


# --- The table -----------------------------------------------------------------------------------

Table = dict[str, dict[str, Figures]]  # by architecture and instance
HEAD = """\
# What the code of each CUDA kernel instance may use, which tests/test_cuda_code.py checks. To renew
# it, with nvcc and nvdisasm:
#     python -m pytest tests/test_cuda_code.py --cuda-code --update-cuda-budgets
#
# sm_...      registers, at most; for another nvcc than the one named below, the limit holds
# limit       registers that the launch bounds leave a thread, at most
# LDG to STS  instructions that load from (LD) and store to (ST) global (G) and shared (S) memory
#             16 bytes, at least; STG where float32 is written as a 16-bit type: 8 bytes
# a/b/c/d     a number for each architecture, where they differ
#
# Spills and local memory have no column: there are none.
"""


def write_table(nvcc: str, table: Table) -> str:
    rows = [["instance", *ARCHITECTURES, "limit", *ACCESSES]]
    for name in sorted({name for figures in table.values() for name in figures}):
        figures = [table[architecture][name] for architecture in ARCHITECTURES]
        row = [name, *(str(figure["registers"]) for figure in figures)]
        for what in ["limit", *ACCESSES]:
            values = [str(figure[what]) for figure in figures]
            row.append("/".join(values if len(set(values)) > 1 else values[:1]))
        rows.append(row)
    return f"{HEAD}\nnvcc {nvcc}\n\n{align(rows)}"


def read_table(text: str) -> tuple[str, Table]:
    """The release of nvcc, and the table."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    release, (_, *header) = lines[0].split()[1], lines[1].split()
    table: Table = {architecture: {} for architecture in ARCHITECTURES}
    for line in lines[2:]:
        name, *cells = line.rsplit(maxsplit=len(header))
        row = dict(zip(header, cells, strict=True))
        for index, architecture in enumerate(ARCHITECTURES):
            figures = {"registers": int(row[architecture])}
            for what in ["limit", *ACCESSES]:
                values = row[what].split("/")
                figures[what] = int(values[index] if len(values) > 1 else values[0])
            table[architecture][name] = figures
    return release, table


def align(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "".join("  ".join(line) + "\n" for line in lines)


@dataclass(frozen=True)
class Change:
    """A figure that is not its budget."""

    instance: str
    architecture: str
    what: str
    budget: int | str
    now: int | str
    fails: bool


def compare(
    architecture: str, budgets: dict[str, Figures], measured: dict[str, Figures], same_nvcc: bool
) -> list[Change]:
    changes = []
    for name in sorted(budgets.keys() | measured.keys()):
        if name not in measured:
            changes.append(Change(name, architecture, "instance", "listed", "missing", True))
        if name not in budgets:
            changes.append(Change(name, architecture, "instance", "missing", "compiled", True))
        excused = architecture == "sm_120" and "float64" in name
        excused = excused or EXCUSED_ANYWHERE.fullmatch(name) is not None
        budget = budgets.get(name, {}) | (EXCUSED if excused else FORBIDDEN)
        for what, now in measured.get(name, {}).items():
            if what not in budget or now == budget[what]:
                continue
            if excused and what in EXCUSED and now < budget[what]:
                continue
            most = budget["limit" if what == "registers" and not same_nvcc else what]
            fails = now < budget[what] if what in ACCESSES else now > most
            changes.append(Change(name, architecture, what, budget[what], now, fails))
    return changes


def report(changes: list[Change]) -> str:
    head = ["instance", "architecture", "what", "budget", "now"]
    rows = [[c.instance, c.architecture, c.what, str(c.budget), str(c.now)] for c in changes]
    return align([head, *rows])


# --- Tests ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def build() -> Build:
    """build(architecture): the instances of all files, had once."""
    if NVCC is None:
        pytest.fail("--cuda-code: no nvcc on PATH", pytrace=False)

    @cache
    def build_all(architecture: str) -> list[tuple[Instance, Figures]]:
        if library := built_for(architecture):
            instances = built(library, architecture)
        else:
            with ThreadPoolExecutor(WORKERS) as pool:
                results = pool.map(lambda source: compiled(source, architecture), SOURCES)
                instances = [instance for result in results for instance in result]
        names = Counter(instance.name for instance, _ in instances)
        assert [name for name, count in names.items() if count > 1] == []
        return instances

    return build_all


@pytest.fixture(scope="session")
def budgets(build: Build, request: pytest.FixtureRequest) -> tuple[str, Table]:
    if request.config.getoption("--update-cuda-budgets"):
        if find("nvdisasm") is None:
            pytest.fail(f"--update-cuda-budgets: {NO_DISASSEMBLER}", pytrace=False)
        table = {arch: {i.name: figures for i, figures in build(arch)} for arch in ARCHITECTURES}
        TABLE.write_text(write_table(nvcc_release(), table))
    return read_table(TABLE.read_text())


@pytest.mark.cuda_code
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_instance_keeps_its_budget(
    build: Build,
    budgets: tuple[str, Table],
    architecture: str,
    summary: Callable[[str, str], None],
) -> None:
    recorded, table = budgets
    release = nvcc_release()
    measured = {instance.name: figures for instance, figures in build(architecture)}
    same_nvcc = release == recorded
    changes = compare(architecture, table[architecture], measured, same_nvcc)
    if within := [change for change in changes if not change.fails]:
        why = f"nvcc {release}, in the table {recorded}"
        if same_nvcc:
            why = "to be recorded by --update-cuda-budgets"
        summary(f"CUDA budgets, {architecture}: not as in the table; {why}", report(within))
    if beyond := [change for change in changes if change.fails]:
        title = f"{architecture}: {len(beyond)} beyond {TABLE.name} (nvcc {release})"
        pytest.fail(f"{title}\n{report(beyond)}", pytrace=False)


@pytest.mark.cuda_code
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vectorised_instances_access_16_bytes(build: Build, architecture: str) -> None:
    """Whatever the table says: at least the accesses of one tile."""
    instances = build(architecture)
    if find("nvdisasm") is None:
        pytest.fail(f"--cuda-code: {NO_DISASSEMBLER}", pytrace=False)
    for instance, found in instances:
        if not instance.wide:
            continue
        of_segments = instance.op == "logsumexp"  # forward it writes a row a segment
        inputs = 2 if instance.direction == "backward" and not of_segments else 1
        # A long kernel has all of a chunk; a columns kernel a group of steps.
        is_double = instance.read == "float64"
        of_kernel = {"long": 4 if is_double else 8, "columns": 2 if is_double else 4}
        of_kernel |= {"segment_warp": 4, "segment_block": 4}  # a thread's rows
        packed = instance.kernel.startswith("packed")  # slabs, by vectors of their own
        of_instance = int(instance.others.get("vectors", of_kernel.get(instance.kernel, 0)))
        vectors = 1 if packed else of_instance
        assert vectors > 0, instance.name
        grows = max(1, SIZE[instance.written] // SIZE[instance.read])
        writes_one = packed or (of_segments and instance.direction == "forward")
        stores = 1 if writes_one else vectors * grows
        assert found["LDG"] >= vectors * inputs, (instance.name, found)
        assert found["STG"] >= stores, (instance.name, found)
        if instance.kernel == "long":
            assert found["STS"] and found["LDS"], (instance.name, found)


def test_the_table_is_as_it_is_written() -> None:
    text = TABLE.read_text()
    assert write_table(*read_table(text)) == text


BUDGET = {"registers": 40, "limit": 64, "LDG": 2, "STG": 1, "LDS": 0, "STS": 0}


@pytest.mark.parametrize(("what", "now", "same_nvcc", "fails"), [
    ("registers", 41, True, True),
    ("registers", 39, True, False),
    ("registers", 64, False, False),  # another nvcc: as many as the launch bounds leave
    ("registers", 65, False, True),
    ("limit", 128, True, True),       # a launch bound that is gone
    ("limit", 128, False, True),
    ("limit", 32, True, False),
    ("LDG", 1, True, True),
    ("LDG", 1, False, True),
    ("STG", 0, True, True),
    ("STG", 2, True, False),
    *((what, 1, same_nvcc, True) for what in FORBIDDEN for same_nvcc in [True, False]),
])  # fmt: skip
def test_a_change_is_reported(what: str, now: int, same_nvcc: bool, fails: bool) -> None:
    measured = BUDGET | FORBIDDEN
    assert compare("sm_90", {"it": BUDGET}, {"it": measured}, same_nvcc) == []
    changes = compare("sm_90", {"it": BUDGET}, {"it": measured | {what: now}}, same_nvcc)
    budget = BUDGET.get(what, 0)
    assert changes == [Change("it", "sm_90", what, budget, now, fails)]
    assert report(changes).split()[-5:] == ["it", "sm_90", what, str(budget), str(now)]


@pytest.mark.parametrize("name", ["long_forward softmax float64", "long_forward softmax float32"])
@pytest.mark.parametrize("architecture", ["sm_100", "sm_120"])
def test_a_few_bytes_of_float64_are_excused(architecture: str, name: str) -> None:
    excused = (architecture, name) == ("sm_120", "long_forward softmax float64")
    for spilled, fails in ((32, not excused), (33, True)):
        measured = {name: BUDGET | FORBIDDEN | {"spills": spilled}}
        changes = compare(architecture, {name: BUDGET}, measured, same_nvcc=True)
        assert any(change.fails for change in changes) == fails


def test_a_missing_and_an_unknown_instance_fail() -> None:
    measured = BUDGET | FORBIDDEN | {"spills": 4}
    assert compare("sm_90", {"old": BUDGET}, {"new": measured}, same_nvcc=True) == [
        Change("new", "sm_90", "instance", "missing", "compiled", True),
        Change("new", "sm_90", "spills", 0, 4, True),
        Change("old", "sm_90", "instance", "listed", "missing", True),
    ]


@pytest.mark.parametrize(("kernel", "name"), [
    ("registers_forward_kernel<OP0, 4, __half, float>",
     "registers_forward softmax float16 -> float32 vectors=4"),
    ("long_backward_kernel<OP1, float, float>", "long_backward log_softmax float32"),
    ("packed_forward_kernel<OP0, double, double>", "packed_forward softmax float64"),
    ("columns_backward_kernel<OP0, 2, __nv_bfloat16, __nv_bfloat16>",
     "columns_backward softmax bfloat16 columns=2"),
    ("segment_warp_forward_kernel<(softmax_ext::SegmentOp)2, 8, __half>",
     "segment_warp_forward logsumexp float16 columns=8"),
    ("segment_combine_backward_kernel<double>", "segment_combine_backward float64"),
    ("loss_forward_kernel<__half>", "loss_forward float16"),
])  # fmt: skip
def test_names_of_instances(kernel: str, name: str) -> None:
    kernel = kernel.replace("OP", "(softmax_ext::Op)")
    assert instance_of(f"void softmax_ext::cuda::{kernel}(int)").name == name


@pytest.mark.parametrize("kernel", [
    "reset_kernel(int)",
    "registers_forward_kernel(int)",
    "folded_forward_kernel<OP0, float, float>(int)",
    "long_forward_kernel<OP2, float, float>(int)",
    "long_forward_kernel<OP0, 4, float, float>(int)",
    "long_forward_kernel<OP0, __nv_fp8, float>(int)",
    "columns_forward_kernel<OP0, float, float>(int)",
])  # fmt: skip
def test_a_name_that_is_not_understood_is_an_error(kernel: str) -> None:
    kernel = kernel.replace("OP", "(softmax_ext::Op)")
    with pytest.raises(ValueError, match=r"no name for .*_kernel"):
        instance_of(kernel)
