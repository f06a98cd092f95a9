"""Shared settings: one thread, and a line that says which torch.compile backends ran."""

import os
import shutil

# Spinning OpenMP threads slow a machine with few cores down; set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

torch.set_num_threads(max(1, min(2, os.cpu_count() or 1)))


def pytest_terminal_summary(terminalreporter):
    compiler = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    inductor = f"inductor ({compiler})" if compiler else "inductor NOT (no C++ compiler)"
    terminalreporter.write_line(f"torch.compile was tested with: aot_eager, {inductor}")
