"""A character language model, whose logits never lie in memory as a whole.

It reads the documentation of this project, and says which character comes next from the sixteen
before (Bengio et al., "A neural probabilistic language model", JMLR 2003). Its last layer and its
loss are one call of linear_cross_entropy; it is trained a second time with torch's linear and
cross_entropy, from the same seed and on the same batches. Both losses must go the same way: if they
do not, the program says so and exits with status 1. It prints the most memory that the loss held,
and draws both curves as a PNG.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from tqdm import tqdm

from softmax_ext import linear_cross_entropy

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CONTEXT, WIDTH, BATCH = 16, 128, 4096
TOLERANCE = 1e-3  # of a loss; rounding alone moves it by about 1e-6

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_torch(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(linear(hidden, weight), target)


def by_softmax_ext(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    loss = linear_cross_entropy(hidden, weight, target)
    assert isinstance(loss, Tensor)
    return loss


LOSSES: dict[str, Loss] = {"torch": by_torch, "softmax_ext": by_softmax_ext}


class CharacterModel(nn.Module):
    """From (batch, CONTEXT) characters to (batch, WIDTH), which `characters` makes logits of."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, 24)
        self.layers = nn.Sequential(
            nn.Linear(CONTEXT * 24, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.characters = nn.Linear(WIDTH, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.layers(self.embedding(x).flatten(1))
        return hidden


def read(root: Path) -> tuple[Tensor, int]:
    """All documentation as indices of its characters, and how many of these there are."""
    text = "".join(
        path.read_text() for path in sorted([*root.glob("*.md"), *root.glob("docs/*.md")])
    )
    index = {character: k for k, character in enumerate(sorted(set(text)))}
    return torch.tensor([index[character] for character in text]), len(index)


def train(text: Tensor, classes: int, loss_of: Loss, steps: int, name: str) -> list[float]:
    torch.manual_seed(0)
    model = CharacterModel(classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    windows = text.unfold(0, CONTEXT + 1, 1)
    for _ in tqdm(range(steps), desc=name):
        rows = windows[torch.randint(len(windows), (BATCH,))]
        loss = loss_of(model(rows[:, :-1]), model.characters.weight, rows[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def peak_of(loss_of: Loss, classes: int) -> float:
    """MiB that the loss of a batch and its gradients hold at most, beside what it is given."""
    hidden = torch.randn(BATCH, WIDTH, requires_grad=True)
    weight = torch.randn(classes, WIDTH, requires_grad=True)
    target = torch.randint(classes, (BATCH,))
    with torch.profiler.profile(profile_memory=True) as profile:
        loss_of(hidden, weight, target).backward()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


def draw(losses: dict[str, list[float]], output: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (name, values), style in zip(losses.items(), ("-", "--"), strict=True):
        axes.plot(values, style, label=name)
    axes.set(xlabel="step", ylabel="loss, nats a character", title="A character language model")
    axes.legend()
    figure.savefig(output, dpi=150)
    plt.close(figure)


def main(steps: int, output: Path) -> dict[str, list[float]]:
    """Train twice, print what came of it, and give the losses of each step."""
    text, classes = read(Path(__file__).resolve().parent.parent)
    print(f"{len(text)} characters, {classes} different ones")
    losses = {name: train(text, classes, f, steps, name) for name, f in LOSSES.items()}
    for name, values in losses.items():
        print(
            f"{name:12} loss {values[0]:.4f} to {values[-1]:.4f}, "
            f"{values[-1] / math.log(2):.2f} bits a character; the loss of a batch holds "
            f"{peak_of(LOSSES[name], classes):.1f} MiB, and of 50000 classes "
            f"{peak_of(LOSSES[name], 50000):.0f} MiB"
        )
    draw(losses, output)
    print(f"drawn in {output}")
    pairs = zip(*losses.values(), strict=True)
    apart = max(abs(a - b) for a, b in pairs)
    print(f"the losses are at most {apart:.1e} apart")
    if apart > TOLERANCE:
        sys.exit(f"the losses went different ways: {apart:.1e} is above {TOLERANCE}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("char_lm.png"))
    arguments = parser.parse_args()
    main(arguments.steps, arguments.output)
