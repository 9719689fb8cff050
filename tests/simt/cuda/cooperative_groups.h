// The cluster and the grid of <cooperative_groups.h> as the host executor has it.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  void sync(SIMT_HERE("cluster.sync")) const {
    simt::arrive_cluster(site);
    simt::wait_cluster(site);
  }
  void barrier_arrive(SIMT_HERE("cluster.barrier_arrive")) const { simt::arrive_cluster(site); }
  void barrier_wait(SIMT_HERE("cluster.barrier_wait")) const { simt::wait_cluster(site); }
  unsigned block_rank() const { return simt::block_rank_in_cluster(); }
  unsigned num_blocks() const { return simt::blocks_in_cluster(); }
  template <class T>
  T* map_shared_rank(T* pointer, unsigned rank, SIMT_HERE("cluster.map_shared_rank")) const {
    return static_cast<T*>(simt::map_shared(pointer, rank, site));
  }
};

inline cluster_group this_cluster() { return {}; }

struct grid_group {
  void sync(SIMT_HERE("grid.sync")) const { simt::sync_grid(site); }
};

inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
