// How weights and activations are packed, and how threads and caches share a product of them.
//
// Both are made of words of 32 bits: 2 neighbouring columns in bfloat16, or 4 in int8. A weight is
// packed in panels of 32 rows, [word][row], the operand order of vdpbf16ps and vpdpbusd; the last
// panel has 16 rows where those are enough. Activations are packed in tiles of tokens, [block of 16
// words][token][16], so that one pointer walks a tile and whole vectors fill it. With AMX a tile has
// up to 32 tokens; both operands already lie as its tile registers want them.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "memory.h"

namespace {

using std::int64_t;
using Word = std::uint32_t;

constexpr int kLanes = 16;            // words, or float32, in a vector
constexpr int kPanel = 2 * kLanes;    // rows of a packed panel
constexpr int kAmxTile = 2 * kLanes;  // tokens of a tile with AMX, at most
constexpr int kAhead = 4096;          // bytes of weights that are asked for in advance
constexpr int64_t kChunk = 768;       // tokens at a time, which bounds the scratch memory
constexpr int64_t kCached = 384 << 10;  // bytes of panels that stay in the L2 cache under all tiles

// AMX multiplies whole blocks of 16 words: past the end of a panel they find the next panel, past
// the end of the last one this slack, which is zero as NaNs would spread; the activations are zero.
constexpr int64_t kSlack = kLanes * kPanel;

int64_t words_of(int64_t columns, int64_t bytes_each) {
  return round_up(columns * bytes_each, sizeof(Word)) / sizeof(Word);
}

int64_t packed_words(int64_t rows, int64_t words) {
  return round_up(rows, kLanes) * words + kSlack;
}

// A packed weight [rows, words].
struct Weight {
  Word* data;
  int64_t rows;
  int64_t words;

  int64_t panels() const { return (rows + kPanel - 1) / kPanel; }
  int blocks(int64_t panel) const { return rows - panel * kPanel <= kLanes ? 1 : 2; }
  Word* at(int64_t panel, int64_t word) const {
    return data + panel * kPanel * words + word * kLanes * blocks(panel);
  }
};

// Tokens cut into tiles of about one size.
struct Tiles {
  int64_t tokens;
  int64_t count;

  Tiles(int64_t n, int64_t most) : tokens(n), count((n + most - 1) / most) {}
  int64_t start(int64_t index) const { return tokens * index / count; }
  int size(int64_t index) const { return static_cast<int>(start(index + 1) - start(index)); }
};

// Where a token stands: in a tile of `size` tokens, as number `place`.
struct Place {
  int64_t token;
  int size;
  int place;
};

// Packed activations [tokens, 16 * blocks words], tile after tile.
struct Activations {
  Word* data;
  int64_t blocks;

  // A tile, from a word that starts a block.
  const Word* tile(int64_t start, int size, int64_t word) const {
    return data + start * blocks * kLanes + word * size;
  }
  // 16 words of one token.
  Word* vector(const Place& at, int64_t block) const {
    return data + ((at.token - at.place) * blocks + block * at.size + at.place) * kLanes;
  }
};

// Half-open.
struct Range {
  int64_t begin;
  int64_t end;

  // One of `count` about equal parts.
  static Range part(int64_t size, int index, int count) {
    return {size * index / count, size * (index + 1) / count};
  }
};

// Some panels of W times some tiles of x; `store(place, row, sums [32])` gets every result.
template <typename Engine, typename Store>
void multiply_all(const Engine& engine, const typename Engine::Input& x, const Weight& w,
                  const Tiles& tiles, Range panels, Range some, const Store& store) {
  constexpr int64_t kWordBytes = kPanel * sizeof(Word);  // of a panel
  const int64_t tile_count = some.end - some.begin;
  // Where even a few panels would fill the cache, a group is wider and is done in blocks of columns.
  const bool whole = tile_count < 2 || w.words * kWordBytes <= kCached / 4;
  const int64_t block = whole ? std::max<int64_t>(1, w.words) : engine.block_words();
  const int64_t group = std::max<int64_t>(1, kCached / std::max<int64_t>(1, block * kWordBytes));
  const int64_t kept = whole ? 0 : engine.tile() * kPanel;  // between the sums of two tiles or panels
  float* const sums = scratch<float>(kAmxTile * kPanel + tile_count * group * kept);
  for (int64_t first = panels.begin; first < panels.end; first += group) {
    const int64_t last = std::min(first + group, panels.end);
    for (int64_t word = 0; word == 0 || word < w.words; word += block) {
      const int64_t words = std::min(block, w.words - word);
      for (int64_t tile = some.begin; tile < some.end; ++tile) {
        const int64_t start = tiles.start(tile);
        const int size = tiles.size(tile);
        for (int64_t panel = first; panel < last; ++panel) {
          float* out = sums + ((tile - some.begin) * group + panel - first) * kept;
          engine.multiply(x, start, size, word, w.at(panel, word), w.blocks(panel), words, out);
          if (word + block < w.words) continue;
          for (int place = 0; place < size; ++place)
            store(Place{start + place, size, place}, panel * kPanel, out + place * kPanel);
        }
      }
    }
  }
}

// This thread's share of W x: as many panels as the others, and of the panels that are left over
// its part of the tokens; of a single tile, such as a decode step has, its part of the panels.
template <typename Engine, typename Store>
void product(const Engine& engine, const typename Engine::Input& x, const Weight& w,
             const Tiles& tiles, const Store& store) {
  const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
  const int64_t even = tiles.count < threads ? w.panels() : w.panels() / threads * threads;
  const Range mine = Range::part(even, thread, threads), all{0, tiles.count};
  const Range left{even, w.panels()}, share = Range::part(tiles.count, thread, threads);
  multiply_all(engine, x, w, tiles, mine, all, store);
  multiply_all(engine, x, w, tiles, left, share, store);
}

// A contiguous weight [rows, columns] as panels; `flip` is what its words are combined with by xor.
at::Tensor packed(const at::Tensor& weight, Word flip) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_cpu() && weight.is_contiguous(),
              "pack: the weight must be a contiguous matrix on CPU");
  const int64_t rows = weight.size(0), row_bytes = weight.size(1) * weight.element_size();
  const int64_t words = words_of(weight.size(1), weight.element_size());
  const at::Tensor result = in_huge_pages(packed_words(rows, words), weight.options().dtype(at::kInt));
  result.zero_();
  const char* from = static_cast<const char*>(weight.data_ptr());
  const Weight layout{static_cast<Word*>(result.data_ptr()), rows, words};
  at::parallel_for(0, layout.panels(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t start = panel * kPanel, width = layout.blocks(panel) * kLanes;
      const int64_t present = std::min(width, rows - start);
      Word* to = layout.at(panel, 0);
      for (int64_t word = 0; word < words; ++word) {
        const int64_t offset = word * sizeof(Word);
        const std::size_t length = std::min<int64_t>(sizeof(Word), row_bytes - offset);
        for (int64_t row = 0; row < width; ++row, ++to) {
          *to = 0;
          if (row < present) std::memcpy(to, from + (start + row) * row_bytes + offset, length);
          *to ^= flip;
        }
      }
    }
  });
  return result;
}

}  // namespace
