//! One attention stream to one shard, shared by every sequence of a process.

use std::sync::Arc;

use longshore_attention::Partials;
use longshore_proto::types::AttendQuery;

use crate::{CallContext, Error, Shard};

/// A partial of one stripe, as an answer brought it.
#[derive(Debug, Clone, PartialEq)]
pub struct StripePartial {
    /// Index of the item in the query.
    pub item: u32,
    /// Stripe.
    pub stripe: u64,
    /// The partial, checked for shape and finiteness.
    pub partial: Partials,
}

/// Multiplexes queries of many sequences over one `attend` stream; reopens it after a failure. Cheap to clone.
#[derive(Debug, Clone)]
pub struct AttendLink {}

/// An answer under way.
#[derive(Debug)]
pub struct PendingAttend {}

impl AttendLink {
    /// A link to `shard`. Its task runs on `tasks` until the last clone is dropped. `in_flight_max` bounds queries under way.
    pub fn new(
        _shard: Arc<dyn Shard>,
        _tasks: &tokio_util::task::TaskTracker,
        _in_flight_max: usize,
    ) -> Self {
        todo!()
    }

    /// Sends a query (its `query_id` is overwritten). Splits it by rows into messages of about 1 MiB. Blocks the calling
    /// compute thread while too many are under way; never call it on a reactor thread.
    pub fn query_blocking(&self, _ctx: &CallContext, _query: AttendQuery) -> Result<PendingAttend, Error> {
        todo!()
    }
}

impl PendingAttend {
    /// Waits for the whole answer: partials ascending by item and stripe, rows of split messages joined, every shape
    /// checked against the query. Ends early with `Cancelled` or `DeadlineExceeded` as the context says.
    pub fn wait_blocking(self) -> Result<Vec<StripePartial>, Error> {
        todo!()
    }
}
