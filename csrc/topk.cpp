#include "topk.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "parallel.h"

// Compiled for the widest vectors, too; the processor decides when the library is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define VMAE_WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VMAE_WIDE
#endif

namespace vmae {
namespace {

// Keys in the order of scores: -0.0 as 0.0, NaN next above infinity.
VMAE_WIDE void ordered_keys(const float* scores, int64_t n, uint32_t* keys) {
  constexpr uint32_t kSign = 0x80000000, kInfinity = 0x7F800000;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, scores + i, sizeof bits);
    const uint32_t magnitude = bits & ~kSign, key = bits & kSign ? kSign - magnitude : kSign + magnitude;
    keys[i] = magnitude > kInfinity ? kSign + kInfinity + 1 : key;
  }
}

VMAE_WIDE int64_t count_from(const uint32_t* keys, int64_t n, uint32_t least) {
  uint32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += keys[i] >= least;
  return count;
}

VMAE_WIDE void mark_from(const uint32_t* keys, int64_t n, uint32_t least, uint8_t* mask) {
  for (int64_t i = 0; i < n; ++i) mask[i] = keys[i] >= least;
}

// The k largest keys, the first of those that are equal. The k-th is found bit by bit: a pass over keys that are near
// takes less than what could be saved by fewer of them.
void mark_largest(const uint32_t* keys, int64_t n, int64_t k, uint8_t* mask) {
  uint32_t key = 0;
  int64_t found = n;  // from `key` on
  for (uint32_t bit = 0x80000000; bit && found != k; bit >>= 1) {
    const int64_t count = count_from(keys, n, key | bit);
    if (count < k) continue;
    key |= bit;
    found = count;
  }
  mark_from(keys, n, key, mask);
  for (int64_t i = n; found > k;) {
    if (keys[--i] != key) continue;
    mask[i] = 0;
    --found;
  }
}

// done(row, mask) of every row.
template <class F>
void select(const float* scores, int64_t rows, int64_t n, int64_t k, F done) {
  parallel(rows, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> keys(n);
    std::vector<uint8_t> mask(n);
    for (int64_t row = begin; row < end; ++row) {
      ordered_keys(scores + row * n, n, keys.data());
      mark_largest(keys.data(), n, k, mask.data());
      done(row, mask.data());
    }
  });
}

// The first `count` places where the mask has `value`.
void places(const uint8_t* mask, uint8_t value, int64_t count, int64_t* out) {
  const int64_t* end = out + count;
  for (int64_t i = 0; out < end; ++i) {
    *out = i;
    out += mask[i] == value;
  }
}

constexpr int kRounds = 10;
using Keys = std::array<std::array<uint32_t, 2>, kRounds>;

// Of the counters (element, row, block, stream) of n elements from `first` on, to out[word * stride + element].
VMAE_WIDE void philox(uint32_t first, uint32_t row, uint32_t block, uint32_t stream, const Keys& keys, int64_t n,
                      int64_t stride, float* __restrict__ out) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t a = first + static_cast<uint32_t>(i), b = row, c = block, d = stream;
#pragma GCC unroll 10
    for (int round = 0; round < kRounds; ++round) {
      const uint64_t left = uint64_t{0xD2511F53} * a, right = uint64_t{0xCD9E8D57} * c;
      a = static_cast<uint32_t>(right >> 32) ^ b ^ keys[round][0];
      b = static_cast<uint32_t>(right);
      c = static_cast<uint32_t>(left >> 32) ^ d ^ keys[round][1];
      d = static_cast<uint32_t>(left);
    }
    out[i] = static_cast<float>(static_cast<int32_t>(a >> 8));
    out[i + stride] = static_cast<float>(static_cast<int32_t>(b >> 8));
    out[i + 2 * stride] = static_cast<float>(static_cast<int32_t>(c >> 8));
    out[i + 3 * stride] = static_cast<float>(static_cast<int32_t>(d >> 8));
  }
}

}  // namespace

void topk(const float* scores, int64_t rows, int64_t n, int64_t k, int64_t* selected, int64_t* rest) {
  select(scores, rows, n, k, [&](int64_t row, const uint8_t* mask) {
    places(mask, 1, k, selected + row * k);
    if (rest) places(mask, 0, n - k, rest + row * (n - k));
  });
}

void topk_mask(const float* scores, int64_t rows, int64_t n, int64_t k, uint8_t* mask) {
  select(scores, rows, n, k, [&](int64_t row, const uint8_t* marked) { std::copy_n(marked, n, mask + row * n); });
}

void random_bits(uint64_t seed, uint32_t stream, int64_t block, int64_t blocks, int64_t row, int64_t rows, int64_t n,
                 float* out) {
  Keys keys{{{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}}};
  for (int round = 1; round < kRounds; ++round) {
    keys[round] = {keys[round - 1][0] + 0x9E3779B9, keys[round - 1][1] + 0xBB67AE85};
  }
  constexpr int64_t kPart = 1024;
  const int64_t parts = (n + kPart - 1) / kPart;
  parallel(blocks * rows * parts, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t line = part / parts, first = part % parts * kPart;
      philox(static_cast<uint32_t>(first), static_cast<uint32_t>(row + line % rows),
             static_cast<uint32_t>(block + line / rows), stream, keys, std::min(kPart, n - first), blocks * rows * n,
             out + line * n + first);
    }
  });
}

}  // namespace vmae
