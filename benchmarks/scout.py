"""Run a queue of recipes over the GPUs of one machine, in order, within a time budget.

    python benchmarks/scout.py recipes/scout/queue.yaml --out runs/scout --gpus 0,1 --per-gpu 2 --budget 1200

The queue is a YAML list of ``{name, recipe, set}``; ``recipe`` is relative to the queue file. With ``start: NAME``
a run waits for another of the queue and begins with its model (that one needs train.save_last). Each run is a
process of its own with one GPU (``--gpus cpu`` for none). A run that fails or outlasts ``--run-limit`` is
noted and the next one starts. Start again with the same --out to go on: finished runs are kept, others
restart (or resume where the recipe saves checkpoints). On another machine, --done names files of rows from
earlier: their complete runs are skipped.

A run starts only if its estimated time fits in --budget: the time of a finished run of the same name but for
the seed (...-s0), else the median of those that ran here, by their tokens; before any has finished, what the
logs of the running ones say. A run that is still going when the budget ends is killed and leaves no row.
Of several queues the later ones fill the time in which no run of the earlier ones fits any more.

Files in --out: rows.jsonl (results in order of finishing), status.json, table.txt, runs/NAME/, runs/NAME.log.
"""

import argparse
import contextlib
import json
import os
import queue
import re
import signal
import statistics
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import yaml

SOURCE = Path(__file__).resolve().parent.parent / "src"
START_S = 25.0  # of a run: start, compiling, evaluation


def unpack(archive: Path, folder: Path) -> None:
    """Extract a tar (any compression) once."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f".{archive.name}.done"
    if not mark.exists():
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        mark.touch()


def read_queue(path: Path) -> list[dict[str, Any]]:
    """The queue's entries, checked."""
    entries = yaml.safe_load(path.read_text())
    names = set()
    for entry in entries:
        unknown = set(entry) - {"name", "recipe", "set", "start"}
        if unknown or "name" not in entry or "recipe" not in entry:
            raise SystemExit(f"{path}: an entry needs name and recipe, may have set and start; got {entry}")
        if "start" in entry and entry["start"] not in names:
            raise SystemExit(f"{path}: {entry['name']!r} starts from {entry['start']!r}, which does not come before it")
        if entry["name"] in names:
            raise SystemExit(f"{path}: the name {entry['name']!r} comes twice")
        names.add(entry["name"])
        entry["recipe"] = path.parent / entry["recipe"]
    return list(entries)


def read_rows(files: list[Path]) -> list[dict[str, Any]]:
    """All rows of some files; a file that does not exist holds none."""
    return [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines() if line]


def kind_of(name: str) -> str:
    """The name without its seed: "hybrid-k8-s1" -> "hybrid-k8"."""
    return re.sub(r"-s\d+$", "", name)


def tokens_of(entry: dict[str, Any], overrides: list[str]) -> int:
    """The tokens that a run trains on."""
    sys.path.insert(0, str(SOURCE))
    from flash_sfa.train.recipe import load_recipe

    try:
        return load_recipe(entry["recipe"], [*settings(entry), *overrides]).train.tokens
    except ValueError:  # the run itself will say what is wrong
        return 1
    finally:
        sys.path.remove(str(SOURCE))


def settings(entry: dict[str, Any]) -> list[str]:
    """The overrides of an entry as the command takes them."""
    values = {**({"train.start": entry["start"]} if "start" in entry else {}), **(entry.get("set") or {})}
    return [f"{key}={json.dumps(str(value) if isinstance(value, Path) else value)}" for key, value in values.items()]


class Scout:
    """The shared state of the worker threads."""

    def __init__(self, out: Path, overrides: list[str], budget: float, run_limit: float, done: list[Path]) -> None:
        self.out, self.overrides, self.budget, self.run_limit = out, overrides, budget, run_limit
        self.began = time.monotonic()
        self.lock = threading.Lock()
        self.running: dict[str, float] = {}
        self.done: list[str] = []
        self.failed: dict[str, str] = {}
        self.skipped: list[str] = []
        self.durations: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self.children: list[subprocess.Popen[bytes]] = []
        self.needed: set[str] = set()  # names that later runs start from
        (out / "runs").mkdir(parents=True, exist_ok=True)
        earlier = {row["name"] for row in read_rows(done) if row.get("complete")}
        self.have = earlier | {row["name"] for row in read_rows([out / "rows.jsonl"])}

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def estimate(self, name: str) -> float:
        """Seconds a run will take; 0 where nothing is known yet."""
        same = [t for other, t in self.durations.items() if kind_of(other) == kind_of(name)]
        if same:
            return 1.03 * same[-1]
        trained = [(t, other) for other, t in self.durations.items() if self.tokens.get(other, 1)]
        if trained:
            return 1.03 * statistics.median(self.scaled(t, other, name) for t, other in trained)
        going = [(self.progress(other, start), other) for other, start in self.running.items()]
        return max((self.scaled(t, other, name) for t, other in going if t), default=0.0)

    def scaled(self, seconds: float, other: str, name: str) -> float:
        """The time of a run from another's, by their tokens."""
        ratio = self.tokens.get(name, 1) / self.tokens.get(other, 1)
        return START_S + (seconds - START_S) * ratio if seconds > START_S else seconds

    def progress(self, name: str, start: float) -> float:
        """What a running run will have taken at its end, from its log; 0 without one."""
        log, recipe = (self.out / "runs" / name / file for file in ("log.jsonl", "recipe.json"))
        try:
            last = [e for e in map(json.loads, log.read_text().splitlines()) if "tokens_per_s" in e][-1]
            left = json.loads(recipe.read_text())["train"]["tokens"] - last["tokens"]
            return float(self.elapsed() - start + left / last["tokens_per_s"])
        except (OSError, ValueError, IndexError, ZeroDivisionError):  # not there yet, or half a line
            return 0.0

    def note(self) -> None:
        state = {
            "elapsed_s": round(self.elapsed()),
            "budget_s": round(min(self.budget, 1e9)),
            "expected_s": {name: round(self.progress(name, start)) for name, start in self.running.items()},
            "took_s": {name: round(seconds) for name, seconds in self.durations.items()},
            "running": {name: round(self.elapsed() - start) for name, start in self.running.items()},
            "done": self.done,
            "failed": self.failed,
            "skipped": self.skipped,
        }
        part = self.out / "status.json.part"
        part.write_text(json.dumps(state, indent=1) + "\n")
        part.replace(self.out / "status.json")

    def one(self, entry: dict[str, Any], gpu: str, extra: list[str], folder: str = "runs") -> Path:
        """Run one entry to its end; returns the path of its row, which exists if it went well."""
        name = entry["name"]
        target = self.out / folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "flash_sfa.train.pretrain", str(entry["recipe"])]
        command += ["--out", str(target), "--quiet", "--set", f"name={name}"]
        for override in [*settings(entry), *self.overrides, *extra]:
            command += ["--set", override]
        env = dict(os.environ, TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SOURCE), env.get("PYTHONPATH", "")]))
        env["CUDA_VISIBLE_DEVICES"] = "" if gpu == "cpu" else gpu
        began = time.monotonic()
        with (self.out / folder / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
            with self.lock:
                self.children.append(child)
                self.running[name] = self.elapsed()
                self.note()
            limit = max(min(self.run_limit, self.budget - self.elapsed()), 0.0)
            try:
                code = child.wait(timeout=limit)
                reason = "" if code == 0 else f"exit {code}"
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                reason = f"killed after {limit:.0f} s"
        with self.lock:
            self.children.remove(child)
            del self.running[name]
            if reason:
                self.failed[name] = f"{reason}: {last_line(self.out / folder / f'{name}.log')}"
            else:
                self.durations[name] = time.monotonic() - began
            self.note()
        return target / "row.json"

    def model(self, name: str) -> Path:
        return self.out / "runs" / name / "model"

    def wait_for(self, entry: dict[str, Any]) -> bool:
        """Wait for the run that this one starts from; False, and a note, if there is no need or no such model."""
        other, name = entry["start"], entry["name"]
        if name in self.have:
            self.done.append(name)
            return False
        while other in self.running or other not in {*self.failed, *self.skipped, *self.done}:
            time.sleep(0.5)
        if not self.model(other).exists():
            self.skipped.append(name)
            return False
        entry["start"] = self.model(other)
        return True

    def worker(self, gpu: str, jobs: "queue.Queue[dict[str, Any]]") -> None:
        while True:
            try:
                entry = jobs.get_nowait()
            except queue.Empty:
                return
            name = entry["name"]
            if "start" in entry and not self.wait_for(entry):
                continue
            with self.lock:
                if name in self.have and not (name in self.needed and not self.model(name).exists()):
                    self.done.append(name)
                    continue
                if self.elapsed() + self.estimate(name) > self.budget:
                    self.skipped.append(name)
                    self.note()
                    continue
            try:
                row = self.one(entry, gpu, [])
                if row.exists() and name not in self.failed:
                    with self.lock:
                        with (self.out / "rows.jsonl").open("a") as rows:
                            rows.write(json.dumps(json.loads(row.read_text())) + "\n")
                        self.done.append(name)
                        (self.out / "table.txt").write_text(table(self.out / "rows.jsonl"))
                        self.note()
            except Exception as error:  # one bad run must not end the others
                with self.lock:
                    self.running.pop(name, None)
                    self.failed[name] = repr(error)


def last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def table(rows_file: Path) -> str:
    """A short text table of rows.jsonl, best first within a family, with quantised rivals as rows of their
    own."""
    rows = read_rows([rows_file])
    lines = []
    for row in rows:
        config = row["config"]
        codes = row.get("codes", {})
        base = (config["model"]["family"], row["name"])
        lines.append((*base, row, row["k_bytes"], codes, row["complete"]))
        lines += [
            (base[0], f"{base[1]}-{q['bits']}bit", q, q["k_bytes"], {}, row["complete"]) for q in row["quantized"]
        ]
    dense: dict[str, float] = {}
    for family, name, row, *_ in lines:
        if "-dense" in name and "partial" not in name and row["val"]:
            dense[family] = min(row["val"]["all"], dense.get(family, 1e9))
    lines.sort(key=lambda line: (line[0], line[2]["val"].get("all", 0.0)))
    out = [
        f"{'name':28s} {'K B':>6s} {'all':>8s} {'dense':>7s} {'wiki':>8s} {'novels':>8s} {'python':>8s} "
        f"{'wt2':>8s} {'overlap':>7s} {'edges':>6s} {'r999':>5s} {'Mtok/s':>6s}"
    ]
    for family, name, row, k_bytes, codes, complete in lines:
        val, test = row["val"], row["test"]
        ratio = val.get("all", float("nan")) / dense.get(family, float("nan")) - 1
        numbers = [val.get(s, float("nan")) for s in ("wikipedia", "novels", "python")]
        numbers.append(test.get("wikitext2", float("nan")))
        out.append(
            f"{name:28s} {k_bytes:6.1f} {val.get('all', float('nan')):8.2f} {100 * ratio:+6.1f}% "
            + " ".join(f"{n:8.2f}" for n in numbers)
            + f" {codes.get('overlap', float('nan')):7.3f} {codes.get('edges', float('nan')):6.2f}"
            + f" {codes.get('rows_999', float('nan')):5.2f} {row.get('tokens_per_s', 0) / 1e6:6.2f}"
            + ("" if complete else "  stopped early")
        )
    return "\n".join(out) + "\n"


def smoke(scout: Scout, entries: list[dict[str, Any]], gpus: list[str], count: int) -> bool:
    """Run the first ``count`` entries for 40 steps, all at once over the GPUs; True if at least one
    worked."""
    extra = ["train.tokens=1310720", "eval.tokens=65536", "eval.curve_points=0", "train.log_every=10"]
    extra += ["eval.save_qkv=false"]
    limit, scout.run_limit = scout.run_limit, min(scout.run_limit, 240.0)
    rows: dict[str, Path] = {}

    def go(i: int) -> None:
        rows[entries[i]["name"]] = scout.one(entries[i], gpus[i % len(gpus)], extra, "smoke")

    threads = [threading.Thread(target=go, args=(i,)) for i in range(min(count, len(entries)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    good = 0
    for name, path in rows.items():
        if path.exists():
            row = json.loads(path.read_text())
            good += 1
            print(
                f"smoke {name}: {row['tokens_per_s'] / 1e6:.2f}M tokens/s (shared GPU), first step "
                f"{row['first_step_s']:.0f} s, all {row['total_s']:.0f} s, "
                f"peak {row.get('peak_bytes', 0) / 2**30:.1f} GiB",
                flush=True,
            )
        else:
            print(f"smoke {name} FAILED: {scout.failed.get(name)}", flush=True)
    scout.failed.clear()
    scout.durations.clear()
    scout.run_limit = limit
    return good > 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("queue", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", default="0", help="comma-separated ids, or cpu")
    parser.add_argument("--per-gpu", type=int, default=1, help="runs at once on one GPU")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds for all runs together")
    parser.add_argument(
        "--done", type=Path, nargs="*", default=[], metavar="FILE", help="rows from earlier: those runs are skipped"
    )
    parser.add_argument("--run-limit", type=float, default=900.0, help="seconds after which a run is killed")
    parser.add_argument("--only", default="", help="comma-separated names; the rest of the queue is left out")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="override for every run")
    parser.add_argument("--smoke", type=int, default=0, metavar="N", help="first try N entries for 40 steps")
    parser.add_argument("--unpack", action="append", default=[], metavar="TAR:DIR", help="extract first")
    args = parser.parse_args(argv)
    scout = Scout(args.out, args.overrides, args.budget, args.run_limit, args.done)

    def stop(number: int, frame: object) -> None:
        for child in scout.children:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    for item in args.unpack:
        archive, _, folder = item.partition(":")
        unpack(Path(archive), Path(folder))
    entries = [entry for file in args.queue for entry in read_queue(file)]
    if args.only:
        entries = [entry for entry in entries if entry["name"] in args.only.split(",")]
        if lost := {entry["start"] for entry in entries if "start" in entry} - {entry["name"] for entry in entries}:
            raise SystemExit(f"--only: name {', '.join(sorted(lost))} too, where others start from")
    left = [entry for entry in entries if entry["name"] not in scout.have]
    scout.needed = {entry["start"] for entry in left if "start" in entry}
    scout.tokens = {entry["name"]: tokens_of(entry, args.overrides) for entry in entries}
    if len(scout.tokens) < len(entries):
        raise SystemExit("a name comes in two queues")
    gpus = args.gpus.split(",")
    if args.smoke and not smoke(scout, entries, gpus, args.smoke):
        print("every smoke run failed; the queue is not started", flush=True)
        return 1
    jobs: queue.Queue[dict[str, Any]] = queue.Queue()
    for entry in entries:
        jobs.put(entry)
    # GPUs alternate, so that the first runs spread over all of them.
    slots = [gpu for _ in range(args.per_gpu) for gpu in gpus]
    threads = [threading.Thread(target=scout.worker, args=(gpu, jobs)) for gpu in slots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = table(args.out / "rows.jsonl")
    (args.out / "table.txt").write_text(text)
    scout.note()
    print(text)
    for name, reason in scout.failed.items():
        print(f"failed {name}: {reason}")
    if scout.skipped:
        print("not started:", " ".join(scout.skipped))
    return 1 if scout.failed else 0


if __name__ == "__main__":
    sys.exit(main())
