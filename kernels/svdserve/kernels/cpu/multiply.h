// One tile of tokens times one panel of weights, with AVX512-BF16 or with AMX. bf16.cpp says how
// both operands are packed.

#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

namespace {

using std::int64_t;
using Half = std::uint16_t;  // the bits of one bfloat16
using Pair = std::uint32_t;  // those of two neighbouring columns

constexpr int kLanes = 16;            // float32 in a vector
constexpr int kPanel = 2 * kLanes;    // rows of a packed panel
constexpr int kVectorTile = 12;       // tokens of a tile, at most
constexpr int kAmxTile = 2 * kLanes;  // the same with AMX
constexpr int kAhead = 4096;          // bytes of weights that are asked for in advance

// out[token][0 .. 16 * Blocks): the dot products of each token of a tile with each row of a panel,
// added to what is there if `add`.
template <int Tokens, int Blocks>
void multiply(const Half* tile, int, const Half* w, int64_t pairs, bool add, float* out) {
  __m512 sums[Tokens][Blocks];
  for (int token = 0; token < Tokens; ++token)
    for (int block = 0; block < Blocks; ++block)
      sums[token][block] = add ? _mm512_loadu_ps(out + token * kPanel + block * kLanes)
                               : _mm512_setzero_ps();
  const Pair* x = reinterpret_cast<const Pair*>(tile);
  for (; pairs > 0; pairs -= kLanes, x += (Tokens - 1) * kLanes) {
    const Pair* end = x + std::min<int64_t>(pairs, kLanes);
#pragma GCC unroll 2
    for (; x != end; ++x, w += kPanel * Blocks) {
      __m512bh weights[Blocks];
#pragma GCC unroll 2
      for (int block = 0; block < Blocks; ++block) {
        weights[block] = (__m512bh)_mm512_loadu_si512(w + kPanel * block);
        _mm_prefetch(reinterpret_cast<const char*>(w + kPanel * block) + kAhead, _MM_HINT_T0);
      }
#pragma GCC unroll 12
      for (int token = 0; token < Tokens; ++token) {
        const __m512bh value = (__m512bh)_mm512_set1_epi32(static_cast<int>(x[token * kLanes]));
#pragma GCC unroll 2
        for (int block = 0; block < Blocks; ++block)
          sums[token][block] = _mm512_dpbf16_ps(sums[token][block], weights[block], value);
      }
    }
  }
#pragma GCC unroll 12
  for (int token = 0; token < Tokens; ++token)
#pragma GCC unroll 2
    for (int block = 0; block < Blocks; ++block)
      _mm512_storeu_ps(out + token * kPanel + block * kLanes, sums[token][block]);
}

// The same with AMX, for `tokens` of 16 * Tiles at most: rows past them hold garbage, as do sums.
template <int Tiles, int Blocks>
__attribute__((target("amx-tile,amx-bf16"))) void multiply_amx(const Half* tile, int tokens,
                                                               const Half* w, int64_t pairs,
                                                               bool add, float* out) {
  constexpr int kStride = kPanel * Blocks * sizeof(Half), kRow = kPanel * sizeof(float);
  float *const right = out + kLanes, *const below = out + kLanes * kPanel;
  if (add) {
    _tile_loadd(0, out, kRow);
    if constexpr (Blocks > 1) _tile_loadd(1, right, kRow);
    if constexpr (Tiles > 1) _tile_loadd(2, below, kRow);
    if constexpr (Tiles > 1 && Blocks > 1) _tile_loadd(3, below + kLanes, kRow);
  } else {
    _tile_zero(0);
    if constexpr (Blocks > 1) _tile_zero(1);
    if constexpr (Tiles > 1) _tile_zero(2);
    if constexpr (Tiles > 1 && Blocks > 1) _tile_zero(3);
  }
  for (; pairs > 0; pairs -= kLanes, tile += tokens * kPanel, w += kLanes * kPanel * Blocks) {
    _tile_loadd(4, tile, kPanel * sizeof(Half));
    _tile_loadd(6, w, kStride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Blocks > 1) {
      _tile_loadd(7, w + kPanel, kStride);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (Tiles > 1) {
      _tile_loadd(5, tile + kLanes * kPanel, kPanel * sizeof(Half));
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Blocks > 1) _tile_dpbf16ps(3, 5, 7);
    }
    const char* ahead = reinterpret_cast<const char*>(w) + kAhead;
#pragma GCC unroll 32
    for (int line = 0; line < kLanes * Blocks; ++line) _mm_prefetch(ahead + 64 * line, _MM_HINT_T0);
  }
  _tile_stored(0, out, kRow);
  if constexpr (Blocks > 1) _tile_stored(1, right, kRow);
  if constexpr (Tiles > 1) _tile_stored(2, below, kRow);
  if constexpr (Tiles > 1 && Blocks > 1) _tile_stored(3, below + kLanes, kRow);
}

using Multiply = void (*)(const Half*, int, const Half*, int64_t, bool, float*);

template <int Blocks, int... Less>
constexpr std::array<Multiply, kVectorTile> by_tokens(std::integer_sequence<int, Less...>) {
  return {multiply<Less + 1, Blocks>...};
}
constexpr auto kMultiply =
    std::array{by_tokens<1>(std::make_integer_sequence<int, kVectorTile>()),
               by_tokens<2>(std::make_integer_sequence<int, kVectorTile>())};
constexpr Multiply kMultiplyAmx[2][2] = {{multiply_amx<1, 1>, multiply_amx<2, 1>},
                                         {multiply_amx<1, 2>, multiply_amx<2, 2>}};

// Eight tile registers of 16 rows of 64 bytes. In static memory, as the compiler does not know that
// loading it reads all of it.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const TileConfig kTileConfig;

// How this call multiplies; `enter` and `leave` surround every use by a thread.
struct Engine {
  bool amx;

  int64_t tile() const { return amx ? kAmxTile : kVectorTile; }
  // Columns of a block where panels are cut. AMX waits for its operands: there a block of a tile
  // stays in the L1 cache.
  int64_t block_pairs() const { return amx ? 128 : 512; }
  Multiply multiply(int blocks, int tokens) const {
    return amx ? kMultiplyAmx[blocks - 1][tokens > kLanes] : kMultiply[blocks - 1][tokens - 1];
  }
  __attribute__((target("amx-tile"))) void enter() const {
    if (amx) _tile_loadconfig(&kTileConfig);
  }
  __attribute__((target("amx-tile"))) void leave() const {
    if (amx) _tile_release();
  }
};

// Whether the processor has AMX for bfloat16 and Linux lets this process use its registers, which
// must be asked for once.
bool has_amx() {
  static const bool allowed = [] {
    constexpr unsigned kNeeded = 1u << 22 | 1u << 24;            // AMX-BF16 and AMX-TILE in EDX
    constexpr int kRequest = 0x1023, kTileData = 18;             // ARCH_REQ_XCOMP_PERM
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kNeeded) == kNeeded &&
           syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return allowed;
}

}  // namespace
