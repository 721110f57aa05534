"""cp_loss.py against literal float64 loops over the equations, and the models' own logits."""

import math
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import cp_loss as cp_loss_module
from cp_loss import (
    best_device,
    best_dtype,
    check_model,
    cp_loss,
    encode,
    fingerprint,
    linear_nll,
    load_model,
    model_nll,
    sequence_nll,
)

ROOT = Path(__file__).parent.parent


def test_fingerprints_see_order_and_kind():
    """Of a store's bools, too: which lines are held out is told by nothing else."""
    held = torch.tensor([True, True, False, False])
    values = torch.tensor([3.0, 5.0])
    some = [held, held.flip(0), held[:0], held & False, values, values.flip(0)]
    some += [values.bfloat16(), values[None], torch.tensor(3.0), held.long()]
    made = [fingerprint([("x", x)]) for x in some]
    assert len({*made}) == len(made)
    pair = [("a", held), ("b", values)]
    assert fingerprint(pair) == fingerprint(pair[::-1])
    columns = torch.stack([values, values + 1], 1)
    assert fingerprint([("x", columns[:, 0])]) == fingerprint([("x", values)])


def plain_nll(hidden, weight, targets, bias=None, softcap=None):
    z = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    z = softcap * torch.tanh(z / softcap) if softcap else z
    return F.cross_entropy(z, targets, reduction="none")


def relative(got, want) -> float:
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize(
    "dtype, loose",
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)],
)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize(
    "shape",
    [
        (0, 3, 5, 2),
        (1, 8, 7, 3),
        (9, 64, 50, 50),
        (13, 16, 101, 7),
        (40, 96, 1003, 256),
    ],
)
def test_linear_nll_value_and_gradients(
    dtype, loose, with_bias, softcap, head, shape
):
    """Against log_softmax in float64 on the same rounded inputs, over ragged chunks."""
    torch.manual_seed(0)
    T, D, V, chunk = shape
    given = [torch.randn(T, D), torch.randn(V, D) * 2 / D**0.5, torch.randn(V)]
    given = [x.to(dtype) for x in given[: 2 + with_bias]]
    ours, exact = ([x.to(kind) for x in given] for kind in (dtype, torch.float64))
    for inputs in (ours, exact):
        for i, x in enumerate(inputs):
            x.requires_grad_(i == 0 or head == "trained")
    targets, scale = (
        torch.randint(V, (T,)),
        torch.rand(T, dtype=torch.float64) + 0.1,
    )
    want = plain_nll(*exact[:2], targets, *exact[2:], softcap=softcap)
    got = linear_nll(
        *ours[:2], targets, *ours[2:], chunk_size=chunk, softcap=softcap
    )
    assert got.shape == (T,)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(got, want) <= loose
    count = len(given) if head == "trained" else 1
    grads = torch.autograd.grad((got * scale).sum(), ours[:count])
    for g, w in zip(
        grads, torch.autograd.grad((want * scale).sum(), exact[:count])
    ):
        assert g.dtype == dtype and relative(g, w) <= loose


def test_linear_nll_gradcheck():
    def make(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(1)
    targets, hidden, weight, bias = (
        torch.randint(11, (5,)),
        make(5, 4),
        make(11, 4),
        make(11),
    )
    for cap in (None, 2.0):

        def trained(h, w, b, cap=cap):
            return linear_nll(h, w, targets, b, chunk_size=4, softcap=cap)

        def frozen(h, trained=trained):
            return trained(h, weight.detach(), bias.detach())

        assert torch.autograd.gradcheck(frozen, (hidden,))
        assert torch.autograd.gradcheck(trained, (hidden, weight, bias))


def test_linear_nll_keeps_no_vocabulary_and_no_graph_unasked():
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(1000, 8)
    targets, kept = torch.randint(1000, (6,)), []

    def keep(x):
        if x.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
            kept.append(x.numel())
        return x

    for trained in (False, True):
        weight.requires_grad_(trained)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            linear_nll(hidden, weight, targets, chunk_size=64)
    assert kept and max(kept) < 6 * 64
    with torch.no_grad():
        assert linear_nll(hidden, weight, targets).grad_fn is None
    weight.requires_grad_(False)
    assert linear_nll(hidden.detach(), weight, targets).grad_fn is None


@pytest.mark.parametrize("head", [False, True])
def test_linear_nll_used_twice_compiled_checkpointed(head):
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(6, 8, requires_grad=True),
        torch.randn(99, 8, requires_grad=head),
    )
    targets = torch.randint(99, (6,))
    inputs = [hidden, weight] if head else [hidden]

    def ours(h, w):
        return linear_nll(h, w, targets, chunk_size=20)

    def gradients(nll, **how):
        loss = nll.sum() + nll.square().mean()  # used twice
        return torch.autograd.grad(loss, inputs, **how)

    want = gradients(plain_nll(hidden, weight, targets))
    got = ours(hidden, weight)
    compiled = torch.compile(ours, backend="aot_eager")(hidden, weight)
    saved = torch.utils.checkpoint.checkpoint(
        ours, hidden, weight, use_reentrant=False
    )
    variants = [gradients(got, retain_graph=True), gradients(got)]
    for grads in (*variants, gradients(saved), gradients(compiled)):
        for g, w in zip(grads, want):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def test_linear_nll_under_autocast():
    torch.manual_seed(0)
    hidden, weight, targets = (
        torch.randn(20, 64, requires_grad=True),
        torch.randn(300, 64) * 0.3,
        torch.randint(300, (20,)),
    )
    want = plain_nll(hidden.double(), weight.double(), targets)
    for head in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            weight.requires_grad_(head)
            got = linear_nll(hidden, weight, targets, chunk_size=70)
        (grad,) = torch.autograd.grad(got.sum(), hidden)
        assert got.dtype == torch.float32
        assert 1e-6 < relative(got, want) < 1e-2  # it did round
        assert (
            grad.dtype == torch.float32
            and relative(
                grad,
                torch.autograd.grad(want.sum(), hidden, retain_graph=True)[
                    0
                ].double(),
            )
            < 1e-2
        )


def test_linear_nll_extreme_logits():
    huge = linear_nll(
        torch.tensor([[1e4]]),
        torch.tensor([[1.0], [-1.0], [0.0]]),
        torch.tensor([1]),
        chunk_size=1,
    )
    assert huge.item() == 2e4


@pytest.mark.parametrize(
    "bad",
    [
        lambda h, w, t: linear_nll(h[0], w, t),
        lambda h, w, t: linear_nll(h, w[:, :3], t),
        lambda h, w, t: linear_nll(h, w, t[:2]),
        lambda h, w, t: linear_nll(h, w, t, torch.zeros(3)),
        lambda h, w, t: linear_nll(h, w, t - 100),  # Hugging Face's ignore index
    ],
)
def test_linear_nll_refuses_shapes(bad):
    with pytest.raises(ValueError):
        bad(torch.randn(4, 5), torch.randn(9, 5), torch.zeros(4, dtype=torch.long))


def test_a_padded_batch_as_the_file_says():
    """phi of each row from hidden states and labels with -100, against its own cross-entropy."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 6, 5), torch.randn(9, 5)
    labels = torch.randint(0, 9, (3, 6))
    labels[0, :3] = labels[1, 4:] = -100
    counts = labels[:, 1:] >= 0
    sequence = counts.nonzero()[:, 0]
    nll = linear_nll(hidden[:, :-1][counts], weight, labels[:, 1:][counts])
    got = sequence_nll(nll, sequence, 3)
    for row in range(3):
        logits = hidden[row, :-1] @ weight.T
        want = F.cross_entropy(logits, labels[row, 1:])
        assert abs(got[row].item() - want.item()) < 1e-5


@pytest.mark.parametrize("targets", [[3, 1, 4, 1, 5, 9, 2], [49] * 7])
def test_divergence_from_the_base_as_the_file_says(targets):
    """The file's own lines, run, against softmaxes over the whole vocabulary."""
    told = cp_loss_module.__doc__.split("have no soft cap:\n\n")[1].split("\n\n")[0]
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False).double().requires_grad_(False)
    before, after = 3 * torch.randn(2, 7, 8, dtype=torch.float64)
    after.requires_grad_()
    p, q = (F.linear(x, head.weight).log_softmax(-1) for x in (before, after))
    want = F.kl_div(q, p, reduction="none", log_target=True).sum(1)
    scope = {"torch": torch, "linear_nll": linear_nll, "lm_head": head}
    scope |= {"base_hidden": before, "hidden": after}
    scope["targets"] = torch.tensor(targets)
    exec(textwrap.dedent(told), scope)
    assert want.min() > 1e-3
    torch.testing.assert_close(scope["kl"], want)
    grads = [torch.autograd.grad(x.mean(), after)[0] for x in (scope["kl"], want)]
    torch.testing.assert_close(*grads)


def test_sequence_nll_is_a_mean_and_refuses_an_empty_sequence():
    nll, sequence = torch.tensor([1.0, 5.0, 3.0]), torch.tensor([1, 0, 1])
    assert sequence_nll(nll, sequence, 2).tolist() == [5.0, 2.0]
    for wrong in (3, 1):
        with pytest.raises(ValueError, match="needs a token"):
            sequence_nll(nll, sequence, wrong)
    many = torch.full((600,), 3.0, dtype=torch.bfloat16)  # which counts to 256
    assert sequence_nll(many, torch.zeros(600).long(), 1).tolist() == [3.0]


def loop_loss(nll, positive, anchor, prototype, alpha, tau, phi, distance):
    """The equation, anchor by anchor, sequence by sequence."""
    out = []
    for a in range(int(anchor.max()) + 1):
        x = [
            (v if phi == "nll" else v.exp(), p)
            for v, p, k in zip(nll, positive, anchor)
            if k == a
        ]
        pos = [v for v, p in x if p]
        c = sum(pos) / len(pos) if prototype is None else prototype[a]
        top = sum(torch.exp(-(v - c).abs() / tau) for v in pos)
        rest = sum(
            torch.exp(-((v - c).abs() if distance == "absolute" else v - c) / tau)
            for v, p in x
            if not p
        )
        out.append(-torch.log(top / (top + alpha * rest)))
    return torch.stack(out)


def test_a_perplexity_is_cut_where_it_would_overflow():
    """At exp(30), and no earlier."""
    sets = torch.tensor([True, False]), torch.zeros(2, dtype=torch.long)
    loss, _ = cp_loss(torch.tensor([20.0, 25.0]), *sets, phi="perplexity")
    assert loss.item() == 0
    loss, _ = cp_loss(torch.tensor([40.0, 99.0]), *sets, phi="perplexity")
    assert loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("phi", ["nll", "perplexity"])
@pytest.mark.parametrize("distance", ["absolute", "signed"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("alpha, tau", [(1.0, 1.0), (1.1, 0.7), (30.0, 2.0)])
def test_cp_loss_equals_the_loop(phi, distance, given, alpha, tau):
    torch.manual_seed(3)
    anchor = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2])  # ragged
    positive = torch.tensor([1, 0, 0, 1, 0, 1, 1, 1, 0, 0]).bool()
    nll = (torch.rand(10, dtype=torch.float64) * 2).requires_grad_()
    prototype = (
        torch.tensor([1.0, 2.0, 1.5], dtype=torch.float64) if given else None
    )
    want = loop_loss(nll, positive, anchor, prototype, alpha, tau, phi, distance)
    low = nll.detach().float().requires_grad_()
    got, stats = cp_loss(
        low,
        positive,
        anchor,
        prototype,
        alpha=alpha,
        tau=tau,
        phi=phi,
        distance=distance,
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    g, w = (
        torch.autograd.grad(got.sum(), low)[0],
        torch.autograd.grad(want.sum(), nll)[0],
    )
    torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5)
    assert not any(v.requires_grad for v in stats.values())
    order = torch.randperm(10)
    moved, again = cp_loss(
        low[order],
        positive[order],
        anchor[order],
        prototype,
        alpha=alpha,
        tau=tau,
        phi=phi,
        distance=distance,
    )
    torch.testing.assert_close(moved, got)
    assert again.keys() == stats.keys()
    for name in stats:
        torch.testing.assert_close(again[name], stats[name])


def test_cp_loss_statistics():
    _, stats = cp_loss(
        torch.tensor([1.0, 3.0, 2.0, 6.0]),
        torch.tensor([True, True, False, False]),
        torch.zeros(4, dtype=torch.long),
    )
    assert {k: v.item() for k, v in stats.items()} == {
        # distances 1, 1 of positives; 0, 4 of negatives
        "cp": pytest.approx(math.log1p((1 + math.exp(-4)) / (2 * math.exp(-1)))),
        "phi_pos": 2.0,
        "phi_neg": 4.0,
        "gap": 2.0,
        "prototype": 2.0,
    }


def test_aim_holds_each_anchors_positives():
    nll = torch.tensor([1.0, 3.0, 2.0, 6.0, 5.0, 9.0], dtype=torch.float64)
    nll.requires_grad_()
    positive = torch.tensor([True, True, False, False, True, False])
    anchor = torch.tensor([0, 0, 0, 0, 1, 1])
    aim = torch.tensor([2.0, 2.5, 50.0, 50.0, 0.0, 50.0])
    free, _ = cp_loss(nll, positive, anchor, phi="perplexity")
    held, _ = cp_loss(nll, positive, anchor, phi="perplexity", aim=aim, hold=0.6)
    more = held - free
    torch.testing.assert_close(more, 0.6 * torch.tensor([0.75, 5.0]).double())
    (grad,) = torch.autograd.grad(more.sum(), nll)
    want = torch.tensor([-0.3, 0.3, 0.0, 0.0, 0.6, 0.0]).double()
    torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("phi", ["nll", "perplexity"])
@pytest.mark.parametrize("distance", ["absolute", "signed"])
@pytest.mark.parametrize(
    "values",
    [
        [0.0, 0.0, 0.0],
        [1e4, 0.0, 1e4],
        [5.0, 1e4, 1e4],
        [1e4, 1e4, 0.0],
        [0.0, 1e4, 1e4],
    ],
)
def test_cp_loss_extremes_stay_finite(phi, distance, values):
    """|P| = 1 (always at distance 0), ties, and nll from 0 to 1e4."""
    nll = torch.tensor(values, requires_grad=True)
    for alpha in (0.0, 1.0, 100.0):
        for prototype in (None, torch.tensor([3.0])):
            loss, _ = cp_loss(
                nll,
                torch.tensor([True, False, False]),
                torch.zeros(3, dtype=torch.long),
                prototype,
                alpha=alpha,
                phi=phi,
                distance=distance,
            )
            (grad,) = torch.autograd.grad(loss.sum(), nll)
            assert loss.isfinite().all() and grad.isfinite().all()
            assert alpha or (loss.item() == 0 and not grad.any())


@pytest.mark.parametrize(
    "positives, negatives", [(1, 1), (1, 1000), (1000, 1), (1000, 1000)]
)
def test_cp_loss_set_sizes(positives, negatives):
    torch.manual_seed(0)
    positive, anchor = (
        torch.arange(positives + negatives) < positives,
        torch.zeros(positives + negatives, dtype=torch.long),
    )
    nll = torch.rand(positives + negatives, dtype=torch.float64) * 4
    want = loop_loss(nll, positive, anchor, None, 1.1, 0.5, "nll", "absolute")
    torch.testing.assert_close(
        cp_loss(nll.float(), positive, anchor, alpha=1.1, tau=0.5)[0].double(),
        want,
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("distance", ["absolute", "signed"])
def test_cp_loss_gradcheck_and_free_prototype(distance):
    """In float64 it stays float64; gradients flow into a prototype that asks for them."""
    nll = torch.tensor(
        [1.0, 2.0, 2.5, 0.5, 4.0], dtype=torch.float64, requires_grad=True
    )
    positive, anchor = (
        torch.tensor([True, True, False, False, False]),
        torch.zeros(5, dtype=torch.long),
    )
    c = torch.tensor([1.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: cp_loss(x, positive, anchor, distance=distance)[0], (nll,)
    )
    assert torch.autograd.gradcheck(
        lambda x, c: cp_loss(x, positive, anchor, c, distance=distance)[0], (nll, c)
    )


@pytest.mark.parametrize("prototype", [None, torch.tensor([3.0])])
def test_cp_loss_signs(prototype):
    """d loss / d phi below, at and above the prototype; of positives if that is fixed."""
    signs = {}
    for distance in ("absolute", "signed"):
        nll = torch.tensor([2.0, 3.0, 4.0, 1.0, 3.0, 5.0], requires_grad=True)
        positive = torch.tensor([True, True, True, False, False, False])
        cp_loss(
            nll,
            positive,
            torch.zeros(6, dtype=torch.long),
            prototype,
            distance=distance,
        )[0].sum().backward()
        signs[distance] = nll.grad.sign().int().tolist()
    assert signs["absolute"][3:] == [1, 0, -1] and signs["signed"][3:] == [
        -1,
        -1,
        -1,
    ]
    if prototype is not None:  # a free one adds its own pull to every positive
        assert signs["absolute"][:3] == signs["signed"][:3] == [-1, 0, 1]


def test_compiles_whole():
    nll = torch.tensor([1.0, 5.0, 3.0, 2.0], requires_grad=True)
    positive, anchor = torch.tensor([True, False] * 2), torch.tensor([0, 0, 1, 1])
    how = {"distance": "signed", "aim": torch.ones(4), "hold": 0.5}
    grads = []
    for function in (cp_loss, torch.compile(cp_loss, fullgraph=True)):
        loss, _ = function(nll, positive, anchor, **how)
        grads += [loss, *torch.autograd.grad(loss.sum(), nll)]
    torch.testing.assert_close(grads[:2], grads[2:])
    compiled = torch.compile(sequence_nll, fullgraph=True)
    assert compiled(nll, anchor, 2).tolist() == [3.0, 2.5]


def test_cp_loss_refuses():
    nll, positive, anchor = (
        torch.ones(3),
        torch.tensor([True, False, True]),
        torch.tensor([0, 0, 1]),
    )
    with pytest.raises(ValueError, match=r"anchors without negatives: \[1\]"):
        cp_loss(nll, positive, anchor)
    with pytest.raises(ValueError, match=r"anchors without positives: \[1\]"):
        cp_loss(nll, torch.tensor([True, False, False]), anchor)
    for bad in (
        {"tau": 0.0},
        {"alpha": -1.0},
        {"phi": "ppl"},
        {"distance": "squared"},
    ):
        with pytest.raises(ValueError, match="not a valid choice"):
            cp_loss(nll[:2], positive[:2], anchor[:2], **bad)
    with pytest.raises(ValueError, match="must be"):
        cp_loss(nll, positive[:2], anchor)


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 97,
}
GPT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 97,
}
FAMILIES = {
    "Llama": SMALL,
    "Mistral": SMALL | {"sliding_window": 40},
    "Qwen2": SMALL,
    "Qwen3": SMALL | {"head_dim": 8},
    "Falcon": GPT,
    "GPTNeoX": GPT,
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97},
    "Gemma2": SMALL
    | {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 40},
    "Gemma3Text": SMALL | {"head_dim": 8, "sliding_window": 40},
    "Cohere": SMALL | {"logit_scale": 0.5},
    "Granite": SMALL | {"logits_scaling": 4.0},
}


def tiny(family: str):
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(
        **FAMILIES[family], pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa" if family != "Gemma2" else "eager"
    ).eval()
    with torch.no_grad():
        for w in model.parameters():  # far from uniform: caps and scales matter
            w.mul_(8)
    return model


def computed(model):
    """(B, T) of each forward pass of the backbone, from now on."""
    shapes = []
    model.get_decoder().register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    return shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_each_models_own_nll(family, monkeypatch):
    model = tiny(family)
    check_model(model)
    ids = [torch.randint(97, (n,)) for n in (5, 2, 11)]
    start = [1, 1, 4]
    with torch.no_grad():
        want = []
        for x, s in zip(ids, start):
            logp = (
                model(input_ids=x[None], use_cache=False)
                .logits[0, :-1]
                .double()
                .log_softmax(-1)
            )
            want.append(-logp[torch.arange(len(x) - 1), x[1:]][s - 1 :].mean())
        # the last: rows of 11 and of 5 + 2, padded
        for row, max_tokens, batches in (
            (128, 1, 2),
            (128, 10, 2),
            (128, 100, 1),
            (7, 100, 1),
        ):
            monkeypatch.setattr("cp_loss.ROW", row)
            shapes = computed(model)
            got = model_nll(model, ids, start, max_tokens)
            torch.testing.assert_close(
                got.double(), torch.stack(want), rtol=1e-4, atol=1e-4
            )
            assert len(shapes) == batches


def random_tokens(n):
    return torch.randint(3, 97, (n,))


def of_three_contexts():
    """Three sequences of each, the last context empty; where each begins to count."""
    contexts = [random_tokens(n) for n in (20, 7, 0)]
    ids = [torch.cat([c, random_tokens(n)]) for c in contexts for n in (9, 6, 4)]
    return ids, [len(c) + 1 for c in contexts for _ in range(3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_context_is_computed_once(family):
    """As if each sequence stood alone, in rows that are full, too."""
    model = tiny(family)
    ids, start = of_three_contexts()
    with torch.no_grad():
        alone = [model_nll(model, [x], [s]) for x, s in zip(ids, start)]
        shapes = computed(model)
        got = model_nll(model, ids, start)
        torch.testing.assert_close(got, torch.cat(alone), rtol=1e-4, atol=1e-4)
        assert shapes == [(3, 20 + 9 + 6 + 4)]
        torch.testing.assert_close(model_nll(model, 50 * ids, 50 * start)[-9:], got)
        first = [model_nll(model, ids, 9 * [s]) for s in (0, 1)]  # it never counts
        torch.testing.assert_close(*first)
    assert len(shapes) > 2 and all(64 < width <= 128 for _, width in shapes[1:])


@pytest.mark.parametrize("family", ["Mistral", "Gemma2", "Gemma3Text"])
def test_nothing_is_shared_beyond_a_sliding_window(family):
    model = tiny(family)
    ids, start = of_three_contexts()
    long = torch.cat([random_tokens(model.config.sliding_window), *ids[:2]])
    with torch.no_grad():
        got = model_nll(model, [long, *ids], [1, *start])
        want = model(input_ids=long[None], labels=long[None]).loss
        torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            got[1:], model_nll(model, ids, start), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_in_each_family(family, monkeypatch):
    """The objective's gradient for LoRA weights, through packed rows and the model's own logits."""
    monkeypatch.setattr("cp_loss.ROW", 16)  # two rows at once
    base = tiny(family)
    with torch.no_grad():
        [w.div_(4) for w in base.parameters()]
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, config)
    weights = [w for w in model.parameters() if w.requires_grad]
    ids, own = [torch.randint(97, (n,)) for n in (5, 3, 11, 7)], []
    for x in ids:
        logits = model(input_ids=x[None], use_cache=False).logits[0, :-1].float()
        own.append(F.cross_entropy(logits, x[1:]))
    positive, anchor = (
        torch.tensor([True, True, False, False]),
        torch.zeros(4, dtype=torch.long),
    )
    grads = []
    for nll in (torch.stack(own), model_nll(model, ids, max_tokens=32)):
        loss, _ = cp_loss(nll, positive, anchor)
        grads.append(
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(loss.mean(), weights)]
            )
        )
    want, got = grads
    assert want.norm() > 1e-6 and (got - want).norm() / want.norm() < 1e-3


def with_loss_times(model, factor):
    own = model.forward

    def scaled(*args, **kwargs):
        out = own(*args, **kwargs)
        out.loss = out.loss * factor
        return out

    model.forward = scaled
    return model


def test_check_model_refuses_a_head_it_does_not_reproduce():
    with pytest.raises(ValueError, match="not supported"):
        check_model(with_loss_times(tiny("Llama"), 1.01))
    check_model(with_loss_times(tiny("Llama"), 1.0005))  # rounding
    # a processor's bfloat16 took .39 off 17.5 nats
    check_model(with_loss_times(tiny("Llama").bfloat16(), 1.03))
    with pytest.raises(ValueError, match="not supported"):
        check_model(with_loss_times(tiny("Llama").bfloat16(), 1.2))
    with pytest.raises(ValueError, match="does not fit"):
        check_model(tiny("Llama").to("meta"))
    model = tiny("Llama")
    model.set_output_embeddings(torch.nn.Sequential(model.lm_head))
    with pytest.raises(ValueError, match="not Linear"):
        check_model(model)


@pytest.mark.parametrize("prepend", ["always", "never"])
def test_encode_takes_context_and_text_as_one_string(prepend):
    """A SentencePiece-like tokenizer, which marks words: pieces alone would get other tokens."""
    words = ["<s>", "</s>", "?", "▁Say:", "Say:", "▁a", "a", "▁b", "\n"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "?"))
    breaks = pre_tokenizers.Split("\n", "isolated")
    metaspace = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    backend.pre_tokenizer = pre_tokenizers.Sequence([breaks, metaspace])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    whole = fast("Say: a b\n", add_special_tokens=False).input_ids
    ids, start = encode(fast, " a b\n", "Say:")
    # after the EOS, for want of a BOS
    assert ids.tolist() == [1, *whole] and start == 2
    fast.bos_token = "<s>"
    assert encode(fast, "a")[0][0] == 0 and encode(fast, "a")[1] == 1


def test_a_model_that_lacks_weights_is_refused(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    rest = {k: x for k, x in load_file(file).items() if "layers.1.mlp" not in k}
    save_file(rest, file, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights, model.layers.1.mlp.down"):
        load_model(str(tmp_path / "model"), "cpu")


def test_the_faster_dtype_is_taken(monkeypatch):
    assert best_device() in ("cpu", "cuda", "mps", "xpu")
    for slow, want in ((torch.bfloat16, "float32"), (torch.float32, "bfloat16")):

        class Clock:
            def __init__(self, _, globals, slow=slow):  # noqa: A002
                self.mean = 2.0 if globals["x"].dtype == slow else 1.0

            def timeit(self, _):
                return self

        monkeypatch.setattr("cp_loss.Timer", Clock)
        assert best_dtype("cpu") == want


def test_copied_alone_it_runs(tmp_path):
    shutil.copy(ROOT / "cp_loss.py", tmp_path)
    use = "import torch, cp_loss; x = torch.tensor([1.0, 2.0]); good = torch.tensor([True, False])"
    use += "; print(cp_loss.cp_loss(x, good, torch.zeros(2, dtype=torch.long))[0].item())"
    command = [sys.executable, "-c", use]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert abs(float(done.stdout) - math.log(1 + math.exp(-1))) < 1e-6, done.stderr
    source = (ROOT / "cp_loss.py").read_text().splitlines()
    imports = [x.split()[1] for x in source if x.startswith(("import", "from"))]
    assert {x.split(".")[0] for x in imports} == {"hashlib", "math", "torch"}
