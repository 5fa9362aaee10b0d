use std::pin::pin;

use futures::poll;
use longshore_proto::v1::kv_store_service_client::KvStoreServiceClient;
use tokio::net::{TcpListener, TcpStream};
use tonic::{body::Body, transport::Channel};

use super::*;
use crate::{
    GrpcOptions,
    tcp::{KEPT, KEPT_VALUE},
};

/// Connections to a peer that nobody calls.
fn dial() -> Arc<Dial> {
    let channel = Channel::from_static("http://127.0.0.1:1").connect_lazy();
    Arc::new(Dial::new("http://127.0.0.1:1", KvStoreServiceClient::new(channel), &GrpcOptions::default()))
}

/// A store stream that has a connection, and the peer's end of it.
async fn begun(dial: &Arc<Dial>) -> (Sending, Outcome, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (theirs, _) = listener.accept().await.unwrap();
    let (sending, outcome) = halves(dial.lease_of(ours));
    (sending, outcome, theirs)
}

/// The end of a call that went well and whose connection the server keeps.
fn kept() -> Messages {
    let response = http::Response::builder().header("grpc-status", "0").header(KEPT, KEPT_VALUE);
    Messages::of_response(response.body(Body::empty()).unwrap(), 1024)
}

fn end(outcome: Outcome) -> impl Future<Output = Option<Error>> {
    outcome.end(CallContext::new("end"), kept(), Ok(()))
}

#[tokio::test]
async fn a_call_ends_when_its_connection_is_back() {
    let dial = dial();
    let (sending, outcome, _peer) = begun(&dial).await;
    // The peer has the last frame, the half that sends has not heard of it.
    sending.last.store(true, Ordering::Release);
    let mut end = pin!(end(outcome));
    assert!(poll!(&mut end).is_pending(), "the next call would open another connection");
    assert!(sending.sent.send(Ok(sending.lease)).is_ok(), "it is waited for");
    assert_eq!((end.await, dial.waiting()), (None, 1));
}

#[tokio::test]
async fn a_connection_whose_last_frame_did_not_go_is_not_waited_for() {
    let dial = dial();
    let (_sending, outcome, _peer) = begun(&dial).await;
    assert_eq!((poll!(pin!(end(outcome))), dial.waiting()), (std::task::Poll::Ready(None), 0));
    // Nor is one that is gone.
    let (sending, outcome, _peer) = begun(&dial).await;
    sending.last.store(true, Ordering::Release);
    drop(sending);
    assert_eq!((poll!(pin!(end(outcome))), dial.waiting()), (std::task::Poll::Ready(None), 0));
}

#[tokio::test]
async fn all_that_is_sent_leaves_the_connection_to_the_end() {
    let dial = dial();
    let (sending, outcome, _peer) = begun(&dial).await;
    let (tiles, received) = mpsc::channel(1);
    drop(tiles);
    assert!(sending.send_all(received).await.is_ok());
    assert_eq!((end(outcome).await, dial.waiting()), (None, 1));
}
