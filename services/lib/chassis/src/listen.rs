//! Opens listeners, with errors that say what to do.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use tokio::net::{TcpListener, TcpSocket, lookup_host};

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

/// Whether nobody can listen on both addresses, as far as their text says; port 0 collides with nothing.
pub fn collide(one: &str, other: &str) -> bool {
    let parts = |address: &str| {
        let (host, port) = address.rsplit_once(':')?;
        let host = if host == "localhost" { "127.0.0.1" } else { host.trim_matches(['[', ']']) };
        Some((host.to_owned(), port.parse::<u16>().ok().filter(|port| *port != 0)?))
    };
    let (Some((one, one_port)), Some((other, other_port))) = (parts(one), parts(other)) else { return false };
    let all = |host: &str| host.parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified());
    one_port == other_port && (one == other || all(&one) || all(&other))
}

/// Listens on `host:port`; port 0 takes any free one. Returns the listener and the address that it got.
pub async fn bind(address: &str) -> Result<(TcpListener, SocketAddr), Error> {
    at_one_of(address, async |candidate| open(candidate).await.map_err(|cause| refused(candidate, cause)))
        .await
}

/// Keeps `host:port` for a listener that comes later; port 0 takes any free one.
pub async fn reserve(address: &str) -> Result<Reserved, Error> {
    at_one_of(address, async |candidate| Reserved::at(candidate)).await
}

/// What `take` makes of the first address of the host that it does not refuse.
async fn at_one_of<T>(address: &str, take: impl AsyncFn(SocketAddr) -> Result<T, Error>) -> Result<T, Error> {
    let mut last = None;
    for candidate in resolve(address).await? {
        match take(candidate).await {
            Ok(taken) => return Ok(taken),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| nowhere(address)))
}

/// An address that is kept for a listener of this process or of one that it starts, for as long as this lives. Nobody who asks for
/// any free port gets it, nor does an outgoing connection; and where that listener ended, callers are refused as ever.
///
/// Linux lets a listener join a socket that is bound and does not listen. Elsewhere the address was free a moment ago, no more.
#[derive(Debug)]
pub struct Reserved {
    address: SocketAddr,
    _held: Option<TcpSocket>,
}

impl Reserved {
    /// Keeps `address`; port 0 takes any free one.
    pub fn at(address: SocketAddr) -> Result<Self, Error> {
        let hold = || {
            let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
            socket.set_reuseaddr(cfg!(unix))?;
            socket.bind(address)?;
            io::Result::Ok((socket.local_addr()?, cfg!(target_os = "linux").then_some(socket)))
        };
        let (address, held) = hold().map_err(|cause| refused(address, cause))?;
        Ok(Self { address, _held: held })
    }

    /// The address, with its real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn resolve(address: &str) -> Result<Vec<SocketAddr>, Error> {
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
    Ok(resolved.collect())
}

fn nowhere(address: &str) -> Error {
    Error::Address {
        address: address.to_owned(),
        problem: "its host has no address".to_owned(),
        hint: "write an IP address of this machine",
    }
}

fn refused(address: SocketAddr, cause: io::Error) -> Error {
    Error::Bind { address, hint: remedy(&cause), cause }
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

    #[test]
    fn addresses_collide_where_one_listener_takes_the_others_place() {
        for (one, other) in [
            ("127.0.0.1:80", "127.0.0.1:80"),
            ("0.0.0.0:80", "127.0.0.1:80"),
            ("localhost:80", "127.0.0.1:80"),
            ("[::]:80", "10.0.0.1:80"),
            ("a:80", "a:80"),
        ] {
            assert!(collide(one, other) && collide(other, one), "{one} {other}");
        }
        for (one, other) in [
            ("127.0.0.1:80", "127.0.0.1:81"),
            ("127.0.0.1:0", "127.0.0.1:0"),
            ("127.0.0.1:80", "127.0.0.2:80"),
            ("", ""),
            ("a", "a"),
        ] {
            assert!(!collide(one, other), "{one} {other}");
        }
    }

    #[tokio::test]
    async fn a_listener_comes_and_goes_on_a_reserved_port() {
        let reserved = reserve("127.0.0.1:0").await.unwrap();
        let address = reserved.address();
        assert_ne!(address.port(), 0);
        for _ in 0..2 {
            let (listener, bound) = bind(&address.to_string()).await.unwrap();
            assert_eq!(bound, address);
            tokio::net::TcpStream::connect(address).await.expect("the listener answers");
            drop(listener);
            let gone = tokio::net::TcpStream::connect(address).await.expect_err("nobody listens");
            assert_eq!(gone.kind(), io::ErrorKind::ConnectionRefused);
        }
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_reserved_port_is_nobody_elses_until_it_is_given_back() {
        // No outgoing connection of this machine comes from there, which could take the port when it is given back.
        let reserved = reserve("127.0.0.2:0").await.unwrap();
        let address = reserved.address();
        // Those who ask for any free port, and outgoing connections, ask the system as one that shares with nobody.
        let alone = || TcpSocket::new_v4().unwrap().bind(address);
        assert_eq!(alone().unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(reserved);
        alone().unwrap();
    }

    #[tokio::test]
    async fn a_port_with_a_listener_cannot_be_reserved() {
        let (_held, bound) = bind("127.0.0.1:0").await.unwrap();
        let error = reserve(&bound.to_string()).await.unwrap_err();
        assert!(error.retryable(), "{error}");
        assert!(error.to_string().contains(&format!("`{bound}`")), "{error}");
    }

    #[tokio::test]
    async fn an_address_of_another_machine_is_named() {
        for error in [bind("192.0.2.1:0").await.unwrap_err(), reserve("192.0.2.1:0").await.unwrap_err()] {
            assert!(!error.retryable());
            assert!(error.to_string().contains("192.0.2.1:0"), "{error}");
        }
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
            for error in [bind(address).await.unwrap_err(), reserve(address).await.unwrap_err()] {
                assert!(error.to_string().contains(&format!("`{address}`")), "{error}");
            }
        }
        for address in ["127.0.0.1:9000", "[::1]:0", "localhost:80", "0.0.0.0:65535"] {
            assert_eq!(check(address), Ok(()));
        }
    }
}
