//! One process of the cluster: what it is called, what it does, and where it listens.

#[cfg(test)]
mod tests;

use std::{fmt, str::FromStr};

use crate::Error;

/// What a process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Front door.
    Router,
    /// Computes KV.
    Prefill,
    /// Generates.
    Decode,
    /// Holds KV.
    KvStore,
}

impl Role {
    /// Every role, in order.
    pub const ALL: [Self; 4] = [Self::Router, Self::Prefill, Self::Decode, Self::KvStore];

    /// The role as flags, logs and metrics write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Router => "router",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::KvStore => "kvstore",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|role| role.as_str() == text).ok_or_else(|| {
            Error::invalid(text, "role", "is unknown, hint: write `router`, `prefill`, `decode` or `kvstore`")
        })
    }
}

/// One process.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Member {
    /// Unique in the cluster, 1 to 63 characters of `a-z`, `0-9`, `-`.
    pub id: String,
    /// What it does.
    pub role: Role,
    /// `http://host:port` or `local:id`.
    pub address: String,
    /// Changes with every start of the process; 0 where nobody knows it (static membership).
    pub incarnation: u64,
    /// Share of stripes; only for shards, at least 1.
    pub weight: u32,
    /// Where it is: what it fails with, and what is near it.
    pub labels: Labels,
}

/// Where a process is and thus what a shard fails with, as far as it is known. Each label is empty or 1 to 63 characters of `a-z`, `0-9`, `-`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Labels {
    /// Machine; no two copies of a block lie on one, and workers read those on theirs. Empty: one of its own.
    pub host: String,
    /// Part of the site; copies lie in different ones where there are enough. Empty: none that is known.
    pub zone: String,
}

impl Member {
    /// Reads `role=id@address[;weight=N][;host=H][;zone=Z]`, for example `kvstore=kv-0@http://127.0.0.1:9300;weight=2;host=a`.
    /// Shards weigh 1 unless they say otherwise, other roles 0; labels are for all. The incarnation is 0.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let form = "hint: write `role=id@http://host:port[;weight=N][;host=H][;zone=Z]`";
        let (role, rest) = text
            .split_once('=')
            .ok_or_else(|| Error::invalid(text, "role", format!("is missing, {form}")))?;
        let (id, rest) =
            rest.split_once('@').ok_or_else(|| Error::invalid(text, "id", format!("is missing, {form}")))?;
        let role: Role = role.trim().parse().map_err(|_| {
            let problem = "is unknown, hint: write `router`, `prefill`, `decode` or `kvstore`";
            Error::invalid(text, "role", format!("`{}` {problem}", role.trim()))
        })?;
        let mut parts = rest.split(';');
        let address = parts.next().unwrap_or_default().trim().to_owned();
        let options = Options::read(text, role, parts, form)?;
        let weight = options.weight.unwrap_or(u32::from(role == Role::KvStore));
        let (id, labels) = (id.trim().to_owned(), options.labels);
        let member = Self { id, role, address, incarnation: 0, weight, labels };
        member.check()?;
        Ok(member)
    }

    /// Checks every field on its own.
    pub(crate) fn check(&self) -> Result<(), Error> {
        check_id(&self.id).map_err(|problem| Error::invalid(&self.id, "id", problem))?;
        check_address(&self.address).map_err(|problem| Error::invalid(&self.id, "address", problem))?;
        if self.role == Role::KvStore && self.weight == 0 {
            return Err(Error::invalid(&self.id, "weight", "is 0, must be at least 1"));
        }
        for (field, label) in [("host", &self.labels.host), ("zone", &self.labels.zone)] {
            if !label.is_empty() {
                check_id(label).map_err(|problem| Error::invalid(&self.id, field, problem))?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Member {
    /// The form that [`Member::parse`] reads.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}@{}", self.role, self.id, self.address)?;
        if self.role == Role::KvStore && self.weight != 1 {
            write!(f, ";weight={}", self.weight)?;
        }
        for (name, label) in [("host", &self.labels.host), ("zone", &self.labels.zone)] {
            if !label.is_empty() {
                write!(f, ";{name}={label}")?;
            }
        }
        Ok(())
    }
}

/// What follows the address.
#[derive(Default)]
struct Options {
    weight: Option<u32>,
    labels: Labels,
}

impl Options {
    fn read<'a>(
        text: &str,
        role: Role,
        parts: impl Iterator<Item = &'a str>,
        form: &str,
    ) -> Result<Self, Error> {
        let mut options = Self::default();
        for part in parts.map(str::trim) {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            let field = match name {
                "weight" => "weight",
                "host" => "host",
                "zone" => "zone",
                _ => return Err(Error::invalid(text, "options", format!("contain `{part}`, {form}"))),
            };
            let label = match field {
                "weight" => None,
                "host" => Some(&mut options.labels.host),
                _ => Some(&mut options.labels.zone),
            };
            let given = label.as_ref().map_or(options.weight.is_some(), |label| !label.is_empty());
            if given || (field == "weight" && role != Role::KvStore) {
                let problem = "is given once; a weight is for role `kvstore` only";
                return Err(Error::invalid(text, field, problem));
            }
            match label {
                Some(_) if value.is_empty() => {
                    return Err(Error::invalid(text, field, format!("is empty, {form}")));
                }
                Some(label) => *label = value.to_owned(),
                None => options.weight = Some(weight(text, value)?),
            }
        }
        Ok(options)
    }
}

fn weight(text: &str, number: &str) -> Result<u32, Error> {
    number
        .parse()
        .map_err(|_| Error::invalid(text, "weight", format!("is `{number}`, must be from 1 to {}", u32::MAX)))
}

fn check_id(id: &str) -> Result<(), String> {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if (1..=63).contains(&id.len()) && id.bytes().all(allowed) {
        return Ok(());
    }
    Err("must be 1 to 63 characters of `a-z`, `0-9` and `-`".to_owned())
}

fn check_address(address: &str) -> Result<(), String> {
    if let Some(id) = address.strip_prefix("local:") {
        return check_id(id).map_err(|problem| format!("is `{address}`, the id after `local:` {problem}"));
    }
    let problem =
        |what: &str| format!("is `{address}`, {what}, hint: write `http://host:port` or `local:id`");
    let rest =
        address.strip_prefix("http://").ok_or_else(|| problem("whose scheme is none of `http`, `local`"))?;
    let (host, port) = rest.rsplit_once(':').ok_or_else(|| problem("which has no port"))?;
    // A sign would parse, and port 0 is where nobody listens.
    if !port.bytes().all(|byte| byte.is_ascii_digit()) || !matches!(port.parse::<u16>(), Ok(1..)) {
        return Err(problem("whose port is no number from 1 to 65535"));
    }
    let inner = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let valid = match inner {
        Some(inner) => inner.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
            (1..=253).contains(&host.len()) && host.bytes().all(allowed)
        }
    };
    if valid { Ok(()) } else { Err(problem("whose host is no name or address")) }
}
