"""The kernels of segments: rows of different lengths, which a warp, a block or several have."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from host import Host
from kernel_cases import VECTOR_BYTES, assert_same_bits
from lanes import SANITIZERS
from pairwise import all_pairs
from segment_reference import assert_close, assert_gradient_close, by_loop, pointers
from segments_host import Result, SegmentsHost
from tolerances import FLOATING

OPS = ("softmax", "log_softmax", "logsumexp")
DIRECTIONS = ("forward", "backward")
CHUNK = 128  # rows
# None; one; a lane's rows, and one more; a warp's lanes, one less and one more.
SHORT = [0, 1, 4, 5, 0, 31, 32, 33]
HEADS = [
    1,  # neighbours are of one column
    3,  # no whole vector, and lanes of no column
    8,  # two vectors of float32, one of 16 bits
    64,  # several tiles
]


@pytest.fixture(scope="session")
def segments(host: Host) -> Iterator[SegmentsHost]:
    segments = SegmentsHost(host.lane, host.seed)
    yield segments
    segments.close()


def skip_what_another_shows(host: SegmentsHost, dtype: torch.dtype) -> None:
    if host.lane in SANITIZERS and dtype == torch.bfloat16:
        pytest.skip("sanitizers: the same accesses as float16")


def values(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * 3).to(dtype)


def run(
    host: SegmentsHost,
    direction: str,
    op: str,
    x: torch.Tensor,
    ptr: torch.Tensor,
    **how: object,
) -> Result:
    """A gradient of random numbers, which are the same for the same shape."""
    if direction == "forward":
        return host.forward(op, x, ptr, **how)
    y, grad = output_and_gradient(op, x, ptr, float(str(how.get("scale", 1.0))))
    return host.backward(op, grad, y, x, ptr, **how)


def output_and_gradient(
    op: str, x: torch.Tensor, ptr: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    y = by_loop(op, x.double(), 1, scale, ptr=ptr).to(x.dtype)
    return y, torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(x.dtype)


def check(
    host: SegmentsHost,
    direction: str,
    op: str,
    x: torch.Tensor,
    ptr: torch.Tensor,
    scale: float = 1.0,
    **how: object,
) -> Result:
    result = run(host, direction, op, x, ptr, scale=scale, **how)
    if direction == "forward":
        assert_close(result.tensor, op, x, 1, scale, ptr=ptr)
    else:
        _, grad = output_and_gradient(op, x, ptr, scale)
        assert_gradient_close(result.tensor, op, grad, x, 1, scale, ptr=ptr)
    return result


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", OPS)
def test_lengths(
    segments: SegmentsHost, op: str, direction: str, dtype: torch.dtype, heads: int
) -> None:
    """Of warps, with a list of those that are longer: of one block, and of several."""
    skip_what_another_shows(segments, dtype)
    width = VECTOR_BYTES // dtype.itemsize
    for lengths in (SHORT, [*SHORT, 1000, 0, CHUNK, CHUNK + 1, 2]):
        ptr = pointers(lengths)
        x = values(2, int(ptr[-1]), heads, dtype=dtype)
        result = check(segments, direction, op, x, ptr, scale=0.5)
        assert result.columns == (width if heads % width == 0 else 1)
        assert result.across == min(
            8,
            64 // (result.columns * dtype.itemsize),
            1 << (heads // result.columns - 1).bit_length(),
        )
        assert max(SHORT) <= result.block_rows == 4 * 256 // result.across


@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", OPS)
def test_a_long_segment(
    segments: SegmentsHost, op: str, direction: str, dtype: torch.dtype, heads: int
) -> None:
    """Of more chunks than a warp has lanes, between others; a sum of 100000 terms is exact."""
    long = 100_000 if segments.lane not in SANITIZERS else 5000
    ptr = pointers([5, long, 0, 7, 2049, 1])
    x = values(1, int(ptr[-1]), heads, dtype=dtype)
    check(segments, direction, op, x, ptr, orders=segments.orders[-1:], device="AGX Orin")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", OPS)
def test_bits_of_a_segment(
    segments: SegmentsHost, op: str, direction: str, dtype: torch.dtype
) -> None:
    """They depend on its length, values and dtype alone: not on the columns beside it, on the other
    segments, which change what a warp takes, on where it lies, and on the device: of these every
    two together."""
    if segments.lane in SANITIZERS:
        pytest.skip("sanitizers: a test of values, run without them")
    width = VECTOR_BYTES // dtype.itemsize
    order = segments.orders[-1:]
    ways = [
        (length, heads, beside, device)
        for length, heads, beside, device in itertools.product(
            (1, 3, 8, 31, 70, CHUNK, 257, 1024, 1025, 5000),
            (1, 3, width, 8 * width),
            ("none", "empty", "longer"),
            ("4 SMs, 9.0", "H100"),
        )
        if length <= 1000 or (heads <= width and device != "H100")
    ]
    for length, of_length in itertools.groupby(all_pairs(ways), lambda way: way[0]):
        x = values(1, length, 1, dtype=dtype)
        results = {}
        for _, heads, beside, device in of_length:
            others = {"none": [], "empty": [0] * length, "longer": [3 * length]}[beside]
            ptr = pointers([2, length, *others])
            wide = torch.zeros(1, int(ptr[-1]), heads, dtype=dtype)
            wide[:, 2 : 2 + length, -1:] = x
            # The gradient of the segment's last column is that of the segment alone.
            how = {"orders": order, "device": device}
            if direction == "forward":
                actual = segments.forward(op, wide, ptr, **how)
            else:
                y, grad = output_and_gradient(op, x, pointers([length]), 1.0)
                each = [torch.zeros(1, len(ptr) - 1 if op == "logsumexp" else int(ptr[-1]), heads)]
                each = [each[0].to(dtype), each[0].to(dtype)]
                at = slice(1, 2) if op == "logsumexp" else slice(2, 2 + length)
                for tensor, given in zip(each, (grad, y), strict=True):
                    tensor[:, at, -1:] = given
                actual = segments.backward(op, *each, wide, ptr, **how)
            of_segment = direction == "forward" and op == "logsumexp"
            at = slice(1, 2) if of_segment else slice(2, 2 + length)
            name = f"{length} rows, {heads} heads, along={actual.along}, others: {beside}"
            results[f"{name}, {device}"] = actual.tensor[:, at, -1:].clone()
        assert_same_bits(results)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", OPS)
def test_an_order(segments: SegmentsHost, op: str, direction: str) -> None:
    """Elements anywhere have the bits of the same ones side by side."""
    ptr = pointers([*SHORT, 600, 5, 2000])
    size = int(ptr[-1])
    x = values(2, size, 3, dtype=torch.float32)
    order = torch.randperm(size)
    expected = run(segments, direction, op, x, ptr, scale=-2.0).tensor
    anywhere = torch.empty_like(x)
    anywhere[:, order] = x
    if direction == "forward":
        actual = segments.forward(op, anywhere, ptr, scale=-2.0, order=order).tensor
    else:
        given = list(output_and_gradient(op, x, ptr, -2.0))
        if op != "logsumexp":
            for each in given:
                each[:, order] = each.clone()
        y, grad = given
        actual = segments.backward(op, grad, y, anywhere, ptr, scale=-2.0, order=order).tensor
    of_segments = direction == "forward" and op == "logsumexp"
    assert torch.equal(actual if of_segments else actual[:, order], expected)


@pytest.mark.parametrize("offset", [2, 8])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_unaligned(segments: SegmentsHost, direction: str, offset: int) -> None:
    ptr = pointers([*SHORT, 300])
    x = values(2, int(ptr[-1]), 8, dtype=torch.float16)
    result = check(segments, direction, "softmax", x, ptr, offset=offset)
    assert result.columns == 1


@pytest.mark.parametrize("resident", [1, 3])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_more_segments_than_blocks(segments: SegmentsHost, direction: str, resident: int) -> None:
    """A block takes several, of the list too; blocks side by side."""
    ptr = pointers([40, 3, 0, 130] * 50)
    x = values(1, int(ptr[-1]), 16, dtype=torch.float32)
    check(segments, direction, "softmax", x, ptr, resident=resident, orders=segments.orders[-1:])


def test_what_a_warp_takes(segments: SegmentsHost) -> None:
    """More lanes where segments are longer on average, up to all of a warp."""
    for length, along in ((1, 2), (2, 2), (3, 4), (5, 4), (6, 8), (21, 16), (22, 32), (500, 32)):
        ptr = pointers([length, length])
        x = values(1, 2 * length, 1, dtype=torch.float32)
        result = run(segments, "forward", "softmax", x, ptr, orders=segments.orders[-1:])
        assert (result.along, result.most) == (along, 4 * along)


def test_no_elements(segments: SegmentsHost) -> None:
    x = torch.empty(2, 0, 3)
    ptr = pointers([0] * 40)
    actual = segments.forward("logsumexp", x, ptr).tensor
    assert torch.equal(actual, torch.full((2, 40, 3), -math.inf))


@pytest.mark.parametrize("length", [1, 2, 40, 300, 3000])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_infinities_and_nan(
    segments: SegmentsHost, op: str, dtype: torch.dtype, length: int
) -> None:
    """Segment by segment as torch's function of a row."""
    if segments.lane in SANITIZERS:
        pytest.skip("sanitizers: a test of values, run without them")
    inf, nan = math.inf, math.nan
    rows = [
        [-inf],
        [-inf, 1.0],
        [inf, 1.0],
        [inf],
        [inf, -inf],
        [nan, 1.0],
        [nan, -inf],
        [nan, inf],
    ]
    # Where the chunks before have nothing else, too.
    each = [torch.tensor((row * length)[:length]) for row in rows]
    each += [
        torch.cat([torch.full((length - 1,), -inf), torch.tensor([end])]) for end in (1.0, inf)
    ]
    x = torch.cat(each).to(dtype).view(1, -1, 1)
    ptr = pointers([length] * len(each))
    actual = segments.forward(op, x, ptr, orders=segments.orders[-1:])
    assert_close(actual.tensor, op, x, 1, ptr=ptr)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([1, 4, 9], "segment 0 of 2 goes from 1 to 4 of 9"),
        ([0, 4, 8], "segment 1 of 2 goes from 4 to 8 of 9"),
        # Of either segment, whichever thread sees it first.
        ([0, 10, 9], "segment (0 of 2 goes from 0 to 10|1 of 2 goes from 10 to 9) of 9"),
        ([0, -1, 9], "segment (0 of 2 goes from 0 to -1|1 of 2 goes from -1 to 9) of 9"),
        ([0, 5, 3, 9], "segment 1 of 3 goes from 5 to 3 of 9"),
    ],
    ids=str,
)
def test_pointers_that_are_wrong(segments: SegmentsHost, wrong: list[int], message: str) -> None:
    """Nothing of the tensors is read or written: the list kernel fails first."""
    with pytest.raises(AssertionError, match=message):
        segments.forward("softmax", torch.zeros(1, 9, 2), torch.tensor(wrong))


@pytest.mark.parametrize("element", [-1, 9])
def test_an_order_that_is_wrong(segments: SegmentsHost, element: int) -> None:
    order = torch.arange(9)
    order[3] = element
    with pytest.raises(AssertionError, match=f"element 3 of segments is {element} of 9"):
        segments.forward("softmax", torch.zeros(1, 9, 2), pointers([4, 5]), order=order)
