"""Prototype of by-feature pages for decoding on a CPU: one query token, fp32, the steps of `cpu_kernels.run`.

``python benchmarks/by_feature/by_feature_cpu.py`` checks both layouts against float64 and times them beside dense SDPA,
on as many threads as PyTorch uses. See docs/by_feature.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from by_feature import seal
from torch import Tensor

from flash_sfa import SparseKVCache, sfa_attention_with_kvcache, topk_sparsify
from flash_sfa.impl import cpu_kernels as ck
from flash_sfa.impl.cpu_numba import _share

PAGE, BLOCK, F32 = 256, 128, np.float32


@ck._jit()
def attend_blocks(s, base, v_rows, sums, m, z, acc, work):
    """Blocks base / 128 and the next, of scores s (256,): online softmax, the rows with a score, the running sums."""
    e, lanes, every, chosen, coefficient, part, block = work
    for half in range(2):
        first = base + half * BLOCK
        for j in range(BLOCK):
            block[j] = s[half * BLOCK + j]
        top = ck._largest(block, lanes)
        factor = F32(1.0)
        if top > m:
            factor = np.exp(m - top)
            z *= factor
            m = top
        ck._exponentials(block, m, e)
        total = ck._total(e)
        z += total
        count, mu, uses_sum = ck._select(block, e, BLOCK, chosen, coefficient), F32(0.0), False
        if count < BLOCK:
            mu = np.exp(-m)
            if BLOCK * mu <= F32(ck.CANCEL) * total:
                uses_sum = True
                for i in range(count):
                    coefficient[i] -= mu
            else:
                count = BLOCK
                for i in range(BLOCK):
                    chosen[i] = every[i]
                    coefficient[i] = e[i]
        for i in range(count):
            chosen[i] += first
        for c in range(part.shape[1]):
            part[0, c] = F32(0.0)
        ck._add_rows(part, 0, v_rows, chosen, coefficient, count)
        if uses_sum:
            for c in range(part.shape[1]):
                part[0, c] += mu * sums[first // BLOCK, c]
        for c in range(part.shape[1]):
            acc[c] = acc[c] * factor + part[0, c]
    return m, z


@ck._jit()
def run(begin, end, span, q_index, q_value, by_lists, ids, values, ends, v, sums, results):
    """Tasks begin to end: a head's span of pages. ids, values (hkv, pages, 256 * w); without lists ids are features."""
    hkv, pages, per = ids.shape
    w, d, dv = q_index.shape[1], ends.shape[2], v.shape[2]
    m_out, z_out, acc_out = results
    s, table = np.empty(PAGE, F32), np.empty(d, F32)
    work = (
        np.empty(BLOCK, F32), np.empty(16, F32), np.arange(BLOCK).astype(np.uint64), np.empty(BLOCK, np.uint64),
        np.empty(BLOCK, F32), np.empty((1, dv), F32), np.empty(BLOCK, F32),
    )  # fmt: skip
    acc = np.empty(dv, F32)
    spans = -(-pages // span)
    for task in range(begin, end):
        head, part = task % hkv, task // hkv
        m, z = F32(-np.inf), F32(0.0)
        for c in range(dv):
            acc[c] = F32(0.0)
        ck._fill(table, 0, d, F32(0.0))
        for i in range(w):
            table[q_index[head, i]] += q_value[head, i]
        for page in range(part * span, min(pages, (part + 1) * span)):
            page_ids, page_values = ids[head, page], values[head, page]
            if by_lists:
                ck._fill(s, 0, PAGE, F32(0.0))
                for i in range(w):
                    u, x = q_index[head, i], q_value[head, i]
                    a = np.uint32(ends[head, page, u - 1]) if u > 0 else np.uint32(0)
                    for at in range(a, np.uint32(ends[head, page, u])):
                        s[page_ids[at]] += x * page_values[at]
                if page + 1 < pages:
                    next_ids, next_values = ids[head, page + 1], values[head, page + 1]
                    for i in range(w):
                        u = q_index[head, i]
                        a = np.uint32(ends[head, page + 1, u - 1]) if u > 0 else np.uint32(0)
                        b = np.uint32(ends[head, page + 1, u])
                        ck._prefetch(next_ids, a)
                        for at in range(a, b, 16):
                            ck._prefetch(next_values, at)
                if page + 2 < pages:
                    after = ends[head, page + 2]
                    for u in range(0, d, 32):
                        ck._prefetch(after, u)
            else:
                width = per // PAGE
                for j in range(PAGE):
                    total = F32(0.0)
                    for i in range(width):
                        total += table[page_ids[j * width + i]] * page_values[j * width + i]
                    s[j] = total
                if page + 1 < pages:
                    next_ids, next_values = ids[head, page + 1], values[head, page + 1]
                    for at in range(0, per, 64):
                        ck._prefetch(next_ids, at)
                        for j in range(0, 64, 16):
                            ck._prefetch(next_values, at + j)
            m, z = attend_blocks(s, page * PAGE, v[head], sums[head], m, z, acc, work)
        m_out[part, head], z_out[part, head], acc_out[part, head] = m, z, acc
    return spans


def attend(
    q: Tensor, keys: tuple[Tensor, Tensor, Tensor], v: Tensor, sums: Tensor, by_lists: bool, topk: int
) -> Tensor:
    """out (hq, dv) of q (hq, d); keys: ids (or features), values (hkv, pages, 256 * w) and ends (hkv, pages, d)."""
    code = topk_sparsify(q, topk)
    hkv, pages = keys[0].shape[:2]
    span = 16
    spans = -(-pages // span)
    m, z = (torch.empty(spans, hkv) for _ in range(2))
    acc = torch.empty(spans, hkv, v.shape[-1])
    arguments = (
        code.indices.numpy(), (code.values * q.shape[-1] ** -0.5).numpy(), by_lists, keys[0].numpy(), keys[1].numpy(),
        keys[2].view(torch.uint16).numpy(), v.numpy(), sums.numpy(), (m.numpy(), z.numpy(), acc.numpy()),
    )  # fmt: skip
    _share(spans * hkv, lambda begin, end: run(begin, end, span, *arguments), True)
    top = m.amax(0)
    factor = (m - top).exp()
    return (acc * factor[..., None]).sum(0) / (z * factor).sum(0)[:, None]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    n, h, d, w = args.n, args.heads, 128, 8
    flush = torch.empty(64 * 2**20)
    for name, skew in (("random", 0.0), ("skewed", 2.0)):
        weight = torch.exp(-skew * torch.arange(d) / d)
        q, k, v = torch.randn(h, d) * weight, torch.randn(h, n, d) * weight, torch.randn(h, n, d)
        code = topk_sparsify(k, w)
        paged = [x.view(h, n // PAGE, PAGE, w) for x in (code.values, code.indices)]
        ids, values, ends = seal(*paged, d)
        keys = {"row-major": (paged[1].flatten(2), paged[0].flatten(2), ends), "by feature": (ids, values, ends)}
        sums = v.view(h, n // BLOCK, BLOCK, d).sum(2)
        queries = topk_sparsify(q, w).to_dense()
        scores = (code.to_dense().double() @ queries.double()[..., None])[..., 0] * d**-0.5
        exact = (scores.softmax(-1)[:, None] @ v.double())[:, 0]
        cache = SparseKVCache(num_kv_heads=h, head_dim=d, topk=w, max_tokens=n, page_size=PAGE, dtype=torch.float32)
        cache.append(k.transpose(0, 1)[None], v.transpose(0, 1)[None], seq_ids=cache.alloc(1))
        steps: dict[str, Callable[[], Any]] = {
            "dense SDPA": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q[None, :, None], k[None], v[None]),
            "cpu": lambda q=q, cache=cache: sfa_attention_with_kvcache(q[None, None], cache, impl="cpu"),
            **{
                label: lambda x=x, label=label, q=q, v=v, sums=sums: attend(q, x, v, sums, label == "by feature", w)
                for label, x in keys.items()
            },
        }
        for label in keys:
            error = float((steps[label]() - exact).abs().max() / exact.abs().max())
            if not error < 1e-5:
                raise SystemExit(f"{name} {label}: off by {error:.1e}")
        times: dict[str, list[float]] = {label: [] for label in steps}
        for _ in range(args.repeats):
            for label, step in steps.items():
                flush.add_(1.0)
                start = time.perf_counter()
                step()
                times[label].append((time.perf_counter() - start) * 1e3)
        dense = statistics.median(times["dense SDPA"])
        overlap = float((scores != 0).double().mean())
        for label, x in times.items():
            ms = statistics.median(x)
            print(f"{name:7} overlap {overlap:.2f} {label:11} {ms:7.3f} ms  {dense / ms:.2f}x dense", flush=True)


if __name__ == "__main__":
    main()
