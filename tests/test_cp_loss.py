"""cp_loss.py against literal float64 loops over the equations, and against the models' own logits."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model

from cp_loss import check_model, cp_loss, forwards, linear_nll, model_nll, pack, sequence_nll

ROOT = Path(__file__).parent.parent


def plain_nll(hidden, weight, targets, bias=None, softcap=None):
    z = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    z = softcap * torch.tanh(z / softcap) if softcap else z
    return F.cross_entropy(z, targets, reduction="none")


def relative(got, want) -> float:
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype, loose", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_linear_nll_value_and_gradients(dtype, loose, with_bias, softcap, head):
    """Against log_softmax in float64 on the same rounded inputs, over ragged chunks."""
    torch.manual_seed(0)
    for T, D, V, chunk in [(0, 3, 5, 2), (1, 8, 7, 3), (9, 64, 50, 50), (13, 16, 101, 7), (40, 96, 1003, 256), (4, 8, 33, 64)]:
        train = [True, head == "trained", head == "trained"][:2 + with_bias]
        inputs = [torch.randn(shape, dtype=torch.float64).mul(scale).to(dtype).requires_grad_(on) for shape, scale, on in
                  zip([(T, D), (V, D), (V,)], [1, 2 / D ** 0.5, 1], train)]
        exact = [x.detach().double().requires_grad_(on) for x, on in zip(inputs, train)]
        targets, scale = torch.randint(V, (T,)), torch.rand(T, dtype=torch.float64) + 0.1
        want = plain_nll(exact[0], exact[1], targets, exact[2] if with_bias else None, softcap)
        got = linear_nll(inputs[0], inputs[1], targets, inputs[2] if with_bias else None, chunk_size=chunk, softcap=softcap)
        assert got.shape == (T,) and got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert relative(got, want) <= loose
        grads = torch.autograd.grad((want * scale).sum(), [x for x in exact if x.requires_grad])
        for g, w in zip(torch.autograd.grad((got * scale).sum(), [x for x in inputs if x.requires_grad]), grads):
            assert g.dtype == dtype and relative(g, w) <= loose


def test_linear_nll_gradcheck():
    torch.manual_seed(1)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    targets, weight, bias = torch.randint(11, (5,)), make(11, 4), make(11)
    for softcap in (None, 2.0):
        assert torch.autograd.gradcheck(lambda h: linear_nll(h, weight.detach(), targets, bias.detach(), chunk_size=4, softcap=softcap), (make(5, 4),))
        assert torch.autograd.gradcheck(lambda h, w, b: linear_nll(h, w, targets, b, chunk_size=4, softcap=softcap), (make(5, 4), weight, bias))


def test_linear_nll_keeps_no_vocabulary_and_no_graph_unasked():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(6, 8, requires_grad=True), torch.randn(1000, 8), torch.randint(1000, (6,))
    for head in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            linear_nll(hidden, weight.requires_grad_(head), targets, chunk_size=64)
        assert kept and all(t.numel() < 6 * 64 for t in kept if t.data_ptr() != weight.data_ptr() and t.untyped_storage().data_ptr() != weight.data_ptr())
    with torch.no_grad():
        assert linear_nll(hidden, weight, targets).grad_fn is None
    assert linear_nll(hidden.detach(), weight.requires_grad_(False), targets).grad_fn is None


@pytest.mark.parametrize("head", [False, True])
def test_linear_nll_used_twice_compiled_checkpointed(head):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(6, 8, requires_grad=True), torch.randn(99, 8, requires_grad=head), torch.randint(99, (6,))
    inputs = [hidden, weight] if head else [hidden]
    ours = lambda h, w: linear_nll(h, w, targets, chunk_size=20)  # noqa: E731
    loss = lambda nll: nll.sum() + nll.square().mean()  # noqa: E731, two uses of one result
    want = torch.autograd.grad(loss(plain_nll(hidden, weight, targets)), inputs)
    got = loss(ours(hidden, weight))
    variants = [torch.autograd.grad(got, inputs, retain_graph=True), torch.autograd.grad(got, inputs)]
    variants.append(torch.autograd.grad(loss(torch.utils.checkpoint.checkpoint(ours, hidden, weight, use_reentrant=False)), inputs))
    variants.append(torch.autograd.grad(loss(torch.compile(ours, backend="aot_eager")(hidden, weight)), inputs))
    for grads in variants:
        for g, w in zip(grads, want):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def test_linear_nll_under_autocast():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(20, 64, requires_grad=True), torch.randn(300, 64) * 0.3, torch.randint(300, (20,))
    want = plain_nll(hidden.double(), weight.double(), targets)
    for head in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            got = linear_nll(hidden, weight.requires_grad_(head), targets, chunk_size=70)
        grad, = torch.autograd.grad(got.sum(), hidden)
        assert got.dtype == torch.float32 and 1e-6 < relative(got, want) < 1e-2  # it did round
        assert grad.dtype == torch.float32 and relative(grad, torch.autograd.grad(want.sum(), hidden, retain_graph=True)[0].double()) < 1e-2


def test_linear_nll_extreme_logits():
    huge = linear_nll(torch.tensor([[1e4]]), torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([1]), chunk_size=1)
    assert huge.item() == 2e4


@pytest.mark.parametrize("bad", [lambda h, w, t: linear_nll(h[0], w, t), lambda h, w, t: linear_nll(h, w[:, :3], t),
                                 lambda h, w, t: linear_nll(h, w, t[:2]), lambda h, w, t: linear_nll(h, w, t, torch.zeros(3))])
def test_linear_nll_refuses_shapes(bad):
    with pytest.raises(ValueError):
        bad(torch.randn(4, 5), torch.randn(9, 5), torch.zeros(4, dtype=torch.long))


def test_sequence_nll_is_a_mean_and_refuses_an_empty_sequence():
    nll, sequence = torch.tensor([1.0, 5.0, 3.0]), torch.tensor([1, 0, 1])
    assert sequence_nll(nll, sequence, 2).tolist() == [5.0, 2.0]
    with pytest.raises(ValueError, match="needs a token"):
        sequence_nll(nll, sequence, 3)


def loop_loss(nll, positive, anchor, prototype, alpha, tau, phi, distance):
    """The equation, anchor by anchor, sequence by sequence."""
    out = []
    for a in range(int(anchor.max()) + 1):
        x = [(v if phi == "nll" else v.exp(), p) for v, p, k in zip(nll, positive, anchor) if k == a]
        pos = [v for v, p in x if p]
        c = sum(pos) / len(pos) if prototype is None else prototype[a]
        top = sum(torch.exp(-(v - c).abs() / tau) for v in pos)
        rest = sum(torch.exp(-((v - c).abs() if distance == "absolute" else v - c) / tau) for v, p in x if not p)
        out.append(-torch.log(top / (top + alpha * rest)))
    return torch.stack(out)


@pytest.mark.parametrize("phi", ["nll", "perplexity"])
@pytest.mark.parametrize("distance", ["absolute", "signed"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("alpha, tau", [(1.0, 1.0), (1.1, 0.7), (30.0, 2.0)])
def test_cp_loss_equals_the_loop(phi, distance, given, alpha, tau):
    torch.manual_seed(3)
    anchor = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2])  # ragged
    positive = torch.tensor([1, 0, 0, 1, 0, 1, 1, 1, 0, 0]).bool()
    nll = (torch.rand(10, dtype=torch.float64) * 2).requires_grad_()
    prototype = torch.tensor([1.0, 2.0, 1.5], dtype=torch.float64) if given else None
    want = loop_loss(nll, positive, anchor, prototype, alpha, tau, phi, distance)
    low = nll.detach().float().requires_grad_()
    got, stats = cp_loss(low, positive, anchor, prototype, alpha=alpha, tau=tau, phi=phi, distance=distance)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    g, w = torch.autograd.grad(got.sum(), low)[0], torch.autograd.grad(want.sum(), nll)[0]
    torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5)
    assert not any(v.requires_grad for v in stats.values())
    order = torch.randperm(10)
    moved, again = cp_loss(low[order], positive[order], anchor[order], prototype, alpha=alpha, tau=tau, phi=phi, distance=distance)
    torch.testing.assert_close(moved, got)
    torch.testing.assert_close(again["ranking"], stats["ranking"])


def test_cp_loss_statistics():
    _, stats = cp_loss(torch.tensor([1.0, 3.0, 2.0, 6.0]), torch.tensor([True, True, False, False]), torch.zeros(4, dtype=torch.long))
    assert {k: v.item() for k, v in stats.items()} == {"phi_pos": 2.0, "phi_neg": 4.0, "gap": 2.0, "prototype": 2.0, "ranking": 0.75}


@pytest.mark.parametrize("phi", ["nll", "perplexity"])
@pytest.mark.parametrize("distance", ["absolute", "signed"])
@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [1e4, 0.0, 1e4], [5.0, 1e4, 1e4], [1e4, 1e4, 0.0], [0.0, 1e4, 1e4]])
def test_cp_loss_extremes_stay_finite(phi, distance, values):
    """|P| = 1 (always at distance 0), ties, and nll from 0 to 1e4."""
    nll = torch.tensor(values, requires_grad=True)
    for alpha in (0.0, 1.0, 100.0):
        for prototype in (None, torch.tensor([3.0])):
            loss, _ = cp_loss(nll, torch.tensor([True, False, False]), torch.zeros(3, dtype=torch.long), prototype, alpha=alpha, phi=phi, distance=distance)
            grad, = torch.autograd.grad(loss.sum(), nll)
            assert loss.isfinite().all() and grad.isfinite().all()
            assert alpha or (loss.item() == 0 and not grad.any())


@pytest.mark.parametrize("positives, negatives", [(1, 1), (1, 1000), (1000, 1), (1000, 1000)])
def test_cp_loss_set_sizes(positives, negatives):
    torch.manual_seed(0)
    positive, anchor = torch.arange(positives + negatives) < positives, torch.zeros(positives + negatives, dtype=torch.long)
    nll = torch.rand(positives + negatives, dtype=torch.float64) * 4
    want = loop_loss(nll, positive, anchor, None, 1.1, 0.5, "nll", "absolute")
    torch.testing.assert_close(cp_loss(nll.float(), positive, anchor, alpha=1.1, tau=0.5)[0].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("distance", ["absolute", "signed"])
def test_cp_loss_gradcheck_and_free_prototype(distance):
    """In float64 it stays float64; gradients flow into a prototype that asks for them."""
    nll = torch.tensor([1.0, 2.0, 2.5, 0.5, 4.0], dtype=torch.float64, requires_grad=True)
    positive, anchor = torch.tensor([True, True, False, False, False]), torch.zeros(5, dtype=torch.long)
    c = torch.tensor([1.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: cp_loss(x, positive, anchor, distance=distance)[0], (nll,))
    assert torch.autograd.gradcheck(lambda x, c: cp_loss(x, positive, anchor, c, distance=distance)[0], (nll, c))


@pytest.mark.parametrize("prototype", [None, torch.tensor([3.0])])
def test_cp_loss_signs(prototype):
    """d loss / d phi of negatives below, at and above the prototype; of positives below, at and above a fixed one."""
    signs = {}
    for distance in ("absolute", "signed"):
        nll = torch.tensor([2.0, 3.0, 4.0, 1.0, 3.0, 5.0], requires_grad=True)
        positive = torch.tensor([True, True, True, False, False, False])
        cp_loss(nll, positive, torch.zeros(6, dtype=torch.long), prototype, distance=distance)[0].sum().backward()
        signs[distance] = nll.grad.sign().int().tolist()
    assert signs["absolute"][3:] == [1, 0, -1] and signs["signed"][3:] == [-1, -1, -1]
    if prototype is not None:  # a free one adds its own pull to every positive
        assert signs["absolute"][:3] == signs["signed"][:3] == [-1, 0, 1]


def test_cp_loss_refuses():
    nll, positive, anchor = torch.ones(3), torch.tensor([True, False, True]), torch.tensor([0, 0, 1])
    with pytest.raises(ValueError, match=r"anchors without negatives: \[1\]"):
        cp_loss(nll, positive, anchor)
    with pytest.raises(ValueError, match=r"anchors without positives: \[1\]"):
        cp_loss(nll, torch.tensor([True, False, False]), anchor)
    for bad in (dict(tau=0.0), dict(alpha=-1.0), dict(phi="ppl"), dict(distance="squared")):
        with pytest.raises(ValueError, match="not a valid choice"):
            cp_loss(nll[:2], positive[:2], anchor[:2], **bad)
    with pytest.raises(ValueError, match="must be"):
        cp_loss(nll, positive[:2], anchor)


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=97)
GPT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=97)
FAMILIES = {
    "Llama": SMALL, "Mistral": SMALL, "Qwen2": SMALL, "Qwen3": SMALL | {"head_dim": 8}, "Falcon": GPT, "GPTNeoX": GPT,
    "GPT2": dict(n_embd=32, n_layer=2, n_head=4, vocab_size=97), "Gemma2": SMALL | {"head_dim": 8, "final_logit_softcapping": 2.0},
    "Gemma3Text": SMALL | {"head_dim": 8}, "Cohere": SMALL | {"logit_scale": 0.5}, "Granite": SMALL | {"logits_scaling": 4.0},
}


def tiny(family: str):
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**FAMILIES[family], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa" if family != "Gemma2" else "eager").eval()
    with torch.no_grad():
        [w.mul_(8) for w in model.parameters()]  # far from uniform, so that caps and scales matter
    return model


def test_pack():
    assert pack([5, 3, 9, 2, 4], 8) == [[2], [0, 1], [4, 3]] and pack([], 8) == []
    sizes = torch.randint(1, 70, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = pack(sizes, 128)
    assert sorted(sum(rows, [])) == list(range(200)) and all(sum(sizes[i] for i in row) <= 128 for row in rows)
    assert len(rows) == -(-sum(sizes) // 128)  # the least there is
    plan = forwards(sizes, 512)
    assert sorted(i for rows in plan for row in rows for i in row) == list(range(200)) and forwards([], 512) == []
    assert all(len(rows) * max(sum(sizes[i] for i in row) for row in rows) <= 512 for rows in plan)
    assert forwards([600, 5, 5], 512) == [[[0]], [[1, 2]]]  # a longer one has its own


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_each_models_own_nll(family, monkeypatch):
    model = tiny(family)
    check_model(model)
    ids = [torch.randint(97, (n,)) for n in (5, 2, 11)]
    start = [1, 1, 4]
    with torch.no_grad():
        want = []
        for x, s in zip(ids, start):
            logp = model(input_ids=x[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
            want.append(-logp[torch.arange(len(x) - 1), x[1:]][s - 1:].mean())
        for row, max_tokens, batches in ((128, 1, 2), (128, 10, 2), (128, 100, 1), (7, 100, 1)):  # the last: rows of 11 and of 5 + 2, padded
            monkeypatch.setattr("cp_loss.ROW", row)
            got = model_nll(model, ids, start, max_tokens)
            torch.testing.assert_close(got.double(), torch.stack(want), rtol=1e-4, atol=1e-4)
            assert len(forwards([5, 2, 11], max_tokens)) == batches


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_in_each_family(family, monkeypatch):
    """The objective's gradient for LoRA weights, through packed rows, equals the one through the model's own logits."""
    monkeypatch.setattr("cp_loss.ROW", 16)  # two rows at once
    base = tiny(family)
    with torch.no_grad():
        [w.div_(4) for w in base.parameters()]
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
    weights = [w for w in model.parameters() if w.requires_grad]
    ids = [torch.randint(97, (n,)) for n in (5, 3, 11, 7)]
    rows = torch.stack([F.cross_entropy(model(input_ids=x[None], use_cache=False).logits[0, :-1].float(), x[1:]) for x in ids])
    positive, anchor = torch.tensor([True, True, False, False]), torch.zeros(4, dtype=torch.long)
    want, got = (torch.cat([g.flatten() for g in torch.autograd.grad(cp_loss(nll, positive, anchor)[0].mean(), weights)])
                 for nll in (rows, model_nll(model, ids, max_tokens=32)))
    assert want.norm() > 1e-6 and (got - want).norm() / want.norm() < 1e-3


def test_check_model_refuses_a_head_it_does_not_reproduce():
    model = tiny("Llama")
    own = model.forward
    model.forward = lambda *a, **k: (lambda out: setattr(out, "logits", out.logits * 1.5) or out)(own(*a, **k))
    with pytest.raises(ValueError, match="not supported"):
        check_model(model)
    with pytest.raises(ValueError, match="does not fit"):
        check_model(tiny("Llama").to("meta"))
    model = tiny("Llama")
    model.set_output_embeddings(torch.nn.Sequential(model.lm_head))
    with pytest.raises(ValueError, match="not a plain linear"):
        check_model(model)


def test_copied_alone_it_runs(tmp_path):
    shutil.copy(ROOT / "cp_loss.py", tmp_path)
    done = subprocess.run([sys.executable, "-I", "cp_loss.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stderr
    imports = [x for x in (ROOT / "cp_loss.py").read_text().splitlines() if x.startswith(("import", "from"))]
    assert all(x.split()[1].split(".")[0] in ("math", "torch") for x in imports)
