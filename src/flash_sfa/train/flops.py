"""Model FLOPs of a training step and the share of the device's peak they use (MFU).

FLOPs a token = 6 N + 6 sum over layers of heads * (d_qk + d_v) * keys. N are the parameters that take part in matrix
products: all but positions, with the embedding once, as the output head. ``keys`` is the mean number of keys a token
sees: (n + 1) / 2 of a row of n, less in a windowed layer. The 6 is two for a multiply and an add, times three for
forward and backward. An SFA layer counts as a dense one of the same widths, so MFU compares speeds at equal work.
"""

from typing import Any

from torch import nn

from . import models
from .recipe import Recipe

# Dense bf16 FLOP/s by a part of the device's name, from the vendor's data sheets.
PEAKS = {"H200": 989.4e12, "H100 80GB HBM3": 989.4e12, "H100 PCIe": 756.5e12, "A100": 312.0e12}


def peak_flops(device_name: str, stated_tflops: float = 0.0) -> float | None:
    """The peak that MFU is measured against: the stated one, else the data sheet's, else None.

    Example:
        >>> from flash_sfa.train.flops import peak_flops
        >>> peak_flops("NVIDIA H200"), peak_flops("cpu"), peak_flops("cpu", 2.0)
        (989400000000000.0, None, 2000000000000.0)
    """
    if stated_tflops > 0:
        return stated_tflops * 1e12
    return next((peak for part, peak in PEAKS.items() if part in device_name), None)


def visible_keys(n: int, window: int | None) -> float:
    """Mean number of keys a token of a row of n sees: (n + 1) / 2, or less with a window.

    Example:
        >>> from flash_sfa.train.flops import visible_keys
        >>> visible_keys(4, None), visible_keys(4, 2)
        (2.5, 1.75)
    """
    w = min(window or n, n)
    return w - w * (w - 1) / (2 * n)


def flops_per_token(model: Any, recipe: Recipe) -> float:
    """Forward and backward of one token of a row of model.context, see the module's text."""
    m = recipe.model
    total, _ = models.count_parameters(model, recipe)
    position = sum(
        p.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.endswith("wpe")
        for p in module.parameters()
    )
    attention = 0.0
    for module in models.attention_modules(model):
        at = module.sfa_train
        narrow = at.kind == "narrow"
        d_qk = at.qk_dim if narrow and at.qk_dim is not None else m.head_dim
        d_v = at.v_dim if narrow and at.v_dim is not None else m.v_head_dim or m.head_dim
        window = m.window if m.family == "hybrid" and getattr(module, "use_rope", False) else None
        attention += m.heads * (d_qk + d_v) * visible_keys(m.context, window)
    return 6.0 * (total - position + attention)
