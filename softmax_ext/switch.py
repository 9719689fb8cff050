"""The switch that puts torch's own softmax and cross-entropy on these kernels."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import ParamSpec, TypeVar

from torch.compiler import is_dynamo_compiling

from softmax_ext._loader import load

_C = load()

__all__ = ["disable", "enable", "enabled", "is_enabled"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class _Thread(threading.local):
    within = 0  # how many of this thread's ``enabled()`` have not ended


class _Switch:
    """On while it is set, or some thread is within ``enabled()``."""

    def __init__(self) -> None:
        # Reentrant: a signal handler, or a generator that is collected, may come and go within
        # `enabled` while its thread is in here.
        self._lock = threading.RLock()
        self._is_set = False
        self._within = 0  # of all threads
        self._thread = _Thread()
        self._applied = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=lambda: self._lock.acquire(),
                after_in_parent=lambda: self._lock.release(),
                after_in_child=self._start_in_child,
            )

    def is_on(self) -> bool:
        return self._is_set or self._within > 0

    def change(self, is_set: bool | None = None, within: int = 0) -> None:
        with self._lock:
            self._is_set = self._is_set if is_set is None else is_set
            self._thread.within += within
            self._within += within
            self._apply()

    def _apply(self) -> None:
        while self._applied != self.is_on():
            self._applied = not self._applied
            _C.override_torch(self._applied)

    def _start_in_child(self) -> None:
        """The thread that forked is the only one: what others are within never ends here."""
        self._lock = threading.RLock()
        self._within = max(self._thread.within, 0)
        self._apply()


_switch = _Switch()


def enable() -> None:
    """Puts torch's own softmax and cross-entropy on these kernels, for the whole process.

    The dispatcher's aten::_softmax, aten::_log_softmax, their backward and their out= forms are
    theirs then, on the CPU and, where built for it, on CUDA. So torch.softmax, Tensor.softmax,
    torch.nn.functional, torch.nn.Softmax, CrossEntropyLoss, MultiheadAttention, the math path of
    scaled_dot_product_attention and every model of every library use them, without a changed line,
    with torch's own autograd, vmap, forward-mode AD, autocast and compile rules. A call that the
    kernels do not take runs on torch's.

    So is aten::cross_entropy_loss, which torch composes of two operators: F.cross_entropy,
    nn.CrossEntropyLoss and F.linear_cross_entropy without `options` are one call of the kernels of
    :func:`softmax_ext.cross_entropy` where these take it (class indices as int64; class
    probabilities of the logits' dtype and (C) or (N, C)). Under transforms, forward-mode AD and
    modes it is composed as without the switch.

    Code that torch.compile generates with inductor has its own softmax, and is not changed.

    The first call registers kernels with torch's dispatcher, best before other threads run models;
    what follows is safe at any time.

    A process that is forked starts with the switch as the thread that forks has it; one that is
    spawned starts with it off.

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


def is_enabled() -> bool:
    """Whether torch's softmax is on these kernels: by :func:`enable`, or within :func:`enabled`.

    It is one answer for the process: another thread may be the one within.

    Source: as :func:`enable`.

    Example:
        >>> with enabled():
        ...     is_enabled()
        True
        >>> is_enabled()
        False
    """
    return _switch.is_on()


class enabled:  # noqa: N801: used as a function is
    """:func:`enable` for a block or a function; whatever was before comes back after it.

    It may be nested, and entered by several threads; the switch is one for the process.

    Where torch.compile traces it, it does nothing: inductor generates a softmax of its own, and a
    graph that calls torch's operator runs with the switch as it then is.

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
        if not is_dynamo_compiling():
            _switch.change(within=1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not is_dynamo_compiling():
            _switch.change(within=-1)

    def __call__(self, function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        @wraps(function)
        def within(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            with enabled():  # Dynamo enters only what is made where it traces
                return function(*args, **kwargs)

        return within
