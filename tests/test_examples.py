"""Known results, as printed in textbooks: to four decimals; and examples/temperature.py."""

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


@pytest.fixture
def temperature(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    return pytest.importorskip("temperature", reason="the packages of the extra `demo`")


def test_temperature(temperature, tmp_path, capsys):
    """Probabilities as sure as they are right, of the same classes."""
    output = tmp_path / "reliability.png"
    results = temperature.main(output)
    before, after = results["before"], results["after"]
    assert after.accuracy == before.accuracy > 0.85
    assert after.error < 0.6 * before.error
    printed = capsys.readouterr().out
    for result in results.values():
        assert f"{result.accuracy:.4f}" in printed and f"{result.error:.4f}" in printed
    assert output.read_bytes().startswith(b"\x89PNG")


def test_calibration_of_known_probabilities(temperature):
    """Of three bins: sure of 0.9 and half right, of 0.7 and all right, of 0.3 and none right."""

    def row(p, chosen):
        rest = torch.full((10,), (1 - p) / 9)
        return rest.index_fill(0, torch.tensor([chosen]), p)

    rows = [(0.91, 1), (0.91, 2), (0.71, 3), (0.71, 3), (0.31, 4), (0.31, 4)]
    labels = torch.tensor([1, 1, 3, 3, 5, 6])
    result = temperature.calibration(torch.stack([row(*each) for each in rows]), labels)
    assert result.accuracy == pytest.approx(0.5)
    assert result.confidence == pytest.approx([0.31, 0.71, 0.91])
    assert result.right == pytest.approx([0, 1, 0.5])
    assert result.images == [2, 2, 2]
    assert result.error == pytest.approx((0.31 + 0.29 + 0.41) / 3)


def test_the_temperature_of_known_logits(temperature):
    """Logits three times as large as those that the labels were drawn by."""
    logits = 2 * torch.randn(20000, 10)
    labels = torch.multinomial(torch.softmax(logits, 1), 1)[:, 0]
    assert temperature.fit_temperature(3 * logits, labels).item() == pytest.approx(3, rel=0.05)


def test_char_lm(monkeypatch, tmp_path, capsys):
    """The same curve by both, which falls; and the memory of both."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    char_lm = pytest.importorskip("char_lm", reason="the packages of the extra `demo`")
    output = tmp_path / "loss.png"
    losses = char_lm.main(30, output)
    assert losses["softmax_ext"][-1] < 0.8 * losses["softmax_ext"][0]
    assert losses["softmax_ext"] == pytest.approx(losses["torch"], abs=char_lm.TOLERANCE)
    assert capsys.readouterr().out.count("MiB") == 4
    assert output.read_bytes().startswith(b"\x89PNG")


def test_graph_attention() -> None:
    """The same losses as by torch's operators, and more than features alone would tell."""
    assert graph_attention.main(epochs=30) > 0.85
