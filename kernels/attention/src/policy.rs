//! Prefill policies: which blocks of its prefix a query tile visits. They own no memory and no threads.

use crate::{Error, PagedKv, Queries};

/// What a plan is made from.
#[derive(Clone, Copy)]
pub struct PlanInput<'a> {
    /// Rotated query rows of one sequence.
    pub queries: Queries<'a>,
    /// Layer, from 0.
    pub layer: usize,
    /// Tiles of the sequence in this layer; tile `i` is block `first_block + i`. Those of the rows are written.
    pub kv: &'a dyn PagedKv,
    /// Block of tile 0.
    pub first_block: u64,
    /// Means of full blocks; tile `s` is stripe `first_block / stripe_blocks + s`.
    pub summaries: &'a dyn PagedKv,
    /// Blocks of a stripe.
    pub stripe_blocks: u32,
    /// Rows from this position on are exact.
    pub dense_from: u64,
}

/// How a prompt is attended to. Stand-in that knows two names and plans nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct PrefillPolicy {
    name: &'static str,
}

const NAMES: [&str; 2] = ["exact", "balanced"];

impl PrefillPolicy {
    /// Every row visits everything.
    pub fn exact() -> Self {
        Self { name: NAMES[0] }
    }

    /// Reads a policy; `plan` is the head plan of the deployment.
    pub fn parse(text: &str, _plan: Option<&HeadPlan>) -> Result<Self, Error> {
        let known = NAMES.into_iter().find(|name| *name == text);
        known.map(|name| Self { name }).ok_or_else(|| Error::Invalid {
            field: "policy",
            problem: format!("is `{}`, must be one of `{}`", text.escape_debug(), NAMES.join("`, `")),
        })
    }

    /// Whether every row visits everything.
    pub fn is_exact(&self) -> bool {
        self.name == NAMES[0]
    }

    /// Canonical text, which names the KV that it makes.
    pub fn fingerprint(&self) -> String {
        self.name.to_owned()
    }

    /// Query tiles at the end of a prompt that are exact.
    pub fn last_tiles(&self) -> u32 {
        4
    }

    /// Positions that chunks are whole multiples of.
    pub fn chunk_multiple(&self) -> usize {
        64
    }

    /// Names that [`Self::parse`] knows.
    pub fn names() -> &'static [&'static str] {
        &NAMES
    }
}

/// What each head of a model visits. Stand-in that reads nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadPlan {}

impl HeadPlan {
    /// Reads MInference's JSON.
    pub fn from_minference_json(
        _text: &str,
        _layers: usize,
        _query_heads: usize,
        _kv_heads: usize,
    ) -> Result<Self, Error> {
        let problem = "is no list of layers".to_owned();
        Err(Error::Invalid { field: "head_plan", problem })
    }

    /// Reads DuoAttention's TSV.
    pub fn from_duo_tsv(
        _text: &str,
        _layers: usize,
        _query_heads: usize,
        _kv_heads: usize,
    ) -> Result<Self, Error> {
        let problem = "is no table of layers and heads".to_owned();
        Err(Error::Invalid { field: "head_plan", problem })
    }
}
