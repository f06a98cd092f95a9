"""The Hopper forward kernel against float64: on a GPU (-m gpu), and its source compiled for the CPU (host.h).

It also compiles for sm_90a without a GPU, without spills and without products that wait for each other.
"""

import ctypes
import functools
import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import triton

from flash_sfa.impl import nvrtc

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "tests")]

import hopper_forward  # noqa: E402

from oracle import poisoned  # noqa: E402

BF16 = torch.bfloat16
HERE = Path(__file__).parent
E4M3 = torch.float8_e4m3fn
VARIANTS = {
    "64": (64, {}),
    "64_e4m3": (64, {"scores": 1}),
    "128": (128, {}),
    "128_full": (128, {"causal": False}),
    "128_e4m3": (128, {"scores": 1}),
    "128_int8": (128, {"scores": 2}),
    "128_sparse": (128, {"SPARSE": 5}),
    "128_code": (128, {"CODE": 8, "QREGS": 1, "QSTAGES": 1, "STAGES": 3}),
    "128_code_cluster": (128, {"CODE": 8, "CLUSTER": 2, "ACROSS": 1, "QREGS": 1, "QSTAGES": 1, "STAGES": 3}),
    "128_skip": (128, {"SKIP": 30}),
    "128_across": (128, {"ACROSS": 1}),
    "128_cluster": (128, {"CLUSTER": 2}),
    "256": (256, {}),
}


def configure(name):
    d, options = VARIANTS[name]
    return hopper_forward.configure(d, d, **({"causal": True} | options))


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {"128_full", "128_cluster", "64_e4m3"}))  # to save time
def test_compiles_without_spills(name, tmp_path):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    config, log, file = configure(name), io.StringIO(), tmp_path / "forward.cubin"
    file.write_bytes(hopper_forward.compile_kernel(config, log))
    usage = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    (registers, stack), *others = re.findall(r"Function hopper_forward:\s+REG:(\d+) STACK:(\d+)", usage)
    assert not others and int(stack) <= 24
    # What a block of three or four warpgroups can start with; they share the registers out among themselves then.
    assert int(registers) <= 65536 // (128 * (config.WGS + 1))
    assert config.shared <= 227 * 1024
    # The assembler says so if it waits for each product before the next.
    assert "serialized" not in log.getvalue(), log.getvalue()


def rows(*shape, dtype=BF16):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "q must be torch.bfloat16, got torch.float16", {"q": rows(1, 4, 2, 64, dtype=torch.float16)}),
        (TypeError, "q must be torch.float8_e4m3fn or torch.int8, got torch.bfloat16", {"scales": (rows(1), rows(1))}),
        (TypeError, "k must be torch.int8, got torch.bfloat16", {"q": rows(1, 4, 2, 64, dtype=torch.int8)}),
        (ValueError, "v must be", {"v": rows(1, 4, 2, 80)}),
        (ValueError, "rows of v must start", {"v": rows(1, 4, 2, 68)[..., :64]}),
        (ValueError, "rows of v must start", {"v": rows(1, 4, 64, 2).transpose(2, 3)}),
        (ValueError, "rows of k must start", {"k": rows(1, 1, 2, 64).expand(1, 4, 2, 64)}),
        (ValueError, "shapes do not fit", {"k": rows(1, 4, 2, 128)}),
        (ValueError, "shapes do not fit", {"v": rows(1, 5, 2, 64)}),
        (ValueError, "shapes do not fit", {"q": rows(1, 4, 3, 64)}),
        (ValueError, "CODE is the width", {"CODE": 8}),
        (ValueError, "SPARSE goes with sparse", {"SPARSE": 5}),
        (ValueError, "multiples of 8", {"CODE": 4, "QREGS": 1, "QSTAGES": 1, "code": (rows(1, 4, 2, 4), rows(1))}),
        (ValueError, "softmax_scale must be above 0", {"softmax_scale": 0.0}),
        (ValueError, "shared memory", {"STAGES": 7}),
    ],
)
def test_bad_input(error, match, change):
    call = {"q": rows(1, 4, 2, 64), "k": rows(1, 4, 2, 64), "v": rows(1, 4, 2, 64), "softmax_scale": 0.1} | change
    if call["q"].dtype == torch.int8:
        call["scales"] = (rows(1), rows(1))
    with pytest.raises(error, match=match):
        hopper_forward.forward(**call, causal=True)


@pytest.mark.parametrize("dtype", [E4M3, torch.int8], ids=str)
def test_quantise(dtype):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 5, 4, 64, generator=generator).to(BF16)
    k = torch.randn(2, 70, 2, 64, generator=generator).to(BF16) * 30
    q[0, 0, 0] = 0.0
    with poisoned():
        q_8, k_8, q_scale, k_scale = hopper_forward.quantise(q, k, 32, dtype)
    assert q_8.dtype == k_8.dtype == dtype and q_scale.shape == (2, 4, 5) and k_scale.shape == (2, 2, 3)
    q_step = q_scale.transpose(1, 2)[..., None]
    k_step = k_scale.repeat_interleave(32, 2)[:, :, :70].transpose(1, 2)[..., None]
    for x, x_8, step in ((q, q_8, q_step), (k, k_8, k_step)):
        x, error = x.float(), (x_8.float() * step - x.float()).abs()
        # e4m3: three bits after the leading one, and a step of 2^-9 at least; int8: a step of 1.
        bound = step * 0.501 if dtype == torch.int8 else torch.maximum(x.abs() / 16, step * 2**-10) * 1.001
        assert (error <= bound).all()
        assert (error > bound / 2).any()


@pytest.mark.parametrize(("d", "topk"), [(64, 8), (128, 8), (128, 60), (256, 3)])
def test_compress_keeps_every_feature(d, topk):
    q = torch.randn(2, 70, 3, d, generator=torch.Generator().manual_seed(1))
    q = torch.zeros_like(q).scatter_(-1, (i := q.abs().topk(topk, -1).indices), q.gather(-1, i)).to(BF16)
    with poisoned():
        values, where, more = hopper_forward.compress(q)
    rows = torch.zeros(2, 3, 70, d)
    for part in range(d // 32):
        for quad in range(8):
            # Lane quad % 4 holds it, in its first or second half.
            pair = values[:, :, :, :, quad % 4, part, quad // 4].float()
            places = (where[..., part].long() >> 4 * quad & 15)[..., None] >> torch.tensor([0, 2]) & 3
            assert (places[..., 0] < places[..., 1]).all()
            rows.scatter_add_(-1, (part * 32 + quad * 4 + places).flatten(3), pair.flatten(3))
    assert torch.equal(rows, q.transpose(1, 2).float())
    second = values[:, :, :, 1].ne(0).any(-1).any(-1).any(3)  # (b, h, rows, parts)
    for block, seen in enumerate(second.split(64, 2)):
        assert torch.equal((more[..., block, None] >> torch.arange(d // 32)) & 1, seen.any(2).to(torch.uint8))


def reference(q, k, v, scale, causal, dtype):
    group, offset = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * scale
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(offset)
        scores = scores.masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2), scores.logsumexp(-1)


def masked_rows(generator, *shape, topk, spread=1.0):
    x = torch.randn(shape, generator=generator, device=generator.device) * spread
    kept = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, x.abs().topk(topk, -1).indices, True)
    return (x * kept).to(BF16)


def check(q, k, v, causal, name, **call):
    """Against float64, with the budget of the other implementations."""
    scale, config = q.shape[-1] ** -0.5, {n: value for n, value in VARIANTS[name][1].items() if n.isupper()}
    # What a kernel gets beside the rows.
    if config.get("SPARSE"):
        call["sparse"] = hopper_forward.compress(q)
    if width := config.get("CODE"):
        indices = q.abs().topk(width, -1).indices
        call["code"] = (q.gather(-1, indices), indices.to(torch.uint8))
    rows = (q, k)
    if scores := VARIANTS[name][1].get("scores"):
        tile = configure(name).BN
        *rows, q_scale, k_scale = hopper_forward.quantise(q, k, tile, torch.int8 if scores == 2 else E4M3)
        call["scales"] = (q_scale, k_scale)
        # The kernel is exact for the rows as quantised.
        q = rows[0].double() * q_scale.transpose(1, 2)[..., None]
        k = rows[1].double() * k_scale.repeat_interleave(tile, 2)[:, :, : k.shape[1]].transpose(1, 2)[..., None]
    with poisoned():
        out, lse = hopper_forward.forward(*rows, v, scale, causal, **(config | call))
    exact, exact_lse = reference(q, k, v, scale, causal, torch.float64)
    rough, _ = reference(q, k, v, scale, causal, BF16)
    # Quantised rows are not bf16, so the comparator's error would say nothing.
    budget = (0.0 if scores else 2 * (rough - exact).abs().max()) + 2 ** (-7 if scores else -8) * exact.abs().max()
    assert (out - exact).abs().max() <= budget
    empty = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert ((lse - exact_lse).abs() <= (1e-3 if scores else 1e-5) * (1 + exact_lse.abs()))[~empty].all()
    return out, lse


# ------------------------------------------------------------------------------------------------- on the CPU


class HostDriver:
    """Tensor maps as host.h reads them."""

    def call(self, name, tensor_map, kind, rank, address, sizes, strides, box, steps, interleave, swizzle, *others):
        assert name == "cuTensorMapEncodeTiled" and rank.value == 4
        for i, x in enumerate([address.value, *sizes, *strides, *box[:2], {0: 1, 9: 2}[kind]]):
            tensor_map[i] = x


@functools.cache
def library(config):
    folder = Path(tempfile.mkdtemp())
    macros = [f"-D{name}={value}" for name, value in config.macros()]
    subprocess.run(
        ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-I", HERE, "-I", hopper_forward.SOURCE.parent,
         '-DHF_HOST="host.h"', *macros, "-o", folder / "forward.so", HERE / "host.cpp"],
        check=True,
    )  # fmt: skip
    loaded = ctypes.CDLL(str(folder / "forward.so"))
    shutil.rmtree(folder)
    return loaded


@pytest.fixture(params=[0, 1], ids=["loads_land_at_once", "loads_land_late"])
def on_host(request, monkeypatch):
    def launch(config, device, work, maps, params):
        pointers = [ctypes.byref(x) for x in (*maps, params)]
        problem = library(config).launch(*pointers, ctypes.sizeof(params), config.shared, request.param)
        assert problem == 0, "the threads wait for each other" if problem == 2 else "Params differ"

    monkeypatch.setattr(hopper_forward, "_launch", launch)
    monkeypatch.setattr(nvrtc, "driver", HostDriver)


@pytest.mark.parametrize(
    ("name", "causal", "lengths", "heads", "spread"),
    [
        ("64", True, (200, 321), (4, 2), 1.0),
        ("64_e4m3", False, (70, 300), (2, 2), 1.0),
        ("128", True, (300, 300), (2, 2), 1.0),
        ("128", True, (1, 1), (1, 1), 1.0),
        ("128", True, (400, 200), (1, 1), 1.0),
        ("128", True, (300, 700), (2, 1), 4.0),
        ("128_int8", True, (300, 300), (1, 1), 1.0),
        ("128_sparse", True, (300, 300), (1, 1), 1.0),
        ("128_skip", True, (300, 700), (2, 1), 6.0),
        ("128_across", True, (300, 300), (3, 3), 1.0),
        ("128_code_cluster", True, (500, 300), (2, 1), 1.0),
        ("256", True, (200, 300), (1, 1), 1.0),
    ],
)
def test_on_the_cpu(name, causal, lengths, heads, spread, on_host):
    d, generator = VARIANTS[name][0], torch.Generator().manual_seed(0)
    q = masked_rows(generator, 2, lengths[0], heads[0], d, topk=8, spread=spread)
    k = masked_rows(generator, 2, lengths[1], heads[1], d, topk=16, spread=spread)
    v = masked_rows(generator, 2, lengths[1], heads[1], d, topk=d)
    check(q, k, v, causal, name)


# ------------------------------------------------------------------------------------------------- on a GPU


LENGTHS = [(1, 1), (3, 63), (113, 128), (128, 113), (239, 1000), (1000, 239), (1000, 1000)]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(2, 2), (8, 2)])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["64", "128", "128_skip", "128_across", "128_cluster", "256"])
def test_forward(name, causal, lengths, heads):
    d, generator = VARIANTS[name][0], torch.Generator("cuda").manual_seed(0)
    q = masked_rows(generator, 2, lengths[0], heads[0], d, topk=8)
    k = masked_rows(generator, 2, lengths[1], heads[1], d, topk=16)
    v = masked_rows(generator, 2, lengths[1], heads[1], d, topk=d)
    out, lse = check(q, k, v, causal, name)
    again = check(q, k, v, causal, name)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["64", "128", "128_skip", "256"])
def test_peaked_dense_rows_and_views(name):
    d, generator = VARIANTS[name][0], torch.Generator("cuda").manual_seed(1)
    qkv = masked_rows(generator, 1, 2500, 3, 4, d, topk=d, spread=4.0)
    q, k, v = qkv.unbind(2)
    check(q, k, v, True, name)


@pytest.mark.gpu
def test_a_future_token_changes_nothing():
    generator = torch.Generator("cuda").manual_seed(2)
    q, k, v = (masked_rows(generator, 1, 700, 2, 128, topk=n) for n in (8, 8, 128))
    out, lse = hopper_forward.forward(q, k, v, 0.1, True)
    k[:, 500], v[:, 500] = 100.0, -100.0
    other, other_lse = hopper_forward.forward(q, k, v, 0.1, True)
    assert torch.equal(out[:, :500], other[:, :500]) and torch.equal(lse[..., :500], other_lse[..., :500])
    assert not torch.equal(out[:, 500:], other[:, 500:])


@pytest.mark.gpu
@pytest.mark.parametrize("topk", [1, 8])
@pytest.mark.parametrize("name", ["64_e4m3", "128_e4m3", "128_int8", "128_sparse", "128_code", "128_code_cluster"])
def test_other_forms_of_q(name, topk):
    d, generator = VARIANTS[name][0], torch.Generator("cuda").manual_seed(3)
    q, k, v = (masked_rows(generator, 2, 777, 4, d, topk=n) for n in (topk, 8, d))
    check(q, k, v, True, name)
