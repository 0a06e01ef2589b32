# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Reads the router of one layer from safetensors, in the published layout or that of Hugging Face transformers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .config import CONFIG_FILE, MAX_NUM_EXPERTS, RouterConfig, check_integer
from .dispatch import check_device
from .errors import type_error, value_error
from .modules import DenseRouter, HashRouter, Router

_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
_PREFIXES = ("layers.{}.ffn.gate.", "model.layers.{}.mlp.gate.", "layers.{}.mlp.gate.", "model.layers.{}.ffn.gate.")
_BIAS_NAMES = ("bias", "e_score_correction_bias")
_LAYER_NUMBER = re.compile(r"(?:model\.)?layers\.(\d+)\.(?:ffn|mlp)\.gate\.")
_NAMES_SHOWN = 8


@dataclass(frozen=True)
class RouterTensors:
    """One layer's router as it is in the checkpoint, on the CPU.

    Attributes:
        weight: bf16 or fp32 [E, H].
        bias: fp32 [E], or None.
        tid2eid: int32 or int64 [vocabulary, k], or None.
        prefix: what the tensors' names begin with, up to and with the last dot.
        source: the file or folder that was asked for.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    tid2eid: torch.Tensor | None
    prefix: str
    source: Path


def load_tensors(path: str | Path, layer: int | str) -> RouterTensors:
    """Reads the router tensors of one layer, and nothing else.

    Args:
        path: a ``.safetensors`` file, or a folder. In a folder, the first of these that exists is the checkpoint:
            ``model.safetensors.index.json`` and the files it names, ``model.safetensors``, all ``*.safetensors``.
        layer: its number, or the prefix of its tensors' names, such as ``"mtp.0.ffn.gate"``.

    Raises:
        FileNotFoundError: there is no such file or folder, or a shard is missing.
        TypeError: a tensor has the wrong dtype; integer tables must be stored as integers.
        ValueError: the layer or its weight is missing, a name occurs twice, a tensor has the wrong shape, or a file
            is damaged.
    """
    if not isinstance(path, str | os.PathLike):
        raise type_error("path", "a str or a path", path)
    source = Path(path)
    files = _locate(source)
    prefix = _find_prefix(source, layer, files)
    biases = [prefix + name for name in _BIAS_NAMES if prefix + name in files]
    if len(biases) > 1:
        raise ValueError(f"layer: expected one bias, got both {biases[0]} and {biases[1]} in {source}")
    weight = _check_weight(prefix + "weight", _read(prefix + "weight", files))
    bias = _check_bias(biases[0], _read(biases[0], files), weight.shape[0]) if biases else None
    table_name = prefix + "tid2eid"
    table = _check_table(table_name, _read(table_name, files)) if table_name in files else None
    return RouterTensors(weight, bias, table, prefix, source)


def load_router(
    path: str | Path,
    layer: int | str,
    *,
    config: RouterConfig | None = None,
    device: torch.device | str = "cpu",
) -> Router:
    """The router of one layer of a checkpoint: a hash router if the layer has a table, else a dense router.

    A correction bias beside a table is not used: hash routing has none. A dense router must have one: without it, other
    experts would be chosen, and nobody would notice.

    Args:
        path, layer: as in :func:`load_tensors`.
        config: the model's; without it, ``config.json`` in the folder (of the file) is read.
        device: where the router's tensors go. Their dtypes stay those of the checkpoint.

    Raises:
        FileNotFoundError, TypeError: as :func:`load_tensors`.
        ValueError: as there; or ``device`` is the name of none, there is no configuration, the tensors do not fit it, a
            layer that it calls a hash layer has no table, a dense one has no bias, or the table names an expert outside
            [0, E).
    """
    if config is not None and not isinstance(config, RouterConfig):
        raise type_error("config", "None or a RouterConfig", config)
    device = check_device(device)
    tensors = load_tensors(path, layer)
    if config is None:
        config = _read_config(tensors.source)
    _check_fit(tensors, config)
    router: Router
    state = {"weight": tensors.weight}
    if tensors.tid2eid is not None:
        table_dtype = tensors.tid2eid.dtype
        router = HashRouter(config, dtype=tensors.weight.dtype, device="cpu", table_dtype=table_dtype)
        state["tid2eid"] = tensors.tid2eid
    else:
        router = DenseRouter(config, dtype=tensors.weight.dtype, device="cpu")
        assert tensors.bias is not None  # as _check_fit says
        state["bias"] = tensors.bias
    router.load_state_dict(state)
    return router.to(device)


def checkpoint_files(path: str | Path) -> list[Path]:
    """The files that :func:`load_router` may read.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_tensors`.
    """
    source = Path(path)
    folder = _folder(source)
    tensors = {file for files in _locate(source).values() for file in files}
    return [*sorted(tensors), folder / _INDEX, folder / CONFIG_FILE]


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise FileNotFoundError(f"path: no such file: {file}")
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"path: expected a safetensors file, got {file} ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _locate(source: Path) -> dict[str, list[Path]]:
    """Names of all tensors, and the files that hold each."""
    if source.is_dir():
        index = source / _INDEX
        if index.is_file():
            return {name: [source / shard] for name, shard in _read_index(index).items()}
        # Beside a checkpoint in one file there may be any others, such as inputs and outputs.
        whole, every = source / _WHOLE, source.glob("*.safetensors")
        listed = [whole] if whole.is_file() else sorted(file for file in every if file.is_file())
        if not listed:
            raise FileNotFoundError(f"path: expected {_INDEX} or *.safetensors in the folder {source}, got neither")
    elif source.is_file():
        listed = [source]
    else:
        raise FileNotFoundError(f"path: no such file or folder: {source}")
    files: dict[str, list[Path]] = {}
    for file in listed:
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                files.setdefault(name, []).append(file)
    return files


def _read_index(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"path: expected a JSON file, got {index} ({_one_line(error)})") from None
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"path: expected a 'weight_map' of tensor names to file names, got none in {index}")
    return shards


def _find_prefix(source: Path, layer: object, names: Iterable[str]) -> str:
    """The first prefix of the layer under which there is a weight."""
    held = set(names)
    if isinstance(layer, str):
        prefixes = [layer if layer.endswith(".") else layer + "."]
    elif type(layer) is int:
        check_integer("layer", layer, 0, None)
        prefixes = [prefix.format(layer) for prefix in _PREFIXES]
    else:
        raise type_error("layer", "an int or the prefix of tensor names", layer)
    for prefix in prefixes:
        if prefix + "weight" in held:
            return prefix
    wanted = " or ".join(prefix + "weight" for prefix in prefixes)
    near = [name for name in held if name.startswith(tuple(prefixes))]
    gates = [name.removesuffix(".weight") for name in held if name.endswith(".gate.weight")]
    if near:
        exists = f"only {_shorten(near)}"
    elif gates:
        exists = f"the routers {_shorten(gates)}"
    else:
        exists = f"no router but {_shorten(held)}"
    raise ValueError(f"layer: expected the tensor {wanted} in {source}, got {exists}")


def _shorten(names: Iterable[str]) -> str:
    """The first few names, numbers in their order."""
    every = sorted(names, key=lambda name: [int(p) if p.isdecimal() else p for p in re.split(r"([0-9]+)", name)])
    more = f", ... ({len(every)} in all)" if len(every) > _NAMES_SHOWN else ""
    return ", ".join(every[:_NAMES_SHOWN]) + more if every else "no tensors"


def _read(name: str, files: dict[str, list[Path]]) -> torch.Tensor:
    found = files[name]
    if len(found) > 1:
        raise ValueError(f"{name}: expected it in one file, got {_shorten(str(file) for file in found)}")
    with _open(found[0]) as opened:
        if name not in opened.keys():  # noqa: SIM118 - not a mapping
            raise ValueError(f"{name}: expected it in {found[0]}, as {_INDEX} says, got {_shorten(opened.keys())}")
        # What is read maps the file, whose bytes may change or vanish while the tensor lives.
        tensor: torch.Tensor = opened.get_tensor(name).clone()
        return tensor


def _check_weight(name: str, tensor: torch.Tensor) -> torch.Tensor:
    what = f"a bfloat16 or float32 tensor [num_experts, hidden_size], num_experts from 1 to {MAX_NUM_EXPERTS}"
    if tensor.dtype not in (torch.bfloat16, torch.float32):
        raise type_error(name, what, tensor)
    if tensor.dim() != 2 or not 1 <= tensor.shape[0] <= MAX_NUM_EXPERTS or tensor.shape[1] < 1:
        raise value_error(name, what, tensor)
    return tensor


def _check_bias(name: str, tensor: torch.Tensor, num_experts: int) -> torch.Tensor:
    what = f"a floating-point tensor [{num_experts}], as many as the weight has rows"
    if not tensor.is_floating_point():
        raise type_error(name, what, tensor)
    if tensor.shape != (num_experts,):
        raise value_error(name, what, tensor)
    return tensor.float()


def _check_table(name: str, tensor: torch.Tensor) -> torch.Tensor:
    # Never converted: bfloat16, for one, turns 383 into 384.
    what = "an int32 or int64 tensor [vocab_size, top_k]"
    if tensor.dtype not in (torch.int32, torch.int64):
        raise type_error(name, what, tensor)
    if tensor.dim() != 2:
        raise value_error(name, what, tensor)
    return tensor


def _folder(source: Path) -> Path:
    return source if source.is_dir() else source.parent


def _read_config(source: Path) -> RouterConfig:
    file = _folder(source) / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"config: expected a RouterConfig, since there is no {file}, got None; pass config")
    return RouterConfig.from_hf_config(file)


def _check_fit(tensors: RouterTensors, config: RouterConfig) -> None:
    """Raises unless tensors have the configuration's shapes, a layer its table or bias, a table its experts only."""
    prefix, table = tensors.prefix, tensors.tid2eid
    shape = (config.num_experts, config.hidden_size)
    if tensors.weight.shape != shape:
        raise value_error(f"{prefix}weight", f"{list(shape)}, from the configuration ({config})", tensors.weight)
    if table is None:
        match = _LAYER_NUMBER.fullmatch(prefix)
        if match and int(match[1]) < config.num_hash_layers:
            raise ValueError(
                f"{prefix}tid2eid: expected a table, since the configuration ({config}) makes this a hash layer, "
                f"got none in {tensors.source}"
            )
        if tensors.bias is None:
            names = " or ".join(prefix + name for name in _BIAS_NAMES)
            raise ValueError(f"layer: expected the tensor {names} in {tensors.source}, got neither")
        return
    shape = (config.vocab_size, config.top_k)
    if table.shape != shape:
        raise value_error(f"{prefix}tid2eid", f"{list(shape)}, from the configuration ({config})", table)
    wrong = table[(table < 0) | (table >= config.num_experts)]
    if wrong.numel():
        raise ValueError(
            f"{prefix}tid2eid: expected expert ids from 0 to {config.num_experts - 1}, "
            f"got {int(wrong[0])} and {wrong.numel() - 1} more outside"
        )
