"""Run one command and record it: device, versions, commit, wall time, exit status and the end of its output.

python benchmarks/record.py --out benchmarks/results/gpu_tests.json --commit COMMIT -- pytest -m gpu -q
"""

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path

from flash_sfa.env import collect


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True, help="the commit that is measured")
    parser.add_argument("--lines", type=int, default=60, help="lines of output to keep")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command

    started = time.time()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    for line in process.stdout or ():
        sys.stdout.write(line)
        sys.stdout.flush()
        lines.append(line.rstrip())
    record = {
        "command": " ".join(command),
        "exit_status": process.wait(),
        "seconds": round(time.time() - started, 1),
        "time": datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(timespec="seconds"),
        "commit": args.commit,
        "environment": collect(),
        "output_end": lines[-args.lines :],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(record["exit_status"])


if __name__ == "__main__":
    sys.exit(main())
