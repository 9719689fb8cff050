// The operators on segments as the dispatcher knows them, torch.ops.softmax_ext: what a compiled graph
// calls.
#include <torch/library.h>

#include "segments_formulas.h"

namespace softmax_ext {

TORCH_LIBRARY_FRAGMENT(softmax_ext, library) {
  Rules<SegmentForward<SegmentOp::kSoftmax>>::define(library);
  Rules<SegmentForward<SegmentOp::kLogSoftmax>>::define(library);
  Rules<SegmentForward<SegmentOp::kLogSumExp>>::define(library);
  Rules<SegmentBackward<SegmentOp::kSoftmax>>::define(library);
  Rules<SegmentBackward<SegmentOp::kLogSoftmax>>::define(library);
  Rules<SegmentBackward<SegmentOp::kLogSumExp>>::define(library);
}

}  // namespace softmax_ext
