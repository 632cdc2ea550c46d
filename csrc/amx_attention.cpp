// Attention as products of AMX tiles.
//
// Scores are computed transposed, keys x queries: a vector then holds one key's scores of 16 queries, so that a query's
// maximum and sum are lanes of vectors, and two keys' weights, interleaved, are a row of a right tile. The results of
// queries, o and dq, are transposed too, depth x queries. The depth is padded with zeros to whole steps.
//
// Forward: a unit of work is some queries of one head; it goes through the keys with a running maximum.
// Backward: a unit is one head's keys, or a segment of them, in blocks whose dk and dv stay near while all queries
// pass; dq is summed in fp32 per unit.
#include "amx_attention.h"

#include "amx.h"

#ifdef VMAE_AMX

#include <cmath>
#include <cstring>
#include <limits>

#include "parallel.h"

#include "amx_begin.h"

namespace vmae {
namespace {

constexpr int64_t kStep = kRows * kDepth;                    // numbers of a left or right tile
constexpr int64_t kForwardKeys = 256, kForwardQueries = 32;  // of a block; multiples of 32, as below
constexpr int64_t kBackwardKeys = 256, kBackwardQueries = 256;
constexpr int64_t kUnits = 6;  // wanted of the backward, for threads to share
constexpr float kLn2 = 0.693147181f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

using Input = Rows<const uint16_t>;
using Output = Rows<uint16_t>;

// bfloat16 a, then b.
__m512i rounded(__m512 a, __m512 b) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)); }

// a0 b0 a1 b1 ... of the low (or high) halves of a and b.
template <bool HIGH>
__m512i interleave_half(__m512i a, __m512i b) {
  alignas(64) static constexpr uint16_t order[2][32] = {
      {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
      {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
       24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  return _mm512_permutex2var_epi16(a, _mm512_load_si512(order[HIGH]), b);
}

// ---- Operands: of `rows` rows of x, which lie `stride` apart, padded with zeros -------------------------------------

// [rows to 32][depth to 32]: left tiles whose rows are x's.
void pack_rows(const uint16_t* x, int64_t stride, int64_t rows, int64_t depth, uint16_t* to) {
  const int64_t padded = round_up(depth, kDepth);
  for (int64_t i = 0; i < round_up(rows, kDepth); ++i)
    for (int64_t d = 0; d < padded; d += kDepth, to += kDepth)
      _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(i < rows ? first32(depth - d) : 0, x + i * stride + d));
}

// [rows to 32, by 16][depth to 32, by 32][16 pairs of depth][16 rows][2]: right tiles whose columns are x's rows; the
// sign bits `flip` are changed.
void pack_columns(const uint16_t* x, int64_t stride, int64_t rows, int64_t depth, bool flip, uint16_t* to) {
  const __m512i sign = _mm512_set1_epi16(flip ? INT16_MIN : 0);
  for (int64_t i = 0; i < round_up(rows, kDepth); i += kColumns)
    for (int64_t d = 0; d < depth; d += kDepth, to += kStep) {
      __m512i t[16];
      for (int64_t n = 0; n < kColumns; ++n)
        t[n] = _mm512_xor_si512(
            sign, _mm512_maskz_loadu_epi16(i + n < rows ? first32(depth - d) : 0, x + (i + n) * stride + d));
      transpose(t);
      for (int64_t n = 0; n < kColumns; ++n) _mm512_storeu_si512(to + n * kDepth, t[n]);
    }
}

// [rows, by 32][depth to 32, by 16]: tiles whose depth is x's rows; right ones, [16 pairs of rows][16][2], or,
// transposed, left ones, [16][32 rows].
template <bool LEFT>
void pack_depth(const uint16_t* x, int64_t stride, int64_t rows, int64_t depth, uint16_t* to) {
  for (int64_t i = 0; i < rows; i += kDepth)
    for (int64_t d = 0; d < round_up(depth, kDepth); d += kColumns, to += kStep) {
      __m512i t[16];
      for (int64_t n = 0; n < kDepth / 2; ++n) {
        const int64_t row = i + 2 * n;
        const uint16_t* from = x + row * stride + d;
        t[n] = interleave(_mm256_maskz_loadu_epi16(row < rows ? first16(depth - d) : 0, from),
                          _mm256_maskz_loadu_epi16(row + 1 < rows ? first16(depth - d) : 0, from + stride));
      }
      if constexpr (LEFT) transpose(t);
      for (int64_t n = 0; n < kDepth / 2; ++n) _mm512_storeu_si512(to + n * kDepth, t[n]);
    }
}

// Writes a result [depth to 32, by 16][16][16 queries], times a factor of each query, as rows of `to`.
void write_transposed(const float* tiles, int64_t tile_stride, __m512 factor, int64_t rows, int64_t depth, uint16_t* to,
                      int64_t stride) {
  for (int64_t d = 0; d < depth; d += kRows, tiles += tile_stride) {
    __m512i t[16];
    for (int64_t n = 0; n < kRows; ++n)
      t[n] = _mm512_castps_si512(_mm512_mul_ps(factor, _mm512_loadu_ps(tiles + n * kColumns)));
    transpose(t);
    for (int64_t n = 0; n < std::min(rows, kColumns); ++n)
      _mm256_mask_storeu_epi16(to + n * stride + d, first16(depth - d),
                               reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_castsi512_ps(t[n]))));
  }
}

// ---- Forward --------------------------------------------------------------------------------------------------------

// What a thread keeps of one head's keys and values.
struct Keys {
  Buffer<uint16_t> rows, values;

  void pack(const AmxAttention& s, Input k, Input v, int64_t b, int64_t h) {
    pack_rows(k.at(b, h, 0), k.row, s.keys, s.depth, rows.get());
    pack_depth<true>(v.at(b, h, 0), v.row, s.keys, s.depth, values.get());
  }
};

constexpr int64_t kPair = 4 * kTile;  // numbers of 32 keys x 32 queries: [2][2] tiles

// One of the steps of 32 keys' products with 32 queries: rows `left`, columns `right`.
void multiply_pair(const uint16_t* left, const uint16_t* right, int64_t depth, int64_t step, float* to) {
  const int64_t steps = depth / kDepth;
  if (step == 0) zero_tiles<2, 2>();
  left += step * kDepth, right += step * kStep;
  multiply<2, 2>(left, left + kRows * depth, depth * 2, 0, right, right + steps * kStep, 0, 1);
  if (step == steps - 1) store_tiles<2, 2>(to, 2 * kTile, kTile);
}

void attend(const AmxAttention& s, const Keys& keys, const uint16_t* q, float* o, __m512* maximum, __m512* sum) {
  const int64_t depth = round_up(s.depth, kDepth), steps = depth / kDepth;
  const int64_t pairs = ceil_div(s.keys, kDepth), most = kForwardKeys / kDepth;
  const __m512 factor = _mm512_set1_ps(std::fabs(s.scale) * kLog2E);
  alignas(64) float scores[2][kForwardKeys * kForwardQueries];
  alignas(64) uint16_t weights[kForwardKeys * kForwardQueries];  // [pair][query tile]: right tiles
  int current = 0;
  auto product = [&](int64_t first, int64_t t, int64_t step, int buffer) {
    const uint16_t* left = keys.rows.get() + (first + t) * kDepth * depth;
    if (first + t < pairs) multiply_pair(left, q, depth, step, scores[buffer] + t * kPair);
  };
  __m512 largest[2];  // of the scores up to the coming block, looked at while they are in the first cache
  auto look = [&](int64_t first, int64_t t, int buffer) {
    const float* x = scores[buffer] + t * kPair;
    const int64_t all = std::min(s.keys - (first + t) * kDepth, kDepth);
    for (int64_t j = 0; j < 2; ++j) {
      __m512 other = largest[j];
      for (int64_t key = 0; key < all; key += 2) {
        const float* at = x + key / 16 * 2 * kTile + j * kTile + key % 16 * kColumns;
        largest[j] = _mm512_max_ps(_mm512_load_ps(at), largest[j]);
        if (key + 1 < all) other = _mm512_max_ps(_mm512_load_ps(at + kColumns), other);
      }
      largest[j] = _mm512_max_ps(other, largest[j]);
    }
  };
  for (auto& x : largest) x = _mm512_set1_ps(-kInfinity);
  for (int64_t t = 0; t < most; ++t) {
    for (int64_t step = 0; step < steps; ++step) product(0, t, step, 0);
    fence();
    look(0, t, 0);
  }

  for (int64_t first = 0; first < pairs; first += most, current ^= 1) {
    const int64_t count = std::min(most, pairs - first), valid = s.keys - first * kDepth;
    const float* x = scores[current];
    auto row = [&](int64_t j, int64_t key) {
      return _mm512_load_ps(x + key / 16 * 2 * kTile + j * kTile + key % 16 * kColumns);
    };
    __m512 shift[2];
    for (int64_t j = 0; j < 2; ++j) {
      __m512 next = _mm512_mul_ps(factor, largest[j]);
      next = _mm512_max_ps(next, maximum[j]);
      // Where no key has counted yet, any finite number will do.
      __mmask16 none = _mm512_cmp_ps_mask(next, _mm512_set1_ps(-kInfinity), _CMP_EQ_OQ);
      shift[j] = _mm512_mask_mov_ps(next, none, _mm512_setzero_ps());
      if (_mm512_cmp_ps_mask(next, maximum[j], _CMP_NEQ_UQ)) {
        const __m512 kept = exp2_of(_mm512_sub_ps(maximum[j], shift[j]));
        sum[j] = _mm512_mul_ps(sum[j], kept);
        for (int64_t d = 0; d < depth; ++d) {
          float* at = o + d / kRows * 2 * kTile + j * kTile + d % kRows * kColumns;
          _mm512_store_ps(at, _mm512_mul_ps(kept, _mm512_load_ps(at)));
        }
        maximum[j] = next;
      }
    }
    fence();
    for (int64_t t = 0; t < count; ++t) {
      auto weigh = [&](int64_t i) {  // two keys
        const int64_t key = t * kDepth + i;
        for (int64_t j = 0; j < 2; ++j) {
          __m512 p[2];
          for (int64_t m = 0; m < 2; ++m) {
            p[m] = exp2_of(_mm512_fmsub_ps(row(j, key + m), factor, shift[j]));
            if (key + m >= valid) p[m] = _mm512_setzero_ps();
          }
          sum[j] = _mm512_add_ps(sum[j], _mm512_add_ps(p[0], p[1]));
          const __m512i both = rounded(p[0], p[1]);
          _mm512_store_si512(weights + (t * 2 + j) * kStep + i / 2 * kDepth,
                             interleave(_mm512_castsi512_si256(both), _mm512_extracti64x4_epi64(both, 1)));
        }
      };
      for (int64_t step = 0; step < steps; ++step) {  // the next block's products run between this one's exponentials
        product(first + most, t, step, current ^ 1);
        for (int64_t i = 16 * step / steps; i < 16 * (step + 1) / steps; ++i) weigh(2 * i);
      }
      fence();
      look(first + most, t, current ^ 1);
    }
    fence();
    for (int64_t d = 0; d < depth / kRows; d += 2) {
      const uint16_t* left = keys.values.get() + (first * (depth / kRows) + d) * kStep;
      float* at = o + d * 2 * kTile;
      load_tiles<2, 2>(at, 2 * kTile, kTile);
      multiply<2, 2>(left, left + kStep, kDepth * 2, depth / kRows * kStep, weights, weights + kStep, 2 * kStep, count);
      store_tiles<2, 2>(at, 2 * kTile, kTile);
    }
    fence();
  }
}

}  // namespace

void amx_attention_forward(const AmxAttention& s, Input q, Input k, Input v, Output o, float* lse) {
  const int64_t depth = round_up(s.depth, kDepth), size = round_up(s.keys, kDepth) * depth;
  const int64_t blocks = ceil_div(s.queries, kForwardQueries);
  parallel(s.batch * s.heads * blocks, [&](int64_t begin, int64_t end) {
    Tiles registers;
    registers.configure(kRows, kDepth);
    Keys keys{buffer<uint16_t>(size), buffer<uint16_t>(size)};
    Buffer<uint16_t> columns = buffer<uint16_t>(kForwardQueries * depth);
    Buffer<float> results = buffer<float>(kForwardQueries * depth);  // [depth by 16][query tile][16][16]
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t block = unit % blocks, b = unit / blocks / s.heads, h = unit / blocks % s.heads;
      const int64_t first = block * kForwardQueries, count = std::min(kForwardQueries, s.queries - first);
      if (unit == begin || block == 0) keys.pack(s, k, v, b, h);
      pack_columns(q.at(b, h, first), q.row, count, s.depth, s.scale < 0, columns.get());
      std::memset(results.get(), 0, kForwardQueries * depth * sizeof(float));
      __m512 maximum[2], sum[2];
      for (int64_t j = 0; j < 2; ++j) maximum[j] = _mm512_set1_ps(-kInfinity), sum[j] = _mm512_setzero_ps();
      fence();
      attend(s, keys, columns.get(), results.get(), maximum, sum);
      for (int64_t j = 0; j * kColumns < count; ++j) {
        const int64_t row = first + j * kColumns;
        write_transposed(results.get() + j * kTile, 2 * kTile, _mm512_div_ps(_mm512_set1_ps(1.f), sum[j]),
                         count - j * kColumns, s.depth, o.at(b, h, row), o.row);
        alignas(64) float most[16], total[16];
        _mm512_store_ps(most, maximum[j]), _mm512_store_ps(total, sum[j]);
        for (int64_t i = 0; i < std::min(kColumns, count - j * kColumns); ++i)
          lse[(b * s.heads + h) * s.queries + row + i] = most[i] * kLn2 + std::log(total[i]);
      }
    }
  });
}

// ---- Backward -------------------------------------------------------------------------------------------------------

namespace {

// What a thread keeps of one head's queries, all padded to whole pairs of tiles.
struct Queries {
  Buffer<uint16_t> q_columns, grad_columns, q_depth, grad_depth;
  Buffer<float> lse, delta;  // in powers of 2; the sum of grad * o over a row

  explicit Queries(int64_t rows, int64_t depth)
      : q_columns(buffer<uint16_t>(rows * depth)),
        grad_columns(buffer<uint16_t>(rows * depth)),
        q_depth(buffer<uint16_t>(rows * depth)),
        grad_depth(buffer<uint16_t>(rows * depth)),
        lse(buffer<float>(rows)),
        delta(buffer<float>(rows)) {}

  void pack(const AmxAttention& s, Input grad, Input q, Input o, const float* from, int64_t b, int64_t h) {
    pack_columns(q.at(b, h, 0), q.row, s.queries, s.depth, s.scale < 0, q_columns.get());
    pack_columns(grad.at(b, h, 0), grad.row, s.queries, s.depth, false, grad_columns.get());
    pack_depth<false>(q.at(b, h, 0), q.row, s.queries, s.depth, q_depth.get());
    pack_depth<false>(grad.at(b, h, 0), grad.row, s.queries, s.depth, grad_depth.get());
    for (int64_t i = 0; i < round_up(s.queries, kDepth); ++i) {
      const bool valid = i < s.queries;  // the others' weights are 0
      lse[i] = valid ? from[(b * s.heads + h) * s.queries + i] * kLog2E : kInfinity;
      __m512 sum = _mm512_setzero_ps();
      for (int64_t d = 0; d < s.depth && valid; d += kColumns) {
        const __mmask16 mask = first16(s.depth - d);
        sum = _mm512_fmadd_ps(to_float(_mm256_maskz_loadu_epi16(mask, grad.at(b, h, i) + d)),
                              to_float(_mm256_maskz_loadu_epi16(mask, o.at(b, h, i) + d)), sum);
      }
      delta[i] = _mm512_reduce_add_ps(sum);
    }
  }
};

// One block of keys: operands and sums.
struct KeyBlock {
  Buffer<uint16_t> rows, values, columns;
  Buffer<float> dk, dv;    // [key tile][depth by 16][16][16]
  Buffer<uint16_t> p, ds;  // weights and their scores' gradients, [key tile][query step]: left tiles
  Buffer<uint16_t> ds_right;  // [query tile][key step]: right tiles

  explicit KeyBlock(int64_t depth)
      : rows(buffer<uint16_t>(kBackwardKeys * depth)),
        values(buffer<uint16_t>(kBackwardKeys * depth)),
        columns(buffer<uint16_t>(kBackwardKeys * depth)),
        dk(buffer<float>(kBackwardKeys * depth)),
        dv(buffer<float>(kBackwardKeys * depth)),
        p(buffer<uint16_t>(kBackwardKeys * kBackwardQueries)),
        ds(buffer<uint16_t>(kBackwardKeys * kBackwardQueries)),
        ds_right(buffer<uint16_t>(kBackwardKeys * kBackwardQueries)) {}
};

// sums[i][j] += the products over `steps`; [M tiles][N tiles], each tile's neighbours m_stride and n_stride tiles away.
void accumulate(float* sums, int64_t m, int64_t n, int64_t m_stride, int64_t n_stride, const uint16_t* left,
                int64_t left_tile, int64_t left_step, const uint16_t* right, int64_t right_tile, int64_t right_step,
                int64_t steps) {
  for (int64_t i = 0; i < m; i += 2)
    for (int64_t j = 0; j < n; j += 2) {
      float* at = sums + (i * m_stride + j * n_stride) * kTile;
      const uint16_t *a = left + i * left_tile * kStep, *b = right + j * right_tile * kStep;
      load_tiles<2, 2>(at, m_stride * kTile, n_stride * kTile);
      multiply<2, 2>(a, a + left_tile * kStep, kDepth * 2, left_step * kStep, b, b + right_tile * kStep,
                     right_step * kStep, steps);
      store_tiles<2, 2>(at, m_stride * kTile, n_stride * kTile);
    }
}

// Adds one block of keys' share to dq, and sums up their dk and dv.
void pass_queries(const AmxAttention& s, const Queries& all, KeyBlock& block, int64_t valid, float* dq) {
  constexpr int64_t kQuerySteps = kBackwardQueries / kDepth, kKeySteps = kBackwardKeys / kDepth;
  const int64_t depth = round_up(s.depth, kDepth), steps = depth / kDepth, across = depth / kColumns;
  const int64_t rows = round_up(s.queries, kDepth), key_steps = ceil_div(valid, kDepth);
  const __m512 factor = _mm512_set1_ps(std::fabs(s.scale) * kLog2E);
  alignas(64) float products[2][2][kPair];  // of 32 keys and 32 queries: scores, and the gradients of their weights

  for (int64_t first = 0; first < rows; first += kBackwardQueries) {
    const int64_t query_steps = std::min(kQuerySteps, (rows - first) / kDepth), pairs = key_steps * query_steps;
    for (int64_t t = 0; t <= pairs; ++t) {  // a pair's products run between the exponentials of the one before
      const int64_t key = t / query_steps * kDepth * depth, query = (first + t % query_steps * kDepth) * depth;
      const int64_t i = (t - 1) / query_steps, j = (t - 1) % query_steps;
      const float *scores = products[(t - 1) & 1][0], *slopes = products[(t - 1) & 1][1];
      __m512 lse[2], delta[2];
      for (int64_t n = 0; n < 2 && t > 0; ++n) {
        lse[n] = _mm512_loadu_ps(all.lse.get() + first + j * kDepth + n * kColumns);
        delta[n] = _mm512_loadu_ps(all.delta.get() + first + j * kDepth + n * kColumns);
      }
      auto weigh = [&](int64_t row) {  // two keys
        __m512i rows_of_ds[2];
        for (int64_t m = 0; m < 2; ++m) {
          const int64_t tile = (row + m) / kRows, from = tile * 2 * kTile + (row + m) % kRows * kColumns;
          const int64_t to = ((i * 2 + tile) * kQuerySteps + j) * kStep + (row + m) % kRows * kDepth;
          __m512 weight[2], slope[2];
          for (int64_t n = 0; n < 2; ++n) {
            weight[n] = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(scores + from + n * kTile), factor, lse[n]));
            slope[n] = _mm512_mul_ps(weight[n], _mm512_sub_ps(_mm512_load_ps(slopes + from + n * kTile), delta[n]));
            if (i * kDepth + row + m >= valid) weight[n] = slope[n] = _mm512_setzero_ps();
          }
          rows_of_ds[m] = rounded(slope[0], slope[1]);
          _mm512_store_si512(block.p.get() + to, rounded(weight[0], weight[1]));
          _mm512_store_si512(block.ds.get() + to, rows_of_ds[m]);
        }
        uint16_t* to = block.ds_right.get() + (j * 2 * kKeySteps + i) * kStep + row / 2 * kDepth;
        _mm512_store_si512(to, interleave_half<false>(rows_of_ds[0], rows_of_ds[1]));
        _mm512_store_si512(to + kKeySteps * kStep, interleave_half<true>(rows_of_ds[0], rows_of_ds[1]));
      };
      for (int64_t step = 0; step < steps; ++step) {
        if (t < pairs)
          multiply_pair(block.rows.get() + key, all.q_columns.get() + query, depth, step, products[t & 1][0]);
        for (int64_t row = 8 * step / steps; row < 8 * (step + 1) / steps && t > 0; ++row) weigh(2 * row);
      }
      for (int64_t step = 0; step < steps; ++step) {
        if (t < pairs)
          multiply_pair(block.values.get() + key, all.grad_columns.get() + query, depth, step, products[t & 1][1]);
        for (int64_t row = 8 * step / steps; row < 8 * (step + 1) / steps && t > 0; ++row) weigh(16 + 2 * row);
      }
      fence();
    }
    const uint16_t *q = all.q_depth.get() + first * depth, *grad = all.grad_depth.get() + first * depth;
    const int64_t tiles = key_steps * 2;
    accumulate(block.dv.get(), tiles, across, across, 1, block.p.get(), kQuerySteps, 1, grad, 1, across, query_steps);
    accumulate(block.dk.get(), tiles, across, across, 1, block.ds.get(), kQuerySteps, 1, q, 1, across, query_steps);
    accumulate(dq + first * depth, across, query_steps * 2, 1, across, block.columns.get(), 1, across,
               block.ds_right.get(), kKeySteps, 1, key_steps);
    fence();
  }
}

// Rows of the sums [key tile][depth by 16][16][16], times a factor.
void write_rows(const float* sums, float factor, int64_t rows, int64_t depth, uint16_t* to, int64_t stride) {
  const int64_t across = round_up(depth, kDepth) / kColumns;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < depth; d += kColumns) {
      const float* from = sums + (i / kRows * across + d / kColumns) * kTile + i % kRows * kColumns;
      __m512 x = _mm512_mul_ps(_mm512_loadu_ps(from), _mm512_set1_ps(factor));
      _mm256_mask_storeu_epi16(to + i * stride + d, first16(depth - d),
                               reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
    }
}

}  // namespace

void amx_attention_backward(const AmxAttention& s, Input grad, Input q, Input k, Input v, Input o, const float* lse,
                            Output dq, Output dk, Output dv) {
  const int64_t depth = round_up(s.depth, kDepth), rows = round_up(s.queries, kDepth), heads = s.batch * s.heads;
  const int64_t blocks = ceil_div(s.keys, kBackwardKeys);
  const int64_t segments = std::min(ceil_div(kUnits, heads), blocks);
  Buffer<float> partial = buffer<float>(segments > 1 ? heads * segments * rows * depth : 0);

  // The sum of the segments' dq [query tile][depth by 16][16][16 queries] is left in the first one.
  auto write_dq = [&](int64_t head, float* sums, int64_t count, int64_t tile) {
    float* at = sums + tile * kColumns * depth;
    for (int64_t segment = 1; segment < count; ++segment)
      for (int64_t i = 0; i < kColumns * depth; i += 16) {
        const __m512 other = _mm512_loadu_ps(at + segment * rows * depth + i);
        _mm512_storeu_ps(at + i, _mm512_add_ps(_mm512_loadu_ps(at + i), other));
      }
    const int64_t row = tile * kColumns;
    write_transposed(at, kTile, _mm512_set1_ps(s.scale), s.queries - row, s.depth,
                     dq.at(head / s.heads, head % s.heads, row), dq.row);
  };

  parallel(heads * segments, [&](int64_t begin, int64_t end) {
    Tiles registers;
    registers.configure(kRows, kDepth);
    Queries all(rows, depth);
    KeyBlock block(depth);
    Buffer<float> own = buffer<float>(segments > 1 ? 0 : rows * depth);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / segments, segment = unit % segments, b = head / s.heads, h = head % s.heads;
      if (unit == begin || segment == 0) all.pack(s, grad, q, o, lse, b, h);
      float* sums = segments > 1 ? partial.get() + unit * rows * depth : own.get();
      std::memset(sums, 0, rows * depth * sizeof(float));
      for (int64_t i = blocks * segment / segments; i < blocks * (segment + 1) / segments; ++i) {
        const int64_t first = i * kBackwardKeys, valid = std::min(kBackwardKeys, s.keys - first);
        pack_rows(k.at(b, h, first), k.row, valid, s.depth, block.rows.get());
        pack_rows(v.at(b, h, first), v.row, valid, s.depth, block.values.get());
        pack_depth<true>(k.at(b, h, first), k.row, valid, s.depth, block.columns.get());
        std::memset(block.dk.get(), 0, kBackwardKeys * depth * sizeof(float));
        std::memset(block.dv.get(), 0, kBackwardKeys * depth * sizeof(float));
        fence();
        pass_queries(s, all, block, valid, sums);
        write_rows(block.dk.get(), s.scale, valid, s.depth, dk.at(b, h, first), dk.row);
        write_rows(block.dv.get(), 1.f, valid, s.depth, dv.at(b, h, first), dv.row);
      }
      if (segments == 1)
        for (int64_t tile = 0; tile * kColumns < s.queries; ++tile) write_dq(head, sums, 1, tile);
    }
  });
  if (segments == 1) return;
  const int64_t tiles = ceil_div(s.queries, kColumns);
  parallel(heads * tiles, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      write_dq(i / tiles, partial.get() + i / tiles * segments * rows * depth, segments, i % tiles);
  });
}

}  // namespace vmae

#include "amx_end.h"

#else

namespace vmae {

void amx_attention_forward(const AmxAttention&, Rows<const uint16_t>, Rows<const uint16_t>, Rows<const uint16_t>,
                           Rows<uint16_t>, float*) {}
void amx_attention_backward(const AmxAttention&, Rows<const uint16_t>, Rows<const uint16_t>, Rows<const uint16_t>,
                            Rows<const uint16_t>, Rows<const uint16_t>, const float*, Rows<uint16_t>, Rows<uint16_t>,
                            Rows<uint16_t>) {}

}  // namespace vmae

#endif

namespace vmae {

bool amx_attention_supported(const AmxAttention& s) {
  return s.batch > 0 && s.heads > 0 && s.queries > 0 && s.keys > 0 && s.depth >= 16 && s.depth <= 128;
}

}  // namespace vmae
