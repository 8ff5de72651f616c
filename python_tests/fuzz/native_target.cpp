// Calls of the CPU ops whose shapes, strides, dtypes, k and values come from a fuzzer's bytes (`make fuzz-native`).
//
// All numbers of a case are small integers times a power of two, so that float64 sums are exact in any order: what
// torch says in float64 is the only right answer (test_ops.py has the same cases, drawn at random). A wrong answer
// aborts, and so does a call with a wrong argument that is not refused. The library is built with gcc, as it is
// shipped, and watches addresses and undefined behaviour.
//
// libFuzzer counts edges by clang's inline counters, which gcc does not write. The first part of this file makes such
// counters from what gcc writes instead, a call of __sanitizer_cov_trace_pc at every edge.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <optional>
#include <string>
#include <vector>

// ---- counters

namespace {
constexpr size_t kEdges = 1 << 16;  // several times as many as the library has
uint8_t counters[kEdges];
struct Edge {
  uintptr_t place, is_function;
};
Edge edges[kEdges];  // filled in as they are met: libFuzzer counts those whose counters move
}  // namespace

extern "C" {
void __sanitizer_cov_8bit_counters_init(uint8_t* begin, uint8_t* end);
void __sanitizer_cov_pcs_init(const uintptr_t* begin, const uintptr_t* end);

__attribute__((no_sanitize("address", "undefined"))) void __sanitizer_cov_trace_pc() {
  const auto place = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  const size_t edge = (place * 0x9E3779B97F4A7C15ull) >> 48;
  counters[edge] += 1;
  edges[edge].place = place;
}
void __sanitizer_cov_trace_cmpf(float, float) {}
void __sanitizer_cov_trace_cmpd(double, double) {}
}

// ---- pieces of a case

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Limits {
  at::ScalarType type;
  std::vector<std::pair<int, int>>
      exponents;  // of x and of the weights: products near 1, denormal, or near the largest
};
const Limits kLimits[] = {
    {at::kHalf, {{0, 0}, {-24, 0}, {-12, -12}, {7, 4}, {-8, 3}}},
    {at::kBFloat16, {{0, 0}, {-133, 0}, {-70, -63}, {64, 58}, {-20, 9}}},
    {at::kFloat, {{0, 0}, {-149, 0}, {-75, -74}, {64, 60}, {-30, 30}}},
    {at::kDouble, {{0, 0}, {-540, -530}, {500, 510}, {-100, 60}}},
};

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "native_target: %s\n", what.c_str());
  std::abort();
}

// The fuzzer's bytes, and zeros after their end.
class Bytes {
 public:
  Bytes(const uint8_t* bytes, size_t size) : bytes_(bytes), left_(size) {}

  int64_t next() {
    if (left_ == 0) {
      return 0;
    }
    --left_;
    return *bytes_++;
  }
  int64_t below(int64_t n) { return n <= 1 ? 0 : (n <= 256 ? next() : next() * 256 + next()) % n; }
  bool one_in(int64_t n) { return below(n) == n - 1; }

  // Integers from -8 to 8 times 2^exponent: a pattern of bytes, or numbers mixed from one; `special` at a few places.
  Tensor numbers(const std::vector<int64_t>& shape, int exponent, at::ScalarType type, bool infinite, bool nan) {
    const int64_t largest[] = {1, 2, 8};
    const int64_t most = largest[below(3)];
    const bool mixed = below(2) == 0;
    uint64_t seed = 1 + next();
    std::vector<int64_t> pattern(mixed ? 0 : 1 + below(24));
    for (int64_t& number : pattern) {
      number = next();
    }
    Tensor whole = at::empty(shape, at::kDouble);
    auto* values = whole.data_ptr<double>();
    for (int64_t i = 0; i < whole.numel(); ++i) {
      seed = seed * 6364136223846793005ull + 1442695040888963407ull;
      const auto number = mixed ? static_cast<int64_t>(seed >> 40) : pattern[i % pattern.size()];
      values[i] = std::ldexp(static_cast<double>(number % (2 * most + 1) - most), exponent);
    }
    const double specials[] = {kInfinity, -kInfinity, -0.0, std::nan("")};
    if (infinite && one_in(4) && whole.numel() > 0) {
      const double special = specials[below(nan ? 4 : 3)];
      for (int64_t left = 1 + below(3); left > 0; --left) {
        values[below(whole.numel())] = special;
      }
    }
    return whole.to(type);
  }

  // The same numbers with other strides, between numbers that must not be read.
  Tensor strided(const Tensor& x) {
    const Tensor nan = at::full_like(x, std::nan(""));
    switch (below(5)) {
      case 1:
        return x.dim() > 1 ? x.mT().contiguous().mT() : x;
      case 2:
        return at::stack({x, nan}, -1).select(-1, 0);
      case 3:
        return x.dim() > 0 && x.size(0) > 0 ? at::cat({nan.slice(0, 0, 1), x}).slice(0, 1) : x;
      case 4:
        return at::stack({nan, x}).select(0, 1);
      default:
        return x;
    }
  }

 private:
  const uint8_t* bytes_;
  size_t left_;
};

// ---- calls and comparisons

template <typename... Arguments>
std::vector<Tensor> call(const char* op, const Arguments&... arguments) {
  static std::map<std::string, c10::OperatorHandle> found;
  const auto known = found.find(op);
  const c10::OperatorHandle& handle =
      known != found.end()
          ? known->second
          : found
                .emplace(
                    op, c10::Dispatcher::singleton().findSchemaOrThrow((std::string("darkmatter::") + op).c_str(), ""))
                .first->second;
  torch::jit::Stack stack{c10::IValue(arguments)...};
  handle.callBoxed(stack);
  std::vector<Tensor> answers;
  for (const c10::IValue& answer : stack) {
    answers.push_back(answer.toTensor());
  }
  return answers;
}

void same(const Tensor& ours, const Tensor& right, const std::string& about) {
  if (ours.sizes() != right.sizes() || ours.scalar_type() != right.scalar_type()) {
    fail(about + ": another shape or dtype");
  }
  if (!((ours == right) | (ours.isnan() & right.isnan())).all().item<bool>()) {
    fail(about + ": another answer");
  }
}

Tensor row_starts(const Tensor& counts) { return at::cat({at::zeros({1}, at::kLong), counts.cumsum(0)}); }

struct Encoder {
  Tensor W_enc, b_enc;
  Optional b_dec, gain;
  std::vector<Optional> packed;  // weight, bias, codes, sums, bounds, groups: all or none

  // h in the dtype of x.
  Tensor pre_activations(const Tensor& x) const {
    const Tensor centred = b_dec ? x.to(at::kDouble) - b_dec->to(at::kDouble) : x.to(at::kDouble);
    const Tensor h = (centred.matmul(W_enc.to(at::kDouble)) + b_enc.to(at::kDouble)).to(x.scalar_type());
    return gain ? h * *gain : h;
  }

  std::vector<Tensor> topk(const char* op, const Tensor& x, int64_t k) const {
    return call(op, x, W_enc, b_enc, b_dec, k, packed[0], packed[1], packed[2], packed[3], packed[4], packed[5], gain);
  }
  std::vector<Tensor> threshold(const char* op, const Tensor& x, const Tensor& limit) const {
    return call(
        op, x, W_enc, b_enc, b_dec, limit, packed[0], packed[1], packed[2], packed[3], packed[4], packed[5], gain);
  }
};

Encoder encoder(Bytes& bytes, int64_t d, int64_t n_latents, at::ScalarType type, std::pair<int, int> exponents) {
  const auto [of_x, of_w] = exponents;
  Encoder own;
  own.W_enc = bytes.strided(bytes.numbers({d, n_latents}, of_w, type, true, false));
  own.b_enc = bytes.strided(bytes.numbers({n_latents}, of_x + of_w, type, true, false));
  if (bytes.below(2)) {
    own.b_dec = bytes.numbers({d}, of_x, type, false, false);
  }
  if (bytes.one_in(4)) {
    own.gain = bytes.numbers({n_latents}, -1, type, false, false);
  }
  own.packed.resize(6);
  if (const int64_t how = bytes.below(3)) {
    std::vector<Tensor> parts;
    if (how == 1) {
      parts = call("prepare_encoder", own.W_enc, own.b_enc, own.b_dec, own.gain);
    } else {
      const Tensor rows = own.W_enc.mT().contiguous();
      parts = call("prepare_rows", rows, own.b_enc, own.b_dec, own.gain);
      parts.insert(parts.begin(), rows);
    }
    own.packed.assign(parts.begin(), parts.end());
  }
  return own;
}

void check_encoder(Bytes& bytes, const Encoder& own, const Tensor& x, int exponent) {
  const at::ScalarType type = x.scalar_type();
  const int64_t n_latents = own.W_enc.size(1);
  const Tensor h = own.pre_activations(x);
  const int64_t ks[] = {0, 1, n_latents, bytes.below(n_latents + 1), bytes.below(n_latents / 8 + 1)};
  const int64_t k = ks[bytes.below(5)];
  const Tensor indices = std::get<1>(h.sort(true, -1, true)).slice(1, 0, k), values = h.gather(1, indices).relu();
  const auto top = own.topk("topk_encode", x, k);
  same(top[1], indices, "topk_encode's indices");
  same(top[0], values, "topk_encode's values");
  const auto tried = own.topk("try_topk_encode", x, k);
  Tensor decided = at::ones({x.size(0)}, at::kBool);
  decided.index_fill_(0, tried[2], false);
  same(tried[1].index({decided}), indices.index({decided}), "try_topk_encode's indices");
  same(tried[0].index({decided}), values.index({decided}), "try_topk_encode's values");

  const bool each = bytes.below(2) != 0;
  const Tensor limit =
      bytes.numbers(each ? std::vector<int64_t>{n_latents} : std::vector<int64_t>{}, exponent, type, false, false);
  const Tensor keeps = ~(h <= limit);
  const auto above = own.threshold("threshold_encode", x, limit);
  same(above[1], row_starts(keeps.sum(1)), "threshold_encode's crow");
  same(above[2], keeps.nonzero().select(1, 1), "threshold_encode's col");
  same(above[0], h.index({keeps}).relu(), "threshold_encode's values");
  const auto some = own.threshold("try_threshold_encode", x, limit);
  decided.fill_(true).index_fill_(0, some[3], false);
  const Tensor kept = keeps & decided.unsqueeze(1);
  same(some[1], row_starts(kept.sum(1)), "try_threshold_encode's crow");
  same(some[2], kept.nonzero().select(1, 1), "try_threshold_encode's col");
  same(some[0], h.index({kept}).relu(), "try_threshold_encode's values");

  const auto dense = call("to_dense", above[0], above[2], Optional(above[1]), n_latents)[0];
  same(dense, at::where(keeps, h, at::zeros({}, type)).relu(), "to_dense of ragged latents");
  same(
      call("to_dense", top[0], top[1], Optional(), n_latents)[0], at::zeros_like(h).scatter(1, indices, values),
      "to_dense");
  const auto support = call("find_support", bytes.strided(dense));
  same(support[0], row_starts((dense != 0).sum(1)), "find_support's crow");
  same(support[1], dense.nonzero().select(1, 1), "find_support's col");
}

// The ops that gather rows, on active latents [N, k] and ragged ones, some of them twice.
void check_decoder(Bytes& bytes, int64_t n_tokens, int64_t d, int64_t n_latents, at::ScalarType type, int exponent) {
  const Tensor W_dec = bytes.strided(bytes.numbers({n_latents, d}, exponent, type, false, false));
  const int64_t k = bytes.below(12);
  Tensor indices = bytes.numbers({n_tokens, k}, 0, at::kLong, false, false).mul(1 + bytes.next()).remainder(n_latents);
  Tensor values = bytes.strided(bytes.numbers({n_tokens, k}, 0, type, false, false));
  Optional crow;
  Tensor token = at::arange(n_tokens).repeat_interleave(k);
  if (bytes.below(2)) {
    std::vector<int64_t> counts(n_tokens);
    for (int64_t& count : counts) {
      count = bytes.below(9);
    }
    const Tensor given = at::tensor(counts, at::kLong);
    token = at::arange(n_tokens).repeat_interleave(given);
    crow = row_starts(given);
    indices = bytes.numbers({token.size(0)}, 0, at::kLong, false, false).mul(1 + bytes.next()).remainder(n_latents);
    values = bytes.strided(bytes.numbers({token.size(0)}, 0, type, false, false));
  }
  const Optional bias = bytes.below(2) ? Optional(bytes.numbers({d}, exponent, type, false, false)) : Optional();
  const Tensor wide = W_dec.to(at::kDouble), rows = wide.index_select(0, indices.flatten());
  const Tensor factors = values.to(at::kDouble).flatten().unsqueeze(1);
  const Tensor sums = at::zeros({n_tokens, d}, at::kDouble).index_add(0, token, rows * factors);
  same(
      call("sparse_decode", values, indices, crow, W_dec, bias)[0],
      (bias ? sums + bias->to(at::kDouble) : sums).to(type), "sparse_decode");
  const Tensor left = bytes.strided(bytes.numbers({n_tokens, d}, 0, type, false, false));
  const Tensor gathered = left.to(at::kDouble).index_select(0, token);
  const Tensor products = (gathered * rows).sum(1).reshape(indices.sizes());
  same(call("decoder_dot", left, indices, crow, W_dec)[0], products.to(type), "decoder_dot");
  const Tensor outer = at::zeros({n_latents, d}, at::kDouble).index_add(0, indices.flatten(), gathered * factors);
  same(call("decoder_outer", values, indices, crow, left, n_latents)[0], outer.to(type), "decoder_outer");
  if (!crow) {  // what pursuit carries from step to step
    same(call("wide_decode", values.to(at::kDouble), indices, W_dec)[0], sums, "wide_decode");
    same(call("wide_dot", left.to(at::kDouble), indices, W_dec)[0], products, "wide_dot");
  }
}

// A call with one wrong argument: an exception, and no foreign memory is read.
void check_refusal(Bytes& bytes, const Encoder& own, const Tensor& x) {
  const int64_t n_latents = own.W_enc.size(1), d = own.W_enc.size(0), n_tokens = x.size(0);
  const Tensor indices = at::zeros({n_tokens, 2}, at::kLong), values = at::zeros({n_tokens, 2}, x.options());
  const Tensor rows = at::zeros({n_latents, d}, x.options()), flat = at::zeros({2 * n_tokens}, at::kLong);
  const at::ScalarType other = x.scalar_type() == at::kFloat ? at::kHalf : at::kFloat;
  const std::vector<Optional> none(6);
  const auto encode = [&](const Tensor& tokens, const Tensor& bias, const Optional& centre, int64_t k,
                          const std::vector<Optional>& packed) {
    Encoder wrong{own.W_enc, bias, centre, std::nullopt, packed};
    wrong.topk("topk_encode", tokens, k);
  };
  const int64_t kind = bytes.below(12);
  try {
    switch (kind) {
      case 0:
        encode(x, own.b_enc, own.b_dec, n_latents + 1 + bytes.next(), none);
        break;
      case 1:
        encode(x, own.b_enc, own.b_dec, -1 - bytes.next(), none);
        break;
      case 2:
        encode(at::zeros({n_tokens, d + 1}, x.options()), own.b_enc, own.b_dec, 1, none);
        break;
      case 3:
        encode(x.to(other), own.b_enc, own.b_dec, 1, none);
        break;
      case 4:
        encode(x, at::zeros({n_latents + 1 + bytes.below(3)}, x.options()), own.b_dec, 1, none);
        break;
      case 5:
        encode(x, own.b_enc, at::zeros({d + 1}, x.options()), 1, none);
        break;
      case 6:
        encode(x, at::full_like(own.b_enc, std::nan("")), own.b_dec, 1, none);
        break;
      case 7:
        if (n_tokens == 0) {
          return;
        }
        call("sparse_decode", values, indices.fill_(bytes.below(2) ? n_latents : -1), Optional(), rows, Optional());
        break;
      case 8:
        if (n_tokens < 2) {
          return;
        }
        call(
            "to_dense", values.flatten(), flat,
            Optional(row_starts(at::full({n_tokens}, 2, at::kLong)).index_fill_(0, at::tensor({1}), 2 * n_tokens + 5)),
            n_latents);
        break;
      case 9:
        call("decoder_dot", at::zeros({n_tokens + 1, d}, x.options()), indices, Optional(), rows);
        break;
      case 10:
        call("wide_dot", at::zeros({n_tokens, d + 1}, at::kDouble), indices, rows);
        break;
      default: {  // packed parts of another shape, or with places that are none: read with care, whatever comes out
        std::vector<Optional> packed = own.packed;
        if (!packed[0]) {
          return;
        }
        if (const int64_t part = bytes.below(7); part < 6) {
          packed[part] = packed[part]->narrow(-1, 0, packed[part]->size(-1) / (2 + bytes.below(3)));
        } else if (Tensor groups = packed[5]->clone(); groups.numel() > 0) {
          groups.index_fill_(0, at::tensor({bytes.below(groups.numel())}), bytes.next() * 257 - 300);
          packed[5] = groups;
        }
        encode(x, own.b_enc, own.b_dec, std::min<int64_t>(3, n_latents), packed);
        return;
      }
    }
  } catch (const std::exception&) {
    return;
  }
  fail("a wrong argument of kind " + std::to_string(kind) + " was not refused");
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  at::set_num_threads(1);
  __sanitizer_cov_8bit_counters_init(counters, counters + kEdges);
  __sanitizer_cov_pcs_init(
      reinterpret_cast<const uintptr_t*>(edges), reinterpret_cast<const uintptr_t*>(edges + kEdges));
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* given, size_t size) {
  Bytes bytes(given, size);
  const Limits& limits = kLimits[bytes.below(4)];
  const auto exponents = limits.exponents[bytes.below(limits.exponents.size())];
  const int64_t few[] = {0, 1, 3, 9, 17, 70, 130};
  const int64_t n_tokens = few[bytes.below(7)];
  const bool screened = bytes.below(2) != 0;  // dimensions and latents enough for screening
  const int64_t d = screened ? 32 + bytes.below(100) : bytes.below(40);
  const int64_t n_latents = screened ? 256 + bytes.below(700) : 1 + bytes.below(80);
  const Tensor x = bytes.strided(bytes.numbers({n_tokens, d}, exponents.first, limits.type, true, true));
  const Encoder own = encoder(bytes, d, n_latents, limits.type, exponents);
  if (bytes.one_in(8)) {
    check_refusal(bytes, own, x);
    return 0;
  }
  check_encoder(bytes, own, x, exponents.first + exponents.second);
  check_decoder(bytes, n_tokens, d, n_latents, limits.type, exponents.second);
  return 0;
}
