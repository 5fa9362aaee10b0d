//! The listener: accepts connections within a limit, gives headers a deadline, and ends with the process.

use std::{sync::Arc, time::Duration};

use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use longshore_chassis::Tasks;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
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
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "no TCP_NODELAY");
                }
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

/// Answers the requests of one connection until either side ends it.
async fn connection<S>(stream: S, app: axum::Router, limits: Limits, tasks: Tasks)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
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

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tokio::io::AsyncWriteExt as _;

    use super::*;
    use crate::fixture::{Fixture, Options};

    /// Sockets of the kernel hold too much for a test, so the client is a short pipe.
    #[tokio::test]
    async fn a_client_that_reads_nothing_loses_its_connection() {
        for stream in [true, false] {
            let fixture = Fixture::new(Options::default());
            let (mut client, server) = tokio::io::duplex(1_024);
            let limits = Limits { header: Duration::from_secs(60), stall: Duration::from_millis(100) };
            let app = super::super::app(fixture.router.clone());
            let body = json!({ "model": "tiny", "prompt": "a", "max_tokens": 1_000, "stream": stream });
            let body = body.to_string();
            let head = format!("POST /v1/completions HTTP/1.1\r\ncontent-length: {}\r\n\r\n", body.len());
            client.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
            let served = connection(server, app, limits, fixture.tasks.clone());
            tokio::time::timeout(Duration::from_secs(60), served).await.expect("the connection ends");
            Fixture::eventually("room for others", || fixture.metrics.in_flight.get() == 0).await;
            assert_eq!(fixture.decoders[0].calls().len(), 1);
            drop(client);
        }
    }
}
