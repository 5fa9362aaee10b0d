//! One tenant that takes all it can over a real connection, and another one whose calls keep working.

use longshore_fabric::{
    Code, Connector, GrpcConnector, GrpcOptions,
    server::{ServerOptions, Services, serve},
};
use longshore_proto::types::{GetSummaries, WatchInventory};
use tokio::net::TcpListener;

use super::*;

/// A shard that serves gRPC, with the clients of two tenants, each with connections of its own.
pub(super) struct Served {
    pub(super) fixture: Fixture,
    pub(super) address: String,
    greedy: Arc<dyn Shard>,
    modest: Arc<dyn Shard>,
}

impl Served {
    pub(super) async fn new(config: Config) -> Self {
        let fixture = with_config(config);
        let address = listen(&fixture, &fixture.tasks).await;
        let client = || GrpcConnector::new(GrpcOptions::default()).shard(&address).expect("an address");
        let (greedy, modest) = (client(), client());
        Self { fixture, address, greedy, modest }
    }

    fn ctx(&self) -> CallContext {
        CallContext::new("greedy").with_timeout(PATIENCE)
    }

    /// Begins a put stream of tenant `salt` over its own connection; it goes on while its sender lives.
    async fn begin(
        &self,
        shard: &Arc<dyn Shard>,
        salt: &str,
    ) -> Result<(mpsc::Sender<TileMessage>, BoxStream<PutAck>), CallError> {
        let (tiles, received) = mpsc::channel(4);
        let acks = shard.put_blocks(&self.ctx(), identity(salt), wire_shape(), received).await?;
        Ok((tiles, acks))
    }

    /// Stores, looks up, reads and attends over a block as the modest tenant; everything has to work.
    pub(super) async fn modest_goes_on(&self, name: u8) {
        let (tiles, mut acks) = self.begin(&self.modest, "modest").await.expect("a put stream");
        for tile in block(name) {
            tiles.send(tile).await.expect("the shard reads");
        }
        let ack = acks.next().await.expect("an acknowledgement").expect("the stream goes on");
        assert_eq!((ack.key, ack.outcome), (key(name), PutOutcome::Stored), "{}", ack.message);
        drop((tiles, acks));
        let lookup = Lookup { identity: identity("modest"), keys: vec![key(name)], peek: false };
        assert_eq!(self.modest.lookup(&self.ctx(), lookup).await, Ok(vec![true]));
        let get = GetBlocks::whole(identity("modest"), vec![key(name)]);
        let read = self.modest.get_blocks(&self.ctx(), get).await.expect("a get stream");
        let read: Vec<_> = collect(read).await.into_iter().map(|tile| tile.expect("a tile")).collect();
        assert_eq!(read, block(name).into_iter().map(Some).collect::<Vec<_>>());
        self.modest_attends(name).await;
    }

    async fn modest_attends(&self, name: u8) {
        let blocks = vec![(0, key(name))];
        let open = OpenView { identity: identity("modest"), blocks, append_to: None, lease_ms: 60_000 };
        let opened = self.modest.open_view(&self.ctx(), open).await.expect("a view");
        let OpenedView::Open { view_id } = opened else { panic!("{opened:?}") };
        let (queries, received) = mpsc::channel(1);
        let asked = AttendQuery { identity: identity("modest"), ..query(1, 0, vec![item(view_id, 16, 2)]) };
        queries.send(asked).await.expect("there is room");
        drop(queries);
        let answers = self.modest.attend(&self.ctx(), received).await.expect("an attention stream");
        let answers: Vec<_> = collect(answers).await.into_iter().map(|one| one.expect("an answer")).collect();
        assert_eq!(partials_of(&answers, 1).0.len(), 1);
        self.modest.close_view(&self.ctx(), view_id).await.expect("it is closed");
    }

    fn scraped(&self, line: &str) -> bool {
        self.fixture.metrics.encode().lines().any(|have| have.ends_with(line) || have == line)
    }
}

/// Serves the shard at one more port for as long as `tasks` go on; gives its address.
async fn listen(fixture: &Fixture, tasks: &Tasks) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = format!("http://{}", listener.local_addr().expect("a bound socket has an address"));
    let services = crate::grpc::serve(Services::new(ServerOptions::default()), fixture.shard.clone());
    tasks.spawn_critical("grpc", serve(listener, services, tasks.token()));
    address
}

/// Patience with streams that stand still: a busy machine gets as far as the tests want it to before it is over.
const STALL_MS: u64 = 8_000;

/// Room for 16 blocks, of which one tenant gets 12.
pub(super) fn limits() -> Config {
    Config { tenant_percent: 75, retention_ms: 60_000, views_max: 16, readers_max: 8, ..config(16) }
}

#[tokio::test(flavor = "multi_thread")]
async fn pinned_blocks_and_views_of_one_tenant_leave_room_for_another() {
    let served = Served::new(limits()).await;
    for name in 1..=14 {
        served.fixture.put("greedy", block(name)).await;
    }
    let open = |name: u8| {
        let blocks = vec![(0, key(name))];
        OpenView { identity: identity("greedy"), blocks, append_to: None, lease_ms: 600_000 }
    };
    let mut views = 0;
    for name in (1..=14).cycle().take(60) {
        match served.greedy.open_view(&served.ctx(), open(name)).await {
            Ok(OpenedView::Open { .. }) => views += 1,
            Ok(other) => panic!("{other:?}"),
            Err(error) => {
                assert_eq!(error.code, Code::ResourceExhausted, "{error}");
                assert!(error.retry_after.is_some() && error.message.contains("hint:"), "{error}");
            }
        }
    }
    assert_eq!(views, 12, "75 % of the views and of the blocks");
    // More than the two blocks that are free: those that the greedy one was only promised make way.
    for name in 1..=4 {
        served.modest_goes_on(name).await;
    }
    // The server hears of the end of the modest one's streams when it hears of it.
    served.fixture.settled("the greedy one is left", |stats| stats.tenants.tenants == 1).await;
    let stats = served.fixture.stats().await;
    assert_eq!(stats.tenants.most_kept_bytes, 12 * block_bytes());
    assert!(stats.tenants.refused_total >= 48 && stats.tenants.broken_promises_total > 0, "{stats:?}");
    assert!(served.scraped("longshore_kvstore_tenants 1"), "{}", served.fixture.metrics.encode());
    assert!(served.scraped("longshore_kvstore_tenant_most{resource=\"kept_blocks\"} 12"));
    assert!(!served.scraped("longshore_kvstore_tenant_refused_total{resource=\"views\"} 0"));
}

#[tokio::test(flavor = "multi_thread")]
async fn incomplete_blocks_of_one_tenant_leave_room_and_are_freed_when_nothing_comes() {
    let served = Served::new(Config { stall_ms: STALL_MS, ..limits() }).await;
    let (tiles, mut acks) = served.begin(&served.greedy, "greedy").await.unwrap();
    for name in 1..=40 {
        tiles.send(message(name, 0)).await.expect("the shard reads");
    }
    for _ in 0..28 {
        let ack = acks.next().await.expect("a refusal").expect("the stream goes on");
        assert_eq!(ack.outcome, PutOutcome::NoSpace, "{ack:?}");
        assert!(ack.message.contains("incomplete blocks") && ack.message.contains("hint:"), "{ack:?}");
    }
    assert_eq!(served.fixture.stats().await.open_blocks, 12);
    for name in 1..=4 {
        served.modest_goes_on(name).await;
    }
    // It neither goes on nor leaves: its stream is ended and what it kept is free.
    let end = collect(acks).await;
    let error = end.last().expect("a reason").as_ref().expect_err("the stream ends by an error");
    assert_eq!(error.code, Code::ResourceExhausted);
    assert!(error.message.contains("put stream is ended"), "{error}");
    served.fixture.settled("its blocks are free", |stats| stats.open_blocks == 0).await;
    assert_eq!(served.fixture.stats().await.tenants.stalled_streams_total, 1);
    drop(tiles);
}

#[tokio::test(start_paused = true)]
async fn a_put_stream_that_goes_on_slowly_is_not_ended() {
    let shard = with_config(Config { stall_ms: 1_000, ..limits() });
    let (tiles, received) = mpsc::channel(4);
    let acks = shard.shard.put_blocks(&shard.ctx, identity("slow"), wire_shape(), received).await.unwrap();
    // Takes far longer than the patience, but never without progress.
    for tile in [1, 2, 3].into_iter().flat_map(block) {
        tiles.send(tile).await.expect("the shard reads");
        tokio::time::sleep(Duration::from_millis(600)).await;
    }
    // Nothing is incomplete: it may be silent for as long as it likes.
    tokio::time::sleep(Duration::from_secs(600)).await;
    drop(tiles);
    let acks: Vec<_> = collect(acks).await.into_iter().map(|ack| ack.expect("it goes on")).collect();
    assert_eq!(outcomes(&acks), [1, 2, 3].map(|name| (name, PutOutcome::Stored)));
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_that_take_nothing_leave_room_for_others_and_are_ended() {
    let served = Served::new(Config { stall_ms: STALL_MS, ..limits() }).await;
    served.fixture.put("greedy", block(1)).await;
    // Far more than all windows and buffers of a connection.
    let get = GetBlocks::whole(identity("greedy"), vec![key(1); 65_536]);
    let mut unread = Vec::new();
    // They have all the time of the world: it is the shard that ends them.
    let ctx = CallContext::new("greedy");
    for _ in 0..6 {
        unread.push(served.greedy.get_blocks(&ctx, get.clone()).await.expect("75 % of 8 streams"));
    }
    let refused = served.greedy.get_blocks(&served.ctx(), get.clone()).await;
    let error = match refused {
        Err(error) => error,
        Ok(stream) => collect(stream).await.pop().expect("an end").expect_err("it is refused"),
    };
    assert_eq!(error.code, Code::ResourceExhausted, "{error}");
    assert!(error.message.contains("streams of blocks"), "{error}");
    served.modest_goes_on(1).await;
    let wanted = |stats: &ShardStats| stats.tenants.stalled_streams_total == 6;
    served.fixture.settled("streams that nobody reads are ended", wanted).await;
    served.modest_goes_on(2).await;
    for stream in unread {
        let mut end = collect(stream).await;
        let error = end.pop().expect("an end").expect_err("the stream was not whole");
        assert_eq!(error.code, Code::ResourceExhausted, "{error}");
        assert!(end.len() < 3 * 65_536 && end.iter().all(Result::is_ok), "what came before is sound");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tile_connections_and_what_is_on_them_are_shown() {
    let served = Served::new(limits()).await;
    let other_host = GrpcOptions { shm_arena_bytes: 0, ..GrpcOptions::default() };
    let client = GrpcConnector::new(other_host).shard(&served.address).expect("an address");
    assert!(served.scraped("longshore_kvstore_tile_connections 0"), "{}", served.fixture.metrics.encode());
    for round in 1..=5 {
        let (tiles, mut acks) = served.begin(&client, "").await.expect("a put stream");
        for tile in block(round) {
            tiles.send(tile).await.expect("the shard reads");
        }
        assert_eq!(acks.next().await.expect("an answer").expect("no error").outcome, PutOutcome::Stored);
        assert!(served.scraped("longshore_kvstore_tile_connections 1"), "round {round}");
        drop(tiles);
        assert!(acks.next().await.is_none());
    }
    assert!(served.scraped("longshore_kvstore_tile_connections 1"), "it waits for the next call");
    assert!(served.scraped("longshore_kvstore_tile_bytes_in_flight 0"), "and nothing is on it");
}

/// A shard whose callers may take nothing for so long, with a view of the three blocks that it holds. For tests whose clock moves only
/// when nothing else does: no thread that is slow makes a caller late.
async fn impatient(stall_ms: u64) -> (Fixture, u64) {
    let limits = Config { stall_ms, attend_message_bytes: 1 << 8, ..limits() };
    // Summaries take some of it too.
    let capacity_bytes = 5 * block_bytes() - 1;
    let shard = with_config(Config { capacity_bytes, tenant_percent: 100, retention_ms: 0, ..limits });
    shard.store(&[1, 2, 3]).await;
    let view = shard.view(&[(0, 1), (1, 2), (2, 3)]).await;
    (shard, view)
}

/// The error that ends a stream which nobody read, with what came before it.
async fn stalled<T>(shard: &Fixture, stream: &str, unread: BoxStream<T>) -> usize {
    shard.settled("it is ended", |stats| stats.tenants.stalled_streams_total == 1).await;
    let mut came = collect(unread).await;
    let Some(Err(error)) = came.pop() else { panic!("it ends with a reason") };
    assert_eq!(error.code, Code::ResourceExhausted, "{error}");
    assert!(error.message.contains(&format!("this {stream} stream is ended")), "{error}");
    assert!(shard.metrics.encode().contains(&format!("stalled_streams_total{{stream=\"{stream}\"}} 1")));
    came.len()
}

#[tokio::test(start_paused = true)]
async fn blocks_that_an_unread_stream_may_still_need_are_counted_until_it_is_ended() {
    let (shard, view) = impatient(5_000).await;
    let asked = GetSummaries {
        identity: identity(""),
        view_id: view,
        first_layer: 0,
        layers: None,
        values: true,
        spreads: true,
        cosines: true,
    };
    // A message for each block and layer, and one for each query: more of both than may be unread.
    let summaries = shard.shard.get_summaries(&shard.ctx, asked).await.unwrap();
    let (queries, received) = mpsc::channel(16);
    let answers = shard.shard.attend(&shard.ctx, received).await.unwrap();
    for id in 0..12 {
        queries.send(query(id, 0, vec![item(view, 48, 1)])).await.unwrap();
    }
    // Only what began before the view is closed keeps its blocks: eight queries, of which four at most are answered.
    shard.settled("queries began", |_| queries.capacity() >= 16 - 12 + 8).await;
    shard.shard.close_view(&shard.ctx, view).await.unwrap();
    let stats = shard.stats().await;
    assert_eq!((stats.views, stats.pinned_blocks), (0, 3), "the view is closed, its readers are not");
    // Room for one more: those that somebody may still read do not make way, the fourth block makes way for the fifth.
    let acks = shard.put("", [4, 5].into_iter().flat_map(block).collect()).await;
    assert_eq!(outcomes(&acks), [4, 5].map(|name| (name, PutOutcome::Stored)));
    assert_eq!(shard.lookup("", &[1, 2, 3, 4, 5]).await, [true, true, true, false, true]);
    assert!(shard.stats().await.used_bytes < 5 * block_bytes());
    shard.settled("both are ended", |stats| stats.pinned_blocks == 0).await;
    drop((summaries, answers));
    shard.put("", [6, 7, 8, 9].into_iter().flat_map(block).collect()).await;
    assert_eq!(shard.lookup("", &[1, 2, 3]).await, [false; 3], "now they do");
}

#[tokio::test(start_paused = true)]
async fn an_attention_stream_that_nobody_reads_is_ended_with_a_reason() {
    let (shard, view) = impatient(300).await;
    let (queries, received) = mpsc::channel(16);
    let answers = shard.shard.attend(&shard.ctx, received).await.unwrap();
    // Silence is no stall as long as there is nothing to take.
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(shard.stats().await.tenants.stalled_streams_total, 0);
    for id in 0..12 {
        queries.send(query(id, 0, vec![item(view, 48, 1)])).await.unwrap();
    }
    assert!(stalled(&shard, "attend", answers).await >= 4, "what was answered can be read");
}

#[tokio::test(start_paused = true)]
async fn watchers_are_shared_and_those_that_take_nothing_are_ended() {
    let shard = with_config(Config { stall_ms: 300, ..limits() });
    let watch = |salt| WatchInventory { identity: identity(salt), after: None };
    let greedy = || shard.shard.watch_inventory(&shard.ctx, watch("greedy"));
    let mut unread = Vec::new();
    let refused = loop {
        match greedy().await {
            Ok(stream) => unread.push(stream),
            Err(error) => break error,
        }
    };
    assert_eq!((unread.len(), refused.code), (6, Code::ResourceExhausted), "75 % of 8: {refused}");
    assert!(refused.message.contains("inventory streams") && refused.message.contains("hint:"), "{refused}");
    let mut modest = shard.shard.watch_inventory(&shard.ctx, watch("modest")).await.expect("room is left");
    assert!(modest.next().await.unwrap().unwrap().reset);
    drop(modest);
    unread.truncate(1);
    // Without news there is a digest every five seconds.
    assert!(stalled(&shard, "watch", unread.pop().unwrap()).await >= 2);
    shard.settled("its place is free", |stats| stats.tenants.tenants <= 1).await;
    assert!(greedy().await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn tiles_on_all_listeners_of_a_shard_are_added_up() {
    let served = Served::new(limits()).await;
    let more = served.fixture.tasks.child();
    let addresses = [served.address.clone(), listen(&served.fixture, &more).await];
    let other_host = GrpcOptions { shm_arena_bytes: 0, ..GrpcOptions::default() };
    let mut clients = Vec::new();
    for (name, address) in (1..).zip(&addresses) {
        let client = GrpcConnector::new(other_host.clone()).shard(address).expect("an address");
        let (tiles, mut acks) = served.begin(&client, "").await.expect("a put stream");
        for tile in block(name) {
            tiles.send(tile).await.expect("the shard reads");
        }
        assert_eq!(acks.next().await.expect("an answer").expect("no error").outcome, PutOutcome::Stored);
        clients.push((client, tiles, acks));
    }
    assert!(served.scraped("longshore_kvstore_tile_connections 2"), "{}", served.fixture.metrics.encode());
    drop(clients.pop());
    more.drain(PATIENCE).await;
    let gone = || served.scraped("longshore_kvstore_tile_connections 1");
    served.fixture.settled("the listener that is over counts no more", |_| gone()).await;
    // Only one that begins later makes it forgotten; what it refused is not.
    listen(&served.fixture, &served.fixture.tasks).await;
    assert!(served.scraped("longshore_kvstore_tile_connections 1"));
    for counter in
        ["tile_streams_refused", "unread_connections", "exchanged_partials_bytes", "attend_epochs_lost"]
    {
        let line = format!("longshore_kvstore_{counter}_total 0");
        assert!(served.scraped(&line), "{}", served.fixture.metrics.encode());
    }
}
