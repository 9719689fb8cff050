"""Cross-entropy in one pass over the logits."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn._reduction import get_enum, legacy_get_string
from torch.overrides import handle_torch_function, has_torch_function

from softmax_ext._loader import build_record, load

_C = load()

__all__ = ["cross_entropy", "nll_loss"]

# Whose tensors the kernels of class indices take, in a graph too.
_DEVICES = ("cpu", "cuda") if build_record().get("cuda") else ("cpu",)
_INDICES = (torch.int64, torch.int32, torch.uint8)
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Options(NamedTuple):
    """What the operators take behind the tensors."""

    reduction: int
    ignore_index: int
    label_smoothing: float
    z_loss: float
    factor: float
    softcap: float


def _is_autocast(device: str) -> bool:
    """Whether autocast is on: never for a device that has none, such as meta."""
    # Which devices have it, Dynamo cannot trace in torch 2.11.
    has_it = device != "meta" and (is_dynamo_compiling() or torch.amp.is_autocast_available(device))
    return has_it and torch.is_autocast_enabled(device)


def _has_values(tensor: Tensor) -> bool:
    """Whether they can be looked at: not in a graph, under a transform or in a mode."""
    return (
        not is_compiling()
        and type(tensor) is Tensor
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _check_tensor(name: str, argument: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise TypeError(f"{name}(): argument '{argument}' must be Tensor, not {kind}")


def _number(name: str, argument: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        kind = type(value).__name__
        raise TypeError(f"{name}(): argument '{argument}' must be float, not {kind}")
    return float(value)


def _factor(name: str, temperature: float | None) -> float:
    if temperature is None:
        return 1.0
    temperature = _number(name, "temperature", temperature)
    if not temperature > 0 or math.isinf(temperature):
        raise ValueError(
            f"{name}(): expected argument 'temperature' to be above 0 and finite, "
            f"but got {temperature}"
        )
    return 1.0 / temperature


def _softcap(name: str, softcap: float | None) -> float:
    if softcap is None:
        return 0.0
    softcap = _number(name, "softcap", softcap)
    if not softcap > 0 or math.isinf(softcap):
        raise ValueError(
            f"{name}(): expected argument 'softcap' to be above 0 and finite, but got {softcap}"
        )
    return softcap


def _is_for_kernels(
    input: Tensor, target: Tensor, weight: Tensor | None, options: _Options
) -> bool:
    """Whether these are class indices as the kernels take them, by dtypes and shapes.

    What else there is, torch's function computes or refuses.
    """
    dim = 1 if input.dim() > 1 else 0
    return (
        input.dtype in _FLOATING
        and target.dtype in _INDICES
        and input.dim() > 0
        and input.size(dim) > 0
        and target.shape == input.shape[:dim] + input.shape[dim + 1 :]
        and 0.0 <= options.label_smoothing <= 1.0
        and (
            weight is None
            or (
                weight.dtype == input.dtype
                and weight.shape == (input.size(dim),)
                and not weight.requires_grad
            )
        )
    )


def _by_kernels_of_probabilities(
    input: Tensor, target: Tensor, weight: Tensor | None, options: _Options, wants_lse: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Loss and lse, or None where the targets are not probabilities as the kernels take them: of
    classes side by side."""
    is_taken = (
        target.dtype == input.dtype
        and input.dtype in _FLOATING
        and target.shape == input.shape
        and input.dim() in (1, 2)
        and input.numel() > 0
        and 0.0 <= options.label_smoothing <= 1.0
        and options.ignore_index < 0
        and (
            weight is None
            or (
                weight.dtype == input.dtype
                and weight.shape == input.shape[-1:]
                and not weight.requires_grad
            )
        )
        and not _is_autocast(input.device.type)
    )
    if not is_taken:
        return None
    of_kernels = (options.reduction, *options[2:], wants_lse)
    if not is_dynamo_compiling():
        result: tuple[Tensor, Tensor | None] | None = _C.cross_entropy_of_probabilities(
            input, target, weight, *of_kernels
        )
        return result
    if input.device.type not in _DEVICES:
        return None
    operator = torch.ops.softmax_ext.cross_entropy_of_probabilities
    loss, lse, _ = operator(input, target, weight, *of_kernels)
    return loss, lse if wants_lse else None


def _composed(
    input: Tensor, target: Tensor, weight: Tensor | None, options: _Options, wants_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss and lse by torch's functions, with what torch has of devices, transforms and errors."""
    dim = 1 if input.dim() > 1 else 0
    dtype = input.dtype
    if target.is_floating_point():  # as torch's, that of a product
        of_others = [t.dtype for t in (target, weight) if t is not None]
        dtype = functools.reduce(torch.promote_types, of_others, dtype)
    autocast = _is_autocast(input.device.type)
    is_of_another = weight is not None and weight.dtype != input.dtype
    z = input
    # torch refuses indices with a weight of another dtype, and does so of the tensors as they are.
    is_refused = is_of_another and not target.is_floating_point() and not autocast
    if input.dtype in (torch.float16, torch.bfloat16) and not is_refused:
        z = input.float()
        weight = weight if weight is None or is_of_another else weight.float()
    if options.factor != 1.0:
        z = z * options.factor
    if options.softcap:
        z = options.softcap * torch.tanh(z / options.softcap)
    reduction = ("none", "mean", "sum")[options.reduction]
    loss = F.cross_entropy(
        z,
        target,
        weight,
        ignore_index=options.ignore_index,
        reduction=reduction,
        label_smoothing=options.label_smoothing,
    )
    lse = torch.logsumexp(z, dim) if wants_lse or options.z_loss else None
    if options.z_loss and lse is not None:
        if target.is_floating_point():
            counts = torch.ones_like(lse)
        else:
            is_counted = target != options.ignore_index
            counts = is_counted.to(lse.dtype)
            if weight is not None:
                counts = counts * weight[torch.where(is_counted, target, 0).long()]
        of_rows = options.z_loss * torch.where(counts != 0, lse, 0.0).square() * counts
        if reduction == "none":
            loss = loss + of_rows
        else:
            loss = loss + of_rows.sum() / (counts.sum() if reduction == "mean" else 1)
    if not autocast:
        loss = loss.to(dtype)
    return loss, lse if wants_lse else None


class _Results(NamedTuple):
    """What a call gives: lse if it is wanted, and the entropy if this is for kernels, too."""

    loss: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None


def _results(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: _Options,
    *,
    wants_lse: bool = False,
    wants_entropy: bool = False,
    in_place: bool = False,
) -> _Results:
    for_kernels = _is_for_kernels(input, target, weight, options)
    if target.dtype == torch.int32:
        target = target.long()
    if not for_kernels:
        result = _by_kernels_of_probabilities(input, target, weight, options, wants_lse)
        return _Results(*(result or _composed(input, target, weight, options, wants_lse)))
    device = input.device.type
    if _is_autocast(device):
        # As torch's: in float32.
        with torch.autocast(device, enabled=False):
            if input.dtype in (torch.float16, torch.bfloat16):
                input = input.float()
                weight = None if weight is None else weight.float()
            return _results(
                input,
                target,
                weight,
                options,
                wants_lse=wants_lse,
                wants_entropy=wants_entropy,
                in_place=in_place,
            )
    target = target.long()
    if is_dynamo_compiling():
        if device in _DEVICES:
            operator = torch.ops.softmax_ext.cross_entropy
            loss, lse, _, _, entropy = operator(
                input, target, weight, *options, wants_lse, wants_entropy
            )
            return _Results(loss, lse if wants_lse else None, entropy if wants_entropy else None)
    else:
        wants = (wants_lse, wants_entropy)
        found = _C.cross_entropy(input, target, weight, *options, *wants, in_place)
        if found is not None:
            return _Results(*found) if any(wants) else _Results(found)
    return _Results(*_composed(input, target, weight, options, wants_lse))


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    size_average: bool | None = ...,
    ignore_index: int = ...,
    reduce: bool | None = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    *,
    z_loss: float = ...,
    softcap: float | None = ...,
    temperature: float | None = ...,
    return_lse: Literal[False] = ...,
    inplace_backward: bool = ...,
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    size_average: bool | None = ...,
    ignore_index: int = ...,
    reduce: bool | None = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    *,
    z_loss: float = ...,
    softcap: float | None = ...,
    temperature: float | None = ...,
    return_lse: Literal[True],
    inplace_backward: bool = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    size_average: bool | None = ...,
    ignore_index: int = ...,
    reduce: bool | None = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    *,
    z_loss: float = ...,
    softcap: float | None = ...,
    temperature: float | None = ...,
    return_lse: bool,
    inplace_backward: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def cross_entropy(
    input: Tensor,
    target: Tensor,
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
    return_lse: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Cross-entropy of logits and targets, with torch's arguments, values, gradients and errors.

    Kernels compute class indices, and class probabilities of the logits' dtype and (C) or (N, C),
    on the CPU and, where the build has them, on CUDA: forward reads each logit once, backward reads
    it once and writes its gradient, and nothing of the logits' size is kept between them. Sums are
    in float32 (float64 for float64), and a loss of 16 bits is rounded once. The result has the same
    bits for any number of threads. Rows with the target `ignore_index` are not read; their gradient
    is 0, whatever they hold. Other class probabilities, other devices, and transforms of torch.func
    are composed of torch's functions.

    Args:
        input: logits of the shape (C), (N, C) or (N, C, d1, ...), float16, bfloat16, float32 or
            float64. The classes need not be side by side, and slices are read where they lie.
        target: class indices (int64, int32 or uint8) of the input's shape without C, or class
            probabilities of the input's shape and a floating dtype.
        weight: of the shape (C) and the input's dtype: a factor of each class.
        size_average, reduce: deprecated by torch, see `reduction`.
        ignore_index: a target that leaves its row out.
        reduction: ``"none"``: a loss a row; ``"sum"``; ``"mean"``: their sum, divided by the sum of
            the weights of the targets (of probabilities: by the number of rows).
        label_smoothing: the share, in [0, 1], of the targets that is spread over all classes.
        z_loss: adds z_loss * logsumexp(z)**2 to the loss of each row that counts, with the weight
            of its target.
        softcap: the logits become softcap * tanh(logits / softcap).
        temperature: the logits are divided by it first.
        return_lse: also gives the logsumexp of each row, which has a gradient of its own.
        inplace_backward: where there is a gradient to be made, forward writes it over the logits
            while a row is in cache (on CUDA by a pass of its own), so that no other tensor of their
            size is ever needed. They are of no more use then: another use of them, in backward,
            raises, and so does a second backward, one with ``create_graph``, and that of lse. Where
            the kernels do not take the call (see above), and in compiled graphs, it changes
            nothing.

    Returns:
        The loss, of the input's dtype (float32 under autocast; with class probabilities of another
        dtype, as torch's, of the one that holds both); with `return_lse` the tuple of it and the
        logsumexp of each row, of the input's shape without C, as float32 (float64 for float64).

    Raises:
        ValueError: shapes do not go together; `reduction` is none of the three; `softcap` or
            `temperature` is not above 0.
        IndexError: a target is neither `ignore_index` nor in [0, C); on CUDA, as torch's, a
            device-side assertion fails.
        TypeError: an argument is of the wrong type.
        RuntimeError: what else torch.nn.functional.cross_entropy refuses, with its message;
            `inplace_backward` of a leaf, as of any operation in place.

    Source: torch.nn.functional.cross_entropy; z_loss: Chowdhery et al., "PaLM", arXiv 2204.02311;
    softcap: Gemma Team, "Gemma 2", arXiv 2408.00118.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
        >>> cross_entropy(logits, torch.tensor([0, 2]))
        tensor(0.7531)
        >>> cross_entropy(logits, torch.tensor([0, -100]), reduction="none", return_lse=True)
        (tensor([0.4076, 0.0000]), tensor([2.4076, 1.0986]))
    """
    tensors = (input, target, weight)
    if has_torch_function(tensors):
        return handle_torch_function(
            cross_entropy,
            tensors,
            input,
            target,
            weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            temperature=temperature,
            return_lse=return_lse,
            inplace_backward=inplace_backward,
        )
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce)
    name = "cross_entropy"
    _check_tensor(name, "input", input)
    _check_tensor(name, "target", target)
    options = _Options(
        get_enum(reduction),
        ignore_index,
        label_smoothing,
        0.0 if z_loss == 0.0 else _number(name, "z_loss", z_loss),
        _factor(name, temperature),
        _softcap(name, softcap),
    )
    loss, lse, _ = _results(
        input, target, weight, options, wants_lse=return_lse, in_place=inplace_backward
    )
    return (loss, lse) if lse is not None else loss


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""The negative log-likelihood of log-probabilities, as :func:`softmax_ext.log_softmax` gives
    them: :func:`torch.nn.functional.nll_loss`, which also takes int32 targets here.

    Of logits, :func:`softmax_ext.cross_entropy` has the same in one pass.

    Args:
        input: log-probabilities of the shape (C), (N, C) or (N, C, d1, ...), floating.
        target: class indices (int64, int32 or uint8) of the input's shape without C.
        weight, size_average, ignore_index, reduce, reduction: as of
            :func:`softmax_ext.cross_entropy`.

    Returns:
        The loss, of the input's dtype.

    Raises:
        What torch.nn.functional.nll_loss raises.

    Source: torch.nn.functional.nll_loss.

    Example:
        >>> nll_loss(torch.tensor([[-0.5, -1.0]]), torch.tensor([1]))
        tensor(1.)
    """
    if isinstance(target, Tensor) and target.dtype == torch.int32:
        target = target.long()
    return F.nll_loss(input, target, weight, size_average, ignore_index, reduce, reduction)
