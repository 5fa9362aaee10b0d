//! Opens listeners, with errors that say what to do.

use std::{io, net::SocketAddr};

use tokio::net::{TcpListener, lookup_host};

use crate::Error;

const HINT_FORM: &str = "write `host:port`, for example `127.0.0.1:9000`, or port 0 for any free port";

/// Checks the form of a listen address without looking anything up; the problem is a verb phrase for
/// [`crate::Fault::problem`].
pub fn check(address: &str) -> Result<(), String> {
    let problem = |what: &str| format!("is `{address}`, {what}, hint: {HINT_FORM}");
    let Some((host, port)) = address.rsplit_once(':') else {
        return Err(problem("which has no port"));
    };
    if host.is_empty() {
        return Err(problem("which has no host"));
    }
    if port.parse::<u16>().is_err() || !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(problem("whose port is no number from 0 to 65535"));
    }
    let bracketed = host.starts_with('[') && host.ends_with(']');
    if host.contains(':') && !bracketed {
        return Err(problem("whose IPv6 host lacks its brackets"));
    }
    if host.contains('/') || host.chars().any(char::is_whitespace) {
        return Err(problem("whose host is no name or address"));
    }
    Ok(())
}

/// Listens on `host:port`; port 0 takes any free one. Returns the listener and the address that it got.
pub async fn bind(address: &str) -> Result<(TcpListener, SocketAddr), Error> {
    let fail = |problem: String, hint| Error::Address { address: address.to_owned(), problem, hint };
    if check(address).is_err() {
        return Err(fail("it is not of the form `host:port`".to_owned(), HINT_FORM));
    }
    let resolved = lookup_host(address).await.map_err(|error| {
        fail(
            format!("its host is not found: {error}"),
            "write an IP address of this machine, or a name that it knows",
        )
    })?;
    let mut last = None;
    for candidate in resolved {
        match open(candidate).await {
            Ok(bound) => return Ok(bound),
            Err(cause) => last = Some(Error::Bind { address: candidate, hint: remedy(&cause), cause }),
        }
    }
    Err(last
        .unwrap_or_else(|| fail("its host has no address".to_owned(), "write an IP address of this machine")))
}

async fn open(address: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(address).await?;
    let bound = listener.local_addr()?;
    Ok((listener, bound))
}

fn remedy(cause: &io::Error) -> &'static str {
    match cause.kind() {
        io::ErrorKind::AddrInUse => {
            "another process has the port: stop it, choose another port, or port 0 for any free one"
        }
        io::ErrorKind::AddrNotAvailable => {
            "this machine does not have that address: use one of its own, 127.0.0.1 or 0.0.0.0"
        }
        io::ErrorKind::PermissionDenied => "ports below 1024 need privileges: choose a higher port",
        _ => "check that the address belongs to this machine and that its network is up",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    #[tokio::test]
    async fn port_zero_gives_a_real_port() {
        let (listener, bound) = bind("127.0.0.1:0").await.unwrap();
        assert_ne!(bound.port(), 0);
        assert_eq!(listener.local_addr().unwrap(), bound);
    }

    #[tokio::test]
    async fn a_taken_port_is_named_with_its_remedy() {
        let (_held, bound) = bind("127.0.0.1:0").await.unwrap();
        let error = bind(&bound.to_string()).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Bind);
        assert!(error.retryable());
        let text = error.to_string();
        assert!(
            text.contains(&bound.to_string()) && text.contains("hint: another process has the port"),
            "{text}"
        );
    }

    #[tokio::test]
    async fn an_address_of_another_machine_is_named() {
        let error = bind("192.0.2.1:0").await.unwrap_err();
        assert!(!error.retryable());
        assert!(error.to_string().contains("192.0.2.1:0"), "{error}");
    }

    #[tokio::test]
    async fn malformed_addresses_are_refused_before_any_lookup() {
        for address in [
            "",
            "9000",
            ":9000",
            "localhost",
            "127.0.0.1:",
            "127.0.0.1:x",
            "127.0.0.1:65536",
            "127.0.0.1:+80",
            "::1:80",
            "http://a:80",
            "a b:1",
        ] {
            assert!(check(address).is_err(), "{address}");
            let error = bind(address).await.unwrap_err();
            assert!(error.to_string().contains(&format!("`{address}`")), "{error}");
        }
        for address in ["127.0.0.1:9000", "[::1]:0", "localhost:80", "0.0.0.0:65535"] {
            assert_eq!(check(address), Ok(()));
        }
    }
}
