"""torch.nn's softmax modules on the kernels of this package.

Each is a subclass of torch's own, so that repr, state dict, pickling and isinstance are torch's;
only the computation differs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import Unpack

from softmax_ext import functional as F
from softmax_ext.functional.scores import Scores, given, with_scores

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
        # torch's own refuses a tuple from 2.14 on.
        super().__init__(None if isinstance(dim, tuple) else dim)
        self.dim = dim
        self.inplace = inplace


class _OfScores(_OverDim):
    """The keyword-only arguments of the functions: a parameter stays one, another tensor is a
    buffer, anything else an attribute."""

    __constants__ = ["dim", "inplace", "scored"]  # noqa: RUF012
    scored: bool = False  # also of modules pickled without it
    names: tuple[str, ...] = ()

    @with_scores
    def __init__(
        self,
        dim: int | tuple[int, ...] | None = None,
        *,
        inplace: bool = False,
        **scores: Unpack[Scores],
    ) -> None:
        super().__init__(dim, inplace=inplace)  # type: ignore[arg-type]
        scores = given(type(self).__name__, scores)
        if not scores:
            return
        self.scored, self.names = True, tuple(scores)
        for name, value in scores.items():
            if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def extra_repr(self) -> str:
        def text(value: object) -> str:
            return f"Tensor{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)

        shown = [f"{name}={text(getattr(self, name))}" for name in self.names]
        return ", ".join([super().extra_repr(), *shown])

    def _of_scores(self, function: Callable[..., Tensor], input: Tensor) -> Tensor:
        scores = {name: getattr(self, name) for name in self.names}
        return function(input, self.dim, _stacklevel=6, **scores)


class Softmax(_OfScores, torch.nn.Softmax):
    """torch.nn.Softmax by :func:`softmax_ext.softmax`.

    Args:
        dim: of which the slices sum to 1, or a tuple of dims. Without it, torch's implicit choice,
            with its warning.
        inplace: whether the result takes the input's memory.
        scale, temperature, softcap, mask, is_causal, causal_offset, window, sink: as in
            :func:`softmax_ext.softmax`. A tensor is a buffer of the module, a torch.nn.Parameter
            one of its parameters.

    Shape: any to the same, in the input's dtype. Errors are those of :func:`softmax_ext.softmax`.

    Source: torch.nn.Softmax.

    Example:
        >>> Softmax(dim=1)(torch.tensor([[2.0, 1.0, 0.1]]))
        tensor([[0.6590, 0.2424, 0.0986]])
        >>> Softmax(dim=1, temperature=2.0)(torch.tensor([[2.0, 1.0, 0.1]]))
        tensor([[0.5017, 0.3043, 0.1940]])
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.scored:
            return self._of_scores(F.softmax_ if self.inplace else F.softmax, input)
        if self.inplace:
            return F.softmax_(input, self.dim, _stacklevel=5)
        return F.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(_OfScores, torch.nn.LogSoftmax):
    """torch.nn.LogSoftmax by :func:`softmax_ext.log_softmax`.

    Args:
        dim: over which, or a tuple of dims. Without it, torch's implicit choice, with its warning.
        inplace: whether the result takes the input's memory.
        scale, temperature, softcap, mask, is_causal, causal_offset, window, sink: as of
            :class:`Softmax`.

    Shape: any to the same, in the input's dtype. Errors are those of :func:`softmax_ext.softmax`.

    Source: torch.nn.LogSoftmax.

    Example:
        >>> LogSoftmax(dim=1)(torch.tensor([[2.0, 1.0, 0.1]]))
        tensor([[-0.4170, -1.4170, -2.3170]])
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.scored:
            return self._of_scores(F.log_softmax_ if self.inplace else F.log_softmax, input)
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
