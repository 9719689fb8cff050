"""The functions, with the signatures of torch.nn.functional; a file for each family."""

from softmax_ext.functional.divergences import kl_div_with_logits
from softmax_ext.functional.linear_losses import linear_cross_entropy
from softmax_ext.functional.losses import cross_entropy, nll_loss
from softmax_ext.functional.scores import logsumexp
from softmax_ext.functional.segments import (
    segment_log_softmax,
    segment_logsumexp,
    segment_softmax,
)
from softmax_ext.functional.selective import selective_log_softmax
from softmax_ext.functional.softmax import (
    log_softmax,
    log_softmax_,
    softmax,
    softmax_,
    softmin,
    softmin_,
)

__all__ = [
    "cross_entropy",
    "kl_div_with_logits",
    "linear_cross_entropy",
    "log_softmax",
    "log_softmax_",
    "logsumexp",
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
