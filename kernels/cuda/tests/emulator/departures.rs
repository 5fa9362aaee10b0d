//! Copies to the host that were begun: as late as they may be, and not of what was changed meanwhile.

use std::collections::BTreeMap;

/// A copy that nobody took yet: where from, and what was there when it was begun.
struct Departing {
    from: u64,
    bytes: Vec<u8>,
}

/// Those that are under way, by number.
#[derive(Default)]
pub(crate) struct Departures {
    begun: u64,
    under_way: BTreeMap<u64, Departing>,
}

impl Departures {
    pub(crate) fn begin(&mut self, from: u64, bytes: &[u8]) -> u64 {
        self.begun += 1;
        self.under_way.insert(self.begun, Departing { from, bytes: bytes.to_vec() });
        self.begun
    }

    /// Where the bytes are, and what they were.
    pub(crate) fn end(&mut self, number: u64) -> Result<(u64, Vec<u8>), String> {
        let Departing { from, bytes } =
            self.under_way.remove(&number).ok_or_else(|| format!("no departure {number} is under way"))?;
        Ok((from, bytes))
    }

    /// Memory is given back.
    pub(crate) fn freed(&mut self, address: u64, bytes: usize) -> Result<(), String> {
        let end = address + bytes as u64;
        let meets = |copy: &Departing| copy.from < end && address < copy.from + copy.bytes.len() as u64;
        let found = self.under_way.iter().find(|(_, copy)| meets(copy)).map(|(&number, _)| number);
        self.under_way.retain(|_, copy| !meets(copy));
        match found {
            Some(number) => {
                Err(format!("memory at {address:#x} is given back while departure {number} is under way"))
            }
            None => Ok(()),
        }
    }

    /// What nobody took.
    pub(crate) fn left(&self) -> Option<String> {
        let left = self.under_way.len();
        (left > 0).then(|| format!("{left} departures were neither taken nor abandoned"))
    }
}
