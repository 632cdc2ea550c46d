// The operations of `torch.ops.vmae_csrc`, in PyTorch's stable ABI: one binary for every Python and every torch from
// 2.10. They write into tensors that Python has made and checked; autograd, fakes and the choice of an implementation
// are Python's (kernels/vmae_kernels/causal_conv3d.py).
#include <string>

#include <torch/csrc/stable/library.h>

#include "amx.h"

namespace vmae {
namespace {

// Of this build and this processor, as json.
std::string facts() {
  std::string built = VMAE_BUILD_FACTS;  // an object
  built.pop_back();
  return built + ", \"amx\": " + (amx_available() ? "true}" : "false}");
}

}  // namespace
}  // namespace vmae

STABLE_TORCH_LIBRARY(vmae_csrc, m) {
  m.def(
      "convolve(Tensor(a!) y, Tensor x, Tensor? cache, Tensor weight, Tensor? bias, int[] stride, bool silu, "
      "bool exact) -> ()");
  m.def(
      "input_gradient(Tensor(a!) dx, Tensor(b!)? dcache, Tensor dy, Tensor weight, int[] stride, bool exact) -> ()");
  m.def(
      "weight_gradient(Tensor(a!) dweight, Tensor x, Tensor? cache, Tensor dy, int[] stride, bool exact) -> ()");
  m.def("attention(Tensor(a!) o, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, float scale) -> ()");
  m.def(
      "attention_backward(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor grad, Tensor q, Tensor k, Tensor v, "
      "Tensor o, Tensor lse, float scale) -> ()");
  m.def("linear(Tensor(a!) y, Tensor(b!)? activated, Tensor x, Tensor weight, Tensor? bias) -> ()");
  m.def("linear_input_gradient(Tensor(a!) dx, Tensor dy, Tensor weight) -> ()");
  m.def(
      "linear_gelu_gradient(Tensor(a!) dbefore, Tensor(b!) activated, Tensor dy, Tensor weight, Tensor before) -> ()");
  m.def("linear_weight_gradient(Tensor(a!) dweight, Tensor(b!)? dbias, Tensor dy, Tensor x) -> ()");
  m.def("layer_norm(Tensor(a!) y, Tensor(b!) stats, Tensor x, Tensor weight, Tensor bias, float eps) -> ()");
  m.def(
      "layer_norm_backward(Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias, Tensor dy, Tensor x, Tensor weight, "
      "Tensor stats) -> ()");
  m.def("topk(Tensor(a!) selected, Tensor(b!)? rest, Tensor scores, int k) -> ()");
  m.def("topk_mask(Tensor(a!) mask, Tensor scores, int k) -> ()");
  m.def("random_bits(Tensor(a!) out, int seed, int stream, int block, int row) -> ()");
  m.def("gather(Tensor(a!) y, Tensor x, Tensor indices) -> bool");
  m.def("huge_pages(Tensor(a!) x) -> ()");
  m.def("facts() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(vmae_csrc, CompositeExplicitAutograd, m) { m.impl("facts", TORCH_BOX(&vmae::facts)); }
