// As much of CUDA's runtime as csrc/ calls: what it launches goes to a function that has been told to us, instead of a
// GPU. And csrc's launchers for those who cannot call C++. For the tests; test_csrc_machine.py says more.
#include <cstring>
#include <exception>
#include <map>
#include <string>

#include <cuda_runtime.h>

#include "kernels.h"

using Carry = void (*)(const char* kernel, int blocks_x, int blocks_y, int blocks_z, int threads, void** arguments,
                       size_t shared);

static Carry carry = nullptr;
static int architecture = 80;
static std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> known;
  return known;
}
static struct { dim3 grid, block; size_t shared; cudaStream_t stream; } asked;

extern "C" {

void** __cudaRegisterFatBinary(void*) { return reinterpret_cast<void**>(&names()); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  names()[stub] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  asked = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = asked.grid, *block = asked.block, *shared = asked.shared;
  *static_cast<cudaStream_t*>(stream) = asked.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  carry(names().at(kernel).c_str(), grid.x, grid.y, grid.z, block.x * block.y * block.z, arguments, shared);
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrComputeCapabilityMajor && attribute != cudaDevAttrComputeCapabilityMinor) std::terminate();
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? architecture / 10 : architecture % 10;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { std::terminate(); }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int*, const void*, int, size_t, unsigned) {
  std::terminate();
}

void machine_set(Carry to, int capability) { carry = to, architecture = capability; }

}  // extern "C"

namespace vmae {
namespace {

// batch, channels, outputs, frames, height, width, kernel (3), stride (3)
Problem problem_of(const int64_t* n) {
  Problem p;
  p.batch = n[0];
  p.channels = n[1], p.outputs = n[2], p.frames = n[3], p.height = n[4], p.width = n[5];
  for (int i = 0; i < 3; ++i) p.kernel[i] = n[6 + i], p.stride[i] = n[9 + i];
  return p;
}

}  // namespace
}  // namespace vmae

// One library for each kind of arithmetic.
using Math = vmae::MACHINE_MATH;

extern "C" {

void machine_convolve(const int64_t* n, const void* x, const void* past, const void* weight, const void* bias, void* y,
                      int silu) {
  vmae::convolve<Math>(vmae::problem_of(n), x, past, weight, bias, y, silu, nullptr);
}

void machine_input_gradient(const int64_t* n, const void* dy, const void* weight, void* dx, void* dpast) {
  vmae::input_gradient<Math>(vmae::problem_of(n), dy, weight, dx, dpast, nullptr);
}

int64_t machine_workspace(const int64_t* n) { return vmae::weight_gradient_workspace<Math>(vmae::problem_of(n)); }

void machine_weight_gradient(const int64_t* n, const void* x, const void* past, const void* dy, float* workspace,
                             void* dweight) {
  vmae::weight_gradient<Math>(vmae::problem_of(n), x, past, dy, workspace, dweight, nullptr);
}

}  // extern "C"
