// The fused low-rank linear in bfloat16 for x86 processors with AVX512-BF16:
// y = C (x[pivots] + Z x[rest]) + b, y = U (V x) + b, or y = W x + b of a whole weight.
//
// One parallel region does all of it: the rows of x are compressed into pivots and other channels,
// then the first product with the pivots added in float32, then the second product with the bias.
// A decode step so reads each weight once, in order, and wakes its threads once.
//
// The outputs may be gate and up of a gated MLP: C then has 16 rows of one, 16 of the other, and so
// on, so that a panel's sums become act(gate) * up before they are rounded or leave the cache.

#include <torch/library.h>

#include "rows.h"

namespace {

at::Tensor pack(const at::Tensor& weight) {
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16, "pack: the weight must be bfloat16");
  return packed(weight, 0);
}

// The first product has a pivot for each of its `rank` rows, or none at all; `mask` tells the pivots
// among the channels. Without packed_in there is only the second product, of a weight with `rank`
// columns. With an activation, C has rows of gate and up for each of the `outputs`, each in whole
// vectors.
at::Tensor lowrank(const at::Tensor& x, const std::optional<at::Tensor>& packed_in,
                   const at::Tensor& packed_out, const at::Tensor& mask, int64_t pivots,
                   int64_t rank, int64_t outputs, const std::optional<at::Tensor>& bias,
                   int64_t activation, bool amx) {
  const Call call("lowrank", x, outputs, bias, Activation{activation}, amx);
  Source source{halves(call.input), call.input.stride(0), call.input.size(1), words(mask), pivots};
  Target target{halves(call.y), outputs, bias ? halves(*bias) : nullptr, Activation{activation}};
  const Weight inner{packed_in ? words(*packed_in) : nullptr, rank, words_of(source.others(), 2)};
  const Weight outer{words(packed_out), target.rows(), words_of(rank, 2)};
  TORCH_CHECK((packed_in ? packed_in->numel() == packed_words(rank, inner.words)
                         : rank == source.channels && pivots == 0) &&
                  packed_out.numel() == packed_words(target.rows(), outer.words) &&
                  mask.numel() * kPanel == round_up(source.channels, kPanel),
              "lowrank: x has ", source.channels, " channels, the packed factors have others");
  const int64_t tokens = call.input.size(0), chunk = std::min(tokens, kChunk);
  const Bf16 engine{amx};
  const int threads = at::get_num_threads();
  const int64_t rest_width = round_up(source.others(), kPanel), z_width = round_up(rank, kPanel);
  Arrays arrays;
  const int64_t rest_at = arrays.add<Half>(rest_width * chunk);
  const int64_t z_at = arrays.add<Half>(packed_in ? z_width * chunk : 0);
  const int64_t chosen_at = arrays.add<Half>(source.pivot_length() * chunk);
  const int64_t row_at = arrays.add<Half>(source.row_length() * threads);
  arrays.add<Half>(kAmxTile * kPanel);  // AMX reads a full tile of tokens wherever one starts
  char* base = scratch<char>(arrays.bytes);
  const Activations rest{reinterpret_cast<Word*>(base + rest_at), rest_width / kPanel};
  const Activations z{reinterpret_cast<Word*>(base + z_at), z_width / kPanel};
  Half* const chosen = reinterpret_cast<Half*>(base + chosen_at);

  for (int64_t first = 0; first < tokens; first += chunk) {
    const Tiles tiles(std::min(chunk, tokens - first), engine.tile());
#pragma omp parallel num_threads(threads)
    {
      Half* row = reinterpret_cast<Half*>(base + row_at) + omp_get_thread_num() * source.row_length();
      engine.enter();
      for_my_tokens(tiles, [&](const Place& at) {
        source.split(at.token, chosen + at.token * source.pivot_length(), row);
        for (int64_t block = 0; block < rest.blocks; ++block)
          _mm512_storeu_si512(rest.vector(at, block), _mm512_loadu_si512(row + block * kPanel));
      });
#pragma omp barrier
      if (packed_in) {
        product(engine, rest, inner, tiles, [&](const Place& at, int64_t row, const float* sums) {
          const __mmask32 lanes = present(rank - row);
          const Half* addend = pivots ? chosen + at.token * source.pivot_length() + row : nullptr;
          const __m512i values = Sums::load(sums).plus(addend, lanes).rounded();
          _mm512_storeu_si512(z.vector(at, row / kPanel), _mm512_maskz_mov_epi16(lanes, values));
        });
#pragma omp barrier
      }
      product(engine, packed_in ? z : rest, outer, tiles,
              [&](const Place& at, int64_t row, const float* sums) {
                target.store(at.token, row, Sums::load(sums));
              });
      engine.leave();
    }
    source.data += chunk * source.stride;
    target.data += chunk * outputs;
  }
  return call.y;
}

}  // namespace

// The shapes of the factors are checked before packing, in linear.py.
TORCH_LIBRARY(svdserve, library) {
  library.def("pack(Tensor weight) -> Tensor");
  library.def(
      "lowrank(Tensor x, Tensor? packed_in, Tensor packed_out, Tensor mask, int pivots, int rank, "
      "int outputs, Tensor? bias, int activation, bool amx) -> Tensor");
  library.def("has_amx() -> bool", &has_amx);
}

TORCH_LIBRARY_IMPL(svdserve, CPU, library) {
  library.impl("pack", &pack);
  library.impl("lowrank", &lowrank);
}
