"""Each schedule, forward and backward, on small tensors: to be run under compute-sanitizer."""

from __future__ import annotations

import sys

import torch

import softmax_ext
from benchmarks.gpu_check import DONE

# (shape, dim). In float32 a block's registers hold 16384 elements forward and 8192 backward, and
# the shared memory of every supported GPU 20000 and 10000.
SHAPES = [
    ((70, 10), -1),  # registers: several rows a warp
    ((5, 1000), -1),  # registers: one warp a row
    ((5, 1001), -1),  # registers, not vectorized
    ((3, 8192), -1),  # registers: one block a row
    ((3, 10000), -1),  # shared backward
    ((3, 20000), -1),  # shared forward
    ((2, 70001), -1),  # streaming, not vectorized
    ((2, 200000), -1),  # streaming in every dtype
    ((3, 37, 19), 1),  # strided
    ((2, 1500, 64), 1),  # strided, vectorized, dim beyond a block
    ((600, 8), 0),  # strided, the first dim
]


def main() -> int:
    generator = torch.Generator().manual_seed(0)
    for shape, dim in SHAPES:
        # Made on the CPU, so that hardly a kernel but ours runs.
        values, gradient = torch.randn(2, *shape, generator=generator)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for function in (softmax_ext.softmax, softmax_ext.log_softmax):
                x = values.to(dtype).cuda().requires_grad_()
                y = function(x, dim)
                (result,) = torch.autograd.grad(y, x, gradient.to(dtype).cuda())
                if not (y.detach().cpu().isfinite().all() and result.cpu().isfinite().all()):
                    print(f"{function.__name__} of {shape} {dtype} is not finite")
                    return 1
    for dtype in (torch.int32, torch.bfloat16):  # a cast element by element, and one fused
        softmax_ext.softmax(torch.arange(3000).to(dtype).cuda(), -1, dtype=torch.float32)
    torch.cuda.synchronize()
    print(DONE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
