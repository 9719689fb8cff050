"""Calibration by a temperature: a classifier that is as sure as it is right.

A network that has learned a few images by heart is right less often than its probabilities say. One
number mends it, the temperature of softmax(logits / temperature), found by L-BFGS on images that it
was not trained with (Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks",
arXiv 1706.04599). The order of the probabilities, and so the accuracy, stays.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

from softmax_ext import log_softmax, softmax

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CLASSES = 10
BINS = 10
TRAINED, HELD_OUT = 200, 600  # images; the rest is the test set


class Part(NamedTuple):
    """Images of shape (n, 64) from 0 to 1, and labels of shape (n,)."""

    images: Tensor
    labels: Tensor


class Calibration(NamedTuple):
    accuracy: float
    error: float  # expected calibration error, from 0 to 1
    confidence: list[float]  # of each bin that has images, the mean
    right: list[float]  # and the fraction that is right
    images: list[int]


def load(seed: int) -> tuple[Part, Part, Part]:
    """To train with, held out, to test with."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(digits.data / 16, dtype=torch.float32)[order]
    labels = torch.tensor(digits.target)[order]
    sizes = [TRAINED, HELD_OUT, len(labels) - TRAINED - HELD_OUT]
    train, held_out, test = map(Part, images.split(sizes), labels.split(sizes))
    return train, held_out, test


def train(part: Part, epochs: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(epochs):
        optimizer.zero_grad()
        loss = nn.functional.nll_loss(log_softmax(model(part.images), dim=-1), part.labels)
        loss.backward()
        optimizer.step()
    return model


def fit_temperature(logits: Tensor, labels: Tensor) -> Tensor:
    """The temperature of the least cross entropy. Its logarithm is sought, so it is above 0."""
    logarithm = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([logarithm], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        log_probabilities = log_softmax(logits, dim=-1, temperature=logarithm.exp())
        loss = nn.functional.nll_loss(log_probabilities, labels)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return logarithm.detach().exp()


def calibration(probabilities: Tensor, labels: Tensor) -> Calibration:
    confidence, predicted = probabilities.max(dim=-1)
    right = (predicted == labels).float()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    used = [bins == i for i in range(BINS) if (bins == i).any()]
    error = multiclass_calibration_error(probabilities, labels, CLASSES, n_bins=BINS)
    return Calibration(
        right.mean().item(),
        error.item(),
        [confidence[each].mean().item() for each in used],
        [right[each].mean().item() for each in used],
        [int(each.sum()) for each in used],
    )


def draw(results: dict[str, Calibration], path: Path) -> None:
    figure, axes = plt.subplots(
        1, len(results), figsize=(9, 4.5), sharey=True, layout="constrained"
    )
    for axis, (title, result) in zip(axes, results.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="gray", lw=1, ls="--", label="as sure as right")
        axis.plot(result.confidence, result.right, color="#1f6f8b", lw=1)
        axis.scatter(result.confidence, result.right, s=result.images, color="#1f6f8b", alpha=0.6)
        axis.set(title=f"{title}\nexpected calibration error {result.error:.1%}")
        axis.set(xlabel="mean probability of the class chosen", xlim=(0, 1.02), ylim=(0, 1.02))
        axis.legend(loc="upper left")
    axes[0].set_ylabel("fraction that is right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(output: Path, epochs: int = 300, seed: int = 0) -> dict[str, Calibration]:
    """Train, calibrate, print and draw; what it was before and after."""
    torch.manual_seed(seed)
    trained, held_out, test = load(seed)
    model = train(trained, epochs)
    with torch.no_grad():
        of_held_out, logits = model(held_out.images), model(test.images)
    temperature = fit_temperature(of_held_out, held_out.labels)
    results = {
        "before": calibration(softmax(logits, dim=-1), test.labels),
        "after": calibration(softmax(logits, dim=-1, temperature=temperature), test.labels),
    }
    print(f"temperature {temperature.item():.3f}, from {HELD_OUT} images held out\n")
    print(f"{len(test.labels)} test images    accuracy   expected calibration error")
    for name, result in results.items():
        print(f"{name:>15}    {result.accuracy:8.4f}   {result.error:26.4f}")
    draw(results, output)
    print(f"\nReliability before and after: {output}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("temperature.png"))
    main(**vars(parser.parse_args()))
