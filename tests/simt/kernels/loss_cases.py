"""What the tests of the CUDA kernels of losses share: rows, options, a comparison."""

import torch

ROWS = {  # with the threads along a row, and the parts of one that is had in some
    "a class": ((3, 1), 8, 1),
    "lanes of a warp, rows left over": ((35, 10), 8, 1),
    "neighbours": ((3, 128), 16, 1),
    "a warp": ((3, 257), 32, 1),
    "a warp, neighbours, batches": ((2, 1024), 32, 1),
    "a block": ((2, 1025), 256, 1),
    "a block, neighbours": ((2, 8192), 256, 1),
    "parts": ((2, 8193), 256, 2),
    "parts, neighbours": ((1, 16400), 256, 3),
}
OPTIONS: dict[str, dict[str, float]] = {  # of cross-entropy
    "plain": {},
    "smoothing": {"smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "factor": {"factor": 1.5},
    "all": {"smoothing": 0.2, "z_loss": 1e-3, "softcap": 5.0, "factor": 0.5},
}


def scores_of(x: torch.Tensor, options: dict[str, float]) -> torch.Tensor:
    z = x * options.get("factor", 1.0)
    if softcap := options.get("softcap"):
        z = softcap * torch.tanh(z / softcap)
    return z


def assert_close(found: torch.Tensor, expected: torch.Tensor, ulps: float, atol: float) -> None:
    """Within ulps of found's type, and atol."""
    rtol = ulps * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected.detach(), rtol=rtol, atol=atol)
