//! Attend streams over the lane `nccl`, over ranks that are none (`gpu.rs`): large partials are exchanged, and whatever becomes of their
//! epoch, every query is answered as if there were none.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures::StreamExt;
use longshore_fabric::{
    AttendLink, BoxStream, CallContext, Code, Connector, Error, GrpcConnector, GrpcOptions, Lane as Seen,
    Shard, TcpPatience, status::code_from_number,
};
use longshore_proto::{
    types::{AttendAnswer, AttendQuery, PutOutcome},
    v1,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;

use super::{
    attention::{ask, query},
    fake::{PIECES, PIECES_VIEW, STUCK, identity, queries},
    gpu::{Fault, Net},
    house::{House, LONG, Lane, over_nccl},
    nccl::{house, impatient, seen, until_joined},
    raw,
    tiles::{block, put},
};

/// Rows whose partials are worth an exchange: 2 heads of 6 numbers each.
pub(crate) const ROWS: u64 = 4_000;

fn exchanges(net: &Net) -> usize {
    net.exchanges.load(Ordering::SeqCst)
}

/// A house with a view that is answered, and a client of it that has the lane.
async fn attended(net: &Arc<Net>, patience: TcpPatience) -> (House, Arc<dyn Shard>) {
    let (house, connector) = connected(net, patience, patience).await;
    let shard = connector.shard(&house.address).unwrap();
    (house, shard)
}

/// The same with what a shard is patient for, and a client.
async fn connected(net: &Arc<Net>, shards: TcpPatience, clients: TcpPatience) -> (House, GrpcConnector) {
    let house = house(net, shards).await;
    house.shard.views.lock().unwrap().insert(7, Vec::new());
    // No handshake fails on a busy machine.
    let tcp_patience = TcpPatience { hello: LONG, ..clients };
    let options = GrpcOptions { tcp_patience, nccl_ends_max: 1, ..over_nccl(net) };
    (house, GrpcConnector::new(options))
}

/// Asks until an answer is exchanged: an epoch is joined on the side.
pub(crate) async fn until_exchanged(net: &Net, link: &AttendLink) {
    let before = exchanges(net);
    for _ in 0..6_000 {
        ask(link, query(7, ROWS)).await.unwrap();
        if exchanges(net) > before {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("no epoch was joined");
}

pub(crate) async fn until_gone(net: &Net) {
    for _ in 0..12_000 {
        if net.alive() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("both sides left it");
}

#[tokio::test(flavor = "multi_thread")]
async fn large_partials_are_exchanged_and_small_ones_are_not() {
    let net = Arc::new(Net::default());
    let (house, shard) = attended(&net, TcpPatience::default()).await;
    let link = AttendLink::new(shard, &TaskTracker::new(), 8);
    // The first query waits for nothing.
    let plain = ask(&link, query(7, ROWS)).await.unwrap();
    assert_eq!(exchanges(&net), 0);
    until_exchanged(&net, &link).await;
    let before = exchanges(&net);
    let counted = house.traffic.exchanged_partials_bytes_total();
    assert_eq!(ask(&link, query(7, ROWS)).await.unwrap(), plain);
    assert_eq!(exchanges(&net), before + 1);
    assert_eq!(house.traffic.exchanged_partials_bytes_total() - counted, 12 * 4 * ROWS);
    // 64 KiB are 1,365 rows and a third here.
    ask(&link, query(7, 1_365)).await.unwrap();
    assert_eq!(exchanges(&net), before + 1);
    assert_eq!(ask(&link, query(7, 1_366)).await.unwrap()[0].partial.shape(), (1_366, 2, 4));
    assert_eq!(exchanges(&net), before + 2);
    // Rows of several messages, and an error in the midst of them.
    let large = ask(&link, query(7, 100_000)).await.unwrap();
    // The shard numbers the rows of each message anew.
    assert_eq!(large[0].partial.row(99_999, 1).2, [3_391.0, 0.0, 0.0, 0.0]);
    assert_eq!(ask(&link, query(8, ROWS)).await.unwrap_err().code, Code::NotFound);
    assert_eq!(ask(&link, query(7, ROWS)).await.unwrap(), plain);
    assert_eq!(exchanges(&net), before + 2 + 4 + 1, "100,000 rows are four messages");
}

/// A stream that lasts has an end of its own: calls with tiles have theirs beside it, though they have one only.
#[tokio::test(flavor = "multi_thread")]
async fn streams_that_last_leave_the_lane_to_tiles() {
    let net = Arc::new(Net::default());
    let (house, shard) = attended(&net, TcpPatience::default()).await;
    let link = AttendLink::new(Arc::clone(&shard), &TaskTracker::new(), 8);
    until_exchanged(&net, &link).await;
    until_joined(&house, &*shard).await;
    let mut second = Attending::new(&*shard, CallContext::new("second")).await;
    for name in 1..=10 {
        let before = exchanges(&net);
        ask(&link, query(7, ROWS)).await.unwrap();
        assert_eq!(put(&*shard, block(name, 100_000)).await, [(name, PutOutcome::Stored)]);
        assert_eq!((seen(&house), exchanges(&net) - before), (Seen::Nccl, 3));
        // One that finds no end is answered in messages.
        second.ask(u64::from(name), 7).await;
        assert!(matches!(second.next().await, AttendAnswer::Partials { last: true, .. }));
        assert_eq!(exchanges(&net) - before, 3);
    }
}

/// Queries and answers as they are, without a link.
pub(crate) struct Attending {
    pub(crate) queries: mpsc::Sender<AttendQuery>,
    pub(crate) answers: BoxStream<AttendAnswer>,
}

impl Attending {
    pub(crate) async fn new(shard: &dyn Shard, context: CallContext) -> Self {
        let (queries, received) = mpsc::channel(8);
        let answers = shard.attend(&context, received).await.unwrap();
        Self { queries, answers }
    }

    pub(crate) async fn ask(&self, query_id: u64, view_id: u64) {
        let query = AttendQuery { query_id, ..query(view_id, ROWS) };
        self.queries.send(query).await.unwrap();
    }

    pub(crate) async fn next(&mut self) -> AttendAnswer {
        self.answers.next().await.unwrap().unwrap()
    }

    /// Asks until an answer is exchanged.
    async fn until_exchanged(&mut self, net: &Net) {
        self.exchanged(net).await.unwrap();
    }

    /// The same, or an error of the stream.
    async fn exchanged(&mut self, net: &Net) -> Result<(), Error> {
        let before = exchanges(net);
        for query_id in 1_000_000.. {
            // Where the stream is over it takes no more, and says why.
            let _taken = self.queries.send(AttendQuery { query_id, ..query(7, ROWS) }).await;
            self.answers.next().await.expect("it is not at its end")?;
            if exchanges(net) > before {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// A stream with an answer that was exchanged long before its deadline.
    async fn late(shard: &dyn Shard, net: &Net) -> Self {
        // A slow machine takes more time to get there, and to what comes next.
        for seconds in [4, 16, 64] {
            let context = CallContext::new("late").with_timeout(Duration::from_secs(seconds));
            let mut attending = Self::new(shard, context.clone()).await;
            let is_exchanged = attending.exchanged(net).await.is_ok();
            if is_exchanged && context.time_left() > Some(Duration::from_secs(seconds / 2)) {
                return attending;
            }
            drop(attending);
            until_gone(net).await;
        }
        panic!("no epoch was joined");
    }

    /// Stripes of the answers to these queries, whose numbers are right, up to the end of all.
    async fn stripes<const N: usize>(&mut self, ids: [u64; N]) -> [Vec<u64>; N] {
        let mut stripes = [const { Vec::new() }; N];
        let mut open = N;
        while open > 0 {
            let AttendAnswer::Partials { query_id, partials, last } = self.next().await else {
                panic!("it failed")
            };
            let of_query = &mut stripes[ids.iter().position(|id| *id == query_id).expect("asked")];
            for partial in partials {
                let values = partial.partial.to_f32().unwrap();
                let is_right = |(row, of_row): (usize, &[f32])| {
                    of_row == [0.0, 1.0, row as f32, partial.stripe as f32, 0.0, 0.0]
                };
                assert!(values.chunks(6).enumerate().all(is_right) && values.len() == 12 * ROWS as usize);
                of_query.push(partial.stripe);
            }
            open -= usize::from(last);
        }
        stripes
    }
}

/// Whatever happens to the bodies of an answer that is under way, its caller gets each stripe once, and the right one.
#[tokio::test(flavor = "multi_thread")]
async fn an_epoch_that_breaks_in_the_midst_of_an_answer_costs_nobody_anything() {
    for fault in [Fault::Corrupts, Fault::Dies, Fault::Hangs] {
        for came in 0..PIECES {
            let net = Arc::new(Net::default());
            let (_house, shard) = attended(&net, impatient()).await;
            let mut attending = Attending::new(&*shard, CallContext::new("breaks")).await;
            attending.until_exchanged(&net).await;
            attending.ask(5, PIECES_VIEW).await;
            for stripe in 0..came {
                let AttendAnswer::Partials { query_id: 5, partials, last } = attending.next().await else {
                    panic!("it failed")
                };
                assert_eq!((partials[0].stripe, last), (stripe, false));
            }
            net.set(fault);
            attending.ask(6, PIECES_VIEW).await;
            let stripes = |from| (from..PIECES).collect::<Vec<u64>>();
            assert_eq!(
                attending.stripes([5, 6]).await,
                [stripes(came), stripes(0)],
                "{fault:?} after {came}"
            );
            until_gone(&net).await;
            // Healed: but the lane is left alone for a while.
            net.set(Fault::None);
            let before = exchanges(&net);
            attending.ask(7, PIECES_VIEW).await;
            assert_eq!(attending.stripes([7]).await[0].len(), PIECES as usize);
            assert_eq!(exchanges(&net), before);
        }
    }
}

/// A shard that does not notice that its client left an epoch is told: otherwise it waits for its bodies to be taken, for an hour here, and
/// answers nothing until then, neither this query nor others.
#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_notices_nothing_is_told_that_an_epoch_was_left() {
    let net = Arc::new(Net::default());
    let patient = TcpPatience { write: Duration::from_secs(3_600), ..TcpPatience::default() };
    let (house, connector) = connected(&net, patient, impatient()).await;
    let shard = connector.shard(&house.address).unwrap();
    let mut attending = Attending::new(&*shard, CallContext::new("unnoticed")).await;
    attending.until_exchanged(&net).await;
    net.set(Fault::HangsUnnoticed);
    // More bodies than may be under way at a time.
    attending.ask(5, PIECES_VIEW).await;
    attending.ask(6, PIECES_VIEW).await;
    let all: Vec<u64> = (0..PIECES).collect();
    let stripes = tokio::time::timeout(Duration::from_secs(60), attending.stripes([5, 6])).await;
    assert_eq!(stripes.expect("long before the shard's patience is at its end"), [all.clone(), all]);
    until_gone(&net).await;
    assert!(connector.nccl_attend_rest(&house.address).unwrap() > Duration::ZERO);
    assert_eq!(house.traffic.attend_epochs_lost_total(), 1);
}

/// Bytes that come are no success where they come damaged: the pause grows from one epoch to the next.
#[tokio::test(flavor = "multi_thread")]
async fn the_lane_is_left_alone_for_longer_where_bodies_come_damaged_again() {
    let net = Arc::new(Net::default());
    let (house, connector) = connected(&net, impatient(), impatient()).await;
    let link = AttendLink::new(connector.shard(&house.address).unwrap(), &TaskTracker::new(), 8);
    net.set(Fault::Corrupts);
    for seconds in [5, 10] {
        until_exchanged(&net, &link).await;
        until_gone(&net).await;
        let rest = connector.nccl_attend_rest(&house.address).unwrap();
        assert_eq!(rest, Duration::from_secs(seconds));
    }
}

/// After the pause the same stream has another epoch.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_lost_its_epoch_gets_another() {
    let net = Arc::new(Net::default());
    // Who dies is noticed at once: nobody has to be impatient.
    let (_house, shard) = attended(&net, TcpPatience::default()).await;
    let link = AttendLink::new(shard, &TaskTracker::new(), 8);
    until_exchanged(&net, &link).await;
    net.set(Fault::Dies);
    let plain = ask(&link, query(7, ROWS)).await.unwrap();
    until_gone(&net).await;
    net.set(Fault::None);
    until_exchanged(&net, &link).await;
    assert_eq!(ask(&link, query(7, ROWS)).await.unwrap(), plain);
    assert_eq!(net.alive(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_nobody_can_join_answers_come_in_messages() {
    for fault in [Fault::Refuses, Fault::NobodyComes, Fault::Dies] {
        let net = Arc::new(Net::default());
        net.set(fault);
        let (_house, shard) = attended(&net, impatient()).await;
        let link = AttendLink::new(shard, &TaskTracker::new(), 8);
        for _ in 0..5 {
            assert_eq!(ask(&link, query(7, ROWS)).await.unwrap()[0].partial.shape(), (4_000, 2, 4));
        }
        assert_eq!(exchanges(&net), 0, "{fault:?}");
    }
    // And where there is no such lane at all.
    let net = Arc::new(Net::default());
    let plain = House::new(Lane::Grpc).await;
    plain.shard.views.lock().unwrap().insert(7, Vec::new());
    let shard = GrpcConnector::new(over_nccl(&net)).shard(&plain.address).unwrap();
    ask(&AttendLink::new(shard, &TaskTracker::new(), 8), query(7, ROWS)).await.unwrap();
    let alone = GrpcConnector::new(over_nccl(&net)).nccl_shard(&plain.address).unwrap();
    let (_queries, received) = mpsc::channel(1);
    let refused = alone.attend(&CallContext::new("alone"), received).await.err().unwrap();
    assert_eq!(refused.code, Code::Unimplemented, "{refused}");
}

/// Cancelled, dropped, ended well, or late in the midst of a body that hangs: the epoch is over at both sides.
#[tokio::test(flavor = "multi_thread")]
async fn the_epoch_of_a_stream_ends_with_it() {
    for way in ["cancelled", "dropped", "ended", "late"] {
        let net = Arc::new(Net::default());
        let (house, connector) = connected(&net, TcpPatience::default(), TcpPatience::default()).await;
        let shard = connector.shard(&house.address).unwrap();
        let context = CallContext::new(way);
        let mut attending = match way {
            "late" => Attending::late(&*shard, &net).await,
            _ => Attending::new(&*shard, context.clone()).await,
        };
        if way != "late" {
            attending.until_exchanged(&net).await;
        }
        assert_eq!(net.alive(), 1);
        if way != "ended" {
            net.set(Fault::Hangs);
            attending.ask(5, PIECES_VIEW).await;
        }
        match way {
            "cancelled" => {
                let cancel = async {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    context.cancel.cancel();
                };
                let (answer, ()) = tokio::join!(attending.answers.next(), cancel);
                assert_eq!(answer.unwrap().unwrap_err().code, Code::Cancelled);
            }
            "dropped" => {
                let soon = Duration::from_millis(50);
                tokio::time::timeout(soon, attending.answers.next()).await.unwrap_err();
                drop(attending);
            }
            "late" => {
                let error = attending.answers.next().await.unwrap().unwrap_err();
                assert_eq!(error.code, Code::DeadlineExceeded, "{error}");
            }
            _ => {
                let Attending { queries, mut answers } = attending;
                drop(queries);
                assert!(answers.next().await.is_none());
            }
        }
        until_gone(&net).await;
        // One that ended well is no fault of the lane. In the midst of a body the shard cannot tell, and rests for a while.
        if way != "ended" {
            continue;
        }
        assert_eq!(connector.nccl_attend_rest(&house.address).unwrap(), Duration::ZERO);
        let mut again = Attending::new(&*shard, CallContext::new("again")).await;
        again.until_exchanged(&net).await;
    }
}

/// Answers by the numbers of their queries.
async fn answers_of(
    client: &mut raw::Client,
    asked: Vec<v1::AttendRequest>,
) -> std::collections::BTreeMap<u64, v1::AttendResponse> {
    let (sender, received) = mpsc::channel(16);
    for message in asked {
        sender.send(message).await.unwrap();
    }
    drop(sender);
    let answers = client.attend(ReceiverStream::new(received)).await.unwrap().into_inner();
    answers.map(|answer| answer.unwrap()).map(|answer| (answer.query_id, answer)).collect().await
}

/// Epochs that are none: their queries are answered in messages that say so; those that make no sense fail alone.
#[tokio::test(flavor = "multi_thread")]
async fn queries_that_name_no_epoch_that_there_is_are_answered_all_the_same() {
    let net = Arc::new(Net::default());
    let house = house(&net, impatient()).await;
    house.shard.views.lock().unwrap().insert(7, Vec::new());
    let epoch =
        |incarnation, member: Vec<u8>| Some(v1::NcclEpoch { incarnation, number: 1, member: member.into() });
    let named = |query_id, epoch, lease| v1::AttendRequest {
        query_id,
        identity: Some(identity().into()),
        layer: 0,
        items: vec![queries(7, ROWS).into()],
        nccl: Some(v1::NcclLease { epoch, lease }),
    };
    let asked = || {
        vec![
            named(1, epoch(1, vec![1; 16]), 1),
            named(2, epoch(2, vec![1; 16]), 1),
            named(3, epoch(2, vec![1; 16]), 1),
            named(4, None, 1),
            named(5, epoch(0, vec![1; 16]), 1),
            named(6, epoch(1, vec![1; 15]), 1),
            named(7, epoch(1, vec![1; 16]), 0),
            v1::AttendRequest { nccl: None, ..named(8, None, 1) },
        ]
    };
    let plain = House::new(Lane::Grpc).await;
    plain.shard.views.lock().unwrap().insert(7, Vec::new());
    for house in [&house, &plain] {
        let mut client = raw::client(house).await;
        let answers = answers_of(&mut client, asked()).await;
        for (id, over) in [(1, true), (2, true), (3, true), (8, false)] {
            let answer = &answers[&id];
            assert!(answer.last && answer.nccl.is_none(), "{id}");
            assert_eq!((answer.nccl_over, answer.body_bytes()), (over, 12 * 4 * ROWS as usize), "{id}");
        }
        for (id, field) in
            [(4, "nccl.epoch"), (5, "nccl.epoch.incarnation"), (6, "nccl.epoch.member"), (7, "nccl.lease")]
        {
            let answer = &answers[&id];
            assert_eq!(code_from_number(answer.error_code), Some(Code::InvalidArgument), "{id}");
            assert!(answer.error_message.contains(&format!("`{field}`")), "{}", answer.error_message);
        }
    }
    let stuck = CallContext::new("others").with_timeout(Duration::from_millis(50));
    let lookup = house.client().lookup(&stuck, super::fake::lookup(&[STUCK])).await;
    assert_eq!(lookup.unwrap_err().code, Code::DeadlineExceeded, "others are served");
}
