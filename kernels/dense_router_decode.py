# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The one-launch decode kernel in CuTe DSL: hidden states and gate weight in, expert ids and weights out."""

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint8, Uint32, Uint64, const_expr, range_constexpr
from cutlass.cute.nvgpu import cpasync, warpgroup

from dsv4_router import decode_config
from dsv4_router.decode_config import CHUNK, LANES, MMA_WARPS, QUARTERS, DecodeConfig
from dsv4_router.kernels import decode_ptx
from dsv4_router.kernels.row_selection import Call, RowSelection, Selection, gmem
from dsv4_router.kernels.warp_product import WarpProduct, place_in_smem
from dsv4_router.kernels.warpgroup_product import WarpgroupProduct


class Operands(NamedTuple):
    """Shared memory of the product, and the barriers of its copies."""

    sX: cute.Tensor  # (hidden_rows, CHUNK, chunks) bf16, swizzled
    sRows: cute.Tensor | None  # the same memory with padded rows, which are not swizzled, if rows may come one by one
    sW: cute.Tensor  # (expert_tile, CHUNK, chunks) bf16, swizzled
    sPartial: cute.Tensor  # (slices of the block x QUARTERS, partial_rows, expert_tile) fp32
    hidden_full: cute.Pointer  # hidden_stages mbarriers
    gate_full: cute.Pointer  # slices_per_block mbarriers


class Places(NamedTuple):
    """What a thread needs right after a wait, computed before it; of warpgroups the last one alone."""

    gate: cute.Pointer | None  # in shared memory, its first fragment of the gate weight
    hidden: cute.Pointer | None  # likewise of the hidden states
    row: cute.Pointer | None  # likewise the row that its warp may request
    row_source: Int64 | None  # where that row is
    partials: Int32 | None  # where in shared memory its first sum of a quarter goes
    stores: Int32 | None  # whether it has a packet
    sums: Int32 | None  # of its first packet: where in shared memory
    packet: Int64  # where that packet goes


class DenseRouterDecodeKernel(WarpProduct, WarpgroupProduct, RowSelection):
    """Steps 1 to 6 of dense routing for up to ``token_tile`` rows, in one launch.

    A block multiplies all rows with ``expert_tile`` experts over its part of K, one or two slices, and publishes the
    sums through global memory as packets of two sums and a tag. Row r belongs to block ``num_blocks - 1 - r`` (and
    every num_blocks-th), of up to ``FIRST_BLOCKS_OWN_UP_TO`` rows to block r, which adds the row's parts in their order
    and selects.

    Roles of a block's warps::

        producer (warp MMA_WARPS)    all warps, the first MMA_WARPS of which multiply
        init mbarriers
        load_gate: the gate tile     load the bias
                                     places_of: addresses for right after the waits
        ------------------ barrier: mbarriers are initialised ------------------
        --------- griddepcontrol.wait: the previous kernel has completed ---------
        wait_and_load_tile: all rows wait_and_load_rows: row r by warp r, in place of that with the fewest rows
        take_ticket: the tag         mma: wait gate_full[s], hidden_full[i]; ldmatrix; mma.sync
        - barrier, if the partial sums share the operands' memory: all operands are read -
                                     partial sums to shared memory
        ---------------------- barrier: all sums and the tag ----------------------
                                     launch_dependents by the last one, the usher, with few rows
                                     epilogue: add the quarters, store packets
                                     griddepcontrol.launch_dependents, with more: of the first warp that has stored its
                                     packets, or has none
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
    ``LATE_GATE_CYCLES`` before the wait's end; with a tile of more than ``EARLY_DEPENDENTS_UP_TO`` rows once a warp of
    every block has stored its packets, or has none. If it was launched with the attribute it waits for this grid's
    completion itself before it may touch anything, the workspace included.
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
        x_layout = self._operand_layout(config.hidden_rows, config.chunks_per_block)
        copied = self._operand_layout(config.token_tile, config.chunks_per_block)
        tma_x, tma_mX = self._tensor_copy(hidden_states, num_tokens, hidden_stride, copied, config.hidden_stages)
        tiled_mma = self.make_tiled_mma()
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
        sRows = None
        if config.max_row_copies:
            shape, pitch = (config.hidden_rows, CHUNK, config.chunks_per_block), config.hidden_pitch
            padded = cute.make_layout(shape, stride=(pitch, 1, CHUNK))
            sRows = smem.allocate_tensor(BFloat16, padded, byte_alignment=1024)
            sX = cute.make_tensor(cute.recast_ptr(sRows.iterator, x_layout.inner, dtype=BFloat16), x_layout.outer)
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
        return Operands(sX, sRows, sW, sPartial, hidden_full, gate_full), selection, sTag

    @cute.kernel
    def kernel(
        self,
        tma_x: cute.CopyAtom,
        mX: cute.Tensor,
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
        if const_expr(config.max_row_copies > 0 and config.covered_columns > config.hidden_size):
            self.clear_missing_columns(operands.sRows, call.num_tokens, part, tidx)
        # Addresses too: after a wait every cycle counts.
        places = self.places_of(tiled_mma, operands, call, tile, part, tidx, warp_idx)
        # What of them is not in registers by now would be computed between the wait and the request of a row. And the
        # first read of a parameter takes a multiprocessor some 200 cycles; here nothing waits for it.
        needed = places if config.max_row_copies else ()
        decode_ptx.read_here(*needed, *(value for value in call if not isinstance(value, Float32)))
        self.load_hidden(tma_x, mX, operands, call, places, part, config.has_usher and is_usher, warp_idx)
        self.take_ticket(call, sTag, tidx)
        quarters = None
        if const_expr(config.warpgroup_mma):
            barriers = operands.hidden_full, operands.gate_full
            quarters = self.multiply_by_warpgroups(operands.sX, operands.sW, *barriers, warp_idx)
        else:
            self.mma(tiled_mma, operands, places, call.num_tokens, tidx, warp_idx)
        let_in = Boolean(False)
        if config.has_usher and is_usher:
            let_in = self.usher(operands)
        tag = self.publish(operands, call, places, quarters, sTag, tile, part, is_usher and not let_in, tidx, warp_idx)
        row = self.first_row_of(bidx, call.num_tokens)
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

    def first_row_of(self, bidx, num_tokens) -> Int32:
        """The first row that a block owns, if there is such a row.

        Blocks start in their order, so as a rule those that a row needs have started before one of the last. But where
        the last ones run depends on what ran before, so the first own the rows if there are hardly any: with these
        times are shorter and vary less ("Rows owned by the first blocks").
        """
        from_the_last = Int32(self.config.num_blocks - 1 - bidx)
        if not self.config.experts_are_rows:
            return from_the_last
        is_of_first = num_tokens <= decode_config.FIRST_BLOCKS_OWN_UP_TO
        return decode_ptx.select(is_of_first, bidx, from_the_last, Int32)

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
    def load_hidden(self, tma, mX, operands: Operands, call: Call, places: Places, part, is_usher, warp_idx):
        """The barrier for what the block's warps have made ready, the wait, and then at once requests for all rows.

        The usher waits for the previous kernel later.
        """
        config = self.config
        if const_expr(config.max_row_copies > 0):
            if self.comes_by_rows(call.num_tokens):
                # The barrier is in each branch, so that nothing is left to do between it and the request.
                if is_usher:
                    cute.arch.sync_threads()
                else:
                    cute.arch.sync_threads()
                    self.wait_and_load_rows(call, operands, places, part, warp_idx)
                if warp_idx == MMA_WARPS:
                    with cute.arch.elect_one():
                        num_bytes = call.num_tokens * self.columns_of(part) * decode_config.BF16_BYTES
                        cute.arch.mbarrier_arrive_and_expect_tx(operands.hidden_full, num_bytes)
            else:
                self.wait_and_load_tile(tma, mX, operands, part, is_usher, warp_idx)
        else:
            self.wait_and_load_tile(tma, mX, operands, part, is_usher, warp_idx)

    @cute.jit
    def wait_and_load_tile(self, tma, mX, operands: Operands, part, is_usher, warp_idx):
        """The barrier and the wait; the producer requests the block's chunks of all rows, at once or in turn.

        Right before its wait it tells the barriers how much will come. While that is done, the compiler has addresses
        computed, which it would compute after the wait if nothing but that came before it.
        """
        config = self.config
        rows, chunks, stages = config.token_tile, config.chunks_per_block, config.hidden_stages
        cute.arch.sync_threads()
        if warp_idx == MMA_WARPS:
            with cute.arch.elect_one():
                num_bytes = config.chunk_bytes(rows) * chunks // stages
                for stage in range_constexpr(stages):
                    cute.arch.mbarrier_arrive_and_expect_tx(operands.hidden_full + stage, num_bytes)
            cute.arch.griddepcontrol_wait()
            sX = operands.sX
            if const_expr(config.hidden_rows > rows):
                sX = self.rows_of(sX, 0, rows)
            if const_expr(stages == 1):
                gX = cute.local_tile(mX, (rows, CHUNK, chunks), (0, 0, part))  # (rows, CHUNK, chunks)
                tXsX, tXgX = cpasync.tma_partition(
                    tma, 0, cute.make_layout(1), cute.group_modes(sX, 0, 3), cute.group_modes(gX, 0, 3)
                )
                cute.copy(tma, tXgX, tXsX, tma_bar_ptr=operands.hidden_full)
            else:
                gX = cute.local_tile(mX, (rows, CHUNK), (0, None))  # (rows, CHUNK, H / CHUNK)
                tXsX, tXgX = cpasync.tma_partition(
                    tma, 0, cute.make_layout(1), cute.group_modes(sX, 0, 2), cute.group_modes(gX, 0, 2)
                )
                for stage in range_constexpr(stages):
                    chunk, barrier = config.steps[stage], operands.hidden_full + stage
                    cute.copy(tma, tXgX[None, part * chunks + chunk], tXsX[None, chunk], tma_bar_ptr=barrier)
        if not is_usher:
            cute.arch.griddepcontrol_wait()

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
            return Places(*[None] * 7, decode_ptx.opaque(packet))
        row, row_source = None, None
        if config.max_row_copies:
            sRows = operands.sRows
            row = place_in_smem((sRows.iterator + sRows.layout((warp_idx, 0, 0))).toint(), 16)
            offset = Int64(warp_idx) * call.hidden_stride + part * (config.chunks_per_block * CHUNK)
            row_source = decode_ptx.opaque(call.hidden_states + offset * decode_config.BF16_BYTES)
        row_of_packet = self.row_of_item(tidx)
        sums, packet = self.places_of_item(operands.sPartial, call, tile, part, tidx, row_of_packet)
        return Places(
            self.gate_place(tiled_mma, operands.sW, warp_idx, lane),
            self.hidden_place(tiled_mma, operands, call.num_tokens, warp_idx, lane),
            row,
            row_source,
            decode_ptx.opaque(self.partial_place(operands.sPartial, warp_idx, lane)),
            decode_ptx.opaque(Int32(row_of_packet < call.num_tokens)),
            decode_ptx.opaque(sums),
            decode_ptx.opaque(packet),
        )

    @cute.jit
    def clear_missing_columns(self, sRows, num_tokens, part, tidx):
        """Zeros for columns past H, which no copy of a row writes."""
        config = self.config
        columns, rows = config.chunks_per_block * CHUNK, config.max_row_copies
        missing = (part + 1) * columns - config.hidden_size  # at most 0 but in the last part: less than its columns
        if self.comes_by_rows(num_tokens):
            for item in cutlass.range(tidx, missing * rows, config.num_threads, unroll=1):
                row, column = item % rows, columns - 1 - item // rows
                sRows[row, column % CHUNK, column // CHUNK] = BFloat16(0.0)

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
        """Where in shared memory its first sum is, and where the packet goes."""
        pairs = self.config.expert_tile // 2
        pair = item - row * pairs
        sums = (sPartial.iterator + sPartial.layout((0, row, 2 * pair))).toint()
        return sums, self.packet_address(call, row, part, tile * pairs + pair)

    @cute.jit
    def epilogue(self, sPartial, call: Call, places: Places, tile, part, tag, tidx):
        """Adds the warps' sums, and stores them as packets of this launch, for the rows' owners."""
        pairs, threads = self.config.expert_tile // 2, self.config.num_threads
        for i in range_constexpr(-(-self.config.token_tile * pairs // threads)):
            item = tidx + i * threads
            row = self.row_of_item(item)
            stores = places.stores != 0 if const_expr(i == 0) else row < call.num_tokens
            if stores:
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
            sums = cute.make_rmem_tensor(2, Float32)  # of the half, of two experts
            sums.fill(0.0)
            missing = Int32(1)
            looks = call.max_looks
            # At all packets again if one is missing: to keep those in hand takes instructions after every look.
            while missing != 0 and looks > 0:
                packets = []
                for p in range_constexpr(parts):
                    place = address
                    if const_expr(short and p >= parts - width):
                        place = address - Int64(half) * (stride * width)
                    packets.append(decode_ptx.look(place, p * stride))
                for v in range_constexpr(2):
                    sums[v] = self.add_parts([packet[v] for packet in packets], half)
                differing = [Uint32(0), Uint32(0)]  # two chains, each half as long
                for p in range_constexpr(parts):
                    differing[p % 2] = decode_ptx.or_differing(differing[p % 2], packets[p][2], tag)
                missing = Int32((differing[0] | differing[1]) != 0)
                looks -= 1
            mine = decode_ptx.select(half == 0, sums[0], sums[1])
            given = decode_ptx.select(half == 0, sums[1], sums[0])
        return mine + cute.arch.shuffle_sync_bfly(given, 1), missing

    def add_parts(self, values: list[Float32], half) -> Float32:
        """A half's parts of a logit, as they came: pairs of slices, then from the lowest on.

        In its place, which is before it is known whether all were there: later it would take time of its own.
        """
        if self.config.slices_per_block == 1:
            values = [decode_ptx.add_here(*values[i : i + 2]) for i in range(0, len(values), 2)]
        total = values[0]
        for i, value in enumerate(values[1:], 1):
            longer = decode_ptx.add_here(total, value)
            if i == len(values) - 1 and self.config.num_parts < 2 * self.half_parts:  # the upper half is shorter
                longer = decode_ptx.select(half == 0, longer, total)
            total = longer
        return total

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
        gate = self.gate_place(tiled_mma, operands.sW, warp_idx, lane)
        partials = self.partial_place(operands.sPartial, warp_idx, lane)
        tCrW, tCrX, acc = self.gate_fragment(tiled_mma), self.hidden_fragment(tiled_mma), self.accumulator(tiled_mma)
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
                        chunk = part * config.chunks_per_block + slice_idx * chunks + i
                        self.load_row(call, tCrX, row, chunk, quarter, lane)
                        cute.arch.mbarrier_wait(operands.gate_full + slice_idx, parity)
                        self.load_gate_fragment(tiled_mma, operands.sW, gate, tCrW, i, lane)
                        self.multiply_fragments(tiled_mma, acc, tCrX, tCrW)
                if const_expr(config.partials_share_operands):
                    cute.arch.sync_threads()  # every warp has read the gate tile
                if multiplies:
                    self.store_partials(acc, operands.sPartial, partials, 0)
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
        sums = self.add_partials(sPartial, (sPartial.iterator + sPartial.layout((0, 0, 2 * pair))).toint())
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
