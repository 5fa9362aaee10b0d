//! The shard on the wire: names which gRPC services it offers. The adapter itself is `longshore-fabric`'s.

use std::sync::Arc;

use longshore_fabric::server::Services;

use crate::KvStore;

/// Serves `KvStoreService` from `shard` beside whatever `services` has already. The shard's metrics add up the
/// tiles of all listeners that serve it.
pub fn serve(services: Services, shard: Arc<KvStore>) -> Services {
    shard.show_tiles(services.tile_traffic());
    services.shard(shard)
}
