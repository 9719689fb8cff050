"""Known results, as printed in textbooks: to four decimals."""

import sys
from pathlib import Path

import pytest
import torch

import softmax_ext

sys.path.append(str(Path(__file__).parent.parent / "examples"))

import graph_attention

ROWS = {
    (1.0, 2.0, 3.0): (0.0900, 0.2447, 0.6652),
    (2.0, 1.0, 0.1): (0.6590, 0.2424, 0.0986),
    (1.0, 3.0, 0.2): (0.1131, 0.8360, 0.0508),
}


def rounded(probabilities: torch.Tensor) -> list[float]:
    return [round(p, 4) for p in probabilities.tolist()]


@pytest.mark.parametrize("logits", ROWS, ids=str)
def test_row(logits: tuple[float, ...], device: str) -> None:
    input = torch.tensor(logits, device=device)
    probabilities = softmax_ext.softmax(input, dim=0)
    assert rounded(probabilities) == list(ROWS[logits])
    assert round(probabilities.sum().item(), 4) == 1.0
    assert rounded(softmax_ext.log_softmax(input, dim=0).exp()) == list(ROWS[logits])
    assert rounded(softmax_ext.softmin(-input, dim=0)) == list(ROWS[logits])


def test_batch(device: str) -> None:
    logits = [(2.0, 1.0, 0.1), (1.0, 3.0, 0.2)]
    input = torch.tensor(logits, device=device)
    rows = softmax_ext.Softmax(dim=1)(input)
    columns = softmax_ext.softmax(input.t(), dim=0)
    for i, row in enumerate(logits):
        assert rounded(rows[i]) == list(ROWS[row])
        assert rounded(columns[:, i]) == list(ROWS[row])
    assert [round(s, 4) for s in rows.sum(dim=1).tolist()] == [1.0, 1.0]


def test_integer_logits(device: str) -> None:
    input = torch.tensor([1, 2, 3], device=device)
    probabilities = softmax_ext.softmax(input, dim=0, dtype=torch.float64)
    assert rounded(probabilities) == [0.0900, 0.2447, 0.6652]


def test_graph_attention() -> None:
    """The same losses as by torch's operators, and more than features alone would tell."""
    assert graph_attention.main(epochs=30) > 0.85
