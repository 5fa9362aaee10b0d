//! gRPC servers: listeners with health, reflection, limits and graceful shutdown, and the adapters from the generated
//! service traits to ours. A service crate hands over its trait object and never sees a status.

mod attend;
mod budget;
mod call;
mod exchanged;
mod front;
mod options;
mod pump;
mod refusal;
mod run;
mod shard;
mod socket;
mod streamed;
mod tiles;
mod unread;
mod workers;

use std::{pin::Pin, sync::Arc};

use futures::{Stream, StreamExt};
use longshore_proto::v1::{
    cluster_service_server::ClusterServiceServer, decode_service_server::DecodeServiceServer,
    inference_service_server::InferenceServiceServer, kv_store_service_server::KvStoreService,
    prefill_service_server::PrefillServiceServer,
};
use tokio::sync::watch;
use tonic::{Response, Status, server::NamedService, service::RoutesBuilder};

use crate::{
    BoxStream, Decoder, Describer, Inference, Prefiller, Shard, TileTraffic,
    nccl::Convener,
    tcp::{Buffers, Door},
};

pub(crate) use budget::Peer;
pub(crate) use call::{REQUEST_ID, TRACEPARENT};
pub use options::ServerOptions;
pub use run::serve;

/// What a listener serves. Health (`""`, `liveness`, `readiness` and every service by name) and reflection are always there.
#[derive(Debug)]
pub struct Services {
    options: ServerOptions,
    routes: RoutesBuilder,
    names: Vec<&'static str>,
    desk: call::Desk,
    readiness: Readiness,
    /// The tile connections of its shard, where it has one and offers them.
    door: Option<Arc<Door>>,
    traffic: TileTraffic,
}

impl Services {
    /// Nothing but health and reflection.
    pub fn new(options: ServerOptions) -> Self {
        Self {
            options,
            routes: RoutesBuilder::default(),
            names: Vec::new(),
            desk: call::Desk::default(),
            readiness: Readiness { ready: Arc::new(watch::Sender::new(true)) },
            door: None,
            traffic: TileTraffic::default(),
        }
    }

    /// Serves `KvStoreService`.
    pub fn shard(mut self, shard: Arc<dyn Shard>) -> Self {
        let limit = self.options.message_bytes_max;
        if self.options.tcp_connections_max > 0 {
            let options = &self.options;
            let (connections_max, patience) = (options.tcp_connections_max, options.tcp_patience);
            self.door = Some(Arc::new(Door::new(connections_max, limit, patience, self.traffic.clone())));
        }
        let service = shard::ShardService {
            shard,
            desk: self.desk.clone(),
            door: self.door.clone(),
            convener: convener(&self.options),
            buffers: Buffers::default(),
            traffic: self.traffic.clone(),
        };
        let budget = budget::Budget::new(&self.options, self.traffic.clone());
        self.add(tiles::TileService::new(service, budget, &self.options));
        self
    }

    /// Serves `PrefillService`.
    pub fn prefiller(mut self, prefiller: Arc<dyn Prefiller>) -> Self {
        let limit = self.options.message_bytes_max;
        let service =
            PrefillServiceServer::new(workers::PrefillerService { prefiller, desk: self.desk.clone() });
        self.add(service.max_decoding_message_size(limit).max_encoding_message_size(limit));
        self
    }

    /// Serves `DecodeService`.
    pub fn decoder(mut self, decoder: Arc<dyn Decoder>) -> Self {
        let limit = self.options.message_bytes_max;
        let service = DecodeServiceServer::new(workers::DecoderService { decoder, desk: self.desk.clone() });
        self.add(service.max_decoding_message_size(limit).max_encoding_message_size(limit));
        self
    }

    /// Serves `InferenceService`.
    pub fn inference(mut self, inference: Arc<dyn Inference>) -> Self {
        let limit = self.options.inference_message_bytes_max;
        let service =
            InferenceServiceServer::new(front::InferenceFront { inference, desk: self.desk.clone() });
        self.add(service.max_decoding_message_size(limit).max_encoding_message_size(limit));
        self
    }

    /// Serves `ClusterService`.
    pub fn describer(mut self, describer: Arc<dyn Describer>) -> Self {
        let limit = self.options.message_bytes_max;
        let service = ClusterServiceServer::new(front::ClusterFront { describer, desk: self.desk.clone() });
        self.add(service.max_decoding_message_size(limit).max_encoding_message_size(limit));
        self
    }

    /// The switch of this listener's readiness; ready until told otherwise.
    pub fn readiness(&self) -> Readiness {
        self.readiness.clone()
    }

    /// The tiles of this listener, as long as it lives.
    pub fn tile_traffic(&self) -> TileTraffic {
        self.traffic.clone()
    }

    fn add<S>(&mut self, service: S)
    where
        S: tower::Service<
                http::Request<tonic::body::Body>,
                Response = http::Response<tonic::body::Body>,
                Error = std::convert::Infallible,
            > + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
    {
        self.names.push(S::NAME);
        self.routes.add_service(service);
    }
}

/// Says whether a listener wants work, as `grpc.health.v1` tells it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Readiness {
    ready: Arc<watch::Sender<bool>>,
}

impl Readiness {
    /// Serving or not: `""`, `readiness` and every service by name. `liveness` stays as it is.
    pub fn set(&self, ready: bool) {
        self.ready.send_replace(ready);
    }
}

/// The adapter that the generated server wants, apart from any listener of ours.
pub(crate) fn stock(shard: Arc<dyn Shard>) -> impl KvStoreService {
    let (desk, buffers, traffic) = (call::Desk::default(), Buffers::default(), TileTraffic::default());
    shard::ShardService { shard, desk, door: None, convener: None, buffers, traffic }
}

/// Who hands out epochs of the lane `nccl`, where there is such a lane.
fn convener(options: &ServerOptions) -> Option<Arc<Convener>> {
    let lanes = Arc::clone(options.nccl.as_ref()?);
    let convener = Convener::new(lanes, options.nccl_members_max, options.tcp_patience);
    convener.inspect_err(|error| tracing::warn!(%error, "no nccl lane at this listener")).ok().map(Arc::new)
}

/// A response stream as tonic wants it.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn answer<A, T>(answers: BoxStream<A>) -> Response<Answers<T>>
where
    A: Into<T> + Send + 'static,
    T: Send + 'static,
{
    Response::new(Box::pin(answers.map(|answer| answer.map(Into::into).map_err(Status::from))))
}
