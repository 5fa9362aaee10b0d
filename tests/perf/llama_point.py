"""One measurement of llama.cpp in a process of its own: prefill (`pp`), decode (`tg`) or loading and the first token
(`first`) of one model file with one setting.

Prints one JSON object. Runs in the virtual environment that `compare.py` makes; knows nothing of longshore.
"""

import argparse
import ctypes
import json
import os
import random
import resource
import sys
import time


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    point = commands.add_parser("point", help="measure one point")
    point.add_argument("--model", required=True, help="GGUF file")
    point.add_argument(
        "--kind", choices=["pp", "tg", "first"], required=True, help="prefill, decode, or load and first token"
    )
    point.add_argument("--tokens", type=int, required=True, help="prompt tokens of pp and first, depth of tg")
    point.add_argument("--steps", type=int, default=32, help="decode steps of a tg sample")
    point.add_argument("--samples", type=int, default=1, help="samples taken in this process")
    point.add_argument("--flash-attention", choices=["on", "off"], required=True)
    point.add_argument("--threads", type=int, default=2)
    point.add_argument("--state", help="file that keeps the KV of a depth, so that only the first run prefills it")
    quantize = commands.add_parser("quantize", help="write a variant of a model file")
    quantize.add_argument("--model", required=True, help="GGUF file to start from")
    quantize.add_argument("--type", choices=["F16", "Q4_0"], required=True, help="element type of the variant")
    quantize.add_argument("--out", required=True, help="file to write")
    commands.add_parser("version", help="print the version and what llama.cpp was compiled for")
    return parser.parse_args(arguments)


def quiet(llama):
    """Sends llama.cpp's log to nowhere; returns what must stay alive."""
    silence = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(silence, ctypes.c_void_p(0))
    return silence


class Session:
    """A loaded model with an empty context."""

    BATCH = 2048

    def __init__(self, llama, arguments):
        self.llama = llama
        began = time.perf_counter()
        self.model = llama.llama_model_load_from_file(
            os.fsencode(arguments.model), llama.llama_model_default_params()
        )
        if not self.model:
            sys.exit(f"llama_point: cannot load {arguments.model}")
        params = llama.llama_context_default_params()
        params.n_ctx = (arguments.tokens + arguments.steps * arguments.samples + 512 + 255) // 256 * 256
        params.n_batch, params.n_ubatch = self.BATCH, 512
        params.n_threads = params.n_threads_batch = arguments.threads
        enabled = arguments.flash_attention == "on"
        params.flash_attn_type = (
            llama.LLAMA_FLASH_ATTN_TYPE_ENABLED if enabled else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.context = llama.llama_init_from_model(self.model, params)
        if not self.context:
            sys.exit("llama_point: cannot make a context")
        self.load_seconds = time.perf_counter() - began
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.batch = llama.llama_batch_init(self.BATCH, 0, 1)
        self.memory = llama.llama_get_memory(self.context)

    def decode(self, tokens, position):
        """One call of llama_decode; logits of its last token only."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = position + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = index + 1 == len(tokens)
        status = self.llama.llama_decode(self.context, batch)
        if status != 0:
            sys.exit(f"llama_point: llama_decode returned {status}")

    def prefill(self, tokens):
        for start in range(0, len(tokens), self.BATCH):
            self.decode(tokens[start : start + self.BATCH], start)
        self.llama.llama_synchronize(self.context)

    def greedy(self):
        """The most likely next token."""
        import numpy

        logits = self.llama.llama_get_logits_ith(self.context, -1)
        return int(numpy.argmax(numpy.ctypeslib.as_array(logits, shape=(self.vocabulary,))))

    def clear(self):
        self.llama.llama_memory_clear(self.memory, True)


def tokens_of(session, count, seed):
    generator = random.Random(seed)
    return [generator.randrange(session.vocabulary) for _ in range(count)]


def prefill_samples(session, arguments):
    """Tokens per second of each prefill; a short one goes first, so that nothing is cold."""
    session.prefill(tokens_of(session, min(arguments.tokens, 64), 0))
    rates = []
    for sample in range(arguments.samples):
        session.clear()
        tokens = tokens_of(session, arguments.tokens, sample + 1)
        began = time.perf_counter()
        session.prefill(tokens)
        rates.append(arguments.tokens / (time.perf_counter() - began))
    return rates


def fill(session, arguments):
    """KV of `--tokens` random tokens: from the state file when there is one, computed and kept otherwise."""
    llama, state = session.llama, arguments.state
    if arguments.tokens == 0:
        return
    if state and os.path.exists(state):
        count = ctypes.c_size_t(0)
        room = (llama.llama_token * arguments.tokens)()
        read = llama.llama_state_seq_load_file(
            session.context, os.fsencode(state), 0, room, arguments.tokens, ctypes.byref(count)
        )
        if read and llama.llama_memory_seq_pos_max(session.memory, 0) == arguments.tokens - 1:
            return
        session.clear()
    session.prefill(tokens_of(session, arguments.tokens, 1))
    if state:
        partial = f"{state}.{os.getpid()}"
        empty = (llama.llama_token * 1)()
        if llama.llama_state_seq_save_file(session.context, os.fsencode(partial), 0, empty, 0):
            os.replace(partial, state)


def decode_samples(session, arguments):
    """Tokens per second of each run of `--steps` greedy steps; a few steps go first and do not count."""
    fill(session, arguments)
    position = arguments.tokens
    token = 1
    for _ in range(2):
        session.decode([token], position)
        token, position = session.greedy(), position + 1
    rates = []
    for _ in range(arguments.samples):
        began = time.perf_counter()
        for _ in range(arguments.steps):
            session.decode([token], position)
            token, position = session.greedy(), position + 1
        rates.append(arguments.steps / (time.perf_counter() - began))
    return rates


def first_token_samples(session, arguments):
    """Seconds to load the model, to prefill a prompt and to choose its next token; Python's own start is left out."""
    began = time.perf_counter()
    session.prefill(tokens_of(session, arguments.tokens, 1))
    session.greedy()
    return [session.load_seconds + time.perf_counter() - began]


MEASURES = {"pp": prefill_samples, "tg": decode_samples, "first": first_token_samples}


def main():
    arguments = parse(sys.argv[1:])
    import llama_cpp as llama

    silence = quiet(llama)
    if arguments.command == "version":
        system = llama.llama_print_system_info().decode()
        print(json.dumps({"version": llama.__version__, "system": " ".join(system.split())}))
        return
    llama.llama_backend_init()
    if arguments.command == "quantize":
        params = llama.llama_model_quantize_default_params()
        params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{arguments.type}")
        params.allow_requantize = True
        names = os.fsencode(arguments.model), os.fsencode(arguments.out)
        status = llama.llama_model_quantize(*names, ctypes.byref(params))
        sys.exit(f"llama_point: quantize returned {status}" if status else 0)
    session = Session(llama, arguments)
    result = {
        "samples": MEASURES[arguments.kind](session, arguments),
        "load_seconds": session.load_seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(result))
    del silence


if __name__ == "__main__":
    main()
