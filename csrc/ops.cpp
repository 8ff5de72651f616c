// The op table: every schema once, nothing else. Implementations register themselves in csrc/cpu and csrc/cuda.
//
// One alphabet for shapes: N tokens, d model dimension, F latents, k active latents a token, z active latents in all.
// Where `crow` is absent the active latents are [N, k]; where it is given they are flat [z], token i holding
// crow[i]..crow[i+1] (torch's CSR terms). Indices are int64, W_enc is [d, F], W_dec is [F, d].
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(darkmatter, m) {
  // weight: W_enc^T as contiguous rows [F, d]; bias: b_enc with b_dec folded in, float64 [F]; codes, sums, bounds: what
  // screening needs (csrc/cpu/screen/certificate.h), empty where the machine cannot screen; groups: which latents are
  // equal or need no screening (csrc/cpu/screen/places.h), empty on CUDA. gain [F] multiplies the rounded
  // pre-activations (CPU only).
  m.def(
      "prepare_encoder(Tensor W_enc, Tensor b_enc, Tensor? b_dec, Tensor? gain=None)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The same without weight, from rows [F, d] that are there already (CPU only).
  m.def(
      "prepare_rows(Tensor rows, Tensor b_enc, Tensor? b_dec, Tensor? gain=None)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // values [N, k], indices [N, k]; weight ... groups as prepare_encoder gives them, or absent: then packed in the call.
  m.def(
      "topk_encode(Tensor x, Tensor W_enc, Tensor b_enc, Tensor? b_dec, int k, Tensor? weight, Tensor? bias,"
      " Tensor? codes, Tensor? sums, Tensor? bounds, Tensor? groups, Tensor? gain=None) -> (Tensor, Tensor)");
  // values [z], crow [N + 1], col [z]; threshold is a scalar tensor or [F]. (The floating-point output comes first
  // because opcheck adds up all outputs in place.)
  m.def(
      "threshold_encode(Tensor x, Tensor W_enc, Tensor b_enc, Tensor? b_dec, Tensor threshold, Tensor? weight,"
      " Tensor? bias, Tensor? codes, Tensor? sums, Tensor? bounds, Tensor? groups, Tensor? gain=None)"
      " -> (Tensor, Tensor, Tensor)");
  // The same in a fixed shape, so that nobody waits for the number of kept latents: values and indices [N, capacity],
  // each token's latents ascending and zeros after them; found [N]: how many a token has. Of more than capacity the
  // first are stored. On CUDA a threshold that is NaN keeps its latents.
  m.def(
      "threshold_encode_fixed(Tensor x, Tensor W_enc, Tensor b_enc, Tensor? b_dec, Tensor threshold, int capacity,"
      " Tensor? weight, Tensor? bias, Tensor? codes, Tensor? sums, Tensor? bounds, Tensor? groups,"
      " Tensor? gain=None) -> (Tensor, Tensor, Tensor)");
  // The same for tokens that screening helps; the others (`undecided`, [u] token numbers) are left empty, so that the
  // caller can do them with a dense product, the faster way then. CPU only.
  m.def(
      "try_topk_encode(Tensor x, Tensor W_enc, Tensor b_enc, Tensor? b_dec, int k, Tensor? weight, Tensor? bias,"
      " Tensor? codes, Tensor? sums, Tensor? bounds, Tensor? groups, Tensor? gain=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "try_threshold_encode(Tensor x, Tensor W_enc, Tensor b_enc, Tensor? b_dec, Tensor threshold, Tensor? weight,"
      " Tensor? bias, Tensor? codes, Tensor? sums, Tensor? bounds, Tensor? groups, Tensor? gain=None)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  // x_hat [N, d] = sum over the active latents of value * W_dec[index], + b_dec.
  m.def("sparse_decode(Tensor values, Tensor indices, Tensor? crow, Tensor W_dec, Tensor? b_dec) -> Tensor");
  // The two gradients of sparse_decode: <rows_i, W_dec[index]> for each active latent, in the shape of indices, and
  // sum over the tokens of value * rows_i for each latent, [F, d]. rows is [N, d].
  m.def("decoder_dot(Tensor rows, Tensor indices, Tensor? crow, Tensor W_dec) -> Tensor");
  m.def("decoder_outer(Tensor values, Tensor indices, Tensor? crow, Tensor rows, int n_latents) -> Tensor");
  // sparse_decode and decoder_dot of float64 values [N, k] or rows [N, d] with W_dec of any dtype, in float64 and not
  // rounded. For pursuit; float64 weights need them nowhere.
  m.def("wide_decode(Tensor values, Tensor indices, Tensor W_dec) -> Tensor");
  m.def("wide_dot(Tensor rows, Tensor indices, Tensor W_dec) -> Tensor");
  // crow [N + 1], col [z] of the nonzero entries (NaN is one, -0 is not) of dense acts [N, F].
  m.def("find_support(Tensor acts) -> (Tensor, Tensor)");
  // The same in a fixed shape: indices [N, capacity] and found [N], as threshold_encode_fixed has them.
  m.def("find_support_fixed(Tensor acts, int capacity) -> (Tensor, Tensor)");
  // The inverse: dense acts [N, F] of the active latents.
  m.def("to_dense(Tensor values, Tensor indices, Tensor? crow, int n_latents) -> Tensor");
  // lower [N, F], upper [N, F], float32: what screening knows of each pre-activation; screened [N]: whether it is used.
  m.def(
      "screen_intervals(Tensor x, Tensor W_enc, Tensor b_enc, Tensor? b_dec, Tensor? weight, Tensor? bias,"
      " Tensor? codes, Tensor? sums, Tensor? bounds, Tensor? groups, Tensor? gain=None) -> (Tensor, Tensor, Tensor)");
  // The atom [N] that a step of pursuit takes: the largest float64 product of residual [N, d] (float64) with a row of
  // dictionary [F, d], the lowest index of those that fall short of it by at most noise [N] (float64). codes, bounds as
  // prepare_encoder gives them for the dictionary with no bias. -1 for tokens that rest: done, or l0 <= step. CUDA
  // only.
  m.def(
      "pursuit_choose(Tensor residual, Tensor dictionary, Tensor codes, Tensor bounds, Tensor noise, Tensor l0, int "
      "step,"
      " Tensor done) -> Tensor");
  // One step of gradient pursuit for tokens [N] after their atoms `choice` are chosen, in place; steps l0 and after
  // leave a token as it is. All float64 but the dictionary; a gradient of at most noise [N] is none. atoms, weights
  // [N, s]; done is int32. CUDA only: on the CPU the wide sums do it as fast.
  m.def(
      "pursuit_step(Tensor target, Tensor dictionary, Tensor choice, Tensor noise, Tensor l0, int step, bool "
      "keep_chosen,"
      " float residual_threshold, Tensor(a!) residual, Tensor(b!) atoms, Tensor(c!) weights, Tensor(d!) n_chosen,"
      " Tensor(e!) done) -> ()");
}
