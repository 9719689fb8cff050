#include "launch_segments.h"
#include "segment_kernels.cuh"

namespace softmax_ext::cuda {

// Instantiated in the file of each type.
template <class T, class Args>
cudaError_t launch_segments(const Args& args, const SegmentPlan& plan, void* scratch,
                            cudaStream_t stream);

namespace {

// Fails unless the pointers and the order are those of segments; lists the segments of more than `most`
// rows.
__global__ void __launch_bounds__(limits::kSegmentThreads)
    segment_list_kernel(Segments segments, int64_t size, int64_t most, int64_t block_rows,
                        SegmentLists lists) {
  const int lane = static_cast<int>(threadIdx.x) % limits::kWarp;
  const int64_t thread = int64_t{blockIdx.x} * limits::kSegmentThreads + threadIdx.x;
  const int64_t threads = int64_t{gridDim.x} * limits::kSegmentThreads;
  if (segments.order != nullptr) {
#pragma unroll 1
    for (int64_t k = thread; k < size; k += threads) {
      const int64_t element = segments.order[k];
      if (element < 0 || element >= size) {
        SOFTMAX_EXT_FAIL("0 <= order[k] && order[k] < size",
                         "softmax_ext: element %lld of segments is %lld of %lld\n",
                         static_cast<long long>(k), static_cast<long long>(element),
                         static_cast<long long>(size));
      }
    }
  }
#pragma unroll 1
  for (int64_t first = thread - lane; first < segments.count; first += threads) {
    const int64_t segment = first + lane;
    int64_t own = 0;
    if (segment < segments.count) {
      const int64_t begin = segments.pointers[segment], end = segments.pointers[segment + 1];
      own = end - begin;
      if (begin < 0 || own < 0 || end > size || (segment == 0 && begin != 0) ||
          (segment + 1 == segments.count && end != size)) {
        SOFTMAX_EXT_FAIL(
            "ptr[s] <= ptr[s + 1], from 0 to size",
            "softmax_ext: segment %lld of %lld goes from %lld to %lld of %lld elements\n",
            static_cast<long long>(segment), static_cast<long long>(segments.count),
            static_cast<long long>(begin), static_cast<long long>(end),
            static_cast<long long>(size));
      }
    }
    const bool is_whole = own > most && own <= block_rows;
    const unsigned wholes = __ballot_sync(0xffffffffu, is_whole);
    if (wholes != 0) {
      unsigned place = 0;
      if (lane == 0) place = atomicAdd(&lists.counts[0], static_cast<unsigned>(__popc(wholes)));
      place = __shfl_sync(0xffffffffu, place, 0);
      place += static_cast<unsigned>(__popc(wholes & ((1u << lane) - 1)));
      if (is_whole && place < lists.most_wholes) lists.wholes[place] = segment;
    }
    const unsigned longer = __ballot_sync(0xffffffffu, own > block_rows);
    for (int source = 0; source < limits::kWarp; ++source) {
      if ((longer >> source & 1) == 0) continue;
      const int64_t rows = __shfl_sync(0xffffffffu, own, source);
      const auto parts = static_cast<unsigned>((rows + block_rows - 1) / block_rows);
      unsigned place = 0;
      if (lane == 0) place = atomicAdd(&lists.counts[1], parts);
      place = __shfl_sync(0xffffffffu, place, 0);
      for (unsigned part = static_cast<unsigned>(lane); part < parts; part += limits::kWarp) {
        if (place + part < lists.most_parts) lists.parts[place + part] = {first + source, part};
      }
    }
  }
}

template <class Args>
cudaError_t launch(const Args& args, const SegmentPlan& plan, void* scratch, cudaStream_t stream) {
  if (args.segments.count > 0) {
    const SegmentLists lists = SegmentLists::in(scratch, plan);
    cudaError_t error = cudaMemsetAsync(lists.counts, 0, plan.wholes, stream);
    if (error != cudaSuccess) return error;
    error = launch_kernel(segment_list_kernel, dim3(static_cast<unsigned>(plan.list_blocks)),
                          dim3(limits::kSegmentThreads), 0, {}, stream, args.segments,
                          args.shape.dim, plan.most, plan.block_rows, lists);
    if (error != cudaSuccess) return error;
  }
  return with_type(args.dtype, [&](auto element) {
    return launch_segments<decltype(element)>(args, plan, scratch, stream);
  });
}

}  // namespace

cudaError_t launch_segments_forward(const SegmentsForwardArgs& args, const SegmentPlan& plan,
                                    void* scratch, cudaStream_t stream) {
  return launch(args, plan, scratch, stream);
}

cudaError_t launch_segments_backward(const SegmentsBackwardArgs& args, const SegmentPlan& plan,
                                     void* scratch, cudaStream_t stream) {
  return launch(args, plan, scratch, stream);
}

}  // namespace softmax_ext::cuda
