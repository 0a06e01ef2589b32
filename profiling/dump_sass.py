# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Compiles a kernel with line info, without a GPU, and prints its SASS by phase and function of its source.

First a summary: registers, memory, and the instructions that each function became, by kind or, with --samples, by
where Nsight Compute's samples fell. Then the listing.
"""

from __future__ import annotations

import argparse
import ast
import csv
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and not __package__:  # run as a file
    from as_module import run_as_module

    run_as_module(__file__)

import torch

from dsv4_router import thresholds
from dsv4_router.backends import cublas, cuda_hash, cuda_module, decode
from dsv4_router.config import PRESETS, RouterConfig
from dsv4_router.decode_config import ARCHITECTURES, TOKEN_TILES, token_tile, variant
from dsv4_router.dispatch import architecture
from dsv4_router.logits_config import fastest, logits_configs

from .profile_call import Parser, num_multiprocessors, positive, rows_of_a_launch

KERNELS = ("decode", "dense_logits", "activation_topk", "hash_router")
COUNTED = ("HMMA", "HGMMA", "LDSM", "UTMALDG", "SYNCS", "LDG", "STG", "LDS", "STS", "BAR", "SHFL", "REDUX", "ATOMG")
LOAD, MMA, HANDOFF, SELECT, SETUP, ALONE = "load", "MMA", "hand-off", "select", "set-up", "row alone"
# The decode kernel's phases by function; instructions of any other one belong to the phase around them.
_FUNCTIONS = {
    SETUP: "kernel is_token clear places_of gate_place hidden_place place_in_smem swizzled"
    " decode_ptx.read_here decode_ptx.opaque",
    LOAD: "load_gate load_hidden wait_and_load_tile wait_and_load_rows clear_missing_columns usher decode_ptx.clock",
    MMA: "mma multiply load_hidden_fragment store_partials multiply_by_warpgroups",
    HANDOFF: "take_ticket tag_of publish add_partials packet_address epilogue store_sums _sum exchange collect"
    " add_parts decode_ptx.add_here decode_ptx.store_packet decode_ptx.look decode_ptx.or_differing"
    " decode_ptx.wait_cycles",
    SELECT: "publish_score decode_ptx.barrier_any select groups_with_better choose expert_of rank_among rank_many"
    " store_choice decode_ptx.sqrt_softplus decode_ptx.weighable decode_ptx.weight decode_ptx.selection_key"
    " decode_ptx.next_place decode_ptx.minus_one_if_less decode_ptx.fma decode_ptx.mul decode_ptx.add decode_ptx.div",
    ALONE: "compute_row add_part load_row",
}
PHASES = {name: phase for phase, names in _FUNCTIONS.items() for name in names.split()}
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+\s+)?([A-Z][\w.]*).*?)\s*;")
_LINE = re.compile(r'\s*//## File "([^"]+)", line (\d+)')
# Columns of Nsight Compute: all samples, under the first of these names that is there, and those of a reason.
_ALL_SAMPLES = ("Warp Stall Sampling (All Samples)", "# Samples")
_STALLED = re.compile(r"stall_(\w+)(?<!not_issued)")


class Kernel(NamedTuple):
    """A compiled kernel."""

    entry: str  # its symbol contains this
    cubin: bytes
    what: str
    shared: str


@dataclass
class Instruction:
    """One instruction, the place in the source that its line info names, and its samples: all ("") and by reason."""

    address: int
    text: str
    opcode: str
    place: str
    function: str
    phase: str
    samples: Counter[str] = field(default_factory=Counter)


def compile_kernel(kernel: str, config: RouterConfig, num_tokens: int, target: str) -> Kernel:
    """Compiles the variant that serves a call, with line info.

    Raises:
        ValueError: the architecture has none, or another kernel serves so many tokens.
    """
    sizes = config.hidden_size, config.num_experts, config.top_k
    one_launch = rows_of_a_launch(config, target) if target in ARCHITECTURES else TOKEN_TILES[-1]
    more = logits_configs(config.hidden_size, config.num_experts, target)
    if more and kernel in ("decode", "dense_logits") and (num_tokens > one_launch) != (kernel == "dense_logits"):
        other = "dense_logits serves more" if kernel == "decode" else "decode serves up to that many"
        raise ValueError(f"--kernel {kernel}: one launch takes {one_launch} tokens, got {num_tokens}; {other}")
    if kernel == "decode":
        one = variant(*sizes, token_tile(min(num_tokens, one_launch)), target)
        code, _ = decode.compile_object(one, target, "--generate-line-info")
        cubin = code[code.index(b"\x7fELF", 4) :]  # inside the object file
        shared = f"at most {one.shared_bytes:,} bytes, dynamic"
        return Kernel("dense_router_decode", cubin, f"{one}", shared)
    if kernel == "dense_logits":
        if not more:
            raise ValueError(f"{kernel}: no kernel of that name for {target}")
        many = fastest(more, num_tokens, num_multiprocessors(), one_launch).config
        code, _ = decode.compile_object(many, target, "--generate-line-info")
        shared = f"at most {many.shared_bytes:,} bytes, dynamic"
        return Kernel(kernel, code[code.index(b"\x7fELF", 4) :], f"{many}", shared)
    if kernel == "activation_topk":
        splits = cublas.num_splits(num_tokens, config.hidden_size, config.num_experts)
        many_rows = thresholds.topk_has_many_rows(num_tokens, splits)
        spec = cublas.topk_spec(config.num_experts, config.top_k, torch.int32, True, splits, many_rows=many_rows)
    else:
        kinds = torch.int64, torch.int64, torch.int32  # of token ids, table and expert ids
        spec = cuda_hash.hidden_spec(config.hidden_size, config.top_k, 2, True, *kinds)
    try:
        cubin, log = cuda_module.compile_with_log(spec, target)
    except Exception as error:  # the compiler's, which share no narrower base class
        raise ValueError(f"{spec.file} does not compile for {target}: {error}") from error
    static = re.search(r"(\d+) bytes smem", log)
    what = f"{spec.file}, {', '.join(f'{name}={value}' for name, value in spec.macros)}"
    return Kernel(spec.entry, cubin, what, f"{static[1] if static else 0} bytes, static")


def disassemble(cubin: bytes) -> str:
    """The whole listing with line info, by the nvdisasm of the wheel or of a CUDA toolkit."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    tools = [str(file.locate()) for file in files if file.stem == "nvdisasm"]
    tools += [tool for place in (None, "/usr/local/cuda/bin") if (tool := shutil.which("nvdisasm", path=place))]
    if not tools:
        raise FileNotFoundError("needs nvdisasm: pip install nvidia-cuda-nvdisasm, or a CUDA toolkit")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([tools[0], "-g", str(path)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvdisasm: {done.stderr}")
    return done.stdout


def _functions(path: Path) -> Callable[[int], str]:
    """The name of the function that a line of a kernel source is in; empty if in none."""
    text = path.read_text()
    starts: list[tuple[int, int, str]] = []  # first line, last line, name
    if path.suffix == ".py":
        prefix = f"{path.stem}." if path.stem == "decode_ptx" else ""  # which has a `select` too
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                starts.append((first, node.end_lineno or first, prefix + node.name))
    else:
        lines = [*text.splitlines(), ""]
        for number, line in enumerate(lines):
            if re.match(r"(?!\s*//).*__(?:device|global)__", line):
                declared = re.sub(r"__launch_bounds__\(\w+\)", "", f"{line} {lines[number + 1]}")
                if name := re.search(r"(\w+)\(", declared):
                    starts.append((number + 1, len(lines), name[1]))
    starts.sort()
    return lambda line: next((name for first, last, name in reversed(starts) if first <= line <= last), "")


def annotate(listing: str, entry: str) -> list[Instruction]:
    """The kernel's instructions, each with its place in the source and its phase."""
    folder = cuda_module.kernel_folder()
    function_of: dict[str, Callable[[int], str]] = {}
    found: list[Instruction] = []
    inside, internal, file, line, phase = False, "", "", 0, SETUP
    for text in listing.splitlines():
        if section := re.match(r"\s*\.section\s+(\S+?),", text):
            inside, internal = section[1].startswith(".text.") and entry in section[1], ""
        elif text.startswith("$__internal"):  # a routine of the compiler's
            internal = text.strip("$:").rpartition("$")[2].strip("_")
        elif place := _LINE.match(text):
            file, line = Path(place[1]).name, int(place[2])
            if file not in function_of:
                function_of[file] = _functions(folder / file) if (folder / file).exists() else str
        elif inside and (match := _INSTRUCTION.match(text)):
            function = internal or (function_of[file](line) if file else "")
            phase = PHASES.get(function, phase)
            found.append(Instruction(int(match[1], 16), match[2], match[3], f"{file}:{line}", function, phase))
    # What the products wait for at an mbarrier is a load; fragments that are read at the same line are not.
    waits = {each.place for each in found if each.phase == MMA and "PHASECHK" in each.opcode}
    for each in found:
        if each.place in waits and each.opcode.startswith(("SYNCS", "NANOSLEEP", "BRA")):
            each.phase = LOAD
    return found


def counts(instructions: Iterable[Instruction]) -> Counter[str]:
    """Instructions by opcode without modifiers."""
    return Counter(instruction.opcode.partition(".")[0] for instruction in instructions)


def summary(kernel: Kernel, target: str, listing: str, instructions: Sequence[Instruction]) -> list[str]:
    """What the kernel takes, and how much of what."""

    def attribute(name: str) -> int:
        pattern = rf"EIATTR_{name}\n.*?index@\(([^)]*)\).*?\.word\s+(0x[0-9a-f]+)"
        return max(int(value, 16) for of, value in re.findall(pattern, listing, re.DOTALL) if kernel.entry in of)

    (symbol,) = {name for name in re.findall(r"\.global\s+(\S+)", listing) if kernel.entry in name}
    total = counts(instructions)
    return [
        f"{kernel.what} for {target}",
        f"symbol {symbol}",
        f"registers {attribute('REGCOUNT')}, stack {attribute('FRAME_SIZE')} bytes, shared memory {kernel.shared}",
        f"local loads {total['LDL']}, local stores {total['STL']}",
        f"instructions {len(instructions)}: {', '.join(f'{name} {total[name]}' for name in COUNTED)}",
    ]


def table(instructions: Sequence[Instruction], by_phase: bool) -> list[str]:
    """A line for each function: its instructions by kind or, where there are samples, these by stall reason."""
    groups: dict[tuple[str, str], list[Instruction]] = {}
    for each in instructions:
        name = "(control flow)" if each.function == "__call__" else each.function
        for key in {(each.phase, name), (each.phase, "")} if by_phase else {("", name)}:
            groups.setdefault(key, []).append(each)
    order = [*_FUNCTIONS, ""]
    samples = sum((each.samples for each in instructions), Counter[str]())
    shown = [name for name in COUNTED if counts(instructions)[name]]
    heads = f"{'samples':>9}{'share':>7}  stalled by" if samples else "".join(f"{name:>8}" for name in shown)
    lines = [f"{'phase, function' if by_phase else 'function':32}{'all':>6}{heads}"]
    for phase, function in sorted(groups, key=lambda key: (order.index(key[0]), key)):
        mine = groups[phase, function]
        if samples:
            of = sum((each.samples for each in mine), Counter[str]())
            reasons = [f"{name} {n / samples['']:.1%}" for name, n in of.most_common(5) if name]
            rest = f"{of['']:>9}{of[''] / samples['']:>7.1%}  {', '.join(reasons)}"
        else:
            rest = "".join(f"{counts(mine)[name] or '':>8}" for name in shown)
        title = f"  {function}" if function and by_phase else function or phase
        lines.append(f"{title[:31]:32}{len(mine):>6}{rest}".rstrip())
    return lines


def annotated(instructions: Sequence[Instruction]) -> list[str]:
    """The listing, with a heading wherever another function begins, and samples in front."""
    lines, last = [], ""
    for each in instructions:
        if (title := f"== {each.phase}: {each.function}") != last:
            last = title
            lines += ["", title]
        lines.append(f"{each.samples[''] or '':>6}  {each.address:04x}  {each.text:64}  {each.place}")
    return lines


def _number(text: str) -> int:
    """A count as Nsight Compute prints it; 0 of an empty cell."""
    digits = text.replace(",", "")
    return int(digits) if digits.isdecimal() else 0


def add_samples(instructions: Sequence[Instruction], path: Path, entry: str) -> None:
    """Adds Nsight Compute's samples to the instructions; those of several launches are added up.

    The file is what ``ncu --import REPORT --page source --csv --print-source sass`` prints; ValueError if it has no
    samples of a kernel with ``entry`` in its name, or samples of other code.
    """
    at = {each.address: each for each in instructions}
    header: list[str] = []
    inside, base, rows, same = False, 0, 0, 0
    with path.open(newline="") as file:
        for row in csv.reader(file):
            if row[:1] == ["Kernel Name"]:
                inside, base = entry in " ".join(row), 0
            elif {"Address", "Source"} <= set(row):
                header, base = row, 0
            elif inside and len(row) == len(header):
                cells = dict(zip(header, row, strict=True))
                base = base or int(cells["Address"], 16)
                each = at.get(int(cells["Address"], 16) - base)
                rows += 1
                if each is None or each.opcode not in cells["Source"]:
                    continue
                same += 1
                each.samples[""] += _number(next((cells[name] for name in _ALL_SAMPLES if name in cells), ""))
                for name, value in cells.items():
                    if reason := _STALLED.fullmatch(name):
                        each.samples[reason[1]] += _number(value)
    if same < 0.95 * rows or not any(each.samples[""] for each in instructions):
        raise ValueError(f"{path}: {rows} lines of a kernel named like {entry!r}, {same} with the instruction expected")


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    """Runs the command.

    Raises:
        SystemExit: 2 if an argument is wrong, 1 if the kernel cannot be compiled or read, or the samples are not its.
    """
    made = Parser(prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--kernel", choices=KERNELS, required=True, help="activation_topk: of the cublas path")
    made.add_argument("--shape", choices=tuple(PRESETS), default="v4-pro", help="the model (v4-pro)")
    made.add_argument("--tokens", type=positive, default=16, help="of the call that the kernel serves (16)")
    made.add_argument("--arch", help="such as sm_90a; without it the GPU's, or sm_90a where there is none")
    made.add_argument("--out", type=Path, metavar="FILE", help="for the listing, which is printed otherwise")
    made.add_argument("--summary", action="store_true", help="print no listing")
    made.add_argument("--samples", type=Path, metavar="FILE", help="of Nsight Compute, as ncu.sh writes it")
    options = made.parse_args(arguments)
    of_gpu = architecture(torch.cuda.get_device_capability()) if torch.cuda.is_available() else "sm_90a"
    target = options.arch or of_gpu
    try:
        kernel = compile_kernel(options.kernel, PRESETS[options.shape], options.tokens, target)
        listing = disassemble(kernel.cubin)
        instructions = annotate(listing, kernel.entry)
        if options.samples is not None:
            add_samples(instructions, options.samples, kernel.entry)
        print(f"{options.shape}, {options.tokens} tokens", *summary(kernel, target, listing, instructions), sep="\n")
        print("", *table(instructions, options.kernel == "decode"), sep="\n")
        if options.out is not None:
            options.out.write_text("\n".join(annotated(instructions)) + "\n")
        elif not options.summary:
            print(*annotated(instructions), sep="\n")
    except (OSError, RuntimeError, ValueError) as error:
        print(f"{made.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
