use std::future::poll_fn;

use http_body::Body as _;
use tokio::sync::mpsc;

use super::*;

const PATIENCE: Duration = Duration::from_secs(10);

/// Gives what is sent.
struct Sent(mpsc::Receiver<Bytes>);

impl http_body::Body for Sent {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.0.poll_recv(cx).map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes))))
    }
}

async fn frame(answer: &mut Watched) -> Bytes {
    let frame = poll_fn(|cx| Pin::new(&mut *answer).poll_frame(cx)).await;
    frame.expect("a frame").unwrap().into_data().expect("bytes")
}

/// An answer that gives what is sent, on a connection.
fn answer(unread: &Unread) -> (mpsc::Sender<Bytes>, Watched, CancellationToken) {
    let (sender, sent) = mpsc::channel(4);
    let sever = CancellationToken::new();
    let watched = unread.over(Body::new(Sent(sent)), sever.clone());
    (sender, watched, sever)
}

async fn after(unread: &Unread, time: Duration) {
    tokio::time::advance(time).await;
    unread.end_late();
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_was_never_asked_for_ends_its_connection() {
    let unread = Unread::new(PATIENCE, TileTraffic::default());
    let (_sender, _answer, sever) = answer(&unread);
    let (_other_sender, other, other_sever) = answer(&unread);
    drop(other);
    after(&unread, PATIENCE / 2).await;
    assert!(!sever.is_cancelled());
    after(&unread, PATIENCE / 2).await;
    assert!(sever.is_cancelled() && !other_sever.is_cancelled());
    after(&unread, PATIENCE).await;
    assert_eq!(unread.traffic.ended_unread_total(), 1, "once for each connection");
}

#[tokio::test(start_paused = true)]
async fn a_reader_may_wait_for_a_service_but_not_the_other_way_round() {
    let unread = Unread::new(PATIENCE, TileTraffic::default());
    let (sender, mut answer, sever) = answer(&unread);
    // The service has nothing.
    assert!(futures::poll!(std::pin::pin!(frame(&mut answer))).is_pending());
    after(&unread, PATIENCE * 3).await;
    assert!(!sever.is_cancelled());
    // The reader is slow, and takes something every time.
    for _ in 0..4 {
        sender.send(Bytes::from_static(b"tile")).await.unwrap();
        assert_eq!(frame(&mut answer).await, "tile");
        after(&unread, PATIENCE * 3 / 4).await;
        assert!(!sever.is_cancelled());
    }
    after(&unread, PATIENCE / 2).await;
    assert!(sever.is_cancelled());
    drop(answer);
    assert!(unread.answers().under_way.is_empty());
}
