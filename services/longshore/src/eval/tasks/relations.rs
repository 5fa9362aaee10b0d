//! Chains: variables assigned to each other (RULER's `vt`), threads through a JSON object, ancestors.

use super::{Task, buried, words};
use crate::{eval::score::Metric, random::Random};

/// Assignments after the first.
const HOPS: usize = 4;
/// Keys of a thread.
const THREAD: usize = 4;
/// People of a family.
const FAMILY: usize = 5;

/// All variables that have a value, over four assignments in noise.
pub(super) fn variables(units: usize, random: &mut Random) -> Task {
    let names = words::variables(HOPS + 1, random);
    let value = (10_000 + random.below(90_000)).to_string();
    let mut lines = vec![format!("VAR {} = {value}", names[0])];
    lines.extend(names.windows(2).map(|pair| format!("VAR {} = VAR {}", pair[1], pair[0])));
    let mut depths: Vec<f64> = lines.iter().map(|_| random.unit()).collect();
    depths.sort_by(f64::total_cmp);
    let hay = vec![words::NOISE.to_owned(); units];
    let context = buried(hay, depths.into_iter().zip(lines).collect());
    let prompt = format!(
        "Remember the chains of variable assignments that are hidden in the following text.\n{context}\n\
         Find all variables that have the value {value} in the text above."
    );
    Task {
        prompt,
        prefix: format!(
            "By the chain of assignments in the text above, {} variables have the value {value}:",
            HOPS + 1
        ),
        answers: names,
        metric: Metric::All,
        answer_tokens: 60,
    }
}

/// The end of a thread: each value is the next key, further on in the object.
pub(super) fn threading(units: usize, random: &mut Random) -> Task {
    let pairs = units.max(THREAD);
    let mut keys: Vec<String> = (0..pairs).map(|_| words::uuid(random)).collect();
    let mut values: Vec<String> = (0..pairs).map(|_| words::uuid(random)).collect();
    let mut thread = random.distinct(THREAD, pairs);
    thread.sort_unstable();
    for step in thread.windows(2) {
        keys[step[1]].clone_from(&values[step[0]]);
    }
    let (first, end) = (keys[thread[0]].clone(), std::mem::take(&mut values[thread[THREAD - 1]]));
    values[thread[THREAD - 1]].clone_from(&end);
    let entries: Vec<String> =
        keys.iter().zip(&values).map(|(key, value)| format!("\"{key}\": \"{value}\"")).collect();
    let prompt = format!(
        "The following JSON object has keys and values that are UUIDs. The value of a key may be another key: following them is a thread.\n\
         {{{}}}\nBegin with the key \"{first}\". Its value is a key too, and so on. What is the last value of the thread?",
        entries.join(",\n")
    );
    let prefix = "The last value of the thread is \"".to_owned();
    Task { prompt, prefix, answers: vec![end], metric: Metric::Part, answer_tokens: 64 }
}

/// The eldest of a family, over four relations, among other families.
pub(super) fn ancestry(units: usize, random: &mut Random) -> Task {
    let families = units.div_ceil(FAMILY - 1).max(1);
    let people = words::people(families * FAMILY, random);
    let relations = [("father", "son"), ("mother", "daughter"), ("grandfather", "grandson")];
    let mut lines = Vec::new();
    for family in people.chunks(FAMILY) {
        for pair in family.windows(2) {
            let (elder, younger) = *random.choose(&relations);
            lines.push(match random.below(2) {
                0 => format!("{} is the {elder} of {}.", pair[1], pair[0]),
                _ => format!("{} is a {younger} of {}.", pair[0], pair[1]),
            });
        }
    }
    random.shuffle(&mut lines);
    let asked = &people[0];
    let prompt = format!(
        "Here are kinship relations.\n{}\nBy the relations above, who is the eldest relative to whom {asked} can be traced back?",
        lines.join("\n")
    );
    let prefix = format!("The eldest relative to whom {asked} can be traced back is");
    let eldest = people[FAMILY - 1].clone();
    Task { prompt, prefix, answers: vec![eldest], metric: Metric::Part, answer_tokens: 32 }
}
