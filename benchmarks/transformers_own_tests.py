"""Run Transformers' own model and generation tests for Llama, Qwen3 and GPT-2 with "sfa" at topk = head_dim.

    python benchmarks/transformers_own_tests.py --out benchmarks/results/transformers_own_tests.json \\
        --source CHECKOUT --source-name "what CHECKOUT is"

The tests come from the source distribution of the installed version on the package index. It holds the common model
tests (``ModelTesterMixin``) but not the generation tests (``GenerationTesterMixin``): what it lacks is taken from
--source, a checkout at the tag or as near to it as can be had; without one it is replaced by empty classes. Files are
put together in a temporary folder and are not kept. The export tests are left out. The models with a language head are
enabled by ``enable_sfa`` when they are made with attention "sfa", so their ``generate()`` keeps a sparse cache (some
tests ask for another attention). All tests run with "sfa" and with "sdpa"; only what "sfa" breaks counts against it.
Some want an instance of Transformers' own cache class, and many ask for "eager" attention to look at its weights: the
generation tests are run again with a sparse cache passing for one, and with "sfa" in place of "eager" but no look at
weights. Needs: pytest, pytest-timeout, parameterized.
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

import torch
import transformers

EXPORT = "class ExportTesterMixin:\n    pass\n\n\nclass ExportGenerateTesterMixin:\n    pass\n"
NO_GENERATION = "class GenerationTesterMixin:\n    pass\n"
MODULE = """
import functools
import json
import os
import unittest

import torch
import transformers as hf
from .generation import test_utils
from .generation.test_utils import GenerationTesterMixin
from .test_modeling_common import ModelTesterMixin, ids_tensor
from flash_sfa.integrations.transformers import SFACache, enable_sfa, register_sfa

register_sfa()


def enabled(kind):  # models of this class are enabled when they are made with attention "sfa"
    make = kind.__init__

    @functools.wraps(make)
    def __init__(self, config, *args, **kwargs):
        make(self, config, *args, **kwargs)
        if config._attn_implementation == "sfa":
            enable_sfa(self, topk=8)

    kind.__init__ = __init__
    return kind


made = {}  # the tests that made a sparse cache: whether a static one
make_cache = SFACache.__init__


def note_cache(self, *args, **kwargs):
    test = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].partition(" ")[0]
    made[test] = made.get(test, False) or kwargs.get("static", False)
    make_cache(self, *args, **kwargs)


SFACache.__init__ = note_cache


def tearDownModule():
    with open("caches.json", "w") as file:
        json.dump(made, file)


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


class Base(ModelTesterMixin, GenerationTesterMixin):
    def setUp(self):
        self.model_tester = Tester(self.kind, self.options)


if os.environ["RELAXED"]:  # a sparse cache passes for one of Transformers' own, and holds tokens instead of tensors

    class Passes(type):
        def __instancecheck__(cls, x):
            return isinstance(x, cls.own) or (isinstance(x, SFACache) and x.is_compileable == cls.static)

    for name, static in (("DynamicCache", False), ("StaticCache", True)):
        setattr(test_utils, name, Passes(name, (), {"own": getattr(hf, name), "static": static}))

    dense_check = Base._check_past_key_values_for_generate

    def check(self, batch_size, past_key_values, seq_length, config):
        if not isinstance(past_key_values, SFACache):
            return dense_check(self, batch_size, past_key_values, seq_length, config)
        layers = past_key_values.layers
        assert [layer.counts() for layer in layers] == [[seq_length] * batch_size] * len(layers)

    Base._check_past_key_values_for_generate = check
    Base.has_attentions = False


class LlamaTest(Base, unittest.TestCase):
    kind, options = hf.LlamaConfig, SMALL
    all_model_classes = (hf.LlamaModel, enabled(hf.LlamaForCausalLM), hf.LlamaForSequenceClassification)


class Qwen3Test(Base, unittest.TestCase):
    kind, options = hf.Qwen3Config, SMALL
    all_model_classes = (hf.Qwen3Model, enabled(hf.Qwen3ForCausalLM), hf.Qwen3ForSequenceClassification)


class GPT2Test(Base, unittest.TestCase):
    kind, options = hf.GPT2Config, GPT2
    all_model_classes = (hf.GPT2Model, enabled(hf.GPT2LMHeadModel), hf.GPT2ForSequenceClassification)
"""


def unpack(source: Path | None, folder: Path) -> list[str]:
    """The tests of the installed version below ``folder``; what came from ``source`` or is left out."""
    get = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
    subprocess.run([*get, f"transformers=={transformers.__version__}"], check=True, cwd=folder)
    (archive,) = folder.glob("transformers-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, [m for m in tar.getmembers() if "/tests/" in m.name], filter="data")
    (whole,) = (path for path in folder.glob("transformers-*") if path.is_dir())
    shutil.copytree(whole / "tests", folder / "tests")
    other = ["exporters: left out"]
    (folder / "tests/exporters").mkdir(exist_ok=True)
    (folder / "tests/exporters/__init__.py").touch()
    (folder / "tests/exporters/test_export.py").write_text(EXPORT)
    generation = folder / "tests/generation"
    if not (generation / "test_utils.py").exists():
        shutil.rmtree(generation, ignore_errors=True)
        if source is None:
            generation.mkdir()
            (generation / "test_utils.py").write_text(NO_GENERATION)
            other.append("generation: left out")
        else:
            shutil.copytree(source / "tests/generation", generation)
            other.append("generation: from --source")
        (generation / "__init__.py").touch()
    (folder / "tests/__init__.py").touch()
    (folder / "tests/test_with_sfa.py").write_text(MODULE)
    return other


def run(folder: Path, attention: str, *chosen: str, relaxed: bool = False) -> tuple[dict[str, int], dict[str, str]]:
    """Counts, and the first line of each failure."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rfE", "--timeout=300", *chosen],
        cwd=folder, capture_output=True, text=True,
        env=os.environ | {"ATTENTION": attention, "HF_HUB_OFFLINE": "1", "RELAXED": "1" * relaxed, "COLUMNS": "200"},
    )  # fmt: skip
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    failed = dict(re.findall(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?", done.stdout, flags=re.M))
    if not counts:
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
    return counts, failed


def with_cache(folder: Path) -> dict[str, list[str]]:
    """The tests of any model that made a sparse cache in the last run."""
    made = json.loads((folder / "caches.json").read_text())
    kinds = {"growing": False, "static": True}
    return {
        kind: sorted({t.partition("::")[2] for t, s in made.items() if s == static}) for kind, static in kinds.items()
    }


def without_eager(file: Path) -> None:
    """Many generation tests ask for "eager" to get attention weights; where they do not get them they need not."""
    text = file.read_text()
    for before, after in (
        ('config._attn_implementation = "eager"', 'config._attn_implementation = "sfa"'),
        ('attn_implementation="eager").to(', 'attn_implementation="sfa").to('),
    ):
        text = text.replace(before, after)
    file.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", type=Path, help="a checkout of Transformers, for what its distribution lacks")
    parser.add_argument("--source-name", help="what to call --source in the record: repository, commit, version")
    parser.add_argument("-k", dest="chosen", default="test", help="only these tests, as pytest's -k")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        other = unpack(args.source, folder)
        chosen = "-k", args.chosen, "tests/test_with_sfa.py"
        counts, failed = run(folder, "sfa", *chosen)
        sparse = with_cache(folder)
        dense_counts, dense_failed = run(folder, "sdpa", *chosen)
        only = {test: text for test, text in failed.items() if test not in dense_failed}
        again = {}
        if args.source is not None:
            without_eager(folder / "tests/generation/test_utils.py")
            again["counts"], again["failures"] = run(folder, "sfa", "-m", "generate", *chosen, relaxed=True)
            again["tests_that_made_a_sparse_cache"] = with_cache(folder)
    record = {
        "transformers": transformers.__version__, "torch": torch.__version__, "python": sys.version.split()[0],
        "not_of_the_distribution": other, "source": args.source_name, "with_sfa": counts, "with_sdpa": dense_counts,
        "tests_that_made_a_sparse_cache": sparse,
        "fails_with_both": sorted(failed.keys() & dense_failed.keys()),
        "fails_with_sfa_only": only,
        "generation_tests_again_with_a_sparse_cache_passing_for_transformers_own_and_without_eager": again,
        "fails_with_sdpa_only": sorted(dense_failed.keys() - failed.keys()),
        "commit": os.environ.get("FLASH_SFA_COMMIT"),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
