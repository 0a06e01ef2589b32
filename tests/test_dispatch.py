# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Which path a call takes: choose, plan and explain agree, are pure, and say why."""

from __future__ import annotations

from typing import NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_router import BackendUnavailableError, RouterConfig, dispatch, explain
from dsv4_router.config import PRESETS
from dsv4_router.dispatch import BACKENDS, PATHS, Availability, Plan, Request

_why = st.one_of(st.none(), st.sampled_from(["no such package", "too old"]))
_capabilities = st.one_of(st.none(), st.tuples(st.integers(5, 13), st.integers(0, 9)))
requests = st.builds(
    Request,
    hidden_size=st.integers(1, 1 << 16),
    num_experts=st.integers(1, 1024),
    top_k=st.integers(1, 16),
    num_tokens=st.integers(0, 1 << 20),
    batch_invariant=st.booleans(),
)
availabilities = st.builds(
    Availability,
    device=st.sampled_from(["cpu", "cuda", "cuda:0", "cuda:7", "mps"]),
    compute_capability=_capabilities,
    missing_device=_why,
    missing_cuda_python=_why,
    missing_cutlass_dsl=_why,
)
backends = st.sampled_from(BACKENDS)
A_REQUEST = Request(4096, 256, 6, 17)
COMPLETE_GPU = Availability("cuda:0", compute_capability=(9, 0))


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


@given(requests, availabilities)
def test_auto_takes_the_first_path_that_can(request: Request, availability: Availability) -> None:
    refusals = [refusal(path, request, availability) for path in PATHS]
    can = [path for path, why in zip(PATHS, refusals, strict=True) if why is None]
    if not can:
        with pytest.raises(BackendUnavailableError):
            dispatch.choose(request, availability)
        return
    plan = dispatch.plan(request, availability)
    assert plan.path == can[0]
    before = PATHS[: PATHS.index(plan.path)]
    assert plan.rejected == tuple(zip(before, refusals, strict=False))
    assert all(why for _, why in plan.rejected)


@given(requests, availabilities)
def test_auto_refuses_only_batch_invariance_on_cuda(request: Request, availability: Availability) -> None:
    if request.batch_invariant and availability.is_cuda:
        assert outcome(request, availability, "auto") not in ("cublas", "reference")
    else:
        assert outcome(request, availability, "auto") in PATHS


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
        assert f"{backend}: {why}" in message
        assert not any(f"{path}: " in message for path in PATHS if path != backend)


@given(requests, availabilities)
def test_when_none_can_every_reason_is_named(request: Request, availability: Availability) -> None:
    chosen = outcome(request, availability, "auto")
    if chosen not in PATHS:
        for path in PATHS:
            assert f"{path}: {refusal(path, request, availability)}" in chosen


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
    ("availability", "path"),
    [
        (Availability("cpu"), "reference"),
        (Availability("mps"), "reference"),
        (Availability("cuda:0", compute_capability=(7, 5)), "reference"),
        (Availability("cuda:0", missing_device="torch sees no CUDA GPU"), "reference"),
        (Availability("cuda:0", compute_capability=(9, 0), missing_cuda_python="no cuda-python"), "reference"),
        (Availability("cuda:0", compute_capability=(8, 0), missing_cutlass_dsl="no DSL"), "cublas"),
    ],
)
def test_paths_without_the_one_launch_kernel(availability: Availability, path: str) -> None:
    assert dispatch.choose(A_REQUEST, availability) == path
    assert dispatch.hash_path(availability) == ("cuda" if path == "cublas" else "reference")


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


def test_batch_invariance_is_a_reason() -> None:
    invariant = A_REQUEST._replace(batch_invariant=True)
    assert dispatch.choose(invariant, Availability("cpu")) == "reference"
    with pytest.raises(BackendUnavailableError, match="batch-invariant"):
        dispatch.choose(invariant, COMPLETE_GPU, "cublas")
    with pytest.raises(BackendUnavailableError, match="batch_invariant"):
        dispatch.choose(invariant, COMPLETE_GPU, "reference")


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS.keys())
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_explain_presets(config: RouterConfig, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    plan = explain(config, 33, device)
    assert isinstance(plan, Plan)
    assert plan.path == "reference"
    assert [path for path, _ in plan.rejected] == ["decode", "cublas"]
    assert plan.request == Request(config.hidden_size, config.num_experts, config.top_k, 33, False)
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
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailableError, match="one-launch kernel"):
            explain(config, 1, "cuda", batch_invariant=True)


def test_availability_of_the_cpu_is_asked_once() -> None:
    found = dispatch.availability(torch.device("cpu"))
    assert found is dispatch.availability(torch.device("cpu"))
    assert not found.is_cuda
    assert found.compute_capability is None
