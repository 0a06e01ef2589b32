# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The one-launch decode kernel in CuTe DSL: hidden states and gate weight in, expert ids and weights out."""

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint8, Uint32, Uint64, const_expr, range_constexpr
from cutlass.cute.nvgpu import cpasync, warp, warpgroup

from dsv4_router import decode_config
from dsv4_router.decode_config import CHUNK, LANES, MMA_K, MMA_M, MMA_N, MMA_WARPS, QUARTERS, DecodeConfig
from dsv4_router.kernels import decode_ptx
from dsv4_router.kernels.row_selection import Call, RowSelection, Selection, gmem, pair_at, wide
from dsv4_router.kernels.warpgroup_product import WarpgroupProduct


class Operands(NamedTuple):
    """Shared memory of the product, and the barriers of its copies."""

    sX: cute.Tensor  # (hidden_rows, CHUNK, chunks) bf16, swizzled, or with padded rows if they are copied one by one
    sW: cute.Tensor  # (expert_tile, CHUNK, chunks) bf16, swizzled
    sPartial: cute.Tensor  # (slices of the block x QUARTERS, partial_rows, expert_tile) fp32
    hidden_full: cute.Pointer  # hidden_stages mbarriers
    gate_full: cute.Pointer  # slices_per_block mbarriers


class Places(NamedTuple):
    """Addresses that a thread needs right after a wait, computed before it; of warpgroups the last one alone."""

    gate: cute.Pointer | None  # in shared memory, its first fragment of the gate weight
    hidden: cute.Pointer | None  # likewise of the hidden states
    row: cute.Pointer | None  # likewise the row that its warp requests, if rows are copied one by one
    row_source: Int64 | None  # where that row is
    sums: Int32 | None  # of its first packet: from the start of sPartial
    packet: Int64  # where that packet goes


def swizzled(address: Int32) -> Int32:
    """Where a tensor copy puts a 16-byte word: its place among the 8 of its row is changed by the row's number.

    After 8 rows of 128 bytes the pattern begins again, so the result plus whole KiB is right too.
    """
    return address ^ ((address >> 3) & 0x70)


class DenseRouterDecodeKernel(WarpgroupProduct, RowSelection):
    """Steps 1 to 6 of dense routing for up to ``token_tile`` rows, in one launch.

    A block multiplies all rows with ``expert_tile`` experts over its part of K, one or two slices, and publishes the
    sums through global memory as packets of two sums and a tag. Row r belongs to block ``num_blocks - 1 - r`` (and
    every num_blocks-th), which adds the row's parts in their order and selects.

    Roles of a block's warps::

        producer (warp MMA_WARPS)    all warps, the first MMA_WARPS of which multiply
        init mbarriers
        load_gate: the gate tile     load the bias
                                     places_of: addresses for right after the waits
        ------------------ barrier: mbarriers are initialised ------------------
        --------- griddepcontrol.wait: the previous kernel has completed ---------
        load_hidden: all rows        wait_and_load_rows, if rows are copied one by one, which is the wait too
        take_ticket: the tag         mma: wait gate_full[s], hidden_full[i]; ldmatrix; mma.sync
        - barrier, if the partial sums share the operands' memory: all operands are read -
                                     partial sums to shared memory
        ---------------------- barrier: all sums and the tag ----------------------
                                     launch_dependents by the last one, the usher, with few rows
                                     epilogue: add the quarters, store packets
                                     griddepcontrol.launch_dependents, with more
                                     each own row, up to the first one that is late:
                                       clear: no candidates
                                       wait_cycles, before its first row alone
                                       collect: look at its packets
                                       publish_score: scores, groups' best   -- barrier, with "any missing?"
                                       if none is: select: candidates        -- barrier
                                               one warp ranks and stores     -- barrier, if another row follows
                                     each row that is left, if one was late:
                                       clear, compute_row, publish_score     -- barrier
                                       select, likewise

    With ``has_usher`` the usher has one role between the first barrier and the one for all sums, and waits for the
    previous kernel in this::

        usher: wait gate_full[last slice], griddepcontrol.wait; launch_dependents at once, if the gate tile was late

    If ``weights_are_constant`` is 0 ``griddepcontrol.wait`` comes before the gate tile and the bias are read.
    ``compute_row`` has barriers of its own for each tile and part: before the copy of the gate tile, after the products
    if the partial sums share its memory, and after the partial sums; and one at its end.

    With ``warpgroup_mma`` the first ``warpgroup_warps`` warps multiply, by other methods. Their sums stay in registers
    until they are packets, so the barrier for operands is not there either::

        multiply_by_warpgroups: wait gate_full, hidden_full[i]; wgmma    in place of mma, with one slice
        store_sums: add the quarters in registers, store packets         in place of epilogue

    A warp that multiplies has one quarter of every chunk, with two slices of one of them and all rows, with one slice
    of half of the rows; and all of the block's experts, so that no two warps read the same hidden states.

    Barriers: ``gate_full[s]`` and ``hidden_full[i]`` are mbarriers with one arrival, the producer's
    ``arrive.expect_tx``, and complete when the bytes of slice s of the gate tile, or of stage i, have landed; copies of
    single rows, which other warps request, may land before that arrival. In ``compute_row`` warp 0 is the producer of
    ``gate_full``, whose parity alternates from 1. The block's barrier counts every thread.

    Hand-off between blocks: a packet is {sum, sum, tag}, stored and read by single 128-bit accesses, relaxed, at gpu
    scope. It carries all that its reader uses, so no other memory is ordered by it. The tag is the launch's epoch (44
    bits), its number of blocks and the low bits of ``%gridid``. Epochs come from tickets: every block adds 1 to the
    workspace's counter for that number of blocks after the wait on the previous kernel, and ``ticket / num_blocks`` is
    the same for the blocks of a launch because each took one. So the counter needs no reset, and a packet that an
    earlier launch left behind has another tag.

    Forward progress: an owner looks at most ``max_looks`` times, then computes its row alone (``compute_row``), and any
    other that it has left: the same products in the same order, hence the same bits. No wait depends on another block
    being scheduled.

    Dependent launch: before ``griddepcontrol.wait`` only the gate weight and the bias are read (or nothing, if
    ``weights_are_constant`` is 0: then the wait comes first), and no global memory is written. The next kernel may be
    scheduled once every block has its sums or, with ``has_usher``, its late gate tile, one that came less than
    ``LATE_GATE_CYCLES`` before the wait's end; with a tile of more than ``EARLY_DEPENDENTS_UP_TO`` rows once every
    block has stored its packets. If it was launched with the attribute it waits for this grid's completion itself
    before it may touch anything, the workspace included.
    """

    def __init__(self, config: DecodeConfig) -> None:
        super().__init__(config)
        self.half_parts = config.half_pairs * 2 // config.slices_per_block

    @cute.jit
    def __call__(
        self,
        hidden_states: Int64,
        hidden_stride: Int64,
        gate_weight: Int64,
        gate_stride: Int64,
        correction_bias: Int64,
        workspace: Int64,
        out_weights: Int64,
        out_ids: Int64,
        ids_are_int64: Int32,
        logits_out: Int64,
        token_mask: Int64,
        num_valid_tokens: Int64,
        num_valid_tokens_on_host: Int32,
        first_row: Int32,
        num_tokens: Int32,
        padding_id: Int64,
        routed_scaling_factor: Float32,
        weights_are_constant: Int32,
        max_looks: Int32,
        launch_with_pdl: Int32,
        stream: Any,
    ) -> None:
        """Launches on ``stream``, on the current device. Nothing is checked here.

        Args:
            hidden_states, gate_weight: addresses of bf16 [N, H] and [E, H], 16-byte aligned.
            hidden_stride, gate_stride: elements between rows, multiples of 8.
            correction_bias, logits_out, token_mask, num_valid_tokens: addresses, or 0.
            workspace: address of ``workspace_bytes``, zeroed once, for no other launch at the same time.
            num_valid_tokens_on_host: used where ``num_valid_tokens`` is 0.
            first_row: of this launch in the call, for ``num_valid_tokens``; every address is this row's.
            num_tokens: rows of this launch, from 1 to ``token_tile``.
            max_looks: at a row's packets, before the row's owner computes it alone.
        """
        config = self.config
        w_layout = self._operand_layout(config.expert_tile, config.chunks_per_block)
        of_slice = self._operand_layout(config.expert_tile, config.chunks_per_slice)
        tma_w, tma_mW = self._tensor_copy(gate_weight, config.num_experts, gate_stride, of_slice, 1)
        if const_expr(config.copies_rows):
            pitch = config.hidden_pitch
            x_layout = cute.make_layout((config.token_tile, CHUNK, config.chunks_per_block), stride=(pitch, 1, CHUNK))
            tma_x, tma_mX = None, None
        else:
            x_layout = self._operand_layout(config.hidden_rows, config.chunks_per_block)
            copied = self._operand_layout(config.token_tile, config.chunks_per_block)
            tma_x, tma_mX = self._tensor_copy(hidden_states, num_tokens, hidden_stride, copied, config.hidden_stages)
        tiled_mma = cute.make_tiled_mma(
            warp.MmaF16BF16Op(BFloat16, Float32, (MMA_M, MMA_N, MMA_K)),
            cute.make_layout((1, 1, 1)),
            permutation_mnk=(MMA_M, config.expert_tile, MMA_K),
        )
        call = Call(
            hidden_states,
            hidden_stride,
            workspace,
            out_weights,
            out_ids,
            ids_are_int64,
            logits_out,
            token_mask,
            num_valid_tokens,
            num_valid_tokens_on_host,
            first_row,
            num_tokens,
            padding_id,
            routed_scaling_factor,
            max_looks,
        )
        self.kernel(
            tma_x, tma_mX, tma_w, tma_mW, x_layout, w_layout, tiled_mma, correction_bias, weights_are_constant, call
        ).launch(
            grid=(config.num_blocks, 1, 1),
            block=(config.num_threads, 1, 1),
            stream=stream,
            use_pdl=launch_with_pdl,
            min_blocks_per_mp=config.blocks_per_sm,
            preferred_smem_carveout=100,
        )

    def _tensor_copy(self, address: Int64, rows: Any, stride: Int64, smem_layout: Any, stages: int) -> tuple[Any, Any]:
        """The copy of a stage of all of a tile's rows, and the matrix [rows, H] as its coordinates.

        If there is one, it is all chunks of the layout, and the matrix (rows, CHUNK, H / CHUNK), for a single request;
        of several each is a chunk, and the matrix (rows, H).
        """
        config = self.config
        pointer = cute.make_ptr(BFloat16, address, cute.AddressSpace.gmem, assumed_align=16)
        stride = cute.assume(stride, divby=8)
        if stages == 1:
            tile, shape, strides = smem_layout, (rows, CHUNK, config.hidden_size // CHUNK), (stride, 1, CHUNK)
            box: tuple[int, ...] = (CHUNK, cute.size(smem_layout, mode=[2]))
        else:
            tile, shape, strides = cute.select(smem_layout, mode=[0, 1]), (rows, config.hidden_size), (stride, 1)
            box = (CHUNK,)
        matrix = cute.make_tensor(pointer, cute.make_layout(shape, stride=strides))
        copy = cpasync.CopyBulkTensorTileG2SOp()
        return cpasync.make_tiled_tma_atom(copy, matrix, tile, (cute.size(tile, mode=[0]), *box))

    def _operand_layout(self, rows: int, chunks: int) -> Any:
        """(rows, CHUNK, chunks): rows of 128 bytes, swizzled so that ldmatrix reads without bank conflicts."""
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, BFloat16)
        return cute.tile_to_shape(atom, (rows, CHUNK, chunks), order=(0, 1, 2))

    def _allocate(self, x_layout: Any, w_layout: Any) -> tuple[Operands, Selection, cute.Tensor]:
        config = self.config
        threads = config.num_threads
        smem = cutlass.memory.SmemAllocator()
        gate_full = smem.allocate_array(Int64, config.slices_per_block)
        hidden_full = smem.allocate_array(Int64, config.hidden_stages)
        sTag = smem.allocate_tensor(Uint64, cute.make_layout(1), byte_alignment=8)
        sW = smem.allocate_tensor(BFloat16, w_layout.outer, byte_alignment=1024, swizzle=w_layout.inner)
        if const_expr(config.copies_rows):
            sX = smem.allocate_tensor(BFloat16, x_layout, byte_alignment=1024)
        else:
            sX = smem.allocate_tensor(BFloat16, x_layout.outer, byte_alignment=1024, swizzle=x_layout.inner)
        sums, pitch = config.slices_per_block * QUARTERS, config.partial_pitch
        partial_layout = cute.make_layout(
            (sums, config.partial_rows, config.expert_tile), stride=(config.partial_rows * pitch, pitch, 1)
        )
        if config.partials_share_operands:
            # Over sW, sX and, where those are too small, what is allocated here right behind them.
            if config.partial_bytes > config.operand_bytes:
                smem.allocate_array(Uint8, config.partial_bytes - config.operand_bytes)
            unswizzled = cute.recast_ptr(sW.iterator, cute.make_swizzle(0, 4, 3), dtype=Float32)
            sPartial = cute.make_tensor(unswizzled, partial_layout)
        else:
            sPartial = smem.allocate_tensor(Float32, partial_layout, byte_alignment=16)
        selection = Selection(
            smem.allocate_tensor(Float32, cute.make_layout((2, threads), stride=(threads, 1)), byte_alignment=16),
            smem.allocate_tensor(Float32, cute.make_layout(threads), byte_alignment=16),
            smem.allocate_tensor(Uint64, cute.make_layout(threads), byte_alignment=16),
            smem.allocate_tensor(Uint32, cute.make_layout(LANES), byte_alignment=16),
            smem.allocate_tensor(Float32, cute.make_layout(decode_config.MAX_TOP_K), byte_alignment=16),
            smem.allocate_tensor(Int32, cute.make_layout(1), byte_alignment=16),
        )
        if config.padding_bytes:
            smem.allocate_array(Uint8, config.padding_bytes)
        return Operands(sX, sW, sPartial, hidden_full, gate_full), selection, sTag

    @cute.kernel
    def kernel(
        self,
        tma_x: cute.CopyAtom | None,
        mX: cute.Tensor | None,
        tma_w: cute.CopyAtom,
        mW: cute.Tensor,
        x_layout: Any,
        w_layout: cute.ComposedLayout,
        tiled_mma: cute.TiledMma,
        correction_bias: Int64,
        weights_are_constant: Int32,
        call: Call,
    ):
        """Sets the stage; the roles are the methods below."""
        config = self.config
        operands, selection, sTag = self._allocate(x_layout, w_layout)
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        tile, part = bidx // config.num_parts, bidx % config.num_parts
        is_producer = warp_idx == MMA_WARPS
        is_usher = warp_idx == config.num_warps - 1  # the producer, if there is no other that does not multiply

        if is_producer:
            cpasync.prefetch_descriptor(tma_w)
            if const_expr(not config.copies_rows):
                cpasync.prefetch_descriptor(tma_x)
            with cute.arch.elect_one():
                for slice_idx in range_constexpr(config.slices_per_block):
                    cute.arch.mbarrier_init(operands.gate_full + slice_idx, 1)
                for stage in range_constexpr(config.hidden_stages):
                    cute.arch.mbarrier_init(operands.hidden_full + stage, 1)
                cute.arch.mbarrier_init_fence()
            cute.arch.sync_warp()  # the copies may be another lane's
            if weights_are_constant == 0:
                cute.arch.griddepcontrol_wait()
            self.load_gate(tma_w, mW, operands, tile, part)
        if weights_are_constant == 0:
            cute.arch.griddepcontrol_wait()
        bias = Float32(0.0)
        if correction_bias != 0 and tidx < config.num_experts:
            bias = cute.arch.load(gmem(Float32, correction_bias, tidx), Float32)
        if const_expr(config.copies_rows and config.covered_columns > config.hidden_size):
            self.clear_missing_columns(operands.sX, part, tidx)
        # Addresses too: after a wait every cycle counts.
        places = self.places_of(tiled_mma, operands, call, tile, part, tidx, warp_idx)
        # The first read of a parameter takes a multiprocessor some 200 cycles; here nothing waits for it.
        decode_ptx.read_here(sum((Int64(value) for value in call if not isinstance(value, Float32)), Int64(0)))
        cute.arch.sync_threads()
        if const_expr(not config.copies_rows):
            cute.arch.griddepcontrol_wait()
        elif not (config.has_usher and is_usher):
            self.wait_and_load_rows(call, operands, places, part, warp_idx)

        if is_producer:
            if const_expr(config.copies_rows):
                with cute.arch.elect_one():
                    num_bytes = call.num_tokens * self.columns_of(part) * decode_config.BF16_BYTES
                    cute.arch.mbarrier_arrive_and_expect_tx(operands.hidden_full, num_bytes)
            else:
                sX, rows = operands.sX, config.token_tile
                if const_expr(config.hidden_rows > rows):
                    sX = self.rows_of(sX, 0, rows)
                self.load_hidden(tma_x, mX, sX, operands.hidden_full, part)
        self.take_ticket(call, sTag, tidx)
        quarters = None
        if const_expr(config.warpgroup_mma):
            barriers = operands.hidden_full, operands.gate_full
            quarters = self.multiply_by_warpgroups(operands.sX, operands.sW, *barriers, warp_idx)
        else:
            self.mma(tiled_mma, operands, places, tidx, warp_idx)
        let_in = Boolean(False)
        if config.has_usher and is_usher:
            let_in = self.usher(operands)
        tag = self.publish(operands, call, places, quarters, sTag, tile, part, is_usher and not let_in, tidx, warp_idx)
        # Blocks start in their order, so as a rule those that a row needs have started before its owner.
        row = config.num_blocks - 1 - bidx
        is_late = Boolean(False)
        while row < call.num_tokens and not is_late:
            is_token = self.is_token(call, row)
            self.clear(selection, tidx)
            if row < config.num_blocks:  # the block's first one, whose packets are under way
                # A look that leaves at once is at L2 just before the last of them; the next one takes as long again.
                decode_ptx.wait_cycles(config.first_look_after_cycles)
            logit, missing = self.collect(call, row, tag, tidx)
            key = self.publish_score(selection, logit, bias, tidx)
            is_late = decode_ptx.barrier_any(config.num_threads, missing)
            if not is_late:
                self.select(call, selection, row, is_token, logit, key, tidx)
                row += config.num_blocks
        # A loop of its own, from the first late row on, so that the one above runs through no code but its own.
        parity = Int32(1)
        while row < call.num_tokens:
            is_token = self.is_token(call, row)
            self.clear(selection, tidx)
            parity = self.compute_row(tiled_mma, tma_w, mW, operands, call, selection, row, parity, tidx, warp_idx)
            logit = selection.sHalf[0, tidx] + selection.sHalf[1, tidx]
            key = self.publish_score(selection, logit, bias, tidx)
            cute.arch.sync_threads()
            self.select(call, selection, row, is_token, logit, key, tidx)
            row += config.num_blocks

    @cute.jit
    def usher(self, operands: Operands) -> Boolean:
        """Waits for the previous kernel; lets dependents in if the gate tile has come late, and says so.

        A tile that is late came from memory, as the next launch's will: the sooner that asks for it the better. Where
        tiles come from L2, the next launch's would only be in the way of this one's rows and packets.
        """
        cute.arch.mbarrier_wait(operands.gate_full + self.config.slices_per_block - 1, 0)
        gate_came = decode_ptx.clock()
        cute.arch.griddepcontrol_wait()
        let_in = Boolean(decode_ptx.clock() - gate_came < decode_config.LATE_GATE_CYCLES)
        if let_in:
            cute.arch.griddepcontrol_launch_dependents()
        return let_in

    @cute.jit
    def take_ticket(self, call: Call, sTag, tidx):
        """This launch's tag into shared memory, by one thread of a warp that does not multiply."""
        if tidx == MMA_WARPS * LANES:
            counter = gmem(Uint64, call.workspace, self.config.num_blocks)
            ticket = cute.arch.atomic_add(counter, Uint64(1), sem="relaxed", scope="gpu")
            sTag[0] = self.tag_of(ticket)

    def tag_of(self, ticket: Uint64) -> Uint64:
        """From the low end: the launch's epoch, from 1 up; the number of blocks, whose counter that is; %gridid."""
        epoch = ticket // self.config.num_blocks + 1
        tag = epoch & Uint64((1 << decode_config.EPOCH_BITS) - 1)
        tag = tag | Uint64(self.config.num_blocks << decode_config.EPOCH_BITS)
        shift = decode_config.EPOCH_BITS + decode_config.NUM_BLOCKS_BITS
        return tag | (Uint64(Uint32(cute.arch.gridid())) << shift)

    @cute.jit
    def load_gate(self, tma, mW, operands: Operands, tile, part):
        """Requests the block's gate tile, each slice by a copy of its own; called by one warp."""
        config = self.config
        of_slice = (config.expert_tile, CHUNK, config.chunks_per_slice)
        num_bytes = config.chunk_bytes(config.expert_tile) * config.chunks_per_slice
        with cute.arch.elect_one():
            for slice_idx in range_constexpr(config.slices_per_block):
                cute.arch.mbarrier_arrive_and_expect_tx(operands.gate_full + slice_idx, num_bytes)
        gW = cute.local_tile(mW, of_slice, (tile, 0, None))  # (experts, CHUNK, chunks, slices of K)
        sW = cute.local_tile(operands.sW, of_slice, (0, 0, None))  # (experts, CHUNK, chunks, slices of the block)
        tWsW, tWgW = cpasync.tma_partition(
            tma, 0, cute.make_layout(1), cute.group_modes(sW, 0, 3), cute.group_modes(gW, 0, 3)
        )
        for slice_idx in range_constexpr(config.slices_per_block):
            of_all = part * config.slices_per_block + slice_idx
            cute.copy(tma, tWgW[None, of_all], tWsW[None, slice_idx], tma_bar_ptr=operands.gate_full + slice_idx)

    @cute.jit
    def load_hidden(self, tma, mX, sX, barriers, part):
        """Requests the block's chunks of all rows, all at once or one after the other; called by one warp."""
        config = self.config
        rows, chunks, stages = config.token_tile, config.chunks_per_block, config.hidden_stages
        with cute.arch.elect_one():
            for stage in range_constexpr(stages):
                cute.arch.mbarrier_arrive_and_expect_tx(barriers + stage, config.chunk_bytes(rows) * chunks // stages)
        if const_expr(stages == 1):
            gX = cute.local_tile(mX, (rows, CHUNK, chunks), (0, 0, part))  # (rows, CHUNK, chunks)
            tXsX, tXgX = cpasync.tma_partition(
                tma, 0, cute.make_layout(1), cute.group_modes(sX, 0, 3), cute.group_modes(gX, 0, 3)
            )
            cute.copy(tma, tXgX, tXsX, tma_bar_ptr=barriers)
        else:
            gX = cute.local_tile(mX, (rows, CHUNK), (0, None))  # (rows, CHUNK, H / CHUNK)
            tXsX, tXgX = cpasync.tma_partition(
                tma, 0, cute.make_layout(1), cute.group_modes(sX, 0, 2), cute.group_modes(gX, 0, 2)
            )
            for stage in range_constexpr(stages):
                chunk = config.steps[stage]
                cute.copy(tma, tXgX[None, part * chunks + chunk], tXsX[None, chunk], tma_bar_ptr=barriers + stage)

    def columns_of(self, part) -> Int32:
        """Columns of the hidden states that a block has, at least one; those past H are not counted."""
        config = self.config
        columns = Int32(config.chunks_per_block * CHUNK)
        if const_expr(config.covered_columns > config.hidden_size):
            columns = cutlass.min(columns, config.hidden_size - part * columns)
        return columns

    @cute.jit
    def wait_and_load_rows(self, call: Call, operands: Operands, places: Places, part, warp_idx):
        """Waits, and requests the block's columns of row r by a copy of its own, by warp r: one that multiplies.

        With few rows they are there sooner than by tensor copies. The producer tells the barrier how much will come.
        """
        num_bytes = self.columns_of(part) * decode_config.BF16_BYTES
        has_row = warp_idx < call.num_tokens
        decode_ptx.wait_and_copy_row(places.row, places.row_source, num_bytes, operands.hidden_full, has_row)

    def places_of(self, tiled_mma, operands: Operands, call: Call, tile, part, tidx, warp_idx) -> Places:
        """The thread's. ``opaque``, for the compiler would compute each where it is first used."""
        config = self.config
        lane = tidx % LANES
        if config.warpgroup_mma:
            row_of_packet, pair = self.first_packet(warp_idx, lane)
            packet = self.packet_address(call, row_of_packet, part, tile * (config.expert_tile // 2) + pair)
            return Places(None, None, None, None, None, decode_ptx.opaque(packet))
        slice_idx, quarter, first_m = self._cell(warp_idx)
        first = slice_idx * config.chunks_per_slice
        tCsW = self._gate_copy(tiled_mma, lane).partition_S(operands.sW)
        gate = self._pointer(swizzled(tCsW[None, 0, quarter, first].iterator.toint()), 16)
        sX, row, row_source = operands.sX, None, None
        if config.copies_rows:
            place = sX.layout((lane // 4, quarter * MMA_K + 2 * (lane % 4), first))
            hidden = self._pointer((sX.iterator + place).toint(), 4)
            row = self._pointer((sX.iterator + sX.layout((warp_idx, 0, 0))).toint(), 16)
            offset = Int64(warp_idx) * call.hidden_stride + part * (config.chunks_per_block * CHUNK)
            row_source = decode_ptx.opaque(call.hidden_states + offset * decode_config.BF16_BYTES)
        else:
            tCsX = self._hidden_copy(tiled_mma, lane).partition_S(sX)
            hidden = self._pointer(swizzled(tCsX[None, first_m, quarter, first].iterator.toint()), 16)
        sums, packet = self.places_of_item(operands.sPartial, call, tile, part, tidx, self.row_of_item(tidx))
        return Places(gate, hidden, row, row_source, decode_ptx.opaque(sums), decode_ptx.opaque(packet))

    def _pointer(self, address: Int32, align: int) -> cute.Pointer:
        return cute.make_ptr(BFloat16, decode_ptx.opaque(address), cute.AddressSpace.smem, assumed_align=align)

    @cute.jit
    def clear_missing_columns(self, sX, part, tidx):
        """Zeros for columns past H, which no copy of rows writes."""
        config = self.config
        columns = config.chunks_per_block * CHUNK
        missing = (part + 1) * columns - config.hidden_size  # at most 0 but in the last part: less than its columns
        for item in cutlass.range(tidx, missing * config.token_tile, config.num_threads, unroll=1):
            row, column = item % config.token_tile, columns - 1 - item // config.token_tile
            sX[row, column % CHUNK, column // CHUNK] = BFloat16(0.0)

    def _cell(self, warp_idx: Int32) -> tuple[Any, Int32, Any]:
        """What a warp that multiplies has: slice of the block, quarter of its chunks, first row tile."""
        quarter, group = warp_idx % QUARTERS, warp_idx // QUARTERS
        if self.config.slices_per_block == 2:
            return group, quarter, 0
        return 0, quarter, group * self.config.warp_m_tiles

    @cute.jit
    def mma(self, tiled_mma, operands: Operands, places: Places, tidx, warp_idx):
        """All rows times the block's experts; the warp's sums of quarters into sPartial."""
        config = self.config
        lane = tidx % LANES
        slice_idx, quarter, first_m = self._cell(warp_idx)
        acc_shape = tiled_mma.partition_shape_C((MMA_M, config.expert_tile))
        acc = [cute.make_rmem_tensor(acc_shape, Float32) for _ in range(config.warp_m_tiles)]  # each (MMA, 1, n8 tiles)
        for a in acc:
            a.fill(0.0)
        if warp_idx < MMA_WARPS:
            self.multiply(tiled_mma, operands, places, acc, slice_idx, lane)
        if const_expr(config.partials_share_operands):
            cute.arch.sync_threads()  # every warp has read the operands
        if warp_idx < MMA_WARPS:
            for m in range_constexpr(config.warp_m_tiles):
                first_row = (first_m + m) * MMA_M
                self.store_partials(acc[m], operands.sPartial, slice_idx * QUARTERS + quarter, first_row, lane)

    @cute.jit
    def multiply(self, tiled_mma, operands: Operands, places: Places, acc, slice_idx, lane):
        """A warp's rows times its experts over a quarter of its slice."""
        config = self.config
        steps, m_tiles = config.chunks_per_slice, config.warp_m_tiles
        w_shape = tiled_mma.partition_shape_B((config.expert_tile, MMA_K))
        tCrW = [tiled_mma.make_fragment_B(w_shape) for _ in range(config.gate_fragments)]  # each (MMA, n8 tiles, 1)
        x_shape = tiled_mma.partition_shape_A((MMA_M, MMA_K))
        tCrX = [tiled_mma.make_fragment_A(x_shape) for _ in range(config.hidden_fragments)]  # each (MMA, 1, 1)
        units = [(i, m) for i in range(steps) for m in range(m_tiles)]
        # Unless caches are cold the gate weight is there long before. Fragments of both are loaded some products ahead.
        cute.arch.mbarrier_wait(operands.gate_full + slice_idx, 0)
        for i in range_constexpr(min(config.gate_fragments, steps)):
            self.load_gate_fragment(tiled_mma, operands.sW, places, tCrW[i], i, lane)
        for u in range_constexpr(-config.hidden_fragments, len(units)):
            if const_expr(u >= 0):
                i, m = units[u]
                x, w = tCrX[u % config.hidden_fragments], tCrW[i % config.gate_fragments]
                cute.gemm(tiled_mma, acc[m], x[None, None, 0], w[None, None, 0], acc[m])
                i += config.gate_fragments
                if const_expr(m == m_tiles - 1 and i < steps):
                    self.load_gate_fragment(tiled_mma, operands.sW, places, w, i, lane)
            u += config.hidden_fragments
            if const_expr(u < len(units)):
                i, m = units[u]
                if const_expr(m == 0 and (i == 0 or config.hidden_stages > 1)):
                    stage = 0 if const_expr(config.hidden_stages == 1) else i * config.slices_per_block + slice_idx
                    cute.arch.mbarrier_wait(operands.hidden_full + stage, 0)
                x = tCrX[u % config.hidden_fragments]
                self.load_hidden_fragment(tiled_mma, operands.sX, places, x, m, i, lane)

    def _gate_copy(self, tiled_mma, lane):
        matrices = 4 if self.config.expert_tile % (2 * MMA_N) == 0 else 2  # 8 experts and 8 columns each
        ldmatrix = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, matrices), BFloat16)
        return cute.make_tiled_copy_B(ldmatrix, tiled_mma).get_slice(lane)

    def _hidden_copy(self, tiled_mma, lane):
        ldmatrix = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), BFloat16)
        return cute.make_tiled_copy_A(ldmatrix, tiled_mma).get_slice(lane)

    def load_gate_fragment(self, tiled_mma, sW, places: Places, tCrW, step: int, lane) -> None:
        """16 columns of the block's experts as the B operand; ``step`` counts the chunks of the warp's slice."""
        copy_w = self._gate_copy(tiled_mma, lane)
        layout = copy_w.partition_S(sW)[None, 0, 0, 0].layout  # (CPY)
        start = places.gate + step * self.config.expert_tile * CHUNK
        cute.copy(copy_w, cute.make_tensor(start, layout), copy_w.retile(tCrW)[None, 0, 0])

    def load_hidden_fragment(self, tiled_mma, sX, places: Places, tCrX, m: int, step: int, lane) -> None:
        """16 rows, the warp's m-th, and 16 columns as the A operand; of 8 rows, the others are zeros."""
        if self.config.token_tile >= MMA_M:
            copy_x = self._hidden_copy(tiled_mma, lane)
            layout = copy_x.partition_S(sX)[None, 0, 0, 0].layout  # (CPY)
            start = places.hidden + (step * self.config.token_tile + m * MMA_M) * CHUNK
            cute.copy(copy_x, cute.make_tensor(start, layout), copy_x.retile(tCrX)[None, 0, 0])
        else:
            words = cute.recast_tensor(tCrX, Uint32)  # (row 0 | row 8) x (k 0 | k 8)
            for k in range(2):
                pair = cute.recast_tensor(wide(places.hidden + (step * CHUNK + 8 * k), 2), Uint32)
                words[2 * k] = pair[0]
                words[2 * k + 1] = Uint32(0)

    @cute.jit
    def store_partials(self, acc, sPartial, place, first_row, lane):
        """Lane l of an m16n8 accumulator holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and one more."""
        config = self.config
        for n in range_constexpr(config.expert_tile // MMA_N):
            for half in range_constexpr(min(2, config.token_tile // 8)):
                row = first_row + half * 8 + lane // 4
                column = n * MMA_N + 2 * (lane % 4)
                pair = cute.make_rmem_tensor(2, Float32)
                pair[0] = acc[(0, half), 0, n]
                pair[1] = acc[(1, half), 0, n]
                cute.autovec_copy(pair, pair_at(sPartial, (place, row, column)))

    @cute.jit
    def add_partials(self, sPartial, first):
        """The block's sums of two neighbouring experts: ``(q0 + q1) + (q2 + q3)`` of a slice, then its slices."""
        sums = []
        for s in range_constexpr(self.config.slices_per_block):
            q = [cute.make_rmem_tensor(2, Float32) for _ in range(QUARTERS)]
            for quarter in range_constexpr(QUARTERS):
                place = s * QUARTERS + quarter
                there = wide(sPartial.iterator + (first + sPartial.layout((place, 0, 0))), 2)
                cute.autovec_copy(there, q[quarter])
            sums.append([(q[0][v] + q[1][v]) + (q[2][v] + q[3][v]) for v in range(2)])
        if const_expr(self.config.slices_per_block == 2):
            return sums[0][0] + sums[1][0], sums[0][1] + sums[1][1]
        return sums[0][0], sums[0][1]

    def packet_address(self, call: Call, row: Int32, part: Int32, pair: Int32) -> Int64:
        """Packets lie as [row][part of K][pair of experts]."""
        packet = row * self.config.packets_per_row + part * self.config.packets_per_part + pair
        return call.workspace + decode_config.HEADER_BYTES + Int64(packet) * decode_config.PACKET_BYTES

    @cute.jit
    def publish(
        self, operands: Operands, call: Call, places: Places, quarters, sTag, tile, part, lets_in, tidx, warp_idx
    ):
        """Stores the block's sums as packets of this launch, whose tag it returns, and lets dependents in.

        ``quarters`` is of warpgroups; ``lets_in`` is of one warp, for with few rows the others store packets meanwhile.
        """
        config = self.config
        cute.arch.sync_threads()  # all sums and the tag are there
        if config.lets_dependents_in_early and lets_in:
            cute.arch.griddepcontrol_launch_dependents()
        tag = sTag[0]
        if const_expr(config.warpgroup_mma):
            self.store_sums(quarters, places.packet, call.num_tokens, tag, tidx, warp_idx)
        else:
            self.epilogue(operands.sPartial, call, places, tile, part, tag, tidx)
        if const_expr(not config.lets_dependents_in_early):
            cute.arch.griddepcontrol_launch_dependents()
        return tag

    def row_of_item(self, item: Int32) -> Int32:
        """Whose sums the block's packet of that number holds."""
        return Int32(Uint32(item) // (self.config.expert_tile // 2))

    def places_of_item(self, sPartial, call: Call, tile, part, item: Int32, row: Int32) -> tuple[Int32, Int64]:
        """Where its first sum is, from the start of ``sPartial``, and where the packet goes."""
        pairs = self.config.expert_tile // 2
        pair = item - row * pairs
        return Int32(sPartial.layout((0, row, 2 * pair))), self.packet_address(call, row, part, tile * pairs + pair)

    @cute.jit
    def epilogue(self, sPartial, call: Call, places: Places, tile, part, tag, tidx):
        """Adds the warps' sums, and stores them as packets of this launch, for the rows' owners."""
        pairs, threads = self.config.expert_tile // 2, self.config.num_threads
        for i in range_constexpr(-(-self.config.token_tile * pairs // threads)):
            item = tidx + i * threads
            row = self.row_of_item(item)
            if row < call.num_tokens:
                sums, packet = places.sums, places.packet
                if const_expr(i > 0):
                    sums, packet = self.places_of_item(sPartial, call, tile, part, item, row)
                v0, v1 = self.add_partials(sPartial, sums)
                decode_ptx.store_packet(packet, v0, v1, tag)

    @cute.jit
    def collect(self, call: Call, row, tag, tidx) -> tuple[Float32, Int32]:
        """Looks at a row's packets until all are this launch's, at most ``max_looks`` times, and adds them.

        A thread looks at half of the parts of two experts; its neighbour has the other half. Returns the logit of
        expert ``tidx``, and whether one of the thread's packets is still missing.
        """
        config = self.config
        pair, half = tidx // 2, tidx % 2
        mine, given = Float32(0.0), Float32(0.0)
        missing = Int32(0)
        if tidx < config.num_experts:
            parts = self.half_parts
            address = self.packet_address(call, row, half * parts, pair)
            stride = config.packets_per_part * decode_config.PACKET_BYTES
            # With an odd number of pairs of slices the upper half is one shorter: it looks twice at those before.
            width = 2 // config.slices_per_block
            short = config.num_parts < 2 * parts
            values = cute.make_rmem_tensor((2, parts), Float32)
            tags = cute.make_rmem_tensor(parts, Uint64)
            values.fill(0.0)
            tags.fill(0)
            missing = Int32(1)
            looks = call.max_looks
            # At all packets again if one is missing: to keep those in hand takes instructions after every look.
            while missing != 0 and looks > 0:
                for p in range_constexpr(parts):
                    place = address
                    if const_expr(short and p >= parts - width):
                        place = address - Int64(half) * (stride * width)
                    values[0, p], values[1, p], tags[p] = decode_ptx.look(place, p * stride)
                differing = [Uint32(0), Uint32(0)]  # two chains, each half as long
                for p in range_constexpr(parts):
                    differing[p % 2] = decode_ptx.or_differing(differing[p % 2], tags[p], tag)
                missing = Int32((differing[0] | differing[1]) != 0)
                looks -= 1
            sums = []
            for v in range_constexpr(2):
                two = [values[v, p] for p in range(parts)]
                if const_expr(width == 2):
                    two = [values[v, p] + values[v, p + 1] for p in range(0, parts, 2)]
                total = two[0]
                for i in range_constexpr(1, len(two)):
                    longer = total + two[i]
                    if const_expr(short and i == len(two) - 1):
                        longer = decode_ptx.select(half == 0, longer, total)
                    total = longer
                sums.append(total)
            mine = decode_ptx.select(half == 0, sums[0], sums[1])
            given = decode_ptx.select(half == 0, sums[1], sums[0])
        return mine + cute.arch.shuffle_sync_bfly(given, 1), missing

    @cute.jit
    def compute_row(
        self, tiled_mma, tma_w, mW, operands: Operands, call: Call, selection: Selection, row, parity, tidx, warp_idx
    ):
        """Every tile and slice of a row by this block alone: slow, but it waits for nobody.

        The products and their order are those of ``mma``, ``epilogue`` and ``collect``, hence the bits too; that the
        row is the first of its MMA and not row ``row % 16`` changes nothing, for rows of an MMA do not mix.

        Returns the parity of ``gate_full``'s next use.
        """
        config = self.config
        chunks = config.chunks_per_slice
        # Else the compiler would compute what both share before `mma`, and hold it in registers that `mma` needs.
        tidx, warp_idx = decode_ptx.opaque(tidx), decode_ptx.opaque(warp_idx)
        lane = tidx % LANES
        slice_idx, quarter, first_m = self._cell(warp_idx)
        multiplies = warp_idx < MMA_WARPS and first_m == 0
        copy_w = self._gate_copy(tiled_mma, lane)
        tCsW = copy_w.partition_S(operands.sW)  # (CPY, 1, QUARTERS, chunks)
        w_shape = tiled_mma.partition_shape_B((config.expert_tile, MMA_K))
        tCrW = tiled_mma.make_fragment_B(w_shape)  # (MMA, n8 tiles, 1)
        tCrX = tiled_mma.make_fragment_A(tiled_mma.partition_shape_A((MMA_M, MMA_K)))  # (MMA, 1, 1)
        acc_shape = tiled_mma.partition_shape_C((MMA_M, config.expert_tile))
        acc = cute.make_rmem_tensor(acc_shape, Float32)  # (MMA, 1, n8 tiles)
        kept = cute.make_rmem_tensor(2, Float32)
        kept.fill(0.0)
        for tile in cutlass.range(config.num_expert_tiles, unroll=1):
            for part in cutlass.range(config.num_parts, unroll=1):
                # What warps read or wrote in shared memory comes before the copy into the same place.
                cute.arch.fence_proxy("async.shared", space="cta")
                cute.arch.sync_threads()
                if warp_idx == 0:
                    self.load_gate(tma_w, mW, operands, tile, part)
                if multiplies:
                    acc.fill(0.0)
                    for i in cutlass.range(chunks, unroll=1):
                        chunk = slice_idx * chunks + i
                        self.load_row(call, tCrX, row, part * config.chunks_per_block + chunk, quarter, lane)
                        cute.arch.mbarrier_wait(operands.gate_full + slice_idx, parity)
                        cute.copy(copy_w, tCsW[None, 0, quarter, chunk], copy_w.retile(tCrW)[None, 0, 0])
                        cute.gemm(tiled_mma, acc, tCrX[None, None, 0], tCrW[None, None, 0], acc)
                if const_expr(config.partials_share_operands):
                    cute.arch.sync_threads()  # every warp has read the gate tile
                if multiplies:
                    self.store_partials(acc, operands.sPartial, slice_idx * QUARTERS + quarter, 0, lane)
                parity = 1 - parity
                cute.arch.sync_threads()
                if tidx < config.expert_tile // 2:
                    self.add_part(operands.sPartial, kept, selection, tile, part, tidx)
        cute.arch.sync_threads()
        return parity

    @cute.jit
    def add_part(self, sPartial, kept, selection: Selection, tile, part, pair):
        """A part's sums into the row's, as ``collect`` adds them; ``kept`` holds the first of two slices."""
        config = self.config
        sums = self.add_partials(sPartial, sPartial.layout((0, 0, 2 * pair)))
        half = Int32(part >= self.half_parts)
        for v in range_constexpr(2):
            two = sums[v]
            if const_expr(config.slices_per_block == 1):
                two = kept[v] + sums[v]
                kept[v] = sums[v]
            if const_expr(config.slices_per_block == 2) or part % 2 == 1:
                expert = tile * config.expert_tile + 2 * pair + v
                if part - half * self.half_parts >= 2 // config.slices_per_block:
                    two = selection.sHalf[half, expert] + two
                selection.sHalf[half, expert] = two

    @cute.jit
    def load_row(self, call: Call, tCrX, row, chunk, quarter, lane):
        """The A fragment that holds one row, as its first, and zeros; ``chunk`` counts from the start of the row."""
        words = cute.recast_tensor(tCrX, Uint32)  # (row 0 | row 8) x (k 0 | k 8)
        column = chunk * CHUNK + quarter * MMA_K + 2 * (lane % 4)
        address = call.hidden_states + (Int64(row) * call.hidden_stride + column) * 2
        inside = lane < 4 and column < self.config.hidden_size
        for k in range_constexpr(2):
            value = Uint32(0)
            if inside:
                value = cute.arch.load(gmem(Uint32, address + 16 * k), Uint32, cop="cg")
            words[2 * k] = value
            words[2 * k + 1] = Uint32(0)
