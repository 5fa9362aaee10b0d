//! The listener over a real socket.

use std::{net::SocketAddr, time::Instant};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::*;
use crate::{bind, reserve, telemetry::LogCounters};

/// Long enough for any machine; no test waits for it.
const LONG: Duration = Duration::from_secs(60);

async fn start(tasks: &Tasks, readiness: Readiness) -> SocketAddr {
    start_at(([127, 0, 0, 1], 0).into(), tasks, readiness).await
}

async fn start_at(address: SocketAddr, tasks: &Tasks, readiness: Readiness) -> SocketAddr {
    let (listener, address) = bind(&address.to_string()).await.unwrap();
    let metrics = Metrics::new();
    LogCounters::default().register(&metrics);
    Admin { readiness, metrics, config: "port = 1\n".into() }.serve(listener, tasks);
    address
}

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn every_page_answers() {
    let tasks = Tasks::new();
    // Nobody else listens there once this one is closed.
    let reserved = reserve("127.0.0.1:0").await.unwrap();
    let address = start_at(reserved.address(), &tasks, Readiness::new(tasks.token())).await;
    assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
    assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 200"));
    let metrics = get(address, "/metrics").await;
    assert!(metrics.contains("application/openmetrics-text; version=1.0.0"), "{metrics}");
    assert!(metrics.contains("longshore_log_errors_total 0"), "{metrics}");
    assert!(get(address, "/config").await.ends_with("port = 1\n"));
    assert!(get(address, "/other").await.starts_with("HTTP/1.1 404"));
    assert!(tasks.drain(LONG).await.is_empty());
    assert!(TcpStream::connect(address).await.is_err(), "the listener is closed");
}

#[tokio::test]
async fn readiness_names_its_reasons() {
    let (admin_tasks, service) = (Tasks::new(), Tasks::new());
    let readiness = Readiness::new(service.token());
    let address = start(&admin_tasks, readiness.clone()).await;
    readiness.wait_for("model", "loads");
    readiness.wait_for("shards", "2 of 3 are reached");
    let answer = get(address, "/readyz").await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(answer.ends_with("model: loads\nshards: 2 of 3 are reached\n"), "{answer}");
    readiness.ready("model");
    readiness.ready("shards");
    assert!(readiness.is_ready());
    service.cancel();
    let answer = get(address, "/readyz").await;
    assert!(answer.contains("503") && answer.ends_with("drain: the process ends\n"), "{answer}");
    admin_tasks.drain(LONG).await;
}

#[tokio::test]
async fn connections_are_bounded_and_idle_ones_make_room() {
    let tasks = Tasks::new();
    let (listener, address) = bind("127.0.0.1:0").await.unwrap();
    let admin =
        Admin { readiness: Readiness::new(tasks.token()), metrics: Metrics::new(), config: String::new() };
    let listener = Bounded::new(listener, 2, Duration::from_millis(300));
    let server = axum::serve(listener, admin.routes()).with_graceful_shutdown(tasks.cancelled());
    tasks.spawn_critical("admin", async move { server.await });

    // Before they connect: their time begins when they are accepted, which may be long before this goes on.
    let started = Instant::now();
    let mut idle = TcpStream::connect(address).await.unwrap();
    let mut half = TcpStream::connect(address).await.unwrap();
    half.write_all(b"GET /healthz HTTP/1.1\r\n").await.unwrap();
    // Waits in the backlog until the idle ones are closed.
    assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
    assert!(started.elapsed() >= Duration::from_millis(200), "{:?}", started.elapsed());
    let mut rest = Vec::new();
    drop(idle.read_to_end(&mut rest).await);
    drop(half.read_to_end(&mut rest).await);
    assert!(tasks.drain(LONG).await.is_empty());
}
