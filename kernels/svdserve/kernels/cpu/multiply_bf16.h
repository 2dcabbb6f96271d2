// One tile of tokens times one panel of weights, both bfloat16, with AVX512-BF16 or with AMX.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "amx.h"
#include "panels.h"
#include "unrolled.h"

namespace {

using Half = std::uint16_t;  // the bits of one bfloat16

// Tokens of a tile without AMX: with 32 rows of a weight they keep 24 of 32 vector registers busy.
constexpr int kBf16Tile = 12;

// out[token][0 .. 16 * Blocks): the dot products of each token of a tile with each row of a panel,
// added to what is there if `add`.
template <int Tokens, int Blocks>
void multiply_bf16(const Word* x, int, const Word* w, int64_t words, bool add, float* out) {
  __m512 sums[Tokens][Blocks];
  unrolled<Tokens, Blocks>([&](auto token, auto block) {
    sums[token][block] = add ? _mm512_loadu_ps(out + token * kPanel + block * kLanes)
                             : _mm512_setzero_ps();
  });
  for (; words > 0; words -= kLanes, x += Tokens * kLanes) {
    // The last block may be short, and its padding would take time.
    const int count = static_cast<int>(std::min<int64_t>(words, kLanes));
#pragma GCC unroll 2
    for (int word = 0; word < count; ++word, w += kLanes * Blocks) {
      __m512bh weights[Blocks];
      unrolled<1, Blocks>([&](auto, auto block) {
        weights[block] = (__m512bh)_mm512_loadu_si512(w + kLanes * block);
        _mm_prefetch(reinterpret_cast<const char*>(w + kLanes * block) + kAhead, _MM_HINT_T0);
      });
      unrolled<Tokens, Blocks>([&](auto token, auto block) {
        const __m512bh value = (__m512bh)_mm512_set1_epi32(static_cast<int>(x[token * kLanes + word]));
        sums[token][block] = _mm512_dpbf16_ps(sums[token][block], weights[block], value);
      });
    }
  }
  unrolled<Tokens, Blocks>([&](auto token, auto block) {
    _mm512_storeu_ps(out + token * kPanel + block * kLanes, sums[token][block]);
  });
}

// The same with AMX, for `tokens` of 16 * Tiles at most: rows past them hold garbage, as do sums.
template <int Tiles, int Blocks>
__attribute__((target("amx-tile,amx-bf16"))) void multiply_bf16_amx(const Word* x, int tokens,
                                                                    const Word* w, int64_t words,
                                                                    bool add, float* out) {
  constexpr int kStride = kLanes * Blocks * sizeof(Word), kRow = kPanel * sizeof(float);
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
  for (; words > 0; words -= kLanes, x += tokens * kLanes, w += kLanes * kLanes * Blocks) {
    _tile_loadd(4, x, kLanes * sizeof(Word));
    _tile_loadd(6, w, kStride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Blocks > 1) {
      _tile_loadd(7, w + kLanes, kStride);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (Tiles > 1) {
      _tile_loadd(5, x + kLanes * kLanes, kLanes * sizeof(Word));
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

using MultiplyBf16 = void (*)(const Word*, int, const Word*, int64_t, bool, float*);

template <int Blocks, int... Less>
constexpr std::array<MultiplyBf16, kBf16Tile> bf16_by_tokens(std::integer_sequence<int, Less...>) {
  return {multiply_bf16<Less + 1, Blocks>...};
}
constexpr auto kMultiplyBf16 =
    std::array{bf16_by_tokens<1>(std::make_integer_sequence<int, kBf16Tile>()),
               bf16_by_tokens<2>(std::make_integer_sequence<int, kBf16Tile>())};
constexpr MultiplyBf16 kMultiplyBf16Amx[2][2] = {
    {multiply_bf16_amx<1, 1>, multiply_bf16_amx<2, 1>},
    {multiply_bf16_amx<1, 2>, multiply_bf16_amx<2, 2>}};

// How a call multiplies; `enter` and `leave` surround every use by a thread.
struct Bf16 {
  using Input = Activations;

  bool amx;

  int64_t tile() const { return amx ? kAmxTile : kBf16Tile; }
  // Columns of a block where panels are cut. AMX waits for its operands: there a block of a tile
  // stays in the L1 cache.
  int64_t block_words() const { return amx ? 128 : 512; }
  void multiply(const Input& x, int64_t start, int size, int64_t word, const Word* w, int blocks,
                int64_t words, float* out) const {
    const MultiplyBf16 chosen = amx ? kMultiplyBf16Amx[blocks - 1][size > kLanes]
                                    : kMultiplyBf16[blocks - 1][size - 1];
    chosen(x.tile(start, size, word), size, w, words, word > 0, out);
  }
  void enter() const {
    if (amx) enter_amx();
  }
  void leave() const {
    if (amx) leave_amx();
  }
};

}  // namespace
