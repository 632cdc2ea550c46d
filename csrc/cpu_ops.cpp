// The operations of ops.cpp for CPU tensors, all bfloat16.
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "amx.h"
#include "amx_conv3d.h"

namespace vmae {
namespace {

using torch::stable::Tensor;

uint16_t* data(const std::optional<Tensor>& tensor) {
  return tensor && tensor->numel() ? static_cast<uint16_t*>(tensor->mutable_data_ptr()) : nullptr;
}

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

}  // namespace
}  // namespace vmae

STABLE_TORCH_LIBRARY_IMPL(vmae_csrc, CPU, m) {
  m.impl("convolve", TORCH_BOX(&vmae::convolve_cpu));
  m.impl("input_gradient", TORCH_BOX(&vmae::input_gradient_cpu));
  m.impl("weight_gradient", TORCH_BOX(&vmae::weight_gradient_cpu));
}
