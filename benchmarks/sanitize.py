"""Each schedule, forward and backward, on small tensors: to be run under compute-sanitizer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch

import softmax_ext
from benchmarks.gpu_check import DONE

# (shape, dim): each schedule, on devices with clusters and without. A chunk, which a warp has in
# registers, is 4 KB of a row, 2 KB in float64.
SHAPES = [
    ((300, 7), -1),  # packed: a row by a thread
    ((70, 101), -1),  # packed: by several
    ((5, 37, 3), 1),
    ((70, 64), -1),  # warp: several rows a warp
    ((5, 1000), -1),  # warp: whole vectors
    ((5, 1001), -1),  # warp: shifted vectors
    ((200, 8192), -1),  # block
    ((200, 8193), -1),
    ((3, 50257), -1),  # cluster, grid
    ((40, 150000), -1),  # cluster, block: in shared memory, read twice
    ((2, 1000001), -1),  # grid
    ((3, 37, 190), 1),  # columns
    ((2, 1500, 64), 1),  # columns: a cluster; in 16 bits backward, 16 bytes at a time
    ((1, 5000, 66), 1),  # columns: several chunks
]
# Of a warp, of a block, and of several.
SEGMENTS = [0, 1, 5, 0, 33, 300, 2, 5000, 3]


def segments_are_finite(generator: torch.Generator) -> bool:
    ptr = torch.tensor([0, *SEGMENTS]).cumsum(0)
    index = torch.repeat_interleave(ptr.diff())[torch.randperm(int(ptr[-1]), generator=generator)]
    for heads in (1, 3, 8):
        values = torch.randn(int(ptr[-1]), heads, generator=generator)
        for function in (
            softmax_ext.segment_softmax,
            softmax_ext.segment_log_softmax,
            softmax_ext.segment_logsumexp,
        ):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                for named in ({"ptr": ptr.cuda()}, {"index": index.cuda(), "num_segments": 9}):
                    x = values.to(dtype).cuda().requires_grad_()
                    y = function(x, **named)  # type: ignore[arg-type]
                    (result,) = torch.autograd.grad(y, x, torch.ones_like(y))
                    if not result.cpu().isfinite().all():
                        print(f"{function.__name__} of {heads} heads {dtype} is not finite")
                        return False
    return True


def losses_are_finite(generator: torch.Generator) -> bool:
    """Rows of a part of a warp, of a block and of parts, and columns; all options; in place."""
    for shape in ((300, 10), (5, 1001), (3, 8192), (3, 50257), (3, 19, 190), (2, 1500, 64)):
        values = torch.randn(shape, generator=generator)
        of_rows = shape[:1] + shape[2:]
        target = torch.randint(shape[1], of_rows, generator=generator)
        target.view(-1)[1] = -100
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            weight = torch.ones(shape[1]).to(dtype).cuda()
            for options in (
                {},
                {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0, "temperature": 2.0},
                {"inplace_backward": True},
            ):
                x = values.to(dtype).cuda().requires_grad_()
                loss = softmax_ext.cross_entropy(x * 1, target.cuda(), weight, **options)  # type: ignore[call-overload]
                (result,) = torch.autograd.grad(loss, x)
                if not (loss.detach().cpu().isfinite() and result.cpu().isfinite().all()):
                    print(f"cross_entropy of {shape} {dtype} {options} is not finite")
                    return False
    return True


def losses_of_pairs_are_finite(generator: torch.Generator) -> bool:
    """Of logits and probabilities, and of two tensors of logits: rows as above."""
    for shape in ((300, 10), (5, 1001), (3, 8192), (3, 50257)):
        values = torch.randn(2, *shape, generator=generator)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            weight = torch.ones(shape[0])
            weight[1] = 0
            x, y = values.to(dtype).cuda()
            losses: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
                lambda x, y: softmax_ext.cross_entropy(x, y, label_smoothing=0.1, z_loss=1e-3),
                *(
                    partial(softmax_ext.kl_div_with_logits, beta=beta, weight=weight.cuda())
                    for beta in (0.0, 0.5, 1.0)
                ),
            ]
            for loss in losses:
                both = [tensor.detach().requires_grad_() for tensor in (x, y)]
                value = loss(*both)
                results = [value.detach(), *torch.autograd.grad(value, both)]
                if not all(result.cpu().isfinite().all() for result in results):
                    print(f"a loss of two tensors of {shape} {dtype} is not finite")
                    return False
    return True


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
                # Rows that begin anywhere in 16 bytes, and steps that do.
                apart = torch.empty_like(x.detach())[..., 1:]
                function(x.detach()[..., :-1], dim, out=apart)
                if not (y.detach().cpu().isfinite().all() and result.cpu().isfinite().all()):
                    print(f"{function.__name__} of {shape} {dtype} is not finite")
                    return 1
    for dtype in (torch.int32, torch.bfloat16):  # a cast before the kernel, and one in it
        softmax_ext.softmax(torch.arange(3000).to(dtype).cuda(), -1, dtype=torch.float32)
    parts = (segments_are_finite, losses_are_finite, losses_of_pairs_are_finite)
    if not all(are_finite(generator) for are_finite in parts):
        return 1
    torch.cuda.synchronize()
    print(DONE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
