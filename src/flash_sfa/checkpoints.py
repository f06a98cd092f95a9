"""Loading a Transformers checkpoint and its tokenizer for the command line: it fits whole, or one clear message."""

import argparse
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cli import UsageError


@dataclass(frozen=True)
class Bytes:
    """The tokenizer of byte-level models, as of ``flash-sfa demo``: token i is byte i."""

    pad_token_id: int = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def add_model_arguments(parser: argparse.ArgumentParser, generates: bool = True) -> None:
    """Which checkpoint, which SFA setting, where to run; with the options of the sparse cache where it generates."""
    parser.add_argument("--tokenizer", metavar="DIR", help="default: the checkpoint's; 'bytes' for byte-level models")
    parser.add_argument("--topk", help="8; or topk_q,topk_k with 'none' for a dense side; or JSON, an entry a layer")
    parser.add_argument("--dense-dims", default="0", help="features always kept: a number, or 'rotary'")
    parser.add_argument("--layers", help="layers to change: numbers with commas, or 'global' (default: all)")
    if generates:
        parser.add_argument(
            "--v-dtype", choices=("int8", "float8_e4m3fn"), help="V of the sparse cache in 8 bits (generation)"
        )
        parser.add_argument(
            "--tolerance", type=float, default=0.0, help="weight a cached step may misplace (generation)"
        )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))


def setting_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """The arguments of enable_sfa from the command line, or None without --topk."""
    if args.topk is None:
        if args.dense_dims != "0" or args.layers is not None:
            raise UsageError("--dense-dims and --layers need --topk")
        return None
    layers = args.layers
    try:
        if args.topk.startswith("["):
            topk = json.loads(args.topk)
        else:
            parts = [None if part.strip() == "none" else int(part) for part in args.topk.split(",")]
            topk = parts[0] if len(parts) == 1 else tuple(parts)
    except ValueError:
        raise UsageError(f"--topk must be a number, a pair or a JSON list, got {args.topk!r}") from None
    try:
        dims = args.dense_dims if args.dense_dims == "rotary" else int(args.dense_dims)
        if layers is not None and layers != "global":
            layers = [int(part) for part in layers.split(",")]
    except ValueError as error:
        raise UsageError(f"--dense-dims and --layers take numbers: {error}") from None
    return {"topk": topk, "dense_dims": dims, "layers": layers}


def check_device(name: str) -> None:
    """A device that tensors can be made on here."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch finds no CUDA device here")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, NotImplementedError) as error:
        raise UsageError(f"--device {name}: {short(error)}") from None


def load_model(path: str, args: argparse.Namespace) -> Any:
    """The model in eval mode, dense. Every weight must come from the checkpoint, and every one must be used."""
    transformers = import_transformers()
    check_device(args.device)
    _check_folder(path)
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="config.sfa says")
            model, info = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except Exception as error:  # the many ways in which Transformers refuses a folder or a name
        raise UsageError(f"{path}: no checkpoint that Transformers can load: {short(error)}") from error
    wrong = {kind: sorted(map(str, info.get(kind) or ())) for kind in ("missing_keys", "unexpected_keys")}
    wrong["mismatched_keys"] = [str(key) for key in info.get("mismatched_keys") or ()]
    if any(wrong.values()):
        some = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(keys[:3])}" for kind, keys in wrong.items() if keys)
        raise UsageError(f"{path}: the weights do not match the config: {some}")
    return model.to(args.device).eval()


def load_tokenizer(path: str, given: str | None) -> Any:
    """The tokenizer of a checkpoint, or another one."""
    if given == "bytes":
        return Bytes()
    where = given or path
    _check_folder(where)
    try:
        return import_transformers().AutoTokenizer.from_pretrained(where)
    except Exception as error:
        raise UsageError(
            f"{where}: no tokenizer that Transformers can load ({short(error)}); give one with --tokenizer"
        ) from error


def enable(model: Any, setting: dict[str, Any], path: str) -> None:
    """enable_sfa, with a message that names the checkpoint."""
    from .integrations.transformers import enable_sfa

    try:
        enable_sfa(model, **setting)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UsageError(f"{path}: {error}") from error


def new_cache(model: Any, args: argparse.Namespace) -> Any:
    """An empty cache of the kind that the model's attention wants."""
    from transformers import DynamicCache

    from .integrations.transformers import SFACache

    if model.config.get_text_config(decoder=True)._attn_implementation != "sfa":
        return DynamicCache(config=model.config)
    v_dtype = None if args.v_dtype is None else getattr(torch, args.v_dtype)
    try:
        return SFACache(model.config, v_dtype=v_dtype, tolerance=args.tolerance)
    except ValueError as error:
        raise UsageError(f"--tolerance: {error}") from None


def row_bytes(cache: Any) -> int:
    """Bytes of the stored keys and values, sparse or Transformers' own."""
    return int(cache.key_nbytes() + cache.value_nbytes()) if hasattr(cache, "key_nbytes") else cache_bytes(cache)


def cache_bytes(cache: Any) -> int:
    """Bytes that a filled cache uses; of a sparse one whole pages, with running sums and tables."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes())
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values) if x is not None)


def read_text(path: Path, option: str) -> str:
    """A UTF-8 text file that is not empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{option} {path}: not UTF-8 text (byte {error.start} does not decode)") from None
    if not text.strip():
        raise UsageError(f"{option} {path}: the file is empty")
    return text


def encode(tokenizer: Any, text: str, model: Any) -> Tensor:
    """Token ids (1, n) on the model's device, all of them in its vocabulary."""
    ids = tokenizer.encode(text) if isinstance(tokenizer, Bytes) else tokenizer(text, verbose=False).input_ids
    size = model.get_input_embeddings().num_embeddings
    if not ids:
        raise UsageError(
            "the tokenizer makes no token of the text; if it is not the model's, give one with --tokenizer"
        )
    if max(ids) >= size:
        raise UsageError(f"the tokenizer gives token {max(ids)}, and the model has {size}: they do not belong together")
    return torch.tensor([ids], device=model.device)


def pad_token(tokenizer: Any) -> int:
    """A token to pad with; its rows are masked."""
    for name in ("pad_token_id", "eos_token_id"):
        if (token := getattr(tokenizer, name, None)) is not None:
            return int(token)
    return 0


def import_transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UsageError("this command needs Transformers: pip install 'flash-sfa[hf]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _check_folder(path: str) -> None:
    """A name with no slash, or one slash, may be one of the hub; anything else must be a folder."""
    if Path(path).is_file():
        raise UsageError(f"{path}: a file, not the folder of a checkpoint")
    if not Path(path).is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise UsageError(f"{path}: no such folder")


def short(error: Exception) -> str:
    """The beginning of an error's text in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
