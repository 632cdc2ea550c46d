// Linear layers as products of AMX tiles, in squares of 2 x 2 of them.
//
// The right operand is packed first, whole, by all threads, in panels of 32 columns. Then 32 rows at a time of the left
// one, read where they lie if they can be, pass by as many panels as fit the second cache, in parts of their depth that
// fit the first.
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
constexpr int64_t kNear = 8;               // steps of depth whose rows and panel stay in the first cache
constexpr int64_t kDeep = 64;              // steps beyond which going through rows in parts costs more than it saves
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

  // Those from `first` on, at 32 numbers of depth from `d` on.
  void pack(int64_t first, int64_t d, uint16_t* to) const {
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

// In the order in which x lies, or most of what is read would be waited for.
template <class T>
Buffer<uint16_t> pack_all(const T& operand) {
  const int64_t steps = ceil_div(operand.depth, kDepth), panels = ceil_div(operand.count, kSide);
  const int64_t outer = T::deep ? steps : panels, inner = T::deep ? panels : steps;
  auto packed = buffer<uint16_t>(panels * steps * 2 * kStep);
  parallel(outer, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < inner; ++j) {
        const int64_t p = T::deep ? j : i, s = T::deep ? i : j;
        operand.pack(p * kSide, s * kDepth, packed.get() + (p * steps + s) * 2 * kStep);
      }
  });
  return packed;
}

constexpr auto kNothing = [](int64_t, int64_t) {};

// finish(row, column, square) is given, one by one, the squares of the product of `left` and `right`; before each is
// multiplied, ahead(row, column) may ask for memory that `finish` reads.
template <class Left, class Right, class Finish, class Ahead = decltype(kNothing)>
void multiply_all(const Left& left, const Right& right, Finish finish, Ahead ahead = kNothing) {
  const int64_t steps = ceil_div(left.depth, kDepth), panel = steps * 2 * kStep;
  const int64_t panels = ceil_div(right.count, kSide), squares = ceil_div(left.count, kSide);
  const int64_t groups = ceil_div(panels, std::max<int64_t>(kGroup / panel, 1)), group = ceil_div(panels, groups);
  const int64_t parts = steps > kDeep ? 1 : ceil_div(steps, kNear);
  const auto packed = pack_all(right);
  const auto turned = Left::deep ? pack_all(left) : nullptr;  // once: to transpose costs more than to copy rows
  parallel(groups * squares, [&](int64_t begin, int64_t end) {
    Tiles tiles;
    tiles.configure(kRows, kDepth);
    const auto copy = buffer<uint16_t>(panel);
    const auto sums = buffer<float>((parts > 1 ? group : 1) * kSide * kSide);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % squares * kSide, last = std::min((i / squares + 1) * group, panels);
      const uint16_t* rows = turned.get() + i % squares * panel;
      int64_t row = kDepth, step = 2 * kStep;
      if (left.lies(first)) {
        rows = left.x.data + first * left.x.stride, row = left.x.stride, step = kDepth;
      } else if (!turned) {
        for (int64_t s = 0; s < steps; ++s) left.pack(first, s * kDepth, copy.get() + s * 2 * kStep);
        rows = copy.get();
      }
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t from = steps * part / parts, count = steps * (part + 1) / parts - from;
        float* square = sums.get();
        for (int64_t p = i / squares * group; p < last; ++p) {
          const uint16_t* columns = packed.get() + p * panel + from * 2 * kStep;
          if (part == parts - 1) ahead(first, p * kSide);
          fence();
          part ? load_tiles<2, 2>(square, 2 * kTile, kTile) : zero_tiles<2, 2>();
          multiply<2, 2>(rows + from * step, rows + kRows * row + from * step, row * 2, step, columns, columns + kStep,
                         2 * kStep, count);
          store_tiles<2, 2>(square, 2 * kTile, kTile);
          fence();
          if (part == parts - 1) finish(first, p * kSide, square);
          if (parts > 1) square += kSide * kSide;
        }
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

__m512i rounded(const Row& row) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(row.high, row.low)); }

// GELU, x times the normal distribution up to x, and its derivative; to 1.5e-4 of it, which rounding to bfloat16 hides.
template <bool DERIVATIVE>
struct Gelu {
  __m512 value, derivative;

  explicit Gelu(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.f);
    const __m512 e = exp2_of(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.5f * kLog2E)));
    // erfc(|x| / sqrt 2) / 2 is e times a polynomial of t = 1 / (1 + 0.376 |x|), fitted to 3e-5 of it up to |x| = 13.
    const __m512 z = _mm512_min_ps(_mm512_abs_ps(x), _mm512_set1_ps(100.f));  // of infinity the next lines make NaN
    const __m512 s = _mm512_fmadd_ps(z, _mm512_set1_ps(0.375755055f), one);
    __m512 t = _mm512_rcp14_ps(s), p = _mm512_set1_ps(-0.0911914915f);
    t = _mm512_mul_ps(t, _mm512_fnmadd_ps(s, t, _mm512_set1_ps(2.f)));
    for (float factor : {0.199974590f, 0.0837739035f, 0.158075854f, 0.149353611f})
      p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(factor));
    const __m512 tail = _mm512_mul_ps(e, _mm512_mul_ps(p, t));
    const __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __m512 below = _mm512_mask_sub_ps(tail, positive, one, tail);
    value = _mm512_mul_ps(x, below);
    if constexpr (DERIVATIVE)
      derivative = _mm512_fmadd_ps(_mm512_mul_ps(x, e), _mm512_set1_ps(0.398942280f), below);
  }
};

// Writes squares, after adding `bias` to each row, if there is any; and their GELU, if it is asked for.
template <class T>
auto rounded_to(uint16_t* y, int64_t rows, int64_t columns, const T* bias, uint16_t* activated = nullptr) {
  return [=](int64_t row, int64_t column, const float* square) {
    const int64_t width = columns - column;
    __m512 low = _mm512_setzero_ps(), high = low;
    if (bias) low = as_float(bias + column, width), high = as_float(bias + column + 16, width - 16);
    for (int64_t i = 0; i < std::min(kSide, rows - row); ++i) {
      const int64_t at = (row + i) * columns + column;
      Row sums(square, i);
      sums.low = _mm512_add_ps(sums.low, low), sums.high = _mm512_add_ps(sums.high, high);
      const __m512i both = rounded(sums);
      _mm512_mask_storeu_epi16(y + at, first32(width), both);
      if (!activated) continue;
      sums.low = Gelu<false>(to_float(_mm512_castsi512_si256(both))).value;
      sums.high = Gelu<false>(to_float(_mm512_extracti64x4_epi64(both, 1))).value;
      _mm512_mask_storeu_epi16(activated + at, first32(width), rounded(sums));
    }
  };
}

}  // namespace

template <class T>
void amx_linear(const AmxLinear& s, Matrix<const uint16_t> x, Matrix<const T> w, const T* bias, uint16_t* y,
                uint16_t* activated) {
  multiply_all(Operand<false, false, uint16_t>{x, s.rows, s.inputs}, Operand<true, false, T>{w, s.outputs, s.inputs},
               rounded_to(y, s.rows, s.outputs, bias, activated));
}

template <class T>
void amx_linear_input_gradient(const AmxLinear& s, Matrix<const uint16_t> dy, Matrix<const T> w, uint16_t* dx) {
  multiply_all(Operand<false, false, uint16_t>{dy, s.rows, s.outputs}, Operand<true, true, T>{w, s.inputs, s.outputs},
               rounded_to<float>(dx, s.rows, s.inputs, nullptr));
}

template <class T>
void amx_linear_gelu_gradient(const AmxLinear& s, Matrix<const uint16_t> dy, Matrix<const T> w, const uint16_t* before,
                              uint16_t* dbefore, uint16_t* activated) {
  auto finish = [=](int64_t row, int64_t column, const float* square) {
    const int64_t width = s.inputs - column;
    for (int64_t i = 0; i < std::min(kSide, s.rows - row); ++i) {
      const int64_t at = (row + i) * s.inputs + column;
      const Gelu<true> low(as_float(before + at, width)), high(as_float(before + at + 16, width - 16));
      Row numbers(square, i);
      numbers.low = _mm512_mul_ps(numbers.low, low.derivative);
      numbers.high = _mm512_mul_ps(numbers.high, high.derivative);
      _mm512_mask_storeu_epi16(dbefore + at, first32(width), rounded(numbers));
      numbers.low = low.value, numbers.high = high.value;
      _mm512_mask_storeu_epi16(activated + at, first32(width), rounded(numbers));
    }
  };
  auto ahead = [=](int64_t row, int64_t column) {
    for (int64_t i = row; i < std::min(row + kSide, s.rows); ++i)
      _mm_prefetch(reinterpret_cast<const char*>(before + i * s.inputs + column), _MM_HINT_T0);
  };
  multiply_all(Operand<false, false, uint16_t>{dy, s.rows, s.outputs}, Operand<true, true, T>{w, s.inputs, s.outputs},
               finish, ahead);
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
void amx_linear(const AmxLinear&, Matrix<const uint16_t>, Matrix<const T>, const T*, uint16_t*, uint16_t*) {}

template <class T>
void amx_linear_input_gradient(const AmxLinear&, Matrix<const uint16_t>, Matrix<const T>, uint16_t*) {}

template <class T>
void amx_linear_gelu_gradient(const AmxLinear&, Matrix<const uint16_t>, Matrix<const T>, const uint16_t*, uint16_t*,
                              uint16_t*) {}

void amx_linear_weight_gradient(const AmxLinear&, Matrix<const uint16_t>, Matrix<const uint16_t>, float*, float*) {}

}  // namespace vmae

#endif

namespace vmae {

#define VMAE_OF(T)                                                                                                  \
  template void amx_linear(const AmxLinear&, Matrix<const uint16_t>, Matrix<const T>, const T*, uint16_t*,           \
                           uint16_t*);                                                                               \
  template void amx_linear_input_gradient(const AmxLinear&, Matrix<const uint16_t>, Matrix<const T>, uint16_t*);    \
  template void amx_linear_gelu_gradient(const AmxLinear&, Matrix<const uint16_t>, Matrix<const T>, const uint16_t*, \
                                         uint16_t*, uint16_t*);
VMAE_OF(float)
VMAE_OF(uint16_t)
#undef VMAE_OF

}  // namespace vmae
