"""The choice of CUDA schedule and launch (plan.h), for any device, without a GPU."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from plans import DEVICES, Plan

FOLDER = Path(__file__).resolve().parent
DTYPES = ["float16", "bfloat16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32"]
DTYPES += ["int64"]
SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "bool": 1, "uint8": 1}
SIZE |= {"int8": 1, "int16": 2, "int32": 4, "int64": 8}
KIB = 1024


MakePlan = Callable[..., Plan]


@pytest.fixture(scope="module")
def make_plan(tmp_path_factory: pytest.TempPathFactory) -> MakePlan:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("plan") / "plan_shim.so"
    source = FOLDER / "plan_shim.cpp"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined"]
    flags += ["-fsanitize-undefined-trap-on-error", "-shared", "-fPIC"]
    include = f"-I{FOLDER.parent.parent / 'csrc' / 'include'}"
    subprocess.run([compiler, *flags, include, str(source), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.schedule_name.restype = ctypes.c_char_p

    def plan(
        shape: tuple[int, int, int],
        load: str = "float32",
        store: str | None = None,
        *,
        backward: bool = False,
        aligned: bool = True,
        device: str = "H100",
    ) -> Plan:
        """The plan of a forward from `load` to `store`, or of a backward from output type `load`
        to gradient type `store`."""
        store = store or load
        out = (ctypes.c_int64 * 9)()
        library.plan(
            *map(ctypes.c_int64, shape),
            DTYPES.index(load if backward else store),
            DTYPES.index(load),
            DTYPES.index(store),
            2 if backward else 1,
            aligned,
            DEVICES[device].sm_count,
            DEVICES[device].shared_bytes,
            out,
        )
        name = library.schedule_name(ctypes.c_int(out[0])).decode()
        return Plan(name, bool(out[1]), *out[2:])

    return plan


# The largest dim held in registers, by element size: 512 threads of 32 registers for data.
FORWARD_REGISTERS = {"float16": 16384, "bfloat16": 16384, "float32": 16384, "float64": 4096}
BACKWARD_REGISTERS = {"float16": 8192, "bfloat16": 8192, "float32": 8192, "float64": 2048}
ROWS = [1, 2, 7, 8, 9, 31, 32, 33, 127, 256, 257, 1000, 1024, 1025, 2048, 4097, 16384, 16385, 50257]
ROWS += [2**20, 2**31 - 1, 2**31, 2**33 + 1]


@pytest.mark.parametrize("dtype", FORWARD_REGISTERS)
@pytest.mark.parametrize("backward", [False, True])
def test_registers_up_to_their_limit_then_shared_memory_then_streaming(
    make_plan: MakePlan, dtype: str, backward: bool
) -> None:
    limit = (BACKWARD_REGISTERS if backward else FORWARD_REGISTERS)[dtype]
    for device, properties in DEVICES.items():
        # 1 KiB is left to the reductions; both inputs of a backward share the rest.
        inputs = 2 if backward else 1
        shared = (properties.shared_bytes - KIB) // inputs // 16 * 16 // SIZE[dtype]
        for dim, expected in [
            (1, "registers"),
            (limit, "registers"),
            (limit + 1, "shared"),
            (shared, "shared"),
            (shared + 1, "streaming"),
        ]:
            plan = make_plan((4096, dim, 1), dtype, backward=backward, device=device)
            assert plan.schedule == expected, (device, dim, plan)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("load", "store"), [(d, d) for d in FORWARD_REGISTERS]
                         + [("float16", "float32"), ("bfloat16", "float32")])  # fmt: skip
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 4096])
def test_a_row_fits_what_its_threads_hold(
    make_plan: MakePlan, device: str, load: str, store: str, backward: bool, rows: int
) -> None:
    if backward:
        load, store = store, load
    for dim in ROWS:
        plan = make_plan((rows, dim, 1), load, store, backward=backward, device=device)
        assert plan.width * SIZE[load] == 16
        assert plan.across == 1
        assert plan.threads % 32 == 0 and plan.threads <= 512
        if plan.group > 32:
            assert plan.items == 1 and plan.group % 32 == 0
        else:
            assert 32 % plan.group == 0
        assert plan.shared_bytes <= DEVICES[device].shared_bytes - KIB
        assert (plan.shared_bytes > 0) == (plan.schedule == "shared")
        assert plan.blocks == -(-rows // plan.items)
        if plan.schedule == "registers":
            assert plan.group * plan.vectors * plan.width >= dim
        if plan.schedule == "shared":
            assert plan.shared_bytes >= dim * SIZE[load] * (2 if backward else 1)


@pytest.mark.parametrize(("dim", "load", "expected"), [
    (8, "float16", (1, 1)),     # one vector
    (64, "float16", (8, 1)),    # several rows a warp
    (256, "float16", (32, 1)),  # a warp, one vector a thread
    (257, "float16", (32, 2)),
    (1024, "float16", (32, 4)),  # a warp, all the vectors that a thread can hold
    (1025, "float16", (64, 4)),  # more than a warp: whole warps
    (1024, "float32", (32, 8)),
    (16384, "float32", (512, 8)),
])  # fmt: skip
def test_threads_and_vectors_of_a_row_in_registers(
    make_plan: MakePlan, dim: int, load: str, expected: tuple[int, int]
) -> None:
    plan = make_plan((4096, dim, 1), load)
    assert (plan.schedule, plan.group, plan.vectors) == ("registers", *expected)


def test_vector_access_needs_aligned_pointers_and_whole_vectors(make_plan: MakePlan) -> None:
    for dtype, width in [("float16", 8), ("bfloat16", 8), ("float32", 4), ("float64", 2)]:
        assert make_plan((64, 10 * width, 1), dtype).vectorized
        assert not make_plan((64, 10 * width, 1), dtype, aligned=False).vectorized
        assert not make_plan((64, 10 * width + 1, 1), dtype).vectorized
        assert make_plan((64, 17, 10 * width), dtype).vectorized
        assert not make_plan((64, 17, 10 * width), dtype, aligned=False).vectorized
        assert not make_plan((64, 16, 10 * width + 1), dtype).vectorized


@pytest.mark.parametrize(("load", "store"), [
    ("int64", "float32"), ("bool", "float16"), ("float32", "float16"),
    ("float64", "float32"), ("bfloat16", "float16"), ("float16", "float64"),
])  # fmt: skip
def test_other_casts_stream_element_by_element(make_plan: MakePlan, load: str, store: str) -> None:
    for dim in [1, 7, 1024, 50257]:
        plan = make_plan((300, dim, 1), load, store)
        assert (plan.schedule, plan.vectorized, plan.width) == ("streaming", False, 1)
    assert make_plan((300, 7, 5), load, store).schedule == "strided"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FORWARD_REGISTERS)
@pytest.mark.parametrize("backward", [False, True])
def test_strided_launches_are_within_the_limits(
    make_plan: MakePlan, device: str, dtype: str, backward: bool
) -> None:
    for outer in [1, 32, 2**20]:
        for dim in [1, 2, 19, 1000, 8192, 2**31]:
            for inner in [2, 3, 7, 8, 32, 196, 512, 8192, 512 * 512]:
                plan = make_plan((outer, dim, inner), dtype, backward=backward, device=device)
                assert plan.schedule == "strided"
                assert plan.threads <= 256 and plan.items <= 64
                assert plan.group & (plan.group - 1) == 0 and plan.across in (1, 2, 4, 8, 16, 32)
                # The reduction's buffer: a value a column for each thread.
                assert plan.shared_bytes >= plan.threads * plan.width * 4
                assert plan.shared_bytes <= 48 * KIB
                columns = -(-inner // (plan.across * plan.width))
                assert plan.blocks == min(-(-outer * columns // plan.items), 2**31 - 1)


def test_small_inner_sizes_leave_neighbouring_threads_on_neighbouring_memory(
    make_plan: MakePlan,
) -> None:
    for inner in [2, 3, 4]:
        plan = make_plan((1000, 500, inner), "float32")
        assert (plan.across, plan.width) == (1, 4) and plan.group >= 32


def test_a_strided_block_holds_short_dims_whole(make_plan: MakePlan) -> None:
    plan = make_plan((8, 19, 512 * 512), "float32")
    assert plan.group * plan.vectors >= 19


def test_block_counts_are_64_bit_and_clamped_to_the_grid(make_plan: MakePlan) -> None:
    assert make_plan((2**31 - 1, 2048, 1), "float32").blocks == 2**31 - 1
    assert make_plan((2**31, 2048, 1), "float32").blocks == 2**31 - 1
    assert make_plan((2**33, 2, 1), "float32").blocks == 2**33 // 128
    assert make_plan((2**40, 2, 3), "float32").blocks == 2**31 - 1


@pytest.mark.parametrize("shape", [(0, 5, 1), (5, 0, 1), (0, 5, 3), (5, 0, 3), (5, 3, 0)])
def test_nothing_is_launched_for_an_empty_tensor(
    make_plan: MakePlan, shape: tuple[int, int, int]
) -> None:
    assert make_plan(shape).blocks == 0
