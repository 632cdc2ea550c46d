// A 3D convolution that is causal in time, and its gradients, in bfloat16 on CPUs with Intel AMX.
//
// Every tensor is bfloat16 (as uint16_t), dense and channels-last:
//   x        [batch, frames, height, width, channels]
//   cache    [batch, kt - st, height, width, channels]     the frames before x; null: zeros
//   weight   [outputs, kt, kh, kw, channels]
//   bias     [outputs]                                     null: zeros
//   y        [batch, frames / st, P, Q, outputs]           P = (height + 2 * (kh / 2) - kh) / sh + 1, Q likewise
// with dx, dcache, dweight and dy like x, cache, weight and y. Output (z, p, q) sees, through tap (r, u, v), the input
// at (z * st + r - (kt - st), p * sh + u - kh / 2, q * sw + v - kw / 2). Sums are of fp32 and rounded once, in an order
// that depends on neither the number of threads nor, but for dweight's, the number of frames or clips.
#pragma once

#include <cstdint>

namespace vmae {

struct AmxConvolution {
  int64_t batch, channels, outputs, frames, height, width;
  int64_t kernel[3], stride[3];  // time, height, width

  int64_t cache_frames() const { return kernel[0] - stride[0]; }
  int64_t output_frames() const { return frames / stride[0]; }
  int64_t output_height() const { return (height + 2 * (kernel[1] / 2) - kernel[1]) / stride[1] + 1; }
  int64_t output_width() const { return (width + 2 * (kernel[2] / 2) - kernel[2]) / stride[2] + 1; }
};

// Whether the functions below, which need amx_available(), take these sizes.
bool amx_supported(const AmxConvolution& sizes);

// y; silu: its SiLU. `cache` and `bias` may be null.
void amx_forward(const AmxConvolution& sizes, const uint16_t* x, const uint16_t* cache, const uint16_t* weight,
                 const uint16_t* bias, bool silu, uint16_t* y);

// dx and, unless null, dcache.
void amx_input_gradient(const AmxConvolution& sizes, const uint16_t* dy, const uint16_t* weight, uint16_t* dx,
                        uint16_t* dcache);

// dweight. `cache` may be null.
void amx_weight_gradient(const AmxConvolution& sizes, const uint16_t* x, const uint16_t* cache, const uint16_t* dy,
                         uint16_t* dweight);

}  // namespace vmae
