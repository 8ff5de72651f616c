// How a tensor core adds, at the worst that the screen's bound must allow for.
#pragma once

#include <algorithm>
#include <cmath>

namespace darkmatter::cuda {

// Four products and the running sum are aligned to the largest of them and truncated to 24 bits.
inline double add_truncated(double sum, const double (&products)[4]) {
  double largest = std::fabs(sum);
  for (const double term : products) {
    largest = std::max(largest, std::fabs(term));
  }
  if (!(largest > 0.0 && largest < INFINITY)) {
    return sum + products[0] + products[1] + products[2] + products[3];
  }
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 23);
  double total = std::trunc(sum / unit) * unit;
  for (const double term : products) {
    total += std::trunc(term / unit) * unit;
  }
  return total;
}

}  // namespace darkmatter::cuda
