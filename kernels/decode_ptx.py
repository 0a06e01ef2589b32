# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The dsv4-router authors
"""Single instructions that both kernels in CuTe DSL need exactly as written, and the decode kernel's score.

``router_math.cuh`` says what the score is and why it is computed in this way; the constants, the order of operations
and hence every bit are the same here. Arithmetic is inline PTX so that no compiler contracts a product into a sum.
"""

from typing import Any

from cutlass import Boolean, Float32, Int32, Int64, Uint32, Uint64
from cutlass._mlir.dialects import arith, llvm
from cutlass._mlir_helpers.op import dsl_user_op
from cutlass.cute import Pointer
from cutlass.cutlass_dsl import T

_HALF_LOG2E, _HALF_LOG2E_REST, _LN2 = 0.72134752, 9.6298149e-09, 0.69314718
_LARGEST_SCORE = 1.8446743e19  # sqrt(FLT_MAX)
_WEIGHT_FLOOR = 1e-20
# Minimax polynomial of log1p(t) / t on [0, 1], the highest power first.
_LOG1P = (
    0.0052326941, -0.029505238, 0.078225948, -0.13663246, 0.19106007, -0.24842982, 0.33319098, -0.49999493, 0.99999994,
)  # fmt: skip


@dsl_user_op
def _f32(instruction: str, *operands: Any, loc: Any = None, ip: Any = None) -> Float32:
    """One fp32 instruction without side effects."""
    values = [Float32(operand).ir_value(loc=loc, ip=ip) for operand in operands]
    places = ", ".join(f"${i}" for i in range(len(values) + 1))
    constraints = ",".join(["=f", *["f"] * len(values)])
    return Float32(llvm.inline_asm(T.f32(), values, f"{instruction} {places};", constraints, loc=loc, ip=ip))


def fma(a: Any, b: Any, c: Any) -> Float32:
    return _f32("fma.rn.f32", a, b, c)


def mul(a: Any, b: Any) -> Float32:
    return _f32("mul.rn.f32", a, b)


def add(a: Any, b: Any) -> Float32:
    return _f32("add.rn.f32", a, b)


def div(a: Any, b: Any) -> Float32:
    return _f32("div.rn.f32", a, b)


def select(condition: Any, a: Any, b: Any, kind: Any = Float32) -> Any:
    """``a if condition else b``, without a branch."""
    return kind(arith.select(Boolean(condition).ir_value(), kind(a).ir_value(), kind(b).ir_value()))


def sqrt_softplus(x: Float32) -> Float32:
    """``sqrt(max(x, 0) + log1p(exp(-|x|)))``; NaN gives NaN, +inf gives +inf."""
    magnitude = _f32("min.f32", _f32("abs.f32", x), 400.0)
    exponent = mul(magnitude, -_HALF_LOG2E)
    lost = fma(magnitude, -_HALF_LOG2E, _f32("neg.f32", exponent))
    lost = fma(magnitude, -_HALF_LOG2E_REST, lost)
    h = _f32("ex2.approx.ftz.f32", exponent)
    h = fma(h, mul(lost, _LN2), h)
    t = mul(h, h)
    p = Float32(_LOG1P[0])
    for coefficient in _LOG1P[1:]:
        p = fma(p, t, coefficient)
    negative = x < 0.0
    root = _f32("sqrt.approx.ftz.f32", select(negative, p, fma(t, p, x)))
    return select(negative, mul(h, root), root)


def weighable(score: Float32) -> Float32:
    """A score's share in the weights: NaN counts as 0, infinity as sqrt(FLT_MAX)."""
    return select(score == score, _f32("min.f32", score, _LARGEST_SCORE), 0.0)


def weight(score: Float32, total: Float32, routed_scaling_factor: Float32) -> Float32:
    """``score / (total + 1e-20) * routed_scaling_factor``."""
    return mul(div(score, add(total, _WEIGHT_FLOOR)), routed_scaling_factor)


@dsl_user_op
def minus_one_if_less(a: Any, b: Any, *, loc: Any = None, ip: Any = None) -> Int32:
    """The borrow of ``a - b``, unsigned, of 32 or 64 bits; compilers make a chain of moves of a sum of comparisons."""
    width = type(a).width
    letter = "r" if width == 32 else "l"
    code = f"{{\n.reg .b{width} rest;\nsub.cc.u{width} rest, $1, $2;\nsubc.u32 $0, 0, 0;\n}}"
    operands = [value.ir_value(loc=loc, ip=ip) for value in (a, b)]
    return Int32(llvm.inline_asm(T.i32(), operands, code, f"=r,{letter},{letter}", loc=loc, ip=ip))


@dsl_user_op
def or_differing(before: Uint32, a: Uint64, b: Uint64, *, loc: Any = None, ip: Any = None) -> Uint32:
    """``before``, and bits where ``a`` and ``b`` differ; of comparisons compilers make a chain through predicates."""
    code = """{
    .reg .b32 a_low, a_high, b_low, b_high;
    mov.b64 {a_low, a_high}, $2;
    mov.b64 {b_low, b_high}, $3;
    lop3.b32 a_low, a_low, b_low, $1, 0xbe;
    lop3.b32 $0, a_high, b_high, a_low, 0xbe;
    }"""
    operands = [value.ir_value(loc=loc, ip=ip) for value in (before, a, b)]
    return Uint32(llvm.inline_asm(T.i32(), operands, code, "=r,r,l,l", loc=loc, ip=ip))


@dsl_user_op
def selection_key(selection: Float32, *, loc: Any = None, ip: Any = None) -> Uint32:
    """An unsigned integer that orders as the floats do, from 2 up; NaN is 1, below every number (0 is no expert)."""
    code = """{
    .reg .pred nan;
    .reg .b32 flipped;
    shr.s32 flipped, $1, 31;
    or.b32 flipped, flipped, 0x80000000;
    xor.b32 $0, $1, flipped;
    setp.nan.f32 nan, $2, $2;
    selp.b32 $0, 1, $0, nan;
    }"""
    bits = llvm.bitcast(T.i32(), selection.ir_value(loc=loc, ip=ip), loc=loc, ip=ip)
    return Uint32(llvm.inline_asm(T.i32(), [bits, selection.ir_value(loc=loc, ip=ip)], code, "=&r,r,f", loc=loc, ip=ip))


def _effect(code: str, result: Any, operands: list[Any], constraints: str, loc: Any, ip: Any) -> Any:
    """Inline PTX that reads or writes memory or synchronises: neither moved nor dropped."""
    return llvm.inline_asm(result, operands, code, constraints, has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def opaque(value: Any, *, loc: Any = None, ip: Any = None) -> Any:
    """The same value, an Int32 or Int64, of which the compiler knows nothing; it is computed before this place."""
    kind, letter = (T.i32(), "r") if type(value).width == 32 else (T.i64(), "l")
    code = f"mov.b{type(value).width} $0, $1;"
    return type(value)(_effect(code, kind, [value.ir_value(loc=loc, ip=ip)], f"={letter},{letter}", loc, ip))


@dsl_user_op
def read_here(*values: Any, loc: Any = None, ip: Any = None) -> None:
    """Has these integers and pointers in this place, and does nothing with them.

    For what would be read or computed only where it is needed.
    """
    numbers = [value.toint() if isinstance(value, Pointer) else value for value in values]
    code = "{\n.reg .b32 all, low, high;\n.reg .pred is_zero;\nmov.b32 all, 0;\n"
    for i, number in enumerate(numbers):
        if type(number).width == 32:
            code += f"or.b32 all, all, ${i};\n"
        else:
            code += f"mov.b64 {{low, high}}, ${i};\nor.b32 all, all, low;\nor.b32 all, all, high;\n"
    code += "setp.eq.b32 is_zero, all, 0;\n@is_zero nanosleep.u32 0;\n}"
    constraints = ",".join("r" if type(number).width == 32 else "l" for number in numbers)
    _effect(code, None, [number.ir_value(loc=loc, ip=ip) for number in numbers], constraints, loc, ip)


@dsl_user_op
def add_here(a: Float32, b: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    """:func:`add` in this place: the compiler moves it past no other instruction that stays in its place."""
    values = [Float32(value).ir_value(loc=loc, ip=ip) for value in (a, b)]
    return Float32(_effect("add.rn.f32 $0, $1, $2;", T.f32(), values, "=f,f,f", loc, ip))


@dsl_user_op
def wait_cycles(cycles: int, *, loc: Any = None, ip: Any = None) -> None:
    """Holds the warp for so many cycles of its multiprocessor, or some more."""
    code = f"""{{
    .reg .pred is_early;
    .reg .b32 start, now;
    mov.u32 start, %clock;
    again:
    mov.u32 now, %clock;
    sub.u32 now, now, start;
    setp.lt.u32 is_early, now, {cycles};
    @is_early bra again;
    }}"""
    _effect(code, None, [], "~{memory}", loc, ip)


@dsl_user_op
def clock(*, loc: Any = None, ip: Any = None) -> Uint32:
    """Cycles of the multiprocessor, from any start; to be subtracted from each other."""
    return Uint32(_effect("mov.u32 $0, %clock;", T.i32(), [], "=r,~{memory}", loc, ip))


@dsl_user_op
def wait_and_copy_row(
    place: Any, address: Int64, num_bytes: Int32, barrier: Any, has_row: Any, *, loc: Any = None, ip: Any = None
) -> None:
    """Waits for the previous kernel; then one lane, if the warp has a row, requests it into shared memory.

    The bytes count on ``barrier``. In one piece, so that the compiler moves the operands into uniform registers before
    the wait and not after it.
    """
    code = """{
    .reg .pred has_row, requests;
    setp.ne.b32 has_row, $4, 0;
    elect.sync _|requests, 0xffffffff;
    and.pred requests, requests, has_row;
    griddepcontrol.wait;
    @requests cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];
    }"""
    operands = [
        place.toint().ir_value(loc=loc, ip=ip),
        address.ir_value(loc=loc, ip=ip),
        Int32(num_bytes).ir_value(loc=loc, ip=ip),
        barrier.toint().ir_value(loc=loc, ip=ip),
        Int32(has_row).ir_value(loc=loc, ip=ip),
    ]
    _effect(code, None, operands, "r,l,r,r,r,~{memory}", loc, ip)


@dsl_user_op
def next_place(counter: Any, *, loc: Any = None, ip: Any = None) -> Int32:
    """Adds 1 to a counter in shared memory and returns what it was.

    ``inc``, for compilers gather an ``add`` over the warp, which takes longer for the one or two threads that come.
    """
    address = counter.toint().ir_value(loc=loc, ip=ip)
    code = "atom.relaxed.cta.shared.inc.u32 $0, [$1], 0x7fffffff;"
    return Int32(_effect(code, T.i32(), [address], "=r,r,~{memory}", loc, ip))


@dsl_user_op
def store_packet(address: Int64, v0: Float32, v1: Float32, tag: Uint64, *, loc: Any = None, ip: Any = None) -> None:
    """Publishes two sums and their launch's tag as one 128-bit access: no reader sees a part of it."""
    code = """{
    .reg .b64 sums;
    .reg .b128 packet;
    mov.b64 sums, {$1, $2};
    mov.b128 packet, {sums, $3};
    st.relaxed.gpu.global.b128 [$0], packet;
    }"""
    operands = [value.ir_value(loc=loc, ip=ip) for value in (address, v0, v1, tag)]
    _effect(code, None, operands, "l,f,f,l,~{memory}", loc, ip)


@dsl_user_op
def look(address: Int64, offset: int, *, loc: Any = None, ip: Any = None) -> tuple[Float32, Float32, Uint64]:
    """Reads the packet at ``address + offset``, two sums and a tag, as one access."""
    code = f"""{{
    .reg .b64 sums;
    .reg .b128 packet;
    ld.relaxed.gpu.global.b128 packet, [$3 + {offset}];
    mov.b128 {{sums, $2}}, packet;
    mov.b64 {{$0, $1}}, sums;
    }}"""
    kinds = (T.f32(), T.f32(), T.i64())
    operands = [address.ir_value(loc=loc, ip=ip)]
    packet = _effect(code, llvm.StructType.get_literal(list(kinds)), operands, "=f,=f,=l,l,~{memory}", loc, ip)
    v0, v1, tag = (llvm.extractvalue(kind, packet, [i], loc=loc, ip=ip) for i, kind in enumerate(kinds))
    return Float32(v0), Float32(v1), Uint64(tag)


@dsl_user_op
def barrier_any(num_threads: int, condition: Any, *, loc: Any = None, ip: Any = None) -> Boolean:
    """The block's barrier, which tells every thread whether ``condition`` held for any."""
    code = f"""{{
    .reg .pred mine, any;
    setp.ne.b32 mine, $1, 0;
    barrier.cta.red.or.pred any, 0, {num_threads}, mine;
    selp.b32 $0, 1, 0, any;
    }}"""
    mine = Int32(condition).ir_value(loc=loc, ip=ip)
    return Int32(_effect(code, T.i32(), [mine], "=r,r,~{memory}", loc, ip)) != 0
