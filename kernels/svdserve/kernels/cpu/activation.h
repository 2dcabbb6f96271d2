// Gated activations of 16 rows at a time, act(gate) * up, in float32.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

// The numbers are those of linear.py.
enum class Activation : std::int64_t { none, silu, gelu_tanh };

// e^x, to about 1e-5: far finer than the bfloat16 that its only user rounds to.
__m512 exponential(__m512 x) {
  // 2^(whole + rest) by the Taylor series of 2^rest, |rest| <= 1/2. Past the limits it is 0 or
  // infinity anyway; a NaN stays one, as the second operand is what max and min then return.
  __m512 power = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
  power = _mm512_min_ps(_mm512_set1_ps(150), _mm512_max_ps(_mm512_set1_ps(-150), power));
  const __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(power, whole);
  __m512 sum = _mm512_set1_ps(1.33335581e-3f);
  for (const float term : {9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(term));
  return _mm512_scalef_ps(sum, whole);
}

// silu(g) is g sigmoid(g); the tanh form of gelu(g) is g sigmoid(2 sqrt(2 / pi) (g + 0.044715 g^3)).
__m512 multiplied(Activation activation, __m512 gate, __m512 up) {
  __m512 inner = gate;
  if (activation == Activation::gelu_tanh) {
    const __m512 square = _mm512_mul_ps(gate, gate);
    inner = _mm512_mul_ps(gate, _mm512_fmadd_ps(square, _mm512_set1_ps(0.0713548163f),
                                                _mm512_set1_ps(1.59576912f)));
  }
  const __m512 power = exponential(_mm512_sub_ps(_mm512_setzero_ps(), inner));
  const __m512 sigmoid = _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1), power));
  return _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid), up);
}

}  // namespace
