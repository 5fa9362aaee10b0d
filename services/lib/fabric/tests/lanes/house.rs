//! The fakes behind a lane.

use std::{sync::Arc, time::Duration};

use longshore_fabric::{
    AnyConnector, Connector, Error, GrpcConnector, GrpcOptions, Inference, LocalConnector, Shard,
    TcpPatience, TileTraffic, baseline,
    server::{Readiness, ServerOptions, Services, serve},
};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::{
    fake::{FakeRouter, FakeShard, Served},
    gpu::Net,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    Local,
    Shm,
    /// Over ranks that are none: no GPU, no NCCL.
    Nccl,
    Tcp,
    Grpc,
    /// The generated client against our server.
    StockClient,
    /// Our client against the generated server.
    StockServer,
}

/// Long enough for any machine; no test that passes waits for it.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// Where no test is about waiting: a lane must not be given up because the machine is busy.
pub(crate) fn patient() -> TcpPatience {
    TcpPatience { read: LONG, write: LONG, hello: LONG, ..TcpPatience::default() }
}

/// Lanes to services that clients reach.
pub(crate) const LANES: [Lane; 2] = [Lane::Local, Lane::Grpc];
/// Lanes to shards.
pub(crate) const SHARD_LANES: [Lane; 7] =
    [Lane::Local, Lane::Shm, Lane::Nccl, Lane::Tcp, Lane::Grpc, Lane::StockClient, Lane::StockServer];

/// The fakes, served over one lane.
pub(crate) struct House {
    pub(crate) shard: Arc<FakeShard>,
    pub(crate) router: Arc<FakeRouter>,
    pub(crate) connector: AnyConnector,
    /// The client where the connector would choose another lane.
    client: Option<Arc<dyn Shard>>,
    pub(crate) address: String,
    pub(crate) shutdown: CancellationToken,
    pub(crate) readiness: Option<Readiness>,
    /// The tiles of its listener.
    pub(crate) traffic: TileTraffic,
    pub(crate) served: JoinSet<Result<(), Error>>,
}

impl House {
    pub(crate) async fn new(lane: Lane) -> Self {
        let options = ServerOptions { tcp_patience: patient(), ..ServerOptions::default() };
        Self::with(lane, FakeRouter::default(), options).await
    }

    pub(crate) async fn with(lane: Lane, router: FakeRouter, options: ServerOptions) -> Self {
        let net = Arc::new(Net::default());
        let options = match lane {
            Lane::Nccl => ServerOptions { nccl: Some(net.gpu()), nccl_members_max: 128, ..options },
            _ => options,
        };
        let (shard, router) = (Arc::new(FakeShard::default()), Arc::new(router));
        let local = LocalConnector::new();
        let grpc = GrpcConnector::new(plain());
        let connector = AnyConnector::new(local.clone(), grpc);
        let shutdown = CancellationToken::new();
        let mut served = JoinSet::new();
        let mut traffic = TileTraffic::default();
        let (address, readiness) = match lane {
            Lane::Local => {
                local.add_shard("fake", Arc::new(Served(Arc::clone(&shard))));
                local.add_inference("fake", Arc::new(Served(Arc::clone(&router))));
                local.add_describer("fake", Arc::new(Served(Arc::clone(&router))));
                ("local:fake".to_owned(), None)
            }
            Lane::StockServer => {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                let address = format!("http://{}", listener.local_addr().unwrap());
                let shard = Arc::new(Served(Arc::clone(&shard)));
                served.spawn(baseline::serve(listener, shard, shutdown.clone()));
                (address, None)
            }
            Lane::Shm | Lane::Nccl | Lane::Tcp | Lane::Grpc | Lane::StockClient => {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                let address = format!("http://{}", listener.local_addr().unwrap());
                let services = Services::new(options)
                    .shard(Arc::new(Served(Arc::clone(&shard))))
                    .inference(Arc::new(Served(Arc::clone(&router))))
                    .describer(Arc::new(Served(Arc::clone(&router))));
                let readiness = services.readiness();
                traffic = services.tile_traffic();
                served.spawn(serve(listener, services, shutdown.clone()));
                (address, Some(readiness))
            }
        };
        let client = match lane {
            Lane::Shm => {
                let shm = GrpcConnector::new(GrpcOptions::default());
                Some(connected(&shm, &address).await)
            }
            Lane::Nccl => {
                let nccl = GrpcConnector::new(over_nccl(&net));
                Some(nccl.nccl_shard(&address).unwrap())
            }
            Lane::Tcp => Some(GrpcConnector::new(over_tcp()).tcp_shard(&address).unwrap()),
            Lane::StockClient => Some(baseline::shard(&address).unwrap()),
            Lane::Local | Lane::Grpc | Lane::StockServer => None,
        };
        Self { shard, router, connector, client, address, shutdown, readiness, traffic, served }
    }

    pub(crate) fn client(&self) -> Arc<dyn Shard> {
        self.client.clone().unwrap_or_else(|| self.connector.shard(&self.address).unwrap())
    }

    pub(crate) fn front(&self) -> Arc<dyn Inference> {
        self.connector.inference(&self.address).unwrap()
    }

    /// A stuck call must notice that its caller went away.
    pub(crate) async fn expect_gone(&self) {
        tokio::time::timeout(LONG, self.shard.gone.notified()).await.expect("the service noticed");
    }

    /// Waits until the service has a first call of those whose context it notes.
    pub(crate) async fn called(&self) {
        let called = async {
            while self.shard.seen.lock().unwrap().is_none() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LONG, called).await.expect("the call came");
    }
}

/// Options of clients that know no other lane than `grpc`.
pub(crate) fn plain() -> GrpcOptions {
    GrpcOptions { shm_arena_bytes: 0, tcp_connections_max: 0, ..GrpcOptions::default() }
}

/// Options of clients that know the lanes `tcp` and `grpc`.
pub(crate) fn over_tcp() -> GrpcOptions {
    GrpcOptions { shm_arena_bytes: 0, tcp_patience: patient(), ..GrpcOptions::default() }
}

/// Options of clients that know the lanes `nccl` and `grpc`.
pub(crate) fn over_nccl(net: &Arc<Net>) -> GrpcOptions {
    GrpcOptions { nccl: Some(net.gpu()), nccl_ends_max: 32, tcp_patience: patient(), ..plain() }
}

/// The server's task opens its sockets some time after it was spawned.
async fn connected(connector: &GrpcConnector, address: &str) -> Arc<dyn Shard> {
    for _ in 0..6_000 {
        if let Ok(shard) = connector.shm_shard(address).await {
            return shard;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    connector.shm_shard(address).await.expect("the server listens within a minute")
}
