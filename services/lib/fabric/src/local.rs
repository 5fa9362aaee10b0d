//! The `local` lane: the service traits called directly, with the cancellation and deadlines of a real lane.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

use crate::{Code, Connector, Decoder, Describer, Error, GrpcConnector, Inference, Prefiller, Shard};

mod lanes;

use lanes::Local;

/// Scheme of local addresses.
const SCHEME: &str = "local:";

/// Services of this process by id; `local:ID` addresses reach them. Cheap to clone; clones share the registry. Services
/// may be added after clients were made: a call to an id that nobody has registered is `Unavailable`.
#[derive(Debug, Clone, Default)]
pub struct LocalConnector {
    registry: Arc<Registry>,
}

#[derive(Debug, Default)]
struct Registry {
    shards: Slots<dyn Shard>,
    prefillers: Slots<dyn Prefiller>,
    decoders: Slots<dyn Decoder>,
    inferences: Slots<dyn Inference>,
    describers: Slots<dyn Describer>,
}

/// Services of one trait by id.
#[derive(Debug)]
struct Slots<T: ?Sized>(RwLock<HashMap<String, Arc<T>>>);

impl<T: ?Sized> Default for Slots<T> {
    fn default() -> Self {
        Self(RwLock::default())
    }
}

impl<T: ?Sized> Slots<T> {
    fn insert(&self, id: String, service: Arc<T>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(id, service);
    }

    fn remove(&self, id: &str) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(id);
    }

    fn get(&self, id: &str) -> Result<Arc<T>, Error> {
        let slots = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let service = slots.get(id).cloned();
        service.ok_or_else(|| Error::new(Code::Unavailable, format!("nobody serves `{SCHEME}{id}`")))
    }
}

impl LocalConnector {
    /// An empty registry.
    pub fn new() -> Self {
        Self::default()
    }

    /// Serves `local:ID` as a shard; replaces an earlier one.
    pub fn add_shard(&self, id: impl Into<String>, shard: Arc<dyn Shard>) {
        self.registry.shards.insert(id.into(), shard);
    }

    /// Serves `local:ID` as a prefill worker; replaces an earlier one.
    pub fn add_prefiller(&self, id: impl Into<String>, prefiller: Arc<dyn Prefiller>) {
        self.registry.prefillers.insert(id.into(), prefiller);
    }

    /// Serves `local:ID` as a decode worker; replaces an earlier one.
    pub fn add_decoder(&self, id: impl Into<String>, decoder: Arc<dyn Decoder>) {
        self.registry.decoders.insert(id.into(), decoder);
    }

    /// Serves `local:ID` as a router; replaces an earlier one.
    pub fn add_inference(&self, id: impl Into<String>, inference: Arc<dyn Inference>) {
        self.registry.inferences.insert(id.into(), inference);
    }

    /// Lets `local:ID` describe itself; replaces an earlier one.
    pub fn add_describer(&self, id: impl Into<String>, describer: Arc<dyn Describer>) {
        self.registry.describers.insert(id.into(), describer);
    }

    /// Forgets every service of `id`; calls under way go on, new ones are `Unavailable`.
    pub fn remove(&self, id: &str) {
        self.registry.shards.remove(id);
        self.registry.prefillers.remove(id);
        self.registry.decoders.remove(id);
        self.registry.inferences.remove(id);
        self.registry.describers.remove(id);
    }

    fn lane(&self, address: &str) -> Result<Local, Error> {
        match address.strip_prefix(SCHEME) {
            Some(id) if !id.is_empty() => Ok(Local::new(self.registry.clone(), id.to_owned())),
            _ => Err(Error::invalid("address", format!("is `{address}`, must be `{SCHEME}ID`"))),
        }
    }
}

impl Connector for LocalConnector {
    fn shard(&self, address: &str) -> Result<Arc<dyn Shard>, Error> {
        Ok(Arc::new(self.lane(address)?))
    }

    fn prefiller(&self, address: &str) -> Result<Arc<dyn Prefiller>, Error> {
        Ok(Arc::new(self.lane(address)?))
    }

    fn decoder(&self, address: &str) -> Result<Arc<dyn Decoder>, Error> {
        Ok(Arc::new(self.lane(address)?))
    }

    fn inference(&self, address: &str) -> Result<Arc<dyn Inference>, Error> {
        Ok(Arc::new(self.lane(address)?))
    }

    fn describer(&self, address: &str) -> Result<Arc<dyn Describer>, Error> {
        Ok(Arc::new(self.lane(address)?))
    }
}

/// Chooses the lane by the scheme of the address.
#[derive(Debug, Clone)]
pub struct AnyConnector {
    local: LocalConnector,
    grpc: GrpcConnector,
}

impl AnyConnector {
    /// Both lanes.
    pub fn new(local: LocalConnector, grpc: GrpcConnector) -> Self {
        Self { local, grpc }
    }

    fn lane(&self, address: &str) -> &dyn Connector {
        if address.starts_with(SCHEME) { &self.local } else { &self.grpc }
    }
}

impl Connector for AnyConnector {
    fn shard(&self, address: &str) -> Result<Arc<dyn Shard>, Error> {
        self.lane(address).shard(address)
    }

    fn prefiller(&self, address: &str) -> Result<Arc<dyn Prefiller>, Error> {
        self.lane(address).prefiller(address)
    }

    fn decoder(&self, address: &str) -> Result<Arc<dyn Decoder>, Error> {
        self.lane(address).decoder(address)
    }

    fn inference(&self, address: &str) -> Result<Arc<dyn Inference>, Error> {
        self.lane(address).inference(address)
    }

    fn describer(&self, address: &str) -> Result<Arc<dyn Describer>, Error> {
        self.lane(address).describer(address)
    }
}
