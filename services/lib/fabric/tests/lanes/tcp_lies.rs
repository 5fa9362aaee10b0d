//! The `tcp` lane with servers that lie, break off or stay silent: typed errors, no hang, and nothing is sound that is not.

use std::{sync::atomic::Ordering, time::Duration};

use futures::{StreamExt, future::join_all};
use longshore_blocks::BlockKey;
use longshore_fabric::{CallContext, Code, Error, GrpcConnector, GrpcOptions, Shard, TcpPatience};
use longshore_proto::types::{GetBlocks, TileMessage};
use tokio::sync::mpsc;
use tonic::Status;

use super::{
    fake::{identity, shape, tile},
    house::{over_tcp, patient},
    liar::{Liar, Lie, Offer, Then},
    raw::{TILE, end, frame, head},
    tiles::block,
};

const SHORT: Duration = Duration::from_millis(300);
/// Longer than any lie may delay a call.
const NO_HANG: Duration = Duration::from_secs(120);

/// Waits for a frame, or for somebody to read one, for a short time only.
fn hasty() -> TcpPatience {
    TcpPatience { read: SHORT, write: SHORT, bytes_per_second_min: u64::MAX, ..patient() }
}

fn client(liar: &Liar, tcp_patience: TcpPatience) -> std::sync::Arc<dyn Shard> {
    let options = GrpcOptions { tcp_patience, ..over_tcp() };
    GrpcConnector::new(options).tcp_shard(&liar.address).unwrap()
}

/// The tiles that came, and why no more did.
async fn read(shard: &dyn Shard, names: &[u8]) -> (Vec<Option<TileMessage>>, Option<Error>) {
    let keys = names.iter().map(|name| BlockKey([*name; 16])).collect();
    let get = GetBlocks::whole(identity(), keys);
    let reading = async {
        let mut answers = match shard.get_blocks(&CallContext::new("lies"), get).await {
            Ok(answers) => answers,
            Err(error) => return (Vec::new(), Some(error)),
        };
        let mut came = Vec::new();
        while let Some(answer) = answers.next().await {
            match answer {
                Ok(tile) => came.push(tile),
                Err(error) => return (came, Some(error)),
            }
        }
        (came, None)
    };
    tokio::time::timeout(NO_HANG, reading).await.expect("it hangs")
}

/// The frames of block 1, which is asked for.
fn frames() -> [Vec<u8>; 2] {
    [0, 1].map(|number| frame(number, &tile(BlockKey([1; 16]), number, 300)))
}

fn told(parts: &[&[u8]], then: Then) -> Lie {
    Lie::new(parts.concat(), then)
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_about_frames_are_typed_errors_and_no_tile_is_sound_that_is_not() {
    let [first, second] = frames();
    let large = frame(0, &tile(BlockKey([1; 16]), 0, 20_000));
    let bytes_of = |bytes: u32| head(1, 0, TILE, |head| head[16..20].copy_from_slice(&bytes.to_le_bytes()));
    let (broken, nonsense) = (Code::Unavailable, Code::DataLoss);
    let drip = |lie: Lie, bytes| Lie { step: (bytes, SHORT / 2), ..lie };
    let cases = [
        ("closes at once", told(&[], Then::Close), broken),
        ("closes inside a head", told(&[&first[..50]], Then::Close), broken),
        ("closes inside a body", told(&[&first, &second[..200]], Then::Close), broken),
        ("closes between frames", told(&[&first], Then::Close), broken),
        ("is silent inside a head", told(&[&first[..95]], Then::Silence), broken),
        ("is silent inside a body", told(&[&first, &second[..97]], Then::Silence), broken),
        ("drips a head", drip(told(&[&first], Then::Silence), 1), broken),
        ("drips a body", drip(told(&[&large], Then::Silence), 500), broken),
        ("ends the call only", told(&[&first, &second], Then::End), broken),
        ("ends the frames only", told(&[&first, &second, &end(2)], Then::Silence), broken),
        ("has a short body", told(&[&first[..300], &second, &end(2)], Then::End), nonsense),
        ("has a long body", told(&[&first, &[7; 200], &second], Then::End), nonsense),
        ("has the second frame first", told(&[&second, &first], Then::End), nonsense),
        ("has a frame twice", told(&[&first, &first], Then::End), nonsense),
        ("has the frame of another call", told(&[&head(2, 0, TILE, |_| ())], Then::End), nonsense),
        ("has no kind", told(&[&head(1, 0, 0, |_| ())], Then::End), nonsense),
        ("has an unknown kind", told(&[&head(1, 0, 5, |_| ())], Then::End), nonsense),
        ("has an endless body", told(&[&bytes_of(u32::MAX)], Then::Silence), nonsense),
        ("has a body beyond the limit", told(&[&bytes_of((16 << 20) + 1)], Then::Silence), nonsense),
        ("fills what is empty", told(&[&head(1, 0, TILE, |head| head[90] = 1)], Then::End), nonsense),
        ("has zeros", told(&[&[0; 96]], Then::End), nonsense),
        ("has a message too", told(&[&first, &second], Then::Message), nonsense),
    ];
    let whole = block(1, 300);
    let runs = cases.map(|(what, lie, code)| {
        let whole = whole.clone();
        async move {
            let liar = Liar::new(lie).await;
            // What makes no sense is seen at once: nothing is given up before.
            let patience = if code == nonsense { patient() } else { hasty() };
            let (came, error) = read(&*client(&liar, patience), &[1]).await;
            let error = error.unwrap_or_else(|| panic!("{what}: all is well"));
            assert_eq!(error.code, code, "{what}: {error}");
            let is_seen = |tile: &TileMessage| whole.contains(tile) || !tile.data.matches(tile.crc32c);
            assert!(came.iter().flatten().all(is_seen), "{what}: {came:?}");
        }
    });
    join_all(runs).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_what_it_says_is_seen_by_who_takes_it() {
    let mut wrong = tile(BlockKey([1; 16]), 0, 300);
    wrong.crc32c ^= 1;
    let liar = Liar::new(told(&[&frame(0, &wrong), &frames()[1], &end(2)], Then::Kept)).await;
    let (came, error) = read(&*client(&liar, patient()), &[1]).await;
    assert_eq!((came.len(), error), (2, None));
    let sound: Vec<_> = came.iter().flatten().map(|tile| tile.data.matches(tile.crc32c)).collect();
    assert_eq!(sound, [false, true]);
    // Sound, and of another block: it says so, and cannot pass for the one that was asked for.
    let other = tile(BlockKey([9; 16]), 0, 300);
    let liar = Liar::new(told(&[&frame(0, &other), &end(1)], Then::Kept)).await;
    let (came, error) = read(&*client(&liar, patient()), &[1]).await;
    assert_eq!((came, error), (vec![Some(other)], None));
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_behind_the_last_frame_are_nobodys() {
    let [first, second] = frames();
    let liar =
        Liar::new(told(&[&first, &second, &end(2), &frame(0, &tile(BlockKey([8; 16]), 0, 9))], Then::Kept));
    let (liar, whole) = (liar.await, block(1, 300).into_iter().map(Some).collect::<Vec<_>>());
    let shard = client(&liar, patient());
    for round in 1..=3 {
        assert_eq!(read(&*shard, &[1]).await, (whole.clone(), None));
        assert_eq!(liar.offers.load(Ordering::SeqCst), round, "the connection is not used again");
    }
    // Without them it would have been.
    let honest = Liar::new(told(&[&first, &second, &end(2)], Then::Kept)).await;
    let shard = client(&honest, patient());
    assert_eq!(read(&*shard, &[1]).await, (whole, None));
    tokio::time::timeout(SHORT, read(&*shard, &[1])).await.expect_err("its one socket answers one call");
    assert_eq!(honest.offers.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn offers_that_lie_are_typed_errors() {
    let offers = [
        (Offer { port: Some(0), ..Offer::default() }, Code::Unavailable),
        (Offer { port: Some(1), ..Offer::default() }, Code::Unavailable),
        (Offer { port: Some(70_000), ..Offer::default() }, Code::DataLoss),
        (Offer { token: vec![7; 15], ..Offer::default() }, Code::DataLoss),
        (Offer { token: vec![7; 17], ..Offer::default() }, Code::DataLoss),
        (Offer { confirms: b"HTTP/1.1 200 OK\r\n".to_vec(), ..Offer::default() }, Code::Unavailable),
        (Offer { confirms: b"LSTCP\0\0\x02".to_vec(), ..Offer::default() }, Code::Unavailable),
        (Offer { confirms: b"LSTCP".to_vec(), ..Offer::default() }, Code::Unavailable),
        (Offer { confirms: Vec::new(), ..Offer::default() }, Code::Unavailable),
    ];
    for (offer, code) in offers {
        let what = format!("{offer:?}");
        let liar = Liar::offering(told(&[], Then::Close), offer).await;
        // Two of them say nothing more.
        let patience = TcpPatience { hello: Duration::from_secs(5), ..patient() };
        let (came, error) = read(&*client(&liar, patience), &[1]).await;
        assert_eq!((came.len(), error.map(|error| error.code)), (0, Some(code)), "{what}");
    }
}

/// Whether a store stream of 60 MiB, which is more than sockets hold, was acknowledged and why it ended.
async fn store(liar: &Liar, patience: TcpPatience) -> (usize, Option<Error>) {
    let (shard, (sender, received)) = (client(liar, patience), mpsc::channel(1));
    let feeding = async move {
        for layer in 0..60 {
            if sender.send(tile(BlockKey([1; 16]), layer, 1 << 20)).await.is_err() {
                return;
            }
        }
    };
    let storing = async {
        let context = CallContext::new("lies");
        let mut acks = match shard.put_blocks(&context, identity(), shape(), received).await {
            Ok(acks) => acks,
            Err(error) => return (0, Some(error)),
        };
        let mut acknowledged = 0;
        while let Some(ack) = acks.next().await {
            match ack {
                Ok(_) => acknowledged += 1,
                Err(error) => return (acknowledged, Some(error)),
            }
        }
        (acknowledged, None)
    };
    let both = async { tokio::join!(storing, feeding).0 };
    tokio::time::timeout(NO_HANG, both).await.expect("it hangs")
}

#[tokio::test(flavor = "multi_thread")]
async fn store_streams_end_whatever_the_server_does_with_their_connection() {
    let reading = |reads, then| Lie { reads, ..told(&[], then) };
    for (lie, code) in [
        (reading(0, Then::Close), Some(Code::Unavailable)),
        (reading(50, Then::Close), Some(Code::Unavailable)),
        (reading(3 << 20, Then::Close), Some(Code::Unavailable)),
        (reading(0, Then::Silence), Some(Code::Unavailable)),
        (reading(1 << 20, Then::Silence), Some(Code::Unavailable)),
        (reading(0, Then::Refuse(Status::resource_exhausted("full"))), Some(Code::ResourceExhausted)),
        (reading(1 << 20, Then::Refuse(Status::internal("a bug"))), Some(Code::Internal)),
        // An acknowledgement without a key.
        (reading(1 << 20, Then::Message), Some(Code::DataLoss)),
        // A server may want no more. Nothing was acknowledged.
        (reading(1 << 20, Then::End), None),
    ] {
        let what = format!("{lie:?}");
        // Who says something may take his time for it.
        let patience = if matches!(lie.then, Then::Silence) { hasty() } else { patient() };
        let liar = Liar::new(lie).await;
        let (acknowledged, error) = store(&liar, patience).await;
        assert_eq!((acknowledged, error.as_ref().map(|error| error.code)), (0, code), "{what}: {error:?}");
    }
}
