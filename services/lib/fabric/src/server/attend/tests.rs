//! What a stream keeps of an epoch.

use std::time::Duration;

use longshore_proto::types::{AttendPartial, Tensor};
use tokio::time::Instant;

use super::*;
use crate::{
    TcpPatience,
    nccl::willing::{Willing, invited, invited_soon},
};

/// A stream whose epoch is over gives the end back at once, though it has nothing to say: others get it.
#[tokio::test]
async fn an_idle_stream_keeps_no_end_whose_epoch_is_over() {
    let convener = Arc::new(Convener::new(Arc::new(Willing), 1, TcpPatience::default()).unwrap());
    let lease = invited(&convener, 1, Instant::now()).await.unwrap();
    let named = Arc::<Named>::default();
    named.note(1, Some(lease));
    let partial = Tensor::from_f32(&[4_000, 1, 6], &[1.0; 24_000]);
    let partials = vec![AttendPartial { item: 0, stripe: 0, partial }];
    let answer = AttendAnswer::Partials { query_id: 1, partials, last: true };
    let traffic = TileTraffic::default();
    let of = (Some(Arc::clone(&convener)), traffic.clone());
    let exchange = Exchange { convener: of.0, traffic: of.1, named, held: None, over: None };
    let answers = stream::iter([Ok(answer)]).chain(stream::pending());
    let mut sending = Sending { answers: Box::pin(answers), lender: None, exchange };
    assert!(sending.next().await.unwrap().unwrap().nccl.is_some(), "it is exchanged");
    sending.exchange.all_sent().await;
    assert!(convener.end(v1::EndNcclEpochRequest { epoch: Some(lease.epoch.into()) }).unwrap());
    let later = Instant::now() + Duration::from_secs(3_600);
    tokio::select! {
        _ = sending.next() => panic!("there are no more answers"),
        other = invited_soon(&convener, 2, later) => assert_eq!(other.epoch.member, [2; 16]),
    }
    let counted = (traffic.exchanged_partials_bytes_total(), traffic.attend_epochs_lost_total());
    assert_eq!(counted, (96_000, 0), "the body went before");
}
