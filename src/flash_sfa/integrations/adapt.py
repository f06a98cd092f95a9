r"""Adapting a dense Transformers model to Sparse Feature Attention with the regularised loss of the paper.

.. math::
    L = L_\text{LM} + \lambda R, \qquad
    R = \sum_\text{layers} \frac{1}{T H} \sum_{t, h}
        \lVert O^\text{sparse}_{t h} - \text{stopgrad}(O^\text{dense}_{t h}) \rVert^2

T counts the tokens of an optimizer step that are not padding, over all micro-batches and devices, H a layer's heads.
O_dense is what dense attention makes of the same q, k and v; both are without dropout. Source: arXiv 2603.22300.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, Trainer, TrainerCallback
from transformers.masking_utils import AttentionMaskInterface

from ..checks import check_dense_dims, check_topk
from ..codes import autocast_dtype
from ..train.attention import topk_mask
from . import transformers as sfa
from .settings import head_dim, layer_setting, query_topk, text_config
from .sparse_cache import NewKeys

NAME = "sfa_adapt"
# Queries of a row that the overlap in the log is taken from.
_OBSERVED = 64


class _State:
    """What the attention layers of one training leave for its loss."""

    def __init__(self) -> None:
        self.collect = self.observe = self.stored = False
        self.tokens: Tensor | None = None  # (b, n), True where a token counts; None: all
        self.terms: list[Tensor] = []
        self.seen: list[tuple[float, float]] = []


class AdaptTrainer(Trainer):
    """Transformers' `Trainer` for a model with ``enable_sfa``, with the regulariser and schedules.

    Everything else is the Trainer's: data, accumulation, DDP and FSDP through accelerate, checkpoints, resume. The log
    has, beside the Trainer's, ``lm_loss``, ``regulariser`` (R; its mean over the steps with lambda above 0, absent
    without one), ``lambda``, ``topk``, ``overlap`` (share of visible pairs with a common feature) and ``balance``
    (entropy of the kept features of keys over its largest value), these four of the last step.

    Args:
        regulariser: lambda at the first step.
        regulariser_end: lambda at the last step, linear in between; None keeps it.
        topk_from: topk at the first step, falling by equal factors to that of ``config.sfa`` over ``topk_steps`` steps;
            None starts with the final one. Only where ``config.sfa["topk"]`` is an int.
        topk_steps: steps of that schedule, fewer than the training has, so that the final topk is trained too.
        The others are the Trainer's.

    Raises:
        ValueError: a model without ``enable_sfa``, a negative number, a topk_from below the final topk or above the
            head dim, topk_from with a topk that is not an int, topk_steps without topk_from or not below the steps of
            the training, several GPUs in one process, or reentrant checkpointing, which would run the regulariser
            without its graph. While training: a forward pass in which no layer attends by top-k with lambda above 0.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
        >>> from flash_sfa.integrations.adapt import AdaptTrainer
        >>> from flash_sfa.integrations.transformers import enable_sfa
        >>> config = LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> model = enable_sfa(LlamaForCausalLM(config), topk=8)
        >>> rows = [{"input_ids": list(range(16)), "labels": list(range(16))} for _ in range(4)]
        >>> options = TrainingArguments("runs/adapt", max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
        >>> trainer = AdaptTrainer(model, options, train_dataset=rows, regulariser=0.1)
        >>> trainer.train().global_step
        1
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        regulariser: float = 0.0,
        regulariser_end: float | None = None,
        topk_from: int | None = None,
        topk_steps: int = 0,
        **kwargs: Any,
    ) -> None:
        end = regulariser if regulariser_end is None else regulariser_end
        for name, value in (("regulariser", regulariser), ("regulariser_end", end)):
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if args.n_gpu > 1:
            raise ValueError(
                f"several GPUs need torchrun or accelerate launch, and this process would use {args.n_gpu}; start it "
                "by one of them, or show it one GPU by CUDA_VISIBLE_DEVICES"
            )
        if args.gradient_checkpointing:
            options = dict(args.gradient_checkpointing_kwargs or {})
            if options.get("use_reentrant", False):
                raise ValueError(
                    "gradient_checkpointing_kwargs={'use_reentrant': True} would lose the regulariser's gradient; "
                    "only {'use_reentrant': False} is allowed"
                )
            args.gradient_checkpointing_kwargs = options | {"use_reentrant": False}
        self._part = _sparse_part(model)
        self._config = self._part.config
        self._final_topk = self._config.sfa["topk"]
        if topk_from is not None:
            _check_schedule(topk_from, topk_steps, self._final_topk, head_dim(self._config))
        elif topk_steps:
            raise ValueError(f"topk_steps needs topk_from, got topk_steps={topk_steps!r} without it")
        if args.max_steps > 0:
            _check_steps(topk_steps, args.max_steps)
        self._lambdas, self._topk_from, self._topk_steps = (float(regulariser), float(end)), topk_from, topk_steps
        self._adapt = _State()
        self._step_tokens = torch.ones((), dtype=torch.int64)
        self._sums: dict[str, Tensor] = {}
        self._counted: Counter[str] = Counter()  # the steps in a sum
        self._lambda = 0.0  # of the step that runs
        super().__init__(model=model, args=args, **kwargs)
        self.add_callback(_Schedules(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        _register()
        self._sums, self._counted = {}, Counter()
        for module in self._part.modules():  # some attention modules do not know their layer's number
            module._sfa_adapt = self._adapt
        self._config._attn_implementation_internal = NAME
        try:
            return super().train(*args, **kwargs)
        finally:
            self._config._attn_implementation_internal = "sfa"
            self._config.sfa["topk"] = self._final_topk
            for module in self._part.modules():
                module.__dict__.pop("_sfa_adapt", None)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """Transformers' own, and the tokens of the whole step."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        masks = [batch.get("attention_mask") for batch in batches]
        count = sum(b["input_ids"].numel() if m is None else int(m.sum()) for b, m in zip(batches, masks))
        tokens = torch.tensor([count], dtype=torch.int64, device=device)
        self._step_tokens = self.accelerator.gather(tokens).sum() if self.args.world_size > 1 else tokens[0]
        return batches, items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The language model's loss, and lambda R while training."""
        state, training = self._adapt, model.training
        weight = self.lambda_now() if training else 0.0
        state.terms, state.seen, state.collect, state.stored = [], [], weight > 0.0, False
        state.observe = training and self._logs_next() and "overlap" not in self._sums
        mask = inputs.get("attention_mask")
        state.tokens = None if mask is None else mask.bool()
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        state.stored = True
        if training:
            loss = self._regularised(loss, weight, 1 if self._counts(num_items_in_batch) else None)
        return (loss, outputs) if return_outputs else loss

    def _regularised(self, loss: Tensor, weight: float, parts: int | None) -> Tensor:
        """loss + lambda R of a micro-batch. parts: what the Trainer divides it by; None: by their number."""
        state, parts = self._adapt, parts or self.current_gradient_accumulation_steps
        sums = {"lm_loss": loss.detach() / parts}
        if weight > 0.0:
            if not state.terms:
                raise ValueError(
                    f"regulariser is {weight}, but no layer of {type(self._part).__name__} attended by top-k in this "
                    "forward pass, so there is no R; was its attention implementation changed?"
                )
            # Gradients are averaged over devices.
            total = torch.stack(state.terms).sum() * self.args.world_size / self._step_tokens
            loss = loss + weight * parts * total
            sums["regulariser"] = total.detach()
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
        if state.seen:
            for i, name in enumerate(("overlap", "balance")):
                mean = sum(pair[i] for pair in state.seen) / len(state.seen)
                self._sums[name] = torch.tensor(mean, device=loss.device)
        state.terms = []
        return loss

    def lambda_now(self) -> float:
        """The regulariser's weight at the current step."""
        first, last = self._lambdas
        done = self.state.global_step / max(1, self.state.max_steps - 1)
        return first + (last - first) * min(1.0, done)

    def topk_now(self) -> Any:
        """topk at the current step."""
        if self._topk_from is None or self.state.global_step >= self._topk_steps:
            return self._final_topk
        done = self.state.global_step / self._topk_steps
        return round(self._topk_from ** (1 - done) * self._final_topk**done)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._counted["lm_loss"]:
            for name, value in self._sums.items():
                if name in ("overlap", "balance"):
                    logs[name] = float(value)
                else:
                    mean = value / self._counted[name]
                    logs[name] = float(self.accelerator.gather(mean.reshape(1)).mean())
            logs |= {"lambda": self._lambda, "topk": self._config.sfa["topk"]}
            self._sums, self._counted = {}, Counter()
        super().log(logs, start_time)

    def _counts(self, num_items_in_batch: Any) -> bool:
        """Whether the loss is divided by the items of the step already, so that micro-batches add up."""
        accepts = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(accepts or self.compute_loss_func is not None)

    def _logs_next(self) -> bool:
        step, every = self.state.global_step + 1, max(1, int(self.state.logging_steps or 1))
        return step % every == 0 or step == self.state.max_steps or (step == 1 and self.args.logging_first_step)


class _Schedules(TrainerCallback):
    """Sets topk and lambda before each step and counts the steps since the last log."""

    def __init__(self, trainer: AdaptTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _check_steps(self.trainer._topk_steps, state.max_steps)  # known only now where epochs were given

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._config.sfa["topk"] = self.trainer.topk_now()
        self.trainer._lambda = self.trainer.lambda_now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._counted["lm_loss"] += 1
        self.trainer._counted["regulariser"] += self.trainer._lambda > 0.0

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A checkpoint is one of the final model, whatever the schedule is at.
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "config.json"
        if state.is_world_process_zero and file.is_file():
            config = json.loads(file.read_text())
            holder = config if "sfa" in config else config.get("text_config", {})
            if "sfa" in holder:
                holder["sfa"]["topk"] = self.trainer._final_topk
                file.write_text(json.dumps(config, indent=2) + "\n")


def _sparse_part(model: Any) -> Any:
    """The model that ``enable_sfa`` changed, also inside a PEFT model."""
    for part in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(part, PreTrainedModel):
            config = text_config(part.config)
            if config._attn_implementation == "sfa" and getattr(config, "sfa", None):
                return next(m for m in part.modules() if isinstance(m, PreTrainedModel) and m.config is config)
    raise ValueError(f"SFA is not enabled on this {type(model).__name__}: call enable_sfa(model, topk=...) first")


def _check_schedule(topk_from: Any, topk_steps: Any, final: Any, dim: int) -> None:
    check_topk(topk_from, "topk_from")
    if not isinstance(final, int):
        raise ValueError(f"topk_from needs one int as topk in config.sfa, got {final!r}")
    if not final <= topk_from <= dim:
        raise ValueError(f"topk_from must be from {final} (the final topk) to {dim} (the head dim), got {topk_from}")
    if not isinstance(topk_steps, int) or topk_steps < 1:
        raise ValueError(f"topk_steps must be at least 1 with topk_from, got {topk_steps!r}")


def _check_steps(topk_steps: int, steps: int) -> None:
    if topk_steps >= steps > 0:
        raise ValueError(
            f"topk_steps must be below the {steps} steps of the training, or its final topk is never trained with, "
            f"got {topk_steps}"
        )


def _register() -> None:
    AttentionInterface.register(NAME, _adapt_forward)
    AttentionMaskInterface.register(NAME, sfa._mask)
    sfa._OURS.add(NAME)


def _adapt_forward(
    module: Any, query: Tensor, key: Tensor | NewKeys, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention of ``enable_sfa``; while training, a layer leaves its part of the regulariser behind."""
    out, _ = sfa._sfa_forward(module, query, key, value, attention_mask, **kwargs)
    state = getattr(module, "_sfa_adapt", None)
    if state is None or isinstance(key, NewKeys) or not module.training:
        return out, None
    setting = layer_setting(module.config, sfa._layer_of(module))
    if setting is None:
        return out, None
    if state.collect:
        if not state.stored and not torch.is_grad_enabled():
            raise ValueError(
                "the regulariser's gradient would be lost: a layer runs without a graph while training, as under "
                "gradient checkpointing with use_reentrant=True; only use_reentrant=False is allowed"
            )
        plain = kwargs | {"dropout": 0.0}
        sparse = (
            sfa._sfa_forward(module, query, key, value, attention_mask, **plain)[0] if kwargs.get("dropout") else out
        )
        with torch.no_grad():
            dense, _ = sfa._dense_forward(module, query, key, value, attention_mask, **plain)
        error = (sparse.float() - dense.float()).square().sum(-1).mean(-1)  # (b, n)
        if state.tokens is not None:
            error = error.masked_fill(~state.tokens[:, -error.shape[1] :], 0.0)
        # Checkpointing runs a layer again for its gradient; it counts once.
        term = error.sum()
        if not state.stored:
            state.terms.append(term)
    if state.observe and not state.stored:
        with torch.no_grad():
            state.seen.append(_observe(query.detach(), key.detach(), setting))
    return out, None


def _observe(q: Tensor, k: Tensor, setting: tuple[Any, Any]) -> tuple[float, float]:
    """(overlap, balance of the keys) of the first row of a batch, over its last queries, causal."""
    topk, dims = setting
    d, dtype = q.shape[-1], autocast_dtype(q)
    dims = check_dense_dims(dims, d)
    sides = []
    for x, entry in ((q[:1], query_topk(topk, q.shape[1])), (k[:1], topk[1] if isinstance(topk, tuple) else topk)):
        widths = entry if isinstance(entry, list) else [entry] * x.shape[1]
        if len(widths) != x.shape[1]:  # a key keeps what the widest query head of its group does
            group = len(widths) // x.shape[1]
            widths = [max(widths[i * group : (i + 1) * group]) for i in range(x.shape[1])]
        heads = [
            torch.ones_like(x[:, i], dtype=torch.bool) if w is None else topk_mask(x[:, i].to(dtype), w, dims)
            for i, w in enumerate(widths)
        ]
        sides.append(torch.stack(heads, 1))
    on_q, on_k = sides
    n, some = k.shape[2], min(_OBSERVED, q.shape[2])
    hit = on_q[:, :, -some:].float() @ on_k.repeat_interleave(q.shape[1] // k.shape[1], 1).float().transpose(-1, -2) > 0
    seen = torch.arange(n, device=q.device) <= torch.arange(n - some, n, device=q.device)[:, None]
    share = on_k.float().mean((0, 2))[:, [u for u in range(d) if u not in dims]]
    share = share / share.sum(-1, keepdim=True)
    entropy = -(share * share.clamp_min(1e-12).log()).sum(-1).mean() / math.log(max(share.shape[-1], 2))
    return float((hit & seen).sum() / (seen.sum() * hit.shape[1])), float(entropy)
