# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Which path a call takes: choose, plan and explain agree, are pure, and say why."""

from __future__ import annotations

import dataclasses
import warnings
from typing import NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_router import (
    V4_1_FLASH,
    V4_PRO,
    BackendUnavailableError,
    RouterConfig,
    decode_config,
    dispatch,
    explain,
    thresholds,
)
from dsv4_router.config import PRESETS
from dsv4_router.dispatch import BACKENDS, MANY_TOKENS, PATHS, Availability, Plan, Request
from dsv4_router.thresholds import DecodeThreshold

_why = st.one_of(st.none(), st.sampled_from(["no such package", "too old"]))
_capabilities = st.one_of(
    st.none(), st.tuples(st.integers(5, 13), st.integers(0, 9)), st.sampled_from([(9, 0), (10, 0), (10, 3), (12, 0)])
)
requests = st.builds(
    Request,
    hidden_size=st.one_of(
        st.integers(1, 1 << 16), st.integers(16, 128).map(lambda chunks: 64 * chunks), st.sampled_from([4096, 7168])
    ),
    num_experts=st.one_of(
        st.integers(1, 1024), st.integers(8, 128).map(lambda quads: 4 * quads), st.sampled_from([128, 256, 384])
    ),
    top_k=st.integers(1, 16),
    num_tokens=st.one_of(st.integers(0, 1 << 20), st.integers(0, 2 * MANY_TOKENS), st.integers(0, 260)),
    batch_invariant=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    aligned=st.booleans(),
)
H100 = "NVIDIA H100 80GB HBM3"
_tuned = st.builds(
    DecodeThreshold,
    gpu=st.just(H100),
    compute_capability=st.just((9, 0)),
    hidden_size=st.sampled_from([4096, 7168]),
    num_experts=st.sampled_from([128, 256, 384]),
    max_tokens=st.one_of(st.integers(0, 200), st.integers(0, 2000), st.just(1 << 30)),
    date=st.just("2026-11-24"),
    also=st.sampled_from([(), ((240, 256), (385, 385)), ((201, 1024),)]),
)
availabilities = st.builds(
    Availability,
    device=st.sampled_from(["cpu", "cuda", "cuda:0", "cuda:7", "mps"]),
    compute_capability=_capabilities,
    missing_device=_why,
    missing_cuda_python=_why,
    missing_cutlass_dsl=_why,
    missing_cublaslt=_why,
    gpu=st.sampled_from([None, H100, "NVIDIA B200"]),
    tuned=st.lists(_tuned, max_size=3).map(tuple),
)
backends = st.sampled_from(BACKENDS)
A_REQUEST = Request(4096, 256, 6, 17)
COMPLETE_GPU = Availability("cuda:0", compute_capability=(9, 0), gpu=H100)


def limit_of(config: RouterConfig) -> int:
    """Up to how many tokens :data:`COMPLETE_GPU` prefers the decode path."""
    return dispatch.decode_limit(config.hidden_size, config.num_experts, COMPLETE_GPU).max_tokens


def refusal(path: str, request: Request, availability: Availability) -> str | None:
    refused = dict(dispatch.plan_refusals(request, availability, (path,)))
    return refused.get(path)


def outcome(request: Request, availability: Availability, backend: str) -> str:
    """The path, or the message of the error."""
    try:
        return dispatch.choose(request, availability, backend)
    except BackendUnavailableError as error:
        return str(error)


@given(requests, availabilities, backends)
def test_choose_and_plan_agree(request: Request, availability: Availability, backend: str) -> None:
    chosen = outcome(request, availability, backend)
    if chosen in PATHS:
        plan = dispatch.plan(request, availability, backend)
        assert plan.path == chosen
        assert (plan.request, plan.availability) == (request, availability)
    else:
        with pytest.raises(BackendUnavailableError) as caught:
            dispatch.plan(request, availability, backend)
        assert str(caught.value) == chosen


def slower(path: str, request: Request, availability: Availability) -> bool:
    """Whether a path is not the one for so many tokens, though it can serve them."""
    if path != "decode" or request.batch_invariant or availability.architecture is None:
        return False
    limit = dispatch.decode_limit(request.hidden_size, request.num_experts, availability)
    assert limit.max_tokens <= 1024
    shapes = {entry.shape for entry in (*availability.tuned, *thresholds.DECODE)}
    assert limit.is_of_shape == (request[:2] in shapes)
    one_launch = decode_config.max_tokens(*request[:3], availability.architecture)
    two_launches = availability.architecture == "sm_90a" and limit.is_of_shape
    in_ranges = any(first <= request.num_tokens <= last for first, last in limit.also)
    return (request.num_tokens > limit.max_tokens and not in_ranges) or (
        request.num_tokens > one_launch and not two_launches
    )


@given(requests, availabilities)
def test_auto_takes_the_first_path_that_can_and_should(request: Request, availability: Availability) -> None:
    refusals = [refusal(path, request, availability) for path in PATHS]
    passed = [why is not None or slower(path, request, availability) for path, why in zip(PATHS, refusals, strict=True)]
    plan = dispatch.plan(request, availability)
    assert plan.path == PATHS[passed.index(False)]
    assert [path for path, _ in plan.rejected] == list(PATHS[: PATHS.index(plan.path)])
    for (path, why), refused in zip(plan.rejected, refusals, strict=False):
        if refused is None:
            assert slower(path, request, availability)
            assert why.startswith(("faster ", "one launch takes up to "))
        else:
            assert why == refused


@given(requests, availabilities)
def test_auto_never_raises_and_keeps_batch_invariance(request: Request, availability: Availability) -> None:
    chosen = dispatch.choose(request, availability)
    assert chosen in PATHS
    assert not (request.batch_invariant and chosen == "cublas")
    assert availability.is_cuda or chosen == "reference"


@given(requests, availabilities, st.sampled_from(PATHS))
def test_a_named_backend_is_taken_or_refused_with_its_reason(
    request: Request, availability: Availability, backend: str
) -> None:
    why = refusal(backend, request, availability)
    if why is None:
        plan = dispatch.plan(request, availability, backend)
        assert plan.path == backend
        assert plan.rejected == ()
        assert f"backend={backend!r}" in plan.reason
    else:
        with pytest.raises(BackendUnavailableError) as caught:
            dispatch.choose(request, availability, backend)
        message = str(caught.value)
        assert f"backend={backend!r}" in message
        assert message.endswith(f"({why})")


@given(requests, availabilities, backends)
def test_a_plan_prints_its_path_and_each_rejection(request: Request, availability: Availability, backend: str) -> None:
    if outcome(request, availability, backend) not in PATHS:
        return
    plan = dispatch.plan(request, availability, backend)
    lines = str(plan).splitlines()
    assert lines[0] == f"{plan.path}: {plan.reason}"
    for part in (
        f"H={request.hidden_size} ",
        f"E={request.num_experts} ",
        f"k={request.top_k},",
        f" {request.num_tokens} tokens",
        availability.device,
    ):
        assert part in lines[1]
    assert ("batch-invariant" in lines[1]) == request.batch_invariant
    if availability.compute_capability is not None:
        major, minor = availability.compute_capability
        assert f"(sm_{major}{minor})" in lines[1]
    assert lines[2:] == [f"  not {path}: {why}" for path, why in plan.rejected]


@given(requests, availabilities)
def test_hash_path(request: Request, availability: Availability) -> None:
    """The CUDA hash kernels run exactly where the CUDA kernels of the dense path do."""
    plain = request._replace(batch_invariant=False)
    expected = "cuda" if refusal("cublas", plain, availability) is None else "reference"
    assert dispatch.hash_path(availability) == expected


@settings(max_examples=30)
@given(requests, availabilities, backends)
def test_pure(request: Request, availability: Availability, backend: str) -> None:
    def touched(*_: object, **__: object) -> NoReturn:
        raise AssertionError("the choice asked torch.cuda")

    expected = outcome(request, availability, backend)
    hashed = dispatch.hash_path(availability)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("is_available", "device_count", "current_device", "get_device_capability", "init", "_lazy_init"):
            patch.setattr(torch.cuda, name, touched)
        for _ in range(2):
            assert outcome(request, availability, backend) == expected
            assert dispatch.hash_path(availability) == hashed
        if expected in PATHS:
            plan = dispatch.plan(request, availability, backend)
            assert plan == dispatch.plan(request, availability, backend)
            assert str(plan).startswith(expected)


@pytest.mark.parametrize(
    ("availability", "path", "hashed"),
    [
        (Availability("cpu"), "reference", "reference"),
        (Availability("mps"), "reference", "reference"),
        (Availability("cuda:0", compute_capability=(7, 5)), "reference", "reference"),
        (Availability("cuda:0", missing_device="torch sees no CUDA GPU"), "reference", "reference"),
        (Availability("cuda:0", (9, 0), missing_cuda_python="no NVRTC"), "reference", "reference"),
        (Availability("cuda:0", (9, 0), missing_cublaslt="no cuBLASLt"), "decode", "cuda"),
        (Availability("cuda:0", (8, 0), missing_cublaslt="no cuBLASLt"), "cublas", "cuda"),
        (Availability("cuda:0", (9, 0), missing_cutlass_dsl="no DSL"), "cublas", "cuda"),
        (Availability("cuda:0", (8, 0)), "cublas", "cuda"),
        (Availability("cuda:0", (8, 9)), "cublas", "cuda"),
        (COMPLETE_GPU, "decode", "cuda"),
    ],
)
def test_paths_of_what_is_there(availability: Availability, path: str, hashed: str) -> None:
    assert dispatch.choose(A_REQUEST, availability) == path
    assert dispatch.hash_path(availability) == hashed


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS.keys())
def test_few_tokens_take_one_launch_and_many_take_cublas(config: RouterConfig) -> None:
    request = Request(config.hidden_size, config.num_experts, config.top_k, 1)
    limit = dispatch.decode_limit(config.hidden_size, config.num_experts, COMPLETE_GPU)
    ends = {count + more for pair in limit.also for count in pair for more in (-1, 0, 1)}
    last = limit.max_tokens
    counts = sorted({*range(0, MANY_TOKENS, 16), *range(120, 140), last, last + 1, MANY_TOKENS} | ends)
    taken = [dispatch.choose(request._replace(num_tokens=n), COMPLETE_GPU) for n in counts]
    also = {n for first, last in limit.also for n in range(first, last + 1)}
    assert taken == ["decode" if n <= limit.max_tokens or n in also else "cublas" for n in counts]
    plan = dispatch.plan(request._replace(num_tokens=MANY_TOKENS), COMPLETE_GPU)
    assert plan.rejected == (("decode", f"faster {limit} only ({limit.source})"),)
    plan = dispatch.plan(request, COMPLETE_GPU)
    assert plan.reason == f"one launch from hidden states to experts, faster {limit} ({limit.source})"
    for other in (
        dispatch.plan(request, COMPLETE_GPU, "decode"),
        dispatch.plan(request._replace(batch_invariant=True), COMPLETE_GPU),
    ):
        assert "faster" not in str(other)


MORE_ROWS = "one launch for the logits, one for the CUDA top-k, at some counts one for the last rows"


@pytest.mark.parametrize(
    ("capability", "sizes", "rows", "many"),
    [
        ((9, 0), (7168, 384), 128, f"more than 128 tokens: {MORE_ROWS}"),
        ((9, 0), (8192, 512), 64, f"more than 64 tokens: {MORE_ROWS}"),
        ((10, 0), (7168, 384), 128, "one launch from hidden states to experts for each 128 tokens"),
        ((12, 0), (7168, 384), 16, "one launch from hidden states to experts for each 16 tokens"),
    ],
)
def test_plan_says_what_more_rows_than_a_launch_takes_take(
    capability: tuple[int, int], sizes: tuple[int, int], rows: int, many: str
) -> None:
    found = dataclasses.replace(COMPLETE_GPU, compute_capability=capability)
    never = "" if capability == (9, 0) else f"; compiled for {dispatch.architecture(capability)}, never run there"
    for num_tokens in (1, rows, rows + 1, 1000):
        reason = "one launch from hidden states to experts" if num_tokens <= rows else many
        request = Request(*sizes, 6, num_tokens)
        invariant = dispatch.plan(request._replace(batch_invariant=True), found)
        assert (invariant.path, invariant.reason, invariant.rejected) == ("decode", reason + never, ())
        named = dispatch.plan(request, found, "decode")
        assert (named.path, named.reason) == ("decode", f"{reason} (asked for by backend='decode'){never}")


def test_without_a_kernel_for_more_rows_auto_takes_one_launch() -> None:
    """Whatever was measured elsewhere: on ``sm_120a`` a launch takes few rows, above 384 experts on any."""
    for capability, sizes, rows in (
        ((10, 0), (7168, 384), 128),
        ((10, 0), (4096, 512), 64),
        ((12, 0), (7168, 384), 16),
    ):
        own = DecodeThreshold(H100, (9, 0), *sizes, 300, "2026-11-24")
        found = dataclasses.replace(COMPLETE_GPU, compute_capability=capability, tuned=(own,))
        request = Request(*sizes, 6, rows)
        assert dispatch.most_tokens(request, found) == rows
        assert dispatch.choose(request, found) == "decode"
        plan = dispatch.plan(request._replace(num_tokens=rows + 1), found)
        assert plan.path == "cublas"
        assert plan.rejected == (("decode", f"one launch takes up to {rows} tokens"),)
        assert dispatch.choose(request._replace(num_tokens=rows + 1, batch_invariant=True), found) == "decode"


@pytest.mark.parametrize(("num_sms", "rows"), [(132, 128), (114, 114), (78, 78), (46, 46), (24, 24)])
def test_a_gpu_that_holds_few_blocks_takes_few_rows_at_once(num_sms: int, rows: int) -> None:
    found = dataclasses.replace(COMPLETE_GPU, num_multiprocessors=num_sms)
    request = Request(7168, 384, 6, rows, batch_invariant=True)
    assert dispatch.plan(request, found).reason.startswith("one launch from hidden states")
    plan = dispatch.plan(request._replace(num_tokens=rows + 1), found)
    assert plan.reason == f"more than {rows} tokens: {MORE_ROWS}"


@pytest.mark.parametrize("sizes", [(7168, 384), (8192, 512)])
def test_with_a_kernel_for_more_rows_a_threshold_may_exceed_one_launch(sizes: tuple[int, int]) -> None:
    own = DecodeThreshold(H100, (9, 0), *sizes, 300, "2026-11-24")
    found = dataclasses.replace(COMPLETE_GPU, tuned=(own,))
    rows = decode_config.max_tokens(*sizes, 6, "sm_90a")
    assert rows < 300
    plan = dispatch.plan(Request(*sizes, 6, 300), found)
    source = "from this machine's dsv4-router tune of 2026-11-24"
    assert (plan.path, plan.rejected) == ("decode", ())
    assert plan.reason == f"more than {rows} tokens: {MORE_ROWS}, faster up to 300 tokens ({source})"
    plan = dispatch.plan(Request(*sizes, 6, 301), found)
    assert plan.path == "cublas"
    assert plan.rejected == (("decode", f"faster up to 300 tokens only ({source})"),)


def test_beyond_one_launch_only_a_shape_that_was_measured() -> None:
    """What two launches take depends on the shape more than what one takes: the nearest shape's number ends with it."""
    found = dataclasses.replace(COMPLETE_GPU, tuned=(DecodeThreshold(H100, (9, 0), 8192, 508, 300, "2026-11-24"),))
    assert dispatch.choose(Request(8192, 508, 6, 300), found) == "decode"
    assert dispatch.choose(Request(8192, 512, 6, 64), found) == "decode"
    plan = dispatch.plan(Request(8192, 512, 6, 65), found)
    source = "from this machine's dsv4-router tune of 2026-11-24, for the nearest shape: H=8192 E=508"
    why = f"one launch takes up to 64 tokens, and more of this very shape were not measured ({source})"
    assert (plan.path, plan.rejected) == ("cublas", (("decode", why),))


def test_no_threshold_reaches_many_tokens() -> None:
    """Though a file says so."""
    own = DecodeThreshold(H100, (9, 0), 7168, 384, 1 << 30, "2026-11-24")
    found = dataclasses.replace(COMPLETE_GPU, tuned=(own,))
    assert dispatch.decode_limit(7168, 384, found).max_tokens == MANY_TOKENS - 1 == thresholds.MOST_TOKENS == 4096
    assert dispatch.choose(Request(7168, 384, 6, MANY_TOKENS - 1), found) == "decode"
    assert dispatch.choose(Request(7168, 384, 6, MANY_TOKENS), found) == "cublas"
    assert all(entry.max_tokens <= thresholds.MOST_TOKENS for entry in thresholds.DECODE)
    assert all(last <= thresholds.MOST_TOKENS for entry in thresholds.DECODE for _, last in entry.also)
    assert dispatch.most_tokens(Request(7168, 384, 6, 1), found) == thresholds.MOST_TOKENS
    assert dispatch.most_tokens(Request(64, 16, 6, 1), found) == 0, "no kernel at all"


def test_what_this_machine_measured_decides() -> None:
    own = DecodeThreshold(H100, (9, 0), 7168, 384, 40, "2026-11-24")
    found = dataclasses.replace(COMPLETE_GPU, tuned=(own,))
    request = Request(7168, 384, 6, 40)
    assert dispatch.choose(request, found) == "decode"
    assert dispatch.choose(request._replace(num_tokens=41), found) == "cublas"
    plan = dispatch.plan(request._replace(num_tokens=41), found)
    assert dict(plan.rejected)["decode"] == (
        "faster up to 40 tokens only (from this machine's dsv4-router tune of 2026-11-24)"
    )
    never = dataclasses.replace(COMPLETE_GPU, tuned=(dataclasses.replace(own, max_tokens=0),))
    assert dispatch.choose(request._replace(num_tokens=1), never) == "cublas"
    assert dispatch.choose(request._replace(num_tokens=1), never, "decode") == "decode"


@given(requests, availabilities, st.integers(MANY_TOKENS, 1 << 20))
def test_many_tokens_are_all_the_same(request: Request, availability: Availability, num_tokens: int) -> None:
    """So that ``path_of_call`` may be asked with ``MANY_TOKENS`` in their place."""
    many = request._replace(num_tokens=MANY_TOKENS)
    assert dispatch.choose(request._replace(num_tokens=num_tokens), availability) == dispatch.choose(many, availability)


REFUSALS: dict[str, tuple[Request, Availability, list[str]]] = {
    "float32": (A_REQUEST._replace(dtype=torch.float32), COMPLETE_GPU, ["bfloat16, not float32"]),
    "misaligned": (A_REQUEST._replace(aligned=False), COMPLETE_GPU, ["aligned to 16 bytes"]),
    "odd-experts": (A_REQUEST._replace(num_experts=255), COMPLETE_GPU, ["num_experts", "multiple of 4", "got 255"]),
    "few-experts": (A_REQUEST._replace(num_experts=28), COMPLETE_GPU, ["num_experts from 32 to 512", "got 28"]),
    "many-experts": (A_REQUEST._replace(num_experts=516), COMPLETE_GPU, ["num_experts from 32 to 512", "got 516"]),
    "odd-hidden-size": (A_REQUEST._replace(hidden_size=4128), COMPLETE_GPU, ["multiple of 64", "got 4128"]),
    "small-hidden-size": (A_REQUEST._replace(hidden_size=960), COMPLETE_GPU, ["from 1024 to 8192", "got 960"]),
    "large-hidden-size": (A_REQUEST._replace(hidden_size=8256), COMPLETE_GPU, ["from 1024 to 8192", "got 8256"]),
    "ampere": (A_REQUEST, Availability("cuda:0", (8, 0)), ["compiled for sm_90a, sm_100a", "device is sm_80"]),
    "unknown": (A_REQUEST, Availability("cuda:0", (11, 0)), ["compiled for sm_90a", "device is sm_110a"]),
    "too-old": (A_REQUEST, Availability("cuda:0", (7, 5)), ["8.0 or later", "7.5"]),
    "no-dsl": (A_REQUEST, Availability("cuda:0", (9, 0), missing_cutlass_dsl="no DSL"), ["no DSL"]),
    "no-cuda-python": (A_REQUEST, Availability("cuda:0", (9, 0), missing_cuda_python="no cuda"), ["no cuda"]),
    "too-large": (
        A_REQUEST._replace(hidden_size=8192, num_experts=512),
        Availability("cuda:0", (12, 0)),
        ["shared memory", "> 101376 of sm_120a"],
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_each_single_reason_refuses_the_one_launch_kernel(name: str, batch_invariant: bool) -> None:
    """Everything else about the call is right, so the reason is the one that is told."""
    request, availability, words = REFUSALS[name]
    request = request._replace(batch_invariant=batch_invariant)
    assert dispatch.choose(A_REQUEST, COMPLETE_GPU) == "decode"
    cublas_can = name not in ("too-old", "no-cuda-python") and not batch_invariant
    plan = dispatch.plan(request, availability)
    assert plan.path == ("cublas" if cublas_can else "reference")
    path, why = plan.rejected[0]
    assert path == "decode"
    assert all(word in why for word in words), why
    with pytest.raises(BackendUnavailableError) as caught:
        dispatch.choose(request, availability, "decode")
    assert str(caught.value) == f"backend='decode' cannot serve this call ({why})"


def test_top_k_that_no_argument_may_have_is_refused_too() -> None:
    assert dispatch.choose(A_REQUEST._replace(top_k=16), COMPLETE_GPU) == "decode"
    with pytest.raises(BackendUnavailableError, match="top_k from 1 to 16, got 17"):
        dispatch.choose(A_REQUEST._replace(top_k=17), COMPLETE_GPU, "decode")


@given(requests, availabilities)
def test_the_one_launch_kernel_serves_what_its_variants_serve(request: Request, availability: Availability) -> None:
    sizes = request.hidden_size, request.num_experts, request.top_k
    if refusal("decode", request, availability) is None:
        assert availability.architecture is not None
        assert decode_config.variants(*sizes, availability.architecture)


def test_a_named_backend_is_not_asked_for_its_speed() -> None:
    many = A_REQUEST._replace(num_tokens=1 << 20)
    assert dispatch.choose(many, COMPLETE_GPU) == "cublas"
    assert dispatch.choose(many, COMPLETE_GPU, "decode") == "decode"


@pytest.mark.parametrize(("capability", "ran"), [((9, 0), True), ((10, 0), False), ((10, 3), False), ((12, 0), False)])
def test_plan_says_where_the_kernel_has_never_run(capability: tuple[int, int], ran: bool) -> None:
    availability = dataclasses.replace(COMPLETE_GPU, compute_capability=capability)
    for backend in ("auto", "decode"):
        plan = dispatch.plan(A_REQUEST, availability, backend)
        assert plan.path == "decode"
        never = f"; compiled for {dispatch.architecture(capability)}, never run there"
        assert plan.reason.endswith(never) == (not ran)
        assert ("never run there" in str(plan)) == (not ran)
    assert "never" not in str(dispatch.plan(A_REQUEST, availability, "cublas"))


def test_tested_architectures_are_among_the_compiled() -> None:
    assert set(dispatch.TESTED_ARCHITECTURES) <= set(decode_config.ARCHITECTURES)
    targets = [dispatch.architecture(capability) for capability in ((9, 0), (10, 0), (10, 3), (12, 0))]
    assert tuple(targets) == decode_config.ARCHITECTURES


@pytest.mark.parametrize("num_experts", [1, 132, 144, 256, 384, 1023, 1024])
@pytest.mark.parametrize("num_tokens", [0, 1, 1 << 20])
def test_a_gpu_never_falls_to_plain_pytorch(num_experts: int, num_tokens: int) -> None:
    request = Request(4096, num_experts, 1, num_tokens)
    assert dispatch.choose(request, COMPLETE_GPU) in ("decode", "cublas")
    assert dispatch.choose(request, COMPLETE_GPU, "cublas") == "cublas"


@pytest.mark.parametrize(
    ("availability", "words"),
    [
        (Availability("cpu"), ["CUDA device", "cpu"]),
        (Availability("cuda:0", compute_capability=(7, 5)), ["8.0", "7.5"]),
        (Availability("cuda:0"), ["8.0", "none"]),
        (Availability("cuda:0", missing_device="torch sees no CUDA GPU"), ["torch sees no CUDA GPU"]),
        (Availability("cuda:0", compute_capability=(9, 0), missing_cuda_python="no cuda-python"), ["no cuda-python"]),
    ],
)
def test_reasons_name_what_is_missing(availability: Availability, words: list[str]) -> None:
    with pytest.raises(BackendUnavailableError) as caught:
        dispatch.choose(A_REQUEST, availability, "cublas")
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("num_tokens", [0, 1, 64, 65, 1 << 20])
def test_batch_invariant_calls_take_one_path_at_any_number_of_tokens(num_tokens: int) -> None:
    invariant = A_REQUEST._replace(batch_invariant=True, num_tokens=num_tokens)
    assert dispatch.choose(invariant, Availability("cpu")) == "reference"
    plan = dispatch.plan(invariant, COMPLETE_GPU)
    assert (plan.path, plan.rejected) == ("decode", ())
    assert dispatch.choose(invariant._replace(hidden_size=4100), COMPLETE_GPU) == "reference"
    assert dispatch.choose(invariant._replace(dtype=torch.float32), COMPLETE_GPU) == "reference"
    assert dispatch.choose(invariant, COMPLETE_GPU, "reference") == "reference"
    with pytest.raises(BackendUnavailableError, match="not batch-invariant"):
        dispatch.choose(invariant, COMPLETE_GPU, "cublas")


def test_the_warning_of_plain_pytorch_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch-invariant call that the one-launch kernel refuses takes plain PyTorch on a GPU that lacks nothing."""
    monkeypatch.setattr(dispatch, "availability", lambda device: COMPLETE_GPU)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refused = Request(4096, 255, 6, 17, batch_invariant=True)
        dispatch.warn_of_reference(torch.device("cuda:0"), "auto", refused)
        dispatch.warn_of_reference(torch.device("cuda:0"), "reference", refused)
        dispatch.warn_of_reference(torch.device("cpu"), "auto", refused)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1
    assert messages[0].startswith("routing on cuda:0 by plain PyTorch: ")
    assert "num_experts" in messages[0]
    assert "batch-invariant" in messages[0]


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS.keys())
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_explain_presets(config: RouterConfig, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    plan = explain(config, 33, device)
    assert isinstance(plan, Plan)
    assert plan.path == "reference"
    assert [path for path, _ in plan.rejected] == ["decode", "cublas"]
    assert plan.request == Request(config.hidden_size, config.num_experts, config.top_k, 33, False, torch.bfloat16)
    missing = "torch sees no CUDA GPU" if device == "cuda" else "needs a CUDA device, the tensors are on cpu"
    assert all(missing in why for _, why in plan.rejected)
    assert str(plan).count(missing) == 2
    assert str(plan) == str(explain(config, 33, torch.device(device)))


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS.keys())
def test_explain_says_what_a_call_would_raise(config: RouterConfig) -> None:
    for backend in ("decode", "cublas"):
        with pytest.raises(BackendUnavailableError, match="needs a CUDA device"):
            explain(config, 1, "cpu", backend=backend)
    assert explain(config, 1, "cpu", backend="reference", batch_invariant=True).request.batch_invariant
    assert explain(config, 1, "cpu", batch_invariant=True).path == "reference"


def test_explain_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "availability", lambda device: dataclasses.replace(COMPLETE_GPU, device=str(device)))
    limit = limit_of(V4_PRO)
    assert explain(V4_PRO, limit, "cuda:0").path == "decode"
    assert explain(V4_PRO, limit + 1, "cuda:0").path == "cublas"
    assert explain(V4_PRO, limit + 1, "cuda:0", batch_invariant=True).path == "decode"
    first_line = str(explain(V4_PRO, 1000, "cuda:0", batch_invariant=True)).splitlines()[0]
    assert first_line == f"decode: more than 128 tokens: {MORE_ROWS}"
    assert explain(V4_PRO, 1, "cuda:0", dtype=torch.float32).path == "cublas"
    assert explain(V4_PRO, 1, "cuda:0", dtype=torch.float32, batch_invariant=True).path == "reference"
    lines = str(explain(V4_1_FLASH, 150, "cuda:5")).splitlines()
    assert lines[1] == "  for H=5120 E=384 k=6, 150 tokens on cuda:5 (sm_90)"
    limits = dispatch.decode_limit(V4_1_FLASH.hidden_size, V4_1_FLASH.num_experts, COMPLETE_GPU)
    assert lines[2].startswith(f"  not decode: faster {limits} only (measured on {H100}, ")


def test_the_path_of_a_call_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []
    choose = dispatch.choose

    def counted(request: Request, availability: Availability, backend: str = "auto") -> str:
        asked.append(request)
        return choose(request, availability, backend)

    monkeypatch.setattr(dispatch, "availability", lambda device: COMPLETE_GPU)
    monkeypatch.setattr(dispatch, "choose", counted)
    dispatch.path_of_call.cache_clear()
    device = torch.device("cuda:0")
    calls = [A_REQUEST, A_REQUEST._replace(num_tokens=MANY_TOKENS), A_REQUEST._replace(dtype=torch.float32)]
    for _ in range(2):
        assert [dispatch.path_of_call(device, "auto", request) for request in calls] == ["decode", "cublas", "cublas"]
    assert asked == calls
    for _ in range(2):
        with pytest.raises(BackendUnavailableError, match="float32"):
            dispatch.path_of_call(device, "decode", calls[2])
    dispatch.path_of_call.cache_clear()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"cutlass", "tvm_ffi"}
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: name if name in found else None)
    assert dispatch.missing_cutlass_dsl() is None
    found.remove("tvm_ffi")
    assert dispatch.missing_cutlass_dsl() == "apache-tvm-ffi is not installed"
    found.remove("cutlass")
    assert dispatch.missing_cutlass_dsl() == "nvidia-cutlass-dsl is not installed"


def test_availability_of_the_cpu_is_asked_once() -> None:
    found = dispatch.availability(torch.device("cpu"))
    assert found is dispatch.availability(torch.device("cpu"))
    assert not found.is_cuda
    assert found.compute_capability is None
