"""A change of basis of queries and keys, a head at a time, that leaves dense attention as it is.

For any invertible A, (q A) (k A^-T)^T = q k^T, so A can go into the weights of the projections for nothing. Top-k of k
depends on the basis. With q whole, the error that dropped features of k' = k A^-T leave in the scores is
q A (k' - top-k of k')^T; where the features of q A are uncorrelated with variance 1, its mean square is the energy of
what is dropped. So A = C^-1/2 R, with C the second moment of q over tokens, makes it a question of a rotation R:

    minimise  sum over tokens |z R - topk(z R)|^2,  z = k C^1/2,

which alternates between top-k and the rotation nearest to it (an orthogonal Procrustes problem); it is orthogonal
sparse coding. "pca" takes the principal axes of z, the best choice if all tokens were to keep the same features.
"""

from typing import Any

import torch
from torch import Tensor

from .attention import LayerAttention, keep_topk
from .models import attention_modules
from .recipe import BASES, Recipe

ROUNDS = 25


def fit_basis(q: Tensor, k: Tensor, topk: int, how: str = "fit") -> Tensor:
    """The matrix A, (d, d) float64, for one kv head.

    Args:
        q: (tokens of all query heads of the group, d). k: (tokens, d). topk: features of k that will be kept.
        how: "fit"; "pca"; "random", a rotation; or "none", the identity.

    Raises:
        ValueError: another ``how``.

    Example:
        >>> import torch
        >>> from flash_sfa.train.basis import fit_basis
        >>> q, k = torch.randn(100, 8), torch.randn(100, 8)
        >>> a = fit_basis(q, k, 2)
        >>> scores = (q @ a.float()) @ (k @ a.float().inverse().T).T
        >>> torch.allclose(scores, q @ k.T, atol=1e-3)
        True
    """
    if how not in BASES or not how:
        raise ValueError(f"how must be one of {BASES[1:]}, got {how!r}")
    q, k = q.double(), k.double()
    d = q.shape[-1]
    if how == "none":
        return torch.eye(d, dtype=q.dtype, device=q.device)
    if how == "random":
        gen = torch.Generator().manual_seed(0)
        return torch.linalg.qr(torch.randn(d, d, generator=gen, dtype=q.dtype))[0].to(q.device)
    values, vectors = torch.linalg.eigh(q.T @ q / len(q))
    values = values.clamp_min(1e-6 * float(values[-1]))
    root, whiten = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    z = k @ root
    axes = torch.linalg.eigh(z.T @ z)[1].flip(1)
    rotation = axes if how == "pca" else _sparse_rotation(z, axes, topk)
    a = whiten @ rotation
    # One factor more for q and less for k, so that both have features of one size.
    size_q, size_k = ((x.square().mean() + 1e-30).sqrt() for x in (q @ a, k @ torch.linalg.inv(a).T))
    return a * (size_k / size_q).sqrt()


def _sparse_rotation(z: Tensor, axes: Tensor, topk: int) -> Tensor:
    """The rotation with the least energy beyond the top-k: the better of two starts."""
    start = fit_basis(z, z, topk, "random")
    found = []
    for rotation in (axes, start):
        for _ in range(ROUNDS):
            left, _, right = torch.linalg.svd(z.T @ _kept(z @ rotation, topk))
            rotation = left @ right
        turned = z @ rotation
        found.append((float((turned - _kept(turned, topk)).square().sum()), rotation))
    return min(found, key=lambda pair: pair[0])[1]


def _kept(x: Tensor, topk: int) -> Tensor:
    return keep_topk(x.float(), topk).to(x.dtype)


@torch.no_grad()
def rebase(model: Any, recipe: Recipe, ids: Tensor) -> None:
    """Give the recipe's layers the basis that ``attention.basis`` names, fitted on ``ids`` int64 (b, n).

    Features behind the rotated ones take part (always-on rotary features keep their places). Dense attention does not
    change. For narrow q and k, whose scale grows with d / qk_dim, q shrinks by as much: what is left is the dense
    attention with the leading ``qk_dim`` features of the basis.

    Raises:
        NotImplementedError: projections that are followed by a norm, or features that rotate without being always on.
    """
    at, shape = recipe.attention, recipe.model
    first = at.dense_dims
    rotary = shape.family == "rotary" and (shape.rotary_dims is None or shape.rotary_dims > first)
    if shape.family == "qwen3" or rotary:
        raise NotImplementedError(
            f"attention.basis: model.family {shape.family} turns or normalises q and k between the projection and "
            "top-k; only features that do neither can change their basis (model.rotary_dims = attention.dense_dims)"
        )
    chosen = [m for m in attention_modules(model) if m.sfa_train.kind != "dense"]
    settings = [m.sfa_train for m in chosen]
    for module, setting in zip(chosen, settings):
        module.sfa_train = LayerAttention(captured=[], alibi=setting.alibi)
    model(input_ids=ids, use_cache=False)
    factor = (at.qk_dim / shape.head_dim) ** 0.5 if at.kind == "narrow" and at.qk_dim else 1.0
    for module, setting in zip(chosen, settings):
        ((q, k, _),) = module.sfa_train.captured
        module.sfa_train = setting
        q, k = (x[..., first:].transpose(0, 1).flatten(1, 2) for x in (q, k))  # (heads, tokens, features)
        group = len(q) // len(k)
        topk = at.topk_k if at.kind == "sfa" else at.qk_dim
        for i in range(len(k)):
            heads = range(i * group, (i + 1) * group)
            a = fit_basis(q[heads.start : heads.stop].flatten(0, 1), k[i], topk or 1, at.basis)
            for head in heads:
                _turn(module, "q", head, first, shape.head_dim, a * factor)
            _turn(module, "k", i, first, shape.head_dim, torch.linalg.inv(a).T)


def _turn(module: Any, side: str, head: int, first: int, d: int, a: Tensor) -> None:
    """Multiply the features of one head that a projection gives, from ``first`` on, by a."""
    if hasattr(module, "c_attn"):  # GPT-2: (in, 3 width), q then k then v
        begin = (side == "k") * (module.c_attn.weight.shape[1] // 3) + head * d
        weight, bias = module.c_attn.weight.data.T, module.c_attn.bias
    else:
        begin, projection = head * d, getattr(module, f"{side}_proj")
        weight, bias = projection.weight.data, projection.bias
    rows = slice(begin + first, begin + d)
    weight[rows] = (a.T @ weight[rows].double()).to(weight.dtype)
    if bias is not None:
        bias.data[rows] = (bias.data[rows].double() @ a).to(bias.dtype)
