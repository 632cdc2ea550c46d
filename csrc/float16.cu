#include "launch.cuh"

namespace vmae {
VMAE_INSTANTIATE(Float16);
}
