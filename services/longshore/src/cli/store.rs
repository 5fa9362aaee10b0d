//! Flags of `longshore store`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// What to do with the store of a running cluster.
#[derive(Debug, Subcommand)]
pub(crate) enum StoreCommand {
    /// Show what each shard holds, what came and went, and how its copies stand.
    Stat(StoreStatArgs),
    /// List blocks: key, tenant, size, and who holds a copy on which tier.
    Ls(StoreLsArgs),
    /// Write a block into a file.
    Get(StoreGetArgs),
    /// Store blocks from files that `get` wrote.
    Put(StorePutArgs),
    /// Have every copy of blocks read and checked, and compare the copies with each other; fails when one is bad or missing.
    Verify(StoreVerifyArgs),
    /// Have shards read and check everything they hold, and drop what is damaged; fails when something was.
    Scrub(StoreScrubArgs),
    /// Have a shard hand its blocks to the others, so that it can be stopped without a loss.
    Drain(StoreDrainArgs),
}

pub(crate) const STORE_EXAMPLES: &str = "Examples:
  longshore up --processes --shards 3 --copies 2           a cluster to try this with
  longshore store stat                                     its shards, by the router at port 9000
  longshore store stat --watch 2                           the same every two seconds, with rates
  longshore store ls --limit 20                            some blocks and who holds them
  longshore store get 1f3c9a --out block.lsb               the one block whose key begins so
  longshore store get 1f3c9a --heads 0..2 --out two.lsh    its first two KV heads
  longshore store put block.lsb                            back again
  longshore store verify --all                             is every copy there and sound?
  longshore store scrub --bytes-per-second 268435456       check everything, 256 MiB/s each
  longshore store drain kv-1 && echo 'kv-1 can be stopped'

Any process of the cluster knows its shards: name one with --endpoint. Shards inside a single process (`longshore up` without \
--processes) cannot be reached from outside.";

/// How to find the shards.
#[derive(Debug, Clone, Args)]
pub(crate) struct ClusterArgs {
    /// gRPC address of a process of the cluster: its router, a worker or a shard; may be repeated.
    #[arg(
        long = "endpoint",
        value_name = "URL",
        default_value = "http://127.0.0.1:9000",
        env = "LONGSHORE_URL"
    )]
    pub(crate) endpoints: Vec<String>,
    /// Take the shards from this member list, as processes take it, and ask nobody for them.
    #[arg(long, value_name = "FILE")]
    pub(crate) members_file: Option<PathBuf>,
}

const STAT_COLUMNS: &str = "Columns, table by table; counts are since the start of a shard unless they tell what is there now.
  UP, EPOCH, INCARNATION   time since its start, number of the shard map that it sees, number of this start
  BLOCKS PINNED OPEN       blocks that are held, of these those that a view keeps, and blocks that are still being written
  CONDEMNED                damaged blocks that nobody finds any more, kept until the views that hold them end
  VIEWS CLOSED WRITERS     open views, those closed whose blocks somebody still reads, open put streams
  WAITING                  pieces of work that wait for a thread
  STORED HITS MISSES       blocks that were stored, keys that were looked up and were there, or were not
  HIT RATE ATTENDS         share of lookups that found their block, attention queries answered

  TIER USED CAPACITY       memory (dram) and disk: bytes of blocks and how many there may be
  ALSO ABOVE               blocks on disk that are in memory too
  LEAVING RISING           blocks on their way to the disk, and to memory
  SPILLED PROMOTED         blocks that went to the disk, and to memory
  I/O ERRORS SLOW          reads and writes that failed, and that took longer than somebody waits

  EVICTED FROM MEMORY      blocks lost to make room in memory; of these NOT ADMITTED ones were not worth a write to disk,
                           and DISK FULL ones found no room there
  EVICTED FROM DISK        blocks lost to make room on disk
  DAMAGED MOVED            blocks whose bytes failed a check, and blocks dropped because their owners hold them
  INCOMPLETE NO ROOM       blocks that never became whole, and blocks that were refused for want of room

  COPIES                   copies that each block should have
  SHORT                    copies that the last search found missing; UNSEARCHED blocks came after it began, or something
                           happened to a shard since: of these it says nothing yet
  BACKLOG UNCHECKED        copies that are about to be sent, and blocks that the running search did not look at yet
  UNPLACED                 blocks of which nobody said where they belong; they are served and never copied
  SENT SENT BYTES FAILED   copies that went to other shards, and that found no room there or did not arrive
  PEERS DOWN               other shards that it does not reach
  SCRUBBED ROUNDS DAMAGED  blocks checked of those of this round, rounds, damaged blocks that were found
  DRAIN                    no, draining, or drained: it can be stopped

  TENANTS                  namespaces (a tenant under one prefill policy) with views, streams or incomplete blocks
  KEPT MOST KEPT           bytes of blocks that nothing may evict, and the most of that which one tenant has
  REFUSED                  views, streams and blocks refused because one tenant would have taken too much
  PROMISES BROKEN          blocks dropped before their promise ended, because their tenant kept most
  STALLED                  streams ended because they made no progress

  LANE                     local (this process), shm (shared memory of a host), nccl (between GPUs), tcp (a connection
                           of its own) or grpc
  PUT STREAMS GET STREAMS  streams of tiles that came over it
  RECEIVED SENT            bytes of tiles; /S is a mean since the start, with --watch of the time since the look before";

/// Flags of `longshore store stat`.
#[derive(Debug, Args)]
#[command(
    after_help = STAT_COLUMNS
)]
pub(crate) struct StoreStatArgs {
    /// How to find the shards.
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// Print JSON, one object a look.
    #[arg(long)]
    pub(crate) json: bool,
    /// Look again every so many seconds, until Ctrl-C.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) watch: Option<u64>,
}

/// Flags of `longshore store ls`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    longshore store ls --prefix 1f --limit 10\n  \
    longshore store ls --json --limit 0 | jq -r 'select(.copies < 2) | .key'\n\
    A namespace is one tenant under one prefill policy. It is shown by its first digits only: the whole keys its hashes.")]
pub(crate) struct StoreLsArgs {
    /// How to find the shards.
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// Only namespaces that begin with these hexadecimal digits.
    #[arg(long, value_name = "HEX")]
    pub(crate) namespace: Option<String>,
    /// Only keys that begin with these hexadecimal digits.
    #[arg(long, value_name = "HEX")]
    pub(crate) prefix: Option<String>,
    /// Most blocks to list; 0 lists all.
    #[arg(long, default_value_t = 100)]
    pub(crate) limit: u64,
    /// Go on after a block, as the end of the list before said (NAMESPACE:KEY).
    #[arg(long, value_name = "CURSOR")]
    pub(crate) after: Option<String>,
    /// Print JSON, one object a line.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Flags of `longshore store get`.
#[derive(Debug, Args)]
#[command(
    after_help = "The file names the deployment, tenant, key and shape, and carries a CRC-32C of each tile and of its own \
    header (docs/protocol.md, \"Block files\"). It holds keys and values of a prompt in clear."
)]
pub(crate) struct StoreGetArgs {
    /// How to find the shards.
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// Key of the block: all 32 hexadecimal digits, or so many of the first ones that there is no other.
    pub(crate) key: String,
    /// File to write; replaced when it exists.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// Of equal keys, the one of this namespace (first hexadecimal digits).
    #[arg(long, value_name = "HEX")]
    pub(crate) namespace: Option<String>,
    /// Only these KV heads of every layer, from A to B - 1 (docs/protocol.md, "Files of heads").
    #[arg(long, value_name = "A..B", value_parser = heads)]
    pub(crate) heads: Option<std::ops::Range<u32>>,
}

fn heads(text: &str) -> Result<std::ops::Range<u32>, String> {
    let form = "must be A..B with A below B, as `0..2` for the first two heads";
    let (first, end) = text.split_once("..").ok_or(form)?;
    let number = |text: &str| text.trim().parse::<u32>().map_err(|_| form.to_owned());
    let heads = number(first)?..number(end)?;
    if heads.is_empty() { Err(form.to_owned()) } else { Ok(heads) }
}

/// Flags of `longshore store put`.
#[derive(Debug, Args)]
#[command(
    after_help = "Every file is checked whole before anything of it is sent. Copies go to the shards that own the block; one that has \
    no place (nobody told the shard where it belongs) goes to --shard, and is copied nowhere."
)]
pub(crate) struct StorePutArgs {
    /// How to find the shards.
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// Files that `get` wrote.
    #[arg(required = true)]
    pub(crate) files: Vec<PathBuf>,
    /// Store on this shard only.
    #[arg(long, value_name = "ID")]
    pub(crate) shard: Option<String>,
}

/// Flags of `longshore store verify`.
#[derive(Debug, Args)]
#[command(
    after_help = "Shards read their copies where they lie, memory or disk, check every tile, and tell its checksum; nothing is counted as a \
    use, and no tile crosses the network. A shard drops a copy that is damaged, as it does whenever it reads one; repair makes it anew \
    from another one.\n\
    Examples:\n  longshore store verify --all\n  longshore store verify 1f3c9a 77\n\
    Exit code: 0 when every copy is there and sound, 1 otherwise."
)]
pub(crate) struct StoreVerifyArgs {
    /// How to find the shards.
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// Keys of blocks, or their first hexadecimal digits.
    #[arg(required_unless_present = "all", value_name = "KEYS|--all")]
    pub(crate) keys: Vec<String>,
    /// All blocks.
    #[arg(long, conflicts_with = "keys")]
    pub(crate) all: bool,
    /// Print JSON: one object for each block that is not as it should be, then one with the totals.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Flags of `longshore store scrub`.
#[derive(Debug, Args)]
#[command(
    after_help = "Shards scrub all the time at a low rate (`kvstore.scrub_bytes_per_s`); this asks for a round now. A round that somebody \
    asked for and that still runs is joined, at its own rate.\n\
    Exit code: 0 when nothing was damaged, 1 otherwise."
)]
pub(crate) struct StoreScrubArgs {
    /// How to find the shards.
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// Only these shards; may be repeated.
    #[arg(long = "shard", value_name = "ID")]
    pub(crate) shards: Vec<String>,
    /// Bytes a second that each shard reads, as `268435456` or `256MiB` [default: as it is configured].
    #[arg(long, value_name = "BYTES", value_parser = some_bytes)]
    pub(crate) bytes_per_second: Option<u64>,
    /// Seconds to wait for the end; the round goes on without.
    #[arg(long, value_name = "SECONDS", default_value_t = 86_400)]
    pub(crate) timeout: u64,
}

fn some_bytes(text: &str) -> Result<u64, String> {
    match longshore_chassis::config::bytes(text)? {
        0 => Err("is 0, must be at least 1".to_owned()),
        bytes => Ok(bytes),
    }
}

/// Flags of `longshore store drain`.
#[derive(Debug, Args)]
#[command(
    after_help = "The shard sends its blocks to those that own them without it, at `kvstore.repair.bytes_per_second`, and refuses new ones as \
    long as there are shards enough for them. It drops nothing and answers readers until it is stopped. Asking again changes nothing \
    and shows the progress; --cancel makes it an owner again. Drain one shard at a time, stop it, then take it out of the member list.\n\
    Exit code: 0 when every block has all its copies on other shards, 1 otherwise; then the shard goes on draining."
)]
pub(crate) struct StoreDrainArgs {
    /// How to find the shards.
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// Shard to drain.
    pub(crate) shard: String,
    /// Seconds to wait until everything is elsewhere.
    #[arg(long, value_name = "SECONDS", default_value_t = 3_600)]
    pub(crate) timeout: u64,
    /// Stop draining.
    #[arg(long)]
    pub(crate) cancel: bool,
}
