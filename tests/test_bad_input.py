"""Wrong arguments of topk_sparsify, SparseCode, sfa_attention, sfa_attention_varlen and select_impl.

Each raises, names the argument, and says what came.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flash_sfa import SparseCode, select_impl, sfa_attention, sfa_attention_varlen, topk_sparsify

X = torch.randn(2, 6, 4, 16)
K = torch.randn(2, 6, 2, 16)
CODE = topk_sparsify(X, 3)
CU = torch.tensor([0, 2, 6], dtype=torch.int32)

# (arguments to replace, the exception, what the message must contain)
BadCall = tuple[dict[str, Any], type[Exception], tuple[str, ...]]

BAD_TOPK: dict[str, BadCall] = {
    "topk 0": ({"topk": 0}, ValueError, ("topk", "at least 1", "0")),
    "topk negative": ({"topk": -3}, ValueError, ("topk", "at least 1", "-3")),
    "topk float": ({"topk": 8.0}, TypeError, ("topk", "int", "8.0")),
    "topk bool": ({"topk": True}, TypeError, ("topk", "int", "True")),
    "topk list": ({"topk": [8, 8]}, TypeError, ("topk", "int", "[8, 8]")),
    "topk str": ({"topk": "8"}, TypeError, ("topk", "int", "'8'")),
    "topk tensor": ({"topk": torch.tensor(8)}, TypeError, ("topk", "int", "tensor(8)")),
}

BAD_DENSE_DIMS: dict[str, BadCall] = {
    "dense_dims bool": ({"dense_dims": True}, TypeError, ("dense_dims", "int", "True")),
    "dense_dims float": ({"dense_dims": 2.0}, TypeError, ("dense_dims", "int", "2.0")),
    "dense_dims tensor": ({"dense_dims": torch.tensor([1])}, TypeError, ("dense_dims", "int", "Tensor")),
    "dense_dims None": ({"dense_dims": None}, TypeError, ("dense_dims", "int", "None")),
    "dense_dims str": ({"dense_dims": "12"}, TypeError, ("dense_dims", "int", "12")),
    "dense_dims of bools": ({"dense_dims": [True, 2]}, TypeError, ("dense_dims", "int", "True")),
    "dense_dims of floats": ({"dense_dims": (1.5,)}, TypeError, ("dense_dims", "int", "1.5")),
    "dense_dims of a tensor": ({"dense_dims": [torch.tensor(1)]}, TypeError, ("dense_dims", "int", "Tensor")),
    "dense_dims negative": ({"dense_dims": -1}, ValueError, ("dense_dims", "-1")),
    "dense_dims below range": ({"dense_dims": [-1, 2]}, ValueError, ("dense_dims", "[0, 16)", "-1")),
    "dense_dims above range": ({"dense_dims": [3, 16]}, ValueError, ("dense_dims", "[0, 16)", "16")),
    "dense_dims repeated": ({"dense_dims": [3, 3]}, ValueError, ("dense_dims", "repeat", "(3, 3)")),
    "dense_dims all": ({"dense_dims": 16}, ValueError, ("dense_dims", "all 16")),
    "dense_dims all, named": ({"dense_dims": list(range(16))}, ValueError, ("dense_dims", "all 16")),
    "dense_dims too many": ({"dense_dims": 17}, ValueError, ("dense_dims", "[0, 16)")),
    "dense_dims huge": ({"dense_dims": 2**62}, ValueError, ("dense_dims", "[0, 16)", str(2**62))),
    "dense_dims huge, named": ({"dense_dims": range(2**62)}, ValueError, ("dense_dims", "16", str(2**62))),
}

# Options that both attention functions share.
BAD_OPTIONS: dict[str, BadCall] = {
    **BAD_TOPK,
    **BAD_DENSE_DIMS,
    "topk missing": ({"topk": None}, ValueError, ("topk", "missing")),
    "topk (None, None)": ({"topk": (None, None)}, ValueError, ("topk", "(None, None)")),
    "topk triple": ({"topk": (1, 2, 3)}, ValueError, ("topk", "3 entries")),
    "topk pair with 0": ({"topk": (4, 0)}, ValueError, ("topk", "at least 1", "0")),
    "topk pair with a bool": ({"topk": (True, 4)}, TypeError, ("topk", "int", "True")),
    "topk pair with a float": ({"topk": (None, 4.0)}, TypeError, ("topk", "int", "4.0")),
    "window int": ({"window_size": 4}, TypeError, ("window_size", "pair", "4")),
    "window None": ({"window_size": None}, TypeError, ("window_size", "pair", "None")),
    "window triple": ({"window_size": (1, 2, 3)}, TypeError, ("window_size", "pair", "(1, 2, 3)")),
    "window floats": ({"window_size": (1.0, 2)}, TypeError, ("window_size", "pair", "1.0")),
    "window bools": ({"window_size": (True, 2)}, TypeError, ("window_size", "pair", "True")),
    "window with None": ({"window_size": (None, 0)}, TypeError, ("window_size", "pair", "None")),
    "window below -1": ({"window_size": (-2, 0)}, ValueError, ("window_size", "-1", "-2")),
    "window right below -1": ({"window_size": (0, -5), "causal": True}, ValueError, ("window_size", "-1", "-5")),
    "nonoverlap unknown": ({"nonoverlap": "skip"}, ValueError, ("nonoverlap", "zero", "drop", "skip")),
    "nonoverlap None": ({"nonoverlap": None}, ValueError, ("nonoverlap", "zero", "drop", "None")),
    "impl unknown": ({"impl": "flash"}, ValueError, ("impl", "reference", "sdpa", "flash")),
    "impl list": ({"impl": ["sdpa"]}, ValueError, ("impl", "['sdpa']")),
    "impl triton": ({"impl": "triton"}, NotImplementedError, ("triton",)),
    "impl cuda": ({"impl": "cuda"}, NotImplementedError, ("cuda",)),
    "impl intersect": ({"impl": "intersect"}, NotImplementedError, ("intersect",)),
    "cpu dropout": ({"impl": "cpu", "dropout_p": 0.5}, NotImplementedError, ("cpu", "dropout_p", "0.5")),
    "sdpa drop": ({"impl": "sdpa", "nonoverlap": "drop"}, NotImplementedError, ("sdpa", "nonoverlap", "drop")),
    "sdpa dropout": ({"impl": "sdpa", "dropout_p": 0.5}, NotImplementedError, ("sdpa", "dropout_p", "0.5")),
    "dropout 1": ({"dropout_p": 1.0}, ValueError, ("dropout_p", "[0, 1)", "1.0")),
    "dropout negative": ({"dropout_p": -0.1}, ValueError, ("dropout_p", "[0, 1)", "-0.1")),
    "dropout NaN": ({"dropout_p": float("nan")}, ValueError, ("dropout_p", "nan")),
    "dropout str": ({"dropout_p": "0.1"}, TypeError, ("dropout_p", "number", "'0.1'")),
    "dropout bool": ({"dropout_p": False}, TypeError, ("dropout_p", "number", "False")),
    "tolerance negative": ({"tolerance": -1e-3}, ValueError, ("tolerance", "[0, 1)", "-0.001")),
    "tolerance 1": ({"tolerance": 1}, ValueError, ("tolerance", "[0, 1)", "1")),
    "tolerance None": ({"tolerance": None}, TypeError, ("tolerance", "number", "None")),
    "scale NaN": ({"softmax_scale": float("nan")}, ValueError, ("softmax_scale", "finite", "nan")),
    "scale infinite": ({"softmax_scale": float("inf")}, ValueError, ("softmax_scale", "finite", "inf")),
    "scale int beyond float": ({"softmax_scale": 10**400}, ValueError, ("softmax_scale", "finite", "float64")),
    "scale huge negative": ({"softmax_scale": -(10**5000)}, ValueError, ("softmax_scale", "finite", "float64")),
    "dropout int beyond float": ({"dropout_p": 10**400}, ValueError, ("dropout_p", "float64")),
    "scale tensor": ({"softmax_scale": torch.tensor(0.1)}, TypeError, ("softmax_scale", "number", "Tensor")),
    "scale bool": ({"softmax_scale": True}, TypeError, ("softmax_scale", "number", "True")),
    "causal int": ({"causal": 1}, TypeError, ("causal", "bool", "1")),
    "causal None": ({"causal": None}, TypeError, ("causal", "bool", "None")),
    "return_lse int": ({"return_lse": 1}, TypeError, ("return_lse", "bool", "1")),
    "deterministic str": ({"deterministic": "yes"}, TypeError, ("deterministic", "bool", "yes")),
    "score_dtype": ({"score_dtype": torch.int8}, NotImplementedError, ("score_dtype", "int8")),
    "q list": ({"q": [1.0]}, TypeError, ("q ", "Tensor", "list")),
    "k None": ({"k": None}, TypeError, ("k ", "Tensor", "NoneType")),
    "v code": ({"v": CODE}, TypeError, ("v ", "Tensor", "SparseCode")),
    "q int": ({"q": X.int()}, TypeError, ("q ", "float", "int32")),
    "k bool": ({"k": K > 0}, TypeError, ("k ", "float", "bool")),
    "v long": ({"v": K.long()}, TypeError, ("v ", "float", "int64")),
    "q sparse": ({"q": X.to_sparse()}, TypeError, ("q ", "strided", "sparse_coo")),
    "k sparse": ({"k": K.to_sparse()}, TypeError, ("k ", "strided", "sparse_coo")),
    "v sparse": ({"v": K.to_sparse()}, TypeError, ("v ", "strided", "sparse_coo")),
    "q complex": ({"q": X.to(torch.complex64)}, TypeError, ("q ", "float", "complex64")),
    "dtypes differ": ({"q": X.bfloat16()}, TypeError, ("q, k and v", "dtype", "bfloat16", "float32")),
    "dtype of v differs": ({"v": K.double()}, TypeError, ("q, k and v", "dtype", "float64", "float32")),
    "head dims differ": ({"q": X[..., :12]}, ValueError, ("head dim", "q", "k", "12", "16")),
    "head dim 0": ({"q": X[..., :0], "k": K[..., :0]}, ValueError, ("dimension of q", "0")),
    "value dim 0": ({"v": K[..., :0]}, ValueError, ("dimension of v", "0")),
    "device of k": ({"k": K.to("meta")}, ValueError, ("k", "q", "device", "meta", "cpu")),
    "device of v": ({"v": K.to("meta")}, ValueError, ("v", "q", "device", "meta", "cpu")),
}

BAD_ATTENTION: dict[str, BadCall] = {
    **BAD_OPTIONS,
    "q of 3 dimensions": ({"q": X[0]}, ValueError, ("q ", "(batch, seqlen, heads, head_dim)", "3 dim", "(6, 4, 16)")),
    "k of 5 dimensions": ({"k": K[None]}, ValueError, ("k ", "(batch, seqlen, heads, head_dim)", "5 dim")),
    "v of 2 dimensions": ({"v": K[0, 0]}, ValueError, ("v ", "(batch, seqlen, heads, head_dim)", "2 dim")),
    "code of 3 dimensions": (
        {"q": CODE.map(lambda x: x[0]), "topk": None}, ValueError, ("q ", "(batch, seqlen, heads, head_dim)", "3 dim")
    ),
    "heads of q": ({"q": X[:, :, :3]}, ValueError, ("heads", "3", "2")),
    "fewer heads of q": ({"q": X[:, :, :1]}, ValueError, ("heads", "1", "2")),
    "no heads": ({"k": K[:, :, :0], "v": K[:, :, :0]}, ValueError, ("heads", "0")),
    "heads of v": ({"v": K[:, :, :1]}, ValueError, ("v", "k", "heads", "1", "2")),
    "lengths of k and v": ({"v": K[:, :5]}, ValueError, ("v", "k", "length", "5", "6")),
    "batch of q": ({"q": X[:1]}, ValueError, ("k", "q", "batch", "1", "2")),
    "batch of v": ({"v": K[:1]}, ValueError, ("v", "k", "batch", "1", "2")),
    "mask of floats": ({"attn_mask": torch.zeros(6, 6)}, TypeError, ("attn_mask", "bool", "float32")),
    "mask of ints": ({"attn_mask": torch.ones(6, 6, dtype=torch.uint8)}, TypeError, ("attn_mask", "bool", "uint8")),
    "mask list": ({"attn_mask": [True]}, TypeError, ("attn_mask", "bool", "list")),
    "mask too long": ({"attn_mask": torch.ones(6, 7).bool()}, ValueError, ("attn_mask", "(2, 4, 6, 6)", "(6, 7)")),
    "mask of kv heads": (
        {"attn_mask": torch.ones(2, 2, 6, 6).bool()}, ValueError, ("attn_mask", "(2, 4, 6, 6)", "(2, 2, 6, 6)")
    ),
    "mask of 3 dimensions for a batch": (
        {"attn_mask": torch.ones(2, 6, 6).bool()}, ValueError, ("attn_mask", "(2, 4, 6, 6)", "(2, 6, 6)")
    ),
    "mask of 5 dimensions": (
        {"attn_mask": torch.ones(1, 2, 4, 6, 6).bool()}, ValueError, ("attn_mask", "(2, 4, 6, 6)", "(1, 2, 4, 6, 6)")
    ),
    "mask device": ({"attn_mask": torch.ones(6, 6).bool().to("meta")}, ValueError, ("attn_mask", "device", "meta")),
    "code and another topk": ({"q": CODE, "topk": (4, 4)}, ValueError, ("topk", "q", "4", "3")),
    "two codes and another topk": (
        {"q": CODE, "k": topk_sparsify(K, 3), "topk": 5}, ValueError, ("topk", "5", "3")
    ),
    "code and a bad topk": ({"q": CODE, "topk": 0}, ValueError, ("topk", "at least 1", "0")),
    "code and a list": ({"q": CODE, "topk": [3, 3]}, TypeError, ("topk", "int", "[3, 3]")),
    "code dtype": ({"q": CODE.to(torch.float64)}, TypeError, ("q, k and v", "dtype", "float64")),
    "code dim": ({"q": topk_sparsify(X[..., :8], 3)}, ValueError, ("head dim", "8", "16")),
}  # fmt: skip

BAD_VARLEN: dict[str, BadCall] = {
    **BAD_OPTIONS,
    "q of 4 dimensions": ({"q": X}, ValueError, ("q ", "(total, heads, head_dim)", "4 dim")),
    "v of 2 dimensions": ({"v": K[0, 0]}, ValueError, ("v ", "(total, heads, head_dim)", "2 dim")),
    "heads of q": ({"q": X[0, :, :3]}, ValueError, ("heads", "3", "2")),
    "lengths of k and v": ({"v": K[0, :5]}, ValueError, ("v", "k", "length", "5", "6")),
    "cu list": ({"cu_seqlens_q": [0, 6]}, TypeError, ("cu_seqlens_q", "int32", "list")),
    "cu None": ({"cu_seqlens_k": None}, TypeError, ("cu_seqlens_k", "int32", "NoneType")),
    "cu int64": ({"cu_seqlens_k": CU.long()}, TypeError, ("cu_seqlens_k", "int32", "int64")),
    "cu float": ({"cu_seqlens_q": CU.float()}, TypeError, ("cu_seqlens_q", "int32", "float32")),
    "cu of 2 dimensions": ({"cu_seqlens_q": CU[None]}, ValueError, ("cu_seqlens_q", "(batch + 1,)", "(1, 3)")),
    "cu empty": ({"cu_seqlens_q": CU[:0]}, ValueError, ("cu_seqlens_q", "(batch + 1,)", "(0,)")),
    "cu start": ({"cu_seqlens_q": CU + 1}, ValueError, ("cu_seqlens_q", "start at 0", "1")),
    "cu end low": ({"cu_seqlens_k": CU - torch.tensor([0, 0, 1])}, TypeError, ("cu_seqlens_k", "int32", "int64")),
    "cu end short": (
        {"cu_seqlens_k": torch.tensor([0, 2, 5], dtype=torch.int32)}, ValueError, ("cu_seqlens_k", "6", "5")
    ),
    "cu end long": (
        {"cu_seqlens_q": torch.tensor([0, 2, 7], dtype=torch.int32)}, ValueError, ("cu_seqlens_q", "6", "7")
    ),
    "cu unsorted": (
        {"cu_seqlens_q": torch.tensor([0, 4, 2, 6], dtype=torch.int32),
         "cu_seqlens_k": torch.tensor([0, 2, 4, 6], dtype=torch.int32)},
        ValueError, ("cu_seqlens_q", "decrease", "[0, 4, 2, 6]"),
    ),
    "cu batch sizes": (
        {"cu_seqlens_k": torch.tensor([0, 6], dtype=torch.int32)},
        ValueError, ("cu_seqlens_k", "cu_seqlens_q", "length", "2", "3"),
    ),
    "cu device": ({"cu_seqlens_q": CU.to("meta")}, ValueError, ("cu_seqlens_q", "device", "meta")),
    "max_seqlen float": ({"max_seqlen_q": 4.0}, TypeError, ("max_seqlen_q", "int", "4.0")),
    "max_seqlen bool": ({"max_seqlen_k": True}, TypeError, ("max_seqlen_k", "int", "True")),
    "max_seqlen negative": ({"max_seqlen_k": -1}, ValueError, ("max_seqlen_k", "-1")),
    "max_seqlen too small": ({"max_seqlen_q": 3}, ValueError, ("max_seqlen_q", "4", "3")),
    "attn_mask": ({"attn_mask": None}, TypeError, ("attn_mask",)),
}  # fmt: skip


def check(call: Callable[..., Any], good: dict[str, Any], bad: BadCall) -> None:
    replaced, error, words = bad
    arguments = good | replaced
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    before = {name: x.clone() for name, x in tensors.items() if x.layout is torch.strided and not x.is_nested}
    with pytest.raises(error) as raised:
        call(**arguments)
    assert raised.type is error
    message = str(raised.value)
    for word in words:
        assert word in message, f"{word!r} is missing in: {message}"
    for name, x in before.items():
        assert x.is_meta or torch.equal(x, arguments[name])


ATTENTION = {"q": X, "k": K, "v": K, "topk": 4}
VARLEN = {"q": X[0], "k": K[0], "v": K[0], "topk": 4, "cu_seqlens_q": CU, "cu_seqlens_k": CU}


def test_the_good_calls_are_good() -> None:
    assert sfa_attention(**ATTENTION).shape == X.shape
    assert sfa_attention_varlen(**VARLEN).shape == X[0].shape


@pytest.mark.parametrize("name", BAD_ATTENTION)
def test_attention(name: str) -> None:
    check(sfa_attention, ATTENTION, BAD_ATTENTION[name])
    check(select_impl, ATTENTION, BAD_ATTENTION[name])


@pytest.mark.parametrize("name", BAD_VARLEN)
def test_varlen(name: str) -> None:
    rows = {key: x[0] if isinstance(x, torch.Tensor) and x.shape[:2] == (2, 6) and key in "kqv" else x
            for key, x in BAD_VARLEN[name][0].items()}  # fmt: skip
    if name.endswith("dimensions"):
        rows = BAD_VARLEN[name][0]
    check(sfa_attention_varlen, VARLEN, (rows, *BAD_VARLEN[name][1:]))


@pytest.mark.parametrize("arguments", ((X, K, K, 4), (X, K, K, 4, 0, None, True)))
def test_options_are_keyword_only(arguments: tuple) -> None:
    with pytest.raises(TypeError, match="positional"):
        sfa_attention(*arguments)


BAD_SPARSIFY: dict[str, BadCall] = {
    **BAD_TOPK,
    **BAD_DENSE_DIMS,
    "topk pair": ({"topk": (8, 8)}, TypeError, ("topk", "int", "(8, 8)")),
    "topk None": ({"topk": None}, TypeError, ("topk", "int", "None")),
    "x list": ({"x": [1.0, 2.0]}, TypeError, ("x ", "Tensor", "list")),
    "x int": ({"x": X.long()}, TypeError, ("x ", "float", "int64")),
    "x fp8": ({"x": X.to(torch.float8_e4m3fn)}, TypeError, ("x ", "float16", "float8")),
    "x sparse": ({"x": X.to_sparse()}, TypeError, ("x ", "strided", "sparse_coo")),
    "x nested": (
        {"x": torch.nested.nested_tensor([X[0], X[0]], layout=torch.jagged)},
        TypeError,
        ("x ", "strided", "nested"),
    ),
    "x scalar": ({"x": torch.tensor(1.0)}, ValueError, ("x ", "dimension")),
    "x without features": ({"x": X[..., :0]}, ValueError, ("dimension of x", "0")),
    "x too wide": ({"x": torch.empty(0, 2**15 + 1)}, ValueError, ("dimension of x", "32769")),
    "impl unknown": ({"impl": "gpu"}, ValueError, ("impl", "reference", "gpu")),
    "impl of attention": ({"impl": "sdpa"}, NotImplementedError, ("topk_sparsify", "sdpa", "reference")),
    "impl triton": ({"impl": "triton"}, NotImplementedError, ("topk_sparsify", "triton")),
}


@pytest.mark.parametrize("name", BAD_SPARSIFY)
def test_sparsify(name: str) -> None:
    check(topk_sparsify, {"x": X, "topk": 4}, BAD_SPARSIFY[name])


def index(*rows: list[int], dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype)


BAD_CODE: dict[str, BadCall] = {
    "values list": ({"values": [1.0]}, TypeError, ("values", "Tensor", "list")),
    "values int": ({"values": index([1, 2])}, TypeError, ("values", "float", "uint8")),
    "values sparse": ({"values": torch.ones(1, 2).to_sparse()}, TypeError, ("values", "strided", "sparse_coo")),
    "values scalar": ({"values": torch.tensor(1.0), "indices": index([1])[0, 0]}, ValueError, ("values", "()")),
    "indices list": ({"indices": [[1, 2]]}, TypeError, ("indices", "uint8", "list")),
    "indices int64": ({"indices": index([1, 2], dtype=torch.int64)}, TypeError, ("indices", "uint8", "int64")),
    "indices int16 for a narrow row": (
        {"indices": index([1, 2], dtype=torch.int16)}, TypeError, ("indices", "uint8", "16", "int16")
    ),
    "indices uint8 for a wide row": ({"dim": 257}, TypeError, ("indices", "int16", "257", "uint8")),
    "shapes differ": ({"indices": index([1, 2, 3])}, ValueError, ("values", "indices", "(1, 2)", "(1, 3)")),
    "out of range": ({"indices": index([1, 16])}, ValueError, ("indices", "[0, 16)", "16")),
    "negative": (
        {"indices": index([-1, 3], dtype=torch.int16), "dim": 300}, ValueError, ("indices", "[0, 300)", "-1")
    ),
    "descending": ({"indices": index([5, 2])}, ValueError, ("indices", "ascend")),
    "names a dense feature": (
        {"dense": torch.ones(1, 1), "dense_dims": [2]}, ValueError, ("indices", "always-on", "(2,)")
    ),
    "dense missing": ({"dense_dims": [3]}, ValueError, ("dense", "missing", "(3,)")),
    "dense too wide": ({"dense": torch.ones(1, 2), "dense_dims": [3]}, ValueError, ("dense", "(1, 1)", "(1, 2)")),
    "dense without dims": ({"dense": torch.ones(1, 2)}, ValueError, ("dense", "(1, 0)", "(1, 2)")),
    "dense dtype": (
        {"dense": torch.ones(1, 1).double(), "dense_dims": [3]}, TypeError, ("dense", "float64", "float32")
    ),
    "device": ({"indices": index([1, 2]).to("meta")}, ValueError, ("device", "meta", "cpu")),
    "dim float": ({"dim": 16.0}, TypeError, ("dim", "int", "16.0")),
    "dim 0": ({"dim": 0}, ValueError, ("dim", "0")),
    "dim too small": ({"dim": 1}, ValueError, ("dim=1", "2")),
    "no room beside dense_dims": (
        {"dim": 4, "dense": torch.ones(1, 3), "dense_dims": [0, 2, 3]}, ValueError, ("dim=4", "3", "2")
    ),
    "no entries": ({"values": torch.ones(1, 0), "indices": index([])}, ValueError, ("entries", "0")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CODE)
def test_code(name: str) -> None:
    good = {"values": torch.ones(1, 2), "indices": index([1, 2]), "dim": 16}
    assert SparseCode(**good).dim == 16  # type: ignore[arg-type]
    check(SparseCode, good, BAD_CODE[name])
