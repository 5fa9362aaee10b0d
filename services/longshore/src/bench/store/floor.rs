//! What this machine does without any of our code: copies, checksums, bytes through loopback.

use std::{
    hint::black_box,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use longshore_blocks::{copy_crc32c, crc32c};
use serde::Serialize;

use super::{load::Source, usage};

/// Memory that each thread copies around in.
const RING_BYTES: usize = 64 << 20;
/// Share of a point's time that a figure of memory takes.
const MEMORY_SHARE: f64 = 0.3;
/// Numbers of connections of the raw loop.
const CONNECTIONS: [usize; 3] = [1, 2, 4];

/// The figures for one size of tiles, in GB/s of payload.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Floor {
    pub(super) tile_bytes: usize,
    /// One thread copies tiles.
    pub(super) memcpy_gbps: f64,
    /// Two threads do.
    pub(super) memcpy_two_gbps: f64,
    /// One thread takes CRC-32C of tiles.
    pub(super) crc_gbps: f64,
    /// One thread copies tiles and takes CRC-32C of the copies.
    pub(super) copy_crc_gbps: f64,
    /// Loopback by number of connections, one thread at each end.
    pub(super) tcp: Vec<TcpFloor>,
}

/// The raw loop with some connections.
#[derive(Debug, Clone, Serialize)]
pub(super) struct TcpFloor {
    pub(super) connections: usize,
    /// Tiles read into memory that exists.
    pub(super) gbps: f64,
    /// Cores used for each GB/s.
    pub(super) cores_per_gbps: f64,
    /// The same with a checksum of every tile: what a lane of our own framing could reach.
    pub(super) verified_gbps: f64,
}

impl Floor {
    /// Measures; blocks for about six times `seconds`.
    pub(super) fn measure(source: &Arc<Source>, seconds: f64) -> Result<Self> {
        let memory = Duration::from_secs_f64(seconds * MEMORY_SHARE);
        let copy = |into: &mut [u8], from: &[u8]| into.copy_from_slice(from);
        let checked = |into: &mut [u8], from: &[u8]| {
            black_box(copy_crc32c(0, into, from));
        };
        let checksum = |_: &mut [u8], from: &[u8]| {
            black_box(crc32c(from));
        };
        let tcp = CONNECTIONS.iter().map(|&connections| TcpFloor::measure(source, connections, seconds));
        Ok(Self {
            tile_bytes: source.tile_bytes(),
            memcpy_gbps: memory_gbps(source, 1, memory, copy),
            memcpy_two_gbps: memory_gbps(source, 2, memory, copy),
            crc_gbps: memory_gbps(source, 1, memory, checksum),
            copy_crc_gbps: memory_gbps(source, 1, memory, checked),
            tcp: tcp.collect::<Result<_>>()?,
        })
    }

    /// The fastest raw loop.
    pub(super) fn tcp_gbps(&self) -> f64 {
        self.tcp.iter().map(|tcp| tcp.gbps).fold(0.0, f64::max)
    }
}

/// GB/s of `work` over tiles on `threads` threads.
fn memory_gbps(
    source: &Arc<Source>,
    threads: usize,
    duration: Duration,
    work: impl Fn(&mut [u8], &[u8]) + Copy + Send + Sync,
) -> f64 {
    let one = |_| {
        let mut ring = source.ring(RING_BYTES);
        let begun = Instant::now();
        let mut bytes = 0;
        let mut tiles = source.bodies().iter().cycle();
        while begun.elapsed() < duration {
            for slot in ring.chunks_exact_mut(source.tile_bytes()).take(16) {
                if let Some((_, tile)) = tiles.next() {
                    work(slot, tile);
                    bytes += tile.len();
                }
            }
        }
        bytes as f64 / begun.elapsed().as_secs_f64() / 1e9
    };
    thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|index| scope.spawn(move || one(index))).collect();
        running.into_iter().filter_map(|thread| thread.join().ok()).sum()
    })
}

impl TcpFloor {
    fn measure(source: &Arc<Source>, connections: usize, seconds: f64) -> Result<Self> {
        let duration = Duration::from_secs_f64(seconds);
        let (gbps, cpu) = loopback(source, connections, duration, false)?;
        let (verified_gbps, _) = loopback(source, connections, duration, true)?;
        Ok(Self { connections, gbps, cores_per_gbps: cpu / gbps.max(1e-9), verified_gbps })
    }
}

/// GB/s through loopback and cores used: blocking sockets, a thread at each end of each connection.
fn loopback(
    source: &Arc<Source>,
    connections: usize,
    duration: Duration,
    verify: bool,
) -> Result<(f64, f64)> {
    let listener = TcpListener::bind("127.0.0.1:0").context("no free port on loopback")?;
    let address = listener.local_addr().context("a bound socket has an address")?;
    let mut pairs = Vec::new();
    for _ in 0..connections {
        let client = TcpStream::connect(address).context("cannot connect over loopback")?;
        client.set_nodelay(true).context("cannot set TCP_NODELAY")?;
        pairs.push((client, listener.accept().context("cannot accept over loopback")?.0));
    }
    let (begun, cpu) = (Instant::now(), usage::cpu_seconds(std::process::id()));
    let bytes: u64 = thread::scope(|scope| {
        let mut readers = Vec::new();
        for (client, server) in pairs {
            scope.spawn(move || send(source, client, begun + duration));
            readers.push(scope.spawn(move || receive(source, server, verify)));
        }
        readers.into_iter().filter_map(|reader| reader.join().ok()).sum()
    });
    let seconds = begun.elapsed().as_secs_f64();
    let cores = (usage::cpu_seconds(std::process::id()) - cpu) / seconds;
    Ok((bytes as f64 / seconds / 1e9, cores))
}

fn send(source: &Source, mut socket: TcpStream, until: Instant) {
    for (_, tile) in source.bodies().iter().cycle() {
        if Instant::now() >= until || socket.write_all(tile).is_err() {
            return;
        }
    }
}

fn receive(source: &Source, mut socket: TcpStream, verify: bool) -> u64 {
    let mut ring = source.ring(RING_BYTES / 2);
    let mut bytes = 0;
    loop {
        for slot in ring.chunks_exact_mut(source.tile_bytes()) {
            if socket.read_exact(slot).is_err() {
                return bytes;
            }
            if verify {
                black_box(crc32c(slot));
            }
            bytes += slot.len() as u64;
        }
    }
}
