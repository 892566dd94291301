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
    """A tile and its budget: what ptxas gave on either architecture, at most, for any options."""

    block: int  # tokens in registers
    step: int  # tokens of the other side, per step of the loop
    warps: int
    stages: int
    registers: int  # a thread
    shared: int  # bytes a block


Table = dict[tuple[int, int], dict[int, Tile]]  # (element size, block_d) -> largest cell -> tile


def block_d(head_dim: int) -> int:
    """Lanes of a row: a power of two that tl.dot takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tile_for(table: Table, qkv: Tensor, head_dim: int, tokens: int) -> Tile:
    """The tile of the smallest entry that holds a cell of so many tokens, or of the last."""
    entries = table[qkv.element_size(), block_d(head_dim)]
    return entries[min((size for size in entries if size >= tokens), default=max(entries))]


# A row of a table: largest cell in tokens -> tile. BACKWARD entries up to 64 hold the whole cell,
# which saves it the second look at its scores; block and step must then agree.

FORWARD: Table = {
    (2, 16): {
        16: Tile(16, 16, 1, 1, 255, 99999),
        32: Tile(32, 32, 2, 1, 255, 99999),
        64: Tile(64, 64, 4, 1, 255, 99999),
        192: Tile(64, 64, 4, 2, 255, 99999),
    },
    (2, 32): {
        16: Tile(16, 16, 1, 1, 255, 99999),
        32: Tile(32, 32, 2, 1, 255, 99999),
        64: Tile(64, 64, 4, 1, 255, 99999),
        192: Tile(64, 64, 4, 2, 255, 99999),
    },
    (2, 64): {
        16: Tile(16, 16, 1, 1, 255, 99999),
        32: Tile(32, 32, 2, 1, 255, 99999),
        64: Tile(64, 64, 4, 1, 255, 99999),
        192: Tile(64, 64, 4, 2, 255, 99999),
        256: Tile(128, 64, 8, 2, 255, 99999),
    },
    (2, 128): {
        16: Tile(16, 16, 1, 1, 255, 99999),
        32: Tile(32, 32, 2, 1, 255, 99999),
        64: Tile(64, 32, 4, 1, 255, 99999),
        192: Tile(64, 32, 4, 2, 255, 99999),
    },
    (4, 16): {16: Tile(16, 16, 4, 1, 255, 99999), 32: Tile(32, 32, 4, 1, 255, 99999)},
    (4, 32): {16: Tile(16, 16, 4, 1, 255, 99999), 32: Tile(32, 32, 4, 1, 255, 99999)},
    (4, 64): {
        16: Tile(16, 16, 4, 1, 255, 99999),
        32: Tile(32, 32, 4, 1, 255, 99999),
        64: Tile(64, 32, 8, 1, 255, 99999),
    },
    (4, 128): {16: Tile(16, 16, 8, 1, 255, 99999), 32: Tile(32, 16, 8, 1, 255, 99999)},
}

BACKWARD: Table = {
    (2, 16): {
        16: Tile(16, 16, 1, 1, 255, 99999),
        32: Tile(32, 32, 2, 1, 255, 99999),
        64: Tile(64, 64, 4, 1, 255, 99999),
        128: Tile(64, 32, 4, 2, 255, 99999),
    },
    (2, 32): {
        16: Tile(16, 16, 1, 1, 255, 99999),
        32: Tile(32, 32, 2, 1, 255, 99999),
        64: Tile(64, 64, 4, 1, 255, 99999),
        128: Tile(64, 32, 4, 2, 255, 99999),
    },
    (2, 64): {
        16: Tile(16, 16, 1, 1, 255, 99999),
        32: Tile(32, 32, 2, 1, 255, 99999),
        64: Tile(64, 64, 4, 1, 255, 99999),
        128: Tile(64, 32, 4, 3, 255, 99999),
    },
    (2, 128): {
        16: Tile(16, 16, 1, 1, 255, 99999),
        32: Tile(32, 32, 4, 1, 255, 99999),
        64: Tile(32, 32, 4, 2, 255, 99999),
    },
    (4, 16): {16: Tile(16, 16, 2, 1, 255, 99999), 32: Tile(32, 32, 8, 1, 255, 99999)},
    (4, 32): {16: Tile(16, 16, 2, 1, 255, 99999), 32: Tile(32, 32, 8, 1, 255, 99999)},
    (4, 64): {16: Tile(16, 16, 2, 1, 255, 99999), 32: Tile(32, 32, 8, 1, 255, 99999)},
    (4, 128): {16: Tile(16, 16, 2, 1, 255, 99999), 32: Tile(32, 16, 4, 1, 255, 99999)},
}

# The bias costs registers for its addresses.
BACKWARD_WITH_BIAS: Table = {
    (2, 16): {
        16: Tile(16, 16, 1, 1, 255, 99999),
        32: Tile(32, 32, 2, 1, 255, 99999),
        64: Tile(64, 64, 4, 1, 255, 99999),
        128: Tile(32, 32, 2, 2, 255, 99999),
    },
    (2, 32): {
        16: Tile(16, 16, 1, 1, 255, 99999),
        32: Tile(32, 32, 2, 1, 255, 99999),
        64: Tile(64, 64, 4, 1, 255, 99999),
        128: Tile(32, 32, 2, 2, 255, 99999),
    },
    (2, 64): {
        16: Tile(16, 16, 1, 1, 255, 99999),
        32: Tile(32, 32, 2, 1, 255, 99999),
        64: Tile(64, 64, 4, 1, 255, 99999),
        128: Tile(32, 32, 2, 2, 255, 99999),
    },
    (2, 128): {
        16: Tile(16, 16, 1, 1, 255, 99999),
        32: Tile(32, 32, 4, 1, 255, 99999),
        64: Tile(32, 32, 4, 2, 255, 99999),
    },
    (4, 16): {16: Tile(16, 16, 4, 1, 255, 99999), 32: Tile(32, 32, 8, 1, 255, 99999)},
    (4, 32): {16: Tile(16, 16, 4, 1, 255, 99999), 32: Tile(32, 32, 8, 1, 255, 99999)},
    (4, 64): {16: Tile(16, 16, 4, 1, 255, 99999), 32: Tile(32, 32, 8, 1, 255, 99999)},
    (4, 128): {16: Tile(16, 16, 4, 1, 255, 99999), 32: Tile(32, 16, 8, 1, 255, 99999)},
}

BIAS_BACKWARD: Table = {
    (2, 16): {
        16: Tile(16, 16, 1, 1, 255, 99999),
        32: Tile(32, 32, 2, 1, 255, 99999),
        64: Tile(64, 32, 4, 2, 255, 99999),
    },
    (2, 32): {
        16: Tile(16, 16, 1, 1, 255, 99999),
        32: Tile(32, 32, 2, 1, 255, 99999),
        64: Tile(64, 32, 4, 2, 255, 99999),
    },
    (2, 64): {
        16: Tile(16, 16, 1, 1, 255, 99999),
        32: Tile(32, 32, 2, 1, 255, 99999),
        64: Tile(64, 32, 4, 2, 255, 99999),
    },
    (2, 128): {
        16: Tile(16, 16, 1, 1, 255, 99999),
        32: Tile(32, 16, 2, 1, 255, 99999),
        64: Tile(32, 32, 4, 1, 255, 99999),
    },
    (4, 16): {16: Tile(16, 16, 2, 1, 255, 99999), 32: Tile(32, 32, 4, 1, 255, 99999)},
    (4, 32): {16: Tile(16, 16, 2, 1, 255, 99999), 32: Tile(32, 32, 4, 1, 255, 99999)},
    (4, 64): {16: Tile(16, 16, 2, 1, 255, 99999), 32: Tile(32, 32, 4, 1, 255, 99999)},
    (4, 128): {16: Tile(16, 16, 4, 1, 255, 99999), 32: Tile(32, 16, 8, 1, 255, 99999)},
}

POOL_BACKWARD: Table = {  # pooled keys in registers, tokens of the whole map a step
    (2, 16): {16: Tile(POOL_BLOCK, 64, 4, 2, 255, 99999)},
    (2, 32): {16: Tile(POOL_BLOCK, 64, 4, 2, 255, 99999)},
    (2, 64): {16: Tile(POOL_BLOCK, 64, 4, 2, 255, 99999)},
    (2, 128): {16: Tile(POOL_BLOCK, 64, 4, 2, 255, 99999)},
    (4, 16): {16: Tile(POOL_BLOCK, 32, 4, 1, 255, 99999)},
    (4, 32): {16: Tile(POOL_BLOCK, 32, 4, 1, 255, 99999)},
    (4, 64): {16: Tile(POOL_BLOCK, 32, 4, 1, 255, 99999)},
    (4, 128): {16: Tile(POOL_BLOCK, 16, 4, 1, 255, 99999)},
}

POOL = Tile(32, 128, 4, 1, 255, 99999)
"""Tokens and channels of a step of the pooling kernel."""

BIAS_REDUCE = Tile(128, 1, 1, 1, 255, 99999)
"""Pairs a step of the kernel that sums the bias gradient."""
