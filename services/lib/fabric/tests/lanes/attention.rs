//! Attention links over both lanes, and over a server that dies.

use std::{sync::Arc, time::Duration};

use longshore_fabric::{AttendLink, CallContext, Code, Error, Shard, StripePartial, server::ServerOptions};
use longshore_proto::types::AttendQuery;
use tokio_util::task::TaskTracker;

use super::{
    fake::{FakeRouter, MISSHAPEN_VIEW, STUCK, identity, lookup, queries},
    house::{House, LONG, Lane, SHARD_LANES},
};

pub(crate) fn query(view_id: u64, rows: u64) -> AttendQuery {
    AttendQuery { query_id: 0, identity: identity(), layer: 0, items: vec![queries(view_id, rows)] }
}

/// Asks from a thread that may block.
pub(crate) async fn ask(link: &AttendLink, query: AttendQuery) -> Result<Vec<StripePartial>, Error> {
    let link = link.clone();
    let context = CallContext::new("attend").with_timeout(LONG);
    tokio::task::spawn_blocking(move || link.query_blocking(&context, query)?.wait_blocking()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn links_work_over_every_lane() {
    for lane in SHARD_LANES {
        let house = House::new(lane).await;
        house.shard.views.lock().unwrap().insert(7, Vec::new());
        let tasks = TaskTracker::new();
        let link = AttendLink::new(house.client(), &tasks, 8);
        let answer = ask(&link, query(7, 3)).await.unwrap();
        assert_eq!(answer.len(), 1, "{lane:?}");
        assert_eq!(answer[0].partial.shape(), (3, 2, 4));
        assert_eq!(answer[0].partial.row(2, 1).2, [5.0, 0.0, 0.0, 0.0]);
        let large = ask(&link, query(7, 100_000)).await.unwrap();
        assert_eq!(large[0].partial.shape(), (100_000, 2, 4));
        assert_eq!(ask(&link, query(8, 1)).await.unwrap_err().code, Code::NotFound);
        assert_eq!(ask(&link, query(MISSHAPEN_VIEW, 2)).await.unwrap_err().code, Code::DataLoss);
        ask(&link, query(7, 3)).await.unwrap();
        drop(link);
        tasks.close();
        tokio::time::timeout(LONG, tasks.wait()).await.expect("the link ends with its last clone");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn death_of_the_server_is_unavailable() {
    let options = ServerOptions { drain_timeout: Duration::ZERO, ..ServerOptions::default() };
    let mut house = House::with(Lane::Grpc, FakeRouter::default(), options).await;
    house.shard.views.lock().unwrap().insert(7, Vec::new());
    let link = AttendLink::new(house.client(), &TaskTracker::new(), 8);
    ask(&link, query(7, 1)).await.unwrap();
    let client = house.client();
    let context = CallContext::new("in flight");
    let in_flight = client.lookup(&context, lookup(&[STUCK]));
    let kill = async {
        house.called().await;
        house.shutdown.cancel();
    };
    let (answer, ()) = tokio::join!(in_flight, kill);
    assert_eq!(answer.unwrap_err().code, Code::Unavailable);
    house.served.join_next().await.unwrap().unwrap().unwrap();
    assert_eq!(ask(&link, query(7, 1)).await.unwrap_err().code, Code::Unavailable);
    let shard: Arc<dyn Shard> = house.client();
    assert_eq!(shard.stats(&CallContext::new("later")).await.unwrap_err().code, Code::Unavailable);
}
