"""``flash-sfa demo``: train dense and sparse attention on real text, side by side, and report."""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli import UsageError

if TYPE_CHECKING:
    from .models import Settings

RUN_FILE = "run.json"
CHECKPOINT_NOTE = """# {name}: {label}

A checkpoint in the Transformers format, trained by `flash-sfa demo`. It has no tokenizer file: a token is a
byte of UTF-8 (ids 0 to 255). `list(text.encode())` encodes, `bytes(ids).decode(errors="replace")` decodes.

```python
from flash_sfa.demo.models import load

model = load(".")  # this folder; sets the attention that the model was trained with
```
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", metavar="FILE", help="a UTF-8 text file (default: tiny Shakespeare, included)")
    parser.add_argument(
        "--positions", choices=("rotary", "absolute"), help="mimo_v2_flash with RoPE (default) or GPT-2"
    )
    parser.add_argument("--variants", metavar="A,B", help="which of dense,narrow,sfa-rope,sfa (default: all)")
    parser.add_argument("--steps", type=int, help="training steps of each variant (default: what the time allows)")
    parser.add_argument("--seed", type=int, help="decides weights and batches (default: 0)")
    parser.add_argument("--quick", action="store_true", help="a smaller model, done in under a minute")
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="where results go (default: runs/demo)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: the cores this process may use)")


def usable_cores() -> int:
    """Cores of this process: its affinity, and the quota of its control group where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no such file, or "max": no quota
        pass
    return max(1, cores)


def _chosen_variants(text: str, positions: str) -> tuple[str, ...]:
    """What --variants names, in the order of the report."""
    from .models import VARIANTS

    known = VARIANTS[positions]
    chosen = [name.strip() for name in text.split(",")]
    for name in chosen:
        if name not in known:
            raise UsageError(
                f"--variants: {name!r} is unknown with {positions} positions; choose from {','.join(known)}"
            )
    return tuple(name for name in known if name in chosen)


def _new_settings(args: argparse.Namespace) -> "Settings":
    from .models import QUICK, VARIANTS, Settings

    positions = args.positions or "rotary"
    variants = VARIANTS[positions] if args.variants is None else _chosen_variants(args.variants, positions)
    changed = QUICK if args.quick else {}
    settings = Settings(positions=positions, variants=variants, seed=args.seed or 0, text=args.text)
    return dataclasses.replace(settings, **changed, steps=args.steps or 0)  # type: ignore[arg-type]


def _stored_settings(args: argparse.Namespace, path: Path) -> "Settings":
    """The settings of the run to go on with; an option that would change them is refused."""
    from .models import QUICK, Settings

    if not path.exists():
        raise UsageError(f"--resume: {path.parent} holds no run ({RUN_FILE} is missing)")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        settings = Settings(**{**stored, "variants": tuple(stored["variants"])})
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"--resume: {path} cannot be read ({error})") from None
    given = {"positions": args.positions, "steps": args.steps, "seed": args.seed, "text": args.text}
    for name, value in given.items():
        if value is not None and value != getattr(settings, name):
            raise UsageError(
                f"--resume: the run has {name} {getattr(settings, name)!r}; --{name} {value} would change it"
            )
    if args.variants is not None and _chosen_variants(args.variants, settings.positions) != settings.variants:
        raise UsageError(f"--resume: the run has variants {','.join(settings.variants)}; --variants would change it")
    if args.quick and any(getattr(settings, name) != value for name, value in QUICK.items()):
        raise UsageError("--resume: the run is not a quick one; --quick would change it")
    return settings


def _machine(device: Any) -> str:
    import torch
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU"
    return (
        f"{name}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def _device(name: str) -> Any:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _prepare(folder: Path, resume: bool) -> None:
    """Make the folder; a new run replaces an earlier one there, and nothing else."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder}: is not a folder")
    if folder.is_dir() and not resume and any(folder.iterdir()):
        if not (folder / RUN_FILE).exists():
            raise UsageError(f"--out {folder}: holds files that are not a run of this demo; choose another folder")
        from .models import VARIANTS

        print(f"replacing the earlier run in {folder}")
        (folder / RUN_FILE).unlink()
        for name in ("state", *VARIANTS["rotary"]):
            shutil.rmtree(folder / name, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder}: cannot be made ({error.strerror})") from None


def run(args: argparse.Namespace) -> int:
    """0; 1 if cached generation differs from uncached; 130 after Ctrl-C. The report is written first."""
    for name in ("steps", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")
    if args.seed is not None and not 0 <= args.seed < 2**31:
        raise UsageError(f"--seed must be in [0, 2**31), got {args.seed}")
    # A thread that waits by spinning loses its core to any other busy process: training is then up to a
    # hundred times slower. Sleeping costs little. It takes effect only before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        import matplotlib  # noqa: F401
        import safetensors  # noqa: F401
        import tqdm  # noqa: F401
        import transformers
    except ImportError as error:
        raise UsageError(f"the demo needs {error.name}: pip install 'flash-sfa[demo]'") from None
    import torch

    from .data import load_text
    from .evaluate import evaluate
    from .models import make_variants
    from .report import Outcome, plain_table, table, write
    from .report import findings as findings_of
    from .train import calibrate, load_state, save_state, train, write_metrics

    begin = time.perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = _device(args.device)
    torch.set_num_threads(args.threads or usable_cores())
    folder = Path(args.out)
    run_file = folder / RUN_FILE
    settings = _stored_settings(args, run_file) if args.resume else _new_settings(args)
    text = load_text(settings.text, settings.context)
    sha256 = hashlib.sha256(text.train.numpy().tobytes() + text.validation.numpy().tobytes()).hexdigest()
    if settings.text_sha256 not in ("", sha256):
        raise UsageError("--resume: the text is not the one that the run began with")
    _prepare(folder, args.resume)
    variants = make_variants(settings)
    outcome = Outcome(
        settings, variants, {name: [] for name in variants}, {}, _machine(device), 0.0, text.name,
        text.bytes_per_character,
    )  # fmt: skip

    def write_run_file() -> None:
        run_file.write_text(json.dumps(dataclasses.asdict(settings), indent=2) + "\n", encoding="utf-8")

    def save_metrics() -> None:
        rows = {
            name: [*records, *([outcome.results[name]] if name in outcome.results else [])]
            for name, records in outcome.records.items()
        }
        write_metrics(folder / "metrics.jsonl", rows)

    settings = dataclasses.replace(settings, text_sha256=sha256)
    write_run_file()
    try:
        if settings.steps == 0:
            print("measuring the speed of a training step ...")
            settings = dataclasses.replace(settings, steps=calibrate(variants, text, settings, device))
        outcome.settings = settings
        write_run_file()
        print(
            f"{text.name}: {len(text.train):,} bytes to train on, {len(text.validation):,} to validate; "
            f"{settings.steps} steps of {settings.batch} x {settings.context} bytes for each of "
            f"{', '.join(variants)}"
        )
        for name, variant in variants.items():
            state_path = folder / "state" / f"{name}.pt"
            model = train(variant, text, settings, device, state_path, outcome.records[name], save_metrics)
            state = load_state(state_path) or {}
            if "result" not in state:
                print(f"{name}: validation, cache sizes, generation ...")
                state["result"] = evaluate(model, variant, text, settings, device)
                model.save_pretrained(folder / name)
                note = CHECKPOINT_NOTE.format(name=name, label=variant.label)
                (folder / name / "README.md").write_text(note, encoding="utf-8")
                save_state(state_path, state)
            outcome.results[name] = state["result"]
    except KeyboardInterrupt:
        outcome.interrupted = True
        print("\ninterrupted; --resume goes on from the last saved step")
    outcome.seconds = time.perf_counter() - begin
    save_metrics()
    write(outcome, folder)
    print()
    print(plain_table(table(outcome)))
    print()
    for line in findings_of(outcome):
        print(line)
    print(f"\nreport: {folder / 'report.html'}  ({outcome.seconds:.0f} s)")
    if any(not result["equality"]["ok"] for result in outcome.results.values()):
        return 1
    return 130 if outcome.interrupted else 0
