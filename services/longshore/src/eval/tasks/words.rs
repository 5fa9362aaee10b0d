//! Words, names and numbers to make tasks of.

use crate::random::Random;

pub(super) const ADJECTIVES: [&str; 32] = [
    "amber", "brisk", "calm", "dusty", "eager", "faint", "gentle", "hollow", "icy", "jolly", "keen",
    "lively", "mellow", "narrow", "odd", "pale", "quiet", "rapid", "silent", "tidy", "upper", "vivid",
    "warm", "young", "zesty", "ancient", "bold", "crisp", "deep", "early", "fancy", "grand",
];
pub(super) const NOUNS: [&str; 48] = [
    "anchor", "basket", "candle", "desert", "engine", "forest", "garden", "harbour", "island", "jacket",
    "kettle", "ladder", "meadow", "needle", "orchard", "pencil", "quarry", "river", "saddle", "temple",
    "umbrella", "valley", "window", "yard", "zipper", "bridge", "castle", "dragon", "eagle", "falcon",
    "glacier", "hammer", "insect", "jungle", "kitten", "lantern", "mirror", "nugget", "ocean", "pepper",
    "ribbon", "shadow", "timber", "vessel", "walnut", "beacon", "copper", "dinner",
];
const FIRST: [&str; 24] = [
    "Ada", "Bruno", "Clara", "Dmitri", "Elena", "Felix", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Luca",
    "Mira", "Nils", "Olga", "Pavel", "Quinn", "Rosa", "Stefan", "Tara", "Ugo", "Vera", "Wanda", "Yusuf",
];
const SYLLABLES: [&str; 20] = [
    "bar", "cor", "den", "fel", "gar", "hal", "kin", "lor", "mar", "nor", "pel", "ran", "sil", "tor", "val",
    "wen", "bel", "dor", "mon", "ler",
];

/// A unit of noise.
pub(super) const NOISE: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

/// `count` different adjective-noun pairs, `amber-basket`.
pub(super) fn keys(count: usize, random: &mut Random) -> Vec<String> {
    let all = ADJECTIVES.len() * NOUNS.len();
    let pair = |i: usize| format!("{}-{}", ADJECTIVES[i % ADJECTIVES.len()], NOUNS[i / ADJECTIVES.len()]);
    if count <= all {
        return random.distinct(count, all).into_iter().map(pair).collect();
    }
    // Pairs of pairs, when there are not enough.
    let chosen = random.distinct(count, all * all);
    chosen.into_iter().map(|i| format!("{}-{}", pair(i % all), pair(i / all))).collect()
}

/// `count` different numbers of seven digits.
pub(super) fn numbers(count: usize, random: &mut Random) -> Vec<String> {
    random.distinct(count, 9_000_000).into_iter().map(|i| (i + 1_000_000).to_string()).collect()
}

/// A random UUID (version 4).
pub(super) fn uuid(random: &mut Random) -> String {
    let (high, low) = (random.next(), random.next());
    let (a, b, c) = (high >> 32, high >> 16 & 0xffff, high & 0xfff);
    let (d, e) = (low >> 48 & 0x3fff | 0x8000, low & 0xffff_ffff_ffff);
    format!("{a:08x}-{b:04x}-4{c:03x}-{d:04x}-{e:012x}")
}

/// `count` different names of variables, five capital letters.
pub(super) fn variables(count: usize, random: &mut Random) -> Vec<String> {
    let name = |mut i: usize| {
        let mut letter = || {
            let letter = char::from(b'A' + (i % 26) as u8);
            i /= 26;
            letter
        };
        (0..5).map(|_| letter()).collect()
    };
    random.distinct(count, 26usize.pow(5)).into_iter().map(name).collect()
}

/// `count` different full names.
pub(super) fn people(count: usize, random: &mut Random) -> Vec<String> {
    let (first, part) = (FIRST.len(), SYLLABLES.len());
    let capital = |text: &str| text[..1].to_uppercase() + &text[1..];
    let name = |i: usize| {
        let (a, b, c) = (i / first % part, i / first / part % part, i / first / part / part);
        format!("{} {}{}{}", FIRST[i % first], capital(SYLLABLES[a]), SYLLABLES[b], SYLLABLES[c])
    };
    random.distinct(count, first * part.pow(3)).into_iter().map(name).collect()
}

/// `count` different words.
pub(super) fn plain(count: usize, random: &mut Random) -> Vec<String> {
    let part = SYLLABLES.len();
    let word = |i: usize| {
        let (a, b, c) = (i % part, i / part % part, i / part / part % part);
        let fourth = i / part.pow(3);
        let tail = if fourth == 0 { "" } else { SYLLABLES[fourth - 1] };
        format!("{}{}{}{tail}", SYLLABLES[a], SYLLABLES[b], SYLLABLES[c])
    };
    random.distinct(count, part.pow(3) * (part + 1)).into_iter().map(word).collect()
}

/// `count` different coded words of six letters.
pub(super) fn coded(count: usize, random: &mut Random) -> Vec<String> {
    let word = |i: usize| (0..6).map(|n| char::from(b'a' + (i / 26usize.pow(n) % 26) as u8)).collect();
    random.distinct(count, 26usize.pow(6)).into_iter().map(word).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn everything_is_different_and_well_formed() {
        let mut random = Random::new(1);
        let generators = [keys, numbers, variables, people, plain, coded];
        for (index, generate) in generators.into_iter().enumerate() {
            for count in [1, 10, 3000] {
                let made = generate(count, &mut random);
                let different: HashSet<&String> = made.iter().collect();
                assert_eq!((made.len(), different.len()), (count, count), "generator {index}");
            }
        }
        let id = uuid(&mut random);
        let parts: Vec<usize> = id.split('-').map(str::len).collect();
        assert_eq!(parts, [8, 4, 4, 4, 12], "{id}");
        assert_ne!(id, uuid(&mut random));
    }
}
