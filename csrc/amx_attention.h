// softmax(q k^T scale) v and its gradients, in bfloat16 on CPUs with Intel AMX.
//
// Every tensor is bfloat16 (as uint16_t), [batch, heads, rows, depth]: q, o, and their gradients of `queries` rows, k, v
// and theirs of `keys`. lse [batch, heads, queries], the natural logarithm of a query's sum of exponentials, is fp32.
// Sums are of fp32 and rounded once, in an order that does not depend on the number of threads.
#pragma once

#include <cstdint>

namespace vmae {

// Strides are in elements; the numbers of a row lie side by side.
template <class T>
struct Rows {
  T* data;
  int64_t batch, head, row;

  T* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * row; }
};

struct AmxAttention {
  int64_t batch, heads, queries, keys, depth;
  float scale;
};

// Whether the functions below, which need amx_available(), take these sizes.
bool amx_attention_supported(const AmxAttention& sizes);

void amx_attention_forward(const AmxAttention& sizes, Rows<const uint16_t> q, Rows<const uint16_t> k,
                           Rows<const uint16_t> v, Rows<uint16_t> o, float* lse);

// dq, dk and dv from grad, the gradient of o, and what the forward was given and gave.
void amx_attention_backward(const AmxAttention& sizes, Rows<const uint16_t> grad, Rows<const uint16_t> q,
                            Rows<const uint16_t> k, Rows<const uint16_t> v, Rows<const uint16_t> o, const float* lse,
                            Rows<uint16_t> dq, Rows<uint16_t> dk, Rows<uint16_t> dv);

}  // namespace vmae
