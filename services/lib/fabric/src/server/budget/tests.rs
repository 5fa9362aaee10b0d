use super::*;

fn budget() -> Budget {
    let options = ServerOptions {
        stream_window_bytes: 1000,
        connection_window_bytes: 1500,
        frame_bytes_max: 10,
        tile_bytes_max: 5000,
        tenant_tile_bytes_max: 2000,
        peer_tile_bytes_max: 3000,
        tile_room_patience: Duration::from_millis(200),
        ..ServerOptions::default()
    };
    Budget::new(&options, TileTraffic::default())
}

fn tenant(byte: u8) -> Namespace {
    Namespace::from_bytes([byte; 32])
}

#[track_caller]
fn refused<T: std::fmt::Debug>(outcome: Result<T, Error>, who: &str) {
    let error = outcome.unwrap_err();
    assert_eq!((error.code, error.retry_after), (Code::ResourceExhausted, Some(RETRY_AFTER)));
    assert!(error.message.starts_with(who) && error.message.contains("hint:"), "{error}");
}

#[test]
fn readers_are_refused_by_peer_tenant_and_listener_and_everything_comes_back() {
    let budget = budget();
    let peers: [Arc<Peer>; 3] = Default::default();
    let read = |name, peer: usize| budget.reserve(tenant(name), &peers[peer], Travel::Out);
    let a = [read(1, 0).unwrap(), read(1, 0).unwrap()];
    refused(read(1, 1), "the tenant");
    let b = read(2, 0).unwrap();
    refused(read(3, 0), "the connection");
    let c = [read(3, 1).unwrap(), read(3, 1).unwrap()];
    refused(read(4, 2), "the listener");
    assert_eq!((budget.taken(), budget.traffic.budget_taken_bytes()), (5000, 5000));
    assert_eq!(budget.traffic.refused_total(), 3);
    drop((a, b, c));
    assert_eq!((budget.taken(), budget.traffic.budget_taken_bytes()), (0, 0));
    let again = read(1, 1).unwrap();
    assert_eq!(budget.tenants.lock().unwrap().len(), 1, "tenants without streams are forgotten");
    drop(again);
}

#[test]
fn what_a_connection_may_hold_unread_counts_once_for_its_window() {
    let budget = budget();
    let (one, other) = (Arc::<Peer>::default(), Arc::<Peer>::default());
    let write = |name, peer: &Arc<Peer>| budget.reserve(tenant(name), peer, Travel::InMessages);
    let mut streams = Vec::new();
    for (name, peer, taken) in [(1, &one, 1010), (1, &one, 1520), (1, &one, 1530), (2, &other, 2540)] {
        streams.push(write(name, peer).unwrap());
        assert_eq!(budget.taken(), taken);
    }
    // Whichever of them goes first.
    drop(streams.remove(0));
    assert_eq!(budget.taken(), 2530);
    let frames = budget.reserve(tenant(1), &one, Travel::InFrames).unwrap();
    assert_eq!(budget.taken(), 2530, "what comes over a tile connection waits with the kernel");
    drop((streams, frames));
    assert_eq!(budget.taken(), 0);
}

#[test]
fn silent_writers_of_one_tenant_on_many_connections_leave_room_for_others() {
    let budget = budget();
    let peers: Vec<Arc<Peer>> = (0..6).map(|_| Arc::default()).collect();
    let write = |name, peer: usize| budget.reserve(tenant(name), &peers[peer], Travel::InMessages);
    let silent = write(1, 0).unwrap();
    (1..5).for_each(|peer| refused(write(1, peer), "the tenant"));
    let others = [write(2, 1).unwrap(), write(3, 2).unwrap()];
    let reader = budget.reserve(tenant(4), &peers[3], Travel::Out).unwrap();
    assert_eq!(budget.taken(), 3 * 1010 + 1000);
    drop(silent);
    let again = write(1, 5).unwrap();
    drop((again, others, reader));
    assert_eq!(budget.taken(), 0);
}

#[tokio::test]
async fn a_stream_waits_for_its_bytes() {
    let budget = budget();
    let stream = budget.reserve(tenant(1), &Arc::default(), Travel::InFrames).unwrap();
    let first = stream.room(600).await.unwrap();
    // It waits for itself for longer than anybody waits for others.
    let patience = Duration::from_millis(500);
    assert!(tokio::time::timeout(patience, stream.room(600)).await.is_err());
    let small = stream.room(400).await.unwrap();
    drop((first, small));
    let large = stream.room(1800).await.unwrap();
    assert_eq!(budget.taken(), 1800, "a tile that is larger than the window counts with all of it");
    drop(large);
    assert_eq!(budget.taken(), 0);
}

#[tokio::test(start_paused = true)]
async fn who_finds_no_room_waits_for_a_while_and_is_refused() {
    let budget = budget();
    let peers: Vec<Arc<Peer>> = (0..6).map(|_| Arc::default()).collect();
    let open = |name, peer: usize| budget.reserve(tenant(name), &peers[peer], Travel::InFrames).unwrap();
    let (a, b) = (open(1, 0), open(1, 1));
    let mut held = vec![a.room(1000).await.unwrap(), b.room(1000).await.unwrap()];
    refused(open(1, 2).room(1).await, "the tenant");
    // A tenant whose streams ended has no new share while his tiles are under way.
    drop((a, b));
    refused(open(1, 2).room(1).await, "the tenant");
    for name in [2, 3, 4] {
        held.push(open(name, 3).room(1000).await.unwrap());
    }
    refused(open(5, 3).room(1).await, "the connection");
    refused(open(5, 4).room(1).await, "the listener");
    // Room that comes back in time is enough.
    let late = open(5, 5);
    let (given, ()) = tokio::join!(late.room(700), async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        held.pop();
    });
    drop(given.unwrap());
    held.clear();
    assert_eq!(budget.taken(), 0);
}

/// Bytes that a tenant is charged with.
fn charged(budget: &Budget, name: u8) -> usize {
    let share = budget.share_of(tenant(name));
    share.limit - share.free.available_permits()
}

#[test]
fn a_tenant_that_closes_the_first_of_its_streams_pays_for_those_that_are_left() {
    let budget = Budget::new(&ServerOptions::default(), TileTraffic::default());
    let peers: Vec<Arc<Peer>> = (0..1024).map(|_| Arc::default()).collect();
    let mut kept = Vec::new();
    'peers: for peer in &peers {
        let mut streams = Vec::new();
        for _ in 0..3 {
            match budget.reserve(tenant(1), peer, Travel::InMessages) {
                Ok(stream) => streams.push(stream),
                Err(error) => {
                    refused::<()>(Err(error), "the tenant");
                    break 'peers;
                }
            }
        }
        kept.extend(streams.pop());
    }
    assert!(kept.len() < peers.len());
    assert_eq!(charged(&budget, 1), budget.taken(), "there is no other tenant");
    let other = Arc::default();
    budget.reserve(tenant(2), &other, Travel::Out).unwrap();
    budget.reserve(tenant(2), &other, Travel::InMessages).unwrap();
}

#[test]
fn two_tenants_on_a_connection_are_charged_with_what_they_would_have_alone() {
    let budget = budget();
    let peer = Arc::<Peer>::default();
    let write = |name| budget.reserve(tenant(name), &peer, Travel::InMessages).unwrap();
    let all = || (budget.taken(), charged(&budget, 1), charged(&budget, 2));
    let (a, b, c) = (write(1), write(2), write(1));
    assert_eq!(all(), (1530, 1520, 1010));
    drop(a);
    assert_eq!(all(), (1520, 1010, 1010));
    drop(c);
    assert_eq!(all(), (1010, 0, 1010));
    drop(b);
    assert_eq!(all(), (0, 0, 0));
    assert!(peer.writers.lock().unwrap().is_empty());
}
