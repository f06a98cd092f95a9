"""Shared settings: one thread policy, and a line that says which torch.compile backends were tested."""

import os

# Spinning OpenMP threads slow a machine with few cores down; set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

torch.set_num_threads(max(1, min(2, os.cpu_count() or 1)))

BACKENDS = ("aot_eager", "inductor")


@pytest.fixture
def poisoned_memory():
    """Fresh memory holds NaN, so that a row read before it was written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_terminal_summary(terminalreporter):
    """Passed tests by the backend that their parameters name."""
    passed = [
        report.nodeid.rpartition("[")[2].rstrip("]").split("-")
        for report in terminalreporter.getreports("passed")
        if report.when == "call" and report.nodeid.endswith("]")
    ]
    counts = {name: sum(name in parts for parts in passed) for name in BACKENDS}
    if any(counts.values()):
        said = ", ".join(f"{name} {count or 'none'}" for name, count in counts.items())
        terminalreporter.write_line(f"torch.compile, passed tests by backend: {said}")
