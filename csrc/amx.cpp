#include "amx.h"

#ifdef VMAE_AMX

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace vmae {

bool amx_available() {
  static const bool available = [] {
    unsigned a, b, c, d;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTile)) return false;
    // These three tell what the operating system keeps, too.
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq")) return false;
    if (!__builtin_cpu_supports("avx512vl")) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5)) return false;  // AVX512-BF16
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return available;
}

}  // namespace vmae

#else

namespace vmae {

bool amx_available() { return false; }

}  // namespace vmae

#endif
