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

// Whether the current device has wgmma, and this build code for it.
inline bool has_wgmma() {
#ifdef VMAE_SM90A
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "device");
  return major == 9 && minor == 0;
#else
  return false;
#endif
}

// `run` with the table of tiles for the current device.
template <class Math, class Run>
void with_table(Run&& run) {
  if constexpr (sizeof(typename Math::Element) == 2) {
    if (has_wgmma()) return run(static_cast<HopperTiles*>(nullptr));
  }
  run(static_cast<Tiles<sizeof(typename Math::Element), Math::kBlocks>*>(nullptr));
}

template <class Math>
void launch_convolution(const Gather& gather, const void* body, const void* head, const void* weight, const void* bias,
                        void* result, void* result_head, bool silu, cudaStream_t stream) {
  using Element = typename Math::Element;
  with_table<Math>([&](auto* table) {
    using Table = std::remove_pointer_t<decltype(table)>;
    bool wide_stores = gather.columns % Table::kVector == 0 && aligned(result) && aligned(result_head);
    ConvolutionArguments<Element> arguments = {gather,
                                               static_cast<const Element*>(body),
                                               static_cast<const Element*>(head),
                                               static_cast<const Element*>(weight),
                                               static_cast<const Element*>(bias),
                                               static_cast<Element*>(result),
                                               static_cast<Element*>(result_head),
                                               silu,
                                               wide_stores};
    Size size = convolution_tile<Table>(gather, aligned(body) && aligned(head) && aligned(weight));
    with_tile<Table>(size, [&](auto* tile) {
      using Tile = std::remove_pointer_t<decltype(tile)>;
      launch(convolution_kernel<Math, Tile>, ConvolutionKernel<Math, Tile>::kSharedBytes,
             convolution_tiles<Tile>(gather), 1, arguments, stream);
    });
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

inline int64_t weight_count(const Gather& g) { return static_cast<int64_t>(g.columns) * g.taps() * g.channels; }

template <class Math>
int64_t weight_gradient_workspace(const Problem& problem) {
  Gather g = forward_gather(problem);
  int slices = 1;
  with_table<Math>([&](auto* table) {
    using Table = std::remove_pointer_t<decltype(table)>;
    slices = weight_gradient_slices<Table>(g, weight_gradient_tile<Table>(g, true));
  });
  return weight_count(g) * slices;
}

template <class Math>
void weight_gradient(const Problem& problem, const void* video, const void* past, const void* gradient,
                     float* workspace, void* weight, cudaStream_t stream) {
  using Element = typename Math::Element;
  Gather g = forward_gather(problem);
  int64_t count = weight_count(g);
  int slices = static_cast<int>(weight_gradient_workspace<Math>(problem) / count);
  WeightGradientArguments<Element> arguments = {
      g,      static_cast<const Element*>(video), static_cast<const Element*>(past), static_cast<const Element*>(gradient),
      workspace, slices};
  with_table<Math>([&](auto* table) {
    using Table = std::remove_pointer_t<decltype(table)>;
    auto run = [&](auto* tile) {
      using Tile = std::remove_pointer_t<decltype(tile)>;
      launch(weight_gradient_kernel<Math, Tile>, WeightGradientKernel<Math, Tile>::kSharedBytes,
             weight_gradient_tiles<Tile>(g), slices, arguments, stream);
    };
    if (weight_gradient_tile<Table>(g, aligned(video) && aligned(past) && aligned(gradient)) == Size::wide) {
      run(static_cast<typename Table::Wide*>(nullptr));
    } else {
      run(static_cast<typename Table::Scalar*>(nullptr));
    }
  });
  sum_slices_kernel<<<static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, 0, stream>>>(
      workspace, slices, count, static_cast<Element*>(weight));
  check(cudaGetLastError(), "causal_conv3d");
}

template <class Tile, class Kernel>
void add_occupancy(std::vector<Occupancy>& found, const char* name, const char* math, Kernel* kernel, int shared) {
  cudaFuncAttributes attributes;
  int blocks = 0;
  check(cudaFuncGetAttributes(&attributes, kernel), name);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), name);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, shared), name);
  found.push_back({name, math, Tile::kRows, Tile::kColumns, Tile::kDepth, Tile::kStages, attributes.numRegs,
                   static_cast<int>(attributes.localSizeBytes), shared, blocks});
}

template <class Math>
void occupancy(std::vector<Occupancy>& found, const char* math) {
  with_table<Math>([&](auto* table) {
    using Table = std::remove_pointer_t<decltype(table)>;
    auto add = [&](auto* tile) {
      using Tile = std::remove_pointer_t<decltype(tile)>;
      add_occupancy<Tile>(found, "convolution", math, convolution_kernel<Math, Tile>,
                          ConvolutionKernel<Math, Tile>::kSharedBytes);
    };
    auto add_gradient = [&](auto* tile) {
      using Tile = std::remove_pointer_t<decltype(tile)>;
      add_occupancy<Tile>(found, "weight_gradient", math, weight_gradient_kernel<Math, Tile>,
                          WeightGradientKernel<Math, Tile>::kSharedBytes);
    };
    add(static_cast<typename Table::Wide*>(nullptr));
    add(static_cast<typename Table::Narrow*>(nullptr));
    add(static_cast<typename Table::Scalar*>(nullptr));
    add_gradient(static_cast<typename Table::Wide*>(nullptr));
    add_gradient(static_cast<typename Table::Scalar*>(nullptr));
  });
}

#define VMAE_INSTANTIATE(Math)                                                                                     \
  template void convolve<Math>(const Problem&, const void*, const void*, const void*, const void*, void*, bool,    \
                               cudaStream_t);                                                                      \
  template void input_gradient<Math>(const Problem&, const void*, const void*, void*, void*, cudaStream_t);        \
  template void weight_gradient<Math>(const Problem&, const void*, const void*, const void*, float*, void*,        \
                                      cudaStream_t);                                                               \
  template int64_t weight_gradient_workspace<Math>(const Problem&);                                                \
  template <>                                                                                                      \
  void occupancy<Math>(std::vector<Occupancy> & found) {                                                           \
    occupancy<Math>(found, #Math);                                                                                 \
  }

}  // namespace vmae
