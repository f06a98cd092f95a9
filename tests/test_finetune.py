"""Adapting: the regularised loss against a plain computation, checkpointing, schedules, resume, DDP, the command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from flash_sfa import sfa_attention
from flash_sfa.cli import main
from flash_sfa.integrations.adapt import AdaptTrainer
from flash_sfa.integrations.transformers import enable_sfa

TEXT = "".join(f"{i} the quick brown fox; {i * 7} jumps over the lazy dog\n" for i in range(200))


def tiny(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0,
        initializer_range=0.3, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch_of_rows(n=4, length=12):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(n):
        ids = torch.randint(1, 256, (length,), generator=generator)
        mask = torch.ones(length, dtype=torch.int64)
        mask[: 2 * i] = 0  # left padding, another amount in each row
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return rows


def arguments(folder, **options):
    return TrainingArguments(
        str(folder), **({"max_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no",
                         "max_grad_norm": 0.0, "disable_tqdm": True, "logging_steps": 1} | options),
    )  # fmt: skip


def trained(folder, model, rows, **options):
    """The gradient of one step, as SGD with rate 1 subtracts it, and the trainer."""
    ours = {n: options.pop(n) for n in ("regulariser", "regulariser_end", "topk_from", "topk_steps") if n in options}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    flat = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1.0)
    trainer = AdaptTrainer(
        model, arguments(folder, **options), train_dataset=rows, optimizers=(sgd, flat), data_collator=torch_stack,
        **ours,
    )  # fmt: skip
    trainer.train()
    return {n: before[n] - p.detach() for n, p in model.named_parameters()}, trainer


def torch_stack(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def plain_gradient(rows, weight, topk=3):
    """LM loss + weight * R, by the equations: attention of every layer twice, through the eager reference."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    model, terms = tiny(), []
    inputs = torch_stack(rows)
    real = inputs["attention_mask"].bool()

    def attend(module, q, k, v, mask, *, scaling, **kwargs):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        options = {"attn_mask": mask, "softmax_scale": scaling, "impl": "reference"}
        sparse = sfa_attention(q, k, v, topk=topk, **options)
        dense = sfa_attention(q, k, v, topk=q.shape[-1], **options).detach()
        terms.append((((sparse - dense) ** 2).sum(-1).mean(-1) * real).sum() / real.sum())
        return sparse, None

    AttentionInterface.register("plain_test", attend)
    AttentionMaskInterface.register("plain_test", lambda *a, **k: sdpa_mask(*a, **{**k, "allow_is_causal_skip": False}))
    model.set_attn_implementation("plain_test")
    loss = model(**inputs).loss + weight * sum(terms)
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}, float(sum(term.detach() for term in terms))


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    ],
    ids=["whole", "accumulated", "checkpointed"],
)  # fmt: skip
def test_gradient_is_that_of_the_equations(options, tmp_path):
    rows = batch_of_rows()
    wanted, regulariser = plain_gradient(rows, 0.7)
    model = enable_sfa(tiny(), topk=3)
    got, trainer = trained(tmp_path, model, rows, regulariser=0.7, **options)
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, atol=1e-5 * float(grad.abs().max()), rtol=1e-3)
    name, without = "model.layers.0.self_attn.q_proj.weight", plain_gradient(rows, 0.0)[0]
    assert (wanted[name] - without[name]).norm() > 1e-2 * without[name].norm()
    (log,) = [entry for entry in trainer.state.log_history if "lm_loss" in entry]
    assert log["regulariser"] == pytest.approx(regulariser, rel=1e-4)
    assert log["loss"] == pytest.approx(log["lm_loss"] + 0.7 * log["regulariser"], rel=1e-4)
    assert 0 < log["overlap"] <= 1 and 0 < log["balance"] <= 1 and log["topk"] == 3 and log["lambda"] == 0.7
    assert model.config._attn_implementation == "sfa"


def test_schedules(tmp_path):
    model = enable_sfa(tiny(), topk=2)
    seen = []
    rows = batch_of_rows(8)
    _, trainer = trained(
        tmp_path, model, rows, max_steps=5, per_device_train_batch_size=2, regulariser=1.0, regulariser_end=0.0,
        topk_from=8, topk_steps=4,
    )  # fmt: skip
    for entry in trainer.state.log_history:
        if "lm_loss" in entry:
            seen.append((entry["topk"], entry["lambda"]))
    assert [topk for topk, _ in seen] == [8, 6, 4, 3, 2]
    assert model.config.sfa["topk"] == 2
    assert [round(value, 2) for _, value in seen] == [0.75, 0.5, 0.25, 0.0, 0.0]


def test_bad_input(tmp_path):
    rows = batch_of_rows()
    with pytest.raises(ValueError, match="SFA is not enabled"):
        AdaptTrainer(tiny(), arguments(tmp_path), train_dataset=rows)
    model = enable_sfa(tiny(), topk=3)
    for options, match in (
        ({"regulariser": -1.0}, "regulariser must be"), ({"regulariser": float("nan")}, "regulariser must be"),
        ({"topk_from": 2, "topk_steps": 3}, "topk_from must be from 3"), ({"topk_from": 9, "topk_steps": 3}, "8"),
        ({"topk_from": 8}, "topk_steps must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            AdaptTrainer(model, arguments(tmp_path), train_dataset=rows, **options)
    reentrant = arguments(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    )  # fmt: skip
    with pytest.raises(ValueError, match="use_reentrant"):
        AdaptTrainer(model, reentrant, train_dataset=rows, regulariser=0.1)
    with pytest.raises(ValueError, match="one int"):
        AdaptTrainer(
            enable_sfa(tiny(), topk=(None, 3)), arguments(tmp_path), train_dataset=rows, topk_from=8, topk_steps=2
        )


@pytest.fixture
def dense(tmp_path):
    tiny().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def command(folder, out, *more):
    return [
        "finetune", str(folder / "dense"), "--tokenizer", "bytes", "--text", str(folder / "text.txt"), "--out",
        str(folder / out), "--topk", "3", "--steps", "6", "--batch", "2", "--length", "32", "--device", "cpu", "--lr",
        "1e-2", "--warmup", "1", "--log-steps", "2", "--save-steps", "3", *more,
    ]  # fmt: skip


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def test_the_command_learns_resumes_and_saves(dense, capsys):
    assert main(command(dense, "a", "--eval-text", str(dense / "text.txt"))) == 0
    said = capsys.readouterr().out
    figures = [float(line.split("perplexity ")[1].split()[0]) for line in said.splitlines() if "perplexity" in line]
    assert len(figures) == 3 and figures[2] < 0.9 * figures[1]
    config = json.loads((dense / "a" / "model" / "config.json").read_text())
    assert config["sfa"]["topk"] == 3
    log = [json.loads(line) for line in (dense / "a" / "log.jsonl").read_text().splitlines()]
    assert {"loss", "lm_loss", "regulariser", "overlap", "balance", "topk", "lambda"} <= set(log[0])

    # Stopped after three of six steps and resumed: the same weights.
    assert main(command(dense, "b")) == 0
    whole = weights(dense / "b")
    for name in ("checkpoint-6", "model"):
        for file in sorted((dense / "b" / name).iterdir()):
            file.unlink()
        (dense / "b" / name).rmdir()
    assert main(command(dense, "b", "--resume")) == 0
    for name, value in weights(dense / "b").items():
        assert torch.equal(value, whole[name]), name

    assert main(command(dense, "b")) == 2 and "--resume" in capsys.readouterr().err
    assert main(command(dense, "b", "--resume", "--lr", "1e-3")) == 2 and "lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (["--steps", "0"], "--steps"), (["--topk", "0"], "topk"), (["--topk", "9"], None), (["--lr", "0"], "--lr"),
        (["--length", "4096"], "positions"), (["--fsdp"], "torchrun"), (["--resume"], "--resume"),
        (["--regulariser", "-1"], "regulariser"),
        (["--topk-from", "2", "--topk-steps", "2"], "topk_from"), (["--text", "missing.txt"], "missing.txt"),
    ],
    ids=str,
)  # fmt: skip
def test_one_line_for_a_mistake(change, text, dense, capsys):
    status = main(command(dense, "bad", *change))
    if text is None:
        assert status == 0  # topk above the head dim keeps everything
        return
    said = capsys.readouterr().err.strip()
    assert status == 2 and len(said.splitlines()) == 1 and text in said
    assert not (dense / "bad").exists()


def test_lora(dense, capsys):
    try:
        import peft  # noqa: F401
    except ImportError:
        assert main(command(dense, "l", "--lora", "4")) == 2 and "peft" in capsys.readouterr().err
        return
    before = tiny().state_dict()
    assert main(command(dense, "l", "--lora", "4")) == 0
    after = weights(dense / "l")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed and all("proj" in name for name in changed)  # merged, and nothing else moved


def test_two_processes_train_like_one(dense):
    """Two micro-batches on one process, or one on each of two: the same tokens a step, the same weights."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    assert main(command(dense, "one", "--batch", "4", "--seed", "3")) == 0
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "flash_sfa.cli", *command(dense, "two", "--seed", "3")],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = weights(dense / "one"), weights(dense / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-4, rtol=1e-3)
    logs = [[json.loads(x) for x in (dense / n / "log.jsonl").read_text().splitlines()] for n in ("one", "two")]
    for a, b in zip(*logs):
        for name in ("loss", "lm_loss", "regulariser"):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-3)
    assert Path(dense / "two" / "model" / "config.json").is_file()


def test_example(tmp_path):
    done = subprocess.run(
        [sys.executable, Path(__file__).parent.parent / "examples" / "adapt.py", "--quick", "--out", tmp_path / "run"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    (saved,) = [line.split()[-1] for line in lines if line.startswith("SFA, 10 steps, regularised")]
    assert saved == "33%" and lines[-1].startswith("Lost is against")
