"""The modules, those of torch.nn on the kernels of this package; a file for each family."""

from softmax_ext.modules.losses import CrossEntropyLoss, LinearCrossEntropyLoss
from softmax_ext.modules.softmax import LogSoftmax, Softmax, Softmax2d, Softmin

__all__ = [
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "Softmax",
    "Softmax2d",
    "Softmin",
]
