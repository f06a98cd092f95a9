"""``flash-sfa prepare``: text files to packed token shards, streaming and resumable."""

import argparse
import gzip
import hashlib
import json
import lzma
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from . import shards

SEPARATOR = "<|endoftext|>"
PIECE_CHARS = 1 << 18
BATCH_CHARS = 1 << 23


def load_tokenizer(folder: str | Path) -> tuple[Any, int, str]:
    """A ``tokenizers.Tokenizer``, the id of ``<|endoftext|>`` and a hash of the files it came from.

    Args:
        folder: holds tokenizer.json, or BPE files (encoder.json + vocab.bpe, or vocab.json + merges.txt).

    Raises:
        ValueError: none of these files, or no end-of-text token in the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = Path(folder)
    pairs = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
    files = [folder / "tokenizer.json"]
    if files[0].is_file():
        tokenizer = Tokenizer.from_file(str(files[0]))
    else:
        found = [pair for pair in pairs if all((folder / name).is_file() for name in pair)]
        if not found:
            raise ValueError(f"{folder} holds no tokenizer.json and none of the pairs {pairs}")
        files = [folder / name for name in found[0]]
        tokenizer = Tokenizer(models.BPE.from_file(str(files[0]), str(files[1])))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    eos = tokenizer.token_to_id(SEPARATOR)
    if eos is None:
        raise ValueError(f"the tokenizer in {folder} has no token {SEPARATOR!r} to end a document")
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return tokenizer, int(eos), digest


def open_text(path: Path) -> IO[str]:
    """A UTF-8 text stream of a plain, .xz or .gz file; line ends are kept as they are."""
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8", newline="\n")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="\n")
    return path.open(encoding="utf-8", newline="\n")


def read_pieces(stream: Iterable[str], limit: int = PIECE_CHARS) -> Iterator[tuple[str, bool]]:
    """(text, whether a document starts here) for every document, long ones in several pieces.

    Documents are separated by a line ``<|endoftext|>``; empty ones are dropped. A document is cut only
    between a line that ends in a visible character and one that starts with one: there GPT-2's
    pre-tokenizer splits anyway, so pieces give the tokens of the whole.
    """
    lines: list[str] = []
    size = 0
    fresh = True
    for line in stream:
        if line.rstrip("\r\n") == SEPARATOR:
            if lines:
                yield "".join(lines), fresh
            lines, size, fresh = [], 0, True
            continue
        if size >= limit and not line[0].isspace() and not lines[-1][-2:-1].isspace() and len(lines[-1]) > 1:
            yield "".join(lines), fresh
            lines, size, fresh = [], 0, False
        lines.append(line)
        size += len(line)
    if lines:
        yield "".join(lines), fresh


def prepare(
    texts: list[Path],
    tokenizer_dir: Path,
    out: Path,
    *,
    shard_tokens: int = 1 << 30,
    wikitext: bool = False,
    quiet: bool = False,
) -> None:
    """Tokenise ``texts`` into the data set ``out`` (format: ``flash_sfa.train.shards``).

    Reads piece by piece, so memory does not grow with the input. After every batch the state is saved in
    progress.json; a killed run that is started again with the same arguments goes on from there and gives
    the same bytes. A finished data set made from the same arguments is left as it is.

    Raises:
        ValueError: a missing or non-UTF-8 input, a bad tokenizer, or an ``out`` that was begun with other
            arguments.
    """
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1, got {shard_tokens}")
    for path in texts:
        if not path.is_file():
            raise ValueError(f"the text file {path} does not exist")
    tokenizer, eos, digest = load_tokenizer(tokenizer_dir)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    dtype = shards.token_dtype(vocab_size)
    job = {
        "texts": [[path.name, path.stat().st_size] for path in texts],
        "tokenizer": digest,
        "shard_tokens": shard_tokens,
        "wikitext": wikitext,
    }
    out.mkdir(parents=True, exist_ok=True)
    state_file = out / "progress.json"
    state: dict[str, Any] = {"job": job, "text": 0, "piece": 0, "documents": 0, "tokens": 0}
    index_file = out / shards.INDEX
    begun = json.loads(state_file.read_text()) if state_file.is_file() else None
    made = json.loads(index_file.read_text())["source"] if index_file.is_file() else begun and begun["job"]
    if made is not None and made != job:
        raise ValueError(f"{out} was begun with other arguments: {made}, now {job}")
    if index_file.is_file():
        return
    state = begun or state
    _truncate(out, state["tokens"], shard_tokens, dtype.itemsize)
    began, before = time.monotonic(), state["tokens"]
    while state["text"] < len(texts):
        path = texts[state["text"]]
        try:
            with open_text(path) as stream:
                pieces = read_pieces(wikitext_rows(stream) if wikitext else stream)
                for _ in range(state["piece"]):
                    next(pieces)
                for batch in _batches(pieces):
                    ids: list[np.ndarray] = []
                    encoded = tokenizer.encode_batch([text for text, _ in batch], add_special_tokens=False)
                    for (_, fresh), row in zip(batch, encoded, strict=True):
                        if fresh and state["documents"]:
                            ids.append(np.array([eos], dtype=dtype))
                        state["documents"] += fresh
                        ids.append(np.array(row.ids, dtype=dtype))
                    tokens = np.concatenate(ids)
                    _append(out, tokens, state["tokens"], shard_tokens)
                    state["tokens"] += len(tokens)
                    state["piece"] += len(batch)
                    shards.write_json(state_file, state)
                    if not quiet:
                        rate = (state["tokens"] - before) / max(time.monotonic() - began, 1e-9)
                        print(
                            f"\r{path.name}: {state['tokens']:,} tokens, {rate / 1e6:.2f} M/s",
                            end="",
                            file=sys.stderr,
                            flush=True,
                        )
        except (UnicodeDecodeError, lzma.LZMAError, EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        state["text"] += 1
        state["piece"] = 0
    if not quiet:
        print(file=sys.stderr)
    count, full = state["tokens"], shard_tokens
    files = [(f"{i:05d}.bin", min(full, count - i * full)) for i in range((count + full - 1) // full)]
    shards.write_index(
        out, files, vocab_size=vocab_size, eos=eos, documents=state["documents"], tokenizer=digest, source=job
    )
    state_file.unlink(missing_ok=True)


def wikitext_rows(lines: Iterable[str]) -> Iterator[str]:
    """Lines of the raw WikiText file as its rows joined by blank lines.

    A row with text keeps its line end, a blank row is empty, and two line ends join rows: the text that is
    usually meant by WikiText-2 perplexity (287,644 GPT-2 tokens in the test split).
    """
    for i, line in enumerate(lines):
        if i:
            yield "\n"
            yield "\n"
        if line.strip():
            yield line


def _batches(pieces: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _truncate(out: Path, tokens: int, shard_tokens: int, itemsize: int) -> None:
    """Drop what a killed run wrote after its last saved state."""
    for file in out.glob("[0-9][0-9][0-9][0-9][0-9].bin"):
        keep = min(max(tokens - int(file.stem) * shard_tokens, 0), shard_tokens) * itemsize
        if keep == 0:
            file.unlink()
        elif file.stat().st_size > keep:
            with file.open("r+b") as stream:
                stream.truncate(keep)


def _append(out: Path, tokens: np.ndarray, at: int, shard_tokens: int) -> None:
    while len(tokens):
        shard, offset = divmod(at, shard_tokens)
        piece = tokens[: shard_tokens - offset]
        with (out / f"{shard:05d}.bin").open("ab") as stream:
            stream.write(piece.tobytes())
        tokens, at = tokens[len(piece) :], at + len(piece)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``flash-sfa prepare``."""
    parser.add_argument(
        "texts",
        nargs="+",
        type=Path,
        metavar="TEXT",
        help=f"UTF-8 text (.txt, .xz, .gz); a line {SEPARATOR} ends a document",
    )
    parser.add_argument(
        "--tokenizer", required=True, type=Path, metavar="DIR", help="tokenizer.json or GPT-2 BPE files"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="data-set folder to write")
    parser.add_argument("--shard-tokens", type=int, default=1 << 30, metavar="N", help="tokens a file (default 2^30)")
    parser.add_argument(
        "--wikitext", action="store_true", help="the texts are raw WikiText: join its rows by blank lines"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress line")


def run(args: argparse.Namespace) -> int:
    """Run ``flash-sfa prepare``."""
    from ..cli import UsageError

    try:
        prepare(
            args.texts,
            args.tokenizer,
            args.out,
            shard_tokens=args.shard_tokens,
            wikitext=args.wikitext,
            quiet=args.quiet,
        )
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    except ImportError as error:
        raise UsageError(f"this command needs {error.name}: pip install 'flash-sfa[train]'") from None
    return 0
