"""What each argument of scores can be, for an input of (batch, heads, queries, keys) or the like.

A maker gives the keyword arguments, of which floating tensors require a gradient.
"""

from collections.abc import Callable
from typing import Any

import torch

Shape = tuple[int, ...]
Maker = Callable[[Shape, torch.dtype], dict[str, Any]]


def _leaf(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype).requires_grad_()


def _per_row(shape: Shape) -> Shape:
    return (*shape[:-1], 1)


SCALES: dict[str, Maker] = {
    "no scale": lambda shape, dtype: {},
    "scale": lambda shape, dtype: {"scale": -0.7},
    "scale of rows": lambda shape, dtype: {"scale": _leaf(torch.randn(_per_row(shape)), dtype)},
    "scale of heads": lambda shape, dtype: {"scale": _leaf(torch.randn(shape[-3], 1, 1), dtype)},
    "scale, 0-d": lambda shape, dtype: {"scale": _leaf(torch.tensor(1.3), dtype)},
    "temperature": lambda shape, dtype: {"temperature": 1.7},
    "temperature of rows": lambda shape, dtype: {
        "temperature": _leaf(0.5 + torch.rand(_per_row(shape)), dtype)
    },
}
SOFTCAPS: dict[str, Maker] = {
    "no softcap": lambda shape, dtype: {},
    "softcap": lambda shape, dtype: {"softcap": 1.5},
}
# How a mask is broadcast, of all that four dims allow what models use.
MASK_SHAPES: dict[str, Callable[[Shape], Shape]] = {
    "all": lambda shape: shape,
    "keys": lambda shape: shape[-1:],
    "queries and keys": lambda shape: shape[-2:],
    "heads": lambda shape: (shape[-3], 1, shape[-1]),
    "batch": lambda shape: (shape[0], *(1 for _ in shape[1:-1]), shape[-1]),
    "rows": _per_row,  # of size 1 along the keys
}


def _bool_mask(broadcast: str) -> Maker:
    return lambda shape, dtype: {"mask": torch.rand(MASK_SHAPES[broadcast](shape)) > 0.3}


def _float_mask(broadcast: str) -> Maker:
    def make(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
        mask = 2 * torch.randn(MASK_SHAPES[broadcast](shape))
        return {"mask": _leaf(mask.masked_fill(torch.rand(mask.shape) < 0.2, -torch.inf), dtype)}

    return make


MASKS: dict[str, Maker] = {
    "no mask": lambda shape, dtype: {},
    **{f"bool of {each}": _bool_mask(each) for each in MASK_SHAPES},
    **{f"floating of {each}": _float_mask(each) for each in MASK_SHAPES},
}
BANDS: dict[str, Maker] = {
    "no band": lambda shape, dtype: {},
    "causal": lambda shape, dtype: {"is_causal": True},
    "causal, top left": lambda shape, dtype: {"is_causal": True, "causal_offset": 0},
    "window": lambda shape, dtype: {"window": (2, 1)},
    "window to the right": lambda shape, dtype: {"window": (-1, 1), "causal_offset": 1},
    "causal window": lambda shape, dtype: {"is_causal": True, "window": (2, 5)},
}
SINKS: dict[str, Maker] = {
    "no sink": lambda shape, dtype: {},
    "sink": lambda shape, dtype: {"sink": 0.4},
    "sink of heads": lambda shape, dtype: {"sink": _leaf(torch.randn(shape[-3]), dtype)},
    "sink of rows": lambda shape, dtype: {"sink": _leaf(torch.randn(_per_row(shape)), dtype)},
}
KINDS = (SCALES, SOFTCAPS, MASKS, BANDS, SINKS)


def arguments(kinds: tuple[str, ...], shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """Of one name from each of KINDS."""
    made = {}
    for makers, name in zip(KINDS, kinds, strict=True):
        made.update(makers[name](shape, dtype))
    return made


def to_device(scores: dict[str, Any], device: str) -> dict[str, Any]:
    """The same on a device, as leaves."""

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().to(device).requires_grad_(value.requires_grad)

    return {name: moved(value) for name, value in scores.items()}
