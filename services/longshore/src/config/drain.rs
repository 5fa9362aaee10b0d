//! How long the end of a process may take, and what must fit into it.

use anyhow::{Result, ensure};
use longshore_chassis::{Fault, Validate, config::check_range};
use longshore_kvstore::DiskConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// End of the process.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct DrainConfig {
    /// Milliseconds that streams get to finish after the first Ctrl-C or SIGTERM.
    pub(crate) deadline_ms: u64,
}

impl Default for DrainConfig {
    fn default() -> Self {
        Self { deadline_ms: 20_000 }
    }
}

impl Validate for DrainConfig {
    fn faults(&self, path: &str, faults: &mut Vec<Fault>) {
        check_range(faults, path, "deadline_ms", self.deadline_ms, 0..=3_600_000);
    }
}

impl DrainConfig {
    /// Refuses a shard that may save for longer than its process lives: it would be cut off in the middle, whatever it was promised.
    /// Processes without a shard may have the same file.
    pub(crate) fn check_save(&self, disk: &DiskConfig) -> Result<()> {
        ensure!(
            disk.stop_ms() <= self.deadline_ms,
            "`kvstore.disk.save_ms` is {}, and a shard may take {} ms with its last writes, but the process ends after `drain.deadline_ms`, \
             which is {}, with blocks that are not saved yet; hint: raise `drain.deadline_ms` to {}, or lower `kvstore.disk.save_ms` (0: \
             save nothing)",
            disk.save_ms,
            disk.stop_ms(),
            self.deadline_ms,
            disk.stop_ms()
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Result;
    use clap::Parser as _;
    use longshore_cluster::Role;

    use crate::{
        cli::{Cli, Command},
        config::Config,
        role, up,
    };

    fn checked(path: &str, save_ms: u64, deadline_ms: u64) -> Result<()> {
        let mut config = Config::default();
        config.kvstore.disk.path = path.to_owned();
        config.kvstore.disk.save_ms = save_ms;
        config.drain.deadline_ms = deadline_ms;
        config.drain.check_save(&config.kvstore.disk)
    }

    #[test]
    fn a_save_that_lasts_longer_than_the_process_is_refused() {
        // The last writes take a second more.
        let problem = checked("/data", 19_001, 20_000).unwrap_err().to_string();
        for named in ["19001", "20001", "`drain.deadline_ms`", "20000", "`kvstore.disk.save_ms`"] {
            assert!(problem.contains(named), "{named} in {problem}");
        }
        assert!(checked("/data", 20_000, 20_000).is_err());
        assert!(checked("/data", 1, 0).is_err());
    }

    #[test]
    fn a_save_that_fits_and_one_that_never_happens_are_not() {
        for (path, save_ms, deadline_ms) in [("/data", 19_000, 20_000), ("/data", 0, 0), ("", 10_000, 0)] {
            assert!(checked(path, save_ms, deadline_ms).is_ok(), "`{path}`, {save_ms}, {deadline_ms}");
        }
        let mut config = Config::default();
        config.kvstore.disk.path = "/data".to_owned();
        assert!(config.drain.check_save(&config.kvstore.disk).is_ok(), "the defaults fit");
    }

    /// What a command says of a shared configuration whose save does not fit.
    async fn told(line: &str) -> Result<()> {
        let sets = "--check-config --set kvstore.disk.path=\"/data\" --set kvstore.disk.save_ms=20000 --set drain.deadline_ms=20000";
        let words = format!("longshore {line} {sets}");
        match Cli::try_parse_from(words.split_whitespace())?.command {
            Command::Up(args) => up::up(args).await,
            Command::Kvstore(args) => role::run(Role::KvStore, args).await,
            Command::Prefill(args) => role::run(Role::Prefill, args).await,
            other => panic!("{other:?} is not tested"),
        }
    }

    #[tokio::test]
    async fn only_processes_with_a_shard_are_refused() {
        for line in ["up", "up --processes", "kvstore --id a --member kvstore=a@http://127.0.0.1:9300"] {
            let problem = told(line).await.expect_err(line).to_string();
            assert!(problem.contains("`drain.deadline_ms`"), "{line}: {problem}");
        }
        told("prefill --id a --member prefill=a@http://127.0.0.1:9300")
            .await
            .expect("a worker saves nothing");
    }
}
