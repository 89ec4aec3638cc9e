"""The Triton programs: activations to integer levels, and levels times packed weights.

**Layout.** A byte of a 4-bit weight holds channel 2i in its lower four bits and channel 2i + 1 in its upper
four (`sqap.kernels.packing`). The levels of an activation are therefore written *split*, a token's even
channels first and its odd channels behind them:

    weight, as stored    byte 0       byte 1       byte 2    ...      (one row of K / 2 bytes)
                         c1 | c0      c3 | c2      c5 | c4
    levels, split        c0 c2 c4 ... | c1 c3 c5 ...                  (one row of K bytes)

A tile of weight bytes is then two tiles of signed bytes, the lower four bits and the upper four, each of
which is multiplied with a contiguous tile of levels. Nothing is repacked.

**Nibbles.** A nibble n stands for the level n - 8. Moved to the upper four bits of a byte, with the sign bit
flipped, it is 16 (n - 8) as a signed byte: a shift, a mask and an exclusive or for four bytes at a time. The
factor 16 is divided out in the epilogue. Sums stay exact: at most 128 * 127 * K in 32 bits, enough for K up
to 131,071.
"""

from __future__ import annotations

import triton
import triton.language as tl

TINY = tl.constexpr(1.1754943508222875e-38)  # `sqap.kernels.levels.TINY`
TO_NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2**23: added and subtracted, it rounds a float32, ties to even


@triton.jit
def unpack(packed, ASSEMBLY: tl.constexpr):
    """Packed bytes to 16 times the levels of the even channels, and of the odd ones: two int8 tiles."""
    if ASSEMBLY:  # four bytes in one register, which the compiler does not find by itself
        even = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; lop3.b32 $0, t, 0xF0F0F0F0, 0x80808080, 0x6A; }",
            "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
        odd = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0xF0F0F0F0, 0x80808080, 0x6A;",
            "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        even = ((packed << 4) ^ 0x80).to(tl.int8, bitcast=True)
        odd = ((packed & 0xF0) ^ 0x80).to(tl.int8, bitcast=True)
    return even, odd


@triton.jit
def product(
    x, x_scale, weight, w_scale, bias, gain, residual, y,
    M, N, K: tl.constexpr,
    BITS: tl.constexpr, BIAS: tl.constexpr, GAIN: tl.constexpr, RESIDUAL: tl.constexpr,
    ASSEMBLY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``y = residual + gain * (x weight^T * x_scale * w_scale + bias)``; one program for a tile of ``y``.

    Output channels are the rows of the matrix instruction and tokens its columns: y^T = W x^T. Hopper's
    ``wgmma`` takes operands from registers, as unpacked weights are, for its rows alone, and few tokens waste
    few columns.

    Args:
        x: int8 levels ``(M, K)``, split where BITS is 4.
        x_scale: float32 ``(M,)``.
        weight: ``(N, K / 2)`` uint8 for 4 BITS, ``(N, K)`` int8 for 8.
        w_scale: float32 ``(N,)``.
        bias, gain: ``(N,)``.
        residual: ``(M, N)``.
        y: ``(M, N)``.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, token = n % N, m % M  # rows beyond the end repeat those at the beginning, and are not stored
    WIDTH: tl.constexpr = K // 2 if BITS == 4 else K  # bytes of a weight's row
    STEP: tl.constexpr = BLOCK_K // 2 if BITS == 4 else BLOCK_K
    at = tl.arange(0, STEP)
    xs = x + token[None, :].to(tl.int64) * K + at[:, None]
    ws = weight + row[:, None].to(tl.int64) * WIDTH + at[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for start in range(0, WIDTH, STEP):
        if WIDTH % STEP == 0:
            w, even = tl.load(ws), tl.load(xs)
        else:  # a level behind the last channel is 0, whatever the weight is taken for
            w = tl.load(ws, mask=at[None, :] < WIDTH - start, other=0)
            even = tl.load(xs, mask=at[:, None] < WIDTH - start, other=0)
        if BITS == 4:
            if WIDTH % STEP == 0:
                odd = tl.load(xs + WIDTH)
            else:
                odd = tl.load(xs + WIDTH, mask=at[:, None] < WIDTH - start, other=0)
            low, high = unpack(w, ASSEMBLY)
            total = tl.dot(low, even, total, out_dtype=tl.int32)
            total = tl.dot(high, odd, total, out_dtype=tl.int32)
        else:
            total = tl.dot(w, even, total, out_dtype=tl.int32)
        ws += STEP
        xs += STEP
    scale = tl.load(w_scale + row)
    if BITS == 4:
        scale *= 0.0625
    out = total.to(tl.float32) * tl.load(x_scale + token)[None, :] * scale[:, None]
    if BIAS:
        out += tl.load(bias + row).to(tl.float32)[:, None]
    if GAIN:
        out *= tl.load(gain + row).to(tl.float32)[:, None]
    place = m[None, :].to(tl.int64) * N + n[:, None]
    inside = (m[None, :] < M) & (n[:, None] < N)
    if RESIDUAL:
        out += tl.load(residual + place, mask=inside, other=0).to(tl.float32)
    tl.store(y + place, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def store_levels(
    values, inside, at, x, x_scale, token, K: tl.constexpr, BITS: tl.constexpr, SPLIT: tl.constexpr
):
    """One token's ``values`` at the channels ``at``, by one symmetric scale: `quantize_activation`."""
    SMALLEST: tl.constexpr = -8.0 if BITS == 4 else -127.0
    LARGEST: tl.constexpr = 7.0 if BITS == 4 else 127.0
    high = tl.max(tl.max(tl.where(inside, values, -float("inf")), 1), 0)
    low = tl.min(tl.min(tl.where(inside, values, float("inf")), 1), 0)
    scale = tl.maximum(tl.div_rn(tl.maximum(high, -low), -SMALLEST), TINY)
    if BITS == 4:
        scale = tl.where(high > -low, -scale, scale)
    # A maximum leaves out what is not a number; the scale must not.
    wrong = tl.sum(tl.sum((values != values).to(tl.int32), 1), 0)
    scale = tl.where(wrong > 0, float("nan"), scale)
    q = (tl.div_rn(values, scale) + TO_NEAREST) - TO_NEAREST
    q = tl.minimum(tl.maximum(q, SMALLEST), LARGEST)
    place = at // 2 + at % 2 * (K // 2) if SPLIT else at
    tl.store(x + token.to(tl.int64) * K + place, q.to(tl.int8), mask=inside)
    tl.store(x_scale + token, scale)


@triton.jit
def norm_quantize(
    h, gain, shift, x, x_scale, eps,
    K: tl.constexpr, RMS: tl.constexpr, GAIN: tl.constexpr, SHIFT: tl.constexpr,
    BITS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """RMSNorm or LayerNorm of a token of ``h`` ``(M, K)``, and its levels; one program for each token.

    ``gain`` and ``shift`` ``(K,)`` are the norm's weight and bias; BLOCK is a power of two, K or more.
    """
    token = tl.program_id(0)
    at = tl.arange(0, BLOCK)[None, :]
    inside = at < K
    v = tl.load(h + token.to(tl.int64) * K + at, mask=inside, other=0).to(tl.float32)
    if not RMS:
        v = tl.where(inside, v - tl.sum(tl.sum(v, 1), 0) / K, 0.0)
    v = v * (1.0 / tl.sqrt(tl.sum(tl.sum(v * v, 1), 0) / K + eps))
    if GAIN:
        v *= tl.load(gain + at, mask=inside, other=0).to(tl.float32)
    if SHIFT:
        v += tl.load(shift + at, mask=inside, other=0).to(tl.float32)
    store_levels(v, inside, at, x, x_scale, token, K, BITS, SPLIT)


@triton.jit
def sylvester(ORDER: tl.constexpr):
    """Hadamard matrices of ORDER 2 to 16, of entries 1 and -1, along the diagonal of a 16 x 16 matrix."""
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    parity = i & j & (ORDER - 1)
    parity ^= parity >> 2
    parity ^= parity >> 1
    return tl.where((i // ORDER) == (j // ORDER), 1.0 - 2.0 * (parity & 1).to(tl.float32), 0.0)


@triton.jit
def hadamard_step(v, ORDER: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The lowest log2(ORDER) bits of a channel's number in its block: multiplied, and made the highest.

    Tensor cores take a float32 for a TF32, of 11 bits. Entries are exact there; values are cut into two
    parts.
    """
    columns, matrix = tl.reshape(v, (SIZE // 16, 16)), sylvester(ORDER)
    coarse = (columns.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    y = tl.dot(coarse, matrix)
    y = tl.dot(columns - coarse, matrix, y)
    return tl.permute(tl.reshape(y, (SIZE // BLOCK, BLOCK // ORDER, ORDER)), (0, 2, 1))


@triton.jit
def hadamard(v, SIZE: tl.constexpr, BLOCK: tl.constexpr, LOG: tl.constexpr):
    """Each BLOCK = 2**LOG of the SIZE values of ``v`` times Sylvester's matrix: `hadamard.block_hadamard`.

    That matrix is a Kronecker product of small ones. Four bits of a channel's number at a time are the
    columns of a matrix, are multiplied, and become the highest bits; after all of them the order is the old
    one.
    """
    for _ in tl.static_range(LOG // 4):
        v = hadamard_step(v, 16, SIZE, BLOCK)
    if LOG % 4:
        v = hadamard_step(v, 1 << (LOG % 4), SIZE, BLOCK)
    return v * (1.0 / tl.sqrt(BLOCK * 1.0))


@triton.jit
def activation_quantize(
    h, factor, x, x_scale,
    K: tl.constexpr, FUNCTION: tl.constexpr, FACTOR: tl.constexpr, HADAMARD: tl.constexpr, LOG: tl.constexpr,
    BITS: tl.constexpr, SPLIT: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``FUNCTION(h) * factor`` of a token, times Hadamard matrices, and its levels; one program a token.

    Args:
        h, factor: ``(M, K)``; ``factor`` is not read unless FACTOR.
        FUNCTION: its place in `sqap.kernels.FUNCTIONS`.
        HADAMARD: the matrix's size, 2**LOG; 1 for none.
        CHUNKS, BLOCK: powers of two whose product is K or more; HADAMARD divides BLOCK.
    """
    token = tl.program_id(0)
    at = tl.arange(0, CHUNKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < K
    v = tl.load(h + token.to(tl.int64) * K + at, mask=inside, other=0).to(tl.float32)
    if FUNCTION == 1:  # SiLU
        v = v / (1.0 + tl.exp(-v))
    elif FUNCTION == 2:  # GELU
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif FUNCTION == 3:  # GELU by tanh: (1 + tanh(u)) / 2 is the logistic function of 2 u
        v = v / (1.0 + tl.exp(-1.5957691216057308 * (v + 0.044715 * v * v * v)))
    if FACTOR:
        v *= tl.load(factor + token.to(tl.int64) * K + at, mask=inside, other=0).to(tl.float32)
    if HADAMARD > 1:
        v = tl.reshape(hadamard(v, CHUNKS * BLOCK, HADAMARD, LOG), (CHUNKS, BLOCK))
    store_levels(v, inside, at, x, x_scale, token, K, BITS, SPLIT)


@triton.jit
def place(
    q, k, v, cos, sin, keys, values,
    first, tokens, angles, q_row, kv_row, batch_step, head_step, token_step,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, TURNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotary positions of queries, in place, and of keys on their way to ``keys``; values go to ``values``.

    One program for each token, and of it for each head of queries, of keys and, if the grid is so large, of
    values. Halves of a head are paired.

    Args:
        q: ``(M - first, HEADS * HEAD)``, rows ``q_row`` apart, of the tokens behind ``first``.
        k, v: ``(M, KV_HEADS * HEAD)``, rows ``kv_row`` apart.
        cos, sin: ``(angles, HEAD)``, which begin anew behind the last; for the first TURNED heads.
        keys, values: ``(M / tokens, KV_HEADS, tokens, HEAD)``, by these steps; they may be ``k`` and ``v``.
        BLOCK: a power of two, HEAD / 2 or more.
    """
    token, head = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    row, inside = token.to(tl.int64), at < HEAD // 2
    if head < HEADS:
        source = q + (row - first) * q_row + head * HEAD
        target = source
        inside = inside & (token >= first)
    else:
        own = (head - HEADS) % KV_HEADS
        step = row // tokens * batch_step + own * head_step + row % tokens * token_step
        source, target = k + row * kv_row + own * HEAD, keys + step
        if head >= HEADS + KV_HEADS:
            source, target = v + row * kv_row + own * HEAD, values + step
    x = tl.load(source + at, mask=inside, other=0).to(tl.float32)
    y = tl.load(source + HEAD // 2 + at, mask=inside, other=0).to(tl.float32)
    if head < TURNED:
        turn = token % angles * HEAD + at
        c = tl.load(cos + turn, mask=inside, other=0).to(tl.float32)
        s = tl.load(sin + turn, mask=inside, other=0).to(tl.float32)
        first_half = x * c - y * s
        c = tl.load(cos + turn + HEAD // 2, mask=inside, other=0).to(tl.float32)
        s = tl.load(sin + turn + HEAD // 2, mask=inside, other=0).to(tl.float32)
        y = y * c + x * s
        x = first_half
    tl.store(target + at, x.to(keys.dtype.element_ty), mask=inside)
    tl.store(target + HEAD // 2 + at, y.to(keys.dtype.element_ty), mask=inside)
