//! Who gets an end of the shard's.

use super::*;
use crate::nccl::{
    is_of_epoch,
    willing::{Willing, invited, invited_soon},
};

fn convener(members_max: usize) -> Arc<Convener> {
    Arc::new(Convener::new(Arc::new(Willing), members_max, TcpPatience::default()).unwrap())
}

#[tokio::test]
async fn attend_streams_have_half_of_all_ends() {
    let (convener, now) = (convener(2), Instant::now());
    let first = invited(&convener, 1, now).await.unwrap();
    let held = convener.lease_for_stream(first).await.unwrap();
    let second = invited(&convener, 2, now).await.unwrap();
    assert!(invited(&convener, 3, now).await.is_err(), "all ends are in use");
    let refused = convener.lease_for_stream(second).await.unwrap_err();
    assert!(is_of_epoch(&refused), "{refused}");
    // Its end is free for a call with tiles.
    let third = invited_soon(&convener, 3, now).await;
    convener.lease(third).await.unwrap();
    // The place of a stream is free again when its epoch is given back.
    drop(held);
    let again = invited(&convener, 1, now).await.unwrap();
    convener.lease_for_stream(again).await.unwrap();
}

/// A call that keeps an epoch which is over keeps no place among the members, but nobody takes one whose epoch is in use.
#[tokio::test]
async fn an_epoch_that_is_over_counts_as_free_though_a_call_has_it() {
    let (convener, now) = (convener(2), Instant::now());
    let lease = invited(&convener, 1, now).await.unwrap();
    let _held = convener.lease(lease).await.unwrap();
    invited(&convener, 2, now + 2 * IDLE).await.unwrap();
    assert_eq!(convener.members().len(), 2);
    assert!(convener.end(v1::EndNcclEpochRequest { epoch: Some(lease.epoch.into()) }).unwrap());
    // Its thread goes with the call.
    assert!(invited(&convener, 3, now + 3 * IDLE).await.is_err());
    assert_eq!(convener.members().len(), 1);
}
