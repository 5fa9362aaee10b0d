//! Prefill policies of a router: the deployment's default, and what requests ask for. Decides nothing about blocks.

use std::sync::Arc;

use longshore_attention::{HeadPlan, PrefillPolicy};

use crate::Error;

/// Policy of deployments that name none; the one place that says so.
pub const DEFAULT_PREFILL_POLICY: &str = "exact";

/// Longest canonical text that travels, in bytes.
const FINGERPRINT_BYTES_MAX: usize = 256;
/// Name of policies that are put together by hand, in labels.
const OTHER: &str = "other";

/// The policies that requests of a deployment may name.
#[derive(Debug, Clone)]
pub struct Policies {
    head_plan: Option<Arc<HeadPlan>>,
    default: Chosen,
}

/// The policy of one request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Chosen {
    /// Canonical text: part of the namespace, and what prefill workers are told.
    pub(crate) fingerprint: String,
    /// Name for labels; one of a few.
    pub(crate) name: String,
    /// What it means.
    policy: PrefillPolicy,
}

impl Policies {
    /// Policies with the default of `router.prefill_policy` and the head plan of the deployment. Refuses a default that
    /// requests could not name either.
    pub fn new(default: &str, head_plan: Option<Arc<HeadPlan>>) -> Result<Self, Error> {
        let default = Chosen::parse("router.prefill_policy", default, head_plan.as_deref())?;
        Ok(Self { head_plan, default })
    }

    /// Names that policies begin with.
    pub fn names() -> impl Iterator<Item = &'static str> {
        PrefillPolicy::names().iter().map(|(name, _)| *name)
    }

    /// The policy that a request names; without a name the default.
    pub(crate) fn choose(&self, text: &str) -> Result<Chosen, Error> {
        if text.is_empty() {
            return Ok(self.default.clone());
        }
        Chosen::parse("prefill_policy", text, self.head_plan.as_deref())
    }
}

impl Chosen {
    fn parse(field: &str, text: &str, plan: Option<&HeadPlan>) -> Result<Self, Error> {
        let policy =
            PrefillPolicy::parse(text, plan).map_err(|error| Error::invalid(field, problem(&error)))?;
        let fingerprint = policy.fingerprint();
        if fingerprint.len() > FINGERPRINT_BYTES_MAX {
            let problem = format!(
                "has a canonical text of {} bytes, limit {FINGERPRINT_BYTES_MAX}; hint: give its numbers fewer digits",
                fingerprint.len()
            );
            return Err(Error::invalid(field, problem));
        }
        Ok(Self { fingerprint, name: label(text), policy })
    }

    /// Position from which on rows are exact, for a prompt of `prompt_tokens` tokens as the client sent it, of which prefill
    /// workers store the first `stored_tokens`: on the grid of query tiles, so that it cuts none. The decode worker computes the rest
    /// exactly, and so does whoever computes it again. What was generated since does not count, so that a request that is begun
    /// again keeps its value.
    pub(crate) fn dense_from(&self, prompt_tokens: u64, stored_tokens: u64) -> u64 {
        let tile = longshore_attention::QUERY_TILE as u64;
        self.policy.dense_from(prompt_tokens).min(stored_tokens / tile * tile)
    }

    /// What decode workers are told: the policy where it has heads that stream in answers too.
    pub(crate) fn in_answers(&self) -> &str {
        if self.policy.streams_answers() { &self.fingerprint } else { longshore_blocks::EXACT_PREFILL }
    }
}

/// What is wrong with a policy, as a verb phrase, with the remedy: a head plan, or the names that there are.
fn problem(error: &longshore_attention::Error) -> String {
    let told = error.to_string();
    if matches!(error, longshore_attention::Error::Invalid { field: "plan", .. }) {
        return format!("cannot be used: {told}; hint: set `model.head_plan` of routers and prefill workers");
    }
    if Policies::names().all(|name| told.contains(name)) {
        return format!("cannot be used: {told}");
    }
    let names: Vec<_> = Policies::names().collect();
    format!("cannot be used: {told}; hint: policies are named {}", names.join(", "))
}

/// The name that a policy's text begins with when it is a known one, so that labels stay few.
fn label(text: &str) -> String {
    let name = text.split(':').next().unwrap_or_default().trim();
    let known = Policies::names().any(|known| known == name);
    if known { name.to_owned() } else { OTHER.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policies(default: &str) -> Policies {
        Policies::new(default, None).expect("the default is known")
    }

    #[test]
    fn requests_get_what_they_name_or_the_default() {
        for default in ["exact", "balanced"] {
            let policies = policies(default);
            assert_eq!(policies.choose("").unwrap(), policies.choose(default).unwrap());
            assert_ne!(
                policies.choose("exact").unwrap().fingerprint,
                policies.choose("balanced").unwrap().fingerprint
            );
        }
        assert!(Policies::new(DEFAULT_PREFILL_POLICY, None).is_ok());
    }

    #[test]
    fn exact_has_the_fingerprint_that_keeps_its_namespaces() {
        let exact = policies("exact").choose("").unwrap();
        assert_eq!(exact.fingerprint, longshore_blocks::EXACT_PREFILL);
    }

    #[test]
    fn what_is_no_policy_names_the_field_and_what_there_is() {
        let refused = [
            ("router.prefill_policy", Policies::new("sparsest", None).err()),
            ("prefill_policy", policies("exact").choose("sparsest").err()),
            ("prefill_policy", policies("exact").choose(" ").err()),
            ("prefill_policy", policies("exact").choose("exact exact").err()),
            ("prefill_policy", policies("exact").choose("\n").err()),
        ];
        for (field, error) in refused {
            let error = error.expect("it is refused").to_string();
            assert!(error.starts_with(&format!("`{field}` cannot be used: ")), "{error}");
            for name in Policies::names() {
                assert!(error.contains(name), "{name} is not listed: {error}");
            }
        }
    }

    #[test]
    fn a_policy_without_its_head_plan_says_where_one_is_set() {
        let error = longshore_attention::Error::Invalid { field: "plan", problem: "is missing".to_owned() };
        let told = problem(&error);
        assert!(told.contains("`plan` is missing; hint: set `model.head_plan`"), "{told}");
    }

    #[test]
    fn the_exact_tail_begins_on_a_query_tile() {
        let policies = policies("balanced");
        let balanced = policies.choose("balanced").unwrap();
        let tail = u64::from(PrefillPolicy::parse("balanced", None).unwrap().last_tiles()) * 32;
        assert_eq!(balanced.dense_from(1_000, 320), 320, "rows of the decode worker are exact");
        assert_eq!(balanced.dense_from(1_000, 336), 320, "between tiles");
        for (prompt_tokens, expected) in [
            (1, 0),
            (tail, 0),
            (tail + 31, 0),
            (tail + 32, 32),
            (tail + 63, 32),
            (tail + 64, 64),
            (tail + 1_000_000, 1_000_000),
            (u64::MAX, (u64::MAX - tail) / 32 * 32),
        ] {
            assert_eq!(balanced.dense_from(prompt_tokens, prompt_tokens), expected, "{prompt_tokens}");
            assert_eq!(policies.choose("exact").unwrap().dense_from(prompt_tokens, prompt_tokens), 0);
        }
    }

    #[test]
    fn decode_workers_are_told_of_policies_that_stream() {
        let policies = policies("exact");
        for silent in ["exact", "balanced", "fast", "minference"] {
            assert_eq!(policies.choose(silent).unwrap().in_answers(), "exact", "{silent}");
        }
        let streaming = policies.choose("streaming").unwrap();
        assert_eq!(streaming.in_answers(), streaming.fingerprint);
    }

    #[test]
    fn labels_are_names_that_there_are() {
        assert_eq!(label("exact"), "exact");
        assert_eq!(label("balanced"), "balanced");
        assert_eq!(label(" balanced: alpha=0.1"), "balanced");
        for odd in ["", ":", "balancedx", "zufällig", "=", "exact-ish"] {
            assert_eq!(label(odd), OTHER, "{odd}");
        }
    }
}
