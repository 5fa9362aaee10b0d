//! The epoch of the shard map, as it changes: what fences a shard.

use std::sync::Arc;

use longshore_chassis::Tasks;
use longshore_cluster::ClusterView;
use tokio::sync::watch;

/// The epoch that `views` tell, for as long as `tasks` goes on.
pub fn epochs(mut views: watch::Receiver<Arc<ClusterView>>, tasks: &Tasks) -> watch::Receiver<u64> {
    let (send, epochs) = watch::channel(views.borrow_and_update().epoch());
    let scope = tasks.clone();
    tasks.spawn("epochs", async move {
        let follow = async {
            while views.changed().await.is_ok() {
                let epoch = views.borrow_and_update().epoch();
                send.send_if_modified(|last| std::mem::replace(last, epoch) != epoch);
            }
        };
        tokio::select! {
            () = follow => {}
            () = scope.cancelled() => {}
        }
    });
    epochs
}
