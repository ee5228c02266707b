//! The `flux` command as a user meets it: what it prints, where, and its exit codes.

use std::{
    fs,
    io::{Read, Write},
    path::Path,
    process::{Command, Output},
};

/// Runs the command in a folder, with nothing in its environment but these variables.
fn flux(folder: &Path, variables: &[(&str, &str)], arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_flux"))
        .current_dir(folder)
        .env_clear()
        .envs(variables.iter().copied())
        .args(arguments)
        .output()
        .expect("the command can be run")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("the command prints text")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("the command prints text")
}

#[test]
fn config_shows_what_is_in_force_and_where_it_was_set() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::write(folder.path().join("flux.toml"), "fsync = \"no\"\nworkers = 3\n").unwrap();
    let output = flux(folder.path(), &[("FLUX_WORKERS", "2")], &["config", "--partitions", "8"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    let line = |start: &str| text.lines().find(|line| line.starts_with(start)).unwrap_or_default();
    assert!(line("fsync = \"no\" ").ends_with("# flux.toml:1"), "{text}");
    assert!(line("workers = 2 ").ends_with("# environment variable FLUX_WORKERS"), "{text}");
    assert!(line("partitions = 8 ").ends_with("# flag --partitions"), "{text}");
    assert!(line("data_dir = \"./flux-data\" ").ends_with("# default"), "{text}");
}

#[test]
fn a_bad_setting_stops_the_start_and_leaves_nothing() {
    for (variables, arguments, complaint) in [
        (
            &[("FLUX_FSYNK", "no")][..],
            &["up"][..],
            "variable FLUX_FSYNK: there is no setting `fsynk`",
        ),
        (&[], &["server", "--fsync", "maybe"], "flag --fsync: `fsync` is \"maybe\""),
        (&[], &["up", "--data-addr", "0.0.0.0:0"], "flag --data-addr: `data_addr` is 0.0.0.0:0"),
        (&[("FLUX_HTTP_ADDR", "[::]:0")], &["gateway"], "FLUX_HTTP_ADDR: `http_addr` is [::]:0"),
        (&[], &["config", "--config", "none.toml"], "cannot read the configuration file none.toml"),
    ] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let output = flux(folder.path(), variables, arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(stderr(&output).contains(complaint), "{arguments:?}: {}", stderr(&output));
        assert_eq!(stdout(&output), "", "{arguments:?}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{arguments:?}");
    }
}

#[test]
fn an_unknown_flag_is_a_usage_error() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let output = flux(folder.path(), &[], &["up", "--fsynk", "no"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("'--fsynk'"), "{}", stderr(&output));
}

#[test]
fn version_names_the_version() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let output = flux(folder.path(), &[], &["version"]);
    let expected = format!("flux {} (", env!("CARGO_PKG_VERSION"));
    assert!(stdout(&output).starts_with(&expected), "{}", stdout(&output));
}

#[test]
fn the_command_line_says_that_nobody_answers() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("a bound listener").to_string();
    drop(listener);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let output = flux(folder.path(), &[], &["cli", "--addr", &address, "get", "k"]);
    assert_eq!(output.status.code(), Some(2));
    let complaint = format!("cannot connect to {address}");
    assert!(stderr(&output).contains(&complaint), "{}", stderr(&output));
}

#[test]
fn admin_says_that_nobody_answers() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("a bound listener").to_string();
    drop(listener);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let output = flux(folder.path(), &[], &["admin", "status", "--addr", &address]);
    assert_eq!(output.status.code(), Some(1));
    let complaint = format!("flux: cannot reach the admin port {address}");
    assert!(stderr(&output).starts_with(&complaint), "{}", stderr(&output));
    let advice = "--addr wants the admin_addr of a node, 127.0.0.1:7380";
    assert!(stderr(&output).contains(advice), "{}", stderr(&output));
    assert_eq!(stdout(&output), "");
}

#[test]
fn admin_says_that_it_has_reached_another_port() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    // As RESP, gRPC and the gateway do.
    let answers = [
        "-ERR what is that\r\n",
        "\0\0\x06\x04\0\0\0\0\0\0\x05\0\0\x40\0",
        "HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\nno",
    ];
    for answer in answers {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound listener").to_string();
        let other = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut asked = [0; 16];
            stream.read_exact(&mut asked).expect("a question");
            stream.write_all(answer.as_bytes()).expect("answered");
        });
        let output = flux(folder.path(), &[], &["admin", "status", "--addr", &address]);
        other.join().expect("it answered");
        assert_eq!(output.status.code(), Some(1));
        let complaint =
            format!("flux: what answers at {address} is not the admin port of a node: ");
        assert!(stderr(&output).starts_with(&complaint), "{}", stderr(&output));
        let advice = "--addr wants the admin_addr of a node, 127.0.0.1:7380";
        assert!(stderr(&output).contains(advice), "{}", stderr(&output));
    }
}

#[test]
fn admin_says_what_a_partition_is() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for wrong in ["abc", "16384"] {
        let output = flux(folder.path(), &[], &["admin", "move", wrong, "a", "b"]);
        assert_eq!(output.status.code(), Some(2));
        let complaint = "a partition is a number, from 0 to 16383 at most";
        assert!(stderr(&output).contains(complaint), "{}", stderr(&output));
    }
}
