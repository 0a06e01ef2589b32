# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Every argument of every public function, wrong in every way: the error names it, and nothing is written."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dsv4_router
from dsv4_router import V4_FLASH, BackendUnavailableError, RouterConfig
from dsv4_router.arguments import DenseOperands, Options, check_memory, pieces_of
from dsv4_router.backends import decode
from dsv4_router.settings import CACHE_DIR_VARIABLE

N, H, E, K, VOCABULARY = 5, 64, 16, 3, 40
POISON_WEIGHT, POISON_ID = 9e9, -7
META = torch.device("meta")
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A wrong value of ``argument``; ``also`` changes other arguments so that only this one is to blame."""

    argument: str
    name: str
    value: Callable[[], Any]
    error: type[Exception]
    also: Callable[[], Arguments] = dict
    words: tuple[str, ...] = ()


def wrong(
    argument: str,
    name: str,
    value: Any,
    error: type[Exception],
    *words: str,
    also: Callable[[], Arguments] = dict,
) -> Case:
    """A case; a callable value is called for each use."""
    return Case(argument, name, value if callable(value) else lambda: value, error, also, words)


# ---- valid arguments


def outputs() -> Arguments:
    return {"out_weights": torch.full((N, K), POISON_WEIGHT), "out_ids": torch.full((N, K), POISON_ID).int()}


def padding() -> Arguments:
    return {"token_mask": torch.ones(N, dtype=torch.bool), "num_valid_tokens": N, "padding_id": -1}


def launch() -> Arguments:
    return {"launch_with_pdl": True, "weights_are_constant": True}


def dense_arguments() -> Arguments:
    return {
        "hidden_states": torch.ones(N, H),
        "gate_weight": torch.ones(E, H),
        "correction_bias": torch.zeros(E),
        "top_k": K,
        "routed_scaling_factor": 1.5,
        "backend": "auto",
        "batch_invariant": False,
        "logits_out": torch.full((N, E), POISON_WEIGHT),
        **padding(),
        **launch(),
    }


def hash_arguments() -> Arguments:
    return {
        "token_ids": torch.arange(N),
        "hash_lut": torch.zeros(VOCABULARY, K, dtype=torch.int64),
        "top_k": K,
        "hidden_states": torch.ones(N, H),
        "gate_weight": torch.ones(E, H),
        "router_logits": None,
        "routed_scaling_factor": 1.5,
        **padding(),
        **launch(),
    }


def ready_logits() -> Arguments:
    return {"hidden_states": None, "gate_weight": None}


def config_arguments() -> Arguments:
    return {
        "hidden_size": H,
        "num_experts": E,
        "top_k": K,
        "routed_scaling_factor": 1.5,
        "num_layers": 4,
        "num_hash_layers": 2,
        "vocab_size": VOCABULARY,
    }


def explain_arguments() -> Arguments:
    numbers = {"config": V4_FLASH, "num_tokens": 3, "device": "cpu", "dtype": torch.bfloat16}
    return {**numbers, "backend": "auto", "batch_invariant": False}


VALID: dict[str, Callable[[], Arguments]] = {
    "dense_router_dispatch": lambda: {**dense_arguments(), **outputs()},
    "hash_router_dispatch": lambda: {**hash_arguments(), **outputs()},
    "dense_route": lambda: {**dense_arguments(), "ids_dtype": torch.int64},
    "hash_route": lambda: {**hash_arguments(), "ids_dtype": torch.int64},
    "explain": explain_arguments,
    "compile_ahead": lambda: {"config": V4_FLASH, "architecture": "sm_90a"},
    "warmup": lambda: {"config": V4_FLASH, "device": "cpu"},
    "RouterConfig": config_arguments,
}


# ---- wrong ones


def not_integers(argument: str, also: Callable[[], Arguments] = dict) -> list[Case]:
    return [
        wrong(argument, "None", None, TypeError, also=also),
        wrong(argument, "bool", True, TypeError, also=also),
        wrong(argument, "float", 3.0, TypeError, also=also),
        wrong(argument, "str", "3", TypeError, also=also),
        wrong(argument, "tensor", lambda: torch.tensor(3), TypeError, also=also),
        wrong(argument, "tensor-of-2", lambda: torch.tensor([3, 4]), TypeError, also=also),
    ]


def top_k_cases(also: Callable[[], Arguments] = dict) -> list[Case]:
    return [
        *not_integers("top_k", also),
        wrong("top_k", "0", 0, ValueError, also=also),
        wrong("top_k", "negative", -1, ValueError, also=also),
        wrong("top_k", "17", 17, ValueError, "16", also=also),
        wrong("top_k", "huge", 10**30, ValueError, also=also),
    ]


SCALING_CASES = [
    wrong("routed_scaling_factor", "None", None, TypeError),
    wrong("routed_scaling_factor", "str", "1.5", TypeError),
    wrong("routed_scaling_factor", "bool", True, TypeError),
    wrong("routed_scaling_factor", "complex", 1j, TypeError),
    wrong("routed_scaling_factor", "tensor", lambda: torch.tensor(1.5), TypeError),
    wrong("routed_scaling_factor", "nan", math.nan, ValueError),
    wrong("routed_scaling_factor", "+inf", math.inf, ValueError),
    wrong("routed_scaling_factor", "-inf", -math.inf, ValueError),
    wrong("routed_scaling_factor", "int-beyond-floats", 10**400, ValueError),
]


def flag_cases(argument: str) -> list[Case]:
    return [
        wrong(argument, "None", None, TypeError),
        wrong(argument, "1", 1, TypeError),
        wrong(argument, "str", "yes", TypeError),
        wrong(argument, "tensor", lambda: torch.tensor(True), TypeError),
    ]


LAUNCH_CASES = [*flag_cases("launch_with_pdl"), *flag_cases("weights_are_constant")]
BACKEND_CASES = [
    wrong("backend", "unknown", "triton", ValueError, "'auto'", "'decode'", "'cublas'", "'reference'"),
    wrong("backend", "empty", "", ValueError),
    wrong("backend", "case", "Auto", ValueError),
    wrong("backend", "None", None, TypeError),
    wrong("backend", "bytes", b"auto", TypeError),
    wrong("backend", "list", lambda: ["auto"], TypeError),
]


def tensor_cases(
    argument: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    bad_dtypes: tuple[torch.dtype, ...],
    also: Callable[[], Arguments] = dict,
    optional: bool = False,
    fixed_rows: bool = True,
) -> list[Case]:
    """Wrong types, dtypes, dimensions and device; also wrong numbers of rows, if the argument does not define it."""
    make = torch.zeros
    cases = [
        wrong(argument, "list", lambda: make(shape).tolist(), TypeError, also=also),
        wrong(argument, "int", 1, TypeError, also=also),
        wrong(argument, "no-dimension", lambda: make((), dtype=dtype), ValueError, also=also),
        wrong(argument, "one-more-dimension", lambda: make((1, *shape), dtype=dtype), ValueError, also=also),
        wrong(argument, "other-device", lambda: make(shape, dtype=dtype, device=META), ValueError, "cpu", also=also),
    ]
    cases += [
        wrong(argument, str(bad), lambda bad=bad: make(shape, dtype=bad), TypeError, str(bad)[6:], also=also)
        for bad in bad_dtypes
    ]
    if not optional:
        cases.append(wrong(argument, "None", None, TypeError, also=also))
    if fixed_rows:
        for name, rows in (("more-rows", shape[0] + 1), ("fewer-rows", shape[0] - 1)):
            size = (rows, *shape[1:])
            value = lambda size=size: make(size, dtype=dtype)  # noqa: E731
            cases.append(wrong(argument, name, value, ValueError, str(list(size)), also=also))
    return cases


def contiguous_cases(
    argument: str, shape: tuple[int, ...], dtype: torch.dtype, fill: float = 0, also: Callable[[], Arguments] = dict
) -> list[Case]:
    """Strides that are refused."""
    wide = (*shape[:-1], 2 * shape[-1])
    cases = [
        wrong(argument, "every-other", lambda: torch.full(wide, fill, dtype=dtype)[..., ::2], ValueError, also=also),
        wrong(argument, "expanded", lambda: torch.full((1,), fill, dtype=dtype).expand(shape), ValueError, also=also),
    ]
    if len(shape) == 2:
        rows = wide, lambda: torch.full(wide, fill, dtype=dtype)[:, : shape[1]]
        cases.append(wrong(argument, "rows-apart", rows[1], ValueError, "contiguous", also=also))
        transposed = lambda: torch.full(shape[::-1], fill, dtype=dtype).T  # noqa: E731
        cases.append(wrong(argument, "transposed", transposed, ValueError, "contiguous", also=also))
    return cases


def matrix_cases(argument: str, rows: int, also: Callable[[], Arguments] = dict) -> list[Case]:
    """Strides of operands: rows may lie apart, but not overlap, and must be contiguous."""
    return [
        wrong(argument, "transposed", lambda: torch.ones(H, rows).T, ValueError, "contiguous rows", also=also),
        wrong(argument, "every-other", lambda: torch.ones(rows, 2 * H)[:, ::2], ValueError, also=also),
        wrong(argument, "expanded", lambda: torch.ones(1, H).expand(rows, H), ValueError, "overlap", also=also),
        wrong(
            argument, "overlap", lambda: torch.ones(rows * H).as_strided((rows, H), (H - 1, 1)), ValueError, also=also
        ),
    ]


OTHER_FLOATS = (torch.float16, torch.float64, torch.int32, torch.bool, torch.complex64)
OPERAND_CASES = [
    *tensor_cases("hidden_states", (N, H), torch.float32, OTHER_FLOATS, fixed_rows=False)[:4],
    *tensor_cases("hidden_states", (N, H), torch.float32, OTHER_FLOATS, fixed_rows=False)[5:-1],
    *matrix_cases("hidden_states", N),
    wrong("hidden_states", "no-columns", lambda: torch.ones(N, 0), ValueError, also=lambda: {
        "gate_weight": torch.ones(E, 0)}),
    wrong("hidden_states", "all-on-meta", lambda: torch.ones(N, H, device=META), ValueError, also=lambda: {
        "gate_weight": torch.ones(E, H, device=META)}),
    *tensor_cases("gate_weight", (E, H), torch.float32, (*OTHER_FLOATS, torch.bfloat16), fixed_rows=False)[:-1],
    *matrix_cases("gate_weight", E),
    wrong("gate_weight", "fp32-to-bf16", lambda: torch.ones(E, H), TypeError, "float32", also=lambda: {
        "hidden_states": torch.ones(N, H, dtype=torch.bfloat16)}),
    wrong("gate_weight", "other-hidden-size", lambda: torch.ones(E, H - 1), ValueError, str(H)),
    wrong("gate_weight", "no-experts", lambda: torch.ones(0, H), ValueError, "1024"),
    wrong("gate_weight", "1025-experts", lambda: torch.ones(1025, H), ValueError, "1024"),
]  # fmt: skip
REQUIRED_OPERAND_CASES = [
    wrong("hidden_states", "None", None, TypeError),
    wrong("gate_weight", "None", None, TypeError),
]

PADDING_CASES = [
    *tensor_cases("token_mask", (N,), torch.bool, (torch.uint8, torch.int32, torch.float32), optional=True),
    *contiguous_cases("token_mask", (N,), torch.bool, True),
    wrong("num_valid_tokens", "negative", -1, ValueError, f"({N})"),
    wrong("num_valid_tokens", "more-than-rows", N + 1, ValueError, f"({N})"),
    wrong("num_valid_tokens", "bool", True, TypeError),
    wrong("num_valid_tokens", "float", 3.0, TypeError),
    wrong("num_valid_tokens", "str", "3", TypeError),
    wrong("num_valid_tokens", "int64-tensor", lambda: torch.tensor(3), TypeError, "int64"),
    wrong("num_valid_tokens", "float-tensor", lambda: torch.tensor(3.0), TypeError),
    wrong("num_valid_tokens", "bool-tensor", lambda: torch.tensor(True), TypeError),
    wrong("num_valid_tokens", "two", lambda: torch.tensor([3, 3]).int(), ValueError),
    wrong("num_valid_tokens", "empty", lambda: torch.empty(0).int(), ValueError),
    wrong("num_valid_tokens", "other-device", lambda: torch.ones((), device=META).int(), ValueError),
    *not_integers("padding_id"),
    wrong("padding_id", "minus-one-as-float", -1.0, TypeError),
    wrong("padding_id", "int64-max+1", 2**63, ValueError, "int64", also=lambda: wide_ids()),
    wrong("padding_id", "int64-min-1", -(2**63) - 1, ValueError, "int64", also=lambda: wide_ids()),
]
INT32_PADDING_CASES = [
    wrong("padding_id", "int32-max+1", 2**31, ValueError, "int32"),
    wrong("padding_id", "int32-min-1", -(2**31) - 1, ValueError, "int32"),
]


def wide_ids() -> Arguments:
    return {"out_ids": torch.full((N, K), POISON_ID)}


OUTPUT_CASES = [
    *tensor_cases("out_weights", (N, K), torch.float32, (torch.float64, torch.bfloat16, torch.int32)),
    *contiguous_cases("out_weights", (N, K), torch.float32, POISON_WEIGHT),
    wrong("out_weights", "other-width", lambda: torch.full((N, K + 1), POISON_WEIGHT), ValueError, f"[{N}, {K + 1}]"),
    *tensor_cases("out_ids", (N, K), torch.int32, (torch.int16, torch.uint8, torch.float32, torch.bool)),
    *contiguous_cases("out_ids", (N, K), torch.int64, POISON_ID),
    wrong("out_ids", "other-width", lambda: torch.full((N, K - 1), POISON_ID), ValueError, f"[{N}, {K - 1}]"),
]
IDS_DTYPE_CASES = [
    wrong("ids_dtype", name, value, TypeError, "torch.int32", "torch.int64")
    for name, value in {"None": None, "int16": torch.int16, "float32": torch.float32, "str": "int32"}.items()
] + [wrong("ids_dtype", "type", lambda: int, TypeError)]

DENSE_CASES = [
    *OPERAND_CASES,
    *REQUIRED_OPERAND_CASES,
    *tensor_cases("correction_bias", (E,), torch.float32, (torch.float64, torch.bfloat16, torch.int64), optional=True),
    *contiguous_cases("correction_bias", (E,), torch.float32),
    *top_k_cases(),
    wrong("top_k", "more-than-experts", 6, ValueError, "from 1 to 5", also=lambda: {
        "gate_weight": torch.ones(5, H), "correction_bias": None, "logits_out": None}),
    *SCALING_CASES,
    *BACKEND_CASES,
    *flag_cases("batch_invariant"),
    *PADDING_CASES,
    *tensor_cases("logits_out", (N, E), torch.float32, (torch.float64, torch.bfloat16, torch.int32), optional=True),
    *contiguous_cases("logits_out", (N, E), torch.float32, POISON_WEIGHT),
    wrong("logits_out", "other-width", lambda: torch.full((N, E + 1), POISON_WEIGHT), ValueError, f"[{N}, {E + 1}]"),
    *LAUNCH_CASES,
]  # fmt: skip


HASH_CASES = [
    *tensor_cases(
        "token_ids", (N,), torch.int64, (torch.int16, torch.uint8, torch.float32, torch.bool), fixed_rows=False
    )[:4],
    *tensor_cases(
        "token_ids", (N,), torch.int64, (torch.int16, torch.uint8, torch.float32, torch.bool), fixed_rows=False
    )[5:],
    *contiguous_cases("token_ids", (N,), torch.int64),
    wrong("token_ids", "all-on-meta", lambda: torch.zeros(N, dtype=torch.int64, device=META), ValueError, also=lambda: {
        "hash_lut": torch.zeros(VOCABULARY, K, dtype=torch.int64, device=META)}),
    *tensor_cases(
        "hash_lut", (VOCABULARY, K), torch.int64, (torch.int16, torch.bfloat16, torch.float32), fixed_rows=False
    ),
    *contiguous_cases("hash_lut", (VOCABULARY, K), torch.int64),
    wrong("hash_lut", "wider", lambda: torch.zeros(VOCABULARY, K + 1).long(), ValueError, f"top_k = {K}"),
    wrong("hash_lut", "narrower", lambda: torch.zeros(VOCABULARY, K - 1).int(), ValueError, f"top_k = {K}"),
    *top_k_cases(),
    *OPERAND_CASES,
    wrong("hidden_states", "None", None, ValueError, "gate_weight"),
    wrong("gate_weight", "None", None, ValueError, "hidden_states"),
    wrong("hidden_states", "more-rows", lambda: torch.ones(N + 1, H), ValueError, str(N)),
    wrong("hidden_states", "fewer-rows", lambda: torch.ones(N - 1, H), ValueError, str(N)),
    wrong("router_logits", "with-hidden-states", lambda: torch.zeros(N, E), ValueError, "hidden_states", "both"),
    wrong("router_logits", "with-hidden-states-alone", lambda: torch.zeros(N, E), ValueError, "both",
          also=lambda: {"gate_weight": None}),
    wrong("router_logits", "with-gate-alone", lambda: torch.zeros(N, E), ValueError, "both",
          also=lambda: {"hidden_states": None}),
    *tensor_cases("router_logits", (N, E), torch.float32, (torch.bfloat16, torch.float64, torch.int32),
                  also=ready_logits, optional=True),
    *contiguous_cases("router_logits", (N, E), torch.float32, also=ready_logits),
    wrong("router_logits", "no-experts", lambda: torch.zeros(N, 0), ValueError, "1024", also=ready_logits),
    wrong("router_logits", "1025-experts", lambda: torch.zeros(N, 1025), ValueError, "1024", also=ready_logits),
    *SCALING_CASES,
    *PADDING_CASES,
    *LAUNCH_CASES,
]  # fmt: skip

CONFIG_CASES = [
    *not_integers("hidden_size"),
    wrong("hidden_size", "0", 0, ValueError),
    *not_integers("num_experts"),
    wrong("num_experts", "0", 0, ValueError, "1024"),
    wrong("num_experts", "1025", 1025, ValueError, "1024"),
    *top_k_cases(),
    wrong("top_k", "more-than-experts", 6, ValueError, "from 1 to 5", also=lambda: {"num_experts": 5}),
    *SCALING_CASES,
    *not_integers("num_layers"),
    wrong("num_layers", "0", 0, ValueError),
    *not_integers("num_hash_layers"),
    wrong("num_hash_layers", "negative", -1, ValueError, "0 to 4"),
    wrong("num_hash_layers", "more-than-layers", 5, ValueError, "0 to 4"),
    *not_integers("vocab_size"),
    wrong("vocab_size", "0", 0, ValueError),
]

ROUTER_CASES = [
    wrong("config", "None", None, TypeError, "RouterConfig"),
    wrong("config", "dict", config_arguments, TypeError, "RouterConfig"),
    wrong("config", "class", lambda: RouterConfig, TypeError, "RouterConfig"),
]
DEVICE_CASES = [
    wrong("device", "None", None, TypeError),
    wrong("device", "int", 0, TypeError),
    wrong("device", "bytes", b"cpu", TypeError),
    wrong("device", "unknown", "gpu", ValueError),
    wrong("device", "empty", "", ValueError),
    wrong("device", "no-number", "cuda:first", ValueError),
]
EXPLAIN_CASES = [
    *ROUTER_CASES,
    *not_integers("num_tokens"),
    wrong("num_tokens", "negative", -1, ValueError),
    *DEVICE_CASES,
    *BACKEND_CASES,
    *flag_cases("batch_invariant"),
    *(
        wrong("dtype", name, value, TypeError, "torch.bfloat16", "torch.float32")
        for name, value in {"None": None, "float16": torch.float16, "int32": torch.int32, "str": "bfloat16"}.items()
    ),
    wrong("dtype", "type", lambda: float, TypeError),
    wrong("dtype", "tensor", lambda: torch.zeros(2, dtype=torch.bfloat16), TypeError),
]
COMPILE_CASES = [
    *ROUTER_CASES,
    wrong("architecture", "unknown", "sm_80", ValueError, "'sm_90a'", "'sm_100a'", "'sm_103a'", "'sm_120a'"),
    wrong("architecture", "without-a", "sm_90", ValueError),
    wrong("architecture", "empty", "", ValueError),
    wrong("architecture", "None", None, TypeError, "'sm_90a'"),
    wrong("architecture", "bytes", b"sm_90a", TypeError),
    wrong("architecture", "capability", lambda: (9, 0), TypeError),
    wrong("architecture", "list", lambda: ["sm_90a"], TypeError),
]

CASES: dict[str, list[Case]] = {
    "dense_router_dispatch": [*DENSE_CASES, *INT32_PADDING_CASES, *OUTPUT_CASES],
    "hash_router_dispatch": [*HASH_CASES, *INT32_PADDING_CASES, *OUTPUT_CASES],
    "dense_route": [*DENSE_CASES, *IDS_DTYPE_CASES],
    "hash_route": [*HASH_CASES, *IDS_DTYPE_CASES],
    "explain": EXPLAIN_CASES,
    "compile_ahead": COMPILE_CASES,
    "warmup": [*ROUTER_CASES, *DEVICE_CASES],
    "RouterConfig": CONFIG_CASES,
}
MATRIX = [
    pytest.param(function, case, id=f"{function}-{case.argument}-{case.name}")
    for function, cases in CASES.items()
    for case in cases
]


# ---- the tests


def bits(value: Any) -> Any:
    """What a tensor holds, comparable even where it is NaN."""
    if isinstance(value, torch.Tensor) and value.device != META:
        return (value.dtype, value.stride(), value.contiguous().view(-1).view(torch.uint8).tolist())
    return None


@pytest.mark.parametrize(("function", "case"), MATRIX)
def test_wrong_argument(function: str, case: Case) -> None:
    arguments = VALID[function]()
    also = case.also()
    arguments.update({name: value for name, value in also.items() if name in arguments})
    arguments[case.argument] = case.value()
    before = {name: bits(value) for name, value in arguments.items()}
    with pytest.raises(case.error, match=rf"^{case.argument}: expected .+, got .+") as caught:
        getattr(dsv4_router, function)(**arguments)
    assert type(caught.value) is case.error
    for word in case.words:
        assert word in str(caught.value)
    assert {name: bits(value) for name, value in arguments.items()} == before
    for name, poison in (("out_weights", POISON_WEIGHT), ("out_ids", POISON_ID), ("logits_out", POISON_WEIGHT)):
        if isinstance(arguments.get(name), torch.Tensor) and name != case.argument:
            assert bool((arguments[name] == poison).all())


@pytest.mark.parametrize("function", VALID)
def test_the_valid_call_of_the_matrix_is_valid(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So each case is refused for its one change."""
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    monkeypatch.setattr(decode, "compile_object", lambda config, target: (b"an object", None))
    arguments = VALID[function]()
    getattr(dsv4_router, function)(**arguments)
    for name, poison in (("out_weights", POISON_WEIGHT), ("out_ids", POISON_ID), ("logits_out", POISON_WEIGHT)):
        if name in arguments:
            assert not bool((arguments[name] == poison).any())


def arguments_of(function: str) -> set[str]:
    """Names of the arguments; those that ``**options`` passes on are the keyword-only ones of the function below."""
    parameters = inspect.signature(getattr(dsv4_router, function)).parameters
    names = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
    if "options" in parameters:
        below = inspect.signature(getattr(dsv4_router, function.replace("_route", "_router_dispatch"))).parameters
        names |= {name for name, parameter in below.items() if parameter.kind is parameter.KEYWORD_ONLY}
    return names


@pytest.mark.parametrize("function", CASES)
def test_the_matrix_covers_every_argument(function: str) -> None:
    for_people = {"name"} if function == "RouterConfig" else set()  # any text will do
    assert {case.argument for case in CASES[function]} == arguments_of(function) - for_people
    assert VALID[function]().keys() == arguments_of(function) - for_people
    assert len({(case.argument, case.name) for case in CASES[function]}) == len(CASES[function])


def test_the_matrix_covers_every_public_function() -> None:
    functions = {name for name in dsv4_router.__all__ if name.islower() and callable(getattr(dsv4_router, name, None))}
    assert functions == CASES.keys() - {"RouterConfig"}


@pytest.mark.parametrize("function", ["dense_route", "hash_route"])
@pytest.mark.parametrize("option", ["paddingid", "out_weights", "correction"])
def test_unknown_option(function: str, option: str) -> None:
    with pytest.raises(TypeError, match=option):
        getattr(dsv4_router, function)(**VALID[function](), **{option: None})


@pytest.mark.parametrize("num_tokens", [0, N])
@pytest.mark.parametrize("backend", ["decode", "cublas"])
def test_backend_that_the_cpu_does_not_have(backend: str, num_tokens: int) -> None:
    arguments = VALID["dense_router_dispatch"]()
    for name in ("hidden_states", "token_mask", "logits_out", "out_weights", "out_ids"):
        arguments[name] = arguments[name][:num_tokens]
    arguments.update(backend=backend, num_valid_tokens=None)
    reason = rf"^backend='{backend}' cannot serve this call \(needs a CUDA device, the tensors are on cpu\)$"
    with pytest.raises(BackendUnavailableError, match=reason):
        dsv4_router.dense_router_dispatch(**arguments)
    for name, poison in (("out_weights", POISON_WEIGHT), ("out_ids", POISON_ID), ("logits_out", POISON_WEIGHT)):
        assert bool((arguments[name] == poison).all())
    for name in ("out_weights", "out_ids"):
        del arguments[name]
    with pytest.raises(BackendUnavailableError, match=reason):
        dsv4_router.dense_route(**arguments)
    with pytest.raises(BackendUnavailableError, match=reason):
        dsv4_router.explain(V4_FLASH, num_tokens, "cpu", backend=backend)


def test_arguments_are_checked_when_there_are_no_tokens() -> None:
    arguments = VALID["dense_router_dispatch"]()
    for name in ("hidden_states", "token_mask", "logits_out", "out_weights", "out_ids"):
        arguments[name] = arguments[name][:0]
    arguments["num_valid_tokens"] = 1
    with pytest.raises(ValueError, match=r"^num_valid_tokens: expected an int from 0 to num_tokens \(0\)"):
        dsv4_router.dense_router_dispatch(**arguments)


@pytest.mark.parametrize(
    ("function", "argument"),
    [("dense_router_dispatch", name) for name in ("out_weights", "out_ids", "logits_out")]
    + [("hash_router_dispatch", name) for name in ("out_weights", "out_ids")],
)
def test_an_output_that_torch_would_not_write(function: str, argument: str) -> None:
    arguments = VALID[function]()
    with torch.inference_mode():
        arguments[argument] = arguments[argument].clone()
    written = {name: arguments[name] for name in ("out_weights", "out_ids", "logits_out") if name in arguments}
    before = {name: tensor.clone() for name, tensor in written.items()}
    with pytest.raises(ValueError, match=f"^{argument}: expected a tensor made outside of inference mode"):
        getattr(dsv4_router, function)(**arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in written.items())
    with torch.inference_mode():
        getattr(dsv4_router, function)(**arguments)
    assert not bool((arguments["out_weights"] == POISON_WEIGHT).any())


def test_long_values_are_cut_short() -> None:
    with pytest.raises(TypeError, match=r"^top_k: expected .+, got str 'x+\.\.\.$") as caught:
        RouterConfig(**{**config_arguments(), "top_k": "x" * 10000})
    assert len(str(caught.value)) < 200


def test_what_has_no_short_account() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(TypeError, match=r"^hidden_states: expected .+, got nested float32 on cpu$"):
        dsv4_router.dense_route(nested, torch.ones(E, H), None, K, 1.5)
    with pytest.raises(TypeError, match=r"^token_mask: expected .+, got nested float32 on cpu$"):
        dsv4_router.dense_router_dispatch(**VALID["dense_router_dispatch"]() | {"token_mask": nested})
    with pytest.raises(ValueError, match=r"^routed_scaling_factor: expected .+, got int too long to print$"):
        dsv4_router.dense_route(torch.ones(N, H), torch.ones(E, H), None, K, 10**5000)


def test_tensors_without_memory_have_no_address_for_a_kernel() -> None:
    with FakeTensorMode():
        fake = torch.empty(N, H, device="cuda")
    with pytest.raises(TypeError, match=r"^gate_weight: expected a tensor with memory of its own"):
        check_memory(hidden_states=torch.ones(N, H), correction_bias=None, gate_weight=fake)
    check_memory(hidden_states=torch.ones(N, H), hash_lut=torch.empty(0, K))


# ---- long calls as pieces


def dense_operands() -> DenseOperands:
    """Operands whose rows tell their numbers."""
    rows = torch.arange(N, dtype=torch.float32)[:, None]
    weights, ids = outputs().values()
    return rows.expand(N, H).contiguous(), torch.ones(E, H), torch.zeros(E), K, 1.5, weights, ids


@pytest.mark.parametrize("rows_at_once", [N, N + 1, 1 << 16])
def test_a_call_that_fits_is_one_piece(rows_at_once: int) -> None:
    operands, logits, options = dense_operands(), torch.zeros(N, E), Options(torch.ones(N, dtype=torch.bool), N)
    (piece,) = pieces_of(operands, logits, options, rows_at_once)
    assert piece[0] is operands
    assert piece[1] is logits
    assert piece[2] is options


INT32 = torch.iinfo(torch.int32)
COUNTS: list[int | list[int] | None] = [None, 0, 1, 3, N, [-1], [0], [3], [N], [N + 2], [INT32.min], [INT32.max]]


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, N - 1])
@pytest.mark.parametrize("count", COUNTS, ids=str)
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("with_logits", [True, False])
def test_pieces_are_the_call(
    rows_at_once: int, count: int | list[int] | None, with_mask: bool, with_logits: bool
) -> None:
    """Each row is in one piece, in order and with its padding; what a piece writes, the call has written.

    Args:
        count: of valid tokens; in a list, on the device, where it may be any.
    """
    operands, mask = dense_operands(), torch.tensor([True, False, True, True, True])
    logits = torch.full((N, E), POISON_WEIGHT) if with_logits else None
    num_valid = torch.tensor(count, dtype=torch.int32) if isinstance(count, list) else count
    options = Options(mask if with_mask else None, num_valid, -3, False, False)
    valid, first = [], 0
    for piece, piece_logits, of_piece in pieces_of(operands, logits, options, rows_at_once):
        rows = len(piece[0])
        assert rows == min(rows_at_once, N - first)
        assert piece[0][:, 0].tolist() == list(range(first, first + rows))
        assert all(mine is whole for mine, whole in zip(piece[1:5], operands[1:5], strict=True))
        piece[5].copy_(piece[0][:, :K])
        piece[6].copy_(piece[0][:, :K])
        assert (piece_logits is not None) == with_logits
        if piece_logits is not None:
            piece_logits.copy_(piece[0][:, :E])
        assert of_piece[2:] == options[2:]
        of_rows = [True] * rows if of_piece.token_mask is None else of_piece.token_mask.tolist()
        assert len(of_rows) == rows
        left = of_piece.num_valid_tokens
        assert type(left) is type(num_valid)
        if isinstance(left, torch.Tensor):
            assert isinstance(num_valid, torch.Tensor)
            assert (left.dtype, left.shape) == (num_valid.dtype, num_valid.shape)
        most = rows if left is None else int(left)
        valid += [is_valid and row < most for row, is_valid in enumerate(of_rows)]
        first += rows
    most = N if num_valid is None else int(num_valid)
    assert valid == [(bool(mask[row]) or not with_mask) and row < most for row in range(N)]
    written = [*operands[5:], *([] if logits is None else [logits])]
    for tensor in written:
        assert torch.equal(tensor, torch.arange(N)[:, None].expand_as(tensor).to(tensor.dtype))
