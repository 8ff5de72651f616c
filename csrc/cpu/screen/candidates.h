// What topk_encode and threshold_encode have in common when they screen.
//
// Each step works on what the one before left over: low-precision scores of all places (scan_panels), with 8-bit codes
// float32 scores with their own bound, float64 sums (both in cpu/screen/rescore.h). Only the last gives values; the
// others only leave out what is certainly below a limit.
//
// Memory: of each token of a task its codes (1, 2 or 4 bytes a dimension), with 8-bit codes a float16 row, and its
// candidates, 12 bytes each.
#pragma once

#include <limits>

#include "cpu/encoder.h"
#include "cpu/screen/certificate.h"
#include "margins.h"

namespace darkmatter::cpu {

// Token chunks of whole tiles, ranges of whole panels.
inline Tiling screen_tiling(int64_t n_tokens, int64_t n_places) {
  const int64_t tokens = screen_kernels()->tokens;
  return Tiling(n_tokens, n_places, kScreenChunk / tokens * tokens, tokens, kPanel);
}

// How many candidates of a range of places are worth their exact sums. One such sum costs about ten times a place of a
// dense float32 product and twice one of the exact path: beyond, the token is left to whichever of them there is.
constexpr int64_t kCandidatesAtLeast = 64;
inline int64_t most_candidates(int64_t places, bool may_leave) {
  return std::max(kCandidatesAtLeast, places / (may_leave ? 16 : 4));
}

// A sample of the panels goes first: one in sixteen, but at least 22 (1056 places).
inline int64_t sample_step(int64_t panels) { return std::max<int64_t>(1, std::min<int64_t>(16, panels / 22)); }

template <typename T>
inline float margin_below(float value) {
  return darkmatter::margin_below(kMargin<T>, value);
}

inline ScreenedWeights screened_weights(const Packed& packed) {
  const int64_t n_places = packed.places.n_places, d = packed.d();
  return {
      n_places,
      d,
      screen_padded(*screen_kernels(), d),
      screen_panels(n_places),
      data<int8_t>(*packed.codes),
      data<int32_t>(*packed.sums),
      data<float>(*packed.bounds),
      packed.places.reach};
}

// The tokens of one task, ready to be screened.
template <typename T>
struct TaskTokens {
  const T* x;  // [count, d]
  int64_t count, row_bytes;
  std::vector<uint8_t> codes;           // [count, row_bytes]
  std::vector<ScreenedToken> screened;  // [count]
  std::vector<char> zero;               // [count] all of x is 0
  // Where the kernels refine: x * scale in float16, half the bytes of float32: what matters when rows are gathered.
  // scale is a power of two that brings the norm to 1 .. 2; `lost` bounds the norm of what rounding to float16 removed,
  // in units of x.
  std::vector<uint16_t> half;             // [count, d]
  std::vector<double> scale, norm, lost;  // [count]

  // centre [d] is b_dec, or empty.
  TaskTokens(const T* x, int64_t count, const ScreenedWeights& weights, const std::vector<double>& centre)
      : x(x),
        count(count),
        row_bytes(weights.d_padded * screen_kernels()->code_bytes),
        codes(count * row_bytes),
        screened(count),
        zero(count),
        half(screen_kernels()->refines ? count * weights.d : 0),
        scale(count, 1.0),
        norm(count),
        lost(count) {
    const int64_t d = weights.d;
    double centre_squares = 0.0;
    for (double e : centre) {
      centre_squares += e * e;
    }
    std::vector<float> scratch(weights.d_padded);
    std::vector<double> row(d);
    for (int64_t t = 0; t < count; ++t) {
      kernels().of<T>().widen(x + t * d, row.data(), d);
      norm[t] = std::sqrt(kernels().of<double>().dot(row.data(), row.data(), d));
      zero[t] = norm[t] == 0.0 && std::all_of(row.begin(), row.end(), [](double e) { return e == 0.0; });
      if (screen_kernels()->refines) {
        to_half(t, row);
      }
      for (size_t e = 0; e < centre.size(); ++e) {
        row[e] -= centre[e];
      }
      // of two float64 sums of d products, and of the centred row: (d + 2) units each
      const double error = 4.0 * static_cast<double>(d + 2) * 0x1p-53 * (norm[t] + std::sqrt(centre_squares));
      screened[t] = screen_kernels()->encode_token(
          row.data(), d, weights.d_padded, error, scratch.data(), codes.data() + t * row_bytes);
      screened[t].screened &= !zero[t] && norm[t] <= weights.reach;
    }
  }

 private:
  void to_half(int64_t t, const std::vector<double>& row) {
    if (norm[t] > 1e-30 && norm[t] < 1e30) {
      scale[t] = std::ldexp(1.0, -std::ilogb(norm[t]));
      lost[t] = screen_kernels()->to_half(row.data(), scale[t], half.data() + t * row.size(), row.size());
    } else {
      lost[t] = std::numeric_limits<double>::infinity();
    }
  }
};

// What the screen let in of one token: places, their scores, and the upper bounds of their pre-activations.
struct Candidates {
  std::vector<float> score, upper;
  std::vector<int32_t> place;
  int64_t count = 0;

  // Appends the hits of one panel.
  void scan(
      const int32_t* products, const ScreenedToken& token, const ScreenedWeights& weights, int64_t panel,
      const float* limits, int64_t step) {
    if (count + kPanel > static_cast<int64_t>(upper.size())) {
      upper.resize(2 * upper.size() + 4 * kPanel);
      score.resize(upper.size());
      place.resize(upper.size());
    }
    count += screen_kernels()->hits(
        products, token, weights, panel, limits, step, score.data() + count, upper.data() + count,
        place.data() + count);
  }
};

using Rows = std::vector<int32_t>;  // of a task, ascending

inline Rows rows_between(int64_t first, int64_t last) {
  Rows rows(last - first);
  for (int64_t row = first; row < last; ++row) {
    rows[row - first] = static_cast<int32_t>(row);
  }
  return rows;
}

// Places whose scores are made at a time where torch multiplies: 1.5 MB of them for 256 tokens.
constexpr int64_t kPanelsAtOnce = 32;

// Float32 rows [count, d] of some panels from `first` on, `step` apart: those of the weights where they lie together,
// else copied into `storage`; beyond the last place zeros.
template <typename T>
const float* panel_rows(
    const Packed& packed, int64_t first, int64_t panels, int64_t step, std::vector<float>& storage) {
  const int64_t d = packed.d(), n_places = packed.places.n_places, start = first * kPanel,
                end = start + panels * kPanel;
  const int32_t* latent = packed.places.latent;
  const T* rows = data<T>(packed.weight);
  if constexpr (std::is_same_v<T, float>) {
    if ((step == 1 || panels == 1) && end <= n_places && latent[end - 1] - latent[start] == end - 1 - start) {
      return rows + latent[start] * d;
    }
  }
  storage.assign(panels * kPanel * d, 0.0f);
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t l = 0; l < kPanel; ++l) {
      const int64_t place = (first + p * step) * kPanel + l;
      if (place < n_places) {
        const T* row = rows + latent[place] * d;
        std::transform(row, row + d, storage.data() + (p * kPanel + l) * d, [](T e) { return static_cast<float>(e); });
      }
    }
  }
  return storage.data();
}

// As scan_panels, by torch's matrix product.
template <typename T, typename Visit>
void scan_by_torch(
    const Packed& packed, const float* x, const Rows& rows, int64_t begin, int64_t end, int64_t step,
    const Visit& visit) {
  const int64_t d = packed.d(), n = static_cast<int64_t>(rows.size());
  const auto wrapped = [&](const float* from, int64_t count) {
    return torch::stable::from_blob(
        const_cast<float*>(from), {count, d}, {d, 1}, packed.weight.device(), ScalarType::Float);
  };
  const Tensor tokens = wrapped(x, n);
  std::vector<float> storage;
  for (int64_t first = begin; first < end; first += kPanelsAtOnce * step) {
    const int64_t panels = std::min(kPanelsAtOnce, ceil_div(end - first, step));
    const Tensor weights = wrapped(panel_rows<T>(packed, first, panels, step, storage), panels * kPanel);
    const Tensor scores =
        torch::stable::contiguous(torch::stable::matmul(tokens, torch::stable::transpose(weights, 0, 1)));
    check_type("scores", scores, ScalarType::Float);  // of torch's product: another would be read wrongly
    const auto* products = static_cast<const int32_t*>(scores.const_data_ptr());
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t p = 0; p < panels; ++p) {
        visit(rows[t], first + p * step, products + (t * panels + p) * kPanel);
      }
    }
  }
}

// A thread's use of the kernels' products.
class InProducts {
 public:
  explicit InProducts(const ScreenKernels& kernel) : leave_(kernel.leave) {
    if (kernel.enter != nullptr) {
      kernel.enter();
    }
  }
  ~InProducts() {
    if (leave_ != nullptr) {
      leave_();
    }
  }
  InProducts(const InProducts&) = delete;
  InProducts& operator=(const InProducts&) = delete;

 private:
  void (*leave_)();
};

// Products of each of the rows and each of the panels begin, begin + step, .. < end:
// visit(row, panel, products), where products is int32 [kPanel].
template <typename T, typename Visit>
void scan_panels(
    const TaskTokens<T>& tokens, const Packed& packed, const ScreenedWeights& weights, const Rows& rows, int64_t begin,
    int64_t end, int64_t step, const Visit& visit) {
  const ScreenKernels& kernel = *screen_kernels();
  const auto n = static_cast<int64_t>(rows.size());
  if (n == 0) {
    return;
  }
  const uint8_t* codes = tokens.codes.data() + rows.front() * tokens.row_bytes;
  std::vector<uint8_t> together;  // a tile wants its tokens side by side
  if (rows.back() - rows.front() + 1 != n) {
    together.resize(n * tokens.row_bytes);
    for (int64_t i = 0; i < n; ++i) {
      const auto from = tokens.codes.begin() + rows[i] * tokens.row_bytes;
      std::copy(from, from + tokens.row_bytes, together.begin() + i * tokens.row_bytes);
    }
    codes = together.data();
  }
  if (kernel.products == nullptr) {
    return scan_by_torch<T>(packed, reinterpret_cast<const float*>(codes), rows, begin, end, step, visit);
  }
  const InProducts in_products(kernel);
  alignas(64) int32_t products[kMaxScreenTokens * kPanel];
  const int64_t panel_bytes = weights.d_padded * kernel.weight_bytes * kPanel;
  const int64_t at_once = std::max(kernel.tokens, kernel.at_once);
  for (int64_t panel = begin; panel < end; panel += step) {
    for (int64_t tile = 0; tile < n; tile += at_once) {
      const int64_t some = std::min(at_once, n - tile);
      kernel.products(
          codes + tile * tokens.row_bytes, some, weights.codes + panel * panel_bytes, weights.d_padded, products);
      for (int64_t t = 0; t < some; ++t) {
        visit(rows[tile + t], panel, products + t * kPanel);
      }
    }
  }
}

// Some tokens of a task by exact sums of all its places, a block at a time: visit(row, place, h).
template <typename T, typename Visit>
void visit_exactly(const T* x, const Rows& rows, const Packed& packed, int64_t begin, int64_t end, const Visit& visit) {
  const int64_t d = packed.d(), block = exact_tokens(d);
  for (size_t first = 0; first < rows.size(); first += block) {
    const int64_t some = std::min<int64_t>(block, rows.size() - first);
    WideRows wide(some, d);
    for (int64_t row = 0; row < some; ++row) {
      kernels().of<T>().widen(x + rows[first + row] * d, wide.data() + row * wide.d_padded(), d);
    }
    visit_range<T>(
        wide, some, packed, begin, end, [&](int64_t row, int64_t place, T h) { visit(rows[first + row], place, h); });
  }
}

// The latents that need no place (cpu/screen/places.h), for whole tokens.
template <typename T>
class OtherLatents {
 public:
  // b_enc: all of it, for the odd latents; centre [d] is b_dec, or empty.
  OtherLatents(const Packed& packed, const Tensor& b_enc, const std::vector<double>& centre)
      : packed_(packed), places_(packed.places), centre_(centre), h_(packed) {
    const Tensor own = torch::stable::contiguous(b_enc);
    for (int64_t i = 0; i < places_.n_odd; ++i) {
      double bias;
      kernels().of<T>().widen(data<T>(own) + places_.odd[i], &bias, 1);
      odd_bias_.push_back(bias);
    }
  }

  // The pre-activation of a latent where x is 0, or the row is.
  T at_zero(int64_t latent) const { return h_(0.0, latent); }

  // visit(latent, h) of the odd latents of a token x [d].
  template <typename Visit>
  void visit_odd(const T* x, const Visit& visit) const {
    const int64_t d = packed_.d();
    if (places_.n_odd == 0) {
      return;
    }
    std::vector<double> row(d), weights(d);
    kernels().of<T>().widen(x, row.data(), d);
    for (size_t e = 0; e < centre_.size(); ++e) {
      row[e] -= centre_[e];
    }
    for (int64_t i = 0; i < places_.n_odd; ++i) {
      const int32_t latent = places_.odd[i];
      kernels().of<T>().widen(data<T>(packed_.weight) + latent * d, weights.data(), d);
      visit(latent, h_.rounded_with(kernels().of<double>().dot(row.data(), weights.data(), d) + odd_bias_[i], latent));
    }
  }

  // visit(latent, h) of the constant latents.
  template <typename Visit>
  void visit_constant(const Visit& visit) const {
    for (int64_t i = 0; i < places_.n_constant; ++i) {
      visit(places_.constant[i], at_zero(places_.constant[i]));
    }
  }
  // Whether those are the constant latents of a token x [d] too: 0 times Inf or NaN is NaN.
  bool constant_of(const T* x) const {
    return places_.n_constant == 0 ||
           std::all_of(x, x + packed_.d(), [](T e) { return std::isfinite(static_cast<double>(e)); });
  }
  // visit(latent, NaN) of the first `most` constant latents, for a token of which they are not.
  template <typename Visit>
  void visit_constant_as_nan(int64_t most, const Visit& visit) const {
    for (int64_t i = 0; i < std::min(most, places_.n_constant); ++i) {
      visit(places_.constant[i], static_cast<T>(std::numeric_limits<float>::quiet_NaN()));
    }
  }
  // visit(latent, h) of all but the odd latents, for a token of zeros.
  template <typename Visit>
  void visit_all_at_zero(const Visit& visit) const {
    for (int64_t place = 0; place < places_.n_places; ++place) {
      places_.each_of(place, [&](int32_t latent) { visit(latent, at_zero(latent)); });
    }
    visit_constant(visit);
  }

 private:
  const Packed& packed_;
  const Places& places_;
  const std::vector<double>& centre_;
  const PreActivation<T> h_;
  std::vector<double> odd_bias_;
};

}  // namespace darkmatter::cpu
