"""Log-probabilities of chosen tokens and the entropy of what they were chosen from."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from softmax_ext.functional.linear_losses import _wide
from softmax_ext.functional.losses import (
    _FLOATING,
    _INDICES,
    _check_tensor,
    _factor,
    _has_values,
    _is_autocast,
    _Options,
    _Results,
    _results,
)
from softmax_ext.functional.softmax import log_softmax

__all__ = ["selective_log_softmax"]

# No class is ignored: all below 0 are out of range, and the one that would pass is made another.
_OF_EACH_ROW = _Options(0, -(2**63), 0.0, 0.0, 1.0, 0.0)


def _composed_entropy(logits: Tensor, factor: float) -> Tensor:
    """By torch's functions, with what torch has of devices and transforms."""
    wide = _wide(logits.dtype)
    if factor != 1.0:
        logits = logits.to(wide) * factor
    log_p = log_softmax(logits, -1, dtype=wide).clamp(min=torch.finfo(wide).min)
    return -(log_p.exp() * log_p).sum(-1)


def _of_one(
    logits: Tensor, chosen: Tensor, factor: float, wants_entropy: bool, wants_lse: bool = False
) -> _Results:
    """Of one class a row. Rows are read where they lie, with the classes in the last dim."""
    if logits.dim() > 2:
        logits = logits.movedim(-1, 1)
    options = _OF_EACH_ROW._replace(factor=factor)
    return _results(logits, chosen, None, options, wants_lse=wants_lse, wants_entropy=wants_entropy)


def _check_range(name: str, chosen: Tensor, logits: Tensor) -> None:
    """What gather does not say of itself in these words; on other devices it does."""
    if not (logits.is_cpu and chosen.numel() and _has_values(chosen)):
        return
    low, high = int(chosen.min()), int(chosen.max())
    if low < 0 or high >= logits.size(-1):
        raise IndexError(
            f"{name}(): expected argument 'index' to be in [0, {logits.size(-1)}), but got "
            f"{low if low < 0 else high}"
        )


@overload
def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    *,
    temperature: float = ...,
    return_entropy: Literal[False] = ...,
) -> Tensor: ...
@overload
def selective_log_softmax(
    logits: Tensor, index: Tensor, *, temperature: float = ..., return_entropy: Literal[True]
) -> tuple[Tensor, Tensor]: ...
@overload
def selective_log_softmax(
    logits: Tensor, index: Tensor, *, temperature: float = ..., return_entropy: bool
) -> Tensor | tuple[Tensor, Tensor]: ...
def selective_log_softmax(
    logits: Tensor, index: Tensor, *, temperature: float = 1.0, return_entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    r"""``log_softmax(logits / temperature, -1)`` at chosen classes alone, and the entropy.

    One class a row is had by the kernels of :func:`softmax_ext.cross_entropy`: one pass over the
    logits, which are read where they lie, forward and one backward. Several are had by their
    differences from the first. The entropy, :math:`-\sum p \log p`, comes of the same passes. No
    tensor of the logits' size is made but their gradient (of several classes, two).

    Args:
        logits: of the shape (..., C), float16, bfloat16, float32 or float64.
        index: of the shape (...) or (..., K), int64, int32 or uint8, in [0, C).
        temperature: the logits are divided by it.
        return_entropy: also gives the entropy of each row, which has a gradient of its own.

    Returns:
        The log-probabilities, of the index's shape and the logits' dtype (float32 under autocast);
        with `return_entropy` the tuple of them and the entropies, of the logits' shape without C,
        as float32 (float64 for float64).

    Raises:
        ValueError: the shapes do not go together, or `temperature` is not above 0.
        IndexError: an index is not in [0, C).
        TypeError: the index is not integer.
        NotImplementedError: the dtype of `logits` is not floating.

    Source: ``log_softmax(logits, -1).gather(-1, index)`` of torch, as TRL's
    ``selective_log_softmax`` and verl's ``entropy_from_logits`` have it.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, -torch.inf]])
        >>> selective_log_softmax(logits, torch.tensor([0, 1]))
        tensor([-0.4076, -0.6931])
        >>> selective_log_softmax(logits, torch.tensor([[0, 1], [1, 0]]), return_entropy=True)
        (tensor([[-0.4076, -1.4076],
                [-0.6931, -0.6931]]), tensor([0.8324, 0.6931]))
    """
    if has_torch_function((logits, index)):
        return handle_torch_function(
            selective_log_softmax,
            (logits, index),
            logits,
            index,
            temperature=temperature,
            return_entropy=return_entropy,
        )
    name = "selective_log_softmax"
    _check_tensor(name, "logits", logits)
    _check_tensor(name, "index", index)
    factor = _factor(name, temperature)
    if logits.dtype not in _FLOATING:
        raise NotImplementedError(
            f"{name}(): not implemented for an argument 'logits' of dtype {logits.dtype}; "
            "expected float16, bfloat16, float32 or float64"
        )
    if index.dtype not in _INDICES:
        raise TypeError(
            f"{name}(): expected argument 'index' to be int64, int32 or uint8, but got "
            f"{index.dtype}"
        )
    rows = logits.shape[:-1]
    if logits.dim() == 0 or (index.shape != rows and index.shape[:-1] != rows):
        raise ValueError(
            f"{name}(): expected argument 'index' of the shape {tuple(rows)} or "
            f"{(*rows, 'K')} for 'logits' of the shape {tuple(logits.shape)}, but got "
            f"{tuple(index.shape)}"
        )
    chosen = index.long().clamp(min=_OF_EACH_ROW.ignore_index + 1)
    if index.shape == rows:
        loss, _, entropy = _of_one(logits, chosen, factor, return_entropy)
        log_p = -loss
    else:
        _check_range(name, chosen, logits)
        first = chosen[..., 0] if index.size(-1) else chosen.new_zeros(rows)
        loss, lse, entropy = _of_one(logits, first, factor, return_entropy, wants_lse=True)
        assert lse is not None
        z = logits.gather(-1, chosen).to(lse.dtype)
        log_p = z * factor - lse.unsqueeze(-1)
        if index.size(-1) and loss.dtype == lse.dtype:
            # A difference of logits has more digits than their lse; but none of -inf.
            of_first = z[..., :1]
            by_first = (z - of_first) * factor - loss.unsqueeze(-1)
            log_p = torch.where(of_first == -torch.inf, log_p, by_first)
        if not _is_autocast(logits.device.type):
            log_p = log_p.to(logits.dtype)
    if not return_entropy:
        return log_p
    return log_p, _composed_entropy(logits, factor) if entropy is None else entropy
