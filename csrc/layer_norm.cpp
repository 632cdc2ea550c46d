#include "layer_norm.h"

#include "amx.h"

#ifdef VMAE_AMX

#include <cmath>

#include "parallel.h"

#include "amx_begin.h"

namespace vmae {
namespace {

// each(c, mask, half) of 16 channels at a time; half is 0 or 1, in turns: sums of one need not wait for the other's.
template <class F>
inline __attribute__((always_inline)) void over(int64_t channels, F each) {
  int64_t c = 0;
  for (; c + 32 <= channels; c += 32) each(c, 0xffff, 0), each(c + 16, 0xffff, 1);
  for (; c < channels; c += 16) each(c, first16(channels - c), 0);
}

__m512 load(const float* x, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, x); }
__m512 load(const uint16_t* x, __mmask16 mask) { return to_float(_mm256_maskz_loadu_epi16(mask, x)); }

float mean_of(const __m512* sums, int64_t channels) {
  return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1])) / channels;
}

}  // namespace

void layer_norm(const LayerNorm& s, const float* x, const float* weight, const float* bias, uint16_t* y, float* stats) {
  parallel(s.rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* row = x + i * s.channels;
      __m512 sums[2] = {}, squares[2] = {};
      over(s.channels, [&](int64_t c, __mmask16 mask, int half) {
        sums[half] = _mm512_add_ps(sums[half], load(row + c, mask));
      });
      const float mean = mean_of(sums, s.channels);
      const __m512 shift = _mm512_set1_ps(mean);
      over(s.channels, [&](int64_t c, __mmask16 mask, int half) {
        const __m512 off = _mm512_maskz_sub_ps(mask, load(row + c, mask), shift);
        squares[half] = _mm512_fmadd_ps(off, off, squares[half]);
      });
      const float scale = 1 / std::sqrt(mean_of(squares, s.channels) + s.eps);
      stats[2 * i] = mean, stats[2 * i + 1] = scale;
      over(s.channels, [&](int64_t c, __mmask16 mask, int) {
        const __m512 normal = _mm512_mul_ps(_mm512_sub_ps(load(row + c, mask), shift), _mm512_set1_ps(scale));
        const __m512 result = _mm512_fmadd_ps(normal, load(weight + c, mask), load(bias + c, mask));
        _mm256_mask_storeu_epi16(y + i * s.channels + c, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(result)));
      });
    }
  });
}

void layer_norm_backward(const LayerNorm& s, const uint16_t* dy, const float* x, const float* weight,
                         const float* stats, float* dx, float* dweight, float* dbias) {
  // Rows are summed in parts, and then the parts: as many on any number of threads.
  const int64_t part = std::max<int64_t>(64, ceil_div(s.rows, 256)), parts = ceil_div(s.rows, part);
  const auto sums = buffer<float>(parts * 2 * s.channels);
  parallel(parts, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      float *weights = sums.get() + p * 2 * s.channels, *biases = weights + s.channels;
      std::fill(weights, weights + 2 * s.channels, 0.f);
      for (int64_t i = p * part; i < std::min((p + 1) * part, s.rows); ++i) {
        const float* row = x + i * s.channels;
        const uint16_t* grad = dy + i * s.channels;
        const __m512 shift = _mm512_set1_ps(stats[2 * i]), scale = _mm512_set1_ps(stats[2 * i + 1]);
        auto normal = [&](int64_t c, __mmask16 mask) {
          return _mm512_mul_ps(_mm512_maskz_sub_ps(mask, load(row + c, mask), shift), scale);
        };
        __m512 all[2] = {}, along[2] = {};  // of the gradient that reaches `normal`; and times `normal`
        over(s.channels, [&](int64_t c, __mmask16 mask, int half) {
          const __m512 g = _mm512_mul_ps(load(grad + c, mask), load(weight + c, mask));
          all[half] = _mm512_add_ps(all[half], g), along[half] = _mm512_fmadd_ps(g, normal(c, mask), along[half]);
        });
        const __m512 mean = _mm512_set1_ps(mean_of(all, s.channels));
        const __m512 slope = _mm512_set1_ps(mean_of(along, s.channels));
        over(s.channels, [&](int64_t c, __mmask16 mask, int) {
          const __m512 g = load(grad + c, mask), n = normal(c, mask);
          const __m512 centred = _mm512_fmsub_ps(g, load(weight + c, mask), mean);
          _mm512_mask_storeu_ps(dx + i * s.channels + c, mask,
                                _mm512_mul_ps(scale, _mm512_fnmadd_ps(n, slope, centred)));
          _mm512_mask_storeu_ps(weights + c, mask, _mm512_fmadd_ps(g, n, load(weights + c, mask)));
          _mm512_mask_storeu_ps(biases + c, mask, _mm512_add_ps(g, load(biases + c, mask)));
        });
      }
    }
  });
  over(s.channels, [&](int64_t c, __mmask16 mask, int) {
    __m512 weights = _mm512_setzero_ps(), biases = weights;
    for (int64_t p = 0; p < parts; ++p) {
      weights = _mm512_add_ps(weights, load(sums.get() + p * 2 * s.channels + c, mask));
      biases = _mm512_add_ps(biases, load(sums.get() + (p * 2 + 1) * s.channels + c, mask));
    }
    _mm512_mask_storeu_ps(dweight + c, mask, weights), _mm512_mask_storeu_ps(dbias + c, mask, biases);
  });
}

}  // namespace vmae

#include "amx_end.h"

#else

namespace vmae {

void layer_norm(const LayerNorm&, const float*, const float*, const float*, uint16_t*, float*) {}

void layer_norm_backward(const LayerNorm&, const uint16_t*, const float*, const float*, const float*, float*, float*,
                         float*) {}

}  // namespace vmae

#endif
