// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The dsv4-router authors
//
// What every router kernel shares: the score, its share in the weights, padding rows, dependent launch.
// Nothing here needs a CUDA header, so NVRTC compiles it on a machine without the toolkit.
#pragma once

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kLanes = 32;
// An infinite score counts as sqrt(FLT_MAX), the score of the largest finite logit, so that weights stay finite.
constexpr float kLargestScore = 1.8446743e19f;
constexpr float kWeightFloor = 1e-20f;

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Of x that is not denormal, for which it has the bits of sqrt.approx.f32 in a quarter of the instructions.
__device__ __forceinline__ float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// sqrt(softplus(x)) with softplus(x) = max(x, 0) + log1p(exp(-|x|)); NaN gives NaN, +inf gives +inf.
// With h = exp(-|x| / 2) and t = h * h, log1p(t) = t * P(t), hence
//   x >= 0: sqrt(x + t * P(t))        x < 0: sqrt(t * P(t)) = h * sqrt(P(t)),
// which never squares a small number: the result keeps its relative precision (3e-7) down to x = -174, where
// exp(x) itself has long left the range of fp32. P is the minimax polynomial of log1p(t) / t on [0, 1] in the
// relative error (3e-8). Every product is an explicit fma, so that no compiler option changes the bits.
__device__ __forceinline__ float sqrt_softplus(float x) {
  constexpr float kHalfLog2e = 0.72134752f, kHalfLog2eRest = 9.6298149e-09f, kLn2 = 0.69314718f;
  // At 400 h has long underflowed to 0. For an infinity `lost` would be NaN; a NaN passes through x itself.
  const float magnitude = fminf(fabsf(x), 400.f);
  const float exponent = __fmul_rn(magnitude, -kHalfLog2e);
  // What the rounding of `exponent` lost, in units of the exponent; h * 2^lost = h * (1 + lost * ln 2).
  float lost = __fmaf_rn(magnitude, -kHalfLog2e, -exponent);
  lost = __fmaf_rn(magnitude, -kHalfLog2eRest, lost);
  float h = exp2_approx(exponent);
  h = __fmaf_rn(h, __fmul_rn(lost, kLn2), h);
  const float t = __fmul_rn(h, h);
  float p = 0.0052326941f;
  p = __fmaf_rn(p, t, -0.029505238f);
  p = __fmaf_rn(p, t, 0.078225948f);
  p = __fmaf_rn(p, t, -0.13663246f);
  p = __fmaf_rn(p, t, 0.19106007f);
  p = __fmaf_rn(p, t, -0.24842982f);
  p = __fmaf_rn(p, t, 0.33319098f);
  p = __fmaf_rn(p, t, -0.49999493f);
  p = __fmaf_rn(p, t, 0.99999994f);
  const bool negative = x < 0.f;
  const float root = sqrt_approx(negative ? p : __fmaf_rn(t, p, x));  // of at least ln 2
  return negative ? __fmul_rn(h, root) : root;
}

// Bounds of a selection, which is sqrt_softplus(x) + bias: `low` <= selection <= `high`, or all three are NaN. Below
// x = -87, where t is flushed to 0, the selection may exceed `high`, by less than kLeastScore.
struct Bounds {
  float low, high;
};

constexpr float kLeastScore = 2e-19f;

// In half of the instructions of sqrt_softplus: sqrt(max(x, 0) + t Q(t)) with t = exp(-|x|), where Q is the minimax
// polynomial of log1p(t) / t on [0, 1] of degree 2 in the relative error (2.83e-3), of which the root keeps at most
// half; kRootError leaves room for what the instructions round, here and there. An fma rounds once, like the sum that it
// bounds, and rounding keeps the order.
__device__ __forceinline__ Bounds selection_bounds(float x, float bias) {
  constexpr float kLog2e = 1.44269504f, kRootError = 1.5e-3f;
  const float t = exp2_approx(__fmul_rn(fabsf(x), -kLog2e));
  float q = 0.14171118f;
  q = __fmaf_rn(q, t, -0.44377953f);
  q = __fmaf_rn(q, t, 0.99717422f);
  const float root = sqrt_approx(__fmaf_rn(t, q, fmaxf(x, 0.f)));
  return {__fmaf_rn(root, 1.f - kRootError, bias), __fmaf_rn(root, 1.f + kRootError, bias)};
}

// A score's share in the weights: NaN counts as 0, infinity as kLargestScore.
__device__ __forceinline__ float weighable(float score) { return score == score ? fminf(score, kLargestScore) : 0.f; }

// Programmatic dependent launch (sm_90 and later). Before wait_for_previous_kernel() nothing is written, and nothing is
// read that an earlier kernel of the stream may have written, with one exception, which decides no result: the guess of
// a token id in hash_from_hidden.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Up to this many blocks the next kernel may be scheduled as soon as ours has started: its launch is then hidden. In
// larger grids its blocks would take the place of ours, so it is left to our last block's exit. H100, 2026-11-22,
// activation_topk at E = 256, microseconds at the start / at the exit: 1.54 / 1.81 (1 block), 2.01 / 2.30 (256),
// 5.04 / 4.39 (1024).
constexpr unsigned kEarlyTriggerBlocks = 512;

// Lets the next kernel of the stream be scheduled; called after our own wait. It promises nothing about our stores: a
// kernel launched with the dependent attribute must itself wait, and that wait ends when this grid has completed and
// its stores are visible.
__device__ __forceinline__ void launch_dependents_early() {
#if __CUDA_ARCH__ >= 900
  if (gridDim.x <= kEarlyTriggerBlocks) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Which rows of the call are tokens; all others are padding rows. Null pointers mean "no such option".
struct ValidRows {
  const bool* token_mask;               // [num_tokens], true = a token
  const int* num_valid_tokens;          // one int32 on the device
  long long num_valid_tokens_on_host;   // used where the pointer is null

  __device__ __forceinline__ bool contains(long long row) const {
    const long long limit = num_valid_tokens ? (long long)*num_valid_tokens : num_valid_tokens_on_host;
    return row < limit && (!token_mask || token_mask[row]);
  }
};
