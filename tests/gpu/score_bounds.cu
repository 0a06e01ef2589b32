// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The dsv4-router authors
//
// Checks the bounds of a selection for every float as a logit: how many break them, and how many are useless.
#include "router_math.cuh"

extern "C" __global__ void score_bounds(float bias, unsigned long long* wrong, unsigned long long* loose) {
  const unsigned long long first = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x;
  unsigned long long my_wrong = 0, my_loose = 0;
  for (unsigned long long bits = first; bits < 1ull << 32; bits += gridDim.x * (unsigned long long)blockDim.x) {
    const float x = __uint_as_float((unsigned)bits);
    const float selection = __fadd_rn(sqrt_softplus(x), bias);
    const Bounds bounds = selection_bounds(x, bias);
    const bool is_nan = selection != selection;
    const float least = x < -87.f ? __fsub_rn(selection, kLeastScore) : selection;
    const bool holds = bounds.low <= selection && least <= bounds.high;
    const bool all_nan = is_nan && bounds.low != bounds.low && bounds.high != bounds.high;
    my_wrong += is_nan ? !all_nan : !holds;
    my_loose += bounds.high - bounds.low > 4e-3f * fabsf(selection - bias) + 1e-6f * fabsf(bias);
  }
  atomicAdd(wrong, my_wrong);
  atomicAdd(loose, my_loose);
}
