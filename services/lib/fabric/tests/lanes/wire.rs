//! What only real gRPC has: hostile messages, health, reflection, drain. Speaks through the generated clients.

use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use futures::StreamExt;
use longshore_fabric::{CallContext, Code, server::ServerOptions, status::from_status};
use longshore_proto::v1::{
    self, inference_service_client::InferenceServiceClient, kv_store_service_client::KvStoreServiceClient,
    put_blocks_request::Part,
};
use tonic::{
    Request, Status,
    body::Body,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::Channel,
};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::{v1 as reflection, v1alpha as reflection_alpha};
use tower::ServiceExt;

use super::{
    fake::{FakeRouter, STUCK, identity, lookup, shape, tile},
    house::{House, LONG, Lane},
};

async fn channel(house: &House) -> Channel {
    Channel::from_shared(house.address.clone()).unwrap().connect().await.unwrap()
}

#[track_caller]
fn refused(status: &Status, code: Code, field: &str) {
    let error = from_status(status);
    assert_eq!((error.code, error.field.as_deref()), (code, Some(field)), "{error}");
}

fn put(part: Part) -> v1::PutBlocksRequest {
    v1::PutBlocksRequest { part: Some(part) }
}

fn put_start() -> v1::PutBlocksRequest {
    let (identity, shape) = (Some(identity().into()), Some(shape().into()));
    put(Part::Start(v1::PutBlocksStart { identity, shape, ..Default::default() }))
}

fn put_tile(byte: u8, layer: u32) -> v1::Tile {
    tile(longshore_blocks::BlockKey([byte; 16]), layer, 8).into()
}

/// Sends `messages` and returns what came until the end or the first error.
async fn put_all(
    house: &House,
    messages: Vec<v1::PutBlocksRequest>,
) -> Result<Vec<v1::PutBlocksResponse>, Status> {
    let mut client = KvStoreServiceClient::new(channel(house).await);
    let answers = client.put_blocks(futures::stream::iter(messages)).await?.into_inner();
    answers.collect::<Vec<_>>().await.into_iter().collect()
}

#[tokio::test]
async fn a_corrupt_tile_harms_only_its_block() {
    let house = House::new(Lane::Grpc).await;
    let corrupt = v1::Tile { crc32c: 0, ..put_tile(1, 1) };
    let tiles = [put_tile(1, 0), corrupt, put_tile(2, 0), put_tile(2, 1)];
    let messages = std::iter::once(put_start()).chain(tiles.map(|tile| put(Part::Tile(tile)))).collect();
    let mut acks = put_all(&house, messages).await.unwrap();
    acks.sort_by(|a, b| a.key.cmp(&b.key));
    let outcomes: Vec<_> = acks.iter().map(|ack| (ack.key[0], ack.outcome())).collect();
    assert_eq!(outcomes, [(1, v1::PutOutcome::Corrupt), (2, v1::PutOutcome::Stored)]);
    assert_eq!(acks[0].message, "layer 1 does not match its checksum");
}

#[tokio::test]
async fn bad_messages_in_a_stream_name_their_field() {
    let house = House::new(Lane::Grpc).await;
    let check = async |messages, field| {
        refused(&put_all(&house, messages).await.unwrap_err(), Code::InvalidArgument, field);
    };
    check(vec![], "start").await;
    check(vec![v1::PutBlocksRequest { part: None }], "start").await;
    check(vec![put(Part::Tile(put_tile(1, 0)))], "start").await;
    check(
        vec![put(Part::Start(v1::PutBlocksStart { shape: Some(shape().into()), ..Default::default() }))],
        "start.identity",
    )
    .await;
    check(vec![put_start(), put_start()], "start").await;
    check(vec![put_start(), v1::PutBlocksRequest { part: None }], "part").await;
    let odd = v1::Tile { key: vec![0; 3].into(), ..put_tile(1, 0) };
    check(vec![put_start(), put(Part::Tile(odd))], "tile.key").await;
}

#[tokio::test]
async fn a_bad_query_fails_alone() {
    let house = House::new(Lane::Grpc).await;
    house.shard.views.lock().unwrap().insert(7, Vec::new());
    let good = |query_id| v1::AttendRequest {
        query_id,
        identity: Some(identity().into()),
        layer: 0,
        items: vec![super::fake::queries(7, 1).into()],
        nccl: None,
    };
    let mut corrupt = good(1);
    corrupt.items[0].queries.as_mut().unwrap().crc32c ^= 1;
    let anonymous = v1::AttendRequest { identity: None, ..good(2) };
    let mut client = KvStoreServiceClient::new(channel(&house).await);
    let queries = futures::stream::iter([corrupt, anonymous, good(3)]);
    let answers: Vec<_> =
        client.attend(queries).await.unwrap().into_inner().map(Result::unwrap).collect().await;
    let seen = |id| answers.iter().find(|answer| answer.query_id == id).unwrap();
    assert_eq!(
        (seen(1).error_code, seen(1).error_message.as_str()),
        (15, "`items[0].queries.data` does not match its checksum")
    );
    assert_eq!((seen(2).error_code, seen(2).error_message.as_str()), (3, "`identity` is missing"));
    assert_eq!((seen(3).error_code, seen(3).partials.len(), seen(3).last), (0, 1, true));
}

#[tokio::test]
async fn unary_faults_name_their_field() {
    let house = House::new(Lane::Grpc).await;
    let mut client = KvStoreServiceClient::new(channel(&house).await);
    let keys = v1::LookupRequest { identity: Some(identity().into()), keys: vec![0; 17].into(), peek: false };
    refused(&client.lookup(keys).await.unwrap_err(), Code::InvalidArgument, "keys");
    let mut named = Request::new(v1::StatsRequest {});
    named.metadata_mut().insert("x-request-id", "x".repeat(200).parse().unwrap());
    refused(&client.stats(named).await.unwrap_err(), Code::InvalidArgument, "x-request-id");
    let mut front = InferenceServiceClient::new(channel(&house).await);
    let sampling = Some(v1::SamplingParams { temperature: Some(-1.0), ..Default::default() });
    let start = v1::GenerateStart { sampling, ..Default::default() };
    let messages = futures::stream::iter([v1::GenerateRequest { start: Some(start), chunk: None }]);
    refused(
        &front.generate(messages).await.unwrap_err(),
        Code::InvalidArgument,
        "start.sampling.temperature",
    );
}

#[tokio::test]
async fn messages_beyond_the_limit_are_refused() {
    let house = House::new(Lane::Grpc).await;
    let mut front = InferenceServiceClient::new(channel(&house).await);
    let text = v1::TokenizeRequest { text: "x".repeat(5 << 20), ..Default::default() };
    let status = front.tokenize(text).await.unwrap_err();
    refused(&status, Code::OutOfRange, "message");
    assert!(status.message().contains("the limit is 4194304 bytes; hint: "), "{status:?}");
    let chunk = v1::TextChunk { text: "x".repeat(5 << 20) };
    let chunk = Some(v1::generate_request::Chunk::Text(chunk));
    let start = Some(v1::GenerateStart::default());
    let messages = [v1::GenerateRequest { start, chunk: None }, v1::GenerateRequest { start: None, chunk }];
    let answers = front.generate(futures::stream::iter(messages)).await;
    let status = match answers {
        Err(status) => status,
        Ok(answers) => answers.into_inner().filter_map(async |item| item.err()).boxed().next().await.unwrap(),
    };
    refused(&status, Code::OutOfRange, "message");
}

/// Messages as bytes, whether they are Protobuf or not.
#[derive(Debug, Clone, Copy)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// The path of a method of `longshore.v1`.
fn path(method: &str) -> http::uri::PathAndQuery {
    format!("/longshore.v1.{method}").parse().unwrap()
}

/// Sends raw messages and returns the first error, which may come before or among the answers.
async fn stream_error(house: &House, method: &str, messages: &[&'static [u8]]) -> Status {
    let mut client = Grpc::new(channel(house).await);
    client.ready().await.unwrap();
    let messages: Vec<_> = messages.iter().map(|message| Bytes::from_static(message)).collect();
    let request = Request::new(futures::stream::iter(messages));
    let mut answers = match client.streaming(request, path(method), Raw).await {
        Err(status) => return status,
        Ok(answers) => answers.into_inner(),
    };
    loop {
        match answers.message().await {
            Err(status) => return status,
            Ok(answer) => assert!(answer.is_some(), "the stream ended well"),
        }
    }
}

#[tokio::test]
async fn undecodable_stream_messages_name_their_field() {
    const START: &[u8] = b"\x0a\x00";
    let house = House::new(Lane::Grpc).await;
    let check = async |method, messages: &[&'static [u8]], field, problem| {
        let status = stream_error(&house, method, messages).await;
        refused(&status, Code::InvalidArgument, field);
        assert!(status.message().contains(problem) && status.message().contains("hint: "), "{status:?}");
    };
    let generate = "InferenceService/Generate";
    check(generate, &[START, b"\x12\x04\x0a\x02\xff\xfe"], "chunk.text", "UTF-8").await;
    check(generate, &[START, b"\x22\x04\x12\x02\xff\xfe"], "chunk.content", "UTF-8").await;
    check(generate, &[b"\x0a\x04\x0a\x02\xff\xfe"], "start.model", "UTF-8").await;
    check(generate, &[START, b"\xff\xff\xff\xff"], "message", "invalid varint").await;
    check(generate, &[b"\x00\x00"], "message", "invalid tag").await;
    check(generate, &[START, b"\x12\x7fab"], "chunk", "underflow").await;
    check("KvStoreService/PutBlocks", &[b"\xff\xff"], "message", "invalid varint").await;
    check("KvStoreService/Attend", &[b"\xff\xff"], "message", "invalid varint").await;
}

#[tokio::test]
async fn undecodable_unary_messages_name_their_field() {
    let house = House::new(Lane::Grpc).await;
    let mut client = Grpc::new(channel(&house).await);
    let mut check = async |method, message: &'static [u8], field, problem| {
        client.ready().await.unwrap();
        let request = Request::new(Bytes::from_static(message));
        let status = client.unary(request, path(method), Raw).await.unwrap_err();
        refused(&status, Code::InvalidArgument, field);
        assert!(status.message().contains(problem) && status.message().contains("hint: "), "{status:?}");
    };
    let tokenize = "InferenceService/Tokenize";
    check(tokenize, b"\x12\x02\xff\xfe", "text", "UTF-8").await;
    check(tokenize, b"\x0a\x02\xc3\x28", "model", "UTF-8").await;
    check(tokenize, b"\xff\xff\xff\xff", "message", "invalid varint").await;
    check(tokenize, b"\x12\x7fab", "text", "underflow").await;
    check(tokenize, b"\x10\x01", "text", "wire type").await;
    check("KvStoreService/Lookup", b"\x0a\x7f", "identity", "underflow").await;
}

#[tokio::test]
async fn frames_cut_short_are_the_callers_fault() {
    let house = House::new(Lane::Grpc).await;
    let channel = channel(&house).await;
    for method in ["InferenceService/Tokenize", "InferenceService/Generate"] {
        // Announces 32 bytes and sends 3.
        let request = http::Request::post(format!("{}{}", house.address, path(method)))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Body::new("\0\0\0\0\x20abc".to_owned()))
            .unwrap();
        let response = channel.clone().oneshot(request).await.unwrap();
        let status = Status::from_header_map(response.headers()).expect("nothing but a status");
        refused(&status, Code::InvalidArgument, "message");
        assert!(status.message().contains("cut short"), "{method}: {status:?}");
    }
}

async fn health(channel: &Channel, service: &str) -> Result<ServingStatus, Status> {
    let mut client = HealthClient::new(channel.clone());
    Ok(client.check(HealthCheckRequest { service: service.to_owned() }).await?.into_inner().status())
}

const NAMES: [&str; 5] = [
    "",
    "readiness",
    "longshore.v1.KvStoreService",
    "longshore.v1.InferenceService",
    "longshore.v1.ClusterService",
];

#[tokio::test]
async fn health_follows_readiness() {
    let house = House::new(Lane::Grpc).await;
    let channel = channel(&house).await;
    for name in NAMES {
        assert_eq!(health(&channel, name).await.unwrap(), ServingStatus::Serving, "{name}");
    }
    house.readiness.as_ref().unwrap().set(false);
    for name in NAMES {
        let told = async {
            while health(&channel, name).await.unwrap() == ServingStatus::Serving {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LONG, told).await.unwrap_or_else(|_| panic!("`{name}` still serves"));
    }
    assert_eq!(health(&channel, "liveness").await.unwrap(), ServingStatus::Serving);
    assert_eq!(
        health(&channel, "longshore.v1.DecodeService").await.unwrap_err().code(),
        tonic::Code::NotFound
    );
}

#[tokio::test]
async fn reflection_lists_what_is_served() {
    let house = House::new(Lane::Grpc).await;
    let channel = channel(&house).await;
    let mut wanted = NAMES[2..].to_vec();
    wanted.extend(["grpc.health.v1.Health"]);
    {
        use reflection::{ServerReflectionRequest, server_reflection_client::ServerReflectionClient};
        use reflection::{
            server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
        };
        let ask = |request| ServerReflectionRequest { host: String::new(), message_request: Some(request) };
        let requests = [
            ask(MessageRequest::ListServices(String::new())),
            ask(MessageRequest::FileContainingSymbol("longshore.v1.AttendItem".to_owned())),
        ];
        let mut client = ServerReflectionClient::new(channel.clone());
        let answers =
            client.server_reflection_info(futures::stream::iter(requests)).await.unwrap().into_inner();
        let answers: Vec<_> = answers.map(|answer| answer.unwrap().message_response.unwrap()).collect().await;
        let MessageResponse::ListServicesResponse(list) = &answers[0] else { panic!("a list was asked for") };
        let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
        assert!(wanted.iter().all(|name| names.contains(name)), "{names:?}");
        assert!(!names.contains(&"longshore.v1.DecodeService"), "{names:?}");
        assert!(
            matches!(&answers[1], MessageResponse::FileDescriptorResponse(files) if !files.file_descriptor_proto.is_empty())
        );
    }
    use reflection_alpha::{ServerReflectionRequest, server_reflection_client::ServerReflectionClient};
    use reflection_alpha::{
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let list = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(channel);
    let mut answers =
        client.server_reflection_info(futures::stream::iter([list])).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else { panic!("a list was asked for") };
    assert!(wanted.iter().all(|name| list.service.iter().any(|service| service.name == *name)));
}

#[tokio::test]
async fn a_drain_lets_calls_finish_and_refuses_new_ones() {
    let mut house = House::new(Lane::Grpc).await;
    let client = house.client();
    let context = CallContext::new("last").with_timeout(Duration::from_secs(4));
    let shutdown = async {
        house.called().await;
        house.shutdown.cancel();
    };
    let (answer, ()) = tokio::join!(client.lookup(&context, lookup(&[STUCK])), shutdown);
    assert_eq!(from_error(answer), Code::DeadlineExceeded, "it lasted until its own end");
    let ended = std::time::Instant::now();
    house.served.join_next().await.unwrap().unwrap().unwrap();
    assert!(ended.elapsed() < Duration::from_secs(10), "nothing waits for the drain timeout");
    let later = CallContext::new("later");
    assert_eq!(from_error(house.client().stats(&later).await), Code::Unavailable);
}

fn from_error<T: std::fmt::Debug>(answer: Result<T, longshore_fabric::Error>) -> Code {
    answer.unwrap_err().code
}

#[tokio::test]
async fn health_watchers_see_the_drain() {
    let options = ServerOptions { drain_timeout: Duration::from_secs(5), ..ServerOptions::default() };
    let house = House::with(Lane::Grpc, FakeRouter::default(), options).await;
    let mut client = HealthClient::new(channel(&house).await);
    let mut watch =
        client.watch(HealthCheckRequest { service: "readiness".to_owned() }).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    house.shutdown.cancel();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
}

#[tokio::test]
async fn connections_beyond_the_limit_are_closed() {
    let options = ServerOptions { connections_max: 1, ..ServerOptions::default() };
    let house = House::with(Lane::Grpc, FakeRouter::default(), options).await;
    let mut first = KvStoreServiceClient::new(channel(&house).await);
    first.stats(v1::StatsRequest {}).await.unwrap();
    let second = Channel::from_shared(house.address.clone()).unwrap().connect_lazy();
    let status = KvStoreServiceClient::new(second).stats(v1::StatsRequest {}).await.unwrap_err();
    assert_eq!(from_status(&status).code, Code::Unavailable, "{status:?}");
    first.stats(v1::StatsRequest {}).await.unwrap();
}
