"""Log-probabilities of chosen tokens and the entropy of what they were chosen from."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function

from softmax_ext.functional.linear_losses import _wide
from softmax_ext.functional.losses import _FLOATING, _factor, _Options, _results
from softmax_ext.functional.softmax import log_softmax

__all__ = ["selective_log_softmax"]

# No class is ignored: -1 is out of range as any other.
_OF_EACH_ROW = _Options(0, -(2**63), 0.0, 0.0, 1.0, 0.0)


def _composed_entropy(logits: Tensor, factor: float) -> Tensor:
    """By torch's functions, with what torch has of devices and transforms."""
    wide = _wide(logits.dtype)
    if factor != 1.0:
        logits = logits.to(wide) * factor
    log_p = log_softmax(logits, -1, dtype=wide).clamp(min=torch.finfo(wide).min)
    return -(log_p.exp() * log_p).sum(-1)


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
    logits forward and one backward. Several share its logsumexp. The entropy,
    :math:`-\sum p \log p`, comes of the same passes. No tensor of the logits' size is made but
    their gradient.

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
    factor = _factor(name, temperature)
    if logits.dtype not in _FLOATING:
        raise NotImplementedError(
            f"{name}(): not implemented for an argument 'logits' of dtype {logits.dtype}; "
            "expected float16, bfloat16, float32 or float64"
        )
    if index.dtype not in (torch.int64, torch.int32, torch.uint8):
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
    is_one = index.shape == rows
    flat = logits.reshape(-1, logits.size(-1))
    chosen = index.long().reshape(flat.size(0), 1 if is_one else index.size(-1))
    options = _OF_EACH_ROW._replace(factor=factor)
    if is_one:
        loss, _, entropy = _results(
            flat, chosen.squeeze(1), None, options, wants_entropy=return_entropy
        )
        log_p = -loss
    else:
        if not is_compiling() and flat.is_cpu and chosen.numel():
            low, high = int(chosen.min()), int(chosen.max())
            if low < 0 or high >= flat.size(1):
                raise IndexError(
                    f"{name}(): expected argument 'index' to be in [0, {flat.size(1)}), but got "
                    f"{low if low < 0 else high}"
                )
        _, lse, entropy = _results(
            flat,
            chosen.new_zeros(flat.size(0)),
            None,
            options,
            wants_lse=True,
            wants_entropy=return_entropy,
        )
        assert lse is not None
        log_p = (flat.gather(1, chosen).to(lse.dtype) * factor - lse.unsqueeze(1)).to(flat.dtype)
    log_p = log_p.reshape(index.shape)
    if not return_entropy:
        return log_p
    if entropy is None:
        entropy = _composed_entropy(flat, factor)
    return log_p, entropy.reshape(rows)
