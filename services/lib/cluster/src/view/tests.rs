//! What a view accepts, and when its epoch changes.

use super::*;
use crate::Kind;

fn members(texts: &[&str]) -> Vec<Member> {
    texts.iter().map(|text| Member::parse(text).unwrap()).collect()
}

fn epoch(texts: &[&str]) -> u64 {
    ClusterView::new(members(texts)).unwrap().epoch()
}

#[test]
fn members_are_sorted_by_role_and_id() {
    let view = ClusterView::new(members(&[
        "kvstore=b@local:b",
        "decode=z@local:z",
        "kvstore=a@local:a;weight=3",
        "router=r@local:r",
    ]))
    .unwrap();
    let ids: Vec<&str> = view.members().iter().map(|member| member.id.as_str()).collect();
    assert_eq!(ids, ["r", "z", "a", "b"]);
    assert_eq!(view.with_role(Role::KvStore).count(), 2);
    assert_eq!(view.member("z").unwrap().role, Role::Decode);
    assert_eq!(view.member("y"), None);
    let map = view.shard_map();
    assert_eq!(map.epoch(), view.epoch());
    let shards: Vec<(&str, u32)> =
        map.shards().iter().map(|shard| (shard.id.0.as_str(), shard.weight)).collect();
    assert_eq!(shards, [("a", 3), ("b", 1)]);
}

#[test]
fn the_epoch_follows_shards_and_nothing_else() {
    let base = epoch(&["kvstore=a@local:a", "kvstore=b@local:b"]);
    assert_eq!(base, epoch(&["kvstore=b@local:b", "kvstore=a@local:a"]));
    assert_eq!(base, epoch(&["kvstore=a@http://h:1", "router=r@local:r", "kvstore=b@local:b"]));
    let located = "decode=d@local:d;host=a;zone=z";
    assert_eq!(base, epoch(&["kvstore=a@local:a", located, "kvstore=b@local:b"]), "workers place nothing");
    let mut restarted = members(&["kvstore=a@local:a", "kvstore=b@local:b"]);
    restarted[0].incarnation = 9;
    assert_eq!(base, ClusterView::new(restarted).unwrap().epoch());
    let others = [
        epoch(&[]),
        epoch(&["kvstore=a@local:a"]),
        epoch(&["kvstore=b@local:b"]),
        epoch(&["kvstore=ab@local:a"]),
        epoch(&["kvstore=a@local:a;weight=2", "kvstore=b@local:b"]),
        epoch(&["kvstore=a@local:a", "kvstore=b@local:b;weight=2"]),
        epoch(&["kvstore=a@local:a", "kvstore=b@local:b;host=a"]),
        epoch(&["kvstore=a@local:a", "kvstore=b@local:b;zone=a"]),
    ];
    let mut all = vec![base];
    all.extend(others);
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 9);
}

#[test]
fn the_epoch_is_pinned_across_versions() {
    let mut hasher = blake3::Hasher::new_derive_key("longshore.v1 shard map epoch");
    hasher.update(b"\x04\0\0\0\0\0\0\0kv-0\x01\0\0\0\x04\0\0\0\0\0\0\0kv-1\x05\0\0\0");
    let expected = u64::from_le_bytes(hasher.finalize().as_bytes()[..8].try_into().unwrap());
    assert_eq!(epoch(&["kvstore=kv-1@local:a;weight=5", "kvstore=kv-0@local:b"]), expected);
}

#[test]
fn views_that_cannot_work_are_refused() {
    let error = ClusterView::new(members(&["kvstore=a@local:a", "router=a@local:b"])).unwrap_err();
    assert_eq!(error, Error::Taken { id: "a".into() });
    let mut weightless = members(&["kvstore=a@local:a"]);
    weightless[0].weight = 0;
    let error = ClusterView::new(weightless).unwrap_err();
    assert!(error.to_string().contains("`weight` of member `a`"), "{error}");
    let mut homeless = members(&["router=a@local:a"]);
    homeless[0].address = "ftp://a:1".into();
    assert_eq!(ClusterView::new(homeless).unwrap_err().kind(), Kind::InvalidInput);
    let one = members(&["router=a@local:a"]).remove(0);
    let crowd = (0..=MEMBERS_MAX).map(|index| Member { id: format!("r-{index}"), ..one.clone() });
    assert!(matches!(ClusterView::new(crowd.collect()).unwrap_err(), Error::TooMany { .. }));
}
