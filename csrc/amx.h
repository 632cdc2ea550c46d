// AMX: what its users share. A tile holds up to 16 rows of 64 bytes; one instruction adds the product of a left tile,
// 16 x 32 bfloat16, and a right tile, 32 x 16 with each pair of its rows interleaved, to 16 x 16 fp32.
// Denormal numbers count as zeros.
#pragma once

namespace vmae {

// Whether processor, operating system and build have AMX for bfloat16, with AVX512-BF16 beside it. The first
// call asks Linux for the permission to use AMX, which holds for the process.
bool amx_available();

}  // namespace vmae

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 11))
#define VMAE_AMX 1

#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "amx_begin.h"

namespace vmae {

constexpr int64_t kRows = 16, kColumns = 16, kDepth = 32;  // of a left tile; a right tile has kDepth x kColumns
constexpr int64_t kTile = kRows * kColumns;                // fp32 numbers of a result tile

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Uninitialised memory, aligned to cache lines.
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> buffer(int64_t count) {
  constexpr int64_t kHuge = 2 << 20;
  const int64_t bytes = std::max<int64_t>(count, 1) * sizeof(T), alignment = bytes < kHuge / 2 ? 64 : kHuge;
  void* p = std::aligned_alloc(alignment, round_up(bytes, alignment));
  if (!p) throw std::bad_alloc();
  if (alignment == kHuge) madvise(p, round_up(bytes, alignment), MADV_HUGEPAGE);  // or every 4 KiB cost a page fault
  return Buffer<T>(static_cast<T*>(p));
}

// ---- Tiles ----------------------------------------------------------------------------------------------------------

// GCC's tile intrinsics do not tell it which memory they read: what was written before must not move past this.
inline void fence() { asm volatile("" ::: "memory"); }

// The calling thread's tile registers: 0-3 for results, `rows` x 16; 4-5 for left operands, rows x depth; 6-7 for right
// ones. Released at the end, as oneDNN uses AMX in the same threads.
class Tiles {
 public:
  ~Tiles() { _tile_release(); }

  void configure(int64_t rows, int64_t depth) {
    if (rows == rows_ && depth == depth_) return;
    rows_ = rows, depth_ = depth;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? depth * 2 : kColumns * 4);
      config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : depth / 2);
    }
    asm volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
  }

 private:
  int64_t rows_ = 0, depth_ = 0;
};

template <int M, int N>
void zero_tiles() {
  _tile_zero(0);
  if constexpr (N > 1) _tile_zero(1);
  if constexpr (M > 1) _tile_zero(2);
  if constexpr (M > 1 && N > 1) _tile_zero(3);
}

// Result tile i * N + j is at results + i * row_stride + j * column_stride.
template <int M, int N>
void load_tiles(const float* results, int64_t row_stride, int64_t column_stride) {
  _tile_loadd(0, results, kColumns * 4);
  if constexpr (N > 1) _tile_loadd(1, results + column_stride, kColumns * 4);
  if constexpr (M > 1) _tile_loadd(2, results + row_stride, kColumns * 4);
  if constexpr (M > 1 && N > 1) _tile_loadd(3, results + row_stride + column_stride, kColumns * 4);
}

template <int M, int N>
void store_tiles(float* results, int64_t row_stride, int64_t column_stride) {
  _tile_stored(0, results, kColumns * 4);
  if constexpr (N > 1) _tile_stored(1, results + column_stride, kColumns * 4);
  if constexpr (M > 1) _tile_stored(2, results + row_stride, kColumns * 4);
  if constexpr (M > 1 && N > 1) _tile_stored(3, results + row_stride + column_stride, kColumns * 4);
}

// Adds M x N tiles of products, one after another in depth. Step s has its left tiles at left0 and left1 + s * left_step
// elements, with rows left_stride bytes apart, and its right ones at right0 and right1 + s * right_step.
template <int M, int N>
inline __attribute__((always_inline)) void multiply(const uint16_t* left0, const uint16_t* left1, int64_t left_stride,
                                                    int64_t left_step, const uint16_t* right0, const uint16_t* right1,
                                                    int64_t right_step, int64_t steps) {
  for (; steps > 0; --steps, left0 += left_step, left1 += left_step, right0 += right_step, right1 += right_step) {
    _tile_loadd(4, left0, left_stride);
    _tile_loadd(6, right0, kColumns * 4);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 1) {
      _tile_loadd(7, right1, kColumns * 4);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (M > 1) {
      _tile_loadd(5, left1, left_stride);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
  }
}

// ---- Vectors --------------------------------------------------------------------------------------------------------

inline uint64_t lowest(int64_t count, int64_t most) { return (1ull << std::clamp<int64_t>(count, 0, most)) - 1; }
inline __mmask16 first16(int64_t count) { return static_cast<__mmask16>(lowest(count, 16)); }
inline __mmask32 first32(int64_t count) { return static_cast<__mmask32>(lowest(count, 32)); }

inline __m256i load16(const uint16_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }

// a0 b0 a1 b1 ...: a row of a right tile.
inline __m512i interleave(__m256i a, __m256i b) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), both);
}

// The 16 x 16 transpose of 32-bit numbers, in place.
inline void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // Now r[4 a + c] has, in its 128-bit lane l, rows 4 a to 4 a + 3 of column 4 l + c.
  for (int c = 0; c < 4; ++c) {
    __m512i low01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x44), high01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xee);
    __m512i low23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x44);
    __m512i high23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xee);
    t[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    t[8 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

inline __m512 to_float(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

constexpr float kLog2E = 1.44269504f;

// 2^x to 9e-5 of it, which rounding to bfloat16 hides; exact where x is whole.
inline __m512 exp2_of(__m512 x) {
  __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.0770671740f), _mm512_set1_ps(0.227644847f));
  p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(0.695116819f));
  p = _mm512_fmadd_ps(f, p, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p, x);  // by 2^floor(x)
}

// exp of y between -104 and 104, to about one unit in the last place: 2^n * a polynomial on half a binade about 1.
inline __m512 exp_of(__m512 y) {
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(y, _mm512_set1_ps(kLog2E)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), y);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 e = _mm512_set1_ps(1.f / 720);
  for (float factor : {1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f})
    e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(factor));
  return _mm512_scalef_ps(e, n);
}

}  // namespace vmae

#include "amx_end.h"

#endif
