"""The memory of CPU results of 32 MB and more: kept for the next, and the system's to take."""

import ctypes
import gc
import mmap
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_threads_and_isa import imports, run

import softmax_ext

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="its memory is malloc's")

ROWS, DIM = 2100, 4096  # of float32: 34.4 MB, no multiple of a huge page


def result_of(rows: int = ROWS) -> torch.Tensor:
    """Rows of equal values: each element is 1 / DIM."""
    return softmax_ext.softmax(torch.zeros(1, DIM).expand(rows, DIM), 1)


def is_right(result: torch.Tensor) -> bool:
    return bool((result == 1 / DIM).all())


def mapping(address: int) -> dict[str, str]:
    """What /proc/self/smaps says of the memory at an address; nothing if there is none."""
    entries: dict[str, str] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, value = line.partition(":")
        if "-" in key.split()[0] and " " in key:
            begin, end = (int(part, 16) for part in key.split()[0].split("-"))
            inside = begin <= address < end
        elif inside:
            entries[key] = value
    return entries


def kilobytes(text: str) -> int:
    return int(text.split()[0])


def huge_pages_are_given() -> bool:
    memory = mmap.mmap(-1, 2**23)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return False
    return "hg" in mapping(ctypes.addressof(ctypes.c_char.from_buffer(memory)))["VmFlags"].split()


@pytest.mark.parametrize("rows", [300, ROWS])  # malloc's memory, and our own
def test_huge_pages_are_asked_for(rows: int) -> None:
    if not huge_pages_are_given():
        pytest.skip("this system has no huge pages to ask for")
    result = result_of(rows)
    assert "hg" in mapping(result.data_ptr() + result.nbytes // 2)["VmFlags"].split()


def test_the_next_result_has_the_memory_of_the_last() -> None:
    result = result_of()
    place = result.data_ptr()
    del result
    result = result_of()
    assert result.data_ptr() == place
    other = result_of()
    assert other.data_ptr() != place
    assert is_right(result)
    assert is_right(other)


def test_a_much_smaller_result_does_not() -> None:
    results = result_of(3 * ROWS), result_of(2 * ROWS)  # at once, so that three may be there
    places = [result.data_ptr() for result in results]
    del results
    smaller = result_of()
    assert smaller.data_ptr() not in places
    larger = result_of(3 * ROWS)
    assert larger.data_ptr() == places[0]


def test_what_is_kept_is_bounded_by_what_was_in_use_at_once() -> None:
    """A quarter above it: many sizes, one at a time, do not add up."""
    sizes = [ROWS + 997 * k % 5000 for k in range(30)]
    largest = 0
    for rows in sizes:
        largest = max(largest, result_of(rows).nbytes + 2**21)
        assert softmax_ext.memory_stats().kept_bytes <= 1.25 * largest


def test_what_is_kept_is_known_and_given_back() -> None:
    results = [result_of() for _ in range(2)]
    places, size = [result.data_ptr() for result in results], results[0].nbytes
    assert softmax_ext.memory_stats() == softmax_ext.MemoryStats(0, 0, 2**29)
    del results
    stats = softmax_ext.memory_stats()
    assert stats.kept_blocks == 2
    assert 2 * size <= stats.kept_bytes < 2 * (size + 2**21)
    held = result_of()
    softmax_ext.empty_cache()
    assert softmax_ext.memory_stats() == softmax_ext.MemoryStats(0, 0, 2**29)
    assert [bool(mapping(place)) for place in places].count(True) == 1  # the one in use
    assert is_right(held)


ADDRESS_SPACE = """
import resource, sys, torch, softmax_ext
sys.path.insert(0, sys.argv[1])
from test_softmax_large_outputs import result_of
torch.set_num_threads(1)
result_of()
assert softmax_ext.memory_stats().kept_blocks == 1
limited = getattr(resource, sys.argv[2])
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(limited, (pages * resource.getpagesize() + 2**30, resource.RLIM_INFINITY))
result_of(7 * 2100)  # 241 MB, and its input
assert softmax_ext.memory_stats() == softmax_ext.MemoryStats(0, 0, 0)
torch.empty(700 * 2**20, dtype=torch.uint8)
resource.setrlimit(limited, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
result_of()
assert softmax_ext.memory_stats().kept_blocks == 1
"""


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_nothing_is_kept_in_a_limited_address_space(limit: str) -> None:
    process = run(ADDRESS_SPACE, str(Path(__file__).parent), limit)
    assert process.returncode == 0, process.stderr


NO_NUMBERS = ["many", "-1", "1.5", " 64", "64 MB", "0x40", str(2**64), "+1"]


def test_a_limit_that_is_no_number_is_an_error_at_import() -> None:
    for value, end in imports("SOFTMAX_EXT_KEEP_MB", NO_NUMBERS).items():
        expected = f'ImportError: SOFTMAX_EXT_KEEP_MB is "{value}"; expected a whole number'
        assert end.startswith(expected)


def test_views_and_numpy_keep_it() -> None:
    result = result_of()
    view, array = result[1:], result.numpy()
    del result
    result_of().fill_(7)
    assert is_right(view)
    del view
    result_of().fill_(7)
    assert (array == 1 / DIM).all()


def test_the_system_may_take_it() -> None:
    """Lazily freed, in the kernel's words (proc(5)): no working memory, and no swap."""
    result = result_of()
    place, size = result.data_ptr(), result.nbytes
    assert kilobytes(mapping(place)["LazyFree"]) == 0
    del result
    entries = mapping(place)
    assert kilobytes(entries["LazyFree"]) * 1024 >= 0.9 * size
    # And if it has: the pages are made anew.
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.madvise(ctypes.c_void_p(place), ctypes.c_size_t(size), mmap.MADV_DONTNEED) == 0
    assert kilobytes(mapping(place)["Rss"]) * 1024 < 0.1 * size
    result = result_of()
    assert result.data_ptr() == place
    assert is_right(result)


LIMIT = """
import sys, torch, softmax_ext
sys.path.insert(0, sys.argv[1])
from test_softmax_large_outputs import mapping, result_of
results = [result_of() for _ in range(3)]
places = [result.data_ptr() for result in results]
while results:
    results.pop(0)
print(*(bool(mapping(place)) for place in places))
"""


@pytest.mark.parametrize(
    ("megabytes", "kept"),
    [("0", "False False False"), ("40", "False False True"), ("90", "False True True")],
)
def test_the_environment_limits_what_is_kept(megabytes: str, kept: str) -> None:
    """The oldest goes first."""
    process = run(LIMIT, str(Path(__file__).parent), SOFTMAX_EXT_KEEP_MB=megabytes)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == kept


def test_no_more_than_half_a_gigabyte_is_kept() -> None:
    results = [result_of() for _ in range(20)]
    places = [result.data_ptr() for result in results]
    del results
    kept = [kilobytes(entry["Rss"]) for entry in map(mapping, places) if entry]
    assert 0 < sum(kept) <= 512 * 1024


def test_resizing() -> None:
    result = result_of()
    result.resize_(2 * ROWS, DIM)
    assert is_right(result[:ROWS])
    result.resize_(10, DIM)
    assert is_right(result)
    result.untyped_storage().resize_(0)
    assert is_right(result_of())


def test_the_profiler_sees_it() -> None:
    with torch.profiler.profile(profile_memory=True) as profile:
        result = result_of()
        size = result.nbytes
        del result
    sizes = [
        event.nbytes()
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    assert size in sizes
    assert -size in sizes


def test_threads() -> None:
    def work(number: int) -> bool:
        results = [result_of(ROWS + 512 * (number % 3)) for _ in range(2)]
        if number % 5 == 0:
            softmax_ext.empty_cache()
        return all(map(is_right, results))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(24)))


FORK = """
import os, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_softmax_large_outputs import is_right, result_of
held = result_of()
place = result_of().data_ptr()  # freed, and so kept
child = os.fork()
if child == 0:
    result = result_of()
    os._exit(0 if is_right(result) and is_right(held) and result.data_ptr() == place else 1)
result = result_of().fill_(7)
assert os.waitpid(child, 0)[1] == 0
assert (result == 7).all() and is_right(held)
"""


def test_a_child_has_its_own() -> None:
    process = run(FORK, str(Path(__file__).parent))
    assert process.returncode == 0, process.stderr


FORK_AMID = """
import os, signal, sys, threading, torch, softmax_ext
sys.path.insert(0, sys.argv[1])
from test_softmax_large_outputs import result_of
torch.set_num_threads(1)
stop = threading.Event()

def use(number):
    torch.set_num_threads(1)
    while not stop.is_set():
        result_of(2100 + 512 * number)
        softmax_ext.memory_stats()
        if number == 0:
            softmax_ext.empty_cache()

threads = [threading.Thread(target=use, args=(number,), daemon=True) for number in range(2)]
for thread in threads:
    thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        before = softmax_ext.memory_stats()
        assert before.kept_blocks <= 16 and before.kept_bytes <= before.limit_bytes
        softmax_ext.empty_cache()
        assert softmax_ext.memory_stats().kept_bytes == 0
        result_of()
        stats = softmax_ext.memory_stats()
        os._exit(0 if (stats.kept_blocks, stats.kept_bytes) == (1, 34 * 2**20) else 1)
    status = os.waitpid(child, 0)[1]
    assert status == 0, status
stop.set()
for thread in threads:
    thread.join()
"""


def test_a_child_forked_while_other_threads_are_in_it() -> None:
    process = run(FORK_AMID, str(Path(__file__).parent))
    assert process.returncode == 0, process.stderr


def error_of(function: Callable[..., torch.Tensor], *shape: int) -> tuple[type, str]:
    with pytest.raises(RuntimeError) as caught:
        function(torch.zeros(1, 1, dtype=torch.float64).expand(shape), 1)
    return type(caught.value), str(caught.value).splitlines()[0]


@pytest.mark.parametrize(
    "shape",
    [
        (2**40, 64),  # bytes: more than there can be
        (2**23, 2**38 + 1),  # 2^64 + 2^26
        (2**30, 2**31 - 1),  # 2^64 - 2^33
    ],
)
def test_there_is_not_enough(shape: tuple[int, int]) -> None:
    """torch's error, of torch's allocator."""
    assert error_of(softmax_ext.softmax, *shape) == error_of(torch.softmax, *shape)


@pytest.fixture(autouse=True)
def nothing_left_over() -> None:
    """What earlier tests kept is given back."""
    gc.collect()
    softmax_ext.empty_cache()
