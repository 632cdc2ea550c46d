// Which tile a problem gets, and the launch of its kernel.
#pragma once

#include <stdexcept>
#include <string>

#include "implicit_gemm.cuh"
#include "kernels.h"

namespace vmae {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class Kernel, class Arguments>
void launch(Kernel* kernel, int shared_bytes, int64_t blocks, int slices, const Arguments& arguments,
            cudaStream_t stream) {
  if (blocks >= int64_t{1} << 31) throw std::runtime_error("causal_conv3d: more than 2^31 tiles in one call");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "shared memory");
  kernel<<<dim3(static_cast<unsigned>(blocks), slices), kThreads, shared_bytes, stream>>>(arguments);
  check(cudaGetLastError(), "causal_conv3d");
}

template <class Math>
void launch_convolution(const Gather& gather, const void* body, const void* head, const void* weight, const void* bias,
                        void* result, void* result_head, bool silu, cudaStream_t stream) {
  using Element = typename Math::Element;
  using Table = TilesFor<Math>;
  bool wide_stores = gather.columns % Table::kVector == 0 && aligned(result) && aligned(result_head);
  ConvolutionArguments<Element> arguments = {
      gather, static_cast<const Element*>(body), static_cast<const Element*>(head), static_cast<const Element*>(weight),
      static_cast<const Element*>(bias), static_cast<Element*>(result), static_cast<Element*>(result_head), silu,
      wide_stores};
  with_tile<Table>(convolution_tile<Table>(gather, aligned(body) && aligned(head) && aligned(weight)), [&](auto* tile) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    launch(convolution_kernel<Math, Tile>, ConvolutionKernel<Math, Tile>::kSharedBytes, convolution_tiles<Tile>(gather),
           1, arguments, stream);
  });
}

template <class Math>
void convolve(const Problem& problem, const void* video, const void* past, const void* weight, const void* bias,
              void* result, bool silu, cudaStream_t stream) {
  Gather gather = forward_gather(problem);
  if (gather.rows() == 0) return;
  launch_convolution<Math>(gather, video, past, weight, bias, result, nullptr, silu, stream);
}

template <class Math>
void input_gradient(const Problem& problem, const void* gradient, const void* weight, void* video, void* past,
                    cudaStream_t stream) {
  for (const Gather& gather : gradient_gathers(problem, past != nullptr)) {
    launch_convolution<Math>(gather, gradient, nullptr, weight, nullptr, video, past, false, stream);
  }
}

template <class Math>
int64_t weight_gradient_workspace(const Problem& problem) {
  Gather g = forward_gather(problem);
  int slices = weight_gradient_slices<TilesFor<Math>>(g, weight_gradient_tile<TilesFor<Math>>(g, true));
  return static_cast<int64_t>(g.columns) * g.taps() * g.channels * slices;
}

template <class Math, class Tile>
void launch_weight_gradient(const WeightGradientArguments<typename Math::Element>& arguments, cudaStream_t stream) {
  launch(weight_gradient_kernel<Math, Tile>, WeightGradientKernel<Math, Tile>::kSharedBytes,
         weight_gradient_tiles<Tile>(arguments.gather), arguments.slices, arguments, stream);
}

template <class Math>
void weight_gradient(const Problem& problem, const void* video, const void* past, const void* gradient,
                     float* workspace, void* weight, cudaStream_t stream) {
  using Element = typename Math::Element;
  using Table = TilesFor<Math>;
  Gather g = forward_gather(problem);
  int64_t count = static_cast<int64_t>(g.columns) * g.taps() * g.channels;
  WeightGradientArguments<Element> arguments = {
      g, static_cast<const Element*>(video), static_cast<const Element*>(past), static_cast<const Element*>(gradient),
      workspace, static_cast<int>(weight_gradient_workspace<Math>(problem) / count)};
  Size size = weight_gradient_tile<Table>(g, aligned(video) && aligned(past) && aligned(gradient));
  if (size == Size::wide) {
    launch_weight_gradient<Math, typename Table::Wide>(arguments, stream);
  } else {
    launch_weight_gradient<Math, typename Table::Scalar>(arguments, stream);
  }
  sum_slices_kernel<<<static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, 0, stream>>>(
      workspace, arguments.slices, count, static_cast<Element*>(weight));
  check(cudaGetLastError(), "causal_conv3d");
}

#define VMAE_INSTANTIATE(Math)                                                                                         \
  template void convolve<Math>(const Problem&, const void*, const void*, const void*, const void*, void*, bool,        \
                               cudaStream_t);                                                                          \
  template void input_gradient<Math>(const Problem&, const void*, const void*, void*, void*, cudaStream_t);            \
  template void weight_gradient<Math>(const Problem&, const void*, const void*, const void*, float*, void*,            \
                                      cudaStream_t);                                                                   \
  template int64_t weight_gradient_workspace<Math>(const Problem&)

}  // namespace vmae
