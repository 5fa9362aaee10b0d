use longshore_blocks::{Deployment, EXACT_PREFILL};
use proptest::prelude::*;

use super::*;

fn tenant(salt: u8) -> Namespace {
    Deployment::from_bytes([1; 32]).namespace(EXACT_PREFILL, &[salt])
}

fn key(name: u8) -> BlockKey {
    BlockKey([name; 16])
}

fn shard(at: u8) -> ShardId {
    ShardId(format!("kv-{at}"))
}

/// A shard that tells as a real one does.
#[derive(Debug, Default)]
struct Teller {
    incarnation: u64,
    sequence: u64,
    held: Vec<u8>,
    log: Vec<(u64, BlockKey, bool)>,
}

impl Teller {
    fn change(&mut self, name: u8, held: bool) {
        self.sequence += 1;
        self.held.retain(|known| *known != name);
        if held {
            self.held.push(name);
        }
        self.log.push((self.sequence, key(name), held));
    }

    fn news(&self, reset: bool, events: Vec<(u64, BlockKey, bool)>) -> News {
        let digest = self.held.iter().fold(0, |digest, name| digest ^ word(&key(*name)));
        let (blocks, told) = (self.held.len() as u64, self.sequence);
        News { incarnation: self.incarnation, reset, events, told, blocks, digest }
    }

    fn all(&self) -> News {
        self.news(true, self.held.iter().map(|name| (0, key(*name), true)).collect())
    }

    fn since(&self, after: u64) -> News {
        self.news(false, self.log.iter().filter(|(number, ..)| *number > after).copied().collect())
    }
}

fn known(index: &InventoryIndex, teller: &Teller) {
    for name in 0..=u8::MAX {
        let held = teller.held.contains(&name);
        assert_eq!(index.may_hold(tenant(1), &shard(0), &key(name)), held, "{name}");
    }
}

#[test]
fn what_is_not_known_may_be_held() {
    let mut index = InventoryIndex::new(100);
    assert!(index.may_hold(tenant(1), &shard(0), &key(1)));
    let mut teller = Teller { incarnation: 3, ..Teller::default() };
    teller.change(1, true);
    teller.change(2, true);
    index.take(tenant(1), &shard(0), &teller.all()).unwrap();
    known(&index, &teller);
    assert!(index.knows(tenant(1)) && !index.knows(tenant(2)));
    assert!(index.may_hold(tenant(2), &shard(0), &key(9)), "another tenant");
    assert!(index.may_hold(tenant(1), &shard(1), &key(9)), "another shard");
    index.lost(tenant(1), &shard(0));
    assert!(index.may_hold(tenant(1), &shard(0), &key(9)) && !index.knows(tenant(1)), "nobody listens");
    assert_eq!(index.position(tenant(1), &shard(0)), Some((3, 2)));
    teller.change(1, false);
    index.take(tenant(1), &shard(0), &teller.since(2)).unwrap();
    known(&index, &teller);
    assert_eq!((index.blocks(), index.current()), (1, 1));
    index.forget(tenant(1), &shard(0));
    assert_eq!((index.blocks(), index.current(), index.position(tenant(1), &shard(0))), (0, 0, None));
}

#[test]
fn a_snapshot_in_several_messages_counts_when_it_is_whole() {
    let mut index = InventoryIndex::new(100);
    let mut teller = Teller { incarnation: 1, ..Teller::default() };
    (1..=5).for_each(|name| teller.change(name, true));
    let all = teller.all();
    let (head, tail) = all.events.split_at(3);
    index.take(tenant(1), &shard(0), &News { events: head.to_vec(), ..all.clone() }).unwrap();
    assert!(index.may_hold(tenant(1), &shard(0), &key(99)), "more may come");
    assert_eq!(index.position(tenant(1), &shard(0)), None, "what is half known cannot be resumed");
    index.take(tenant(1), &shard(0), &News { reset: false, events: tail.to_vec(), ..all }).unwrap();
    known(&index, &teller);
}

#[test]
fn whatever_does_not_follow_is_out_of_step_and_forgotten() {
    let mut teller = Teller { incarnation: 7, ..Teller::default() };
    (1..=3).for_each(|name| teller.change(name, true));
    let begun = || {
        let mut index = InventoryIndex::new(100);
        index.take(tenant(1), &shard(0), &teller.all()).unwrap();
        index
    };
    let quiet = teller.news(false, Vec::new());
    let event = |number, held| News { events: vec![(number, key(9), held)], told: 4, ..quiet.clone() };
    for (why, news) in [
        ("another start", News { incarnation: 8, ..quiet.clone() }),
        ("told less", News { told: 2, ..quiet.clone() }),
        ("an old event", event(3, true)),
        ("an event beyond what was told", event(5, true)),
        ("a held block in the middle", event(0, true)),
        ("another digest", News { digest: quiet.digest ^ 1, ..quiet.clone() }),
        ("another count", News { blocks: 4, ..quiet.clone() }),
    ] {
        let mut index = begun();
        assert_eq!(index.take(tenant(1), &shard(0), &news), Err(Untaken::OutOfStep), "{why}");
        assert_eq!((index.blocks(), index.position(tenant(1), &shard(0))), (0, None), "{why}");
        assert!(index.may_hold(tenant(1), &shard(0), &key(99)), "{why}: nothing is known now");
    }
    // A missed event is noticed by the next message without any.
    let mut index = begun();
    teller.change(4, true);
    teller.change(5, true);
    let missing = News { events: vec![(5, key(5), true)], ..teller.news(false, Vec::new()) };
    index.take(tenant(1), &shard(0), &missing).unwrap();
    assert_eq!(index.take(tenant(1), &shard(0), &teller.news(false, Vec::new())), Err(Untaken::OutOfStep));
}

#[test]
fn the_index_is_bounded_over_all_namespaces() {
    let mut index = InventoryIndex::new(6);
    let mut teller = Teller { incarnation: 1, ..Teller::default() };
    (1..=4).for_each(|name| teller.change(name, true));
    index.take(tenant(1), &shard(0), &teller.all()).unwrap();
    assert_eq!(index.take(tenant(2), &shard(0), &teller.all()), Err(Untaken::Full));
    assert_eq!((index.blocks(), index.current()), (4, 1), "the others stay");
    // Beginning anew does not count what is forgotten by it.
    index.take(tenant(1), &shard(0), &teller.all()).unwrap();
    index.forget(tenant(1), &shard(0));
    index.take(tenant(2), &shard(0), &teller.all()).unwrap();
    assert_eq!(index.blocks(), 4);
}

proptest! {
    /// Whatever happens to a shard and to the connection, the index that resumes knows what the shard holds, or knows that it does not.
    #[test]
    fn a_follower_that_resumes_knows_what_is_held(
        steps in prop::collection::vec((0u8..6, 0u8..12), 1..80),
    ) {
        let mut index = InventoryIndex::new(1_000);
        let mut teller = Teller { incarnation: 1, ..Teller::default() };
        for (what, name) in steps {
            match what {
                0..=2 => if !teller.held.contains(&name) { teller.change(name, true) },
                3 => if teller.held.contains(&name) { teller.change(name, false) },
                4 => index.lost(tenant(1), &shard(0)),
                _ => teller = Teller { incarnation: teller.incarnation + 1, held: vec![name], ..Teller::default() },
            }
            let news = match index.position(tenant(1), &shard(0)) {
                Some((incarnation, after)) if incarnation == teller.incarnation => teller.since(after),
                _ => teller.all(),
            };
            index.take(tenant(1), &shard(0), &news).unwrap();
            known(&index, &teller);
            prop_assert_eq!(index.blocks(), teller.held.len());
        }
    }
}
