"""What is refused, by which exception and with which words; and the implicit-dim warning.

Each exception is compared with the one torch raises in the same place.
"""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import INTEGERS, OPS, OURS, TORCH

EVERY = [*OPS, "softmin"]


def refused(function: Callable[..., Any], *args: Any, **kwargs: Any) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011  the type is compared by the caller
        function(*args, **kwargs)
    return caught.value


def assert_refused_alike(op: str, pattern: str, *args: Any, **kwargs: Any) -> None:
    ours = refused(OURS[op], *args, **kwargs)
    theirs = refused(TORCH[op], *args, **kwargs)
    assert type(ours) is type(theirs), f"{ours!r}, torch: {theirs!r}"
    assert re.search(pattern, str(ours)), f"{ours!r} does not match {pattern!r}"


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("shape", "dim"), [((3, 5), 1), ((3, 5), 0), ((), 0)], ids=str)
def test_integer_input_without_dtype(
    shape: tuple[int, ...], dim: int, op: str, dtype: torch.dtype, device: str
) -> None:
    assert_refused_alike(op, "softmax", torch.ones(shape, dtype=dtype, device=device), dim)


@pytest.mark.parametrize("op", EVERY)
def test_softmin_of_integers(op: str, device: str) -> None:
    input = torch.ones(3, 5, dtype=torch.int64, device=device)
    assert_refused_alike(op, "softm", input, 1)


def test_softmin_of_bool(device: str) -> None:
    """bool can't be negated, cast or not."""
    input = torch.ones(3, 5, dtype=torch.bool, device=device)
    assert_refused_alike("softmin", "Negation", input, 1)
    assert_refused_alike("softmin", "Negation", input, 1, dtype=torch.float32)


@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn],
    ids=str,
)
@pytest.mark.parametrize("op", EVERY)
def test_dtype_that_is_not_a_result(op: str, dtype: torch.dtype, device: str) -> None:
    assert_refused_alike(op, "softm", torch.ones(3, 5, device=device), 1, dtype=dtype)


@pytest.mark.parametrize("op", EVERY)
def test_complex_input(op: str, device: str) -> None:
    input = torch.ones(3, 5, dtype=torch.complex64, device=device)
    assert_refused_alike(op, "softm", input, 1)


@pytest.mark.parametrize("dtype", ["float32", 6, float], ids=str)
@pytest.mark.parametrize("op", EVERY)
def test_dtype_that_is_none(op: str, dtype: Any, device: str) -> None:
    input = torch.ones(3, 5, device=device)
    if dtype is float:  # torch takes Python's float for its default dtype's name, so must we
        result = OURS[op](input, 1, dtype=dtype)
        assert result.dtype == TORCH[op](input, 1, dtype=dtype).dtype
    else:
        assert_refused_alike(op, "dtype", input, 1, dtype=dtype)


RANGES = {
    (): (-1, 0),
    (5,): (-1, 0),
    (3, 5): (-2, 1),
    (0, 5): (-2, 1),
    (2, 3, 4, 5): (-4, 3),
}


@pytest.mark.parametrize("shape", RANGES, ids=str)
@pytest.mark.parametrize("op", EVERY)
def test_dim_out_of_range(op: str, shape: tuple[int, ...], device: str) -> None:
    low, high = RANGES[shape]
    input = torch.ones(shape, device=device)
    for dim in (low - 1, high + 1, 2**40, -(2**40)):
        pattern = re.escape(f"range of [{low}, {high}], but got {dim}")
        assert_refused_alike(op, pattern, input, dim)
        assert_refused_alike(op, pattern, input, dim, dtype=torch.float64)


# torch took the name of a dim for a dim, before it gave names up.
NAMED = isinstance(refused(torch.softmax, torch.ones(1), "a"), RuntimeError)


@pytest.mark.parametrize(
    "dim", [*([] if NAMED else ["a"]), 1.0, [1], True, torch.tensor(1.0)], ids=repr
)
@pytest.mark.parametrize("op", EVERY)
def test_dim_of_a_wrong_type(op: str, dim: Any, device: str) -> None:
    assert_refused_alike(op, "'dim'.* must be int, not", torch.ones(3, 5, device=device), dim)


class Index:
    """What Python takes for an index, torch takes for a dim."""

    def __index__(self) -> int:
        return 1

    def __repr__(self) -> str:
        return "Index()"


@pytest.mark.parametrize("dim", [torch.tensor(1), torch.tensor(-1), Index()], ids=repr)
@pytest.mark.parametrize("op", EVERY)
def test_dim_of_another_integer_type(op: str, dim: Any, device: str) -> None:
    input = torch.randn(3, 5, device=device)
    try:
        expected = TORCH[op](input, dim)
    except TypeError:
        assert_refused_alike(op, "'dim'", input, dim)
    else:
        torch.testing.assert_close(OURS[op](input, dim), expected)


@pytest.mark.parametrize("op", EVERY)
def test_dim_of_a_numpy_integer(op: str, device: str) -> None:
    numpy = pytest.importorskip("numpy")
    input = torch.randn(3, 5, device=device)
    assert torch.equal(OURS[op](input, numpy.int64(1)), OURS[op](input, 1))


@pytest.mark.parametrize("input", [[1.0, 2.0], (1.0,), 1.0, None, "a", Ellipsis], ids=repr)
@pytest.mark.parametrize("op", OPS)
def test_input_that_is_no_tensor(op: str, input: Any) -> None:
    """torch.softmax raises TypeError; nn.functional's softmax an AttributeError by accident."""
    theirs = refused(getattr(torch, op), input, 0)
    ours = refused(OURS[op], input, 0)
    assert type(ours) is type(theirs) is TypeError
    assert re.search("'input'.* must be Tensor, not", str(ours)), repr(ours)


@pytest.mark.parametrize("op", EVERY)
def test_softmin_input_that_is_no_tensor(op: str) -> None:
    with pytest.raises(TypeError):
        OURS[op]([1.0, 2.0], 0)


@pytest.mark.parametrize("out", [[1.0], (torch.empty(3, 5),), "a"], ids=["list", "tuple", "str"])
@pytest.mark.parametrize("op", EVERY)
def test_out_that_is_no_tensor(op: str, out: Any) -> None:
    with pytest.raises(TypeError, match=r"'out'.* must be Tensor, not"):
        OURS[op](torch.ones(3, 5), 1, out=out)


@pytest.mark.parametrize("op", EVERY)
def test_arguments_python_refuses(op: str) -> None:
    input = torch.ones(3, 5)
    assert_refused_alike(op, "input")
    assert_refused_alike(op, "foo", input, 1, foo=1)
    assert_refused_alike(op, "positional", input, 1, 3, torch.float64, None)


@pytest.mark.parametrize("op", OPS)
def test_refused_input_is_untouched(op: str, device: str) -> None:
    out = torch.full((3, 5), 7.0, device=device)
    for args in ((torch.ones(3, 5, device=device), 2), (out.long(), 1)):
        refused(OURS[op], *args, out=out)
        assert torch.equal(out, torch.full((3, 5), 7.0, device=device))


def implicit(function: Callable[..., torch.Tensor], **kwargs: Any) -> tuple[Any, list[Any]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(**kwargs)
    return result, [(str(w.message), w.category, w.filename, w.lineno) for w in caught]


@pytest.mark.parametrize("rank", range(6))
@pytest.mark.parametrize("op", EVERY)
def test_implicit_dim(op: str, rank: int, device: str) -> None:
    """0 for 0-d, 1-d and 3-d inputs, otherwise 1; with torch's words, at the caller's line."""
    input = torch.randn([2, 3, 4, 2, 3][:rank], device=device)
    expected_dim = 0 if rank in (0, 1, 3) else 1
    result, ours = implicit(OURS[op], input=input)
    _, theirs = implicit(TORCH[op], input=input)
    assert ours == theirs
    assert [w[:3] for w in ours] == [
        (
            f"Implicit dimension choice for {op} has been deprecated. "
            "Change the call to include dim=X as an argument.",
            UserWarning,
            __file__,
        )
    ]
    assert torch.equal(result, OURS[op](input, expected_dim))


@pytest.mark.parametrize("stacklevel", [2, 3, 4, 5])
@pytest.mark.parametrize("op", EVERY)
def test_stacklevel_of_the_warning(op: str, stacklevel: int) -> None:
    def middle(function: Callable[..., torch.Tensor], **kwargs: Any) -> torch.Tensor:
        return function(**kwargs)

    input = torch.randn(3, 5)
    found = []
    for function in (OURS[op], TORCH[op]):
        kwargs = {"function": function, "input": input, "_stacklevel": stacklevel}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            middle(**kwargs)
        found.append([(w.filename, w.lineno) for w in caught])
    if stacklevel == 2:  # the function's own file
        assert len(found[0]) == 1
        assert found[0][0][0] != __file__
    else:
        assert found[0] == found[1]


@pytest.mark.parametrize("op", EVERY)
def test_no_warning_with_a_dim(op: str, device: str) -> None:
    _, caught = implicit(OURS[op], input=torch.randn(3, 5, device=device), dim=1)
    assert caught == []


@pytest.mark.parametrize("op", EVERY)
def test_implicit_dim_with_dtype_and_out(op: str, device: str) -> None:
    input = torch.randint(0, 5, (3, 5), device=device)
    out = torch.empty(3, 5, device=device)
    result, caught = implicit(OURS[op], input=input, dtype=torch.float32, out=out)
    assert result is out
    assert len(caught) == 1
    assert torch.equal(out, OURS[op](input, 1, dtype=torch.float32))


@pytest.mark.parametrize("op", OPS)
def test_layouts_that_are_not_strided(op: str) -> None:
    sparse = torch.eye(3).to_sparse()
    assert_refused_alike(op, "softmax", sparse, 1)
