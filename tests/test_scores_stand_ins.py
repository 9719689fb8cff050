"""docs/scores.md: each piece of code there against what it stands in for, written out here."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import softmax_ext

DOCUMENT = Path(__file__).parent.parent / "docs" / "scores.md"
DOCUMENTED: dict[str, Any] = {
    "torch": torch,
    "softmax": softmax_ext.softmax,
    "softmax_ext": softmax_ext,
}
for block in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL):
    exec(block, DOCUMENTED)


def randn(*shape: int, device: str) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=torch.float64).requires_grad_()


def causal(queries: int, keys: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """(batch, 1, queries, keys) of 0 and the lowest number, with a padded first row."""
    mask = torch.full((2, 1, queries, keys), torch.finfo(dtype).min, dtype=dtype, device=device)
    mask = mask.triu(keys - queries + 1)
    mask[1, :, :, :2] = torch.finfo(dtype).min
    return mask


def assert_alike(actual: torch.Tensor, expected: torch.Tensor, *leaves: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    found, right = (torch.autograd.grad(y, leaves, grad) for y in (actual, expected))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("queries", [1, 5, 9])
def test_transformers(queries: int, device: str) -> None:
    query, key = randn(2, 3, queries, 8, device=device), randn(2, 3, 9, 8, device=device)
    mask = causal(queries, 9, device, torch.float64)
    scores = torch.matmul(query, key.transpose(2, 3)) * 8**-0.5
    expected = torch.nn.functional.softmax(scores + mask, dim=-1)
    assert_alike(DOCUMENTED["attention_weights"](query, key, 8**-0.5, mask), expected, query, key)


def test_transformers_in_bfloat16(device: str) -> None:
    """A cast to float32 and back changes what is rounded between: nothing that is visible in it."""
    query, key = (randn(2, 3, 9, 8, device=device).detach().bfloat16() for _ in range(2))
    mask = causal(9, 9, device, torch.bfloat16)
    scores = torch.matmul(query, key.transpose(2, 3)) * 8**-0.5 + mask
    theirs = torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    actual = DOCUMENTED["attention_weights"](query, key, 8**-0.5, mask)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, theirs, atol=2e-2, rtol=2e-2)


def test_gemma(device: str) -> None:
    query, key = (randn(2, 3, 7, 8, device=device) for _ in range(2))
    mask = causal(7, 7, device, torch.float64)
    scores = torch.matmul(query, key.transpose(2, 3)) * 2.0
    scores = torch.tanh(scores / 5.0) * 5.0
    expected = torch.nn.functional.softmax(scores + mask, dim=-1)
    actual = DOCUMENTED["capped_attention_weights"](query, key, 2.0, 5.0, mask)
    assert_alike(actual, expected, query, key)


def test_gpt_oss(device: str) -> None:
    query, key = (randn(2, 4, 7, 8, device=device) for _ in range(2))
    sinks, mask = randn(4, device=device), causal(7, 7, device, torch.float64)
    scores = torch.matmul(query, key.transpose(2, 3)) * 0.3 + mask
    of_sinks = sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[-2], -1)
    combined = torch.cat([scores, of_sinks], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    expected = torch.nn.functional.softmax(combined, dim=-1)[..., :-1]
    actual = DOCUMENTED["attention_weights_beside_sinks"](query, key, 0.3, mask, sinks)
    assert_alike(actual, expected, query, key, sinks)


@pytest.mark.parametrize("shifted", [False, True])
def test_swin(shifted: bool, device: str) -> None:
    windows, heads, n = 4, 3, 49
    query, key = (randn(2 * windows, heads, n, 8, device=device) for _ in range(2))
    bias = randn(heads, n, n, device=device)
    mask = None
    if shifted:
        apart = torch.rand(windows, n, n, device=device) < 0.5
        mask = torch.zeros(windows, n, n, device=device).masked_fill(apart, -100.0)
    scores = (query * 0.3) @ key.transpose(-2, -1) + bias.unsqueeze(0)
    if mask is not None:
        scores = scores.view(2, windows, heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
        scores = scores.view(-1, heads, n, n)
    expected = torch.nn.functional.softmax(scores, dim=-1)
    actual = DOCUMENTED["window_attention_weights"](query, key, 0.3, bias, mask)
    assert_alike(actual, expected, query, key, bias)


@pytest.mark.parametrize("masked", [False, True])
def test_megatron(masked: bool, device: str) -> None:
    """True is masked there."""
    input = randn(2, 3, 6, 6, device=device)
    mask = torch.rand(2, 1, 6, 6, device=device) < 0.4 if masked else None
    if mask is not None:
        mask[..., 0] = False  # of every row something is left
    left_out = torch.ones(6, 6, dtype=torch.bool, device=device).triu(1) if mask is None else mask
    scores = (input * 0.7).masked_fill(left_out, -10000.0)
    expected = torch.nn.Softmax(dim=-1)(scores)
    actual = DOCUMENTED["ScaleMaskSoftmax"](True, 0.7)(input, mask)
    assert_alike(actual, expected, input)
