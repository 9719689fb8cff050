// Which of the compiled instruction sets this processor runs.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace softmax_ext::cpu {

#define SOFTMAX_EXT_KERNELS(isa)                                                               \
  void launch_forward_##isa(const ForwardArgs& args, const Threads&);                          \
  void launch_backward_##isa(const BackwardArgs& args, const Threads&);                        \
  void launch_score_forward_##isa(const ScoreForwardArgs& args, const Threads&);               \
  void launch_score_backward_##isa(const ScoreBackwardArgs& args, const Threads&);             \
  void launch_segments_forward_##isa(const SegmentsForwardArgs& args, const Threads&);         \
  void launch_segments_backward_##isa(const SegmentsBackwardArgs& args, const Threads&);       \
  void launch_loss_forward_##isa(const LossForwardArgs& args, const Threads&);                 \
  void launch_loss_backward_##isa(const LossBackwardArgs& args, const Threads&);               \
  int64_t find_bad_target_##isa(const int64_t*, int64_t, int64_t, int64_t, int64_t*);          \
  void launch_divergence_forward_##isa(const DivergenceForwardArgs& args, const Threads&);     \
  void launch_divergence_backward_##isa(const DivergenceBackwardArgs& args, const Threads&);   \
  void launch_probability_forward_##isa(const ProbabilityForwardArgs& args, const Threads&);   \
  void launch_probability_backward_##isa(const ProbabilityBackwardArgs& args, const Threads&); \
  constexpr Kernels kernels_##isa = {#isa,                                                     \
                                     launch_forward_##isa,                                     \
                                     launch_backward_##isa,                                    \
                                     launch_score_forward_##isa,                               \
                                     launch_score_backward_##isa,                              \
                                     launch_segments_forward_##isa,                            \
                                     launch_segments_backward_##isa,                           \
                                     launch_loss_forward_##isa,                                \
                                     launch_loss_backward_##isa,                               \
                                     find_bad_target_##isa,                                    \
                                     launch_divergence_forward_##isa,                          \
                                     launch_divergence_backward_##isa,                         \
                                     launch_probability_forward_##isa,                         \
                                     launch_probability_backward_##isa};

#if defined(SOFTMAX_EXT_AVX512)
SOFTMAX_EXT_KERNELS(avx512)
#endif
#if defined(SOFTMAX_EXT_AVX2)
SOFTMAX_EXT_KERNELS(avx2)
#endif
#if defined(SOFTMAX_EXT_BASELINE)
SOFTMAX_EXT_KERNELS(baseline)
#endif

namespace {

KernelList find_usable() {
  KernelList list{};
#if defined(SOFTMAX_EXT_AVX2) || defined(SOFTMAX_EXT_AVX512)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
#endif
#if defined(SOFTMAX_EXT_AVX512)
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512) list.items[list.size++] = &kernels_avx512;
#endif
#if defined(SOFTMAX_EXT_AVX2)
  if (avx2) list.items[list.size++] = &kernels_avx2;
#endif
#if defined(SOFTMAX_EXT_BASELINE)
  list.items[list.size++] = &kernels_baseline;
#endif
  return list;
}

const Kernels* choose() {
  const KernelList& usable = usable_kernels();
  if (usable.size == 0) {
    throw std::runtime_error(
        "this build lacks the CPU kernels for this processor's instruction set, since "
        "SOFTMAX_EXT_ISAS "
        "named others when it was made");
  }
  const char* forced = std::getenv("SOFTMAX_EXT_ISA");
  if (forced == nullptr || *forced == '\0') return usable.items[0];
  std::string names;
  for (int k = 0; k < usable.size; ++k) {
    if (std::strcmp(forced, usable.items[k]->isa) == 0) return usable.items[k];
    names += std::string(k == 0 ? "" : ", ") + usable.items[k]->isa;
  }
  throw std::runtime_error(std::string("SOFTMAX_EXT_ISA is \"") + forced +
                           "\"; this build on this processor can use: " + names);
}

}  // namespace

const KernelList& usable_kernels() {
  static const KernelList list = find_usable();
  return list;
}

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

}  // namespace softmax_ext::cpu
