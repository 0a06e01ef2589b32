// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The dsv4-router authors
//
// Steps 2 to 6 of dense routing in a single pass over each row of logits: score, bias, top-k, weights.
// One warp routes one row, and rows share nothing: no barrier of the block, bits independent of num_tokens.
//
// Of few rows every expert's score is computed and the selections sorted: the shortest way. Many rows are bound by
// instructions, so they spare most scores: bounds of every selection cost half as much, and only experts that may be
// among the k best by these are candidates, seldom more than ten. The results are the same, to the bit.
//
// Compile-time parameters (macros):
//   NUM_EXPERTS  experts, 1 to 1024        TOP_K  experts per token, 1 to 16
//   MANY_ROWS    1 for the second way      NUM_WARPS  of a block
//   IDS_T        int or long long          VECTOR_LOADS  1 if all rows and the bias are 16-byte aligned
//   STORE_LOGITS 1 if logits_out receives the logits
//   NUM_SPLITS   partial logits of each row, which are added first to last: the reduction of a GEMM that split K
//   FIRST_HALF   how many of these are added apart from the others, before both sums are; NUM_SPLITS adds all in turn
#include "router_math.cuh"

constexpr int kPerLane = (NUM_EXPERTS + kLanes - 1) / kLanes;
constexpr int kDepth = kPerLane < TOP_K ? kPerLane : TOP_K;  // no lane can win more often
constexpr bool kAllAtOnce = NUM_SPLITS * kPerLane <= 128;  // registers hold all of a lane's partial logits
constexpr bool kVector = VECTOR_LOADS && NUM_EXPERTS % 4 == 0 && kPerLane % 4 == 0;

static_assert(TOP_K >= 1 && TOP_K <= 16 && TOP_K <= NUM_EXPERTS, "top_k out of range");
static_assert(NUM_EXPERTS <= 1024, "num_experts out of range");
static_assert(FIRST_HALF >= 1 && FIRST_HALF <= NUM_SPLITS, "first half out of range");

// Keys order selections as unsigned integers: absent experts, then NaN, then the numbers from -inf to +inf.
constexpr unsigned kAbsentKey = 0, kNanKey = 1;

// Of the result of an operation, whose NaN is always 0x7fffffff: it alone wraps around, to 1.
__device__ __forceinline__ unsigned selection_key(float selection) {
  const unsigned bits = __float_as_uint(selection);
  return (bits ^ (unsigned)(((int)bits >> 31) | (int)0x80000000u)) + 2u;
}

// The number that has a key above kNanKey.
__device__ __forceinline__ float selection_of(unsigned key) {
  const unsigned bits = key - 2u;
  return __uint_as_float(bits ^ ((int)bits < 0 ? 0x80000000u : 0xffffffffu));
}

// Lane l owns the kPerLane consecutive experts from l * kPerLane on: among equal keys the lowest lane, and in a lane
// the lowest slot, is the lowest expert id.
__device__ __forceinline__ void load_slots(float (&to)[kPerLane], const float* from, int first) {
  if constexpr (kVector) {
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4) {
      float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
      if (first + i < NUM_EXPERTS) v = *reinterpret_cast<const float4*>(from + first + i);
      to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; i++) to[i] = first + i < NUM_EXPERTS ? from[first + i] : 0.f;
  }
}

__device__ __forceinline__ void store_slots(float* to, const float (&from)[kPerLane], int first) {
  if constexpr (kVector) {
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4)
      if (first + i < NUM_EXPERTS)
        *reinterpret_cast<float4*>(to + first + i) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; i++)
      if (first + i < NUM_EXPERTS) to[first + i] = from[i];
  }
}

// What a lane has of a row's partial logits.
struct Partials {
  float of[NUM_SPLITS][kPerLane];

  __device__ __forceinline__ void load(const float* row_of_first, long long stride, int first) {
#pragma unroll
    for (int split = 0; split < NUM_SPLITS; split++) load_slots(of[split], row_of_first + split * stride, first);
  }

  __device__ __forceinline__ void add(float (&sum)[kPerLane]) const {
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      sum[i] = of[0][i];
#pragma unroll
      for (int split = 1; split < FIRST_HALF; split++) sum[i] = __fadd_rn(sum[i], of[split][i]);
      if constexpr (FIRST_HALF < NUM_SPLITS) {
        float rest = of[FIRST_HALF][i];
#pragma unroll
        for (int split = FIRST_HALF + 1; split < NUM_SPLITS; split++) rest = __fadd_rn(rest, of[split][i]);
        sum[i] = __fadd_rn(sum[i], rest);
      }
    }
  }
};

// What lane r has of the choice: the expert of rank r.
struct Choice {
  int expert;
  float score;
};

// Batcher's odd-even merge sort, descending, of any length: the comparators at distance kDistance that merge sorted
// runs of kRun, then all that follow. Every index is a compile-time constant, so `v` stays in registers.
template <int kRun, int kDistance>
__device__ __forceinline__ void sort_descending(unsigned (&v)[kPerLane]) {
  constexpr int kOffset = kDistance % kRun;
#pragma unroll
  for (int a = 0; a + kDistance < kPerLane; a++) {
    const int b = a + kDistance;
    if (a >= kOffset && (a - kOffset) % (2 * kDistance) < kDistance && a / (2 * kRun) == b / (2 * kRun)) {
      const unsigned high = max(v[a], v[b]);
      v[b] = min(v[a], v[b]);
      v[a] = high;
    }
  }
  if constexpr (kDistance > 1) {
    sort_descending<kRun, kDistance / 2>(v);
  } else if constexpr (2 * kRun < kPerLane) {
    sort_descending<2 * kRun, 2 * kRun>(v);
  }
}

// The choice among all experts.
__device__ __forceinline__ Choice choose_of_all(const float (&logit)[kPerLane], const float (&bias)[kPerLane],
                                                int lane) {
  float score[kPerLane];
  unsigned key[kPerLane], sorted[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; i++) {
    score[i] = sqrt_softplus(logit[i]);
    const bool exists = lane * kPerLane + i < NUM_EXPERTS;
    key[i] = exists ? selection_key(__fadd_rn(score[i], bias[i])) : kAbsentKey;
    sorted[i] = key[i];
  }
  sort_descending<1, 1>(sorted);

  // Round r finds the r-th best of the row: the best head of all lanes' sorted lists, which the lowest lane that has it
  // then drops. Lane r remembers the key and who had it.
  const unsigned my_lane = 1u << lane, lower_lanes = my_lane - 1u;
  unsigned my_key = kAbsentKey, my_heads = my_lane;
#pragma unroll
  for (int r = 0; r < TOP_K; r++) {
    const unsigned best = __reduce_max_sync(kFullWarp, sorted[0]);
    const unsigned heads = __ballot_sync(kFullWarp, sorted[0] == best);
    if (lane == r) my_key = best, my_heads = heads;
    if (sorted[0] == best && !(heads & lower_lanes)) {
#pragma unroll
      for (int i = 0; i + r + 1 < TOP_K && i < kDepth; i++) sorted[i] = i + 1 < kPerLane ? sorted[i + 1] : kAbsentKey;
    }
  }

  // Lane r looks its key up among its source's slots. Of equal ones there the first round has the lowest slot.
  const int my_source = __ffs(my_heads) - 1;
  unsigned equal_slots = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; i++)
    if (__shfl_sync(kFullWarp, key[i], my_source) == my_key) equal_slots |= 1u << i;
  const unsigned key_before = __shfl_up_sync(kFullWarp, my_key, 1);
  if (__any_sync(kFullWarp, lane > 0 && lane < TOP_K && my_key == key_before)) {
    const unsigned long long mine = (unsigned long long)my_key << 32 | (unsigned)my_source;
    const int rounds_before = __popc(__match_any_sync(kFullWarp, mine) & lower_lanes);
#pragma unroll 1
    for (int i = 0; i < rounds_before; i++) equal_slots &= equal_slots - 1;
  }
  const int my_slot = __ffs(equal_slots) - 1;
  float my_score = 0.f;
#pragma unroll
  for (int i = 0; i < kPerLane; i++) {
    const float their_score = __shfl_sync(kFullWarp, score[i], my_source);
    if (i == my_slot) my_score = their_score;
  }
  return {my_source * kPerLane + my_slot, my_score};
}

// What a warp of many rows has in shared memory.
struct Held {
  alignas(16) float logit[NUM_EXPERTS];
  alignas(16) unsigned key[kLanes];  // of the candidates
  int candidate[kLanes];             // their ids, ascending
  Choice choice[kLanes];             // by rank
};

// Lists the candidates of a row whose logits are held, and returns how many there are, of which lane l shall have number
// l; 0 if there are too many for that, or fewer than k numbers.
//
// The k-th best of the lanes' best lower bounds is a selection that k experts reach. So does whoever is among the k
// best, and then its upper bound does too.
__device__ __forceinline__ int list_candidates(Held& held, const float (&logit)[kPerLane],
                                               const float (&bias)[kPerLane], int lane) {
  constexpr int kCountBits = kPerLane < 2 ? 1 : kPerLane < 4 ? 2 : 3;  // of a lane's candidates; seldom more
  const int first = lane * kPerLane;
  const float kNan = __uint_as_float(0x7fffffffu);
  float high[kPerLane], best_low = kNan;
#pragma unroll
  for (int i = 0; i < kPerLane; i++) {
    const Bounds bounds = selection_bounds(logit[i], bias[i]);
    const bool exists = first + i < NUM_EXPERTS;
    high[i] = exists ? bounds.high : kNan;
    best_low = fmaxf(best_low, exists ? bounds.low : kNan);  // of a number and a NaN the number
  }
  // Each round drops all lanes that are equal: then the threshold is lower than it could be, or is none.
  unsigned head = selection_key(best_low), threshold_key = kAbsentKey;
#pragma unroll
  for (int r = 0; r < TOP_K; r++) {
    threshold_key = __reduce_max_sync(kFullWarp, head);
    if (head == threshold_key) head = kAbsentKey;
  }
  const float threshold = __fsub_rn(selection_of(threshold_key), 2.f * kLeastScore);
  unsigned mine = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; i++)
    if (high[i] >= threshold) mine |= 1u << i;
  const unsigned count = __popc(mine);
  int place = 0, num_candidates = 0;
#pragma unroll
  for (int bit = 0; bit < kCountBits; bit++) {
    const unsigned lanes = __ballot_sync(kFullWarp, count >> bit & 1u);
    place += __popc(lanes & ((1u << lane) - 1u)) << bit;
    num_candidates += __popc(lanes) << bit;
  }
  const bool too_many = kPerLane >> kCountBits && __any_sync(kFullWarp, count >> kCountBits);
  if (threshold_key <= kNanKey || num_candidates > kLanes || too_many) return 0;
  for (; mine; mine &= mine - 1u) held.candidate[place++] = first + __ffs(mine) - 1;
  return num_candidates;
}

// The choice among the candidates, by their exact selections.
__device__ __forceinline__ Choice choose_of(Held& held, int num_candidates, const float* correction_bias, int lane) {
  Choice mine{};
  unsigned key = kAbsentKey;
  if (lane < num_candidates) {
    mine.expert = held.candidate[lane];
    mine.score = sqrt_softplus(held.logit[mine.expert]);
    key = selection_key(__fadd_rn(mine.score, correction_bias ? correction_bias[mine.expert] : 0.f));
  }
  held.key[lane] = key;
  __syncwarp();
  int rank = 0;
#pragma unroll 1
  for (int from = 0; from < num_candidates; from += 8) {
#pragma unroll
    for (int i = from; i < from + 8; i += 4) {
      const uint4 others = *reinterpret_cast<const uint4*>(held.key + i);
      rank += (others.x > key) + (others.y > key) + (others.z > key) + (others.w > key);
    }
  }
  // Equal keys have taken the same rank. TOP_K powers of two add up to 2^TOP_K - 1 only if each is there once.
  if (lane >= num_candidates) rank = kLanes;
  constexpr unsigned kOne = 1u << 26, kEachOnce = TOP_K * kOne + (1u << TOP_K) - 1u;  // how many, and their sum
  if (__reduce_add_sync(kFullWarp, rank < TOP_K ? kOne + (1u << rank) : 0u) != kEachOnce)
    rank += __popc(__match_any_sync(kFullWarp, key) & ((1u << lane) - 1u));
  if (rank < TOP_K) held.choice[rank] = mine;
  __syncwarp();
  return held.choice[lane];
}

// The weights of a row's choice, and its ids.
__device__ __forceinline__ void store_choice(Choice choice, int lane, float routed_scaling_factor, float* weights,
                                             IDS_T* ids) {
  const float score = weighable(choice.score);
  float sum = 0.f;
#pragma unroll
  for (int r = 0; r < TOP_K; r++) sum = __fadd_rn(sum, __shfl_sync(kFullWarp, score, r));
  if (lane < TOP_K) {
    weights[lane] = __fmul_rn(__fdiv_rn(score, __fadd_rn(sum, kWeightFloor)), routed_scaling_factor);
    ids[lane] = (IDS_T)choice.expert;
  }
}

// partial_logits [NUM_SPLITS, num_tokens, NUM_EXPERTS] fp32; logits_out [num_tokens, NUM_EXPERTS] fp32, to receive
// their sums, those of padding rows too, if STORE_LOGITS; correction_bias [NUM_EXPERTS] fp32 or null; out_weights and
// out_ids [num_tokens, TOP_K]. No pointer is __restrict__: a dependent launch starts while the kernel before it still
// writes the logits, so no load of theirs may move above the wait.
extern "C" __global__ void __launch_bounds__(NUM_WARPS * kLanes)
activation_topk(const float* partial_logits, float* logits_out, const float* correction_bias, const bool* token_mask,
                const int* num_valid_tokens, long long num_valid_tokens_on_host, long long num_tokens,
                double routed_scaling_factor, long long padding_id, long long weights_are_constant, float* out_weights,
                IDS_T* out_ids) {
  const int lane = threadIdx.x % kLanes, first = lane * kPerLane;
  const long long row = (long long)blockIdx.x * NUM_WARPS + threadIdx.x / kLanes;

  float bias[kPerLane] = {};
  if (!weights_are_constant) wait_for_previous_kernel();
  if (correction_bias) load_slots(bias, correction_bias, first);
  if (weights_are_constant) wait_for_previous_kernel();
  launch_dependents_early();
  if (row >= num_tokens) return;
  out_weights += row * TOP_K;
  out_ids += row * TOP_K;

  // Before it is known whether they are needed: so all are in flight at the branch. Where they are added up right after,
  // compilers request a few at a time, for the registers' sake.
  Partials partials;
  const float* row_of_first = partial_logits + row * NUM_EXPERTS;
  const long long stride = num_tokens * NUM_EXPERTS;
  if constexpr (kAllAtOnce) partials.load(row_of_first, stride, first);
  const ValidRows valid{token_mask, num_valid_tokens, num_valid_tokens_on_host};
  const bool is_token = valid.contains(row);
  if (!is_token && lane < TOP_K) {
    out_weights[lane] = 0.f;
    out_ids[lane] = (IDS_T)padding_id;
  }
  if (!is_token && !STORE_LOGITS) return;

  float logit[kPerLane];
  if constexpr (!kAllAtOnce) partials.load(row_of_first, stride, first);
  partials.add(logit);
  if constexpr (STORE_LOGITS) {
    store_slots(logits_out + row * NUM_EXPERTS, logit, first);
    if (!is_token) return;
  }
  const float scaling = (float)routed_scaling_factor;
  if constexpr (MANY_ROWS) {
    __shared__ Held warps[NUM_WARPS];
    Held& held = warps[threadIdx.x / kLanes];
    store_slots(held.logit, logit, first);
    if (const int num_candidates = list_candidates(held, logit, bias, lane)) {
      __syncwarp();
      store_choice(choose_of(held, num_candidates, correction_bias, lane), lane, scaling, out_weights, out_ids);
      return;
    }
    // Seldom: logits and bias are read again, for nobody has held registers for this.
    __syncwarp();
    load_slots(logit, held.logit, first);
    if (correction_bias) load_slots(bias, correction_bias, first);
  }
  store_choice(choose_of_all(logit, bias, lane), lane, scaling, out_weights, out_ids);
}
