// One step of gradient pursuit after its atom is chosen, one block a token: everything on the support, nothing of size
// F.
//
// Budget: the s rows of the support are read twice (products with the residual; their weighted sum), a third time where
// a weight was clamped: 2 s d elements a token, which is what the sparse ops apart would read, without their launches.
#pragma once

#include "cuda/kernels/block.cuh"

namespace darkmatter::cuda {

constexpr int kAtomsAhead = 8;

// What a step reads and changes of the tokens.
template <typename T>
struct PursuitState {
  const T* target;        // [N, d]
  const T* dictionary;    // [F, d]
  const int64_t* choice;  // [N] the atom chosen in this step
  const int64_t* l0;      // [N] steps of each token
  T* residual;            // [N, d]
  int64_t* atoms;         // [N, s_max]
  T* weights;             // [N, s_max]
  int64_t* n_chosen;      // [N]
  int* done;              // [N] converged, or its residual is small enough
  T* direction;           // [N, d] scratch
  int64_t d, s_max;
};

struct PursuitRules {
  int64_t step;  // from 0
  bool keep_chosen;
  double residual_threshold;
};

struct PursuitShared {
  int place, chosen, clamped;
  double partial[kWarps];
};

__device__ inline double block_sum(double value, PursuitShared& shared) {
  for (int step = 16; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    shared.partial[threadIdx.x / 32] = value;
  }
  __syncthreads();
  double sum = 0.0;
  for (int w = 0; w < kWarps; ++w) {
    sum += shared.partial[w];
  }
  return sum;
}

// The place of the atom chosen in the token's list, appended where it is new.
template <typename T>
__device__ void choose_place(const PursuitState<T>& state, int64_t token, PursuitShared& shared) {
  const int64_t* atoms = state.atoms + token * state.s_max;
  const int n = static_cast<int>(state.n_chosen[token]);
  if (threadIdx.x == 0) {
    shared.place = n;
    shared.clamped = 0;
  }
  __syncthreads();
  for (int a = threadIdx.x; a < n; a += kThreads) {
    if (atoms[a] == state.choice[token]) {
      shared.place = a;  // at most one
    }
  }
  __syncthreads();
  shared.chosen = shared.place == n ? n + 1 : n;  // the same from every thread
  if (threadIdx.x == 0 && shared.place == n) {
    state.atoms[token * state.s_max + n] = state.choice[token];
    state.n_chosen[token] = n + 1;
  }
  __syncthreads();
}

// visit(column, sum over the support of factors_a dictionary[atom_a, column]) for every column, one thread a column.
template <typename T, typename Visit>
__device__ void weighted_atoms(
    const PursuitState<T>& state, const int64_t* atoms, const T* factors, int count, const Visit& visit) {
  for (int64_t column = threadIdx.x; column < state.d; column += kThreads) {
    double sum = 0.0;
    const auto add = [&](int a, auto n) {  // n loads in flight
      T ahead[n.value];
#pragma unroll
      for (int i = 0; i < n.value; ++i) {
        ahead[i] = state.dictionary[atoms[a + i] * state.d + column];
      }
#pragma unroll
      for (int i = 0; i < n.value; ++i) {
        const double factor = widen(factors[a + i]), with = fma(factor, widen(ahead[i]), sum);
        sum = factor == 0.0 ? sum : with;
      }
    };
    int a = 0;
    for (; a + kAtomsAhead <= count; a += kAtomsAhead) {
      add(a, std::integral_constant<int, kAtomsAhead>());
    }
    for (; a < count; ++a) {
      add(a, std::integral_constant<int, 1>());
    }
    visit(column, sum);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kDotBlocks)
    pursuit_step_kernel(PursuitState<T> state, PursuitRules rules, bool staged) {
  const int64_t token = blockIdx.x;
  if (rules.step >= state.l0[token] || state.done[token] != 0) {
    return;  // the whole block
  }
  Arena arena{shared_memory()};
  double* storage = staged ? arena.take<double>(state.d) : nullptr;
  T* gradient = arena.take<T>(state.s_max);
  T* moved = arena.take<T>(state.s_max);
  PursuitShared& shared = *arena.take<PursuitShared>(1);
  T* residual = state.residual + token * state.d;
  T* weights = state.weights + token * state.s_max;
  const int64_t* atoms = state.atoms + token * state.s_max;
  choose_place(state, token, shared);
  const int count = shared.chosen, place = shared.place;

  // The gradient of half the squared residual, on the support: the atom just chosen and those in use.
  const double* row = stage_row(residual, state.d, storage);
  for (int a = static_cast<int>(threadIdx.x) / kLanes; a < count; a += kGroups) {
    const bool moves = a == place || rules.keep_chosen || widen(weights[a]) != 0.0;
    const double product = moves ? row_dot(row, residual, state.dictionary + atoms[a] * state.d, state.d) : 0.0;
    if (threadIdx.x % kLanes == 0) {
      gradient[a] = rounded<T>(product);
    }
  }
  __syncthreads();

  // Line search along c = g D: <c, r> / <c, c>.
  T* direction = state.direction + token * state.d;
  double energy = 0.0, gain = 0.0;
  weighted_atoms(state, atoms, gradient, count, [&](int64_t column, double sum) {
    direction[column] = rounded<T>(sum);
    const double c = widen(direction[column]);
    energy += c * c;
    gain += c * widen(residual[column]);
  });
  energy = block_sum(energy, shared);
  gain = block_sum(gain, shared);
  if (energy == 0.0) {  // converged; the released code divides 0 by 0 here
    if (threadIdx.x == 0) {
      state.done[token] = 1;
    }
    return;  // the whole block
  }
  const double length = gain / energy;
  for (int a = threadIdx.x; a < count; a += kThreads) {
    const double weight = widen(weights[a]) + length * widen(gradient[a]);
    if (weight < 0.0) {
      shared.clamped = 1;
    }
    moved[a] = rounded<T>(relu(weight));
    weights[a] = moved[a];
  }
  __syncthreads();

  double squares = 0.0;
  if (shared.clamped != 0) {  // the weights did not move along the gradient
    weighted_atoms(state, atoms, moved, count, [&](int64_t column, double sum) {
      residual[column] = rounded<T>(widen(state.target[token * state.d + column]) - sum);
      squares += widen(residual[column]) * widen(residual[column]);
    });
  } else {
    for (int64_t column = threadIdx.x; column < state.d; column += kThreads) {
      residual[column] = rounded<T>(widen(residual[column]) - length * widen(direction[column]));
      squares += widen(residual[column]) * widen(residual[column]);
    }
  }
  squares = block_sum(squares, shared);
  if (threadIdx.x == 0 && sqrt(squares) < rules.residual_threshold) {
    state.done[token] = 1;
  }
}

}  // namespace darkmatter::cuda
