"""Run Transformers' own model tests for Llama, Qwen3 and GPT-2 with "sfa" at topk = head_dim, and record the outcome.

    python benchmarks/transformers_own_tests.py --out benchmarks/results/transformers_own_tests.json [--source DIR]

The tests come from the source distribution of the installed version on the package index (or from --source, a checkout
at that tag), are unpacked into a temporary folder and are not kept. The distribution holds the common model tests
(``ModelTesterMixin``) but neither the generation tests nor each model's own file; what is missing is replaced by empty
classes, and said in the record. A test that fails is run again with "sdpa": only what "sfa" breaks counts against it.
Needs: pytest, parameterized.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

STUBS = {
    "exporters/test_export.py": "ExportTesterMixin",
    "generation/test_utils.py": "GenerationTesterMixin",
}
MODULE = """
import os
import unittest

import torch
import transformers as hf
from .test_modeling_common import ModelTesterMixin, ids_tensor
from flash_sfa.integrations.transformers import register_sfa

register_sfa()
SMALL = dict(vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
             head_dim=8)
GPT2 = dict(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=98, eos_token_id=98,
            pad_token_id=98)


class Tester:
    batch_size, seq_length, is_training = 4, 7, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99
    encoder_seq_length = key_length = 7

    def __init__(self, kind, options):
        self.kind, self.options = kind, options

    def get_config(self):
        config = self.kind(**self.options)
        config.sfa = {"topk": 8}
        config._attn_implementation = os.environ["ATTENTION"]
        return config

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], 99)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Base(ModelTesterMixin):
    def setUp(self):
        self.model_tester = Tester(self.kind, self.options)


class LlamaTest(Base, unittest.TestCase):
    kind, options = hf.LlamaConfig, SMALL
    all_model_classes = (hf.LlamaModel, hf.LlamaForCausalLM, hf.LlamaForSequenceClassification)


class Qwen3Test(Base, unittest.TestCase):
    kind, options = hf.Qwen3Config, SMALL
    all_model_classes = (hf.Qwen3Model, hf.Qwen3ForCausalLM, hf.Qwen3ForSequenceClassification)


class GPT2Test(Base, unittest.TestCase):
    kind, options = hf.GPT2Config, GPT2
    all_model_classes = (hf.GPT2Model, hf.GPT2LMHeadModel, hf.GPT2ForSequenceClassification)
"""


def unpack(source: Path | None, folder: Path) -> list[str]:
    """The tests of the installed version below ``folder``; the files that had to be replaced."""
    if source is None:
        get = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary"]
        subprocess.run(
            [*get, ":all:", "-d", str(folder), f"transformers=={transformers.__version__}"], check=True, cwd=folder
        )
        (archive,) = folder.glob("transformers-*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, [m for m in tar.getmembers() if "/tests/" in m.name], filter="data")
        (source,) = (path for path in folder.glob("transformers-*") if path.is_dir())
    shutil.copytree(source / "tests", folder / "tests")
    replaced = []
    for name, kind in STUBS.items():
        file = folder / "tests" / name
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            (file.parent / "__init__.py").touch()
            file.write_text(f"class {kind}:\n    pass\n")
            replaced.append(name)
    (folder / "tests/__init__.py").touch()
    (folder / "tests/test_with_sfa.py").write_text(MODULE)
    return replaced


def run(folder: Path, attention: str, tests: list[str]) -> tuple[dict[str, int], dict[str, str]]:
    """Counts, and the first line of each failure."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rfE", "--timeout=300", *tests],
        cwd=folder, env=os.environ | {"ATTENTION": attention, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    failed = dict(re.findall(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?", done.stdout, flags=re.M))
    if not counts:
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
    return counts, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", type=Path, help="a checkout of the repository at the installed version's tag")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        replaced = unpack(args.source, folder)
        counts, failed = run(folder, "sfa", ["tests/test_with_sfa.py"])
        again = run(folder, "sdpa", list(failed))[1] if failed else {}
    record = {
        "transformers": transformers.__version__, "python": sys.version.split()[0], "replaced_by_nothing": replaced,
        "with_sfa": counts, "fails_with_sdpa_too": sorted(again),
        "fails_with_sfa_only": {test: text for test, text in failed.items() if test not in again},
        "commit": os.environ.get("FLASH_SFA_COMMIT"),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
