use std::future::poll_fn;

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
    let watched = unread.over(Body::new(Sent(sent)), sever.clone(), None, None);
    (sender, watched, sever)
}

async fn after(unread: &Unread, time: Duration) {
    tokio::time::advance(time).await;
    unread.end_late(PATIENCE);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_was_never_asked_for_ends_its_connection() {
    let unread = Unread::new(Some(PATIENCE), TileTraffic::default());
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
    let unread = Unread::new(Some(PATIENCE), TileTraffic::default());
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

#[tokio::test(start_paused = true)]
async fn what_is_not_sent_is_looked_after_when_its_answer_is_gone() {
    let unread = Unread::new(Some(PATIENCE), TileTraffic::default());
    let kept = Arc::new(());
    let (sender, sent) = mpsc::channel(4);
    let sever = CancellationToken::new();
    let keeps = Some(Keeps(kept.clone()));
    let mut answer = unread.over(Body::new(Sent(sent)), sever.clone(), None, keeps);
    sender.send(Bytes::from_static(b"the last tile")).await.unwrap();
    let mut last = frame(&mut answer).await;
    let begun = last.split_to(3);
    drop((answer, sender, begun));
    assert_eq!((Arc::strong_count(&kept), unread.answers().under_way.len()), (2, 1));
    after(&unread, PATIENCE).await;
    assert!(sever.is_cancelled());
    drop(last);
    assert_eq!((Arc::strong_count(&kept), unread.answers().under_way.len()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_large_frame_goes_out_in_parts_and_each_of_them_counts() {
    let unread = Unread::new(Some(PATIENCE), TileTraffic::default());
    let (sender, mut answer, sever) = answer(&unread);
    let bytes = Bytes::from_iter((0..5 * FRAME_BYTES_MAX / 2).map(|at| (at % 251) as u8));
    sender.send(bytes.clone()).await.unwrap();
    let mut came = Vec::new();
    while came.len() < bytes.len() {
        let part = frame(&mut answer).await;
        assert!(part.len() <= FRAME_BYTES_MAX && !answer.is_end_stream());
        came.extend_from_slice(&part);
        assert_eq!(answer.size_hint().lower(), (bytes.len() - came.len()) as u64);
        after(&unread, PATIENCE * 3 / 4).await;
        assert!(!sever.is_cancelled());
    }
    assert_eq!(came, bytes);
}

#[tokio::test(start_paused = true)]
async fn a_process_that_stood_still_blames_nobody() {
    let unread = Unread::new(Some(PATIENCE), TileTraffic::default());
    let (_sender, _answer, sever) = answer(&unread);
    tokio::time::advance(PATIENCE * 5).await;
    unread.pardon();
    after(&unread, PATIENCE / 2).await;
    assert!(!sever.is_cancelled());
    after(&unread, PATIENCE / 2).await;
    assert!(sever.is_cancelled());
}
