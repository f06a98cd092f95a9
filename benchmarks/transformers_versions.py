"""Run the integration's tests on several versions of Transformers, each in a temporary environment, and record it.

    python benchmarks/transformers_versions.py --out benchmarks/results/transformers_versions.json 5.14.1 5.17.0 5.23.0

An environment holds the one Transformers and sees the packages of the Python that runs this script for everything else.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = [
    "tests/test_transformers.py", "tests/test_transformers_models.py", "tests/test_transformers_steps.py",
    "tests/test_evaluate.py",
]  # fmt: skip


def run(version: str, folder: Path) -> dict[str, object]:
    venv.create(folder, with_pip=True)
    python = str(folder / "bin/python")
    where = [python, "-c", 'import sysconfig; print(sysconfig.get_path("purelib"))']
    site = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    (site / "zz_base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"transformers=={version}"]
    subprocess.run(install, check=True)
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    tests = subprocess.run(
        [python, "-m", "pytest", "-p", "no:cacheprovider", "-rfE", *TESTS],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    said = subprocess.run(
        [python, "-c", "import transformers, torch; print(transformers.__version__, torch.__version__)"],
        env=env, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", tests.stdout, flags=re.M)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", tests.stdout)}
    return {"transformers": said[0], "torch": said[1], "exit": tests.returncode, **counts, "failures": failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for version in args.versions:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(version, Path(folder)))
        print(rows[-1], flush=True)
    record = {
        "tests": TESTS, "runs": rows, "python": sys.version.split()[0], "commit": os.environ.get("FLASH_SFA_COMMIT"),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(any(row["exit"] for row in rows))


if __name__ == "__main__":
    main()
