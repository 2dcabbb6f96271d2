// One tile of tokens times one panel of weights, both int8, with AVX512-VNNI or with AMX.
//
// Each token's columns are rounded in groups of 64, each with its own scale (rounding.h): a block of
// 16 words. Sums of a group are whole numbers, then scaled and added in float32. The instructions
// multiply unsigned by signed bytes, so a weight q is stored as q + 128; its share of 128 times the
// sum of the group's activations is taken off beforehand.

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

constexpr Word kUnsigned = 0x80808080;  // turns four signed bytes into unsigned ones, by xor

// A vector of 16 integers of 32 bits. GCC 12 copies a sum in every step if its type is __m512i, which
// is a vector of 8 integers.
using Integers = int __attribute__((vector_size(64)));

// What one token's group is multiplied with, and minus 128 times the sum of its rounded values.
struct GroupScale {
  float scale;
  std::int32_t offset;
};

// Packed activations and the scales of their groups, [token tile][block][token of the tile].
struct Int8Activations {
  Activations values;
  GroupScale* scales;

  GroupScale* tile(int64_t start, int size, int64_t block) const {
    return scales + start * values.blocks + block * size;
  }
};

// Tokens of a tile without AMX: the sums of a group and those of all groups stay in registers.
constexpr int kInt8Tile = 6;

// values * scale + sum.
[[gnu::always_inline]] inline __m512 add_scaled(__m512i values, float scale, __m512 sum) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(values), _mm512_set1_ps(scale), sum);
}

// 16 sums, or zeros unless `add`. Without a branch, around which the compiler would move the sums of
// all tokens to memory.
[[gnu::always_inline]] inline __m512 sums_before(const float* out, bool add) {
  return _mm512_maskz_loadu_ps(add ? 0xffff : 0, out);
}

// out[token][0 .. 16 * Blocks): the dot products of each token of a tile with each row of a panel,
// in the scale of the tokens, added to what is there if `add`.
template <int Tokens, int Blocks>
void multiply_int8(const Word* x, const GroupScale* scales, int, const Word* w, int64_t words,
                   bool add, float* out) {
  __m512 totals[Tokens][Blocks];
  unrolled<Tokens, Blocks>([&](auto token, auto block) {
    totals[token][block] = sums_before(out + token * kPanel + block * kLanes, add);
  });
  do {
    Integers sums[Tokens][Blocks];
    unrolled<Tokens, Blocks>([&](auto token, auto block) {
      sums[token][block] = (Integers)_mm512_set1_epi32(scales[token].offset);
    });
    // The last block may be short, and its padding would take time.
    const int count = static_cast<int>(std::min<int64_t>(words, kLanes));
#pragma GCC unroll 2
    for (int word = 0; word < count; ++word, w += kLanes * Blocks) {
      __m512i weights[Blocks];
      unrolled<1, Blocks>([&](auto, auto block) {
        weights[block] = _mm512_loadu_si512(w + kLanes * block);
        _mm_prefetch(reinterpret_cast<const char*>(w + kLanes * block) + kAhead, _MM_HINT_T0);
      });
      unrolled<Tokens, Blocks>([&](auto token, auto block) {
        const __m512i value = _mm512_set1_epi32(static_cast<int>(x[token * kLanes + word]));
        const __m512i sum = (__m512i)sums[token][block];
        sums[token][block] = (Integers)_mm512_dpbusd_epi32(sum, weights[block], value);
      });
    }
    unrolled<Tokens, Blocks>([&](auto token, auto block) {
      totals[token][block] = add_scaled((__m512i)sums[token][block], scales[token].scale,
                                        totals[token][block]);
    });
    words -= kLanes, x += Tokens * kLanes, scales += Tokens;
  } while (words > 0);  // there is a word: code for none would keep the sums in memory too
  unrolled<Tokens, Blocks>([&](auto token, auto block) {
    _mm512_storeu_ps(out + token * kPanel + block * kLanes, totals[token][block]);
  });
}

// The same with AMX, for `tokens` of 16 * Tiles at most.
template <int Tiles, int Blocks>
__attribute__((target("amx-tile,amx-int8"))) void multiply_int8_amx(
    const Word* x, const GroupScale* scales, int tokens, const Word* w, int64_t words, bool add,
    float* out) {
  constexpr int kStride = kLanes * Blocks * sizeof(Word), kRow = kPanel * sizeof(std::int32_t);
  alignas(64) std::int32_t sums[kLanes * Tiles * kPanel];
  for (; words > 0; words -= kLanes, x += tokens * kLanes, w += kLanes * kLanes * Blocks) {
    _tile_zero(0);
    if constexpr (Blocks > 1) _tile_zero(1);
    if constexpr (Tiles > 1) _tile_zero(2);
    if constexpr (Tiles > 1 && Blocks > 1) _tile_zero(3);
    _tile_loadd(4, x, kLanes * sizeof(Word));
    _tile_loadd(6, w, kStride);
    _tile_dpbsud(0, 4, 6);
    if constexpr (Blocks > 1) {
      _tile_loadd(7, w + kLanes, kStride);
      _tile_dpbsud(1, 4, 7);
    }
    if constexpr (Tiles > 1) {
      _tile_loadd(5, x + kLanes * kLanes, kLanes * sizeof(Word));
      _tile_dpbsud(2, 5, 6);
      if constexpr (Blocks > 1) _tile_dpbsud(3, 5, 7);
    }
    const char* ahead = reinterpret_cast<const char*>(w) + kAhead;
#pragma GCC unroll 32
    for (int line = 0; line < kLanes * Blocks; ++line) _mm_prefetch(ahead + 64 * line, _MM_HINT_T0);
    _tile_stored(0, sums, kRow);
    if constexpr (Blocks > 1) _tile_stored(1, sums + kLanes, kRow);
    if constexpr (Tiles > 1) _tile_stored(2, sums + kLanes * kPanel, kRow);
    if constexpr (Tiles > 1 && Blocks > 1) _tile_stored(3, sums + kLanes * kPanel + kLanes, kRow);
    for (int token = 0; token < tokens; ++token, ++scales)
#pragma GCC unroll 2
      for (int block = 0; block < Blocks; ++block) {
        const int at = token * kPanel + block * kLanes;
        const __m512i offset = _mm512_set1_epi32(scales->offset);
        const __m512i whole = _mm512_add_epi32(_mm512_load_si512(sums + at), offset);
        const __m512 before = sums_before(out + at, add);
        _mm512_storeu_ps(out + at, add_scaled(whole, scales->scale, before));
      }
    add = true;
  }
}

using MultiplyInt8 = void (*)(const Word*, const GroupScale*, int, const Word*, int64_t, bool,
                              float*);

template <int Blocks, int... Less>
constexpr std::array<MultiplyInt8, kInt8Tile> int8_by_tokens(std::integer_sequence<int, Less...>) {
  return {multiply_int8<Less + 1, Blocks>...};
}
constexpr auto kMultiplyInt8 =
    std::array{int8_by_tokens<1>(std::make_integer_sequence<int, kInt8Tile>()),
               int8_by_tokens<2>(std::make_integer_sequence<int, kInt8Tile>())};
constexpr MultiplyInt8 kMultiplyInt8Amx[2][2] = {
    {multiply_int8_amx<1, 1>, multiply_int8_amx<2, 1>},
    {multiply_int8_amx<1, 2>, multiply_int8_amx<2, 2>}};

// How a call multiplies; `enter` and `leave` surround every use by a thread.
struct Int8 {
  using Input = Int8Activations;

  bool amx;

  int64_t tile() const { return amx ? kAmxTile : kInt8Tile; }
  // Words of a block where panels are cut.
  int64_t block_words() const { return amx ? 128 : 512; }
  void multiply(const Input& x, int64_t start, int size, int64_t word, const Word* w, int blocks,
                int64_t words, float* out) const {
    const MultiplyInt8 chosen = amx ? kMultiplyInt8Amx[blocks - 1][size > kLanes]
                                    : kMultiplyInt8[blocks - 1][size - 1];
    if (words == 0)
      std::fill_n(out, size * kPanel, 0.0f);  // no group, so nothing writes the sums
    else
      chosen(x.values.tile(start, size, word), x.tile(start, size, word / kLanes), size, w, words,
             word > 0, out);
  }
  void enter() const {
    if (amx) enter_amx();
  }
  void leave() const {
    if (amx) leave_amx();
  }
};

}  // namespace
