#include "cpu/screen/places.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#include "cpu/kernels/dispatch.h"

namespace darkmatter::cpu {

namespace {

enum class Row : int8_t { usual, zero, not_finite };

struct Look {
  std::vector<uint64_t> hash;  // of the bits of row, bias and gain
  std::vector<Row> kind;
};

// Sixty-four bits that differ for rows that differ, up to chance: equal ones are compared again.
inline uint64_t mixed(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9E3779B97F4A7C15ull;
  return hash ^ (hash >> 29);
}

template <typename T>
Row kind_of(const T* row, int64_t d) {
  using Bits = Word<T>;
  const auto exponent = std::bit_cast<Bits>(std::numeric_limits<T>::infinity());  // all ones in Inf and NaN alone
  Bits any = 0, not_finite = 0;
  for (int64_t e = 0; e < d; ++e) {
    const auto bits = std::bit_cast<Bits>(row[e]);
    any |= static_cast<Bits>(bits << 1);  // without the sign: -0 is zero
    not_finite |= static_cast<Bits>((bits & exponent) == exponent);
  }
  return not_finite ? Row::not_finite : any ? Row::usual : Row::zero;
}

template <typename T>
uint64_t hash_of(const T* row, int64_t d) {
  constexpr int64_t kWord = 8 / sizeof(T);
  uint64_t lanes[4] = {1, 2, 3, 4};  // independent: a multiplication takes several cycles
  int64_t e = 0;
  for (int64_t lane = 0; e + kWord <= d; e += kWord, lane = (lane + 1) % 4) {
    uint64_t word;
    std::memcpy(&word, row + e, 8);
    lanes[lane] = mixed(lanes[lane], word);
  }
  uint64_t rest = 0;
  if (e < d) {  // the rows of a weight without rows are at no address, which no memcpy may be given
    std::memcpy(&rest, row + e, (d - e) * sizeof(T));
  }
  return mixed(mixed(mixed(mixed(lanes[0], lanes[1]), lanes[2]), lanes[3]), rest);
}

template <typename T>
Look look(const T* weight, int64_t n_latents, int64_t d, const double* bias, const T* gain) {
  Look found{std::vector<uint64_t>(n_latents), std::vector<Row>(n_latents)};
  parallel_ranges(n_latents, 64, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      found.kind[j] = kind_of(weight + j * d, d);
      found.hash[j] = mixed(hash_of(weight + j * d, d), std::bit_cast<uint64_t>(bias[j]));
      if (gain != nullptr) {
        uint64_t bits = 0;
        std::memcpy(&bits, gain + j, sizeof(T));
        found.hash[j] = mixed(found.hash[j], bits);
      }
      if (!(bias[j] < std::numeric_limits<double>::infinity())) {
        found.kind[j] = Row::not_finite;
      }
    }
  });
  return found;
}

// The first latent of the same row as each, itself where there is none before it.
template <typename T>
std::vector<int32_t> first_equals(
    const Look& found, const T* weight, int64_t n_latents, int64_t d, const double* bias, const T* gain) {
  std::vector<int32_t> first(n_latents);
  std::iota(first.begin(), first.end(), 0);
  std::vector<std::pair<uint64_t, int32_t>> order(n_latents);  // sorted: equal hashes meet, the lowest latent first
  for (int64_t j = 0; j < n_latents; ++j) {
    order[j] = {found.hash[j], static_cast<int32_t>(j)};
  }
  std::sort(order.begin(), order.end());
  const auto equal = [&](int64_t a, int64_t b) {
    return (d == 0 || std::memcmp(weight + a * d, weight + b * d, d * sizeof(T)) == 0) &&
           std::memcmp(bias + a, bias + b, sizeof(double)) == 0 &&
           (gain == nullptr || std::memcmp(gain + a, gain + b, sizeof(T)) == 0);
  };
  for (int64_t i = 1, head = 0; i < n_latents; ++i) {
    if (order[i].first != order[head].first || !equal(order[i].second, order[head].second)) {
      head = i;  // of another row with the same hash as well: it then only misses its equals
    } else {
      first[order[i].second] = order[head].second;
    }
  }
  return first;
}

template <typename T>
Tensor grouped(const Tensor& weight, const double* bias, const T* gain, bool merge) {
  const int64_t n_latents = weight.size(0), d = weight.size(1);
  const T* rows = data<T>(weight);
  const Look found = look(rows, n_latents, d, bias, gain);
  std::vector<int32_t> first(n_latents);
  std::iota(first.begin(), first.end(), 0);
  if (merge) {
    first = first_equals(found, rows, n_latents, d, bias, gain);
  }
  std::vector<int32_t> latent, constant, odd, count(n_latents, 0);
  int64_t n_twins = 0;
  for (int32_t j = 0; j < n_latents; ++j) {
    if (found.kind[j] != Row::usual) {
      (found.kind[j] == Row::zero && merge ? constant : found.kind[j] == Row::zero ? latent : odd).push_back(j);
    } else if (first[j] == j) {
      latent.push_back(j);
    } else {
      ++count[first[j]];
      ++n_twins;
    }
  }
  const int64_t n_places = static_cast<int64_t>(latent.size());
  const int64_t size = kGroupsHead + n_places + (n_twins ? n_places + 1 + n_twins : 0) + constant.size() + odd.size();
  Tensor groups = torch::stable::new_empty(weight, {size}, ScalarType::Int);
  int32_t* at = mutable_data<int32_t>(groups);
  *at++ = static_cast<int32_t>(n_places);
  *at++ = static_cast<int32_t>(n_twins);
  *at++ = static_cast<int32_t>(constant.size());
  *at++ = static_cast<int32_t>(odd.size());
  *at++ = std::bit_cast<int32_t>(std::numeric_limits<float>::infinity());
  at = std::copy(latent.begin(), latent.end(), at);
  if (n_twins) {
    std::vector<int32_t> next(n_latents, 0);
    int32_t total = 0;
    for (int32_t l : latent) {
      *at++ = next[l] = total;
      total += count[l];
    }
    *at++ = total;
    for (int32_t j = 0; j < n_latents; ++j) {
      if (found.kind[j] == Row::usual && first[j] != j) {
        at[next[first[j]]++] = j;
      }
    }
    at += n_twins;
  }
  at = std::copy(constant.begin(), constant.end(), at);
  std::copy(odd.begin(), odd.end(), at);
  return groups;
}

}  // namespace

Tensor group_latents(const Tensor& weight, const double* bias, const OptionalTensor& gain, bool merge) {
  return dispatch_floating("weight", weight.scalar_type(), [&](auto type) {
    using T = decltype(type);
    return grouped<T>(weight, bias, data<T>(gain), merge);
  });
}

Places places_of(const Tensor& groups, int64_t n_latents) {
  check_dim("groups", groups, 1);
  check_type("groups", groups, ScalarType::Int);
  require(groups.size(0) >= kGroupsHead, "groups: must be what prepare_encoder gives, got shape ", shape_of(groups));
  const int32_t *head = data<int32_t>(groups), *at = head + kGroupsHead;
  Places places{head[0], head[1], head[2], head[3], std::bit_cast<float>(head[kReachAt])};
  bool fits = std::all_of(head, head + kReachAt, [](int32_t count) { return count >= 0; }) &&
              places.n_places + places.n_twins + places.n_constant + places.n_odd == n_latents;
  const int64_t twin_part = places.n_twins > 0 ? places.n_places + 1 + places.n_twins : 0;
  fits = fits && groups.size(0) == kGroupsHead + places.n_places + twin_part + places.n_constant + places.n_odd;
  require(fits, "groups: must be of ", n_latents, " latents, got shape ", shape_of(groups));
  places.latent = at;
  at += places.n_places;
  if (places.n_twins > 0) {
    places.twin_start = at;
    places.twins = at + places.n_places + 1;
    at += twin_part;
  }
  places.constant = at;
  places.odd = at + places.n_constant;
  // A number out of range would read foreign memory.
  const auto all_within = [](const int32_t* from, int64_t count, int64_t below) {
    bool within = true;
    for (int64_t i = 0; i < count; ++i) {
      within &= static_cast<uint32_t>(from[i]) < static_cast<uint64_t>(below);
    }
    return within;
  };
  fits = all_within(places.latent, places.n_places, n_latents) && all_within(places.twins, places.n_twins, n_latents) &&
         all_within(places.constant, places.n_constant + places.n_odd, n_latents);
  if (places.n_twins > 0) {
    fits = fits && places.twin_start[0] == 0 && places.twin_start[places.n_places] == places.n_twins &&
           std::is_sorted(places.twin_start, places.twin_start + places.n_places + 1);
  }
  require(fits, "groups: must hold latents from 0 to ", n_latents - 1, ", got others");
  return places;
}

}  // namespace darkmatter::cpu
