"""Memory: the layouts an input may have, those a result has, out=, and what must stay untouched."""

import itertools
import sys
import warnings
from collections.abc import Callable

import numpy
import pytest
import torch
from pairwise import all_pairs
from tolerances import FLOATING, OPS, OURS, TORCH, assert_close_to_reference


def unaligned(device: str, *shape: int) -> torch.Tensor:
    """Contiguous, but one element past an aligned address."""
    return torch.randn(torch.Size(shape).numel() + 1, device=device)[1:].view(shape)


LAYOUTS: dict[str, Callable[[str], torch.Tensor]] = {
    "contiguous": lambda d: torch.randn(9, 37, device=d),
    "transposed": lambda d: torch.randn(37, 9, device=d).t(),
    "permuted": lambda d: torch.randn(4, 5, 37, device=d).permute(2, 0, 1),
    "channels last": lambda d: torch.randn(2, 5, 3, 4, device=d).to(
        memory_format=torch.channels_last
    ),
    "channels last 3d": lambda d: torch.randn(2, 5, 3, 4, 2, device=d).to(
        memory_format=torch.channels_last_3d
    ),
    "every other element": lambda d: torch.randn(9, 74, device=d)[:, ::2],
    "every other row": lambda d: torch.randn(18, 37, device=d)[::2],
    "narrowed": lambda d: torch.randn(9, 50, device=d).narrow(1, 5, 37),
    "first rows": lambda d: torch.randn(20, 37, device=d)[:9],
    "expanded rows": lambda d: torch.randn(37, device=d).expand(9, 37),
    "expanded dim": lambda d: torch.randn(9, 1, device=d).expand(9, 37),
    "expanded from one element": lambda d: torch.randn((), device=d).expand(9, 37),
    "unaligned": lambda d: unaligned(d, 9, 37),
    "unaligned, long row": lambda d: unaligned(d, 2, 4100),
    "flipped": lambda d: torch.randn(9, 37, device=d).flip(0, 1),
    "overlapping": lambda d: torch.randn(60, device=d).as_strided((9, 37), (2, 1)),
    "sizes of 1": lambda d: torch.randn(1, 37, 1, device=d).transpose(0, 2),
    "negated view": lambda d: torch.randn(9, 37, device=d, dtype=torch.complex64).conj().imag,
    "0-d view": lambda d: torch.randn(9, device=d)[4],
}


def cases() -> list[tuple[str, int]]:
    return [
        (name, dim) for name, make in LAYOUTS.items() for dim in range(max(make("cpu").dim(), 1))
    ]


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["same dtype", "cast"])
@pytest.mark.parametrize("op", [*OPS, "softmin"])
@pytest.mark.parametrize(("layout", "dim"), cases())
def test_layout(layout: str, dim: int, op: str, dtype: torch.dtype | None, device: str) -> None:
    """Right values, torch's metadata, and an input that is neither changed nor shared."""
    input = LAYOUTS[layout](device)
    before = input.clone()
    version = input._version
    actual = OURS[op](input, dim, dtype=dtype)
    expected = TORCH[op](input, dim, dtype=dtype)

    assert_close_to_reference(actual, op, input, dim, dtype)
    assert type(actual) is torch.Tensor
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert actual.device == expected.device
    assert actual.layout == expected.layout
    assert actual.stride() == expected.stride()
    assert actual.storage_offset() == expected.storage_offset()
    assert actual.is_contiguous() == expected.is_contiguous()
    assert not actual.is_neg()

    assert torch.equal(input, before)
    assert input._version == version
    assert actual.untyped_storage().data_ptr() != input.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("offset", range(1, 8))
def test_every_alignment(offset: int, op: str, dtype: torch.dtype, device: str) -> None:
    """16-byte access must not assume an aligned input, whatever the element size."""
    for shape, dim in (((3, 64), 1), ((64, 24), 0)):
        numel = torch.Size(shape).numel()
        input = torch.randn(numel + offset, device=device).to(dtype)[offset:].view(shape)
        assert_close_to_reference(OURS[op](input, dim), op, input, dim)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("shape", "dim"), [((0, 5), 0), ((5, 0), 0), ((2, 0, 3), 1)], ids=str)
def test_empty_has_torchs_strides(op: str, shape: tuple[int, ...], dim: int, device: str) -> None:
    for input in (torch.empty(shape, device=device), torch.empty(shape[::-1], device=device).mT):
        assert OURS[op](input, dim).stride() == TORCH[op](input, dim).stride()


TORCH_OUT: dict[str, Callable[..., torch.Tensor]] = {
    "softmax": torch.softmax,
    "log_softmax": torch.log_softmax,
    "softmin": lambda x, *args, **kwargs: torch.softmax(-x, *args, **kwargs),
}
WITH_OUT = [*OPS, "softmin"]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", WITH_OUT)
@pytest.mark.parametrize("dim", [0, 1])
def test_out(dim: int, op: str, dtype: torch.dtype, device: str) -> None:
    input = torch.randn(9, 37, device=device).to(dtype)
    out = torch.full_like(input, torch.nan)
    version = out._version
    assert OURS[op](input, dim, out=out) is out
    assert torch.equal(out, OURS[op](input, dim))
    assert out._version > version


def large_input(dim_size: int, inner: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Just over 32 MB, of which a third is not too large for the caches; dim is 1.

    Where the rows of one of two threads end, memory is not aligned.
    """
    outer = 2 * ((1 << 24) // (dim_size * inner * dtype.itemsize)) + 7
    x = torch.randn(outer, dim_size, inner, device=device).to(dtype)
    x[:, 1] = -torch.inf
    return x.squeeze(2)


def in_thirds(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    parts = zip(*(tensor.chunk(3) for tensor in tensors), strict=True)
    return torch.cat([function(*part) for part in parts])


# Rows of whole lines, several at a time; then each with a rest that is no whole register: in a
# chunk, alone in the last chunk, in some and kept in cache, beyond that.
LARGE_ROWS = [256, 1031, 4097, 20011, 150011]


@pytest.mark.parametrize(
    ("dim_size", "op", "dtype"),
    all_pairs(list(itertools.product(LARGE_ROWS, OPS, FLOATING))),
    ids=str,
)
def test_out_beyond_the_caches(dim_size: int, op: str, dtype: torch.dtype, device: str) -> None:
    """32 MB and more are written past the caches of a CPU: the same bits, and nothing beside."""
    x = large_input(dim_size, 1, dtype, device)
    memory = torch.full((x.numel() + 65,), 7.0, dtype=dtype, device=device)
    out = memory[1:-64].view(x.shape)
    OURS[op](x, 1, out=out)
    assert torch.equal(out, in_thirds(lambda part: OURS[op](part, 1), x))
    assert memory[0] == 7
    assert (memory[-64:] == 7).all()


# Columns: of a block and of more, with steps of whole lines; then with others.
LARGE_COLUMNS = [(16, 4096), (19, 4096), (300, 480), (50, 196)]
LARGE_SHAPES = [*((size, 1) for size in LARGE_ROWS), *LARGE_COLUMNS]


@pytest.mark.parametrize(
    ("shape", "op", "dtype"),
    all_pairs(list(itertools.product(LARGE_SHAPES, OPS, FLOATING))),
    ids=str,
)
def test_large_results_in_memory_used_before(
    shape: tuple[int, int], op: str, dtype: torch.dtype, device: str
) -> None:
    """On the CPU the second is written past the caches: the same bits, and so the gradient."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        return OURS[op](x, 1)

    def backward(grad_output: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = getattr(torch.ops.softmax_ext, f"{op}_backward")(
            grad_output, output, 1, dtype
        )
        return result

    x = large_input(*shape, dtype, device)
    grad_output = torch.randn_like(x)
    output = in_thirds(forward, x)
    grad_input = in_thirds(backward, grad_output, output)
    places = set()
    for _ in range(2):
        result = forward(x)
        assert torch.equal(result, output)
        places.add(result.data_ptr())
        del result
        result = backward(grad_output, output)
        assert torch.equal(result, grad_input)
        places.add(result.data_ptr())
        del result
    if device == "cpu" and sys.platform == "linux":
        assert len(places) == 1


@pytest.mark.parametrize("op", OPS)
def test_large_out_between_two_elements(op: str) -> None:
    """As memory that another library made may lie."""
    rows = 2100
    row = torch.randn(4096)
    memory = numpy.frombuffer(bytearray(rows * row.nbytes + 1), dtype=numpy.float32, offset=1)
    out = torch.from_numpy(memory).view(rows, 4096)
    assert out.data_ptr() % out.itemsize != 0
    OURS[op](row.expand(rows, -1), 1, out=out)
    assert torch.equal(out, OURS[op](row, 0).expand(rows, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize("op", WITH_OUT)
def test_out_with_a_cast(op: str, dtype: torch.dtype, device: str) -> None:
    input = torch.randint(-5, 6, (9, 37), device=device).to(dtype)
    out = torch.empty(9, 37, device=device)
    assert OURS[op](input, 1, dtype=torch.float32, out=out) is out
    assert_close_to_reference(out, op, input, 1, torch.float32)


@pytest.mark.parametrize(
    ("integer", "floating"),
    [(torch.int16, torch.float16), (torch.int32, torch.float32), (torch.int64, torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("dim", [0, 1])
def test_out_is_the_memory_of_an_input_of_another_dtype(
    dim: int, integer: torch.dtype, floating: torch.dtype, device: str
) -> None:
    """The cast then happens in place; it must happen."""
    x = torch.arange(4 * 37, device=device).reshape(4, 37).remainder(11).to(integer)
    expected = OURS["softmax"](x.clone(), dim, dtype=floating)
    out = OURS["softmax"](x, dim, dtype=floating, out=x.view(floating))
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("op", WITH_OUT)
@pytest.mark.parametrize(("shape", "dim"), [((), 0), ((0, 5), 1), ((2, 0, 3), 1)], ids=str)
def test_out_of_0d_and_empty(op: str, shape: tuple[int, ...], dim: int, device: str) -> None:
    input = torch.zeros(shape, device=device)
    out = torch.empty(shape, device=device)
    assert OURS[op](input, dim, out=out) is out
    assert torch.equal(out, TORCH[op](input, dim))


NON_CONTIGUOUS_OUT: dict[str, Callable[[str], torch.Tensor]] = {
    "transposed": lambda d: torch.zeros(37, 9, device=d).t(),
    "every other element": lambda d: torch.zeros(9, 74, device=d)[:, ::2],
    "narrowed": lambda d: torch.zeros(9, 50, device=d)[:, 5:42],
    "unaligned": lambda d: torch.zeros(9 * 37 + 1, device=d)[1:].view(9, 37),
}


@pytest.mark.parametrize("op", WITH_OUT)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("layout", NON_CONTIGUOUS_OUT)
def test_out_keeps_its_layout(layout: str, dim: int, op: str, device: str) -> None:
    """Written through out's own strides, and nothing beside it."""
    input = torch.randn(9, 37, device=device)
    out = NON_CONTIGUOUS_OUT[layout](device)
    stride, address = out.stride(), out.data_ptr()
    assert OURS[op](input, dim, out=out) is out
    assert (out.stride(), out.data_ptr()) == (stride, address)
    expected = OURS[op](input, dim)
    assert torch.equal(out, expected)
    storage = torch.empty(0, device=device).set_(out.untyped_storage())
    torch.testing.assert_close(storage.double().sum(), expected.double().sum())


@pytest.mark.parametrize("op", WITH_OUT)
def test_empty_out_is_resized(op: str, device: str) -> None:
    input = torch.randn(37, 9, device=device).t()
    out = torch.empty(0, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert OURS[op](input, 1, out=out) is out
    assert out.stride() == TORCH_OUT[op](input, 1, out=torch.empty(0, device=device)).stride()
    assert torch.equal(out, OURS[op](input, 1))


@pytest.mark.parametrize("op", WITH_OUT)
@pytest.mark.parametrize("shape", [(3,), (10, 37), (37, 9)], ids=str)
def test_out_of_another_shape_is_resized_with_a_warning(
    shape: tuple[int, ...], op: str, device: str
) -> None:
    input = torch.randn(9, 37, device=device)
    for functions in (TORCH_OUT, OURS):
        out = torch.empty(shape, device=device)
        with pytest.warns(UserWarning, match="An output with one or more elements was resized"):
            functions[op](input, 1, out=out)
        assert out.shape == input.shape
    assert torch.equal(out, OURS[op](input, 1))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("op", WITH_OUT)
@pytest.mark.parametrize(
    ("shape", "dim"), [((9, 37), 1), ((9, 37), 0), ((2, 4099), 1), ((20000,), 0)], ids=str
)
def test_in_place(
    shape: tuple[int, ...], dim: int, op: str, dtype: torch.dtype, device: str
) -> None:
    """out is the input: rows of every schedule must be read before they are written."""
    input = torch.randn(shape, device=device).to(dtype)
    expected = OURS[op](input.clone(), dim)
    assert OURS[op](input, dim, out=input) is input
    assert torch.equal(input, expected)


@pytest.mark.parametrize("op", WITH_OUT)
@pytest.mark.parametrize("dim", [0, 1])
def test_out_is_the_input_transposed(dim: int, op: str, device: str) -> None:
    base = torch.randn(37, 37, device=device)
    expected = OURS[op](base.t().contiguous(), dim)
    OURS[op](base.t(), dim, out=base)
    assert torch.equal(base, expected)


@pytest.mark.parametrize("op", WITH_OUT)
@pytest.mark.parametrize(("start", "end"), [(0, 5), (5, 0), (0, 37)])
@pytest.mark.parametrize("dim", [0, 1])
def test_out_overlapping_the_input_is_never_silently_wrong(
    dim: int, start: int, end: int, op: str, device: str
) -> None:
    """torch.softmax gives wrong values here; right ones, or a RuntimeError, are both accepted."""
    storage = torch.randn(9 * 37 + 37, device=device)
    input = storage[start : start + 9 * 37].view(9, 37)
    out = storage[end : end + 9 * 37].view(9, 37)
    expected = OURS[op](input.clone(), dim)
    before = storage.clone()
    try:
        OURS[op](input, dim, out=out)
    except RuntimeError:
        assert torch.equal(storage, before)
    else:
        assert torch.equal(out, expected)


@pytest.mark.parametrize("op", WITH_OUT)
def test_out_of_inference_mode(op: str, device: str) -> None:
    input = torch.randn(9, 37, device=device)
    with torch.inference_mode():
        out = torch.zeros(9, 37, device=device)
    with pytest.raises(RuntimeError, match="inference tensor outside InferenceMode"):
        OURS[op](input, 1, out=out)
    assert not out.any()


@pytest.mark.parametrize("op", WITH_OUT)
def test_out_with_elements_that_share_memory(op: str, device: str) -> None:
    input = torch.randn(9, 37, device=device)
    for functions in (TORCH_OUT, OURS):
        out = torch.empty(37, device=device).expand(9, 37)
        with pytest.raises(RuntimeError, match="single memory location"):
            functions[op](input, 1, out=out)


@pytest.mark.parametrize(
    ("input_dtype", "dtype", "out_dtype"),
    [
        (torch.float32, None, torch.float64),
        (torch.float32, None, torch.float16),
        (torch.float32, None, torch.int64),
        (torch.float32, torch.float64, torch.float32),
        (torch.float16, torch.float32, torch.float16),
        (torch.int64, torch.float32, torch.int64),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", WITH_OUT)
def test_out_of_another_dtype(
    op: str,
    input_dtype: torch.dtype,
    dtype: torch.dtype | None,
    out_dtype: torch.dtype,
    device: str,
) -> None:
    input = torch.ones(9, 37, dtype=input_dtype, device=device)
    for functions in (TORCH_OUT, OURS):
        out = torch.zeros(9, 37, dtype=out_dtype, device=device)
        with pytest.raises(RuntimeError, match="dtype"):
            functions[op](input, 1, dtype=dtype, out=out)
        assert not out.any()


@pytest.mark.parametrize("op", WITH_OUT)
def test_out_on_another_device(op: str, device: str) -> None:
    input = torch.randn(9, 37, device=device)
    for functions in (TORCH_OUT, OURS):
        with pytest.raises(RuntimeError, match="device"):
            functions[op](input, 1, out=torch.empty(9, 37, device="meta"))


@pytest.mark.parametrize("op", WITH_OUT)
def test_out_and_autograd(op: str, device: str) -> None:
    """out= has no gradient: refused where out requires one, and never silently dropped."""
    plain = torch.randn(9, 37, device=device)
    leaf = plain.clone().requires_grad_()
    for functions in (TORCH_OUT, OURS):
        out = torch.empty(9, 37, device=device, requires_grad=True)
        with pytest.raises(RuntimeError, match="don't support automatic differentiation"):
            functions[op](plain, 1, out=out)
        with torch.no_grad():
            assert functions[op](leaf, 1, out=out) is out
        result = torch.empty(9, 37, device=device)
        with pytest.raises(RuntimeError):
            functions[op](leaf, 1, out=result).sum().backward()
    assert torch.equal(out, OURS[op](plain, 1))
