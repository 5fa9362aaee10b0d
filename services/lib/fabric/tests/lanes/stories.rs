//! What lanes have in common on which a call leases something for its tiles.

use futures::StreamExt;
use longshore_blocks::BlockKey;
use longshore_fabric::{CallContext, Lane as Seen, Shard};
use longshore_proto::types::*;
use tokio::sync::mpsc;

use super::{
    fake::{ENDED, STUCK, ended, identity, shape, tile},
    house::{House, LONG},
    tiles::{block, get, put},
};

const BYTES: usize = 100_000;

fn seen(house: &House) -> Seen {
    house.shard.seen.lock().unwrap().as_ref().unwrap().lane
}

/// A shard that ends calls, or refuses them, for reasons of its own: callers are told these, and the lane stays.
pub(crate) async fn what_a_shard_says(house: &House, shard: &dyn Shard, lane: Seen) {
    for round in 1..=3 {
        let (sender, received) = mpsc::channel(1);
        let mut acks =
            shard.put_blocks(&CallContext::new("ended"), identity(), shape(), received).await.unwrap();
        // Many are under way when the shard ends the call, and what it leased with it.
        let feeding = async move {
            for number in 0..200 {
                let key = if number == 3 { ENDED } else { BlockKey([7; 16]) };
                if sender.send(tile(key, 0, 1 << 20)).await.is_err() {
                    break;
                }
            }
        };
        let ending = async move {
            loop {
                match acks.next().await.expect("an error before the end") {
                    Ok(_) => {}
                    Err(error) => return error,
                }
            }
        };
        assert_eq!(tokio::join!(ending, feeding).0, ended(), "round {round}");
        assert_eq!(seen(house), lane, "round {round}");
        house.shard.blocks.lock().unwrap().clear();
    }
    // The same for calls that do not begin, and those that go on for ever.
    *house.shard.refusal.lock().unwrap() = Some(ended());
    let (_sender, received) = mpsc::channel(1);
    let refused = shard.put_blocks(&CallContext::new("refused"), identity(), shape(), received).await;
    assert_eq!(refused.err(), Some(ended()));
    *house.shard.refusal.lock().unwrap() = None;
    assert_eq!(put(shard, block(1, BYTES)).await, [(1, PutOutcome::Stored)]);
    assert_eq!(seen(house), lane);
    let stuck = GetBlocks::whole(identity(), vec![STUCK]);
    let mut tiles = shard.get_blocks(&CallContext::new("stuck"), stuck).await.unwrap();
    assert_eq!(tiles.next().await.unwrap().unwrap(), None);
    drop(tiles);
    house.expect_gone().await;
}

/// Calls that are cancelled or dropped in the middle: nothing that they leased is left for another one to take, or held for ever.
pub(crate) async fn cancelled_calls(house: &House, lane: Seen, rounds: u32) {
    let shard = house.client();
    put(&*shard, block(1, BYTES)).await;
    let whole: Vec<_> = block(1, BYTES).into_iter().map(Some).collect();
    for round in 0..rounds {
        let context = CallContext::new("cancelled");
        let (sender, received) = mpsc::channel(1);
        let acks = shard.put_blocks(&context, identity(), shape(), received).await.unwrap();
        sender.send(block(2, BYTES).remove(0)).await.unwrap();
        let get_one = GetBlocks::whole(identity(), vec![BlockKey([1; 16])]);
        let mut tiles = shard.get_blocks(&context, get_one).await.unwrap();
        assert!(tiles.next().await.unwrap().unwrap().is_some());
        match round % 2 {
            0 => context.cancel.cancel(),
            _ => drop((acks, tiles)),
        }
        tokio::time::timeout(LONG, sender.closed()).await.expect("nobody reads any more");
        assert_eq!(get(&*shard, &[1]).await, whole, "round {round}");
        assert_eq!(seen(house), lane, "round {round}");
    }
    assert_eq!(put(&*shard, block(3, BYTES)).await, [(3, PutOutcome::Stored)]);
}
