//! Connections by address: lazy, shared, bounded in number.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::runtime::Handle;
use tonic::transport::{Channel, Endpoint};

use super::{GrpcOptions, dial::Dial, epochs::Epochs, lanes::Tracked, over, shard::generated};
use crate::Error;

/// What a connection carries. Tiles have their own ones, by number, so that bulk never delays a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Use {
    Calls,
    Tiles(usize),
}

#[derive(Debug)]
pub(super) struct Pool {
    options: GrpcOptions,
    runtime: Handle,
    slots: Mutex<Slots>,
}

#[derive(Debug, Default)]
struct Slots {
    channels: HashMap<(String, Use), Slot>,
    /// Tile connections by address, with the stamp of their last use.
    dials: HashMap<String, (Arc<Dial>, u64)>,
    /// Ends of the lane `nccl` by address, likewise: those of calls with tiles, and those of attend streams.
    epochs: HashMap<String, (Arc<Epochs>, u64)>,
    attending: HashMap<String, (Arc<Epochs>, u64)>,
    /// Counts requests for channels; the oldest slot has the lowest stamp.
    clock: u64,
}

#[derive(Debug)]
struct Slot {
    channel: Channel,
    stamp: u64,
}

impl Pool {
    pub(super) fn new(options: GrpcOptions) -> Self {
        Self { options, runtime: Handle::current(), slots: Mutex::default() }
    }

    pub(super) fn message_bytes_max(&self) -> usize {
        self.options.message_bytes_max
    }

    pub(super) fn options(&self) -> &GrpcOptions {
        &self.options
    }

    pub(super) fn tile_connections(&self) -> usize {
        self.options.tile_connections.max(1)
    }

    /// The connection to `address` for `purpose`. Clients keep a handle, so that one that is pushed out of the pool lives
    /// on until its last client is gone.
    pub(super) fn channel(&self, address: &str, purpose: Use) -> Result<Channel, Error> {
        let endpoint = self.endpoint(address)?;
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.clock += 1;
        let stamp = slots.clock;
        let key = (address.to_owned(), purpose);
        if let Some(slot) = slots.channels.get_mut(&key) {
            slot.stamp = stamp;
            return Ok(slot.channel.clone());
        }
        if slots.channels.len() >= self.options.connections_max {
            let oldest = slots.channels.iter().min_by_key(|(_, slot)| slot.stamp).map(|(key, _)| key.clone());
            oldest.map(|key| slots.channels.remove(&key));
        }
        // Channels spawn their driver on the runtime that is current; callers may be plain threads.
        let _entered = self.runtime.enter();
        let channel = endpoint.connect_lazy();
        slots.channels.insert(key, Slot { channel: channel.clone(), stamp });
        Ok(channel)
    }

    /// The tile connections to `address`. The oldest make room as those of [`Self::channel`] do.
    pub(super) fn dial(&self, address: &str) -> Result<Arc<Dial>, Error> {
        let calls = generated(self.channel(address, Use::Calls)?, self.message_bytes_max());
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let Slots { dials, clock, .. } = &mut *slots;
        let make = || Dial::new(address, calls, &self.options);
        Ok(kept(dials, address, (clock, self.options.connections_max), make))
    }

    /// The ends of the lane `nccl` to `address` for calls with tiles, where this process can have some; bounded likewise.
    pub(super) fn epochs(&self, address: &str) -> Result<Option<Arc<Epochs>>, Error> {
        self.ends(address, self.options.nccl_ends_max, |slots| &mut slots.epochs)
    }

    /// The same for attend streams, which keep theirs: so they take none of those of calls with tiles.
    pub(super) fn attending(&self, address: &str) -> Result<Option<Arc<Epochs>>, Error> {
        self.ends(address, self.options.nccl_attend_ends_max, |slots| &mut slots.attending)
    }

    fn ends(
        &self,
        address: &str,
        ends_max: usize,
        of: impl FnOnce(&mut Slots) -> &mut HashMap<String, (Arc<Epochs>, u64)>,
    ) -> Result<Option<Arc<Epochs>>, Error> {
        let Some(lanes) = self.options.nccl.clone().filter(|_| ends_max > 0) else {
            return Ok(None);
        };
        let calls = generated(self.channel(address, Use::Calls)?, self.message_bytes_max());
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let mut clock = slots.clock;
        let make = || Epochs::new(address, calls, lanes, (ends_max, &self.options));
        let known = kept(of(&mut slots), address, (&mut clock, self.options.connections_max), make);
        slots.clock = clock;
        Ok(Some(known))
    }

    fn endpoint(&self, address: &str) -> Result<Endpoint, Error> {
        let refuse = || Error::invalid("address", format!("is `{address}`, must be `http://HOST:PORT`"));
        let uri: Uri = address.parse().map_err(|_| refuse())?;
        let plain = uri.scheme_str() == Some("http") && uri.port_u16().is_some_and(|port| port != 0);
        if !plain || !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(refuse());
        }
        Ok(self.tuned(Endpoint::from(uri)))
    }

    fn tuned(&self, endpoint: Endpoint) -> Endpoint {
        let options = &self.options;
        endpoint
            .executor(over::Tasks)
            .connect_timeout(options.connect_timeout)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(options.keepalive_interval)
            .keep_alive_timeout(options.keepalive_timeout)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(options.stream_window_bytes)
            .initial_connection_window_size(options.connection_window_bytes)
            .max_frame_size(options.frame_bytes_max)
    }

    /// A channel over one stream that is open already; it fails for good when the stream ends.
    pub(super) fn channel_over(&self, stream: Tracked) -> Channel {
        let endpoint = self.tuned(Endpoint::from_static("http://shm"));
        let mut stream = Some(stream);
        let _entered = self.runtime.enter();
        endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let stream = stream.take().map(TokioIo::new);
            let ended = || std::io::Error::new(std::io::ErrorKind::NotConnected, "the connection ended");
            std::future::ready(stream.ok_or_else(ended))
        }))
    }
}

/// What is known for an address, made where nothing is; what was asked for least recently makes room.
fn kept<T>(
    known: &mut HashMap<String, (Arc<T>, u64)>,
    address: &str,
    (clock, max): (&mut u64, usize),
    make: impl FnOnce() -> T,
) -> Arc<T> {
    *clock += 1;
    if let Some((kept, stamp)) = known.get_mut(address) {
        *stamp = *clock;
        return Arc::clone(kept);
    }
    if known.len() >= max {
        let oldest = known.iter().min_by_key(|(_, (_, stamp))| *stamp).map(|(key, _)| key.clone());
        oldest.map(|key| known.remove(&key));
    }
    let made = Arc::new(make());
    known.insert(address.to_owned(), (Arc::clone(&made), *clock));
    made
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Code;

    #[tokio::test]
    async fn addresses_that_make_no_sense_are_refused() {
        let pool = Pool::new(GrpcOptions::default());
        for bad in [
            "",
            "local:a",
            "127.0.0.1:80",
            "http://",
            "http://a",
            "http://a:0",
            "https://a:1",
            "http://a:1/x",
            "http://a:1/?q",
            "http://a b:1",
        ] {
            let error = pool.channel(bad, Use::Calls).unwrap_err();
            assert_eq!(
                (error.code, error.field.as_deref()),
                (Code::InvalidArgument, Some("address")),
                "{bad}"
            );
        }
        pool.channel("http://127.0.0.1:9", Use::Calls).unwrap();
        pool.channel("http://[::1]:9/", Use::Calls).unwrap();
    }

    #[tokio::test]
    async fn the_pool_is_bounded_and_keeps_what_is_used() {
        let pool = Pool::new(GrpcOptions { connections_max: 2, ..GrpcOptions::default() });
        for address in ["http://a:1", "http://b:1", "http://a:1", "http://c:1"] {
            pool.channel(address, Use::Calls).unwrap();
        }
        let slots = pool.slots.lock().unwrap();
        let mut kept: Vec<&str> = slots.channels.keys().map(|(address, _)| address.as_str()).collect();
        kept.sort_unstable();
        assert_eq!(kept, ["http://a:1", "http://c:1"]);
    }
}
