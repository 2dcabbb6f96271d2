// The rows that an operation reads and writes, in bfloat16: input, pivots, bias and outputs.

#pragma once

#include <ATen/ATen.h>
#include <immintrin.h>

#include <optional>
#include <vector>

#include "activation.h"
#include "multiply_bf16.h"

namespace {

Half* halves(const at::Tensor& tensor) { return static_cast<Half*>(tensor.data_ptr()); }
Word* words(const at::Tensor& tensor) { return static_cast<Word*>(tensor.data_ptr()); }

// Lanes of 16-bit values that exist, where `count` are left.
__mmask32 present(int64_t count) {
  return count >= kPanel ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
}

// 32 float32, as two vectors.
struct Sums {
  __m512 low, high;

  static Sums load(const float* from) {
    return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + kLanes)};
  }
  static Sums widen(__m512i halves) {
    const auto half = [](__m256i bits) {
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    };
    return {half(_mm512_castsi512_si256(halves)), half(_mm512_extracti64x4_epi64(halves, 1))};
  }
  // Adds 32 bfloat16, or nothing where `addend` is null.
  Sums plus(const Half* addend, __mmask32 lanes) const {
    if (!addend) return *this;
    const Sums other = widen(_mm512_maskz_loadu_epi16(lanes, addend));
    return {_mm512_add_ps(low, other.low), _mm512_add_ps(high, other.high)};
  }
  Sums times(const float* factors) const {
    const Sums other = load(factors);
    return {_mm512_mul_ps(low, other.low), _mm512_mul_ps(high, other.high)};
  }
  __m512i rounded() const { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
};

// The input [tokens, channels] and which of its channels are pivots: one bit each, 32 in a word.
struct Source {
  const Half* data;
  int64_t stride;
  int64_t channels;
  const Word* mask;
  int64_t pivots;

  int64_t others() const { return channels - pivots; }
  // How many halves a row of all channels takes where whole vectors are stored at its end.
  int64_t row_length() const { return round_up(channels, kPanel) + 2 * kPanel; }
  int64_t pivot_length() const { return round_up(pivots, kPanel) + kPanel; }

  // One token's pivots to `pivot`, its other channels and zeros after them to `other`.
  void split(int64_t token, Half* pivot, Half* other) const {
    const Half* from = data + token * stride;
    for (int64_t channel = 0; channel < channels; channel += kPanel) {
      const __mmask32 lanes = present(channels - channel);
      const __mmask32 chosen = pivots ? mask[channel / kPanel] : 0, rest = lanes & ~chosen;
      const __m512i values = _mm512_maskz_loadu_epi16(lanes, from + channel);
      if (pivots) {
        _mm512_storeu_si512(pivot, _mm512_maskz_compress_epi16(chosen, values));
        pivot += _mm_popcnt_u32(chosen);
      }
      _mm512_storeu_si512(other, _mm512_maskz_compress_epi16(rest, values));
      other += _mm_popcnt_u32(rest);
    }
    _mm512_storeu_si512(other, _mm512_setzero_si512());
  }
};

// This thread's tokens, one after the other, with their places in the tiles.
template <typename Function>
void for_my_tokens(const Tiles& tiles, const Function& function) {
  const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    const int64_t start = tiles.start(tile);
    const int size = tiles.size(tile);
    for (int place = 0; place < size; ++place)
      if ((start + place) % threads == thread) function(Place{start + place, size, place});
  }
}

// The outputs [tokens, outputs] in bfloat16.
struct Target {
  Half* data;
  int64_t outputs;
  const Half* bias;  // or null
  Activation activation;

  bool gated() const { return activation != Activation::none; }
  // Rows of the weight that these are the results of: for gate and up in whole vectors of each.
  int64_t rows() const { return gated() ? 2 * round_up(outputs, kLanes) : outputs; }

  void store(int64_t token, int64_t row, const Sums& sums) const {
    if (gated()) {
      const __m512 values = multiplied(activation, sums.low, sums.high);
      _mm256_mask_storeu_epi16(data + token * outputs + row / 2,
                               static_cast<__mmask16>(present(outputs - row / 2)),
                               (__m256i)_mm512_cvtneps_pbh(values));
      return;
    }
    const __mmask32 lanes = present(outputs - row);
    const __m512i values = sums.plus(bias ? bias + row : nullptr, lanes).rounded();
    _mm512_mask_storeu_epi16(data + token * outputs + row, lanes, values);
  }
};

// The tensors of one call: x as rows, and y for them.
struct Call {
  at::Tensor input;
  at::Tensor y;

  // Checks what Python does not check beforehand.
  Call(const char* name, const at::Tensor& x, int64_t outputs,
       const std::optional<at::Tensor>& bias, Activation activation, bool amx) {
    TORCH_CHECK(x.dim() > 0 && x.scalar_type() == at::kBFloat16 && x.is_cpu(), name,
                ": x must be bfloat16 on CPU with at least one dimension");
    TORCH_CHECK(!bias || (bias->scalar_type() == at::kBFloat16 && bias->is_contiguous() &&
                          bias->numel() == outputs),
                name, ": the bias must be bfloat16 [", outputs, "]");
    TORCH_CHECK(activation == Activation::none || !bias, name, ": an activation takes no bias");
    TORCH_CHECK(!amx || has_amx(), name, ": this processor has no AMX");
    const at::Tensor rows = x.reshape({-1, x.size(-1)});
    input = rows.stride(-1) == 1 ? rows : rows.contiguous();
    std::vector<int64_t> shape = x.sizes().vec();
    shape.back() = outputs;
    y = at::empty(shape, x.options());
  }
};

}  // namespace
