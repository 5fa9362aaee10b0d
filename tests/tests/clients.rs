//! Real clients against the real program: the `openai` package and `grpcio` with code generated from our protos.

use std::process::Command;

use longshore_tests::{
    server::{Server, python},
    tree::root,
};

fn run(script: &str, arguments: &[&str]) {
    let script = root().join("tests/clients").join(script);
    let output = Command::new(python()).arg(&script).args(arguments).env("PYTHONUNBUFFERED", "1").output();
    let output = output.expect("Python starts: `tests/run` provisions it");
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} failed:\n{said}", script.display());
    assert!(said.contains("ok      "), "{} checked nothing:\n{said}", script.display());
}

#[test]
fn the_openai_package_is_served() {
    let server = Server::up(&["--shards", "2"]);
    run("openai_client.py", &[&server.openai]);
}

#[test]
fn a_grpcio_client_from_our_protos_is_served() {
    let server = Server::up(&["--processes", "--shards", "2"]);
    let address = server.grpc.trim_start_matches("http://").to_owned();
    run("grpc_client.py", &[&address, &root().join("proto").display().to_string()]);
}
