//! The wire adapter: `InferenceService` and `ClusterService` of a router. The conversions themselves live beside the lane
//! that undoes them, in `longshore-fabric`.

use std::sync::Arc;

use longshore_fabric::server::Services;

use crate::Router;

/// Adds what a router serves to a gRPC listener.
pub fn serve_on(services: Services, router: &Router) -> Services {
    services.inference(Arc::new(router.clone())).describer(Arc::new(router.clone()))
}

#[cfg(test)]
mod tests;
