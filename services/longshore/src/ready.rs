//! The lines that say what listens where, and how to try it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use longshore_proto::types::ModelDescription;

use crate::console;

/// Prints the ready lines on stdout, the last of them a command to try.
pub(crate) fn announce(model: &ModelDescription, http: &str, grpc: &str, workers: &[String]) {
    let per_token = console::bytes(model.kv_bytes_per_token);
    console::say(format!(
        "longshore {} serves {} ({}, {} positions, {per_token} KV per token)",
        env!("CARGO_PKG_VERSION"),
        model.name,
        model.architecture,
        console::grouped(model.max_context_tokens),
    ));
    if !workers.is_empty() {
        console::say(format!("  processes    {}", workers.join(", ")));
    }
    if !grpc.is_empty() {
        console::say(format!("  gRPC         {}", loopback_url(grpc)));
    }
    if http.is_empty() {
        return;
    }
    let url = loopback_url(http);
    console::say(format!("  OpenAI HTTP  {url}/v1"));
    console::say(format!(
        "ready; try:\n  curl {url}/v1/chat/completions -H 'content-type: application/json' \\\n    \
         -d '{{\"model\":\"{}\",\"temperature\":0,\"messages\":[{{\"role\":\"user\",\"content\":\"What is the capital of France?\"}}]}}'",
        model.name
    ));
}

/// A URL by which this machine reaches what listens at `address`: the wildcard address is reached over loopback.
pub(crate) fn loopback_url(address: &str) -> String {
    let Ok(socket) = address.parse::<SocketAddr>() else {
        return format!("http://{address}");
    };
    let ip = match socket.ip() {
        ip if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        ip => ip,
    };
    format!("http://{}", SocketAddr::new(ip, socket.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_are_reached_over_loopback() {
        assert_eq!(loopback_url("0.0.0.0:9000"), "http://127.0.0.1:9000");
        assert_eq!(loopback_url("[::1]:9000"), "http://[::1]:9000");
        assert_eq!(loopback_url("localhost:9000"), "http://localhost:9000");
    }
}
