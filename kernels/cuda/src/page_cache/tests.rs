//! What is found, what makes way, and what a cache does where the device has less than its budget.

use std::collections::{HashMap, HashSet};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{FreshPage, PageCache};
use crate::{Device, Error, Kind, addresses::Addresses};

const PAGE: usize = 1 << 20;

fn cache(device_pages: usize, budget_pages: usize) -> (Arc<Addresses>, PageCache) {
    let device = Addresses::new(device_pages * PAGE);
    let cache = PageCache::new(Arc::clone(&device) as Arc<dyn Device>, PAGE, budget_pages * PAGE).unwrap();
    (device, cache)
}

fn nothing(_: &[FreshPage]) -> Result<(), Error> {
    Ok(())
}

fn fault() -> Error {
    Error::Device { call: "upload", problem: "of this test".to_owned() }
}

#[test]
fn what_is_here_is_not_brought_again_and_what_is_oldest_makes_way() {
    let (device, cache) = cache(100, 3);
    let brought = |versions: &[u64]| {
        let mut brought = Vec::new();
        let pinned = cache.pin(versions, |fresh| {
            brought.extend(fresh.iter().map(|page| versions[page.index()]));
            Ok(())
        });
        assert_eq!(pinned.unwrap().len(), versions.len());
        brought
    };
    assert_eq!(brought(&[1, 2, 1, 3]), [1, 2, 3]);
    assert_eq!(brought(&[2, 1]), [0; 0]);
    // 3 was unpinned before 2 and 1 were used again.
    assert_eq!(brought(&[4]), [4]);
    assert_eq!(brought(&[1, 2]), [0; 0]);
    assert_eq!(brought(&[3]), [3]);
    let stats = cache.stats();
    assert_eq!((stats.pages, stats.hits, stats.misses, stats.evictions), (3, 5, 5, 2));
    assert_eq!((stats.reserved_bytes, cache.try_stats()), (3 * PAGE, Some(stats)));
    drop(cache);
    assert_eq!(device.left(), 100 * PAGE, "everything is given back");
}

#[test]
fn pinned_pages_stay_and_a_call_gets_what_is_left() {
    let (_, cache) = cache(100, 4);
    let first = cache.pin(&[1, 2, 3], nothing).unwrap();
    let held: HashSet<u64> = first.addresses().iter().copied().collect();
    let second = cache.pin(&[4, 5, 6], |fresh| {
        assert!(!held.contains(&fresh[0].span().unwrap().address()), "a pinned page was given away");
        assert_eq!(fresh.len(), 1);
        Ok(())
    });
    let second = second.unwrap();
    assert_eq!((second.len(), cache.stats().shortages), (1, 1));
    assert!(cache.pin_beside(&[7], |_| unreachable!("no page is left")).unwrap().is_empty());
    // Who has nothing pinned waits until there is a page.
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| cache.pin(&[7], nothing).unwrap().len());
        drop(first);
        assert_eq!(waits.join().unwrap(), 1);
    });
    assert_eq!(cache.pin(&[7, 8, 9], nothing).unwrap().len(), 3);
}

#[test]
fn a_device_with_less_than_the_budget_gives_what_it_has() {
    // 100 pages of the budget's 200 fit: slabs of 64, 32 and 4.
    let (_, small) = cache(100, 200);
    let versions: Vec<u64> = (0..200).collect();
    let pinned = small.pin(&versions, nothing).unwrap();
    assert_eq!((pinned.len(), small.stats().reserved_bytes), (100, 100 * PAGE));
    drop(pinned);
    assert_eq!(small.pin(&[500], nothing).unwrap().len(), 1);

    let (_, none) = cache(0, 200);
    let error = none.pin(&[1], nothing).unwrap_err();
    assert!(error.kind() == Kind::Exhausted && error.retryable(), "{error}");
    assert!(none.pin(&[], nothing).unwrap().is_empty());
    let nothing = PageCache::new(Addresses::new(9), PAGE, PAGE - 1).unwrap_err();
    assert_eq!(nothing.kind(), Kind::InvalidInput);
}

#[test]
fn memory_that_the_device_needs_is_given_back_what_is_oldest_first() {
    // Slabs of 64, 32 and 4 pages.
    let (device, cache) = cache(100, 200);
    let (first, second, third): (Vec<u64>, Vec<u64>, Vec<u64>) =
        ((0..64).collect(), (64..96).collect(), (96..100).collect());
    for versions in [&second, &third, &first] {
        drop(cache.pin(versions, nothing).unwrap());
    }
    // The largest slab has the second and the third versions: it is the newest, and pinned.
    drop(cache.pin(&second[..1], nothing).unwrap());
    let pinned = cache.pin(&third[..1], nothing).unwrap();
    let before = cache.stats();
    assert_eq!(before.reserved_bytes, 100 * PAGE);
    let idle = cache.idle_bytes();
    let given = cache.give_back(1);
    let after = cache.stats();
    assert!(given > 0 && after.reserved_bytes == 100 * PAGE - given, "{after:?}");
    assert_eq!((device.left(), after.returned), (given, 1));
    assert!(after.pages < before.pages);
    // All but what is pinned.
    assert_eq!(cache.idle_bytes(), idle - given);
    let rest = cache.give_back(usize::MAX);
    assert_eq!(
        (cache.idle_bytes(), given + rest),
        (0, idle),
        "it tells what it could give, and gives no more"
    );
    let left = cache.stats().reserved_bytes;
    assert!(rest > 0 && left > 0 && left == 100 * PAGE - given - rest);
    assert_eq!(cache.give_back(usize::MAX), 0);
    drop(pinned);
    // What the pinned page's slab holds is found, the rest is brought again; no more memory is taken for a while.
    let all = cache.pin(&first, nothing).unwrap();
    assert!(!all.is_empty() && cache.stats().reserved_bytes == left);
    drop(all);
    assert_eq!(cache.give_back(usize::MAX), left);
    assert_eq!((device.left(), cache.stats().pages), (100 * PAGE, 0));
    // Without any page it takes memory at once.
    assert_eq!(cache.pin(&first, nothing).unwrap().len(), 64);
}

#[test]
fn pages_that_could_not_be_filled_are_not_found() {
    let (_, cache) = cache(10, 3);
    drop(cache.pin(&[1], nothing).unwrap());
    let failed = cache.pin(&[1, 2, 3], |fresh| {
        assert_eq!(fresh.len(), 2);
        Err(fault())
    });
    assert_eq!(failed.unwrap_err().kind(), Kind::Device);
    let mut brought = Vec::new();
    let all = cache.pin(&[1, 2, 4], |fresh| {
        brought.extend(fresh.iter().map(FreshPage::index));
        Ok(())
    });
    assert_eq!(all.unwrap().len(), 3, "nothing is pinned any more");
    assert_eq!(brought, [1, 2]);
    assert_eq!(cache.stats().evictions, 0, "the others have their pages back");
}

const PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn others_go_on_while_pages_are_filled() {
    let (_, cache) = cache(10, 4);
    let cache = &cache;
    drop(cache.pin(&[1], nothing).unwrap());
    let ((fills, is_filling), (go, may_go)) = (sync_channel(1), sync_channel(1));
    std::thread::scope(|scope| {
        let first = scope.spawn(move || {
            let pinned = cache.pin(&[2, 3], |_| {
                fills.send(()).unwrap();
                may_go.recv_timeout(PATIENCE).expect("others wait for these pages");
                Ok(())
            });
            pinned.unwrap().addresses().to_vec()
        });
        is_filling.recv_timeout(PATIENCE).unwrap();
        // What is there is found, what is new is brought, and what is on its way is waited for.
        assert_eq!(cache.pin(&[1, 4], nothing).unwrap().len(), 2);
        let hits = cache.stats().hits;
        let second = scope.spawn(move || {
            let pinned = cache.pin(&[1, 3], |_| unreachable!("another one brings it"));
            pinned.unwrap().addresses().to_vec()
        });
        while cache.stats().hits < hits + 2 {
            std::thread::yield_now();
        }
        go.send(()).unwrap();
        assert_eq!(first.join().unwrap()[1], second.join().unwrap()[1]);
    });
    assert_eq!((cache.stats().pages, cache.stats().misses), (4, 4));
}

#[test]
fn what_another_could_not_bring_is_brought_by_who_waits_for_it() {
    let (_, cache) = cache(10, 4);
    let cache = &cache;
    drop(cache.pin(&[1], nothing).unwrap());
    let (fills, is_filling) = sync_channel(1);
    std::thread::scope(|scope| {
        let fails = scope.spawn(move || {
            let failed = cache.pin(&[2, 3], |_| {
                fills.send(()).unwrap();
                // Both of the others have found its pages.
                while cache.stats().hits < 4 {
                    std::thread::yield_now();
                }
                Err(fault())
            });
            assert_eq!(failed.unwrap_err().kind(), Kind::Device);
        });
        is_filling.recv_timeout(PATIENCE).unwrap();
        let second = scope.spawn(move || {
            let mut brought = 0;
            let pinned = cache.pin(&[2, 3], |fresh| {
                brought += fresh.len();
                Ok(())
            });
            assert!(brought <= 2);
            pinned.unwrap().len()
        });
        // It has what came before what did not come.
        let third = cache.pin(&[1, 3], |_| unreachable!("the first is there")).unwrap();
        assert_eq!(third.len(), 1);
        fails.join().unwrap();
        assert_eq!(second.join().unwrap(), 2);
    });
    assert_eq!(cache.pin(&[1, 2, 3, 4], nothing).unwrap().len(), 4, "nothing is pinned any more");
}

#[test]
fn threads_always_read_what_they_asked_for() {
    println!("seed 5");
    let (_, cache) = cache(40, 9);
    let content: Mutex<HashMap<u64, u64>> = Mutex::default();
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (cache, content) = (&cache, &content);
            scope.spawn(move || {
                let mut rng = ChaCha8Rng::seed_from_u64(5 + seed);
                for _ in 0..500 {
                    let versions: Vec<u64> = (0..6).map(|_| rng.random_range(0..30)).collect();
                    let fails = rng.random_range(0..8) == 0;
                    let pinned = cache.pin(&versions, |fresh| {
                        std::thread::yield_now();
                        if fails {
                            return Err(fault());
                        }
                        for page in fresh {
                            let address = page.span().unwrap().address();
                            content.lock().unwrap().insert(address, versions[page.index()]);
                        }
                        Ok(())
                    });
                    let Ok(pinned) = pinned else { continue };
                    assert!(!pinned.is_empty());
                    std::thread::yield_now();
                    let content = content.lock().unwrap();
                    for (address, version) in pinned.addresses().iter().zip(&versions) {
                        assert_eq!(content[address], *version);
                    }
                }
            });
        }
    });
    let stats = cache.stats();
    assert!(stats.pages <= 9 && stats.hits > 0 && stats.evictions > 0, "{stats:?}");
    let all: Vec<u64> = (100..109).collect();
    assert_eq!(cache.pin(&all, nothing).unwrap().len(), 9, "nothing is pinned any more");
}

#[test]
fn a_page_is_taken_over_by_another_version_where_nobody_has_it() {
    let (device, cache) = cache(100, 3);
    let address = cache.pin(&[1], nothing).unwrap().addresses()[0];
    assert!(!cache.take_over(7, 8), "nobody knows it");
    let held = cache.pin(&[1], nothing).unwrap();
    assert!(!cache.take_over(1, 2), "somebody has it");
    drop(held);
    assert!(cache.take_over(1, 2));
    assert_eq!((cache.missing(&[1]), cache.missing(&[2])), (1, 0));
    let found = cache.pin(&[2], |_| unreachable!("it is there")).unwrap();
    assert_eq!(found.addresses(), [address]);
    drop(found);
    // It makes way like any other, under its new version.
    assert_eq!(cache.pin(&[3, 4, 5], nothing).unwrap().len(), 3);
    assert_eq!(cache.missing(&[2]), 1);
    drop(cache);
    assert_eq!(device.left(), 100 * PAGE);
}

#[test]
fn a_version_that_has_a_page_takes_over_no_other() {
    let (device, cache) = cache(100, 3);
    let addresses = cache.pin(&[1, 2], nothing).unwrap().addresses().to_vec();
    assert!(!cache.take_over(1, 2) && !cache.take_over(2, 1) && !cache.take_over(1, 1));
    let found = cache.pin(&[1, 2], |_| unreachable!("both are there")).unwrap();
    assert_eq!(found.addresses(), addresses);
    drop(found);
    // What could not be given back to its old version is discarded, and its page is free.
    cache.discard(&[2]);
    assert_eq!(cache.pin(&[1, 3, 4], nothing).unwrap().len(), 3);
    assert_eq!(cache.stats().evictions, 0);
    drop(cache);
    assert_eq!(device.left(), 100 * PAGE);
}

#[test]
fn pages_that_are_being_filled_are_not_taken_over() {
    let (_, cache) = cache(100, 3);
    let filled = cache.pin(&[1], |_| {
        assert!(!cache.take_over(1, 2));
        Ok(())
    });
    assert_eq!(filled.unwrap().len(), 1);
}

#[test]
fn discarded_versions_leave_their_pages_to_others() {
    let (_, cache) = cache(100, 2);
    drop(cache.pin(&[1, 2], nothing).unwrap());
    let held = cache.pin(&[2], nothing).unwrap();
    cache.discard(&[1, 2, 9]);
    assert_eq!((cache.missing(&[1]), cache.missing(&[2])), (1, 0), "what is pinned stays");
    assert_eq!(cache.pin_beside(&[3], nothing).unwrap().len(), 1);
    assert_eq!(cache.stats().evictions, 0);
    drop(held);
}
