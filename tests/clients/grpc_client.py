"""Drives a running Longshore with `grpcio` and code generated from our protos.

usage: grpc_client.py HOST:PORT PROTO_FOLDER
Exits 0 when everything held; prints what did not.
"""

import pathlib
import sys
import tempfile
import time

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from grpc_tools import protoc

ADDRESS, PROTOS = sys.argv[1], pathlib.Path(sys.argv[2])


def generate():
    out = tempfile.mkdtemp()
    files = [str(path.relative_to(PROTOS)) for path in sorted(PROTOS.glob("longshore/v1/*.proto"))]
    code = protoc.main(["protoc", f"-I{PROTOS}", f"--python_out={out}", f"--grpc_python_out={out}", *files])
    assert code == 0, "protoc refused our protos"
    sys.path.insert(0, out)


generate()
from longshore.v1 import (  # noqa: E402
    cluster_pb2,
    cluster_pb2_grpc,
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
)

channel = grpc.insecure_channel(ADDRESS)
inference = inference_pb2_grpc.InferenceServiceStub(channel)
Request, Start, Tokens = inference_pb2.GenerateRequest, inference_pb2.GenerateStart, common_pb2.TokenChunk


def start(**sampling):
    return Request(start=Start(sampling=common_pb2.SamplingParams(**sampling), progress=True))


def text(piece):
    return Request(text=inference_pb2.TextChunk(text=piece))


def collect(requests):
    events = list(inference.Generate(iter(requests), timeout=120))
    assert events[0].WhichOneof("event") == "accepted", events[0]
    assert events[-1].WhichOneof("event") == "finished", events[-1]
    answer = "".join(event.tokens.text for event in events if event.WhichOneof("event") == "tokens")
    return answer, events[0].accepted, events[-1].finished


def refused(requests):
    try:
        list(inference.Generate(iter(requests), timeout=120))
    except grpc.RpcError as error:
        return error
    raise AssertionError("the request was accepted")


def field(error):
    for detail in rpc_status.from_call(error).details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            return bad.field_violations[0].field
    return ""


def answers():
    answer, accepted, finished = collect([start(temperature=0, max_tokens=8), text("The capital of "), text("France is")])
    assert "Paris" in answer, answer
    assert finished.prompt_tokens == accepted.prompt_tokens > 0
    assert 0 < finished.completion_tokens <= 8 and finished.time_to_first_token_ms > 0


def chats():
    message = inference_pb2.ChatMessage(role="user", content="What is the capital of France?")
    answer, _, _ = collect([start(temperature=0, max_tokens=16), Request(message=message)])
    assert "Paris" in answer, answer


def places_and_caches():
    prompt = "The harbour master writes down every ship. " * 40
    first, _, one = collect([start(temperature=0, max_tokens=4), text(prompt)])
    second, accepted, two = collect([start(temperature=0, max_tokens=4), text(prompt)])
    assert first == second
    assert accepted.cached_tokens == two.cached_tokens >= 256, two
    assert sum(shard.kv_bytes for shard in one.placement) > 0, one


def chooses_a_policy():
    prompt = text("The pilot boat leaves at dawn. " * 40)
    told = {}
    for policy in ("balanced", "exact", "balanced"):
        _, accepted, _ = collect([Request(start=Start(prefill_policy=policy)), prompt])
        told.setdefault(policy, []).append((accepted.prefill_policy, accepted.cached_tokens))
    assert told["exact"] == [("exact", 0)], told
    (name, cold), (same, warm) = told["balanced"]
    assert name == same != "exact" and cold == 0 and warm >= 64, told


def tokenizes():
    ids = inference.Tokenize(inference_pb2.TokenizeRequest(text="The capital of France is")).token_ids
    assert len(ids) >= 5
    answer, accepted, _ = collect([start(temperature=0, max_tokens=8), Request(tokens=Tokens(token_ids=ids))])
    assert accepted.prompt_tokens == len(ids) and "Paris" in answer, answer


def describes():
    models = inference.ListModels(inference_pb2.ListModelsRequest()).models
    assert len(models) == 1 and models[0].kv_bytes_per_token > 0 and len(models[0].deployment) == 32
    stub = cluster_pb2_grpc.ClusterServiceStub(channel)
    cluster = stub.Describe(cluster_pb2.DescribeRequest())
    roles = {member.role for member in cluster.members}
    assert {cluster_pb2.ROLE_PREFILL, cluster_pb2.ROLE_DECODE, cluster_pb2.ROLE_KVSTORE} <= roles, cluster


def is_healthy():
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ["", "longshore.v1.InferenceService", "liveness", "readiness"]:
        status = stub.Check(health_pb2.HealthCheckRequest(service=service)).status
        assert status == health_pb2.HealthCheckResponse.SERVING, (service, status)
    try:
        stub.Check(health_pb2.HealthCheckRequest(service="no.such.Service"))
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.NOT_FOUND
    else:
        raise AssertionError("an unknown service has a health")


def reflects():
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = next(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask])))
    names = {service.name for service in answer.list_services_response.service}
    assert "longshore.v1.InferenceService" in names, names


def refuses_a_million_tokens():
    sent = 0

    def prompt():
        nonlocal sent
        yield start(max_tokens=1)
        for _ in range(100):
            sent += 10_000
            yield Request(tokens=Tokens(token_ids=[5] * 10_000))

    began = time.monotonic()
    error = refused(prompt())
    assert error.code() == grpc.StatusCode.OUT_OF_RANGE, error
    assert "8192" in error.details().replace(",", "") and "--max-context-tokens" in error.details(), error.details()
    assert time.monotonic() - began < 30, "the refusal took too long"
    print(f"        refused after {sent:,} of 1,000,000 token ids were read from the generator")


def refuses_bad_input():
    chunk = text("x")
    cases = [
        ([start(temperature=-1), chunk], "INVALID_ARGUMENT", "temperature"),
        ([start(temperature=float("nan")), chunk], "INVALID_ARGUMENT", "temperature"),
        ([start(top_p=0), chunk], "INVALID_ARGUMENT", "top_p"),
        ([start(max_tokens=0), chunk], "INVALID_ARGUMENT", "max_tokens"),
        ([start()], "INVALID_ARGUMENT", "prompt"),
        ([chunk], "INVALID_ARGUMENT", "start"),
        ([start(), start(), chunk], "INVALID_ARGUMENT", "start"),
        ([start(), chunk, Request(tokens=Tokens(token_ids=[1]))], "INVALID_ARGUMENT", "prompt"),
        ([start(), Request(tokens=Tokens(token_ids=[4_000_000_000]))], "INVALID_ARGUMENT", "token"),
        ([Request(start=Start(model="no-such-model")), chunk], "NOT_FOUND", "model"),
        ([Request(start=Start(stop=[""])), chunk], "INVALID_ARGUMENT", "stop"),
        ([Request(start=Start(cache_salt=b"x" * 257)), chunk], "INVALID_ARGUMENT", "cache_salt"),
        ([Request(start=Start(prefill_policy="sparsest")), chunk], "INVALID_ARGUMENT", "prefill_policy"),
        ([Request(start=Start(prefill_policy="x" * 257)), chunk], "INVALID_ARGUMENT", "prefill_policy"),
    ]
    for requests, code, name in cases:
        error = refused(requests)
        assert error.code().name == code, (name, error.code(), error.details())
        assert name in field(error) or name in error.details(), (name, field(error), error.details())
    refuses_undecodable_bytes()


def refuses_undecodable_bytes():
    # No serializers: what is given goes out as it is.
    tokenize = channel.unary_unary("/longshore.v1.InferenceService/Tokenize")
    generate = channel.stream_stream("/longshore.v1.InferenceService/Generate")
    first = start().SerializeToString()
    cases = [
        (lambda: tokenize(b"\x12\x02\xff\xfe", timeout=120), "text"),
        (lambda: tokenize(b"\x0a\x02\xff\xfe", timeout=120), "model"),
        (lambda: tokenize(b"\x12\x7fab", timeout=120), "text"),
        (lambda: tokenize(b"\xff\xff\xff\xff", timeout=120), "message"),
        (lambda: list(generate(iter([first, b"\x12\x04\x0a\x02\xff\xfe"]), timeout=120)), "chunk.text"),
        (lambda: list(generate(iter([b"\x0a\x04\x0a\x02\xff\xfe"]), timeout=120)), "start.model"),
        (lambda: list(generate(iter([first, b"\xff\xff\xff\xff"]), timeout=120)), "message"),
    ]
    for number, (call, name) in enumerate(cases):
        try:
            call()
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, (number, name, error.code(), error.details())
            assert field(error) == name, (number, name, field(error), error.details())
            assert "hint:" in error.details(), (number, error.details())
        else:
            raise AssertionError(f"undecodable message {number} ({name}) was accepted")


def honours_deadlines_and_cancellation():
    call = inference.Generate(iter([start(temperature=0, max_tokens=4000), text("Once upon a time")]), timeout=1.0)
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED, error
    else:
        raise AssertionError("the deadline passed unnoticed")
    call = inference.Generate(iter([start(temperature=0, max_tokens=4000), text("Once upon a time")]))
    next(call)
    call.cancel()
    answers()


def main():
    checks = [answers, chats, places_and_caches, chooses_a_policy, tokenizes, describes, is_healthy, reflects, refuses_a_million_tokens]
    checks += [refuses_bad_input, honours_deadlines_and_cancellation]
    failed = 0
    for check in checks:
        try:
            check()
            print(f"ok      {check.__name__}")
        except Exception as error:  # noqa: BLE001 - each check is reported, then the next one runs
            failed += 1
            print(f"FAILED  {check.__name__}: {type(error).__name__}: {error}")
    sys.exit(1 if failed else 0)


main()
