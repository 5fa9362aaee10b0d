//! Wire adapter: puts a worker behind `longshore.v1.PrefillService`.

use std::sync::Arc;

use longshore_fabric::server::Services;

use crate::PrefillWorker;

/// Adds the worker to a gRPC listener.
pub fn serve(services: Services, worker: Arc<PrefillWorker>) -> Services {
    services.prefiller(worker)
}
