# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""The one-launch decode kernel in CuTe DSL: hidden states and gate weight in, expert ids and weights out."""

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint8, Uint32, Uint64, const_expr, range_constexpr
from cutlass.cute.nvgpu import cpasync, warp, warpgroup

from dsv4_router import decode_config
from dsv4_router.decode_config import CHUNK, LANES, MMA_K, MMA_M, MMA_N, QUARTERS, WARP_N, DecodeConfig
from dsv4_router.kernels import decode_ptx

BARRIER_WORKERS = 1  # named barrier of the worker warps; barrier 0 is the whole block's


def _gmem(dtype: Any, address: Int64, offset: Any = 0) -> cute.Pointer:
    return cute.make_ptr(
        dtype, address + Int64(offset) * (dtype.width // 8), cute.AddressSpace.gmem, assumed_align=dtype.width // 8
    )


def _pair_at(tensor: cute.Tensor, coordinate: Any) -> cute.Tensor:
    """Two neighbouring floats as one 8-byte access."""
    return cute.make_tensor((tensor.iterator + tensor.layout(coordinate)).align(8), cute.make_layout(2))


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


class Operands(NamedTuple):
    """Shared memory of the product, and the barriers of its copies."""

    sX: cute.Tensor  # (token_tile, CHUNK, chunks) bf16, swizzled
    sW: cute.Tensor  # (expert_tile, CHUNK, chunks) bf16, swizzled
    sPartial: cute.Tensor  # (QUARTERS, token_tile, expert_tile) fp32
    hidden_full: cute.Pointer  # one mbarrier a chunk
    gate_full: cute.Pointer


class Selection(NamedTuple):
    """Shared memory of a row's selection."""

    sHalf: cute.Tensor  # (2, workers) fp32, sums of the lower and of the upper slices
    sScore: cute.Tensor  # (workers,) fp32
    sKey: cute.Tensor  # (workers,) uint32
    sCandidate: cute.Tensor  # (groups * k,) uint64: key, then the complement of the id
    sBestScore: cute.Tensor  # (MAX_TOP_K,) fp32
    sBestId: cute.Tensor  # (MAX_TOP_K,) int32


class DenseRouterDecodeKernel:
    """Steps 1 to 6 of dense routing for up to ``token_tile`` rows, in one launch.

    A block multiplies all rows with ``expert_tile`` experts over one slice of K, and publishes the sums through global
    memory as packets of two sums and a tag. Row r belongs to block ``num_blocks - 1 - r`` (and every num_blocks-th),
    which adds the row's slices in their order and selects.

    Roles of a block's warps::

        producer (1 warp)        worker warps (QUARTERS x expert_tile / 16)
        init mbarriers
        copy the gate tile       load the bias
        ---------------- barrier 0: mbarriers are initialised ----------------
        ------- griddepcontrol.wait: the previous kernel has completed -------
        copy the hidden states   thread 0: take a ticket
                                 mma: wait gate_full[c], hidden_full[c]; ldmatrix; mma.sync
                                 partial sums to shared memory
                                 -------- barrier 1 --------
                                 publish: add the quarters, store packets
                                 griddepcontrol.launch_dependents
                                 each own row:
                                   collect: look at its packets        -- barrier 1 (with "any missing?")
                                   compute_row, only if some stay away
                                   select                              -- barrier 1, three times

    Barriers: ``gate_full[c]`` and ``hidden_full[c]`` are mbarriers with one arrival, the producer's
    ``arrive.expect_tx``, and complete when chunk c's bytes have landed. In ``compute_row`` worker warp 0 is the
    producer of ``gate_full``, whose parity alternates from 1. Barrier 1 counts every worker thread.

    Hand-off between blocks: a packet is {sum, sum, tag}, stored and read by single 128-bit accesses, relaxed, at gpu
    scope. It carries all that its reader uses, so no other memory is ordered by it. The tag is the launch's epoch (44
    bits), its number of blocks and the low bits of ``%gridid``. Epochs come from tickets: every block adds 1 to the
    workspace's counter for that number of blocks after the wait on the previous kernel, and ``ticket / num_blocks`` is
    the same for the blocks of a launch because each took one. So the counter needs no reset, and a packet that an
    earlier launch left behind has another tag.

    Forward progress: an owner looks at most ``max_looks`` times, then computes its row alone (``compute_row``): the
    same products in the same order, hence the same bits. No wait depends on another block being scheduled.

    Dependent launch: before ``griddepcontrol.wait`` only the gate weight and the bias are read (or nothing, if
    ``weights_are_constant`` is 0), and nothing is written. The next kernel may be scheduled once a worker warp of every
    block has stored its packets; if it was launched with the attribute it waits for this grid's completion itself
    before it may touch anything, the workspace included.
    """

    def __init__(self, config: DecodeConfig) -> None:
        self.config = config
        self.half_slices = -(-config.num_slices // 2)
        self.num_candidates = config.num_expert_groups * config.top_k

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
        mX = self._matrix(hidden_states, num_tokens, hidden_stride)  # (N, H)
        mW = self._matrix(gate_weight, config.num_experts, gate_stride)  # (E, H)
        x_layout = self._operand_layout(config.token_tile)
        w_layout = self._operand_layout(config.expert_tile)
        copy = cpasync.CopyBulkTensorTileG2SOp()
        x_tile, w_tile = (config.token_tile, CHUNK), (config.expert_tile, CHUNK)
        tma_x, tma_mX = cpasync.make_tiled_tma_atom(copy, mX, cute.select(x_layout, mode=[0, 1]), x_tile)
        tma_w, tma_mW = cpasync.make_tiled_tma_atom(copy, mW, cute.select(w_layout, mode=[0, 1]), w_tile)
        tiled_mma = cute.make_tiled_mma(
            warp.MmaF16BF16Op(BFloat16, Float32, (MMA_M, MMA_N, MMA_K)),
            cute.make_layout((1, 1, 1)),
            permutation_mnk=(MMA_M, WARP_N, MMA_K),
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

    def _matrix(self, address: Int64, rows: Any, stride: Int64) -> cute.Tensor:
        pointer = cute.make_ptr(BFloat16, address, cute.AddressSpace.gmem, assumed_align=16)
        layout = cute.make_layout((rows, self.config.hidden_size), stride=(cute.assume(stride, divby=8), 1))
        return cute.make_tensor(pointer, layout)

    def _operand_layout(self, rows: int) -> Any:
        """(rows, CHUNK, chunks): rows of 128 bytes, swizzled so that ldmatrix reads without bank conflicts."""
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, BFloat16)
        return cute.tile_to_shape(atom, (rows, CHUNK, self.config.chunks_per_slice), order=(0, 1, 2))

    def _allocate(self, x_layout: Any, w_layout: Any) -> tuple[Operands, Selection, cute.Tensor]:
        config = self.config
        workers = config.num_worker_threads
        smem = cutlass.memory.SmemAllocator()
        gate_full = smem.allocate_array(Int64, config.chunks_per_slice)
        hidden_full = smem.allocate_array(Int64, config.chunks_per_slice)
        sTicket = smem.allocate_tensor(Uint64, cute.make_layout(1), byte_alignment=8)
        sW = smem.allocate_tensor(BFloat16, w_layout.outer, byte_alignment=1024, swizzle=w_layout.inner)
        sX = smem.allocate_tensor(BFloat16, x_layout.outer, byte_alignment=1024, swizzle=x_layout.inner)
        pitch = config.partial_pitch
        partial_layout = cute.make_layout(
            (QUARTERS, config.token_tile, config.expert_tile), stride=(config.token_tile * pitch, pitch, 1)
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
            smem.allocate_tensor(Float32, cute.make_layout((2, workers), stride=(workers, 1)), byte_alignment=16),
            smem.allocate_tensor(Float32, cute.make_layout(workers), byte_alignment=16),
            smem.allocate_tensor(Uint32, cute.make_layout(workers), byte_alignment=16),
            smem.allocate_tensor(Uint64, cute.make_layout(self.num_candidates), byte_alignment=16),
            smem.allocate_tensor(Float32, cute.make_layout(decode_config.MAX_TOP_K), byte_alignment=16),
            smem.allocate_tensor(Int32, cute.make_layout(decode_config.MAX_TOP_K), byte_alignment=16),
        )
        return Operands(sX, sW, sPartial, hidden_full, gate_full), selection, sTicket

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
        correction_bias: Int64,
        weights_are_constant: Int32,
        call: Call,
    ):
        """Sets the stage; the roles are the methods below."""
        config = self.config
        operands, selection, sTicket = self._allocate(x_layout, w_layout)
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        tile, slice_idx = bidx // config.num_slices, bidx % config.num_slices
        is_producer = warp_idx == config.num_worker_warps

        if is_producer:
            cpasync.prefetch_descriptor(tma_w)
            cpasync.prefetch_descriptor(tma_x)
            with cute.arch.elect_one():
                for chunk in range_constexpr(config.chunks_per_slice):
                    cute.arch.mbarrier_init(operands.gate_full + chunk, 1)
                    cute.arch.mbarrier_init(operands.hidden_full + chunk, 1)
                cute.arch.mbarrier_init_fence()
            cute.arch.sync_warp()  # the copies may be another lane's
            if weights_are_constant == 0:
                cute.arch.griddepcontrol_wait()
            self.load(tma_w, mW, operands.sW, operands.gate_full, tile, slice_idx, config.expert_tile)
        if weights_are_constant == 0:
            cute.arch.griddepcontrol_wait()
        bias = Float32(0.0)
        if correction_bias != 0 and tidx < config.num_experts:
            bias = cute.arch.load(_gmem(Float32, correction_bias, tidx), Float32)
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_wait()

        if is_producer:
            self.load(tma_x, mX, operands.sX, operands.hidden_full, Int32(0), slice_idx, config.token_tile)
        else:
            if tidx == 0:
                counter = _gmem(Uint64, call.workspace, config.num_blocks)
                sTicket[0] = cute.arch.atomic_add(counter, Uint64(1), sem="relaxed", scope="gpu")
            self.mma(tiled_mma, operands, tidx, warp_idx)
            tag = self.tag_of(sTicket[0])
            self.publish(operands.sPartial, call, tile, slice_idx, tag, tidx)
            cute.arch.griddepcontrol_launch_dependents()
            # Blocks start in their order, so as a rule those that a row needs have started before its owner.
            row = config.num_blocks - 1 - bidx
            parity = Int32(1)
            while row < call.num_tokens:
                if not self.collect(call, selection, row, tag, tidx):
                    parity = self.compute_row(
                        tiled_mma, tma_w, mW, operands, call, selection, row, parity, tidx, warp_idx
                    )
                self.select(call, selection, row, bias, tidx)
                row += config.num_blocks

    def tag_of(self, ticket: Uint64) -> Uint64:
        """From the low end: the launch's epoch, from 1 up; the number of blocks, whose counter that is; %gridid."""
        epoch = ticket // self.config.num_blocks + 1
        tag = epoch & Uint64((1 << decode_config.EPOCH_BITS) - 1)
        tag = tag | Uint64(self.config.num_blocks << decode_config.EPOCH_BITS)
        shift = decode_config.EPOCH_BITS + decode_config.NUM_BLOCKS_BITS
        return tag | (Uint64(Uint32(cute.arch.gridid())) << shift)

    @cute.jit
    def load(self, tma, mT, sT, barriers, tile, slice_idx, rows: cutlass.Constexpr):
        """Requests the slice's chunks of ``rows`` rows; called by one warp."""
        config = self.config
        gT = cute.local_tile(mT, (rows, CHUNK), (tile, None))  # (rows, CHUNK, H / CHUNK)
        tTsT, tTgT = cpasync.tma_partition(
            tma, 0, cute.make_layout(1), cute.group_modes(sT, 0, 2), cute.group_modes(gT, 0, 2)
        )
        for chunk in range_constexpr(config.chunks_per_slice):
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(barriers + chunk, config.chunk_bytes(rows))
            cute.copy(
                tma,
                tTgT[None, slice_idx * config.chunks_per_slice + chunk],
                tTsT[None, chunk],
                tma_bar_ptr=barriers + chunk,
            )

    def _cell(self, warp_idx: Int32) -> tuple[Int32, Int32]:
        """A worker warp's 16 experts in the block's tile, and its quarter of every chunk."""
        n_tiles = self.config.expert_tile // WARP_N
        return warp_idx % n_tiles, warp_idx // n_tiles

    @cute.jit
    def mma(self, tiled_mma, operands: Operands, tidx, warp_idx):
        """All rows times the warp's 16 experts over its quarter of the slice; then all warps' sums are in sPartial."""
        config = self.config
        chunks, m_tiles = config.chunks_per_slice, config.token_tile // MMA_M
        lane = tidx % LANES
        n_tile, quarter = self._cell(warp_idx)
        ldmatrix = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), BFloat16)
        copy_x = cute.make_tiled_copy_A(ldmatrix, tiled_mma).get_slice(lane)
        copy_w = cute.make_tiled_copy_B(ldmatrix, tiled_mma).get_slice(lane)
        tCsX = copy_x.partition_S(operands.sX)  # (CPY, m_tiles, QUARTERS, chunks)
        tCsW = copy_w.partition_S(operands.sW)  # (CPY, expert_tile / 16, QUARTERS, chunks)
        tCrX = tiled_mma.make_fragment_A(tiled_mma.partition_shape_A((MMA_M, MMA_K)))  # (MMA, 1, 1)
        w_shape = tiled_mma.partition_shape_B((WARP_N, MMA_K))
        tCrW = [tiled_mma.make_fragment_B(w_shape) for _ in range(2)]  # each (MMA, 2, 1)
        acc_shape = tiled_mma.partition_shape_C((MMA_M, WARP_N))
        acc = [cute.make_rmem_tensor(acc_shape, Float32) for _ in range(m_tiles)]  # each (MMA, 1, 2)
        for m in range_constexpr(m_tiles):
            acc[m].fill(0.0)
        # The gate weight is there long before the hidden states, so its fragments are a chunk ahead.
        for chunk in range_constexpr(chunks):
            cute.arch.mbarrier_wait(operands.gate_full + chunk, 0)
        cute.copy(copy_w, tCsW[None, n_tile, quarter, 0], copy_w.retile(tCrW[0])[None, 0, 0])
        for chunk in range_constexpr(chunks):
            if const_expr(chunk + 1 < chunks):
                ahead = copy_w.retile(tCrW[(chunk + 1) % 2])
                cute.copy(copy_w, tCsW[None, n_tile, quarter, chunk + 1], ahead[None, 0, 0])
            cute.arch.mbarrier_wait(operands.hidden_full + chunk, 0)
            for m in range_constexpr(m_tiles):
                cute.copy(copy_x, tCsX[None, m, quarter, chunk], copy_x.retile(tCrX)[None, 0, 0])
                cute.gemm(tiled_mma, acc[m], tCrX[None, None, 0], tCrW[chunk % 2][None, None, 0], acc[m])
        if const_expr(config.partials_share_operands):
            self.sync_workers()  # every warp has read the operands
        for m in range_constexpr(m_tiles):
            self.store_partials(acc[m], operands.sPartial, m * MMA_M, n_tile, quarter, lane)
        self.sync_workers()

    def sync_workers(self) -> None:
        cute.arch.barrier(barrier_id=BARRIER_WORKERS, number_of_threads=self.config.num_worker_threads)

    @cute.jit
    def store_partials(self, acc, sPartial, first_row: cutlass.Constexpr, n_tile, quarter, lane):
        """Lane l of an m16n8 accumulator holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and one more."""
        for n in range_constexpr(WARP_N // MMA_N):
            for half in range_constexpr(2):
                row = first_row + half * 8 + lane // 4
                column = n_tile * WARP_N + n * MMA_N + 2 * (lane % 4)
                pair = cute.make_rmem_tensor(2, Float32)
                pair[0] = acc[(0, half), 0, n]
                pair[1] = acc[(1, half), 0, n]
                cute.autovec_copy(pair, _pair_at(sPartial, (quarter, row, column)))

    @cute.jit
    def add_quarters(self, sPartial, row, pair):
        """The slice's sums of two neighbouring experts, ``(q0 + q1) + (q2 + q3)``."""
        q = [cute.make_rmem_tensor(2, Float32) for _ in range(QUARTERS)]
        for quarter in range_constexpr(QUARTERS):
            cute.autovec_copy(_pair_at(sPartial, (quarter, row, 2 * pair)), q[quarter])
        return (q[0][0] + q[1][0]) + (q[2][0] + q[3][0]), (q[0][1] + q[1][1]) + (q[2][1] + q[3][1])

    def packet_address(self, call: Call, row: Int32, slice_idx: Int32, pair: Int32) -> Int64:
        """Packets lie as [row][slice][pair of experts]."""
        packet = row * self.config.packets_per_row + slice_idx * self.config.packets_per_slice + pair
        return call.workspace + decode_config.HEADER_BYTES + Int64(packet) * decode_config.PACKET_BYTES

    @cute.jit
    def publish(self, sPartial, call: Call, tile, slice_idx, tag, tidx):
        """Stores the block's sums as packets of this launch."""
        pairs = self.config.expert_tile // 2
        item = tidx
        while item < call.num_tokens * pairs:
            row, pair = item // pairs, item % pairs
            v0, v1 = self.add_quarters(sPartial, row, pair)
            decode_ptx.store_packet(self.packet_address(call, row, slice_idx, tile * pairs + pair), v0, v1, tag)
            item += self.config.num_worker_threads

    @cute.jit
    def collect(self, call: Call, selection: Selection, row, tag, tidx) -> Boolean:
        """Looks at a row's packets until all are this launch's, at most ``max_looks`` times, and adds the slices.

        A thread has two experts and half of the slices. Returns, to every worker, whether all packets were there.
        """
        config = self.config
        pairs = config.num_experts // 2
        half, pair = tidx // pairs, tidx % pairs
        missing = Int32(0)
        if tidx < config.num_experts:
            address = self.packet_address(call, row, half * self.half_slices, pair)
            stride = config.packets_per_slice * decode_config.PACKET_BYTES
            # With an odd number of slices the upper half is one shorter: it looks twice at its last but one place.
            last, odd = self.half_slices - 1, config.num_slices % 2 == 1
            values = cute.make_rmem_tensor((2, self.half_slices), Float32)
            tags = cute.make_rmem_tensor(self.half_slices, Uint64)
            values.fill(0.0)
            for s in range_constexpr(self.half_slices):
                tags[s] = ~tag
            missing = Int32(1)
            looks = call.max_looks
            while missing != 0 and looks > 0:
                missing = Int32(0)
                for s in range_constexpr(self.half_slices):
                    place = address
                    if const_expr(odd and s == last):
                        place = address - Int64(half) * stride
                    values[0, s], values[1, s], tags[s] = decode_ptx.look(
                        place, s * stride, values[0, s], values[1, s], tags[s], tag
                    )
                for s in range_constexpr(self.half_slices):
                    if tags[s] != tag:
                        missing = Int32(1)
                looks -= 1
            sums = cute.make_rmem_tensor(2, Float32)
            for v in range_constexpr(2):
                total = values[v, 0]
                for s in range_constexpr(1, self.half_slices):
                    longer = total + values[v, s]
                    if const_expr(odd and s == last):
                        longer = decode_ptx.select(half == 0, longer, total)
                    total = longer
                sums[v] = total
            cute.autovec_copy(sums, _pair_at(selection.sHalf, (half, 2 * pair)))
        return decode_ptx.barrier_any(BARRIER_WORKERS, config.num_worker_threads, missing) == 0

    @cute.jit
    def compute_row(
        self, tiled_mma, tma_w, mW, operands: Operands, call: Call, selection: Selection, row, parity, tidx, warp_idx
    ):
        """Every tile and slice of a row by this block alone: slow, but it waits for nobody.

        The products and their order are those of ``mma``, ``publish`` and ``collect``, hence the bits too; that the
        row is the first of its MMA and not row ``row % 16`` changes nothing, for rows of an MMA do not mix.

        Returns the parity of ``gate_full``'s next use.
        """
        config = self.config
        # Else the compiler would compute what both share before `mma`, and hold it in registers that `mma` needs.
        tidx, warp_idx = decode_ptx.opaque(tidx), decode_ptx.opaque(warp_idx)
        lane = tidx % LANES
        n_tile, quarter = self._cell(warp_idx)
        ldmatrix = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), BFloat16)
        copy_w = cute.make_tiled_copy_B(ldmatrix, tiled_mma).get_slice(lane)
        tCsW = copy_w.partition_S(operands.sW)  # (CPY, expert_tile / 16, QUARTERS, chunks)
        tCrW = tiled_mma.make_fragment_B(tiled_mma.partition_shape_B((WARP_N, MMA_K)))  # (MMA, 2, 1)
        tCrX = tiled_mma.make_fragment_A(tiled_mma.partition_shape_A((MMA_M, MMA_K)))  # (MMA, 1, 1)
        acc = cute.make_rmem_tensor(tiled_mma.partition_shape_C((MMA_M, WARP_N)), Float32)  # (MMA, 1, 2)
        for tile in cutlass.range(config.num_expert_tiles, unroll=1):
            for slice_idx in cutlass.range(config.num_slices, unroll=1):
                # What warps read or wrote in shared memory comes before the copy into the same place.
                cute.arch.fence_proxy("async.shared", space="cta")
                self.sync_workers()
                if warp_idx == 0:
                    self.load(tma_w, mW, operands.sW, operands.gate_full, tile, slice_idx, config.expert_tile)
                acc.fill(0.0)
                for chunk in cutlass.range(config.chunks_per_slice, unroll=1):
                    self.load_row(call, tCrX, row, slice_idx * config.chunks_per_slice + chunk, quarter, lane)
                    cute.arch.mbarrier_wait(operands.gate_full + chunk, parity)
                    cute.copy(copy_w, tCsW[None, n_tile, quarter, chunk], copy_w.retile(tCrW)[None, 0, 0])
                    cute.gemm(tiled_mma, acc, tCrX[None, None, 0], tCrW[None, None, 0], acc)
                parity = 1 - parity
                self.sync_workers()
                self.store_partials(acc, operands.sPartial, 0, n_tile, quarter, lane)
                self.sync_workers()
                if tidx < config.expert_tile // 2:
                    v0, v1 = self.add_quarters(operands.sPartial, 0, tidx)
                    half = Int32(slice_idx >= self.half_slices)
                    expert = tile * config.expert_tile + 2 * tidx
                    if slice_idx != half * self.half_slices:
                        v0 = selection.sHalf[half, expert] + v0
                        v1 = selection.sHalf[half, expert + 1] + v1
                    selection.sHalf[half, expert] = v0
                    selection.sHalf[half, expert + 1] = v1
        self.sync_workers()
        return parity

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
                value = cute.arch.load(_gmem(Uint32, address + 16 * k), Uint32, cop="cg")
            words[2 * k] = value
            words[2 * k + 1] = Uint32(0)

    @cute.jit
    def select(self, call: Call, selection: Selection, row, bias, tidx):
        """Steps 2 to 6 of a row whose half sums are in shared memory.

        Experts are ranked by counting how many are better: first within each group of 32, a warp's, then the groups'
        best k among each other. No reduction depends on another.
        """
        config = self.config
        lane, group = tidx % LANES, tidx // LANES
        logit = selection.sHalf[0, tidx] + selection.sHalf[1, tidx]
        score = decode_ptx.sqrt_softplus(logit)
        key = Uint32(0)
        if tidx < config.num_experts:
            key = decode_ptx.selection_key(decode_ptx.add(score, bias))
            if call.logits_out != 0:
                place = Int64(row) * config.num_experts + tidx
                cute.arch.store(_gmem(Float32, call.logits_out, place), logit)
        selection.sKey[tidx] = key
        selection.sScore[tidx] = score
        cute.arch.sync_warp()
        if group < config.num_expert_groups:
            others = cute.make_rmem_tensor(LANES, Uint32)
            first = selection.sKey.iterator + group * LANES
            cute.autovec_copy(cute.make_tensor(first.align(16), cute.make_layout(LANES)), others)
            rank = Int32(0)
            for i in range_constexpr(LANES):
                rank += Int32(others[i] > key or (others[i] == key and lane > i))
            if rank < config.top_k:
                # The complement of the id makes the lower id the larger of equal keys.
                selection.sCandidate[group * config.top_k + rank] = (Uint64(key) << 32) | Uint64(Uint32(-1 - tidx))
        self.sync_workers()
        if tidx < self.num_candidates:
            mine = selection.sCandidate[tidx]
            rank = Int32(0)
            two = cute.make_rmem_tensor(2, Uint64)
            for i in range_constexpr(0, self.num_candidates - 1, 2):
                pair = (selection.sCandidate.iterator + i).align(16)
                cute.autovec_copy(cute.make_tensor(pair, cute.make_layout(2)), two)
                rank += Int32(two[0] > mine) + Int32(two[1] > mine)
            if const_expr(self.num_candidates % 2 == 1):
                rank += Int32(selection.sCandidate[self.num_candidates - 1] > mine)
            if rank < config.top_k:
                expert = -1 - Int32(Uint32(mine & Uint64(0xFFFFFFFF)))
                selection.sBestId[rank] = expert
                selection.sBestScore[rank] = decode_ptx.weighable(selection.sScore[expert])
        self.sync_workers()
        if tidx < config.top_k:
            total = selection.sBestScore[0]
            for i in range_constexpr(1, config.top_k):
                total = total + selection.sBestScore[i]
            weight = decode_ptx.weight(selection.sBestScore[tidx], total, call.routed_scaling_factor)
            expert = Int64(selection.sBestId[tidx])
            if not self.is_token(call, row):
                weight = Float32(0.0)
                expert = call.padding_id
            place = Int64(row) * config.top_k + tidx
            cute.arch.store(_gmem(Float32, call.out_weights, place), weight)
            if call.ids_are_int64 != 0:
                cute.arch.store(_gmem(Int64, call.out_ids, place), expert)
            else:
                cute.arch.store(_gmem(Int32, call.out_ids, place), Int32(expert))
        if row + config.num_blocks < call.num_tokens:
            self.sync_workers()  # before the next row's sums

    @cute.jit
    def is_token(self, call: Call, row) -> Boolean:
        limit = call.num_valid_tokens_on_host
        if call.num_valid_tokens != 0:
            limit = cute.arch.load(_gmem(Int32, call.num_valid_tokens), Int32)
        valid = call.first_row + row < limit
        if valid and call.token_mask != 0:
            valid = cute.arch.load(_gmem(Uint8, call.token_mask, row), Uint8) != 0
        return valid
