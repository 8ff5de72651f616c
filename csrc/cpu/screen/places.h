// Which latents need work for every token. A latent whose row is zero has one pre-activation for all tokens, and
// latents that are equal (row, bias, gain to the bit) have equal ones: dead, pruned and copied latents cost nothing a
// token.
//
// A *place* stands for a set of equal latents, its lowest number first. `constant` latents have rows of zeros; `odd`
// ones are not finite and are computed from x - b_dec itself, since a folded bias would turn Inf - Inf into NaN.
#pragma once

#include <cstdint>
#include <vector>

#include "checks.h"

namespace darkmatter::cpu {

// The int32 tensor `groups` of the op table, seen as what it holds:
//   [n_places, n_twins, n_constant, n_odd, reach | latent of each place |
//    twin_start [n_places + 1], twins | constant | odd],
// the second part only where n_twins > 0; reach is a float32, bit by bit.
struct Places {
  int64_t n_places = 0, n_twins = 0, n_constant = 0, n_odd = 0;
  float reach = 0.0f;  // the largest ||x|| for which no pre-activation overflows before its gain
  const int32_t *latent = nullptr, *twin_start = nullptr, *twins = nullptr, *constant = nullptr, *odd = nullptr;

  // visit(latent) for every latent of a place, ascending.
  template <typename Visit>
  void each_of(int64_t place, const Visit& visit) const {
    visit(latent[place]);
    if (n_twins > 0) {
      for (int32_t t = twin_start[place]; t < twin_start[place + 1]; ++t) {
        visit(twins[t]);
      }
    }
  }
};

constexpr int64_t kGroupsHead = 5, kReachAt = 4;

// Checks a `groups` tensor for n_latents latents and looks into it; the tensor must outlive the result.
Places places_of(const Tensor& groups, int64_t n_latents);

// The groups of weight rows [F, d] with their folded biases and gains. `merge`: look for equal rows (a pass over the
// weights); else every finite latent is a place of its own.
Tensor group_latents(const Tensor& weight, const double* bias, const OptionalTensor& gain, bool merge);

}  // namespace darkmatter::cpu
