"""The command line, the environment report and what importing costs."""

import json
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flash_sfa.cli import main

ROOT = Path(__file__).parent.parent


def python(code, *, path=None, check=True):
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(str(p) for p in (path, ROOT / "src") if p), "HOME": "/tmp"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=check)


def test_env_prints_implementations(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for name in ("reference", "sdpa", "cpu", "triton", "cuda", "intersect"):
        assert name in out
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["implementations"]["sdpa"].startswith("available")


@pytest.mark.parametrize("broken", ["torch", "triton"])
def test_env_works_with_a_broken_package(broken, tmp_path):
    (tmp_path / f"{broken}.py").write_text("raise OSError('libbroken.so: cannot open')\n")
    run = python("from flash_sfa.cli import main; main(['env', '--json'])", path=tmp_path)
    report = json.loads(run.stdout)
    assert "libbroken.so" in report["packages"][broken]
    assert "not available" in report["implementations"]["triton"]
    assert report["implementations"]["sdpa"].startswith("not available" if broken == "torch" else "available")


def test_help_and_version_do_not_import_torch():
    run = python("import sys\nfrom flash_sfa.cli import main\ntry:\n main(['--version'])\nexcept SystemExit: pass\n"
                 "assert 'torch' not in sys.modules")  # fmt: skip
    assert "flash-sfa" in run.stdout


def test_usage_errors_exit_2(capsys):
    assert main(["demo", "--text", "/does/not/exist"]) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1 and "/does/not/exist" in err
    with pytest.raises(SystemExit) as error:
        main(["nonsense"])
    assert error.value.code == 2


def test_import_is_light():
    code = (
        "import time, torch, sys; t = time.perf_counter(); import flash_sfa; flash_sfa.sfa_attention; "
        "flash_sfa.SparseKVCache; print(time.perf_counter() - t); "
        "assert 'transformers' not in sys.modules and 'triton' not in set(sys.modules) - before"
    )
    code = code.replace("t = time", "before = set(sys.modules); t = time", 1)
    times = [float(python(code).stdout) for _ in range(3)]
    assert statistics.median(times) <= 0.3


def test_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = {d.split(">")[0].split("=")[0] for d in project["project"]["dependencies"]}
    assert names == {"torch", "numpy"}
    assert not any("torch" in r for r in project["build-system"]["requires"])
    assert all("<" not in d for d in project["project"]["dependencies"])
