//! The listener: accepts connections within a limit, gives headers a deadline, and ends with the process.

use std::{sync::Arc, time::Duration};

use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use longshore_chassis::Tasks;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};

use super::stall::WriteStall;
use crate::Router;

/// Pause after a failed accept, which mostly means that file descriptors ran out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A client's time for each step.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// From the first byte of a request's headers, or from the last answer, to their end.
    header: Duration,
    /// For taking anything of what is written.
    stall: Duration,
}

/// Serves OpenAI HTTP until `tasks` is cancelled. Connections are tasks of `tasks`: answers under way go on for the
/// router's `drain_ms`, idle connections close at once.
pub async fn serve(listener: TcpListener, router: Router, tasks: Tasks) {
    let config = router.config().http.clone();
    let connections = Arc::new(Semaphore::new(config.connections_max as usize));
    let limits = Limits {
        header: Duration::from_millis(config.header_timeout_ms),
        stall: Duration::from_millis(router.config().client_stall_ms),
    };
    let app = super::app(router);
    loop {
        let accepted = async {
            let permit = Arc::clone(&connections).acquire_owned().await;
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            () = tasks.cancelled() => return,
            accepted = accepted => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let (app, own) = (app.clone(), tasks.clone());
                tasks.spawn("http connection", async move {
                    let _permit = permit;
                    connection(stream, app, limits, own).await;
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, app: axum::Router, limits: Limits, tasks: Tasks) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "no TCP_NODELAY");
    }
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(limits.header);
    let stream = TokioIo::new(WriteStall::new(stream, limits.stall));
    let connection = builder.serve_connection(stream, TowerToHyperService::new(app));
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = tasks.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "connection ended");
    }
}
