// Layer norms of rows of fp32 numbers, rounded to bfloat16 (as uint16_t), and their gradients, with AVX-512.
//
// All rows lie together. Sums are of fp32, in an order that does not depend on the number of threads.
#pragma once

#include <cstdint>

namespace vmae {

struct LayerNorm {
  int64_t rows, channels;
  float eps;
};

// `stats` [rows][2]: mean, and the reciprocal of the standard deviation.
void layer_norm(const LayerNorm& sizes, const float* x, const float* weight, const float* bias, uint16_t* y,
                float* stats);

void layer_norm_backward(const LayerNorm& sizes, const uint16_t* dy, const float* x, const float* weight,
                         const float* stats, float* dx, float* dweight, float* dbias);

}  // namespace vmae
