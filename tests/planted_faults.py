"""Faults planted in the sources, one at a time, and whether the tests find them.

    python tests/planted_faults.py [--list] [NAME ...]

Works in a copy of the tree, in build/faults, and says for each fault which test has found it. Exits
with 1 if one is not found. The first run builds the copy; then a fault takes about a minute, most
of it to compile the file that it is in.

A fault is a text that is in its file once (test_planted_faults.py sees to that) and what stands in
its place. Where the sources have changed, plant it anew: the fault is what its name says.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "faults"
SECONDS = 900  # of the tests; more is a loop that never ends

ROWS = "csrc/cuda/row_kernels.cuh"
COLUMNS = "csrc/cuda/column_kernels.cuh"
PACKED = "csrc/cuda/packed_kernels.cuh"
DEVICE = "csrc/cuda/device.cuh"
CUDA_SCORES = "csrc/cuda/score_kernels.cuh"
CUDA_SEGMENTS = "csrc/cuda/segment_kernels.cuh"
CUDA_LOSSES = "csrc/cuda/loss_kernels.cuh"
CUDA_PROBABILITIES = "csrc/cuda/probability_kernels.cuh"
CUDA_DIVERGENCES = "csrc/cuda/divergence_kernels.cuh"
SEGMENT_LIST = "csrc/cuda/launch_segments.cu"
CPU_SLICES = "csrc/cpu/slices.h"
CPU_ROWS = "csrc/cpu/rows.h"
CPU_COLUMNS = "csrc/cpu/columns.h"
CPU_NARROW = "csrc/cpu/narrow_columns.h"
CPU_INPUT = "csrc/cpu/input.h"
VEC = "csrc/cpu/vec.h"
SEGMENTS_SCHEDULE = "csrc/cpu/segments_schedule.h"
SEGMENTS_TILE = "csrc/cpu/segments_tile.h"
SEGMENTS_FORWARD = "csrc/cpu/segments_forward.cpp"
SEGMENTS_BACKWARD = "csrc/cpu/segments_backward.cpp"
SEGMENTS_ORDER = "csrc/cpu/segments_order.cpp"
CPU_LOSSES = "csrc/cpu/losses.h"
LOSSES_FORWARD = "csrc/cpu/losses_forward.cpp"
DIVERGENCES = "csrc/include/softmax_ext/divergences.h"
CPU_DIVERGENCES = "csrc/cpu/divergences.h"
DIVERGENCES_FORWARD = "csrc/cpu/divergences_forward.cpp"
PROBABILITIES_FORWARD = "csrc/cpu/probabilities_forward.cpp"
LOSSES_SWITCH = "csrc/torch/losses_override.cpp"

VALUES = "tests/test_softmax_forward.py tests/test_softmax_extremes.py"
GRADIENTS = "tests/test_softmax_backward.py"
BITS = "tests/test_softmax_batch_invariance.py"
LAYOUT = "tests/test_softmax_layout.py"
STRIDES = "tests/test_softmax_layout_strides.py"
SCORES_PY = "softmax_ext/functional/scores.py"
SCORES = "tests/test_scores_values.py tests/test_scores_stand_ins.py"
SEGMENTS = "tests/test_segments_forward.py"
LOSSES = "tests/test_losses_values.py"
SELECTIVE = "tests/test_selective.py"
OF_DIVERGENCES = "tests/test_divergences.py"
OF_PROBABILITIES = "tests/test_probabilities.py"
HOST = "tests/simt/kernels"
HOST_STRIDES = f"{HOST}/test_strides.py"
HOST_SCORES = f"{HOST}/test_scores.py"
HOST_SEGMENTS = f"{HOST}/test_segments.py"
HOST_LOSSES = f"{HOST}/test_cross_entropy.py"
HOST_PAIRS = f"{HOST}/test_loss_pairs.py"


@dataclass(frozen=True)
class Fault:
    name: str
    family: str  # a kernel family or a layer
    path: str
    old: str
    new: str
    tests: str  # arguments of pytest
    isa: str = ""  # of the CPU kernels: the one that is compiled with the fault, and tested

    def plant(self, root: Path) -> None:
        path = root / self.path
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: its text is {text.count(self.old)} times in {path}")
        path.write_text(text.replace(self.old, self.new))


FAULTS = [
    # --- The CPU's kernels ---
    Fault(
        "a lane without an element counts as 0",
        "cpu register rows",
        CPU_ROWS,
        "load(row, All{}, kLowest<A>) : load(row, lanes, kLowest<A>);",
        "load(row, All{}, kLowest<A>) : load(row, lanes, A(0));",
        VALUES,
        "avx512",
    ),
    Fault(
        "the last row of a few has the sum of the first",
        "cpu register rows",
        CPU_ROWS,
        "    const auto formula = of_lane(formulas, r);\n    V result;",
        "    const auto formula = of_lane(formulas, r + 1 < rows ? r : 0);\n    V result;",
        VALUES,
        "avx2",
    ),
    Fault(
        "the max leaves out the last element",
        "cpu short rows",
        CPU_ROWS,
        "lanes[r] = lane_max(x[r], n);",
        "lanes[r] = lane_max(x[r], n - 1);",
        VALUES,
        "avx2",
    ),
    Fault(
        "the gradient of all rows with the sum of the first",
        "cpu short rows",
        CPU_ROWS,
        "store_gradient<op>(streamed, grads[r], outputs[r], grad_inputs[r], dim, sums[r],",
        "store_gradient<op>(streamed, grads[r], outputs[r], grad_inputs[r], dim, sums[0],",
        GRADIENTS,
        "baseline",
    ),
    Fault(
        "the last chunk is not in the sum",
        "cpu long rows",
        CPU_ROWS,
        "for (int64_t k = 1; k < chunks; ++k) state = combine(state, states[k]);",
        "for (int64_t k = 1; k + 1 < chunks; ++k) state = combine(state, states[k]);",
        VALUES,
        "baseline",
    ),
    Fault(
        "the exps of a chunk are not scaled to the row's max",
        "cpu long rows",
        CPU_ROWS,
        "return formula.of_exp(e * weight);",
        "return formula.of_exp(e);",
        VALUES,
        "avx512",
    ),
    Fault(
        "all rows that threads share have the sum of the first",
        "cpu split rows",
        CPU_ROWS,
        "store_chunk(t / chunks, t % chunks, states[t], of_rows[t / chunks]);",
        "store_chunk(t / chunks, t % chunks, states[t], of_rows[0]);",
        VALUES,
        "avx512",
    ),
    Fault(
        "the end of a row past the caches is that of another place",
        "cpu streamed rows",
        CPU_ROWS,
        "store_as<From>(y + begin + i, lanes, value(begin + i, lanes));",
        "store_as<From>(y + begin + i, lanes, value(i, lanes));",
        LAYOUT,
        "avx2",
    ),
    Fault(
        "a sum so far is not scaled to a larger max",
        "cpu columns",
        CPU_COLUMNS,
        "sums[v].scale(exp_of_nonpositive(old - shifts[v]));",
        "sums[v].scale(V(A(1)));",
        VALUES,
        "avx512",
    ),
    Fault(
        "the last slice of several is not stored",
        "cpu narrow columns",
        CPU_NARROW,
        "tile.scatter(y, y_step, size, args.shape);",
        "tile.scatter(y, y_step, std::max<int64_t>(size - 1, 1), args.shape);",
        VALUES,
        "avx2",
    ),
    Fault(
        "a step left over of several packed ones is not in the max",
        "cpu narrow columns",
        CPU_NARROW,
        "const int64_t from = kept * packing.inner, n = groups / 2 * packing.inner;",
        "const int64_t from = kept * packing.inner, n = (groups / 2 - 1) * packing.inner;",
        VALUES,
        "avx512",
    ),
    Fault(
        "a bool is a byte",
        "cpu casts",
        VEC,
        "return x.byte != 0;",
        "return x.byte;",
        VALUES,
        "baseline",
    ),
    Fault(
        "a thread's share begins anew behind each long segment",
        "cpu segments",
        SEGMENTS_SCHEDULE,
        "        first -= size;\n",
        "",
        SEGMENTS,
    ),
    Fault(
        "chunks of a segment count alike, whatever their maximum",
        "cpu segments",
        SEGMENTS_FORWARD,
        "state.sum * std::exp(state.max - both)",
        "state.sum",
        SEGMENTS,
    ),
    Fault(
        "rows of an order are gathered from where they would lie without it",
        "cpu segments",
        SEGMENTS_SCHEDULE,
        "std::memcpy(to + k * bytes(), slice + rows.order[k] * shape_.inner",
        "std::memcpy(to + k * bytes(), slice + (rows.first + k) * shape_.inner",
        SEGMENTS,
    ),
    Fault(
        "lanes beyond a segment's last row count as 0",
        "cpu segments",
        SEGMENTS_TILE,
        "    return first_of(product, lanes, kLowest<A>);",
        "    return product;",
        SEGMENTS,
    ),
    Fault(
        "an index is sorted if its last two numbers are",
        "cpu segments",
        SEGMENTS_ORDER,
        "signs |= bits | (bits - before);",
        "signs = bits | (bits - before);",
        SEGMENTS,
    ),
    Fault(
        "the gradient of rows in one register is not scaled",
        "cpu segments",
        SEGMENTS_BACKWARD,
        "formula.of(grads, outputs) * scale_",
        "formula.of(grads, outputs)",
        "tests/test_segments_backward.py",
    ),
    Fault(
        "the largest elements are summed with the others",
        "cpu losses",
        LOSSES_FORWARD,
        "return {V(is_max ? one : zero), V(is_max ? zero : e.raw)};",
        "return {V(is_max ? zero : zero), V(is_max ? one : e.raw)};",
        LOSSES,
        "avx512",
    ),
    Fault(
        "what was largest is lost where something larger comes",
        "cpu losses",
        LOSSES_FORWARD,
        "sum.others.add(V(is_same ? zero : ones.raw));",
        "sum.others.add(V(is_same ? zero : zero));",
        LOSSES,
        "avx512",
    ),
    Fault(
        "columns of the second register have the targets of the first",
        "cpu losses",
        CPU_LOSSES,
        "const RawInt of_columns = targets[c / kSize];",
        "const RawInt of_columns = targets[c / kSize / 2];",
        LOSSES,
        "avx512",
    ),
    Fault(
        "an ignored target is a class where lse has a gradient",
        "cpu losses",
        CPU_LOSSES,
        "if (target == loss.ignore_index) target = -1;",
        "if (target == loss.ignore_index && loss.weight != nullptr) target = -1;",
        LOSSES,
        "avx512",
    ),
    Fault(
        "a gradient is not divided by the sum of the weights",
        "cpu losses",
        CPU_LOSSES,
        "if (grads.divisor != nullptr) g = g * value(1 / *grads.divisor);",
        "if (grads.divisor != nullptr) g = g * value(1);",
        LOSSES,
        "avx512",
    ),
    Fault(
        "the entropy's sum stays that of the smaller max, in a long row",
        "cpu losses",
        LOSSES_FORWARD,
        "(state.product + (state.max - max) * sum) * factor;",
        "state.product * factor;",
        SELECTIVE,
        "avx512",
    ),
    Fault(
        "the entropy's sum stays that of the smaller max, in columns",
        "cpu losses",
        LOSSES_FORWARD,
        "(state.product + more) * exp_of_nonpositive(",
        "state.product * exp_of_nonpositive(",
        SELECTIVE,
        "avx512",
    ),
    Fault(
        "the entropy's gradient is not the target's",
        "cpu losses",
        CPU_LOSSES,
        "  if (rows.has_grad_entropy) {",
        "  if (rows.has_grad_entropy && loss.smoothing != 0) {",
        SELECTIVE,
        "avx512",
    ),
    Fault(
        "what is masked has a NaN of a gradient of the entropy",
        "cpu losses",
        CPU_LOSSES,
        "grad_entropy * p * (at_least_finite(log_p) + entropy);",
        "grad_entropy * p * (log_p + entropy);",
        SELECTIVE,
        "avx512",
    ),
    Fault(
        "close distributions by their difference",
        "cpu divergences",
        DIVERGENCES,
        "where(is_less(square, one), a",
        "where(is_less(one, square), a",
        OF_DIVERGENCES,
        "avx512",
    ),
    Fault(
        "a row of the weight 0 is read",
        "cpu divergences",
        CPU_DIVERGENCES,
        "return of.weight != nullptr && static_cast<const A*>(of.weight)[row] == 0;",
        "return of.weight != nullptr && static_cast<const A*>(of.weight)[row] < 0;",
        OF_DIVERGENCES,
        "avx512",
    ),
    Fault(
        "the middle is the teacher",
        "cpu divergences",
        DIVERGENCES,
        "student = student + divergence_term<A>(of.q, m, of.log_q);",
        "student = student + divergence_term<A>(of.q, of.p, of.log_q);",
        OF_DIVERGENCES,
        "avx512",
    ),
    Fault(
        "a chunk of no share is weighed by its distance from 0",
        "cpu divergences",
        DIVERGENCES_FORWARD,
        "const double below = (max - static_cast<double>(max_of_row)) * factor;",
        "const double below = (shift_by(max) - static_cast<double>(max_of_row)) * factor;",
        OF_DIVERGENCES,
        "avx512",
    ),
    Fault(
        "kept exps are taken for those of the row's max",
        "cpu divergences",
        DIVERGENCES_FORWARD,
        "return load(exps + i, lanes, A(0)) * share;",
        "return load(exps + i, lanes, A(0));",
        OF_DIVERGENCES,
        "avx512",
    ),
    Fault(
        "a chunk's sum of scores stays below its own max",
        "cpu probabilities",
        PROBABILITIES_FORWARD,
        "return of.score + of.total * (shift_by(of.max) - shift);",
        "return of.score + of.total * (shift - shift);",
        OF_PROBABILITIES,
        "avx512",
    ),
    Fault(
        "a gradient of any size, dtype and memory is taken",
        "torch operators",
        "csrc/torch/softmax.cpp",
        "  check_gradient(grad_output, output, dim, input_dtype, op);\n  return to_shape",
        "  return to_shape",
        "tests/test_softmax_entries.py",
    ),
    Fault(
        "compiled autograd gives a formula none of its members",
        "autograd",
        "csrc/torch/node.h",
        "((member = packed.unpack<std::decay_t<decltype(member)>>()), ...);",
        "((member = std::decay_t<decltype(member)>{}), ...);",
        "tests/test_nodes.py",
    ),
    Fault(
        "the columns of a partial register have no sum",
        "cpu columns",
        CPU_COLUMNS,
        "add_block(sums[v], block_sums[v], begin);",
        "if (v < width / kSize) add_block(sums[v], block_sums[v], begin);",
        GRADIENTS,
        "avx2",
    ),
    Fault(
        "the steps of a gradient are a column too far apart",
        "cpu columns",
        CPU_COLUMNS,
        "        const T* grad = grad_tile + d * grad_step;\n"
        "        const T* y = y_tile + d * y_step;\n"
        "        for_each_vector",
        "        const T* grad = grad_tile + d * (d > 0 ? grad_step - 1 : grad_step);\n"
        "        const T* y = y_tile + d * y_step;\n"
        "        for_each_vector",
        GRADIENTS,
        "baseline",
    ),
    Fault(
        "slices of a group lie along the last dim, whichever that is of",
        "cpu strides",
        CPU_SLICES,
        "strides->of[along]};",
        "strides->of[dims->outer - 1]};",
        STRIDES,
        "avx512",
    ),
    Fault(
        "columns of several inner dims are one",
        "cpu strides",
        CPU_INPUT,
        "dims_.sizes[last] - column % dims_.sizes[last]);",
        "dims_.sizes[last]);",
        STRIDES,
        "avx2",
    ),
    Fault(
        "the last rows of a square are not transposed",
        "cpu strides",
        CPU_INPUT,
        "k < std::min(kSize, rows - r); ++k) {",
        "k < std::min(kSize, rows - r - 1); ++k) {",
        STRIDES,
        "avx2",
    ),
    Fault(
        "steps that share a register may lie apart",
        "cpu strides",
        "csrc/cpu/launch.h",
        "shape.inner > 1 && (shape.dim <= short_dim || !is_narrow(shape, dtype));",
        "shape.inner > 1;",
        STRIDES,
        "avx512",
    ),
    Fault(
        "int16 is read as uint16",
        "cpu casts",
        CPU_INPUT,
        "return f(static_cast<const int16_t*>(data));",
        "return f(static_cast<const uint16_t*>(data));",
        VALUES,
        "baseline",
    ),
    Fault(
        "an input of another type is converted for the first chunk only",
        "cpu casts",
        CPU_ROWS,
        "if (!is_placed) input.place_rows(",
        "if (!is_placed && k == 0) input.place_rows(",
        VALUES,
        "avx512",
    ),
    Fault(
        "a mask of one lane too many",
        "avx512",
        VEC,
        "static_cast<__mmask16>((1u << lanes.count) - 1);",
        "static_cast<__mmask16>((2u << lanes.count) - 1);",
        VALUES,
        "avx512",
    ),
    Fault(
        "bfloat16 is cut off, not rounded",
        "avx2",
        VEC,
        "_mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);",
        "_mm256_srli_epi32(bits, 16);",
        VALUES,
        "avx2",
    ),
    Fault(
        "exp of subnormal results is rounded twice",
        "baseline",
        VEC,
        "return q * power(n, C::kUp) * Vec<T>(C::kDown);",
        "return q * power(n, 0);",
        VALUES,
        "baseline",
    ),
    # --- The CUDA kernels, on the host executor ---
    Fault(
        "the lanes of a short row are those of a warp",
        "cuda short",
        ROWS,
        "    for (int k = 0; k < vectors; ++k) {\n"
        "      const int first = (k * part.lanes + part.lane) * kWidth;\n"
        "      A values[kWidth];",
        "    for (int k = 0; k < vectors; ++k) {\n"
        "      const int first = (k * limits::kWarp + part.lane) * kWidth;\n"
        "      A values[kWidth];",
        HOST,
    ),
    Fault(
        "the elements of a last vector are those of the first",
        "cuda registers",
        DEVICE,
        "if (k == last_ / limits::kWarp) ending_ = pieces;",
        "if (k == 0) ending_ = pieces;",
        HOST,
    ),
    Fault(
        "one vector is read behind a chunk where two may be needed",
        "cuda registers",
        DEVICE,
        "if (any_behind && part.lane < 2) behind = load(vectors);",
        "if (any_behind && part.lane < 1) behind = load(vectors);",
        HOST,
    ),
    Fault(
        "no barrier before the states of a block's chunks are read",
        "cuda block",
        ROWS,
        "    } else {\n      __syncthreads();\n      states += turn * share_.chunks;",
        "    } else {\n      states += turn * share_.chunks;",
        HOST,
    ),
    Fault(
        "one buffer of states for two rows",
        "cuda block",
        ROWS,
        ": shared<State>() + turn * share_.chunks;",
        ": shared<State>();",
        HOST,
    ),
    Fault(
        "no wait for the states of a cluster's other blocks",
        "cuda cluster",
        ROWS,
        "      mail_.wait(turn);\n",
        "",
        HOST,
    ),
    Fault(
        "no barrier between the blocks of a grid",
        "cuda grid",
        ROWS,
        "      sync_grid();\n",
        "",
        HOST,
    ),
    Fault(
        "no barrier before the terms of a grid's chunks are written again",
        "cuda grid",
        DEVICE,
        "sum = add_of(sum, memory[i]);\n      }\n      __syncthreads();",
        "sum = add_of(sum, memory[i]);\n      }",
        HOST,
    ),
    Fault(
        "the sum of a chunk is not scaled to the row's max",
        "cuda long",
        DEVICE,
        "return mul_of(chunk.sum, exp_of_difference(chunk.max, max));",
        "return mul_of(chunk.sum, exp_of_difference(max, max));",
        HOST,
    ),
    Fault(
        "exp of a vector without elements is not 0",
        "cuda registers",
        ROWS,
        "x[k] = filled<In>(A(0));",
        "x[k] = filled<In>(-static_cast<A>(INFINITY));",
        HOST,
    ),
    Fault(
        "what lies behind a chunk held in shared memory is that of another",
        "cuda long",
        ROWS,
        "          chunk.load_behind(place(number), part);\n",
        "",
        HOST,
    ),
    Fault(
        "no barrier before a slab is written to memory",
        "cuda packed",
        PACKED,
        "          out[place] = ToElement<Out>::of(formula.of(x[v]));\n"
        "        }\n      });\n    });\n    __syncthreads();",
        "          out[place] = ToElement<Out>::of(formula.of(x[v]));\n"
        "        }\n      });\n    });",
        HOST,
    ),
    Fault(
        "the last element of a slab stays where it is",
        "cuda packed",
        PACKED,
        "if (byte >= shift_ && byte < end_) body(byte);",
        "if (byte >= shift_ && byte + kSize < end_) body(byte);",
        HOST,
    ),
    Fault(
        "of a packed column's parts a thread adds one half",
        "cuda packed",
        PACKED,
        "if (half * row.group >= split.parts) continue;",
        "if (2 * half * row.group >= split.parts) continue;",
        HOST,
    ),
    Fault(
        "a thread's row goes on into the next",
        "cuda packed short",
        PACKED,
        "    if (v >= dim) break;\n",
        "    if (v > dim) break;\n",
        HOST,
    ),
    Fault(
        "the gradient is that of a sum too large by its first term",
        "cuda packed short",
        PACKED,
        "sums[v / width] = v % width == 0 ? term(v) : add_of(sums[v / width], term(v));",
        "sums[v / width] = v % width == 0 ? term(0) : add_of(sums[v / width], term(v));",
        HOST,
    ),
    Fault(
        "the parts of a team's blocks are a step too far apart",
        "cuda columns",
        COLUMNS,
        "(int64_t{number} * team() + rank()) * split_.steps;",
        "(int64_t{number} * team() + rank()) * split_.steps + rank();",
        HOST,
    ),
    Fault(
        "the last part of a column goes on behind it",
        "cuda columns",
        COLUMNS,
        "const int64_t left = shape_.dim - first;",
        "const int64_t left = shape_.dim - first + 1;",
        HOST,
    ),
    Fault(
        "no barrier before the states of the parts are combined",
        "cuda columns",
        COLUMNS,
        "half /= 2) {\n      __syncthreads();\n",
        "half /= 2) {\n",
        HOST,
    ),
    Fault(
        "the states of two columns are combined",
        "cuda columns",
        COLUMNS,
        "states[i] = combine(states[i], states[i + half * width()]);",
        "states[i] = combine(states[i], states[(i + half * width()) ^ 1]);",
        HOST,
    ),
    Fault(
        "exp that was kept is not brought from the part's max to the column's",
        "cuda columns",
        "csrc/cuda/column_tree.cuh",
        "values[c] = formulas[c].of_exp(mul_of(values[c], scale[c]));",
        "values[c] = formulas[c].of_exp(values[c]);",
        HOST,
    ),
    Fault(
        "columns beyond the inner size are written",
        "cuda columns",
        COLUMNS,
        "exists_ = column < shape_.inner;",
        "exists_ = column <= shape_.inner;",
        HOST,
    ),
    Fault(
        "the last of several outer dims has the stride of the one before",
        "cuda strides",
        "csrc/cuda/outer_strides.cuh",
        "offset += (rest - quotient * sizes[k].size) * of[tensor][k];",
        "offset += (rest - quotient * sizes[k].size) * of[tensor][k - 1];",
        HOST_STRIDES,
    ),
    Fault(
        "the gradient's rows are written where those of the output lie",
        "cuda strides",
        ROWS,
        "    Out* const to = grad_input + place.of(2);\n    PartWriter",
        "    Out* const to = grad_input + place.of(1);\n    PartWriter",
        HOST_STRIDES,
    ),
    Fault(
        "the steps of what is written are as far apart as those of what is read",
        "cuda strides",
        COLUMNS,
        ".store(output + place(Pass::kInputs, part, s));",
        ".store(output + place(Pass::kInputs - 1, part, s));",
        HOST_STRIDES,
    ),
    Fault(
        "a slab goes on into the next run",
        "cuda strides",
        PACKED,
        "      end = (run + 1) * packing.run;\n",
        "",
        HOST_STRIDES,
    ),
    Fault(
        "a plan of shared memory without that of the states",
        "cuda plan",
        "csrc/include/softmax_ext/plan.h",
        "static_cast<size_t>(states + (plan.hold == Hold::kShared ? kept : 0));",
        "static_cast<size_t>(plan.hold == Hold::kShared ? kept : 0);",
        "tests/simt/test_plan.py",
    ),
    Fault(
        "a segment of one more row than lanes take is nobody's",
        "cuda segments",
        SEGMENT_LIST,
        "own > most && own <= block_rows",
        "own > most + 1 && own <= block_rows",
        HOST_SEGMENTS,
    ),
    Fault(
        "pointers may end before the last element",
        "cuda segments",
        SEGMENT_LIST,
        "(segment + 1 == segments.count && end != size)",
        "(segment + 1 == segments.count && end > size)",
        HOST_SEGMENTS,
    ),
    Fault(
        "a segment's parts are in the list for another",
        "cuda segments",
        SEGMENT_LIST,
        "lists.parts[place + part] = {first + source, part};",
        "lists.parts[place + part] = {first + lane, part};",
        HOST_SEGMENTS,
    ),
    Fault(
        "no barrier before the sums of a block's warps are read",
        "cuda segments",
        CUDA_SEGMENTS,
        "meeting.put_sum(column, sum);\n        __syncthreads();",
        "meeting.put_sum(column, sum);",
        HOST_SEGMENTS,
    ),
    Fault(
        "the max of a chunk is that of its first warp",
        "cuda segments",
        CUDA_SEGMENTS,
        "for (int w = first; w < first + across_; ++w) {",
        "for (int w = first; w < first + 1; ++w) {",
        HOST_SEGMENTS,
    ),
    Fault(
        "the last chunk of a segment is not in its state",
        "cuda segments",
        CUDA_SEGMENTS,
        "(size + limits::kSegmentChunk - 1) / limits::kSegmentChunk",
        "size / limits::kSegmentChunk",
        HOST_SEGMENTS,
    ),
    Fault(
        "an order is not followed",
        "cuda segments",
        CUDA_SEGMENTS,
        "place_[r] = call.segments.order[place_[r]];",
        "place_[r] += 0 * call.segments.order[place_[r]];",
        HOST_SEGMENTS,
    ),
    Fault(
        "logsumexp of an infinite element is NaN",
        "cuda segments",
        CUDA_SEGMENTS,
        "x[c] = kOfSegments && x[c] > shift ?",
        "x[c] = false && x[c] > shift ?",
        HOST_SEGMENTS,
    ),
    Fault(
        "no barrier before the states of a block's warps are read",
        "cuda losses",
        CUDA_LOSSES,
        "states[lanes.lane / limits::kWarp] = state;\n  __syncthreads();",
        "states[lanes.lane / limits::kWarp] = state;",
        HOST_LOSSES,
    ),
    Fault(
        "a sure target's loss is that of the rounded sum",
        "cuda losses",
        CUDA_LOSSES,
        "log_of(state.ones) + log1p_of(state.others / state.ones);",
        "log_of(state.ones + state.others);",
        HOST_LOSSES,
    ),
    Fault(
        "the sum of scores stays that of the smaller max",
        "cuda losses",
        CUDA_LOSSES,
        "score = add_of(score, mul_of(weight, less));",
        "score = add_of(score, mul_of(A(0), less));",
        HOST_LOSSES,
    ),
    Fault(
        "the entropy's sum stays that of the smaller max",
        "cuda losses",
        CUDA_LOSSES,
        "product = mul_of(add_of(product, mul_of(sum, less)), factor);",
        "product = mul_of(product, factor);",
        HOST_LOSSES,
    ),
    Fault(
        "the target's gradient of the entropy has no share in it",
        "cuda losses",
        CUDA_LOSSES,
        "of_target = of_target - of_entropy(exp_of(log_p), log_p);",
        "of_target = of_target - of_entropy(A(0), log_p);",
        HOST_LOSSES,
    ),
    Fault(
        "a row that is ignored is read",
        "cuda losses",
        CUDA_LOSSES,
        "place.exists && (target.y >= 0 || args.wants_lse);",
        "place.exists;",
        HOST_LOSSES,
    ),
    Fault(
        "the target's gradient is that of any class",
        "cuda losses",
        CUDA_LOSSES,
        "z[i] = first + k == target.y ? of_target",
        "z[i] = first + k == dim ? of_target",
        HOST_LOSSES,
    ),
    Fault(
        "the parts of a row but the first are left out",
        "cuda losses",
        CUDA_LOSSES,
        "for (int k = lanes.lane; k < parts; k += lanes.lanes) add(",
        "for (int k = lanes.lane; k < parts && k < 1; k += lanes.lanes) add(",
        HOST_LOSSES,
    ),
    Fault(
        "a row of logits keeps the sum of its smaller max",
        "cuda losses",
        CUDA_DIVERGENCES,
        "sum = mul_of(sum, exp_of(mul_of(max - shift_by(larger), factor)));",
        "sum = mul_of(sum, factor);",
        HOST_PAIRS,
    ),
    Fault(
        "a row of the weight 0 is read on CUDA",
        "cuda losses",
        CUDA_DIVERGENCES,
        "place.exists && rows.weight != A(0);",
        "place.exists;",
        HOST_PAIRS,
    ),
    Fault(
        "the divergence's gradient has no weight",
        "cuda losses",
        CUDA_DIVERGENCES,
        "(args.grad_factor * args.of.factor) * rows.weight;",
        "(args.grad_factor * args.of.factor);",
        HOST_PAIRS,
    ),
    Fault(
        "probabilities behind a row's end count",
        "cuda losses",
        CUDA_PROBABILITIES,
        "if (k < size) state.add_weighted(",
        "if (k >= 0) state.add_weighted(",
        HOST_PAIRS,
    ),
    Fault(
        "the gradient of probabilities has none of lse",
        "cuda losses",
        CUDA_PROBABILITIES,
        "if (args.grad_lse != nullptr) share = share + ",
        "if (args.grad_lse != nullptr) share = share + A(0) * ",
        HOST_PAIRS,
    ),
    # --- torch's operators, autograd, the switch, Python ---
    Fault(
        "out= that overlaps the input is written all the same",
        "torch operators",
        "csrc/torch/softmax.cpp",
        "    at::assert_no_partial_overlap(out, input);\n",
        "",
        LAYOUT,
    ),
    Fault(
        "out= in the memory of a part of the input is written where it lies",
        "torch operators",
        "csrc/torch/tensors.cpp",
        "begin == output_begin && input.strides() == output.strides() &&",
        "begin == output_begin &&",
        STRIDES,
    ),
    Fault(
        "rows in the memory of one another are written where they lie",
        "torch operators",
        "csrc/torch/tensors.cpp",
        "if (stride <= last) return false;",
        "",
        STRIDES,
    ),
    Fault(
        "out= keeps its version",
        "torch operators",
        "csrc/torch/softmax.cpp",
        "  out.unsafeGetTensorImpl()->bump_version();\n",
        "",
        LAYOUT,
    ),
    Fault(
        "the second derivative of softmax lacks a term",
        "autograd",
        "csrc/torch/softmax_formulas.h",
        "(v * (g - sum(g * y, dim)) - g * sum(v * y, dim))",
        "(v * (g - sum(g * y, dim)))",
        GRADIENTS,
    ),
    Fault(
        "the second derivative of log_softmax is not scaled by the gradient's sum",
        "autograd",
        "csrc/torch/softmax_formulas.h",
        "(-v * y.exp() * sum(g, dim)).to(dtype)",
        "(-v * y.exp()).to(dtype)",
        GRADIENTS,
    ),
    Fault(
        "the output's node keeps the output alive",
        "autograd",
        "csrc/torch/transforms.h",
        "/*is_output=*/tensor.is_same(result)",
        "/*is_output=*/false",
        GRADIENTS,
    ),
    Fault(
        "a result of another type is not of that type",
        "switch",
        "csrc/torch/softmax_override.cpp",
        "if (!half_to_float) return dtype;",
        "return dtype;",
        "tests/test_switch.py",
    ),
    Fault(
        "the end of one of two switches the other off",
        "switch",
        "softmax_ext/switch.py",
        "self._within += within",
        "self._within = max(within, 0)",
        "tests/test_switch.py",
    ),
    Fault(
        "probabilities with an index to ignore",
        "switch",
        LOSSES_SWITCH,
        "input.numel() > 0 && options.ignore_index < 0;",
        "input.numel() > 0;",
        "tests/test_switch.py",
    ),
    Fault(
        "cross-entropy below autograd records a gradient",
        "switch",
        LOSSES_SWITCH,
        "implement(c10::DispatchKey::CPU, TORCH_FN(cross_entropy_loss<false>));",
        "implement(c10::DispatchKey::CPU, TORCH_FN(cross_entropy_loss<true>));",
        "tests/test_switch.py",
    ),
    Fault(
        "a sum of rows without the last ones",
        "torch operators",
        "csrc/torch/loss_tensors.cpp",
        "for (; k < count; ++k) sums[0]",
        "for (; k + 1 < count; ++k) sums[0]",
        LOSSES,
    ),
    Fault(
        "the implicit dim of three dimensions is 1",
        "python",
        "softmax_ext/functional/softmax.py",
        "return 0 if ndim in (0, 1, 3) else 1",
        "return 0 if ndim in (0, 1) else 1",
        "tests/test_softmax_errors.py tests/test_softmax_modules.py",
    ),
    Fault(
        "softmin casts before it negates",
        "python",
        "softmax_ext/functional/softmax.py",
        "return _C.softmax(-input, dim, dtype, out)",
        "return _C.softmax(-input.to(dtype or input.dtype), dim, dtype, out)",
        VALUES,
    ),
    Fault(
        "a causal mask is top left",
        "python",
        SCORES_PY,
        "keys - queries if offset is None",
        "0 if offset is None",
        SCORES,
    ),
    Fault(
        "a window goes behind a causal query",
        "python",
        SCORES_PY,
        "    if is_causal:\n        right = 0\n",
        "    if is_causal:\n        right = max(right, 0)\n",
        SCORES,
    ),
    Fault(
        "a temperature multiplies",
        "python",
        SCORES_PY,
        "return None, 1.0 / temperature",
        "return None, float(temperature)",
        SCORES,
    ),
    Fault(
        "sinks of heads are of queries",
        "python",
        SCORES_PY,
        "sink = sink.view(-1, 1, 1)",
        "sink = sink.view(-1, 1)",
        SCORES,
    ),
    Fault(
        "a mask is not moved with the dims",
        "python",
        SCORES_PY,
        "    return rows.to_last(mask)\n",
        "    return mask\n",
        SCORES,
    ),
    Fault(
        "a result over other dims stays permuted",
        "python",
        SCORES_PY,
        ".permute(inverse).contiguous()",
        ".permute(order).contiguous()",
        SCORES,
    ),
    Fault(
        "logsumexp of integers is of integers",
        "python",
        SCORES_PY,
        "        dtype = torch.get_default_dtype()\n",
        "        dtype = torch.float64\n",
        "tests/test_scores_values.py",
    ),
    Fault(
        "a tensor temperature is not checked",
        "python",
        SCORES_PY,
        "(values > 0).all()",
        "(values > 0).any()",
        "tests/test_scores_errors.py",
    ),
    Fault(
        "an exported program needs this package",
        "python",
        SCORES_PY,
        "    if torch.compiler._is_exporting_flag:\n        return",
        "    if False:\n        return",
        "tests/test_scores_transforms.py",
    ),
    Fault(
        "a band has one key more",
        "cuda scores",
        CUDA_SCORES,
        "return element >= begin && element < end;",
        "return element >= begin && element <= end;",
        HOST_SCORES,
    ),
    Fault(
        "the mask of every chunk is that of the first",
        "cuda scores",
        CUDA_SCORES,
        "mask_items(elements + first, lanes, begin, end, z);",
        "mask_items(elements, lanes, begin, end, z);",
        HOST_SCORES,
    ),
    Fault(
        "a masked element of a row with a NaN is NaN",
        "cuda scores",
        CUDA_SCORES,
        "const bool is_dead = is_safe && z[i] == kLowest;",
        "const bool is_dead = false && is_safe && z[i] == kLowest;",
        HOST_SCORES,
    ),
    Fault(
        "the sink is not in the row's sum",
        "cuda scores",
        CUDA_SCORES,
        "state = combine(state, State{max, term(scores.sink, shift_by(max))});",
        "state = combine(state, State{max, A(0)});",
        HOST_SCORES,
    ),
    Fault(
        "an infinite element hides in logsumexp",
        "cuda scores",
        CUDA_SCORES,
        "return op == ScoreOp::kLogSumExp && max == static_cast<A>(INFINITY) ? kLargest : max;",
        "return op == ScoreOp::kLogSoftmax && max == static_cast<A>(INFINITY) ? kLargest : max;",
        HOST_SCORES,
    ),
    Fault(
        "the gradient of a mask begins with what is there",
        "cuda scores",
        CUDA_SCORES,
        "place.is_first ? 0 : size, A(0), y);",
        "size, A(0), y);",
        HOST_SCORES,
    ),
    Fault(
        "a chunk comes back as another",
        "cuda scores",
        CUDA_SCORES,
        "Vector* const at = kept + kth * kVectors * blockDim.x;",
        "Vector* const at = kept + (kth > 0) * kVectors * blockDim.x;",
        HOST_SCORES,
    ),
    Fault(
        "a row's state is met where the last one was",
        "cuda scores",
        CUDA_SCORES,
        "        turn ^= 1;\n      }\n      state = row.of_row(",
        "      }\n      state = row.of_row(",
        HOST_SCORES,
    ),
    Fault(
        "the gradient of a scale misses its chunks",
        "cuda scores",
        CUDA_SCORES,
        "[row * teams.chunks + number] = sum;",
        "[row * teams.chunks] = sum;",
        HOST_SCORES,
    ),
]


def sources() -> list[str]:
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


class Copy:
    """Of the tree, built. `clean` stays without a fault, and is copied for each to where it was
    built, so that a build there compiles what the fault is in."""

    def __init__(self, folder: Path) -> None:
        self.clean, self.tree = folder / "clean", folder / "tree"
        self._begin()
        for name in sources():
            target = self.tree / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists() or target.read_bytes() != (ROOT / name).read_bytes():
                shutil.copy(ROOT / name, target)
        self._build()
        shutil.rmtree(self.clean, ignore_errors=True)
        self.tree.rename(self.clean)

    def find(self, fault: Fault) -> tuple[bool, str]:
        """Whether it was found, and by which test."""
        self._begin()
        fault.plant(self.tree)
        self._build(fault.isa)
        status, by = self._test(fault.tests, fault.isa)
        if status not in (0, 1):
            raise RuntimeError(f"pytest could not run {fault.tests}: exit status {status}: {by}")
        return status == 1, by

    def _begin(self) -> None:
        shutil.rmtree(self.tree, ignore_errors=True)
        if self.clean.exists():
            shutil.copytree(self.clean, self.tree)

    def _run(
        self, *arguments: str, path: str = "", seconds: float | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.tree / path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=seconds,
        )

    def _build(self, isa: str = "") -> None:
        """What has changed; the CPU kernels for one instruction set, if that is given."""
        for path in self.tree.glob("build/kernels/*.o"):
            if isa and not path.stem.endswith(f"_{isa}"):
                os.utime(path)
        programs = ("kernels", "segments", "losses")
        host = f"import lanes; [lanes.build('o1', each) for each in {programs}]"
        for built in (
            self._run("setup.py", "-q", "build_ext", "--inplace", FORCE_CPU="1"),
            self._run("-c", host, path="tests/simt"),
        ):
            if built.returncode != 0:
                raise RuntimeError(f"it does not compile:\n{built.stdout}{built.stderr}")

    def _test(self, arguments: str, isa: str) -> tuple[int, str]:
        """Exit status, and the first test that failed."""
        environment = {"PYTHONPATH": str(self.tree)} | ({"SOFTMAX_EXT_ISA": isa} if isa else {})
        command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments.split()]
        try:
            result = self._run(*command, seconds=SECONDS, **environment)
        except subprocess.TimeoutExpired:
            return 1, f"not finished in {SECONDS} s"
        failed = re.search(r"^(?:FAILED|ERROR) (\S+?::.*?)(?: - .*)?$", result.stdout, re.MULTILINE)
        if failed:
            return result.returncode, failed[1]
        if result.returncode < 0:
            return 1, f"ended by signal {-result.returncode}"
        return result.returncode, result.stdout.strip().rpartition("\n")[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of faults or families; all")
    parser.add_argument("--list", action="store_true", help="names the faults, plants none")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the copy")
    options = parser.parse_args()
    chosen = [
        fault
        for fault in FAULTS
        if not options.names or {fault.name, fault.family} & set(options.names)
    ]
    if options.list:
        for fault in chosen:
            print(f"{fault.family}: {fault.name} ({fault.path})")
        return 0
    copy = Copy(options.folder.resolve())
    missed = 0
    for fault in chosen:
        start = time.monotonic()
        try:
            found, by = copy.find(fault)
        except RuntimeError as error:
            found, by = False, str(error)
        missed += not found
        where = f"{fault.family}, {fault.isa}" if fault.isa else fault.family
        by = by if found else f"NOT FOUND: {by}"
        seconds = time.monotonic() - start
        print(f"| {where} | {fault.name} | {by} | {seconds:.0f} s |", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} found")
    return 1 if missed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
