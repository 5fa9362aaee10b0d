//! Registering, leaving and watching.

use std::time::Duration;

use super::*;
use crate::Kind;

fn member(text: &str) -> Member {
    Member::parse(text).unwrap()
}

fn ids(view: &ClusterView) -> Vec<String> {
    view.members().iter().map(|member| member.id.clone()).collect()
}

#[tokio::test]
async fn watchers_see_members_come_and_go() {
    let cluster = MemoryMembership::new();
    let mut watcher = cluster.watch();
    assert!(watcher.borrow_and_update().members().is_empty());
    let empty = watcher.borrow().epoch();

    let router = cluster.register(member("router=r@local:r")).await.unwrap();
    watcher.changed().await.unwrap();
    assert_eq!(watcher.borrow_and_update().epoch(), empty);

    let shard = cluster.clone().register(member("kvstore=a@local:a")).await.unwrap();
    watcher.changed().await.unwrap();
    assert_ne!(watcher.borrow_and_update().epoch(), empty);
    assert_eq!(ids(&cluster.view()), ["r", "a"]);

    drop(shard);
    watcher.changed().await.unwrap();
    assert_eq!(watcher.borrow_and_update().epoch(), empty);
    drop(router);
    assert!(cluster.view().members().is_empty());
}

#[tokio::test]
async fn a_taken_id_is_refused_until_its_holder_leaves() {
    let cluster = MemoryMembership::new();
    let held = cluster.register(member("decode=d@local:d")).await.unwrap();
    let error = cluster.register(member("router=d@local:e")).await.unwrap_err();
    assert_eq!((error.kind(), error.retryable()), (Kind::AlreadyExists, true));
    assert_eq!(ids(&cluster.view()), ["d"], "the holder stays");
    drop(held);
    let next = Member { incarnation: 2, ..member("decode=d@local:d") };
    let again = cluster.register(next).await.unwrap();
    assert_eq!(again.member().incarnation, 2);
    assert_eq!(cluster.view().member("d").unwrap().incarnation, 2);
}

#[tokio::test]
async fn an_invalid_member_changes_nothing() {
    let cluster = MemoryMembership::new();
    let invalid = Member { weight: 0, ..member("kvstore=a@local:a") };
    assert_eq!(cluster.register(invalid).await.unwrap_err().kind(), Kind::InvalidInput);
    assert!(cluster.view().members().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_registrations_are_all_kept() {
    let cluster = MemoryMembership::new();
    let mut joins = tokio::task::JoinSet::new();
    for index in 0..64 {
        let cluster = cluster.clone();
        joins.spawn(async move {
            cluster.register(member(&format!("kvstore=kv-{index}@local:a"))).await.unwrap()
        });
    }
    let registrations = joins.join_all().await;
    assert_eq!(cluster.view().members().len(), 64);
    drop(registrations);
    assert!(cluster.view().members().is_empty());
}

#[tokio::test]
async fn static_members_register_as_configured() {
    let list = ["kvstore=a@http://h:1;weight=2", "router=r@http://h:2"].map(member).to_vec();
    let cluster = StaticMembership::new(list.clone()).unwrap();
    let mut backwards = list.clone();
    backwards.reverse();
    assert_eq!(cluster.view(), StaticMembership::new(backwards).unwrap().view());

    let started = Member { incarnation: 77, ..list[0].clone() };
    let held = cluster.register(started.clone()).await.unwrap();
    assert_eq!(cluster.register(started.clone()).await.unwrap_err().kind(), Kind::AlreadyExists);
    drop(held);
    cluster.register(started).await.unwrap();
    assert_eq!(cluster.watch().borrow().members().len(), 2, "leaving does not change the list");

    let stranger = cluster.register(member("router=x@http://h:2")).await.unwrap_err();
    assert_eq!((stranger.kind(), stranger.retryable()), (Kind::NotFound, false));
    for (text, field) in [
        ("kvstore=a@http://h:9;weight=2", "`address`"),
        ("kvstore=a@http://h:1", "`weight`"),
        ("decode=a@http://h:1", "`role`"),
    ] {
        let error = cluster.register(member(text)).await.unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidInput);
        assert!(error.to_string().starts_with(field), "{error}");
    }
    assert!(StaticMembership::new(vec![list[0].clone(), list[0].clone()]).is_err());
}

#[tokio::test]
async fn a_static_list_can_be_replaced_as_a_whole() {
    let cluster = StaticMembership::new(vec![member("kvstore=a@http://h:1")]).unwrap();
    let mut watcher = cluster.watch();
    let before = watcher.borrow_and_update().epoch();
    assert!(!cluster.replace(vec![member("kvstore=a@http://h:1")]).unwrap());
    let twice = vec![member("kvstore=a@http://h:1"), member("kvstore=a@http://h:2")];
    assert!(cluster.replace(twice).is_err());
    assert!(!watcher.has_changed().unwrap(), "nothing happened yet");
    let two = vec![member("kvstore=a@http://h:1"), member("kvstore=b@http://h:2")];
    assert!(cluster.replace(two).unwrap());
    watcher.changed().await.unwrap();
    assert_ne!(watcher.borrow_and_update().epoch(), before);
    cluster.register(member("kvstore=b@http://h:2")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn only_a_lease_can_be_lost() {
    let cluster = MemoryMembership::new();
    let forever = cluster.register(member("router=r@local:r")).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_secs(3600), forever.lost()).await.is_err());

    let (lease, lost) = watch::channel(false);
    let leased = Registration::new(member("router=r@local:r"), Some(lost), || {});
    assert!(tokio::time::timeout(Duration::from_secs(3600), leased.lost()).await.is_err());
    lease.send_replace(true);
    leased.lost().await;
    leased.lost().await;

    let (provider, lost) = watch::channel(false);
    let orphan = Registration::new(member("router=r@local:r"), Some(lost), || {});
    drop(provider);
    orphan.lost().await;
}
