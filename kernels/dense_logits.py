# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Logits of many rows with the decode kernel's bits, in CuTe DSL, by warpgroup MMA."""

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, const_expr, pipeline, range_constexpr
from cutlass.cute.nvgpu import cpasync, warpgroup

from dsv4_router.decode_config import CHUNK, LANES, QUARTERS
from dsv4_router.kernels import decode_ptx
from dsv4_router.kernels.warpgroup_product import warpgroup_mma
from dsv4_router.logits_config import (
    AFTER_PRODUCTS,
    AT_ONCE,
    CLUSTER,
    CONSUMER_REGISTERS,
    CONSUMERS,
    PRODUCER_REGISTERS,
    ROW_TILE,
    WARPGROUP,
    LogitsConfig,
)


class Call(NamedTuple):
    """What a launch works on beside the operands."""

    partial_logits: Int64
    num_tokens: Int32
    num_parts: Int32
    early_stages: Int32
    dependents: Int32


class Place(NamedTuple):
    """A tile of one part of K."""

    row_tile: Int32
    first_row: Int32  # that is multiplied; a broken last tile takes in rows of the one before, and does not store them
    expert_tile: Int32
    first_sum: Int32  # which of the partial logits takes the part's, or the first of its two
    first_pair: Int32  # of slices of K
    middle_pair: Int32  # where the part's second sum begins, or its end if it has only one
    end_pair: Int32


class DenseLogitsKernel:
    """Step 1 of dense routing for any number of rows, in the order of summation of ``DecodeConfig``.

    ``mma.sync`` and warpgroup MMA give the same bits if they add the same products in the same order, 16 columns at a
    time. So one block can make a tile of 128 rows as the decode kernel's many would: chains of products for each
    quarter of a slice, which registers add up. The pairs of slices of K are cut into parts: all of them apart if rows
    are few, else quarters, halves, or none; ``activation_topk`` adds the sums, and goes on from there. A half's pairs
    are added in turn: the block of its first quarter does, that of its second one stores each pair's sum by itself. A
    block that has all of K sums up one half after the other, and adds the two itself.

    Roles of a block's warpgroups::

        producer (1 warp of its warpgroup)         2 consumers, 64 rows each
                                                   init mbarriers: warp 0
        -------------- cluster barrier: the mbarriers of both blocks are initialised --------------
        load: the gate weight of the first
              stages, if that is constant
        griddepcontrol.wait
        griddepcontrol.launch_dependents (1)
        for each of the block's tiles:             for each of the block's tiles:
        load: a stage of both operands, as soon        for the part's sum, or for each of its two:
              as both blocks have released it              mma: each stage, when it is full; at the end of a slice
                                                                add up
        wait until both blocks released all                griddepcontrol.launch_dependents (2), after a consumer's
                                                                last products
                                                           store: the sum, of all of K the second one
                                                                added to the first

    A block keeps its experts and its part of K, and takes every ``gridDim.y``-th tile of rows; so the producer requests
    the next one's stages while the sums of this one are stored. A broken last tile begins 128 rows before the end: it
    takes less time with rows that exist. Sums of those that it shares with the tile before are stored by that one's
    block.

    Barriers: a stage's ``full`` has one arrival, its producer's ``arrive.expect_tx``, and completes with the bytes of
    both operands. Half of the rows of hidden states come by this block's copy and half by its neighbour's in the
    cluster, each multicast to both; so a stage's ``empty`` has one arrival for each consumer warp of both blocks. The
    blocks of a cluster are scheduled together, and no other block is waited for: where other kernels hold the GPU, a
    launch goes on with any two multiprocessors that may hold a cluster, but not with one.

    A stage holds a chunk: rows of 128 bytes, the most for which L2 looks up one address. So all four chains of a slice
    are open, and registers hold their sums. Those of a pair's even slice and the total over pairs have room beside them
    if the tile is small. Else they lie in shared memory, each thread's own; nobody else reads them. Nor does anybody
    else read a first sum, where ``partial_logits`` holds it while the second one is made.

    Dependent launch: everything but a constant gate weight is read after ``griddepcontrol.wait``, and written by
    threads that have multiplied what came after it. Dependents are let in at (1), at (2) or as blocks end, whichever
    ``dependents`` says, and wait for this grid's completion themselves.
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
        max_clusters: Int32,
        early_stages: Int32,
        dependents: Int32,
        launch_with_pdl: Int32,
        stream: Any,
    ) -> None:
        """Launches on ``stream``, on the current device. Nothing is checked here.

        Args:
            hidden_states, gate_weight: addresses of bf16 [N, H] and [E, H], 16-byte aligned.
            hidden_stride, gate_stride: elements between rows, multiples of 8.
            partial_logits: address of fp32 [S, N, E], S as ``LogitsConfig.num_sums`` has it; written, and read if K is
                in one part.
            num_tokens: N, at least 1.
            num_parts: of K, one of ``LogitsConfig.parts``.
            max_clusters: of the launch, as many as the GPU holds at once; fewer take turns with more tiles.
            early_stages: how many stages' gate weight is requested before the previous kernel has ended; at most as
                ``LogitsConfig.early_stages`` has it, and none if that kernel may write it.
            dependents: when the next kernel is let in, as ``LogitsConfig.dependents`` has it.
        """
        x_layout, w_layout = self._operand_layout(ROW_TILE), self._operand_layout(self.config.expert_tile)
        tma_x, mX = self._tensor_copy(hidden_states, num_tokens, hidden_stride, x_layout, CLUSTER)
        tma_w, mW = self._tensor_copy(gate_weight, self.config.num_experts, gate_stride, w_layout, 1)
        tiled_mma = cute.make_tiled_mma(warpgroup_mma(self.config.expert_tile), (CONSUMERS, 1, 1))
        row_tiles = (num_tokens + ROW_TILE - 1) // ROW_TILE
        lanes = cutlass.max(max_clusters // (self.config.num_expert_tiles // CLUSTER * num_parts), 1)
        call = Call(partial_logits, num_tokens, num_parts, early_stages, dependents)
        self.kernel(
            tma_x,
            mX,
            tma_w,
            mW,
            x_layout,
            w_layout,
            tiled_mma,
            call,
        ).launch(
            grid=(self.config.num_expert_tiles, cutlass.min(row_tiles, lanes), num_parts),
            block=(self.config.num_threads, 1, 1),
            cluster=(CLUSTER, 1, 1),
            stream=stream,
            use_pdl=launch_with_pdl,
            min_blocks_per_mp=1,
        )

    def _tensor_copy(self, address: Int64, rows: Any, stride: Int64, smem_layout: Any, blocks: int) -> tuple[Any, Any]:
        """The copy of a chunk of a tile's rows, an equal share by each block; the matrix as its coordinates."""
        pointer = cute.make_ptr(BFloat16, address, cute.AddressSpace.gmem, assumed_align=16)
        layout = cute.make_layout((rows, self.config.hidden_size), stride=(cute.assume(stride, divby=8), 1))
        tile = cute.select(smem_layout, mode=[0, 1])
        copy = cpasync.CopyBulkTensorTileG2SMulticastOp() if blocks > 1 else cpasync.CopyBulkTensorTileG2SOp()
        return cpasync.make_tiled_tma_atom(
            copy, cute.make_tensor(pointer, layout), tile, (cute.size(tile, mode=[0]), CHUNK), blocks
        )

    def _operand_layout(self, rows: int) -> Any:
        """(rows, CHUNK, stages): rows of 128 bytes, swizzled as the MMA reads them."""
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, BFloat16)
        return cute.tile_to_shape(atom, (rows, CHUNK, self.config.stages), order=(0, 1, 2))

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
        call: Call,
    ):
        """Sets the stage; the roles are the methods below."""
        config = self.config
        smem = cutlass.memory.SmemAllocator()
        barriers = smem.allocate_array(Int64, 2 * config.stages)
        sX = smem.allocate_tensor(BFloat16, x_layout.outer, byte_alignment=1024, swizzle=x_layout.inner)
        sW = smem.allocate_tensor(BFloat16, w_layout.outer, byte_alignment=1024, swizzle=w_layout.inner)
        threads, vectors = CONSUMERS * WARPGROUP, config.expert_tile // 2 // 4  # of 4 sums of a thread
        sSums = None
        if const_expr(config.sums_in_shared):
            sums_layout = cute.make_layout((4, vectors, threads, 2), stride=(1, 4 * threads, 4, 4 * threads * vectors))
            sSums = smem.allocate_tensor(Float32, sums_layout, byte_alignment=16)
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
        if warpgroup_idx == CONSUMERS:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if tidx // LANES == threads // LANES:
                self.load(tma_x, mX, sX, tma_w, mW, sW, stages, call)
        else:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            # (4, sums of the thread / 4) each: of a pair's even slice, and of the pairs so far
            even, total = [cute.make_rmem_tensor((4, vectors), Float32) for _ in range(2)]
            if const_expr(config.sums_in_shared):
                even, total = [sSums[None, None, tidx, i] for i in range(2)]
            self.consume(tiled_mma, sX, sW, even, total, stages, call, warpgroup_idx, tidx)

    @cute.jit
    def place_of(self, row_tile, call: Call) -> Place:
        """This block's tile of those rows."""
        config, lower = self.config, self.config.order.half_pairs
        expert_tile, _, part = cute.arch.block_idx()
        first_pair, middle_pair, end_pair, first_sum = part, part + 1, part + 1, part
        if call.num_parts == 4:
            half, is_late = part >> 1, part & 1
            first_pair, end_pair = half * lower, lower + half * (config.num_pairs - lower)
            quarter = first_pair + (end_pair - first_pair + 1) // 2
            first_sum = half * config.sums_of_halves(4)[0] + is_late
            if is_late == 1:
                first_pair, middle_pair = quarter, quarter + 1
            else:
                middle_pair, end_pair = quarter, quarter
        elif call.num_parts == 2:
            first_pair, end_pair = part * lower, lower + part * (config.num_pairs - lower)
            middle_pair = end_pair
        elif call.num_parts == 1:
            middle_pair, end_pair = Int32(lower), Int32(config.num_pairs)
        first_row = self.first_row_of(row_tile, call)
        return Place(row_tile, first_row, expert_tile, first_sum, first_pair, middle_pair, end_pair)

    def first_row_of(self, row_tile, call: Call) -> Int32:
        """The first of the rows that are multiplied for a tile."""
        return cutlass.max(cutlass.min(row_tile * ROW_TILE, call.num_tokens - ROW_TILE), 0)

    def row_tiles_of_block(self, call: Call) -> tuple[Int32, Int32, Int32]:
        """The first of its tiles of rows, their end, and how far it is from one to the next."""
        _, first, _ = cute.arch.block_idx()
        _, step, _ = cute.arch.grid_dim()
        return first, (call.num_tokens + ROW_TILE - 1) // ROW_TILE, step

    @cute.jit
    def load(self, tma_x, mX, sX, tma_w, mW, sW, stages, call: Call):
        """Requests the stages of the block's tiles, in the order of ``mma``, each when both blocks have released it."""
        config, chunks = self.config, 2 * self.chunks  # of a pair
        rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
        cpasync.prefetch_descriptor(tma_w)
        cpasync.prefetch_descriptor(tma_x)
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, config.stages)
        first, end, step = self.row_tiles_of_block(call)
        place = self.place_of(first, call)
        begin_chunk, end_chunk = place.first_pair * chunks, place.end_pair * chunks
        gW = cute.local_tile(mW, (config.expert_tile, CHUNK), (place.expert_tile, None))  # (experts, CHUNK, chunks)
        tWsW, tWgW = cpasync.tma_partition(
            tma_w, 0, cute.make_layout(1), cute.group_modes(sW, 0, 2), cute.group_modes(gW, 0, 2)
        )
        # Stages whose rows follow after the wait.
        early, ahead = call.early_stages, state.clone()
        for chunk in cutlass.range(begin_chunk, begin_chunk + early, unroll=1):
            self.load_gate(tma_w, tWgW, tWsW, stages, ahead, chunk)
            ahead.advance()
        cute.arch.griddepcontrol_wait()
        if call.dependents == AT_ONCE:
            cute.arch.griddepcontrol_launch_dependents()
        for row_tile in cutlass.range(first, end, step, unroll=1):
            rows = cute.domain_offset((self.first_row_of(row_tile, call), 0), mX)
            gX = cute.local_tile(rows, (ROW_TILE, CHUNK), (0, None))  # (rows, CHUNK, chunks)
            tXsX, tXgX = cpasync.tma_partition(
                tma_x, rank, cute.make_layout(CLUSTER), cute.group_modes(sX, 0, 2), cute.group_modes(gX, 0, 2)
            )
            for chunk in cutlass.range(begin_chunk, begin_chunk + early, unroll=1):
                self.load_rows(tma_x, tXgX, tXsX, stages, state, chunk)
                state.advance()
            for chunk in cutlass.range(begin_chunk + early, end_chunk, unroll=1):
                self.load_gate(tma_w, tWgW, tWsW, stages, state, chunk)
                self.load_rows(tma_x, tXgX, tXsX, stages, state, chunk)
                state.advance()
            early = Int32(0)
        stages.producer_tail(state)

    def load_gate(self, tma_w: Any, tWgW: Any, tWsW: Any, stages: Any, state: Any, chunk: Int32) -> None:
        """Requests a stage's gate weight when both blocks have released the stage."""
        stages.producer_acquire(state)
        barrier = stages.producer_get_barrier(state)
        cute.copy(tma_w, tWgW[None, chunk], tWsW[None, state.index], tma_bar_ptr=barrier)

    def load_rows(self, tma_x: Any, tXgX: Any, tXsX: Any, stages: Any, state: Any, chunk: Int32) -> None:
        """Requests this block's half of a stage's hidden states, for both; ``load_gate`` has acquired the stage."""
        barrier, everyone = stages.producer_get_barrier(state), Int32((1 << CLUSTER) - 1).to(cutlass.Int16)
        to = tXsX[None, state.index]
        cute.copy(tma_x, tXgX[None, chunk], to, tma_bar_ptr=barrier, mcast_mask=everyone)

    @cute.jit
    def consume(self, tiled_mma, sX, sW, even, total, stages, call: Call, warpgroup_idx, tidx):
        """The sums of the block's tiles, of this warpgroup's rows."""
        config = self.config
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, config.stages)
        first, end, step = self.row_tiles_of_block(call)
        for row_tile in cutlass.range(first, end, step, unroll=1):
            place = self.place_of(row_tile, call)
            begin_pair, end_pair = place.first_pair, place.middle_pair
            while begin_pair < place.end_pair:
                num_pairs = end_pair - begin_pair
                state = self.mma(tiled_mma, sX, sW, even, total, stages, state, warpgroup_idx, num_pairs)
                is_last = end_pair == place.end_pair and row_tile + step >= end
                if is_last and call.dependents == AFTER_PRODUCTS:
                    cute.arch.griddepcontrol_launch_dependents()
                self.store(tiled_mma, total, call, place, begin_pair != place.first_pair, tidx)
                begin_pair, end_pair = end_pair, place.end_pair

    @cute.jit
    def mma(self, tiled_mma, sX, sW, even, total, stages, state, warpgroup_idx, num_pairs: Int32):
        """The ``total`` of the next pairs of slices, of a consumer's rows; returns the stage after them."""
        config = self.config
        thr_mma = tiled_mma.get_slice(warpgroup_idx * WARPGROUP)
        tCrX = tiled_mma.make_fragment_A(thr_mma.partition_A(sX))  # (MMA, 1, QUARTERS, stages)
        tCrW = tiled_mma.make_fragment_B(thr_mma.partition_B(sW))  # likewise
        shape = tiled_mma.partition_shape_C((ROW_TILE, config.expert_tile))  # (MMA, 1, 1)
        nothing = cute.make_rmem_tensor(total.shape, Float32)
        nothing.fill(-0.0)  # which changes nothing that is added to it, +0.0 would turn -0.0 into itself
        cute.autovec_copy(nothing, total)
        released = state.clone()
        for _ in cutlass.range(num_pairs, unroll=1):
            for is_odd in range_constexpr(2):
                quarters = [cute.make_rmem_tensor(shape, Float32) for _ in range(QUARTERS)]
                for chunk in range_constexpr(config.order.chunks_per_slice):
                    stages.consumer_wait(state)
                    warpgroup.fence()
                    tiled_mma.set(warpgroup.Field.ACCUMULATE, chunk > 0)
                    for k, q in enumerate(quarters):
                        cute.gemm(tiled_mma, q, tCrX[None, None, k, state.index], tCrW[None, None, k, state.index], q)
                    warpgroup.commit_group()
                    state.advance()
                    if const_expr(chunk > 0):
                        warpgroup.wait_group(1)  # all but this stage's
                        stages.consumer_release(released)
                        released.advance()
                warpgroup.wait_group(0)
                stages.consumer_release(released)
                released.advance()
                self.add_up(quarters, is_odd == 1, even, total)
        return state

    def add_up(self, quarters: Any, is_odd: bool, even: Any, total: Any) -> None:
        """At the end of a slice: ``(q0 + q1) + (q2 + q3)``; of an odd one ``even + odd`` and the total too."""
        q0, q1, q2, q3 = (cute.make_tensor(q.iterator, cute.make_layout(total.shape)) for q in quarters)
        self.add(q0, q0, q1)
        self.add(q2, q2, q3)
        self.add(q0, q0, q2)
        if not is_odd:
            cute.autovec_copy(q0, even)
            return
        cute.autovec_copy(even, q1)
        self.add(q0, q1, q0)
        cute.autovec_copy(total, q2)
        self.add(q2, q2, q0)
        cute.autovec_copy(q2, total)

    def add(self, to: Any, a: Any, b: Any) -> None:
        """``a + b`` in this place: computed later, the operands would hold registers that the next products need."""
        for i in range(cute.size(to)):
            to[i] = decode_ptx.add_here(a[i], b[i])

    @cute.jit
    def store(self, tiled_mma, total, call: Call, place: Place, is_second, tidx):
        """The sums of a thread; if they are second ones of all of K, added to those that it has stored before."""
        sums = cute.make_rmem_tensor(tiled_mma.partition_shape_C((ROW_TILE, self.config.expert_tile)), Float32)
        cute.autovec_copy(total, cute.make_tensor(sums.iterator, cute.make_layout(total.shape)))
        # Else the compiler would compute addresses before the products, and hold them in registers that those need.
        tidx = decode_ptx.opaque(tidx)
        index = place.first_sum
        if is_second:
            if call.num_parts == 1:
                first = cute.make_rmem_tensor(sums.shape, Float32)
                first.fill(0.0)
                self.exchange(first, call, place, index, tidx, False)
                for i in range_constexpr(cute.size(sums)):
                    sums[i] = decode_ptx.add(first[i], sums[i])
            else:
                index += 1
        self.exchange(sums, call, place, index, tidx, True)

    @cute.jit
    def exchange(self, sums, call: Call, place: Place, index: Int32, tidx, stores: cutlass.Constexpr):
        """Stores or loads a thread's sums, in one of the partial logits.

        Lane l of a warp holds rows l / 4 and l / 4 + 8 of 16, columns 2 (l % 4) and one more of every 8.
        """
        config = self.config
        lane, warp = tidx & (LANES - 1), tidx >> 5
        first = place.expert_tile * config.expert_tile + 2 * (lane & 3)
        for half in range_constexpr(2):
            row = place.first_row + warp * 16 + half * 8 + (lane >> 2)
            if row >= place.row_tile * ROW_TILE and row < call.num_tokens:
                # One address a row: of each pair the compiler would compute its own, in a branch of its own.
                element = (Int64(index) * call.num_tokens + row) * config.num_experts + first
                address = call.partial_logits + element * 4
                pairs = cute.make_ptr(Float32, address, cute.AddressSpace.gmem, assumed_align=8)
                for n in range_constexpr(config.expert_tile // 8):
                    if const_expr(config.tiles_are_whole):
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
