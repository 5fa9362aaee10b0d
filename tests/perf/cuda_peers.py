#!/usr/bin/env python3
"""What other programs do with attention on this machine's GPU, on the shapes of `longshore bench cuda`.

Measures, each where Python has it: PyTorch's matrix product and copy (what the GPU can do at most), its
scaled_dot_product_attention, FlashAttention, and MInference's Triton kernels (block-sparse, at a given density).

    python3 tests/perf/cuda_peers.py
    python3 tests/perf/cuda_peers.py --lengths 8192,131072 --density 0.06 --json peers.json

The shape is Llama-3-8B's: 32 query heads, 8 KV heads, head size 128, bf16. FLOPs of prefill count what a causal mask
leaves: 4 x heads x head size x n (n + 1) / 2.
"""

import argparse
import json
import statistics
import sys

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
BLOCK = 64


def lengths(text):
    values = [int(part) for part in text.split(",")]
    if not values or any(value < BLOCK or value > 1 << 21 for value in values):
        raise argparse.ArgumentTypeError(f"must be numbers from {BLOCK} to {1 << 21}, with commas between them")
    return values


def flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=int, default=0, metavar="N", help="number of the GPU [default: 0]")
    parser.add_argument("--lengths", type=lengths, default=[8192, 32768, 131072], metavar="TOKENS", help="prompt lengths")
    parser.add_argument("--decode-lengths", type=lengths, metavar="TOKENS", help="keys of a decode step [default: those of prompts]")
    parser.add_argument("--density", type=float, default=0.06, help="visited part of what is causal, for sparse kernels [default: 0.06]")
    parser.add_argument("--repeats", type=int, default=5, help="samples of each point; the median is shown")
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    return parser.parse_args()


def seconds(torch, work, repeats):
    """Medians of a launch, by the GPU's own clock, after launches that do not count."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    samples = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(samples)


class Bench:
    def __init__(self, torch, args):
        self.torch, self.args, self.points = torch, args, []

    def point(self, what, shape, work, flops=0, read=0):
        """Measures one point; what cannot run is told and left out."""
        try:
            took = seconds(self.torch, work, self.args.repeats)
        except Exception as error:  # a kernel that refuses a shape, or no memory
            print(f"| {what} | {shape} | did not run: {str(error).splitlines()[0][:80]} | | |", flush=True)
            self.torch.cuda.empty_cache()
            return
        tflops, gbps = flops / took / 1e12, read / took / 1e9
        self.points.append({"what": what, "shape": shape, "seconds": took, "tflops": tflops, "gbps": gbps})
        cell = lambda value: f"{value:.1f}" if value else ""
        print(f"| {what} | {shape} | {took * 1e3:.3f} | {cell(tflops)} | {cell(gbps)} |", flush=True)

    def tensor(self, *shape):
        return self.torch.randn(*shape, device="cuda", dtype=self.torch.bfloat16)

    def peaks(self):
        a, b = self.tensor(8192, 8192), self.tensor(8192, 8192)
        self.point("torch.matmul", "8192^3 bf16", lambda: a @ b, flops=2 * 8192**3)
        source = self.torch.empty(1 << 30, device="cuda", dtype=self.torch.uint8)
        target = self.torch.empty_like(source)
        self.point("torch copy_", "1 GiB", lambda: target.copy_(source), read=2 << 30)

    def prefill(self, n):
        flops = 4 * HEADS * HEAD_DIM * n * (n + 1) // 2
        q, k, v = self.tensor(1, HEADS, n, HEAD_DIM), self.tensor(1, KV_HEADS, n, HEAD_DIM), self.tensor(1, KV_HEADS, n, HEAD_DIM)
        attend = self.torch.nn.functional.scaled_dot_product_attention
        self.point("torch SDPA", f"prefill {n}", lambda: attend(q, k, v, is_causal=True, enable_gqa=True), flops=flops)
        flash = module("flash_attn")
        if flash:
            rows = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
            self.point("flash_attn", f"prefill {n}", lambda: flash.flash_attn_func(*rows, causal=True), flops=flops)
        self.sparse(q, k, v, n)

    def sparse(self, q, k, v, n):
        found = module("minference")
        if not found:
            return
        group = HEADS // KV_HEADS
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        blocks = max(1, round(n / BLOCK * self.args.density / 2))
        visited = 4 * HEADS * HEAD_DIM * min(blocks * BLOCK, n) * n
        self.point("minference block_sparse", f"prefill {n}, {blocks} blocks a row", lambda: found.block_sparse_attention(q, k, v, blocks), flops=visited)

    def decode(self, n):
        q, k, v = self.tensor(1, HEADS, 1, HEAD_DIM), self.tensor(1, KV_HEADS, n, HEAD_DIM), self.tensor(1, KV_HEADS, n, HEAD_DIM)
        read = 2 * KV_HEADS * n * HEAD_DIM * 2
        attend = self.torch.nn.functional.scaled_dot_product_attention
        self.point("torch SDPA", f"decode {n}", lambda: attend(q, k, v, enable_gqa=True), read=read)
        flash = module("flash_attn")
        if flash:
            rows = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
            self.point("flash_attn_with_kvcache", f"decode {n}", lambda: flash.flash_attn_with_kvcache(*rows), read=read)


def module(name):
    try:
        return __import__(name)
    except Exception:  # not there, or broken by what it imports
        return None


def main():
    args = flags()
    torch = module("torch")
    if torch is None:
        sys.exit("cuda_peers: Python has no PyTorch; hint: pip install torch, in an environment of its own")
    if not torch.cuda.is_available() or args.device >= torch.cuda.device_count():
        sys.exit(f"cuda_peers: PyTorch {torch.__version__} sees no GPU {args.device}; hint: see what nvidia-smi says")
    torch.cuda.set_device(args.device)
    bench = Bench(torch, args)
    name = torch.cuda.get_device_name()
    print(f"{name}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    for other in ("flash_attn", "minference"):
        found = module(other)
        print(f"{other}: {getattr(found, '__version__', 'found') if found else 'not there, left out'}")
    print("\n| what | shape | ms | TFLOP/s | GB/s |\n| --- | --- | --- | --- | --- |")
    bench.peaks()
    for n in args.lengths:
        bench.prefill(n)
    for n in args.decode_lengths or args.lengths:
        bench.decode(n)
    if args.json:
        report = {"device": name, "torch": torch.__version__, "density": args.density, "points": bench.points}
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
