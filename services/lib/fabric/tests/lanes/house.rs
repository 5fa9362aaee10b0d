//! The fakes behind a lane.

use std::{sync::Arc, time::Duration};

use longshore_fabric::{
    AnyConnector, Connector, Error, GrpcConnector, GrpcOptions, Inference, LocalConnector, Shard,
    server::{Readiness, ServerOptions, Services, serve},
};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::fake::{FakeRouter, FakeShard, Served};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    Local,
    Grpc,
}

pub(crate) const LANES: [Lane; 2] = [Lane::Local, Lane::Grpc];

/// The fakes, served over one lane.
pub(crate) struct House {
    pub(crate) shard: Arc<FakeShard>,
    pub(crate) router: Arc<FakeRouter>,
    pub(crate) connector: AnyConnector,
    pub(crate) address: String,
    pub(crate) shutdown: CancellationToken,
    pub(crate) readiness: Option<Readiness>,
    pub(crate) served: JoinSet<Result<(), Error>>,
}

impl House {
    pub(crate) async fn new(lane: Lane) -> Self {
        Self::with(lane, FakeRouter::default(), ServerOptions::default()).await
    }

    pub(crate) async fn with(lane: Lane, router: FakeRouter, options: ServerOptions) -> Self {
        let (shard, router) = (Arc::new(FakeShard::default()), Arc::new(router));
        let local = LocalConnector::new();
        let connector = AnyConnector::new(local.clone(), GrpcConnector::new(GrpcOptions::default()));
        let shutdown = CancellationToken::new();
        let mut served = JoinSet::new();
        let (address, readiness) = match lane {
            Lane::Local => {
                local.add_shard("fake", Arc::new(Served(Arc::clone(&shard))));
                local.add_inference("fake", Arc::new(Served(Arc::clone(&router))));
                local.add_describer("fake", Arc::new(Served(Arc::clone(&router))));
                ("local:fake".to_owned(), None)
            }
            Lane::Grpc => {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                let address = format!("http://{}", listener.local_addr().unwrap());
                let services = Services::new(options)
                    .shard(Arc::new(Served(Arc::clone(&shard))))
                    .inference(Arc::new(Served(Arc::clone(&router))))
                    .describer(Arc::new(Served(Arc::clone(&router))));
                let readiness = services.readiness();
                served.spawn(serve(listener, services, shutdown.clone()));
                (address, Some(readiness))
            }
        };
        Self { shard, router, connector, address, shutdown, readiness, served }
    }

    pub(crate) fn client(&self) -> Arc<dyn Shard> {
        self.connector.shard(&self.address).unwrap()
    }

    pub(crate) fn front(&self) -> Arc<dyn Inference> {
        self.connector.inference(&self.address).unwrap()
    }

    /// A stuck call must notice soon that its caller went away.
    pub(crate) async fn expect_gone(&self) {
        tokio::time::timeout(Duration::from_secs(5), self.shard.gone.notified())
            .await
            .expect("the service noticed");
    }
}
