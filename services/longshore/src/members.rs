//! The member list: flags and configuration, and a file that is read again when it changes, so that members come and go
//! without a restart of the others.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, anyhow};
use longshore_chassis::Tasks;
use longshore_cluster::{Member, StaticMembership};

use crate::{config::ClusterConfig, console};

/// How often the file is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Members as they are listed now.
pub(crate) fn listed(config: &ClusterConfig) -> Result<Vec<Member>> {
    let text = match config.members_file.as_str() {
        "" => String::new(),
        file => std::fs::read_to_string(file).map_err(|error| {
            anyhow!(
                "`cluster.members_file` is `{file}`, which cannot be read: {error}; hint: name a text file with one member a line, as \
                 `kvstore=kv-0@http://10.0.0.1:9300`"
            )
        })?,
    };
    parse(config, &text)
}

/// One member a line; empty lines and those that begin with `#` mean nothing.
fn parse(config: &ClusterConfig, text: &str) -> Result<Vec<Member>> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut members = Vec::with_capacity(config.members.len());
    for member in config.members.iter().map(String::as_str) {
        members.push(Member::parse(member).context("`cluster.members`")?);
    }
    for line in lines {
        members.push(Member::parse(line).context("`cluster.members_file`")?);
    }
    Ok(members)
}

/// Reads the file again whenever it changes, until `tasks` is cancelled. A list that cannot be is told and changes nothing;
/// `this` belongs to every list.
pub(crate) fn follow(config: &ClusterConfig, this: &Member, membership: &StaticMembership, tasks: &Tasks) {
    if config.members_file.is_empty() {
        return;
    }
    let (config, this, membership, scope) = (config.clone(), this.clone(), membership.clone(), tasks.clone());
    tasks.spawn("members-file", async move {
        tokio::select! {
            () = read_again(&config, &this, &membership) => {}
            () = scope.cancelled() => {}
        }
    });
}

async fn read_again(config: &ClusterConfig, this: &Member, membership: &StaticMembership) {
    let mut last = None;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let text = match tokio::fs::read_to_string(Path::new(&config.members_file)).await {
            Ok(text) => text,
            Err(error) => {
                tracing::warn!(file = %config.members_file, %error, "the member list cannot be read");
                continue;
            }
        };
        if last.as_ref() == Some(&text) {
            continue;
        }
        match update(config, this, membership, &text) {
            Ok(true) => tracing::info!(epoch = membership.view().epoch(), "the member list changed"),
            Ok(false) => {}
            Err(error) => {
                tracing::error!(error = console::text(&error), "the member list is not taken");
            }
        }
        last = Some(text);
    }
}

/// Takes a new list; true when it is another one than before.
fn update(config: &ClusterConfig, this: &Member, membership: &StaticMembership, text: &str) -> Result<bool> {
    let mut members = parse(config, text)?;
    if !members.iter().any(|member| member.id == this.id) {
        members.push(Member { incarnation: 0, ..this.clone() });
    }
    Ok(membership.replace(members)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(members: &[&str]) -> ClusterConfig {
        ClusterConfig { members: members.iter().map(|&m| m.to_owned()).collect(), ..ClusterConfig::default() }
    }

    #[test]
    fn a_list_is_one_member_a_line() {
        let text = "# shards\nkvstore=kv-0@http://a:1\n\n  kvstore=kv-1@http://a:2;host=h \n";
        let members = parse(&config(&["decode=d@http://a:3"]), text).unwrap();
        let ids: Vec<&str> = members.iter().map(|member| member.id.as_str()).collect();
        assert_eq!(ids, ["d", "kv-0", "kv-1"]);
        let error = parse(&config(&[]), "kvstore=kv-0").unwrap_err();
        assert!(format!("{error:#}").contains("`cluster.members_file`"), "{error:#}");
    }

    #[test]
    fn a_bad_list_changes_nothing_and_this_process_stays() {
        let this = Member::parse("kvstore=kv-0@http://a:1").unwrap();
        let membership = StaticMembership::new(vec![this.clone()]).unwrap();
        let before = membership.view();
        for bad in ["nonsense", "kvstore=kv-0@http://a:1\nkvstore=kv-0@http://a:2"] {
            assert!(update(&config(&[]), &this, &membership, bad).is_err());
            assert_eq!(membership.view(), before);
        }
        assert!(update(&config(&[]), &this, &membership, "kvstore=kv-1@http://a:2").unwrap());
        let view = membership.view();
        assert_eq!(view.members().len(), 2);
        assert_ne!(view.epoch(), before.epoch());
        assert!(!update(&config(&[]), &this, &membership, "kvstore=kv-1@http://a:2\n#").unwrap());
    }
}
