"""What counts as right: a float64 reference and one tolerance table by dtype.

A result is the reference's value rounded once to the result's dtype, up to the error of the
arithmetic before that rounding: float32 for 16-bit types and float32, float64 for float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import softmax_ext

OPS = ("softmax", "log_softmax")
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIXTEEN_BIT = (torch.float16, torch.bfloat16)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

Function = Callable[..., torch.Tensor]
OURS: dict[str, Function] = {
    "softmax": softmax_ext.softmax,
    "log_softmax": softmax_ext.log_softmax,
    "softmin": softmax_ext.softmin,
}
TORCH: dict[str, Function] = {
    "softmax": F.softmax,
    "log_softmax": F.log_softmax,
    "softmin": F.softmin,
}


@dataclass(frozen=True)
class Tolerance:
    """|result - reference| <= atol[op] + (rtol + arithmetic * |x - max|) * |reference|.

    rtol: 16-bit types: half an ulp, the final rounding, and 1 % of it for float32 arithmetic.
        float32 and float64: 8 and 16 ulp, for exp, log and the sum of a long row.
    atol: of softmax, the final rounding of a subnormal; of log_softmax, the arithmetic's error in
        log(sum), which is all there is of a result near 0.
    arithmetic: the unit roundoff of the arithmetic before the final rounding. That of x - max is a
        relative error of exp(x - max).
    above_torch: how far our largest error may be above torch's, in units of what can be told
        apart: the chance of a rounding, and in float32 that of a sum, which a whole row shares.
        None: the reference is no more exact than the result.
    """

    rtol: float
    atol: dict[str, float]
    arithmetic: float
    above_torch: float | None


TOLERANCES = {
    torch.float16: Tolerance(
        1.01 * 2**-11, {"softmax": 1.01 * 2**-25, "log_softmax": 2**-21}, 2**-24, 0.02
    ),
    torch.bfloat16: Tolerance(
        1.01 * 2**-8, {"softmax": 1.01 * 2**-134, "log_softmax": 2**-21}, 2**-24, 0.02
    ),
    torch.float32: Tolerance(2**-20, {"softmax": 2**-149, "log_softmax": 2**-21}, 2**-24, 3.0),
    torch.float64: Tolerance(2**-48, {"softmax": 2**-1074, "log_softmax": 2**-49}, 2**-53, None),
}


def reference(
    op: str, input: torch.Tensor, dim: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """`op` of the input as cast to the result's dtype, computed in float64 on the CPU."""
    shifted = shifted_by_max(op, input, dim, dtype)
    if op == "log_softmax":
        return shifted - shifted.exp().sum(dim, keepdim=True).log()
    exponential = shifted.exp()
    return exponential / exponential.sum(dim, keepdim=True)


def shifted_by_max(
    op: str, input: torch.Tensor, dim: int, dtype: torch.dtype | None
) -> torch.Tensor:
    x = input.detach().cpu()
    x = (-x if op == "softmin" else x).to(dtype or input.dtype).double()
    return x - x.amax(dim, keepdim=True) if x.numel() else x


def ulp(reference: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance between neighbouring numbers of `dtype` at the size of `reference`."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(reference.abs().clamp(info.tiny, info.max)).exponent - 1
    return torch.ldexp(torch.full_like(reference, info.eps), exponent)


def largest_error(actual: torch.Tensor, expected: torch.Tensor, unit: torch.Tensor) -> float:
    """In units, where the expected value is finite in actual's dtype."""
    finite = expected.to(actual.dtype).isfinite()
    if not finite.any():
        return 0.0
    error = (actual.detach().cpu().double() - expected).abs() / unit
    return error[finite].nan_to_num(nan=float("inf")).max().item()


def assert_within(
    actual: torch.Tensor, expected: torch.Tensor, allowed: torch.Tensor | float
) -> None:
    """|actual - expected| <= allowed; NaN and, rounded to actual's dtype, infinities are equal."""
    assert actual.shape == expected.shape
    actual64 = actual.detach().cpu().double()
    rounded = expected.to(actual.dtype).double()
    special = ~rounded.isfinite()
    if special.any():
        torch.testing.assert_close(
            actual64[special],
            rounded[special],
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=_first_line(actual),
        )
    error = (actual64 - expected).abs()
    wrong = ~special & ~(error <= allowed)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        limit = allowed[at] if isinstance(allowed, torch.Tensor) else allowed
        raise AssertionError(
            f"{wrong.sum()} of {wrong.numel()} elements of {tuple(actual.shape)} {actual.dtype} "
            f"are wrong, the first at {at}: {actual64[at].item()!r}, "
            f"reference {expected[at].item()!r}, error {error[at].item():.3g}, "
            f"allowed {float(limit):.3g}"
        )


def _first_line(actual: torch.Tensor) -> Callable[[str], str]:
    return lambda message: f"infinities and NaN of {actual.shape} {actual.dtype}: {message}"


def assert_close_to_reference(
    actual: torch.Tensor,
    op: str,
    input: torch.Tensor,
    dim: int,
    dtype: torch.dtype | None = None,
) -> None:
    """`actual` is op(input, dim, dtype=dtype) within the table, and no less exact than torch's."""
    result_dtype = dtype or input.dtype
    assert actual.dtype == result_dtype
    assert actual.device == input.device
    tolerance = TOLERANCES[result_dtype]
    kind = "log_softmax" if op == "log_softmax" else "softmax"
    expected = reference(op, input, dim, dtype)
    distance = shifted_by_max(op, input, dim, dtype).abs().nan_to_num(0, posinf=0)
    relative = tolerance.rtol + tolerance.arithmetic * distance
    assert_within(actual, expected, tolerance.atol[kind] + relative * expected.abs())
    if tolerance.above_torch is None or actual.numel() == 0:
        return
    # The least that a careful computation can tell apart: an ulp of the result, or what one
    # rounding of x - max (of log(sum), at 1) costs in the arithmetic's precision.
    sensitivity = distance.clamp(min=1) * (1 if kind == "log_softmax" else expected.abs())
    unit = torch.maximum(ulp(expected, result_dtype), 2 * tolerance.arithmetic * sensitivity)
    ours = largest_error(actual, expected, unit)
    theirs = largest_error(TORCH[op](input.detach(), dim, dtype=dtype), expected, unit)
    assert ours <= theirs + tolerance.above_torch, (
        f"our largest error is {ours:.3f} units of what can be told apart, torch's {theirs:.3f}"
    )


def assert_gradient_close(
    actual: torch.Tensor, op: str, grad_output: torch.Tensor, output: torch.Tensor, dim: int
) -> None:
    """`actual` is the gradient of the input, given that of the output and the output as rounded.

    The gradient is a difference, so the arithmetic's error is relative to its terms, not to it.
    """
    tolerance = TOLERANCES[actual.dtype]
    unit = TOLERANCES[output.dtype].arithmetic
    grad = grad_output.detach().cpu().double()
    y = output.detach().cpu().double()
    if op == "log_softmax":
        factor, summands = y.exp(), grad
        expected = grad - factor * summands.sum(dim, keepdim=True)
        terms = grad.abs() + factor * summands.abs().sum(dim, keepdim=True)
    else:
        factor, summands = y, grad * y
        expected = factor * (grad - summands.sum(dim, keepdim=True))
        terms = factor.abs() * (grad.abs() + summands.abs().sum(dim, keepdim=True))
    rounding = min(tolerance.rtol, 1.01 * torch.finfo(actual.dtype).eps / 2)
    allowed = 8 * unit * terms + rounding * expected.abs() + tolerance.atol["softmax"]
    assert_within(actual, expected, allowed)
