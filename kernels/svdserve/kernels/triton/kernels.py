"""The Triton kernels: shrink, expand, and both in one launch; launch.py launches them.

Shrink is z = x[pivots] + Z x[rest] with the gather and the addition fused in, or z = V x; expand is
y = C z + b. Sums are float32. As in a grouped GEMM, a kernel computes several parts at once, each
with its own factors and rank, which all read the same x. A part is that of parts.py: the q, k and
v of a model that is factored ``separate`` are three parts of one launch.

A factor_in has few rows, so it gives few tiles to the many multiprocessors of a GPU. Shrink may
therefore divide its columns among SPLITS programs, each of which writes its own float32 sums. The
last one to finish adds them, always in the same order, so that results do not vary from run to run.

EARLY is programmatic dependent launch (NVIDIA, from sm_90): a kernel starts while the previous one
ends, prefetches the first weights of each row, and only then waits for the previous one's results.

Every size is a multiple of 16, zero padded (layout.py pads), and is passed as a number of blocks of
16, so that the compiler knows the alignment of every row. The loads of weights are thus 128 bits
wide, and no kernel is compiled a second time for another shape.
"""

import triton
import triton.language as tl

PART_FIELDS = 8
# The columns of the table of parts, all in blocks of 16: the rank; the width of factor_in; the
# outputs; the offsets of factor_in, factor_out and the channels; the first columns in z and y.
RANK = tl.constexpr(0)
WIDTH = tl.constexpr(1)
OUTPUTS = tl.constexpr(2)
INNER = tl.constexpr(3)
OUTER = tl.constexpr(4)
CHANNELS = tl.constexpr(5)
Z_COLUMN = tl.constexpr(6)
Y_COLUMN = tl.constexpr(7)
FIELDS = tl.constexpr(PART_FIELDS)

# The indices of the counters of the single launch.
STARTED = tl.constexpr(0)
SHRUNK = tl.constexpr(1)
FINISHED = tl.constexpr(2)
COUNTERS = 4  # one is unused, so that what follows is aligned

# Sizes that vary from call to call. Triton must not specialise on them, or it would compile a
# kernel again when one of them is 1 or is not a multiple of 16.
_CALL_SIZES = ("rows", "x_blocks", "z_blocks", "y_blocks", "parts", "tiles", "shrink_tiles")
_CALL_SIZES += ("has_bias", "rest_block", "rest_blocks")

# How shrink reads x. PLAIN: all channels. GATHERED: by the indices of pivots and other channels.
# IN_ORDER: x already holds the pivots and then the others, each padded, so nothing is gathered.
PLAIN = tl.constexpr(0)
GATHERED = tl.constexpr(1)
IN_ORDER = tl.constexpr(2)


@triton.jit
def _locate(parts_ptr, parts, tile, SIZE: tl.constexpr, BN: tl.constexpr):
    """The part that a tile of BN rows of its factor belongs to, and the tile's first row."""
    part = 0
    before = 0
    first = 0
    for index in range(parts):
        if tile >= first:
            part = index
            before = first
        first += tl.cdiv(tl.load(parts_ptr + index * FIELDS + SIZE) * 16, BN)
    return parts_ptr + part * FIELDS, (tile - before) * BN


@triton.jit
def _gathered(x_rows, channels, k0, width, inside, BK: tl.constexpr):
    """The x [BT, BK] of the channels that columns k0 .. k0 + BK of factor_in multiply."""
    k = k0 + tl.arange(0, BK)
    channel = tl.load(channels + k, mask=k < width, other=-1)
    # Padding is -1 and not a channel with weight zero, because zero times an infinite x is NaN.
    return tl.load(
        x_rows + channel[None, :], mask=inside[:, None] & (channel >= 0)[None, :], other=0.0
    )


@triton.jit
def _weights(rows, k0, width, inside, BK: tl.constexpr):
    """Columns k0 .. k0 + BK of the BN rows of a factor, transposed."""
    k = k0 + tl.arange(0, BK)
    return tl.trans(
        tl.load(rows + k[None, :], mask=inside[:, None] & (k < width)[None, :], other=0.0)
    )


@triton.jit
def _dot(a, b, sums, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """a b + sums; WIDEN is for the interpreter, which would multiply bfloat16 as integers."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def _rounded(sums, dtype: tl.constexpr, WIDEN: tl.constexpr):
    """The sums rounded to dtype, to nearest even; the interpreter would truncate to bfloat16."""
    if WIDEN and dtype == tl.bfloat16:
        bits = sums.to(tl.int32, bitcast=True)
        sums = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return sums.to(dtype)


@triton.jit
def _ask_for(rows, width, LINES: tl.constexpr):
    """Prefetch the first LINES times 128 bytes of every row into the L2 cache, without waiting."""
    column = tl.minimum(
        tl.arange(0, LINES) * (128 // (rows.dtype.element_ty.primitive_bitwidth // 8)), width - 1
    )
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [rows + column[None, :]],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _shrink_tile(
    x_ptr, inner_ptr, channels_ptr, pivots_ptr, z_ptr, sums_ptr, arrivals_ptr, parts_ptr,
    rows, x_blocks, z_blocks, parts, rest_block, row_block, tile, split,
    READ: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr, LINES: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    part, first = _locate(parts_ptr, parts, tile, RANK, BN)
    rank = tl.load(part + RANK) * 16
    width = tl.load(part + WIDTH) * 16
    column = tl.load(part + Z_COLUMN) * 16
    channels = channels_ptr + tl.load(part + CHANNELS) * 16
    t = row_block * BT + tl.arange(0, BT)
    n = first + tl.arange(0, BN)
    x_rows = x_ptr + (t.to(tl.int64) * (x_blocks * 16))[:, None]
    inner = inner_ptr + tl.load(part + INNER).to(tl.int64) * 16
    w_rows = inner + (n * width)[:, None]
    share = tl.cdiv(tl.cdiv(width, BK), SPLITS) * BK
    begin = split * share
    end = tl.minimum(begin + share, width)
    if EARLY:
        if LINES and not WIDEN:
            _ask_for(
                inner + (tl.minimum(n, rank - 1) * width)[:, None] + begin, width - begin, LINES
            )
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros([BT, BN], tl.float32)
    if READ == GATHERED:
        # Scalar loads cannot be asynchronous copies, so registers hold the next x beforehand.
        x = _gathered(x_rows, channels, begin, end, t < rows, BK)
        for k0 in range(begin, end, BK):
            w = _weights(w_rows, k0, end, n < rank, BK)
            following = _gathered(x_rows, channels, k0 + BK, end, t < rows, BK)
            sums = _dot(x, w, sums, PRECISION, WIDEN)
            x = following
    else:
        for k0 in range(begin, end, BK):
            k = k0 + tl.arange(0, BK)
            inside = (t < rows)[:, None] & (k < end)[None, :]
            x = tl.load(x_rows + rest_block * 16 + k[None, :], mask=inside, other=0.0)
            sums = _dot(x, _weights(w_rows, k0, end, n < rank, BK), sums, PRECISION, WIDEN)
    if READ != PLAIN and split == 0:
        pivot = n
        if READ == GATHERED:
            pivot = tl.load(pivots_ptr + column + n, mask=n < rank, other=-1)
        chosen = (t < rows)[:, None] & ((pivot >= 0) & (n < rank))[None, :]
        sums += tl.load(x_rows + pivot[None, :], mask=chosen, other=0.0).to(tl.float32)
    inside = (t < rows)[:, None] & (n < rank)[None, :]
    place = column + (t.to(tl.int64) * (z_blocks * 16))[:, None] + n[None, :]
    dtype = z_ptr.dtype.element_ty
    if SPLITS == 1:
        tl.store(z_ptr + place, _rounded(sums, dtype, WIDEN), mask=inside)
    else:
        whole = tl.cast(rows, tl.int64) * (z_blocks * 16)
        tl.store(sums_ptr + split * whole + place, sums, mask=inside)
        tl.debug_barrier()  # every warp has stored its part before one thread says so
        if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == SPLITS - 1:
            total = tl.zeros([BT, BN], tl.float32)
            for other in tl.static_range(SPLITS):
                # .cg: from the L2 cache, where the other multiprocessors wrote it.
                total += tl.load(
                    sums_ptr + other * whole + place, mask=inside, other=0.0, cache_modifier=".cg"
                )
            tl.store(z_ptr + place, _rounded(total, dtype, WIDEN), mask=inside)
            tl.atomic_xchg(arrivals_ptr, 0, sem="relaxed")


@triton.jit
def _expand_tile(
    z_ptr, outer_ptr, bias_ptr, y_ptr, parts_ptr,
    rows, z_blocks, y_blocks, parts, has_bias, row_block, tile,
    EARLY: tl.constexpr, LINES: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    part, first = _locate(parts_ptr, parts, tile, OUTPUTS, BN)
    rank = tl.load(part + RANK) * 16
    outputs = tl.load(part + OUTPUTS) * 16
    column = tl.load(part + Y_COLUMN) * 16
    t = row_block * BT + tl.arange(0, BT)
    n = first + tl.arange(0, BN)
    z_rows = z_ptr + tl.load(part + Z_COLUMN) * 16 + (t.to(tl.int64) * (z_blocks * 16))[:, None]
    outer = outer_ptr + tl.load(part + OUTER).to(tl.int64) * 16
    c_rows = outer + (n * rank)[:, None]
    if EARLY:
        if LINES and not WIDEN:
            _ask_for(outer + (tl.minimum(n, outputs - 1) * rank)[:, None], rank, LINES)
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros([BT, BN], tl.float32)
    for k0 in range(0, rank, BK):
        k = k0 + tl.arange(0, BK)
        inside = (t < rows)[:, None] & (k < rank)[None, :]
        z = tl.load(z_rows + k[None, :], mask=inside, other=0.0)
        sums = _dot(z, _weights(c_rows, k0, rank, n < outputs, BK), sums, PRECISION, WIDEN)
    bias = tl.load(bias_ptr + column + n, mask=n < outputs * has_bias, other=0.0)
    sums += bias.to(tl.float32)[None, :]
    y = y_ptr + column + (t.to(tl.int64) * (y_blocks * 16))[:, None] + n[None, :]
    inside = (t < rows)[:, None] & (n < outputs)[None, :]
    tl.store(y, _rounded(sums, y_ptr.dtype.element_ty, WIDEN), mask=inside)


@triton.jit
def _swizzled(rows, tiles, BT: tl.constexpr):
    """Row block and tile of a program; eight consecutive programs read the same weights."""
    row_blocks = tl.cdiv(rows, BT)
    program = tl.program_id(0)
    band = program // (8 * tiles)
    height = tl.minimum(row_blocks - band * 8, 8)
    place = program % (8 * tiles)
    return band * 8 + place % height, place // height


@triton.jit(do_not_specialize=_CALL_SIZES)
def shrink(
    x_ptr, inner_ptr, channels_ptr, pivots_ptr, z_ptr, sums_ptr, arrivals_ptr, parts_ptr,
    rows, x_blocks, z_blocks, parts, rest_block, tiles,
    READ: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr, LINES: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute z of every part, with a program for each tile [BT, BN] of z and split of its sum."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    row_block, tile = _swizzled(rows, tiles, BT)
    _shrink_tile(
        x_ptr, inner_ptr, channels_ptr, pivots_ptr, z_ptr, sums_ptr,
        arrivals_ptr + row_block * tiles + tile, parts_ptr,
        rows, x_blocks, z_blocks, parts, rest_block, row_block, tile, tl.program_id(1),
        READ, SPLITS, EARLY, LINES, PRECISION, WIDEN, BT, BN, BK,
    )  # fmt: skip


@triton.jit(do_not_specialize=_CALL_SIZES)
def expand(
    z_ptr, outer_ptr, bias_ptr, y_ptr, parts_ptr,
    rows, z_blocks, y_blocks, parts, has_bias, tiles,
    EARLY: tl.constexpr, LINES: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute y of every part, with a program for each tile [BT, BN] of y."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    row_block, tile = _swizzled(rows, tiles, BT)
    _expand_tile(
        z_ptr, outer_ptr, bias_ptr, y_ptr, parts_ptr,
        rows, z_blocks, y_blocks, parts, has_bias, row_block, tile,
        EARLY, LINES, PRECISION, WIDEN, BT, BN, BK,
    )  # fmt: skip


@triton.jit(do_not_specialize=_CALL_SIZES)
def shrink_expand(
    x_ptr, inner_ptr, channels_ptr, pivots_ptr, z_ptr, sums_ptr, arrivals_ptr, outer_ptr, bias_ptr,
    y_ptr, parts_ptr, counters_ptr,
    rows, x_blocks, z_blocks, y_blocks, parts, has_bias, rest_block,
    shrink_tiles, tiles,
    READ: tl.constexpr, SPLITS: tl.constexpr, LINES: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute z and y of at most BT rows in one launch, with a program for each tile of z and of y.

    A program gets its tile by a ticket, so the tiles of z go to the programs that start first, and
    these wait for no other. In whatever order the device starts programs, those of y wait only for
    programs that are running. The last program to finish sets the counters back to zero for the
    next launch.
    """
    ticket = tl.atomic_add(counters_ptr + STARTED, 1, sem="relaxed")
    if ticket < shrink_tiles * SPLITS:
        _shrink_tile(
            x_ptr, inner_ptr, channels_ptr, pivots_ptr, z_ptr, sums_ptr,
            arrivals_ptr + ticket // SPLITS, parts_ptr,
            rows, x_blocks, z_blocks, parts, rest_block,
            0, ticket // SPLITS, ticket % SPLITS,
            READ, SPLITS, False, LINES, PRECISION, WIDEN, BT, BN, BK,
        )  # fmt: skip
        tl.debug_barrier()  # every warp has stored its part of z before one thread says so
        tl.atomic_add(counters_ptr + SHRUNK, 1, sem="release")
    else:
        tile = ticket - shrink_tiles * SPLITS
        if LINES and not WIDEN:
            part, first = _locate(parts_ptr, parts, tile, OUTPUTS, BN)
            rank = tl.load(part + RANK) * 16
            n = tl.minimum(first + tl.arange(0, BN), tl.load(part + OUTPUTS) * 16 - 1)
            outer = outer_ptr + tl.load(part + OUTER).to(tl.int64) * 16
            _ask_for(outer + (n * rank)[:, None], rank, LINES)
        while tl.atomic_add(counters_ptr + SHRUNK, 0, sem="acquire") < shrink_tiles * SPLITS:
            pass
        tl.debug_barrier()
        _expand_tile(
            z_ptr, outer_ptr, bias_ptr, y_ptr, parts_ptr,
            rows, z_blocks, y_blocks, parts, has_bias, 0, tile,
            False, LINES, PRECISION, WIDEN, BT, BN, BK,
        )  # fmt: skip
    if tl.atomic_add(counters_ptr + FINISHED, 1, sem="acq_rel") == tiles - 1:
        tl.atomic_xchg(counters_ptr + STARTED, 0, sem="relaxed")
        tl.atomic_xchg(counters_ptr + SHRUNK, 0, sem="relaxed")
        tl.atomic_xchg(counters_ptr + FINISHED, 0, sem="relaxed")


@triton.jit(do_not_specialize=_CALL_SIZES)
def gather(
    x_ptr, channels_ptr, pivots_ptr, z_ptr, rest_ptr,
    x_blocks, z_blocks, rest_blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy x[pivots] to z and x[rest] to rest, with zeros in their padding."""
    t = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ranks = z_blocks * 16
    own = place < ranks
    other = (place >= ranks) & (place < ranks + rest_blocks * 16)
    channel = tl.load(pivots_ptr + place, mask=own, other=-1)
    channel = tl.where(own, channel, tl.load(channels_ptr + place - ranks, mask=other, other=-1))
    x = tl.load(x_ptr + t * (x_blocks * 16) + channel, mask=channel >= 0, other=0.0)
    tl.store(z_ptr + t * ranks + place, x, mask=own)
    tl.store(rest_ptr + t * (rest_blocks * 16) + place - ranks, x, mask=other)
