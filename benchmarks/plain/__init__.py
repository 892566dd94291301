"""The models as a careful user writes them without us: torch alone, one plain layer after another.

The state_dict of each is that of our model, less `input_size`. Attention is SDPA, a change of
layout is a view wherever it can be, and all run in either memory format of their images. BatchNorm
stays a layer of its own: torch.compile folds none into a convolution unless it is told to freeze.
"""

from __future__ import annotations

from torch import nn


def copy_weights(ours: nn.Module, plain: nn.Module) -> None:
    state = ours.state_dict()
    plain.load_state_dict({n: t for n, t in state.items() if not n.endswith("input_size")})
