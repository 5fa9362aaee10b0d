//! Copies to the host that are begun and taken later.

use std::sync::Arc;

use longshore_cuda::{Buffer, Kind};

use super::{StandIn, bytes, told};

/// More than the staging memory of departures.
const TOO_MUCH: usize = (128 << 20) + 1;

#[test]
fn what_departs_is_what_lay_there_when_it_was_begun_to() {
    let stand_in = StandIn::new();
    let device = stand_in.device();
    // In several pieces, small, and nothing.
    for count in [(9 << 20) + 5, 100, 0] {
        let content = bytes(count, count as u64);
        let buffer = Arc::new(Buffer::from_slice(&device, &content).unwrap());
        let departure = buffer.depart(0, buffer.bytes()).unwrap().unwrap();
        // What is queued later is not waited for.
        let later = Buffer::from_slice(&device, &bytes(1 << 20, 9)).unwrap();
        let mut found = vec![0_u8; count];
        departure.collect(&mut found).unwrap();
        assert!(found == content, "{count} bytes");
        drop((buffer, later));
    }
    let buffer = Arc::new(Buffer::from_slice(&device, &bytes(TOO_MUCH, 1)).unwrap());
    let half = TOO_MUCH / 2 + (4 << 20);
    assert!(buffer.depart(0, buffer.bytes()).unwrap().is_none(), "there is no room for all of it");
    let first = buffer.depart(0, half).unwrap().unwrap();
    assert!(buffer.depart(0, half).unwrap().is_none(), "nor for both");
    assert_eq!(device.refused_departures(), 2);
    // What nobody wants makes room again.
    drop(first);
    let again = buffer.depart(0, half).unwrap().unwrap();
    let mut found = vec![0_u8; half];
    again.collect(&mut found).unwrap();
    assert!(found == bytes(TOO_MUCH, 1)[..half]);
    drop((buffer, device));
    assert_eq!(stand_in.live(), 0, "everything is given back");
}

#[test]
fn departures_that_fail_say_so_and_leave_nothing_behind() {
    let stand_in = StandIn::new();
    for (call, collected) in [
        ("cuStreamCreate", false),
        ("cuEventRecord", false),
        ("cuStreamWaitEvent", false),
        ("cuMemcpyDtoHAsync_v2", false),
        ("cuEventSynchronize", true),
    ] {
        let device = stand_in.device();
        let content = bytes(5 << 20, 2);
        let buffer = Arc::new(Buffer::from_slice(&device, &content).unwrap());
        device.synchronize().unwrap();
        let mut found = vec![0_u8; content.len()];
        if collected {
            let departure = buffer.depart(0, buffer.bytes()).unwrap().unwrap();
            stand_in.fail(call, 1);
            assert!(told(departure.collect(&mut found), Kind::Device).contains(call));
        } else {
            stand_in.fail(call, 1);
            told(buffer.depart(0, buffer.bytes()), Kind::Device);
        }
        // The next one is as good as the first.
        buffer.depart(0, buffer.bytes()).unwrap().unwrap().collect(&mut found).unwrap();
        assert!(found == content, "{call}");
        // One that is under way when the device goes, and its memory with it.
        let kept = buffer.depart(0, buffer.bytes()).unwrap().unwrap();
        drop((buffer, device, kept));
        assert_eq!(stand_in.live(), 0, "{call}: everything is given back");
    }
    // Without pinned memory there is no room.
    let device = stand_in.device();
    let buffer = Arc::new(Buffer::from_slice(&device, &[1_u8]).unwrap());
    stand_in.fail("cuMemHostAlloc", 2);
    assert!(buffer.depart(0, buffer.bytes()).unwrap().is_none());
    assert!(buffer.depart(0, buffer.bytes()).unwrap().is_some());
}
