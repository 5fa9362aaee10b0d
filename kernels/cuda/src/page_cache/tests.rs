//! What is found, what makes way, and what a cache does where the device has less than its budget.
#![expect(unsafe_code, reason = "a device that gives out numbers; see SAFETY")]

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::PageCache;
use crate::{Device, Error, Kind, Launch, Memory, Span};

/// Addresses without memory behind them: the cache moves no bytes itself.
#[derive(Debug)]
struct Addresses {
    left: AtomicUsize,
    next: AtomicUsize,
}

impl Addresses {
    fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self { left: AtomicUsize::new(bytes), next: AtomicUsize::new(256) })
    }
}

impl Device for Addresses {
    fn name(&self) -> String {
        "addresses".to_owned()
    }

    fn multiprocessors(&self) -> usize {
        1
    }

    fn capability(&self) -> u32 {
        80
    }

    fn shared_bytes_limit(&self) -> usize {
        0
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, Error> {
        let taken =
            self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes));
        match taken {
            // SAFETY: a number that is given out once; nothing lies there.
            Ok(_) => Ok(unsafe { Memory::new(self.next.fetch_add(bytes, Ordering::Relaxed) as u64, bytes) }),
            Err(left) => Err(Error::OutOfMemory { bytes, problem: format!("{left} are left") }),
        }
    }

    fn free(&self, memory: Memory) {
        self.left.fetch_add(memory.bytes(), Ordering::Relaxed);
    }

    fn upload(&self, _: Span<'_>, _: &[u8]) -> Result<(), Error> {
        unreachable!("the cache leaves that to who fills pages")
    }

    fn download(&self, _: Span<'_>, _: &mut [u8]) -> Result<(), Error> {
        unreachable!("the cache reads nothing")
    }

    fn launch(&self, _: &Launch<'_>) -> Result<(), Error> {
        unreachable!("the cache launches nothing")
    }

    fn synchronize(&self) -> Result<(), Error> {
        Ok(())
    }
}

const PAGE: usize = 1 << 20;

fn cache(device_pages: usize, budget_pages: usize) -> (Arc<Addresses>, PageCache) {
    let device = Addresses::new(device_pages * PAGE);
    let cache = PageCache::new(Arc::clone(&device) as Arc<dyn Device>, PAGE, budget_pages * PAGE).unwrap();
    (device, cache)
}

#[test]
fn what_is_here_is_not_brought_again_and_what_is_oldest_makes_way() {
    let (device, cache) = cache(100, 3);
    let brought = |versions: &[u64]| {
        let mut brought = Vec::new();
        let pinned = cache.pin(versions, |index, _| {
            brought.push(versions[index]);
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
    assert_eq!(stats.reserved_bytes, 3 * PAGE);
    drop(cache);
    assert_eq!(device.left.load(Ordering::Relaxed), 100 * PAGE, "everything is given back");
}

#[test]
fn pinned_pages_stay_and_a_call_gets_what_is_left() {
    let (_, cache) = cache(100, 4);
    let first = cache.pin(&[1, 2, 3], |_, _| Ok(())).unwrap();
    let held: HashSet<u64> = first.addresses().iter().copied().collect();
    let second = cache.pin(&[4, 5, 6], |_, page| {
        assert!(!held.contains(&page.address()), "a pinned page was given away");
        Ok(())
    });
    let second = second.unwrap();
    assert_eq!((second.len(), cache.stats().shortages), (1, 1));
    let error = cache.pin(&[7], |_, _| Ok(())).unwrap_err();
    assert_eq!((error.kind(), error.retryable()), (Kind::Exhausted, true));
    drop(first);
    assert_eq!(cache.pin(&[7, 8, 9], |_, _| Ok(())).unwrap().len(), 3);
}

#[test]
fn a_device_with_less_than_the_budget_gives_what_it_has() {
    // 100 pages of the budget's 200 fit: slabs of 64, 32 and 4.
    let (_, small) = cache(100, 200);
    let versions: Vec<u64> = (0..200).collect();
    let pinned = small.pin(&versions, |_, _| Ok(())).unwrap();
    assert_eq!((pinned.len(), small.stats().reserved_bytes), (100, 100 * PAGE));
    drop(pinned);
    assert_eq!(small.pin(&[500], |_, _| Ok(())).unwrap().len(), 1);

    let (_, none) = cache(0, 200);
    assert_eq!(none.pin(&[1], |_, _| Ok(())).unwrap_err().kind(), Kind::Exhausted);
    assert!(none.pin(&[], |_, _| Ok(())).unwrap().is_empty());
    let nothing = PageCache::new(Addresses::new(9), PAGE, PAGE - 1).unwrap_err();
    assert_eq!(nothing.kind(), Kind::InvalidInput);
}

#[test]
fn a_page_that_could_not_be_filled_is_not_found() {
    let (_, cache) = cache(10, 2);
    let fault = || Error::Device { call: "upload", problem: "of this test".to_owned() };
    let failed = cache.pin(&[1, 2], |index, _| if index == 1 { Err(fault()) } else { Ok(()) });
    assert_eq!(failed.unwrap_err().kind(), Kind::Device);
    let mut brought = Vec::new();
    let both = cache.pin(&[1, 2], |index, _| {
        brought.push(index);
        Ok(())
    });
    assert_eq!(both.unwrap().len(), 2, "the first is not pinned any more, the second has its page back");
    assert_eq!(brought, [1]);
}

#[test]
fn threads_always_read_what_they_asked_for() {
    println!("seed 5");
    let (_, cache) = cache(40, 24);
    let content: Mutex<HashMap<u64, u64>> = Mutex::default();
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (cache, content) = (&cache, &content);
            scope.spawn(move || {
                let mut rng = ChaCha8Rng::seed_from_u64(5 + seed);
                for _ in 0..500 {
                    let versions: Vec<u64> = (0..6).map(|_| rng.random_range(0..60)).collect();
                    let pinned = cache.pin(&versions, |index, page| {
                        content.lock().unwrap().insert(page.address(), versions[index]);
                        Ok(())
                    });
                    let pinned = pinned.unwrap();
                    let content = content.lock().unwrap();
                    for (address, version) in pinned.addresses().iter().zip(&versions) {
                        assert_eq!(content[address], *version);
                    }
                }
            });
        }
    });
    let stats = cache.stats();
    assert!(stats.pages <= 24 && stats.hits > 0 && stats.evictions > 0, "{stats:?}");
}
