"""Sparse Feature Attention as a layer."""

from collections.abc import Sequence

from torch import Tensor, nn

from .api import sfa_attention
from .cache import SparseKVCache
from .checks import check_bool, check_dense_dims, check_tensor, check_topk_pair, is_int
from .decode import sfa_attention_with_kvcache


class SparseFeatureAttention(nn.Module):
    r"""Multi-head self-attention whose scores use the top-k features of queries and keys.

    .. math::
        \text{out} = W_o\, \text{sfa\_attention}(W_q x, W_k x, W_v x)

    It adds no positions: rotate or add them outside.

    Args:
        embed_dim: width of x and of the output.
        num_heads: query heads; num_kv_heads: key and value heads, a divisor of it (default: the same).
        head_dim: width of a query and key head (default: embed_dim // num_heads, which must divide).
        v_head_dim: width of a value head (default: head_dim).
        topk, dense_dims: as in `sfa_attention`; with a cache the keys must be sparse.
        bias: bias in the four projections.
        causal: a token sees itself and those before it.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.

    Source: arXiv 2603.22300.

    Example:
        >>> import torch
        >>> from flash_sfa import SparseFeatureAttention
        >>> SparseFeatureAttention(64, 4, topk=4)(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        topk: int | tuple[int | None, int | None],
        dense_dims: int | Sequence[int] = 0,
        bias: bool = False,
        causal: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
        sizes |= {"head_dim": head_dim, "v_head_dim": v_head_dim}
        for name, size in sizes.items():
            if size is None:
                continue
            if not is_int(size):
                raise TypeError(f"{name} must be an int, got {size!r} of type {type(size).__name__}")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}; or give head_dim"
                )
            head_dim = embed_dim // num_heads
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
        check_topk_pair(topk)
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim, self.v_head_dim = head_dim, head_dim if v_head_dim is None else v_head_dim
        self.topk, self.dense_dims = topk, check_dense_dims(dense_dims, head_dim)
        self.causal = check_bool(causal, "causal")
        check_bool(bias, "bias")
        self.q_proj = nn.Linear(embed_dim, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * self.v_head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.v_head_dim, embed_dim, bias=bias)

    def forward(self, x: Tensor, *, cache: SparseKVCache | None = None, layer: int = 0) -> Tensor:
        """x (b, n, embed_dim) -> (b, n, embed_dim).

        With a cache, row b of x continues the b-th live sequence: its keys and values are appended to ``layer``
        and it attends to all that is stored there. No gradient reaches stored tokens.
        """
        check_tensor(x, "x")
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x must be (batch, seqlen, {self.embed_dim}), got {tuple(x.shape)}")
        if cache is not None:
            if not isinstance(cache, SparseKVCache):
                raise TypeError(f"cache must be a SparseKVCache or None, got {type(cache).__name__}")
            if cache.dense_dims != self.dense_dims:
                raise ValueError(f"cache must have dense_dims={self.dense_dims}, got {cache.dense_dims}")
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.v_head_dim))
        if cache is None:
            out = sfa_attention(q, k, v, topk=self.topk, dense_dims=self.dense_dims, causal=self.causal)
        else:
            out = sfa_attention_with_kvcache(q, cache, k=k, v=v, layer=layer, topk=self.topk, causal=self.causal)
        return self.o_proj(out.flatten(-2))

    def extra_repr(self) -> str:
        return f"topk={self.topk}, dense_dims={self.dense_dims}, causal={self.causal}"
