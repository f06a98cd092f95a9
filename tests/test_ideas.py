"""Ideas of recipes for training SFA: what each computes, its gradient, and that a step stays one graph."""

import itertools
from pathlib import Path

import pytest
import torch

from flash_sfa import sfa_attention
from flash_sfa.train import models
from flash_sfa.train.attention import (
    LayerAttention,
    add_maps,
    balance_loss,
    codes_of,
    distill_loss,
    keep_topk,
    key_bytes,
    split_signs,
    topk_mask,
    train_attention,
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
    {"match": 0.5},
    {"match": 0.5, "balance": 0.1},
    {"map_dim": 40},
    {"share": True},
    {"drop": True},
    {"center": True, "map_dim": 24},
    {"shrink": True, "map_dim": 16, "share": True},
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


def test_match_is_the_distance_from_the_whole_attention() -> None:
    q, k, v = (torch.randn(2, 2, 6, 8, requires_grad=True) for _ in range(3))
    module = torch.nn.Module()
    module.sfa_train = layer(3, match=0.25, balance=0.5)
    train_attention(module, q, k, v, None, scaling=0.4)
    total = 0.0
    for b, h, i in itertools.product(range(2), range(2), range(6)):
        rows = k[b, h, : i + 1]
        whole = (q[b, h, i] @ rows.T * 0.4).softmax(-1) @ v[b, h, : i + 1]
        ours = (keep_topk(q[b, h, i], 3) @ keep_topk(rows, 3).T * 0.4).softmax(-1) @ v[b, h, : i + 1]
        total += float((ours - whole).detach().square().sum()) / 24
    balance = 0.5 * (balance_loss(q, 3, ()) + balance_loss(k, 3, ()))
    assert float((module.sfa_train.aux - balance).detach()) == pytest.approx(0.25 * total, rel=1e-3)
    (module.sfa_train.aux - balance).backward()
    assert (q.grad != 0).sum(-1).max() <= 3 and v.grad.any()  # nothing passes through the whole attention
    with torch.no_grad():
        module.sfa_train.aux = None
        train_attention(module, q, k, v, None, scaling=0.4)
    assert module.sfa_train.aux is None


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


@pytest.mark.parametrize("features", [8, 20, 32])
def test_maps_begin_without_changing_scores(features: int) -> None:
    module = torch.nn.Module()
    add_maps(module, heads=4, kv_heads=2, head_dim=8, features=features)
    q, k = torch.randn(4, 5, 8), torch.randn(2, 5, 8).repeat_interleave(2, 0)
    mapped = (q @ module.sfa_map_q) @ (k @ module.sfa_map_k.repeat_interleave(2, 0)).transpose(-1, -2)
    assert module.sfa_map_q.shape == (4, 8, features) and module.sfa_map_k.shape == (2, 8, features)
    assert torch.allclose(mapped, q @ k.transpose(-1, -2), atol=1e-5) == (features % 8 == 0)
    assert features == 8 or not torch.allclose(module.sfa_map_k[0, :, 8:16], module.sfa_map_k[0, :, :8])


def test_a_map_is_trained_and_counted(data_root: Path) -> None:  # noqa: F811
    tree = tiny(data_root, attention={"topk_q": None, "topk_k": 4, "dense_dims": 0, "map_dim": 64})
    tree["model"] = {**tree["model"], "rotary_dims": None}
    recipe = build_recipe(tree)
    model = models.build_model(recipe, 100)
    shape, maps = recipe.model, [p for n, p in model.named_parameters() if "sfa_map" in n]
    assert len(maps) == 2 * shape.layers and maps[0].shape == (shape.heads, shape.head_dim, 64)
    bare = models.build_model(build_recipe({**tree, "attention": {"kind": "dense"}}), 100)
    more = models.count_parameters(model, recipe)[1] - models.count_parameters(bare, recipe)[1]
    assert more == sum(p.numel() for p in maps)


def test_shared_features_are_those_of_the_largest_norm() -> None:
    x = torch.tensor([[3.0, 0.0, 2.0, 0.0], [0.0, 2.5, 2.0, 0.0]]).view(1, 2, 1, 4)
    at = layer(2, share=True)
    assert codes_of(x, 2, at).view(2, 4).tolist() == [[3.0, 0.0, 2.0, 0.0], [0.0, 0.0, 2.0, 0.0]]
    assert key_bytes(64, layer(8, share=True), kv_heads=4) == 8 * (2 + 1 / 4)
    assert key_bytes(64, layer(8, map_dim=512)) == 32


def test_drop_leaves_pairs_without_a_common_feature_out(data_root: Path) -> None:  # noqa: F811
    """The layer equals the operator's own drop mode, also in rows with nothing left."""
    module = torch.nn.Module()
    module.sfa_train = layer(1, drop=True)
    q, k, v = (torch.randn(1, 2, 12, 16, requires_grad=True) for _ in range(3))
    out, _ = train_attention(module, q, k, v, None, scaling=0.3)
    swapped = (x.transpose(1, 2) for x in (q, k, v))
    expected = sfa_attention(*swapped, topk=1, causal=True, softmax_scale=0.3, nonoverlap="drop", impl="reference")
    assert torch.allclose(out, expected, atol=1e-5) and (expected == 0).all(-1).any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_centred_keys_change_no_dense_attention(data_root: Path) -> None:  # noqa: F811
    """And the mean follows the keys in training only."""
    module = torch.nn.Module()
    module.register_buffer("sfa_mean", torch.zeros(2, 16))
    q, k, v = (torch.randn(3, 2, 12, 16) + 1 for _ in range(3))
    outs = {}
    for kind, topk in (("dense", None), ("sfa", 16), ("sfa", 2)):
        module.sfa_train = LayerAttention(kind, topk_k=topk, center=True)
        for _ in range(300):
            train_attention(module, q, k, v, None, scaling=0.3)
        outs[topk] = train_attention(module.eval(), q, k, v, None, scaling=0.3)[0]
        mean = module.train().sfa_mean.clone()
    assert torch.allclose(mean, k.mean((0, 2)), atol=1e-2)
    module.sfa_train = LayerAttention()
    plain = train_attention(module, q, k, v, None, scaling=0.3)[0]
    assert torch.allclose(outs[None], plain, atol=1e-5) and torch.allclose(outs[16], plain, atol=1e-5)
    expected = train_attention(module, q, keep_topk(k - mean[:, None], 2), v, None, scaling=0.3)[0]
    assert torch.allclose(outs[2], expected, atol=1e-5)


def test_alibi_takes_the_distance_off(data_root: Path) -> None:  # noqa: F811
    """Dense, by hand; and one graph for SFA. Path op, and the other families, have no bias."""
    module = torch.nn.Module()
    module.sfa_train = LayerAttention(alibi=True)
    q, k, v = (torch.randn(1, 4, 9, 16) for _ in range(3))
    out, _ = train_attention(module, q, k, v, None, scaling=0.3)
    for h, slope in enumerate((1 / 4, 1 / 16, 1 / 64, 1 / 256)):
        for i in (0, 5, 8):
            scores = q[0, h, i] @ k[0, h, : i + 1].T * 0.3 - slope * (i - torch.arange(i + 1))
            assert torch.allclose(out[0, i, h], scores.softmax(-1) @ v[0, h, : i + 1], atol=1e-5)
    tree = tiny(data_root, attention={"topk_q": None, "topk_k": 4, "dense_dims": 0})
    tree["model"] = {
        **tree["model"],
        "family": "hybrid",
        "rotary_dims": None,
        "global_every": 2,
        "alibi": True,
        "layers": 2,
    }
    model = models.build_model(build_recipe(tree), 100)
    assert [m.sfa_train.alibi for m in models.attention_modules(model)] == [False, True]
    with pytest.raises(ValueError, match=r"model.alibi needs"):
        build_recipe({**tree, "model": {**tree["model"], "family": "gpt2"}})
    with pytest.raises(ValueError, match=r"attention.path op has no"):
        build_recipe({**tree, "attention": {**tree["attention"], "path": "op"}})


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
    buffers = {name: x.clone() for name, x in model.named_buffers()}
    for share in (0.0, 0.3, 1.0):
        progress.fill_(share)
        losses = []
        for loss in (task.loss, compiled):
            model.load_state_dict(buffers, strict=False)  # center moves its mean
            losses.append(loss(model, task.rows(0), False))
        plain, ours = losses
        assert torch.allclose(plain, ours, atol=1e-5)
        seen.append(float(plain.detach()))
    torch.autograd.backward(ours)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert (len({round(loss, 6) for loss in seen}) > 1) == ("anneal" in ideas or "fade" in ideas)
    row = pretrain(recipe, tmp_path, quiet=True)
    assert row["complete"] and row["val"]["all"] < 400
    text = make_task(build_recipe({**tree, "attention": {"kind": "dense"}}))
    bare = text.loss(model, task.rows(0), False)
    assert (bool(task.loss(model, task.rows(0), False) > bare)) == bool({"balance", "distill", "match"} & set(ideas))


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"kind": "dense", "shrink": True}, "attention.shrink needs attention.kind sfa"),
        ({"kind": "sfa", "topk_k": 4, "path": "op", "recent": 8}, "attention.recent needs"),
        ({"kind": "sfa", "topk_k": 4, "anneal": 1.5}, "at most 1"),
        ({"kind": "sfa", "topk_k": 4, "balance": -1}, "at least 0"),
        ({"kind": "sfa", "topk_k": 4, "map_dim": 64, "dense_dims": 4}, "map_dim does not go with"),
        ({"kind": "sfa", "topk_k": 4, "drop": True, "distill": 0.1}, "drop does not go with"),
        ({"kind": "sfa", "topk_k": 4, "match": 1.0, "recent": 8}, "match does not go with"),
        ({"kind": "sfa", "topk_k": 4, "share": True, "balance": 0.1}, "share does not go with"),
    ],
)
def test_bad_ideas_say_why(attention: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_recipe({"attention": attention})


@pytest.mark.parametrize(
    ("family", "idea", "said"),
    [("rotary", {}, True), ("rotary", {"share": True}, False), ("rotary", {"shrink": True}, False),
     ("rotary", {"recent": 4}, False), ("rotary", {"center": True}, False)],
)  # fmt: skip
def test_config_sfa_is_said_only_where_enable_sfa_gives_the_same(
    data_root: Path,  # noqa: F811
    family: str, idea: dict, said: bool,
) -> None:  # fmt: skip
    model = models.build_model(build_recipe(tiny(data_root, model={"family": family}, attention=idea)), 100)
    assert (getattr(model.config, "sfa", None) is not None) == said


@pytest.mark.parametrize("idea", [{"map_dim": 32}, {"center": True}])
def test_a_run_with_weights_of_its_own_is_loaded_again(idea: dict, data_root: Path, tmp_path: Path) -> None:  # noqa: F811
    from flash_sfa.train.niah import load_model
    from flash_sfa.train.pretrain import pretrain, token_losses

    recipe = build_recipe(tiny(data_root, attention={"dense_dims": 0, **idea}, train={"save_last": True}))
    pretrain(recipe, tmp_path, quiet=True)
    model, again = load_model(tmp_path)
    assert again is not None
    ids = torch.randint(0, 60, (1, 33), generator=torch.Generator().manual_seed(0))
    losses = token_losses(model, ids[:, :-1], ids[:, 1:], False)
    fresh = models.build_model(recipe, model.config.vocab_size).eval()
    fresh.load_state_dict({n: x for n, x in model.state_dict().items() if "sfa_" not in n}, strict=False)
    assert not torch.equal(losses, token_losses(fresh, ids[:, :-1], ids[:, 1:], False))
