# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The decode kernel with time stamps, for phases.py."""

import cutlass
import cutlass.cute as cute
from cutlass import Int64, Uint32, const_expr

from dsv4_router.decode_config import LANES
from dsv4_router.kernels import decode_ptx
from dsv4_router.kernels.dense_router_decode import DenseRouterDecodeKernel
from dsv4_router.kernels.row_selection import gmem

WAITED, LOADED, SUMMED, COLLECTED, STORED, FIRST_NS, LAST_NS = range(7)
WORDS = 8  # of a warp, one for each of these: the first five by its multiprocessor's clock, the others by %globaltimer


class StampedDecodeKernel(DenseRouterDecodeKernel):
    """Has the block of row 0 store when its warps come to the end of each phase: 32-bit words behind ``logits_out``.

    A warp's stamps are those of its lane 0. When the hidden states have come, with many rows their first chunk, is what
    warps that multiply see; where warpgroups do, the first other warp. Beyond 64 rows that is the producer, which has
    taken the ticket before.
    """

    @cute.jit
    def stamp(self, call, which: cutlass.Constexpr):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        if self.first_row_of(bidx, call.num_tokens) == 0 and tidx % LANES == 0:
            place = Int64(call.num_tokens) * self.config.num_experts + tidx // LANES * WORDS
            cute.arch.store(gmem(Uint32, call.logits_out, place + which), decode_ptx.clock())
            if const_expr(which in (WAITED, STORED)):
                nanoseconds = FIRST_NS if which == WAITED else LAST_NS
                now = Uint32(cute.arch.globaltimer_lo())
                cute.arch.store(gmem(Uint32, call.logits_out, place + nanoseconds), now)

    @cute.jit
    def take_ticket(self, call, sTag, tidx):
        self.call = call  # for methods that are not given it
        self.stamp(call, WAITED)
        DenseRouterDecodeKernel.take_ticket(self, call, sTag, tidx)

    def load_hidden_fragment(self, tiled_mma, sX, place, tCrX, m, step, by_rows, lane):
        if m == step == 0:
            self.stamp(self.call, LOADED)
        DenseRouterDecodeKernel.load_hidden_fragment(self, tiled_mma, sX, place, tCrX, m, step, by_rows, lane)

    @cute.jit
    def multiply_by_warpgroups(self, sX, sW, hidden_full, gate_full, warp_idx):
        if warp_idx == self.config.warpgroup_warps:
            cute.arch.mbarrier_wait(hidden_full, 0)
            self.stamp(self.call, LOADED)
        return DenseRouterDecodeKernel.multiply_by_warpgroups(self, sX, sW, hidden_full, gate_full, warp_idx)

    @cute.jit
    def epilogue(self, sPartial, call, places, tile, part, tag, tidx):
        self.stamp(call, SUMMED)
        DenseRouterDecodeKernel.epilogue(self, sPartial, call, places, tile, part, tag, tidx)

    @cute.jit
    def store_sums(self, quarters, packet, num_tokens, tag, tidx, warp_idx):
        self.stamp(self.call, SUMMED)
        DenseRouterDecodeKernel.store_sums(self, quarters, packet, num_tokens, tag, tidx, warp_idx)

    @cute.jit
    def collect(self, call, row, tag, tidx):
        collected = DenseRouterDecodeKernel.collect(self, call, row, tag, tidx)
        self.stamp(call, COLLECTED)
        return collected

    @cute.jit
    def choose(self, call, selection, row, is_token, lane):
        DenseRouterDecodeKernel.choose(self, call, selection, row, is_token, lane)
        self.stamp(call, STORED)
