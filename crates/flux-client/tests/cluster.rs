//! The client against a cluster whose topology changes under it. Pipes in memory and a paused clock:
//! what takes no time takes none, and waiting takes exactly as long as it says.

mod fake;
mod world;

use std::time::Duration;

use flux_client::{
    Client, Code, Condition, Config, Error, Guard, Position, Retry, ScanOptions, SetOptions, Write,
};
use flux_proto::native::{Opcode, Response, encode_response, feature};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use world::{Cluster, Mood, PARTITIONS, Tale};

const MS: Duration = Duration::from_millis(1);

/// A key of each partition.
fn keys() -> Vec<Vec<u8>> {
    let key_in = |partition| {
        let mut keys = (0..).map(|number| format!("k{number}").into_bytes());
        keys.find(|key| world::partition_of(key) == partition).unwrap()
    };
    (0..PARTITIONS).map(key_in).collect()
}

#[tokio::test(start_paused = true)]
async fn requests_go_straight_to_leaders_that_any_node_tells_of() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(Config { ..cluster.config() }).await;
    for key in &keys() {
        client.set(key, b"1", SetOptions::default()).await.unwrap();
        client.increment(key, 1).await.unwrap();
        client.get(key).await.unwrap();
        let guards = [Guard { key, version: 0 }];
        client.batch_write(&guards, &[Write::Increment { key, delta: 1 }]).await.unwrap();
        client.delete(key, Condition::Always).await.unwrap();
        assert_eq!(cluster.asked(), vec![cluster.leader(key).unwrap(); 5]);
    }
    let world = cluster.world();
    assert_eq!((world.not_leader, world.passed_on, world.infos), (0, 0, 1));
}

#[tokio::test(start_paused = true)]
async fn links_are_opened_when_they_are_needed() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(cluster.config()).await;
    let open = |cluster: &Cluster| ["a:1", "b:1", "c:1"].map(|addr| cluster.connections(addr));
    assert_eq!(open(&cluster), [1, 0, 0]);
    client.get(&cluster.key_of("c:1")).await.unwrap();
    client.get(&cluster.key_of("c:1")).await.unwrap();
    assert_eq!(open(&cluster), [1, 0, 1]);
    drop(client);
    sleep(MS).await;
    assert_eq!(open(&cluster), [0, 0, 0]);
}

#[tokio::test(start_paused = true)]
async fn a_hint_is_followed_at_once_and_for_nothing() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let retry = Retry { reserve: 0, budget_percent: 0, max_attempts: 1, ..Retry::default() };
    let client = cluster.client(Config { retry, ..cluster.config() }).await;
    let key = cluster.key_of("a:1");
    client.increment(&key, 1).await.unwrap();
    client.get(&cluster.key_of("b:1")).await.unwrap();
    cluster.asked();
    cluster.lead(&key, Some("b:1"));
    let started = Instant::now();
    assert_eq!(client.increment(&key, 1).await.unwrap().value, 2);
    assert_eq!(client.increment(&key, 1).await.unwrap().value, 3);
    assert_eq!(started.elapsed(), Duration::ZERO);
    assert_eq!(cluster.asked(), ["a:1", "b:1", "b:1"]);
}

#[tokio::test(start_paused = true)]
async fn a_hint_may_name_a_node_that_nobody_told_of() {
    let cluster = Cluster::new(&["a", "b"]);
    let client = cluster.client(cluster.config()).await;
    let key = cluster.key_of("a:1");
    cluster.start("new:1");
    cluster.lead(&key, Some("new:1"));
    let old = cluster.world().view.clone();
    for addr in ["a:1", "b:1"] {
        cluster.tale(addr, Tale::Old(Box::new(old.clone())));
    }
    client.increment(&key, 1).await.unwrap();
    assert_eq!(cluster.asked(), ["a:1", "new:1"]);
}

#[tokio::test(start_paused = true)]
async fn without_a_hint_one_refresh_serves_all() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    cluster.world().hints = false;
    let client = cluster.client(cluster.config()).await;
    client.get(&cluster.key_of("a:1")).await.unwrap();
    let key = cluster.key_of("a:1");
    cluster.succeed("a:1", Some("b:1"));
    let started = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..200 {
        let (client, key) = (client.clone(), key.clone());
        tasks.spawn(async move { client.increment(&key, 1).await.unwrap() });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    assert!(started.elapsed() < 200 * MS, "{:?}", started.elapsed());
    let world = cluster.world();
    assert_eq!((world.not_leader, world.passed_on), (200, 0));
    // The first, and one for all of these; one more where some came after it had begun.
    assert!(world.infos <= 3, "{} refreshes", world.infos);
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_is_killed_is_followed_to_the_next() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(cluster.config()).await;
    let key = cluster.key_of("b:1");
    client.increment(&key, 1).await.unwrap();
    cluster.kill("b:1");
    let started = Instant::now();
    let election = async {
        sleep(200 * MS).await;
        cluster.succeed("b:1", None);
        sleep(600 * MS).await;
        cluster.succeed("b:1", Some("c:1"));
        let mut view = cluster.world();
        let leaders = view.view.leaders.iter_mut().filter(|leader| leader.is_none());
        leaders.for_each(|leader| *leader = Some("c:1".to_owned()));
    };
    let (sum, ()) = tokio::join!(client.increment(&key, 1), election);
    assert_eq!(sum.unwrap().value, 2);
    assert!(started.elapsed() < 1000 * MS, "{:?}", started.elapsed());
    // Nobody was bothered with what they could not do.
    assert_eq!(cluster.asked(), ["b:1", "c:1"]);
    assert!(cluster.world().infos < 25, "{} refreshes", cluster.world().infos);
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_says_nothing_is_left_when_another_leads() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(cluster.config()).await;
    let (key, other) = (cluster.key_of("b:1"), cluster.key_of("c:1"));
    client.increment(&key, 1).await.unwrap();
    client.get(&other).await.unwrap();
    cluster.mood("b:1", Mood::Hang);
    let started = Instant::now();
    let election = async {
        sleep(800 * MS).await;
        cluster.succeed("b:1", Some("c:1"));
    };
    let (read, write, ()) = tokio::join!(client.get(&key), client.increment(&key, 1), election);
    assert_eq!(write.unwrap().value, 2);
    assert!(read.unwrap().is_some());
    assert!(started.elapsed() < 2000 * MS, "{:?}", started.elapsed());
    assert_eq!(client.increment(&key, 1).await.unwrap().value, 3);
}

/// A slow leader is waited for: nothing is sent twice while it leads.
#[tokio::test(start_paused = true)]
async fn a_leader_that_says_nothing_and_leads_is_waited_for() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(cluster.config()).await;
    let key = cluster.key_of("b:1");
    cluster.mood("b:1", Mood::Hang);
    let started = Instant::now();
    assert_eq!(client.get(&key).await, Err(Error::Timeout));
    assert_eq!(started.elapsed(), 5000 * MS);
    assert_eq!(cluster.asked(), ["b:1"]);
}

#[tokio::test(start_paused = true)]
async fn without_a_leader_calls_wait_until_their_time_is_over() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(cluster.config()).await;
    let key = cluster.key_of("a:1");
    cluster.lead(&key, None);
    let started = Instant::now();
    let error = client.with_timeout(3000 * MS).increment(&key, 1).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.to_string().contains("no leader"), "{error}");
    assert_eq!(started.elapsed(), 3000 * MS);
    assert_eq!(cluster.asked(), ["a:1"]);
}

#[tokio::test(start_paused = true)]
async fn with_nobody_there_calls_fail_soon() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(cluster.config()).await;
    for key in &keys() {
        client.get(key).await.unwrap();
    }
    ["a:1", "b:1", "c:1"].iter().for_each(|addr| cluster.kill(addr));
    sleep(100 * MS).await;
    let started = Instant::now();
    let error = client.increment(b"n", 1).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
    assert!(started.elapsed() < 500 * MS, "{:?}", started.elapsed());
    ["a:1", "b:1", "c:1"].iter().for_each(|addr| cluster.start(addr));
    timeout(5000 * MS, async { while client.increment(b"n", 1).await.is_err() {} }).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_node_that_cannot_be_reached_is_tried_last() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let endpoints = ["a:1", "b:1", "c:1"];
    let client = cluster.client(Config { ..Config::new(endpoints) }).await;
    cluster.kill("a:1");
    sleep(MS).await;
    cluster.mood("c:1", Mood::Hang);
    let started = Instant::now();
    client.ping().await.unwrap();
    client.ping().await.unwrap();
    // The one that says nothing costs one wait, no more.
    assert!(started.elapsed() <= 600 * MS, "{:?}", started.elapsed());
    let started = Instant::now();
    for _ in 0..50 {
        client.ping().await.unwrap();
    }
    assert_eq!(started.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_leader_out_of_reach_is_reached_through_others() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(cluster.config()).await;
    let key = cluster.key_of("b:1");
    client.increment(&key, 1).await.unwrap();
    cluster.cut_off("b:1");
    let started = Instant::now();
    assert_eq!(client.increment(&key, 1).await.unwrap().value, 2);
    assert!((1000 * MS..1300 * MS).contains(&started.elapsed()), "{:?}", started.elapsed());
    let started = Instant::now();
    assert_eq!(client.increment(&key, 1).await.unwrap().value, 3);
    assert_eq!(started.elapsed(), Duration::ZERO);
    assert_eq!(cluster.world().passed_on, 2);
}

#[tokio::test(start_paused = true)]
async fn leaders_are_asked_for_now_and_then() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(cluster.config()).await;
    let key = cluster.key_of("a:1");
    cluster.lead(&key, Some("c:1"));
    sleep(Duration::from_secs(46)).await;
    client.get(&key).await.unwrap();
    assert_eq!((cluster.asked(), cluster.world().not_leader), (vec!["c:1".to_owned()], 0));
    let before = cluster.world().infos;
    sleep(Duration::from_secs(3000)).await;
    let asked = cluster.world().infos - before;
    assert!((70..140).contains(&asked), "{asked} refreshes in 100 times 30 s");
}

#[tokio::test(start_paused = true)]
async fn members_that_are_gone_are_let_go() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(cluster.config()).await;
    for key in &keys() {
        client.get(key).await.unwrap();
    }
    cluster.asked();
    {
        let mut world = cluster.world();
        world.view.epoch = 2;
        world.view.members = vec!["c:1".to_owned()];
        world.view.leaders.fill(Some("c:1".to_owned()));
        world.view.replicas.fill(vec!["c:1".to_owned()]);
    }
    sleep(Duration::from_secs(46)).await;
    for key in &keys() {
        client.get(key).await.unwrap();
    }
    client.ping().await.unwrap();
    assert_eq!(cluster.asked(), vec!["c:1"; keys().len() + 1]);
    assert_eq!(["a:1", "b:1", "c:1"].map(|addr| cluster.connections(addr)), [0, 0, 1]);

    // Everybody the client knows is gone, but the endpoint it was given leads back.
    {
        let mut world = cluster.world();
        world.view.epoch = 3;
        world.view.members = vec!["a:1".to_owned()];
        world.view.leaders.fill(Some("a:1".to_owned()));
    }
    cluster.kill("c:1");
    timeout(5000 * MS, async { while client.get(b"k").await.is_err() {} }).await.unwrap();
    assert_eq!(cluster.asked().pop().as_deref(), Some("a:1"));
}

/// Bodies of INFO that no honest node sends.
fn strange_infos(cluster: &Cluster) -> Vec<Vec<u8>> {
    let body = |info| {
        let mut out = Vec::new();
        encode_response(&mut out, 1, Opcode::Info, &Response::Info(info)).unwrap();
        out.split_off(16)
    };
    let view = cluster.world().view.clone();
    let info = view.info();
    let honest = body(info.clone());
    let mut strange = vec![Vec::new(), vec![0xff; 40], honest[..honest.len() - 1].to_vec()];
    let mut leaders = info.clone();
    leaders.leaders.pop();
    leaders.replicas.pop();
    let mut replicas = info.clone();
    replicas.replicas.pop();
    let mut nobody = info.clone();
    nobody.members.iter_mut().for_each(|member| member.data_addr = "nowhere");
    let mut many = info.clone();
    many.members = vec![many.members[0]; 5000];
    let mut out_of_range = info.clone();
    out_of_range.leaders[0] = Some(3);
    strange.extend([leaders, replicas, nobody, many, out_of_range].map(body));
    strange
}

#[tokio::test(start_paused = true)]
async fn strange_accounts_are_passed_over() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    for bytes in strange_infos(&cluster) {
        cluster.tale("a:1", Tale::Bytes(bytes.clone()));
        let endpoints = ["a:1", "b:1"];
        let client = cluster.client(Config { ..Config::new(endpoints) }).await;
        cluster.asked();
        client.get(&cluster.key_of("c:1")).await.unwrap();
        assert_eq!(cluster.asked(), ["c:1"], "{bytes:?}");
    }
    // With nobody else to ask, requests still go to the endpoint, which passes them on.
    cluster.tale("a:1", Tale::Bytes(vec![1]));
    let client = cluster.client(cluster.config()).await;
    client.get(&cluster.key_of("c:1")).await.unwrap();
    assert_eq!((cluster.asked(), cluster.world().passed_on), (vec!["a:1".to_owned()], 1));
    // And it is asked again before long.
    cluster.tale("a:1", Tale::Truth);
    sleep(Duration::from_secs(4)).await;
    client.get(&cluster.key_of("c:1")).await.unwrap();
    assert_eq!(cluster.asked(), ["c:1"]);
}

#[tokio::test(start_paused = true)]
async fn an_older_epoch_is_believed_only_where_nobody_has_a_newer_one() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    cluster.world().view.epoch = 7;
    let client = cluster.client(cluster.config()).await;
    let key = cluster.key_of("a:1");
    let mut old = cluster.world().view.clone();
    old.epoch = 6;
    cluster.lead(&key, Some("b:1"));
    for addr in ["a:1", "c:1"] {
        cluster.tale(addr, Tale::Old(Box::new(old.clone())));
    }
    sleep(Duration::from_secs(100)).await;
    client.get(&key).await.unwrap();
    assert_eq!(cluster.asked(), ["b:1"]);

    // An epoch that is nobody's any more does not hold the client for ever.
    let mut ahead = old.clone();
    ahead.epoch = u64::MAX;
    cluster.tale("b:1", Tale::Old(Box::new(ahead)));
    sleep(Duration::from_secs(100)).await;
    for addr in ["a:1", "b:1", "c:1"] {
        cluster.tale(addr, Tale::Truth);
    }
    cluster.lead(&key, Some("c:1"));
    sleep(Duration::from_secs(100)).await;
    client.get(&key).await.unwrap();
    assert_eq!(cluster.asked(), ["c:1"]);
}

#[tokio::test(start_paused = true)]
async fn stale_reads_take_turns_among_replicas_and_tell_their_age() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(cluster.config()).await;
    let key = cluster.key_of("a:1");
    {
        let mut world = cluster.world();
        let partition = usize::from(world::partition_of(&key));
        world.view.replicas[partition] = vec!["a:1".to_owned(), "c:1".to_owned()];
        world.nodes.get_mut("c:1").unwrap().age_ms = 40;
        world.view.epoch += 1;
    }
    sleep(Duration::from_secs(46)).await;
    client.set(&key, b"v", SetOptions::default()).await.unwrap();
    // Whoever is connected is asked while another one is being connected to.
    for _ in 0..4 {
        client.stale_get(&key).await.unwrap();
    }
    cluster.asked();
    let mut ages = Vec::new();
    for _ in 0..20 {
        let read = client.stale_get(&key).await.unwrap();
        assert_eq!(read.value.unwrap().bytes.as_ref(), b"v");
        let Position { revision, age } = read.position.unwrap();
        assert_eq!(revision, Some(1));
        ages.push(age.unwrap());
    }
    let asked = cluster.asked();
    let of = |addr: &str| asked.iter().filter(|asked| *asked == addr).count();
    assert_eq!((of("a:1"), of("b:1"), of("c:1")), (10, 0, 10));
    assert_eq!(ages.iter().filter(|&&age| age == 40 * MS).count(), 10);

    cluster.kill("a:1");
    sleep(MS).await;
    for _ in 0..10 {
        client.with_stale_reads().get(&key).await.unwrap();
    }
    assert_eq!(cluster.asked(), vec!["c:1"; 10]);
    // Writes are not stale.
    cluster.succeed("a:1", Some("c:1"));
    client.with_stale_reads().increment(b"n", 1).await.unwrap();
    assert!(cluster.world().seen.iter().all(|seen| !seen.stale));
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_says_nothing_is_left_for_another() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(cluster.config()).await;
    for _ in 0..3 {
        client.stale_get(b"k").await.unwrap();
    }
    cluster.mood("b:1", Mood::Hang);
    let started = Instant::now();
    for _ in 0..30 {
        client.stale_get(b"k").await.unwrap();
    }
    assert!(started.elapsed() < 600 * MS, "{:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn many_keys_are_split_by_leader_and_put_together_again() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(cluster.config()).await;
    let names: Vec<Vec<u8>> = (0..100).map(|n| format!("key-{n}").into_bytes()).collect();
    for name in names.iter().filter(|name| !name.ends_with(b"7")) {
        client.set(name, name, SetOptions::default()).await.unwrap();
    }
    cluster.asked();
    let keys: Vec<&[u8]> = names.iter().map(Vec::as_slice).collect();
    let check = |values: Vec<Option<flux_client::Value>>| {
        assert_eq!(values.len(), keys.len());
        for (key, value) in keys.iter().zip(values) {
            let expected = (!key.ends_with(b"7")).then_some(*key);
            assert_eq!(value.as_ref().map(|value| value.bytes.as_ref()), expected);
        }
    };
    check(client.batch_get(&keys).await.unwrap());
    let mut asked = cluster.asked();
    asked.sort();
    assert_eq!(asked, ["a:1", "b:1", "c:1"]);
    assert_eq!(client.batch_get(&[]).await, Ok(vec![]));

    // Leaders change between the halves: what was refused is split anew.
    cluster.succeed("b:1", Some("a:1"));
    check(client.batch_get(&keys).await.unwrap());
    assert_eq!(cluster.world().passed_on, 0);
    cluster.asked();

    cluster.world().nodes.get_mut("b:1").unwrap().age_ms = 70;
    let read = client.stale_batch_get(&keys).await.unwrap();
    check(read.value);
    // All from one node, which has replicas of all, or from another in the next turn.
    assert_eq!(cluster.asked().len(), 1);
    assert!(read.position.is_some());

    // A task may own such a call.
    let call = tokio::spawn(async move { client.batch_get(&[b"key-1"]).await.unwrap().len() });
    assert_eq!(call.await.unwrap(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_part_that_fails_for_good_fails_the_whole() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(cluster.config()).await;
    cluster.mood("b:1", Mood::Refuse(Code::PermissionDenied));
    let keys = keys();
    let keys: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
    let error = client.batch_get(&keys).await.unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied);
    cluster.mood("b:1", Mood::Serve);
    cluster.kill("c:1");
    let election = async {
        sleep(400 * MS).await;
        cluster.succeed("c:1", Some("a:1"));
    };
    let (values, ()) = tokio::join!(client.batch_get(&keys), election);
    assert_eq!(values.unwrap().len(), keys.len());
}

async fn scan_all(client: &Client, options: &ScanOptions) -> Result<Vec<Vec<u8>>, Error> {
    let (mut found, mut cursor) = (Vec::new(), None);
    loop {
        let page = client.scan(options, cursor.as_deref()).await?;
        found.extend(page.items.iter().map(|item| item.key.to_vec()));
        cursor = page.cursor;
        if cursor.is_none() {
            found.sort();
            return Ok(found);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_scan_goes_from_leader_to_leader() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(cluster.config()).await;
    let mut names: Vec<Vec<u8>> = (0..50).map(|n| format!("key-{n}").into_bytes()).collect();
    names.sort();
    for name in &names {
        client.set(name, b"", SetOptions::default()).await.unwrap();
    }
    cluster.asked();
    let options = ScanOptions { limit: 3, ..ScanOptions::default() };
    assert_eq!(scan_all(&client, &options).await.unwrap(), names);
    assert_eq!(cluster.world().not_leader, 0);
    assert_eq!(cluster.world().passed_on, 0);

    let error = client.scan(&options, Some(b"\x07")).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);

    // Nodes that cannot do that are left to scan everything as they can.
    let plain = Cluster::new(&["a", "b"]);
    for node in plain.world().nodes.values_mut() {
        node.features = feature::ALL & !feature::PARTITION_SCANS;
    }
    let client = plain.client(plain.config()).await;
    client.set(b"k", b"", SetOptions::default()).await.unwrap();
    assert_eq!(scan_all(&client, &options).await.unwrap(), [b"k"]);
}

#[tokio::test(start_paused = true)]
async fn a_closed_client_lets_nobody_wait() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(cluster.config()).await;
    cluster.lead(b"k", None);
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.get(b"k").await }
    });
    sleep(300 * MS).await;
    client.close().await;
    let started = Instant::now();
    assert_eq!(waiting.await.unwrap(), Err(Error::Closed));
    assert_eq!(client.get(b"k").await, Err(Error::Closed));
    assert_eq!(client.increment(b"k", 1).await, Err(Error::Closed));
    assert!(started.elapsed() < 100 * MS);
}
