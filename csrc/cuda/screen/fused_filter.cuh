// The screen as one kernel of Hopper: the matrix product of the codes with the filter as its end, so that no score is
// ever written to memory. What it keeps is what the filter of filter.cuh keeps of the same products.
//
// A block has tiles of 128 tokens by 256 latents. One warp of its first warpgroup has tiles of codes copied into a ring
// of four stages of 64 dimensions; two warpgroups multiply them, 64 tokens each, and look through the 128 sums of each
// of their threads for candidates; two more warps of the first warpgroup take these into the lists of their tokens. Two
// blocks, a cluster, have the same latents and other tokens: each has half of the latents' codes copied to both.
//
// Budget of a tile of d dimensions on a multiprocessor: 16 d clocks of products; from L2 32 KB for every 64 dimensions,
// 32 B a clock. Looking through the sums is 500 instructions a warp, one warp of each warpgroup on each scheduler: 500
// clocks that the other warpgroup multiplies in, up to the four stages that it may be behind. Lists are in device
// memory: whoever takes hits waits for it, and who multiplies does not wait for them. Shared memory 213 KB: 192 of
// codes, 4 of screens, 16 of hits. Registers 224 * 256 + 56 * 128 = 168 * 384, what the block starts with.
#pragma once

#include "cuda/kernels/hopper.cuh"
#include "cuda/screen/limits.cuh"

namespace darkmatter::cuda {

constexpr int kClusterBlocks = 2;
constexpr int kTokenTile = 128;
constexpr int kLatentTile = kRun;
constexpr int kStages = 4;
constexpr int kConsumers = 2;  // warpgroups that multiply
constexpr int kConsumerTokens = kTokenTile / kConsumers;
constexpr int kConsumerWarps = 4 * kConsumers;
constexpr int kFusedThreads = hopper::kWarpgroup * (1 + kConsumers);
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
constexpr int kHits = 256;       // of a warp before they are taken: two groups of columns in full
constexpr int kRasterPairs = 8;  // clusters side by side over the tokens: 2048 tokens, 15 MB of codes at d 3584, in L2
constexpr int kColumnGroups = kLatentTile / 8;  // four sums a thread each

static_assert(kLatentTile == hopper::kProductLatents && kHits >= 128);

// The tiles of latents of a launch: `step` times every number from 0 on, or every number that `growth` does not divide,
// n in all.
struct LatentOrder {
  int step, growth, n;

  DM_HOST_DEVICE int tile(int at) const {
    return step * (growth == 0 ? at : at / (growth - 1) * growth + at % (growth - 1) + 1);
  }
};

// What a launch does.
struct FusedWork {
  ScreenedTokens tokens;
  ScreenedLatents latents;
  CandidateLists lists;  // of one range
  LatentLimits limits;   // null for top-k: then the lists have limits
  int64_t n_tokens;
  int steps;  // of 64 dimensions
  LatentOrder order;
};

// Which tile a block has when. Clusters that run at a time have the same few tiles of latents: these cross device
// memory once for every kRasterPairs clusters of tokens, and the tokens' codes stay in L2.
struct Schedule {
  int pairs, items, stride, first;

  __device__ explicit Schedule(const FusedWork& work)
      : pairs(static_cast<int>(ceil_div(work.n_tokens, kTokenTile * kClusterBlocks))),
        items(pairs * work.order.n),
        stride(gridDim.x / kClusterBlocks),
        first(blockIdx.x / kClusterBlocks) {}

  struct Place {
    int64_t token, latent_tile;
  };
  __device__ Place place(const FusedWork& work, int item, uint32_t rank) const {
    const int band = item / (kRasterPairs * work.order.n), within = item % (kRasterPairs * work.order.n);
    const int left = pairs - band * kRasterPairs, high = left < kRasterPairs ? left : kRasterPairs;
    const int pair = band * kRasterPairs + within % high;
    return {(static_cast<int64_t>(pair) * kClusterBlocks + rank) * kTokenTile, work.order.tile(within / high)};
  }
};

// A product that may be of a candidate: sum `where / 32` of lane `where % 32`.
struct Hit {
  float product;
  uint32_t where;
};
constexpr uint32_t kMoreHits = 1u << 31;  // beside their number: the warp has others for the same tile

struct FusedShared {
  unsigned char tokens[kStages][kTokenTile * hopper::kTileColumns * sizeof(__half)];
  unsigned char latents[kStages][kLatentTile * hopper::kTileColumns * sizeof(__half)];
  LatentScreen screens[2][kLatentTile];
  Hit hits[kConsumerWarps][kHits];
  uint32_t n_hits[kConsumerWarps];
  hopper::Barrier full[kStages], empty[kStages];                          // of stages
  hopper::Barrier screens_full[2], screens_empty[2];                      // of screens
  hopper::Barrier hits_full[kConsumerWarps], hits_empty[kConsumerWarps];  // of hits

  __device__ void init() {
    for (int s = 0; s < kStages; ++s) {
      hopper::init(&full[s], 1);
      hopper::init(&empty[s], kConsumerWarps * kClusterBlocks);
    }
    for (int b = 0; b < 2; ++b) {
      hopper::init(&screens_full[b], 1);
      hopper::init(&screens_empty[b], kConsumerWarps);
    }
    for (int w = 0; w < kConsumerWarps; ++w) {
      hopper::init(&hits_full[w], 1);
      hopper::init(&hits_empty[w], 1);
    }
    hopper::fence_init();
  }
};
constexpr size_t kFusedSharedBytes = sizeof(FusedShared) + hopper::kAtomBytes;
static_assert(kFusedSharedBytes <= 227 * 1024);

// Where in a ring of n places, and the parity of the barriers' phase there.
template <int n>
struct RingPlace {
  int at = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    at = at + 1 == n ? 0 : at + 1;
    parity ^= at == 0 ? 1 : 0;
  }
};

// One thread: has the codes and screens of all tiles of the block copied.
__device__ inline void copy_codes(
    const hopper::TensorMap& token_map, const hopper::TensorMap& latent_map, const FusedWork& work, FusedShared& shared,
    uint32_t rank) {
  constexpr int kShare = kLatentTile / kClusterBlocks;  // rows of latents that this block copies to the cluster
  const Schedule schedule(work);
  RingPlace<kStages> stage;
  RingPlace<2> screen;
  for (int item = schedule.first; item < schedule.items; item += schedule.stride) {
    const Schedule::Place place = schedule.place(work, item, rank);
    hopper::wait(&shared.screens_empty[screen.at], screen.parity ^ 1);
    hopper::arrive_expecting(&shared.screens_full[screen.at], sizeof(shared.screens[0]));
    hopper::copy_bytes(
        shared.screens[screen.at], work.latents.screens + place.latent_tile * kLatentTile, sizeof(shared.screens[0]),
        &shared.screens_full[screen.at]);
    screen.advance();
    for (int step = 0; step < work.steps; ++step) {
      hopper::wait(&shared.empty[stage.at], stage.parity ^ 1);
      hopper::Barrier* full = &shared.full[stage.at];
      hopper::arrive_expecting(full, sizeof(shared.tokens[0]) + sizeof(shared.latents[0]));
      const int column = step * hopper::kTileColumns;
      hopper::copy_tile(shared.tokens[stage.at], token_map, column, static_cast<int>(place.token), full);
      hopper::copy_tile_to(
          (1u << kClusterBlocks) - 1, shared.latents[stage.at] + rank * (sizeof(shared.latents[0]) / kClusterBlocks),
          latent_map, column, static_cast<int>(place.latent_tile * kLatentTile + rank * kShare), full);
      stage.advance();
    }
  }
}

// The warp has read a stage: also the other blocks of the cluster may copy into it.
__device__ inline void release_stage(FusedShared& shared, int stage) {
  const uint32_t lane = threadIdx.x % 32;
  if (lane < kClusterBlocks) {
    hopper::arrive_at(&shared.empty[stage], lane);
  }
}

// The products of 64 tokens and 256 latents over all dimensions.
__device__ inline void multiply(
    float (&sums)[hopper::kAccumulators], FusedShared& shared, int consumer, int steps, RingPlace<kStages>& stage) {
  int before = 0;
  for (int step = 0; step < steps; ++step) {
    hopper::wait(&shared.full[stage.at], stage.parity);
    const uint64_t left = hopper::tile_descriptor(
        shared.tokens[stage.at] + consumer * kConsumerTokens * hopper::kTileColumns * sizeof(__half));
    const uint64_t right = hopper::tile_descriptor(shared.latents[stage.at]);
    hopper::begin_products();
#pragma unroll
    for (int k = 0; k < hopper::kTileColumns / hopper::kProductDepth; ++k) {
      hopper::product(
          sums, left + k * hopper::kStepInDescriptor, right + k * hopper::kStepInDescriptor, step != 0 || k != 0);
    }
    hopper::commit_products();
    hopper::wait_products<1>();  // those of the stage before are done
    if (step != 0) {
      release_stage(shared, before);
    }
    before = stage.at;
    stage.advance();
  }
  hopper::wait_products<0>();
  hopper::hold(sums);
  release_stage(shared, before);
}

// Sum i of a thread is of token 8 (i / 2 % 2) after its first, and of latent 8 (i / 4) + i % 2 after its first.
DM_HOST_DEVICE inline int first_row(int thread) { return thread / 32 * 16 + thread % 32 / 4; }
DM_HOST_DEVICE inline int first_column(int lane) { return 2 * (lane % 4); }

// One of the two tokens of a thread, loaded before the products and looked at after them.
struct TokenRow {
  bool there;
  int exact;
  uint32_t limit;
  float scale;
  TokenBounds bounds;

  __device__ TokenRow(const FusedWork& work, int64_t token) : there(token < work.n_tokens) {
    const int64_t at = there ? token : 0;
    exact = work.tokens.exact[at];
    scale = work.tokens.scale[at];
    bounds = work.tokens.bounds[at];
    limit = work.lists.limit != nullptr ? work.lists.limit[at] : ordered_key(0.0f);
  }
  __device__ float least(const LargestBounds& largest) const {
    return there && exact == 0 ? least_score(key_float(limit), bounds, largest) : INFINITY;
  }
};

// How the thread's two tokens look at sums: a hit is one whose score is not below `least`.
struct HitTest {
  float scale[2], least[2];
  const float4* screens;  // of the thread's two latents of each group of columns: groups are four apart

  __device__ void of_group(const float (&sums)[hopper::kAccumulators], int group, bool (&hit)[4]) const {
    const float4 two = screens[group * 4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float score =
          fmaf(sums[4 * group + i], scale[i / 2] * (i % 2 == 0 ? two.x : two.z), i % 2 == 0 ? two.y : two.w);
      hit[i] = !(score < least[i / 2]);
    }
  }
};

// Writes the hits among a group's sums behind the others of the warp; false if there is no room for all.
__device__ inline bool push_hits(
    const float (&sums)[hopper::kAccumulators], int group, const HitTest& test, Hit* hits, int& n) {
  bool hit[4];
  unsigned lanes[4];
  test.of_group(sums, group, hit);
  int end = n;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    lanes[i] = __ballot_sync(kAllLanes, hit[i]);
    end += __popc(lanes[i]);
  }
  if (end > kHits) {
    return false;
  }
  const unsigned lane = threadIdx.x % 32, before = (1u << lane) - 1;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (hit[i]) {
      hits[n + __popc(lanes[i] & before)] = {sums[4 * group + i], static_cast<uint32_t>(4 * group + i) * 32 + lane};
    }
    n += __popc(lanes[i]);
  }
  return true;
}

// Looks through the sums of a tile, all of them without a branch; then, group by group of columns, writes down those
// that are hits in any lane. Where a warp has no room for more it has the others taken first.
__device__ inline void find_hits(
    const float (&sums)[hopper::kAccumulators], const HitTest& test, FusedShared& shared, int warp, uint32_t& parity) {
  uint32_t groups = 0;
#pragma unroll
  for (int group = 0; group < kColumnGroups; ++group) {
    bool hit[4];
    test.of_group(sums, group, hit);
    groups |= hit[0] || hit[1] || hit[2] || hit[3] ? 1u << group : 0u;
  }
  groups = __reduce_or_sync(kAllLanes, groups);
  do {
    hopper::wait(&shared.hits_empty[warp], parity ^ 1);
    uint32_t later = 0;
    int n = 0;
#pragma unroll
    for (int group = 0; group < kColumnGroups; ++group) {
      if (groups >> group & 1 && !push_hits(sums, group, test, shared.hits[warp], n)) {
        later = groups & ~0u << group;
        groups = 0;
      }
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      shared.n_hits[warp] = static_cast<uint32_t>(n) | (later != 0 ? kMoreHits : 0);
      hopper::arrive(&shared.hits_full[warp]);
    }
    parity ^= 1;
    groups = later;
  } while (groups != 0);
}

// A warpgroup: products and hits of its 64 tokens of every tile.
__device__ inline void consume(const FusedWork& work, FusedShared& shared, uint32_t rank, int consumer) {
  const int thread = threadIdx.x % hopper::kWarpgroup, warp = consumer * 4 + thread / 32;
  const Schedule schedule(work);
  RingPlace<kStages> stage;
  RingPlace<2> screen;
  uint32_t hits_parity = 0;
  for (int item = schedule.first; item < schedule.items; item += schedule.stride) {
    const Schedule::Place place = schedule.place(work, item, rank);
    const int64_t token = place.token + consumer * kConsumerTokens + first_row(thread);
    const TokenRow first(work, token), second(work, token + 8);  // under way while the products are made
    const LargestBounds largest = work.latents.largest[place.latent_tile];
    float sums[hopper::kAccumulators];
    multiply(sums, shared, consumer, work.steps, stage);
    hopper::wait(&shared.screens_full[screen.at], screen.parity);
    const HitTest test{
        {first.scale, second.scale},
        {first.least(largest), second.least(largest)},
        reinterpret_cast<const float4*>(shared.screens[screen.at] + first_column(thread % 32))};
    find_hits(sums, test, shared, warp, hits_parity);
    __syncwarp();
    if (thread % 32 == 0) {
      hopper::arrive(&shared.screens_empty[screen.at]);
    }
    screen.advance();
  }
}

// Takes a hit into the list of its token, if it is a candidate by its own bounds.
__device__ inline void take_hit(const FusedWork& work, const Hit& hit, int64_t first_token, int64_t first_latent) {
  const int lane = hit.where % 32, sum = hit.where / 32;
  const int64_t token = first_token + first_row(lane) + 8 * (sum / 2 % 2);
  const int64_t latent = first_latent + first_column(lane) + 8 * (sum / 4) + sum % 2;
  if (token >= work.n_tokens || latent >= work.latents.n || work.tokens.exact[token] != 0) {
    return;
  }
  const Interval interval =
      work.latents.interval(latent, hit.product, work.tokens.scale[token], work.tokens.bounds[token]);
  const float limit = work.limits.values != nullptr ? work.limits.values[latent * work.limits.step]
                                                    : key_float(work.lists.limit[token]);
  if (interval.upper < limit) {
    return;
  }
  const int place = atomicAdd(&work.lists.count[token], 1);
  if (place >= work.lists.size) {
    work.tokens.exact[token] = kExactly;
    return;
  }
  const CandidateList list(work.lists, token, 0);
  list.latent[place] = static_cast<int32_t>(latent);
  if (list.lower != nullptr) {
    list.lower[place] = interval.lower;
    list.upper[place] = interval.upper;
  }
}

// A warp: takes the hits of the four warps of a consumer, tile by tile and in their order.
__device__ inline void take_hits_of(const FusedWork& work, FusedShared& shared, uint32_t rank, int consumer) {
  const int lane = threadIdx.x % 32;
  const Schedule schedule(work);
  uint32_t parities = 0;  // a bit a warp
  for (int item = schedule.first; item < schedule.items; item += schedule.stride) {
    const Schedule::Place place = schedule.place(work, item, rank);
    for (int w = 0; w < 4; ++w) {
      const int warp = consumer * 4 + w;
      const int64_t first_token = place.token + consumer * kConsumerTokens + w * 16;
      bool more = true;
      while (more) {
        hopper::wait(&shared.hits_full[warp], parities >> w & 1);
        parities ^= 1u << w;
        const uint32_t found = shared.n_hits[warp];
        more = (found & kMoreHits) != 0;
        for (int i = lane; i < static_cast<int>(found & ~kMoreHits); i += 32) {
          take_hit(work, shared.hits[warp][i], first_token, place.latent_tile * kLatentTile);
        }
        __syncwarp();
        if (lane == 0) {
          hopper::arrive(&shared.hits_empty[warp]);
        }
      }
    }
  }
}

// Grid: a multiple of kClusterBlocks, in clusters of so many.
__global__ void __launch_bounds__(kFusedThreads, 1) fused_filter_kernel(
    const __grid_constant__ hopper::TensorMap token_map, const __grid_constant__ hopper::TensorMap latent_map,
    const __grid_constant__ FusedWork work) {
#ifdef DM_HOPPER
  FusedShared& shared = *reinterpret_cast<FusedShared*>(hopper::aligned_shared());
  const uint32_t rank = hopper::cluster_rank();
  const int warpgroup = threadIdx.x / hopper::kWarpgroup, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    shared.init();
  }
  __syncwarp();  // whole warps arrive at the barrier of the cluster
  hopper::cluster_sync();
  if (warpgroup == 0) {
    hopper::give_registers<kProducerRegisters>();
    if (warp == 0) {
      if (threadIdx.x == 0) {
        copy_codes(token_map, latent_map, work, shared, rank);
      }
    } else if (warp <= kConsumers) {
      take_hits_of(work, shared, rank, warp - 1);
    }
  } else {
    hopper::take_registers<kConsumerRegisters>();
    consume(work, shared, rank, warpgroup - 1);
  }
  __syncwarp();
  hopper::cluster_sync();  // the other block may still copy into this one and arrive at its barriers
#endif
}

// Between launches: raises the limit of every token to what its list proves. One warp a token.
__global__ void __launch_bounds__(kThreads)
    raise_limits_kernel(ScreenedTokens tokens, CandidateLists lists, int64_t n, int k, RoundingMargin margin) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (token >= n || tokens.exact[token] != 0 || lists.count[token] < k) {
    return;  // the whole warp
  }
  int* bins = Arena{shared_memory()}.take<int>(kWarps * kBins) + threadIdx.x / 32 * kBins;
  const Tightened after =
      tighten(CandidateList(lists, token, 0), lists.count[token], lists.limit[token], k, margin, bins);
  __syncwarp();  // all have read what is written now
  if (threadIdx.x % 32 == 0) {
    lists.count[token] = after.count;
    lists.limit[token] = after.limit;
  }
}

}  // namespace darkmatter::cuda
