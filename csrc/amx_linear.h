// y = x w^T + bias and its gradients, in bfloat16 on CPUs with Intel AMX.
//
// x [rows, inputs] and y [rows, outputs] are bfloat16 (as uint16_t), w [outputs, inputs] and bias [outputs] fp32 or
// bfloat16: what is fp32 is rounded to bfloat16 where it is multiplied, and not copied before. Rows lie `stride` apart.
// Sums are of fp32 and rounded once, in an order that does not depend on the number of threads.
#pragma once

#include <cstdint>

namespace vmae {

struct AmxLinear {
  int64_t rows, inputs, outputs;
};

// Numbers that lie side by side in rows that do not have to.
template <class T>
struct Matrix {
  T* data;
  int64_t stride;
};

// And activated = GELU(y), unless it is null.
template <class T>  // float or uint16_t
void amx_linear(const AmxLinear& sizes, Matrix<const uint16_t> x, Matrix<const T> w, const T* bias, uint16_t* y,
                uint16_t* activated);

template <class T>
void amx_linear_input_gradient(const AmxLinear& sizes, Matrix<const uint16_t> dy, Matrix<const T> w, uint16_t* dx);

// Of x = GELU(before): the gradient of `before`, and activated = x.
template <class T>
void amx_linear_gelu_gradient(const AmxLinear& sizes, Matrix<const uint16_t> dy, Matrix<const T> w,
                              const uint16_t* before, uint16_t* dbefore, uint16_t* activated);

// dw and, unless it is null, dbias.
void amx_linear_weight_gradient(const AmxLinear& sizes, Matrix<const uint16_t> dy, Matrix<const uint16_t> x, float* dw,
                                float* dbias);

}  // namespace vmae
