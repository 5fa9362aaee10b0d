//! Notes: what the holder made of the pages of a block (summaries, say), kept in memory beside the block wherever that lies, and
//! counted in the budget. They can be made again, so they never keep anything from its place for long.

use super::{BlockPool, Generation, sealed::Note, tiers::Room};

/// Notes take at most one part in so many of the budget.
const SHARE: u64 = 4;

/// What became of a note.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Noted {
    /// It stays as long as its block, or until room is needed and no view holds its block.
    Kept,
    /// Room is being made: carry out a spill ([`BlockPool::next_spill`]) or wait for one to end, then ask again.
    MakeRoom,
    /// There is no room for it, or its block is gone: whoever needs it makes it again.
    No,
}

impl<T> BlockPool<T> {
    /// Keeps what was made of a block's page of `layer`, which takes `bytes` of memory. Of several notes of one page the first stays.
    /// Room is made as for a block; when that is not enough by notes of blocks that no view holds.
    pub fn take_note(
        &mut self,
        generation: Generation,
        layer: usize,
        note: Note,
        bytes: u64,
        now_ms: u64,
    ) -> Noted {
        let Some(held) = self.held.get(&generation).filter(|held| !held.condemned) else { return Noted::No };
        if held.block.has_note(layer) {
            return Noted::Kept;
        }
        // Blocks that nothing keeps are never all driven out by notes.
        let limit = self.config.budget_bytes / SHARE;
        let limit = limit.min(self.config.budget_bytes - self.config.block_bytes());
        while self.note_bytes.saturating_add(bytes) > limit {
            if !self.drop_oldest_notes() {
                return Noted::No;
            }
        }
        match self.room_for(bytes, now_ms) {
            Some(Room::Ready) => {}
            Some(Room::Moving) => return Noted::MakeRoom,
            None => return Noted::No,
        }
        // Making room may have taken this very block.
        let Some(held) = self.held.get_mut(&generation) else { return Noted::No };
        if !held.block.put_note(layer, note) {
            return Noted::No;
        }
        held.note_bytes += bytes;
        self.note_bytes += bytes;
        if held.pins == 0 {
            self.noted.insert((held.uses.last, generation));
        }
        Noted::Kept
    }

    /// Drops the notes of the block that was used least recently among those that no view holds. False when there is none.
    pub(super) fn drop_oldest_notes(&mut self) -> bool {
        let Some(&(_, generation)) = self.noted.first() else { return false };
        self.drop_notes(generation);
        true
    }

    /// Drops the notes of a held block.
    pub(super) fn drop_notes(&mut self, generation: Generation) {
        let Some(held) = self.held.get_mut(&generation) else { return };
        self.noted.remove(&(held.uses.last, generation));
        self.note_bytes -= std::mem::take(&mut held.note_bytes);
        held.block.drop_notes();
    }
}
