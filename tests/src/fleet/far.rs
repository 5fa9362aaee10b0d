//! Relays in front of a shard, by which all others reach it: one for calls and one for tiles.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use longshore_chassis::Reserved;

use super::free_port;
use crate::relay::{Lag, Relay};

/// Ports that are tried until one is free at both addresses.
const TRIES: usize = 100;

/// What lies between a shard and everybody else.
#[derive(Debug)]
pub struct Far {
    /// Calls, and tiles of the lane `grpc`.
    pub calls: Relay,
    /// Tiles of the lane `tcp`.
    pub tiles: Relay,
    /// Ports of the shard, which nobody else gets while it is down.
    pub(super) listen: Reserved,
    pub(super) tiles_listen: Reserved,
}

impl Far {
    /// In front of a shard that is to listen at `listen` and `tiles_listen`.
    pub(super) fn make(seed: u64) -> Self {
        let listen = free_port(Ipv4Addr::LOCALHOST.into());
        let calls = Relay::new(0, listen.address(), seed).expect("there is a free port");
        let (tiles, tiles_listen) = (0..TRIES).find_map(|_| tiles(seed)).expect("there is a free port");
        Self { calls, tiles, listen, tiles_listen }
    }

    fn both(&self) -> [&Relay; 2] {
        [&self.calls, &self.tiles]
    }

    /// How late bytes are.
    pub fn lag(&self, lag: Option<&Lag>) {
        self.both().iter().for_each(|relay| relay.lag(lag.cloned()));
    }

    /// Lets nothing pass.
    pub fn hold(&self) {
        self.both().iter().for_each(|relay| relay.hold());
    }

    /// Cuts each of them after so many more bytes.
    pub fn cut_after(&self, bytes: u64) {
        self.both().iter().for_each(|relay| relay.cut_after(bytes));
    }

    /// As they were.
    pub fn mend(&self) {
        self.both().iter().for_each(|relay| relay.mend());
    }
}

/// A shard tells the port for its tiles, and not where: so it is one port at both addresses.
fn tiles(seed: u64) -> Option<(Relay, Reserved)> {
    let listen = free_port(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let port = listen.address().port();
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    Some((Relay::new(port, to, !seed).ok()?, listen))
}
