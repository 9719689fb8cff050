// The kernels' exponentials over ranges of float32, against double, and their division: for test_exp.py.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../../csrc/cuda/outer_strides.cuh"
#include "softmax_ext/formula.h"

using namespace softmax_ext;

namespace {

// The largest error over the floats whose bits are first, first + step, ... up to last, in units that
// `unit` gives of the right value; where it is goes to `at`.
template <class Function, class Unit>
double largest_error(uint32_t first, uint32_t last, uint32_t step, Function function, Unit unit,
                     float* at) {
  double largest = 0;
  for (uint64_t bits = first; bits <= last; bits += step) {
    const auto narrow = static_cast<uint32_t>(bits);
    float x;
    memcpy(&x, &narrow, sizeof(x));
    const double right = std::exp(static_cast<double>(x));
    const double error = std::abs(static_cast<double>(function(x)) - right) / unit(right);
    if (!(error <= largest)) {
      largest = error;
      *at = x;
    }
  }
  return largest;
}

}  // namespace

// In units in the last place of float32.
extern "C" double error_of_exp(uint32_t first, uint32_t last, uint32_t step, float* at) {
  return largest_error(
      first, last, step, [](float x) { return exp_of(x); },
      [](double right) {
        int exponent;
        std::frexp(right, &exponent);
        return std::ldexp(1.0, std::max(exponent - 24, -149));
      },
      at);
}

// Relative, of what a result of 16 bits is made of, without its factor.
extern "C" double error_of_rounded_exp(int scaled, uint32_t first, uint32_t last, uint32_t step,
                                       float* at) {
  return largest_error(
      first, last, step,
      [=](float x) {
        return scaled ? static_cast<double>(Rounded<24>::exp(x)) * 0x1p-24
                      : static_cast<double>(Rounded<0>::exp(x));
      },
      [](double right) { return right; }, at);
}

extern "C" float exp_of_float(float x) { return exp_of(x); }

extern "C" uint32_t quotient(uint32_t n, int64_t size) {
  return cuda::Divisor::of(size).quotient(n);
}
