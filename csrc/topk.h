// Exact selection of the largest, and the random bits of perturbed scores. No library is needed, and no processor in
// particular.
#pragma once

#include <cstdint>

namespace vmae {

// Of each of `rows` rows of n scores the k largest, 0 <= k <= n; ties go to the lowest index, NaN ranks highest, -0.0
// equals 0.0. Their indices go to `selected` [rows, k], the others' to `rest` [rows, n - k], unless that is null.
void topk(const float* scores, int64_t rows, int64_t n, int64_t k, int64_t* selected, int64_t* rest);

// The same as `mask` [rows, n], of 1 and 0.
void topk_mask(const float* scores, int64_t rows, int64_t n, int64_t k, uint8_t* mask);

// Philox4x32-10: word w >> 8 of the counter (element, row, block, stream), as out[w][block][row][element]; rows and
// blocks count from the ones given.
void random_bits(uint64_t seed, uint32_t stream, int64_t block, int64_t blocks, int64_t row, int64_t rows, int64_t n,
                 float* out);

}  // namespace vmae
