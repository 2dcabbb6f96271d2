// Loops over registers, unrolled by the language rather than by the optimiser.
//
// GCC 12 keeps arrays of vectors in registers only if every index is a constant before it optimises.
// With "#pragma GCC unroll" half of the sums of a product stayed in memory, which took twice as long.

#pragma once

#include <utility>

namespace {

// Calls function(row, column) with constants, row by row.
template <int Rows, int Columns, typename Function>
[[gnu::always_inline]] inline void unrolled(const Function& function) {
  [&]<int... Index>(std::integer_sequence<int, Index...>) __attribute__((always_inline)) {
    (function(std::integral_constant<int, Index / Columns>{},
              std::integral_constant<int, Index % Columns>{}),
     ...);
  }(std::make_integer_sequence<int, Rows * Columns>{});
}

}  // namespace
