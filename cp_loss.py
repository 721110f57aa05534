# Copyright 2026 the contrastive-perplexity authors. SPDX-License-Identifier: Apache-2.0
"""Prototype contrastive perplexity (CP), after Klein & Nabi, "Contrastive Perplexity for Controlled
Generation", ACL 2025, arXiv 2401.08491. Version 1. Needs torch only: copy this file.

For an anchor with positives P (clean paraphrases) and hard negatives N (toxic ones), phi(x) the perplexity
of a sentence under the model being tuned and the prototype c = mean of phi over P:

    s(x) = exp(-|phi(x) - c| / tau)
    J    = sum_P s / (sum_P s + alpha * sum_N s)          loss = -log J

    nll  = linear_nll(hidden, lm_head.weight, targets)    # (T,) hidden and targets already shifted by one
    nll  = sequence_nll(nll, sequence, num_sequences)     # (S,) nats per token
    loss, stats = cp_loss(nll, is_positive, anchor)       # (A,) one loss an anchor
    loss.mean().backward()

With a Hugging Face causal LM, `model_nll(model, token_lists)` does the first two lines on packed rows.

Departures from the paper, each a choice of the caller. Effects: rewrites toxic or failed and similarity to the input
of the default recipe without it, 36.7% and .47 with all (SmolLM2-135M-Instruct, one seed, README's "Ablation"):
 1. tau divides inside the exponent. As printed, outside of it, it cancels from J.
 2. phi="nll" is log-perplexity (what the official code uses); phi="perplexity" is the paper's text: 42.5%, .44.
 3. distance="signed" takes phi - c, not |phi - c|, for negatives. The absolute distance rewards making a
    negative that is already likelier than the prototype (most mined ones are) likelier still: 90.0%, .87.
 4. `prototype` fixes c, for example to the base model's: 33.3%, .42. None is the paper's, from the positives at hand.
 5. phi is a mean over a sequence's own tokens and c over the anchor's own positives. The official code
    averages over padding and over all positives of the micro-batch; its whole loss: 55.0%, .46 (three seeds: 62.8%, .46).
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROW = 128  # tokens of a packed row, or its longest sequence

def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    z = hidden @ weight.to(hidden.dtype).T  # (T, C)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    z = z if bias is None else z + bias
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _chunk_lse(*args) -> Tensor:
    return _logits(*args).logsumexp(1)  # (T,)


class _FrozenHeadLSE(torch.autograd.Function):
    """logsumexp of the logits z = hidden W^T + b, walked in chunks of the vocabulary. Its gradient is attention
    with W as keys and values, d lse_t / d hidden_t = sum_v p_tv z'_tv W_v, so as in flash attention each chunk's
    softmax mean joins a running one, weighed by its share. Made in the forward pass, only scaled in the backward
    pass: two products of T x D x V, the minimum."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, softcap, chunk_size):
        kind = torch.promote_types(hidden.dtype, torch.float32)
        lse = hidden.new_full((len(hidden), 1), -math.inf, dtype=kind)
        mean = torch.zeros_like(hidden, dtype=kind)  # (T, D)
        for i in range(0, len(weight), chunk_size):
            w = weight[i:i + chunk_size].to(hidden.dtype)
            z = _logits(hidden, w, None if bias is None else bias[i:i + chunk_size], softcap)  # (T, C)
            p = z.softmax(1)
            chunk = z.amax(1, keepdim=True) - p.amax(1, keepdim=True).log()  # its logsumexp, one exp fewer
            before, lse = lse, torch.logaddexp(lse, chunk)
            if ctx.needs_input_grad[0]:
                p = p if softcap is None else p.mul_(1 - (z / softcap) ** 2)
                mean.mul_((before - lse).exp()).addcmul_(p.to(w.dtype) @ w, (chunk - lse).exp())
        ctx.save_for_backward(mean)
        return lse[:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        mean, = ctx.saved_tensors
        return mean * grad[:, None], None, None, None, None


def linear_nll(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *,
               chunk_size: int = 2048, softcap: float | None = None) -> Tensor:
    """-log softmax(hidden W^T + b)[target] in nats, (T,) float32 (float64 for float64), never holding (T, V).

    hidden (T, D); weight (V, D), the LM head; targets (T,) long in [0, V): the token that hidden predicts;
    bias (V,). `softcap` is Gemma 2's cap * tanh(z / cap); scaled logits (Cohere) are a scaled `hidden`.
    Exact gradients for hidden and, where they require them, weight and bias. Arithmetic: two T x D x V
    products for a frozen head, one without gradients, four for a head that trains (recomputed in backward).
    Extra memory: T x (D + a few chunk_size). Raises ValueError on shapes that don't fit."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden (T, D) and weight (V, D) don't fit: {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"targets must be ({hidden.shape[0]},) and bias ({weight.shape[0]},)")
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    head = [weight] if bias is None else [weight, bias]
    if torch.is_grad_enabled() and any(x.requires_grad for x in head):
        chunks = zip(weight.split(chunk_size), [None] * len(weight) if bias is None else bias.split(chunk_size))
        lse = torch.stack([checkpoint(_chunk_lse, hidden, w, b, softcap, use_reentrant=False) for w, b in chunks]).logsumexp(0)
    else:
        lse = _FrozenHeadLSE.apply(hidden, weight, bias, softcap, chunk_size)
    z = (hidden.to(lse.dtype) * weight[targets].to(lse.dtype)).sum(1)  # (T,) the target's own logit
    z = z if bias is None else z + bias[targets]
    return lse - (z if softcap is None else softcap * torch.tanh(z / softcap))


def sequence_nll(token_nll: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Mean nats per token of each sequence, (S,). token_nll (T,); sequence (T,) long: whose token it is.
    Raises ValueError where a sequence has no token, since its phi is undefined."""
    if token_nll.shape != sequence.shape or token_nll.ndim != 1:
        raise ValueError(f"token_nll and sequence must both be (T,): {tuple(token_nll.shape)}, {tuple(sequence.shape)}")
    count = torch.bincount(sequence, minlength=num_sequences)
    if len(count) != num_sequences or not count.all():
        raise ValueError(f"every one of the {num_sequences} sequences needs a token: {count.tolist()[:20]}")
    return token_nll.new_zeros(num_sequences).index_add(0, sequence, token_nll) / count


def _group_logsumexp(x: Tensor, group: Tensor, num_groups: int) -> Tensor:
    top = x.new_full((num_groups,), -math.inf).scatter_reduce(0, group, x.detach(), "amax")  # (A,)
    top = top.masked_fill(top == -math.inf, 0)  # an empty group: log 0, not nan
    return top + x.new_zeros(num_groups).index_add(0, group, torch.exp(x - top[group])).log()


def cp_loss(nll: Tensor, is_positive: Tensor, anchor: Tensor, prototype: Tensor | None = None, *,
            alpha: float = 1.0, tau: float = 1.0, phi: str = "nll", distance: str = "absolute"):
    """Each anchor's -log J, (A,) float32 (float64 for float64), and a dict of detached scalars.

    nll (S,) nats per token; is_positive (S,) bool; anchor (S,) long in [0, A); sets may be ragged.
    prototype (A,) in phi's unit, or None: the mean phi of the anchor's positives, gradients flowing through
    it. -log J = softplus(log alpha + lse_N(l) - lse_P(l)), l = -|phi - c| / tau. Sign of d loss / d phi:
    a signed negative's is never positive (it is always made less likely); an absolute one's is that of
    c - phi. At distance 0 the subgradient is 0. alpha = 0 leaves J = 1: a constant. Perplexities are
    cut at e^30. Raises ValueError on shapes, options and an anchor without positives or negatives."""
    if not (nll.ndim == 1 and nll.shape == is_positive.shape == anchor.shape and len(nll)):
        raise ValueError(f"nll, is_positive, anchor must be (S,), S > 0: "
                         f"{tuple(nll.shape)}, {tuple(is_positive.shape)}, {tuple(anchor.shape)}")
    if phi not in ("nll", "perplexity") or distance not in ("absolute", "signed") or tau <= 0 or alpha < 0:
        raise ValueError(f"phi={phi!r}, distance={distance!r}, tau={tau}, alpha={alpha} is not a valid choice")
    A = int(anchor.max()) + 1 if prototype is None else len(prototype)
    pos = is_positive.bool()
    for name, member in (("positives", pos), ("negatives", ~pos)):
        empty = (torch.bincount(anchor[member], minlength=A) == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"anchors without {name}: {empty[:20]}")
    nll = nll.to(torch.promote_types(nll.dtype, torch.float32))
    x = nll if phi == "nll" else nll.clamp(max=30).exp()  # phi, (S,)
    c = sequence_nll(x[pos], anchor[pos], A) if prototype is None else prototype.to(x.dtype)  # (A,)
    diff = x - c[anchor]
    near = -torch.where(pos | torch.tensor(distance == "absolute"), diff.abs(), diff) / tau  # log s, (S,)
    log_alpha = math.log(alpha) if alpha else -math.inf
    lse_p = _group_logsumexp(near[pos], anchor[pos], A)
    lse_n = _group_logsumexp(near[~pos], anchor[~pos], A)
    loss = F.softplus(log_alpha + lse_n - lse_p)  # (A,)
    with torch.no_grad():
        same = anchor[pos][:, None] == anchor[~pos]  # (S+, S-)
        mean_p, mean_n = (sequence_nll(x[m], anchor[m], A).mean() for m in (pos, ~pos))
        stats = {"phi_pos": mean_p, "phi_neg": mean_n, "gap": mean_n - mean_p, "prototype": c.mean(),
                 "ranking": (x[pos][:, None] < x[~pos])[same].float().mean()}
    return loss, stats


def _parts(model):
    """Backbone, head, logit scale and soft cap of a Hugging Face causal LM (LoRA inside or not)."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    head, config = model.get_output_embeddings(), model.config
    if type(head) is not torch.nn.Linear:
        raise ValueError(f"{type(model).__name__}: its head is a {type(head).__name__}, not a plain linear layer")
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return model.base_model, head, scale, getattr(config, "final_logit_softcapping", None)


def pack(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Rows of whole sequences (their numbers), up to max_tokens each; a longer one has its own. First fit, longest first."""
    rows, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        k = next((k for k, left in enumerate(room) if lengths[i] <= left), len(rows))
        if k == len(rows):
            rows, room = rows + [[]], room + [max_tokens]
        rows[k].append(i)
        room[k] -= lengths[i]
    return rows


def forwards(lengths: list[int], max_tokens: int) -> list[list[list[int]]]:
    """What `model_nll` computes at once: packed rows, max_tokens in all with their ends' padding. Rows are short, since
    attention's work grows with their square."""
    width = max([min(ROW, max_tokens), *lengths])
    rows = sorted(pack(lengths, width), key=lambda row: -sum(lengths[i] for i in row))  # alike ones together
    return [rows[i:i + max(max_tokens // width, 1)] for i in range(0, len(rows), max(max_tokens // width, 1))]


def model_nll(model, sequences: list[Tensor], start: list[int] | None = None, max_tokens: int = 2048) -> Tensor:
    """phi as used by every stage: nats per token of each sequence, (S,), from batches of packed rows.

    sequences: S token-id tensors (L,), each beginning with its own context (a BOS, a prompt); start: where
    phi begins, at least 1, default 1: tokens before it are context and don't count. Position ids restart
    with each sequence, which is how transformers keeps attention within it. Batches are made by `forwards`.
    Gradients flow if grad mode is on."""
    backbone, head, scale, softcap = _parts(model)
    start, plan, out = start or [1] * len(sequences), forwards([len(x) for x in sequences], max_tokens), []
    for rows in plan:
        def grid(make, fill: int) -> Tensor:  # (B, T) on the model's device
            lines = [torch.cat([make(i) for i in row]) for row in rows]
            return torch.nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=fill).to(head.weight.device)

        number = {i: k for k, i in enumerate(sum(rows, []))}
        ids = grid(lambda i: sequences[i].long(), 0)
        position = grid(lambda i: torch.arange(len(sequences[i])), 0)
        owner = grid(lambda i: torch.full((len(sequences[i]),), number[i]), -1)
        scored = grid(lambda i: torch.arange(len(sequences[i])) >= max(start[i], 1), False)  # never a sequence's first
        mask = None
        if backbone.config.model_type == "falcon":  # does not look at position ids for its mask: spell it out
            mask = (owner[:, :, None] == owner[:, None])[:, None].tril()
        hidden = backbone(input_ids=ids, position_ids=position, attention_mask=mask, use_cache=False).last_hidden_state
        hidden = hidden.to(ids.device)[:, :-1][scored[:, 1:]]  # (N, D); layers may be spread over devices
        nll = linear_nll(hidden * scale, head.weight, ids[scored], head.bias, softcap=softcap)
        out.append(sequence_nll(nll, owner[scored], len(number)))
    order = torch.tensor([i for rows in plan for row in rows for i in row])
    return torch.cat(out)[order.argsort().to(out[0].device)]  # as they came


@torch.no_grad()
def check_model(model) -> None:
    """Raises ValueError unless packed `model_nll` equals log_softmax of the model's own logits, row by row."""
    if any(w.is_meta for w in model.parameters()):
        raise ValueError(f"{type(model).__name__} does not fit on the devices at hand")
    vocab, device = model.get_input_embeddings().num_embeddings, model.device
    ids = [torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(n)).to(device) for n in (7, 12)]
    logits = [model(input_ids=x[None], use_cache=False).logits[0, :-1].float() for x in ids]
    want = torch.stack([F.cross_entropy(z, x[1:]) for z, x in zip(logits, ids)])
    got, want = model_nll(model, 10 * ids), want.repeat(10)  # two rows, the second padded
    loose = 1e-4 if model.dtype == torch.float32 else 2e-2
    if not torch.allclose(got, want.to(got), rtol=loose, atol=loose):
        raise ValueError(f"{type(model).__name__} is not supported: packed nll {got[:2].tolist()} against its own "
                         f"{want[:2].tolist()} (an unusual head, or attention that crosses packed sequences)")


if __name__ == "__main__":  # self-check: both functions against the plain equation
    torch.manual_seed(0)
    h, w, y = torch.randn(9, 8, requires_grad=True), torch.randn(50, 8), torch.randint(50, (9,))
    plain = F.cross_entropy(h @ w.T, y, reduction="none")
    ours = linear_nll(h, w, y, chunk_size=7)
    grads = [torch.autograd.grad(z.square().sum(), h)[0] for z in (plain, ours)]
    assert torch.allclose(ours, plain, atol=1e-5) and torch.allclose(*grads, atol=1e-4)
    x, is_pos = torch.tensor([1.0, 2.0, 1.5, 4.0]), torch.tensor([True, True, False, False])
    s = torch.exp(-(x - 1.5).abs() / 2)
    want = -math.log(s[:2].sum() / (s[:2].sum() + 1.1 * s[2:].sum()))
    loss, _ = cp_loss(x, is_pos, torch.zeros(4, dtype=torch.long), alpha=1.1, tau=2.0)
    assert abs(loss.item() - want) < 1e-6
    print("cp_loss self-check passed")
