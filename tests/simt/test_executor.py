"""That the host executor finds what it is for: toys.cpp has kernels with one planted defect each.

A defect shows as a wrong result, or as a report that names the kernel, the block, the threads and
the source line. Without its defect each kernel gives the right result everywhere.
"""

import functools
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lanes import ROOT, build

SOURCE = Path(__file__).resolve().parent / "toys.cpp"
ORDERS = ("forward", "reverse", "random", "greedy")
SECONDS = 120  # of one run; more is a loop that never ends
NVCC = shutil.which("nvcc")


@pytest.fixture
def lane(request: pytest.FixtureRequest) -> str:
    """The parameter. Sanitizers run where --simt-lanes names them, the others always."""
    name: str = request.param
    if name in ("asan", "tsan") and name not in request.config.getoption("--simt-lanes").split(","):
        pytest.skip(f"runs with --simt-lanes={name}")
    return name


@functools.cache
def program(lane: str) -> Path:
    return build(lane, "toys")


@functools.cache
def line_of(marker: str) -> int:
    """Of toys.cpp, that ends with `// planted: marker`."""
    lines = SOURCE.read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if line.endswith(f"// planted: {marker}"))
    return number


def run(lane: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    words = [f"{key}={value}" for key, value in options.items()]
    return subprocess.run(
        [str(program(lane)), *arguments, *words],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def results(lane: str, toy: str, variant: str, **options: object) -> list[str]:
    """`right` or `wrong` of each run of a toy in which nothing is reported."""
    result = run(lane, toy, variant, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return re.findall(r"result (right|wrong)$", result.stdout, re.MULTILINE)


# --- Without a defect ----------------------------------------------------------------------------

# Each launches at a limit, some with very many threads: not for each seed.
LAUNCHES = ["launch_threads", "launch_threads_z", "launch_grid_y", "launch_grid_z"]
LAUNCHES += ["launch_shared", "launch_shared_unasked", "launch_cluster", "launch_cluster_blocks"]
LAUNCHES += ["launch_cluster_unasked"]
TOYS = re.findall(r"^    \{\"(\w+)\", \w+", SOURCE.read_text(), re.MULTILINE)


@pytest.mark.parametrize("lane", ["o1", "asan", "tsan", "ucontext"], indirect=True)
@pytest.mark.parametrize("toy", TOYS)
def test_correct_kernels_are_right_in_every_order(toy: str, lane: str) -> None:
    seeds, resident = ([0], [1]) if toy in LAUNCHES else ([0, 1, 2], [1, 3])
    if lane == "ucontext":
        seeds, resident = [0], [3]
    found = results(
        lane,
        toy,
        "correct",
        order=",".join(ORDERS),
        seed=",".join(map(str, seeds)),
        resident=",".join(map(str, resident)),
    )
    assert found == ["right"] * (len(ORDERS) * len(seeds) * len(resident))


def test_all_toys_are_known() -> None:
    listed = run("o1").stdout.split("\n")
    assert {line.split()[0] for line in listed if line} == set(TOYS) and len(TOYS) > 40


# --- Wrong results -------------------------------------------------------------------------------

# In which orders the result of the planted defect is wrong, for every seed. Where a barrier is
# missing that is where a thread runs ahead of one it should wait for.
WRONG = {
    # Some pair of warps always runs one after the other.
    "exchange": ORDERS,
    "reuse": ORDERS,
    "group_exchange": ORDERS,
    # Shuffles keep all warps in step: only one warp running ahead of the others shows it.
    "block_sum": ("greedy",),
    # Memory is in order once the lanes have met: only ThreadSanitizer sees that nothing says so.
    "warp_exchange": (),
    "row_sum_store": (),
    "row_sum_load": (),
    "row_sum_scope": (),
    # A plain addition, between whose load and store no other thread runs.
    "atomics": (),
    "static_poison": ORDERS,
    "dynamic_poison": ORDERS,
    "cluster_sum_first": ORDERS,
    "cluster_ring_first": ORDERS,
    # The pointer is older than the exit of the block it points into.
    "cluster_ring_last": ORDERS,
    "grid_sync": ORDERS,
    "shuffles": ORDERS,
}
SEEDS = (0, 1, 2, 3)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("toy", WRONG)
def test_defects_give_wrong_results(toy: str, order: str) -> None:
    found = results("o1", toy, "planted", order=order, seed=",".join(map(str, SEEDS)))
    assert found == ["wrong" if order in WRONG[toy] else "right"] * len(SEEDS)


# One thread writes for all: right where it is the first, which in random and in greedy order it is
# for some seeds. One of these, fixed, shows the defect.
@pytest.mark.parametrize(
    ("order", "wrong"), [("forward", 0), ("reverse", len(SEEDS)), ("random", 1), ("greedy", 1)]
)
def test_missing_barrier_after_a_broadcast(order: str, wrong: int) -> None:
    found = results("o1", "broadcast", "planted", order=order, seed=",".join(map(str, SEEDS)))
    assert len(found) == len(SEEDS)
    assert found.count("wrong") >= wrong if wrong else "wrong" not in found


@pytest.mark.parametrize("lane", ["o1", "asan", "tsan", "ucontext"], indirect=True)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("toy", ["static_poison", "dynamic_poison"])
def test_unwritten_shared_memory_is_nan_in_every_block(toy: str, order: str, lane: str) -> None:
    # One block after another has the same memory, which the one before has written.
    output = run(lane, toy, "planted", order=order, resident=1).stdout
    assert "wrong: 384 of 384 values, 384 of them NaN;" in output


# --- Reports -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What a run has to end with. Text is a regular expression, unless it says otherwise."""

    toy: str
    says: str  # what it is, at the beginning
    lines: tuple[str, ...]  # those of toys.cpp that it names (their markers), one of them first
    kernel: str = ""  # by default the toy's
    who: str = r"block \(\d+, \d+, 0\), thread \(\d+, 0, 0\), lane \d+ of warp \d+"
    forward: str = ""  # who, in forward order: the text itself
    also: str = ""  # what it says besides
    orders: tuple[str, ...] = ORDERS
    variant: str = "planted"
    options: tuple[tuple[str, int], ...] = ()

    def check(self, lane: str, order: str) -> None:
        options = {"order": order, **dict(self.options)}
        result = run(lane, self.toy, self.variant, **options)
        text = result.stderr
        assert result.returncode < 0 and "result" not in result.stdout, result.stdout + text
        found = re.search(r"^simt: (.*\n)+?(?=  kernel |\Z)", text, re.MULTILINE)
        assert found, text
        head = found[0]
        assert re.match(f"simt: {self.says}", head), text
        named = [int(number) for number in re.findall(r"\btests/simt/toys\.cpp:(\d+)", head)]
        wanted = {line_of(marker) for marker in self.lines}
        assert wanted <= set(named), text
        # Where a thread did it, that comes first; a launch has its callers.
        assert not wanted or self.who == BEFORE_THE_KERNEL or named[0] in wanted, text
        kernel = rf"\bkernel {self.kernel or self.toy}_kernel(<.*>)?( asks |$)"
        assert re.search(kernel, text, re.MULTILINE), text
        assert re.search(rf"^  {self.who}$", text, re.MULTILINE), text
        assert order != "forward" or f"  {self.forward}\n" in text or not self.forward, text
        assert re.search(self.also, text, re.MULTILINE), text
        # Nothing of what runs the kernels.
        assert not re.search(r"executor\.|report\.|simt/cuda/|invoke|fiber|0x\w+ in ", text), text


def thread(number: int, block: int = 0) -> str:
    place = f"lane {number % 32} of warp {number // 32}"
    return f"block ({block}, 0, 0), thread ({number}, 0, 0), {place}"


def named(marker: str) -> str:
    return rf"tests/simt/toys\.cpp:{line_of(marker)}\b"


BEFORE_THE_KERNEL = ".*"  # no thread runs

# The executor's own.
REPORTS = [
    Report(
        "load_word", r"misaligned: .* 16 bytes at address 0x", ("load_word",), forward=thread(0)
    ),
    Report(
        "store_word", r"misaligned: .* 16 bytes at address 0x", ("store_word",), forward=thread(0)
    ),
    Report(
        "shuffle_elsewhere",
        r"divergence: lane \d+ came to __shfl_xor_sync at .*, while lane \d+ waits in __shfl_xor",
        ("shuffle_elsewhere, one", "shuffle_elsewhere, other"),
        forward=thread(16),
    ),
    Report(
        "shuffle_masks",
        r"divergence: lane \d+ came to .*, mask 0x(\w+), while lane \d+ waits in .*, mask 0x(?!\1)",
        ("shuffle_masks",),
        forward=thread(16),
    ),
    Report(
        "shuffle_caller",
        r"divergence: lane \d+ is not in mask 0x0000ffff of its own __shfl_xor_sync at ",
        ("shuffle_caller",),
        forward=thread(16),
    ),
    Report(
        "shuffle_source",
        r"__shfl_xor_sync at \S+: lane \d+ reads lane \d+, which mask 0x\w+ does not have",
        ("shuffle_source",),
        forward=thread(0),
    ),
    Report(
        "shuffle_exited",
        r"__shfl_sync at \S+: lane 19 reads lane 20, which .* has exited",
        ("shuffle_exited",),
        forward=thread(19),
    ),
    Report(
        "barrier_elsewhere",
        r"divergence: a thread came to __syncthreads at .* while others wait in __syncthreads at ",
        ("barrier_elsewhere, one", "barrier_elsewhere, other"),
        forward=thread(32),
    ),
    Report(
        "barrier_or_shuffle",
        "deadlock: no thread can run",
        (),
        who=r"threads of block \(\d, 0, 0\):",
        also=r"^    0 to 15, .* waiting in __shfl_xor_sync at "
        + named("barrier_or_shuffle, shuffle")
        + r", mask 0xffffffff\n    16 to 31, .* waiting in __syncthreads at "
        + named("barrier_or_shuffle, barrier")
        + "$",
    ),
    # It waits for blocks that begin only when it is done.
    Report(
        "grid_barrier",
        "deadlock: threads only wait for a value that nobody writes",
        (),
        who=r"threads of block \(\d, 0, 0\):",
        also=r"1 of 3 blocks begun\n(.*\n)*    0: spinning in atomicAdd at "
        + named("grid_barrier")
        + r"\n    1 to 127: waiting in __syncthreads",
        options=(("resident", 1),),
    ),
    Report(
        "grid_sync_launch",
        r"grid.sync at \S+: the launch is not cooperative",
        ("grid_sync_launch",),
        forward=thread(0),
        kernel="grid_sync",
    ),
    Report(
        "cluster_sum_last",
        r"cluster.map_shared_rank at \S+: block \d of the cluster has exited",
        ("cluster_sum, map",),
        kernel="cluster_sum",
        forward=thread(0, block=1),
    ),
    Report(
        "cluster_rank",
        r"cluster.map_shared_rank at \S+: rank 3 of a cluster of 3 blocks",
        ("cluster_rank",),
        forward=thread(127, block=2),
    ),
    Report(
        "cluster_pointer",
        r"cluster.map_shared_rank at \S+: not an address in the block's shared memory",
        ("cluster_pointer",),
        forward=thread(127, block=2),
    ),
    Report(
        "cluster_arrive",
        r"cluster.barrier_arrive at \S+: the thread has arrived before, and has not waited",
        ("cluster_arrive",),
        forward=thread(0),
    ),
    Report(
        "cluster_wait",
        r"cluster.barrier_wait at \S+: the thread has not arrived",
        ("cluster_wait",),
        forward=thread(0),
    ),
    Report(
        "cluster_large",
        "the block's shared memory is 232452 bytes, the device has 232448",
        ("cluster_large",),
        forward=thread(0),
    ),
]

# By the message and the launch that it is about, before any thread runs: the order is all the same.
LAUNCHES_OUT_OF_RANGE = [
    Report(
        toy,
        f"a launch out of range: {message}",
        (marker,),
        kernel="count",
        who=BEFORE_THE_KERNEL,
        also=also,
        orders=("forward",),
    )
    for toy, marker, message, also in [
        ("launch_threads", "launch_threads", r"a block of \(1025, 1, 1\) threads", r"\(1025, 1, 1"),
        ("launch_threads_z", "launch_threads_z", r"a block of \(1, 1, 65\) threads", "64 in z"),
        ("launch_grid_y", "launch_grid_y", r"a grid of \(1, 65536, 1\) blocks", r"\(1, 65536, 1"),
        ("launch_grid_z", "launch_grid_z", r"a grid of \(1, 1, 65536\) blocks", r"\(1, 1, 65536"),
        ("launch_shared", "launch_shared", ".* asks for 232449 bytes", "the device has 232448$"),
        ("launch_shared_unasked", "launch_unasked", "49153 bytes of dynamic", "was given 49152$"),
        ("launch_cluster", "launch_cluster", r"clusters of \(4, 1, 1\) blocks", r"of \(6, 1, 1\)$"),
        (
            "launch_cluster_blocks",
            "launch_cluster_blocks",
            r"clusters of \(17, 1",
            r"\(272, 1, 1\)$",
        ),
        ("launch_cluster_unasked", "cluster_unasked", "clusters of 9 blocks", "most are 8$"),
    ]
] + [
    # What one device has, another has not.
    Report(
        "launch_cluster",
        r"a launch out of range: clusters need compute capability 9.0, the device has 8.0",
        ("launch_cluster",),
        kernel="count",
        who=BEFORE_THE_KERNEL,
        orders=("forward",),
        variant="correct",
        options=(("capability", 80),),
    ),
    Report(
        "launch_shared",
        r"a launch out of range: .* asks for 232448 bytes .*, the device has 101376\n",
        ("launch_shared",),
        kernel="count",
        who=BEFORE_THE_KERNEL,
        orders=("forward",),
        variant="correct",
        options=(("shared", 99 * 1024),),
    ),
]

# AddressSanitizer's, and in the last UndefinedBehaviorSanitizer's.
MEMORY_ERRORS = [
    Report(
        "global_store",
        "AddressSanitizer: heap-buffer-overflow",
        ("global_store",),
        who=re.escape(thread(118, block=2)),
        also=r"WRITE of size 4 .*\n(.*\n)*.* 0 bytes (to the right of|after) 1496-byte region",
    ),
    Report(
        "global_load",
        "AddressSanitizer: heap-buffer-overflow",
        ("global_load",),
        who=re.escape(thread(127, block=2)),
        also=r"READ of size 4 .*\n(.*\n)*.* 0 bytes (to the right of|after) 1536-byte region",
    ),
    Report(
        "dynamic_shared_store",
        "AddressSanitizer: heap-buffer-overflow",
        ("dynamic_shared_store",),
        forward=thread(127),
        also=r"WRITE of size 4 .*\n.*\n  byte 512 of the 512 bytes of dynamic shared memory of ",
    ),
    Report(
        "static_shared_store",
        "AddressSanitizer: heap-buffer-overflow",
        ("static_shared_store",),
        forward=thread(127),
        also=r"WRITE of size 4 .*\n.*\n  byte 512 of the 512 bytes of static shared memory of ",
    ),
    Report(
        "cluster_ring_last",
        "AddressSanitizer: use-after-poison",
        ("cluster_ring, read",),
        kernel="cluster_ring",
        also=r"static shared memory of block \(\d, 0, 0\), which has exited",
    ),
    Report(
        "float4",
        "ended by Aborted",
        ("float4",),
        forward=thread(0),
        also=named("float4")
        + r":\d+: runtime error: .* misaligned address 0x\w+ for type .*float4",
    ),
]

RACE = "ThreadSanitizer: data race"
THREAD = r"thread \(\d+, 0, 0\) of block \(\d+, \d+, 0\)( or one before it in its place)?"
BOTH_THREADS = (
    rf"^  (Read|Write) of size 4 at 0x\w+ by {THREAD}:\n    tests/simt/toys.cpp:\d+: .*_kernel.*\n"
    rf"  Previous (read|write) of size 4 at 0x\w+ by {THREAD}:\n    tests/simt/toys.cpp:\d+: "
)


def race(toy: str, kernel: str, resident: int = 1, orders: tuple[str, ...] = ORDERS) -> Report:
    lines = (f"{kernel}, write", f"{kernel}, read")
    options = (("resident", resident),)
    return Report(
        toy, RACE, lines, kernel=kernel, also=BOTH_THREADS, orders=orders, options=options
    )


RACES = [
    race("exchange", "exchange"),
    race("broadcast", "broadcast"),
    race("block_sum", "block_sum"),
    race("reuse", "reuse"),
    # A shuffle is no fence.
    race("warp_exchange", "warp_exchange"),
    race("group_exchange", "group_exchange"),
    race("cluster_sum_first", "cluster_sum"),
    race("cluster_ring_first", "cluster_ring"),
    # Blocks race with those that are resident with them.
    race("row_sum_store", "row_sum", resident=3),
    race("row_sum_scope", "row_sum", resident=3),
    # The last block's own fence, before the atomic, orders what was written before it: only where
    # a write came after that is there a race.
    race("row_sum_load", "row_sum", resident=12, orders=("random",)),
    Report("atomics", RACE, ("atomics",), also=BOTH_THREADS),
]


def cases(*tables: tuple[str, tuple[str, ...], list[Report]]) -> list[object]:
    """Of lane, orders and reports."""
    return [
        pytest.param(lane, report, order, id="-".join([lane, report.toy, order, *extra]))
        for lane, orders, reports in tables
        for report in reports
        for extra in [[f"{key}={value}" for key, value in report.options]]
        for order in report.orders
        if order in orders
    ]


@pytest.mark.parametrize(
    ("lane", "report", "order"),
    cases(
        ("o1", ORDERS, REPORTS + LAUNCHES_OUT_OF_RANGE),
        ("asan", ("forward",), REPORTS + LAUNCHES_OUT_OF_RANGE),
        ("asan", ORDERS, MEMORY_ERRORS),
        ("tsan", ("forward",), REPORTS + LAUNCHES_OUT_OF_RANGE),
        ("tsan", ORDERS, RACES),
    ),
    indirect=["lane"],
)
def test_defects_are_reported(lane: str, report: Report, order: str) -> None:
    report.check(lane, order)


def test_each_planted_defect_has_its_test() -> None:
    tested = {report.toy for report in REPORTS + LAUNCHES_OUT_OF_RANGE + MEMORY_ERRORS + RACES}
    planted = re.findall(r"^(\w+) planted$", run("o1").stdout, re.MULTILINE)
    assert set(planted) == tested | WRONG.keys()


# --- Half types ----------------------------------------------------------------------------------


def values_of(dtype: torch.dtype) -> torch.Tensor:
    """What each of the 2^16 patterns stands for, in float64."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).double()


def hard_to_round(dtype: torch.dtype) -> torch.Tensor:
    """In float64: every value, every tie and what lies just beside one, and beyond the largest."""
    finite = values_of(dtype)
    finite = finite[finite.isfinite()].sort().values
    # As if there were one more on either side: half of the way there a value becomes infinite.
    step = finite[-1] - finite[-2]
    ends = torch.stack([finite[-1], finite[-1] + step]).double()
    grid = torch.cat([-ends.flip(0), finite[1:-1], ends])
    ties = (grid[1:] + grid[:-1]) / 2
    beside = torch.tensor([-torch.inf, torch.inf], dtype=torch.float64)
    near = [ties, *(torch.nextafter(ties, way) for way in beside)]
    # The nearest in float32: rounded to float32 first, what is beside a tie becomes one.
    near += [torch.nextafter(ties.float(), way.float()).double() for way in beside]
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 5e-324, -5e-324, 2.0**-149, 2.0**-150]
    special += [1.7e308, -1.7e308, 3.5e38, 3.4028235e38, 2.0**-133, 2.0**-134, 2.0**-25]
    return torch.cat([finite, *near, torch.tensor(special, dtype=torch.float64)])


def nearest_even(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """By definition: of the two neighbours the nearer, of equally near ones the even pattern."""
    patterns = torch.arange(2**15).to(torch.int16)
    grid = patterns.view(dtype).double()
    infinity = int(grid.isinf().nonzero())
    grid = grid[: infinity + 1]
    grid[infinity] = 2 * grid[infinity - 1] - grid[infinity - 2]
    size = values.abs().clamp(max=float(grid[infinity]))
    below = (torch.searchsorted(grid, size, right=True) - 1).clamp(0, infinity - 1)
    middle = (grid[below] + grid[below + 1]) / 2
    up = (size > middle) | ((size == middle) & (below % 2 == 1))
    result = patterns[below + up].view(dtype)
    result = torch.where(values.signbit(), -result, result)
    return torch.where(values.isnan(), torch.nan, result)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_convert_as_cuda_does(dtype: torch.dtype) -> None:
    given = hard_to_round(dtype)
    output = subprocess.run(
        [str(program("o1")), "convert", str(dtype).removeprefix("torch.")],
        input=given.numpy().tobytes(),
        capture_output=True,
        check=True,
        timeout=SECONDS,
    ).stdout
    wide = torch.frombuffer(bytearray(output[: 4 * 2**16]), dtype=torch.float32)
    narrow = torch.frombuffer(bytearray(output[4 * 2**16 :]), dtype=dtype).view(2, -1)

    def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
        """Bit by bit, but that one NaN is like another."""
        nan = expected.isnan()
        bits = torch.int32 if found.dtype == torch.float32 else torch.int16
        equal = found.view(bits) == expected.view(bits)
        return bool(torch.where(nan, found.isnan(), equal).all())

    # In the order of the patterns as unsigned numbers.
    assert same(wide, values_of(dtype).roll(2**15).float())
    # torch itself rounds float64 to float32 first, so it is no reference for that.
    assert same(narrow[0], given.float().to(dtype))
    assert same(narrow[0], nearest_even(given.float().double(), dtype))
    assert same(narrow[1], nearest_even(given, dtype))
    # They would be the same if rounding twice did no harm.
    assert not same(narrow[0], narrow[1])


# --- CUDA ----------------------------------------------------------------------------------------


@pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")
def test_toys_are_cuda(tmp_path: Path) -> None:
    command = [str(NVCC), "-arch=sm_90", "-x", "cu", "-std=c++17", "-cubin", "-Xcompiler", "-Wall"]
    command += ["-Werror", "all-warnings", f"-I{ROOT / 'csrc' / 'include'}", str(SOURCE)]
    result = subprocess.run(
        [*command, "-o", str(tmp_path / "toys.cubin")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
