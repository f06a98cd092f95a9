"""Run a test file's cases in a process of their own.

Triton's interpreter must be chosen before kernels are defined, and excludes its compiler. So a file runs itself, prints
one line of JSON, and its tests read the outcome of every case from there.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def outcomes_of(file: str, *, interpret: bool) -> dict[str, Any]:
    """What `file`, run as a script, prints as its last line; in Triton's interpreter or not."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if interpret:
        env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    src = str(Path(__file__).parent.parent / "src")
    env["PYTHONPATH"] = os.pathsep.join(p for p in (src, env.get("PYTHONPATH")) if p)
    process = subprocess.run([sys.executable, file], env=env, capture_output=True, text=True, timeout=280)
    assert process.returncode == 0, process.stderr[-3000:]
    return dict(json.loads(process.stdout.splitlines()[-1]))


def print_outcomes(cases: Mapping[str, Callable[[], None]]) -> None:
    """Run every case; print "ok" or the end of its traceback by name."""
    results = {}
    for name, case in cases.items():
        try:
            case()
            results[name] = "ok"
        except Exception:
            results[name] = traceback.format_exc(limit=4)
    print(json.dumps(results))
