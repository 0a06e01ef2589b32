# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The decode kernel's product of many rows by warpgroups, whose sums stay in registers until they are packets."""

from typing import Any

import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint64, const_expr, range_constexpr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from dsv4_router import decode_config
from dsv4_router.decode_config import CHUNK, LANES, MMA_K, MMA_N, QUARTERS, SWIZZLE_ROWS, WARPGROUP_ROWS, DecodeConfig
from dsv4_router.kernels import decode_ptx


def warpgroup_mma(num_experts: int) -> cute.MmaAtom:
    """``wgmma`` of 64 rows and that many experts, of which shared memory holds both."""
    sources = warpgroup.OperandSource.SMEM, OperandMajorMode.K, OperandMajorMode.K
    return cute.make_mma_atom(warpgroup.MmaF16BF16Op(BFloat16, Float32, (WARPGROUP_ROWS, num_experts, MMA_K), *sources))


class WarpgroupProduct:
    """A block's sums by ``wgmma``; its waits are part of the decode kernel's contract.

    A warpgroup has 64 rows and all of the block's experts; of a tile of 32 rows the upper 32 are what the memory held.
    Its accumulators are the sums of the four quarters, so each chain of products is the one that a warp has where warps
    multiply, and so are the bits.
    """

    config: DecodeConfig

    def first_row(self, warp_idx: Int32) -> Any:
        """Of a warp's warpgroup. Of 96 rows two warpgroups have the middle ones both."""
        if self.config.token_tile <= WARPGROUP_ROWS:
            return 0
        return warp_idx // decode_config.WARPGROUP_WARPS * (self.config.token_tile - WARPGROUP_ROWS)

    def first_packet(self, warp_idx: Int32, lane: Int32) -> tuple[Int32, Int32]:
        """The first row that a lane stores, and which of the block's pairs of experts; see :meth:`store_sums`."""
        row = self.first_row(warp_idx) + warp_idx % decode_config.WARPGROUP_WARPS * 16
        if self.config.exchanges_sums:
            return row + lane % 16 // 4, lane // 16 * (MMA_N // 2) + lane % 4
        return row + lane // 4, lane % 4

    @cute.jit
    def multiply_by_warpgroups(self, sX, sW, hidden_full, gate_full, warp_idx):
        """All rows times the block's experts: the sums of each quarter, (MMA, 1, 1), if the warp has any."""
        config = self.config
        tiled_mma = cute.make_tiled_mma(warpgroup_mma(config.expert_tile))
        shape = tiled_mma.partition_shape_C((WARPGROUP_ROWS, config.expert_tile))
        quarters = [cute.make_rmem_tensor(shape, Float32) for _ in range(QUARTERS)]
        if warp_idx < config.warpgroup_warps:
            # One for all warpgroups: each has its own rows by where they begin.
            thr_mma = tiled_mma.get_slice(0)
            mine = self.rows_of(sX, self.first_row(warp_idx), WARPGROUP_ROWS)
            tCrX = tiled_mma.make_fragment_A(thr_mma.partition_A(mine))  # (MMA, 1, QUARTERS, chunks)
            tCrW = tiled_mma.make_fragment_B(thr_mma.partition_B(sW))  # likewise
            cute.arch.mbarrier_wait(gate_full, 0)
            warpgroup.fence()
            for chunk in range_constexpr(config.chunks_per_block):
                cute.arch.mbarrier_wait(hidden_full + chunk, 0)
                tiled_mma.set(warpgroup.Field.ACCUMULATE, chunk > 0)
                for k, q in enumerate(quarters):
                    cute.gemm(tiled_mma, q, tCrX[None, None, k, chunk], tCrW[None, None, k, chunk], q)
                warpgroup.commit_group()
            warpgroup.wait_group(0)
        return quarters

    def rows_of(self, sX: cute.Tensor, first_row: Any, rows: int) -> cute.Tensor:
        """(rows, CHUNK, chunks) of the block's; where they begin the swizzle's pattern does too."""
        config = self.config
        pattern = SWIZZLE_ROWS * CHUNK
        layout = cute.make_layout(
            ((SWIZZLE_ROWS, rows // SWIZZLE_ROWS), CHUNK, config.chunks_per_block),
            stride=((CHUNK, pattern), 1, config.hidden_rows * CHUNK),
        )
        start = sX.iterator
        if not isinstance(first_row, int):
            start += cute.assume(first_row * CHUNK, divby=pattern)
        return cute.make_tensor(start, layout)

    @cute.jit
    def store_sums(self, quarters, packet: Int64, num_tokens: Int32, tag: Uint64, tidx, warp_idx):
        """Adds the quarters, and stores the sums as packets of this launch, a thread's first one at ``packet``.

        Lane l of a warp holds rows l / 4 and l / 4 + 8 of 16, columns 2 (l % 4) and one more of every 8.
        """
        config = self.config
        lane = tidx % LANES
        first_row, _ = self.first_packet(warp_idx, lane)
        for half in range_constexpr(2):
            tiles = range(config.expert_tile // MMA_N)
            packets = [[self._sum(quarters, (v, half, n)) for v in range(2)] for n in tiles]
            # What the lane stores, by how many rows behind its first one.
            rows = self.exchange(packets, lane) if const_expr(config.exchanges_sums) else {0: packets}
            for row in rows:
                behind = row + 8 * half
                if self._stores(first_row + behind, num_tokens, warp_idx):
                    step = config.expert_tile // 2 // len(rows[row])  # pairs of experts
                    for i in range_constexpr(len(rows[row])):
                        place = behind * config.packets_per_row + i * step
                        decode_ptx.store_packet(packet + place * decode_config.PACKET_BYTES, *rows[row][i], tag)

    def exchange(self, packets: Any, lane: Int32) -> dict[int, Any]:
        """A lane's packets after the halves of the warp have exchanged some, by how many rows behind its first one.

        Four lanes hold 64 neighbouring bytes of a row. With eight it is 128, which L2 looks up once: of two
        neighbouring 8 columns the lower half stores the first, the upper one the second, of the lower one's 4 rows and
        then of its own, which are 4 behind.
        """
        is_lower = lane < LANES // 2
        of_lower, of_upper = [], []
        for low, high in zip(packets[::2], packets[1::2], strict=True):
            asked = [decode_ptx.select(is_lower, high[v], low[v]) for v in range(2)]
            given = [cute.arch.shuffle_sync_bfly(value, LANES // 2) for value in asked]
            of_lower.append([decode_ptx.select(is_lower, low[v], given[v]) for v in range(2)])
            of_upper.append([decode_ptx.select(is_lower, given[v], high[v]) for v in range(2)])
        return {0: of_lower, 4: of_upper}

    def _sum(self, quarters: Any, place: Any) -> Float32:
        q = [quarter[place, 0, 0] for quarter in quarters]
        return (q[0] + q[1]) + (q[2] + q[3])

    def _stores(self, row: Int32, num_tokens: Int32, warp_idx: Int32) -> Boolean:
        """Whether the warp has sums of the row, and no earlier warpgroup has them."""
        config = self.config
        stores = (row < num_tokens) & (warp_idx < config.warpgroup_warps)
        if const_expr(WARPGROUP_ROWS < config.token_tile < 2 * WARPGROUP_ROWS):
            is_first = warp_idx < decode_config.WARPGROUP_WARPS
            stores = stores & (is_first | (row >= WARPGROUP_ROWS))
        return stores
