//! The order of readers by itself, and how copies share what is read of them.

use longshore_blocks::{ShardEntry, ShardId, ShardMap, quorum::CopyRule};
use longshore_cluster::Labels;
use longshore_fabric::{Connector, LocalConnector};
use tokio_util::task::TaskTracker;

use super::*;

fn standing(avoided: bool, distance: Distance, load: u32) -> Standing {
    Standing { avoided, distance, load }
}

/// From the one that is asked first on.
fn best_first() -> Vec<Standing> {
    let mut all = Vec::new();
    for avoided in [false, true] {
        for distance in [Distance::Here, Distance::Host, Distance::Zone, Distance::Far] {
            all.extend([0, 1, 7].map(|load| standing(avoided, distance, load)));
        }
    }
    all
}

#[test]
fn failures_count_before_distance_and_distance_before_load() {
    let best = best_first();
    let ordered: Vec<usize> = (0..best.len()).collect();
    for turn in 0..best.len() {
        // Every rotation, and each of them backwards.
        let mut ranked = ordered.clone();
        ranked.rotate_left(turn);
        assert_eq!(in_order(ranked.clone(), |shard| best[shard]), ordered);
        ranked.reverse();
        assert_eq!(in_order(ranked, |shard| best[shard]), ordered);
    }
}

#[test]
fn equals_stay_in_the_order_of_their_stripe() {
    let same = |_| standing(false, Distance::Far, 3);
    for ranked in [vec![4, 1, 3], vec![1, 3, 4], vec![3, 4, 1]] {
        assert_eq!(in_order(ranked.clone(), same), ranked);
    }
    let one_is_near = |shard| standing(false, if shard == 3 { Distance::Zone } else { Distance::Far }, 0);
    assert_eq!(in_order(vec![4, 1, 3, 2], one_is_near), [3, 4, 1, 2]);
}

#[test]
fn loads_are_compared_by_doublings() {
    let classes = [0, 1, LOAD_STEP - 1, LOAD_STEP, 2 * LOAD_STEP - 1, 2 * LOAD_STEP, 4 * LOAD_STEP, u64::MAX];
    assert_eq!(classes.map(Load::class), [0, 0, 0, 1, 1, 2, 3, 40]);
}

#[test]
fn what_came_or_was_given_up_is_under_way_no_more() {
    let load = Arc::new(Load::default());
    let bytes = || load.bytes.load(Ordering::Relaxed);
    let mut first = load.begin(100);
    let second = load.begin(10);
    first.came(30);
    assert_eq!(bytes(), 80);
    first.came(1_000);
    assert_eq!(bytes(), 10, "more than was asked for counts for what was");
    drop(first);
    drop(second);
    assert_eq!(bytes(), 0);
}

fn site(host: &str, zone: &str, address: &str) -> Site {
    let text = format!("kvstore=a@{address}");
    let member = Member::parse(&text).expect("the member is valid");
    Site::of(&Member { labels: Labels { host: host.to_owned(), zone: zone.to_owned() }, ..member })
}

#[test]
fn labels_tell_how_far_a_shard_is_and_addresses_where_there_are_none() {
    let (here, there) = ("http://10.0.0.1:9000", "http://10.0.0.2:9000");
    let own = site("a", "z", here);
    let unlabelled = site("", "", here);
    for (other, from_own, from_unlabelled) in [
        (site("a", "z", there), Distance::Host, Distance::Far),
        (site("b", "z", there), Distance::Zone, Distance::Far),
        (site("b", "y", there), Distance::Far, Distance::Far),
        (site("", "z", there), Distance::Zone, Distance::Far),
        (site("", "", there), Distance::Far, Distance::Far),
        (site("", "", "http://10.0.0.1:1"), Distance::Host, Distance::Host),
        // Addresses may be those of something in between; labels know better.
        (site("b", "", "http://10.0.0.1:1"), Distance::Far, Distance::Host),
        (site("", "", "local:a"), Distance::Far, Distance::Far),
    ] {
        assert_eq!(own.distance(&other), from_own, "{other:?}");
        assert_eq!(unlabelled.distance(&other), from_unlabelled, "{other:?}");
    }
    let nowhere = site("", "", "local:a");
    assert_eq!(nowhere.distance(&nowhere), Distance::Far, "two without an address");
}

/// Links to shards that nobody asks anything.
fn links(shards: usize, copies: usize) -> ShardLinks {
    let entries = (0..shards).map(|shard| ShardEntry::new(ShardId(format!("kv-{shard}")), 1)).collect();
    let map = ShardMap::new(1, entries).expect("the ids differ");
    let connector = LocalConnector::new();
    let clients = (0..shards).map(|shard| connector.shard(&format!("local:kv-{shard}")).expect("an address"));
    let links = ShardLinks::new(map, clients, &TaskTracker::new(), 4).expect("a client for each");
    links.with_copies(CopyRule::new(copies, copies).expect("the rule can be"))
}

fn seed(stripe: u64) -> [u8; 32] {
    let mut seed = [0; 32];
    seed[..8].copy_from_slice(&stripe.to_le_bytes());
    seed
}

#[tokio::test]
async fn without_load_a_stripe_is_read_where_it_comes_first() {
    let links = links(4, 2);
    let mut order = ReadOrder::new(&links);
    for stripe in 0..100 {
        let readers = order.readers(&seed(stripe)).expect("there are shards");
        assert_eq!(readers, links.candidates(&seed(stripe)).expect("there are shards"));
        assert_eq!(links.map().owners(&seed(stripe), 2), readers[..2]);
    }
}

/// Reads stripes of so many bytes until each of them was planned; bytes by shard.
fn planned(links: &ShardLinks, stripes: u64, bytes: u64) -> Vec<u64> {
    let (mut order, mut all) = (ReadOrder::new(links), vec![0; links.links().len()]);
    for stripe in 0..stripes {
        let first = order.readers(&seed(stripe)).expect("there are shards")[0];
        order.plan(first, bytes);
        all[first] += bytes;
    }
    all
}

#[tokio::test]
async fn copies_share_what_is_read_of_them() {
    let links = links(2, 2);
    // One is to send much already: what follows goes to the other one, until both have as much in hand.
    let busy = links.links()[0].load.begin(64 * LOAD_STEP);
    let few = planned(&links, 16, LOAD_STEP);
    assert_eq!(few[0], 0, "{few:?}");
    let many = planned(&links, 192, LOAD_STEP);
    let (both, sum) = ([64 * LOAD_STEP + many[0], many[1]], 256 * LOAD_STEP);
    assert!(many[0] > 0 && both.iter().all(|bytes| *bytes > sum / 4), "{both:?}");
    drop(busy);
    let calm = planned(&links, 192, LOAD_STEP);
    assert!(calm.iter().all(|bytes| *bytes > 192 * LOAD_STEP / 4), "{calm:?}");
    // Short reads next to an idle shard stay where they are, whoever reads them how often.
    let (first, again) = (planned(&links, 1, 1_000), planned(&links, 1, 1_000));
    assert_eq!(first, again);
}

#[tokio::test(start_paused = true)]
async fn a_shard_that_failed_is_asked_last_however_little_it_has_to_do() {
    let links = links(3, 2);
    let _busy = [1, 2].map(|shard: usize| links.links()[shard].load.begin(100 * LOAD_STEP));
    links.links()[0].health.failed(Instant::now());
    for stripe in 0..50 {
        let readers = ReadOrder::new(&links).readers(&seed(stripe)).expect("there are shards");
        assert_eq!(readers.iter().position(|shard| *shard == 0), Some(2), "{readers:?}");
    }
}
