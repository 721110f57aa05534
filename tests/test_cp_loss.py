"""cp_loss.py against literal float64 loops over the equations, and against the models' own logits."""
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

from cp_loss import check_model, cp_loss, linear_nll, model_nll, sequence_nll

ROOT = Path(__file__).parent.parent


def plain_nll(hidden, weight, targets, bias=None, softcap=None):
    z = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    z = softcap * torch.tanh(z / softcap) if softcap else z
    return F.cross_entropy(z, targets, reduction="none")


@pytest.mark.parametrize("T, V, chunk", [(0, 5, 2), (1, 7, 3), (9, 50, 50), (13, 101, 7), (4, 33, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_linear_nll_value_and_gradients(T, V, chunk, with_bias, softcap):
    torch.manual_seed(T * V)
    make = lambda *shape: (2 * torch.randn(*shape, dtype=torch.float64)).requires_grad_()  # noqa: E731
    hidden, weight, bias = make(T, 8), make(V, 8), make(V) if with_bias else None
    targets, scale = torch.randint(V, (T,)), torch.randn(T, dtype=torch.float64)
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    want = plain_nll(hidden, weight, targets, bias, softcap)
    low = [x.detach().float().requires_grad_() for x in inputs]
    got = linear_nll(low[0], low[1], targets, low[2] if with_bias else None, chunk_size=chunk, softcap=softcap)
    assert got.dtype == torch.float32 and got.shape == (T,)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad((want * scale).sum(), inputs)
    for g, w in zip(torch.autograd.grad((got * scale.float()).sum(), low), grads):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5)


def test_linear_nll_frozen_head_is_the_same_and_keeps_no_vocabulary():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(6, 8, requires_grad=True), torch.randn(1000, 8), torch.randint(1000, (6,))
    got = linear_nll(hidden, weight, targets, chunk_size=64)
    assert max(t.numel() for t in got.grad_fn.saved_tensors if t is not None) == 48
    want = plain_nll(hidden, weight, targets)
    torch.testing.assert_close(*(torch.autograd.grad(x.pow(2).sum(), hidden)[0] for x in (got, want)), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert linear_nll(hidden, weight, targets).grad_fn is None


def test_linear_nll_gradcheck_by_differences():
    torch.manual_seed(1)
    hidden, weight, targets = torch.randn(3, 4), torch.randn(11, 4), torch.randint(11, (3,))
    x = hidden.clone().requires_grad_()
    grad, = torch.autograd.grad(linear_nll(x, weight, targets, chunk_size=4).sum(), x)
    for i in range(3):
        for j in range(4):
            step = torch.zeros(3, 4, dtype=torch.float64)
            step[i, j] = 1e-5
            up, down = (plain_nll(hidden.double() + s, weight.double(), targets).sum() for s in (step, -step))
            assert abs((up - down) / 2e-5 - grad[i, j]) < 1e-4


def test_linear_nll_bfloat16_and_extreme_logits():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(20, 64).bfloat16(), torch.randn(300, 64).bfloat16() * 0.3, torch.randint(300, (20,))
    want = plain_nll(hidden.double(), weight.double(), targets)
    assert (linear_nll(hidden, weight, targets, chunk_size=50) - want).norm() < 1e-2 * want.norm()
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
@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [1e4, 0.0, 1e4], [5.0, 1e4, 1e4], [1e4, 1e4, 0.0]])
def test_cp_loss_extremes_stay_finite(phi, distance, values):
    nll = torch.tensor(values, requires_grad=True)
    for alpha in (0.0, 1.0, 100.0):
        loss, _ = cp_loss(nll, torch.tensor([True, False, False]), torch.zeros(3, dtype=torch.long), alpha=alpha, phi=phi, distance=distance)
        grad, = torch.autograd.grad(loss.sum(), nll)
        assert loss.isfinite().all() and grad.isfinite().all()
        assert alpha or loss.item() == 0


def test_cp_loss_direction_of_the_push():
    """A negative likelier than the prototype is made likelier by the absolute distance, less likely by the signed."""
    for distance, sign in (("absolute", 1), ("signed", -1)):
        nll = torch.tensor([3.0, 3.0, 2.0], requires_grad=True)
        loss, _ = cp_loss(nll, torch.tensor([True, True, False]), torch.zeros(3, dtype=torch.long), torch.tensor([3.0]), distance=distance)
        loss.sum().backward()
        assert math.copysign(1, nll.grad[2]) == sign


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


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_each_models_own_nll(family):
    model = tiny(family)
    check_model(model)
    ids = [torch.randint(97, (n,)) for n in (5, 2, 11)]
    start = [1, 1, 4]
    with torch.no_grad():
        want = []
        for x, s in zip(ids, start):
            logp = model(input_ids=x[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
            want.append(-logp[torch.arange(len(x) - 1), x[1:]][s - 1:].mean())
        for max_tokens in (1, 10, 100):
            got = model_nll(model, ids, start, max_tokens)
            torch.testing.assert_close(got.double(), torch.stack(want), rtol=1e-4, atol=1e-4)


def test_check_model_refuses_a_head_it_does_not_reproduce():
    model = tiny("Llama")
    own = model.forward
    model.forward = lambda *a, **k: (lambda out: setattr(out, "logits", out.logits * 1.5) or out)(own(*a, **k))
    with pytest.raises(ValueError, match="not supported"):
        check_model(model)
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
