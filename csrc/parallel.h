// PyTorch's threads, through its stable ABI.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace vmae {

// body(begin, end) on PyTorch's threads, which share 0..n-1 among them in contiguous ranges.
template <class F>
void parallel(int64_t n, F body) {
  torch::stable::parallel_for(0, n, 1, body);
}

inline int64_t threads() { return torch::stable::get_num_threads(); }

}  // namespace vmae
