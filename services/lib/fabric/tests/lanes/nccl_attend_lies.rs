//! Attend streams of a client whose shard lies about the bodies of partials: over the generated service, in epochs that are joined.

use std::{
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::StreamExt;
use longshore_fabric::{
    AttendLink, CallContext, Code, Connector, GrpcConnector, Shard,
    nccl::{GpuEnd, GpuInvitation, GpuLane},
};
use longshore_proto::{
    types::{AttendAnswer, AttendPartial, Tensor},
    v1,
};
use tokio_util::task::TaskTracker;

use super::{
    attention::{ask, query},
    gpu::Net,
    house::over_nccl,
    liar::{Attends, Liar, Lie, Offer, Then},
    nccl_attend::{Attending, ROWS, until_gone},
};

/// Queries over this view are answered as they must be, in messages.
const HONEST_VIEW: u64 = 1;
const LIES_VIEW: u64 = 2;
/// Bytes of the partials of [`ROWS`] rows.
const BYTES: u32 = 12 * 4 * ROWS as u32;

/// What is wrong with an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wrong {
    Number,
    TooManyBytes,
    NoBytes,
    DataBeside,
    BodyTooLong,
    BodyTooShort,
    /// Says in one message that it exchanges, and that the epoch is over.
    OverBeside,
    /// Says of every epoch that it is over.
    AlwaysOver,
}

#[derive(Debug)]
struct LyingShard {
    end: Arc<Mutex<Box<dyn GpuLane>>>,
    wrong: Wrong,
}

/// For a moment, in which the other side is to come.
fn for_a_moment() -> impl FnMut() -> bool {
    let until = Instant::now() + Duration::from_secs(5);
    move || {
        std::thread::yield_now();
        Instant::now() < until
    }
}

impl LyingShard {
    /// Does something at its end on a thread of its own.
    fn run(&self, work: impl FnOnce(&mut dyn GpuLane) + Send + 'static) {
        let end = Arc::clone(&self.end);
        std::thread::spawn(move || work(&mut **end.lock().unwrap()));
    }

    fn lie(&self, named: v1::NcclLease, answer: &mut v1::AttendResponse) {
        let epoch = named.epoch.unwrap().number;
        let (number, bytes) = match self.wrong {
            Wrong::Number => (1, BYTES),
            Wrong::TooManyBytes => (0, (16 << 20) + 1),
            Wrong::NoBytes => (0, 0),
            Wrong::BodyTooLong => (0, BYTES + 4),
            Wrong::BodyTooShort => (0, BYTES - 4),
            Wrong::DataBeside | Wrong::OverBeside | Wrong::AlwaysOver => (0, BYTES),
        };
        answer.nccl_over = matches!(self.wrong, Wrong::OverBeside | Wrong::AlwaysOver);
        if self.wrong == Wrong::AlwaysOver {
            return;
        }
        answer.nccl = Some(v1::NcclBytes { number, bytes });
        if self.wrong != Wrong::DataBeside {
            answer.leave_out_body();
        }
        if matches!(self.wrong, Wrong::DataBeside | Wrong::BodyTooLong | Wrong::BodyTooShort) {
            let body = Bytes::from(vec![0; bytes as usize]);
            self.run(move |end| {
                // Nobody takes it where its message is refused before.
                let _taken = end.send(epoch, &[body], 0, &mut for_a_moment());
            });
        }
    }
}

impl Attends for LyingShard {
    fn invite(&self) -> v1::JoinNcclEpochResponse {
        let invitation = self.end.lock().unwrap().invite(0).unwrap();
        let GpuInvitation { incarnation, epoch, unique_id } = invitation;
        self.run(move |end| {
            let _joined = end.accept(&invitation, 0, &mut for_a_moment());
        });
        longshore_proto::types::NcclInvitation { incarnation, number: epoch, unique_id }.into()
    }

    fn answer(&self, query: v1::AttendRequest) -> v1::AttendResponse {
        let rows = query.items[0].queries.as_ref().unwrap().shape[0];
        let values: Vec<f32> = (0..rows * 2).flat_map(|_| [0.0, 1.0, 2.0, 3.0, 0.0, 0.0]).collect();
        let partial = Tensor::from_f32(&[rows, 2, 6], &values);
        let partials = vec![AttendPartial { item: 0, stripe: 0, partial }];
        let mut answer = AttendAnswer::Partials { query_id: query.query_id, partials, last: true }.into();
        if let Some(named) = query.nccl.filter(|_| query.items[0].view_id == LIES_VIEW) {
            self.lie(named, &mut answer);
        }
        answer
    }
}

async fn lying(net: &Arc<Net>, wrong: Wrong) -> Liar {
    let end = Arc::new(Mutex::new(net.gpu().lane(GpuEnd::Shard { incarnation: 9 })));
    let attends = Arc::new(LyingShard { end, wrong });
    Liar::offering(Lie::new(Vec::new(), Then::End), Offer { attends: Some(attends), ..Offer::default() })
        .await
}

/// One that has an epoch, or none, and one that is asked beside it.
async fn streams(liar: &Liar, connector: &GrpcConnector) -> (Attending, AttendLink) {
    let shard = connector.shard(&liar.address).unwrap();
    let beside = AttendLink::new(Arc::clone(&shard), &TaskTracker::new(), 8);
    ask(&beside, query(HONEST_VIEW, 4)).await.unwrap();
    let alone: Arc<dyn Shard> = connector.nccl_shard(&liar.address).unwrap();
    (Attending::new(&*alone, CallContext::new("lies")).await, beside)
}

/// What makes no sense ends its stream, and no other; its epoch is free.
#[tokio::test(flavor = "multi_thread")]
async fn answers_that_make_no_sense_end_their_stream() {
    for (wrong, said) in [
        (Wrong::Number, "nccl.number"),
        (Wrong::TooManyBytes, "nccl.bytes"),
        (Wrong::NoBytes, "nccl.bytes"),
        (Wrong::DataBeside, "partials[0].partial.data"),
        (Wrong::BodyTooLong, "nccl.bytes"),
        (Wrong::BodyTooShort, "partials[0].partial.shape"),
    ] {
        let net = Arc::new(Net::default());
        let (liar, connector) = (lying(&net, wrong).await, GrpcConnector::new(over_nccl(&net)));
        let (mut attending, beside) = streams(&liar, &connector).await;
        assert_eq!(net.alive(), 1);
        attending.ask(1, LIES_VIEW).await;
        let error = attending.answers.next().await.unwrap().unwrap_err();
        assert_eq!(error.code, Code::DataLoss, "{wrong:?}: {error}");
        assert!(error.message.contains(&format!("`{said}`")), "{wrong:?}: {error}");
        assert!(attending.answers.next().await.is_none());
        until_gone(&net).await;
        ask(&beside, query(HONEST_VIEW, 4)).await.unwrap();
    }
}

/// A body where the query named no epoch.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_of_no_epoch_ends_its_stream() {
    #[derive(Debug)]
    struct Names(LyingShard);
    impl Attends for Names {
        fn invite(&self) -> v1::JoinNcclEpochResponse {
            self.0.invite()
        }
        fn answer(&self, query: v1::AttendRequest) -> v1::AttendResponse {
            assert!(query.nccl.is_none(), "the stream has no epoch");
            let is_lie = query.items[0].view_id == LIES_VIEW;
            let nccl = is_lie.then_some(v1::NcclBytes { number: 0, bytes: BYTES });
            v1::AttendResponse { nccl, ..self.0.answer(query) }
        }
    }
    let net = Arc::new(Net::default());
    let end = Arc::new(Mutex::new(net.gpu().lane(GpuEnd::Shard { incarnation: 9 })));
    let attends = Arc::new(Names(LyingShard { end, wrong: Wrong::Number }));
    let offer = Offer { attends: Some(attends), ..Offer::default() };
    let liar = Liar::offering(Lie::new(Vec::new(), Then::End), offer).await;
    let shard = GrpcConnector::new(over_nccl(&net)).shard(&liar.address).unwrap();
    let beside = AttendLink::new(Arc::clone(&shard), &TaskTracker::new(), 8);
    let mut attending = Attending::new(&*shard, CallContext::new("lies")).await;
    attending.ask(1, LIES_VIEW).await;
    let error = attending.answers.next().await.unwrap().unwrap_err();
    assert_eq!(error.code, Code::DataLoss, "{error}");
    ask(&beside, query(HONEST_VIEW, 4)).await.unwrap();
    assert_eq!(net.alive(), 0);
}

/// A message that names a body in an epoch that it says is over: the epoch is left, and the query asked again.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_beside_the_end_of_its_epoch_is_asked_for_again() {
    let net = Arc::new(Net::default());
    let (liar, connector) = (lying(&net, Wrong::OverBeside).await, GrpcConnector::new(over_nccl(&net)));
    let (mut attending, beside) = streams(&liar, &connector).await;
    attending.ask(1, LIES_VIEW).await;
    let AttendAnswer::Partials { query_id: 1, partials, last: true } = attending.next().await else {
        panic!("it failed")
    };
    assert_eq!((partials.len(), partials[0].partial.data.len()), (1, BYTES as usize));
    until_gone(&net).await;
    ask(&beside, query(HONEST_VIEW, 4)).await.unwrap();
}

/// A shard that invites and then always says that the epoch is over: a restart may explain the first time, no more.
#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_invites_and_refuses_for_ever_is_left_alone() {
    let net = Arc::new(Net::default());
    let (liar, connector) = (lying(&net, Wrong::AlwaysOver).await, GrpcConnector::new(over_nccl(&net)));
    let (mut attending, beside) = streams(&liar, &connector).await;
    let rest = || connector.nccl_attend_rest(&liar.address).unwrap();
    for query_id in 1..3_000 {
        attending.ask(query_id, LIES_VIEW).await;
        assert!(matches!(attending.next().await, AttendAnswer::Partials { last: true, .. }));
        if rest() > Duration::ZERO {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!((rest(), liar.offers.load(Ordering::SeqCst)), (Duration::from_secs(5), 2));
    until_gone(&net).await;
    ask(&beside, query(HONEST_VIEW, 4)).await.unwrap();
}
