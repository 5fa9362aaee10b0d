//! Plans of budgets: what each head visits, what names mean, and what is refused.

use longshore_attention::{BudgetLevel, CpuExecutor, Error, HeadBudgets, HeadPlan, PrefillPolicy, Visit};

use crate::case::{Case, Shape, generator, policy};

fn level(name: &str, blocks: &str, heads: &[&[&str]]) -> BudgetLevel {
    let layer = |layer: &&[&str]| layer.iter().map(|head| (*head).to_owned()).collect();
    BudgetLevel {
        name: name.to_owned(),
        note: String::new(),
        blocks: blocks.to_owned(),
        heads: heads.iter().map(layer).collect(),
    }
}

/// A plan of six layers of two heads, each the same.
fn plan(levels: &[(&str, &str, [&str; 2])]) -> HeadPlan {
    let levels = levels.iter().map(|(name, blocks, heads)| level(name, blocks, &[&heads[..]; 6])).collect();
    HeadBudgets::new("test", levels, 6, 2).unwrap().into()
}

fn parse(text: &str, plan: &HeadPlan) -> Result<PrefillPolicy, Error> {
    PrefillPolicy::parse(text, Some(plan))
}

fn lists(case: &Case, policy: &PrefillPolicy) -> [Vec<Vec<Visit>>; 2] {
    let work = case.plan(policy);
    [0, 1].map(|kv_head| (0..work.tiles()).map(|tile| work.list(kv_head, tile).to_vec()).collect())
}

/// A head visits what it would visit if all heads had its rule; a dense one everything.
#[test]
fn every_head_has_its_own_rule() {
    let guards = "dense_layers=0,min_positions=64";
    let rules = [
        "scorer=row-normalised,selector=mass,gamma=0.5",
        "scorer=pooled,selector=alpha,alpha=0.3,sink=1,local=0",
        "scorer=antidiagonal,selector=mass,gamma=0.6",
        "scorer=second-order,selector=top-k,k=3,peak=0.4",
        "scorer=pooled-query,selector=mass,gamma=0.7,correction=off",
        "dense",
    ];
    let case = Shape { tokens: 1200, ..Shape::default() }.case(&mut generator(3));
    let of = |rule: &str| match rule {
        "dense" => lists(&case, &policy("exact")),
        rule => lists(&case, &policy(&format!("blocks:{rule},{guards}"))),
    };
    let exact = of("dense");
    for (first, second) in rules.into_iter().zip(rules.into_iter().cycle().skip(1)) {
        let plan = plan(&[("a", "", [first, second])]);
        let found = lists(&case, &parse(&format!("heads:{guards}"), &plan).unwrap());
        assert_eq!(found, [of(first)[0].clone(), of(second)[1].clone()], "{first} and {second}");
        assert_ne!(found, exact, "{first} and {second} leave something out");
    }
}

#[test]
fn shared_keys_lie_beneath_those_of_a_head() {
    let guards = "dense_layers=0,min_positions=0";
    let case = Shape::default().case(&mut generator(4));
    let shared = "scorer=row-normalised,selector=mass,gamma=0.5,local=1,peak=0.9";
    let plan = plan(&[("a", shared, ["", "gamma=0.8,local=0"])]);
    let found = lists(&case, &parse(&format!("heads:{guards}"), &plan).unwrap());
    let first = lists(&case, &policy(&format!("blocks:{shared},{guards}")));
    let second = shared.replace("gamma=0.5,local=1", "gamma=0.8,local=0");
    let second = lists(&case, &policy(&format!("blocks:{second},{guards}")));
    assert_eq!(found, [first[0].clone(), second[1].clone()]);
}

#[test]
fn a_mistyped_key_is_told_the_keys_of_both_forms() {
    let plan = plan(&[("balanced", "selector=mass", ["gamma=0.5", "dense"])]);
    let told = parse("balanced:gama=0.9", &plan).unwrap_err().to_string();
    for key in ["`gama`", "plan", "last_tiles", "gamma", "scorer", "peak", "in place of the head plan"] {
        assert!(told.contains(key), "{key}: {told}");
    }
    // Without a level there is one form.
    let told = parse("faithful:gama=0.9", &plan).unwrap_err().to_string();
    assert!(told.contains("gamma") && !told.contains("in place of"), "{told}");
}

#[test]
fn layers_that_are_dense_are_exact() {
    let heads: Vec<&[&str]> = vec![&["dense", "dense"], &["dense", "gamma=0.5"]];
    let budgets = HeadBudgets::new("test", vec![level("a", "selector=mass", &heads)], 2, 2).unwrap();
    let policy = parse("heads:min_positions=70", &budgets.into()).unwrap();
    assert!(!policy.is_exact());
    // Deeper than the plan: refused, not guessed.
    let case = Shape::default().case(&mut generator(5));
    let deeper = policy.plan(&CpuExecutor::serial(), &case.input(0, case.shape.tokens));
    assert!(deeper.unwrap_err().to_string().contains("has 2 layers, this is layer 5"));
}

#[test]
fn presets_mean_the_level_of_their_name() {
    let plan = plan(&[
        ("balanced", "selector=mass", ["gamma=0.5", "dense"]),
        ("mine", "selector=mass", ["gamma=0.7", "dense"]),
    ]);
    let balanced = parse("balanced", &plan).unwrap();
    assert!(balanced.fingerprint().starts_with("heads:plan="), "{balanced}");
    assert_eq!(parse(&balanced.fingerprint(), &plan).unwrap(), balanced);
    assert_eq!(parse("heads:level=balanced", &plan).unwrap(), balanced);
    assert_ne!(parse("heads:level=mine", &plan).unwrap(), balanced);
    assert_eq!(parse("balanced:last_tiles=9", &plan).unwrap().last_tiles(), 9);
    // What says how blocks are chosen does not mean the plan, and neither does a preset that it has no level of.
    for text in
        ["balanced:plan=off", "balanced:gamma=0.8", "balanced:peak=off", "faithful", "blocks", "minference"]
    {
        let without = policy(text.trim_end_matches(":plan=off"));
        assert_eq!(parse(text, &plan).unwrap(), without, "{text}");
    }
    assert_eq!(policy("balanced:plan=off"), policy("balanced"));
}

#[test]
fn levels_are_told_apart_by_what_they_say() {
    let text = |gamma: &str, note: &str| {
        let mut level = level("a", "selector=mass", &[&[gamma, "dense"]]);
        level.note = note.to_owned();
        let budgets = HeadBudgets::new(note, vec![level], 1, 2).unwrap();
        PrefillPolicy::parse("heads", Some(&budgets.into())).unwrap().fingerprint()
    };
    assert_eq!(text("gamma=0.5", ""), text("gamma=0.50", "a note"));
    assert_eq!(text("gamma=0.5", ""), text("gamma=0.5,sink=2", ""));
    assert_ne!(text("gamma=0.5", ""), text("gamma=0.6", ""));
    assert_ne!(text("gamma=0.5", ""), text("dense", ""));
}

#[test]
fn files_read_back() {
    let mut first = level("balanced", "scorer=antidiagonal", &[&["", "dense"], &["alpha=0.5", "alpha=0"]]);
    first.note = "a \"note\"\n".to_owned();
    let second = level("b-2", "", &[&["selector=top-k,k=3", "dense"], &["dense", "dense"]]);
    let budgets = HeadBudgets::new("a model", vec![first, second], 2, 2).unwrap();
    let text = budgets.to_json();
    assert_eq!(HeadBudgets::from_json(&text, 2, 2).unwrap(), budgets, "{text}");
    let plan = HeadPlan::from(budgets);
    assert_eq!((plan.layers(), plan.heads(), plan.layer(0)), (2, 2, &[][..]));
    assert_eq!(
        plan.budgets().unwrap().levels().map(|level| level.name.as_str()).collect::<Vec<_>>(),
        ["balanced", "b-2"]
    );
}

#[track_caller]
fn refused<T: std::fmt::Debug>(found: Result<T, Error>, says: &str) {
    match found {
        Err(Error::Invalid { problem, .. }) => {
            assert!(problem.contains(says), "{problem} does not say {says}");
            assert!(problem.len() < 600, "{} bytes", problem.len());
        }
        other => panic!("not refused: {other:?}"),
    }
}

const FILE: &str = r#"{"format": "longshore-head-budgets", "version": 1, "levels": [
    {"name": "a", "blocks": "selector=mass", "heads": [["gamma=0.5", "dense"]]}]}"#;

#[test]
fn hostile_files() {
    let read = |text: &str| HeadBudgets::from_json(text, 1, 2);
    let with = |from: &str, to: &str| {
        assert!(FILE.contains(from));
        read(&FILE.replace(from, to))
    };
    assert!(read(FILE).is_ok());
    refused(read(""), "no plan of budgets");
    refused(read("[]"), "no plan of budgets");
    refused(read("{}"), "missing field `format`");
    refused(read(&"{".repeat(1 << 20)), "no plan of budgets");
    refused(read(&" ".repeat((16 << 20) + 1)), "limit");
    refused(with("longshore-head-budgets", "gguf"), "must be `longshore-head-budgets`");
    refused(with("\"version\": 1", "\"version\": 2"), "this program reads 1");
    refused(with("\"version\": 1", "\"version\": -1"), "no plan of budgets");
    refused(with("\"name\"", "\"extra\": 1, \"name\""), "unknown field `extra`");
    refused(with("\"name\": \"a\"", "\"name\": \"\""), "has the level ``");
    refused(with("\"name\": \"a\"", "\"name\": \"A b\""), "a to z");
    refused(with("\"name\": \"a\"", &format!("\"name\": \"{}\"", "a".repeat(1 << 16))), "1 to 32");
    refused(with(r#"["gamma=0.5", "dense"]"#, r#"["gamma=0.5"]"#), "has 1 heads in layer 0");
    refused(with(r#"["gamma=0.5", "dense"]"#, r#"["", "", ""]"#), "the model has 2 KV heads");
    refused(with(r#"["gamma=0.5", "dense"]"#, r#"["", ""], ["", ""]"#), "has 2 layers");
    refused(with(r#"["gamma=0.5", "dense"]"#, "[0.5, 1]"), "no plan of budgets");
    for value in ["-0.1", "NaN", "inf", "1.01", "1e30", "", "x"] {
        let said = "no budget for head 0 of layer 0 in level a: `gamma`";
        refused(with("gamma=0.5", &format!("gamma={value}")), said);
    }
    refused(with("gamma=0.5", "sparse"), "key=value");
    refused(with("gamma=0.5", "alpha=0.5"), "has the key `alpha`");
    refused(with("gamma=0.5", "gamma=0.5,gamma=0.5"), "twice");
    refused(with("gamma=0.5", "gamma=0.5,last_tiles=3"), "last_tiles");
    refused(with("gamma=0.5", "selector=top-k,k=-1"), "`k`");
    refused(with("gamma=0.5", "peak=-1"), "`peak`");
    refused(with("gamma=0.5", "selector=best"), "alpha, mass, top-k");
    refused(with("selector=mass", "selector=mass,skip=3"), "`skip`");
    refused(with("selector=mass", "selector=mass,selector=mass"), "twice");
    refused(with("selector=mass", "selector=most"), "alpha, mass, top-k");
    // What all share counts even where no head uses it.
    refused(read(&FILE.replace("gamma=0.5", "dense").replace("=mass", "=most")), "alpha, mass, top-k");
    refused(HeadBudgets::from_json(FILE, 2, 2), "the model has 2");
    refused(HeadBudgets::from_json(FILE, 0, 0), "layers");
}

#[test]
fn hostile_levels() {
    let one = || level("a", "", &[&["", ""]]);
    refused(HeadBudgets::new("", vec![], 1, 2), "has 0 levels");
    refused(HeadBudgets::new("", vec![one(); 2], 1, 2), "has the level `a` twice");
    let many = (0..17).map(|i| BudgetLevel { name: format!("a{i}"), ..one() }).collect();
    refused(HeadBudgets::new("", many, 1, 2), "must have 1 to 16");
    let long = BudgetLevel { note: "n".repeat(5000), ..one() };
    refused(HeadBudgets::new("", vec![long], 1, 2), "limit 4096");
    refused(HeadBudgets::new(&"m".repeat(5000), vec![one()], 1, 2), "limit 4096");
}

#[test]
fn unknown_levels_are_refused() {
    let plan = plan(&[("a", "", ["", "dense"]), ("b", "", ["dense", ""])]);
    refused(parse("heads", &plan), "is missing, must be one of: a, b");
    refused(parse("heads:level=c", &plan), "must be one of: a, b");
    refused(parse("heads:plan=00", &plan), "no such level");
    refused(parse("balanced:plan=00", &plan), "must be `off`");
    let a = parse("heads:level=a", &plan).unwrap().fingerprint();
    refused(parse(&format!("{a},level=b"), &plan), "no such level");
}
