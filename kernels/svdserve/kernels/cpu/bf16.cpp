// The fused low-rank linear for x86 processors with AVX512-BF16: y = C (x[pivots] + Z x[rest]) + b.
//
// One parallel region does all of it: the rows of x are compressed into pivots and other channels,
// then the first product with the pivots added in float32, then the second product with the bias.
// A decode step so reads each weight once, in order, and wakes its threads once.
//
// Weights are packed in panels of 32 rows, [column pair][row][2], the operand order of vdpbf16ps;
// the last panel has 16 rows where those are enough. Activations are packed in tiles of tokens,
// [block of 32 columns][token][32], so that one pointer walks a tile and whole vectors fill it: 12
// tokens times 32 rows keep 24 of the 32 vector registers busy. With AMX a tile has up to 32 tokens;
// both operands already lie as its tile registers want them.
//
// The outputs may be gate and up of a gated MLP: C then has 16 rows of one, 16 of the other, and so
// on, so that a panel's sums become act(gate) * up before they are rounded or leave the cache.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <immintrin.h>
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "activation.h"
#include "multiply.h"

namespace {

constexpr int64_t kChunk = 768;             // tokens at a time, which bounds the scratch memory
constexpr int64_t kGroupBytes = 384 << 10;  // panels that stay in the L2 cache while tiles pass
constexpr int64_t kPairBytes = 4 * kPanel;  // of a panel
constexpr std::size_t kHugePage = 2 << 20;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

Half* halves(const at::Tensor& tensor) { return static_cast<Half*>(tensor.data_ptr()); }
const Pair* words(const at::Tensor& tensor) { return static_cast<const Pair*>(tensor.data_ptr()); }

// Lanes of 16-bit values that exist, where `count` are left.
__mmask32 present(int64_t count) {
  return count >= kPanel ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
}

// Memory that this thread keeps between calls, as fresh pages would cost more than many a product.
template <typename T>
T* scratch(int64_t count) {
  static thread_local std::unique_ptr<T[], decltype(&std::free)> kept{nullptr, std::free};
  static thread_local int64_t size = 0;
  if (size < count) {
    kept.reset();
    void* memory = std::aligned_alloc(64, round_up(count * sizeof(T), 64));
    if (!memory) throw std::bad_alloc();
    kept.reset(static_cast<T*>(memory));
    size = count;
  }
  return kept.get();
}

// AMX reads whole blocks of 16 pairs: past the end of a panel it finds the next panel, past the end
// of the last one this slack, and the activations there are zero.
constexpr int64_t kSlack = kLanes * kPanel * 2;

int64_t packed_size(int64_t rows, int64_t columns) {
  return round_up(rows, kLanes) * round_up(columns, 2) + kSlack;
}

// A packed weight [rows, 2 * pairs].
struct Weight {
  Half* data;
  int64_t rows;
  int64_t pairs;

  int64_t panels() const { return (rows + kPanel - 1) / kPanel; }
  Half* panel(int64_t index) const { return data + index * kPanel * 2 * pairs; }
  int blocks(int64_t index) const { return rows - index * kPanel <= kLanes ? 1 : 2; }
};

// Tokens cut into tiles of about one size.
struct Tiles {
  int64_t tokens;
  int64_t count;

  Tiles(int64_t n, int64_t most) : tokens(n), count((n + most - 1) / most) {}
  int64_t start(int64_t index) const { return tokens * index / count; }
  int size(int64_t index) const { return static_cast<int>(start(index + 1) - start(index)); }
};

// Packed activations [tokens, 32 * blocks], tile after tile.
struct Activations {
  Half* data;
  int64_t blocks;

  Half* tile(int64_t start) const { return data + start * blocks * kPanel; }
  // 32 columns of one token.
  Half* vector(int64_t token, int size, int place, int64_t block) const {
    return tile(token - place) + (block * size + place) * kPanel;
  }
};

// 32 sums plus 32 bfloat16 (none where `addend` is null), rounded to bfloat16.
__m512i add_and_round(const float* sums, const Half* addend, __mmask32 lanes) {
  __m512 low = _mm512_loadu_ps(sums), high = _mm512_loadu_ps(sums + kLanes);
  if (addend) {
    const __m512i added = _mm512_maskz_loadu_epi16(lanes, addend);
    const auto widen = [](__m256i bits) {
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    };
    low = _mm512_add_ps(low, widen(_mm512_castsi512_si256(added)));
    high = _mm512_add_ps(high, widen(_mm512_extracti64x4_epi64(added, 1)));
  }
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// Half-open.
struct Range {
  int64_t begin;
  int64_t end;

  // One of `count` about equal parts.
  static Range part(int64_t size, int index, int count) {
    return {size * index / count, size * (index + 1) / count};
  }
};

// Some panels of W times some tiles of x; `store(token, size of its tile, its place there, row,
// sums [32])` gets every result.
template <typename Store>
void multiply_all(const Engine& engine, const Activations& x, const Weight& w, const Tiles& tiles,
                  Range panels, Range some, const Store& store) {
  const int64_t tile_count = some.end - some.begin, panel_bytes = w.pairs * kPairBytes;
  // Where even a few panels would fill the cache, a group is wider and is done in blocks of columns.
  const bool whole = tile_count < 2 || panel_bytes <= kGroupBytes / 4;
  const int64_t block = whole ? std::max<int64_t>(1, w.pairs) : engine.block_pairs();
  const int64_t group = std::max<int64_t>(1, kGroupBytes / std::max<int64_t>(1, block * kPairBytes));
  const int64_t kept = whole ? 0 : kAmxTile * kPanel;  // between the sums of two tiles or panels
  float* const sums = scratch<float>(kAmxTile * kPanel + tile_count * group * kept);
  for (int64_t first = panels.begin; first < panels.end; first += group) {
    const int64_t last = std::min(first + group, panels.end);
    for (int64_t pair = 0; pair == 0 || pair < w.pairs; pair += block) {
      const int64_t pairs = std::min(block, w.pairs - pair);
      for (int64_t tile = some.begin; tile < some.end; ++tile) {
        const int64_t start = tiles.start(tile);
        const int size = tiles.size(tile);
        const Half* inputs = x.tile(start) + pair * 2 * size;
        for (int64_t panel = first; panel < last; ++panel) {
          const int blocks = w.blocks(panel);
          float* out = sums + ((tile - some.begin) * group + panel - first) * kept;
          const Half* weights = w.panel(panel) + pair * 2 * kLanes * blocks;
          engine.multiply(blocks, size)(inputs, size, weights, pairs, pair > 0, out);
          if (pair + block < w.pairs) continue;
          for (int place = 0; place < size; ++place)
            store(start + place, size, place, panel * kPanel, out + place * kPanel);
        }
      }
    }
  }
}

// This thread's share of W x: as many panels as the others, and of the panels that are left over
// its part of the tokens; of a single tile, such as a decode step has, its part of the panels.
template <typename Store>
void product(const Engine& engine, const Activations& x, const Weight& w, const Tiles& tiles,
             const Store& store) {
  const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
  const int64_t even = tiles.count < threads ? w.panels() : w.panels() / threads * threads;
  const Range mine = Range::part(even, thread, threads), all{0, tiles.count};
  const Range left{even, w.panels()}, share = Range::part(tiles.count, thread, threads);
  multiply_all(engine, x, w, tiles, mine, all, store);
  multiply_all(engine, x, w, tiles, left, share, store);
}

// The input [tokens, channels] and which of its channels are pivots: one bit each, 32 in a word.
struct Input {
  const Half* data;
  int64_t stride;
  int64_t channels;
  const Pair* mask;
  int64_t pivots;
};

// Rows of halves, one for each token, wide enough that whole vectors may be stored at their end.
struct Rows {
  Half* data;
  int64_t stride;

  Half* row(int64_t index) const { return data + index * stride; }
};

// This thread's tokens: pivots to `chosen`, the other channels to `rest`; `row` is its own scratch.
void split(const Input& x, const Tiles& tiles, const Rows& chosen, const Activations& rest,
           Half* row) {
  const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    const int64_t start = tiles.start(tile);
    const int size = tiles.size(tile);
    for (int place = 0; place < size; ++place) {
      if ((start + place) % threads != thread) continue;
      const Half* from = x.data + (start + place) * x.stride;
      Half *pivot = chosen.row(start + place), *other = row;
      for (int64_t channel = 0; channel < x.channels; channel += kPanel) {
        const __mmask32 lanes = present(x.channels - channel);
        const __mmask32 pivots = x.mask[channel / kPanel], others = lanes & ~pivots;
        const __m512i values = _mm512_maskz_loadu_epi16(lanes, from + channel);
        _mm512_storeu_si512(pivot, _mm512_maskz_compress_epi16(pivots, values));
        _mm512_storeu_si512(other, _mm512_maskz_compress_epi16(others, values));
        pivot += _mm_popcnt_u32(pivots);
        other += _mm_popcnt_u32(others);
      }
      _mm512_storeu_si512(other, _mm512_setzero_si512());  // up to the end of the last block
      for (int64_t block = 0; block < rest.blocks; ++block)
        _mm512_storeu_si512(rest.vector(start + place, size, place, block),
                            _mm512_loadu_si512(row + block * kPanel));
    }
  }
}

// Memory of which a step reads every byte: in huge pages where Linux has some to give, since with
// small ones it would wait for addresses to be translated as much as for the bytes themselves.
at::Tensor in_huge_pages(int64_t count, const at::TensorOptions& options) {
  const std::size_t bytes = count * options.dtype().itemsize();
  if (bytes < kHugePage) return at::empty({count}, options);
  void* memory = nullptr;
  if (posix_memalign(&memory, kHugePage, bytes)) throw std::bad_alloc();
  madvise(memory, bytes, MADV_HUGEPAGE);  // an error leaves the pages small
  return at::from_blob(memory, {count}, &std::free, options);
}

at::Tensor pack(const at::Tensor& weight) {
  const at::Tensor source = weight.contiguous();
  const int64_t rows = source.size(0), columns = source.size(1), pairs = (columns + 1) / 2;
  const at::Tensor packed = in_huge_pages(packed_size(rows, columns), source.options());
  packed.slice(0, packed.numel() - kSlack).zero_();
  const Half* from = halves(source);
  const Weight layout{halves(packed), rows, pairs};
  at::parallel_for(0, layout.panels(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t start = panel * kPanel, width = layout.blocks(panel) * kLanes;
      const int64_t present = std::min(width, rows - start);
      std::memset(layout.panel(panel), 0, width * pairs * sizeof(Pair));
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const int64_t length = std::min<int64_t>(2, columns - 2 * pair) * sizeof(Half);
        for (int64_t row = 0; row < present; ++row)
          std::memcpy(layout.panel(panel) + (pair * width + row) * 2,
                      from + (start + row) * columns + 2 * pair, length);
      }
    }
  });
  return packed;
}

// y = C (x[pivots] + Z x[rest]) + b. The first product has a pivot for each of its `rank` rows, or
// none at all; `mask` tells the pivots among the channels. With an activation, C
// has rows of gate and up for each of the `outputs`, each in whole vectors.
at::Tensor lowrank(const at::Tensor& x, const at::Tensor& packed_in, const at::Tensor& packed_out,
                   const at::Tensor& mask, int64_t pivots, int64_t rank, int64_t outputs,
                   const std::optional<at::Tensor>& bias, int64_t activation, bool amx) {
  TORCH_CHECK(x.dim() > 0 && x.scalar_type() == at::kBFloat16 && x.is_cpu(),
              "lowrank: x must be bfloat16 on CPU with at least one dimension");
  const Activation act{activation};
  const bool gated = act != Activation::none;
  const int64_t rows_out = gated ? 2 * round_up(outputs, kLanes) : outputs;
  TORCH_CHECK(packed_in.numel() == packed_size(rank, x.size(-1) - pivots) &&
                  packed_out.numel() == packed_size(rows_out, rank) &&
                  mask.numel() * kPanel == round_up(x.size(-1), kPanel),
              "lowrank: x has ", x.size(-1), " channels, the packed factors have others");
  TORCH_CHECK(!bias || (bias->scalar_type() == at::kBFloat16 && bias->is_contiguous() &&
                        bias->numel() == outputs),
              "lowrank: the bias must be bfloat16 [", outputs, "]");
  TORCH_CHECK(!gated || !bias, "lowrank: an activation takes no bias");
  TORCH_CHECK(!amx || has_amx(), "lowrank: this processor has no AMX");
  const at::Tensor rows = x.reshape({-1, x.size(-1)});
  const at::Tensor input = rows.stride(-1) == 1 ? rows : rows.contiguous();
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = outputs;
  const at::Tensor y = at::empty(shape, x.options());
  const int64_t tokens = input.size(0), chunk = std::min(tokens, kChunk);
  if (tokens == 0) return y;

  Input part{halves(input), input.stride(0), input.size(1), words(mask), pivots};
  const Weight inner{halves(packed_in), rank, (part.channels - pivots + 1) / 2};
  const Weight outer{halves(packed_out), rows_out, (rank + 1) / 2};
  const Half* offset = bias ? halves(*bias) : nullptr;
  Half* result = halves(y);

  const Engine engine{amx};
  const int threads = at::get_num_threads();
  const int64_t chosen_stride = round_up(pivots, kPanel) + kPanel;
  const int64_t row_length = round_up(part.channels, kPanel) + 2 * kPanel;
  const int64_t rest_width = round_up(part.channels - pivots, kPanel);
  const int64_t z_width = round_up(rank, kPanel);
  const int64_t z_start = rest_width * chunk, chosen_start = z_start + z_width * chunk;
  const int64_t rows_start = chosen_start + chosen_stride * chunk;
  // AMX reads a full tile of tokens wherever one starts.
  Half* base = scratch<Half>(rows_start + row_length * threads + kAmxTile * kPanel);
  const Activations rest{base, rest_width / kPanel}, z{base + z_start, z_width / kPanel};
  const Rows chosen{base + chosen_start, chosen_stride};

  for (int64_t first = 0; first < tokens; first += chunk) {
    const Tiles tiles(std::min(chunk, tokens - first), engine.tile());
#pragma omp parallel num_threads(threads)
    {
      engine.enter();
      split(part, tiles, chosen, rest, base + rows_start + omp_get_thread_num() * row_length);
#pragma omp barrier
      product(engine, rest, inner, tiles,
              [&](int64_t token, int size, int place, int64_t row, const float* sums) {
                const __mmask32 lanes = present(rank - row);
                const Half* addend = pivots ? chosen.row(token) + row : nullptr;
                const __m512i values = add_and_round(sums, addend, lanes);
                _mm512_storeu_si512(z.vector(token, size, place, row / kPanel),
                                    _mm512_maskz_mov_epi16(lanes, values));
              });
#pragma omp barrier
      if (gated) {
        product(engine, z, outer, tiles,
                [&](int64_t token, int, int, int64_t row, const float* sums) {
                  const __mmask16 lanes = present(outputs - row / 2);
                  const __m512 values = multiplied(act, _mm512_loadu_ps(sums),
                                                   _mm512_loadu_ps(sums + kLanes));
                  _mm256_mask_storeu_epi16(result + token * outputs + row / 2, lanes,
                                           (__m256i)_mm512_cvtneps_pbh(values));
                });
      } else {
        product(engine, z, outer, tiles,
                [&](int64_t token, int, int, int64_t row, const float* sums) {
                  const __mmask32 lanes = present(outputs - row);
                  const __m512i values = add_and_round(sums, offset ? offset + row : nullptr, lanes);
                  _mm512_mask_storeu_epi16(result + token * outputs + row, lanes, values);
                });
      }
      engine.leave();
    }
    part.data += chunk * part.stride;
    result += chunk * outputs;
  }
  return y;
}

}  // namespace

// The shapes of the factors are checked before packing, in cpu.py.
TORCH_LIBRARY(svdserve, library) {
  library.def("pack(Tensor weight) -> Tensor");
  library.def(
      "lowrank(Tensor x, Tensor packed_in, Tensor packed_out, Tensor mask, int pivots, int rank, "
      "int outputs, Tensor? bias, int activation, bool amx) -> Tensor");
  library.def("has_amx() -> bool", &has_amx);
}

TORCH_LIBRARY_IMPL(svdserve, CPU, library) {
  library.impl("pack", &pack);
  library.impl("lowrank", &lowrank);
}
