"""How many digits are right, beyond the tolerances of the other tests: in ulp of the result."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from test_threads_and_isa import ISAS, VARIABLE, run
from tolerances import OPS, OURS, SIXTEEN_BIT, TORCH, ulp

import softmax_ext

SIZES = [
    1,
    2,  # a log close to 0, of a sum close to 1
    3,
    7,
    16,  # a register of AVX-512, and a block of columns
    17,
    33,
    1000,
    4096,  # a chunk of a row
    4097,
    50257,
    2**20,
]


def moderate(size: int, dim: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Uniform in [-2, 2]; rows of this size lie along dim."""
    rows = max(3, min(2000, 2**18 // size))
    x = torch.rand(rows, size).mul(4).sub(2).to(dtype)
    return (x if dim == 1 else x.t().contiguous()).to(device)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", SIZES)
def test_float32_is_within_6_ulp(size: int, op: str, dim: int, device: str) -> None:
    x = moderate(size, dim, torch.float32, device)
    exact = TORCH[op](x.cpu().double(), dim)
    error = (OURS[op](x, dim).cpu().double() - exact).abs() / ulp(exact, torch.float32)
    if device == "cuda" and op == "log_softmax":
        # A result near 0 has many ulp in the last digit of log(sum), the last that a GPU has.
        error *= ulp(exact, torch.float32) / ulp(exact.abs().clamp(min=0.25), torch.float32)
    assert error.max() <= 6


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", [*SIZES, 31, 64, 128])
def test_float32_is_no_further_off_than_torch(size: int, op: str, dim: int, device: str) -> None:
    if device != "cpu":
        pytest.skip("a GPU's last digits are its exp's and log's")
    x = moderate(size, dim, torch.float32, device)
    exact = TORCH[op](x.double(), dim)
    ours, theirs = (
        ((function(x, dim).double() - exact).abs() / ulp(exact, torch.float32)).max()
        for function in (OURS[op], TORCH[op])
    )
    # torch runs the fastest of its kernels here, with fused multiply-adds.
    info = softmax_ext.build_info()
    same = info.cpu_isa == info.cpu_isas[0] != "baseline"
    assert ours <= theirs * (1 if same else 1.1)


# A float64 has no wider type in torch; numpy's longdouble has 64 bits or more, on x86.
def exact_sum(terms: np.ndarray) -> np.ndarray:
    """Over the last dim, with what each addition rounds off (Neumaier)."""
    total, rest = (np.zeros(terms.shape[0], np.longdouble) for _ in range(2))
    for term in terms.T:
        added = total + term
        of_term = added - total
        rest += (total - (added - of_term)) + (term - of_term)
        total = added
    return (total + rest)[:, None]


def exact_output(op: str, x: torch.Tensor) -> np.ndarray:
    shifted = x.numpy().astype(np.longdouble) - x.amax(1, keepdim=True).numpy()
    e = np.exp(shifted)
    if op == "softmax":
        return e / exact_sum(e)
    # The log of a sum close to 1 has the digits of what is added to its largest term.
    np.put_along_axis(e, shifted.argmax(1)[:, None], 0, 1)
    return shifted - np.log1p(exact_sum(e))


def exact_gradient(op: str, grad: torch.Tensor, y: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    """And the sum of its terms' sizes: the gradient is a difference, as exact as these are."""
    g, output = (tensor.numpy().astype(np.longdouble) for tensor in (grad, y))
    if op == "softmax":
        sizes = y * (grad.abs() + (grad.abs() * y).sum(1, keepdim=True))
        return output * (g - exact_sum(g * output)), sizes
    sizes = grad.abs() + y.exp() * grad.abs().sum(1, keepdim=True)
    return g - np.exp(output) * exact_sum(g), sizes


def errors(actual: torch.Tensor, exact: np.ndarray, size: torch.Tensor) -> np.ndarray:
    """In ulp at the size given."""
    return np.abs(actual.numpy() - exact) / ulp(size, actual.dtype).numpy()


DOUBLES = """
import sys, torch, softmax_ext
results = []
for op, dim, x, y, grad in torch.load(sys.argv[1], weights_only=True):
    ours = getattr(torch.ops.softmax_ext, op + "_backward")
    theirs = getattr(torch, f"_{op}_backward_data")
    results.append([
        (getattr(package, op)(x, dim), backward(grad, y, dim, torch.float64))
        for package, backward in [(softmax_ext, ours), (torch, theirs)]
    ])
torch.save((softmax_ext.build_info().cpu_isa, results), sys.argv[2])
"""


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name not in softmax_ext.build_info().cpu_isas:
        pytest.skip(f"{name} is not built, or this CPU lacks it")
    return name


def test_float64_is_no_further_off_than_torch(isa: str, tmp_path: Path) -> None:
    """By the root of the mean square of the errors, which a few elements do not decide."""
    cases = []
    for size in [2, 3, 5, 8, 9, 17, 33, 100, 1000, 4096]:
        rows = max(3, 2**14 // size)
        x, grad = (torch.randn(rows, size, dtype=torch.float64) for _ in range(2))
        for op, dim in itertools.product(OPS, [0, 1]):
            of_dim = [t if dim == 1 else t.t().contiguous() for t in (x, TORCH[op](x, 1), grad)]
            cases.append((op, dim, *of_dim))
    torch.save(cases, tmp_path / "cases")
    # torch's kernels for the same instructions.
    torch_isa = "default" if isa == "baseline" else isa
    environment = {VARIABLE: isa, "ATEN_CPU_CAPABILITY": torch_isa}
    process = run(DOUBLES, str(tmp_path / "cases"), str(tmp_path / "results"), **environment)
    assert process.returncode == 0, process.stderr
    used, results = torch.load(tmp_path / "results", weights_only=True)
    assert used == isa
    for (op, dim, x, y, grad), (ours, theirs) in zip(cases, results, strict=True):
        x, y, grad = (t if dim == 1 else t.t() for t in (x, y, grad))
        output = exact_output(op, x)
        gradient, sizes = exact_gradient(op, grad, y)
        size_of_output = torch.from_numpy(output.astype(np.float64))
        for what, exact, size, a, b in [
            ("output", output, size_of_output, ours[0], theirs[0]),
            ("gradient", gradient, sizes, ours[1], theirs[1]),
        ]:
            a, b = (
                np.sqrt(np.mean(errors(t if dim == 1 else t.t(), exact, size) ** 2)) for t in (a, b)
            )
            # The exp's of the two differ by a hundredth where a gradient is little else, and by
            # three without a fused multiply-add.
            allowed = 1.03 if isa == "baseline" else 1.01
            assert a <= b * allowed, f"{what} of {op}, {tuple(x.shape)}, dim {dim}: {a} and {b} ulp"


@pytest.mark.parametrize(
    ("dtype", "dim", "least"),
    [
        (torch.float32, 0, -80),
        (torch.float32, 1, -20),  # a row of floats is summed in double: to 2^-53
        (torch.float64, 0, -80),
        (torch.float64, 1, -80),
    ],
    ids=str,
)
def test_log_of_a_sum_close_to_1(dtype: torch.dtype, dim: int, least: float) -> None:
    """log_softmax of (0, v) is -log(1 + exp(v)) for 0: close to -exp(v), though 1 + exp(v) is 1."""
    v = torch.linspace(least, -1, 1000).to(dtype)
    x = torch.stack([torch.zeros_like(v), v], dim)
    y = softmax_ext.log_softmax(x, dim).select(dim, 0)
    exact = -np.log1p(np.exp(v.numpy().astype(np.longdouble)))
    size = torch.from_numpy(exact.astype(np.float64))
    assert errors(y, exact, size).max() <= 2


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", SIZES)
def test_999_of_1000_results_of_16_bits_are_the_nearest(
    size: int, op: str, dim: int, dtype: torch.dtype, device: str
) -> None:
    x = moderate(size, dim, dtype, device)
    nearest = TORCH[op](x.cpu().double(), dim).to(dtype)
    assert (OURS[op](x, dim).cpu() == nearest).double().mean() >= 0.999


# The gradient of log_softmax over (v, 0), with (0, 1) as that of the output y, is -exp(y) for v.
EXPS = """
import sys, torch, softmax_ext
results = []
for v in torch.load(sys.argv[1], weights_only=True):
    x = torch.stack([v, torch.zeros_like(v)], 1).requires_grad_()
    y = softmax_ext.log_softmax(x, 1)
    gradient = torch.tensor([0, 1], dtype=v.dtype).expand_as(y)
    exp = -torch.autograd.grad(y, x, gradient)[0][:, 0]
    results.append((y.detach()[:, 0].clone(), exp))
torch.save((softmax_ext.build_info().cpu_isa, results), sys.argv[2])
"""


def worst_ulps_of_exp(values: list[torch.Tensor], isa: str, folder: Path) -> list[float]:
    torch.save(values, folder / "values")
    process = run(EXPS, str(folder / "values"), str(folder / "exps"), **{VARIABLE: isa})
    assert process.returncode == 0, process.stderr
    used, results = torch.load(folder / "exps", weights_only=True)
    assert used == isa
    worst = []
    for y, exp in results:
        exact = np.exp(y.numpy().astype(np.longdouble))  # of 64 bits or more, on x86
        size = torch.from_numpy(exact.astype(np.float64))
        worst.append(float(errors(exp, exact, size).max()))
    return worst


def test_exp_on_the_cpu(isa: str, tmp_path: Path) -> None:
    """From where it is 0, through subnormal results, to 1. Below 1 ulp; without a fused
    multiply-add, a little more in float64."""
    values = [
        torch.cat([torch.linspace(least, 20, 2**20, dtype=torch.float64), -3 * torch.rand(2**19)])
        for least in (-110, -750)
    ]
    of_float32, of_float64 = worst_ulps_of_exp([values[0].float(), values[1]], isa, tmp_path)
    assert of_float32 < 1
    assert of_float64 < (1.02 if isa == "baseline" else 1)


@pytest.mark.large
def test_exp_of_every_float32(isa: str, tmp_path: Path) -> None:
    """Of each that is at most 0, as v: y is the same, or close by."""
    first, last = 0x80000000, 0xC2DC0000  # -0 and -110
    step = 2**25
    for begin in range(first, last, step):
        bits = torch.arange(begin, min(begin + step, last)) - 2**32
        assert worst_ulps_of_exp([bits.to(torch.int32).view(torch.float32)], isa, tmp_path)[0] < 1
