// Their gradients on the CPU. Compiled once for each instruction set, as softmax_forward.cpp.
#include "dispatch.h"
#include "segments_schedule.h"

namespace softmax_ext::cpu {
namespace {

// Of softmax and log-softmax: a sum over each column, and then the gradient.
template <Op op, class T>
class SegmentBackward {
 public:
  using Compute = compute_t<T>;
  using State = double;

  SegmentBackward(const SegmentsBackwardArgs& args, const Tiles<Compute>& tiles)
      : shape_(args.shape),
        tiles_(tiles),
        scale_(Compute(args.scale)),
        grads_(static_cast<const T*>(args.grad_output), args.shape, args.segments.order != nullptr),
        outputs_(static_cast<const T*>(args.output), args.shape, args.segments.order != nullptr),
        grad_inputs_(static_cast<T*>(args.grad_input), args.shape, args.segments.order != nullptr) {
  }

  void empty(int64_t, int64_t) const {}

  void open(int64_t o, const RowsOf& rows) {
    grads_.gather(o, rows);
    outputs_.gather(o, rows);
    grad_inputs_.open(o, rows);
  }
  void close(int64_t o, const RowsOf& rows) const { grad_inputs_.scatter(o, rows); }

  void whole(int64_t, int64_t, int64_t first, int64_t count) const {
    const T *const grad = grads_.at(first), *const y = outputs_.at(first);
    T* const grad_input = grad_inputs_.at(first);
    tiles_.for_each([&](int64_t c, const Tile<Compute>& tile) SOFTMAX_EXT_LAMBDA {
      if (tile.steps(count) == 1) {
        return of_a_register(tile, grad + c, y + c, grad_input + c, count);
      }
      const V sum = sum_over(tile, grad + c, y + c, count).rounded();
      write(tile, grad + c, y + c, grad_input + c, count, sum);
    });
  }

  void reduce(int64_t first, int64_t count, State* state) const {
    const T *const grad = grads_.at(first), *const y = outputs_.at(first);
    tiles_.for_each([&](int64_t c, const Tile<Compute>& tile) {
      const ExactSum<V> sum = sum_over(tile, grad + c, y + c, count);
      for (int64_t k = 0; k < tile.width(); ++k) {
        state[c + k] = static_cast<double>(sum.sum.raw[k]) + zero_if_nan(sum.rest).raw[k];
      }
    });
  }

  void combine(int64_t, int64_t, State* states, int64_t n) const {
    for (int64_t c = 0; c < shape_.inner; ++c) {
      for (int64_t k = 1; k < n; ++k) states[c] += states[k * shape_.inner + c];
    }
  }

  void finish(int64_t, int64_t, int64_t first, int64_t count, const State* states) const {
    const T *const grad = grads_.at(first), *const y = outputs_.at(first);
    T* const grad_input = grad_inputs_.at(first);
    tiles_.for_each([&](int64_t c, const Tile<Compute>& tile) {
      Compute sum[V::kSize];
      for (int64_t k = 0; k < tile.width(); ++k) sum[k] = static_cast<Compute>(states[c + k]);
      write(tile, grad + c, y + c, grad_input + c, count, tile.spread(sum));
    });
  }

 private:
  using V = Vec<Compute>;
  using Formula = Backward<op, V>;

  // Of rows that a register holds.
  SOFTMAX_EXT_INLINE void of_a_register(const Tile<Compute>& tile, const T* grad, const T* y,
                                        T* grad_input, int64_t rows) const {
    tile.template for_each_of<1>(rows, [&](int, int64_t, auto lanes) SOFTMAX_EXT_LAMBDA {
      const V grads = load(grad, lanes, {}), outputs = load(y, lanes, {});
      Formula formula;
      formula.sum = tile.fold(Formula::term(grads, outputs), Add{});
      store_masked(grad_input, lanes, formula.of(grads, outputs) * scale_);
    });
  }

  SOFTMAX_EXT_INLINE ExactSum<V> sum_over(const Tile<Compute>& tile, const T* grad, const T* y,
                                          int64_t rows) const {
    return tile.sum(rows, [&](int64_t, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
      return Formula::term(load(grad + i, lanes, {}), load(y + i, lanes, {}));
    });
  }

  SOFTMAX_EXT_INLINE void write(const Tile<Compute>& tile, const T* grad, const T* y, T* grad_input,
                                int64_t rows, V sum) const {
    Formula formula;
    formula.sum = sum;
    tile.for_each_step(rows, [&](int64_t, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
      const V gradient = formula.of(load(grad + i, lanes, {}), load(y + i, lanes, {}));
      store(grad_input + i, lanes, gradient * scale_);
    });
  }

  Shape shape_;
  const Tiles<Compute>& tiles_;
  V scale_;
  Rows<const T> grads_, outputs_;
  Rows<T> grad_inputs_;
};

// Of logsumexp: each element by itself.
template <class T>
class LogSumExpBackward {
 public:
  using Compute = compute_t<T>;
  struct State {};

  LogSumExpBackward(const SegmentsBackwardArgs& args, const Tiles<Compute>& tiles)
      : shape_(args.shape),
        count_(args.segments.count),
        tiles_(tiles),
        scale_(Compute(args.scale)),
        grads_(static_cast<const T*>(args.grad_output)),
        outputs_(static_cast<const T*>(args.output)),
        inputs_(static_cast<const T*>(args.input), args.shape, args.segments.order != nullptr),
        grad_inputs_(static_cast<T*>(args.grad_input), args.shape, args.segments.order != nullptr) {
  }

  void empty(int64_t, int64_t) const {}

  void open(int64_t o, const RowsOf& rows) {
    inputs_.gather(o, rows);
    grad_inputs_.open(o, rows);
  }
  void close(int64_t o, const RowsOf& rows) const { grad_inputs_.scatter(o, rows); }

  void whole(int64_t o, int64_t s, int64_t first, int64_t count) const {
    const int64_t segment = (o * count_ + s) * shape_.inner;
    const T* const input = inputs_.at(first);
    T* const grad_input = grad_inputs_.at(first);
    tiles_.for_each([&](int64_t c, const Tile<Compute>& tile) SOFTMAX_EXT_LAMBDA {
      const V grad = tile.spread(grads_ + segment + c) * scale_;
      const V logsumexp = tile.spread(outputs_ + segment + c);
      tile.for_each_step(count, [&](int64_t, int64_t i, auto lanes) SOFTMAX_EXT_LAMBDA {
        const V x = load(input + c + i, lanes, {}) * scale_;
        store(grad_input + c + i, lanes, grad * exp_of(x - logsumexp));
      });
    });
  }

  void reduce(int64_t, int64_t, State*) const {}
  void combine(int64_t, int64_t, State*, int64_t) const {}
  void finish(int64_t o, int64_t s, int64_t first, int64_t count, const State*) const {
    whole(o, s, first, count);
  }

 private:
  using V = Vec<Compute>;

  Shape shape_;
  int64_t count_;
  const Tiles<Compute>& tiles_;
  V scale_;
  const T *grads_, *outputs_;
  Rows<const T> inputs_;
  Rows<T> grad_inputs_;
};

template <template <class> class Kernel>
void launch(const SegmentsBackwardArgs& args, const Threads& threads) {
  visit(args.dtype, [&](auto element) {
    using K = Kernel<decltype(element)>;
    const Tiles<typename K::Compute> tiles(args.shape.inner);
    for_each_segment<K>(args.shape, args.segments, threads, [&] { return K(args, tiles); });
  });
}

template <class T>
using SoftmaxBackward = SegmentBackward<Op::kSoftmax, T>;
template <class T>
using LogSoftmaxBackward = SegmentBackward<Op::kLogSoftmax, T>;

}  // namespace

void SOFTMAX_EXT_OF_ISA(launch_segments_backward)(const SegmentsBackwardArgs& args,
                                                  const Threads& threads) {
  switch (args.op) {
    case SegmentOp::kSoftmax:
      return launch<SoftmaxBackward>(args, threads);
    case SegmentOp::kLogSoftmax:
      return launch<LogSoftmaxBackward>(args, threads);
    case SegmentOp::kLogSumExp:
      return launch<LogSumExpBackward>(args, threads);
  }
}

}  // namespace softmax_ext::cpu
