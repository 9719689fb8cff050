"""Beyond 32 bits: offsets always, where memory is only reserved; element counts with `large`."""

from pathlib import Path

import pytest
import torch
from tolerances import OPS, OURS, assert_close_to_reference

GIB = 2**30


def available_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 0
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    used = Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def need(device: str, gib: float) -> None:
    if available_bytes(device) < gib * GIB:
        pytest.skip(f"needs {gib} GiB of memory on {device}")


@pytest.mark.parametrize("op", OPS)
def test_offsets_above_32_bits(op: str, device: str) -> None:
    """Rows more than 2^31 elements apart, in memory that is reserved and hardly touched."""
    need(device, 8.5)
    storage = torch.empty(2**32 + 64, dtype=torch.float16, device=device)
    distant = storage.as_strided((3, 10), (2**31 - 3, 1))
    distant.copy_(torch.randn(3, 10))
    for dim in (0, 1):
        assert_close_to_reference(OURS[op](distant, dim), op, distant, dim)
        out = storage.as_strided((3, 10), (2**31 - 3, 1), storage_offset=20)
        assert torch.equal(OURS[op](distant, dim, out=out), OURS[op](distant, dim))
    end = storage[-50:].copy_(torch.randn(50))
    assert_close_to_reference(OURS[op](end, 0), op, end, 0)


@pytest.mark.large
def test_one_row_of_more_than_2_31_elements(device: str) -> None:
    """Four equal logits among 2^31 that are e^30 times less likely, in float16."""
    need(device, 12)
    size = 2**31 + 17
    input = torch.full((size,), -30.0, dtype=torch.float16, device=device)
    places = torch.tensor([0, 2**31 - 1, 2**31, size - 1], device=device)
    input[places] = 0.0
    output = OURS["softmax"](input, 0)
    assert output[places].tolist() == [0.25] * 4
    assert int(torch.count_nonzero(output)) == 4
    OURS["log_softmax"](input, 0, out=output)
    assert output[places].float().tolist() == pytest.approx([-1.38629] * 4, abs=2**-10)
    assert output[5].item() == output[-2].item() == pytest.approx(-31.386, abs=2**-6)


@pytest.mark.large
@pytest.mark.parametrize(("dim", "shape"), [(1, (2**28 + 3, 8)), (0, (2**16, 2**15 + 1))])
def test_many_rows_of_more_than_2_31_elements(
    dim: int, shape: tuple[int, int], device: str
) -> None:
    """Short rows, and columns: those on both sides of the 2^31st element are right."""
    need(device, 12)
    input = torch.zeros(shape, dtype=torch.float16, device=device)
    pattern = torch.tensor([2.0, 1.0, -1.0, 0.5, 0.0, -3.0, 1.5, 1.0], device=device)
    rows = input if dim == 1 else input.t()
    middle = 2**31 // shape[1] if dim == 1 else shape[1] // 2
    chosen = [0, middle - 1, middle, rows.shape[0] - 1]
    for row in chosen:
        rows[row, :8] = pattern.half()
        rows[row, -8:] = pattern.half()
    output = OURS["softmax"](input, dim)
    results = output if dim == 1 else output.t()
    for row in chosen:
        alone = rows[row].contiguous()
        assert_close_to_reference(results[row], "softmax", alone, 0)
    untouched = results[middle + 1]
    assert torch.equal(untouched, torch.full_like(untouched, 1 / rows.shape[1]))


@pytest.mark.large
def test_gradient_of_more_than_2_31_elements(device: str) -> None:
    """The gradient of the sum of squares of uniform rows is 0, and of one chosen row is not."""
    need(device, 18)
    input = torch.zeros(2**28 + 3, 8, dtype=torch.float16, device=device, requires_grad=True)
    output = OURS["softmax"](input, 1)
    grad_output = torch.zeros_like(output)
    grad_output[-1, 0] = 1.0
    grad_output[2**28, 7] = 1.0
    (grad,) = torch.autograd.grad(output, input, grad_output)
    one = 1 / 8 * (1 - 1 / 8)
    other = -1 / 8 * 1 / 8
    assert grad[-1].tolist() == [one, *[other] * 7]
    assert grad[2**28].tolist() == [*[other] * 7, one]
    assert int(torch.count_nonzero(grad)) == 16
