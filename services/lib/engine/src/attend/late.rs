//! How long an answer to an attention query is waited for while other shards have the same blocks. A shard that takes longer than it usually
//! does for such a question is given up where few are; one that is silent, always.

use longshore_fabric::{Error as CallError, PendingAttend, StripePartial};
use tokio::time::Instant;

use super::LayerAttention;
use crate::{
    Error, ShardLink, ShardLinks,
    health::Question,
    patience::{late, within_time},
};

type Answer = Result<Vec<StripePartial>, CallError>;

/// Why a shard is not waited for any longer.
enum Late {
    /// It takes longer than usual.
    Slow,
    /// Nothing was heard of it.
    Silent,
}

impl LayerAttention<'_, '_> {
    /// The answer of a shard to a question that went to it at `since`, or why none is waited for; takes note of how that ended.
    pub(super) fn hear(
        &self,
        (links, shard): (&ShardLinks, usize),
        (question, since): (Question, Instant),
        pending: Result<PendingAttend, CallError>,
    ) -> Result<Vec<StripePartial>, Error> {
        let link = &links.links()[shard];
        let answer = match pending {
            Ok(pending) if pending.is_ready() => Ok(pending.wait_blocking()),
            Ok(pending) => self
                .engine
                .while_waiting(|| self.wait(links, link, (question, since), pending))
                .inspect(|answer| {
                    if answer.is_ok() {
                        link.health.took(question, since.elapsed());
                    }
                }),
            Err(error) => Ok(Err(error)),
        };
        let answer = match answer {
            Ok(answer) => answer.map_err(|source| Error::of_shard(self.ctx, &link.id, source)),
            Err(reason) => Err(self.given_up(link, since, &reason)),
        };
        if !matches!(answer, Err(Error::Late { .. })) {
            link.note(&answer);
        }
        answer
    }

    /// What a shard says; where others can be asked, no longer than it is worth.
    fn wait(
        &self,
        links: &ShardLinks,
        link: &ShardLink,
        (question, since): (Question, Instant),
        mut pending: PendingAttend,
    ) -> Result<Answer, Late> {
        if self.patient || links.rule().copies() == 1 {
            return Ok(pending.wait_blocking());
        }
        let usual = link.health.late_after(question);
        if let Some(usual) = usual {
            match pending.wait_blocking_for(usual.saturating_sub(since.elapsed())) {
                Ok(answer) => return Ok(answer),
                Err(_) if links.second_asks.take() => return Err(Late::Slow),
                Err(back) => pending = *back,
            }
        }
        let patience = within_time(self.ctx, self.engine.options().patience).max(usual.unwrap_or_default());
        loop {
            // Who answers others is busy, and asking elsewhere would only make more work of it. It counts when their answers came:
            // whoever asked may look at them later, or never.
            let heard = link.attend.heard().map_or(since, |heard| heard.max(since));
            match pending.wait_blocking_for(patience.saturating_sub(heard.elapsed())) {
                Ok(answer) => return Ok(answer),
                Err(back) => pending = *back,
            }
            if link.attend.heard().is_none_or(|last| last <= heard) {
                return Err(Late::Silent);
            }
        }
    }

    /// A shard is not waited for any longer. That somebody with little time did not wait says nothing of it.
    fn given_up(&self, link: &ShardLink, since: Instant, reason: &Late) -> Error {
        let waited = since.elapsed();
        if matches!(reason, Late::Slow) || waited >= self.engine.options().patience {
            link.health.late(Instant::now(), waited);
        }
        late(link, waited)
    }
}
