#include "launch.cuh"

namespace vmae {
VMAE_INSTANTIATE(Float16)
}  // namespace vmae
