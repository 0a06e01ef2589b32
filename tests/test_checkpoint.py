# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Reading routers from safetensors: every layout, and every way in which a checkpoint can be wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from dsv4_router import DenseRouter, HashRouter, Router, RouterConfig, api, testing
from dsv4_router.checkpoint import RouterTensors, load_router, load_tensors

# `python -m pytest` puts this repository first on sys.path, where transformers would take its folder kernels/ for the
# package of that name.
with pytest.MonkeyPatch.context() as _patch:
    _root = Path(__file__).resolve().parent.parent
    _patch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).resolve() != _root])
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter, DeepseekV4TopKRouter

TINY = RouterConfig(64, 16, 4, 1.5, num_layers=3, num_hash_layers=1, vocab_size=50, name="tiny")
HF_CONFIG = {
    "hidden_size": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.5,
    "num_hidden_layers": 3,
    "num_hash_layers": 1,
    "vocab_size": 50,
}
PREFIXES = ["layers.{}.ffn.gate.", "model.layers.{}.mlp.gate.", "layers.{}.mlp.gate.", "model.layers.{}.ffn.gate."]
INDEX = "model.safetensors.index.json"
State = dict[str, torch.Tensor]


@pytest.fixture
def dense(seed: int) -> testing.DenseInputs:
    return testing.make_dense_inputs(TINY, 12, seed=seed)


@pytest.fixture
def hashed(seed: int) -> testing.HashInputs:
    return testing.make_hash_inputs(TINY, 12, seed=seed)


def router_state(dense: testing.DenseInputs, prefix: str = "layers.1.ffn.gate.", bias: str = "bias") -> State:
    return {f"{prefix}weight": dense.gate_weight, f"{prefix}{bias}": dense.correction_bias}


def hash_state(hashed: testing.HashInputs, prefix: str = "layers.0.ffn.gate.") -> State:
    return {f"{prefix}weight": hashed.gate_weight, f"{prefix}tid2eid": hashed.hash_lut}


def save(folder: Path, state: State, name: str = "model.safetensors") -> Path:
    save_file({key: tensor.clone() for key, tensor in state.items()}, folder / name)
    return folder / name


def save_shards(folder: Path, **shards: State) -> None:
    """One file for each argument, with numbers of their own as names, and the index of all."""
    weight_map = {}
    for shard, state in shards.items():
        save(folder, state, f"{shard}.safetensors")
        weight_map |= dict.fromkeys(state, f"{shard}.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_one_line(caught: pytest.ExceptionInfo[BaseException], *texts: str) -> None:
    message = str(caught.value)
    assert "\n" not in message
    for text in texts:
        assert text in message


# Reading tensors


@pytest.mark.parametrize("layer", [0, 1, 12])
@pytest.mark.parametrize("bias", ["bias", "e_score_correction_bias"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_layouts(prefix: str, bias: str, layer: int, dense: testing.DenseInputs, tmp_path: Path) -> None:
    prefix = prefix.format(layer)
    # A router beside it, whose number begins or ends alike, holds something else.
    other = f"layers.{layer}1.ffn.gate."
    file = save(tmp_path, router_state(dense, prefix, bias) | {f"{other}weight": torch.zeros(16, 64)})
    for path in (file, tmp_path, str(file)):
        tensors = load_tensors(path, layer)
        assert torch.equal(tensors.weight, dense.gate_weight)
        assert tensors.weight.dtype is torch.bfloat16
        assert tensors.bias is not None
        assert torch.equal(tensors.bias, dense.correction_bias)
        assert (tensors.tid2eid, tensors.prefix, tensors.source) == (None, prefix, Path(path))


def test_order_of_the_layouts(tmp_path: Path) -> None:
    state = {prefix.format(1) + "weight": torch.full((16, 64), float(i)) for i, prefix in enumerate(PREFIXES)}
    for i, prefix in enumerate(PREFIXES):
        tensors = load_tensors(save(tmp_path, state), 1)
        assert tensors.prefix == prefix.format(1)
        assert (tensors.weight == i).all()
        del state[tensors.prefix + "weight"]


@pytest.mark.parametrize("layer", ["mtp.0.ffn.gate", "mtp.0.ffn.gate."])
def test_prefix_with_and_without_a_dot(layer: str, dense: testing.DenseInputs, tmp_path: Path) -> None:
    state = router_state(dense, "mtp.0.ffn.gate.") | {"layers.0.ffn.gate.weight": torch.zeros(16, 64)}
    tensors = load_tensors(save(tmp_path, state), layer)
    assert tensors.prefix == "mtp.0.ffn.gate."
    assert torch.equal(tensors.weight, dense.gate_weight)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tables_stay_as_they_are(dtype: torch.dtype, hashed: testing.HashInputs, tmp_path: Path) -> None:
    state = hash_state(hashed._replace(hash_lut=hashed.hash_lut.to(dtype)))
    tensors = load_tensors(save(tmp_path, state), 0)
    assert tensors.bias is None
    assert tensors.tid2eid is not None
    assert tensors.tid2eid.dtype is dtype
    assert torch.equal(tensors.tid2eid.long(), hashed.hash_lut)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bias_becomes_float32(dtype: torch.dtype, dense: testing.DenseInputs, tmp_path: Path) -> None:
    bias = dense.correction_bias.to(dtype)
    tensors = load_tensors(save(tmp_path, router_state(dense._replace(correction_bias=bias))), 1)
    assert tensors.bias is not None
    assert tensors.bias.dtype is torch.float32
    assert torch.equal(tensors.bias, bias.float())


def test_tensors_are_frozen(dense: testing.DenseInputs, tmp_path: Path) -> None:
    tensors = load_tensors(save(tmp_path, router_state(dense)), 1)
    assert isinstance(tensors, RouterTensors)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tensors.prefix = "other"  # type: ignore[misc]


def test_tensors_in_different_shards(dense: testing.DenseInputs, hashed: testing.HashInputs, tmp_path: Path) -> None:
    table, bias = hash_state(hashed), router_state(dense)
    one = {
        "layers.0.ffn.gate.weight": table["layers.0.ffn.gate.weight"],
        "layers.1.ffn.gate.bias": dense.correction_bias,
    }
    two = {"layers.0.ffn.gate.tid2eid": hashed.hash_lut, "layers.1.ffn.gate.weight": bias["layers.1.ffn.gate.weight"]}
    save_shards(tmp_path, one=one, two=two)
    first, second = load_tensors(tmp_path, 0), load_tensors(tmp_path, 1)
    assert torch.equal(first.weight, hashed.gate_weight)
    assert first.tid2eid is not None
    assert torch.equal(first.tid2eid, hashed.hash_lut)
    assert torch.equal(second.weight, dense.gate_weight)
    assert second.bias is not None
    assert torch.equal(second.bias, dense.correction_bias)
    (tmp_path / INDEX).unlink()  # and so without one
    assert torch.equal(load_tensors(tmp_path, 1).weight, dense.gate_weight)


def test_index_decides(dense: testing.DenseInputs, tmp_path: Path) -> None:
    zeros = dense._replace(gate_weight=torch.zeros(16, 64))
    save(tmp_path, router_state(zeros))
    save_shards(tmp_path, shard=router_state(dense))
    assert torch.equal(load_tensors(tmp_path, 1).weight, dense.gate_weight)
    (tmp_path / INDEX).unlink()
    assert not load_tensors(tmp_path, 1).weight.any()  # model.safetensors, whatever lies beside it


def test_files_beside_a_checkpoint_do_not_matter(dense: testing.DenseInputs, tmp_path: Path) -> None:
    save(tmp_path, router_state(dense))
    (tmp_path / "other.safetensors").write_text("no tensors")
    assert torch.equal(load_tensors(tmp_path, 1).weight, dense.gate_weight)
    save_shards(tmp_path, shard=router_state(dense), absent={"x": torch.zeros(1)})
    (tmp_path / "absent.safetensors").unlink()
    assert torch.equal(load_tensors(tmp_path, 1).weight, dense.gate_weight)


def test_only_the_tensors_of_the_layer_are_read(
    dense: testing.DenseInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = safetensors.safe_open

    class Spy:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            assert options == {"framework": "pt"}
            self.file = real(*arguments, **options)

        def __enter__(self) -> Spy:
            return self

        def __exit__(self, *details: object) -> None:
            self.file.__exit__(*details)

        def keys(self) -> list[str]:
            return self.file.keys()

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self.file.get_tensor(name)

    state = router_state(dense) | router_state(dense, "layers.2.ffn.gate.") | {"embed.weight": torch.zeros(50, 64)}
    save(tmp_path, state)
    monkeypatch.setattr(safetensors, "safe_open", Spy)
    load_tensors(tmp_path, 1)
    assert sorted(read) == ["layers.1.ffn.gate.bias", "layers.1.ffn.gate.weight"]


def test_tensors_outlive_the_file(dense: testing.DenseInputs, tmp_path: Path) -> None:
    file = save(tmp_path, router_state(dense))
    tensors = load_tensors(file, 1)
    with file.open("r+b") as opened:  # in place: what maps the file would change
        opened.write(bytes(os.path.getsize(file)))
    assert torch.equal(tensors.weight, dense.gate_weight)


# What is missing


@pytest.mark.parametrize("name", ["absent", "absent.safetensors"])
def test_missing_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder") as caught:
        load_tensors(tmp_path / name, 0)
    assert_one_line(caught, str(tmp_path / name))


def test_folder_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected model.safetensors.index.json or \*.safetensors") as caught:
        load_tensors(tmp_path, 0)
    assert_one_line(caught, str(tmp_path))


def test_missing_shard(dense: testing.DenseInputs, tmp_path: Path) -> None:
    save_shards(tmp_path, shard=router_state(dense))
    (tmp_path / "shard.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no such file") as caught:
        load_tensors(tmp_path, 1)
    assert_one_line(caught, str(tmp_path / "shard.safetensors"))


def test_shard_without_the_tensor(dense: testing.DenseInputs, tmp_path: Path) -> None:
    save_shards(tmp_path, shard=router_state(dense))
    save(tmp_path, {"other": torch.zeros(1)}, "shard.safetensors")
    with pytest.raises(ValueError, match=r"layers.1.ffn.gate.weight: expected it in .*shard.safetensors") as caught:
        load_tensors(tmp_path, 1)
    assert_one_line(caught, "got other")


def test_missing_layer_names_what_was_looked_for_and_what_exists(dense: testing.DenseInputs, tmp_path: Path) -> None:
    state: State = {}
    for layer in range(12):
        state |= router_state(dense, f"layers.{layer}.ffn.gate.")
    save(tmp_path, state)
    with pytest.raises(ValueError, match=r"layer: expected the tensor layers.40.ffn.gate.weight or ") as caught:
        load_tensors(tmp_path, 40)
    assert_one_line(caught, *(prefix.format(40) + "weight" for prefix in PREFIXES), str(tmp_path))
    # In the order of their numbers, and not all.
    assert_one_line(caught, "layers.1.ffn.gate, layers.2.ffn.gate, layers.3.ffn.gate", "... (12 in all)")
    assert "layers.8.ffn.gate" not in str(caught.value)
    with pytest.raises(ValueError, match=r"expected the tensor mtp.0.ffn.gate.weight in .*, got the routers layers.0"):
        load_tensors(tmp_path, "mtp.0.ffn.gate")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"layers.1.ffn.gate.bias": torch.zeros(16)}, "got only layers.1.ffn.gate.bias"),
        ({"embed.weight": torch.zeros(2, 2)}, "got no router but embed.weight"),
        ({}, "got no router but no tensors"),
    ],
)
def test_missing_weight(state: State, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_tensors(save(tmp_path, state), 1)
    assert_one_line(caught, "layers.1.ffn.gate.weight")


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (-1, ValueError, "layer: expected an int of at least 0, got int -1"),
        (True, TypeError, "layer: expected an int or the prefix"),
        (1.0, TypeError, "layer: expected an int or the prefix"),
        (None, TypeError, "layer: expected an int or the prefix"),
    ],
)
def test_wrong_layer(
    layer: Any, error: type[Exception], message: str, dense: testing.DenseInputs, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        load_tensors(save(tmp_path, router_state(dense)), layer)


# What is damaged or wrong


@pytest.mark.parametrize(
    "damage",
    [lambda whole: b"", lambda whole: whole[:-1], lambda whole: whole[:20], lambda whole: b"no tensors at all" * 9],
    ids=["empty", "cut", "header cut", "text"],
)
def test_damaged_file(damage: Callable[[bytes], bytes], dense: testing.DenseInputs, tmp_path: Path) -> None:
    save_shards(tmp_path, shard=router_state(dense))
    file = tmp_path / "shard.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    for path in (file, tmp_path):
        with pytest.raises(ValueError, match="path: expected a safetensors file") as caught:
            load_tensors(path, 1)
        assert_one_line(caught, str(file))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "expected a JSON file"),
        ("", "expected a JSON file"),
        ("[]", "expected a 'weight_map'"),
        ("{}", "expected a 'weight_map'"),
        ('{"weight_map": {"layers.1.ffn.gate.weight": 3}}', "expected a 'weight_map'"),
    ],
)
def test_damaged_index(index: str, message: str, dense: testing.DenseInputs, tmp_path: Path) -> None:
    save(tmp_path, router_state(dense))
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(ValueError, match=message) as caught:
        load_tensors(tmp_path, 1)
    assert_one_line(caught, str(tmp_path / INDEX))


def test_same_name_in_two_files(dense: testing.DenseInputs, tmp_path: Path) -> None:
    save(tmp_path, router_state(dense), "a.safetensors")
    save(tmp_path, router_state(dense), "b.safetensors")
    with pytest.raises(ValueError, match=r"layers.1.ffn.gate.weight: expected it in one file") as caught:
        load_tensors(tmp_path, 1)
    assert_one_line(caught, "a.safetensors", "b.safetensors")


def test_both_biases(dense: testing.DenseInputs, tmp_path: Path) -> None:
    state = router_state(dense) | {"layers.1.ffn.gate.e_score_correction_bias": torch.zeros(16)}
    with pytest.raises(ValueError, match=r"expected one bias, got both layers.1.ffn.gate.bias and"):
        load_tensors(save(tmp_path, state), 1)


@pytest.mark.parametrize(
    ("name", "tensor", "error", "message"),
    [
        ("weight", torch.zeros(16, 64, dtype=torch.float16), TypeError, r"weight: .*got float16 \[16, 64\]"),
        ("weight", torch.zeros(16, 64).to(torch.float8_e4m3fn), TypeError, "weight: .*got float8_e4m3fn"),
        ("weight", torch.zeros(16, 64, dtype=torch.int32), TypeError, "weight: expected a bfloat16 or float32"),
        ("weight", torch.zeros(64), ValueError, r"weight: .*\[num_experts, hidden_size\]"),
        ("weight", torch.zeros(1, 16, 64), ValueError, r"weight: .*\[num_experts, hidden_size\]"),
        ("weight", torch.zeros(1025, 64), ValueError, "weight: .*num_experts from 1 to 1024"),
        ("weight", torch.zeros(0, 64), ValueError, "weight: .*num_experts from 1 to 1024"),
        ("weight", torch.zeros(16, 0), ValueError, r"weight: .*got float32 \[16, 0\]"),
        ("bias", torch.zeros(16, dtype=torch.int64), TypeError, "bias: expected a floating-point tensor"),
        ("bias", torch.zeros(15), ValueError, r"bias: expected a floating-point tensor \[16\]"),
        ("bias", torch.zeros(16, 1), ValueError, r"bias: expected a floating-point tensor \[16\]"),
        ("tid2eid", torch.zeros(50, 4, dtype=torch.bfloat16), TypeError, "tid2eid: .*got bfloat16"),
        ("tid2eid", torch.zeros(50, 4, dtype=torch.float32), TypeError, "tid2eid: expected an int32 or int64 tensor"),
        ("tid2eid", torch.zeros(50, 4, dtype=torch.uint8), TypeError, "tid2eid: .*got uint8"),
        ("tid2eid", torch.zeros(200, dtype=torch.int64), ValueError, r"tid2eid: .*\[vocab_size, top_k\]"),
    ],
)
def test_wrong_tensor(name: str, tensor: torch.Tensor, error: type[Exception], message: str, tmp_path: Path) -> None:
    state = {"layers.1.ffn.gate.weight": torch.zeros(16, 64)} | {f"layers.1.ffn.gate.{name}": tensor}
    with pytest.raises(error, match=rf"^layers.1.ffn.gate.{message}") as caught:
        load_tensors(save(tmp_path, state), 1)
    assert_one_line(caught)


# Routers


def test_load_dense_router(dense: testing.DenseInputs, tmp_path: Path) -> None:
    router = load_router(save(tmp_path, router_state(dense)), 1, config=TINY)
    assert type(router) is DenseRouter
    assert router.config is TINY
    assert router.weight.dtype is torch.bfloat16
    assert torch.equal(router.bias, dense.correction_bias)
    weights, ids = router(dense.hidden_states)
    expected = api.dense_route(*dense, 4, 1.5)
    assert torch.equal(weights, expected[0])
    assert torch.equal(ids, expected[1])


@pytest.mark.parametrize("shards", [False, True])
def test_a_dense_router_without_its_bias_is_refused(shards: bool, dense: testing.DenseInputs, tmp_path: Path) -> None:
    """It would route, to other experts: as of a lone shard, when the bias is in another one."""
    file = save(tmp_path, {"layers.1.ffn.gate.weight": dense.gate_weight})
    if shards:
        save(tmp_path, {"layers.1.ffn.gate.bias": dense.correction_bias}, "second.safetensors")
    names = r"layers\.1\.ffn\.gate\.bias or layers\.1\.ffn\.gate\.e_score_correction_bias"
    with pytest.raises(ValueError, match=rf"^layer: expected the tensor {names} in .+, got neither$"):
        load_router(file, 1, config=TINY)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_load_hash_router(dtype: torch.dtype, hashed: testing.HashInputs, tmp_path: Path) -> None:
    hashed = hashed._replace(hash_lut=hashed.hash_lut.to(dtype))
    state = hash_state(hashed) | {"layers.0.ffn.gate.bias": torch.ones(16)}  # not used: hash routing has no bias
    router = load_router(save(tmp_path, state), 0, config=TINY)
    assert type(router) is HashRouter
    assert router.tid2eid.dtype is dtype
    weights, ids = router(hashed.hidden_states, hashed.token_ids)
    expected = api.hash_route(
        hashed.token_ids,
        hashed.hash_lut,
        4,
        hidden_states=hashed.hidden_states,
        gate_weight=hashed.gate_weight,
        routed_scaling_factor=1.5,
    )
    assert torch.equal(weights, expected[0])
    assert torch.equal(ids, expected[1])


def test_table_makes_a_hash_router_whatever_the_configuration_says(hashed: testing.HashInputs, tmp_path: Path) -> None:
    file = save(tmp_path, hash_state(hashed, "layers.2.ffn.gate."))
    assert type(load_router(file, 2, config=TINY)) is HashRouter


def test_float32_weight_stays_float32(dense: testing.DenseInputs, tmp_path: Path) -> None:
    weight = torch.linspace(-1, 1, 16 * 64).view(16, 64)
    router = load_router(save(tmp_path, router_state(dense._replace(gate_weight=weight))), 1, config=TINY)
    assert router.weight.dtype is torch.float32
    assert torch.equal(router.weight, weight)


def test_device(dense: testing.DenseInputs, tmp_path: Path) -> None:
    router = load_router(save(tmp_path, router_state(dense)), 1, config=TINY, device=torch.device("meta"))
    assert {tensor.device.type for tensor in router.state_dict().values()} == {"meta"}


def test_device_does_not_follow_torchs_context(
    dense: testing.DenseInputs, hashed: testing.HashInputs, tmp_path: Path
) -> None:
    save(tmp_path, router_state(dense) | hash_state(hashed))
    for layer in (0, 1):
        with torch.device("meta"):
            router = load_router(tmp_path, layer, config=TINY)
        assert {tensor.device.type for tensor in router.state_dict().values()} == {"cpu"}
        assert torch.equal(router.weight, (hashed if layer == 0 else dense).gate_weight)


def test_arguments_that_name_nothing(dense: testing.DenseInputs, tmp_path: Path) -> None:
    file = save(tmp_path, router_state(dense))
    with pytest.raises(ValueError, match=r"^device: expected a torch\.device or its name, got str 'gpu'"):
        load_router(file, 1, config=TINY, device="gpu")
    with pytest.raises(TypeError, match=r"^device: expected a torch\.device or its name, got int 7"):
        load_router(file, 1, config=TINY, device=7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^path: expected a str or a path, got int 5"):
        load_router(5, 1, config=TINY)  # type: ignore[arg-type]


def test_configuration_of_the_folder(dense: testing.DenseInputs, hashed: testing.HashInputs, tmp_path: Path) -> None:
    file = save(tmp_path, router_state(dense) | hash_state(hashed))
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    for path in (tmp_path, file):
        assert load_router(path, 1).config == TINY
        assert type(load_router(path, 0)) is HashRouter
    given = dataclasses.replace(TINY, routed_scaling_factor=7.0)
    assert load_router(tmp_path, 1, config=given).config is given


def test_from_checkpoint(dense: testing.DenseInputs, hashed: testing.HashInputs, tmp_path: Path) -> None:
    save(tmp_path, router_state(dense) | hash_state(hashed))
    router = Router.from_checkpoint(tmp_path, 1, config=TINY, device="cpu")
    assert type(router) is DenseRouter
    assert torch.equal(router.bias, dense.correction_bias)
    assert type(HashRouter.from_checkpoint(tmp_path, "layers.0.ffn.gate", config=TINY)) is HashRouter
    with pytest.raises(TypeError, match="expected one with a HashRouter, got 1 with a DenseRouter"):
        HashRouter.from_checkpoint(tmp_path, 1, config=TINY)


def test_routers_of_transformers_load(seed: int, tmp_path: Path) -> None:
    theirs_config = DeepseekV4Config(
        hidden_size=64, n_routed_experts=16, num_experts_per_tok=4, routed_scaling_factor=1.5, vocab_size=50
    )
    dense = testing.make_dense_inputs(TINY, 12, seed=seed, dtype=torch.float32)
    hashed = testing.make_hash_inputs(TINY, 12, seed=seed, dtype=torch.float32)
    their_dense, their_hash = DeepseekV4TopKRouter(theirs_config).float(), DeepseekV4HashRouter(theirs_config).float()
    their_dense.load_state_dict({"weight": dense.gate_weight, "e_score_correction_bias": dense.correction_bias})
    their_hash.load_state_dict({"weight": hashed.gate_weight, "tid2eid": hashed.hash_lut})
    state = {f"model.layers.0.mlp.gate.{name}": tensor for name, tensor in their_hash.state_dict().items()}
    state |= {f"model.layers.1.mlp.gate.{name}": tensor for name, tensor in their_dense.state_dict().items()}
    save(tmp_path, state)

    with torch.no_grad():
        _, their_weights, their_ids = their_dense(dense.hidden_states)
        _, their_hash_weights, their_hash_ids = their_hash(hashed.hidden_states, hashed.token_ids)
    weights, ids = load_router(tmp_path, 1, config=TINY)(dense.hidden_states, ids_dtype=torch.int64)
    ids, order = ids.sort(dim=-1)
    their_ids, their_order = their_ids.sort(dim=-1)
    assert torch.equal(ids, their_ids)
    torch.testing.assert_close(weights.gather(1, order), their_weights.gather(1, their_order), rtol=1e-5, atol=0)
    weights, ids = load_router(tmp_path, 0, config=TINY)(hashed.hidden_states, hashed.token_ids)
    assert torch.equal(ids.long(), their_hash_ids)
    torch.testing.assert_close(weights, their_hash_weights, rtol=1e-5, atol=0)


def test_no_configuration(dense: testing.DenseInputs, tmp_path: Path) -> None:
    file = save(tmp_path, router_state(dense))
    for path in (tmp_path, file):
        with pytest.raises(ValueError, match="pass config") as caught:
            load_router(path, 1)
        assert_one_line(caught, str(tmp_path / "config.json"))
    with pytest.raises(TypeError, match="config: expected None or a RouterConfig, got dict"):
        load_router(file, 1, config=HF_CONFIG)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "layer", "message"),
    [
        ({"num_experts": 17}, 1, r"layers.1.ffn.gate.weight: expected \[17, 64\].*got bfloat16 \[16, 64\]"),
        ({"num_experts": 17}, 0, r"layers.0.ffn.gate.weight: expected \[17, 64\]"),
        ({"hidden_size": 32}, 1, r"layers.1.ffn.gate.weight: expected \[16, 32\]"),
        ({"top_k": 3}, 0, r"layers.0.ffn.gate.tid2eid: expected \[50, 3\].*got int64 \[50, 4\]"),
        ({"vocab_size": 51}, 0, r"layers.0.ffn.gate.tid2eid: expected \[51, 4\]"),
        ({"num_hash_layers": 2}, 1, "layers.1.ffn.gate.tid2eid: expected a table, .*hash layer"),
        ({"num_hash_layers": 2}, "layers.1.ffn.gate", "layers.1.ffn.gate.tid2eid: expected a table, .*hash layer"),
    ],
)
def test_tensors_that_do_not_fit_the_configuration(
    changes: dict[str, int],
    layer: int | str,
    message: str,
    dense: testing.DenseInputs,
    hashed: testing.HashInputs,
    tmp_path: Path,
) -> None:
    save(tmp_path, router_state(dense) | hash_state(hashed))
    assert isinstance(load_router(tmp_path, layer, config=TINY), Router)
    with pytest.raises(ValueError, match=message) as caught:
        load_router(tmp_path, layer, config=dataclasses.replace(TINY, **changes))  # type: ignore[arg-type]
    assert_one_line(caught)


def test_layer_number_of_a_draft_layer_is_its_own(dense: testing.DenseInputs, tmp_path: Path) -> None:
    file = save(tmp_path, router_state(dense, "mtp.0.ffn.gate."))  # of a model whose layer 0 is a hash layer
    assert type(load_router(file, "mtp.0.ffn.gate", config=TINY)) is DenseRouter


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("entry", [-1, 16, 2**31 - 1])
def test_table_that_names_no_expert(entry: int, dtype: torch.dtype, hashed: testing.HashInputs, tmp_path: Path) -> None:
    table = hashed.hash_lut.to(dtype, copy=True)
    table[49, 3] = 15
    assert load_router(save(tmp_path, hash_state(hashed._replace(hash_lut=table))), 0, config=TINY)
    table[49, 3] = entry
    file = save(tmp_path, hash_state(hashed._replace(hash_lut=table)))
    with pytest.raises(ValueError, match=rf"gate.tid2eid: expected expert ids from 0 to 15, got {entry} ") as caught:
        load_router(file, 0, config=TINY)
    assert_one_line(caught, "layers.0.ffn.gate.tid2eid")
