# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Every kernel once in each of its variants, small: what compute-sanitizer watches. Checks the results too."""

from __future__ import annotations

import sys

import torch

import dsv4_router
from dsv4_router import decode_config, reference, thresholds
from dsv4_router.arguments import Options
from dsv4_router.backends import cublas, cuda_hash, cuda_module, decode
from dsv4_router.config import RouterConfig
from dsv4_router.profiling.splits import Way, ways
from dsv4_router.testing import compare_dense, compare_hash, compare_selection, make_dense_inputs, make_hash_inputs

_SMALL = RouterConfig(1088, 132, 4, 1.0)
# Warpgroups multiply from 17 rows on.
_WIDE = RouterConfig(4160, 132, 4, 1.0)
# Token tiles of each kind: rows by copies of their own and by a tensor copy, partial sums beside the operands and over
# them, products by warps and by warpgroups, full and not. The workspaces grow, so none is used again.
DECODE = [
    *((_SMALL, rows) for rows in (3, 6)),
    (RouterConfig(4096, 256, 6, 1.5), 16),
    (_SMALL, 40),
    *((_WIDE, rows) for rows in (20, 40)),
    *((_SMALL, rows) for rows in (90, 128)),
]
MORE_ROWS = 150  # than a launch takes


def decode_calls(config: RouterConfig, num_tokens: int) -> int:
    """The decode path as users call it, with every option, with rows computed alone, and captured.

    The workspace of a capture is just as large as its launches need, so an access beyond it is seen. More rows than a
    launch takes need memory for their logits, which torch cannot give to a capture without its caching allocator.

    Returns:
        How many kernels were launched, of those that ``cuda_module.launch`` does not count.
    """
    inputs = make_dense_inputs(config, num_tokens, seed=2, device="cuda")
    logits = torch.full((num_tokens, config.num_experts), torch.nan, device="cuda")
    weights = torch.full((num_tokens, config.top_k), 9e9, device="cuda")
    ids = torch.full((num_tokens, config.top_k), -7, dtype=torch.int64, device="cuda")
    rows = torch.arange(num_tokens, device="cuda")
    valid, count = rows % 3 != 1, torch.tensor(num_tokens - 1, dtype=torch.int32, device="cuda")
    call = *inputs, config.top_k, config.routed_scaling_factor, weights, ids

    def check() -> None:
        assert compare_dense(inputs, config.top_k, config.routed_scaling_factor, weights, ids).ok
        ids.fill_(-7)

    dsv4_router.dense_router_dispatch(*call, backend="decode")
    check()
    for max_looks in (decode.MAX_LOOKS, 0):
        decode.route(call, logits, Options(weights_are_constant=False), max_looks)
        check()
    decode.route(call, None, Options(valid, count, -3))
    assert torch.equal(ids[:, 0] == -3, ~valid | (rows >= num_tokens - 1))
    torch.cuda.synchronize()
    if num_tokens > decode_config.TOKEN_TILES[-1]:
        return 4
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dsv4_router.dense_router_dispatch(*call, backend="decode")
    for _ in range(2):
        graph.replay()
        check()
    return 6


def topk_calls(generator: torch.Generator) -> None:
    """The top-k kernel in all of its forms, on rows that fill no block and of logits that are and are not aligned."""
    mask = torch.arange(37, device="cuda") % 5 != 0
    for num_experts, top_k in ((384, 6), (256, 6), (128, 3), (132, 4), (255, 8), (1024, 16), (16, 16), (1, 1)):
        logits = torch.randn(37, num_experts, generator=generator, device="cuda")
        bias = torch.randn(num_experts, generator=generator, device="cuda")
        for ids_dtype, many_rows in ((torch.int32, False), (torch.int64, False), (torch.int32, True)):
            thresholds.topk_has_many_rows = lambda num_tokens, splits, way=many_rows: way  # type: ignore[misc]
            weights = torch.full((37, top_k), 9e9, device="cuda")
            ids = torch.full((37, top_k), -7, dtype=ids_dtype, device="cuda")
            cublas.activation_topk(logits, bias, top_k, 1.5, weights, ids)
            assert compare_selection(logits, bias, top_k, 1.5, weights, ids).ok
            padding = Options(token_mask=mask, num_valid_tokens=30)
            cublas.activation_topk(logits, None, top_k, 1.5, weights, ids, options=padding)
            assert (ids[~mask] == -1).all()
            unaligned = torch.empty(logits.numel() + 1, device="cuda")[1:].view_as(logits)
            padding = Options(num_valid_tokens=30)
            unaligned.copy_(logits)
            cublas.activation_topk(unaligned, bias, top_k, 1.5, weights, ids, unaligned, padding)
            assert torch.equal(unaligned, logits)
            partial = torch.randn(2 if many_rows else 8, 37, num_experts, generator=generator, device="cuda")
            sums = torch.full((37, num_experts), torch.nan, device="cuda")
            cublas.activation_topk(partial, bias, top_k, 1.5, weights, ids, logits_out=sums)
            assert torch.allclose(sums, partial.sum(0), atol=1e-5)
            assert compare_selection(sums, bias, top_k, 1.5, weights, ids).ok


def main() -> None:
    launches = 0
    launch = cuda_module.launch

    def counted(*args: object) -> None:
        nonlocal launches
        launches += 1
        launch(*args)  # type: ignore[arg-type]

    cuda_module.launch = counted  # type: ignore[assignment]
    generator = torch.Generator(device="cuda").manual_seed(0)
    of_rows = thresholds.topk_has_many_rows
    topk_calls(generator)
    thresholds.topk_has_many_rows = of_rows
    for hidden_size, top_k, dtype in (
        (7168, 6, torch.bfloat16),
        (4096, 6, torch.bfloat16),
        (8192, 16, torch.bfloat16),
        (1001, 3, torch.bfloat16),
        (2048, 6, torch.float32),
    ):
        config = RouterConfig(hidden_size, 64, top_k, 1.5, vocab_size=200)
        integers = torch.int32 if top_k == 6 else torch.int64
        inputs = make_hash_inputs(
            config, 9, seed=1, device="cuda", dtype=dtype, token_dtype=integers, table_dtype=integers
        )
        inputs.token_ids[3] = 200
        valid = torch.arange(9, device="cuda") != 3
        for scored in (
            {},
            {"router_logits": reference.logits(inputs.hidden_states, inputs.gate_weight)},
            {"hidden_states": inputs.hidden_states, "gate_weight": inputs.gate_weight},
        ):
            for promise in (True, False):
                weights, ids = dsv4_router.hash_route(
                    inputs.token_ids,
                    inputs.hash_lut,
                    top_k,
                    ids_dtype=torch.int32 if promise else torch.int64,
                    routed_scaling_factor=1.5,
                    weights_are_constant=promise,
                    token_mask=valid,
                    num_valid_tokens=valid.sum().int() + 2,
                    **scored,
                )
                assert (ids[3] == -1).all()
                if scored:
                    keep = [0, 1, 2, 4, 5, 6, 7, 8]
                    good = inputs._replace(hidden_states=inputs.hidden_states[keep], token_ids=inputs.token_ids[keep])
                    assert compare_hash(good, top_k, 1.5, weights[keep], ids[keep]).ok
    if cuda_module.architecture(torch.cuda.get_device_capability()) in decode_config.ARCHITECTURES:
        launches += sum(decode_calls(*case) for case in DECODE)
        if decode._model(0, _SMALL.hidden_size, _SMALL.num_experts, _SMALL.top_k).many_rows:
            for way in ways((0, -1)):  # by small and by large tiles of experts
                decode.fastest = way.choose  # type: ignore[assignment]
                cublas.remembered.clear()  # which holds choices
                launches += decode_calls(_SMALL, MORE_ROWS)
            # The last 22 rows by another launch of the decode kernel.
            decode.fastest = Way(0, "halves", MORE_ROWS - 128).choose  # type: ignore[assignment]
            cublas.remembered.clear()
            launches += 2 * decode_calls(_SMALL, MORE_ROWS)
    torch.cuda.synchronize()
    print(f"{launches} kernels launched")


def read_past_the_table() -> None:
    """A kernel told of more rows than the table has: what memcheck must not miss."""
    token_ids = torch.tensor([100], device="cuda")
    hash_lut = torch.zeros(100, 6, dtype=torch.int64, device="cuda")
    weights, ids = torch.empty(1, 6, device="cuda"), torch.empty(1, 6, dtype=torch.int32, device="cuda")
    spec = cuda_hash.table_spec("hash_gather", 6, token_ids.dtype, hash_lut.dtype, ids.dtype)
    addresses = token_ids.data_ptr(), hash_lut.data_ptr()
    outputs = weights.data_ptr(), ids.data_ptr()
    cuda_module.launch(cuda_module.load(spec, 0), 0, 1, 256, False, *addresses, 101, 0, 0, 1, 1, 1.0, -1, *outputs)
    torch.cuda.synchronize()


if __name__ == "__main__":
    if sys.argv[1:] == ["read-past-the-table"]:
        read_past_the_table()
    else:
        main()
