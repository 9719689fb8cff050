"""Fused softmax and log-softmax for PyTorch, on CPU and CUDA.

``from softmax_ext import softmax`` (or ``import softmax_ext as F``) where
torch.nn.functional.softmax stood: the same values, gradients, dtypes and errors.
"""

from __future__ import annotations

from softmax_ext import autograd as autograd
from softmax_ext import kernels as kernels
from softmax_ext._explain import Explanation, explain
from softmax_ext._info import BuildInfo, __version__, build_info
from softmax_ext.functional import (
    cross_entropy,
    kl_div_with_logits,
    linear_cross_entropy,
    log_softmax,
    log_softmax_,
    logsumexp,
    nll_loss,
    segment_log_softmax,
    segment_logsumexp,
    segment_softmax,
    selective_log_softmax,
    softmax,
    softmax_,
    softmin,
    softmin_,
)
from softmax_ext.memory import MemoryStats, empty_cache, memory_stats
from softmax_ext.modules import (
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    LogSoftmax,
    Softmax,
    Softmax2d,
    Softmin,
)
from softmax_ext.switch import disable, enable, enabled, is_enabled

__all__ = [
    "BuildInfo",
    "CrossEntropyLoss",
    "Explanation",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "MemoryStats",
    "Softmax",
    "Softmax2d",
    "Softmin",
    "__version__",
    "build_info",
    "cross_entropy",
    "disable",
    "empty_cache",
    "enable",
    "enabled",
    "explain",
    "is_enabled",
    "kl_div_with_logits",
    "linear_cross_entropy",
    "log_softmax",
    "log_softmax_",
    "logsumexp",
    "memory_stats",
    "nll_loss",
    "segment_log_softmax",
    "segment_logsumexp",
    "segment_softmax",
    "selective_log_softmax",
    "softmax",
    "softmax_",
    "softmin",
    "softmin_",
]
