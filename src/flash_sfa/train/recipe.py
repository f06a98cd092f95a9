"""Recipes: small YAML files that name one experiment each."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

FAMILIES = ("gpt2", "rotary", "hybrid", "qwen3")
KINDS = ("dense", "narrow", "sfa")
PATHS = ("mask", "op")
BASES = ("", "none", "random", "pca", "fit")
IDEAS = (
    "shrink",
    "split_signs",
    "anneal",
    "fade",
    "recent",
    "balance",
    "distill",
    "match",
    "map_dim",
    "share",
    "drop",
    "center",
)


@dataclass
class ModelSpec:
    """Shape of the model.

    family: "gpt2" (GPT-2, learned absolute positions), "rotary" (MiMo-V2 attention: own v_head_dim, the first
    rotary_dims features rotate), "hybrid" (SmolLM3: windowed RoPE layers, every global_every-th layer global
    and without positions), "qwen3" (Qwen3 with query/key norms).
    alibi: the global layers of a hybrid subtract slope * (i - j) from the score of query i and key j, with slopes
    2 ** (-8 h / heads) for head h = 1, 2, ...; with global_every 1 that is ALiBi in every layer.
    """

    family: str = "rotary"
    layers: int = 8
    width: int = 384
    heads: int = 6
    kv_heads: int | None = None
    head_dim: int = 64
    v_head_dim: int | None = None
    mlp: int | None = None
    rotary_dims: int | None = None
    rope_theta: float = 10000.0
    context: int = 1024
    window: int = 256
    global_every: int = 4
    alibi: bool = False
    vocab_multiple: int = 64


@dataclass
class AttentionSpec:
    """How q and k are used: see ``flash_sfa.train.attention.LayerAttention``.

    dense_dims counts the always-on features from the first on. In the "hybrid" family kind applies to the
    global layers only, the others stay dense. v_dim, for kind narrow, shortens v as well.

    Ideas to close the gap, for kind sfa on path mask:
    shrink: kept values lose the magnitude of the largest dropped one, so that codes change continuously.
    split_signs: features become relu(x), relu(-x) before top-k, so that only equal signs meet.
    anneal: share of the run over which topk falls from all features to its value, by equal factors.
    fade: share of the run over which dropped features fade from whole to nothing.
    recent: scores of the last so many tokens use q and k whole.
    balance: weight of a loss that is least when all features are kept equally often.
    distill: weight of the divergence from the layer's own attention with q and k whole.
    match: weight of the squared distance from the layer's own output with q and k whole, summed over the features of
        v, mean over tokens and heads: the paper's regulariser.
    map_dim: q and k of a head go through learned matrices of their own to so many features before top-k (after
        RoPE, where there is one); they begin so that scores without top-k do not change.
    share: all heads keep the same features, those with the largest sum of squares over them.
    drop: pairs without a common feature weigh 0 instead of e^0.
    basis: "none", "random", "pca" or "fit" change the basis of q and k of a model that train.start loads, see
        ``flash_sfa.train.basis``; the dense model stays the same. "" leaves the weights alone.
    center: keys lose the running mean of their head before top-k; without top-k that would change no softmax.
    """

    kind: str = "dense"
    qk_dim: int | None = None
    v_dim: int | None = None
    topk_q: int | None = None
    topk_k: int | None = None
    dense_dims: int = 0
    path: str = "mask"
    basis: str = ""
    shrink: bool = False
    split_signs: bool = False
    anneal: float = 0.0
    fade: float = 0.0
    recent: int = 0
    balance: float = 0.0
    distill: float = 0.0
    match: float = 0.0
    map_dim: int = 0
    share: bool = False
    drop: bool = False
    center: bool = False


@dataclass
class DataSpec:
    """Token data sets, as folders below root (made by ``flash-sfa prepare``)."""

    root: str = "data"
    train: list[str] = field(default_factory=lambda: ["train"])
    val: dict[str, str] = field(default_factory=dict)
    test: dict[str, str] = field(default_factory=dict)


@dataclass
class TrainSpec:
    """The run: tokens seen, rows a step, learning rate and the like. max_seconds 0 = no limit.

    batch counts the rows of a step over all processes, micro_batch those of one forward pass in one process.
    start: folder of a model to begin with (a run's ``model/``, from train.save_last) instead of fresh weights; then
        tokens may be 0, which only evaluates.
    fsdp: shard the model, its gradients and the optimizer over the processes (FSDP2) instead of copying it (DDP).
    tensorboard: write logs for it where it is installed. peak_tflops: what MFU is measured against, 0 = by device.
    """

    tokens: int = 42_000_000
    batch: int = 32
    micro_batch: int | None = None
    lr: float = 1.5e-3
    warmup: float = 0.03
    schedule: str = "cosine"
    floor: float = 0.1
    decay: float = 0.2
    weight_decay: float = 0.1
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0
    device: str = "auto"
    bf16: bool = True
    compile: bool = True
    start: str = ""
    fsdp: bool = False
    save_every: int = 0
    save_last: bool = False
    log_every: int = 20
    max_seconds: float = 0.0
    tensorboard: bool = True
    peak_tflops: float = 0.0


@dataclass
class EvalSpec:
    """Evaluation: rows a batch, tokens a source at most (0 = all), points of the curve, and bits of K to try.

    save_qkv keeps q, k, v of a few heads on held-out text in qkv.pt, as trained input for benchmarks.
    """

    batch: int = 16
    tokens: int = 0
    curve_points: int = 8
    curve_tokens: int = 65536
    k_bits: list[int] = field(default_factory=list)
    statistics: bool = True
    save_qkv: bool = False


@dataclass
class NeedleSpec:
    """The synthetic needle task (``flash_sfa.train.needle``); an empty train_lengths means training on text.

    train_lengths: row lengths to train on, none above model.context. lengths: those to test (none: the same).
    depths and trials: depths at every length, and rows at every depth. fillers: 1 is a haystack of "#" only.
    """

    train_lengths: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    depths: int = 10
    trials: int = 50
    needles: int = 1
    key_tokens: int = 2
    value_tokens: int = 4
    symbols: int = 32
    fillers: int = 1


@dataclass
class Recipe:
    """One experiment. ``experiment`` is copied into the row, to tell the rows of one study from others."""

    name: str = "recipe"
    experiment: str = ""
    model: ModelSpec = field(default_factory=ModelSpec)
    attention: AttentionSpec = field(default_factory=AttentionSpec)
    data: DataSpec = field(default_factory=DataSpec)
    train: TrainSpec = field(default_factory=TrainSpec)
    eval: EvalSpec = field(default_factory=EvalSpec)
    needle: NeedleSpec = field(default_factory=NeedleSpec)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply ``section.key=value`` overrides (values are YAML).

    A recipe may begin with ``base: other.yaml`` (relative to itself): it then only says what differs. Its
    name is the file's stem unless given.

    Raises:
        ValueError: a missing file, YAML that does not parse, an unknown key, a value of the wrong type, or a
            combination that cannot be trained.

    Example:
        >>> import pathlib, tempfile
        >>> from flash_sfa.train.recipe import load_recipe
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "tiny.yaml"
        >>> _ = file.write_text("model: {layers: 2}")
        >>> load_recipe(file, ["attention.kind=sfa", "attention.topk_k=8"]).attention.topk_k
        8
    """
    import yaml

    path = Path(path)
    try:
        tree = _read_tree(path)
        for override in overrides or []:
            name, equals, text = override.partition("=")
            if not equals:
                raise ValueError(f"an override must read section.key=value, got {override!r}")
            at = tree
            *sections, last = name.split(".")
            for section in sections:
                at = at.setdefault(section, {})
                if not isinstance(at, dict):
                    raise ValueError(f"{override!r}: {section!r} is no section")
            at[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {error}") from error
    return build_recipe(tree)


def _read_tree(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise ValueError(f"the recipe {path} does not exist")
    tree = yaml.safe_load(path.read_text()) or {}
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a mapping")
    base = tree.pop("base", None)
    tree.setdefault("name", path.stem)
    if not base:
        return tree
    if not isinstance(base, str) or path.resolve() in above:
        raise ValueError(f"{path}: base must name another recipe, got {base!r}")
    return _merge(_read_tree(path.parent / base, (*above, path.resolve())), tree)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value) if nested else value
    return out


def build_recipe(tree: dict[str, Any]) -> Recipe:
    """A checked recipe from nested dicts; errors as in ``load_recipe``."""
    recipe: Recipe = _fill(Recipe, tree, "recipe")
    _check(recipe)
    return recipe


def _fill(cls: Any, tree: Any, where: str) -> Any:
    if not isinstance(tree, dict):
        raise ValueError(f"{where} must be a mapping, got {tree!r}")
    hints = get_type_hints(cls)
    unknown = sorted(set(tree) - set(hints))
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}; allowed: {sorted(hints)}")
    return cls(**{key: _value(hints[key], value, f"{where}.{key}") for key, value in tree.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _fill(hint, value, where)
    if hint in (list[str], dict[str, str], list[int]):
        shape = dict if hint == dict[str, str] else list
        if not isinstance(value, shape):
            raise ValueError(f"{where} must be a {shape.__name__}, got {value!r}")
        kind = int if hint == list[int] else str
        if wrong := [x for x in (value.values() if isinstance(value, dict) else value) if not isinstance(x, kind)]:
            raise ValueError(f"{where} must hold {kind.__name__}, got {wrong[0]!r}")
        return value
    allowed = get_args(hint) or (hint,)
    if float in allowed and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)  # YAML reads 1e-3 as text
        except ValueError as error:
            raise ValueError(f"{where} must be a number, got {value!r}") from error
    if int in allowed and isinstance(value, (float, str)):
        try:
            whole = float(value)
        except ValueError as error:
            raise ValueError(f"{where} must be an integer, got {value!r}") from error
        if not math.isfinite(whole) or whole != int(whole):
            raise ValueError(f"{where} must be an integer, got {value!r}")
        value = int(whole)
    if (isinstance(value, bool) and bool not in allowed) or not isinstance(value, allowed):
        raise ValueError(f"{where} must be {getattr(hint, '__name__', hint)}, got {value!r}")
    return value


def _check(recipe: Recipe) -> None:
    from .schedule import SCHEDULES

    model, at, train = recipe.model, recipe.attention, recipe.train
    for value, allowed, name in (
        (model.family, FAMILIES, "model.family"),
        (at.kind, KINDS, "attention.kind"),
        (at.path, PATHS, "attention.path"),
        (at.basis, BASES, "attention.basis"),
        (train.schedule, SCHEDULES, "train.schedule"),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    for name in (
        "layers",
        "width",
        "heads",
        "head_dim",
        "context",
        "window",
        "global_every",
        "vocab_multiple",
    ):
        if getattr(model, name) < 1:
            raise ValueError(f"model.{name} must be at least 1, got {getattr(model, name)}")
    for name, count in (("train.log_every", train.log_every), ("eval.batch", recipe.eval.batch)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if model.alibi and model.family != "hybrid":
        raise ValueError(f"model.alibi needs model.family hybrid, got {model.family!r}")
    if at.basis and (not train.start or at.kind == "dense" or at.map_dim or at.topk_q is not None):
        raise ValueError("attention.basis needs train.start, kind sfa with q whole, or narrow, and no map_dim")
    if train.fsdp and at.center:
        raise ValueError("attention.center keeps a running mean a process, which train.fsdp would not join")
    if train.fsdp and recipe.needle.train_lengths:
        raise ValueError("train.fsdp is for training on text; the needle task tests on one process")
    if model.alibi and at.path == "op":
        raise ValueError("attention.path op has no model.alibi; use path mask")
    if train.batch < 1 or train.batch % (train.micro_batch or train.batch):
        raise ValueError(f"train.batch={train.batch} must be a multiple of train.micro_batch={train.micro_batch}")
    if train.tokens < train.batch * model.context and not (train.start and train.tokens == 0):
        raise ValueError(f"train.tokens={train.tokens} is less than one step, {train.batch * model.context}")
    if at.kind == "sfa":
        if at.topk_k is None and at.topk_q is None:
            raise ValueError("attention.kind sfa needs attention.topk_k or attention.topk_q")
        for name in ("topk_q", "topk_k"):
            value = getattr(at, name)
            if value is not None and value < 1:
                raise ValueError(f"attention.{name} must be at least 1, got {value}")
        if not 0 <= at.dense_dims < model.head_dim:
            raise ValueError(f"attention.dense_dims must lie in [0, {model.head_dim}), got {at.dense_dims}")
        for name in ("anneal", "fade", "balance", "distill", "match", "recent", "map_dim"):
            if getattr(at, name) < 0:
                raise ValueError(f"attention.{name} must be at least 0, got {getattr(at, name)}")
        for name in ("anneal", "fade"):
            if getattr(at, name) > 1:
                raise ValueError(f"attention.{name} is a share of the run, at most 1, got {getattr(at, name)}")
        for one, other in (
            ("map_dim", "dense_dims"), ("drop", "distill"), ("share", "balance"), ("match", "drop"), ("match", "recent")
        ):  # fmt: skip
            if getattr(at, one) and getattr(at, other):
                raise ValueError(f"attention.{one} does not go with attention.{other}")
        if recipe.eval.k_bits:
            raise ValueError("eval.k_bits rounds dense keys; attention.kind sfa stores codes")
    elif at.topk_q is not None or at.topk_k is not None or at.dense_dims:
        raise ValueError(f"attention.kind {at.kind!r} takes no topk_q, topk_k or dense_dims")
    used = [name for name in IDEAS if getattr(at, name)]
    if used and (at.kind != "sfa" or at.path != "mask"):
        raise ValueError(
            f"attention.{used[0]} needs attention.kind sfa and attention.path mask, got {at.kind!r}, {at.path!r}"
        )
    if (at.kind == "narrow") != (at.qk_dim is not None):
        raise ValueError("attention.qk_dim belongs to attention.kind narrow, and narrow needs it")
    if at.qk_dim is not None and not 1 <= at.qk_dim <= model.head_dim:
        raise ValueError(f"attention.qk_dim must lie in [1, {model.head_dim}], got {at.qk_dim}")
    _check_needle(recipe)
    if at.v_dim is not None:
        if at.kind != "narrow" or model.family == "rotary":
            raise ValueError("attention.v_dim needs attention.kind narrow; model.family rotary has model.v_head_dim")
        if not 1 <= at.v_dim <= (model.v_head_dim or model.head_dim):
            raise ValueError(f"attention.v_dim must lie in [1, {model.head_dim}], got {at.v_dim}")


def _check_needle(recipe: Recipe) -> None:
    spec, context = recipe.needle, recipe.model.context
    for name in ("depths", "trials", "needles", "key_tokens", "value_tokens", "fillers"):
        if getattr(spec, name) < 1:
            raise ValueError(f"needle.{name} must be at least 1, got {getattr(spec, name)}")
    words = spec.symbols ** min(spec.key_tokens, spec.value_tokens) if spec.symbols > 0 else 0
    if words < 4 * spec.needles:
        raise ValueError(f"needle.symbols={spec.symbols} gives {words} words, {4 * spec.needles} are needed")
    least = (spec.needles + 1) * (2 + spec.key_tokens + spec.value_tokens)
    for name in ("train_lengths", "lengths"):
        for length in getattr(spec, name):
            if not isinstance(length, int) or length < least:
                raise ValueError(f"needle.{name} must hold integers of at least {least}, got {length!r}")
    for length in spec.train_lengths:
        if length > context or recipe.train.batch * context % length:
            raise ValueError(
                f"needle.train_lengths must divide train.batch * model.context = {recipe.train.batch * context} "
                f"and be at most model.context = {context}, got {length}"
            )
    if recipe.model.family == "gpt2" and max(spec.lengths, default=0) > context:
        raise ValueError(
            f"needle.lengths: model.family gpt2 has positions for model.context = {context} tokens only, "
            f"got {max(spec.lengths)}"
        )
