"""Tile sizes of windowed attention by element size, head width and cell size: data, not code.

Chosen by what compiles without spilling registers on sm_80 and sm_90; nothing here was timed on a
GPU yet. A measurement may replace any row.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

POOL_BLOCK = 16
"""Pooled keys a step: ViTPose has 4 to 12 of them."""

BIAS_PROGRAMS = 1024
"""Programs among which the bias gradient is divided: eight a multiprocessor on an H100, and a bound
on the memory for partial sums (a tile of float32 each)."""


class Tile(NamedTuple):
    """A tile and its budget on either architecture, for any options of the kernel."""

    block: int  # tokens in registers
    step: int  # tokens of the other side, per step of the loop
    warps: int
    stages: int
    registers: int  # a thread at most: told to ptxas, which else may spill for more blocks
    shared: int  # bytes a block


Table = dict[tuple[int, int], dict[int, Tile]]  # (element size, block_d) -> largest cell -> tile


def block_d(head_dim: int) -> int:
    """Lanes of a row: a power of two that tl.dot takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tile_for(table: Table, qkv: Tensor, head_dim: int, tokens: int) -> Tile:
    """The tile of the smallest entry that holds a cell of so many tokens, or of the last."""
    entries = table[qkv.element_size(), block_d(head_dim)]
    return entries[min((size for size in entries if size >= tokens), default=max(entries))]


def launch_options(tile: Tile) -> dict[str, int | bool]:
    """What Triton compiles a kernel with."""
    return {
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": tile.registers,
        "enable_fp_fusion": True,
    }


def head_options(tile: Tile, head_dim: int) -> dict[str, int | bool]:
    """The same, and the widths of a head's rows."""
    return {"HEAD_DIM": head_dim, "BLOCK_D": block_d(head_dim), **launch_options(tile)}


# Tokens of the largest cell -> tile. A backward tile that holds a whole cell, and whose block and
# step agree, computes its scores once instead of twice.

FORWARD: Table = {
    (2, 16): {
        16: Tile(16, 16, 1, 1, 128, 1536),
        32: Tile(32, 32, 2, 1, 128, 6144),
        64: Tile(64, 64, 4, 1, 168, 22528),
        192: Tile(64, 64, 4, 2, 255, 26624),
    },
    (2, 32): {
        16: Tile(16, 16, 1, 1, 128, 3072),
        32: Tile(32, 32, 2, 1, 128, 8192),
        64: Tile(64, 64, 4, 1, 255, 28672),
        192: Tile(64, 64, 4, 2, 255, 36864),
    },
    (2, 64): {
        16: Tile(16, 16, 1, 1, 128, 5120),
        32: Tile(32, 32, 2, 1, 168, 12288),
        64: Tile(64, 64, 4, 1, 255, 32768),
        192: Tile(64, 32, 4, 2, 255, 32768),
        256: Tile(128, 64, 8, 2, 255, 81920),
    },
    (2, 128): {
        16: Tile(16, 16, 1, 1, 255, 9216),
        32: Tile(32, 32, 2, 1, 255, 20480),
        64: Tile(64, 32, 4, 1, 255, 40960),
        192: Tile(64, 32, 4, 2, 255, 57344),
    },
    (4, 16): {16: Tile(16, 16, 4, 1, 128, 4096), 32: Tile(32, 32, 4, 1, 128, 10240)},
    (4, 32): {16: Tile(16, 16, 4, 1, 128, 6144), 32: Tile(32, 32, 4, 1, 128, 12288)},
    (4, 64): {
        16: Tile(16, 16, 4, 1, 128, 12288),
        32: Tile(32, 32, 4, 1, 255, 28672),
        64: Tile(64, 32, 8, 1, 255, 40960),
    },
    (4, 128): {16: Tile(16, 16, 8, 1, 128, 24576), 32: Tile(32, 16, 8, 1, 128, 32768)},
}

BACKWARD: Table = {
    (2, 16): {
        16: Tile(16, 16, 1, 1, 128, 2560),
        32: Tile(32, 32, 2, 1, 128, 5120),
        64: Tile(64, 64, 4, 1, 168, 14336),
        128: Tile(64, 32, 4, 2, 128, 8448),
    },
    (2, 32): {
        16: Tile(16, 16, 1, 1, 168, 5120),
        32: Tile(32, 32, 2, 1, 168, 10240),
        64: Tile(64, 64, 4, 1, 255, 20480),
        128: Tile(64, 32, 4, 2, 255, 16640),
    },
    (2, 64): {
        16: Tile(16, 16, 1, 1, 168, 9216),
        32: Tile(32, 32, 2, 1, 255, 18432),
        64: Tile(64, 64, 4, 1, 255, 34816),
        128: Tile(64, 32, 8, 3, 255, 41472),
    },
    (2, 128): {
        16: Tile(16, 16, 2, 1, 255, 20480),
        32: Tile(32, 32, 4, 1, 255, 40960),
        64: Tile(32, 32, 4, 2, 255, 35072),
    },
    (4, 16): {16: Tile(16, 16, 2, 1, 128, 5120), 32: Tile(32, 32, 8, 1, 128, 16384)},
    (4, 32): {16: Tile(16, 16, 2, 1, 128, 9216), 32: Tile(32, 32, 8, 1, 128, 24576)},
    (4, 64): {16: Tile(16, 16, 2, 1, 255, 17408), 32: Tile(32, 32, 8, 1, 128, 40960)},
    (4, 128): {16: Tile(16, 16, 4, 1, 255, 33792), 32: Tile(32, 16, 4, 1, 255, 53248)},
}

# The bias costs registers for its addresses.
BACKWARD_WITH_BIAS: Table = {
    (2, 16): {
        16: Tile(16, 16, 1, 1, 128, 2560),
        32: Tile(32, 32, 2, 1, 128, 8192),
        64: Tile(64, 64, 4, 1, 168, 24576),
        128: Tile(32, 32, 2, 2, 168, 8448),
    },
    (2, 32): {
        16: Tile(16, 16, 1, 1, 128, 5120),
        32: Tile(32, 32, 2, 1, 168, 12288),
        64: Tile(64, 64, 4, 1, 255, 32768),
        128: Tile(32, 32, 2, 1, 168, 12288),
    },
    (2, 64): {
        16: Tile(16, 16, 1, 1, 168, 9216),
        32: Tile(32, 32, 2, 1, 255, 20480),
        64: Tile(64, 64, 4, 1, 255, 40960),
        128: Tile(32, 32, 4, 2, 255, 22784),
    },
    (2, 128): {
        16: Tile(16, 16, 2, 1, 168, 20480),
        32: Tile(32, 32, 4, 1, 255, 40960),
        64: Tile(32, 32, 4, 2, 255, 39168),
    },
    (4, 16): {16: Tile(16, 16, 4, 1, 128, 5120), 32: Tile(32, 32, 8, 1, 255, 16384)},
    (4, 32): {16: Tile(16, 16, 4, 1, 128, 9216), 32: Tile(32, 32, 8, 1, 128, 24576)},
    (4, 64): {16: Tile(16, 16, 4, 1, 128, 17408), 32: Tile(32, 32, 8, 1, 255, 40960)},
    (4, 128): {16: Tile(16, 16, 4, 1, 255, 33792), 32: Tile(32, 16, 8, 1, 128, 53248)},
}

BIAS_BACKWARD: Table = {
    (2, 16): {
        16: Tile(16, 16, 1, 1, 128, 1536),
        32: Tile(32, 32, 2, 1, 255, 6144),
        64: Tile(64, 32, 4, 2, 168, 20480),
    },
    (2, 32): {
        16: Tile(16, 16, 1, 1, 168, 3072),
        32: Tile(32, 32, 2, 1, 168, 8192),
        64: Tile(64, 32, 4, 2, 255, 32768),
    },
    (2, 64): {
        16: Tile(16, 16, 1, 1, 255, 5120),
        32: Tile(32, 32, 2, 1, 255, 12288),
        64: Tile(64, 32, 4, 2, 255, 57344),
    },
    (2, 128): {
        16: Tile(16, 16, 1, 1, 255, 9216),
        32: Tile(32, 16, 2, 1, 255, 18432),
        64: Tile(32, 16, 4, 1, 255, 18432),
    },
    (4, 16): {16: Tile(16, 16, 2, 1, 128, 4096), 32: Tile(32, 32, 4, 1, 168, 12288)},
    (4, 32): {16: Tile(16, 16, 2, 1, 168, 9216), 32: Tile(32, 32, 4, 1, 128, 16384)},
    (4, 64): {16: Tile(16, 16, 2, 1, 128, 17408), 32: Tile(32, 32, 4, 1, 168, 36864)},
    (4, 128): {16: Tile(16, 16, 4, 1, 128, 32768), 32: Tile(32, 16, 8, 1, 128, 49152)},
}

POOL_BACKWARD: Table = {  # pooled keys in registers, tokens of the whole map a step
    (2, 16): {16: Tile(POOL_BLOCK, 64, 4, 2, 128, 5632)},
    (2, 32): {16: Tile(POOL_BLOCK, 64, 4, 2, 128, 12800)},
    (2, 64): {16: Tile(POOL_BLOCK, 64, 4, 2, 128, 23040)},
    (2, 128): {16: Tile(POOL_BLOCK, 64, 4, 2, 255, 43520)},
    (4, 16): {16: Tile(POOL_BLOCK, 32, 4, 1, 128, 10240)},
    (4, 32): {16: Tile(POOL_BLOCK, 32, 4, 1, 128, 16384)},
    (4, 64): {16: Tile(POOL_BLOCK, 32, 4, 1, 128, 28672)},
    (4, 128): {16: Tile(POOL_BLOCK, 16, 4, 1, 128, 34816)},
}

POOL = Tile(32, 128, 4, 1, 128, 2048)
"""Tokens and channels of a step of the pooling kernel."""

BIAS_REDUCE = Tile(16, 64, 4, 1, 128, 256)
"""Entries of the table, and pairs a step, of the kernel that sums the bias gradient."""
