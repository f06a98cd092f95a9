"""The ``flash-sfa`` command. Only the module of the chosen subcommand is imported."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from .version import __version__

COMMANDS = {
    "bench": ("flash_sfa.bench.command", "time SFA against dense attention on this GPU"),
    "demo": ("flash_sfa.demo.command", "train SFA beside dense attention on real text, compare, generate"),
    "env": ("flash_sfa.env", "versions, devices, and which implementations are available"),
    "eval": ("flash_sfa.evaluate", "perplexity, tasks and cost of a checkpoint, dense and with SFA"),
    "finetune": ("flash_sfa.finetune", "adapt a dense checkpoint to SFA, with the paper's regulariser"),
    "generate": ("flash_sfa.generate", "continue a prompt with a checkpoint, dense or with SFA"),
    "niah": ("flash_sfa.train.niah", "find a needle in a haystack: train on it, or test a checkpoint"),
    "prepare": ("flash_sfa.train.prepare", "turn text into packed token shards"),
    "pretrain": ("flash_sfa.train.pretrain", "train a model from a recipe"),
}


class UsageError(Exception):
    """A mistake of the user: printed as one line, exit status 2."""


def seed_number(text: str) -> int:
    """A --seed: what PyTorch and NumPy both take."""
    if not 0 <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"must lie in [0, 2**32), got {text}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns its exit status (2 for a usage error, 130 after Ctrl-C)."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="flash-sfa", description="Sparse Feature Attention: tools.")
    parser.add_argument("--version", action="version", version=f"flash-sfa {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in words if not word.startswith("-")), None)
    for name, (_, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == chosen:
            module = import_module(COMMANDS[name][0])
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args = parser.parse_args(words)
    try:
        return int(args.run(args))
    except UsageError as error:
        print(f"flash-sfa {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    # Through the package's own module, so that UsageError is one class.
    from flash_sfa.cli import main as package_main

    sys.exit(package_main())
