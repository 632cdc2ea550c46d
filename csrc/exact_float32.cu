#include "launch.cuh"

namespace vmae {
VMAE_INSTANTIATE(ExactFloat32)
}  // namespace vmae
