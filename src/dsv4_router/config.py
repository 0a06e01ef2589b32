# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""What a router is, in numbers: the shapes it may have, the published models, and reading a model's configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import type_error, value_error

# The one statement of the limits, for arguments, configurations and kernels alike.
MAX_NUM_EXPERTS = 1024
MAX_TOP_K = 16
FLOAT32_MAX = 3.4028234663852886e38
CONFIG_FILE = "config.json"  # of a model's folder


def check_integer(argument: str, value: object, low: int, high: int | None, what: str | None = None) -> None:
    """Raises unless ``value`` is an int (no bool) from ``low`` to ``high``; None means no upper limit."""
    if type(value) is int and low <= value and (high is None or value <= high):
        return
    limits = what or (f"an int from {low} to {high}" if high is not None else f"an int of at least {low}")
    if type(value) is not int:
        raise type_error(argument, limits, value)
    raise value_error(argument, limits, value)


def check_top_k(top_k: object, num_experts: int) -> None:
    """Raises unless ``top_k`` is an int from 1 to min(16, num_experts)."""
    limit = min(MAX_TOP_K, num_experts)
    check_integer("top_k", top_k, 1, limit, f"an int from 1 to {limit} (at most {MAX_TOP_K}, and num_experts)")


def check_scaling_factor(value: object) -> None:
    """Raises unless ``routed_scaling_factor`` is a Python number within the range of fp32."""
    if type(value) is not float and type(value) is not int:
        raise type_error("routed_scaling_factor", "a finite float", value)
    if not abs(value) <= FLOAT32_MAX:  # NaN too
        raise value_error("routed_scaling_factor", "a finite float, as fp32", value)


@dataclass(frozen=True)
class RouterConfig:
    """The router of one model: sizes of its dense and hash layers.

    Attributes:
        hidden_size: H, elements of a hidden state.
        num_experts: E, routed experts, 1 to 1024.
        top_k: k, experts per token, 1 to min(16, E).
        routed_scaling_factor: what the normalised weights are multiplied by.
        num_layers: layers of the model. Of these the first ``num_hash_layers`` route by token id.
        vocab_size: rows of a hash layer's table.
        name: for people.
    """

    hidden_size: int
    num_experts: int
    top_k: int
    routed_scaling_factor: float
    num_layers: int = 1
    num_hash_layers: int = 0
    vocab_size: int = 129280
    name: str = field(default="custom", compare=False)

    def __post_init__(self) -> None:
        check_integer("hidden_size", self.hidden_size, 1, None)
        check_integer("num_experts", self.num_experts, 1, MAX_NUM_EXPERTS)
        check_top_k(self.top_k, self.num_experts)
        check_scaling_factor(self.routed_scaling_factor)
        check_integer("num_layers", self.num_layers, 1, None)
        check_integer("num_hash_layers", self.num_hash_layers, 0, self.num_layers)
        check_integer("vocab_size", self.vocab_size, 1, None)

    def __str__(self) -> str:
        return (
            f"{self.name}: H={self.hidden_size} E={self.num_experts} k={self.top_k} "
            f"scaling={self.routed_scaling_factor} layers={self.num_layers} (hash: {self.num_hash_layers}) "
            f"vocabulary={self.vocab_size}"
        )

    def is_hash_layer(self, layer: int) -> bool:
        """Whether layer ``layer`` (from 0) routes by token id."""
        check_integer("layer", layer, 0, self.num_layers - 1)
        return layer < self.num_hash_layers

    @classmethod
    def from_hf_config(cls, source: Mapping[str, Any] | str | Path) -> RouterConfig:
        """Reads a DeepSeek-V4 ``config.json``.

        Args:
            source: the configuration as a mapping, or the path of a ``config.json`` or of the folder that holds one.

        Raises:
            TypeError, ValueError: a key is missing or wrong, or the model scores or normalises in another way than
                DeepSeek-V4 (``scoring_func``, ``norm_topk_prob``, group-limited selection).
            FileNotFoundError: there is no such file.
        """
        if isinstance(source, str | Path):
            path = Path(source)
            path = path / CONFIG_FILE if path.is_dir() else path
            try:
                source = json.loads(path.read_text())
            except ValueError as error:  # not JSON, or not even text
                raise ValueError(f"source: expected a JSON file, got {path} ({error})") from None
        if not isinstance(source, Mapping):
            raise type_error("source", "a mapping or a path", source)
        return _from_mapping(source)


# In a configuration, each of these must have the given value, if it is there at all.
_REQUIRED_VALUES: dict[str, tuple[object, ...]] = {
    "scoring_func": ("sqrtsoftplus",),
    "norm_topk_prob": (True,),
    "n_group": (None, 1),
    "topk_group": (None, 1),
}


def _from_mapping(source: Mapping[str, Any]) -> RouterConfig:
    for key, allowed in _REQUIRED_VALUES.items():
        if key in source and source[key] not in allowed:
            raise value_error(key, " or ".join(repr(value) for value in allowed), source[key])
    wanted = {
        "hidden_size": ("hidden_size",),
        "num_experts": ("n_routed_experts", "num_local_experts"),
        "top_k": ("num_experts_per_tok",),
        "routed_scaling_factor": ("routed_scaling_factor",),
        "num_layers": ("num_hidden_layers",),
        "vocab_size": ("vocab_size",),
    }
    values: dict[str, Any] = {}
    for field_name, keys in wanted.items():
        found = [source[key] for key in keys if key in source]
        if not found:
            raise ValueError(
                f"source: expected the key {' or '.join(map(repr, keys))}, got {sorted(map(str, source))[:20]}"
            )
        values[field_name] = found[0]
    name = source.get("_name_or_path") or source.get("model_type") or "custom"
    return RouterConfig(**values, num_hash_layers=_count_hash_layers(source), name=str(name))


def _count_hash_layers(source: Mapping[str, Any]) -> int:
    kinds = source.get("mlp_layer_types")
    if kinds is None:
        declared: int = source.get("num_hash_layers", 0)
        check_integer("num_hash_layers", declared, 0, None)
        return declared
    what = "one of 'hash_moe' and 'moe' for each of num_hidden_layers layers, hash layers first"
    if not isinstance(kinds, list | tuple):
        raise type_error("mlp_layer_types", what, kinds)
    count = kinds.count("hash_moe")
    if (
        list(kinds) != ["hash_moe"] * count + ["moe"] * (len(kinds) - count)
        or len(kinds) != source["num_hidden_layers"]
    ):
        raise value_error("mlp_layer_types", what, kinds)
    return count


V4_FLASH = RouterConfig(4096, 256, 6, 1.5, num_layers=43, num_hash_layers=3, name="DeepSeek-V4-Flash")
V4_PRO = RouterConfig(7168, 384, 6, 2.5, num_layers=61, num_hash_layers=3, name="DeepSeek-V4-Pro")
V4_1_FLASH = RouterConfig(5120, 384, 6, 1.5, num_layers=40, name="DeepSeek-V4.1-Flash")
V4_1_FLASH_DRAFT = RouterConfig(5120, 128, 3, 1.5, name="DeepSeek-V4.1-Flash draft layer")

PRESETS: dict[str, RouterConfig] = {
    "v4-flash": V4_FLASH,
    "v4-pro": V4_PRO,
    "v4.1-flash": V4_1_FLASH,
    "v4.1-flash-draft": V4_1_FLASH_DRAFT,
}
