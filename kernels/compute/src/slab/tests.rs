use super::*;

/// Tests of one process share the slabs, so that each has sizes of its own.
fn count(len: usize) -> (usize, usize) {
    sizes().count(room(len))
}

#[test]
fn buffers_are_zero_aligned_and_apart() {
    for len in [0, 1, 63, 64, 65, 5000, 49_152, 3 << 20, 33 << 20] {
        let mut buffers: Vec<SlabBuffer> = (0..5).map(|_| SlabBuffer::zeroed(len)).collect();
        for (index, buffer) in buffers.iter_mut().enumerate() {
            assert_eq!((buffer.len(), buffer.as_ptr().addr() % ALIGNMENT), (len, 0));
            assert!(buffer.iter().all(|byte| *byte == 0), "buffer {index} of {len}");
            buffer.fill(index as u8 + 1);
        }
        for (index, buffer) in buffers.iter().enumerate() {
            assert!(buffer.iter().all(|byte| *byte == index as u8 + 1), "buffer {index} of {len}");
        }
    }
}

#[test]
fn a_place_that_was_used_is_zero_again() {
    let len = 7 * 64;
    let keeper = SlabBuffer::copied(&[9; 7 * 64]);
    for _ in 0..3 {
        let mut buffer = SlabBuffer::zeroed(len);
        assert!(buffer.iter().all(|byte| *byte == 0));
        buffer.fill(0xff);
    }
    assert_eq!((&keeper[..], count(len)), (&[9; 7 * 64][..], (1, 1)));
}

#[test]
fn copies_are_their_own() {
    let original = SlabBuffer::copied(&[1, 2, 3]);
    let mut copy = original.clone();
    copy[0] = 7;
    assert_eq!((&original[..], &copy[..]), (&[1, 2, 3][..], &[7, 2, 3][..]));
}

#[test]
fn slabs_grow_fill_up_and_go() {
    let len = 500 * 1024;
    let mut buffers: Vec<SlabBuffer> = (0..9).map(|_| SlabBuffer::zeroed(len)).collect();
    assert_eq!(count(len), (3, 9), "four fit in a huge page");
    // Freed places of older slabs are taken before those of younger ones.
    drop((buffers.swap_remove(0), buffers.swap_remove(4)));
    buffers.push(SlabBuffer::zeroed(len));
    assert_eq!(count(len), (3, 8));
    buffers.clear();
    let other = SlabBuffer::zeroed(600 * 1024);
    drop(other);
    assert_eq!(count(len), (0, 0), "an empty slab is kept until another becomes empty");
}

#[test]
fn threads_share_the_slabs() {
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            scope.spawn(move || {
                let mut kept = Vec::new();
                for round in 0..200 {
                    let mut buffer = SlabBuffer::zeroed(30_000);
                    assert!(buffer.iter().all(|byte| *byte == 0));
                    buffer.fill(thread + 1);
                    kept.push(buffer);
                    if round % 3 == 0 {
                        kept.swap_remove(round % kept.len());
                    }
                }
                assert!(kept.iter().all(|buffer| buffer.iter().all(|byte| *byte == thread + 1)));
            });
        }
    });
    assert_eq!(count(30_000).1, 0);
}
