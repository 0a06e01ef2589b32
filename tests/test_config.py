# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""RouterConfig: the published shapes, the limits, and reading a model's configuration."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from dsv4_router import V4_1_FLASH, V4_1_FLASH_DRAFT, V4_FLASH, V4_PRO, RouterConfig
from dsv4_router.config import MAX_NUM_EXPERTS, MAX_TOP_K, PRESETS

VALID: dict[str, Any] = {
    "hidden_size": 64,
    "num_experts": 16,
    "top_k": 3,
    "routed_scaling_factor": 1.5,
    "num_layers": 8,
    "num_hash_layers": 2,
    "vocab_size": 100,
}
HF: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "hidden_size": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 2.5,
    "num_hidden_layers": 5,
    "num_hash_layers": 2,
    "vocab_size": 100,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
}


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in HF.items() if key not in keys}


@pytest.mark.parametrize(
    ("preset", "hidden_size", "num_experts", "top_k", "scaling", "layers", "hash_layers"),
    [
        (V4_FLASH, 4096, 256, 6, 1.5, 43, 3),
        (V4_PRO, 7168, 384, 6, 2.5, 61, 3),
        (V4_1_FLASH, 5120, 384, 6, 1.5, 40, 0),
        (V4_1_FLASH_DRAFT, 5120, 128, 3, 1.5, 1, 0),
    ],
    ids=lambda value: value.name if isinstance(value, RouterConfig) else "",
)
def test_presets_are_the_published_shapes(
    preset: RouterConfig,
    hidden_size: int,
    num_experts: int,
    top_k: int,
    scaling: float,
    layers: int,
    hash_layers: int,
) -> None:
    assert preset == RouterConfig(hidden_size, num_experts, top_k, scaling, layers, hash_layers, vocab_size=129280)
    assert [layer for layer in range(layers) if preset.is_hash_layer(layer)] == list(range(hash_layers))
    assert preset in PRESETS.values()


def test_presets_are_named() -> None:
    assert {
        "v4-flash": V4_FLASH,
        "v4-pro": V4_PRO,
        "v4.1-flash": V4_1_FLASH,
        "v4.1-flash-draft": V4_1_FLASH_DRAFT,
    } == PRESETS


def test_str_names_every_field() -> None:
    text = str(RouterConfig(**{**VALID, "routed_scaling_factor": 1.25}, name="mine"))
    for part in ("mine", "H=64", "E=16", "k=3", "1.25", "layers=8", "hash: 2", "vocabulary=100"):
        assert part in text


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(RouterConfig)])
def test_frozen(field: str) -> None:
    config = RouterConfig(**VALID)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, getattr(config, field))
    assert config == RouterConfig(**VALID)


def test_hashable_and_name_is_not_compared() -> None:
    one, other = RouterConfig(**VALID, name="one"), RouterConfig(**VALID, name="other")
    assert one == other
    assert len({one, other}) == 1
    assert one != dataclasses.replace(one, top_k=4)


def test_limits_are_inclusive() -> None:
    assert RouterConfig(1, 1, 1, 1.0, vocab_size=1).num_experts == 1
    largest = RouterConfig(1 << 20, MAX_NUM_EXPERTS, MAX_TOP_K, -1, num_layers=3, num_hash_layers=3)
    assert (largest.num_experts, largest.top_k) == (1024, 16)
    assert RouterConfig(64, 5, 5, 1.0).top_k == 5


@pytest.mark.parametrize(
    ("layer", "error"), [(-1, ValueError), (8, ValueError), (True, TypeError), (1.0, TypeError), (None, TypeError)]
)
def test_layer_out_of_range(layer: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"layer: expected an int from 0 to 7, got"):
        RouterConfig(**VALID).is_hash_layer(layer)


def test_from_dict() -> None:
    config = RouterConfig.from_hf_config(HF)
    assert config == RouterConfig(64, 16, 3, 2.5, num_layers=5, num_hash_layers=2, vocab_size=100)
    assert config.name == "deepseek_v4"


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("folder", [False, True])
def test_from_file_and_folder(tmp_path: Path, folder: bool, as_text: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF))
    path = tmp_path if folder else tmp_path / "config.json"
    assert RouterConfig.from_hf_config(str(path) if as_text else path) == RouterConfig.from_hf_config(HF)


def test_file_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps(HF))
    assert RouterConfig.from_hf_config(tmp_path / "other.json") == RouterConfig.from_hf_config(HF)


def test_missing_file_and_folder_without_one(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(FileNotFoundError):
            RouterConfig.from_hf_config(path)


def test_from_transformers_defaults() -> None:
    config = RouterConfig.from_hf_config(DeepseekV4Config().to_dict())
    assert config == V4_FLASH


def test_from_transformers_pro() -> None:
    published: dict[str, Any] = {"num_hash_layers": 3}  # which transformers turns into mlp_layer_types
    hf = DeepseekV4Config(
        hidden_size=7168, n_routed_experts=384, routed_scaling_factor=2.5, num_hidden_layers=61, **published
    )
    assert RouterConfig.from_hf_config(hf.to_dict()) == V4_PRO


@pytest.mark.parametrize("num_hash_layers", [0, 1, 5])
def test_legacy_num_hash_layers(num_hash_layers: int) -> None:
    legacy = {**HF, "num_hash_layers": num_hash_layers}
    assert RouterConfig.from_hf_config(legacy).num_hash_layers == num_hash_layers


def test_num_local_experts_is_another_name() -> None:
    config = RouterConfig.from_hf_config({**without("n_routed_experts"), "num_local_experts": 24})
    assert config.num_experts == 24


@pytest.mark.parametrize("count", range(4))
def test_mlp_layer_types_decide(count: int) -> None:
    kinds = ["hash_moe"] * count + ["moe"] * (5 - count)
    config = RouterConfig.from_hf_config({**HF, "mlp_layer_types": kinds})  # and not num_hash_layers, which says 2
    assert config.num_hash_layers == count


def test_mlp_layer_types_null_falls_back_to_the_legacy_key() -> None:
    assert RouterConfig.from_hf_config({**HF, "mlp_layer_types": None}).num_hash_layers == 2


@pytest.mark.parametrize(
    "kinds",
    [
        ["moe", "hash_moe", "moe", "moe", "moe"],
        ["hash_moe", "moe", "hash_moe", "moe", "moe"],
        ["hash_moe", "moe"],
        ["hash_moe", "dense", "moe", "moe", "moe"],
        ["hash_moe"] * 6,
    ],
    ids=["late", "split", "too-few", "unknown-kind", "too-many"],
)
def test_wrong_mlp_layer_types(kinds: list[str]) -> None:
    with pytest.raises(ValueError, match=r"(mlp_layer_types|num_hash_layers): expected .+, got"):
        RouterConfig.from_hf_config({**HF, "mlp_layer_types": kinds})


@pytest.mark.parametrize("kinds", [5, "hash_moe", {"0": "hash_moe"}], ids=["int", "str", "dict"])
def test_mlp_layer_types_of_the_wrong_type(kinds: object) -> None:
    with pytest.raises((TypeError, ValueError), match=r"mlp_layer_types: expected .+, got"):
        RouterConfig.from_hf_config({**HF, "mlp_layer_types": kinds})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scoring_func", "sigmoid"),
        ("scoring_func", "softmax"),
        ("scoring_func", None),
        ("norm_topk_prob", False),
        ("norm_topk_prob", None),
        ("n_group", 8),
        ("topk_group", 4),
        ("n_group", 0),
    ],
)
def test_other_models_are_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{key}: expected .+, got"):
        RouterConfig.from_hf_config({**HF, key: value})


@pytest.mark.parametrize("key", ["scoring_func", "norm_topk_prob"])
def test_these_keys_may_be_absent(key: str) -> None:
    assert RouterConfig.from_hf_config(without(key)) == RouterConfig.from_hf_config(HF)


@pytest.mark.parametrize("value", [None, 1])
def test_no_groups(value: object) -> None:
    assert RouterConfig.from_hf_config({**HF, "n_group": value, "topk_group": value}).num_experts == 16


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "n_routed_experts",
        "num_experts_per_tok",
        "routed_scaling_factor",
        "num_hidden_layers",
        "vocab_size",
    ],
)
def test_missing_key(key: str) -> None:
    with pytest.raises(ValueError, match=rf"^source: expected the key .*'{key}'.*, got \["):
        RouterConfig.from_hf_config(without(key))


@pytest.mark.parametrize(
    ("key", "value", "argument", "error"),
    [
        ("hidden_size", None, "hidden_size", TypeError),
        ("n_routed_experts", 2048, "num_experts", ValueError),
        ("num_experts_per_tok", 17, "top_k", ValueError),
        ("routed_scaling_factor", "1.5", "routed_scaling_factor", TypeError),
        ("num_hidden_layers", 0, "num_layers", ValueError),
        ("num_hash_layers", -1, "num_hash_layers", ValueError),
        ("num_hash_layers", 6, "num_hash_layers", ValueError),
        ("num_hash_layers", 2.0, "num_hash_layers", TypeError),
        ("vocab_size", 1.5, "vocab_size", TypeError),
    ],
)
def test_wrong_value_in_a_configuration(key: str, value: object, argument: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{argument}: expected .+, got"):
        RouterConfig.from_hf_config({**HF, key: value})


@pytest.mark.parametrize("text", ["", "{", "not json", '{"hidden_size": }'])
def test_invalid_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"^source: expected a JSON file, got .*config\.json"):
        RouterConfig.from_hf_config(tmp_path)


def test_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ValueError, match=r"^source: expected a JSON file, got .*config\.json"):
        RouterConfig.from_hf_config(tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", "3"])
def test_json_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TypeError, match=r"^source: expected a mapping.*, got"):
        RouterConfig.from_hf_config(tmp_path)


@pytest.mark.parametrize("source", [None, 3, [HF], V4_FLASH, b"config.json"])
def test_source_of_the_wrong_type(source: Any) -> None:
    with pytest.raises(TypeError, match=r"^source: expected a mapping or a path, got"):
        RouterConfig.from_hf_config(source)
