"""The exponentials that the CUDA kernels are made of, with the host's 2^x in the place of the
hardware's, whose own error (2 ulp at most, PTX manual, ex2.approx.ftz) comes on top on a GPU; and
the division of an outer index."""

import ctypes
import math
import os
import struct
import subprocess
from pathlib import Path

import pytest
from lanes import FLAGS, FOLDER, alone

SOURCE = Path(__file__).resolve().parent / "exp.cpp"
# Of the sweeps: the step between the bits of neighbours, prime; 1 with --run-large.
STEP = 997


def bits(x: float) -> int:
    return struct.unpack("I", struct.pack("f", x))[0]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    path = FOLDER / "exp.so"
    command = [os.environ.get("CXX", "g++"), *FLAGS, "-O2", "-shared", "-fPIC", str(SOURCE)]
    with alone():
        subprocess.run([*command, "-o", str(path)], check=True)
        library = ctypes.CDLL(str(path))
    library.error_of_exp.restype = library.error_of_rounded_exp.restype = ctypes.c_double
    library.exp_of_float.restype = ctypes.c_float
    library.exp_of_float.argtypes = [ctypes.c_float]
    library.quotient.restype = ctypes.c_uint32
    return library


STEPS = [STEP, pytest.param(1, marks=pytest.mark.large)]


@pytest.mark.parametrize("step", STEPS)
def test_exp_is_within_an_ulp_over_all_floats_up_to_0(library: ctypes.CDLL, step: int) -> None:
    """From -0 to -inf: also where the result is subnormal, and where it is 0."""
    at = ctypes.c_float()
    error = library.error_of_exp(bits(-0.0), bits(-math.inf), step, ctypes.byref(at))
    assert 0.5 <= error <= 1, f"{error} ulp at {at.value!r}"


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("scaled", "lowest", "most"),
    [
        # float16: from the max to where the output is 0, 2^-25 of it. The rounding of x log2(e), up
        # to half an ulp of 32, is an error of the exponent.
        (0, -17.4, 2**-19.8),
        # bfloat16, scaled by 2^24: half an ulp of 32 near the max, of 128 at 2^-134 of it.
        (1, -17.4, 2**-19.8),
        (1, -93.0, 2**-17.5),
    ],
)
def test_exp_for_16_bits_over_the_range_of_a_result(
    library: ctypes.CDLL, scaled: int, lowest: float, most: float, step: int
) -> None:
    at = ctypes.c_float()
    error = library.error_of_rounded_exp(scaled, bits(-0.0), bits(lowest), step, ctypes.byref(at))
    assert 0 < error <= most, f"2^{math.log2(error):.2f} at {at.value!r}"


@pytest.mark.parametrize(
    ("x", "expected"),
    [(0.0, 1.0), (-0.0, 1.0), (-math.inf, 0.0), (-104.0, 0.0), (-3e38, 0.0), (-103.0, 2**-149)],
)
def test_exp_of_what_is_special(library: ctypes.CDLL, x: float, expected: float) -> None:
    assert library.exp_of_float(x) == expected


def test_exp_of_nan_is_nan(library: ctypes.CDLL) -> None:
    assert math.isnan(library.exp_of_float(math.nan))


SIZES = [*range(1, 130), 641, 1000, 4095, 4096, 4097, 50257, 65535, 65536, 65537, 2**24 + 1]
SIZES += [2**30 - 1, 2**30, 2**30 + 1, 2**31 - 1]


@pytest.mark.parametrize("size", SIZES)
def test_quotients_are_exact(library: ctypes.CDLL, size: int) -> None:
    """At each multiple of the size and beside it: the first ones, some on the way, and the last."""
    most = 2**31 - 1
    multiples = {k * size for k in (1, 2, 3, most // size // 3, most // size // 2, most // size)}
    for n in {0, 1, most} | {n + step for n in multiples for step in (-1, 0, 1)}:
        if 0 <= n <= most:
            assert library.quotient(n, ctypes.c_int64(size)) == n // size
