"""Text in, batches of bytes out. A token is a byte of UTF-8, so any text works without a vocabulary."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from ..cli import UsageError

VOCABULARY = 256
VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Text:
    """A text as byte tokens; the last tenth is held out for validation."""

    name: str
    train: Tensor
    validation: Tensor
    bytes_per_character: float


def load_text(path: str | None, context: int) -> Text:
    """Read a UTF-8 file (None: the tiny Shakespeare that ships with the package).

    Raises:
        UsageError: the file is missing, unreadable, empty, binary, not UTF-8, or too short for ``context``.
    """
    if path is None:
        name = "tiny Shakespeare"
        raw = resources.files("flash_sfa").joinpath("data/tinyshakespeare.txt").read_bytes()
    else:
        name = Path(path).name
        try:
            raw = Path(path).read_bytes()
        except FileNotFoundError:
            raise UsageError(f"--text {path}: no such file") from None
        except OSError as error:
            raise UsageError(f"--text {path}: cannot be read ({error.strerror})") from None
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if not raw.strip():
        raise UsageError(f"--text {path}: the file is empty")
    try:
        characters = len(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"--text {path}: not UTF-8 text (byte {error.start} does not decode)") from None
    if b"\0" in raw:
        raise UsageError(f"--text {path}: a binary file (it has a zero byte at {raw.index(0)}), not text")
    shortest = 20 * (context + 1)
    if len(raw) < shortest:
        raise UsageError(f"--text {path}: too short, {len(raw)} bytes; at least {shortest} are needed")
    tokens = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    split = len(tokens) - int(len(tokens) * VALIDATION_SHARE)
    return Text(name, tokens[:split], tokens[split:], len(raw) / characters)


def train_batch(text: Text, step: int, *, seed: int, batch: int, context: int) -> Tensor:
    """The (batch, context + 1) int64 tokens of a step: of (seed, step) alone, equal for all variants."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(text.train) - context, (batch,), generator=generator)
    return text.train[starts[:, None] + torch.arange(context + 1)].long()


def validation_windows(text: Text, *, context: int, limit: int) -> Tensor:
    """Up to ``limit`` windows (n, context + 1), evenly spread over the held-out text, without overlap."""
    count = (len(text.validation) - 1) // context
    chosen = torch.linspace(0, count - 1, min(limit, count)).round().long()
    return text.validation[chosen[:, None] * context + torch.arange(context + 1)].long()


def decode(tokens: Tensor) -> str:
    """Bytes back to text; a cut or impossible UTF-8 sequence becomes U+FFFD."""
    return bytes(tokens.tolist()).decode("utf-8", errors="replace")
