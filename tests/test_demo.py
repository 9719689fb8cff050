"""examples/digits.py: what it prints on a machine that is busy, or has few characters."""

import io
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def digits(monkeypatch):
    """What it imports takes seconds, which a run of other tests does without."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    return pytest.importorskip("digits", reason="the packages of the extra `demo`")


@pytest.mark.parametrize(("encoding", "bar"), [("ascii", "#"), ("latin-1", "#"), ("utf-8", "█")])
def test_bars_in_the_characters_of_the_output(digits, encoding, bar, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", output)
    digits.print_probabilities(torch.eye(10), torch.arange(10))
    output.seek(0)
    assert f"0  {bar * 40}  100.0%" in output.read()


STEADY, WIDE = (1.9, 2.0, 2.1), (1.5, 2.0, 2.5)  # the lowest ratio, the median, the highest


@pytest.mark.parametrize(
    ("ratios", "others", "noted"),
    [
        ([STEADY, STEADY], 0.02, []),
        ([STEADY, STEADY], None, []),  # a system that does not tell
        ([STEADY, STEADY], 1.5, ["other programs used 1.5"]),
        ([STEADY, WIDE], 0.02, ["1 of the 2 ratios"]),
        ([WIDE, WIDE], 1.5, ["other programs used 1.5", "2 of the 2 ratios"]),
    ],
)
def test_a_busy_machine_and_a_wide_spread_are_noted(digits, ratios, others, noted, capsys):
    cell = ("8x64", "softmax", "forward", 2e-6, 1e-6)
    timings = [digits.Timing(*cell, *of_cell) for of_cell in ratios]
    digits.print_speed(digits.Speed(timings, others))
    printed = capsys.readouterr().out
    for text in ("other programs used", "of the 2 ratios"):
        assert (text in printed) is any(text in note for note in noted)
    for note in [*noted, *(f"{t.low:.2f} - {t.high:.2f}" for t in timings)]:
        assert note in printed


def test_quartiles_are_of_the_pairs(digits, monkeypatch):
    """torch takes 1 to 11 times as long in eleven pairs, after two calls that set the count."""
    ratios = iter([1, *range(1, 12)])

    def seconds(function, *_):
        return 1.0 if function is digits.OURS.softmax else float(next(ratios))

    monkeypatch.setattr(digits, "call_seconds", seconds)
    result = digits.compare("softmax", torch.zeros(2, 3))
    assert (result.torch, result.softmax_ext) == (6, 1)
    assert (result.low, result.ratio, result.high) == (3, 6, 9)
