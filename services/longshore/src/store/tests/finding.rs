//! How the shards of a cluster are found.

use std::sync::Arc;

use longshore_cluster::Member;
use longshore_fabric::{GrpcConnector, GrpcOptions};

use super::house::House;
use crate::{
    cli::ClusterArgs,
    store::cluster::{Cluster, hex_digits},
};

fn args(endpoints: &[&str]) -> ClusterArgs {
    ClusterArgs { endpoints: endpoints.iter().map(|&url| url.to_owned()).collect(), members_file: None }
}

fn ids(cluster: &Cluster) -> Vec<&str> {
    cluster.shards.iter().map(|shard| shard.id.as_str()).collect()
}

#[tokio::test]
async fn one_process_that_answers_names_all_shards() {
    let house = House::new(3, 2).await;
    let cluster = Cluster::find(&args(&["http://127.0.0.1:1", &house.members[1].address])).await.unwrap();
    assert_eq!(ids(&cluster), ["kv-0", "kv-1", "kv-2"]);
    let stats = cluster.stats().await;
    let epochs: Vec<u64> = stats.iter().map(|stats| stats.as_ref().unwrap().shard_map_epoch).collect();
    assert_eq!(epochs, [cluster.view.epoch(); 3], "it places blocks as they do");
    assert_eq!(cluster.position("kv-2").unwrap(), 2);
    let unknown = cluster.position("kv-9").unwrap_err().to_string();
    assert!(unknown.contains("no shard `kv-9`") && unknown.contains("`kv-0`, `kv-1`, `kv-2`"), "{unknown}");
}

#[tokio::test]
async fn a_member_list_will_do_and_may_have_labels() {
    let house = House::new(1, 1).await;
    let file = house.folder.path().join("members");
    std::fs::write(&file, format!("# all\nrouter=r@http://a:1\n{};host=h;zone=z\n", house.members[0]))
        .unwrap();
    let found = ClusterArgs { members_file: Some(file), ..args(&[]) };
    let cluster = Cluster::find(&found).await.unwrap();
    assert_eq!(ids(&cluster), ["kv-0"]);
    assert_eq!(cluster.view.members()[0].labels.host, "h");
}

#[tokio::test]
async fn errors_tell_what_to_do() {
    let nobody = Cluster::find(&args(&["http://127.0.0.1:1"])).await.unwrap_err().to_string();
    assert!(nobody.contains("http://127.0.0.1:1") && nobody.contains("is the cluster running?"), "{nobody}");
    let nonsense = Cluster::find(&args(&["127.0.0.1"])).await.unwrap_err().to_string();
    assert!(nonsense.contains("`--endpoint`") && nonsense.contains("`127.0.0.1`"), "{nonsense}");
    assert!(nonsense.contains("`address`") && !nonsense.contains("nobody answers"), "{nonsense}");
    let of = |members: &[&str]| {
        let members = members.iter().map(|member| Member::parse(member).unwrap()).collect();
        Cluster::of(members, Arc::new(GrpcConnector::new(GrpcOptions::default()))).unwrap_err().to_string()
    };
    let inside = of(&["kvstore=kv-0@local:kv-0"]);
    assert!(inside.contains("`longshore up --processes`"), "{inside}");
    let none = of(&["decode=d@http://a:1"]);
    assert!(none.contains("lists no shard"), "{none}");
}

#[test]
fn digits_are_checked_and_lowered() {
    assert_eq!(hex_digits("the key", "1F", 32).unwrap(), "1f");
    for bad in ["g", "0x1", &"1".repeat(33)] {
        assert!(hex_digits("the key", bad, 32).unwrap_err().to_string().contains("the key"), "{bad}");
    }
}
