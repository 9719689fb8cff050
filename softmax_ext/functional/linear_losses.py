"""Cross-entropy of a linear projection, of which the logits never lie in memory as a whole.

They are made in chunks of rows, in one tile. The operator linear_cross_entropy_of_rows turns a tile
into its own gradient while it is there, and that into what it adds to the gradients of input,
linear_weight and linear_bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn._reduction import get_enum
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.checkpoint import checkpoint

from softmax_ext.functional.losses import (
    _DEVICES,
    _FLOATING,
    _INDICES,
    _check_tensor,
    _factor,
    _has_values,
    _is_autocast,
    _number,
    _Options,
    _softcap,
    cross_entropy,
)

__all__ = ["linear_cross_entropy"]

# Of a tile; but a chunk has enough rows for the products to be fast.
_TILE_BYTES = 64 << 20
_FEWEST_ROWS = 128
# Rows of a chunk where nothing says how many classes there are.
_ROWS_OF_A_CALLABLE = 256

Projection = Callable[[Tensor], Tensor]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- the operator -------------------------------------------------------------------------------

_library = torch.library.Library("softmax_ext", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "linear_cross_entropy_of_rows(Tensor input, Tensor linear_weight, Tensor? linear_bias, "
    "Tensor target, Tensor? weight, Tensor? grad_loss, Tensor? grad_lse, bool[] wanted, "
    "bool wants_lse, int chunk, int ignore_index, float label_smoothing, float z_loss, "
    "float factor, float softcap) -> (Tensor losses, Tensor lse, Tensor grad_input, "
    "Tensor grad_weight, Tensor grad_bias)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _empty_results(
    input: Tensor, linear_weight: Tensor, target: Tensor, wanted: list[bool]
) -> list[Tensor]:
    """Zeros: losses, lse and the gradients, which are of no elements where they are not wanted."""
    wide = _wide(input.dtype)

    def zeros(shape: torch.Size, dtype: torch.dtype, is_wanted: bool = True) -> Tensor:
        return input.new_zeros(shape if is_wanted else (0,), dtype=dtype)

    return [
        zeros(target.shape, wide),
        zeros(target.shape, wide),
        zeros(input.shape, input.dtype, wanted[0]),
        zeros(linear_weight.shape, wide, wanted[1]),
        zeros(linear_weight.shape[:1], wide, wanted[2]),
    ]


def _check_rows(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    grads: tuple[Tensor | None, Tensor | None],
    wanted: list[bool],
    chunk: int,
) -> None:
    name = "linear_cross_entropy_of_rows"
    if input.dim() != 2 or linear_weight.dim() != 2 or target.dim() != 1:
        raise RuntimeError(
            f"{name}(): expected input and linear_weight of 2 dimensions and target of 1, but got "
            f"{input.dim()}, {linear_weight.dim()} and {target.dim()}"
        )
    if input.size(1) != linear_weight.size(1) or input.size(0) != target.size(0):
        raise RuntimeError(
            f"{name}(): sizes do not go together: input {list(input.shape)}, linear_weight "
            f"{list(linear_weight.shape)}, target {list(target.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise RuntimeError(
            f"{name}(): expected linear_bias of the size {list(linear_weight.shape[:1])}, but got "
            f"{list(linear_bias.shape)}"
        )
    for argument, tensor in {"linear_weight": linear_weight, "linear_bias": linear_bias}.items():
        if tensor is not None and tensor.dtype != input.dtype:
            raise RuntimeError(
                f"{name}(): expected scalar type {input.dtype} but found {tensor.dtype} for "
                f"argument '{argument}'"
            )
    for argument, tensor in {"grad_loss": grads[0], "grad_lse": grads[1]}.items():
        if tensor is not None and tensor.dim() > 0 and tensor.shape != target.shape:
            raise RuntimeError(
                f"{name}(): expected {argument} of the size {list(target.shape)}, but got "
                f"{list(tensor.shape)}"
            )
    if len(wanted) != 3 or (any(wanted) and grads[0] is None):
        raise ValueError(f"{name}(): expected three of 'wanted', and grad_loss where any is true")
    if chunk < 1:
        raise ValueError(f"{name}(): expected argument 'chunk' to be above 0, but got {chunk}")


def _check_targets(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Which targets count. Before the first product, and by their place in the whole."""
    counts = target != ignore_index
    bad = counts & ((target < 0) | (target >= classes))
    if bad.any():
        place = int(bad.int().argmax())
        raise IndexError(
            f"Target {int(target[place])} is out of bounds: linear_cross_entropy(): expected "
            f"argument 'target' to be {ignore_index} or from 0 to {classes - 1}, but element "
            f"{place} is not"
        )
    return counts


@torch.no_grad()
def _rows_kernel(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    wanted: list[bool],
    wants_lse: bool,
    chunk: int,
    *options: Any,
) -> tuple[Tensor, ...]:
    """Losses and lse of the rows, and the gradients of the sum of these times grad_loss and
    grad_lse: of linear_weight and linear_bias in the type computed in."""
    grads = (grad_loss, grad_lse)
    _check_rows(input, linear_weight, linear_bias, target, grads, wanted, chunk)
    rows = None
    if input.is_cpu:  # on others the kernel of the losses checks, and nothing waits to know
        counts = _check_targets(target, linear_weight.size(0), options[0])
        if not (wants_lse or counts.all()):
            rows = counts.nonzero().squeeze(1)
    results = _empty_results(input, linear_weight, target, wanted)
    losses, lse, grad_input, grad_weight, grad_bias = results
    count = target.numel() if rows is None else rows.numel()
    tile = input.new_empty(min(chunk, count), linear_weight.size(0))
    for begin in range(0, count, chunk):
        end = min(begin + chunk, count)
        part = slice(begin, end) if rows is None else rows[begin:end]
        x, z = input[part], tile[: end - begin]
        if linear_bias is None:
            torch.mm(x, linear_weight.t(), out=z)
        else:
            torch.addmm(linear_bias, x, linear_weight.t(), out=z)
        of_part = [g if g is None or g.dim() == 0 else g[part] for g in grads]
        losses[part], lse[part] = torch.ops.softmax_ext.cross_entropy_of_rows_(
            z, target[part], weight, *of_part, *options
        )
        if wanted[0]:
            grad_input[part] = z @ linear_weight
        if wanted[1] and grad_weight.dtype == z.dtype:
            grad_weight.addmm_(z.t(), x)
        elif wanted[1]:
            grad_weight += z.t() @ x
        if wanted[2]:
            grad_bias += z.sum(0, dtype=grad_bias.dtype)
    return tuple(results)


def _rows_fake(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    wanted: list[bool],
    *_: Any,
) -> tuple[Tensor, ...]:
    return tuple(_empty_results(input, linear_weight, target, wanted))


for _device in _DEVICES:
    _library.impl(  # type: ignore[no-untyped-call]
        "linear_cross_entropy_of_rows", _rows_kernel, _device.upper()
    )
torch.library.register_fake("softmax_ext::linear_cross_entropy_of_rows", _rows_fake, lib=_library)


# ---- its place in autograd's graph --------------------------------------------------------------


def _total(
    target: Tensor, weight: Tensor | None, ignore_index: int, target_is_index: bool
) -> Tensor | float:
    """What a mean is divided by."""
    if not target_is_index:
        return float(target[..., 0].numel()) if target.dim() > 1 else 1.0
    counts = target != ignore_index
    if weight is None:
        return counts.sum(dtype=torch.float64)
    of_targets = weight.double()[target.clamp(0, weight.numel() - 1)]
    return torch.where(counts, of_targets, 0.0).sum()


def _sum_of_rows(losses: Tensor) -> Tensor:
    """In float64, in an order that their number alone decides."""
    return torch.stack([part.sum(dtype=torch.float64) for part in torch.split(losses, 4096)]).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Of rows: gradients are made in forward where one number is all that they lack."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        dtype: torch.dtype,
        wanted: list[bool],
        wants_lse: bool,
        chunk: int,
        options: _Options,
    ) -> tuple[Tensor, Tensor | None]:
        wide = _wide(input.dtype)
        reduction, *of_rows = options
        total: Tensor | float = 1.0
        if reduction == get_enum("mean"):
            total = _total(target, weight, options.ignore_index, target_is_index=True)
        if isinstance(total, Tensor):
            inverse = (1.0 / total).to(wide)
        else:
            inverse = torch.full((), 1.0 / total, dtype=wide, device=input.device)
        one = torch.ones_like(inverse)
        # 16 bits have no room for 1 / total times a probability: they get it in backward, and what
        # is added up of no rows gets 0 there.
        in_forward, in_backward = inverse, one
        if input.dtype != wide:
            in_forward, in_backward = one, torch.where(inverse.isinf(), 0.0, inverse)
        ctx.made = any(wanted) and reduction != get_enum("none") and not wants_lse
        losses, lse, *grads = torch.ops.softmax_ext.linear_cross_entropy_of_rows(
            input,
            linear_weight,
            linear_bias,
            target,
            weight,
            in_forward if ctx.made else None,
            None,
            wanted if ctx.made else [False] * 3,
            wants_lse,
            chunk,
            *of_rows,
        )
        loss = losses if reduction == get_enum("none") else _sum_of_rows(losses) / total
        ctx.wanted, ctx.chunk, ctx.of_rows = wanted, chunk, of_rows
        ctx.dtypes = (
            input.dtype,
            linear_weight.dtype,
            input.dtype if linear_bias is None else linear_bias.dtype,
        )
        ctx.set_materialize_grads(False)
        if ctx.made:
            ctx.save_for_backward(in_backward, *grads)
        else:
            ctx.save_for_backward(inverse, input, linear_weight, linear_bias, target, weight)
        return loss.to(dtype), lse if wants_lse else None

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled() and not is_compiling():
            raise RuntimeError(
                "linear_cross_entropy(): its gradient, made in chunks, cannot be differentiated "
                "again; call backward without create_graph, or give the logits to cross_entropy"
            )
        if grad is None and grad_lse is None:
            return (None,) * 10
        factor, *saved = ctx.saved_tensors
        grads: list[Tensor | None]
        if ctx.made:
            assert grad is not None
            scale = grad.to(factor.dtype) * factor
            # These are large: where they are of no more use here, and need no factor, they are
            # handed out themselves.
            same = (
                _has_values(scale)
                and not torch._C._autograd._get_current_graph_task_keep_graph()
                and scale.is_cpu
                and float(scale) == 1.0
            )
            grads = [g if same else g * scale for g in saved]
        else:
            target = saved[3]
            rows = torch.zeros((), dtype=factor.dtype, device=factor.device)
            if grad is not None:
                rows = grad.to(factor.dtype) * factor
            grads = torch.ops.softmax_ext.linear_cross_entropy_of_rows(
                *saved,
                rows,
                None if grad_lse is None else grad_lse.expand(target.shape),
                ctx.wanted,
                grad_lse is not None,
                ctx.chunk,
                *ctx.of_rows,
            )[2:]
        return (
            *(
                g.to(dtype) if wanted and g is not None else None
                for g, dtype, wanted in zip(grads, ctx.dtypes, ctx.wanted, strict=True)
            ),
            *[None] * 7,
        )


# ---- of any projection, target and device -------------------------------------------------------


def _by_checkpoints(
    project: Projection,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    target_is_index: bool,
    chunk: int,
    wants_lse: bool,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The logits of a chunk are made again in backward, and have their gradient there."""
    ignore_index, reduction = options["ignore_index"], options["reduction"]
    options = {**options, "reduction": "none"}
    rows = input.size(0)
    kept = None
    if target_is_index and not wants_lse and input.is_cpu and _has_values(target):
        counts = target != ignore_index
        if not counts.all():
            kept = counts.nonzero().squeeze(1)
            input, target = input[kept], target[kept]

    def of_chunk(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = project(x)
        z = z.to(_wide(z.dtype))
        w = None if weight is None else weight.to(z.dtype)
        loss, lse = cross_entropy(z, y, w, return_lse=True, **options)
        return loss, lse

    parts = [
        checkpoint(of_chunk, x, y, use_reentrant=False)
        for x, y in zip(torch.split(input, chunk), torch.split(target, chunk), strict=True)
    ]
    losses = torch.cat([loss for loss, _ in parts])
    lse = torch.cat([of_part for _, of_part in parts]) if wants_lse else None
    if reduction == "none":
        if kept is not None:
            losses = losses.new_zeros(rows).index_copy(0, kept, losses)
        return losses, lse
    loss = _sum_of_rows(losses)
    if reduction == "mean":
        loss = loss / _total(target, weight, ignore_index, target_is_index)
    return loss, lse


def _is_transformed() -> bool:
    """Whether forward mode or a transform of torch.func is under way."""
    return (
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _check(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """As torch's. Gives the shape of the logits, and what it has behind the classes."""
    if input.dim() not in (1, 2):
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}"
        )
    if input.size(-1) != linear_weight.size(-1):
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"expected linear_bias shape {tuple(linear_weight.shape[:-1])}, "
            f"got {tuple(linear_bias.shape)}"
        )
    out_features = tuple(linear_weight.shape[1:-1])
    if out_features and input.dim() == 1:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} "
            f"requires batched input, (N, {input.size(-1)}), got unbatched input with shape "
            f"{tuple(input.shape)}"
        )
    return (*input.shape[:-1], *linear_weight.shape[:-1]), out_features


def _by_kernels(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    wants_lse: bool,
    chunk: int,
    options: _Options,
) -> tuple[Tensor, Tensor | None] | None:
    """Loss and lse, or None where the operator does not take the call."""
    tensors = [t for t in (input, linear_weight, linear_bias) if t is not None]
    device = input.device.type
    # Autocast leaves float64 as it is.
    autocast = _is_autocast(device) and all(t.dtype != torch.float64 for t in tensors)
    dtype = torch.get_autocast_dtype(device) if autocast else input.dtype
    if (
        device not in _DEVICES
        or any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors)
        or any(not t.is_floating_point() for t in tensors)
        or dtype not in _FLOATING
        or (not autocast and any(t.dtype != dtype for t in tensors))
        or not 0.0 <= options.label_smoothing <= 1.0
        or linear_weight.size(0) == 0
        or (
            weight is not None
            and (
                weight.dtype != dtype
                or weight.shape != linear_weight.shape[:1]
                or weight.requires_grad
            )
        )
    ):
        return None
    if autocast:
        input, linear_weight = input.to(dtype), linear_weight.to(dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(dtype)
    wanted = [
        t is not None and t.requires_grad and torch.is_grad_enabled()
        for t in (input, linear_weight, linear_bias)
    ]
    with torch.autocast(device, enabled=False):
        loss, lse = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            input,
            linear_weight,
            linear_bias,
            target,
            weight,
            _wide(dtype) if autocast else dtype,
            wanted,
            wants_lse,
            chunk,
            options,
        )
    return loss, lse


def _whole(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    wants_lse: bool,
    by_name: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    if not wants_lse:
        return cross_entropy(logits, target, weight, **by_name), None
    loss, lse = cross_entropy(logits, target, weight, return_lse=True, **by_name)
    return loss, lse


def _in_rows(
    input: Tensor, target: Tensor, of_rows: Callable[..., tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, Tensor | None]:
    """of_rows(input, target), of a single row too."""
    if input.dim() > 1:
        return of_rows(input, target)
    loss, lse = of_rows(input.unsqueeze(0), target.unsqueeze(0))
    return loss.reshape(()), None if lse is None else lse.reshape(())


def _of_weight(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    wants_lse: bool,
    chunk: int | None,
    options: _Options,
    by_name: dict[str, Any],
    ignores: bool,
) -> tuple[Tensor, Tensor | None]:
    logits_shape, out_features = _check(input, linear_weight, linear_bias)
    target_is_index = target.shape != logits_shape
    if ignores and not target_is_index:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    flat_weight = linear_weight.reshape(-1, linear_weight.size(-1))
    flat_bias = None if linear_bias is None else linear_bias.reshape(-1)

    def project(x: Tensor) -> Tensor:
        return F.linear(x, flat_weight, flat_bias)

    is_taken = target.shape == input.shape[:-1] and target.dtype in _INDICES
    if (
        out_features
        or _is_transformed()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or input.size(0) == 0
        or (target_is_index and not is_taken)
    ):
        return _whole(project(input).reshape(logits_shape), target, weight, wants_lse, by_name)
    if chunk is None:
        classes = max(1, linear_weight.size(0))
        chunk = max(_FEWEST_ROWS, _TILE_BYTES // input.element_size() // classes)

    def of_rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        if target_is_index:
            y = y.long()
            result = _by_kernels(
                x, linear_weight, linear_bias, y, weight, wants_lse, chunk, options
            )
            if result is not None:
                return result
        loss, lse = _by_checkpoints(
            project, x, y, weight, target_is_index, chunk, wants_lse, by_name
        )
        autocast = _is_autocast(input.device.type)
        return loss.to(_wide(input.dtype) if autocast else input.dtype), lse

    return _in_rows(input, target, of_rows)


def _of_callable(
    input: Tensor,
    project: Projection,
    target: Tensor,
    weight: Tensor | None,
    wants_lse: bool,
    chunk: int | None,
    by_name: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    if input.dim() not in (1, 2):
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    target_is_index = not target.is_floating_point()
    is_taken = not target_is_index or target.dtype in _INDICES
    if input.size(0) == 0 or _is_transformed() or not is_taken:
        return _whole(project(input), target, weight, wants_lse, by_name)
    size = _ROWS_OF_A_CALLABLE if chunk is None else chunk

    def of_rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        y = y.long() if target_is_index else y
        loss, lse = _by_checkpoints(
            project, x, y, weight, target_is_index, size, wants_lse, by_name
        )
        return loss.to(_wide(input.dtype)), lse

    return _in_rows(input, target, of_rows)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor | Projection,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Cross-entropy of ``linear(input, linear_weight, linear_bias)``, without all logits at once.

    Rows are had in chunks. The products are torch's, of the inputs' dtype; losses, their sum and
    the gradient of linear_weight are added up in float32 (float64 for float64). With class indices,
    on the CPU and, where the build has kernels, on CUDA, forward makes the gradients as well, so
    that there are three products a chunk; with ``reduction="none"`` or `return_lse`, backward makes
    the logits again, and so it does for class probabilities, other devices and a callable. What
    needs no gradient costs no product, and on the CPU rows with the target `ignore_index` cost
    nothing (on CUDA all rows are in the products: which ones count, only the device knows).

    Args:
        input: of the shape (in_features) or (N, in_features), floating.
        linear_weight: of the shape (C, in_features), or (C, d1, ..., in_features) for a loss of
            more dims, whose logits are made at once. Or a callable, such as a module with hooks or
            adapters, that gives the logits (n, C) of n rows of input; it is called again in
            backward, and the gradients of its parameters add up in their own dtype.
        target: class indices (int64, int32 or uint8) of the shape (), (N) or (N, d1, ...), or class
            probabilities of the logits' shape and a floating dtype.
        linear_bias: of the shape (C) or (C, d1, ...).
        weight, reduction, label_smoothing, z_loss, softcap, temperature, return_lse: as of
            :func:`softmax_ext.cross_entropy`.
        ignore_index: a target that leaves its row out; None is -100.
        options: torch.nn.LinearCrossEntropyOptions, of which `batch_chunk_size` is taken: the rows
            of a chunk. Without it, as many as make logits of 64 MiB, but at least 128.

    Returns:
        The loss, of the input's dtype (float32 under autocast and of a callable's 16 bits); with
        `return_lse` the tuple of it and the logsumexp of each row.

    Raises:
        RuntimeError: shapes or dtypes do not go together; a gradient is asked for that is to be
            differentiated again, of what has gradients made in chunks.
        ValueError, IndexError, TypeError: as :func:`softmax_ext.cross_entropy`.

    Source: torch.nn.functional.linear_cross_entropy; Wijmans et al., "Cut Your Losses in
    Large-Vocabulary Language Models", arXiv 2411.09009.

    Example:
        >>> input = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> linear_weight = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
        >>> linear_cross_entropy(input, linear_weight, torch.tensor([0, 2]))
        tensor(0.7531)
        >>> linear_cross_entropy(input, lambda x: x @ linear_weight.T, torch.tensor([0, 2]))
        tensor(0.7531)
    """
    tensors = (input, linear_weight, target, linear_bias, weight)
    if has_torch_function(tensors):
        return handle_torch_function(
            linear_cross_entropy,
            tensors,
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
            z_loss=z_loss,
            softcap=softcap,
            temperature=temperature,
            return_lse=return_lse,
        )
    name = "linear_cross_entropy"
    is_callable = not isinstance(linear_weight, Tensor)
    if is_callable and not callable(linear_weight):
        raise TypeError(
            f"{name}(): argument 'linear_weight' must be Tensor or callable, not "
            f"{type(linear_weight).__name__}"
        )
    _check_tensor(name, "input", input)
    _check_tensor(name, "target", target)
    of_rows = _Options(
        get_enum(reduction),
        -100 if ignore_index is None else ignore_index,
        label_smoothing,
        0.0 if z_loss == 0.0 else _number(name, "z_loss", z_loss),
        _factor(name, temperature),
        _softcap(name, softcap),
    )
    by_name: dict[str, Any] = {
        "reduction": reduction,
        "ignore_index": of_rows.ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "temperature": temperature,
    }
    chunk = getattr(options, "batch_chunk_size", None)
    if isinstance(linear_weight, Tensor):
        of_weight = (input, linear_weight, linear_bias, target, weight, return_lse, chunk, of_rows)
        loss, lse = _of_weight(*of_weight, by_name, ignore_index is not None)
    else:
        if linear_bias is not None:
            raise ValueError(f"{name}(): a callable 'linear_weight' takes no 'linear_bias'")
        loss, lse = _of_callable(input, linear_weight, target, weight, return_lse, chunk, by_name)
    return loss if lse is None else (loss, lse)
