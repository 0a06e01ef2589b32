# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Steps 2 to 6 of one row, as the last role of the decode kernel's warps."""

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint8, Uint32, Uint64, const_expr, range_constexpr

from dsv4_router import decode_config
from dsv4_router.decode_config import LANES, DecodeConfig
from dsv4_router.kernels import decode_ptx


def gmem(dtype: Any, address: Int64, offset: Any = 0) -> cute.Pointer:
    return cute.make_ptr(
        dtype, address + Int64(offset) * (dtype.width // 8), cute.AddressSpace.gmem, assumed_align=dtype.width // 8
    )


def wide(pointer: cute.Pointer, num_elements: int) -> cute.Tensor:
    """Neighbouring elements of shared memory, aligned as one access to up to 16 bytes needs; nothing rounds here."""
    align = min(16, num_elements * pointer.dtype.width // 8)
    promised = cute.make_ptr(pointer.dtype, pointer.toint(), cute.AddressSpace.smem, assumed_align=align)
    return cute.make_tensor(promised, cute.make_layout(num_elements))


class Call(NamedTuple):
    """What a launch works on beside the gate weight: addresses (0 where absent) and numbers."""

    hidden_states: Int64
    hidden_stride: Int64
    workspace: Int64
    out_weights: Int64
    out_ids: Int64
    ids_are_int64: Int32
    logits_out: Int64
    token_mask: Int64
    num_valid_tokens: Int64
    num_valid_tokens_on_host: Int32
    first_row: Int32
    num_tokens: Int32
    padding_id: Int64
    routed_scaling_factor: Float32
    max_looks: Int32


class Selection(NamedTuple):
    """Shared memory of a row's selection."""

    sHalf: cute.Tensor  # (2, threads) fp32, sums of the lower and of the upper slices
    sScore: cute.Tensor  # (threads,) fp32
    sCandidate: cute.Tensor  # (threads,) uint64: key, then the complement of the id
    sGroupBest: cute.Tensor  # (LANES,) uint32, the best key of each group of experts
    sBest: cute.Tensor  # (MAX_TOP_K,) fp32, the chosen experts' scores
    sNumCandidates: cute.Tensor  # (1,) int32


class RowSelection:
    """Scores, candidates and the choice of a row; its barriers are part of the decode kernel's contract."""

    def __init__(self, config: DecodeConfig) -> None:
        self.config = config

    @cute.jit
    def clear(self, selection: Selection, tidx):
        """Makes the list of candidates empty."""
        if tidx < LANES:
            selection.sCandidate[tidx] = Uint64(0)
        if tidx == 0:
            selection.sNumCandidates[0] = Int32(0)

    @cute.jit
    def publish_score(self, selection: Selection, logit, bias, tidx) -> Uint32:
        """Selection key of expert ``tidx``; its score, and the best key of its group, into shared memory."""
        config = self.config
        score = decode_ptx.sqrt_softplus(logit)
        key = Uint32(0)  # below every expert's
        if tidx < config.num_experts:
            key = decode_ptx.selection_key(decode_ptx.add(score, bias))
        selection.sScore[tidx] = score
        best = key
        if const_expr(config.group_lanes == LANES):
            best = cute.arch.warp_redux_sync(key, "umax")
        else:
            for step in range_constexpr(config.group_lanes.bit_length() - 1):
                other = cute.arch.shuffle_sync_bfly(best, 1 << step)
                if other > best:
                    best = other
        if tidx % config.group_lanes == 0 and tidx < config.num_experts:
            selection.sGroupBest[tidx // config.group_lanes] = best
        return key

    @cute.jit
    def select(self, call: Call, selection: Selection, row, is_token, logit, key, tidx):
        """Steps 4 to 6 of a row whose scores and groups' best are in shared memory.

        At least k experts are as good as the k-th best of the groups' best ones, so only experts as good as that are
        candidates: seldom more than a dozen. One warp ranks them.
        """
        config = self.config
        if self.groups_with_better(selection, key) < config.top_k and tidx < config.num_experts:
            place = decode_ptx.next_place(selection.sNumCandidates.iterator)
            # The complement of the id makes the lower id the larger of equal keys.
            selection.sCandidate[place] = (Uint64(key) << 32) | Uint64(Uint32(-1 - tidx))
        cute.arch.sync_threads()
        if tidx < LANES:
            self.choose(call, selection, row, is_token, tidx)
        if call.logits_out != 0 and tidx < config.num_experts:
            cute.arch.store(gmem(Float32, call.logits_out, Int64(row) * config.num_experts + tidx), logit)
        if row + config.num_blocks < call.num_tokens:
            cute.arch.sync_threads()  # before the next row's sums

    @cute.jit
    def groups_with_better(self, selection: Selection, key) -> Int32:
        """How many groups have an expert with a larger key."""
        bests = cute.make_rmem_tensor(LANES, Uint32)
        cute.autovec_copy(wide(selection.sGroupBest.iterator, LANES), bests)
        better = [Int32(0), Int32(0)]
        for group in range_constexpr(self.config.num_groups):
            better[group % 2] -= decode_ptx.minus_one_if_less(key, bests[group])
        return better[0] + better[1]

    @cute.jit
    def choose(self, call: Call, selection: Selection, row, is_token, lane):
        """Ranks the candidates, and stores ids and weights of the k largest; by one warp.

        Few candidates, as a rule, are stored from here, so that this way runs through no code but its own.
        """
        num_candidates = selection.sNumCandidates[0]
        # Two lanes for a candidate, each of which compares it with half of the others.
        mine = selection.sCandidate[lane // 2]
        expert, score = self.expert_of(selection, mine)  # asked for before the ranks are known
        rank = self.rank_among(selection, mine, LANES // 4 * (lane % 2), LANES // 4)
        rank += cute.arch.shuffle_sync_bfly(rank, 1)
        if num_candidates <= LANES // 2:
            if lane % 2 == 1:
                rank = Int32(LANES)
            self.store_choice(call, selection, row, is_token, expert, score, rank)
        else:
            mine = selection.sCandidate[lane]
            if num_candidates <= LANES:
                rank = self.rank_among(selection, mine, 0, LANES)
            else:  # many equal ones, or the best ones all in few groups
                mine, rank = self.rank_many(selection, num_candidates, lane)
            expert, score = self.expert_of(selection, mine)
            self.store_choice(call, selection, row, is_token, expert, score, rank)

    @cute.jit
    def expert_of(self, selection: Selection, candidate) -> tuple[Int32, Float32]:
        """A candidate's id, and its score's share in the weights; of no candidate an id of no use, and 0."""
        expert = -1 - Int32(Uint32(candidate & Uint64(0xFFFFFFFF)))
        score = Float32(0.0)
        if candidate != 0:
            score = decode_ptx.weighable(selection.sScore[expert])
        return expert, score

    @cute.jit
    def store_choice(self, call: Call, selection: Selection, row, is_token, expert, score, rank):
        """Stores id and weight of each lane whose candidate is one of the k largest."""
        config = self.config
        if rank < config.top_k:
            selection.sBest[rank] = score
        cute.arch.sync_warp()
        if rank < config.top_k:
            scores = cute.make_rmem_tensor(decode_config.MAX_TOP_K, Float32)
            cute.autovec_copy(wide(selection.sBest.iterator, decode_config.MAX_TOP_K), scores)
            place = Int64(row) * config.top_k + rank
            chosen = Int64(expert)
            if not is_token:
                chosen = call.padding_id
            if call.ids_are_int64 != 0:
                cute.arch.store(gmem(Int64, call.out_ids, place), chosen)
            else:
                cute.arch.store(gmem(Int32, call.out_ids, place), Int32(chosen))
            total = scores[0]
            for i in range_constexpr(1, config.top_k):
                total = total + scores[i]
            weight = decode_ptx.weight(score, total, call.routed_scaling_factor)
            if not is_token:
                weight = Float32(0.0)
            cute.arch.store(gmem(Float32, call.out_weights, place), weight)

    @cute.jit
    def rank_among(self, selection: Selection, mine, first, count: cutlass.Constexpr) -> Int32:
        """How many of so many candidates, from one on, are larger."""
        others = cute.make_rmem_tensor(count, Uint64)
        cute.autovec_copy(wide(selection.sCandidate.iterator + first, count), others)
        larger = [Int32(0), Int32(0)]
        for i in range_constexpr(count):
            larger[i % 2] -= decode_ptx.minus_one_if_less(mine, others[i])
        return larger[0] + larger[1]

    @cute.jit
    def rank_many(self, selection: Selection, num_candidates, lane):
        """The k largest of any number of candidates, one after the other: lane r gets the one of rank r."""
        mine = Uint64(0)
        rank = Int32(LANES)
        last = ~Uint64(0)
        for r in cutlass.range(self.config.top_k, unroll=1):
            best = Uint64(0)
            for i in cutlass.range(lane, num_candidates, LANES, unroll=1):
                other = selection.sCandidate[i]
                if other < last and other > best:
                    best = other
            high = Uint32(best >> 32)
            best_high = cute.arch.warp_redux_sync(high, "umax")
            low = Uint32(0)
            if high == best_high:
                low = Uint32(best & Uint64(0xFFFFFFFF))
            last = (Uint64(best_high) << 32) | Uint64(cute.arch.warp_redux_sync(low, "umax"))
            if lane == r:
                mine = last
                rank = r
        return mine, rank

    @cute.jit
    def is_token(self, call: Call, row) -> Boolean:
        limit = call.num_valid_tokens_on_host
        if call.num_valid_tokens != 0:
            limit = cute.arch.load(gmem(Int32, call.num_valid_tokens), Int32)
        valid = call.first_row + row < limit
        if valid and call.token_mask != 0:
            valid = cute.arch.load(gmem(Uint8, call.token_mask, row), Uint8) != 0
        return valid
