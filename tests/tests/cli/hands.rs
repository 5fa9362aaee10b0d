//! Processes of a cluster that a test starts by hand.

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use longshore_chassis::Reserved;
use longshore_tests::server::{program, send_signal};

/// Processes that a test started by hand; killed when it fails.
#[derive(Default)]
pub(crate) struct Hands(Vec<(String, Child)>);

impl Drop for Hands {
    fn drop(&mut self) {
        for (_, child) in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Hands {
    pub(crate) fn start(&mut self, role: &str, id: &str, members: &[String], more: &[&str]) {
        let mut command = Command::new(program());
        command.args([role, "--id", id]).args(members).args(more);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("the program starts");
        self.0.push((id.to_owned(), child));
    }

    /// SIGTERM for all, the router first; every one ends cleanly.
    pub(crate) fn end(mut self) {
        for (id, mut child) in std::mem::take(&mut self.0).into_iter().rev() {
            assert!(send_signal(child.id(), "-TERM"), "{id} was gone before its end");
            let began = Instant::now();
            let status = loop {
                match child.try_wait().unwrap() {
                    Some(status) => break status,
                    None if began.elapsed() > Duration::from_secs(30) => {
                        let _ = child.kill();
                        panic!("{id} did not end within 30 s");
                    }
                    None => std::thread::sleep(Duration::from_millis(20)),
                }
            };
            assert!(status.success(), "{id}: {status}");
        }
    }
}

/// Ports of loopback that nobody else gets while these live.
pub(crate) fn free_ports<const N: usize>() -> [Reserved; N] {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    [(); N].map(|()| Reserved::at(any).expect("a free port"))
}
