//! The life of a listener: accept, tell health, drain, cut off.

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use longshore_proto::v1;
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic_health::{
    ServingStatus,
    server::{HealthReporter, health_reporter},
};
use tonic_reflection::server::Builder as Reflection;
use tower::util::MapResponseLayer;

use super::{ServerOptions, Services, call::Desk, refusal, socket, unread::Unread};
use crate::{Code, Error, shm, tcp, tcp::Door};

/// How long connections may take to flush the ends of their last calls.
const FLUSH: Duration = Duration::from_millis(500);
const HEALTH: &str = "grpc.health.v1.Health";

/// Serves until `shutdown` fired and the calls under way ended. From then on health says that this listener wants no
/// work, new connections are refused, and calls that outlast the drain timeout are cut off.
pub async fn serve(
    listener: TcpListener,
    services: Services,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let Services { options, mut routes, names, desk, readiness, door, traffic } = services;
    let (reporter, health) = health_reporter();
    routes.add_service(health);
    let reflection = || names.iter().fold(reflection(), |builder, name| builder.with_service_name(*name));
    routes.add_service(reflection().build_v1().map_err(internal)?);
    routes.add_service(reflection().build_v1alpha().map_err(internal)?);
    tell(&reporter, &names, "liveness", true).await;

    let sever = CancellationToken::new();
    let beside = shm_listener(&listener, &options);
    let tiles = tile_listener(&listener, &options, door).await;
    let sockets = socket::accept(listener, options.connections_max, sever.clone()).boxed();
    let sockets = match beside {
        Some(beside) => {
            let (bytes, connections) = (options.shm_arena_bytes, options.connections_max);
            let beside = socket::accept_shm(beside, bytes, connections, sever.clone());
            futures::stream::select(sockets, beside).boxed()
        }
        None => sockets,
    };
    let unread = Unread::new(options.unread_patience, traffic);
    let server = builder(&options)
        .layer(unread.clone())
        .layer(MapResponseLayer::new(refusal::reword))
        .add_routes(routes.routes())
        .serve_with_incoming_shutdown(sockets, shutdown.clone().cancelled_owned());
    let attendants = async {
        let health = tell_health(&reporter, &names, readiness.ready.subscribe(), &shutdown);
        let tiles = async {
            if let Some((listener, door)) = tiles {
                tcp::serve(listener, door, sever.clone()).await;
            }
        };
        let drain = drain(&desk, options.drain_timeout, &shutdown, &sever);
        tokio::select! {
            ((), (), ()) = async { tokio::join!(health, drain, tiles) } => {}
            () = unread.watch() => {}
        }
        // The server ends by itself once its sockets are cut off.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        served = server => served.map_err(internal),
        () = attendants => Ok(()),
    }
}

/// The socket of the `shm` lane. Without it everybody uses `grpc`.
fn shm_listener(listener: &TcpListener, options: &ServerOptions) -> Option<tokio::net::UnixListener> {
    if options.shm_arena_bytes == 0 {
        return None;
    }
    let opened = listener.local_addr().and_then(shm::listen);
    opened.inspect_err(|error| tracing::warn!(%error, "no shm lane beside this listener")).ok()
}

/// The port of the `tcp` lane, at the address of the listener. Without it everybody uses `grpc`.
async fn tile_listener(
    listener: &TcpListener,
    options: &ServerOptions,
    door: Option<Arc<Door>>,
) -> Option<(TcpListener, Arc<Door>)> {
    let door = door?;
    let opening = async {
        let opened = TcpListener::bind((listener.local_addr()?.ip(), options.tcp_port)).await?;
        std::io::Result::Ok((opened.local_addr()?.port(), opened))
    };
    match opening.await {
        Ok((port, opened)) => {
            door.open(port);
            Some((opened, door))
        }
        Err(error) => {
            tracing::warn!(%error, port = options.tcp_port, "no tcp lane beside this listener");
            None
        }
    }
}

fn internal(error: impl std::error::Error) -> Error {
    Error::new(Code::Internal, format!("the gRPC listener failed: {error}"))
}

fn reflection() -> Reflection<'static> {
    Reflection::configure()
        .register_encoded_file_descriptor_set(v1::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .with_service_name(HEALTH)
}

fn builder(options: &ServerOptions) -> Server {
    Server::builder()
        .initial_stream_window_size(options.stream_window_bytes)
        .initial_connection_window_size(options.connection_window_bytes)
        .max_concurrent_streams(options.streams_max)
        .max_frame_size(options.frame_bytes_max)
        .http2_max_header_list_size(options.header_bytes_max)
        .http2_keepalive_interval(Some(options.keepalive_interval))
        .http2_keepalive_timeout(Some(options.keepalive_timeout))
}

async fn tell(reporter: &HealthReporter, names: &[&'static str], extra: &str, serving: bool) {
    let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
    for name in names.iter().copied().chain(["", HEALTH, extra]) {
        reporter.set_service_status(name, status).await;
    }
}

/// Passes readiness on until the shutdown, which is the end of it.
async fn tell_health(
    reporter: &HealthReporter,
    names: &[&'static str],
    mut ready: watch::Receiver<bool>,
    shutdown: &CancellationToken,
) {
    loop {
        let wanted = *ready.borrow_and_update() && !shutdown.is_cancelled();
        tell(reporter, names, "readiness", wanted).await;
        if shutdown.is_cancelled() {
            return;
        }
        tokio::select! {
            () = shutdown.cancelled() => {}
            changed = ready.changed() => if changed.is_err() {
                shutdown.cancelled().await;
            },
        }
    }
}

/// Waits for the calls under way, then cuts off what is left.
async fn drain(desk: &Desk, timeout: Duration, shutdown: &CancellationToken, sever: &CancellationToken) {
    shutdown.cancelled().await;
    desk.draining.cancel();
    desk.calls.close();
    if tokio::time::timeout(timeout, desk.calls.wait()).await.is_err() {
        tracing::warn!(calls = desk.calls.len(), "calls outlasted the drain and are cut off");
    }
    tokio::time::sleep(FLUSH).await;
    sever.cancel();
}
