"""Drives a running Longshore with the `openai` package: completions, chat, streaming, log-probabilities, errors.

usage: openai_client.py BASE_URL   (…/v1)
Exits 0 when everything held; prints what did not.
"""

import sys

import openai

BASE_URL = sys.argv[1]
client = openai.OpenAI(base_url=BASE_URL, api_key="none", max_retries=0, timeout=120)
model = client.models.list().data[0].id


def lists_models():
    assert client.models.retrieve(model).id == model
    try:
        client.models.retrieve("no-such-model")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found", error
    else:
        raise AssertionError("an unknown model was found")


def completes():
    answer = client.completions.create(model=model, prompt="The capital of France is", max_tokens=8, temperature=0)
    assert "Paris" in answer.choices[0].text, answer
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.choices[0].finish_reason in ("stop", "length")


def completes_token_ids():
    text = client.completions.create(model=model, prompt="One two three", max_tokens=4, temperature=0)
    ids = client.completions.create(model=model, prompt=[1, 2, 3, 4, 5], max_tokens=4, temperature=0)
    assert ids.usage.prompt_tokens == 5 and text.usage.prompt_tokens > 0


def chats():
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=24, temperature=0)
    assert "Paris" in answer.choices[0].message.content, answer
    assert answer.choices[0].message.role == "assistant"


def streams():
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    whole = client.chat.completions.create(model=model, messages=messages, max_tokens=24, temperature=0)
    pieces, usage, reasons = [], None, []
    for chunk in client.chat.completions.create(
        model=model, messages=messages, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert "".join(pieces) == whole.choices[0].message.content, pieces
    assert len([piece for piece in pieces if piece]) > 1, "the answer came in one piece"
    assert reasons == [whole.choices[0].finish_reason], reasons
    assert usage.completion_tokens == whole.usage.completion_tokens, usage


def caches():
    prompt = "A lighthouse keeper counts ships. " * 40
    first = client.completions.create(model=model, prompt=prompt, max_tokens=4, temperature=0)
    second = client.completions.create(model=model, prompt=prompt, max_tokens=4, temperature=0)
    assert second.usage.prompt_tokens_details.cached_tokens >= 64, second.usage
    assert first.choices[0].text == second.choices[0].text
    apart = client.completions.create(
        model=model, prompt=prompt, max_tokens=4, temperature=0, extra_body={"cache_salt": "another tenant"}
    )
    assert apart.usage.prompt_tokens_details.cached_tokens == 0, "a tenant saw another's blocks"
    assert apart.choices[0].text == first.choices[0].text


def chooses_a_policy():
    def ask(**body):
        prompt = "The keeper of the lighthouse writes a letter. " * 40
        answer = client.completions.create(model=model, prompt=prompt, max_tokens=4, temperature=0, extra_body=body)
        return answer.usage.prompt_tokens_details.cached_tokens, answer.system_fingerprint

    cold, warm = ask(prefill_policy="balanced"), ask(prefill_policy="balanced")
    assert cold[0] == 0 and warm[0] >= 64, (cold, warm)
    exact = ask(prefill_policy="exact")
    assert exact[0] == 0, "approximate KV passed for exact"
    assert cold[1] == warm[1] != exact[1], (cold, warm, exact)
    try:
        ask(prefill_policy="sparsest")
    except openai.BadRequestError as error:
        assert error.param == "prefill_policy" and "exact, " in error.message, error
    else:
        raise AssertionError("an unknown policy was accepted")


def stops():
    whole = client.completions.create(model=model, prompt="1, 2, 3, 4, 5,", max_tokens=24, temperature=0).choices[0].text
    stop = whole[4:9]
    cut = client.completions.create(model=model, prompt="1, 2, 3, 4, 5,", max_tokens=24, temperature=0, stop=[stop])
    assert cut.choices[0].text == whole[: whole.index(stop)], (whole, stop, cut.choices[0].text)
    assert cut.choices[0].finish_reason == "stop"


def seeds():
    def draw(seed):
        answer = client.completions.create(model=model, prompt="My favourite", max_tokens=16, temperature=1.2, seed=seed)
        return answer.choices[0].text

    assert draw(7) == draw(7), "one seed gave two answers"
    assert len({draw(seed) for seed in range(4)}) > 1, "four seeds gave one answer"


def reports_logprobs():
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    for step in answer.choices[0].logprobs.content:
        assert len(step.top_logprobs) == 3 and step.logprob <= 0
        assert step.token == step.top_logprobs[0].token, "greedy takes the most likely token"
    old = client.completions.create(model=model, prompt="Hello", max_tokens=3, temperature=0, logprobs=2)
    assert len(old.choices[0].logprobs.tokens) == old.usage.completion_tokens


def refuses():
    chat = [{"role": "user", "content": "x"}]
    cases = [
        (dict(model="no-such-model", messages=chat), openai.NotFoundError, None),
        (dict(model=model, messages=chat, temperature=-1), openai.BadRequestError, "temperature"),
        (dict(model=model, messages=chat, top_p=0), openai.BadRequestError, "top_p"),
        (dict(model=model, messages=chat, n=2), openai.BadRequestError, "n"),
        (dict(model=model, messages=chat, max_tokens=0), openai.BadRequestError, "max_tokens"),
        (dict(model=model, messages=[]), openai.BadRequestError, "messages"),
        (dict(model=model, messages=[{"role": "robot", "content": "x"}]), openai.BadRequestError, "messages"),
        (dict(model=model, messages=chat, stop=["x"] * 17), openai.BadRequestError, "stop"),
    ]
    for arguments, kind, param in cases:
        try:
            client.chat.completions.create(**arguments)
        except kind as error:
            assert error.message and error.type, error
            assert param is None or param in (error.param or ""), (arguments, error.param)
        else:
            raise AssertionError(f"{arguments} was accepted")
    try:
        client.completions.create(model=model, prompt=[5] * 20_000, max_tokens=1)
    except openai.BadRequestError as error:
        assert error.code == "context_length_exceeded", error
    else:
        raise AssertionError("a prompt beyond the context was accepted")


def main():
    failed = 0
    checks = [lists_models, completes, completes_token_ids, chats, streams, caches, chooses_a_policy, stops, seeds, reports_logprobs, refuses]
    for check in checks:
        try:
            check()
            print(f"ok      {check.__name__}")
        except Exception as error:  # noqa: BLE001 - each check is reported, then the next one runs
            failed += 1
            print(f"FAILED  {check.__name__}: {type(error).__name__}: {error}")
    sys.exit(1 if failed else 0)


main()
