// One step of gradient pursuit after its atom is chosen, one block a token: everything on the support, nothing of size
// F.
//
// Budget: the s rows of the support are read twice (products with the residual; their weighted sum), a third time where
// a weight was clamped: 2 s d elements a token, which is what the sparse ops apart would read, without their launches.
#pragma once

#include "cuda/kernels/wide_rows.cuh"

namespace darkmatter::cuda {

// What a step reads and changes of the tokens. All in float64 but the dictionary.
template <typename W>
struct PursuitState {
  const double* target;   // [N, d]
  const W* dictionary;    // [F, d]
  const int64_t* choice;  // [N] the atom chosen in this step
  const double* noise;    // [N] a product of at most so much is 0
  const int64_t* l0;      // [N] steps of each token
  double* residual;       // [N, d]
  int64_t* atoms;         // [N, s_max]
  double* weights;        // [N, s_max]
  int64_t* n_chosen;      // [N]
  int* done;              // [N] converged, or its residual is small enough
  double* direction;      // [N, d] scratch
  int64_t d, s_max;
};

struct PursuitRules {
  int64_t step;  // from 0
  bool keep_chosen;
  double residual_threshold;
};

struct PursuitShared {
  int place;
  double partial[kWarps];
};

// The place of the atom chosen in the token's list, appended where it is new; and the length of the list then.
struct Place {
  int place, count;
};
template <typename W>
__device__ Place choose_place(const PursuitState<W>& state, int64_t token, PursuitShared& shared) {
  const int64_t* atoms = state.atoms + token * state.s_max;
  const int n = static_cast<int>(state.n_chosen[token]);
  if (threadIdx.x == 0) {
    shared.place = n;
  }
  __syncthreads();
  for (int a = threadIdx.x; a < n; a += kThreads) {
    if (atoms[a] == state.choice[token]) {
      shared.place = a;  // at most one
    }
  }
  __syncthreads();
  const int place = shared.place;
  if (threadIdx.x == 0 && place == n) {
    state.atoms[token * state.s_max + n] = state.choice[token];
    state.n_chosen[token] = n + 1;
  }
  __syncthreads();
  return {place, place == n ? n + 1 : n};
}

template <typename W, int kWidth>
__global__ void __launch_bounds__(kThreads, kDotBlocks)
    pursuit_step_kernel(PursuitState<W> state, PursuitRules rules, bool staged) {
  const int64_t token = blockIdx.x;
  if (rules.step >= state.l0[token] || state.done[token] != 0) {
    return;  // the whole block
  }
  Arena arena{shared_memory()};
  double* storage = staged ? arena.take<double>(state.d) : nullptr;
  double* gradient = arena.take<double>(state.s_max);
  double* moved = arena.take<double>(state.s_max);
  PursuitShared& shared = *arena.take<PursuitShared>(1);
  double* residual = state.residual + token * state.d;
  double* weights = state.weights + token * state.s_max;
  const int64_t* atoms = state.atoms + token * state.s_max;
  const auto [place, count] = choose_place(state, token, shared);

  // The gradient of half the squared residual, on the support: the atom just chosen and those in use.
  if (staged) {
    stage_row(residual, state.d, storage);
  }
  const double* row = staged ? storage : residual;
  bool moving = false;
  for (int a = static_cast<int>(threadIdx.x) / kLanes; a < count; a += kGroups) {
    const bool moves = a == place || rules.keep_chosen || weights[a] != 0.0;
    const double product = moves ? lanes_dot(row, state.dictionary + atoms[a] * state.d, state.d) : 0.0;
    moving |= fabs(product) > state.noise[token];
    if (threadIdx.x % kLanes == 0) {
      gradient[a] = product;
    }
  }
  if (__syncthreads_or(moving) == 0) {  // converged; the released code divides 0 by 0 here
    if (threadIdx.x == 0) {
      state.done[token] = 1;
    }
    return;  // the whole block
  }

  // Line search along c = g D: <c, r> / <c, c>.
  double* direction = state.direction + token * state.d;
  double energy = 0.0, gain = 0.0;
  weighted_columns<kWidth>(state.dictionary, state.d, atoms, gradient, count, [&](int64_t column, double sum) {
    direction[column] = sum;
    energy += sum * sum;
    gain += sum * row[column];
  });
  energy = block_sum(energy, shared.partial);
  gain = block_sum(gain, shared.partial);
  if (energy == 0.0) {
    if (threadIdx.x == 0) {
      state.done[token] = 1;
    }
    return;  // the whole block
  }
  const double length = gain / energy;
  bool clamps = false;
  for (int a = threadIdx.x; a < count; a += kThreads) {
    const double weight = weights[a] + length * gradient[a];
    clamps |= weight < 0.0;
    moved[a] = relu(weight);
    weights[a] = moved[a];
  }

  double squares = 0.0;
  if (__syncthreads_or(clamps) != 0) {  // the weights did not move along the gradient
    weighted_columns<kWidth>(state.dictionary, state.d, atoms, moved, count, [&](int64_t column, double sum) {
      residual[column] = state.target[token * state.d + column] - sum;
      squares += residual[column] * residual[column];
    });
  } else {
    for (int64_t column = threadIdx.x; column < state.d; column += kThreads) {
      residual[column] -= length * direction[column];
      squares += residual[column] * residual[column];
    }
  }
  squares = block_sum(squares, shared.partial);
  if (threadIdx.x == 0 && sqrt(squares) < rules.residual_threshold) {
    state.done[token] = 1;
  }
}

}  // namespace darkmatter::cuda
