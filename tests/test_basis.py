"""A change of basis leaves dense attention alone and makes top-k keep more of the scores."""

from pathlib import Path

import pytest
import torch

from flash_sfa.train import models
from flash_sfa.train.attention import LayerAttention, keep_topk
from flash_sfa.train.basis import fit_basis, rebase
from flash_sfa.train.pretrain import pretrain
from flash_sfa.train.recipe import build_recipe
from test_train import data_root, text_file, tiny, tokenizer_dir  # noqa: F401 (fixtures)


def dropped(q: torch.Tensor, k: torch.Tensor, a: torch.Tensor, topk: int) -> float:
    """Share of the scores' mean square that top-k of k loses in the basis a."""
    turned = k.double() @ torch.linalg.inv(a).T
    error = (q.double() @ a) @ (turned - keep_topk(turned.float(), topk).double()).T
    return float(error.square().mean() / (q.double() @ k.double().T).square().mean())


@pytest.mark.parametrize("how", ["none", "random", "pca", "fit"])
def test_scores_stay(how: str) -> None:
    gen = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 16, generator=gen)
    q, k = torch.randn(300, 16, generator=gen) @ mix, torch.randn(200, 16, generator=gen) @ mix.T
    a = fit_basis(q, k, 3, how)
    scores = (q.double() @ a) @ (k.double() @ torch.linalg.inv(a).T).T
    assert torch.allclose(scores, q.double() @ k.double().T, atol=1e-6 * float(scores.abs().max()))
    if how in ("pca", "fit"):
        second = (q.double() @ a).T @ (q.double() @ a) / len(q)
        assert torch.allclose(second, second[0, 0] * torch.eye(16, dtype=torch.float64), atol=1e-5)
        sizes = (q.double() @ a).square().mean(), (k.double() @ torch.linalg.inv(a).T).square().mean()
        assert float(sizes[0]) == pytest.approx(float(sizes[1]))


def test_fit_finds_the_basis_in_which_keys_are_sparse() -> None:
    """Keys of 2 features out of 12 in a hidden basis: all is kept there, little in that of the principal axes."""
    gen = torch.Generator().manual_seed(1)
    hidden = torch.linalg.qr(torch.randn(12, 12, generator=gen))[0] @ torch.diag(torch.linspace(0.5, 2, 12))
    codes = torch.zeros(4000, 12).scatter_(1, torch.rand(4000, 12, generator=gen).topk(2).indices, 1.0)
    k = (codes * torch.randn(4000, 12, generator=gen)) @ hidden.T
    q = torch.randn(4000, 12, generator=gen) @ torch.linalg.inv(hidden)
    lost = {how: dropped(q[:500], k[:500], fit_basis(q, k, 2, how), 2) for how in ("none", "random", "pca", "fit")}
    assert lost["fit"] < 0.02 < 0.1 < min(lost["pca"], lost["random"], lost["none"])


def test_pca_is_the_best_choice_of_fixed_features() -> None:
    gen = torch.Generator().manual_seed(2)
    mix = torch.randn(8, 8, generator=gen)
    q, k = torch.randn(500, 8, generator=gen) @ mix, torch.randn(500, 8, generator=gen) @ mix

    def fixed(a: torch.Tensor) -> float:
        turned = k.double() @ torch.linalg.inv(a).T
        return float(((q.double() @ a)[:, 3:] @ turned[:, 3:].T).square().mean())

    best = fixed(fit_basis(q, k, 3, "pca"))
    others = [fixed(torch.linalg.qr(torch.randn(8, 8, generator=gen, dtype=torch.float64))[0]) for _ in range(50)]
    assert best < min(others)


SHAPES = {
    "gpt2": {"family": "gpt2", "rotary_dims": None},
    "hybrid": {"family": "hybrid", "rotary_dims": None, "layers": 2, "global_every": 2, "kv_heads": 1},
    "rotary": {"family": "rotary", "rotary_dims": 4, "kv_heads": 1},
}


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("how", ["pca", "fit"])
def test_a_dense_model_does_not_change(data_root: Path, family: str, how: str) -> None:  # noqa: F811
    tree = tiny(data_root, model=SHAPES[family], train={"start": "somewhere"})
    dims = 4 if family == "rotary" else 0
    tree["attention"] = {"kind": "sfa", "topk_k": 3, "dense_dims": dims, "basis": how}
    recipe = build_recipe(tree)
    torch.manual_seed(0)
    model = models.build_model(recipe, 100)
    with torch.no_grad():  # weights like those of a trained model: keys with a few large directions, biases
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.3 if "bias" in name else 0.05))
    modules = [m for m in models.attention_modules(model) if m.sfa_train.kind == "sfa"]
    assert len(modules) == 1
    ids = torch.randint(0, 100, (4, 32))
    before, sparse = logits(model, modules, ids)
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    rebase(model, recipe, ids)
    after, turned = logits(model, modules, ids)
    assert torch.allclose(before, after, atol=1e-4)
    assert not torch.allclose(sparse, turned, atol=1e-4)
    assert (turned - after).square().mean() < (sparse - before).square().mean()
    changed = {name for name, p in model.state_dict().items() if not torch.equal(p, weights[name])}
    assert changed and all("c_attn" in name or "q_proj" in name or "k_proj" in name for name in changed)


def logits(model: torch.nn.Module, modules: list, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the model with dense attention, and with its own."""
    own = [m.sfa_train for m in modules]
    out = []
    with torch.no_grad():
        for settings in ([LayerAttention()] * len(own), own):
            for module, setting in zip(modules, settings, strict=True):
                module.sfa_train = setting
            out.append(model(input_ids=ids, use_cache=False).logits)
    return out[0], out[1]


def test_a_run_begins_with_a_dense_model_in_another_basis(data_root: Path, tmp_path: Path) -> None:  # noqa: F811
    """Through recipes: dense, then codes without training, then with; narrow with all features is dense again."""
    tree = tiny(data_root, model=SHAPES["gpt2"], train={"save_last": True, "save_every": 0})
    tree["attention"] = {"kind": "dense"}
    dense = pretrain(build_recipe(tree), tmp_path / "dense", quiet=True)
    tree["train"] |= {"start": str(tmp_path / "dense/model"), "tokens": 0, "save_last": False}
    found = {}
    for name, attention in {
        "dense": {"kind": "dense"},
        "none": {"kind": "sfa", "topk_k": 2, "basis": "none"},
        "fit": {"kind": "sfa", "topk_k": 2, "basis": "fit"},
        "narrow": {"kind": "narrow", "qk_dim": 8, "basis": "pca"},
        "whole": {"kind": "narrow", "qk_dim": 16, "basis": "pca"},
    }.items():
        row = pretrain(build_recipe({**tree, "attention": attention}), tmp_path / name / "0", quiet=True)
        assert row["complete"] and row["tokens"] == 0
        found[name] = row["val"]["all"]
    assert found["dense"] == pytest.approx(dense["val"]["all"], rel=1e-5) == pytest.approx(found["whole"], rel=1e-3)
    assert len({found["dense"], found["none"], found["fit"], found["narrow"]}) == 4
    tree["train"]["tokens"] = 4 * 8 * 32
    tree["attention"] = {"kind": "sfa", "topk_k": 2, "basis": "fit"}
    trained = pretrain(build_recipe(tree), tmp_path / "trained", quiet=True)
    assert trained["val"]["all"] < found["fit"]


@pytest.mark.parametrize(
    ("attention", "train", "message"),
    [
        ({"kind": "sfa", "topk_k": 2, "basis": "fit"}, {}, "attention.basis needs train.start"),
        ({"kind": "dense", "basis": "fit"}, {"start": "x"}, "attention.basis needs"),
        ({"kind": "sfa", "topk_k": 2, "topk_q": 2, "basis": "fit"}, {"start": "x"}, "q whole"),
        ({"kind": "sfa", "topk_k": 2, "basis": "best"}, {"start": "x"}, "attention.basis must be"),
        ({"kind": "dense"}, {"tokens": 0}, "less than one step"),
    ],
)
def test_bad_recipes_say_why(attention: dict, train: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_recipe({"attention": attention, "train": train})


def test_what_cannot_change_its_basis_says_why(data_root: Path, tmp_path: Path) -> None:  # noqa: F811
    for family, model in (("rotary", {"rotary_dims": None}), ("qwen3", {"rotary_dims": None})):
        tree = tiny(data_root, model={"family": family, **model}, train={"start": "somewhere"})
        tree["attention"] = {"kind": "sfa", "topk_k": 2, "basis": "fit"}
        recipe = build_recipe(tree)
        with pytest.raises(NotImplementedError, match=r"attention\.basis"):
            rebase(models.build_model(recipe, 100), recipe, torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="how must be one of"):
        fit_basis(torch.randn(4, 4), torch.randn(4, 4), 2, "best")
    tree["model"] = {**tree["model"], "family": "gpt2"}
    with pytest.raises(ValueError, match=r"train.start: .*does not exist"):
        pretrain(build_recipe(tree), tmp_path / "x", quiet=True)
