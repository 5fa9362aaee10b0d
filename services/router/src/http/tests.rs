//! OpenAI HTTP over real sockets, in front of fakes.

mod answers;
mod refusals;

use std::net::SocketAddr;

use reqwest::{Client, Response};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use crate::fixture::{Fixture, Options};

/// A listener in front of a fixture.
struct Server {
    fixture: Fixture,
    address: SocketAddr,
    client: Client,
}

impl Server {
    async fn new(options: Options) -> Self {
        let fixture = Fixture::new(options);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (router, tasks) = (fixture.router.clone(), fixture.tasks.child());
        fixture.tasks.spawn("http", super::serve(listener, router, tasks));
        Self { fixture, address, client: Client::new() }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    async fn get(&self, path: &str) -> Response {
        self.client.get(self.url(path)).send().await.unwrap()
    }

    async fn post(&self, path: &str, body: impl Into<reqwest::Body>) -> Response {
        self.client.post(self.url(path)).body(body).send().await.unwrap()
    }

    async fn completion(&self, body: &Value) -> Response {
        self.post("/v1/completions", body.to_string()).await
    }

    async fn chat(&self, body: &Value) -> Response {
        self.post("/v1/chat/completions", body.to_string()).await
    }

    /// Sends bytes as they are and reads until the server closes the connection.
    async fn raw(&self, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }
}

async fn value(response: Response) -> Value {
    assert_eq!(response.headers()["content-type"], "application/json");
    response.json().await.unwrap()
}

/// Data of the events of a stream, comments left out; the last one must be `[DONE]`.
async fn events(response: Response) -> Vec<Value> {
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let text = response.text().await.unwrap();
    let mut data: Vec<&str> = text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
    assert_eq!(data.pop(), Some("[DONE]"), "{text}");
    data.into_iter().map(|data| serde_json::from_str(data).unwrap()).collect()
}

/// Checks the shape of an error and gives (status, code, param, message).
async fn error(response: Response) -> (u16, String, Value, String) {
    let status = response.status().as_u16();
    assert!(response.headers().contains_key("x-request-id"));
    let body = value(response).await;
    let error = body["error"].as_object().unwrap();
    assert_eq!(error.len(), 4, "{body}");
    assert!(error["type"].is_string() && error["message"].is_string(), "{body}");
    let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
    (status, text("code"), error["param"].clone(), text("message"))
}

fn hello_chat() -> Value {
    json!({ "model": "tiny", "messages": [{ "role": "user", "content": "hello" }] })
}
