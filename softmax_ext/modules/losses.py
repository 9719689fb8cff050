"""torch.nn's loss modules on the kernels of this package."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from softmax_ext import functional as F

__all__ = ["CrossEntropyLoss", "LinearCrossEntropyLoss"]


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


class LinearCrossEntropyLoss(torch.nn.Module):
    """A linear layer and its cross-entropy, by :func:`softmax_ext.linear_cross_entropy`.

    Args:
        in_features, num_classes: sizes of the layer.
        out_features: what targets have behind their first dim.
        bias, device, dtype: of the layer, ``linear``, as torch.nn.Linear's.
        weight, reduction, ignore_index, label_smoothing, options, z_loss, softcap, temperature: of
            :func:`softmax_ext.linear_cross_entropy`.

    Shapes, dtypes and errors are those of :func:`softmax_ext.linear_cross_entropy`; parameters have
    the names of torch's module.

    Source: torch.nn.LinearCrossEntropyLoss.

    Example:
        >>> loss = LinearCrossEntropyLoss(4, 3)
        >>> loss(torch.zeros(2, 4), torch.tensor([0, 2])).shape
        torch.Size([])
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        temperature: float | None = None,
    ) -> None:
        super().__init__()
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(
                f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}"
            )
        if not 0.0 <= label_smoothing <= 1.0:
            raise RuntimeError(
                f"expected label_smoothing to be in range [0, 1], got {label_smoothing}"
            )
        self.register_buffer("weight", weight)
        self.num_classes, self.out_features = num_classes, out_features
        self.linear = torch.nn.Linear(
            in_features,
            math.prod(out_features, start=num_classes),
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.reduction, self.ignore_index = reduction, ignore_index
        self.label_smoothing, self.options = label_smoothing, options
        self.z_loss, self.softcap, self.temperature = z_loss, softcap, temperature

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        shape = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        loss = F.linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            z_loss=self.z_loss,
            softcap=self.softcap,
            temperature=self.temperature,
        )
        assert isinstance(loss, Tensor)
        return loss

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, out_features={self.out_features}, "
            f"reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}"
        )
