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
constexpr unsigned kAbsentKey = 0, kNanKey = 1;

__device__ __forceinline__ unsigned selection_key(float selection) {
  const unsigned bits = __float_as_uint(selection);
  const unsigned key = bits ^ (unsigned)(((int)bits >> 31) | (int)0x80000000u);
  return selection == selection ? key : kNanKey;
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

  // Round r finds the r-th best of the row: the best head of all lanes' sorted lists, which its lane then drops.
  // Lane r remembers whose it was, and how many equal keys that lane had dropped just before.
  unsigned my_key = 0, last_key = 0;
  int my_source = 0, my_repeat = 0, last_source = -1, repeat = 0;
#pragma unroll
  for (int r = 0; r < TOP_K; r++) {
    const unsigned best = __reduce_max_sync(kFullWarp, sorted[0]);
    const int source = __ffs(__ballot_sync(kFullWarp, sorted[0] == best)) - 1;
    repeat = best == last_key && source == last_source ? repeat + 1 : 0;
    last_key = best, last_source = source;
    if (lane == r) my_key = best, my_source = source, my_repeat = repeat;
    if (lane == source) {
#pragma unroll
      for (int i = 0; i + r + 1 < TOP_K && i < kDepth; i++) sorted[i] = i + 1 < kPerLane ? sorted[i + 1] : kAbsentKey;
    }
  }

  // Lane r looks its key up among its source's slots, in the order of ids.
  int my_slot = 0;
  float my_score = 0.f;
#pragma unroll
  for (int i = 0; i < kPerLane; i++) {
    const unsigned their_key = __shfl_sync(kFullWarp, key[i], my_source);
    const float their_score = __shfl_sync(kFullWarp, score[i], my_source);
    const bool equal = their_key == my_key;
    if (equal && my_repeat == 0) my_slot = i, my_score = their_score;
    my_repeat -= equal;
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
