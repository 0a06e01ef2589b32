# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Logits of many rows with the decode kernel's bits, in CuTe DSL, by warpgroup MMA."""

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, const_expr, pipeline, range_constexpr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from dsv4_router.decode_config import LANES, MMA_K
from dsv4_router.kernels import decode_ptx
from dsv4_router.logits_config import (
    CLUSTER,
    CONSUMER_REGISTERS,
    CONSUMERS,
    EARLY_DEPENDENTS_FROM_BLOCKS,
    HALF_CHUNK,
    PRODUCER_REGISTERS,
    ROW_TILE,
    WARPGROUP,
    LogitsConfig,
)


class Place(NamedTuple):
    """What a block makes, and where its results go."""

    partial_logits: Int64
    num_tokens: Int32
    row_tile: Int32
    expert_tile: Int32
    part: Int32
    first_pair: Int32  # of slices of K
    middle_pair: Int32  # where the part's second sum begins, or its end if it has only one
    end_pair: Int32


class DenseLogitsKernel:
    """Step 1 of dense routing for any number of rows, in the order of summation of ``DecodeConfig``.

    ``mma.sync`` and warpgroup MMA give the same bits if they add the same products in the same order, 16 columns at a
    time. So one block can make a tile of 128 rows as the decode kernel's many would: chains of products for each
    quarter of a slice, which registers add up. The pairs of slices of K are cut into parts: all of them apart if rows
    are few, else the two halves, else none; ``activation_topk`` adds the parts, and goes on from there. A block that
    has all of K sums up one half after the other, and adds the two itself.

    Roles of a block's warpgroups::

        producer (1 warp of its warpgroup)         2 consumers, 64 rows each
        init mbarriers
        -------------- cluster barrier: the mbarriers of both blocks are initialised --------------
        griddepcontrol.wait
        load: a stage of both operands, as soon    for the part's sum, or for each of its two:
              as both blocks have released it          mma: each stage, when it is full; at the end of a phase
        wait until both blocks released all                 (two quarters of a slice) add up
                                                       griddepcontrol.launch_dependents, of many blocks and at the end
                                                       store: the sum, the second one added to the first

    Barriers: a stage's ``full`` has one arrival, its producer's ``arrive.expect_tx``, and completes with the bytes of
    both operands. Half of the rows of hidden states come by this block's copy and half by its neighbour's in the
    cluster, each multicast to both; so a stage's ``empty`` has one arrival for each consumer warp of both blocks. The
    blocks of a cluster are scheduled together, and no other block is waited for.

    Stages hold two half chunks: columns of quarters 0 and 1, or of 2 and 3, so that two chains are open at a time. With
    an odd number of chunks in a slice (7 for Pro, 5 for V4.1) one stage of each slice holds a half chunk of either.
    Sums wait in registers but for the total over pairs, which lies in shared memory, each thread's own; nobody else
    reads it. Nor does anybody else read a first sum, where ``partial_logits`` holds it while the second one is made.
    Small tiles leave registers for the quarters of two phases: one is added up while the next multiplies.

    Dependent launch: everything is read after ``griddepcontrol.wait``, and written by threads that have multiplied what
    came after it. Dependents wait for this grid's completion themselves. Those of a grid of many blocks are let in when
    a block's products are done; else they start as blocks end, for earlier ones would all lie on the few SMs that this
    grid leaves free, and stay there.
    """

    def __init__(self, config: LogitsConfig) -> None:
        self.config = config
        self.chunks = config.order.chunks_per_slice

    @cute.jit
    def __call__(
        self,
        hidden_states: Int64,
        hidden_stride: Int64,
        gate_weight: Int64,
        gate_stride: Int64,
        partial_logits: Int64,
        num_tokens: Int32,
        num_parts: Int32,
        launch_with_pdl: Int32,
        stream: Any,
    ) -> None:
        """Launches on ``stream``, on the current device. Nothing is checked here.

        Args:
            hidden_states, gate_weight: addresses of bf16 [N, H] and [E, H], 16-byte aligned.
            hidden_stride, gate_stride: elements between rows, multiples of 8.
            partial_logits: address of fp32 [num_parts, N, E], written, and read if it has one part.
            num_tokens: N, at least 1.
            num_parts: of K, the number of pairs of slices, or 2 for the halves of a logit's sum, or 1.
        """
        x_layout, w_layout = self._operand_layout(ROW_TILE), self._operand_layout(self.config.expert_tile)
        tma_x, mX = self._tensor_copy(hidden_states, num_tokens, hidden_stride, x_layout, CLUSTER)
        tma_w, mW = self._tensor_copy(gate_weight, self.config.num_experts, gate_stride, w_layout, 1)
        operation = warpgroup.MmaF16BF16Op(
            BFloat16,
            Float32,
            (64, self.config.expert_tile, MMA_K),
            warpgroup.OperandSource.SMEM,
            OperandMajorMode.K,
            OperandMajorMode.K,
        )
        tiled_mma = cute.make_tiled_mma(cute.make_mma_atom(operation), (CONSUMERS, 1, 1))
        self.kernel(
            tma_x,
            mX,
            tma_w,
            mW,
            x_layout,
            w_layout,
            tiled_mma,
            partial_logits,
            num_tokens,
            num_parts,
        ).launch(
            grid=(self.config.num_expert_tiles, (num_tokens + ROW_TILE - 1) // ROW_TILE, num_parts),
            block=(self.config.num_threads, 1, 1),
            cluster=(CLUSTER, 1, 1),
            stream=stream,
            use_pdl=launch_with_pdl,
            min_blocks_per_mp=1,
        )

    def _tensor_copy(self, address: Int64, rows: Any, stride: Int64, smem_layout: Any, blocks: int) -> tuple[Any, Any]:
        """The copy of half a chunk of a tile's rows, an equal share by each block; the matrix as its coordinates."""
        pointer = cute.make_ptr(BFloat16, address, cute.AddressSpace.gmem, assumed_align=16)
        layout = cute.make_layout((rows, self.config.hidden_size), stride=(cute.assume(stride, divby=8), 1))
        tile = cute.select(smem_layout, mode=[0, 1])
        copy = cpasync.CopyBulkTensorTileG2SMulticastOp() if blocks > 1 else cpasync.CopyBulkTensorTileG2SOp()
        return cpasync.make_tiled_tma_atom(
            copy, cute.make_tensor(pointer, layout), tile, (cute.size(tile, mode=[0]), HALF_CHUNK), blocks
        )

    def _operand_layout(self, rows: int) -> Any:
        """(rows, HALF_CHUNK, halves): rows of 64 bytes, swizzled as the MMA reads them."""
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW64, BFloat16)
        return cute.tile_to_shape(atom, (rows, HALF_CHUNK, 2 * self.config.stages), order=(0, 1, 2))

    @cute.kernel
    def kernel(
        self,
        tma_x: cute.CopyAtom,
        mX: cute.Tensor,
        tma_w: cute.CopyAtom,
        mW: cute.Tensor,
        x_layout: cute.ComposedLayout,
        w_layout: cute.ComposedLayout,
        tiled_mma: cute.TiledMma,
        partial_logits: Int64,
        num_tokens: Int32,
        num_parts: Int32,
    ):
        """Sets the stage; the roles are the methods below."""
        config = self.config
        smem = cutlass.memory.SmemAllocator()
        barriers = smem.allocate_array(Int64, 2 * config.stages)
        sX = smem.allocate_tensor(BFloat16, x_layout.outer, byte_alignment=1024, swizzle=x_layout.inner)
        sW = smem.allocate_tensor(BFloat16, w_layout.outer, byte_alignment=512, swizzle=w_layout.inner)
        threads = CONSUMERS * WARPGROUP
        total_layout = cute.make_layout((4, config.total_bytes // 16 // threads, threads), stride=(1, 4 * threads, 4))
        sTotal = smem.allocate_tensor(Float32, total_layout, byte_alignment=16)
        stages = pipeline.PipelineTmaAsync.create(
            num_stages=config.stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, threads),
            tx_count=config.stage_bytes,
            barrier_storage=barriers,
            cta_layout_vmnk=cute.make_layout((1, 1, CLUSTER, 1)),
            enable_multicast_signaling=True,
        )
        tidx, _, _ = cute.arch.thread_idx()
        warpgroup_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx()) // (WARPGROUP // LANES)
        expert_tile, row_tile, part = cute.arch.block_idx()
        lower = config.order.half_pairs
        first_pair, middle_pair, end_pair = part, part + 1, part + 1
        if num_parts == 2:
            first_pair, end_pair = part * lower, lower + part * (config.num_pairs - lower)
            middle_pair = end_pair
        elif num_parts == 1:
            middle_pair, end_pair = Int32(lower), Int32(config.num_pairs)
        place = Place(partial_logits, num_tokens, row_tile, expert_tile, part, first_pair, middle_pair, end_pair)

        if warpgroup_idx == CONSUMERS:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if tidx // LANES == threads // LANES:
                self.load(tma_x, mX, sX, tma_w, mW, sW, stages, place)
        else:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            sMine = sTotal[None, None, tidx]  # (4, sums of the thread / 4)
            state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, config.stages)
            begin, end = place.first_pair, place.middle_pair
            while begin < place.end_pair:
                state = self.mma(tiled_mma, sX, sW, sMine, stages, state, warpgroup_idx, end - begin)
                if end == place.end_pair:
                    blocks_x, blocks_y, blocks_z = cute.arch.grid_dim()
                    if blocks_x * blocks_y * blocks_z >= EARLY_DEPENDENTS_FROM_BLOCKS:
                        cute.arch.griddepcontrol_launch_dependents()
                self.store(tiled_mma, sMine, place, begin != place.first_pair, tidx)
                begin, end = end, place.end_pair

    @cute.jit
    def load(self, tma_x, mX, sX, tma_w, mW, sW, stages, place: Place):
        """Requests the part's stages in the order of ``mma``, each when both blocks have released it."""
        config, chunks = self.config, self.chunks
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        gX = cute.local_tile(mX, (ROW_TILE, HALF_CHUNK), (place.row_tile, None))  # (rows, HALF_CHUNK, halves of H)
        gW = cute.local_tile(mW, (config.expert_tile, HALF_CHUNK), (place.expert_tile, None))
        tXsX, tXgX = cpasync.tma_partition(
            tma_x, rank, cute.make_layout(CLUSTER), cute.group_modes(sX, 0, 2), cute.group_modes(gX, 0, 2)
        )
        tWsW, tWgW = cpasync.tma_partition(
            tma_w, 0, cute.make_layout(1), cute.group_modes(sW, 0, 2), cute.group_modes(gW, 0, 2)
        )
        everyone = Int32((1 << CLUSTER) - 1).to(cutlass.Int16)
        cute.arch.griddepcontrol_wait()
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, config.stages)
        for slice_idx in cutlass.range(2 * place.first_pair, 2 * place.end_pair, unroll=1):
            for stage in range_constexpr(chunks):
                stages.producer_acquire(state)
                barrier = stages.producer_get_barrier(state)
                for i in range_constexpr(2):
                    half, to = self.half_of(slice_idx, 2 * stage + i), 2 * state.index + i
                    cute.copy(tma_w, tWgW[None, half], tWsW[None, to], tma_bar_ptr=barrier)
                    cute.copy(tma_x, tXgX[None, half], tXsX[None, to], tma_bar_ptr=barrier, mcast_mask=everyone)
                state.advance()
        stages.producer_tail(state)

    def half_of(self, slice_idx: Int32, step: int) -> Int32:
        """The half chunk of H that a step of a slice multiplies: first halves of its chunks, then second halves."""
        phase, chunk = divmod(step, self.chunks)
        return 2 * (slice_idx * self.chunks + chunk) + phase

    @cute.jit
    def mma(self, tiled_mma, sX, sW, sMine, stages, state, warpgroup_idx, num_pairs: Int32):
        """The sums of the next pairs of slices, of a consumer's rows, into ``sMine``; returns the stage after them."""
        config, chunks = self.config, self.chunks
        thr_mma = tiled_mma.get_slice(warpgroup_idx * WARPGROUP)
        tCrX = tiled_mma.make_fragment_A(thr_mma.partition_A(sX))  # (MMA, 1, HALF_CHUNK / MMA_K, halves)
        tCrW = tiled_mma.make_fragment_B(thr_mma.partition_B(sW))  # likewise
        shape = tiled_mma.partition_shape_C((ROW_TILE, config.expert_tile))
        first_two = cute.make_rmem_tensor(shape, Float32)  # (MMA, 1, 1): q0 + q1 of a slice
        even = cute.make_rmem_tensor(shape, Float32)  # (MMA, 1, 1): the sum of a pair's first slice
        nothing = cute.make_rmem_tensor(sMine.shape, Float32)
        nothing.fill(-0.0)  # which changes nothing that is added to it, +0.0 would turn -0.0 into itself
        cute.autovec_copy(nothing, sMine)
        released = state.clone()
        last = 4 * chunks - 1
        for _ in cutlass.range(num_pairs, unroll=1):
            held = 0  # stages whose products have been issued, and that are not released
            deferred = None  # a phase whose products have been issued, and whose sums have not been made
            for step in range_constexpr(last + 1):
                is_odd, phase, chunk = step // (2 * chunks), step // chunks % 2, step % chunks
                ends_stage, ends_phase = step % 2 == 1, chunk == chunks - 1
                if const_expr(chunk == 0):
                    q = [cute.make_rmem_tensor(shape, Float32) for _ in range(2)]
                if const_expr(step % 2 == 0):
                    stages.consumer_wait(state)
                warpgroup.fence()
                at = 2 * state.index + step % 2
                tiled_mma.set(warpgroup.Field.ACCUMULATE, chunk > 0)
                for k in range_constexpr(2):
                    cute.gemm(tiled_mma, q[k], tCrX[None, None, k, at], tCrW[None, None, k, at], q[k])
                if const_expr(ends_stage or ends_phase or deferred is not None):
                    warpgroup.commit_group()
                if const_expr(ends_stage):
                    state.advance()
                    held += 1
                keep, sums = held, []  # stages that are not released yet, and phases that are added up now
                if const_expr(deferred is not None):
                    keep, sums, deferred = int(ends_stage), [deferred], None
                    warpgroup.wait_group(1)  # all but this step's
                if const_expr(ends_phase and config.defers_sums and step < last):
                    deferred = q, phase, is_odd
                elif const_expr(ends_phase):
                    warpgroup.wait_group(0)
                    keep, sums = 0, [*sums, (q, phase, is_odd)]
                elif const_expr(keep == 2):
                    warpgroup.wait_group(1)  # all but the last stage's
                    keep = 1
                for _ in range_constexpr(held - keep):
                    stages.consumer_release(released)
                    released.advance()
                held = keep
                for of_phase in sums:
                    self.add_up(*of_phase, first_two, even, sMine)
        return state

    def add_up(self, q: Any, phase: int, is_odd: int, first_two: Any, even: Any, sMine: Any) -> None:
        """At the end of a phase: ``(q0 + q1) + (q2 + q3)`` of a slice, ``even + odd`` of a pair, and the total."""
        if phase == 0:
            self.add(first_two, q[0], q[1])
        else:
            self.add(q[0], q[0], q[1])
            if is_odd == 0:
                self.add(even, first_two, q[0])
            else:
                self.add(q[0], first_two, q[0])
                self.add(q[0], even, q[0])
                total = cute.make_tensor(q[1].iterator, cute.make_layout(sMine.shape))
                cute.autovec_copy(sMine, total)
                self.add(q[1], q[1], q[0])
                cute.autovec_copy(total, sMine)

    def add(self, to: Any, a: Any, b: Any) -> None:
        """``a + b`` in this place: computed later, the operands would hold registers that the next products need."""
        for i in range(cute.size(to)):
            to[i] = decode_ptx.add_here(a[i], b[i])

    @cute.jit
    def store(self, tiled_mma, sMine, place: Place, is_second, tidx):
        """The sums of a thread, added to those that it has stored before if they are second ones."""
        total = cute.make_rmem_tensor(tiled_mma.partition_shape_C((ROW_TILE, self.config.expert_tile)), Float32)
        cute.autovec_copy(sMine, cute.make_tensor(total.iterator, cute.make_layout(sMine.shape)))
        # Else the compiler would compute addresses before the products, and hold them in registers that those need.
        tidx = decode_ptx.opaque(tidx)
        if is_second:
            first = cute.make_rmem_tensor(total.shape, Float32)
            first.fill(0.0)
            self.exchange(first, place, tidx, False)
            for i in range_constexpr(cute.size(total)):
                total[i] = decode_ptx.add(first[i], total[i])
        self.exchange(total, place, tidx, True)

    @cute.jit
    def exchange(self, sums, place: Place, tidx, stores: cutlass.Constexpr):
        """Stores or loads a thread's sums.

        Lane l of a warp holds rows l / 4 and l / 4 + 8 of 16, columns 2 (l % 4) and one more of every 8.
        """
        config = self.config
        lane, warp = tidx & (LANES - 1), tidx >> 5
        first = place.expert_tile * config.expert_tile + 2 * (lane & 3)
        all_exist = config.num_experts % config.expert_tile == 0
        for half in range_constexpr(2):
            row = place.row_tile * ROW_TILE + warp * 16 + half * 8 + (lane >> 2)
            if row < place.num_tokens:
                # One address a row: of each pair the compiler would compute its own, in a branch of its own.
                index = (Int64(place.part) * place.num_tokens + row) * config.num_experts + first
                address = place.partial_logits + index * 4
                pairs = cute.make_ptr(Float32, address, cute.AddressSpace.gmem, assumed_align=8)
                for n in range_constexpr(config.expert_tile // 8):
                    if const_expr(all_exist):
                        self.exchange_pair(sums, pairs, half, n, stores)
                    else:
                        if first + n * 8 < config.num_experts:
                            self.exchange_pair(sums, pairs, half, n, stores)

    def exchange_pair(self, sums: Any, pairs: cute.Pointer, half: int, n: int, stores: bool) -> None:
        """Two neighbouring experts of a row."""
        there = cute.make_tensor(pairs + 8 * n, cute.make_layout(2))
        pair = cute.make_rmem_tensor(2, Float32)
        if stores:
            for v in range(2):
                pair[v] = sums[(v, half, n), 0, 0]
            cute.autovec_copy(pair, there)
        else:
            cute.autovec_copy(there, pair)
            for v in range(2):
                sums[(v, half, n), 0, 0] = pair[v]
