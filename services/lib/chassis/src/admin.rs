//! The admin listener: liveness, readiness, metrics and the effective configuration. Its own port, never the data path's.

mod connection;
mod readiness;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use tokio::net::TcpListener;

use crate::{Metrics, Tasks, metrics::CONTENT_TYPE};

use connection::Bounded;
pub use readiness::Readiness;

/// Connections of the admin listener at one time.
const CONNECTIONS_MAX: usize = 64;
/// A connection that sends nothing for this long is closed, so that idle ones cannot keep probes out.
const IDLE_MAX: Duration = Duration::from_secs(30);

/// What the admin listener shows.
#[derive(Debug, Clone)]
pub struct Admin {
    /// Answers `/readyz`.
    pub readiness: Readiness,
    /// Answers `/metrics`.
    pub metrics: Metrics,
    /// Answers `/config`: the effective configuration as [`crate::render`] prints it.
    pub config: String,
}

impl Admin {
    /// Serves until `tasks` is cancelled. Give it an owner that outlives the drain of the service, so that probes see it.
    pub fn serve(self, listener: TcpListener, tasks: &Tasks) {
        let listener = Bounded::new(listener, CONNECTIONS_MAX, IDLE_MAX);
        let server = axum::serve(listener, self.routes()).with_graceful_shutdown(tasks.cancelled());
        tasks.spawn_critical("admin", async move { server.await });
    }

    fn routes(self) -> Router {
        Router::new()
            .route("/healthz", get(healthz))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .route("/config", get(config))
            .with_state(Arc::new(self))
    }
}

/// Alive means that the reactor answers.
async fn healthz() -> &'static str {
    "ok\n"
}

async fn readyz(State(admin): State<Arc<Admin>>) -> impl IntoResponse {
    let reasons = admin.readiness.reasons();
    if reasons.is_empty() {
        return (StatusCode::OK, "ready\n".to_owned());
    }
    let lines: String = reasons.iter().map(|(part, reason)| format!("{part}: {reason}\n")).collect();
    (StatusCode::SERVICE_UNAVAILABLE, lines)
}

async fn metrics(State(admin): State<Arc<Admin>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], admin.metrics.encode())
}

async fn config(State(admin): State<Arc<Admin>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/toml; charset=utf-8")], admin.config.clone())
}
