"""An oracle in float64 that shares no code with the package, the spanning grid and the error budget.

Members are sets of feature numbers found by sorting Python lists, visibility is read off its definition row by
row, gradients are written out by hand.
"""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flash_sfa import SparseCode, sfa_attention

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# What pytest.mark.parametrize("device", ...) takes.
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN (255 in uint8), so that an element nobody wrote shows."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


# ------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One point of the grid. topk: an int, "d" for the whole row, or a pair. scale: None for d ** -0.5."""

    lengths: tuple[int, int] = (63, 63)
    heads: tuple[int, int] = (4, 4)
    d: int = 64
    dv: int = 64
    topk: Any = 8
    dense: str = "none"
    sees: str = "all"
    nonoverlap: str = "zero"
    layout: str = "plain"
    dtype: torch.dtype = FP32
    batch: int = 2
    scale: float | None = None

    @property
    def pair(self) -> tuple[int | None, int | None]:
        entry = self.d if self.topk == "d" else self.topk
        return entry if isinstance(entry, tuple) else (entry, entry)

    @property
    def dims(self) -> tuple[int, ...]:
        """The always-on features as a tuple."""
        return {"none": (), "first": (0, 1, 2, 3), "named": (self.d // 2 + 1, 1, 0)}[self.dense]

    @property
    def window(self) -> tuple[int, int]:
        """left and right as the definition uses them, after causal."""
        return {
            "causal": (-1, 0), "window": (17, 9), "window_left": (5, -1), "window_right": (-1, 3),
            "causal_window": (20, 0), "causal_mask": (-1, 0), "one_key": (0, 0), "window_full_mask": (40, 2),
        }.get(self.sees, (-1, -1))  # fmt: skip

    @property
    def may_drop(self) -> bool:
        """Whether drop mode can differ from zero mode in a call of this kind."""
        return self.nonoverlap == "drop" and None not in self.pair and not self.dims

    def options(self, mask: Tensor | None) -> dict[str, Any]:
        """Keyword arguments of sfa_attention."""
        dims: Any = {"none": 0, "first": 4, "named": list(self.dims)}[self.dense]
        out: dict[str, Any] = {
            "topk": self.d if self.topk == "d" else self.topk,
            "dense_dims": dims,
            "nonoverlap": self.nonoverlap,
            "attn_mask": mask,
        }
        if self.scale is not None:
            out["softmax_scale"] = self.scale
        if self.sees.startswith("causal"):
            out |= {"causal": True, "window_size": (self.window[0], 5 if self.sees == "causal_window" else -1)}
        elif self.window != (-1, -1):
            out["window_size"] = self.window
        return out

    def __str__(self) -> str:
        (sq, sk), (hq, hkv) = self.lengths, self.heads
        topk = "-".join(map(str, self.topk)) if isinstance(self.topk, tuple) else self.topk
        parts = (f"{sq}x{sk}", f"h{hq}-{hkv}", f"d{self.d}", f"dv{self.dv}", f"k{topk}", self.dense, self.sees)
        scale = () if self.scale is None else (f"scale{self.scale}",)
        return "/".join((*parts, self.nonoverlap, self.layout, str(self.dtype)[6:], *scale))


AXES: dict[str, tuple] = {
    "lengths": ((1, 1), (1, 239), (3, 3), (3, 63), (63, 3), (63, 63), (113, 113), (113, 128), (128, 1), (128, 128),
                (239, 113), (239, 239)),
    "d": (32, 60, 64, 80, 96, 128, 256),
    "topk": (1, 2, 7, 8, 16, "d", (None, 8), (8, None), (2, 16)),
    "heads": ((2, 2), (4, 1), (8, 1), (8, 2)),
    "dv": (32, 60, 96, 128),
    "sees": ("all", "causal", "window", "window_left", "window_right", "causal_window", "one_key", "key_mask",
             "full_mask", "causal_mask", "window_full_mask"),
    "dense": ("none", "first", "named"),
    "nonoverlap": ("zero", "drop"),
    "layout": ("plain", "strided"),
    "dtype": (BF16, FP16, FP32),
}  # fmt: skip

EXTRA = (
    Case((1000, 1000), (2, 1), 128, 128, 8, sees="causal", dtype=BF16, batch=1),
    Case((1000, 1000), (2, 2), 64, 64, 8, "first", sees="window", batch=1),
    Case((239, 1000), (4, 1), 64, 80, 16, sees="causal", dtype=FP16, batch=1),
    Case((1000, 113), (2, 2), 96, 32, 2, sees="causal_window", batch=1),
    Case((63, 113), (4, 2), 320, 80, 16, sees="causal", dtype=BF16),
    Case((63, 63), (8, 1), 64, 64, 8, "named", sees="causal", dtype=FP64),
    Case((37, 63), (4, 2), 60, 80, 2, sees="window", nonoverlap="drop", dtype=FP64),
    Case((63, 63), (4, 4), 64, 64, (16, 4), scale=0.5),
    Case((63, 63), (4, 2), 64, 64, 8, "first", sees="causal", dtype=BF16, scale=0.5),
)


def pairwise(axes: dict[str, tuple] = AXES, seed: int = 0) -> list[Case]:
    """Cases among which every two values of two different axes meet at least once."""
    rng, names = random.Random(seed), list(axes)
    todo = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in axes[a] for y in axes[b]}
    cases = []
    for wanted in sorted(todo, key=str):
        if wanted not in todo:
            continue
        points = [{name: rng.choice(axes[name]) for name in names} | dict(wanted) for _ in range(30)]
        met = [set(itertools.combinations(point.items(), 2)) for point in points]
        best = max(range(30), key=lambda i: len(met[i] & todo))
        todo -= met[best]
        cases.append(Case(**points[best]))
    return cases


# ------------------------------------------------------------------------------------------------ inputs


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    grad_lse: Tensor
    mask: Tensor | None


def make_inputs(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random tensors of a case; the same numbers on every device."""
    gen = torch.Generator().manual_seed(seed)
    (sq, sk), (hq, hkv), b = case.lengths, case.heads, case.batch

    def rows(n: int, h: int, width: int) -> Tensor:
        if case.layout == "plain":
            return torch.randn(b, n, h, width, generator=gen).to(case.dtype).to(device)
        # Heads before positions in memory, and rows that are part of longer ones.
        wide = torch.randn(b, h, n, width + 8, generator=gen).to(case.dtype).to(device)
        return wide[..., 3 : 3 + width].transpose(1, 2)

    q, k, v = rows(sq, hq, case.d), rows(sk, hkv, case.d), rows(sk, hkv, case.dv)
    mask = None
    if case.sees in ("key_mask", "causal_mask"):
        mask = (torch.rand(b, 1, 1, sk, generator=gen) > 0.4).to(device)
    elif case.sees in ("full_mask", "window_full_mask"):
        batch = (b,) if case.sees == "full_mask" else ()  # of three dimensions the other time
        mask = (torch.rand(*batch, hq, sq, sk, generator=gen) > 0.6).to(device)
    grad = torch.randn(b, sq, hq, case.dv, generator=gen).to(case.dtype).to(device)
    return Inputs(q, k, v, grad, torch.randn(b, hq, sq, generator=gen).to(device), mask)


# ------------------------------------------------------------------------------------------------ oracle


def kept_features(row: Sequence[float], topk: int, dims: Sequence[int] = ()) -> list[int]:
    """Features that top-k keeps in one row: largest magnitude first, NaN before all, ties to the lowest."""
    free = [u for u in range(len(row)) if u not in set(dims)]
    free.sort(key=lambda u: (not math.isnan(row[u]), 0.0 if math.isnan(row[u]) else -abs(row[u]), u))
    return sorted(free[:topk])


def members(x: Tensor, topk: int | None, dims: Sequence[int] = ()) -> Tensor:
    """True where a row of x keeps a feature; None keeps all."""
    if topk is None:
        return torch.ones_like(x, dtype=torch.bool)
    flat = torch.zeros(x.numel() // x.shape[-1], x.shape[-1], dtype=torch.bool)
    for i, row in enumerate(x.detach().double().cpu().reshape(flat.shape).tolist()):
        flat[i, kept_features(row, topk, dims) + list(dims)] = True
    return flat.view(x.shape).to(x.device)


def members_of_code(code: SparseCode) -> Tensor:
    """The same, read off the indices of a code; a stored zero counts."""
    flat = torch.zeros(code.values[..., 0].numel(), code.dim, dtype=torch.bool)
    for i, row in enumerate(code.indices.cpu().reshape(-1, code.topk).tolist()):
        flat[i, sorted(set(row) | set(code.dense_dims))] = True
    return flat.view(code.shape).to(code.device)


def visible(sq: int, sk: int, window: tuple[int, int], mask: Tensor | None = None, device: Any = "cpu") -> Tensor:
    """Key j is visible to query i if i + sk - sq - left <= j <= i + sk - sq + right; -1 is unlimited."""
    seen = torch.zeros(1, 1, sq, sk, dtype=torch.bool)
    for i in range(sq):
        first = 0 if window[0] < 0 else i + sk - sq - window[0]
        last = sk - 1 if window[1] < 0 else i + sk - sq + window[1]
        seen[0, 0, i, max(first, 0) : max(last + 1, 0)] = True
    seen = seen.to(device)
    return seen if mask is None else seen & mask


@dataclass(frozen=True)
class Result:
    """noise_*: the largest sum of magnitudes of the terms that add up to an entry of dq, dk or dv."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    noise_q: float = 0.0
    noise_k: float = 0.0
    noise_v: float = 0.0


def oracle(
    q: Tensor, k: Tensor, v: Tensor, kept_q: Tensor, kept_k: Tensor, seen: Tensor, grad: Tensor,
    grad_lse: Tensor | None = None, *, drop: bool = False, scale: float | None = None,
) -> Result:  # fmt: skip
    """Attention and its gradients in float64 on the kept features. seen broadcasts to (b, hq, sq, sk)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[2] // k.shape[2]
    q, k, v, grad = (x.detach().double() for x in (q, k, v, grad))
    q, k = q.where(kept_q, 0.0), k.where(kept_k, 0.0)
    k_of, v_of, kept_of = (torch.stack([x[:, :, h // group] for h in range(q.shape[2])], 2) for x in (k, v, kept_k))
    seen = seen.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if drop:
        seen = seen & (torch.einsum("bihd,bjhd->bhij", kept_q.double(), kept_of.double()) > 0)
    score = scale * torch.einsum("bihd,bjhd->bhij", q, k_of)
    top = score.where(seen, -torch.inf).amax(-1, keepdim=True) if k.shape[1] else score.sum(-1, keepdim=True)
    top = top.where(top.isfinite(), 0.0)
    weight = (score - top).exp().where(seen, 0.0)
    total = weight.sum(-1, keepdim=True)
    prob = weight / total.where(total > 0, 1.0)
    out = torch.einsum("bhij,bjhd->bihd", prob, v_of)
    lse = (total.log() + top).squeeze(-1)

    dprob = torch.einsum("bihd,bjhd->bhij", grad, v_of)
    delta = (prob * dprob).sum(-1, keepdim=True)
    dscore = prob * (dprob - delta)
    terms = prob * (torch.einsum("bihd,bjhd->bhij", grad.abs(), v_of.abs()) + delta.abs())
    if grad_lse is not None:
        dscore = dscore + prob * grad_lse.double()[..., None]
        terms = terms + prob * grad_lse.abs()[..., None]

    def onto_q(pairs: Tensor, rows: Tensor) -> Tensor:
        return scale * torch.einsum("bhij,bjhd->bihd", pairs, rows) * kept_q

    def onto_k(pairs: Tensor, rows: Tensor) -> Tensor:
        by_head = torch.einsum("bhij,bihd->bjhd", pairs, rows)
        return by_head.unflatten(2, (k.shape[2], group)).sum(3)

    dk = scale * onto_k(dscore, q) * kept_k
    sums = onto_q(terms, k_of.abs()), scale * onto_k(terms, q.abs()), onto_k(prob, grad.abs())
    noise = [float(x.max()) if x.numel() else 0.0 for x in sums]
    return Result(out, lse, onto_q(dscore, k_of), dk, onto_k(prob, grad), *noise)


def torch_math(
    q: Tensor, k: Tensor, v: Tensor, kept_q: Tensor, kept_k: Tensor, seen: Tensor, grad: Tensor, *, drop: bool = False,
    scale: float | None = None,
) -> Result:  # fmt: skip
    """The comparator: PyTorch's own attention, math backend, in the dtype of the inputs, on expanded codes."""
    q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q * kept_q, k * kept_k, v))
    seen = seen.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if drop:
        kept_of = kept_k.repeat_interleave(q.shape[1] // k.shape[1], dim=2)
        seen = seen & (torch.einsum("bihd,bjhd->bhij", kept_q.float(), kept_of.float()) > 0)
    empty = ~seen.any(-1, keepdim=True)
    with sdpa_kernel(SDPBackend.MATH):
        out = scaled_dot_product_attention(q, k, v, attn_mask=seen | empty, scale=scale, enable_gqa=True)
    out = out.masked_fill(empty, 0.0).transpose(1, 2)
    dq, dk, dv = (x.transpose(1, 2) for x in torch.autograd.grad(out, (q, k, v), grad))
    return Result(out.detach(), out.new_empty(0), dq * kept_q, dk * kept_k, dv)


# ------------------------------------------------------------------------------------------------- budget


def check_budget(name: str, ours: Tensor, exact: Tensor, comparator: Tensor, noise: float = 0.0) -> None:
    """max |ours - exact| <= 2 max |comparator - exact| + eps max |exact| + eps of fp32 (fp64) * noise.

    The last term allows one rounding of the summed terms. It counts where a sum cancels: with one visible key dq
    is exactly 0, which the comparator hits and a fused backward, which sums dO V and dO O in two orders, does not.
    """
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, wanted {tuple(exact.shape)}"
    if not ours.numel():
        return
    eps, fine = torch.finfo(ours.dtype).eps, torch.finfo(FP64 if ours.dtype == FP64 else FP32).eps
    budget = 2 * (comparator.double() - exact).abs().max() + eps * exact.abs().max() + fine * noise
    error = (ours.double() - exact).abs().max()
    assert error <= budget, f"{name}: error {error:.3e} is over the budget {budget:.3e}"


def check_lse(ours: Tensor, exact: Tensor) -> None:
    assert ours.shape == exact.shape
    assert torch.equal(ours == -torch.inf, exact == -torch.inf), "rows that see nothing"
    rest = exact != -torch.inf
    error = (ours.double() - exact).abs()[rest] / (1 + exact.abs()[rest])
    assert not error.numel() or error.max() <= 1e-5, f"lse: {error.max():.3e}"


def leaves(*tensors: Tensor) -> list[Tensor]:
    """The same numbers and strides, asking for gradients."""
    return [x.detach().requires_grad_() for x in tensors]


def check_all(
    case: Case, inputs: Inputs, result: tuple[Tensor, Tensor], wrt: Sequence[Tensor], exact: Result, comparator: Result
) -> None:
    """out and lse of a call and the gradients it left in its leaves q, k, v."""
    out, lse = (x.detach() for x in result)
    assert out.dtype == case.dtype
    assert lse.dtype == (FP64 if case.dtype == FP64 else FP32)
    check_lse(lse, exact.lse)
    check_budget("out", out, exact.out, comparator.out)
    for name, leaf, noise in zip("qkv", wrt, (exact.noise_q, exact.noise_k, exact.noise_v)):
        assert leaf.grad is not None
        assert leaf.grad.dtype == case.dtype
        check_budget(f"d{name}", leaf.grad, getattr(exact, f"d{name}"), getattr(comparator, f"d{name}"), noise)


def check_case(case: Case, impl: str, device: str = "cpu", seed: int = 0) -> None:
    """Out, lse and all gradients of one point of the grid against the oracle, within the budget."""
    x = make_inputs(case, device, seed)
    kept = [members(t, entry, case.dims) for t, entry in zip((x.q, x.k), case.pair)]
    seen = visible(*case.lengths, case.window, x.mask, device)
    arguments = (x.q, x.k, x.v, *kept, seen, x.grad)
    how: dict[str, Any] = {"drop": case.nonoverlap == "drop", "scale": case.scale}
    exact, comparator = oracle(*arguments, **how), torch_math(*arguments, **how)
    q, k, v = wrt = leaves(x.q, x.k, x.v)
    with poisoned():
        out, lse = sfa_attention(q, k, v, **case.options(x.mask), return_lse=True, impl=impl)
        out.backward(x.grad)
    check_all(case, x, (out, lse), wrt, exact, comparator)
    for leaf, mask in zip((q, k), kept):
        assert leaf.grad is not None
        assert not leaf.grad[~mask].any(), "a gradient outside the kept features"
