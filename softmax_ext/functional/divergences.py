"""Divergences of the softmaxes of two tensors of logits, in two passes over both."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function

from softmax_ext._loader import load
from softmax_ext.functional.losses import _DEVICES, _factor, _is_autocast, _number

_C = load()

__all__ = ["kl_div_with_logits"]

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REDUCTIONS = ("none", "mean", "sum", "batchmean")  # as the operator counts them


def _check(student: Tensor, teacher: Tensor, weight: Tensor | None) -> None:
    name = "kl_div_with_logits"
    for argument, tensor in (("student", student), ("teacher", teacher)):
        if tensor.dtype not in _FLOATING:
            raise NotImplementedError(
                f"{name}(): not implemented for an argument '{argument}' of dtype {tensor.dtype}; "
                "expected float16, bfloat16, float32 or float64"
            )
    if student.dim() == 0:
        raise RuntimeError(
            f"{name}(): expected argument 'student' to have 1 dimension or more, but got 0"
        )
    if teacher.dtype != student.dtype:
        raise RuntimeError(
            f"{name}(): expected argument 'teacher' to have the dtype of 'student', "
            f"{student.dtype}, but got {teacher.dtype}"
        )
    if teacher.shape != student.shape:
        raise ValueError(
            f"{name}(): expected argument 'teacher' to have the shape of 'student', "
            f"{tuple(student.shape)}, but got {tuple(teacher.shape)}"
        )
    if weight is None:
        return
    if weight.shape != student.shape[:-1]:
        raise ValueError(
            f"{name}(): expected argument 'weight' to have the shape {tuple(student.shape[:-1])} "
            f"for a 'student' of the shape {tuple(student.shape)}, but got {tuple(weight.shape)}"
        )
    if weight.is_complex():
        raise RuntimeError(f"{name}(): expected argument 'weight' to be real, not {weight.dtype}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"The function '{name}' is not differentiable with respect to argument 'weight'. "
            "This input cannot have requires_grad True."
        )


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Of each row: 0 of what has no share in a, also as a gradient."""
    a = log_a.exp()
    is_zero = a == 0
    difference = torch.where(is_zero, 0.0, log_a) - torch.where(is_zero, 0.0, log_b)
    return (a * difference).sum(-1)


def _composed(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    reduction: int,
    beta: float,
    factor: float,
) -> Tensor:
    """The loss by torch's functions, with what torch has of devices and transforms."""
    counts = None if weight is None else weight != 0

    def log_softmax(logits: Tensor) -> Tensor:
        z = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        if counts is not None:
            z = torch.where(counts.unsqueeze(-1), z, 0.0)
        return F.log_softmax(z * factor, -1)

    log_p, log_q = log_softmax(teacher), log_softmax(student)
    if beta == 0.0:
        rows = _kl(log_p, log_q)
    elif beta == 1.0:
        rows = _kl(log_q, log_p)
    else:
        in_neither = (log_p == -math.inf) & (log_q == -math.inf)
        log_m = torch.logaddexp(
            torch.where(in_neither, 0.0, log_p) + math.log(beta),
            torch.where(in_neither, 0.0, log_q) + math.log1p(-beta),
        )
        rows = beta * _kl(log_p, log_m) + (1.0 - beta) * _kl(log_q, log_m)
    count: Tensor | int = rows.numel()
    if weight is not None and counts is not None:
        rows = torch.where(counts, rows * weight.to(rows.dtype), 0.0)
        count = counts.sum()
    loss: Tensor = rows
    if _REDUCTIONS[reduction] != "none":
        loss = rows.sum()
    if _REDUCTIONS[reduction] in ("mean", "batchmean"):
        loss = loss / count
    if _REDUCTIONS[reduction] == "mean":
        loss = loss / student.size(-1)
    return loss.to(student.dtype)


def _loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    reduction: int,
    beta: float,
    factor: float,
) -> Tensor:
    device = student.device.type
    if _is_autocast(device):
        # As torch's losses: in float32.
        with torch.autocast(device, enabled=False):
            if student.dtype in (torch.float16, torch.bfloat16):
                student = student.float()
            if teacher.dtype in (torch.float16, torch.bfloat16):
                teacher = teacher.float()
            return _loss(student, teacher, weight, reduction, beta, factor)
    _check(student, teacher, weight)
    if is_dynamo_compiling():
        if device in _DEVICES:
            operator = torch.ops.softmax_ext.kl_div_with_logits
            loss: Tensor = operator(student, teacher, weight, reduction, beta, factor)[0]
            return loss
    else:
        result: Tensor | None = _C.kl_div_with_logits(
            student, teacher, weight, reduction, beta, factor
        )
        if result is not None:
            return result
    return _composed(student, teacher, weight, reduction, beta, factor)


def kl_div_with_logits(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    beta: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    r"""The Kullback-Leibler divergence, its reverse or a Jensen-Shannon divergence of the softmaxes
    of two tensors of logits, as distillation has them.

    With p of ``softmax(teacher / temperature)``, q of ``softmax(student / temperature)`` and
    m = beta p + (1 - beta) q, the loss of a row is

    - beta 0: KL(p || q), the teacher's from the student's;
    - beta 1: KL(q || p), the reverse;
    - between: beta KL(p || m) + (1 - beta) KL(q || m), for 0.5 the Jensen-Shannon divergence.

    There is no factor of temperature**2. A class that one of the distributions gives nothing counts
    as its limit: 0 of p log(p / q) for p = 0, infinity for q = 0 alone. A finite loss has finite
    gradients.

    On the CPU and, where the build has them, on CUDA, kernels read each logit once from memory
    forward (a second time from a cache, as far as a row fits one) and once backward, and keep seven
    numbers a row between them. Each term that is summed is at least 0, so that the loss of nearly
    equal distributions has its digits too. Sums are in float32 (float64 for float64), and a loss of
    16 bits is rounded once. A row has the same bits in any batch and on any number of threads.
    Other devices, and transforms of torch.func, are composed of torch's functions.

    Args:
        student: logits of the shape (..., C), float16, bfloat16, float32 or float64. Rows are read
            where they lie if their classes are side by side.
        teacher: logits of the same shape and dtype. May have a gradient too.
        temperature: both are divided by it.
        reduction: ``"none"``: a loss a row; ``"sum"``: of the rows; ``"batchmean"``: that, divided
            by the number of rows that count, those whose weight is not 0; ``"mean"``: divided by
            the number of their elements, as torch.nn.functional.kl_div does.
        beta: from 0 to 1.
        weight: of the shape (...) and any real dtype: a factor of each row's loss, without a
            gradient. Rows of the weight 0 (or False) are not read: they may hold NaN.

    Returns:
        The loss, of the inputs' dtype (float32 under autocast); for ``"none"`` of the shape (...).

    Raises:
        ValueError: shapes do not go together; `reduction` is none of the four; `beta` is not in
            [0, 1]; `temperature` is not above 0.
        TypeError: an argument is of the wrong type.
        NotImplementedError: the dtype of `student` or `teacher` is not floating.
        RuntimeError: dtypes or devices differ; `student` has no dim; `weight` wants a gradient.

    Source: torch.nn.functional.kl_div; Hinton et al., "Distilling the Knowledge in a Neural
    Network", arXiv 1503.02531; beta: Agarwal et al., "On-Policy Distillation of Language Models",
    arXiv 2306.13649.

    Example:
        >>> student = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        >>> teacher = torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])
        >>> kl_div_with_logits(student, teacher, reduction="none")
        tensor([0.1201, 0.6931])
        >>> kl_div_with_logits(student, teacher, beta=0.5)
        tensor(0.1221)
    """
    tensors = (student, teacher, weight)
    if has_torch_function(tensors):
        return handle_torch_function(
            kl_div_with_logits,
            tensors,
            student,
            teacher,
            temperature=temperature,
            reduction=reduction,
            beta=beta,
            weight=weight,
        )
    name = "kl_div_with_logits"
    for argument, tensor in (("student", student), ("teacher", teacher), ("weight", weight)):
        if not isinstance(tensor, Tensor) and not (argument == "weight" and tensor is None):
            kind = type(tensor).__name__
            raise TypeError(f"{name}(): argument '{argument}' must be Tensor, not {kind}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{name}(): {reduction} is not a valid value for reduction")
    beta = _number(name, "beta", beta)
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"{name}(): expected argument 'beta' to be from 0 to 1, but got {beta}")
    factor = _factor(name, temperature)
    return _loss(student, teacher, weight, _REDUCTIONS.index(reduction), beta, factor)
