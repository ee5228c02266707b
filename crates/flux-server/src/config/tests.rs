//! Where settings come from, and what is said of wrong ones.

use std::{fs, path::PathBuf};

use super::*;

fn environment(pairs: &[(&str, &str)]) -> Inputs {
    Inputs { environment: owned(pairs), ..Inputs::default() }
}

fn owned(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// Loads with the text as `flux.toml`, and gives the error with the folder's name taken out.
fn from_file(text: &str, mut inputs: Inputs) -> Result<Configuration, String> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("flux.toml");
    fs::write(&path, text).expect("the file can be written");
    inputs.file = Some(path);
    let shown = folder.path().display().to_string() + "/";
    Configuration::load(&inputs).map_err(|error| error.to_string().replace(&shown, ""))
}

fn from_environment(variable: &str, value: &str) -> Result<Settings, String> {
    Configuration::load(&environment(&[(variable, value)]))
        .map(|configuration| configuration.settings)
        .map_err(|error| error.to_string())
}

#[test]
fn defaults_are_those_of_the_table() {
    let settings = Configuration::load(&Inputs::default()).expect("nothing to refuse").settings;
    assert_eq!(settings, Settings::default());
    assert_eq!(settings.data_addr, "127.0.0.1:7379".parse().unwrap());
    assert_eq!(settings.fsync, Fsync::Always);
    assert_eq!(settings.output_buffer_limit, 64 << 20);
    assert_eq!(settings.gateway_kv_endpoints, ["127.0.0.1:7379"]);
    assert!(settings.worker_count() >= 1);
    for setting in SETTINGS {
        assert_eq!(
            settings.text(setting.name).as_deref(),
            Some(setting.default),
            "{}",
            setting.name
        );
    }
    for role in [Role::Up, Role::Server, Role::Gateway] {
        settings.validate(role).expect("the defaults are safe");
    }
}

#[test]
fn flags_overrule_the_environment_and_that_the_file() {
    let mut inputs = environment(&[("FLUX_WORKERS", "2"), ("FLUX_FSYNC", "no"), ("HOME", "/")]);
    inputs.flags = owned(&[("fsync", "everysec")]);
    let configuration =
        from_file("# a comment\nworkers = 1\nfsync = \"always\"\n\npartitions = 4\n", inputs)
            .unwrap();
    assert_eq!(configuration.settings.workers, 2);
    assert_eq!(configuration.settings.fsync, Fsync::EverySec);
    assert_eq!(configuration.settings.partitions, 4);
    assert_eq!(configuration.origin("fsync").to_string(), "flag --fsync");
    assert_eq!(configuration.origin("workers").to_string(), "environment variable FLUX_WORKERS");
    assert!(configuration.origin("partitions").to_string().ends_with("flux.toml:5"));
    assert_eq!(configuration.origin("data_dir"), Origin::Default);
}

#[test]
fn an_unknown_setting_names_itself_wherever_it_stands() {
    let error = from_file("workers = 1\nfsnyc = \"no\"\n", Inputs::default()).unwrap_err();
    let start = "flux.toml:2: there is no setting `fsnyc` (did you mean `fsync`?); the settings are \
                 data_addr, admin_addr,";
    assert!(error.starts_with(start), "{error}");

    let error = from_environment("FLUX_DATADIR", "/tmp").unwrap_err();
    let start = "environment variable FLUX_DATADIR: there is no setting `datadir` (did you mean \
                 `data_dir`?)";
    assert!(error.starts_with(start), "{error}");

    let error = from_environment("FLUX_XYZZY", "").unwrap_err();
    assert!(error.contains("no setting `xyzzy`; the settings are"), "{error}");

    let flags = Inputs { flags: owned(&[("colour", "red")]), ..Inputs::default() };
    let error = Configuration::load(&flags).unwrap_err().to_string();
    assert!(error.starts_with("flag --colour: there is no setting `colour`;"), "{error}");

    let error = from_file("[server]\nworkers = 1\n", Inputs::default()).unwrap_err();
    assert!(error.starts_with("flux.toml:1: there is no setting `server`;"), "{error}");
}

#[test]
fn a_bad_value_says_what_is_allowed() {
    let refused = |text: &str| from_file(text, Inputs::default()).unwrap_err();
    assert_eq!(
        refused("\nfsync = \"sometimes\""),
        "flux.toml:2: `fsync` is \"sometimes\", but must be one of always, everysec, no"
    );
    assert_eq!(
        refused("partitions = 12"),
        "flux.toml:1: `partitions` is \"12\", but must be 0 or a power of two from 1 to 16384"
    );
    assert_eq!(
        from_environment("FLUX_WORKERS", "-1").unwrap_err(),
        "environment variable FLUX_WORKERS: `workers` is \"-1\", but must be a whole number from 0 \
         to 1024"
    );
    for text in [
        "workers = true",
        "workers = 1.5",
        "workers = { a = 1 }",
        "data_addr = \"127.0.0.1\"",
        "data_addr = \"example.com:7379\"",
        "data_addr = 7379",
        "gateway_kv_endpoints = []",
        "gateway_kv_endpoints = [\"a:1\", \"b\"]",
        "data_dir = \"\"",
        "max_memory = -1",
        "max_memory = \"2 gb\"",
        "max_memory = \"99999999tb\"",
        "segment_bytes = 100",
        "etcd_endpoints = [\"https://etcd:2379\"]",
        "etcd_endpoints = [\"etcd\"]",
        "cluster_name = \"\"",
        "cluster_name = \"a/b\"",
        "zone = \"two words\"",
        "replication_factor = 2",
        "election_timeout_ms = 100",
        "registry_ttl_s = 1",
        "insecure = \"maybe\"",
        "rabbitmq_url = \"http://localhost\"",
        "cdc_exchange = \"\"",
        "cdc_retention_bytes = \"1kb\"",
        "cdc_batch_max_events = 1001",
        "gateway_grpc_endpoints = []",
        "max_watches = 0",
        "watch_buffer = 1",
    ] {
        let error = refused(text);
        let name = text.split(' ').next().unwrap();
        assert!(error.starts_with(&format!("flux.toml:1: `{name}` is ")), "{text}: {error}");
        assert!(error.contains("but must be "), "{text}: {error}");
    }
}

#[test]
fn broken_toml_gives_the_line() {
    let error = from_file("workers = 1\nfsync = always\n", Inputs::default()).unwrap_err();
    assert!(error.starts_with("flux.toml:2: not valid TOML: "), "{error}");
    let error = from_file("workers = 1\nworkers = 2\n", Inputs::default()).unwrap_err();
    assert!(error.starts_with("flux.toml:2: not valid TOML: duplicate key"), "{error}");
}

#[test]
fn only_a_named_file_must_exist() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("none.toml");
    let by_default = Inputs { default_file: Some(missing.clone()), ..Inputs::default() };
    assert!(Configuration::load(&by_default).is_ok());
    let by_flag = Inputs { file: Some(missing.clone()), ..Inputs::default() };
    let by_variable = environment(&[("FLUX_CONFIG", missing.to_str().unwrap())]);
    for inputs in [by_flag, by_variable] {
        let error = Configuration::load(&inputs).unwrap_err().to_string();
        assert_eq!(error, format!("cannot read the configuration file {}", missing.display()));
    }
}

#[test]
fn sizes_take_units() {
    let max_memory = |text: &str| from_environment("FLUX_MAX_MEMORY", text).unwrap().max_memory;
    assert_eq!(max_memory("512mb"), 512 << 20);
    assert_eq!(max_memory("2GB"), 2 << 30);
    assert_eq!(max_memory("1tb"), 1 << 40);
    assert_eq!(max_memory("3kb"), 3 << 10);
    assert_eq!(max_memory("100b"), 100);
    assert_eq!(max_memory("1000"), 1000);
    let settings = Settings { max_memory: 1536 << 20, ..Settings::default() };
    assert_eq!(settings.text("max_memory").unwrap(), "1536mb");
}

#[test]
fn etcd_endpoints_may_be_urls_or_none() {
    let endpoints =
        |text: &str| from_environment("FLUX_ETCD_ENDPOINTS", text).unwrap().etcd_endpoints;
    assert_eq!(endpoints("a:1, http://b:2/,[::1]:3"), ["a:1", "b:2", "[::1]:3"]);
    assert_eq!(endpoints(""), Vec::<String>::new());
    assert!(!Settings::default().is_clustered());
    let configuration = Configuration::default();
    assert!(
        configuration.to_toml().contains("etcd_endpoints = [] "),
        "{}",
        configuration.to_toml()
    );
    let settings = from_file("etcd_endpoints = []\n", Inputs::default()).unwrap().settings;
    assert!(!settings.is_clustered());
}

#[test]
fn a_listener_beyond_loopback_needs_insecure() {
    let exposed = |variable: &str, address: &str, role: Role| {
        let configuration = Configuration::load(&environment(&[(variable, address)])).unwrap();
        configuration.validate(role).map_err(|error| error.to_string())
    };
    for name in ["DATA", "ADMIN", "PEER", "GRPC", "HTTP"] {
        let variable = format!("FLUX_{name}_ADDR");
        let setting = format!("{}_addr", name.to_lowercase());
        for address in ["0.0.0.0:9", "[::]:9", "192.168.1.2:9", "[::ffff:10.0.0.1]:9"] {
            let error = exposed(&variable, address, Role::Up).unwrap_err();
            let start = format!("environment variable {variable}: `{setting}` is {address}, which");
            assert!(error.starts_with(&start), "{error}");
            assert!(error.contains("127.0.0.1:9") && error.contains("--insecure"), "{error}");
        }
        for address in ["127.0.0.1:9", "127.8.8.8:9", "[::1]:9", "localhost:9"] {
            exposed(&variable, address, Role::Up).expect("loopback is safe");
        }
    }
    // A role is not held to listeners that it does not open.
    exposed("FLUX_DATA_ADDR", "0.0.0.0:9", Role::Gateway).unwrap();
    exposed("FLUX_HTTP_ADDR", "0.0.0.0:9", Role::Server).unwrap();
    let insecure = environment(&[("FLUX_DATA_ADDR", "0.0.0.0:9"), ("FLUX_INSECURE", "true")]);
    Configuration::load(&insecure).unwrap().validate(Role::Up).expect("insecure allows it");
}

#[test]
fn two_listeners_on_one_port_are_refused() {
    let same = environment(&[("FLUX_GRPC_ADDR", "127.0.0.1:7379")]);
    let error = Configuration::load(&same).unwrap().validate(Role::Up).unwrap_err().to_string();
    assert_eq!(
        error,
        "environment variable FLUX_GRPC_ADDR: `grpc_addr` is 127.0.0.1:7379, but `data_addr` listens \
         there; give them different ports"
    );
    let any = environment(&[("FLUX_GRPC_ADDR", "127.0.0.1:0"), ("FLUX_DATA_ADDR", "127.0.0.1:0")]);
    Configuration::load(&any)
        .unwrap()
        .validate(Role::Up)
        .expect("the system picks different ports");
}

#[test]
fn the_printed_configuration_reads_back_as_itself() {
    let settings = [
        ("FLUX_FSYNC", "no"),
        ("FLUX_MAX_MEMORY", "3gb"),
        ("FLUX_GATEWAY_KV_ENDPOINTS", "a:1, b:2"),
        ("FLUX_DATA_DIR", "/tmp/with \"quotes\" and \\"),
        ("FLUX_INSECURE", "on"),
    ];
    let configuration = Configuration::load(&environment(&settings)).unwrap();
    let printed = configuration.to_toml();
    assert!(printed.contains("gateway_kv_endpoints = [\"a:1\", \"b:2\"]"), "{printed}");
    assert!(
        printed.lines().any(|line| line.starts_with("workers = 0 ") && line.ends_with("# default"))
    );
    let fsync = printed.lines().find(|line| line.starts_with("fsync")).unwrap();
    assert!(fsync.ends_with("# environment variable FLUX_FSYNC"), "{fsync}");
    assert_eq!(from_file(&printed, Inputs::default()).unwrap().settings, configuration.settings);
}

#[test]
fn a_cluster_cannot_have_more_partitions_than_etcd_keeps() {
    let asked = |partitions: &str, factor: &str, endpoints: &str| {
        let settings = [
            ("FLUX_PARTITIONS", partitions),
            ("FLUX_REPLICATION_FACTOR", factor),
            ("FLUX_ETCD_ENDPOINTS", endpoints),
        ];
        Configuration::load(&environment(&settings)).unwrap().validate(Role::Server)
    };
    let error = asked("16384", "3", "127.0.0.1:2379").unwrap_err().to_string();
    assert_eq!(
        error,
        "environment variable FLUX_PARTITIONS: `partitions` is 16384, but etcd keeps the map of at most 8192 \
         with 3 replicas each"
    );
    asked("16384", "3", "").expect("a node alone keeps no map");
    asked("8192", "3", "127.0.0.1:2379").expect("it fits");
    asked("16384", "1", "127.0.0.1:2379").expect("it fits");
    assert!(asked("8192", "5", "127.0.0.1:2379").is_err());
}

#[test]
fn a_table_of_the_file_holds_the_settings_of_change_capture() {
    let text = "workers = 1\n[cdc]\nretention_bytes = \"2gb\"\ninclude_previous = true\n";
    let configuration = from_file(text, Inputs::default()).unwrap();
    assert_eq!(configuration.settings.cdc_retention_bytes, 2 << 30);
    assert!(configuration.settings.cdc_include_previous);
    let origin = configuration.origin("cdc_include_previous").to_string();
    assert!(origin.ends_with("flux.toml:4"), "{origin}");
    let dotted = from_file("cdc.batch_max_events = 7\n", Inputs::default()).unwrap();
    assert_eq!(dotted.settings.cdc_batch_max_events, 7);
    let flat = from_file("cdc_batch_max_events = 8\n", Inputs::default()).unwrap();
    assert_eq!(flat.settings.cdc_batch_max_events, 8);

    let refused = |text: &str| from_file(text, Inputs::default()).unwrap_err();
    let error = refused("[cdc]\nretention = 1\n");
    assert!(error.starts_with("flux.toml:2: there is no setting `cdc_retention`"), "{error}");
    assert_eq!(
        refused("\n[cdc]\nbatch_max_events = 0\n"),
        "flux.toml:3: `cdc_batch_max_events` is \"0\", but must be a whole number from 1 to 1000"
    );
    assert_eq!(
        refused("cdc_exchange = \"a\"\n[cdc]\nexchange = \"a\"\n"),
        "flux.toml:3: `cdc_exchange` is set twice in the file; keep one of the two"
    );
    assert!(refused("cdc = 1\n").starts_with("flux.toml:1: there is no setting `cdc`"));
}

#[test]
fn a_password_is_never_shown() {
    let url = "amqp://user:hunter2@127.0.0.1:5672/prod";
    let inputs =
        Inputs { flags: owned(&[("rabbitmq_url", url)]), ..environment(&[("FLUX_X", url)]) };
    let known_inputs = format!("{inputs:?}");
    assert!(known_inputs.contains("rabbitmq_url") && !known_inputs.contains("hunter2"));

    let configuration = Configuration::load(&environment(&[("FLUX_RABBITMQ_URL", url)])).unwrap();
    let broker = configuration.settings.rabbitmq_url.as_ref().expect("it is set");
    assert_eq!(broker.password(), "hunter2");
    let printed = configuration.to_toml();
    let hidden = "rabbitmq_url = \"amqp://user:***@127.0.0.1:5672/prod\" ";
    assert!(printed.contains(hidden), "{printed}");
    for shown in [&printed, &format!("{configuration:?}")] {
        assert!(!shown.contains("hunter2"), "{shown}");
    }
    let read_back = from_file(&printed, Inputs::default()).unwrap_err();
    assert!(read_back.contains("`rabbitmq_url` is \"***\", but must be empty, or"), "{read_back}");

    for wrong in ["rabbitmq_url = \"amqp://u:hunter2@h:x\"", "rabbitmq_url = { a = \"hunter2\" }"] {
        let refused = from_file(wrong, Inputs::default()).unwrap_err();
        assert!(
            refused.starts_with("flux.toml:1: `rabbitmq_url` is \"***\", but must be"),
            "{refused}"
        );
        assert!(!refused.contains("hunter2"), "{refused}");
    }
    let wrong = from_environment("FLUX_RABBITMQ_URL", "hunter2").unwrap_err();
    assert!(!wrong.contains("hunter2"), "{wrong}");
}

/// The documents hold the generated table between two markers. When this fails, put the output of
/// `flux config --markdown` there.
#[test]
fn the_documented_table_is_the_table() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    let between = |name: &str| {
        let text = fs::read_to_string(root.join(name)).ok()?;
        let (_, rest) = text.split_once("<!-- settings:begin -->\n")?;
        Some(rest.split_once("<!-- settings:end -->")?.0.to_owned())
    };
    let documented: Vec<String> =
        ["README.md", "docs/settings.md"].into_iter().filter_map(between).collect();
    assert!(!documented.is_empty(), "no document has the table of settings");
    for table in documented {
        assert_eq!(table, markdown_table());
    }
}
