"""Ideas of recipes for training SFA: what each computes, its gradient, and that a step stays one graph."""

from pathlib import Path

import pytest
import torch

from flash_sfa.train import models
from flash_sfa.train.attention import (
    LayerAttention,
    balance_loss,
    codes_of,
    distill_loss,
    keep_topk,
    key_bytes,
    split_signs,
    topk_mask,
)
from flash_sfa.train.pretrain import make_task, pretrain
from flash_sfa.train.recipe import build_recipe
from test_train import data_root, text_file, tiny, tokenizer_dir  # noqa: F401 (fixtures)

IDEAS = [
    {"shrink": True},
    {"split_signs": True},
    {"anneal": 0.5},
    {"fade": 0.5},
    {"recent": 4},
    {"balance": 0.1},
    {"distill": 0.5},
    {"shrink": True, "anneal": 0.5, "recent": 4, "distill": 0.1},
]


def layer(topk: int = 3, **ideas: object) -> LayerAttention:
    return LayerAttention("sfa", topk_q=topk, topk_k=topk, **ideas)  # type: ignore[arg-type]


def test_shrink_is_continuous_and_passes_gradient_through_tau() -> None:
    x = torch.tensor([[3.0, -2.0, 1.0, -0.5, 0.1]], requires_grad=True)
    out = codes_of(x, 2, layer(2, shrink=True))
    assert torch.equal(out.detach(), torch.tensor([[2.0, -1.0, 0.0, 0.0, 0.0]]))
    (out * torch.tensor([[1.0, 10.0, 100.0, 100.0, 100.0]])).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[1.0, 10.0, 9.0, 0.0, 0.0]]))  # -1 * 1 + 1 * 10 to the next magnitude
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 16, generator=gen)
    for dims in ((), (0, 1)):
        at = LayerAttention("sfa", topk_q=4, dense_dims=dims, shrink=True)
        moved = codes_of(x + 1e-4, 4, at) - codes_of(x, 4, at)
        assert moved.abs().max() < 3e-4
        assert torch.equal(codes_of(x, 4, at)[:, : len(dims)], x[:, : len(dims)])
    assert torch.equal(codes_of(x, 16, layer(16, shrink=True)), x)


def test_split_signs_let_only_equal_signs_meet() -> None:
    q, k = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([2.0, -1.0, -4.0, 1.0])
    assert split_signs(q, ()) @ split_signs(k, ()) == 1 * 2 + 2 * 1 + 3 * 1
    assert split_signs(q, (0,)).tolist() == [1.0, 0.0, 0.5, 3.0, 2.0, 0.0, 0.0]
    assert key_bytes(64, layer(8, split_signs=True)) == 24 and key_bytes(256, layer(8, split_signs=True)) == 32


def test_anneal_ends_at_topk_and_begins_with_all() -> None:
    x = torch.randn(50, 16)
    at = LayerAttention("sfa", topk_k=2, dense_dims=(0, 1, 2), anneal=0.5, progress=torch.zeros(()))
    counts = []
    for share in (0.0, 0.2, 0.4, 0.5, 1.0):
        at.progress.fill_(share)
        out = codes_of(x, 2, at)
        counts.append(int((out != 0).sum(1).unique()))
        assert torch.equal(out, keep_topk(x, counts[-1] - 3, (0, 1, 2)))
    assert counts[0] == 16 and counts[3:] == [5, 5] and counts == sorted(counts, reverse=True) and counts[1] > 5
    at.progress = None
    assert torch.equal(codes_of(x, 2, at), keep_topk(x, 2, (0, 1, 2)))


def test_fade_scales_what_is_dropped() -> None:
    x = torch.randn(50, 16)
    at = layer(3, fade=0.5, progress=torch.tensor(0.25))
    assert torch.allclose(codes_of(x, 3, at), torch.where(topk_mask(x, 3), x, 0.5 * x))
    at.progress.fill_(0.7)
    assert torch.equal(codes_of(x, 3, at), keep_topk(x, 3))


def test_balance_is_least_when_even() -> None:
    even = torch.eye(8).repeat(4, 1).view(1, 1, 32, 8) * 3
    uneven = torch.zeros(1, 1, 32, 8)
    uneven[..., 0] = 3
    assert balance_loss(even, 1, ()) == pytest.approx(1) and balance_loss(uneven, 1, ()) > 3
    x = (torch.randn(2, 3, 64, 8) + torch.tensor([2.0] + [0.0] * 7)).requires_grad_()
    balance_loss(x, 2, ()).backward()
    assert (x.grad * x.sign())[..., 0].mean() > 0  # descending makes the feature of all smaller


def test_distill_is_the_divergence() -> None:
    q, k = (torch.randn(2, 2, 6, 8, requires_grad=True) for _ in range(2))
    loss = distill_loss(q, k, layer(3), 0.4, None)
    total = 0.0
    for h in range(2):
        for i in range(6):
            whole = (q[0, h, i] @ k[0, h, : i + 1].T * 0.4).softmax(-1)
            ours = (keep_topk(q[0, h, i], 3) @ keep_topk(k[0, h, : i + 1], 3).T * 0.4).softmax(-1)
            total += float((whole * (whole / ours).log()).detach().sum()) / 12
    assert float(loss.detach()) == pytest.approx(total, rel=1e-3)
    assert distill_loss(q, k, layer(8), 0.4, None).abs() < 1e-6
    loss.backward()
    assert q.grad.isfinite().all() and (q.grad[0] != 0).sum() <= 2 * 6 * 3 and not q.grad[1].any()


def test_recent_tokens_are_scored_whole(data_root: Path) -> None:  # noqa: F811
    """A window over everything is dense attention, one of a token differs from none."""
    outs = {}
    for recent in (0, 1, 32):
        tree = tiny(data_root, attention={"topk_q": 2, "topk_k": 2, "recent": recent})
        if recent == 32:
            outs["dense"] = run_once({**tree, "attention": {"kind": "dense"}})
        outs[recent] = run_once(tree)
    assert torch.allclose(outs[32], outs["dense"], atol=1e-5)
    assert not torch.allclose(outs[1], outs[0], atol=1e-4) and torch.allclose(outs[1][:, 0], outs[0][:, 0])


def run_once(tree: dict) -> torch.Tensor:
    torch.manual_seed(0)
    model = models.build_model(build_recipe(tree), 100)
    ids = torch.randint(0, 100, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("ideas", IDEAS, ids=lambda ideas: "-".join(ideas))
def test_a_step_with_an_idea_is_one_graph_and_learns(data_root: Path, tmp_path: Path, ideas: dict) -> None:  # noqa: F811
    tree = tiny(data_root, attention={"topk_q": 4, "dense_dims": 0, **ideas})
    tree["model"] = {**tree["model"], "family": "hybrid", "rotary_dims": None, "global_every": 1}
    recipe = build_recipe(tree)
    task = make_task(recipe)
    model = models.build_model(recipe, task.vocab_size)
    progress = torch.zeros(())
    models.follow_progress(model, recipe, progress)
    torch._dynamo.reset()
    compiled = torch.compile(task.loss, fullgraph=True, backend="aot_eager", dynamic=False)
    seen = []
    for share in (0.0, 0.3, 1.0):
        progress.fill_(share)
        plain, ours = task.loss(model, task.rows(0), False), compiled(model, task.rows(0), False)
        assert torch.allclose(plain, ours, atol=1e-5)
        seen.append(float(plain.detach()))
    torch.autograd.backward(ours)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert (len({round(loss, 6) for loss in seen}) > 1) == ("anneal" in ideas or "fade" in ideas)
    row = pretrain(recipe, tmp_path, quiet=True)
    assert row["complete"] and row["val"]["all"] < 400
    text = make_task(build_recipe({**tree, "attention": {"kind": "dense"}}))
    bare = text.loss(model, task.rows(0), False)
    assert (bool(task.loss(model, task.rows(0), False) > bare)) == ("balance" in ideas or "distill" in ideas)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"kind": "dense", "shrink": True}, "attention.shrink needs attention.kind sfa"),
        ({"kind": "sfa", "topk_k": 4, "path": "op", "recent": 8}, "attention.recent needs"),
        ({"kind": "sfa", "topk_k": 4, "anneal": 1.5}, "at most 1"),
        ({"kind": "sfa", "topk_k": 4, "balance": -1}, "at least 0"),
    ],
)
def test_bad_ideas_say_why(attention: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_recipe({"attention": attention})
