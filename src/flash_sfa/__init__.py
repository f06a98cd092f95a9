"""Flash-SFA: Sparse Feature Attention (ICLR 2026, arXiv 2603.22300).

Names load on first use, so that ``flash-sfa env`` works where torch is missing or broken.
"""

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .api import select_impl, sfa_attention, sfa_attention_varlen
    from .cache import SparseKVCache
    from .codes import SparseCode, topk_sparsify
    from .decode import sfa_attention_with_kvcache
    from .nn import SparseFeatureAttention

_HOMES = {
    "SparseCode": "codes",
    "topk_sparsify": "codes",
    "sfa_attention": "api",
    "sfa_attention_varlen": "api",
    "select_impl": "api",
    "SparseKVCache": "cache",
    "sfa_attention_with_kvcache": "decode",
    "SparseFeatureAttention": "nn",
}

__all__ = [
    "SparseCode",
    "SparseFeatureAttention",
    "SparseKVCache",
    "__version__",
    "select_impl",
    "sfa_attention",
    "sfa_attention_varlen",
    "sfa_attention_with_kvcache",
    "topk_sparsify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flash_sfa' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
