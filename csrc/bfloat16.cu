#include "launch.cuh"

namespace vmae {
VMAE_INSTANTIATE(Bfloat16)
}  // namespace vmae
