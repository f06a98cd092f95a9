"""``flash-sfa demo``: train small language models on real text and compare dense and sparse attention."""
