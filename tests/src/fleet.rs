//! Processes of the real program under a test's hand: shards, workers and a router with a tiny model, each started, killed, frozen or cut
//! off by itself. Shards may have network namespaces of their own, where the machine allows them.

mod apart;
mod far;
mod logs;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::{Child, Command, Stdio},
};

use longshore_chassis::Reserved;
use longshore_cluster::Member;
use longshore_model::testing::{TinyOptions, write_tiny_gguf};

use crate::server::{program, send_signal};

use apart::Apart;
use logs::Logs;

pub use apart::Wire;
pub use far::Far;

/// Settings of tests, which the program would take for its own and refuse.
const SETTINGS: [&str; 4] =
    ["LONGSHORE_FAULT_SEED", "LONGSHORE_FAULT_ROUNDS", "LONGSHORE_CHURN_SECONDS", logs::FOLDER];

/// How a fleet is made up.
#[derive(Debug, Clone, Default)]
pub struct FleetPlan {
    /// KV shards.
    pub shards: usize,
    /// Whether there are a prefill worker, a decode worker and a router too.
    pub workers: bool,
    /// Whether each shard is to have a network namespace of its own.
    pub apart: bool,
    /// Whether everybody, shards too, is to reach each shard through relays only, which need a runtime; the seed of how late they are.
    pub far: Option<u64>,
    /// `--set` entries of every process.
    pub sets: Vec<String>,
    /// Shell commands before each shard, in its process.
    pub before_shards: String,
    /// The model.
    pub model: TinyOptions,
}

/// A process of a fleet.
#[derive(Debug)]
struct Process {
    arguments: Vec<String>,
    address: String,
    /// Network namespace.
    space: Option<String>,
    before: String,
    child: Option<Child>,
    /// Its port, which nobody else gets while it is down.
    _reserved: Option<Reserved>,
    /// What lies before it.
    far: Option<Far>,
}

/// Running processes; they end with it.
#[derive(Debug)]
pub struct Fleet {
    processes: BTreeMap<String, Process>,
    members: Vec<Member>,
    apart: Result<Apart, String>,
    logs: Logs,
    _folder: tempfile::TempDir,
}

impl Fleet {
    /// Starts everybody; does not wait until they answer.
    pub fn start(plan: &FleetPlan) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let model = folder.path().join("tiny.gguf");
        write_tiny_gguf(&model, &plan.model).expect("a tiny model");
        let apart = if plan.apart { Apart::make(plan.shards) } else { Err("nobody asked for it".to_owned()) };
        let (processes, members, logs) = (BTreeMap::new(), Vec::new(), Logs::new(folder.path()));
        let mut fleet = Self { processes, members, apart, logs, _folder: folder };
        for (role, id) in roles(plan) {
            fleet.plan(role, id, plan);
        }
        let members: Vec<String> =
            fleet.members.iter().flat_map(|member| ["--member".to_owned(), member.to_string()]).collect();
        let sets = plan.sets.iter().flat_map(|set| ["--set".to_owned(), set.clone()]);
        let shared: Vec<String> = ["--model".to_owned(), model.display().to_string()]
            .into_iter()
            .chain(members)
            .chain(sets)
            .collect();
        let ids: Vec<String> = fleet.processes.keys().cloned().collect();
        for id in ids {
            let process = fleet.processes.get_mut(&id).expect("it was planned");
            process.arguments.extend(shared.iter().cloned());
            fleet.start_one(&id);
        }
        fleet
    }

    fn plan(&mut self, role: &str, id: String, plan: &FleetPlan) {
        let index = self.processes.len();
        let far = plan.far.filter(|_| role == "kvstore").map(|seed| Far::make(seed ^ ((index as u64) << 32)));
        let (listen, space, reserved) = match (&self.apart, role, &far) {
            (Ok(apart), "kvstore", _) => {
                (format!("{}:9300", apart.host(index)), Some(apart.space(index)), None)
            }
            (_, _, Some(far)) => (far.listen.address().to_string(), None, None),
            (apart, _, None) => {
                let host = apart.as_ref().map(|apart| apart.outside().parse().expect("an address"));
                let reserved = free_port(host.unwrap_or(Ipv4Addr::LOCALHOST.into()));
                (reserved.address().to_string(), None, Some(reserved))
            }
        };
        let seen = far.as_ref().map_or_else(|| listen.clone(), |far| far.calls.address().to_string());
        if role != "router" {
            let member = Member::parse(&format!("{role}={id}@http://{seen}"));
            self.members.push(member.expect("the member is valid"));
        }
        // Supervised: it ends with this test, however that ends.
        let mut arguments =
            [role, "--supervised", "--id", &id, "--listen", &listen].map(str::to_owned).to_vec();
        if let Some(far) = &far {
            arguments.extend(["--tiles-port".to_owned(), far.tiles_listen.address().port().to_string()]);
        }
        let before = if role == "kvstore" { plan.before_shards.clone() } else { String::new() };
        let address = format!("http://{listen}");
        self.processes
            .insert(id, Process { arguments, address, space, before, child: None, _reserved: reserved, far });
    }

    /// What lies before a shard; only where the plan wants it.
    pub fn far(&self, id: &str) -> &Far {
        self.processes[id].far.as_ref().expect("the plan has relays before shards")
    }

    /// Everybody but the router.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// gRPC address of a process, without what lies before it.
    pub fn address(&self, id: &str) -> &str {
        &self.processes[id].address
    }

    /// Why shards have no network namespaces of their own; `None` where they have.
    pub fn not_apart(&self) -> Option<&str> {
        self.apart.as_ref().err().map(String::as_str)
    }

    /// Starts a process that does not run.
    pub fn start_one(&mut self, id: &str) {
        let process = self.processes.get_mut(id).expect("it was planned");
        let script = format!("{}exec \"$0\" \"$@\"", process.before);
        let mut command = match &process.space {
            Some(space) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", space, "bash"]);
                command
            }
            None => Command::new("bash"),
        };
        command.arg("-c").arg(script).arg(program()).args(&process.arguments);
        for setting in SETTINGS {
            command.env_remove(setting);
        }
        command.stdin(Stdio::null()).stdout(self.logs.of(id)).stderr(self.logs.of(id));
        process.child = Some(command.spawn().expect("the program starts"));
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(&mut self, id: &str) {
        let process = self.processes.get_mut(id).expect("it was planned");
        if let Some(mut child) = process.child.take() {
            child.kill().expect("a child can be killed");
            child.wait().expect("a child can be waited for");
        }
    }

    /// Sends a signal, as `-STOP`.
    pub fn signal(&self, id: &str, signal: &str) {
        let child = self.processes[id].child.as_ref().expect("it runs");
        assert!(send_signal(child.id(), signal), "{id} could not be sent {signal}");
    }

    /// Process id of one that runs.
    pub fn id(&self, id: &str) -> u32 {
        self.processes[id].child.as_ref().expect("it runs").id()
    }

    /// Whether a process runs.
    pub fn runs(&mut self, id: &str) -> bool {
        let child = self.processes.get_mut(id).and_then(|process| process.child.as_mut());
        child.is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Why the wires of shards cannot be made so; `None` where they can.
    pub fn cannot(&self, wire: Wire) -> Option<String> {
        match &self.apart {
            Ok(apart) => apart.cannot(wire),
            Err(why) => Some(why.clone()),
        }
    }

    /// Makes the wire of a shard so, or as it was. Only where that can be.
    pub fn make_wire(&self, shard: usize, wire: Option<Wire>) {
        let apart = self.apart.as_ref().expect("shards have namespaces of their own");
        apart.make_wire(shard, wire);
    }

    /// Cuts a shard off from everybody, or joins it again. Only where shards have namespaces of their own.
    pub fn cut(&self, shard: usize, cut: bool) {
        let apart = self.apart.as_ref().expect("shards have namespaces of their own");
        apart.cut(shard, cut);
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for process in self.processes.values_mut() {
            if let Some(mut child) = process.child.take() {
                let _gone_already = child.kill();
                let _gone_already = child.wait();
            }
        }
        if std::thread::panicking() {
            self.logs.print();
        }
    }
}

fn roles(plan: &FleetPlan) -> Vec<(&'static str, String)> {
    let mut roles: Vec<_> = (0..plan.shards).map(|shard| ("kvstore", format!("kv-{shard}"))).collect();
    if plan.workers {
        let workers = [("prefill", "prefill-0"), ("decode", "decode-0"), ("router", "router-0")];
        roles.extend(workers.map(|(role, id)| (role, id.to_owned())));
    }
    roles
}

/// A port of `host` that nobody else gets while this lives.
fn free_port(host: IpAddr) -> Reserved {
    Reserved::at(SocketAddr::from((host, 0))).expect("there is a free port")
}
