# Copyright 2026 the contrastive-perplexity authors. SPDX-License-Identifier: Apache-2.0
"""Prototype contrastive perplexity (CP), after Klein & Nabi, "Contrastive Perplexity for Controlled
Generation", ACL 2025, arXiv 2401.08491. Version 3. Needs torch only: copy this file.

An anchor has positives P (clean paraphrases) and hard negatives N (toxic ones). phi(x) is the
perplexity of a sentence under the model being tuned; the prototype c is the mean of phi over P:

    s(x) = exp(-|phi(x) - c| / tau)
    J    = sum_P s / (sum_P s + alpha * sum_N s)          loss = -log J

    nll  = linear_nll(hidden, lm_head.weight, targets)    # (T,) hidden and targets already shifted
    nll  = sequence_nll(nll, sequence, num_sequences)     # (S,) nats per token
    loss, stats = cp_loss(nll, is_positive, anchor,       # (A,) one loss an anchor
                          alpha=10.0, distance="signed", aim=base_nll, hold=1.2)
    loss.mean().backward()

The paper's is cp_loss(nll, is_positive, anchor, phi="perplexity"). base_nll (S,) is the untuned
model's: without it the level of phi is free, and drifts up.

With a Hugging Face causal LM, `model_nll(model, sequences)` does the first two lines. From a
padded batch, with labels (S, L) that are -100 where a token doesn't count, and hidden (S, L, D):

    counts   = labels[:, 1:] >= 0                         # (S, L - 1)
    sequence = counts.nonzero()[:, 0]                     # (T,) whose token it is
    nll      = linear_nll(hidden[:, :-1][counts], lm_head.weight, labels[:, 1:][counts])

KL(base || tuned) of running text's next tokens, (T,), which holds that text at the base's (in stage
03, from logits, with weight 10), is the Bregman divergence of linear_nll in `hidden`, so that it
needs no (T, V) either. In float32; targets cancel; a head must be frozen and have no soft cap:

    base   = base_hidden.detach().requires_grad_()        # (T, D), without the adapter
    was    = linear_nll(base, lm_head.weight, targets)
    slope, = torch.autograd.grad(was.sum(), base)
    now    = linear_nll(hidden, lm_head.weight, targets)
    kl     = now - was.detach() - ((hidden - base.detach()) * slope).sum(1)

Anchors that are split over processes have to gather nll (S,) first: an anchor's loss is no sum of
its parts', and a mean of processes' means weighs anchors unequally. Stage 03 does that.

Departures from the paper, each a choice of the caller; README says what each one does:
 1. tau divides inside the exponent. As printed, outside of it, it cancels from J.
 2. phi="nll" is log-perplexity (what the official code uses); "perplexity" the paper's text.
 3. distance="signed" takes phi - c, not |phi - c|, for negatives. The absolute distance rewards
    making a negative that is already likelier than the prototype likelier (of mined ones a third).
 4. `prototype` fixes c, for example to the base model's. None is the paper's: the positives' own.
 5. aim and hold keep the positives' level. The paper's J is blind to it.
 6. phi is a mean over a sequence's own tokens and c over the anchor's own positives. The official
    code averages over padding, and over all positives of the micro-batch.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.benchmark import Timer
from torch.utils.checkpoint import checkpoint

ROW = 128  # tokens of a packed row, or its longest sequence: attention's work grows with its square


# From hidden states to losses: these know nothing of models, trainers or devices.


def _up(x):
    """float32 at least: float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logits(hidden, weight, bias, softcap):
    z = _up(torch.addmm(bias.to(hidden.dtype), hidden, weight.to(hidden.dtype).T))  # (T, C)
    return softcap * torch.tanh(z / softcap) if softcap else z


class _FrozenHeadLSE(torch.autograd.Function):
    """logsumexp of the logits z = hidden W^T + b, walked in chunks of the vocabulary. Its gradient
    is attention with W as keys and values, d lse_t / d hidden_t = sum_v p_tv z'_tv W_v, so as in
    flash attention each chunk's softmax mean joins a running one, weighed by its share. Made in the
    forward pass, only scaled in the backward pass: two products of T x D x V, the minimum."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, softcap, chunk_size):
        mean = _up(torch.zeros_like(hidden))  # (T, D)
        lse = mean.new_full((len(hidden), 1), -math.inf)
        for w, b in zip(weight.split(chunk_size), bias.split(chunk_size)):
            w = w.to(hidden.dtype)
            z = _logits(hidden, w, b, softcap)  # (T, C)
            p = z.softmax(1)
            top, at = z.max(1, keepdim=True)
            chunk = top - p.gather(1, at).log()  # its logsumexp, one exp fewer
            lse = torch.logaddexp(lse, chunk)
            if ctx.needs_input_grad[0]:
                if softcap:
                    p.mul_(1 - (z / softcap) ** 2)
                mean.lerp_(_up(p.to(w.dtype) @ w), (chunk - lse).exp())
        ctx.save_for_backward(mean)
        return lse[:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (mean,) = ctx.saved_tensors
        return mean * grad[:, None], None, None, None, None


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """-log softmax(hidden W^T + b)[target] in nats, (T,), without ever holding (T, V).

    hidden (T, D); weight (V, D), the LM head; targets (T,) long in [0, V), the token that hidden
    predicts; bias (V,). `softcap` is Gemma 2's cap * tanh(z / cap); scaled logits (Cohere) are a
    scaled `hidden`. float32, or float64 for float64. Exact gradients for hidden and, where they
    require them, weight and bias. Arithmetic: two T x D x V products for a frozen head, one without
    gradients, four for a head that trains (recomputed in backward). Extra memory: T x (D + a few
    chunk_size; by default 2048, which suits a CPU's caches, on GPUs, where launches cost, 8192).
    Raises ValueError on shapes that don't fit, and on targets below 0: leave out tokens to be
    ignored (-100), as the top of the file shows."""
    if bias is None:
        bias = weight.new_zeros(len(weight))
    chunk_size = chunk_size or (2048 if hidden.is_cpu else 8192)
    if (
        [hidden.shape, bias.shape] != [targets.shape + weight.shape[1:], weight.shape[:1]]
        or hidden.ndim != 2
        or (targets < 0).any()
    ):
        raise ValueError(
            "hidden (T, D), weight (V, D), targets (T,) >= 0, bias (V,): not "
            f"{hidden.shape}, {weight.shape}, {targets.shape}, {bias.shape}"
        )
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad):

        def chunk_lse(*chunk):
            return _logits(hidden, *chunk, softcap).logsumexp(1)  # (T,)

        chunks = zip(weight.split(chunk_size), bias.split(chunk_size))
        lse = torch.stack(
            [checkpoint(chunk_lse, *chunk, use_reentrant=False) for chunk in chunks]
        ).logsumexp(0)  # (T,)
    else:
        lse = _FrozenHeadLSE.apply(hidden, weight, bias, softcap, chunk_size)
    z = (_up(hidden) * _up(weight[targets])).sum(1) + bias[targets]  # the targets' own
    return lse - (softcap * torch.tanh(z / softcap) if softcap else z)


def sequence_nll(token_nll: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Mean nats per token of each sequence, (S,). token_nll (T,); sequence (T,) long in
    [0, num_sequences): whose token it is. Raises ValueError where a sequence has no token, since
    its phi is undefined; torch.compile leaves this check out."""
    if token_nll.shape != sequence.shape:
        raise ValueError("token_nll and sequence must be (T,)")
    return _mean(
        _up(token_nll), sequence >= 0, sequence, num_sequences, "each sequence needs a token"
    )


def _mean(x, member, group, num_groups, fault):
    """Of each group's members, (A,)."""
    if not torch.compiler.is_compiling():
        size = torch.bincount(group[member], minlength=num_groups)
        if len(size) > num_groups or not size.all():
            raise ValueError(f"{fault}: {(size == 0).nonzero().flatten().tolist()[:20]}")
    count = x.new_zeros(num_groups).index_add(0, group, member.to(x.dtype))
    return x.new_zeros(num_groups).index_add(0, group, x.where(member, 0)) / count


def _group_logsumexp(x, group, num_groups):
    top = x.new_full((num_groups,), -math.inf)
    top = top.scatter_reduce(0, group, x.detach(), "amax")  # (A,)
    top = top.masked_fill(top == -math.inf, 0)  # an empty group: log 0, not nan
    return top + x.new_zeros(num_groups).index_add(0, group, torch.exp(x - top[group])).log()


def cp_loss(
    nll: Tensor,
    is_positive: Tensor,
    anchor: Tensor,
    prototype: Tensor | None = None,
    *,
    alpha: float = 1.0,
    tau: float = 1.0,
    phi: str = "nll",
    distance: str = "absolute",
    aim: Tensor | None = None,
    hold: float = 0.0,
) -> tuple[Tensor, dict]:
    """Each anchor's loss, (A,) float32 (float64 for float64), and a dict of detached scalars.

    nll (S,) nats per token; is_positive (S,) bool; anchor (S,) long in [0, A); sets may be ragged.
    prototype (A,) in phi's unit, or None: the mean phi of the anchor's positives, gradients flowing
    through it. -log J = softplus(log alpha + lse_N(l) - lse_P(l)), l = -|phi - c| / tau. Sign of
    d loss / d phi: a signed negative's is never positive (it is always made less likely); an
    absolute one's is that of c - phi. At distance 0 the subgradient is 0. alpha = 0 leaves J = 1: a
    constant. Perplexities are cut at e^30. aim (S,), nats per token: adds `hold` times the mean of
    |nll - aim| over the anchor's positives, which nothing else keeps from drifting; the base's nll,
    say, or 0 to make positives likelier. Raises ValueError on shapes, options and an anchor without
    positives or negatives."""
    if not nll.shape == is_positive.shape == anchor.shape == (nll.numel(),) or not len(nll):
        raise ValueError("nll, is_positive and anchor must be (S,), S > 0")
    known = phi in ("nll", "perplexity") and distance in ("absolute", "signed")
    if not known or tau <= 0 or alpha < 0:
        raise ValueError(f"{phi=}, {distance=}, {tau=}, {alpha=} is not a valid choice")
    A = int(anchor.max()) + 1 if prototype is None else len(prototype)
    pos, x = is_positive.bool(), _up(nll)
    if phi == "perplexity":
        x = x.clamp(max=30).exp()  # phi, (S,)
    phi_pos = _mean(x, pos, anchor, A, "anchors without positives")  # (A,)
    phi_neg = _mean(x, ~pos, anchor, A, "anchors without negatives")
    c = phi_pos if prototype is None else prototype.to(x)
    away = x - c[anchor]
    log_s = -torch.where(pos | (distance == "absolute"), away.abs(), away) / tau  # (S,)
    lse_p = _group_logsumexp(log_s.where(pos, -math.inf), anchor, A)  # (A,)
    lse_n = _group_logsumexp(log_s.where(~pos, -math.inf), anchor, A)
    loss = F.softplus(x.new_tensor(alpha).log() + lse_n - lse_p)
    stats = _means(cp=loss, phi_pos=phi_pos, phi_neg=phi_neg, gap=phi_neg - phi_pos, prototype=c)
    if aim is not None:
        loss = loss + hold * _mean((_up(nll) - aim).abs(), pos, anchor, A, "")
    return loss, stats


@torch.no_grad()
def _means(**values):
    return {name: x.mean() for name, x in values.items()}


# Hugging Face glue: what phi is of a model, for all stages alike.


def encode(tokenizer, text: str, context: str = "") -> tuple[Tensor, int]:
    """Token ids of a BOS (the EOS where a tokenizer has none), the context and the text, (L,), and
    where the text begins. Encoded as one string, since pieces alone may get other tokens."""
    first = tokenizer.convert_tokens_to_ids(tokenizer.bos_token or tokenizer.eos_token)
    made = tokenizer(context + text, add_special_tokens=False, return_offsets_mapping=True)
    start = 1 + sum(end <= len(context) for _, end in made.offset_mapping)
    return torch.tensor([first, *made.input_ids]), start


def _parts(model):
    """Of a Hugging Face causal LM (LoRA inside or not): backbone, head, logit scale, soft cap, and
    attention's window."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if type(head) is not torch.nn.Linear:
        raise ValueError(f"its head is a {type(head).__name__}, not Linear")
    scale = getattr(config, "logit_scale", 1 / getattr(config, "logits_scaling", 1))
    optional = [getattr(config, k, None) for k in ("final_logit_softcapping", "sliding_window")]
    return model.get_decoder(), head, scale, *optional


def _rows(sequences, start, limit):
    """Rows (L, 4) of up to limit tokens, or of one sequence; the longest last. Of each token: id,
    position, owner (its sequence's number from 1) and whether it counts. What comes before a
    context's last token, which predicts the first that counts, has owner 0: a row holds it once,
    first, for all its sequences."""
    rows, last = [], {}
    for i, ids in enumerate(sequences):
        own, at = max(start[i], 1) - 1, torch.arange(len(ids))
        cells = torch.stack([ids, at, torch.where(at < own, 0, i + 1), at > own], 1)
        context = tuple(ids[:own].tolist())
        row = last.get(context)
        if row is None or sum(map(len, row)) + len(ids) - own > limit:
            row = last[context] = []
            rows.append(row)
        row.append(cells[own if row else 0 :])
    return sorted(map(torch.cat, rows), key=len)


def model_nll(
    model,
    sequences: list[Tensor],
    start: list[int] | None = None,
    max_tokens: int = 512,
) -> Tensor:
    """phi as every stage uses it: nats per token of each sequence, (S,), from packed rows.

    sequences: S >= 1 token-id tensors (L,) on the CPU, each beginning with its own context (a BOS,
    a prompt); start: where phi begins, 1 or more, default 1: tokens before it don't count, and are
    computed once for sequences that share them. A mask keeps attention within a sequence.
    max_tokens: computed at once, rows of like lengths; GPUs want more. Gradients flow if grad mode
    is on."""
    backbone, head, scale, softcap, window = _parts(model)
    # where attention has a window, long sequences have a row each and the model's own masks
    short = not window or max(map(len, sequences)) <= window
    rows = _rows(sequences, start or [1] * len(sequences), ROW if short else 0)
    nll, owners = [], []
    while rows:
        size = max(max_tokens // len(rows[-1]), 1)
        grid = pad_sequence(rows[-size:], batch_first=True).to(head.weight.device)
        del rows[-size:]
        ids, position, owner, counts = grid.unbind(2)  # (B, T)
        key, query = owner[:, None], owner[..., None]
        seen = ((key == query) | (key == 0)).tril()[:, None]  # (B, 1, T, T)
        hidden = backbone(
            input_ids=ids,
            position_ids=position,
            attention_mask=seen.to(head.weight.dtype).log() if short else None,
            use_cache=False,
        ).last_hidden_state
        counts = counts > 0
        # layers may be spread over devices
        hidden = hidden.to(ids.device)[:, :-1][counts[:, 1:]]  # (N, D)
        nll.append(linear_nll(hidden * scale, head.weight, ids[counts], head.bias, softcap=softcap))
        owners.append(owner[counts] - 1)
    return sequence_nll(torch.cat(nll), torch.cat(owners), len(sequences))


@torch.no_grad()
def check_model(model):
    """Raises ValueError unless packed `model_nll` equals the model's own loss, row by row."""
    if any(w.is_meta for w in model.parameters()):
        raise ValueError("does not fit on the devices at hand")
    ids = torch.arange(12)
    alone = ids[None].to(model.device)
    want = model(input_ids=alone, labels=alone.where(alone > 5, -100)).loss
    got = model_nll(model, 24 * [ids], 24 * [6])  # two rows, the second padded
    # a tuned model, at 21 nats, was off by 1.2e-4 of it, in float64 by nothing
    loose = 1e-3 if model.dtype == torch.float32 else 5e-2
    if not torch.allclose(got, want.to(got), loose, loose):
        raise ValueError(
            f"not supported: packed nll {got[:2].tolist()}, its own {want.item()} "
            "(an unusual head, or attention that crosses packed sequences)"
        )


def load_model(name, device, **how):
    """A causal LM, checked, and its tokenizer; `how` is from_pretrained's. Raises ValueError in a
    line that says why it can't be used. The one place that needs transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # cuDNN's plans anew for each shape, up to a second a time, and ours vary
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        encode(tokenizer, "It needs a BOS or EOS, and offsets.")
        model, info = AutoModelForCausalLM.from_pretrained(
            name, device_map=device, output_loading_info=True, **how
        )
        if info["missing_keys"]:
            raise ValueError(f"lacks weights, {min(info['missing_keys'])} first")
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            raise ValueError("has fewer tokens than its tokenizer")
        for module in model.modules():
            # bitsandbytes' repacking for CPUs cuts gradients, silently
            module.support_avx512bf16_for_cpu = False
        check_model(model)
    except Exception as err:  # of many kinds
        raise ValueError(f"{name}: {' '.join(str(err).split())[:200]}") from err
    return model, tokenizer


def fingerprint(tensors):
    """Of (name, tensor) pairs, such as a model's named_parameters(), on whatever device."""
    made = hashlib.sha256()
    for name, x in sorted(tensors):
        made.update(f"{name} {x.shape} {x.dtype}".encode())
        made.update(x.data.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return made.hexdigest()


def best_device():
    return str(torch.accelerator.current_accelerator(check_available=True) or "cpu")


def best_dtype(device):
    """bfloat16 where a product is faster in it, else float32. Timed, since flags deceive: CPUs and
    older GPUs without it emulate it, ten times slower."""

    def seconds(dtype):
        x = torch.ones(512, 512, dtype=getattr(torch, dtype), device=device)
        return Timer("(x @ x)[0, 0].item()", globals={"x": x}).timeit(9).mean

    return min("bfloat16", "float32", key=seconds)
