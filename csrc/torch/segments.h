// softmax, log-softmax and logsumexp over the segments of a tensor: rows of different lengths side by
// side along one dim. Without autograd; segments_formulas.h adds that.
//
// What names the segments is, of a call, one of
//   ptr              segment s has the elements ptr[s] to ptr[s + 1] - 1 along dim
//   index            element k is of segment index[k]
//   ptr and order    segment s has the elements order[ptr[s]] to order[ptr[s + 1] - 1]
// each a 1-D tensor of int32 or int64.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>

#include "softmax_ext/segments.h"

namespace softmax_ext {

struct SegmentTensors {
  const std::optional<at::Tensor>& ptr;
  const std::optional<at::Tensor>& index;
  const std::optional<at::Tensor>& order;
};

// Raises unless these name segments of `input` along `dim`, by all that shows without a look at values;
// sizes may be symbolic. Returns dim, counted from 0.
int64_t check_segments(const char* function, const at::Tensor& input,
                       const SegmentTensors& segments, int64_t dim,
                       const std::optional<c10::SymInt>& num_segments);

// Raises unless this is a type of results.
void check_segment_dtype(SegmentOp op, const at::Tensor& input,
                         std::optional<at::ScalarType> dtype);

// How many there are. A tensor of a device is asked for its values, if need be.
c10::SymInt count_segments(const SegmentTensors& segments,
                           const std::optional<c10::SymInt>& num_segments);

// Of checked arguments, as the kernels have them: int64 pointers, and the order if there is one. On the
// CPU with the values checked; on a device its kernels do that. There an index is sorted, whether it is
// already or not: to know that, the host would have to wait.
struct SortedSegments {
  std::optional<at::Tensor> ptr;
  std::optional<at::Tensor> order;
};
SortedSegments sort_segments(const char* function, const at::Tensor& input,
                             const SegmentTensors& segments, int64_t dim,
                             const std::optional<c10::SymInt>& num_segments);

// The sizes of the result.
c10::SymDimVector segment_sizes(const at::Tensor& input, int64_t dim, SegmentOp op,
                                const c10::SymInt& count);

// By the kernels; each checks all that they rely on.
at::Tensor segment_forward(const at::Tensor& input, const SegmentTensors& segments, int64_t dim,
                           double scale, const std::optional<c10::SymInt>& num_segments,
                           SegmentOp op);

// `input` of kLogSumExp alone.
at::Tensor segment_backward(const at::Tensor& grad_output, const at::Tensor& output,
                            const std::optional<at::Tensor>& input, const SegmentTensors& segments,
                            int64_t dim, double scale, std::optional<c10::SymInt> num_segments,
                            SegmentOp op);

// Raises unless these can be the arguments of a backward call; sizes may be symbolic.
void check_segment_gradient(const at::Tensor& grad_output, const at::Tensor& output,
                            const std::optional<at::Tensor>& input, const SegmentTensors& segments,
                            int64_t dim, SegmentOp op);

// Sums over segments by torch's operators, which have derivatives of every order.
class SegmentSums {
 public:
  SegmentSums(const SegmentTensors& segments, int64_t dim, const c10::SymInt& size,
              const std::optional<c10::SymInt>& num_segments);

  // A sum a segment, at dim.
  at::Tensor of(const at::Tensor& x) const;
  // What each segment has, for each of its elements.
  at::Tensor spread(const at::Tensor& x) const;
  // The sum of its segment, for each element.
  at::Tensor total(const at::Tensor& x) const { return spread(of(x)); }
  // Of elements, without a gradient; -inf where a segment has none.
  at::Tensor max(const at::Tensor& x) const;

 private:
  at::Tensor owner_;  // the segment of each element
  c10::SymInt count_;
  int64_t dim_;
};

// The forward by torch's operators, of checked arguments, on any device. Raises there, once the device
// comes to it, where the values cannot be such.
at::Tensor segment_forward_by_torch(const at::Tensor& input, const SegmentTensors& segments,
                                    int64_t dim, double scale,
                                    const std::optional<c10::SymInt>& num_segments, SegmentOp op);

}  // namespace softmax_ext
