use std::{cell::RefCell, pin::pin, task::Poll};

use futures::{
    FutureExt as _,
    future::{join_all, poll_immediate},
};
use longshore_blocks::{Deployment, EXACT_PREFILL};

use super::*;

fn tenant(salt: u8) -> Namespace {
    Deployment::from_bytes([1; 32]).namespace(EXACT_PREFILL, &[salt])
}

#[tokio::test]
async fn tenants_take_turns_whoever_asked_for_more() {
    let turns = Turns::new(1);
    let order = RefCell::new(Vec::new());
    let first = turns.turn(tenant(9)).await;
    let wait = async |who: (u8, u32)| {
        let _turn = turns.turn(tenant(who.0)).await;
        order.borrow_mut().push(who);
    };
    let asked = [(1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 0), (2, 1), (3, 0)];
    let mut all = pin!(join_all(asked.map(wait)));
    assert!(poll_immediate(&mut all).await.is_none(), "all of them wait, in this order");
    drop(first);
    all.await;
    let expected = [(1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (1, 2), (1, 3), (1, 4)];
    assert_eq!(*order.borrow(), expected);
    assert_eq!(turns.lock().free, 1);
    assert!(turns.lock().queues.is_empty() && turns.lock().order.is_empty());
}

#[tokio::test]
async fn no_more_than_so_many_have_one_at_a_time() {
    let turns = Turns::new(3);
    let held: Vec<_> =
        [turns.turn(tenant(1)).await, turns.turn(tenant(1)).await, turns.turn(tenant(2)).await].into();
    let mut more = pin!(turns.turn(tenant(3)));
    assert!(poll_immediate(&mut more).await.is_none());
    drop(held);
    assert!(more.now_or_never().is_some());
    assert_eq!(turns.lock().free, 3);
}

#[tokio::test]
async fn whoever_leaves_the_queue_or_with_a_turn_unread_costs_nobody_a_turn() {
    let turns = Turns::new(1);
    let first = turns.turn(tenant(1)).await;
    let mut left = Box::pin(turns.turn(tenant(1)));
    let mut given = Box::pin(turns.turn(tenant(2)));
    let mut last = pin!(turns.turn(tenant(1)));
    for waiting in [left.as_mut(), given.as_mut()] {
        assert!(matches!(futures::poll!(waiting), Poll::Pending));
    }
    assert!(matches!(futures::poll!(last.as_mut()), Poll::Pending));
    drop(left);
    assert_eq!(turns.lock().queues[&tenant(1)].len(), 1, "who left is not in the queue");
    drop(first);
    // It was given a turn and never looked.
    assert_eq!(turns.lock().free, 0);
    drop(given);
    assert!(matches!(futures::poll!(last), Poll::Ready(_)));
    assert_eq!(turns.lock().free, 1);
}

#[tokio::test]
async fn many_that_left_neither_stay_nor_take_turns_of_their_tenant() {
    let turns = Turns::new(1);
    let first = turns.turn(tenant(1)).await;
    for _ in 0..100 {
        let mut left = Box::pin(turns.turn(tenant(1)));
        assert!(matches!(futures::poll!(left.as_mut()), Poll::Pending));
    }
    assert!(turns.lock().queues.is_empty() && turns.lock().order.is_empty());
    let (mut other, mut own) = (pin!(turns.turn(tenant(2))), pin!(turns.turn(tenant(1))));
    assert!(poll_immediate(&mut other).await.is_none() && poll_immediate(&mut own).await.is_none());
    drop(first);
    drop(other.await);
    drop(own.await);
    assert_eq!(turns.lock().free, 1);
}
