// The kernels' launches, which each file of one kind of arithmetic defines.
#pragma once

#include <string>
#include <vector>

#include <cuda_runtime.h>

#include "geometry.h"

namespace vmae {

struct Bfloat16;
struct Float16;
struct TensorFloat32;  // fp32 numbers, rounded to tf32's 10 bits for the tensor cores
struct ExactFloat32;

// Pointers are to channels-last tensors of the arithmetic's type. `past` is the frames before the clip; null: zeros.
template <class Math>
void convolve(const Problem& problem, const void* video, const void* past, const void* weight, const void* bias,
              void* result, bool silu, cudaStream_t stream);

// `weight` is transposed, [channels, taps, outputs]; `past` is null where its gradient is not wanted.
template <class Math>
void input_gradient(const Problem& problem, const void* gradient, const void* weight, void* video, void* past,
                    cudaStream_t stream);

// `workspace` is of `weight_gradient_workspace` floats.
template <class Math>
void weight_gradient(const Problem& problem, const void* video, const void* past, const void* gradient,
                     float* workspace, void* weight, cudaStream_t stream);

template <class Math>
int64_t weight_gradient_workspace(const Problem& problem);

// What a kernel takes of a multiprocessor of the current device.
struct Occupancy {
  std::string kernel, math;
  int rows, columns, depth, stages;  // of its tile
  int registers, local_bytes, shared_bytes, blocks;
};

// Adds those that run on the current device.
template <class Math>
void occupancy(std::vector<Occupancy>& found);

}  // namespace vmae
