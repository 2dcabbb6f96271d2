// What both engines need of AMX: permission, and the shape of the tile registers.

#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace {

// Eight tile registers of 16 rows of 64 bytes. In static memory, as the compiler does not know that
// loading it reads all of it.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const TileConfig kTileConfig;

// Surround every use of the tile registers by a thread.
__attribute__((target("amx-tile"))) void enter_amx() { _tile_loadconfig(&kTileConfig); }
__attribute__((target("amx-tile"))) void leave_amx() { _tile_release(); }

// Whether the processor has AMX for bfloat16 and int8 and Linux lets this process use its
// registers, which must be asked for once.
bool has_amx() {
  static const bool allowed = [] {
    // AMX-BF16, AMX-TILE and AMX-INT8 in EDX.
    constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kNeeded) == kNeeded &&
           syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return allowed;
}

}  // namespace
