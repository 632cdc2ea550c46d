// The operations of ops.cpp for CPU tensors: in bfloat16, but for the selection, of float32, and rows of any numbers.
#include <sys/mman.h>

#include <atomic>
#include <cstring>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "amx.h"
#include "amx_attention.h"
#include "amx_conv3d.h"
#include "amx_linear.h"
#include "layer_norm.h"
#include "parallel.h"
#include "topk.h"

namespace vmae {
namespace {

using torch::stable::Tensor;

uint16_t* data(const std::optional<Tensor>& tensor) {
  return tensor && tensor->numel() ? static_cast<uint16_t*>(tensor->mutable_data_ptr()) : nullptr;
}

float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

// `weight` [O, C, kt, kh, kw].
AmxConvolution sizes_of(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride) {
  AmxConvolution sizes{x.size(0), x.size(1), weight.size(0), x.size(2), x.size(3), x.size(4), {}, {}};
  for (int i = 0; i < 3; ++i) {
    sizes.kernel[i] = weight.size(2 + i);
    sizes.stride[i] = stride[i];
  }
  STD_TORCH_CHECK(amx_available() && amx_supported(sizes), "vmae_csrc: expected Intel AMX, and sizes that it takes");
  return sizes;
}

void convolve_cpu(Tensor y, const Tensor x, const std::optional<Tensor> cache, const Tensor weight,
                  const std::optional<Tensor> bias, const std::vector<int64_t> stride, bool silu, bool) {
  amx_forward(sizes_of(x, weight, stride), data(x), data(cache), data(weight), data(bias), silu, data(y));
}

void input_gradient_cpu(Tensor dx, const std::optional<Tensor> dcache, const Tensor dy, const Tensor weight,
                        const std::vector<int64_t> stride, bool) {
  amx_input_gradient(sizes_of(dx, weight, stride), data(dy), data(weight), data(dx), data(dcache));
}

void weight_gradient_cpu(Tensor dweight, const Tensor x, const std::optional<Tensor> cache, const Tensor dy,
                         const std::vector<int64_t> stride, bool) {
  amx_weight_gradient(sizes_of(x, dweight, stride), data(x), data(cache), data(dy), data(dweight));
}

// Of [batch, heads, rows, depth], whose last stride is 1.
Rows<uint16_t> rows(const Tensor& x) {
  return {static_cast<uint16_t*>(x.mutable_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

Rows<const uint16_t> read(const Tensor& x) {
  return {static_cast<const uint16_t*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

AmxAttention attention_sizes(const Tensor& q, const Tensor& k, double scale) {
  AmxAttention sizes{q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), static_cast<float>(scale)};
  STD_TORCH_CHECK(amx_available() && amx_attention_supported(sizes),
                  "vmae_csrc: expected Intel AMX, and sizes that it takes");
  return sizes;
}

void attention_cpu(Tensor o, Tensor lse, const Tensor q, const Tensor k, const Tensor v, double scale) {
  amx_attention_forward(attention_sizes(q, k, scale), read(q), read(k), read(v), rows(o), floats(lse));
}

void attention_backward_cpu(Tensor dq, Tensor dk, Tensor dv, const Tensor grad, const Tensor q, const Tensor k,
                            const Tensor v, const Tensor o, const Tensor lse, double scale) {
  amx_attention_backward(attention_sizes(q, k, scale), read(grad), read(q), read(k), read(v), read(o), floats(lse),
                         rows(dq), rows(dk), rows(dv));
}

// Of [rows, columns], whose last stride is 1.
template <class T>
Matrix<const T> matrix(const Tensor& x) {
  return {static_cast<const T*>(x.data_ptr()), x.stride(0)};
}

AmxLinear linear_sizes(const Tensor& x, const Tensor& y) {
  STD_TORCH_CHECK(amx_available(), "vmae_csrc: expected Intel AMX");
  return {x.size(0), x.size(1), y.size(1)};
}

// call(weight), as a matrix of what it is made of.
template <class F>
void with_weight(const Tensor& weight, F call) {
  if (weight.scalar_type() == torch::headeronly::ScalarType::Float)
    call(matrix<float>(weight));
  else
    call(matrix<uint16_t>(weight));
}

// `bias` has the weight's dtype.
void linear_cpu(Tensor y, const std::optional<Tensor> activated, const Tensor x, const Tensor weight,
                const std::optional<Tensor> bias) {
  with_weight(weight, [&](auto w) {
    const auto* b = bias ? static_cast<decltype(w.data)>(bias->data_ptr()) : nullptr;
    amx_linear(linear_sizes(x, y), matrix<uint16_t>(x), w, b, data(y), data(activated));
  });
}

void linear_input_gradient_cpu(Tensor dx, const Tensor dy, const Tensor weight) {
  with_weight(weight, [&](auto w) {
    amx_linear_input_gradient(linear_sizes(dx, dy), matrix<uint16_t>(dy), w, data(dx));
  });
}

// `before` has no gaps.
void linear_gelu_gradient_cpu(Tensor dbefore, Tensor activated, const Tensor dy, const Tensor weight,
                              const Tensor before) {
  with_weight(weight, [&](auto w) {
    amx_linear_gelu_gradient(linear_sizes(dbefore, dy), matrix<uint16_t>(dy), w, data(before), data(dbefore),
                             data(activated));
  });
}

void linear_weight_gradient_cpu(Tensor dweight, const std::optional<Tensor> dbias, const Tensor dy, const Tensor x) {
  amx_linear_weight_gradient(linear_sizes(x, dy), matrix<uint16_t>(dy), matrix<uint16_t>(x), floats(dweight),
                             dbias ? floats(*dbias) : nullptr);
}

LayerNorm norm_sizes(const Tensor& x, double eps) {
  STD_TORCH_CHECK(amx_available(), "vmae_csrc: expected Intel AMX");
  return {x.size(0), x.size(1), static_cast<float>(eps)};
}

// Of [rows, channels], all contiguous.
void layer_norm_cpu(Tensor y, Tensor stats, const Tensor x, const Tensor weight, const Tensor bias, double eps) {
  layer_norm(norm_sizes(x, eps), floats(x), floats(weight), floats(bias), data(y), floats(stats));
}

void layer_norm_backward_cpu(Tensor dx, Tensor dweight, Tensor dbias, const Tensor dy, const Tensor x,
                             const Tensor weight, const Tensor stats) {
  layer_norm_backward(norm_sizes(x, 0), data(dy), floats(x), floats(weight), floats(stats), floats(dx), floats(dweight),
                      floats(dbias));
}

// `scores` [rows, n], contiguous.
void topk_cpu(Tensor selected, const std::optional<Tensor> rest, const Tensor scores, int64_t k) {
  topk(floats(scores), scores.size(0), scores.size(1), k, static_cast<int64_t*>(selected.mutable_data_ptr()),
       rest ? static_cast<int64_t*>(rest->mutable_data_ptr()) : nullptr);
}

void topk_mask_cpu(Tensor mask, const Tensor scores, int64_t k) {
  topk_mask(floats(scores), scores.size(0), scores.size(1), k, static_cast<uint8_t*>(mask.mutable_data_ptr()));
}

// y[b, i] = x[b, indices[b, i]], of rows that lie together; whether all indices lie in [0, N).
template <class Index>
bool gather(Tensor& y, const Tensor& x, const Tensor& indices) {
  const int64_t n = x.size(1), k = y.size(1), size = x.element_size(), bytes = x.size(2) * size;
  const int64_t batch = x.stride(0) * size, token = x.stride(1) * size;
  const int64_t index_batch = indices.stride(0), index_token = indices.stride(1);
  const char* from = static_cast<const char*>(x.data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  const Index* index = static_cast<const Index*>(indices.data_ptr());
  std::atomic<bool> fine = true;
  parallel(y.size(0) * k, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = index[i / k * index_batch + i % k * index_token];
      if (row < 0 || row >= n) {
        fine = false;
        return;
      }
      std::memcpy(to + i * bytes, from + i / k * batch + row * token, bytes);
    }
  });
  return fine;
}

bool gather_cpu(Tensor y, const Tensor x, const Tensor indices) {
  const bool wide = indices.scalar_type() == torch::headeronly::ScalarType::Long;
  return wide ? gather<int64_t>(y, x, indices) : gather<int32_t>(y, x, indices);
}

// Before anything is written to x: memory that is new to the process comes in pages of 2 MiB, not one fault each 4 KiB.
void huge_pages_cpu(Tensor x) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHuge = 2 << 20;
  const auto address = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (address + x.numel() * x.element_size()) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // which may be refused
#endif
}

// `out` [4, blocks, rows, n].
void random_bits_cpu(Tensor out, int64_t seed, int64_t stream, int64_t block, int64_t row) {
  random_bits(seed, stream, block, out.size(1), row, out.size(2), out.size(3), floats(out));
}

}  // namespace
}  // namespace vmae

STABLE_TORCH_LIBRARY_IMPL(vmae_csrc, CPU, m) {
  m.impl("convolve", TORCH_BOX(&vmae::convolve_cpu));
  m.impl("input_gradient", TORCH_BOX(&vmae::input_gradient_cpu));
  m.impl("weight_gradient", TORCH_BOX(&vmae::weight_gradient_cpu));
  m.impl("attention", TORCH_BOX(&vmae::attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&vmae::attention_backward_cpu));
  m.impl("linear", TORCH_BOX(&vmae::linear_cpu));
  m.impl("linear_input_gradient", TORCH_BOX(&vmae::linear_input_gradient_cpu));
  m.impl("linear_gelu_gradient", TORCH_BOX(&vmae::linear_gelu_gradient_cpu));
  m.impl("linear_weight_gradient", TORCH_BOX(&vmae::linear_weight_gradient_cpu));
  m.impl("layer_norm", TORCH_BOX(&vmae::layer_norm_cpu));
  m.impl("layer_norm_backward", TORCH_BOX(&vmae::layer_norm_backward_cpu));
  m.impl("topk", TORCH_BOX(&vmae::topk_cpu));
  m.impl("topk_mask", TORCH_BOX(&vmae::topk_mask_cpu));
  m.impl("huge_pages", TORCH_BOX(&vmae::huge_pages_cpu));
  m.impl("gather", TORCH_BOX(&vmae::gather_cpu));
  m.impl("random_bits", TORCH_BOX(&vmae::random_bits_cpu));
}
