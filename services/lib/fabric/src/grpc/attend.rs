//! The client's side of `Attend` where large partials may go from GPU to GPU (lane `nccl`).
//!
//! A stream lasts, so it does not wait for an epoch: where an answer was large one is joined on the side, and queries name it from then
//! on. A stream keeps its epoch, which is one of its own. A body that does not come, or comes damaged, is no failure of the shard: its
//! epoch is left, which the shard is told, and its query is asked again, under another number and without one; what was handed on of its
//! answer before is left out. Queries are pure, so whoever asked sees nothing of it but the time that it takes.

mod asking;

use std::{pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt, stream};
use longshore_proto::{
    WireError,
    types::{AttendAnswer, AttendQuery},
    v1::{self, kv_store_service_client::KvStoreServiceClient},
};
use tokio::{sync::mpsc, task::JoinSet, time::Instant};
use tonic::{Streaming, transport::Channel};

use self::asking::{Asking, Epoch};
use super::{
    call::{fault, request, unary},
    epochs::{Epochs, Lease},
    leased::{Leased, Way},
    over::until,
};
use crate::{
    BoxStream, CallContext, Code, Error, lane,
    lane::Hop,
    nccl::{Arrivals, PARTIALS_BYTES_MIN},
};

/// How often a stream without an epoch looks for one, at most.
const RETRY: Duration = Duration::from_secs(1);
/// Whole bodies after which an epoch works: one that breaks before is one more failure of the lane.
const WORKS_FROM: u32 = 4;

/// An attend stream, whose epochs are those of `epochs`. With `alone` it begins in one, or not at all.
pub(super) async fn attend(
    mut client: KvStoreServiceClient<Channel>,
    (epochs, alone): (&Arc<Epochs>, bool),
    ctx: &CallContext,
    queries: mpsc::Receiver<AttendQuery>,
) -> Result<BoxStream<AttendAnswer>, Error> {
    let hop = Hop::new(ctx);
    let asking = Arc::<Asking>::default();
    let mut exchange = Exchange::new(Arc::clone(epochs), hop.context.clone(), Arc::clone(&asking));
    if alone {
        let lease = lane::within(&hop.context, Box::pin(epochs.lease(&hop.context, true))).await?;
        exchange.take(lease);
    }
    let queries = until(hop.context.cancel.clone(), Arc::clone(&asking).requests(queries));
    let asked = request(&hop.context, queries)?;
    let messages = unary(&hop.context, client.attend(asked)).await?;
    let reading = Reading { context: hop.context.clone(), messages, asking, exchange };
    Ok(hop.bound(Box::pin(reading.answers())))
}

/// What a call receives.
struct Reading {
    context: CallContext,
    messages: Streaming<v1::AttendResponse>,
    asking: Arc<Asking>,
    exchange: Exchange,
}

impl Reading {
    fn answers(self) -> impl Stream<Item = Result<AttendAnswer, Error>> + Send + 'static {
        stream::unfold(Some(self), |reading| async move {
            let mut reading = reading?;
            match reading.next().await.transpose()? {
                Ok(answer) => Some((Ok(answer), Some(reading))),
                Err(error) => Some((Err(error), None)),
            }
        })
    }

    async fn next(&mut self) -> Result<Option<AttendAnswer>, Error> {
        loop {
            self.exchange.look();
            let message = tokio::select! {
                message = self.messages.next() => message,
                () = self.exchange.changed() => continue,
            };
            let Some(message) = message else { return Ok(None) };
            let message = message.map_err(|status| fault(&self.context, &status))?;
            self.exchange.is_wanted |= message.body_bytes() >= PARTIALS_BYTES_MIN;
            let Some(answer) = self.whole(message).await? else { continue };
            if let Some(answer) = self.asking.hand_on(answer) {
                return Ok(Some(answer));
            }
        }
    }

    /// The answer of a message with its body; `None` where that did not come and the query is asked again.
    async fn whole(&mut self, mut message: v1::AttendResponse) -> Result<Option<AttendAnswer>, Error> {
        let number = message.query_id;
        if message.nccl_over {
            self.exchange.refused(self.asking.named_by(number).flatten());
        }
        let Some(named) = message.nccl.take() else {
            return AttendAnswer::try_from(message).map(Some).map_err(|fault| Error::bad_answer(&fault));
        };
        let epoch = match self.asking.named_by(number) {
            Some(Some(epoch)) => epoch,
            Some(None) => return Err(no_sense(&Error::invalid("nccl", "is set, its query named no epoch"))),
            // Asked again, or answered: its epoch was left, and what belongs to it is left out.
            None => return Ok(None),
        };
        let answer = match self.exchange.body(epoch, named, &mut message).await? {
            Body::Came => AttendAnswer::try_from(message),
            Body::Lost => {
                self.asking.ask_again(number);
                return Ok(None);
            }
        };
        match answer {
            Ok(answer) => {
                self.exchange.had_use(epoch);
                Ok(Some(answer))
            }
            Err(fault @ WireError::Checksum { .. }) => {
                self.exchange.broke(&Error::bad_answer(&fault));
                self.asking.ask_again(number);
                Ok(None)
            }
            Err(fault) => Err(Error::bad_answer(&fault)),
        }
    }
}

/// What became of a body.
enum Body {
    Came,
    Lost,
}

/// The epoch of a stream, and how it gets one.
struct Exchange {
    epochs: Arc<Epochs>,
    context: CallContext,
    asking: Arc<Asking>,
    held: Option<Held>,
    joining: Option<Joining>,
    /// Large partials came in a message: a stream of small ones needs no epoch.
    is_wanted: bool,
    /// When to look for one again.
    later: Option<Instant>,
    /// Those that the stream had.
    count: u64,
    /// Whose epoch was refused before a body came in it.
    refused_by: Option<u64>,
    /// Who tells the shard of those that were left. Ends with the call, which tells it too.
    telling: JoinSet<()>,
}

type Joining = Pin<Box<dyn Future<Output = Result<Lease, Error>> + Send>>;

/// An epoch that the stream has.
struct Held {
    number: u64,
    lease: Lease,
    arrivals: Arrivals,
    /// Bodies that came in it, whole.
    came: u32,
}

impl Exchange {
    fn new(epochs: Arc<Epochs>, context: CallContext, asking: Arc<Asking>) -> Self {
        Self {
            epochs,
            context,
            asking,
            held: None,
            joining: None,
            is_wanted: false,
            later: None,
            count: 0,
            refused_by: None,
            telling: JoinSet::new(),
        }
    }

    /// Waits until the epoch that there is is over, or the one that there will be is joined, or not. Dropping the future loses nothing.
    async fn changed(&mut self) {
        match self.held.as_ref().map(|held| held.lease.pulse().left()) {
            Some(left) => left.await,
            None => self.joined().await,
        }
    }

    /// Leaves an epoch that was left idle; begins to join one where there is none, one is wanted and it is time.
    fn look(&mut self) {
        if self.held.as_ref().is_some_and(|held| !held.lease.pulse().is_joined()) {
            self.leave();
        }
        let is_time = self.later.is_none_or(|later| Instant::now() >= later);
        if self.held.is_none() && self.joining.is_none() && self.is_wanted && is_time {
            self.is_wanted = false;
            let (epochs, context) = (Arc::clone(&self.epochs), self.context.clone());
            self.joining = Some(Box::pin(async move { epochs.lease(&context, true).await }));
        }
    }

    /// Waits until one is joined, or not; for ever where none is being joined. Dropping the future loses nothing.
    async fn joined(&mut self) {
        let Some(joining) = &mut self.joining else { return std::future::pending().await };
        let joined = joining.await;
        self.joining = None;
        match joined {
            Ok(lease) => self.take(lease),
            Err(error) => {
                tracing::debug!(%error, "partials of an attend stream come in messages");
                if Epochs::is_at_fault(&error) {
                    self.epochs.failed();
                }
                self.later = Some(Instant::now() + RETRY);
            }
        }
    }

    /// Queries name it from now on.
    fn take(&mut self, lease: Lease) {
        self.count += 1;
        self.is_wanted = false;
        let (number, arrivals) = (self.count, lease.arrivals());
        self.asking.name(Some(Epoch { number, wire: lease.wire(), pulse: lease.pulse() }));
        self.held = Some(Held { number, lease, arrivals, came: 0 });
    }

    /// Queries name none; the one that there was is over, and the shard is told: it may be waiting for a body to be taken in it, and answers
    /// nothing until then.
    fn leave(&mut self) {
        self.asking.name(None);
        while self.telling.try_join_next().is_some() {}
        if let Some(held) = self.held.take() {
            self.telling.spawn(held.lease.leave(&self.context));
        }
    }

    /// A body came in it whole.
    fn had_use(&mut self, epoch: u64) {
        let Some(held) = self.held.as_mut().filter(|held| held.number == epoch) else { return };
        held.came = held.came.saturating_add(1);
        self.refused_by = None;
        if held.came == WORKS_FROM {
            held.lease.way().succeeded();
        }
    }

    /// It failed: the lane is left alone for a while.
    fn broke(&mut self, error: &Error) {
        let Some(held) = &self.held else { return };
        tracing::warn!(%error, "an attend stream lost its nccl epoch: partials come in messages");
        held.lease.way().failed();
        self.leave();
    }

    /// The shard knows an epoch no more. One that it never knew may be of before its restart, as all others then are; but not if the same
    /// shard invited to it since.
    fn refused(&mut self, epoch: Option<u64>) {
        let Some(held) = self.held.as_ref().filter(|held| Some(held.number) == epoch) else { return };
        let incarnation = held.lease.incarnation();
        if held.came > 0 || self.refused_by == Some(incarnation) {
            return self.broke(&Error::new(Code::Unavailable, "the shard left it"));
        }
        self.refused_by = Some(incarnation);
        held.lease.way().forget();
        self.leave();
        self.later = Some(Instant::now() + RETRY);
    }

    /// Receives what a message names in an epoch, and puts it into the message. Names that make no sense end the call.
    async fn body(
        &mut self,
        epoch: u64,
        named: v1::NcclBytes,
        message: &mut v1::AttendResponse,
    ) -> Result<Body, Error> {
        // That epoch was left: none of its bodies comes any more.
        let Some(held) = self.held.as_mut().filter(|held| held.number == epoch) else {
            return Ok(Body::Lost);
        };
        let named = held.arrivals.announced(named).map_err(|error| no_sense(&error))?;
        match held.arrivals.receive_bytes(named).await {
            Ok(body) => {
                message.put_body(body).map_err(|fault| Error::bad_answer(&fault))?;
                Ok(Body::Came)
            }
            Err(error) => {
                self.broke(&error);
                Ok(Body::Lost)
            }
        }
    }
}

fn no_sense(error: &Error) -> Error {
    Error::new(Code::DataLoss, format!("the answer of the peer makes no sense: {error}"))
}
