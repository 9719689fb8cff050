"""The switch that puts torch's own softmax on these kernels."""

from __future__ import annotations

import threading
from contextlib import ContextDecorator
from types import TracebackType

from softmax_ext._loader import load

_C = load()

__all__ = ["disable", "enable", "enabled"]


class _Switch:
    """On while it is set, or someone is within ``enabled()``."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_set = False
        self._within = 0

    def change(self, is_set: bool | None = None, within: int = 0) -> None:
        with self._lock:
            before = self._is_set or self._within > 0
            self._is_set = self._is_set if is_set is None else is_set
            self._within += within
            after = self._is_set or self._within > 0
            if before != after:
                _C.override_torch(after)


_switch = _Switch()


def enable() -> None:
    """Puts torch's own softmax and log-softmax on these kernels, for the whole process.

    The dispatcher's aten::_softmax, aten::_log_softmax, their backward and their out= forms are
    theirs then, on the CPU and, where built for it, on CUDA. So torch.softmax, Tensor.softmax,
    torch.nn.functional, torch.nn.Softmax, CrossEntropyLoss, MultiheadAttention, the math path of
    scaled_dot_product_attention and every model of every library use them, without a changed line,
    with torch's own autograd, vmap, forward-mode AD, autocast and compile rules. A call that the
    kernels do not take runs on torch's.

    Code that torch.compile generates with inductor has its own softmax, and is not changed.

    The first call registers kernels with torch's dispatcher, best before other threads run models;
    what follows is safe at any time.

    Source: torch's dispatcher, https://pytorch.org/tutorials/advanced/dispatcher.html.

    Example:
        >>> import torch
        >>> enable()
        >>> torch.softmax(torch.zeros(2), 0)
        tensor([0.5000, 0.5000])
        >>> disable()
    """
    _switch.change(is_set=True)


def disable() -> None:
    """Undoes :func:`enable`: torch's operators run on torch's kernels again, to the bit.

    Within :func:`enabled`, here or in another thread, they stay on until that ends.

    Source: as :func:`enable`.

    Example:
        >>> disable()
    """
    _switch.change(is_set=False)


class enabled(ContextDecorator):  # noqa: N801: used as a function is
    """:func:`enable` for a block or a function; whatever was before comes back after it.

    It may be nested, and entered by several threads; the switch is one for the process.

    Source: as :func:`enable`.

    Example:
        >>> import torch
        >>> with enabled():
        ...     torch.nn.functional.softmax(torch.zeros(2), dim=0)
        tensor([0.5000, 0.5000])
        >>> @enabled()
        ... def attention(scores, value):
        ...     return scores.softmax(-1) @ value
    """

    def __enter__(self) -> enabled:
        _switch.change(within=1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _switch.change(within=-1)
