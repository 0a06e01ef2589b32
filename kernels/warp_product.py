# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The decode kernel's product of few rows by single warps, whose sums meet in shared memory."""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint32, const_expr, range_constexpr
from cutlass.cute.nvgpu import warp

from dsv4_router.decode_config import (
    BF16_BYTES,
    CHUNK,
    LANES,
    MMA_K,
    MMA_M,
    MMA_N,
    MMA_WARPS,
    QUARTERS,
    SWIZZLE_ROWS,
    DecodeConfig,
)
from dsv4_router.kernels import decode_ptx
from dsv4_router.kernels.row_selection import Call, gmem, wide


def swizzled(address: Int32) -> Int32:
    """Where a tensor copy puts a 16-byte word: its place among the 8 of its row is changed by the row's number.

    After 8 rows of 128 bytes the pattern begins again, so the result plus or less whole KiB is right too.
    """
    return address ^ ((address >> 3) & 0x70)


def place_in_smem(address: Int32, align: int) -> cute.Pointer:
    """Of bf16 numbers, computed before it is used."""
    return cute.make_ptr(BFloat16, decode_ptx.opaque(address), cute.AddressSpace.smem, assumed_align=align)


class WarpProduct:
    """A block's sums by ``mma.sync``; its waits are part of the decode kernel's contract.

    A warp that multiplies has one quarter of every chunk, with two slices of one of them and all rows, with one slice
    of half of the rows; and all of the block's experts, so that no two warps read the same hidden states.

    An MMA has 16 rows and 8 columns. Rows of hidden states are its rows; but with up to 8 of them, which would leave
    half of those to zeros, they are its columns, and experts its rows. An MMA aligns, cuts and adds its 16 products of
    a sum in one way whichever operand is which, so the bits are the same.
    """

    config: DecodeConfig

    def make_tiled_mma(self) -> cute.TiledMma:
        """Of a fragment: all of the block's experts if they are columns, and 16 of them if they are rows."""
        columns = MMA_N if self.config.experts_are_rows else self.config.expert_tile
        return cute.make_tiled_mma(
            warp.MmaF16BF16Op(BFloat16, Float32, (MMA_M, MMA_N, MMA_K)),
            cute.make_layout((1, 1, 1)),
            permutation_mnk=(MMA_M, columns, MMA_K),
        )

    def _cell(self, warp_idx: Int32) -> tuple[Any, Int32, Any]:
        """What a warp that multiplies has: slice of the block, quarter of its chunks, first row tile."""
        quarter, group = Int32(Uint32(warp_idx) % QUARTERS), Int32(Uint32(warp_idx) // QUARTERS)
        if self.config.slices_per_block == 2:
            return group, quarter, 0
        return 0, quarter, group * self.config.warp_m_tiles

    def gate_place(self, tiled_mma, sW, warp_idx, lane) -> cute.Pointer:
        """What the lane reads of its warp's first fragment of the gate weight."""
        slice_idx, quarter, _ = self._cell(warp_idx)
        first = slice_idx * self.config.chunks_per_slice
        if self.config.experts_are_rows:
            # Four matrices of 8 experts and 8 columns: the upper experts after the lower ones, then the next columns.
            row, column = lane % MMA_M, quarter * MMA_K + lane // MMA_M * (MMA_K // 2)
            offset = (first * self.config.expert_tile + row) * CHUNK + column
            start = cute.recast_ptr(sW.iterator, cute.make_swizzle(0, 4, 3)) + offset
        else:
            start = self._gate_copy(tiled_mma, lane).partition_S(sW)[None, 0, quarter, first].iterator
        return place_in_smem(swizzled(start.toint()), 16)

    def hidden_place(self, tiled_mma, operands, num_tokens, warp_idx, lane) -> cute.Pointer:
        """Likewise of the hidden states."""
        slice_idx, quarter, first_m = self._cell(warp_idx)
        first = slice_idx * self.config.chunks_per_slice
        if not self.config.experts_are_rows:
            tCsX = self._hidden_copy(tiled_mma, lane).partition_S(operands.sX)
            return place_in_smem(swizzled(tCsX[None, first_m, quarter, first].iterator.toint()), 16)
        row, column = lane // 4, quarter * MMA_K + 2 * (lane % 4)
        sRows = operands.sRows
        of_rows = (sRows.iterator + sRows.layout((row, column, first))).toint()
        of_tile = swizzled((sRows.iterator + ((first * self.config.hidden_rows + row) * CHUNK + column)).toint())
        return place_in_smem(decode_ptx.select(self.comes_by_rows(num_tokens), of_rows, of_tile, Int32), 4)

    def comes_by_rows(self, num_tokens: Int32) -> Boolean:
        """Whether each row comes by a copy of its own, into padded rows, and not all by a tensor copy, swizzled."""
        return num_tokens <= self.config.max_row_copies

    def gate_fragment(self, tiled_mma) -> cute.Tensor:
        """(MMA, tiles of experts, 1)"""
        if self.config.experts_are_rows:
            return tiled_mma.make_fragment_A(tiled_mma.partition_shape_A((self.config.expert_rows, MMA_K)))
        return tiled_mma.make_fragment_B(tiled_mma.partition_shape_B((self.config.expert_tile, MMA_K)))

    def hidden_fragment(self, tiled_mma) -> cute.Tensor:
        """(MMA, 1, 1): 8 rows or 16"""
        if self.config.experts_are_rows:
            return tiled_mma.make_fragment_B(tiled_mma.partition_shape_B((MMA_N, MMA_K)))
        return tiled_mma.make_fragment_A(tiled_mma.partition_shape_A((MMA_M, MMA_K)))

    def accumulator(self, tiled_mma) -> cute.Tensor:
        """Sums of a tile of rows and all of the block's experts, zeros: (MMA, tiles of rows, tiles of columns)"""
        tile = (MMA_M, self.config.expert_tile)
        if self.config.experts_are_rows:
            tile = (self.config.expert_rows, MMA_N)
        acc = cute.make_rmem_tensor(tiled_mma.partition_shape_C(tile), Float32)
        acc.fill(0.0)
        return acc

    def multiply_fragments(self, tiled_mma, acc, tCrX, tCrW) -> None:
        a, b = (tCrW, tCrX) if self.config.experts_are_rows else (tCrX, tCrW)
        cute.gemm(tiled_mma, acc, a[None, None, 0], b[None, None, 0], acc)

    @cute.jit
    def mma(self, tiled_mma, operands, places, num_tokens, tidx, warp_idx):
        """All rows times the block's experts; the warp's sums of quarters into sPartial."""
        config = self.config
        lane = tidx % LANES
        slice_idx, _, _ = self._cell(warp_idx)
        acc = [self.accumulator(tiled_mma) for _ in range(config.warp_m_tiles)]
        if warp_idx < MMA_WARPS:
            if const_expr(config.max_row_copies > 0):
                # In this order, for a jump that comes after the products would take time of the fewest rows.
                if not self.comes_by_rows(num_tokens):
                    self.multiply(tiled_mma, operands, places, acc, slice_idx, False, lane)
                else:
                    self.multiply(tiled_mma, operands, places, acc, slice_idx, True, lane)
            else:
                self.multiply(tiled_mma, operands, places, acc, slice_idx, False, lane)
        if const_expr(config.partials_share_operands):
            cute.arch.sync_threads()  # every warp has read the operands
        if warp_idx < MMA_WARPS:
            for m in range_constexpr(config.warp_m_tiles):
                self.store_partials(acc[m], operands.sPartial, places.partials, m)

    @cute.jit
    def multiply(self, tiled_mma, operands, places, acc, slice_idx, by_rows: cutlass.Constexpr, lane):
        """A warp's rows times its experts over a quarter of its slice; ``by_rows`` of rows that came one by one."""
        config = self.config
        steps, m_tiles = config.chunks_per_slice, config.warp_m_tiles
        tCrW = [self.gate_fragment(tiled_mma) for _ in range(config.gate_fragments)]
        tCrX = [self.hidden_fragment(tiled_mma) for _ in range(config.hidden_fragments)]
        units = [(i, m) for i in range(steps) for m in range(m_tiles)]
        # Unless caches are cold the gate weight is there long before. Fragments of both are loaded some products ahead.
        cute.arch.mbarrier_wait(operands.gate_full + slice_idx, 0)
        for i in range_constexpr(min(config.gate_fragments, steps)):
            self.load_gate_fragment(tiled_mma, operands.sW, places.gate, tCrW[i], i, lane)
        for u in range_constexpr(-config.hidden_fragments, len(units)):
            if const_expr(u >= 0):
                i, m = units[u]
                w = tCrW[i % config.gate_fragments]
                self.multiply_fragments(tiled_mma, acc[m], tCrX[u % config.hidden_fragments], w)
                i += config.gate_fragments
                if const_expr(m == m_tiles - 1 and i < steps):
                    self.load_gate_fragment(tiled_mma, operands.sW, places.gate, w, i, lane)
            u += config.hidden_fragments
            if const_expr(u < len(units)):
                i, m = units[u]
                if const_expr(m == 0 and (i == 0 or config.hidden_stages > 1)):
                    stage = 0 if const_expr(config.hidden_stages == 1) else i * config.slices_per_block + slice_idx
                    cute.arch.mbarrier_wait(operands.hidden_full + stage, 0)
                x = tCrX[u % config.hidden_fragments]
                self.load_hidden_fragment(tiled_mma, operands.sX, places.hidden, x, m, i, by_rows, lane)

    def _gate_copy(self, tiled_mma, lane):
        """Of a fragment of experts that are columns."""
        matrices = 4 if self.config.expert_tile % (2 * MMA_N) == 0 else 2  # 8 experts and 8 columns each
        ldmatrix = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, matrices), BFloat16)
        return cute.make_tiled_copy_B(ldmatrix, tiled_mma).get_slice(lane)

    def _hidden_copy(self, tiled_mma, lane):
        ldmatrix = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), BFloat16)
        return cute.make_tiled_copy_A(ldmatrix, tiled_mma).get_slice(lane)

    def load_gate_fragment(self, tiled_mma, sW, place: cute.Pointer, tCrW, step: Any, lane) -> None:
        """16 columns of the block's experts; ``step`` counts the chunks of the warp's slice, the first at ``place``."""
        offset = step * (self.config.expert_tile * CHUNK)
        start = place + (offset if isinstance(step, int) else cute.assume(offset, divby=CHUNK))
        if not self.config.experts_are_rows:
            copy_w = self._gate_copy(tiled_mma, lane)
            layout = copy_w.partition_S(sW)[None, 0, 0, 0].layout  # (CPY)
            cute.copy(copy_w, cute.make_tensor(start, layout), copy_w.retile(tCrW)[None, 0, 0])
            return
        ldmatrix = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), BFloat16)
        for m in range(cute.size(tCrW, mode=[1])):
            source = start + m * MMA_M * CHUNK
            if m * MMA_M + SWIZZLE_ROWS == self.config.expert_tile:
                # The upper rows are no experts of the block's: the lower ones again, and the sums are not stored.
                source = source - lane // SWIZZLE_ROWS % 2 * (SWIZZLE_ROWS * CHUNK)
            cute.copy(ldmatrix, wide(source, MMA_K // 2), cute.group_modes(tCrW[None, m, 0], 0, 1))

    def load_hidden_fragment(self, tiled_mma, sX, place, tCrX, m: int, step: int, by_rows: bool, lane) -> None:
        """16 columns of 8 rows, or of 16, the warp's m-th; ``by_rows`` of rows that came one by one."""
        if self.config.experts_are_rows:
            words = cute.recast_tensor(tCrX, Uint32)  # (k 0 | k 8)
            half = MMA_K // 2
            if by_rows:
                upper, stride = place + half, CHUNK
            else:  # the next word of 16 bytes, swizzled
                address = place.toint() ^ (half * BF16_BYTES)
                upper = cute.make_ptr(BFloat16, address, cute.AddressSpace.smem, assumed_align=4)
                stride = self.config.hidden_rows * CHUNK
            words[0] = cute.recast_tensor(wide(place + step * stride, 2), Uint32)[0]
            words[1] = cute.recast_tensor(wide(upper + step * stride, 2), Uint32)[0]
        else:
            copy_x = self._hidden_copy(tiled_mma, lane)
            layout = copy_x.partition_S(sX)[None, 0, 0, 0].layout  # (CPY)
            start = place + (step * self.config.token_tile + m * MMA_M) * CHUNK
            cute.copy(copy_x, cute.make_tensor(start, layout), copy_x.retile(tCrX)[None, 0, 0])

    @cute.jit
    def load_row(self, call: Call, tCrX, row, chunk, quarter, lane):
        """The fragment that holds one row, as its first, and zeros; ``chunk`` counts from the start of the row."""
        words = cute.recast_tensor(tCrX, Uint32)  # (k 0 | k 8), or of 16 rows (row 0 | row 8) x (k 0 | k 8)
        words.fill(0)
        step = const_expr(cute.size(words) // 2)
        column = chunk * CHUNK + quarter * MMA_K + 2 * (lane % 4)
        address = call.hidden_states + (Int64(row) * call.hidden_stride + column) * 2
        if lane < 4 and column < self.config.hidden_size:
            for k in range_constexpr(2):
                words[step * k] = cute.arch.load(gmem(Uint32, address + 16 * k), Uint32, cop="cg")

    def partial_place(self, sPartial, warp_idx, lane) -> Int32:
        """Where in shared memory the lane's first sum of its warp's first row tile goes.

        Lane l of an m16n8 accumulator holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and one more.
        """
        slice_idx, quarter, first_m = self._cell(warp_idx)
        line, pair = lane // 4, 2 * (lane % 4)
        row, expert = (pair, line) if self.config.experts_are_rows else (first_m * MMA_M + line, pair)
        return (sPartial.iterator + sPartial.layout((slice_idx * QUARTERS + quarter, row, expert))).toint()

    def store_partials(self, acc, sPartial, place: Int32, m: int) -> None:
        """A row tile's sums of the warp's quarter, the m-th tile's; ``place`` is the first one's."""
        start = cute.make_ptr(Float32, place, cute.AddressSpace.smem, assumed_align=4)
        if self.config.experts_are_rows:
            for first in range(0, self.config.expert_tile, MMA_M // 2):
                tile, half = first // MMA_M, first % MMA_M // (MMA_M // 2)
                for v in range(2):
                    wide(start + sPartial.layout((0, v, first)), 1)[0] = acc[(v, half), tile, 0]
        else:
            for n in range(self.config.expert_tile // MMA_N):
                for half in range(2):
                    two = cute.make_rmem_tensor(2, Float32)
                    two[0], two[1] = acc[(0, half), 0, n], acc[(1, half), 0, n]
                    row = m * MMA_M + half * (MMA_M // 2)
                    cute.autovec_copy(two, wide(start + sPartial.layout((0, row, n * MMA_N)), 2))

    @cute.jit
    def add_partials(self, sPartial, first):
        """The block's sums of two neighbouring experts: ``(q0 + q1) + (q2 + q3)`` of a slice, then its slices.

        ``first`` is where in shared memory the first of them is.
        """
        sums = []
        for s in range_constexpr(self.config.slices_per_block):
            q = [cute.make_rmem_tensor(2, Float32) for _ in range(QUARTERS)]
            for quarter in range_constexpr(QUARTERS):
                start = cute.make_ptr(Float32, first, cute.AddressSpace.smem, assumed_align=8)
                cute.autovec_copy(wide(start + sPartial.layout((s * QUARTERS + quarter, 0, 0)), 2), q[quarter])
            sums.append([(q[0][v] + q[1][v]) + (q[2][v] + q[3][v]) for v in range(2)])
        if const_expr(self.config.slices_per_block == 2):
            return sums[0][0] + sums[1][0], sums[0][1] + sums[1][1]
        return sums[0][0], sums[0][1]
