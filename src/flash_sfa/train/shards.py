"""Packed token shards: the file format, its writer and its memory-mapped reader.

A data set is a folder::

    index.json      {"format": 1, "dtype": "uint16", "vocab_size": 50257, "eos": 50256,
                     "tokenizer": "<sha256>", "documents": 3, "tokens": 5120,
                     "shards": [{"file": "00000.bin", "tokens": 5120}], "source": null}
    00000.bin       the token ids and nothing else: little-endian uint16 (vocab_size <= 65536) or uint32
    progress.json   only while ``flash-sfa prepare`` has not finished

``source`` says which arguments of ``flash-sfa prepare`` made it. Documents are joined by one ``eos`` token; a
shard boundary may fall anywhere. index.json is written last and in one step, so a folder that has it
is complete.
"""

import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
INDEX = "index.json"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The stored dtype for a vocabulary: little-endian uint16 up to 65536 ids, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_json(path: Path, value: object) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(part, path)


def write_index(
    folder: Path,
    shards: Sequence[tuple[str, int]],
    *,
    vocab_size: int,
    eos: int,
    documents: int,
    tokenizer: str = "",
    source: object = None,
) -> None:
    """Complete a data set: write index.json over shard files that already lie in ``folder``."""
    write_json(
        folder / INDEX,
        {
            "format": FORMAT,
            "dtype": token_dtype(vocab_size).name,
            "vocab_size": vocab_size,
            "eos": eos,
            "tokenizer": tokenizer,
            "documents": documents,
            "tokens": sum(count for _, count in shards),
            "shards": [{"file": name, "tokens": count} for name, count in shards],
            "source": source,
        },
    )


@dataclass(frozen=True)
class TokenShards:
    """All tokens of one or more data sets as one long sequence, read through memory maps.

    Attributes:
        maps: one read-only token array a shard. starts: global number of each shard's first token.
        vocab_size, eos: as in index.json, the same for every folder.

    Example:
        >>> import numpy as np, pathlib, tempfile
        >>> from flash_sfa.train.shards import open_shards, write_index
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> np.arange(10, dtype="<u2").tofile(folder / "00000.bin")
        >>> write_index(folder, [("00000.bin", 10)], vocab_size=16, eos=0, documents=1)
        >>> open_shards([folder]).read(3, 4).tolist()
        [3, 4, 5, 6]
    """

    maps: tuple[np.ndarray, ...]
    starts: tuple[int, ...]
    vocab_size: int
    eos: int

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return self.starts[-1] + len(self.maps[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """``count`` tokens from token number ``start`` as int64 (count,), across shard boundaries."""
        if start < 0 or count < 0 or start + count > self.tokens:
            raise ValueError(f"tokens {start} to {start + count} asked for, the data has {self.tokens}")
        out = np.empty(count, dtype=np.int64)
        done = 0
        shard = bisect_right(self.starts, start) - 1
        while done < count:
            offset = start + done - self.starts[shard]
            piece = self.maps[shard][offset : offset + count - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1
        return out


def open_shards(folders: Sequence[str | Path]) -> TokenShards:
    """Open data sets, in the order given, as one sequence.

    Args:
        folders: data-set folders made by ``flash-sfa prepare``; all with one vocabulary.

    Raises:
        ValueError: no folder, a folder without index.json (unfinished or not a data set), another format,
            a file whose size differs from the index, or folders that disagree in vocabulary.
    """
    if not folders:
        raise ValueError("folders must name at least one data set, got none")
    maps: list[np.ndarray] = []
    starts: list[int] = []
    total = 0
    vocabulary: tuple[int, int, str] | None = None
    for folder in map(Path, folders):
        path = folder / INDEX
        if not path.is_file():
            raise ValueError(f"{folder} has no {INDEX}: it is no token data set, or was not finished")
        index = json.loads(path.read_text())
        if index.get("format") != FORMAT:
            raise ValueError(f"{path} has format {index.get('format')!r}, this version reads {FORMAT}")
        ours = (int(index["vocab_size"]), int(index["eos"]), str(index["tokenizer"]))
        if vocabulary is not None and ours != vocabulary:
            raise ValueError(f"{folder} has (vocab_size, eos, tokenizer) {ours}, those before it {vocabulary}")
        vocabulary = ours
        dtype = token_dtype(ours[0])
        for entry in index["shards"]:
            file, count = folder / entry["file"], int(entry["tokens"])
            size = file.stat().st_size if file.is_file() else -1
            if size != count * dtype.itemsize:
                raise ValueError(f"{file} should hold {count * dtype.itemsize} bytes, it has {size}")
            if count:
                maps.append(np.memmap(file, dtype=dtype, mode="r"))
                starts.append(total)
                total += count
    if not maps or vocabulary is None:
        raise ValueError(f"the data sets {[str(f) for f in folders]} hold no tokens")
    return TokenShards(tuple(maps), tuple(starts), vocabulary[0], vocabulary[1])


class BlockOrder:
    """The order in which fixed-length blocks are read: a new seeded shuffle every epoch.

    Block b covers tokens ``b*length + phase`` to ``+ length`` (inclusive: one more for the target of the
    last position); every epoch draws its own phase below length, so block edges move.
    ``rows(i, n)`` is a pure function of the seed and the row number i, which makes resuming exact.
    """

    def __init__(self, tokens: int, length: int, seed: int) -> None:
        self.length, self.seed = length, seed
        self.per_epoch = (tokens - length) // length  # one block is given up for the phase
        if self.per_epoch < 1:
            raise ValueError(f"the data has {tokens} tokens, a block of {length} needs at least {2 * length}")
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def starts(self, first: int, count: int) -> list[int]:
        """First token numbers of rows first .. first + count - 1 of the endless sequence of rows."""
        out = []
        for row in range(first, first + count):
            epoch, at = divmod(row, self.per_epoch)
            if epoch != self._epoch:
                rng = np.random.default_rng([self.seed, epoch])
                phase = int(rng.integers(self.length))
                self._order = rng.permutation(self.per_epoch) * self.length + phase
                self._epoch = epoch
            out.append(int(self._order[at]))
        return out


def read_rows(data: TokenShards, starts: Sequence[int], length: int) -> np.ndarray:
    """int64 (len(starts), length + 1): inputs are [:, :-1], targets [:, 1:]."""
    return np.stack([data.read(start, length + 1) for start in starts])
