use super::*;
use crate::KvDtype;

fn shape() -> TileShape {
    TileShape { block_tokens: 16, kv_heads: 1, head_dim: 16, dtype: KvDtype::F32 }
}

fn body(seed: u8) -> Vec<u8> {
    vec![seed; shape().bytes()]
}

#[test]
fn tiles_have_their_own_memory_and_slots_are_used_again() {
    let slabs = TileSlabs::new(shape(), 0);
    let per_slab = slabs.shared.slots as usize;
    let make = |count: usize| -> Vec<Tile> {
        (0..count).map(|at| slabs.tile(shape(), &body(at as u8)).unwrap()).collect()
    };
    let tiles = make(per_slab + 3);
    for (at, tile) in tiles.iter().enumerate() {
        assert_eq!(tile.as_bytes(), body(at as u8), "tile {at}");
        assert!(tile.as_bytes().as_ptr().addr().is_multiple_of(64));
    }
    assert_eq!(slabs.stats().mapped_bytes, 2 * (per_slab * shape().bytes()) as u64);
    assert_eq!(slabs.stats().used_bytes, ((per_slab + 3) * shape().bytes()) as u64);
    let copy = tiles[5].clone();
    drop(tiles);
    assert_eq!(copy.as_bytes(), body(5));
    assert_eq!(slabs.stats().used_bytes, 0, "a copy has memory of its own");
    let again = make(per_slab);
    assert_eq!(
        slabs.stats().mapped_bytes,
        (per_slab * shape().bytes()) as u64,
        "mapped memory is used first"
    );
    assert!(again.iter().enumerate().all(|(at, tile)| tile.as_bytes() == body(at as u8)));
}

#[test]
fn all_but_one_empty_slab_goes_back() {
    let slabs = TileSlabs::new(shape(), 0);
    let slab_bytes = u64::from(slabs.shared.slots) * shape().bytes() as u64;
    let tiles: Vec<_> = (0..4 * slabs.shared.slots).map(|_| slabs.tile(shape(), &body(1)).unwrap()).collect();
    assert_eq!(slabs.stats(), SlabStats { mapped_bytes: 4 * slab_bytes, used_bytes: 4 * slab_bytes });
    drop(tiles);
    assert_eq!(slabs.stats(), SlabStats { mapped_bytes: slab_bytes, used_bytes: 0 });
}

#[test]
fn tiles_outlive_their_slabs_owner() {
    let slabs = TileSlabs::new(shape(), 0);
    let tile = slabs.tile(shape(), &body(9)).unwrap();
    drop(slabs);
    assert_eq!(tile.as_bytes(), body(9));
}

#[test]
fn a_body_that_cannot_be_filled_leaves_no_slot_behind() {
    let slabs = TileSlabs::new(shape(), 0);
    assert_eq!(slabs.fill(shape(), |_| Err::<(), _>("no")).unwrap_err(), "no");
    assert_eq!(slabs.stats().used_bytes, 0);
    let short = slabs.tile(shape(), &[1, 2]).unwrap_err().to_string();
    assert!(short.contains("`body`"), "{short}");
    let other = TileShape { block_tokens: 32, ..shape() };
    assert_eq!(slabs.tile(other, &vec![3; other.bytes()]).unwrap().as_bytes(), vec![3; other.bytes()]);
    assert_eq!(slabs.stats().used_bytes, 0, "another shape has memory of its own");
}

#[test]
fn threads_never_share_a_slot() {
    let slabs = TileSlabs::new(shape(), 0);
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            let slabs = &slabs;
            scope.spawn(move || {
                let mut held = std::collections::VecDeque::new();
                for round in 0..2_000usize {
                    let seed = thread * 64 + (round % 64) as u8;
                    held.push_back((seed, slabs.tile(shape(), &body(seed)).unwrap()));
                    if held.len() > 40 + round % 9 {
                        let (seed, tile) = held.pop_front().unwrap();
                        assert_eq!(tile.as_bytes(), body(seed));
                    }
                }
            });
        }
    });
    assert_eq!(slabs.stats().used_bytes, 0);
}
