"""torch.nn's loss modules on the kernels of this package."""

from __future__ import annotations

import torch
from torch import Tensor

from softmax_ext import functional as F

__all__ = ["CrossEntropyLoss"]


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` on the kernels of :func:`softmax_ext.cross_entropy`.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as torch's.
        z_loss, softcap, temperature, inplace_backward: of :func:`softmax_ext.cross_entropy`.

    Shapes, dtypes and errors are those of :func:`softmax_ext.cross_entropy`.

    Source: torch.nn.CrossEntropyLoss.

    Example:
        >>> loss = CrossEntropyLoss(label_smoothing=0.1)
        >>> loss(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0]))
        tensor(0.5076)
    """

    # Also of modules pickled without them.
    z_loss: float = 0.0
    softcap: float | None = None
    temperature: float | None = None
    inplace_backward: bool = False

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        temperature: float | None = None,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap, self.temperature = z_loss, softcap, temperature
        self.inplace_backward = inplace_backward

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            temperature=self.temperature,
            inplace_backward=self.inplace_backward,
        )
