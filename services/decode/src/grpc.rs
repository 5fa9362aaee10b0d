//! Wire adapter: puts a worker behind `longshore.v1.DecodeService`.

use std::sync::Arc;

use longshore_fabric::server::Services;

use crate::DecodeWorker;

/// Adds the worker to a gRPC listener.
pub fn serve(services: Services, worker: Arc<DecodeWorker>) -> Services {
    services.decoder(worker)
}
