"""Writes the extracts that the tests of longshore-model compare with, none of it computed by Longshore.

    pip install gguf jinja2 regex
    python generate.py ~/.cache/longshore/models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf

dequantize.json  blocks of random bytes and their values according to the `gguf` package
tokens.json      texts and their ids according to a byte pair encoding written out below
chat.json        templates, conversations and prompts according to Jinja2, set up as Hugging Face sets it up
"""

import json
import pathlib
import sys

import gguf
import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy
import regex

HERE = pathlib.Path(__file__).parent
SEED = 20260823


def write(name, value):
    (HERE / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- dequantisation

# Byte offsets of the f16 constants of each block type, which random bytes would make infinite.
CONSTANTS = {"F16": [0], "BF16": [], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
             "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}


def dequantize():
    random = numpy.random.default_rng(SEED)
    out = {}
    for name, constants in CONSTANTS.items():
        kind = gguf.GGMLQuantizationType[name]
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (max(2, 32 // elements), size), dtype=numpy.uint8)
        for at in constants:
            scale = (random.standard_normal(len(blocks)) * 0.1).astype(numpy.float16)
            blocks[:, at:at + 2] = scale.view(numpy.uint8).reshape(-1, 2)
        if name == "BF16":
            blocks[:, 1] = 0x3D
        values = gguf.quants.dequantize(blocks, kind).astype(numpy.float32).reshape(-1)
        assert numpy.isfinite(values).all()
        out[name] = {"bytes": blocks.tobytes().hex(), "values": values.astype("<f4").tobytes().hex()}
    write("dequantize.json", out)


# ---- tokens

TEXTS = [
    "", " ", "  ", "a", "Hello", "Hello world", "Hello, world!", " leading and trailing ", "The capital of France is",
    "It's they're I've we'll he'd I'm can't DON'T", "1234567890", "pi=3.14159, year 2024", "x1y22z333", "٣٤ ½ Ⅷ ²",
    "line\nbreaks\n\n\nand\r\nreturns", "\t\ttabs \t mixed   spaces    ", "   \n   \n x", "a  b   c    d",
    "def f(x):\n    return x * 2  # twice\n", "for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
    "naïve café, Ärger, œuvre, ǅ", "cafe\u0301 vs caf\u00e9", "Привет, мир! Как дела?", "日本語のテキスト、漢字とかな。",
    "مرحبا بالعالم", "हिन्दी में पाठ", "한국어 문장", "🙂🙃👩‍👩‍👧‍👦🇫🇷 🏳️‍🌈", "a\u0000b\u0001\u007f\u0085\u00a0\u2028\u3000c",
    "https://example.org/a?b=c&d=%20#e", "email@example.com", "!!!???...---___***", "$100 + €200 = ¥300",
    "{\"key\": [1, 2, null, true]}", "<|im_start|>user\nHi<|im_end|>\n", "<|im_start|><|im_end|><|endoftext|>x",
    "almost <|im_end| > and <im_end>", "supercalifragilisticexpialidocious", "antidisestablishmentarianism " * 3,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "\ufeffbyte order mark", "\U0010ffff\ue000",
]
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def byte_alphabet():
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


class Bpe:
    """The tokenizer of SmolLM2: control tokens, then single digits, then GPT-2 words, then merges by rank."""

    def __init__(self, path):
        fields = gguf.GGUFReader(path).fields
        tokens = fields["tokenizer.ggml.tokens"].contents()
        types = fields["tokenizer.ggml.token_type"].contents()
        merges = fields["tokenizer.ggml.merges"].contents()
        self.ids = {token: index for index, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        control = [token for token, kind in zip(tokens, types) if kind == 3]
        self.control = regex.compile("(" + "|".join(map(regex.escape, sorted(control, key=len, reverse=True))) + ")")
        self.alphabet = byte_alphabet()
        self.template = fields["tokenizer.chat_template"].contents()

    def encode(self, text):
        ids = []
        for part in self.control.split(text):
            if self.control.fullmatch(part):
                ids.append(self.ids[part])
                continue
            for digits in regex.split(r"(\p{N})", part):
                for word in WORDS.findall(digits):
                    ids.extend(self.merge(word))
        return ids

    def merge(self, word):
        parts = [self.alphabet[byte] for byte in word.encode()]
        while True:
            pairs = [(self.ranks.get(pair, 1 << 30), at) for at, pair in enumerate(zip(parts, parts[1:]))]
            rank, at = min(pairs, default=(1 << 30, 0))
            if rank == 1 << 30:
                return [self.ids[part] for part in parts]
            parts[at:at + 2] = [parts[at] + parts[at + 1]]


def tokens(bpe):
    write("tokens.json", [{"text": text, "ids": bpe.encode(text)} for text in TEXTS])


# ---- chat templates

LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{#- The system message comes first. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""

QWEN3 = """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

BLOCKS = """
  {% for message in messages %}
    {# whitespace before and one newline after a block go away #}
    {% if loop.index > 2 %}{% break %}{% endif %}
    {% if message.role.startswith('s') %}{% continue %}{% endif %}
<{{ message.role | upper }}> {{ message | tojson }}
{{ {'list': [1, 2.5, none, true], 'html': '<&>\\'"é'} | tojson(indent=2) }}
  {% endfor %}
{{ 'a,b'.split(',') | join('-') }}{{ '%s!' | format('x') }}{{ missing }}{{ messages | length }}

"""

CONVERSATIONS = [
    [("user", "Hi")],
    [("system", " Be brief. "), ("user", "What is 2+2?\n"), ("assistant", "<think>\nhm</think>\n\n4 "), ("user", "Why? <&>\"é\"")],
    [("user", "a"), ("user", "b")],
]


def python_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(source, conversation, prompt):
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    environment.filters["tojson"] = python_json
    environment.globals["raise_exception"] = raise_exception
    messages = [{"role": role, "content": content} for role, content in conversation]
    try:
        return environment.from_string(source).render(
            messages=messages, add_generation_prompt=prompt, tools=None, documents=None, bos_token="<s>", eos_token="</s>")
    except jinja2.exceptions.TemplateError:
        return None


def chat(bpe):
    sources = {"smollm2": bpe.template, "llama3": LLAMA3, "mistral": MISTRAL, "qwen3": QWEN3, "blocks": BLOCKS}
    cases = [
        {"template": name, "messages": conversation, "add_generation_prompt": prompt,
         "prompt": render(source, conversation, prompt)}
        for name, source in sources.items() for conversation in CONVERSATIONS for prompt in (False, True)
    ]
    write("chat.json", {"templates": sources, "cases": cases})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    smollm2 = Bpe(sys.argv[1])
    dequantize()
    tokens(smollm2)
    chat(smollm2)
