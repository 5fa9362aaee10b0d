//! Network namespaces: one for each shard, joined by a bridge, so that a shard can be cut off while it runs.

use std::process::Command;

/// What is made of the wire of a shard, both ways, by queueing disciplines of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    /// Packets are late by 60 to 140 ms.
    Late,
    /// Packets queue up behind each other for a megabit a second, and are dropped where they would wait for more than 400 ms.
    Narrow,
}

impl Wire {
    /// Arguments of `tc qdisc add dev DEVICE root`.
    fn discipline(self) -> &'static str {
        match self {
            Self::Late => "netem delay 100ms 40ms",
            Self::Narrow => "tbf rate 1mbit burst 4kb latency 400ms",
        }
    }
}

/// The namespaces; they go with it.
#[derive(Debug)]
pub(super) struct Apart {
    name: String,
    /// Third byte of the addresses 10.213.N.0/24.
    net: u32,
    shards: usize,
}

impl Apart {
    /// Makes namespaces for so many shards; the error says what the machine does not allow.
    pub(super) fn make(shards: usize) -> Result<Self, String> {
        let pid = std::process::id();
        // What was made so far goes when a later step fails.
        let apart = Self { name: format!("ls{}", pid % 1_000_000), net: pid % 250, shards };
        ip(&format!("link add {} type bridge", apart.name))?;
        ip(&format!("addr add {}/24 dev {}", apart.outside(), apart.name))?;
        ip(&format!("link set {} up", apart.name))?;
        for shard in 0..shards {
            let (space, wire, host) = (apart.space(shard), apart.wire(shard), apart.host(shard));
            ip(&format!("netns add {space}"))?;
            ip(&format!("link add {wire} type veth peer name eth0 netns {space}"))?;
            ip(&format!("link set {wire} master {}", apart.name))?;
            ip(&format!("link set {wire} up"))?;
            ip(&format!("-n {space} addr add {host}/24 dev eth0"))?;
            ip(&format!("-n {space} link set eth0 up"))?;
            ip(&format!("-n {space} link set lo up"))?;
        }
        Ok(apart)
    }

    /// Address outside of the namespaces.
    pub(super) fn outside(&self) -> String {
        format!("10.213.{}.1", self.net)
    }

    pub(super) fn host(&self, shard: usize) -> String {
        format!("10.213.{}.{}", self.net, 10 + shard)
    }

    pub(super) fn space(&self, shard: usize) -> String {
        format!("{}-{shard}", self.name)
    }

    /// The end of a shard's wire outside of its namespace.
    fn wire(&self, shard: usize) -> String {
        format!("{}v{shard}", self.name)
    }

    /// Why wires cannot be made so here: the kernel has no such discipline, or there is no `tc`. Tries it.
    pub(super) fn cannot(&self, wire: Wire) -> Option<String> {
        let device = format!("dev {} root", self.wire(0));
        let tried = run("tc", &format!("qdisc add {device} {}", wire.discipline()));
        tried.err().or_else(|| run("tc", &format!("qdisc del {device}")).err())
    }

    /// Makes the wire of a shard so, or as it was.
    pub(super) fn make_wire(&self, shard: usize, wire: Option<Wire>) {
        let (space, outside) = (self.space(shard), self.wire(shard));
        for (space, device) in [(String::new(), outside.as_str()), (format!("-n {space} "), "eth0")] {
            let arguments = match wire {
                Some(wire) => format!("{space}qdisc add dev {device} root {}", wire.discipline()),
                None => format!("{space}qdisc del dev {device} root"),
            };
            run("tc", &arguments).expect("what could be done once can be done again");
        }
    }

    /// Packets to and from a shard vanish, or pass again.
    pub(super) fn cut(&self, shard: usize, cut: bool) {
        let to = if cut { "down" } else { "up" };
        ip(&format!("link set {} {to}", self.wire(shard))).expect("a link of ours can be changed");
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        for shard in 0..self.shards {
            let _never_made = ip(&format!("netns del {}", self.space(shard)));
            let _gone_with_its_peer = ip(&format!("link del {}", self.wire(shard)));
        }
        let _never_made = ip(&format!("link del {}", self.name));
    }
}

fn ip(arguments: &str) -> Result<(), String> {
    run("ip", arguments)
}

fn run(program: &str, arguments: &str) -> Result<(), String> {
    let output = Command::new(program).args(arguments.split(' ')).output();
    let output = output.map_err(|error| format!("`{program}` cannot be run: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("`{program} {arguments}`: {}", String::from_utf8_lossy(&output.stderr).trim()))
}
