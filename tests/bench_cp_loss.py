"""linear_nll against its peers: forward + backward of the summed nll, side by side.

    .venv/bin/pip install --no-deps trl==1.16.0 cut-cross-entropy==25.1.1 \
        liger-kernel==0.8.5 triton==3.9.0              # the peers
    .venv/bin/python tests/bench_cp_loss.py            # 6 minutes on 2 CPU cores
    .venv/bin/python tests/bench_cp_loss.py --head     # a head that trains

On a CPU a shape and dtype have a process of their own (memory that another left in pieces costs a
tenth); on a GPU bfloat16 alone is timed. The ways take turns, so that drift meets all alike; times
are medians with their quartiles. `bound` is two bare matrix products into tensors that exist
already. Memory is the peak above what was there before (on a CPU, resident pages). `error` is the
gradient's distance from float64's, relative. `ours, compiled` is torch.compile(linear_nll) with
chunks of 32,768.
"""

import ctypes
import statistics
import sys
import time
from argparse import RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from cut_cross_entropy import linear_cross_entropy
from tap import Tap
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, selective_log_softmax

sys.path.insert(0, str(Path(__file__).parent.parent))
from cp_loss import linear_nll  # noqa: E402

SMOLLM2, GEMMA3, MISTRAL = (512, 576, 49152), (512, 640, 262144), (128, 4096, 32000)
SHAPES = {
    "cpu": [SMOLLM2, GEMMA3, MISTRAL],
    "cuda": [
        (2048, 576, 49152),
        (2048, 4096, 32000),
        (2048, 4096, 128256),  # Llama-3-8B
        (2048, 3584, 256000),  # Gemma-2-9B
    ],
}


def ways(device: str) -> dict:
    def full_logits(h, w, y):
        return F.log_softmax((h @ w.T).float(), dim=-1).gather(1, y[:, None])

    def trl_selective(h, w, y):
        return selective_log_softmax(h @ w.T, y)

    def trl_chunked(h, w, y):
        return ChunkedLogProbFunction.apply(
            h, w, None, y, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
        )[0]

    def cce_torch_compile(h, w, y):
        return linear_cross_entropy(h, w, y, reduction="none", impl="torch_compile")

    out = {
        "ours": linear_nll,
        "full logits": full_logits,
        "TRL selective": trl_selective,
        "TRL chunked": trl_chunked,
    }
    if device == "cpu":
        out["CCE torch_compile"] = cce_torch_compile
    else:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        out["CCE"] = lambda h, w, y: linear_cross_entropy(
            h, w, y, reduction="none", impl="cce"
        )
        larger = partial(linear_nll, chunk_size=32768)
        out["ours, compiled"] = torch.compile(lambda *args: larger(*args))
        out["Liger"] = lambda h, w, y: LigerFusedLinearCrossEntropyLoss(
            reduction="sum"
        )(w, h, y)
    return out


def resident(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    return next(
        int(x.split()[1]) * 1024
        for x in open("/proc/self/status")
        if x.startswith(key)
    )


def extra_memory(run, device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def seconds(run, device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def inputs(T: int, D: int, V: int, dtype: torch.dtype, device: str) -> tuple:
    """Hidden states, head and targets, and the exact gradient for the hidden states."""
    torch.manual_seed(0)
    h = torch.randn(T, D, device=device).to(dtype).requires_grad_()
    w = (torch.randn(V, D, device=device) * 2 / D**0.5).to(dtype)
    y = torch.randint(V, (T,), device=device)
    exact = h.detach().double().requires_grad_()
    loss = F.cross_entropy(exact @ w.double().T, y, reduction="sum")
    return h, w, y, torch.autograd.grad(loss, exact)[0]


def runs_of(h, w, y, device: str) -> dict:
    """What is timed, by name: the bound, and a step by every way."""
    z, out = (
        torch.empty(len(h), len(w), dtype=h.dtype, device=device),
        torch.empty_like(h),
    )

    def bound():
        with torch.no_grad():
            torch.mm(torch.mm(h, w.T, out=z), w, out=out.detach())

    def step(way):
        h.grad = w.grad = None
        way(h, w, y).sum().backward()

    steps = {name: partial(step, way) for name, way in ways(device).items()}
    return {"bound": bound} | steps


def measure(
    shape: tuple, dtype: torch.dtype, head: bool, device: str, repeats: int
) -> None:
    h, w, y, truth = inputs(*shape, dtype, device)
    w.requires_grad_(head)
    runs = runs_of(h, w, y, device)
    error, times = {}, {name: [] for name in runs}
    for name, run in runs.items():
        run()  # warm-up, compilation
        if (
            name != "bound"
        ):  # peers return log-probabilities or nll: the sign is theirs
            away = [
                (s * h.grad.double() - truth).norm() / truth.norm() for s in (1, -1)
            ]
            error[name] = min(away).item()
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    del runs["bound"]
    memory = {name: extra_memory(run, device) for name, run in runs.items()}
    kind = (
        f"{' x '.join(map(str, shape))}, {str(dtype)[6:]}{', head trains' * head}"
    )
    report(kind, times, memory, error)


def report(kind: str, times: dict, memory: dict, error: dict) -> None:
    t = {name: statistics.median(x) for name, x in times.items()}
    best = min(
        (name for name in t if name != "bound" and "ours" not in name), key=t.get
    )
    print(
        f"\n{kind}: ours takes {t['ours'] / t[best]:.2f} of the best peer's time ({best}), "
        f"{memory['ours'] / memory['full logits']:.3f} of full logits' memory; speed "
        f"{t['bound'] / t['ours']:.2f} of the bound\n"
    )
    print("| way | ms, median [quartiles] | time / ours | extra MB | error |")
    print("| --- " * 5 + "|")
    for name in times:
        low, _, high = (1000 * q for q in statistics.quantiles(times[name], n=4))
        took = f"{1000 * t[name]:.3g} [{low:.3g}, {high:.3g}] | {t[name] / t['ours']:.2f}"
        rest = " | "
        if name in memory:
            rest = f"{memory[name] / 1e6:.0f} | {error[name]:.1e}"
        print(f"| {name} | {took} | {rest} |", flush=True)


class Options(Tap):
    head: bool = False
    """the LM head trains too (the bound still counts two products)"""
    repeats: int = 9  # timed runs of each way
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    form = RawDescriptionHelpFormatter
    args = Options(description=__doc__, formatter_class=form).parse_args()
    print(
        f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads"
    )
    for shape in SHAPES[args.device]:
        for dtype in (torch.bfloat16, torch.float32)[: 1 + (args.device == "cpu")]:
            if args.device == "cuda":
                measure(shape, dtype, args.head, args.device, args.repeats)
                continue
            job = torch.multiprocessing.get_context("spawn").Process(
                target=measure,
                args=(shape, dtype, args.head, args.device, args.repeats),
            )
            job.start()
            job.join()
