// The fused low-rank linear with int8 weights for x86 processors with AVX512-VNNI:
// y = C (x[pivots] + Z x[rest]) + b, y = U (V x) + b, or y = W x + b of a whole weight.
//
// bf16.cpp says what one parallel region does; here two roundings are among it (rounding.h): of
// x[rest], and of the latent, to which x[pivots] is added before, in float32 and unrounded. Sums of
// each row of a weight are multiplied by that row's scale.

#include <torch/library.h>

#include "rounding.h"
#include "rows.h"

namespace {

at::Tensor pack_int8(const at::Tensor& weight) {
  TORCH_CHECK(weight.scalar_type() == at::kChar, "pack_int8: the weight must be int8");
  return packed(weight, kUnsigned);
}

// One token's halves as float32 [round_up(count, 32)].
void widen(const Half* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kPanel) {
    const Sums values = Sums::widen(_mm512_loadu_si512(from + i));
    _mm512_storeu_ps(to + i, values.low);
    _mm512_storeu_ps(to + i + kLanes, values.high);
  }
}

// Rounded activations in one scratch memory.
struct Rounded {
  int64_t blocks, values_at, scales_at;

  Rounded(Arrays& arrays, int64_t columns, int64_t tokens)
      : blocks(round_up(words_of(columns, 1), kLanes) / kLanes),
        values_at(arrays.add<Word>(blocks * kLanes * tokens)),
        scales_at(arrays.add<GroupScale>(blocks * tokens)) {}
  Int8Activations in(char* base) const {
    return {{reinterpret_cast<Word*>(base + values_at), blocks},
            reinterpret_cast<GroupScale*>(base + scales_at)};
  }
};

// The arguments are those of `lowrank`; the scales are float32, one for each row that is packed, in
// whole panels.
at::Tensor lowrank_int8(const at::Tensor& x, const std::optional<at::Tensor>& packed_in,
                        const std::optional<at::Tensor>& scale_in, const at::Tensor& packed_out,
                        const at::Tensor& scale_out, const at::Tensor& mask, int64_t pivots,
                        int64_t rank, int64_t outputs, const std::optional<at::Tensor>& bias,
                        int64_t activation, bool amx) {
  const Call call("lowrank_int8", x, outputs, bias, Activation{activation}, amx);
  Source source{halves(call.input), call.input.stride(0), call.input.size(1), words(mask), pivots};
  Target target{halves(call.y), outputs, bias ? halves(*bias) : nullptr, Activation{activation}};
  const Weight inner{packed_in ? words(*packed_in) : nullptr, rank, words_of(source.others(), 1)};
  const Weight outer{words(packed_out), target.rows(), words_of(rank, 1)};
  TORCH_CHECK((packed_in ? scale_in && packed_in->numel() == packed_words(rank, inner.words) &&
                               scale_in->numel() == inner.panels() * kPanel
                         : rank == source.channels && pivots == 0) &&
                  packed_out.numel() == packed_words(target.rows(), outer.words) &&
                  scale_out.numel() == outer.panels() * kPanel &&
                  mask.numel() * kPanel == round_up(source.channels, kPanel),
              "lowrank_int8: x has ", source.channels, " channels, the packed factors have others");
  const float* const row_scales = packed_in ? scale_in->data_ptr<float>() : nullptr;
  const float* const out_scales = scale_out.data_ptr<float>();
  const int64_t tokens = call.input.size(0), chunk = std::min(tokens, kChunk);
  const Int8 engine{amx};
  const int threads = at::get_num_threads();
  const int64_t z_length = round_up(rank, kPanel), float_length = round_up(source.channels, kPanel);
  Arrays arrays;
  const Rounded rest_arrays(arrays, source.others(), chunk);
  const Rounded z_arrays(arrays, packed_in ? rank : 0, chunk);
  const int64_t z_at = arrays.add<float>(packed_in ? z_length * chunk : 0);
  const int64_t chosen_at = arrays.add<Half>(source.pivot_length() * chunk);
  const int64_t row_at = arrays.add<Half>(source.row_length() * threads);
  const int64_t float_at = arrays.add<float>(float_length * threads);
  arrays.add<Word>(kAmxTile * kLanes);  // AMX reads a full tile of tokens wherever one starts
  char* base = scratch<char>(arrays.bytes);
  const Int8Activations rest = rest_arrays.in(base), rounded_z = z_arrays.in(base);
  float* const z = reinterpret_cast<float*>(base + z_at);
  Half* const chosen = reinterpret_cast<Half*>(base + chosen_at);

  for (int64_t first = 0; first < tokens; first += chunk) {
    const Tiles tiles(std::min(chunk, tokens - first), engine.tile());
#pragma omp parallel num_threads(threads)
    {
      const int thread = omp_get_thread_num();
      Half* row = reinterpret_cast<Half*>(base + row_at) + thread * source.row_length();
      float* wide = reinterpret_cast<float*>(base + float_at) + thread * float_length;
      engine.enter();
      for_my_tokens(tiles, [&](const Place& at) {
        source.split(at.token, chosen + at.token * source.pivot_length(), row);
        widen(row, source.others(), wide);
        round_row(wide, source.others(), at, rest);
      });
#pragma omp barrier
      if (packed_in) {
        product(engine, rest, inner, tiles, [&](const Place& at, int64_t row, const float* sums) {
          const Half* addend = pivots ? chosen + at.token * source.pivot_length() + row : nullptr;
          const Sums values =
              Sums::load(sums).times(row_scales + row).plus(addend, present(rank - row));
          float* to = z + at.token * z_length + row;
          _mm512_storeu_ps(to, values.low);
          _mm512_storeu_ps(to + kLanes, values.high);
        });
#pragma omp barrier
        for_my_tokens(tiles, [&](const Place& at) {
          round_row(z + at.token * z_length, rank, at, rounded_z);
        });
#pragma omp barrier
      }
      product(engine, packed_in ? rounded_z : rest, outer, tiles,
              [&](const Place& at, int64_t row, const float* sums) {
                target.store(at.token, row, Sums::load(sums).times(out_scales + row));
              });
      engine.leave();
    }
    source.data += chunk * source.stride;
    target.data += chunk * outputs;
  }
  return call.y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(svdserve, library) {
  library.def("pack_int8(Tensor weight) -> Tensor");
  library.def(
      "lowrank_int8(Tensor x, Tensor? packed_in, Tensor? scale_in, Tensor packed_out, "
      "Tensor scale_out, Tensor mask, int pivots, int rank, int outputs, Tensor? bias, "
      "int activation, bool amx) -> Tensor");
}

TORCH_LIBRARY_IMPL(svdserve, CPU, library) {
  library.impl("pack_int8", &pack_int8);
  library.impl("lowrank_int8", &lowrank_int8);
}
