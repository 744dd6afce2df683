"""What the fused GEMMs share: the walk over tiles, a tile's loop over K, the halves of a tile."""

import triton.language as tl

from ._jit import jit


@jit
def tile_at(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Position of a tile where GROUP_M rows of tiles are walked column by column.

    That keeps the weight and the rows in use there in L2.
    """
    in_group = GROUP_M * tiles_n
    first = tile // in_group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + tile % in_group % rows, tile % in_group // rows


@jit
def halves(t, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N) -> its left and its right half."""
    return tl.split(tl.permute(tl.reshape(t, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@jit
def dot_tile(
    a_ptr,  # first element of BLOCK_M rows of (M, K)
    b_ptr,  # first element of the tile's BLOCK_N columns of B
    num_rows,  # rows of a inside M
    num_cols,  # columns of b inside N
    K,
    b_row,  # elements between rows of B
    b_col,  # elements between columns of B
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides K
    PAST_N: tl.constexpr,  # columns past N: "none" exist, they "repeat" the last, or are "masked"
    PRECISION: tl.constexpr,
):
    """fp32 (BLOCK_M, BLOCK_N): a @ b over all of K; what lies past M and N is to be dropped."""
    ks = tl.arange(0, BLOCK_K)
    cols = tl.arange(0, BLOCK_N)
    # Rows past M repeat the last one: no mask in the loop. So may columns, but not where they are
    # neighbours in memory: what is clamped is read one element at a time.
    rows = tl.minimum(tl.arange(0, BLOCK_M), num_rows - 1)
    b_cols = tl.minimum(cols, num_cols - 1) if PAST_N == "repeat" else cols
    a_at = rows[:, None] * K + ks[None, :]
    b_at = ks[:, None] * b_row + b_cols[None, :] * b_col
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Without disable_licm, triton 3.6 serialises the WGMMA of this loop on sm_90 (ptxas C7515).
    for k in tl.range(0, K, BLOCK_K, disable_licm=True):
        if EVEN_K:
            a = tl.load(a_ptr + a_at)
        else:
            a = tl.load(a_ptr + a_at, mask=ks[None, :] < K - k, other=0.0)
        if PAST_N == "masked":
            inside = (ks[:, None] < K - k) & (cols[None, :] < num_cols)
            b = tl.load(b_ptr + b_at, mask=inside, other=0.0)
        elif EVEN_K:
            b = tl.load(b_ptr + b_at)
        else:
            b = tl.load(b_ptr + b_at, mask=ks[:, None] < K - k, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptr += BLOCK_K
        b_ptr += BLOCK_K * b_row
    return acc
