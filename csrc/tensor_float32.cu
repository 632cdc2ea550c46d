#include "launch.cuh"

namespace vmae {
VMAE_INSTANTIATE(TensorFloat32)
}  // namespace vmae
