// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The dsv4-router authors
//
// Steps 2 to 6 of dense routing in a single pass over each row of logits: score, bias, top-k, weights.
// One warp routes one row, and rows share nothing: no shared memory, no barrier, bits independent of num_tokens.
//
// Compile-time parameters (macros):
//   NUM_EXPERTS  experts, 1 to 1024        TOP_K  experts per token, 1 to 16
//   IDS_T        int or long long          VECTOR_LOADS  1 if all rows and the bias are 16-byte aligned
//   STORE_LOGITS 1 if logits_out receives the logits
//   NUM_SPLITS   partial logits of each row, which are added first to last: the reduction of a GEMM that split K
//   FIRST_HALF   how many of these are added apart from the others, before both sums are; NUM_SPLITS adds all in turn
#include "router_math.cuh"

constexpr int kPerLane = (NUM_EXPERTS + kLanes - 1) / kLanes;
constexpr int kDepth = kPerLane < TOP_K ? kPerLane : TOP_K;  // no lane can win more often
constexpr bool kVector = VECTOR_LOADS && NUM_EXPERTS % 4 == 0 && kPerLane % 4 == 0;

static_assert(TOP_K >= 1 && TOP_K <= 16 && TOP_K <= NUM_EXPERTS, "top_k out of range");
static_assert(NUM_EXPERTS <= 1024, "num_experts out of range");
static_assert(FIRST_HALF >= 1 && FIRST_HALF <= NUM_SPLITS, "first half out of range");

// Keys order selections as unsigned integers: absent experts, then NaN, then the numbers from -inf to +inf.
constexpr unsigned kAbsentKey = 0;

// Of the result of an operation, whose NaN is always 0x7fffffff: it alone wraps around, to 1.
__device__ __forceinline__ unsigned selection_key(float selection) {
  const unsigned bits = __float_as_uint(selection);
  return (bits ^ (unsigned)(((int)bits >> 31) | (int)0x80000000u)) + 2u;
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

// Splits from kFrom to kTo of a row, added first to last.
template <int kFrom, int kTo>
__device__ __forceinline__ void add_splits(float (&sum)[kPerLane], const float* row_of_first, long long stride,
                                           int first) {
  load_slots(sum, row_of_first + kFrom * stride, first);
#pragma unroll
  for (int split = kFrom + 1; split < kTo; split++) {
    float part[kPerLane];
    load_slots(part, row_of_first + split * stride, first);
#pragma unroll
    for (int i = 0; i < kPerLane; i++) sum[i] = __fadd_rn(sum[i], part[i]);
  }
}

// partial_logits [NUM_SPLITS, num_tokens, NUM_EXPERTS] fp32; logits_out [num_tokens, NUM_EXPERTS] fp32, to receive
// their sums, those of padding rows too, if STORE_LOGITS; correction_bias [NUM_EXPERTS] fp32 or null; out_weights and
// out_ids [num_tokens, TOP_K]. blockDim.x is a multiple of 32. No pointer is __restrict__: a dependent launch starts
// while the kernel before it still writes the logits, so no load of theirs may move above the wait.
extern "C" __global__ void __launch_bounds__(256)
activation_topk(const float* partial_logits, float* logits_out, const float* correction_bias, const bool* token_mask,
                const int* num_valid_tokens, long long num_valid_tokens_on_host, long long num_tokens,
                double routed_scaling_factor, long long padding_id, long long weights_are_constant, float* out_weights,
                IDS_T* out_ids) {
  const int lane = threadIdx.x % kLanes;
  const long long row = (long long)blockIdx.x * (blockDim.x / kLanes) + threadIdx.x / kLanes;
  const int first = lane * kPerLane;

  float bias[kPerLane] = {};
  if (!weights_are_constant) wait_for_previous_kernel();
  if (correction_bias) load_slots(bias, correction_bias, first);
  if (weights_are_constant) wait_for_previous_kernel();
  launch_dependents_early();
  if (row >= num_tokens) return;

  const ValidRows valid{token_mask, num_valid_tokens, num_valid_tokens_on_host};
  const bool is_token = valid.contains(row);
  if (!is_token && lane < TOP_K) {
    out_weights[row * TOP_K + lane] = 0.f;
    out_ids[row * TOP_K + lane] = (IDS_T)padding_id;
  }
  if (!is_token && !STORE_LOGITS) return;

  float score[kPerLane];
  const float* row_of_first = partial_logits + row * NUM_EXPERTS;
  const long long stride = num_tokens * NUM_EXPERTS;
  add_splits<0, FIRST_HALF>(score, row_of_first, stride, first);
  if constexpr (FIRST_HALF < NUM_SPLITS) {
    float rest[kPerLane];
    add_splits<FIRST_HALF, NUM_SPLITS>(rest, row_of_first, stride, first);
#pragma unroll
    for (int i = 0; i < kPerLane; i++) score[i] = __fadd_rn(score[i], rest[i]);
  }
  if constexpr (STORE_LOGITS) {
    store_slots(logits_out + row * NUM_EXPERTS, score, first);
    if (!is_token) return;
  }

  unsigned key[kPerLane], sorted[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; i++) {
    score[i] = sqrt_softplus(score[i]);
    key[i] = first + i < NUM_EXPERTS ? selection_key(__fadd_rn(score[i], bias[i])) : kAbsentKey;
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
  my_score = weighable(my_score);
  float sum = 0.f;
#pragma unroll
  for (int r = 0; r < TOP_K; r++) sum = __fadd_rn(sum, __shfl_sync(kFullWarp, my_score, r));
  if (lane < TOP_K) {
    const float share = __fdiv_rn(my_score, __fadd_rn(sum, kWeightFloor));
    out_weights[row * TOP_K + lane] = __fmul_rn(share, (float)routed_scaling_factor);
    out_ids[row * TOP_K + lane] = (IDS_T)(my_source * kPerLane + my_slot);
  }
}
