"""The attention of training runs: a Transformers attention function that follows each layer's settings.

SFA by "mask": q and k keep their top-k features in place (zeros elsewhere) and go through torch SDPA. The
scores are those of the codes, so results equal ``flash_sfa.sfa_attention`` with ``nonoverlap="zero"``; it
saves no memory and needs no kernel. SFA by "op" calls ``flash_sfa.sfa_attention``.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "sfa_train"
ROUNDS = 32
MOMENTUM = 0.02  # of the mean key: an average over about 50 steps


@dataclass
class LayerAttention:
    """How one layer attends; read from ``module.sfa_train``.

    Attributes:
        kind: "dense", "narrow" (the first qk_dim features of q and k, and v_dim of v, only) or "sfa".
        topk_q, topk_k: features kept a row beside dense_dims; None keeps the side dense.
        dense_dims: features that are always kept.
        path: "mask" or "op", for kind "sfa".
        alibi: scores lose slope * distance (path mask), see ``flash_sfa.train.recipe.ModelSpec``.
        shrink, split_signs, anneal, fade, recent, balance, distill, match, map_dim, share, drop, center: see
            ``flash_sfa.train.recipe.AttentionSpec``. The matrices of map_dim are the parameters sfa_map_q and sfa_map_k
            of the module, the mean of center is its buffer sfa_mean (kv_heads, features).
        progress: None (the end of the run) or the share of the run that is done, a float32 scalar tensor.
        aux: the losses of balance, distill and match of the last call with gradients, None without one.
        k_bits: None, or the bits to which k is rounded (evaluation only), see ``quantize_keys``.
        observed: None, or a list to which each call appends its statistics (evaluation only).
        captured: None, or a list to which each call appends q, k, v as they enter top-k (evaluation only).
    """

    kind: str = "dense"
    qk_dim: int | None = None
    v_dim: int | None = None
    topk_q: int | None = None
    topk_k: int | None = None
    dense_dims: tuple[int, ...] = ()
    path: str = "mask"
    alibi: bool = False
    shrink: bool = False
    split_signs: bool = False
    anneal: float = 0.0
    fade: float = 0.0
    recent: int = 0
    balance: float = 0.0
    distill: float = 0.0
    match: float = 0.0
    map_dim: int = 0
    share: bool = False
    drop: bool = False
    center: bool = False
    progress: Tensor | None = field(default=None, repr=False)
    aux: Tensor | None = field(default=None, repr=False)
    k_bits: int | None = None
    observed: list[dict[str, float]] | None = field(default=None, repr=False)
    captured: list[tuple[Tensor, Tensor, Tensor]] | None = field(default=None, repr=False)


def topk_mask(x: Tensor, topk: int, dense_dims: tuple[int, ...] = ()) -> Tensor:
    """True at the features that ``topk_sparsify(x, topk, dense_dims=dense_dims)`` keeps.

    The k-th largest comes from k maxima in a row, which a compiler fuses into one pass over a row.

    Args:
        x: (..., d) bfloat16, float16 or float32, d <= 8192. topk: at least 1.

    Returns:
        bool (..., d).

    Raises:
        TypeError: another dtype. ValueError: topk < 1.

    Example:
        >>> import torch
        >>> from flash_sfa.train.attention import topk_mask
        >>> topk_mask(torch.tensor([0.1, -3.0, 2.0, 0.5]), 2).tolist()
        [False, True, True, False]
    """
    if topk < 1:
        raise ValueError(f"topk must be at least 1, got {topk}")
    d = x.shape[-1]
    width = min(topk, d - len(dense_dims))
    if width == d - len(dense_dims):
        return torch.ones_like(x, dtype=torch.bool)
    key, always = _order(x, dense_dims)
    if width > ROUNDS:
        kth = key.topk(width, dim=-1).values[..., -1:]
    else:
        left = key
        for _ in range(width - 1):
            left = torch.where(left == left.amax(-1, keepdim=True), -1, left)
        kth = left.amax(-1, keepdim=True)
    kept: Tensor = (key >= kth) | always
    return kept


def _order(x: Tensor, dense_dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A unique integer for each feature, and a mask (d,) of those always on, which get -1.

    It is the bits of |x|, then the feature number counted from the end, so one comparison with the k-th largest
    selects exactly k and ties go to the lowest number.
    """
    d = x.shape[-1]
    feature = torch.arange(d, device=x.device)
    always = torch.zeros(d, dtype=torch.bool, device=x.device)
    for u in dense_dims:
        always = always | (feature == u)
    bits = x.float().abs().view(torch.int32)
    bits = torch.where(torch.isnan(x), 0x7FC00000, bits)
    order = d - 1 - feature
    if x.dtype == torch.bfloat16:
        key = (bits & ~0xFFFF) | order.int()
    elif x.dtype == torch.float16:
        key = (bits & ~0x1FFF) | order.int()
    elif x.dtype == torch.float32:
        key = (bits.long() << 16) | order
    else:
        raise TypeError(f"x must be bfloat16, float16 or float32, got {x.dtype}")
    return torch.where(always, -1, key), always


def _annealed_mask(x: Tensor, topk: int, dense_dims: tuple[int, ...], share: Tensor) -> Tensor:
    """``topk_mask`` with topk falling from all features at share 0 to ``topk`` at 1, by equal factors.

    The number is a tensor, so that a compiled step stays one graph while it changes.
    """
    free = x.shape[-1] - len(dense_dims)
    now = (free * (min(topk, free) / free) ** share.clamp(max=1.0)).round().long()
    key, always = _order(x, dense_dims)
    kth = key.sort(-1, descending=True).values.index_select(-1, now.view(1) - 1)
    kept: Tensor = (key >= kth) | always
    return kept


def codes_of(x: Tensor, topk: int | None, at: LayerAttention) -> Tensor:
    """x as its codes take part in scores: zeros at dropped features, or what the layer's ideas make of them."""
    if topk is None:
        return x
    if not (at.shrink or at.anneal or at.fade or at.share):
        return keep_topk(x, topk, at.dense_dims)
    with torch.no_grad():
        if at.anneal and at.progress is not None:
            mask = _annealed_mask(_ranked(x, at), topk, at.dense_dims, at.progress / at.anneal)
        else:
            mask = kept_features(x, topk, at)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    values = x
    if at.shrink:
        tau = torch.where(mask, zero, x.abs()).amax(-1, keepdim=True)
        if at.dense_dims:
            tau = torch.where(torch.arange(x.shape[-1], device=x.device) < len(at.dense_dims), zero, tau)
        values = x - x.sign() * tau
    out = torch.where(mask, values, zero)
    if at.fade and at.progress is not None:
        out = out + (1 - at.progress / at.fade).clamp(min=0.0).to(x.dtype) * torch.where(mask, zero, x)
    return out


def kept_features(x: Tensor, topk: int | None, at: LayerAttention) -> Tensor:
    """True at the features of (b, h, n, d) that a trained layer keeps."""
    if topk is None:
        return torch.ones_like(x, dtype=torch.bool)
    return topk_mask(_ranked(x, at), topk, at.dense_dims).expand_as(x)


def _ranked(x: Tensor, at: LayerAttention) -> Tensor:
    """What top-k ranks: x, or the sum of squares over heads where they share their features."""
    return x.float().square().sum(1, keepdim=True) if at.share else x


def add_maps(module: nn.Module, heads: int, kv_heads: int, head_dim: int, features: int) -> None:
    """Give an attention module the matrices of map_dim: (heads, head_dim, features) for q and for k.

    Those of a query head and its key head begin as one matrix M with M M^T = 1, so (q M) (k M)^T = q k^T: blocks of
    rotations, the first of them the identity.
    """
    blocks = -(-features // head_dim)
    first = torch.eye(head_dim).expand(kv_heads, 1, -1, -1)
    other = torch.linalg.qr(torch.randn(kv_heads, blocks - 1, head_dim, head_dim))[0]
    m = torch.cat([first, other], 1).transpose(1, 2).reshape(kv_heads, head_dim, -1)[..., :features] * blocks**-0.5
    module.sfa_map_q = nn.Parameter(m.repeat_interleave(heads // kv_heads, 0).clone())
    module.sfa_map_k = nn.Parameter(m.clone())


def split_signs(x: Tensor, dense_dims: tuple[int, ...]) -> Tensor:
    """The always-on features (the first ones), then relu(x) and relu(-x) of the others."""
    r = len(dense_dims)
    return torch.cat([x[..., :r], x[..., r:].relu(), (-x[..., r:]).relu()], -1)


def balance_loss(x: Tensor, topk: int, dense_dims: tuple[int, ...]) -> Tensor:
    """1 where every free feature is kept equally often, more the fewer do the work; mean over heads.

    d / topk times the sum over features of the share kept (no gradient) and the mean softmax of |x|.
    """
    r = len(dense_dims)
    kept = topk_mask(x.detach(), topk, dense_dims)[..., r:].float().mean((0, 2))
    soft = x[..., r:].float().abs().softmax(-1).mean((0, 2))
    return (kept * soft).sum(-1).mean() * (soft.shape[-1] / min(topk, soft.shape[-1]))


def _seen(n: int, window: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """How far key j lies behind query i, and whether i sees it: (n, n) both."""
    i = torch.arange(n, device=device)
    behind = i[:, None] - i[None, :]
    return behind, (behind >= 0) & (behind < (window or n))


def _alibi(n: int, heads: int, device: torch.device) -> Tensor:
    """What ALiBi adds to the scores: (heads, n, n)."""
    behind, _ = _seen(n, None, device)
    slopes = 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1, device=device))
    return -slopes[:, None, None] * behind


def _scores(q: Tensor, k: Tensor, at: LayerAttention, scale: float, window: int | None) -> Tensor:
    """All scores of an SFA layer in fp32, -inf where unseen: for ideas that no SDPA call can do, and statistics."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    behind, seen = _seen(q.shape[2], window, q.device)
    with torch.autocast(q.device.type, enabled=False):
        scores = codes_of(q, at.topk_q, at).float() @ codes_of(k, at.topk_k, at).float().transpose(-1, -2)
        if at.drop:
            members = (kept_features(x, topk, at).float() for x, topk in ((q, at.topk_q), (k, at.topk_k)))
            seen = seen & (next(members) @ next(members).transpose(-1, -2) > 0)
        if at.recent:
            near = behind < at.recent
            scores = torch.where(near, q.float() @ k.float().transpose(-1, -2), scores)
            seen = seen | (near & (behind >= 0))
        scores = scores * scale
        if at.alibi:
            scores = scores + _alibi(q.shape[2], q.shape[1], q.device)
    return scores.masked_fill(~seen, -torch.inf)


def distill_loss(q: Tensor, k: Tensor, at: LayerAttention, scale: float, window: int | None) -> Tensor:
    """Mean divergence of the layer's attention from that with q and k whole, on a quarter of the rows of the batch.

    The whole attention gets no gradient.
    """
    some = max(q.shape[0] // 4, 1)
    q, k = q[:some], k[:some]
    with torch.no_grad():
        whole = _scores(q, k, LayerAttention(alibi=at.alibi), scale, window).log_softmax(-1)
    ours = _scores(q, k, at, scale, window).log_softmax(-1)
    gap = torch.where(torch.isinf(whole), 0.0, whole - ours.masked_fill(torch.isinf(whole), 0.0))
    return (whole.exp() * gap).sum(-1).mean()


def keep_topk(x: Tensor, topk: int, dense_dims: tuple[int, ...] = ()) -> Tensor:
    """x with all but its top-k and always-on features set to 0; the gradient passes at the kept ones."""
    with torch.no_grad():
        mask = topk_mask(x, topk, dense_dims)
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def quantize_keys(k: Tensor, bits: int, group: int = 64) -> Tensor:
    """Round keys (b, h, n, d) to ``bits`` as a cache would: 2^bits levels between the smallest and largest
    value
    of each feature in each group of ``group`` tokens. Two 16-bit numbers a feature and group describe the
    levels.
    """
    b, h, n, d = k.shape
    padded = F.pad(k.float(), (0, 0, 0, -n % group)).view(b, h, -1, group, d)
    valid = (torch.arange(padded.shape[2] * group, device=k.device) < n).view(-1, group, 1)
    low = torch.where(valid, padded, torch.inf).amin(3, keepdim=True)
    high = torch.where(valid, padded, -torch.inf).amax(3, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    rounded: Tensor = torch.round((padded - low) / step) * step + low
    rounded = rounded.view(b, h, -1, d)[:, :, :n]
    return rounded.to(k.dtype)


def key_bytes(head_dim: int, at: LayerAttention, kv_heads: int = 1) -> float:
    """Bytes of one stored key (one token, one kv head) in 16-bit floats, top-k indices in 1 byte up to d = 256.

    Heads that share their features store the indices once.
    """
    heads = kv_heads if at.share else 1
    if at.k_bits is not None:
        return (at.qk_dim or head_dim) * (at.k_bits / 8 + 4 / 64)
    if at.kind == "narrow":
        return 2.0 * (at.qk_dim or head_dim)
    if at.kind == "sfa" and at.topk_k is not None:
        features = at.map_dim or head_dim
        if at.split_signs:
            features = 2 * features - len(at.dense_dims)
        width = min(at.topk_k, features - len(at.dense_dims))
        return width * (2.0 + (1.0 if features <= 256 else 2.0) / heads) + 2.0 * len(at.dense_dims)
    return 2.0 * head_dim


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, alibi: bool = False) -> Tensor:
    """Causal attention over (b, h, n, d) tensors through torch SDPA, widths padded to one so that any backend
    fits."""
    n, dv = q.shape[2], v.shape[-1]
    width = max(q.shape[-1], dv) + -max(q.shape[-1], dv) % 8
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if alibi:
        bias = _alibi(n, q.shape[1], q.device).masked_fill(~_seen(n, window, q.device)[1], -torch.inf)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)[None], scale=scale)
    elif window is None or window >= n:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=_seen(n, window, q.device)[1], scale=scale)
    return out[..., :dv]


def train_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for Transformers models; full rows only (no padding), causal, no dropout.

    Args:
        module: its ``sfa_train`` attribute holds a LayerAttention.
        query, key, value: (b, heads, n, d), as Transformers passes them.

    Returns:
        (b, n, heads, dv) and None.
    """
    if attention_mask is not None or dropout:
        raise NotImplementedError("training attention takes packed rows without a mask and no dropout")
    if key.shape[2] != query.shape[2]:
        raise NotImplementedError("training attention has no cache; export the checkpoint to generate")
    at = module.sfa_train
    if not isinstance(at, LayerAttention):
        raise TypeError("the module has no LayerAttention; build the model with flash_sfa.train.models")
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    if at.kind == "narrow" and at.qk_dim is not None and at.qk_dim < q.shape[-1]:
        scaling = scaling * (q.shape[-1] / at.qk_dim) ** 0.5
        q, k = q[..., : at.qk_dim], k[..., : at.qk_dim]
    if at.map_dim:
        q = torch.einsum("bhnd,hde->bhne", q, module.sfa_map_q.to(dtype))
        k = torch.einsum("bhnd,hde->bhne", k, module.sfa_map_k.to(dtype))
    if at.center:
        mean = module.get_buffer("sfa_mean")
        if module.training and torch.is_grad_enabled():
            mean.lerp_(k.detach().float().mean((0, 2)), MOMENTUM)
        k = k - mean[:, None].to(dtype)
    if at.split_signs:
        q, k = split_signs(q, at.dense_dims), split_signs(k, at.dense_dims)
    dv = v.shape[-1]
    if at.v_dim is not None:
        v = v[..., : at.v_dim]
    if at.k_bits is not None:
        k = quantize_keys(k, at.k_bits)
    if at.observed is not None:
        at.observed.append(_statistics(q, k, at, scaling, sliding_window))
    if at.captured is not None:
        at.captured.append((q, k, v))
    if at.kind == "sfa" and at.path == "op":
        from ..api import sfa_attention

        out = sfa_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            topk=(at.topk_q, at.topk_k),
            dense_dims=at.dense_dims,
            causal=True,
            softmax_scale=scaling,
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        )
        return out, None
    if at.kind == "sfa":
        training = torch.is_grad_enabled()
        at.aux = None
        if training and (at.balance or at.distill):
            at.aux = _aux(q, k, at, scaling, sliding_window)
        if at.recent or at.drop:
            scores = _scores(q, k, at, scaling, sliding_window)
            alone = torch.isneginf(scores).all(
                -1, keepdim=True
            )  # only with drop; a softmax over nothing has no gradient
            weights = torch.where(alone, 0.0, torch.where(alone, 0.0, scores).softmax(-1))
            out = weights.to(v.dtype) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
            return out.transpose(1, 2), None
        whole = [x.detach() for x in (q, k, v)]
        q, k = codes_of(q, at.topk_q, at), codes_of(k, at.topk_k, at)
        if training and at.match:
            out = _sdpa(q, k, v, scaling, sliding_window, at.alibi)
            gap = out - _sdpa(whole[0], whole[1], whole[2], scaling, sliding_window, at.alibi)
            at.aux = (0.0 if at.aux is None else at.aux) + at.match * gap.float().square().sum(-1).mean()
            return out.transpose(1, 2), None
    out = _sdpa(q, k, v, scaling, sliding_window, at.alibi)
    if at.v_dim is not None:
        out = F.pad(out, (0, dv - at.v_dim))
    return out.transpose(1, 2), None


def _aux(q: Tensor, k: Tensor, at: LayerAttention, scale: float, window: int | None) -> Tensor:
    """The weighted extra losses of a layer."""
    out = torch.zeros((), device=q.device)
    if at.distill:
        out = out + at.distill * distill_loss(q, k, at, scale, window)
    if at.balance:
        for x, topk in ((q, at.topk_q), (k, at.topk_k)):
            if topk is not None:
                out = out + at.balance * balance_loss(x, topk, at.dense_dims)
    return out


@torch.no_grad()
def _statistics(q: Tensor, k: Tensor, at: LayerAttention, scale: float, window: int | None) -> dict[str, float]:
    """What the codes of one layer look like, means over heads and visible pairs.

    overlap: share of pairs with a common feature. edges: common features a pair. v_rows: share of visible V
    rows
    some query head of the group shares a feature with. balance_q, balance_k: entropy of the selected features
    over its largest value. rows_999: share of visible rows that carry 99.9% of the weight (queries of the
    second half).
    """
    sparse = at.kind == "sfa"
    d, n, groups = q.shape[-1], q.shape[2], q.shape[1] // k.shape[1]
    q_on, k_on = (kept_features(x, t if sparse else None, at) for x, t in ((q, at.topk_q), (k, at.topk_k)))
    free = [u for u in range(d) if u not in at.dense_dims]
    _, seen = _seen(n, window, q.device)
    pairs = seen.sum()
    shared = q_on.float() @ k_on.repeat_interleave(groups, 1).float().transpose(-1, -2)
    hit = (shared > 0) & seen
    by_group = hit.view(hit.shape[0], -1, groups, n, n).any(2)
    weights = _scores(q, k, at, scale, window).softmax(-1).nan_to_num(0.0)[..., n // 2 :, :]
    heavy = (weights.sort(-1, descending=True).values.cumsum(-1) < 0.999).sum(-1) + 1
    out = {
        "overlap": float(hit.sum() / (pairs * hit.shape[0] * hit.shape[1])),
        "edges": float((shared * seen).sum() / (pairs * hit.shape[0] * hit.shape[1])),
        "v_rows": float(by_group.sum() / (pairs * by_group.shape[0] * by_group.shape[1])),
        "rows_999": float((heavy / seen[n // 2 :].sum(-1)).mean()),
    }
    for name, on in (("balance_q", q_on), ("balance_k", k_on)):
        share = on[..., free].float().mean((0, 2))
        share = share / share.sum(-1, keepdim=True)
        entropy = -(share * share.clamp_min(1e-12).log()).sum(-1) / torch.tensor(float(max(len(free), 2))).log()
        out[name] = float(entropy.mean())
    return out


def no_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """Mask function beside ``train_attention``: rows are packed and full, so there is none to build."""
    if attention_mask is not None:
        raise NotImplementedError("training attention takes packed rows; do not pass attention_mask")


def register() -> None:
    """Register "sfa_train" with Transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, train_attention)
    AttentionMaskInterface.register(NAME, no_mask)
