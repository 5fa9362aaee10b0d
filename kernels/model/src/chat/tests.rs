//! Prompts against those of Jinja2 (`tests/extracts/generate.py`), and templates that mean harm.

use std::time::{Duration, Instant};

use super::*;

#[test]
fn prompts_are_those_of_the_reference() {
    let extract: serde_json::Value =
        serde_json::from_str(include_str!("../../tests/extracts/chat.json")).unwrap();
    let mut refused = 0;
    for case in extract["cases"].as_array().unwrap() {
        let name = case["template"].as_str().unwrap();
        let template =
            ChatTemplate::new(extract["templates"][name].as_str().unwrap(), "<s>", "</s>").unwrap();
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        let messages: Vec<_> = case["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|pair| (text(&pair[0]), text(&pair[1])))
            .collect();
        let rendered = template.render(&messages, case["add_generation_prompt"].as_bool().unwrap());
        match case["prompt"].as_str() {
            Some(prompt) => assert_eq!(rendered.unwrap(), prompt, "{name} {messages:?}"),
            None => {
                refused += 1;
                let error = rendered.unwrap_err().to_string();
                assert!(error.starts_with("`messages` "), "{error}");
                assert!(error.ends_with("roles must alternate"), "{error}");
            }
        }
    }
    assert!(refused > 0, "the extract holds conversations that a template refuses");
}

#[test]
fn a_broken_template_is_refused_when_the_model_is_opened() {
    for source in ["{% if %}", "{{ messages", "{% for x in %}", "{% nonsense %}"] {
        let fault = ChatTemplate::new(source, "", "").unwrap_err();
        assert!(matches!(&fault, Fault::Corrupt { field, .. } if field == NAME), "{source}: {fault:?}");
    }
}

#[test]
fn hostile_templates_run_out_of_fuel() {
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    let doubling = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
    let huge = "{{ 'a' * 99999999999 }}";
    let output = "{% for a in range(99999) %}{{ 'a' * 100000 }}{% endfor %}";
    let spread = "{{ range(99999) | list | tojson(indent=16) }}{% for i in range(9999) %}{{ range(99999) | list | tojson }}{% endfor %}";
    let recursion = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}";
    let shared = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}";
    for source in [endless, doubling, huge, output, spread, recursion, shared] {
        let template = ChatTemplate::new(source, "", "").unwrap();
        let start = Instant::now();
        let error = template.render(&[("user", "x")], true).unwrap_err();
        assert_eq!(error.kind(), crate::Kind::InvalidInput, "{source}: {error}");
        assert!(start.elapsed() < Duration::from_secs(30), "{source} took {:?}", start.elapsed());
    }
}

#[test]
fn templates_have_no_clock_and_no_files() {
    for source in ["{{ strftime_now('%d') }}", "{% include '/etc/passwd' %}", "{{ now() }}"] {
        let template = ChatTemplate::new(source, "", "").unwrap();
        assert!(template.render(&[("user", "x")], true).is_err(), "{source}");
    }
}

#[test]
fn a_prompt_of_megabytes_fits_the_budget() {
    let extract: serde_json::Value =
        serde_json::from_str(include_str!("../../tests/extracts/chat.json")).unwrap();
    for name in ["smollm2", "llama3", "mistral", "qwen3"] {
        let source = extract["templates"][name].as_str().unwrap();
        let template = ChatTemplate::new(source, "<s>", "</s>").unwrap();
        let content = "word ".repeat(2_000_000);
        let prompt = template.render(&[("user", content.as_str())], true).unwrap();
        assert!(prompt.contains(content.trim()), "{name}");
    }
}
