//! Lanes of several members over communicators that are none: ranks of one process that meet, exchange nothing, time out, die.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::*;
use crate::Kind;

/// Where the ranks of an id are.
#[derive(Debug, Default)]
struct Meeting {
    ranks: u32,
    /// Ranks that arrived at each step; step 0 is joining.
    arrived: HashMap<u64, u32>,
    aborted: bool,
}

/// What the communicators of all members share.
#[derive(Debug, Default)]
struct Net {
    meetings: Mutex<HashMap<[u8; UniqueId::BYTES], Meeting>>,
    changed: Condvar,
    ids: Mutex<u8>,
}

impl Net {
    fn lock(&self) -> MutexGuard<'_, HashMap<[u8; UniqueId::BYTES], Meeting>> {
        self.meetings.lock().unwrap()
    }

    /// Arrives at a step and waits for all the others.
    fn meet(
        &self,
        id: &UniqueId,
        (step, ranks): (u64, u32),
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error> {
        let failed =
            |problem: &str| Err(Error::Communicator { call: "meeting", problem: problem.to_owned() });
        let mut meetings = self.lock();
        let meeting = meetings.entry(*id.as_bytes()).or_default();
        meeting.ranks = ranks;
        *meeting.arrived.entry(step).or_default() += 1;
        self.changed.notify_all();
        loop {
            let meeting = &meetings[id.as_bytes()];
            if meeting.aborted {
                return failed("a peer aborted");
            }
            if meeting.arrived[&step] == meeting.ranks {
                return Ok(());
            }
            // The fake looks again when something changed, and asks the caller as a real one does between two looks.
            meetings = self.changed.wait_timeout(meetings, Duration::from_millis(2)).unwrap().0;
            if !go_on() {
                drop(meetings);
                self.abort(id);
                return failed("there is no time left");
            }
        }
    }

    fn abort(&self, id: &UniqueId) {
        self.lock().entry(*id.as_bytes()).or_default().aborted = true;
        self.changed.notify_all();
    }
}

#[derive(Debug)]
struct FakeRanks {
    net: Arc<Net>,
    id: UniqueId,
    ranks: u32,
    step: u64,
}

impl Ranks for FakeRanks {
    unsafe fn exchange(
        &mut self,
        _: &[Part<'_>],
        _: &[Part<'_>],
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error> {
        self.step += 1;
        self.net.meet(&self.id, (self.step, self.ranks), go_on)
    }

    fn abort(&mut self) {
        self.net.abort(&self.id);
    }
}

#[derive(Debug)]
struct FakeConvener(Arc<Net>);

impl Convener for FakeConvener {
    fn unique_id(&self) -> Result<UniqueId, Error> {
        let mut ids = self.0.ids.lock().unwrap();
        *ids += 1;
        UniqueId::from_bytes(&[*ids; UniqueId::BYTES])
    }

    fn join(
        &self,
        id: &UniqueId,
        (_, ranks): (u32, u32),
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<Box<dyn Ranks>, Error> {
        self.0.meet(id, (0, ranks), go_on)?;
        Ok(Box::new(FakeRanks { net: Arc::clone(&self.0), id: *id, ranks, step: 0 }))
    }
}

fn names(count: usize) -> Vec<String> {
    (0..count).map(|index| format!("kv-{index}")).collect()
}

fn lanes(count: usize) -> Vec<NcclLane> {
    let net = Arc::new(Net::default());
    let lane = |name: String| {
        let convener: Arc<dyn Convener> = Arc::new(FakeConvener(Arc::clone(&net)));
        NcclLane::new(name, Ok(convener))
    };
    names(count).into_iter().map(lane).collect()
}

/// A deadline of so many looks.
fn looks(mut left: u32) -> impl FnMut() -> bool {
    move || {
        left = left.saturating_sub(1);
        left > 0
    }
}

/// Runs every lane on a thread of its own, as members do.
fn on_each<T: Send>(lanes: &mut [NcclLane], run: impl Fn(usize, &mut NcclLane) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> =
            lanes.iter_mut().enumerate().map(|(index, lane)| scope.spawn(move || run(index, lane))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn exchange(lane: &mut NcclLane, epoch: u64, now_ms: u64, patience: u32) -> Result<(), Error> {
    // SAFETY: no memory is named.
    unsafe { lane.exchange(epoch, (&[], &[]), now_ms, &mut looks(patience)) }
}

/// All join the next epoch that the first convenes.
fn joined(lanes: &mut [NcclLane], now_ms: u64) -> u64 {
    let invitation = lanes[0].invite(lanes.iter().map(|lane| lane.own.clone()).collect(), now_ms).unwrap();
    let epoch = invitation.epoch;
    for outcome in on_each(lanes, |_, lane| lane.accept(invitation.clone(), now_ms, &mut looks(10_000))) {
        outcome.unwrap();
    }
    epoch
}

#[test]
fn members_join_exchange_and_know_each_other() {
    let mut lanes = lanes(3);
    assert_eq!((lanes[1].state(), lanes[1].rank_of("kv-0")), (&LaneState::Idle, None));
    let epoch = joined(&mut lanes, 0);
    assert_eq!(epoch, 1);
    for outcome in on_each(&mut lanes, |_, lane| exchange(lane, 1, 0, 10_000)) {
        outcome.unwrap();
    }
    for lane in &lanes {
        assert_eq!(*lane.state(), LaneState::Joined { epoch });
        assert_eq!((lane.rank_of("kv-2"), lane.rank_of("kv-9")), (Some(2), None));
    }
    // The next epoch takes the place of the one before.
    assert_eq!(joined(&mut lanes, 0), 2);
    let old = exchange(&mut lanes[0], 1, 0, 10).unwrap_err();
    assert!(
        old.kind() == Kind::InvalidInput && old.to_string().contains("`epoch` is 1, 2 is joined"),
        "{old}"
    );
    assert_eq!(*lanes[0].state(), LaneState::Joined { epoch: 2 }, "what was refused broke nothing");
}

#[test]
fn a_dead_peer_ends_the_epoch_at_every_survivor_and_they_go_on_without_it() {
    let mut lanes = lanes(3);
    let epoch = joined(&mut lanes, 0);
    // kv-1 does not come. One of the others has less patience: its abort ends the wait of the last one, which has all the time of the world.
    let outcomes = on_each(&mut lanes, |index, lane| match index {
        0 => exchange(lane, epoch, 100, 5),
        1 => Ok(()),
        _ => exchange(lane, epoch, 100, u32::MAX),
    });
    for (index, outcome) in outcomes.into_iter().enumerate().filter(|(index, _)| *index != 1) {
        assert_eq!(outcome.unwrap_err().kind(), Kind::Communication);
        assert_eq!(*lanes[index].state(), LaneState::Broken { epoch, retry_at_ms: 5_100 });
        assert_eq!(lanes[index].rank_of("kv-1"), None, "bytes go another way");
    }
    // Until then there is no other.
    let survivors = vec!["kv-0".to_owned(), "kv-2".to_owned()];
    let early = lanes[0].invite(survivors.clone(), 5_099).unwrap_err();
    assert!(early.kind() == Kind::Communication && early.to_string().contains("1 ms more"), "{early}");
    let invitation = lanes[0].invite(survivors, 5_100).unwrap();
    let refused = lanes[1].accept(invitation.clone(), 9_000, &mut looks(9)).unwrap_err();
    assert!(refused.to_string().contains("lack `kv-1`"), "{refused}");
    lanes.remove(1);
    let outcomes = on_each(&mut lanes, |_, lane| {
        lane.accept(invitation.clone(), 5_100, &mut looks(10_000))?;
        exchange(lane, 2, 5_100, 10_000)
    });
    outcomes.into_iter().for_each(Result::unwrap);
    assert_eq!(lanes[1].rank_of("kv-2"), Some(1));
}

#[test]
fn news_of_a_fault_ends_the_epoch_and_old_news_does_not() {
    let mut lanes = lanes(2);
    let epoch = joined(&mut lanes, 0);
    lanes[0].broke(epoch - 1, 0);
    lanes[0].broke(epoch + 1, 0);
    assert_eq!(*lanes[0].state(), LaneState::Joined { epoch });
    lanes[0].broke(epoch, 7);
    assert_eq!(*lanes[0].state(), LaneState::Broken { epoch, retry_at_ms: 5_007 });
    let error = exchange(&mut lanes[0], epoch, 8, 9).unwrap_err();
    assert_eq!(error.kind(), Kind::Communication, "{error}");
    // Its abort reaches who has not heard of it.
    let error = exchange(&mut lanes[1], epoch, 9, u32::MAX).unwrap_err();
    assert_eq!(error.kind(), Kind::Communication, "{error}");
    assert_eq!(*lanes[1].state(), LaneState::Broken { epoch, retry_at_ms: 5_009 });
}

#[test]
fn what_was_left_is_no_fault() {
    let mut lanes = lanes(2);
    let epoch = joined(&mut lanes, 0);
    lanes[0].left(epoch + 1, 5);
    assert_eq!(*lanes[0].state(), LaneState::Joined { epoch }, "another epoch");
    lanes[0].left(epoch, 5);
    assert_eq!(*lanes[0].state(), LaneState::Broken { epoch, retry_at_ms: 5 });
    // The peer, which had not heard of it, is told by the abort in the middle of an exchange, and then why.
    exchange(&mut lanes[1], epoch, 5, u32::MAX).unwrap_err();
    assert_eq!(*lanes[1].state(), LaneState::Broken { epoch, retry_at_ms: 5_005 });
    lanes[1].left(epoch, 6);
    assert_eq!(*lanes[1].state(), LaneState::Broken { epoch, retry_at_ms: 6 });
    // The next one begins at once, and the pause after a fault is the first one.
    let epoch = joined(&mut lanes, 6);
    lanes[1].broke(epoch, 10);
    assert_eq!(*lanes[1].state(), LaneState::Broken { epoch, retry_at_ms: 5_010 });
}

/// A member that is still in the old epoch comes to the next one: it has heard the abort, and no pause keeps it.
#[test]
fn whoever_is_invited_comes_at_once() {
    let mut lanes = lanes(2);
    let epoch = joined(&mut lanes, 0);
    lanes[1].broke(epoch, 1);
    let invitation = lanes[0].invite(names(2), 1).unwrap();
    let outcomes = on_each(&mut lanes, |_, lane| lane.accept(invitation.clone(), 2, &mut looks(10_000)));
    outcomes.into_iter().for_each(Result::unwrap);
    assert_eq!(*lanes[1].state(), LaneState::Joined { epoch: epoch + 1 });
}

#[test]
fn pauses_grow_until_something_works() {
    let mut lanes = lanes(2);
    let mut now = 0;
    for pause in [5_000, 10_000, 20_000, 40_000, 80_000, 160_000, 300_000, 300_000] {
        let invitation = lanes[0].invite(names(2), now).unwrap();
        let epoch = invitation.epoch;
        // The other one never comes.
        let error = lanes[0].accept(invitation, now, &mut looks(3)).unwrap_err();
        assert_eq!(error.kind(), Kind::Communication, "{error}");
        assert_eq!(*lanes[0].state(), LaneState::Broken { epoch, retry_at_ms: now + pause });
        now += pause;
    }
    // Joining alone proves nothing; an exchange does.
    let epoch = joined(&mut lanes, now);
    on_each(&mut lanes, |_, lane| exchange(lane, epoch, now, 10_000)).into_iter().for_each(Result::unwrap);
    lanes[0].broke(epoch, now);
    assert_eq!(*lanes[0].state(), LaneState::Broken { epoch, retry_at_ms: now + 5_000 });
}

#[test]
fn invitations_that_cannot_be_are_refused_and_break_nothing() {
    let mut lanes = lanes(2);
    let epoch = joined(&mut lanes, 0);
    let good = lanes[0].invite(names(2), 0).unwrap();
    assert_eq!(good.epoch, epoch + 1);
    let members = |of: &[&str]| of.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    for (invitation, sign) in [
        (Invitation { epoch, ..good.clone() }, "`epoch` is 1, 1 was before it"),
        (Invitation { epoch: 0, ..good.clone() }, "`epoch` is 0"),
        (Invitation { epoch: u64::MAX, ..good.clone() }, "`epoch` is 18446744073709551615, more than"),
        (Invitation { members: members(&["kv-0"]), ..good.clone() }, "`members` are 1"),
        (Invitation { members: vec![String::new(); 2000], ..good.clone() }, "`members` are 2000"),
        (Invitation { members: members(&["kv-1", "kv-2"]), ..good.clone() }, "lack `kv-0`"),
        (Invitation { members: members(&["kv-0", "kv-1", "kv-1"]), ..good }, "name `kv-1` twice"),
    ] {
        let error = lanes[0].accept(invitation, 0, &mut looks(3)).unwrap_err();
        assert!(error.kind() == Kind::InvalidInput && error.to_string().contains(sign), "{error}");
        assert_eq!(*lanes[0].state(), LaneState::Joined { epoch });
    }
    assert!(lanes[0].invite(members(&["kv-1", "kv-2"]), 0).is_err());
    let other = lanes[0].invite(names(2), 0).unwrap();
    assert_eq!(other.epoch, epoch + 2, "two invitations are of two epochs");
}

#[test]
fn a_convener_that_was_started_anew_counts_anew_and_nobody_goes_back() {
    let net = Arc::new(Net::default());
    let lane = |name: &str, incarnation| {
        let convener: Arc<dyn Convener> = Arc::new(FakeConvener(Arc::clone(&net)));
        NcclLane::new(name, Ok(convener)).of_incarnation(incarnation)
    };
    let mut lanes = vec![lane("kv-0", 70), lane("kv-1", 0)];
    assert_eq!((joined(&mut lanes, 0), joined(&mut lanes, 0)), (1, 2));
    let late = lanes[0].invite(names(2), 0).unwrap();
    assert_eq!((late.incarnation, late.epoch), (70, 3));
    // Another start of the process: it knows nothing of the epochs before, and its first is joined by who was in the second.
    lanes[0] = lane("kv-0", 71);
    assert_eq!(joined(&mut lanes, 0), 1);
    on_each(&mut lanes, |_, lane| exchange(lane, 1, 0, 10_000)).into_iter().for_each(Result::unwrap);
    let error = lanes[1].accept(late.clone(), 0, &mut looks(3)).unwrap_err();
    assert!(error.kind() == Kind::InvalidInput, "{error}");
    assert!(error.to_string().contains("`incarnation` is 70, which 71 came after"), "{error}");
    let repeated = Invitation { incarnation: 71, epoch: 1, ..late };
    let error = lanes[1].accept(repeated, 0, &mut looks(3)).unwrap_err();
    assert!(error.to_string().contains("`epoch` is 1, 1 was before it"), "{error}");
    assert_eq!(*lanes[1].state(), LaneState::Joined { epoch: 1 }, "what was refused broke nothing");
    // Epochs of others do not count for what a process convenes itself.
    assert_eq!(lanes[1].invite(names(2), 0).unwrap().epoch, 1);
}

#[test]
fn without_the_library_the_lane_is_off_and_says_what_would_help() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("libnccl.so.2"), b"no library").unwrap();
    let missing = Nccl::open(&[folder.path().to_owned()]).unwrap_err();
    let mut lane = NcclLane::new("kv-0", Err(missing));
    let LaneState::Off { problem } = lane.state().clone() else { panic!("{lane:?}") };
    assert!(problem.contains("NCCL 2.18") && problem.contains("hint: "), "{problem}");
    let id = UniqueId::from_bytes(&[1; 128]).unwrap();
    let invitation = Invitation { incarnation: 0, epoch: 1, id, members: names(2) };
    for error in [
        lane.invite(names(2), 0).unwrap_err(),
        lane.accept(invitation, 0, &mut looks(3)).unwrap_err(),
        exchange(&mut lane, 1, 0, 3).unwrap_err(),
    ] {
        assert_eq!(error.kind(), Kind::Communication, "{error}");
    }
    lane.broke(1, 0);
    assert!(matches!(lane.state(), LaneState::Off { .. }), "for good");
}
