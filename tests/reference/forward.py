#!/usr/bin/env python3
"""Float64 forward pass of a Llama-architecture GGUF model, written from the papers and apart from Longshore's code.

    python3 forward.py MODEL.gguf --prompts prompts.json --out DIR [--generate 16] [--rows last]

`prompts.json` maps names to lists of token ids. For each NAME this writes to DIR:

    NAME.hidden.npy   float32 [rows, hidden]      residual stream after the last layer, before the last norm
    NAME.logits.npy   float32 [rows, vocabulary]
    NAME.json         greedy continuation: {"tokens": [...], "margins": [logit distance to the runner-up, ...]}

Everything is computed in float64 from the dequantised weights and rounded to float32 only when it is written.
It needs nothing but numpy and gguf.
"""

import argparse
import json
import pathlib

import gguf
import numpy as np

SUPPORTED = {"llama": "interleaved", "qwen2": "halves", "qwen3": "halves"}


class Model:
    """Weights and constants of one GGUF file."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        fields = {name: field for name, field in reader.fields.items()}
        self.architecture = fields["general.architecture"].contents()
        if self.architecture not in SUPPORTED:
            raise SystemExit(f"architecture `{self.architecture}` is not one of {sorted(SUPPORTED)}")
        unscaled = fields.get(f"{self.architecture}.rope.scaling.type")
        if unscaled is not None and unscaled.contents() != "none":
            raise SystemExit("this reference knows plain rotary embeddings only")

        def constant(key, default=None):
            field = fields.get(f"{self.architecture}.{key}")
            if field is None and default is None:
                raise SystemExit(f"`{self.architecture}.{key}` is missing")
            return default if field is None else field.contents()

        self.layers = constant("block_count")
        self.query_heads = constant("attention.head_count")
        self.kv_heads = constant("attention.head_count_kv", self.query_heads)
        self.head_dim = constant("attention.key_length", constant("embedding_length") // self.query_heads)
        self.eps = constant("attention.layer_norm_rms_epsilon")
        rotated = constant("rope.dimension_count", self.head_dim)
        self.frequencies = constant("rope.freq_base", 10000.0) ** (-np.arange(0, rotated, 2) / rotated)
        self.weights = {
            tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            for tensor in reader.tensors
        }
        if "rope_freqs.weight" in self.weights:
            self.frequencies = self.frequencies / self.weights["rope_freqs.weight"]

    def of_layer(self, layer, name):
        return self.weights.get(f"blk.{layer}.{name}")

    def output(self):
        return self.weights.get("output.weight", self.weights["token_embd.weight"])


def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rotate(heads, positions, model):
    """`heads` [rows, heads, head_dim]; pairs turn as complex numbers."""
    angles = positions[:, None] * model.frequencies[None, :]
    turn = np.exp(1j * angles)[:, None, :]
    pairs = len(model.frequencies)
    turned = heads.copy()
    if SUPPORTED[model.architecture] == "interleaved":
        z = (heads[..., 0 : 2 * pairs : 2] + 1j * heads[..., 1 : 2 * pairs : 2]) * turn
        turned[..., 0 : 2 * pairs : 2], turned[..., 1 : 2 * pairs : 2] = z.real, z.imag
    else:
        z = (heads[..., :pairs] + 1j * heads[..., pairs : 2 * pairs]) * turn
        turned[..., :pairs], turned[..., pairs : 2 * pairs] = z.real, z.imag
    return turned


def attend(q, k, v, first):
    """Causal attention. `q` [rows, query_heads, dim] starts at position `first`; `k`, `v` [keys, kv_heads, dim]."""
    group = q.shape[1] // k.shape[1]
    hidden_future = np.arange(len(k))[None, :] > first + np.arange(len(q))[:, None]
    out = np.empty_like(q)
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].T / np.sqrt(q.shape[2])
        scores[hidden_future] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, head // group]
    return out.reshape(len(q), -1)


def project(model, layer, x, name, heads):
    y = x @ model.of_layer(layer, f"attn_{name}.weight").T
    bias = model.of_layer(layer, f"attn_{name}.bias")
    if bias is not None:
        y = y + bias
    y = y.reshape(len(x), heads, model.head_dim)
    norm = model.of_layer(layer, f"attn_{name}_norm.weight")
    return y if norm is None else rms_norm(y, norm, model.eps)


def forward(model, tokens, cache):
    """Residual stream after the last layer, [rows, hidden]. `cache` holds (keys, values) per layer and grows."""
    first = len(cache[0][0]) if cache else 0
    positions = np.arange(first, first + len(tokens), dtype=np.float64)
    x = model.weights["token_embd.weight"][tokens]
    for layer in range(model.layers):
        normed = rms_norm(x, model.of_layer(layer, "attn_norm.weight"), model.eps)
        q = rotate(project(model, layer, normed, "q", model.query_heads), positions, model)
        k = rotate(project(model, layer, normed, "k", model.kv_heads), positions, model)
        v = project(model, layer, normed, "v", model.kv_heads)
        if first:
            k, v = np.concatenate([cache[layer][0], k]), np.concatenate([cache[layer][1], v])
            cache[layer] = (k, v)
        else:
            cache.append((k, v))
        x = x + attend(q, k, v, first) @ model.of_layer(layer, "attn_output.weight").T
        normed = rms_norm(x, model.of_layer(layer, "ffn_norm.weight"), model.eps)
        gate = normed @ model.of_layer(layer, "ffn_gate.weight").T
        up = normed @ model.of_layer(layer, "ffn_up.weight").T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ model.of_layer(layer, "ffn_down.weight").T
    return x


def logits_of(model, hidden):
    return rms_norm(hidden, model.weights["output_norm.weight"], model.eps) @ model.output().T


def greedy(model, logits, cache, count):
    tokens, margins = [], []
    while len(tokens) < count:
        runner_up, best = np.partition(logits, -2)[-2:]
        tokens.append(int(np.argmax(logits)))
        margins.append(float(best - runner_up))
        if len(tokens) < count:
            logits = logits_of(model, forward(model, tokens[-1:], cache))[-1]
    return {"tokens": tokens, "margins": margins}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--prompts", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--generate", type=int, default=16)
    parser.add_argument("--rows", choices=["all", "last"], default="all")
    arguments = parser.parse_args()
    model = Model(arguments.model)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, tokens in json.loads(arguments.prompts.read_text()).items():
        cache = []
        hidden = forward(model, tokens, cache)
        rows = hidden if arguments.rows == "all" else hidden[-1:]
        logits = logits_of(model, rows)
        np.save(arguments.out / f"{name}.hidden.npy", rows.astype("<f4"))
        np.save(arguments.out / f"{name}.logits.npy", logits.astype("<f4"))
        continuation = greedy(model, logits[-1], cache, arguments.generate)
        (arguments.out / f"{name}.json").write_text(json.dumps(continuation))


if __name__ == "__main__":
    main()
