"""Learning-rate schedules as pure functions of the step number, so that resuming needs no state."""

import math

SCHEDULES = ("cosine", "wsd", "constant")


def learning_rate(
    step: int,
    *,
    total: int,
    peak: float,
    warmup: int,
    schedule: str = "cosine",
    floor: float = 0.1,
    decay: float = 0.2,
) -> float:
    """Learning rate of 0-based ``step`` of ``total``.

    Linear warm-up over ``warmup`` steps to ``peak``; then "cosine" falls to ``floor * peak`` at the end,
    "wsd"
    stays at the peak and falls linearly to ``floor * peak`` over the last ``decay`` share of all steps,
    "constant" stays.

    Raises:
        ValueError: an unknown schedule.

    Example:
        >>> from flash_sfa.train.schedule import learning_rate
        >>> learning_rate(4, total=100, peak=1.0, warmup=10)
        0.5
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "cosine":
        share = (step - warmup) / max(total - warmup, 1)
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))
    if schedule == "wsd":
        tail = max(round(total * decay), 1)
        left = min(max(total - step, 0) / tail, 1.0)
        return peak * (floor + (1 - floor) * left)
    return peak
