//! What a request may ask of the sampler.

use crate::Error;

/// How the next token is chosen. [`SamplerParams::default`] draws from the whole distribution of the model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplerParams {
    /// Divides the logits; 0 takes the likeliest token, of equals the one with the lowest id.
    pub temperature: f32,
    /// Keeps this many of the likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Keeps the likeliest tokens until their probabilities reach this sum, in (0, 1].
    pub top_p: f32,
    /// Drops tokens less likely than this times the likeliest, in \[0, 1\].
    pub min_p: f32,
    /// Divides positive logits and multiplies negative ones of every token in the prompt or generated; over 0, 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from logits of generated tokens, -2 to 2.
    pub presence_penalty: f32,
    /// Subtracted from logits of generated tokens once for each time that they were, -2 to 2.
    pub frequency_penalty: f32,
    /// With the index of a token, fixes its draw.
    pub seed: u64,
    /// Report the chosen token's logprob and those of this many of the likeliest tokens.
    pub logprobs: Option<u32>,
}

impl Default for SamplerParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            logprobs: None,
        }
    }
}

impl SamplerParams {
    /// Most likeliest tokens that an answer may report, as at OpenAI.
    pub const MAX_LOGPROBS: u32 = 20;

    /// Parameters that take the likeliest token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Checks every range (NaN and infinities are in none) and names the field that is out of its own.
    pub fn validate(&self) -> Result<(), Error> {
        let check = |field: &str, value: f32, good: bool, range: &str| {
            if good && value.is_finite() {
                return Ok(());
            }
            Err(Error::Invalid { field: field.to_owned(), problem: format!("is {value}, must be {range}") })
        };
        let t = self.temperature;
        check("temperature", t, t >= 0.0, "finite and at least 0; hint: 0 is greedy")?;
        check(
            "top_p",
            self.top_p,
            self.top_p > 0.0 && self.top_p <= 1.0,
            "over 0 and at most 1; hint: 1 is off",
        )?;
        check("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "from 0 to 1; hint: 0 is off")?;
        let r = self.repetition_penalty;
        check("repetition_penalty", r, r > 0.0, "finite and over 0; hint: 1 is off")?;
        let presence = self.presence_penalty;
        check(
            "presence_penalty",
            presence,
            (-2.0..=2.0).contains(&presence),
            "from -2 to 2; hint: 0 is off",
        )?;
        let frequency = self.frequency_penalty;
        check(
            "frequency_penalty",
            frequency,
            (-2.0..=2.0).contains(&frequency),
            "from -2 to 2; hint: 0 is off",
        )?;
        match self.logprobs {
            Some(n) if n > Self::MAX_LOGPROBS => Err(Error::Invalid {
                field: "logprobs".to_owned(),
                problem: format!("is {n}, must be at most {}", Self::MAX_LOGPROBS),
            }),
            _ => Ok(()),
        }
    }

    /// Whether generated tokens change anything.
    pub(super) fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}
