#!/usr/bin/env python3
"""Writes a model with generated weights, in the layout of Hugging Face: for measurements of shapes whose weights are not at hand.

The default shape is Llama-3-8B's (16 GB in bf16). Tokens are bytes, and names without a text for the rest of the vocabulary. What such a
model says means nothing; what it costs is what the real one costs. Needs nothing but Python.

    python3 tests/perf/cuda_model.py /tmp/llama-3-8b
    python3 tests/perf/cuda_model.py /tmp/small --layers 2 --hidden 256 --heads 4 --kv-heads 2 --head-dim 64 --ffn 512 --vocabulary 300
"""

import argparse
import json
import os
import random
import struct

BLOCK = 8 << 20


def flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where to write config.json, tokenizer.json and model.safetensors")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--ffn", type=int, default=14336)
    parser.add_argument("--vocabulary", type=int, default=128256, help="at least 258: the bytes and two names")
    parser.add_argument("--context", type=int, default=1 << 21, help="positions that the model claims to be made for")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.vocabulary < 258 or args.layers < 1 or args.heads % args.kv_heads:
        parser.error("--vocabulary must be at least 258, --layers at least 1, --heads a multiple of --kv-heads")
    return args


def tensors(args):
    """Names, shapes, and whether it is a norm, in the order of the file."""
    q, kv, hidden = args.heads * args.head_dim, args.kv_heads * args.head_dim, args.hidden
    yield "model.embed_tokens.weight", (args.vocabulary, hidden), False
    for layer in range(args.layers):
        name = f"model.layers.{layer}."
        yield name + "input_layernorm.weight", (hidden,), True
        yield name + "self_attn.q_proj.weight", (q, hidden), False
        yield name + "self_attn.k_proj.weight", (kv, hidden), False
        yield name + "self_attn.v_proj.weight", (kv, hidden), False
        yield name + "self_attn.o_proj.weight", (hidden, q), False
        yield name + "post_attention_layernorm.weight", (hidden,), True
        yield name + "mlp.gate_proj.weight", (args.ffn, hidden), False
        yield name + "mlp.up_proj.weight", (args.ffn, hidden), False
        yield name + "mlp.down_proj.weight", (hidden, args.ffn), False
    yield "model.norm.weight", (hidden,), True
    yield "lm_head.weight", (args.vocabulary, hidden), False


def noise(seed):
    """bf16 numbers of either sign between 2^-7 and 2^-5, about as large as those of trained models."""
    source = random.Random(seed)
    block = bytearray(BLOCK)
    block[0::2] = source.randbytes(BLOCK // 2)
    signs = bytes(0x3C if byte % 2 else 0xBC for byte in range(256))
    block[1::2] = source.randbytes(BLOCK // 2).translate(signs)
    return bytes(block)


def write_weights(path, args):
    header, at = {}, 0
    for name, shape, _ in tensors(args):
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + 2 * count]}
        at += 2 * count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block, starts = noise(args.seed), random.Random(args.seed + 1)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, shape, is_norm in tensors(args):
            left = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            if is_norm:
                file.write(b"\x80\x3f" * (left // 2))
                continue
            while left:
                # Another place each time, so that no two rows are alike.
                start = 2 * starts.randrange(BLOCK // 4)
                piece = block[start : start + left]
                file.write(piece)
                left -= len(piece)


def byte_characters():
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the others for U+0100 and up in their order."""
    others = iter(range(256, 512))
    printable = set(range(0x21, 0x7F)) | set(range(0xA1, 0xAD)) | set(range(0xAE, 0x100))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def write_tokenizer(folder, args):
    names = ["<s>", "</s>"] + [f"<unused{index}>" for index in range(258, args.vocabulary)]
    vocabulary = {text: index for index, text in enumerate(byte_characters() + names)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = [{"id": 256 + i, "content": n, "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False} for i, n in enumerate(names[:2])]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False, "continuing_subword_prefix": None, "end_of_word_suffix": None, "vocab": vocabulary, "merges": []}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None, "added_tokens": special, "pre_tokenizer": level, "decoder": level, "model": model}
    put(folder, "tokenizer.json", tokenizer)
    put(folder, "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})


def put(folder, name, value):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(value, file)


def main():
    args = flags()
    os.makedirs(args.folder, exist_ok=True)
    write_weights(os.path.join(args.folder, "model.safetensors"), args)
    write_tokenizer(args.folder, args)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "_name_or_path": "generated",
        "hidden_size": args.hidden,
        "intermediate_size": args.ffn,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocabulary,
        "max_position_embeddings": args.context,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    # Last: its presence says that the folder is complete.
    put(args.folder, "config.json", config)
    print(args.folder)


if __name__ == "__main__":
    main()
