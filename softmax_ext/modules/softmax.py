"""torch.nn's softmax modules on the kernels of this package.

Each is a subclass of torch's own, so that repr, state dict, pickling and isinstance are torch's;
only the computation differs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softmax_ext import functional as F

__all__ = ["LogSoftmax", "Softmax", "Softmax2d", "Softmin"]


class _WithInplace(torch.nn.Module):
    """The argument `inplace`, which torch's own softmax modules lack."""

    __constants__ = ["inplace"]  # noqa: RUF012
    inplace: bool = False  # also of modules pickled without it

    def extra_repr(self) -> str:
        rest = super().extra_repr()
        return ", ".join(filter(None, (rest, "inplace=True"))) if self.inplace else rest


class _OverDim(_WithInplace):
    __constants__ = ["dim", "inplace"]  # noqa: RUF012

    def __init__(self, dim: int | None = None, *, inplace: bool = False) -> None:
        super().__init__(dim)
        self.inplace = inplace


class Softmax(_OverDim, torch.nn.Softmax):
    """torch.nn.Softmax by :func:`softmax_ext.softmax`.

    Args:
        dim: of which the slices sum to 1. Without it, torch's implicit choice, with its warning.
        inplace: whether the result takes the input's memory.

    Shape: any to the same, in the input's dtype. Errors are those of :func:`softmax_ext.softmax`.

    Source: torch.nn.Softmax.

    Example:
        >>> Softmax(dim=1)(torch.tensor([[2.0, 1.0, 0.1]]))
        tensor([[0.6590, 0.2424, 0.0986]])
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.inplace:
            return F.softmax_(input, self.dim, _stacklevel=5)
        return F.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(_OverDim, torch.nn.LogSoftmax):
    """torch.nn.LogSoftmax by :func:`softmax_ext.log_softmax`.

    Args:
        dim: over which. Without it, torch's implicit choice, with its warning.
        inplace: whether the result takes the input's memory.

    Shape: any to the same, in the input's dtype. Errors are those of :func:`softmax_ext.softmax`.

    Source: torch.nn.LogSoftmax.

    Example:
        >>> LogSoftmax(dim=1)(torch.tensor([[2.0, 1.0, 0.1]]))
        tensor([[-0.4170, -1.4170, -2.3170]])
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.inplace:
            return F.log_softmax_(input, self.dim, _stacklevel=5)
        return F.log_softmax(input, self.dim, _stacklevel=5)


class Softmin(_OverDim, torch.nn.Softmin):
    """torch.nn.Softmin by :func:`softmax_ext.softmin`.

    Args:
        dim: of which the slices sum to 1. Without it, torch's implicit choice, with its warning.
        inplace: whether the result takes the input's memory.

    Shape: any to the same, in the input's dtype. Errors are those of :func:`softmax_ext.softmax`.

    Source: torch.nn.Softmin.

    Example:
        >>> Softmin(dim=0)(torch.tensor([1.0, 2.0, 3.0]))
        tensor([0.6652, 0.2447, 0.0900])
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.inplace:
            return F.softmin_(input, self.dim, _stacklevel=5)
        return F.softmin(input, self.dim, _stacklevel=5)


class Softmax2d(_WithInplace, torch.nn.Softmax2d):
    """torch.nn.Softmax2d by :func:`softmax_ext.softmax`: over the channels of each pixel.

    Args:
        inplace: whether the result takes the input's memory.

    Shape: (N, C, H, W) or (C, H, W) to the same, in the input's dtype.

    Raises:
        ValueError: the input has another number of dimensions.

    Source: torch.nn.Softmax2d.

    Example:
        >>> Softmax2d()(torch.zeros(1, 2, 1, 1)).flatten()
        tensor([0.5000, 0.5000])
    """

    def __init__(self, *, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() not in (3, 4):
            raise ValueError(
                f"Softmax2d: expected input to be 3D or 4D, got {input.dim()}D instead"
            )
        return F.softmax_(input, -3) if self.inplace else F.softmax(input, -3)
