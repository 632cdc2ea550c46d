// Linear layers as products of AMX tiles, in squares of 2 x 2 of them.
//
// The right operand is packed first, whole, by all threads, in panels of 32 columns. Then 32 rows at a time of the left
// one, read where they lie if they can be, pass by as many panels as fit the second cache.
#include "amx_linear.h"

#include "amx.h"

#ifdef VMAE_AMX

#include <cstring>

#include "parallel.h"

#include "amx_begin.h"

namespace vmae {
namespace {

constexpr int64_t kStep = kRows * kDepth;  // numbers of a left or right tile
constexpr int64_t kSide = 2 * kRows;       // of the squares of 2 x 2 result tiles
constexpr int64_t kGroup = 1 << 19;        // numbers of panels that stay in the second cache
constexpr int64_t kLongest = 64 * kDepth;  // tokens that are summed at a time, so that the operands' copies stay small

// 16 or 32 numbers as bfloat16, of which there are `count`; the others are zeros.
__m256i sixteen(const uint16_t* x, int64_t count) { return _mm256_maskz_loadu_epi16(first16(count), x); }

__m256i sixteen(const float* x, int64_t count) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first16(count), x)));
}

__m512i thirty_two(const uint16_t* x, int64_t count) { return _mm512_maskz_loadu_epi16(first32(count), x); }

__m512i thirty_two(const float* x, int64_t count) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(first16(count - 16), x + 16),
                                                       _mm512_maskz_loadu_ps(first16(count), x)));
}

void store(const __m512i* rows, uint16_t* to) {
  for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * kDepth, rows[i]);
}

// Tiles of 16 rows of `x`, or as many as there are, and of 32 of its columns.
template <bool RIGHT, class T>
void pack_rows(Matrix<const T> x, int64_t rows, int64_t columns, uint16_t* to) {
  __m512i t[16];
  for (int64_t i = 0; i < 16; ++i)
    t[i] = i < rows ? thirty_two(x.data + i * x.stride, columns) : _mm512_setzero_si512();
  if constexpr (RIGHT) transpose(t);
  store(t, to);
}

// Tiles of 32 rows of `x`, which are their depth, and of 16 of its columns.
template <bool RIGHT, class T>
void pack_depth(Matrix<const T> x, int64_t rows, int64_t columns, uint16_t* to) {
  __m512i t[16];
  for (int64_t i = 0; i < 16; ++i) {
    const T* from = x.data + 2 * i * x.stride;
    t[i] = interleave(2 * i < rows ? sixteen(from, columns) : _mm256_setzero_si256(),
                      2 * i + 1 < rows ? sixteen(from + x.stride, columns) : _mm256_setzero_si256());
  }
  if constexpr (!RIGHT) transpose(t);
  store(t, to);
}

// An operand of which 32 rows (of a left one) or columns (of a right one) at a time are packed: [depth by 32][2] tiles.
// DEEP: the depth is x's rows.
template <bool RIGHT, bool DEEP, class T>
struct Operand {
  static constexpr bool deep = DEEP;
  Matrix<const T> x;
  int64_t count, depth;

  void pack(int64_t first, uint16_t* to) const {
    for (int64_t d = 0; d < depth; d += kDepth)
      for (int64_t i = first; i < first + kSide; i += kRows, to += kStep) {
        if constexpr (DEEP)
          pack_depth<RIGHT>(Matrix<const T>{x.data + d * x.stride + i, x.stride}, depth - d, count - i, to);
        else
          pack_rows<RIGHT>(Matrix<const T>{x.data + i * x.stride + d, x.stride}, count - i, depth - d, to);
      }
  }

  // Whether 32 rows from `first` on are tiles where they lie.
  bool lies(int64_t first) const { return !DEEP && first + kSide <= count && depth % kDepth == 0; }
};

template <class T>
Buffer<uint16_t> pack_all(const T& operand) {
  const int64_t panel = round_up(operand.depth, kDepth) * kSide, panels = ceil_div(operand.count, kSide);
  auto packed = buffer<uint16_t>(panels * panel);
  parallel(panels, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) operand.pack(p * kSide, packed.get() + p * panel);
  });
  return packed;
}

// finish(row, column, square) is given, one by one, the squares of the product of `left` and `right`.
template <class Left, class Right, class Finish>
void multiply_all(const Left& left, const Right& right, Finish finish) {
  const int64_t steps = ceil_div(left.depth, kDepth), panel = steps * 2 * kStep;
  const int64_t panels = ceil_div(right.count, kSide), squares = ceil_div(left.count, kSide);
  const int64_t groups = ceil_div(panels, std::max<int64_t>(kGroup / panel, 1)), group = ceil_div(panels, groups);
  const auto packed = pack_all(right);
  const auto turned = Left::deep ? pack_all(left) : nullptr;  // once: to transpose costs more than to copy rows
  parallel(groups * squares, [&](int64_t begin, int64_t end) {
    Tiles tiles;
    tiles.configure(kRows, kDepth);
    const auto copy = buffer<uint16_t>(panel);
    alignas(64) float square[kSide * kSide];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % squares * kSide, last = std::min((i / squares + 1) * group, panels);
      const uint16_t* rows = turned.get() + i % squares * panel;
      int64_t row = kDepth, step = 2 * kStep;
      if (left.lies(first)) {
        rows = left.x.data + first * left.x.stride, row = left.x.stride, step = kDepth;
      } else if (!turned) {
        left.pack(first, copy.get());
        rows = copy.get();
      }
      for (int64_t p = i / squares * group; p < last; ++p) {
        const uint16_t* columns = packed.get() + p * panel;
        fence();
        zero_tiles<2, 2>();
        multiply<2, 2>(rows, rows + kRows * row, row * 2, step, columns, columns + kStep, 2 * kStep, steps);
        store_tiles<2, 2>(square, 2 * kTile, kTile);
        fence();
        finish(first, p * kSide, square);
      }
    }
  });
}

// What a square has of its row i: 16 numbers and 16 more.
struct Row {
  __m512 low, high;

  Row(const float* square, int64_t i) {
    const float* at = square + (i / kRows) * 2 * kTile + i % kRows * kColumns;
    low = _mm512_loadu_ps(at), high = _mm512_loadu_ps(at + kTile);
  }
};

__m512 as_float(const float* x, int64_t count) { return _mm512_maskz_loadu_ps(first16(count), x); }
__m512 as_float(const uint16_t* x, int64_t count) { return to_float(sixteen(x, count)); }

// Writes squares, and adds `bias`, if there is any, to each row.
template <class T>
auto rounded_to(uint16_t* y, int64_t rows, int64_t columns, const T* bias) {
  return [=](int64_t row, int64_t column, const float* square) {
    const int64_t width = columns - column;
    __m512 low = _mm512_setzero_ps(), high = low;
    if (bias) low = as_float(bias + column, width), high = as_float(bias + column + 16, width - 16);
    for (int64_t i = 0; i < std::min(kSide, rows - row); ++i) {
      const Row sums(square, i);
      const auto both = _mm512_cvtne2ps_pbh(_mm512_add_ps(sums.high, high), _mm512_add_ps(sums.low, low));
      _mm512_mask_storeu_epi16(y + (row + i) * columns + column, first32(width), reinterpret_cast<__m512i>(both));
    }
  };
}

}  // namespace

template <class T>
void amx_linear(const AmxLinear& s, Matrix<const uint16_t> x, Matrix<const T> w, const T* bias, uint16_t* y) {
  multiply_all(Operand<false, false, uint16_t>{x, s.rows, s.inputs}, Operand<true, false, T>{w, s.outputs, s.inputs},
               rounded_to(y, s.rows, s.outputs, bias));
}

template <class T>
void amx_linear_input_gradient(const AmxLinear& s, Matrix<const uint16_t> dy, Matrix<const T> w, uint16_t* dx) {
  multiply_all(Operand<false, false, uint16_t>{dy, s.rows, s.outputs}, Operand<true, true, T>{w, s.inputs, s.outputs},
               rounded_to<float>(dx, s.rows, s.inputs, nullptr));
}

void amx_linear_weight_gradient(const AmxLinear& s, Matrix<const uint16_t> dy, Matrix<const uint16_t> x, float* dw,
                                float* dbias) {
  if (dbias)
    parallel(ceil_div(s.outputs, kSide), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin * kSide; c < std::min(end * kSide, s.outputs); c += kSide) {
        const int64_t width = s.outputs - c;
        __m512 low = _mm512_setzero_ps(), high = low;
        for (int64_t i = 0; i < s.rows; ++i) {
          const uint16_t* from = dy.data + i * dy.stride + c;
          low = _mm512_add_ps(low, as_float(from, width)), high = _mm512_add_ps(high, as_float(from + 16, width - 16));
        }
        _mm512_mask_storeu_ps(dbias + c, first16(width), low);
        _mm512_mask_storeu_ps(dbias + c + 16, first16(width - 16), high);
      }
    });
  if (!s.rows) std::memset(dw, 0, s.outputs * s.inputs * sizeof(float));
  for (int64_t first = 0; first < s.rows; first += kLongest) {
    const int64_t depth = std::min(kLongest, s.rows - first);
    multiply_all(
        Operand<false, true, uint16_t>{{dy.data + first * dy.stride, dy.stride}, s.outputs, depth},
        Operand<true, true, uint16_t>{{x.data + first * x.stride, x.stride}, s.inputs, depth},
        [&](int64_t row, int64_t column, const float* square) {
          const __mmask16 low = first16(s.inputs - column), high = first16(s.inputs - column - 16);
          for (int64_t i = 0; i < std::min(kSide, s.outputs - row); ++i) {
            Row sums(square, i);
            float* to = dw + (row + i) * s.inputs + column;
            if (first) {
              sums.low = _mm512_add_ps(sums.low, _mm512_maskz_loadu_ps(low, to));
              sums.high = _mm512_add_ps(sums.high, _mm512_maskz_loadu_ps(high, to + 16));
            }
            _mm512_mask_storeu_ps(to, low, sums.low);
            _mm512_mask_storeu_ps(to + 16, high, sums.high);
          }
        });
  }
}

}  // namespace vmae

#include "amx_end.h"

#else

namespace vmae {

template <class T>
void amx_linear(const AmxLinear&, Matrix<const uint16_t>, Matrix<const T>, const T*, uint16_t*) {}

template <class T>
void amx_linear_input_gradient(const AmxLinear&, Matrix<const uint16_t>, Matrix<const T>, uint16_t*) {}

void amx_linear_weight_gradient(const AmxLinear&, Matrix<const uint16_t>, Matrix<const uint16_t>, float*, float*) {}

}  // namespace vmae

#endif

namespace vmae {

template void amx_linear(const AmxLinear&, Matrix<const uint16_t>, Matrix<const float>, const float*, uint16_t*);
template void amx_linear(const AmxLinear&, Matrix<const uint16_t>, Matrix<const uint16_t>, const uint16_t*, uint16_t*);
template void amx_linear_input_gradient(const AmxLinear&, Matrix<const uint16_t>, Matrix<const float>, uint16_t*);
template void amx_linear_input_gradient(const AmxLinear&, Matrix<const uint16_t>, Matrix<const uint16_t>, uint16_t*);

}  // namespace vmae
