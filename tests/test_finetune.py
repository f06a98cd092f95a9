"""Adapting: the regularised loss against a plain computation, checkpointing, schedules, resume, DDP, the command."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from flash_sfa import finetune, sfa_attention
from flash_sfa.cli import UsageError, main
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
    names = ("regulariser", "regulariser_end", "topk_from", "topk_steps", "data_collator", "callbacks")
    ours = {"data_collator": torch_stack} | {n: options.pop(n) for n in names if n in options}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    flat = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1.0)
    trainer = AdaptTrainer(
        model, arguments(folder, **options), train_dataset=rows, optimizers=(sgd, flat), **ours
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
    assert [round(value, 2) for _, value in seen] == [1.0, 0.75, 0.5, 0.25, 0.0]


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "lm_loss" in entry]


def test_a_log_is_of_its_steps(tmp_path):
    """Losses are means over a window's steps, R over those with lambda above 0; the rest is of the last step."""
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "regulariser": 1.0, "regulariser_end": 0.0}
    runs = []
    for every in (1, 3):
        model = enable_sfa(tiny(), topk=2)
        runs.append(logged(trained(tmp_path, model, batch_of_rows(8), logging_steps=every, **options)[1]))
    (first, second, third), (window,) = runs
    assert "regulariser" not in third and third["lambda"] == 0.0
    assert window["regulariser"] == pytest.approx((first["regulariser"] + second["regulariser"]) / 2, rel=1e-5)
    assert window["lm_loss"] == pytest.approx(sum(x["lm_loss"] for x in runs[0]) / 3, rel=1e-5)
    assert len({entry["balance"] for entry in runs[0]}) == 3
    for name in ("overlap", "balance", "lambda"):
        assert window[name] == third[name]


def test_dropout_is_no_error_of_sparse_attention(tmp_path):
    def step(p, topk, weight):
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=256, n_embd=32, n_layer=1, n_head=4, n_positions=64, attn_pdrop=p, resid_pdrop=0.0,
            embd_pdrop=0.0, initializer_range=0.3,
        )  # fmt: skip
        model = enable_sfa(transformers.GPT2LMHeadModel(config), topk=topk)
        gradient, trainer = trained(tmp_path, model, batch_of_rows(), regulariser=weight)
        return gradient["transformer.h.0.attn.c_attn.weight"], logged(trainer)[0]

    assert step(0.1, 8, 1.0)[1]["regulariser"] < 1e-6
    gradient, log = step(0.1, 3, 1.0)
    whole_gradient, whole = step(0.0, 3, 1.0)
    assert log["regulariser"] == pytest.approx(whole["regulariser"], rel=1e-5) and whole["regulariser"] > 0.01
    assert abs(log["lm_loss"] - whole["lm_loss"]) > 1e-3  # which has the dropout
    # The gradient of R is that of the model without dropout.
    got, wanted = gradient - step(0.1, 3, 0.0)[0], whole_gradient - step(0.0, 3, 0.0)[0]
    torch.testing.assert_close(got, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-3)


def packed_rows():
    return [{"input_ids": row["input_ids"].tolist()} for row in batch_of_rows()]


def test_packed_documents_do_not_see_each_other(tmp_path):
    """cu_seq_lens alone say where documents end: to the regulariser's dense attention, and to dense layers."""
    flat = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=False)
    model = enable_sfa(tiny(), topk=8)
    _, trainer = trained(
        tmp_path, model, packed_rows(), regulariser=1.0, data_collator=flat, per_device_train_batch_size=4
    )  # fmt: skip
    assert logged(trainer)[0]["regulariser"] < 1e-6
    for window in (None, 5):
        model = tiny() if window is None else windowed(window)
        model = enable_sfa(model.eval(), topk=8, layers=[0])  # all features: rotated ones depend on the position
        packed = flat(packed_rows())
        packed.pop("labels")
        with torch.no_grad():
            together = model(**packed, use_cache=False).logits[0].split(12)
            for row, logits in zip(packed_rows(), together):
                alone = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
                torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)


def windowed(size):
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, sliding_window=size, initializer_range=0.3,
    )  # fmt: skip
    return transformers.MistralForCausalLM(config)


def test_attention_without_a_layer_number_is_regularised(tmp_path):
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=256, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64, dropout=0.0,
        attention_dropout=0.0, initializer_range=0.3,
    )  # fmt: skip
    model = enable_sfa(transformers.DistilBertForMaskedLM(config), topk=3)
    (log,) = logged(trained(tmp_path, model, batch_of_rows(), regulariser=0.7)[1])
    assert log["regulariser"] > 0.01
    assert log["loss"] == pytest.approx(log["lm_loss"] + 0.7 * log["regulariser"], rel=1e-4)


def test_a_lost_regulariser_raises(tmp_path):
    class Switch(transformers.TrainerCallback):
        def on_step_begin(self, *args, model, **kwargs):
            model.config._attn_implementation_internal = "sfa"

    rows = batch_of_rows()
    with pytest.raises(ValueError, match="there is no R"):
        trained(tmp_path, enable_sfa(tiny(), topk=3), rows, regulariser=0.7, callbacks=[Switch()])
    model = enable_sfa(tiny(), topk=3)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        trained(tmp_path, model, rows, regulariser=0.7)


def test_bad_input(tmp_path):
    rows = batch_of_rows()
    with pytest.raises(ValueError, match="SFA is not enabled"):
        AdaptTrainer(tiny(), arguments(tmp_path), train_dataset=rows)
    model = enable_sfa(tiny(), topk=3)
    for options, match in (
        ({"regulariser": -1.0}, "regulariser must be"), ({"regulariser": float("nan")}, "regulariser must be"),
        ({"topk_from": 2, "topk_steps": 3}, "topk_from must be from 3"), ({"topk_from": 9, "topk_steps": 3}, "8"),
        ({"topk_from": 8}, "topk_steps must be"), ({"topk_steps": 1}, "needs topk_from"),
        ({"topk_from": 8, "topk_steps": 1}, "below the 1 steps"),
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
    epoch = arguments(tmp_path, max_steps=-1, num_train_epochs=1, per_device_train_batch_size=2)  # 2 steps
    with pytest.raises(ValueError, match="below the 2 steps"):
        AdaptTrainer(model, epoch, train_dataset=rows, topk_from=8, topk_steps=2).train()
    two = arguments(tmp_path)
    two._n_gpu = 2
    with pytest.raises(ValueError, match="several GPUs need torchrun"):
        AdaptTrainer(model, two, train_dataset=rows)


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


def weights(folder, name="model"):
    from safetensors.torch import load_file

    return load_file(folder / name / "model.safetensors")


def test_the_command_learns_resumes_and_saves(dense, capsys):
    assert main(command(dense, "a", "--eval-text", str(dense / "text.txt"))) == 0
    said = capsys.readouterr().out
    figures = [float(line.split("perplexity ")[1].split()[0]) for line in said.splitlines() if "perplexity" in line]
    assert len(figures) == 3 and figures[2] < 0.9 * figures[1]
    config = json.loads((dense / "a" / "model" / "config.json").read_text())
    assert config["sfa"]["topk"] == 3
    log = [json.loads(line) for line in (dense / "a" / "log.jsonl").read_text().splitlines()]
    assert {"loss", "lm_loss", "regulariser", "overlap", "balance", "topk", "lambda"} <= set(log[0])

    # Stopped after three of six steps and resumed: the same weights, and each step logged once.
    assert main(command(dense, "b")) == 0
    whole = weights(dense / "b")
    with (dense / "b" / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    for name in ("checkpoint-6", "model"):
        for file in sorted((dense / "b" / name).iterdir()):
            file.unlink()
        (dense / "b" / name).rmdir()
    assert main(command(dense, "b", "--resume")) == 0
    for name, value in weights(dense / "b").items():
        assert torch.equal(value, whole[name]), name
    again = [json.loads(line) for line in (dense / "b" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in again] == [entry["step"] for entry in log] == [2, 4, 6, 6]

    assert main(command(dense, "b")) == 2 and "--resume" in capsys.readouterr().err
    assert main(command(dense, "b", "--resume", "--lr", "1e-3")) == 2 and "lr" in capsys.readouterr().err
    (dense / "text.txt").write_text(TEXT.replace("fox", "dog"))
    assert main(command(dense, "b", "--resume")) == 2 and "text_sha256" in capsys.readouterr().err
    for content in ("{", "3"):
        (dense / "b" / "finetune.json").write_text(content)
        assert main(command(dense, "b", "--resume")) == 2
        said = capsys.readouterr().err.strip()
        assert "finetune.json cannot be read" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(("more", "dtype"), [([], torch.bfloat16), (["--dtype", "float32"], torch.float32)], ids=str)
def test_saved_in_the_dtype_that_was_loaded(more, dtype, dense):
    model = tiny(tie_word_embeddings=True).bfloat16()
    model.save_pretrained(dense / "dense")
    assert main(command(dense, "x", "--steps", "2", "--save-steps", "2", *more)) == 0
    saved, before = weights(dense / "x"), model.state_dict()
    assert {value.dtype for value in saved.values()} == {dtype} and "lm_head.weight" not in saved
    assert json.loads((dense / "x" / "model" / "config.json").read_text())["dtype"] == str(dtype)[6:]
    name = "model.layers.0.self_attn.q_proj.weight"
    master = weights(dense / "x", "checkpoint-2")[name]
    assert master.dtype == torch.float32 and not torch.equal(saved[name], before[name].to(dtype))
    assert torch.equal(saved[name], master.to(dtype))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (["--steps", "0"], "--steps"), (["--topk", "0"], "topk"), (["--topk", "9"], None), (["--lr", "0"], "--lr"),
        (["--length", "4096"], "positions"), (["--fsdp"], "torchrun"), (["--resume"], "--resume"),
        (["--regulariser", "-1"], "regulariser"),
        (["--topk-from", "2", "--topk-steps", "2"], "topk_from"), (["--text", "missing.txt"], "missing.txt"),
        (["--topk-steps", "2"], "topk_from"), (["--topk-from", "8", "--topk-steps", "6"], "below the 6 steps"),
        (["--device", "nonsense"], "--device nonsense"), (["--device", "cuda:99", "--bf16"], "--device cuda:99"),
        (["--device", "meta"], "--device meta"),
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


def test_out_below_a_file(dense, capsys):
    for out in (dense / "text.txt", dense / "text.txt" / "run"):
        assert main(command(dense, "bad", "--out", str(out))) == 2
        said = capsys.readouterr().err.strip()
        assert "--out" in said and "text.txt is not a folder" in said and len(said.splitlines()) == 1


def test_options_of_the_sparse_cache_are_not_taken(dense, capsys):
    for more in (["--tolerance", "0.1"], ["--v-dtype", "int8"]):
        with pytest.raises(SystemExit):
            main(command(dense, "bad", *more))
        assert "unrecognized arguments" in capsys.readouterr().err


def test_the_command_takes_one_gpu(tmp_path, monkeypatch):
    """On a machine with two, and with no GPU here: what the Trainer's arguments would say there."""

    class Two:
        device = torch.device("cuda", 0)
        n_gpu = property(lambda self: self._n_gpu)

        def __init__(self, *args, **kwargs):
            self._n_gpu = 2

    monkeypatch.setattr(finetune, "import_transformers", lambda: SimpleNamespace(TrainingArguments=Two))
    parser = argparse.ArgumentParser()
    finetune.add_arguments(parser)
    line = ["dense", "--text", "x", "--out", str(tmp_path / "run"), "--device"]
    for device in ("cuda", "cuda:0"):
        assert finetune._options(parser.parse_args([*line, device])).n_gpu == 1
    with pytest.raises(UsageError, match="the Trainer takes cuda:0"):
        finetune._options(parser.parse_args([*line, "cuda:1"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="without an index"):
        finetune._options(parser.parse_args([*line, "cuda:0"]))


def test_lora(dense):
    before = tiny().state_dict()
    assert main(command(dense, "l", "--lora", "4")) == 0
    after = weights(dense / "l")
    assert set(after) == set(before)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "_proj" in name}  # merged, and nothing else moved
    for name in changed:
        assert torch.linalg.matrix_rank(after[name].double() - before[name].double(), rtol=1e-4) <= 4
    whole = weights(dense / "l")
    (dense / "l" / "checkpoint-6").rename(dense / "later")
    assert main(command(dense, "l", "--lora", "4", "--resume")) == 0
    for name, value in weights(dense / "l").items():
        assert torch.equal(value, whole[name]), name


def test_lora_without_peft(dense, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(command(dense, "l", "--lora", "4")) == 2
    assert "flash-sfa[lora]" in capsys.readouterr().err and not (dense / "l").exists()


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
