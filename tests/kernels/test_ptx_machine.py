"""The machine that the compiled kernels are tested on: what it computes, and that it sees what it is there to see."""

import itertools
import math
import struct

import numpy as np
import pytest
from ptx_instructions import narrowed, widened
from ptx_machine import Machine
from ptx_memory import Shared
from ptx_program import Fault, Unknown

HEAD = """
.version 8.4
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 p_in,
	.param .u64 .ptr .global .align 1 p_out
)
{
	.reg .pred %p<8>;
	.reg .b16 %h<8>;
	.reg .b32 %r<32>;
	.reg .b64 %d<32>;
	ld.param.b64 %d0, [p_in];
	ld.param.b64 %d1, [p_out];
	mov.u32 %r0, %tid.x;
	mul.wide.u32 %d2, %r0, 4;
	mul.wide.u32 %d3, %r0, 8;
"""


def run(body, inputs, outputs, threads=32, grid=(1,), shared=4096, machine=None):
    """Run a kernel's body over copies of two arrays; %r0 is the thread, %d2 and %d3 are four and eight times it."""
    inputs, outputs = (np.array(x) for x in (inputs, outputs))
    memory = [(x.__array_interface__["data"][0], x.reshape(-1).view(np.uint8), name)
              for x, name in ((inputs, "in"), (outputs, "out"))]  # fmt: skip
    addresses = [struct.pack("<Q", start) for start, _, _ in memory]
    (machine or Machine()).launch(HEAD + body + "\n\tret;\n}\n", grid, threads, addresses, memory, shared=shared)
    return outputs


EDGES = [0, 1, 2, 3, 7, 31, 32, 33, 255, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xFFFFFFFE, 0xDEADBEEF, 12345]


def signed(x, bits=32):
    return x - 2**bits if x >= 2 ** (bits - 1) else x


def cut(a, b):
    """C's quotient."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def extracted(a, begin, count, is_signed):
    """As the manual of PTX has it."""
    begin, count = begin & 255, count & 255
    sign = 0 if not is_signed or not count else a >> min(begin + count - 1, 31) & 1
    return sum((a >> begin + i & 1 if i < count and begin + i < 32 else sign) << i for i in range(32))


def inserted(a, b, begin, count):
    for i in range(min(count & 255, 32)):
        place = (begin & 255) + i
        if place < 32:
            b = b & ~(1 << place) | (a >> i & 1) << place
    return b


def permuted(a, b, selector):
    both, out = a | b << 32, 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = both >> 8 * (nibble & 7) & 255
        if nibble & 8:  # its sign
            byte = 255 if byte & 128 else 0
        out |= byte << 8 * i
    return out


WHOLE = {
    "add.s32": lambda a, b, c: a + b,
    "sub.s32": lambda a, b, c: a - b,
    "mul.lo.s32": lambda a, b, c: a * b,
    "mul.hi.u32": lambda a, b, c: a * b >> 32,
    "mul.hi.s32": lambda a, b, c: signed(a) * signed(b) >> 32,
    "div.u32": lambda a, b, c: a // b if b else None,
    "div.s32": lambda a, b, c: cut(signed(a), signed(b)) if b else None,
    "rem.u32": lambda a, b, c: a % b if b else None,
    "rem.s32": lambda a, b, c: signed(a) - cut(signed(a), signed(b)) * signed(b) if b else None,
    "min.s32": lambda a, b, c: min(signed(a), signed(b)),
    "max.u32": lambda a, b, c: max(a, b),
    "and.b32": lambda a, b, c: a & b,
    "xor.b32": lambda a, b, c: a ^ b,
    "shl.b32": lambda a, b, c: a << b if b < 32 else 0,
    "shr.u32": lambda a, b, c: a >> b if b < 32 else 0,
    "shr.s32": lambda a, b, c: signed(a) >> min(b, 31),
    "mad.lo.s32": lambda a, b, c: a * b + c,
    "shf.l.wrap.b32": lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32,
    "shf.r.wrap.b32": lambda a, b, c: (b << 32 | a) >> (c & 31),
    "shf.r.clamp.b32": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "bfe.u32": lambda a, b, c: extracted(a, b, c, False),
    "bfe.s32": lambda a, b, c: extracted(a, b, c, True),
    "prmt.b32": permuted,
}


@pytest.mark.parametrize("name", list(WHOLE))
def test_whole_numbers(name):
    triples = np.array(list(itertools.product(EDGES, EDGES, EDGES[:8] + EDGES[-2:])), np.uint32)
    triples = triples[: len(triples) // 32 * 32]
    operands = 3 if WHOLE[name].__code__.co_argcount == 3 and name.split(".")[0] in ("mad", "shf", "bfe", "prmt") else 2
    body = f"""
	mul.wide.u32 %d4, %r0, 12;
	add.s64 %d5, %d0, %d4;
	ld.global.b32 %r1, [%d5];
	ld.global.b32 %r2, [%d5+4];
	ld.global.b32 %r3, [%d5+8];
	{name} %r4, {", ".join(["%r1", "%r2", "%r3"][:operands])};
	add.s64 %d6, %d1, %d2;
	st.global.b32 [%d6], %r4;"""
    got = run(body, triples, np.zeros(len(triples), np.uint32), threads=len(triples))
    for (a, b, c), value in zip(triples.tolist(), got.tolist(), strict=True):
        wanted = WHOLE[name](a, b, c)
        assert wanted is None or value == wanted & 0xFFFFFFFF, (name, a, b, c)


def test_longer_numbers():
    values = np.array(list(itertools.product([0, 1, 2**63, 2**64 - 1, 2**32, 0x123456789ABCDEF0], repeat=2)), np.uint64)
    values = np.concatenate([values, values[:28]])
    body = """
	mul.wide.u32 %d4, %r0, 16;
	add.s64 %d5, %d0, %d4;
	ld.global.v2.b64 {%d6, %d7}, [%d5];
	mul.hi.u64 %d8, %d6, %d7;
	mad.lo.s64 %d9, %d6, %d7, %d6;
	cvt.u32.u64 %r1, %d6;
	cvt.u32.u64 %r2, %d7;
	mad.lo.cc.u32 %r3, %r1, %r2, %r2;
	madc.hi.u32 %r4, %r1, %r2, 5;
	mov.b64 %d10, {%r3, %r4};
	mad.wide.s32 %d11, %r1, %r2, %d6;
	mul.wide.u32 %d4, %r0, 32;
	add.s64 %d5, %d1, %d4;
	st.global.v2.b64 [%d5], {%d8, %d9};
	st.global.v2.b64 [%d5+16], {%d10, %d11};"""
    got = run(body, values, np.zeros((len(values), 4), np.uint64), threads=len(values))
    for (a, b), row in zip(values.tolist(), got.tolist(), strict=True):
        x, y = a % 2**32, b % 2**32
        wanted = a * b >> 64, a * b + a, x * y + y + (5 << 32), signed(x) * signed(y) + a
        assert row == [value % 2**64 for value in wanted]


SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    math.inf,
    -math.inf,
    math.nan,
    1e-45,
    1.2e-38,
    3.4e38,
    0.1,
    2.5,
    -3.5,
    1 / 3,
    1e10,
    -7e-3,
]


def test_real_numbers():
    pairs = np.array(list(itertools.product(SPECIAL, SPECIAL)), np.float32)
    body = """
	add.s64 %d5, %d0, %d3;
	ld.global.v2.b32 {%r1, %r2}, [%d5];
	fma.rn.f32 %r3, %r1, %r2, %r1;
	min.f32 %r4, %r1, %r2;
	max.NaN.f32 %r5, %r1, %r2;
	mul.ftz.f32 %r6, %r1, %r2;
	cvt.rzi.s32.f32 %r7, %r1;
	cvt.rni.ftz.s32.f32 %r8, %r2;
	cvt.rn.bf16x2.f32 %r9, %r1, %r2;
	setp.ltu.f32 %p1, %r1, %r2;
	setp.lt.and.f32 %p2, %r1, %r2, %p1;
	selp.b32 %r10, 1, 0, %p1;
	@!%p2 mov.b32 %r11, 7;
	@%p2 mov.b32 %r11, 9;
	mul.wide.u32 %d6, %r0, 48;
	add.s64 %d7, %d1, %d6;
	st.global.v4.b32 [%d7], {%r3, %r4, %r5, %r6};
	st.global.v4.b32 [%d7+16], {%r7, %r8, %r9, %r10};
	st.global.b32 [%d7+32], %r11;"""
    got = run(body, pairs, np.zeros((len(pairs), 12), np.uint32), threads=len(pairs))
    reals = got.view(np.float32)

    def same(x, y):
        return (math.isnan(x) and math.isnan(y)) or x == y

    def whole(x, rounding):
        x = float(x)
        return 0 if math.isnan(x) else int(min(max(x if math.isinf(x) else rounding(x), -(2.0**31)), 2.0**31 - 1))

    with np.errstate(all="ignore"):
        for (a, b), row, bits in zip(pairs, reals, got, strict=True):
            assert same(row[0], np.float32(np.float64(a) * np.float64(b) + np.float64(a)))
            least = b if math.isnan(a) else a if math.isnan(b) else min(a, b)
            assert same(row[1], least)
            assert same(row[2], math.nan if math.isnan(a) or math.isnan(b) else max(a, b))
            x, y = (0.0 if abs(v) < 2**-126 else v for v in (a, b))
            product = np.float32(np.float32(x) * np.float32(y))
            assert same(row[3], 0.0 if abs(product) < 2**-126 else product)
            assert signed(int(bits[4])) == whole(a, math.trunc)
            assert signed(int(bits[5])) == whole(y, round)
            low, high = (widened(np.array([v], np.uint16))[0] for v in (bits[6] & 0xFFFF, bits[6] >> 16))
            for rounded, exact in ((low, b), (high, a)):
                assert (
                    same(rounded, exact)
                    or abs(rounded - exact) <= abs(exact) * 2**-8 + 2.0**-134
                    or math.isinf(rounded)
                )
            assert bits[7] == (not a >= b)
            assert bits[8] == (9 if a < b else 7)


@pytest.mark.parametrize("kind", ["f32x2", "f16x2", "bf16x2"])
def test_two_numbers_a_register(kind):
    """Each as if it were alone."""
    x = np.array([1.5, -2.25, 3e4, 0.0, 7.0, -0.5, 1 / 3, 100.0] * 16, np.float32)  # four a thread, 32 threads
    size = 64 if kind == "f32x2" else 32
    bits = {"f32x2": x.view(np.uint64), "f16x2": x.astype(np.float16).view(np.uint32),
            "bf16x2": narrowed(x).view(np.uint32)}[kind]  # fmt: skip
    letter, place = ("d", "%d4") if size == 64 else ("r", "%d3")
    body = f"""
	mul.wide.u32 %d4, %r0, 16;
	add.s64 %d5, %d0, {place};
	ld.global.v2.b{size} {{%{letter}8, %{letter}9}}, [%d5];
	add.rn.{kind} %{letter}10, %{letter}8, %{letter}9;
	fma.rn.{kind} %{letter}11, %{letter}8, %{letter}8, %{letter}9;
	add.s64 %d6, %d1, {place};
	st.global.v2.b{size} [%d6], {{%{letter}10, %{letter}11}};"""
    got = run(body, bits, np.zeros_like(bits))
    numbers = {"f32x2": lambda b: b.view(np.float32), "f16x2": lambda b: b.view(np.float16),
               "bf16x2": lambda b: widened(b.view(np.uint16))}[kind]  # fmt: skip
    a, b = numbers(bits).astype(np.float64).reshape(32, 2, 2).swapaxes(0, 1)
    added, multiplied = numbers(got).astype(np.float64).reshape(32, 2, 2).swapaxes(0, 1)
    eps = {"f32x2": 2.0**-24, "f16x2": 2.0**-11, "bf16x2": 2.0**-8}[kind]
    most = 65504 if kind == "f16x2" else np.inf
    for result, wanted in ((added, a + b), (multiplied, a * a + b)):
        inside = abs(wanted) < most
        assert (abs(result - wanted) <= eps * abs(wanted))[inside].all()
        assert np.isinf(result[~inside]).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_halves_among_wider_numbers(kind):
    """Of compute capability 10.0: sums in float32 of which some operands are halves."""
    generator = np.random.default_rng(0)
    halves = generator.standard_normal((32, 2)).astype(np.float16)
    bits = halves.view(np.uint16) if kind == "f16" else narrowed(halves.astype(np.float32))
    known = halves.astype(np.float32) if kind == "f16" else widened(bits)
    body = f"""
	add.s64 %d4, %d0, %d2;
	ld.global.v2.b16 {{%h1, %h2}}, [%d4];
	mov.b32 %r1, 0f3DCCCCCD;
	add.rn.f32.{kind} %r2, %h1, %r1;
	fma.rn.f32.{kind} %r3, %h1, %h2, %r1;
	add.s64 %d5, %d1, %d3;
	st.global.v2.b32 [%d5], {{%r2, %r3}};"""
    got = run(body, bits, np.zeros((32, 2), np.float32))
    tenth = np.float32(0.1)
    assert (got[:, 0] == known[:, 0] + tenth).all()
    exact = known[:, 0].astype(np.float64) * known[:, 1] + tenth
    assert (got[:, 1] == exact.astype(np.float32)).all()
    with pytest.raises(Unknown):
        run(f"add.f64.{kind} %d4, %h1, %d4;", [0], [0])


def test_two_halves_are_compared_by_themselves():
    x = np.array([1, 2, 3, np.nan, -1, 5, 0, 0] * 8, np.float16)  # two a thread, 32 threads
    body = """
	add.s64 %d4, %d0, %d2;
	ld.global.b32 %r1, [%d4];
	mov.b32 %r2, 0x3C003C00;
	setp.gtu.f16x2 %p1|%p2, %r1, %r2;
	setp.gt.f16x2 _|%p3, %r1, %r2;
	selp.b32 %r3, 1, 0, %p1;
	selp.b32 %r4, 2, 0, %p2;
	selp.b32 %r5, 4, 0, %p3;
	or.b32 %r3, %r3, %r4;
	or.b32 %r3, %r3, %r5;
	add.s64 %d5, %d1, %d2;
	st.global.b32 [%d5], %r3;"""  # against 1.0
    got = run(body, x.view(np.uint32), np.zeros(32, np.uint32))
    pairs = x.reshape(32, 2).tolist()
    assert got.tolist() == [(not a <= 1) + 2 * (not b <= 1) + 4 * (b > 1) for a, b in pairs]


def test_halves_go_to_even():
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20], np.float32)
    assert widened(narrowed(x)).tolist() == [1, 1 + 2**-6, 1 + 2**-7]


def test_threads_part_and_meet_again():
    """A loop that each thread leaves after as many rounds as its number, around a branch, before a barrier."""
    body = """
	mov.b32 %r1, 0;
	mov.b32 %r2, 0;
$again:
	setp.ge.u32 %p1, %r1, %r0;
	@%p1 bra $out;
	and.b32 %r3, %r1, 1;
	setp.eq.u32 %p2, %r3, 0;
	@%p2 bra $even;
	add.u32 %r2, %r2, 100;
	bra.uni $next;
$even:
	add.u32 %r2, %r2, 1;
$next:
	add.u32 %r1, %r1, 1;
	bra.uni $again;
$out:
	bar.sync 0;
	shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1;
	add.s64 %d4, %d1, %d2;
	st.global.b32 [%d4], %r4;"""
    got = run(body, np.zeros(1, np.uint32), np.zeros(64, np.uint32), threads=64)
    wanted = [t // 2 * 100 + (t + 1) // 2 for t in range(64)]
    assert got.tolist() == [wanted[t ^ 1] for t in range(64)]


def test_they_meet_wherever_the_code_lies():
    """The end of a loop may stand before its body: there those wait who come by the shorter way."""
    body = """
	mov.b32 %r1, 0;
	mov.b32 %r2, 0;
	bra.uni $body;
$end:
	shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;
	add.u32 %r2, %r2, %r3;
	add.u32 %r1, %r1, 1;
	setp.eq.u32 %p1, %r1, 3;
	@%p1 bra $out;
$body:
	and.b32 %r4, %r0, 1;
	setp.eq.u32 %p2, %r4, 0;
	@%p2 bra $end;
	add.u32 %r2, %r2, %r0;
	bra.uni $end;
$out:
	add.s64 %d4, %d1, %d2;
	st.global.b32 [%d4], %r2;"""
    got = run(body, [0], np.zeros(32, np.uint32))
    sums = [0] * 32
    for _ in range(3):
        sums = [total + (t if t % 2 else 0) for t, total in enumerate(sums)]
        sums = [sums[t] + sums[t ^ 1] for t in range(32)]
    assert got.tolist() == sums


def test_one_barrier_in_two_places():
    """Each goes on from where it was; those that a guard leaves out do not stand still."""
    body = """
	setp.lt.u32 %p1, %r0, 32;
	@%p1 bra $first;
	mov.b32 %r1, 7;
	bar.sync 0;
	bra.uni $out;
$first:
	mov.b32 %r1, 5;
	bar.sync 0;
	add.u32 %r1, %r1, 1;
$out:
	@%p1 bar.sync 1, 32;
	add.s64 %d4, %d1, %d2;
	st.global.b32 [%d4], %r1;"""
    assert run(body, [0], np.zeros(64, np.uint32), threads=64).tolist() == [6] * 32 + [7] * 32


@pytest.mark.parametrize("how", ["bfly", "idx", "up", "down"])
@pytest.mark.parametrize("width", [32, 8])
def test_shuffles(how, width):
    """Against the manual's words, lane by lane."""
    clamp = (32 - width) << 8 | (0 if how == "up" else 31)
    body = f"""
	shr.u32 %r1, %r0, 1;
	xor.b32 %r2, %r0, 85;
	shfl.sync.{how}.b32 %r3|%p1, %r2, %r1, {clamp}, -1;
	selp.b32 %r4, 1, 0, %p1;
	add.s64 %d4, %d1, %d3;
	st.global.v2.b32 [%d4], {{%r3, %r4}};"""
    got = run(body, np.zeros(1, np.uint32), np.zeros((32, 2), np.uint32))
    for lane in range(32):
        by, segment = lane >> 1, lane // width * width
        bound = segment if how == "up" else segment + width - 1
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": segment + by % width}[how]
        inside = source >= bound if how == "up" else source <= bound
        assert got[lane].tolist() == [(source if inside else lane) ^ 85, inside], lane


@pytest.mark.parametrize("how", ["max", "min", "max.NaN"])
def test_the_largest_number_of_a_warp(how):
    numbers = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    numbers[[3, 40]] = np.nan
    body = f"""
	add.s64 %d4, %d0, %d2;
	ld.global.b32 %r1, [%d4];
	redux.sync.{how}.f32 %r2, %r1, -1;
	add.s64 %d5, %d1, %d2;
	st.global.b32 [%d5], %r2;"""
    got = run(body, numbers, np.zeros(64, np.float32), threads=64)
    reduce = {"max": np.nanmax, "min": np.nanmin, "max.NaN": np.max}[how]
    np.testing.assert_array_equal(got, reduce(numbers.reshape(2, 32), 1).repeat(32))


def test_a_copy_comes_no_earlier_than_it_is_waited_for():
    body = """
	mov.b32 %r1, memory;
	mul.lo.s32 %r2, %r0, 16;
	add.s32 %r1, %r1, %r2;
	cvt.u64.u32 %d4, %r2;
	add.s64 %d5, %d0, %d4;
	and.b32 %r3, %r0, 1;
	mul.lo.s32 %r3, %r3, 16;
	cp.async.cg.shared.global [%r1], [%d5], 16, %r3;
	cp.async.commit_group;
	cp.async.wait_group 0;
	ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r1];
	add.s64 %d6, %d1, %d4;
	st.global.v4.b32 [%d6], {%r4, %r5, %r6, %r7};"""
    numbers = np.arange(128, dtype=np.uint32).reshape(32, 4) + 1
    got = run(body, numbers, np.zeros((32, 4), np.uint32))
    assert (got[1::2] == numbers[1::2]).all()
    assert (got[::2] == 0).all()  # a size of 0 fills with zeros
    with pytest.raises(Fault, match="something asynchronous has yet to write"):
        run(body.replace("wait_group 0", "wait_group 1"), numbers, np.zeros((32, 4), np.uint32))
    with pytest.raises(Fault, match="were not waited for"):
        run(body.replace("cp.async.wait_group 0;", "ret;"), numbers, np.zeros((32, 4), np.uint32))


EXCHANGE = """
	mov.b32 %r1, memory;
	mul.lo.s32 %r2, %r0, 4;
	add.s32 %r3, %r1, %r2;
	st.shared.b32 [%r3], %r0;
	bar.sync 0;
	xor.b32 %r4, %r2, {other};
	add.s32 %r5, %r1, %r4;
	ld.shared.b32 %r6, [%r5];
	bar.sync 0;
	st.shared.b32 [%r3], %r6;
	add.s64 %d4, %d1, %d2;
	st.global.b32 [%d4], %r6;"""


def test_a_missing_barrier_is_a_race():
    body = EXCHANGE.format(other=128)  # of another warp
    assert run(body, [0], np.zeros(64, np.uint32), threads=64).tolist() == [t ^ 32 for t in range(64)]
    first, second, third = body.split("bar.sync 0;")
    with pytest.raises(Fault, match=r"race: thread \d+ reads shared byte"):
        run(first + second + "bar.sync 0;" + third, [0], np.zeros(64, np.uint32), threads=64)
    with pytest.raises(Fault, match=r"race: thread \d+ writes shared byte"):
        run(first + "bar.sync 0;" + second + third, [0], np.zeros(64, np.uint32), threads=64)


def test_within_a_warp_a_barrier_of_the_warp_is_enough():
    body = EXCHANGE.format(other=4).replace("bar.sync 0", "bar.warp.sync -1")
    assert run(body, [0], np.zeros(64, np.uint32), threads=64).tolist() == [t ^ 1 for t in range(64)]
    with pytest.raises(Fault, match="race"):
        run(body.replace("bar.warp.sync -1;", ""), [0], np.zeros(64, np.uint32), threads=64)
    with pytest.raises(Fault, match="race"):
        run(EXCHANGE.format(other=128).replace("bar.sync 0", "bar.warp.sync -1"), [0], np.zeros(64, np.uint32),
            threads=64)  # fmt: skip


def test_blocks_do_not_wait_for_each_other():
    """Both write where both read."""
    body = """
	ld.global.b32 %r1, [%d1];
	add.u32 %r1, %r1, 1;
	setp.eq.u32 %p1, %r0, 0;
	@%p1 st.global.b32 [%d1], %r1;"""
    run(body, [0], np.zeros(1, np.uint32))
    with pytest.raises(Fault, match="race: another block"):
        run(body, [0], np.zeros(1, np.uint32), grid=(2,))
    added = run("\tred.global.gpu.relaxed.add.u32 [%d1], 1;", [0], np.zeros(1, np.uint32), grid=(2,))
    assert added.tolist() == [64]


# Columns are those of thread 0's warp; its address in shared memory is 0.
TENSOR = """
	mov.b32 %r1, memory;
	setp.lt.u32 %p1, %r0, 32;
	@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;
	bar.sync 0;
	ld.shared.b32 %r2, [%r1];
	shr.u32 %r3, %r0, 5;
	shl.b32 %r3, %r3, 21;
	add.s32 %r4, %r2, %r3;{body}
	bar.sync 0;
	@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r2, 32;"""


def test_tensor_memory_keeps_what_is_stored():
    body = """
	shl.b32 %r5, %r0, 8;
	or.b32 %r6, %r5, 1;
	tcgen05.st.sync.aligned.32x32b.x2.b32 [%r4 + 4], {%r5, %r6};
	tcgen05.wait::st.sync.aligned;
	{load}
	tcgen05.wait::ld.sync.aligned;
	add.s64 %d4, %d1, %d3;
	st.global.v2.b32 [%d4], {%r7, %r8};"""
    whole = "tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r7, %r8}, [%r4 + 4];"
    out = np.zeros((128, 2), np.uint32)
    got = run(TENSOR.format(body=body.replace("{load}", whole)), [0], out, threads=128)
    assert got.tolist() == [[t << 8, t << 8 | 1] for t in range(128)]
    # 16 rows of a warp's 32: its second half of threads reads the same ones, as many columns further as is said.
    halves = "tcgen05.ld.sync.aligned.16x32bx2.x1.b32 {%r7}, [%r4 + 4], 1; mov.b32 %r8, 7;"
    got = run(TENSOR.format(body=body.replace("{load}", halves)), [0], out, threads=128)
    assert got[:, 0].tolist() == [(t // 32 * 32 + t % 16) << 8 | (t % 32 >= 16) for t in range(128)]
    good = TENSOR.format(body=body.replace("{load}", whole))
    for old, new, words in (
        ("tcgen05.wait::st.sync.aligned;", "", "has yet to write"),
        ("tcgen05.wait::ld.sync.aligned;", "", "given back while it is in use"),
        ("[%r4 + 4], {", "[%r4 + 31], {", "columns of tensor memory that are not had"),
        ("shl.b32 %r3, %r3, 21;", "mov.b32 %r3, 0;", "beyond its own lanes"),
        ("@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r2, 32;", "", "not given back"),
        ("bar.sync 0;\n\t@%p1 tcgen05.dealloc", "@%p1 tcgen05.dealloc", "race: thread 0 writes word of tensor memory"),
        ("@%p1 tcgen05.alloc", "tcgen05.alloc", "one whole warp"),
        ("@%p1 tcgen05.alloc", "tcgen05.relinquish_alloc_permit.sync; @%p1 tcgen05.alloc", "said not to be"),
        ("[%r1], 32", "[%r1], 48", "48 columns"),
    ):
        assert old in good
        with pytest.raises(Fault, match=words):
            run(good.replace(old, new), [0], out, threads=128)


# Rows of 16 numbers, a thread's own of A and, for the first 16 threads, of B^T, in shared memory from byte 1024 and
# 8192 on: 16 bytes of 8 rows together, then the next 8 rows, and the second half of all rows behind.
PRODUCT = """
	shl.b32 %r5, %r0, 4;
	add.s32 %r5, %r5, %r1;
	mul.wide.u32 %d4, %r0, 32;
	add.s64 %d5, %d0, %d4;
	ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d5];
	ld.global.v4.b32 {%r14, %r15, %r16, %r17}, [%d5 + 16];
	st.shared.v4.b32 [%r5 + 1024], {%r10, %r11, %r12, %r13};
	st.shared.v4.b32 [%r5 + 3072], {%r14, %r15, %r16, %r17};
	setp.lt.u32 %p2, %r0, 16;
	ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d5 + 4096];
	ld.global.v4.b32 {%r14, %r15, %r16, %r17}, [%d5 + 4112];
	@%p2 st.shared.v4.b32 [%r5 + 8192], {%r10, %r11, %r12, %r13};
	@%p2 st.shared.v4.b32 [%r5 + 8448], {%r14, %r15, %r16, %r17};
	setp.eq.u32 %p3, %r0, 0;
	@%p3 mbarrier.init.shared::cta.b64 [%r1 + 8], 1;
	fence.proxy.async.shared::cta;
	bar.sync 0;
	mov.b32 %r18, {described};
	add.s32 %r19, %r1, 1024;
	bfe.u32 %r19, %r19, 4, 14;
	or.b32 %r19, %r19, 8388608;
	add.s32 %r20, %r1, 8192;
	bfe.u32 %r20, %r20, 4, 14;
	or.b32 %r20, %r20, 1048576;
	mov.b32 %r21, 16392;
	mov.b64 %d6, {%r19, %r21};
	mov.b64 %d7, {%r20, %r21};
	mov.pred %p4, 0;
	@%p3 tcgen05.mma.cta_group::1.kind::f16 [%r2 + 0], %d6, %d7, %r18, %p4;
	mov.pred %p4, -1;
	@%p3 tcgen05.mma.cta_group::1.kind::f16 [%r2 + 0], %d6, %d7, %r18, %p4;
	@%p3 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1 + 8];
	mov.b32 %r9, 0;
	{ .reg .pred complete; again: mbarrier.try_wait.parity.shared::cta.b64 complete, [%r1 + 8], %r9;
	@!complete bra.uni again; }
	tcgen05.ld.sync.aligned.32x32b.x8.b32 {%r10, %r11, %r12, %r13, %r14, %r15, %r16, %r17}, [%r4];
	tcgen05.wait::ld.sync.aligned;
	add.s64 %d8, %d1, %d4;
	st.global.v4.b32 [%d8], {%r10, %r11, %r12, %r13};
	st.global.v4.b32 [%d8 + 16], {%r14, %r15, %r16, %r17};"""


COMMIT = "@%p3 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1 + 8];"


def test_products_in_tensor_memory():
    numbers = np.random.default_rng(0).integers(-8, 8, (256, 16)).astype(np.float16)
    wanted = 2 * (numbers[:128].astype(np.float64) @ numbers[128:144].astype(np.float64).T)[:, :8]
    body = TENSOR.replace("{body}", PRODUCT)

    def code(rows):  # float16, summed in float32, of so many rows and 16 columns
        return body.replace("{described}", str(rows // 16 << 24 | 2 << 17 | 1 << 4))

    out = np.zeros((128, 8), np.float32)
    got = run(code(128), numbers, out, threads=128, shared=16384)
    assert (got == wanted).all()
    got = run(code(64), numbers, out, threads=128, shared=16384)  # 16 rows in a warp's first 16 lanes
    assert (got.reshape(4, 32, 8)[:, :16].reshape(64, 8) == wanted[:64]).all()
    for old, new, words in (
        ("fence.proxy.async.shared::cta;", "", "no fence.proxy.async"),
        ("fence.proxy.async.shared::cta;\n\tbar.sync 0;", "fence.proxy.async.shared::cta;", "race"),
        ("mov.b32 %r9, 0;", "mov.b32 %r9, 1;", "has yet to write"),
        ("@%p3 tcgen05.commit", "@!%p4 tcgen05.commit", "nobody has asked for"),
        ("mov.b32 %r9, 0;", f"{COMMIT} mov.b32 %r9, 0;", "a second arrival"),
        ("@%p3 mbarrier.init", "mbarrier.init", "race|where one is"),
        ("@%p3 tcgen05.mma", "tcgen05.mma", "128 threads where one"),
        ("fence.proxy.async.shared::cta", "fence.proxy.async.global", "no fence.proxy.async"),
        ("fence.proxy", "@!%p1 fence.proxy", "no fence.proxy.async"),  # not the threads that wrote A's first rows
        ("@%p3 mbarrier.init.shared::cta.b64 [%r1 + 8], 1;", "", "where no barrier is"),
        ("tcgen05.ld.sync", "st.shared.b32 [%r5 + 1024], %r0;\n\ttcgen05.ld.sync", None),
        ("mov.b32 %r9, 0;", "mov.b32 %r9, 0;\n\tst.shared.b32 [%r5 + 1024], %r0;", "still reads"),
    ):
        assert old in code(128)
        changed = code(128).replace(old, new)
        if words is None:
            run(changed, numbers, out, threads=128, shared=16384)
            continue
        with pytest.raises(Fault, match=words):
            run(changed, numbers, out, threads=128, shared=16384)
    with pytest.raises(Unknown, match="a part of a block"):
        run(code(128).replace("again: mbarrier", "again: @%p1 mbarrier"), numbers, out, threads=128, shared=16384)
    with pytest.raises(Unknown, match="a product described"):
        run(code(128).replace(str(8 << 24 | 2 << 17 | 1 << 4), str(8 << 24 | 2 << 17)), numbers, out, threads=128,
            shared=16384)  # fmt: skip


def test_labels_of_their_own_scopes():
    loop = """
	{ .reg .pred more;
	again: add.s32 %r3, %r3, 1;
	mov.b64 {%r4, %r5}, %d2;
	setp.lt.s32 more, %r3, COUNT;
	@more bra again; }"""
    body = "mov.b32 %r3, 0;" + loop.replace("COUNT", "3") + "mov.b32 %r6, %r3;" + loop.replace("COUNT", "5")
    body += "add.s64 %d4, %d1, %d3; st.global.v2.b32 [%d4], {%r6, %r3};"
    assert (run(body, [0], np.zeros((32, 2), np.uint32)) == [3, 5]).all()
    with pytest.raises(Unknown, match="twice"):
        run("again: add.s32 %r3, %r3, 1; again: add.s32 %r3, %r3, 1;", [0], [0])
    with pytest.raises(Unknown, match="bra nowhere"):
        run("bra nowhere;", [0], [0])


def test_a_fence_shows_what_its_threads_know_of():
    def shared(*, fencing, product, barrier=False, met=False):
        memory = Shared(64, 128)
        memory.touch(np.array([[8]]), np.array([5]), True)
        memory.phase[0] += met
        if barrier:
            memory.barrier()
        memory.fence(np.array(fencing))
        memory.read_by_product(np.array([8]), product)

    shared(fencing=[5], product=5)
    shared(fencing=[0], product=0, met=True)  # of the warp, which has met
    shared(fencing=[70], product=70, barrier=True)
    for wrong in ({"fencing": [70], "product": 5, "barrier": True}, {"fencing": [4], "product": 5},
                  {"fencing": [], "product": 5}):  # fmt: skip
        with pytest.raises(Fault, match="no fence"):
            shared(**wrong)


def test_threads_that_write_one_place():
    write = "\tst.global.b32 [%d1], {value};"
    assert run(write.format(value=5), [0], np.zeros(1, np.uint32)).tolist() == [5]
    with pytest.raises(Fault, match="race: threads write different values"):
        run(write.format(value="%r0"), [0], np.zeros(1, np.uint32))


@pytest.mark.parametrize("space", ["in", "out", "shared"])
@pytest.mark.parametrize("where", ["before", "behind"])
def test_one_byte_outside(space, where):
    target = {
        "in": "ld.global.b32 %r1, [%d4];",
        "out": "st.global.b32 [%d4], %r0;",
        "shared": "st.shared.b32 [%r2], %r0;",
    }
    first, last = ("%d0", "%d4") if space == "in" else ("%d1", "%d4")
    step = -4 if where == "before" else 4
    body = f"""
	add.s64 {last}, {first}, %d2;
	add.s64 {last}, {last}, {{step}};
	mul.lo.s32 %r2, %r0, 4;
	add.s32 %r2, %r2, {{step}};
	{target[space]}"""
    memory = np.zeros(32, np.uint32)
    run(body.format(step=0), memory, memory, shared=128)
    with pytest.raises(Fault, match=r"outside every tensor|of shared memory, which has"):
        run(body.format(step=step), memory, memory, shared=128)


@pytest.mark.parametrize(("step", "cycles"), [(4, 0), (8, 1), (128, 31), (0, 0), (132, 0)])
def test_threads_that_meet_in_a_bank(step, cycles):
    """Words that lie 32 words apart are of one bank; of one word all threads may have their share."""
    machine = Machine()
    body = f"\tmul.lo.s32 %r1, %r0, {step};\n\tld.shared.b32 %r2, [%r1];"
    run(body, [0], [0], shared=8192, machine=machine)
    assert machine.traffic.conflicts == cycles
    wide = f"\tmul.lo.s32 %r1, %r0, {max(step // 4, 1) * 16};\n\tld.shared.v4.b32 {{%r2, %r3, %r4, %r5}}, [%r1];"
    machine = Machine()
    run(wide, [0], [0], shared=32768, machine=machine)
    assert machine.traffic.conflicts == {1: 0, 2: 4, 32: 28, 33: 0}[max(step // 4, 1)]


def test_addresses_are_aligned():
    body = "\tadd.s64 %d4, %d0, %d2;\n\tld.global.v{n}.b32 {{{registers}}}, [%d4];"
    memory = np.zeros(64, np.uint32)
    run(body.format(n=1, registers="%r1").replace(".v1", ""), memory, memory)
    with pytest.raises(Fault, match="no multiple of 8"):
        run(body.format(n=2, registers="%r1, %r2"), memory, memory)


def test_what_not_all_threads_reach():
    part = "\tsetp.lt.u32 %p1, %r0, {n};\n\t@!%p1 bra $end;\n\t{instruction}\n$end:\n\tmov.b32 %r9, 0;"
    barrier, shuffle = "bar.sync 0;", "shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;"
    run(part.format(n=32, instruction=shuffle), [0], [0], threads=64)
    with pytest.raises(Fault, match="not all threads of a warp"):
        run(part.format(n=16, instruction=shuffle), [0], [0], threads=64)
    loop = "\tsetp.lt.u32 %p1, %r0, 32;\n$wait:\n\t@%p1 bar.sync 1;\n\t@!%p1 bar.sync 2;"
    with pytest.raises(Fault, match="never reached by all"):
        run(loop, [0], [0], threads=64)
    run(part.format(n=64, instruction=barrier), [0], [0], threads=64)


def test_what_it_does_not_know_it_says():
    for instruction in ("tcgen05.shift.cta_group::1.down [%r1];", "ld.b32 %r1, [%d1];"):
        with pytest.raises(Unknown):
            run("\t" + instruction, [0], [0])
