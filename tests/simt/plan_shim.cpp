// make_plan with a C interface, for test_plan.py.
#include "softmax_ext/plan.h"

using namespace softmax_ext;

// out: schedule, vectorized, width, vectors, group, across, items, blocks, shared_bytes.
extern "C" void plan(int64_t outer, int64_t dim, int64_t inner, int computed_as, int load_type,
                     int store_type, int inputs, int aligned, int sm_count, int max_shared,
                     int64_t* out) {
  const Workload work{{outer, dim, inner},
                      static_cast<DType>(computed_as),
                      static_cast<DType>(load_type),
                      static_cast<DType>(store_type),
                      inputs,
                      aligned != 0};
  const Plan plan = make_plan(work, {sm_count, max_shared, 2048, 90});
  const int64_t values[] = {static_cast<int64_t>(plan.schedule),
                            plan.vectorized,
                            plan.width,
                            plan.vectors,
                            plan.group,
                            plan.across,
                            plan.items,
                            plan.blocks,
                            static_cast<int64_t>(plan.shared_bytes)};
  for (const int64_t value : values) *out++ = value;
}

extern "C" const char* schedule_name(int schedule) { return name(static_cast<Schedule>(schedule)); }
