"""Softmax regression in one dimension: which of four intervals does x lie in?

One linear layer gives four logits to each x, and softmax makes probabilities of them. Four lines
over x, of growing slope, can each be the highest over one interval, so the classes can be learned.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from softmax_ext import CrossEntropyLoss, softmax

BOUNDARIES = (-1.0, 0.0, 1.0)
CLASSES = len(BOUNDARIES) + 1


class Intervals(Dataset[tuple[Tensor, Tensor]]):
    """Points from -2 up to 2, 0.1 apart, and the interval that each lies in."""

    def __init__(self) -> None:
        self.x = (torch.arange(-20, 20) / 10).view(-1, 1)
        self.y = torch.bucketize(self.x.view(-1), torch.tensor(BOUNDARIES), right=True)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def __len__(self) -> int:
        return len(self.x)


class SoftmaxRegression(nn.Module):
    """Logits of shape (batch, classes) from x of shape (batch, 1)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(1, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x)
        return logits


def main(epochs: int = 100) -> float:
    """Train, print what was learned and return the accuracy, from 0 to 1."""
    torch.manual_seed(0)
    data = Intervals()
    loader = DataLoader(data, batch_size=2, shuffle=True)
    model = SoftmaxRegression(CLASSES)
    cross_entropy = CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    for epoch in range(epochs):
        total = 0.0
        for x, y in loader:
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(y)
        if (epoch + 1) % 20 == 0:
            print(f"epoch {epoch + 1:3d}  loss {total / len(data):.4f}")

    with torch.no_grad():
        probabilities = softmax(model(data.x), dim=1)
    confidence, predicted = probabilities.max(dim=1)
    accuracy = float((predicted == data.y).float().mean())

    print("\n    x   class  predicted  probability")
    for i in range(0, len(data), 4):
        print(
            f"{data.x[i].item():5.1f}   {int(data.y[i]):5d}  {int(predicted[i]):9d}"
            f"  {confidence[i].item():11.3f}"
        )
    print(f"\naccuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
