//! Choice of the next token. A pure function of (parameters, prompt and generated tokens, logits, index): nothing is carried
//! from one draw to the next, so a sequence that is resumed elsewhere goes on with the same tokens.
//!
//! Order: repetition, frequency and presence penalties, then temperature, then top-k, then top-p (over what top-k left), then min-p.

mod choice;
mod params;

use std::collections::{BTreeMap, BTreeSet};

pub use params::SamplerParams;

use crate::{Error, RowLogits};

/// Chooses tokens of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampler {
    params: SamplerParams,
    prompt: BTreeSet<u32>,
    generated: BTreeMap<u32, u32>,
}

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability under the raw logits (before penalties and temperature), when asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens under the raw logits with their logprobs, best first; as many as asked for.
    pub top: Vec<(u32, f32)>,
}

impl Sampler {
    /// A sampler that has seen no tokens; refuses parameters out of range.
    pub fn new(params: SamplerParams) -> Result<Self, Error> {
        params.validate()?;
        Ok(Self { params, prompt: BTreeSet::new(), generated: BTreeMap::new() })
    }

    /// Parameters.
    pub fn params(&self) -> &SamplerParams {
        &self.params
    }

    /// Tokens of the prompt, for the repetition penalty. May come in parts.
    pub fn observe_prompt(&mut self, tokens: &[u32]) {
        if self.params.repetition_penalty != 1.0 {
            self.prompt.extend(tokens);
        }
    }

    /// A generated token, for all penalties.
    pub fn observe_generated(&mut self, token: u32) {
        if self.params.penalises() {
            *self.generated.entry(token).or_insert(0) += 1;
        }
    }

    /// [`Self::sample`] or [`Self::sample_best`], by what there is of the row; its vocabulary has so many entries.
    pub fn sample_row(&self, row: &RowLogits, vocabulary: usize, index: u64) -> Result<Sampled, Error> {
        match row {
            RowLogits::All(logits) => self.sample(logits, index),
            RowLogits::Likeliest(likeliest) => {
                self.sample_best(&likeliest.best, likeliest.log_sum_exp, vocabulary, index)
            }
        }
    }

    /// Chooses the generated token number `index` (from 0) from `logits`, f32 `[vocabulary]`. Refuses logits that are not finite.
    pub fn sample(&self, logits: &[f32], index: u64) -> Result<Sampled, Error> {
        check(logits)?;
        let penalised = self.penalised(logits);
        let adjusted = penalised.as_deref().unwrap_or(logits);
        let token = if self.params.temperature == 0.0 {
            choice::greedy(adjusted)
        } else {
            choice::draw(adjusted, &self.params, choice::uniform(self.params.seed, index))
        };
        let Some(wanted) = self.params.logprobs else {
            return Ok(Sampled { token, logprob: None, top: Vec::new() });
        };
        let normaliser = choice::log_sum_exp(logits);
        let logprob = |token: u32| (f64::from(logits[token as usize]) - normaliser) as f32;
        let top =
            choice::best(logits, wanted as usize).into_iter().map(|token| (token, logprob(token))).collect();
        Ok(Sampled { token, logprob: Some(logprob(token)), top })
    }

    /// How many of the likeliest tokens of `vocabulary` are enough for [`Self::sample_best`]; `None` when the choice takes all
    /// logits.
    pub fn candidates(&self, vocabulary: usize) -> Option<usize> {
        let wanted = self.params.logprobs.unwrap_or(0) as usize;
        let penalised = !(self.prompt.is_empty() && self.generated.is_empty());
        match (penalised, self.params.top_k as usize) {
            (true, _) => None,
            (false, _) if self.params.temperature == 0.0 => Some(wanted.max(1).min(vocabulary)),
            (false, top_k) if top_k == 0 || top_k >= vocabulary => None,
            (false, top_k) => Some(wanted.max(top_k).min(vocabulary)),
        }
    }

    /// [`Self::sample`] out of what a device chose: the likeliest tokens with their logits, best first, of equals the lowest id
    /// first; at least [`Self::candidates`] of them; and `ln Σ exp(logit)` over all `vocabulary` logits. Gives the token that
    /// [`Self::sample`] would.
    pub fn sample_best(
        &self,
        best: &[(u32, f32)],
        log_sum_exp: f64,
        vocabulary: usize,
        index: u64,
    ) -> Result<Sampled, Error> {
        let needed = self.candidates(vocabulary);
        if needed.is_none_or(|needed| best.len() < needed) {
            let needed = needed.map_or("all logits".to_owned(), |needed| needed.to_string());
            let problem = format!("has {} tokens, this choice takes {needed}", best.len());
            return Err(Error::Invalid { field: "best".to_owned(), problem });
        }
        let logits: Vec<f32> = best.iter().map(|(_, logit)| *logit).collect();
        check(&logits)?;
        let chosen = match self.params.temperature == 0.0 {
            true => 0,
            false => choice::draw(&logits, &self.params, choice::uniform(self.params.seed, index)) as usize,
        };
        let logprob = |(token, logit): (u32, f32)| (token, (f64::from(logit) - log_sum_exp) as f32);
        let (token, own) = logprob(best[chosen]);
        let Some(wanted) = self.params.logprobs else {
            return Ok(Sampled { token, logprob: None, top: Vec::new() });
        };
        let top = best.iter().take(wanted as usize).map(|candidate| logprob(*candidate)).collect();
        Ok(Sampled { token, logprob: Some(own), top })
    }

    /// Logits after the penalties; `None` when there is nothing to change. Seen tokens outside the vocabulary change nothing.
    fn penalised(&self, logits: &[f32]) -> Option<Vec<f32>> {
        if self.prompt.is_empty() && self.generated.is_empty() {
            return None;
        }
        let mut adjusted = logits.to_vec();
        let repetition = self.params.repetition_penalty;
        // Bounded, because an extreme penalty would make an infinity, and differences of infinities are NaN.
        let repeat = |logit: &mut f32| {
            let scaled = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            *logit = scaled.clamp(f32::MIN, f32::MAX);
        };
        let only_prompt = self.prompt.iter().filter(|token| !self.generated.contains_key(token));
        for &token in only_prompt {
            if let Some(logit) = adjusted.get_mut(token as usize) {
                repeat(logit);
            }
        }
        for (&token, &count) in &self.generated {
            if let Some(logit) = adjusted.get_mut(token as usize) {
                repeat(logit);
                let penalty = self.params.frequency_penalty * count as f32 + self.params.presence_penalty;
                *logit = (*logit - penalty).clamp(f32::MIN, f32::MAX);
            }
        }
        Some(adjusted)
    }
}

fn check(logits: &[f32]) -> Result<(), Error> {
    if logits.is_empty() {
        return Err(Error::Invalid { field: "logits".to_owned(), problem: "is empty".to_owned() });
    }
    // A sum is finite unless an element is not, or so many are huge that it overflows: only then look at each.
    if logits.iter().sum::<f32>().is_finite() {
        return Ok(());
    }
    match logits.iter().position(|logit| !logit.is_finite()) {
        None => Ok(()),
        Some(token) => {
            Err(Error::NotFinite { what: format!("logit of token `{token}`"), value: logits[token] })
        }
    }
}

#[cfg(test)]
mod tests;
