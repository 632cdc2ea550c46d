// The operations of ops.cpp for CUDA tensors.
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "kernels.h"

// PyTorch declares it only where its own CUDA headers are. Weak, so that the library loads into a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace vmae {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const void* data(const std::optional<Tensor>& tensor) {
  return tensor && tensor->numel() ? tensor->data_ptr() : nullptr;
}

void* mutable_data(const std::optional<Tensor>& tensor) {
  return tensor && tensor->numel() ? tensor->mutable_data_ptr() : nullptr;
}

// x [B, C, T, H, W], kernel and stride (time, height, width); all channels-last.
Problem problem_of(const Tensor& x, int64_t outputs, const int64_t* kernel, const std::vector<int64_t>& stride) {
  Problem p;
  p.batch = x.size(0);
  p.channels = static_cast<int>(x.size(1));
  p.outputs = static_cast<int>(outputs);
  p.frames = static_cast<int>(x.size(2));
  p.height = static_cast<int>(x.size(3));
  p.width = static_cast<int>(x.size(4));
  for (int i = 0; i < 3; ++i) {
    p.kernel[i] = static_cast<int>(kernel[i]);
    p.stride[i] = static_cast<int>(stride[i]);
  }
  return p;
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// `run` with the arithmetic of the tensor's type; exact: fp32 without rounding to tf32.
template <class Run>
void with_math(const Tensor& x, bool exact, Run&& run) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return run(static_cast<Bfloat16*>(nullptr));
    case ScalarType::Half:
      return run(static_cast<Float16*>(nullptr));
    case ScalarType::Float:
      return exact ? run(static_cast<ExactFloat32*>(nullptr)) : run(static_cast<TensorFloat32*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "vmae_csrc: expected bfloat16, float16 or float32");
  }
}

void convolve_cuda(Tensor y, const Tensor x, const std::optional<Tensor> cache, const Tensor weight,
                   const std::optional<Tensor> bias, const std::vector<int64_t> stride, bool silu, bool exact) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device());
  Problem p = problem_of(x, weight.size(0), &weight.sizes()[2], stride);
  with_math(x, exact, [&](auto* math) {
    using Math = std::remove_pointer_t<decltype(math)>;
    convolve<Math>(p, x.data_ptr(), data(cache), weight.data_ptr(), data(bias), y.mutable_data_ptr(), silu,
                   current_stream(x));
  });
}

// The weight is transposed: [C, O, kt, kh, kw], channels-last.
void input_gradient_cuda(Tensor dx, const std::optional<Tensor> dcache, const Tensor dy, const Tensor weight,
                         const std::vector<int64_t> stride, bool exact) {
  torch::stable::accelerator::DeviceGuard guard(dy.get_device());
  Problem p = problem_of(dx, dy.size(1), &weight.sizes()[2], stride);
  with_math(dy, exact, [&](auto* math) {
    using Math = std::remove_pointer_t<decltype(math)>;
    input_gradient<Math>(p, dy.data_ptr(), weight.data_ptr(), dx.mutable_data_ptr(), mutable_data(dcache),
                         current_stream(dy));
  });
}

void weight_gradient_cuda(Tensor dweight, const Tensor x, const std::optional<Tensor> cache, const Tensor dy,
                          const std::vector<int64_t> stride, bool exact) {
  torch::stable::accelerator::DeviceGuard guard(x.get_device());
  Problem p = problem_of(x, dweight.size(0), &dweight.sizes()[2], stride);
  with_math(x, exact, [&](auto* math) {
    using Math = std::remove_pointer_t<decltype(math)>;
    Tensor workspace = torch::stable::new_empty(x, {weight_gradient_workspace<Math>(p)}, ScalarType::Float);
    weight_gradient<Math>(p, x.data_ptr(), data(cache), dy.data_ptr(), static_cast<float*>(workspace.mutable_data_ptr()),
                          dweight.mutable_data_ptr(), current_stream(x));
  });
}

}  // namespace
}  // namespace vmae

STABLE_TORCH_LIBRARY_IMPL(vmae_csrc, CUDA, m) {
  m.impl("convolve", TORCH_BOX(&vmae::convolve_cuda));
  m.impl("input_gradient", TORCH_BOX(&vmae::input_gradient_cuda));
  m.impl("weight_gradient", TORCH_BOX(&vmae::weight_gradient_cuda));
}

// For occupancy.cpp, which finds it by name: calls `take` with each kernel that runs on the current device; returns
// the message of what went wrong, or null.
extern "C" __attribute__((visibility("default"))) const char* vmae_csrc_occupancy(
    void (*take)(void* context, const vmae::Occupancy& kernel), void* context) {
  static thread_local std::string message;
  try {
    std::vector<vmae::Occupancy> found;
    vmae::occupancy<vmae::Bfloat16>(found);
    vmae::occupancy<vmae::Float16>(found);
    vmae::occupancy<vmae::TensorFloat32>(found);
    vmae::occupancy<vmae::ExactFloat32>(found);
    for (const vmae::Occupancy& kernel : found) take(context, kernel);
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}
