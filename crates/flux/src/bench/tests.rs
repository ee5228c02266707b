//! What a run reports.

use clap::Parser;
use serde_json::Value;

use super::{measure::Measurements, *};

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    args: Args,
}

fn parsed(flags: &str) -> Result<(Option<Phase>, Phase), String> {
    let words = std::iter::once("bench").chain(flags.split_whitespace());
    let command = Command::try_parse_from(words).map_err(|error| error.to_string())?;
    phases(&command.args).map_err(|error| error.to_string())
}

#[test]
fn defaults_are_a_closed_loop_of_ten_seconds() {
    let (load, main) = parsed("").unwrap();
    assert!(load.is_none());
    assert_eq!(main.protocol, Protocol::Resp);
    assert_eq!(main.addresses, ["127.0.0.1:7379"]);
    assert_eq!((main.clients, main.pipeline, main.threads), (50, 1, 1));
    assert_eq!((main.rate, main.requests, main.duration), (None, None, Some(DEFAULT_DURATION)));
    assert_eq!(main.shape.mix.to_string(), "set=50,get=50");
    assert_eq!((main.shape.keys, main.shape.key_size, main.shape.value_size), (1_000_000, 16, 64));
}

#[test]
fn arguments_reach_the_phase() {
    let (_, main) = parsed(
        "--protocol grpc --clients 8 --pipeline 16 --threads 2 --duration 2.5 --warmup 1 --rate 1e4 \
         --mix set=1,get=2,incr=3,del=4 --keys 10 --dist zipf:1.1 --key-size 20 --value-size 0 \
         --ttl-ms 5000 --seed 9",
    )
    .unwrap();
    assert_eq!(main.addresses, ["127.0.0.1:50052"]);
    assert_eq!((main.clients, main.pipeline, main.threads), (8, 16, 2));
    assert_eq!(main.duration, Some(Duration::from_millis(2500)));
    assert_eq!((main.rate, main.warmup), (Some(1e4), Duration::from_secs(1)));
    assert_eq!(main.shape.mix.to_string(), "set=1,get=2,incr=3,del=4");
    assert_eq!(main.shape.distribution, Some(Distribution::Zipf(1.1)));
    assert_eq!((main.shape.ttl_ms, main.shape.seed), (Some(5000), 9));
}

#[test]
fn connections_take_turns_among_several_servers() {
    let (_, main) = parsed("--addr a:1,b:2,c:3").unwrap();
    let addresses: Vec<_> = (0..4).map(|client| main.address(client)).collect();
    assert_eq!(addresses, ["a:1", "b:2", "c:3", "a:1"]);
    assert!(parsed("--addr a:1,b").unwrap_err().contains("host and a port"));
}

#[test]
fn a_cluster_is_for_resp_and_is_filled_as_one() {
    let (load, main) = parsed("--cluster --load").unwrap();
    assert!(main.cluster && load.unwrap().cluster);
    assert!(!parsed("").unwrap().1.cluster);
    assert!(parsed("--cluster --protocol native").unwrap_err().contains("--protocol resp"));
}

#[test]
fn filling_writes_each_key_once() {
    let (load, main) = parsed("--load --requests 0 --keys 500 --rate 5").unwrap();
    let load = load.expect("filling was asked for");
    assert_eq!((load.requests, load.rate, load.duration), (Some(500), None, None));
    assert_eq!(load.shape.mix, Mix::only(Operation::Set));
    assert_eq!(load.shape.distribution, None);
    assert_eq!(main.requests, Some(0));
}

#[test]
fn what_makes_no_sense_is_refused() {
    for (flags, problem) in [
        ("--requests 0", "makes sense with --load only"),
        ("--requests 5 --duration 1", "cannot be used with"),
        ("--keys 10000000 --key-size 10", "at least 11"),
        ("--threads 4 --clients 2", "more than --clients"),
        ("--clients 0", "0 is not in 1..=100000"),
        ("--rate 0", "over 0"),
        ("--rate nan", "over 0"),
        ("--duration -1", "unexpected argument"),
        ("--duration=-1", "number of seconds"),
        ("--mix put=1", "no operation"),
        ("--dist normal", "uniform, zipf"),
        ("--protocol http", "possible values: resp, native, grpc"),
        ("--value-size 16777217", "is not in"),
    ] {
        let error = parsed(flags).expect_err(flags);
        assert!(error.contains(problem), "{flags}: {error}");
    }
}

#[test]
fn quotas_of_all_parts_add_up() {
    let (_, main) = parsed("--requests 1003 --clients 7").unwrap();
    let parts = (0..7).filter_map(|lane| main.quota(phase::Share { lane, lanes: 7 }));
    assert_eq!(parts.sum::<u64>(), 1003);
}

fn report() -> Report {
    let (_, main) = parsed("--rate 1000").unwrap();
    let mut measurements = Measurements::default();
    measurements.unsent = 3;
    for number in 1..=1000 {
        measurements.success(Operation::Set, Duration::from_micros(number));
    }
    measurements.failure("OVERLOADED", 20);
    measurements.failure("ERR", 1);
    let outcome = Outcome { measurements, elapsed: Duration::from_secs(2) };
    let figures = Figures::of(&outcome, Duration::from_millis(1021));
    Report { version: "1", settings: Settings::of(&main), load: None, run: Some(figures) }
}

#[test]
fn the_json_has_a_stable_shape() {
    let json: Value = serde_json::to_value(report()).unwrap();
    assert_eq!(json["settings"]["protocol"], "resp");
    assert_eq!(json["settings"]["mix"], "set=50,get=50");
    assert_eq!(json["settings"]["rate"], 1000.0);
    assert_eq!(json["load"], Value::Null);
    let run = &json["run"];
    assert_eq!(run["requests"], 1000);
    assert_eq!(run["throughput_per_s"], 500.0);
    assert_eq!(run["errors"]["total"], 24);
    assert_eq!(run["errors"]["overloaded"], 20);
    assert_eq!(run["errors"]["unsent"], 3);
    assert_eq!(run["errors"]["by_kind"]["ERR"], 1);
    assert_eq!(run["client_cpu_us_per_request"], 1000.0);
    let latency = &run["operations"]["set"]["latency_us"];
    for (name, expected) in [
        ("min", 1.0),
        ("p50", 500.0),
        ("p90", 900.0),
        ("p99", 990.0),
        ("p99_9", 999.0),
        ("p99_99", 1000.0),
        ("max", 1000.0),
        ("mean", 500.5),
    ] {
        let value = latency[name].as_f64().unwrap();
        assert!((value / expected - 1.0).abs() < 2e-3, "{name}: {value}");
    }
    assert_eq!(run["operations"].as_object().unwrap().len(), 1);
}

#[test]
fn the_table_names_errors() {
    let text = report().to_text();
    assert!(text.contains("open loop at 1000/s"), "{text}");
    assert!(text.contains("errors: 24 (ERR 1, OVERLOADED 20, unsent 3)"), "{text}");
    assert!(text.lines().any(|line| line.starts_with("set           1000        500")), "{text}");
}
