//! The text form of members, hostile text included.

use super::*;
use crate::Kind;

#[test]
fn members_are_read_and_written_alike() {
    let member = Member::parse("kvstore=kv-0@http://127.0.0.1:9300").unwrap();
    let expected = Member {
        id: "kv-0".into(),
        role: Role::KvStore,
        address: "http://127.0.0.1:9300".into(),
        incarnation: 0,
        weight: 1,
        labels: Labels::default(),
    };
    assert_eq!(member, expected);
    for text in [
        "kvstore=kv-0@http://127.0.0.1:9300",
        "kvstore=kv-0@http://127.0.0.1:9300;weight=7",
        "kvstore=kv-0@http://127.0.0.1:9300;weight=7;host=a;zone=z-1",
        "kvstore=kv-0@http://127.0.0.1:9300;zone=z-1",
        "router=r@http://[::1]:1",
        "prefill=p-1@http://prefill-0.prefill.svc.cluster.local:65535",
        "decode=d@local:d",
        "decode=d@http://127.0.0.1:9200;host=a;zone=z-1",
    ] {
        let member = Member::parse(text).unwrap();
        assert_eq!(member.to_string(), text);
        assert_eq!(member.weight == 0, member.role != Role::KvStore);
    }
    assert_eq!(Member::parse(" kvstore = kv-0 @ local:kv-0 ; weight=2 ").unwrap().weight, 2);
}

#[test]
fn every_fault_names_its_field() {
    let long = "a".repeat(64);
    let cases = [
        ("", "role"),
        ("kv-0@local:a", "role"),
        ("shard=a@local:a", "role"),
        ("KVSTORE=a@local:a", "role"),
        ("kvstore=a", "id"),
        ("kvstore=@local:a", "id"),
        ("kvstore=A@local:a", "id"),
        ("kvstore=a_b@local:a", "id"),
        ("kvstore=ä@local:a", "id"),
        (&format!("kvstore={long}@local:a"), "id"),
        ("kvstore=a@", "address"),
        ("kvstore=a@local:", "address"),
        ("kvstore=a@local:A", "address"),
        ("kvstore=a@127.0.0.1:80", "address"),
        ("kvstore=a@https://a:80", "address"),
        ("kvstore=a@http://a", "address"),
        ("kvstore=a@http://:80", "address"),
        ("kvstore=a@http://a:0", "address"),
        ("kvstore=a@http://a:+80", "address"),
        ("kvstore=a@http://a:65536", "address"),
        ("kvstore=a@http://a:80/", "address"),
        ("kvstore=a@http://a/b:80", "address"),
        ("kvstore=a@http://user@a:80", "address"),
        ("kvstore=a@http://::1:80", "address"),
        ("kvstore=a@http://[::g]:80", "address"),
        ("kvstore=a@http://a b:80", "address"),
        ("kvstore=a@local:a;weight=0", "weight"),
        ("kvstore=a@local:a;weight=-1", "weight"),
        ("kvstore=a@local:a;weight=4294967296", "weight"),
        ("kvstore=a@local:a;weight=", "weight"),
        ("kvstore=a@local:a;weight=1;weight=1", "weight"),
        ("kvstore=a@local:a;", "options"),
        ("kvstore=a@local:a;colour=red", "options"),
        ("router=a@local:a;weight=1", "weight"),
        ("prefill=a@local:a;host=b;weight=1", "weight"),
        ("router=a@local:a;zone=a;zone=a", "zone"),
        ("kvstore=a@local:a;host=", "host"),
        ("kvstore=a@local:a;host", "host"),
        ("kvstore=a@local:a;host=A", "host"),
        ("kvstore=a@local:a;zone=a b", "zone"),
        ("kvstore=a@local:a;zone=a;host=b;zone=a", "zone"),
    ];
    for (text, expected) in cases {
        let error = Member::parse(text).unwrap_err();
        assert_eq!((error.kind(), error.retryable()), (Kind::InvalidInput, false), "{text}");
        let Error::Invalid { field, .. } = &error else { panic!("{text}: {error}") };
        assert_eq!(*field, expected, "{text}: {error}");
        assert!(error.to_string().contains(&format!("`{expected}`")), "{error}");
    }
}

#[test]
fn roles_have_one_name_each() {
    for role in Role::ALL {
        assert_eq!(role.as_str().parse::<Role>().unwrap(), role);
    }
    assert!("store".parse::<Role>().unwrap_err().to_string().contains("`kvstore`"));
}
