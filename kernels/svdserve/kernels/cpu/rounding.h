// Rounds one token's values to int8, in groups of 64 columns with a scale each.
//
// reference.py defines it: the scale is the group's largest magnitude / 127. The activations of
// language models have a few columns that are a hundred times larger than the others; a scale for
// the whole token would leave little of those.

#pragma once

#include <immintrin.h>

#include "multiply_int8.h"

namespace {

constexpr int64_t kGroup = kLanes * static_cast<int64_t>(sizeof(Word));  // columns: one block
constexpr float kLargest = 127;
constexpr float kTiny = 1e-36f;  // groups below it are zeros, as 127 / peak would not be finite

__mmask16 sixteen(int64_t count) {
  return count >= kLanes ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

// The first 64 of `count` values, or all if there are fewer, become one group.
void round_group(const float* from, int64_t count, const Place& at, int64_t block,
                 const Int8Activations& to) {
  constexpr int kParts = kGroup / kLanes;
  __m512 values[kParts];
  // Compared as whole numbers, which orders magnitudes too, and in which a NaN is the largest.
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  unrolled<kParts, 1>([&](auto part, auto) {
    const int64_t before = part * kLanes;
    values[part] = _mm512_maskz_loadu_ps(sixteen(count - before), from + before);
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(values[part]), magnitude);
    largest = _mm512_max_epu32(largest, bits);
  });
  const Word bits = _mm512_reduce_max_epu32(largest);
  float peak;
  std::memcpy(&peak, &bits, sizeof peak);
  const bool zero = peak < kTiny;
  const __m512 inverse = _mm512_set1_ps(zero ? 0 : kLargest / peak);
  __m512i sum = _mm512_setzero_si512();
  Word* const vector = to.values.vector(at, block);
  unrolled<kParts, 1>([&](auto part, auto) {
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(values[part], inverse));
    sum = _mm512_add_epi32(sum, rounded);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(vector + part * 4), _mm512_cvtepi32_epi8(rounded));
  });
  to.tile(at.token - at.place, at.size, block)[at.place] = {
      zero ? 0 : peak / kLargest,
      // Unsigned, as the rounded values of a NaN's group may overflow.
      static_cast<std::int32_t>(-128u * static_cast<Word>(_mm512_reduce_add_epi32(sum)))};
}

// The values [columns] of one token; what pads its last group becomes 0.
void round_row(const float* row, int64_t columns, const Place& at, const Int8Activations& to) {
  for (int64_t block = 0; block < to.values.blocks; ++block)
    round_group(row + block * kGroup, columns - block * kGroup, at, block, to);
}

}  // namespace
