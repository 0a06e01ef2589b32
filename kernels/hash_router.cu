// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: The dsv4-router authors
//
// Hash routing: a token's experts are its row of a frozen table. Three kernels, one launch each:
//   hash_gather        ids and the uniform weight
//   hash_from_logits   ids, and weights from ready logits
//   hash_from_hidden   ids, and weights from hidden states, by the TOP_K dot products of the token's own experts
// A token whose id lies outside the table is a padding row, and so is, in the scored kernels, one whose row of the
// table names an expert that does not exist: memory outside the table, the logits and the gate is never read.
//
// Compile-time parameters (macros):
//   TOP_K            experts per token, 1 to 16
//   TOKEN_T, TABLE_T, IDS_T   int or long long: token ids, table, ids out
// and for hash_from_hidden:
//   HIDDEN_SIZE      elements of a row
//   OPERAND_BYTES    2 for bf16, 4 for fp32
//   VECTOR_LOADS     1 if every row starts at a multiple of 16 bytes
//   NUM_WARPS        warps of a block, which share a token
#include "router_math.cuh"

static_assert(TOP_K >= 1 && TOP_K <= 16, "top_k out of range");

__host__ __device__ constexpr int next_power_of_2(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}
constexpr int kSlots = next_power_of_2(TOP_K);  // lanes that share a token

// The row of the table, or null for a padding row.
__device__ __forceinline__ const TABLE_T* table_row(const TOKEN_T* token_ids, const TABLE_T* hash_lut,
                                                    long long vocab_size, const ValidRows& valid, long long token) {
  if (!valid.contains(token)) return nullptr;
  const long long id = token_ids[token];
  return id >= 0 && id < vocab_size ? hash_lut + id * TOP_K : nullptr;
}

// The weight of slot `lane % kSlots`, whose score is given, among the TOP_K slots of its group of kSlots lanes.
__device__ __forceinline__ float slot_weight(float score, double routed_scaling_factor) {
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < TOP_K; j++) sum = __fadd_rn(sum, __shfl_sync(kFullWarp, score, j, kSlots));
  return __fmul_rn(__fdiv_rn(score, __fadd_rn(sum, kWeightFloor)), (float)routed_scaling_factor);
}

// One thread a (token, slot). token_ids [num_tokens], hash_lut [vocab_size, TOP_K], out_weights and out_ids
// [num_tokens, TOP_K].
extern "C" __global__ void __launch_bounds__(256)
hash_gather(const TOKEN_T* token_ids, const TABLE_T* hash_lut, long long vocab_size, const bool* token_mask,
            const int* num_valid_tokens, long long num_valid_tokens_on_host, long long num_tokens,
            double routed_scaling_factor, long long padding_id, float* out_weights, IDS_T* out_ids) {
  wait_for_previous_kernel();
  launch_dependents_early();
  const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= num_tokens * TOP_K) return;
  const ValidRows valid{token_mask, num_valid_tokens, num_valid_tokens_on_host};
  const TABLE_T* row = table_row(token_ids, hash_lut, vocab_size, valid, i / TOP_K);
  out_weights[i] = row ? __fmul_rn(1.f / TOP_K, (float)routed_scaling_factor) : 0.f;
  out_ids[i] = row ? (IDS_T)row[i % TOP_K] : (IDS_T)padding_id;
}

// kSlots lanes a token. router_logits [num_tokens, num_experts] fp32.
extern "C" __global__ void __launch_bounds__(256)
hash_from_logits(const TOKEN_T* token_ids, const TABLE_T* hash_lut, long long vocab_size, const float* router_logits,
                 long long num_experts, const bool* token_mask, const int* num_valid_tokens,
                 long long num_valid_tokens_on_host, long long num_tokens, double routed_scaling_factor,
                 long long padding_id, float* out_weights, IDS_T* out_ids) {
  wait_for_previous_kernel();
  launch_dependents_early();
  const int lane = threadIdx.x % kLanes, slot = lane % kSlots;
  const long long token = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / kSlots;
  const ValidRows valid{token_mask, num_valid_tokens, num_valid_tokens_on_host};
  const TABLE_T* row = token < num_tokens ? table_row(token_ids, hash_lut, vocab_size, valid, token) : nullptr;
  long long expert = 0;
  if (row && slot < TOP_K) expert = row[slot];
  const bool exists = row && expert >= 0 && expert < num_experts;
  const unsigned group = ((1u << kSlots) - 1) << (lane - slot);
  const bool routed = (__ballot_sync(kFullWarp, exists) & group) == group;
  float score = 0.f;
  if (routed && slot < TOP_K) score = weighable(sqrt_softplus(router_logits[token * num_experts + expert]));
  const float weight = slot_weight(score, routed_scaling_factor);
  if (token < num_tokens && slot < TOP_K) {
    out_weights[token * TOP_K + slot] = routed ? weight : 0.f;
    out_ids[token * TOP_K + slot] = routed ? (IDS_T)expert : (IDS_T)padding_id;
  }
}

#ifdef HIDDEN_SIZE
// Elements that a thread takes at once: 16 bytes where rows divide by that, however they are aligned, so that the order
// of all additions depends on the shape alone.
constexpr int kChunk = HIDDEN_SIZE % (16 / OPERAND_BYTES) == 0 ? 16 / OPERAND_BYTES : 1;
constexpr int kWords = kChunk == 1 ? 1 : 4;
constexpr int kChunks = HIDDEN_SIZE / kChunk;
constexpr int kThreads = NUM_WARPS * kLanes;
static_assert(kThreads <= 1024 && (kChunk > 1 || !VECTOR_LOADS), "bad partition");

// kChunk consecutive elements as 32-bit words; a lone bf16 sits in the low half of its word.
struct Chunk {
  unsigned word[kWords];
};

__device__ __forceinline__ Chunk load_chunk(const char* row, int chunk) {
  Chunk c;
  row += (long long)chunk * (kChunk * OPERAND_BYTES);
#if VECTOR_LOADS
  const uint4 v = *reinterpret_cast<const uint4*>(row);
  c.word[0] = v.x, c.word[1] = v.y, c.word[2] = v.z, c.word[3] = v.w;
#else
#pragma unroll
  for (int i = 0; i < kWords; i++) {
#if OPERAND_BYTES == 4
    c.word[i] = reinterpret_cast<const unsigned*>(row)[i];
#else
    const unsigned short* pair = reinterpret_cast<const unsigned short*>(row) + 2 * i;
    c.word[i] = kChunk == 1 ? pair[0] : pair[0] | (unsigned)pair[1] << 16;
#endif
  }
#endif
  return c;
}

// sum + a . b, elements in order; a bf16 is the upper half of an fp32.
__device__ __forceinline__ float dot(const Chunk& a, const Chunk& b, float sum) {
#pragma unroll
  for (int i = 0; i < kWords; i++) {
#if OPERAND_BYTES == 2
    sum = __fmaf_rn(__uint_as_float(a.word[i] << 16), __uint_as_float(b.word[i] << 16), sum);
    sum = __fmaf_rn(__uint_as_float(a.word[i] & 0xffff0000u), __uint_as_float(b.word[i] & 0xffff0000u), sum);
#else
    sum = __fmaf_rn(__uint_as_float(a.word[i]), __uint_as_float(b.word[i]), sum);
#endif
  }
  return sum;
}

// Adds up kSlots values over the warp, with kSlots - 1 + log2(32 / kSlots) shuffles instead of 5 * kSlots: each step
// swaps half of the remaining slots with another lane. Lane l ends with slot l / (32 / kSlots).
template <int kHalf>
__device__ __forceinline__ float reduce_slots(float (&sum)[kSlots], int lane) {
  if constexpr (kHalf == 0) {  // one slot is left, held by kLanes / kSlots lanes
#pragma unroll
    for (int offset = kLanes / kSlots / 2; offset >= 1; offset /= 2)
      sum[0] = __fadd_rn(sum[0], __shfl_xor_sync(kFullWarp, sum[0], offset));
    return sum[0];
  } else {
    constexpr int kOffset = kHalf * (kLanes / kSlots);
    const bool upper = lane & kOffset;
#pragma unroll
    for (int i = 0; i < kHalf; i++) {
      const float give = upper ? sum[i] : sum[i + kHalf], keep = upper ? sum[i + kHalf] : sum[i];
      sum[i] = __fadd_rn(keep, __shfl_xor_sync(kFullWarp, give, kOffset));
    }
    return reduce_slots<kHalf / 2>(sum, lane);
  }
}

// A token id as it is in memory now: never from a cache that an earlier read of ours may have filled.
__device__ __forceinline__ long long token_id_now(const long long* address) {
  long long id;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(id) : "l"(address) : "memory");
  return id;
}
__device__ __forceinline__ long long token_id_now(const int* address) {
  int id;
  asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(id) : "l"(address) : "memory");
  return id;
}

// What a token id leads to: lane j holds its j-th expert, and every thread its first chunk of each expert's gate row.
struct GateRows {
  long long expert;
  Chunk first[TOP_K];

  // False, and nothing read but the table, if the id or one of its experts does not exist.
  __device__ __forceinline__ bool load(long long id, const TABLE_T* hash_lut, long long vocab_size,
                                       const char* gate_weight, long long gate_stride, long long num_experts) {
    if (id < 0 || id >= vocab_size) return false;
    const int lane = threadIdx.x % kLanes;
    expert = lane < TOP_K ? (long long)hash_lut[id * TOP_K + lane] : 0;
    if (!__all_sync(kFullWarp, expert >= 0 && expert < num_experts)) return false;
#pragma unroll
    for (int j = 0; j < TOP_K; j++) {
      const char* row = gate_weight + __shfl_sync(kFullWarp, expert, j) * gate_stride;
      if ((int)threadIdx.x < kChunks) first[j] = load_chunk(row, threadIdx.x);
    }
    return true;
  }
};

// One block a token. hidden_states [num_tokens, HIDDEN_SIZE] and gate_weight [num_experts, HIDDEN_SIZE], rows
// hidden_stride and gate_stride bytes apart. Every thread takes the same chunks of the hidden state and of the TOP_K
// gate rows; the order of all additions depends on nothing but HIDDEN_SIZE, TOP_K and the type (NUM_WARPS follows from
// them), so the bits of a token are the same in any call.
//
// Where the weights are constant, the gate rows are fetched before the wait on the previous kernel, on a guess: the
// token id that memory holds at that moment. An earlier kernel may still be writing it, so it decides nothing. The id
// that counts is read after the wait, and unless it is the guessed one the rows are fetched again.
extern "C" __global__ void __launch_bounds__(kThreads)
hash_from_hidden(const TOKEN_T* token_ids, const TABLE_T* hash_lut, long long vocab_size, const char* hidden_states,
                 long long hidden_stride, const char* gate_weight, long long gate_stride, long long num_experts,
                 const bool* token_mask, const int* num_valid_tokens, long long num_valid_tokens_on_host,
                 double routed_scaling_factor, long long padding_id, long long weights_are_constant,
                 float* out_weights, IDS_T* out_ids) {
  __shared__ float partial[NUM_WARPS][kSlots];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const long long token = blockIdx.x;

  GateRows rows{};
  long long guess = -1;
  bool routed = false;
  if (weights_are_constant) {
    guess = token_id_now(token_ids + token);
    guess = __shfl_sync(kFullWarp, guess, 0);  // lanes may have read while the id changed
    routed = rows.load(guess, hash_lut, vocab_size, gate_weight, gate_stride, num_experts);
  }
  wait_for_previous_kernel();
  launch_dependents_early();

  const char* hidden = hidden_states + token * hidden_stride;
  Chunk x{};
  if ((int)threadIdx.x < kChunks) x = load_chunk(hidden, threadIdx.x);
  const long long id = token_id_now(token_ids + token);
  if (id != guess) routed = rows.load(id, hash_lut, vocab_size, gate_weight, gate_stride, num_experts);
  const ValidRows valid{token_mask, num_valid_tokens, num_valid_tokens_on_host};
  if (!routed || !valid.contains(token)) {  // the same for every thread of the block
    if (threadIdx.x < TOP_K) {
      out_weights[token * TOP_K + threadIdx.x] = 0.f;
      out_ids[token * TOP_K + threadIdx.x] = (IDS_T)padding_id;
    }
    return;
  }

  float sum[kSlots] = {};
#pragma unroll
  for (int j = 0; j < TOP_K; j++) sum[j] = dot(x, rows.first[j], 0.f);
  if constexpr (kChunks > kThreads) {
    const char* gate[TOP_K];
#pragma unroll
    for (int j = 0; j < TOP_K; j++) gate[j] = gate_weight + __shfl_sync(kFullWarp, rows.expert, j) * gate_stride;
    for (int chunk = threadIdx.x + kThreads; chunk < kChunks; chunk += kThreads) {
      x = load_chunk(hidden, chunk);
#pragma unroll
      for (int j = 0; j < TOP_K; j++) sum[j] = dot(x, load_chunk(gate[j], chunk), sum[j]);
    }
  }
  constexpr int kShare = kLanes / kSlots;  // lanes that hold the same slot after the reduction
  const float warp_sum = reduce_slots<kSlots / 2>(sum, lane);
  if (lane % kShare == 0) partial[warp][lane / kShare] = warp_sum;
  __syncthreads();
  if (warp != 0) return;

  // Lane l adds slot l % kSlots of every kShare-th warp, then the kShare lanes of a slot add up.
  const int slot = lane % kSlots;
  float logit = 0.f;
#pragma unroll
  for (int w = 0; w < NUM_WARPS; w += kShare)
    if (w + lane / kSlots < NUM_WARPS) logit = __fadd_rn(logit, partial[w + lane / kSlots][slot]);
#pragma unroll
  for (int o = kSlots; o < kLanes; o *= 2) logit = __fadd_rn(logit, __shfl_xor_sync(kFullWarp, logit, o));
  const float score = slot < TOP_K ? weighable(sqrt_softplus(logit)) : 0.f;
  const float weight = slot_weight(score, routed_scaling_factor);
  if (lane < TOP_K) {
    out_weights[token * TOP_K + lane] = weight;
    out_ids[token * TOP_K + lane] = (IDS_T)rows.expert;
  }
}
#endif
