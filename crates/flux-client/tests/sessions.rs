//! Writes whose answers are lost: repeated under the same number, carried out once, and reported as
//! unknown where that cannot be made sure. Pipes in memory and a paused clock.

mod fake;
mod world;

use std::collections::HashMap;
use std::time::Duration;

use flux_client::{Code, Config, Error, Retry, ScanOptions, SetOptions, TraceContext};
use flux_proto::native::{Opcode, Response, Session, encode_response, feature};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use world::{Cluster, Mood, Tale};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// The sessions of the writes that nodes got since the last time.
fn sessions(cluster: &Cluster) -> Vec<Option<Session>> {
    cluster.world().seen.drain(..).map(|seen| seen.session).collect()
}

#[tokio::test(start_paused = true)]
async fn a_write_whose_answer_is_lost_is_repeated_and_done_once() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(cluster.config()).await;
    let key = cluster.key_of("b:1");
    client.increment(&key, 1).await.unwrap();
    client.get(&key).await.unwrap();
    let before = sessions(&cluster);
    assert!(before[0].is_some() && before[1].is_none(), "reads have no session: {before:?}");

    cluster.mood("b:1", Mood::LoseAnswers(2));
    assert_eq!(client.increment(&key, 1).await.unwrap().value, 2);
    assert_eq!(cluster.world().table.revision, 2);
    let after = sessions(&cluster);
    assert_eq!(after.len(), 3);
    assert!(after.iter().all(|session| *session == after[0]), "{after:?}");
    let (first, second) = (before[0].unwrap(), after[0].unwrap());
    assert_eq!(first.id, second.id);
    assert_ne!(first.sequence, second.sequence);
    assert_eq!(second.acked_below, second.sequence);
}

#[tokio::test(start_paused = true)]
async fn a_repeated_write_finds_its_answer_at_the_next_leader() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(cluster.config()).await;
    let key = cluster.key_of("b:1");
    cluster.mood("b:1", Mood::LoseAnswers(1));
    let election = async {
        while cluster.world().seen.is_empty() {
            tokio::task::yield_now().await;
        }
        cluster.kill("b:1");
        sleep(700 * MS).await;
        cluster.succeed("b:1", Some("c:1"));
    };
    let (sum, ()) = tokio::join!(client.increment(&key, 5), election);
    assert_eq!(sum.unwrap().value, 5);
    assert_eq!(cluster.world().table.revision, 1);
    let asked = cluster.asked();
    assert_eq!(asked.first().map(String::as_str), Some("b:1"));
    assert_eq!(asked.last().map(String::as_str), Some("c:1"));
}

#[tokio::test(start_paused = true)]
async fn without_sessions_nothing_is_repeated() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let unknown = |error: Error| assert_eq!(error.code(), Code::OutcomeUnknown, "{error:?}");
    let plain = Config { sessions: false, ..cluster.config() };
    let client = cluster.client(plain).await;
    let key = cluster.key_of("b:1");
    cluster.mood("b:1", Mood::LoseAnswers(1));
    unknown(client.increment(&key, 1).await.unwrap_err());
    assert_eq!(sessions(&cluster), [None]);

    // The node knows no sessions.
    cluster.world().nodes.get_mut("b:1").unwrap().features = 0;
    let client = cluster.client(cluster.config()).await;
    cluster.mood("b:1", Mood::LoseAnswers(1));
    unknown(client.increment(&key, 1).await.unwrap_err());
    assert_eq!(sessions(&cluster), [None]);
    assert_eq!(cluster.world().table.revision, 2);

    // The first leader knew them and the next one does not: it could not tell.
    let key = cluster.key_of("c:1");
    cluster.mood("c:1", Mood::LoseAnswers(1));
    let election = async {
        while cluster.world().table.revision == 2 {
            tokio::task::yield_now().await;
        }
        cluster.lead(&key, Some("b:1"));
    };
    let (error, ()) = tokio::join!(client.increment(&key, 1), election);
    unknown(error.unwrap_err());
    assert_eq!(cluster.world().table.revision, 3);
    assert!(cluster.world().seen.iter().all(|seen| seen.node == "c:1"), "it is not sent to b");
}

#[tokio::test(start_paused = true)]
async fn a_refusal_does_not_decide_what_an_earlier_attempt_did() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(cluster.config()).await;
    let key = cluster.key_of("b:1");
    cluster.mood("b:1", Mood::LoseAnswers(1));
    let spoil = async {
        while cluster.world().seen.is_empty() {
            tokio::task::yield_now().await;
        }
        cluster.mood("b:1", Mood::Refuse(Code::OutOfMemory));
    };
    let (error, ()) = tokio::join!(client.increment(&key, 1), spoil);
    assert!(matches!(error, Err(Error::OutcomeUnknown(_))), "{error:?}");
    assert_eq!(cluster.world().table.revision, 1);
    // The same refusal of a first attempt is certain.
    let error = client.increment(&key, 1).await.unwrap_err();
    assert_eq!(error.code(), Code::OutOfMemory);
}

#[tokio::test(start_paused = true)]
async fn a_write_of_which_the_node_cannot_tell_is_repeated() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(cluster.config()).await;
    let key = cluster.key_of("b:1");
    cluster.mood("b:1", Mood::Refuse(Code::OutcomeUnknown));
    let recovery = async {
        while cluster.world().seen.is_empty() {
            tokio::task::yield_now().await;
        }
        cluster.mood("b:1", Mood::Serve);
    };
    let (sum, ()) = tokio::join!(client.increment(&key, 1), recovery);
    assert_eq!(sum.unwrap().value, 1);
    let seen = sessions(&cluster);
    assert_eq!((seen.len(), seen[0]), (2, seen[1]));
}

#[tokio::test(start_paused = true)]
async fn repetitions_keep_to_the_budget_and_to_their_number() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let retry = Retry { reserve: 3, budget_percent: 0, ..Retry::default() };
    let client = cluster.client(Config { retry, ..cluster.config() }).await;
    let key = cluster.key_of("b:1");
    cluster.mood("b:1", Mood::LoseAnswers(100));
    let mut counts = Vec::new();
    for _ in 0..3 {
        let error = client.increment(&key, 1).await.unwrap_err();
        assert!(matches!(error, Error::OutcomeUnknown(_)), "{error:?}");
        counts.push(cluster.asked().len());
    }
    // Three attempts, then two with what is left of the budget, then one.
    assert_eq!(counts, [3, 2, 1]);
    assert_eq!(cluster.world().table.revision, 3);
}

#[tokio::test(start_paused = true)]
async fn when_time_is_over_the_error_says_what_is_known() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(cluster.config()).await.with_timeout(2000 * MS);
    let key = cluster.key_of("b:1");
    client.get(&key).await.unwrap();
    // Never sent: certain.
    cluster.lead(&key, None);
    let started = Instant::now();
    let error = client.increment(&key, 1).await.unwrap_err();
    assert_eq!((error.code(), started.elapsed()), (Code::Unavailable, 2000 * MS));

    // Sent, lost, and then there is nobody to repeat it to.
    cluster.lead(&key, Some("b:1"));
    client.get(&key).await.unwrap();
    cluster.mood("b:1", Mood::LoseAnswers(1));
    let vacancy = async {
        while cluster.world().table.revision == 0 {
            tokio::task::yield_now().await;
        }
        cluster.lead(&key, None);
    };
    let started = Instant::now();
    let (error, ()) = tokio::join!(client.increment(&key, 1), vacancy);
    assert!(matches!(error, Err(Error::OutcomeUnknown(_))), "{error:?}");
    assert_eq!(started.elapsed(), 2000 * MS);

    // Sent, and no answer.
    cluster.lead(&key, Some("b:1"));
    client.get(&key).await.unwrap();
    cluster.mood("b:1", Mood::Hang);
    let started = Instant::now();
    let error = client.increment(&key, 1).await.unwrap_err();
    assert_eq!((error.code(), started.elapsed()), (Code::OutcomeUnknown, 2000 * MS));
}

#[tokio::test(start_paused = true)]
async fn a_write_is_not_repeated_when_its_answer_may_be_forgotten() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(cluster.config()).await.with_timeout(Duration::from_secs(600));
    let key = cluster.key_of("b:1");
    client.get(&key).await.unwrap();
    cluster.mood("b:1", Mood::LoseAnswers(1));
    let vacancy = async {
        while cluster.world().table.revision == 0 {
            tokio::task::yield_now().await;
        }
        cluster.lead(&key, None);
    };
    let started = Instant::now();
    let (error, ()) = tokio::join!(client.increment(&key, 1), vacancy);
    assert!(matches!(error, Err(Error::OutcomeUnknown(_))), "{error:?}");
    assert_eq!(started.elapsed(), Duration::from_secs(60));
}

#[tokio::test(start_paused = true)]
async fn what_is_acknowledged_is_below_all_that_is_under_way() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(Config { max_in_flight: 64, ..cluster.config() }).await;
    let key = cluster.key_of("b:1");
    cluster.mood("b:1", Mood::Hang);
    let stuck = tokio::spawn({
        let (client, key) = (client.clone(), key.clone());
        async move { client.increment(&key, 1).await }
    });
    while cluster.world().seen.is_empty() {
        tokio::task::yield_now().await;
    }
    cluster.mood("b:1", Mood::Serve);
    for _ in 0..3 {
        client.increment(&key, 1).await.unwrap();
    }
    client.increment(&cluster.key_of("a:1"), 1).await.unwrap();
    let seen: Vec<Session> = sessions(&cluster).into_iter().flatten().collect();
    let numbers: Vec<_> = seen.iter().map(|seen| (seen.sequence, seen.acked_below)).collect();
    // The first holds back its partition, and no other.
    assert_eq!(numbers, [(1, 1), (2, 1), (3, 1), (4, 1), (5, 5)]);
    let error = stuck.await.unwrap().unwrap_err();
    assert_eq!(error.code(), Code::OutcomeUnknown);
    client.increment(&key, 1).await.unwrap();
    let last = sessions(&cluster)[0].unwrap();
    assert_eq!((last.sequence, last.acked_below), (6, 6));
}

#[tokio::test(start_paused = true)]
async fn a_node_without_a_cluster_is_repeated_to_as_well() {
    let cluster = Cluster::new(&["a"]);
    cluster.world().view.epoch = 0;
    let client = cluster.client(cluster.config()).await;
    cluster.mood("a:1", Mood::LoseAnswers(1));
    assert_eq!(client.increment(b"n", 1).await.unwrap().value, 1);
    assert_eq!(cluster.world().table.revision, 1);
    assert!(cluster.world().seen.iter().all(|seen| !seen.redirect), "there is no other node");
}

#[tokio::test(start_paused = true)]
async fn a_trace_goes_with_writes_to_nodes_that_know_of_traces() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let trace =
        TraceContext::parse("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01").unwrap();
    let plain = cluster.client(cluster.config()).await;
    let client = plain.with_trace(trace);
    let (known, unknown) = (cluster.key_of("b:1"), cluster.key_of("c:1"));
    cluster.world().nodes.get_mut("c:1").unwrap().features = feature::ALL & !feature::TRACES;
    let traces = || -> Vec<_> {
        cluster.world().seen.drain(..).map(|seen| (seen.opcode, seen.trace)).collect()
    };

    client.set(&known, b"1", SetOptions::default()).await.unwrap();
    client.get(&known).await.unwrap();
    client.with_timeout(SECOND).increment(&known, 1).await.unwrap();
    plain.increment(&known, 1).await.unwrap();
    client.increment(&unknown, 1).await.unwrap();
    assert_eq!(
        traces(),
        [
            (Opcode::Set, Some(trace)),
            (Opcode::Get, None),
            (Opcode::Increment, Some(trace)),
            (Opcode::Increment, None),
            (Opcode::Increment, None),
        ]
    );

    // A write that is repeated tells it again.
    cluster.mood("b:1", Mood::LoseAnswers(1));
    client.increment(&known, 1).await.unwrap();
    assert_eq!(traces(), vec![(Opcode::Increment, Some(trace)); 2]);
}

/// A node of the first servers: it grants nothing and its INFO ends with the leaders.
#[tokio::test(start_paused = true)]
async fn a_node_of_the_first_servers_is_served_as_ever() {
    let cluster = Cluster::new(&["a"]);
    let old = {
        let mut world = cluster.world();
        world.nodes.get_mut("a:1").unwrap().features = 0;
        let mut out = Vec::new();
        let view = world.view.clone();
        // Its own address is of no use to clients.
        let mut info = view.info();
        info.members[0].data_addr = "0.0.0.0:1";
        info.replicas.clear();
        encode_response(&mut out, 1, Opcode::Info, &Response::Info(info)).unwrap();
        // An epoch, one empty zone of one byte, and no replicas.
        let appended = 8 + (4 + 4 + 1) + 4;
        out[16..out.len() - appended].to_vec()
    };
    cluster.tale("a:1", Tale::Bytes(old));
    let client = cluster.client(cluster.config()).await;
    assert_eq!(client.info().await.unwrap().epoch, 0);
    assert_eq!(client.increment(b"n", 1).await.unwrap().value, 1);
    let read = client.stale_get(b"n").await.unwrap();
    assert!(read.value.is_some() && read.position.is_none());
    assert_eq!(client.batch_get(&[b"n", b"m"]).await.unwrap().len(), 2);
    let page =
        client.scan(&ScanOptions { limit: 9, ..ScanOptions::default() }, None).await.unwrap();
    assert_eq!((page.items.len(), page.cursor), (1, None));
    assert_eq!(cluster.asked(), vec!["a:1"; 4]);
    cluster.mood("a:1", Mood::LoseAnswers(1));
    let error = client.increment(b"n", 1).await.unwrap_err();
    assert_eq!((error.code(), sessions(&cluster)), (Code::OutcomeUnknown, vec![None]));
}

/// Counters under a cluster whose leaders are moved, killed and silenced all the time, and lose
/// answers: each acknowledged increment is there once, and none that was refused.
#[tokio::test(start_paused = true)]
async fn every_acknowledged_increment_is_there_once() {
    for seed in 0..20 {
        let mut random = fastrand::Rng::with_seed(seed);
        // The client's pauses are of this thread's randomness.
        fastrand::seed(seed);
        let cluster = Cluster::new(&["a", "b", "c"]);
        let nodes = ["a:1", "b:1", "c:1"];
        let endpoints = Config { connections_per_endpoint: 2, ..Config::new(nodes) };
        let client = cluster.client(endpoints).await;
        let mut tasks = JoinSet::new();
        for task in 0..20 {
            let client = client.clone();
            tasks.spawn(async move {
                let key = format!("n{}", task % 7).into_bytes();
                let (mut sums, mut unknown) = (Vec::new(), 0);
                for _ in 0..40 {
                    match client.increment(&key, 1).await {
                        Ok(counter) => sums.push(counter.value),
                        Err(error) if error.code() == Code::OutcomeUnknown => unknown += 1,
                        Err(error) => assert!(error.code().is_retryable(), "{error:?}"),
                    }
                    sleep(20 * MS).await;
                }
                (key, sums, unknown)
            });
        }
        let mut sums: HashMap<Vec<u8>, (Vec<i64>, i64)> = HashMap::new();
        while !tasks.is_empty() {
            disturb(&cluster, &mut random, &nodes);
            sleep(random.u32(1..150) * MS).await;
            while let Some(done) = tasks.try_join_next() {
                let (key, mut more, unknown) = done.unwrap();
                let entry = sums.entry(key).or_default();
                entry.0.append(&mut more);
                entry.1 += unknown;
            }
        }
        for (key, (mut seen, unknown)) in sums {
            let acknowledged = seen.len() as i64;
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len() as i64, acknowledged, "no answer twice, seed {seed}");
            let stored = cluster.world().table.entries[&key].value.clone();
            let stored: i64 = String::from_utf8(stored).unwrap().parse().unwrap();
            let possible = acknowledged..=acknowledged + unknown;
            assert!(possible.contains(&stored), "{stored} of {possible:?}, seed {seed}");
            assert!(acknowledged > 30, "most get through: {acknowledged}, seed {seed}");
        }
    }
}

/// One fault, or the end of one.
fn disturb(cluster: &Cluster, random: &mut fastrand::Rng, nodes: &[&str; 3]) {
    let node = nodes[random.usize(..3)];
    let others: Vec<&str> = nodes.iter().copied().filter(|other| *other != node).collect();
    match random.u32(..6) {
        0 => cluster.mood(node, Mood::LoseAnswers(random.usize(1..4))),
        1 => {
            nodes.iter().for_each(|node| cluster.start(node));
            cluster.kill(node);
            cluster.succeed(node, Some(others[random.usize(..2)]));
        }
        2 => {
            nodes.iter().for_each(|node| cluster.start(node));
            cluster.mood(node, Mood::Hang);
            cluster.succeed(node, Some(others[random.usize(..2)]));
        }
        3 => cluster.succeed(node, Some(others[random.usize(..2)])),
        4 => {
            let hints = random.bool();
            cluster.world().hints = hints;
        }
        _ => nodes.iter().for_each(|node| cluster.start(node)),
    }
}

#[tokio::test(start_paused = true)]
async fn sets_and_batches_are_numbered_too() {
    let cluster = Cluster::new(&["a", "b", "c"]);
    let client = cluster.client(cluster.config()).await;
    let key = cluster.key_of("c:1");
    cluster.mood("c:1", Mood::LoseAnswers(1));
    let reply = client.set(&key, b"v", SetOptions::default()).await.unwrap();
    assert_eq!((reply.written, reply.version), (true, Some(1)));
    let writes = [flux_client::Write::Increment { key: b"x", delta: 1 }];
    client.batch_write(&[], &writes).await.unwrap();
    client.persist(&key).await.unwrap();
    let world = cluster.world();
    let mut numbered: Vec<_> = world.seen.iter().map(|seen| (seen.opcode, seen.session)).collect();
    numbered.dedup();
    assert!(numbered.iter().all(|(_, session)| session.is_some()));
    let opcodes: Vec<_> = numbered.iter().map(|(opcode, _)| *opcode).collect();
    assert_eq!(opcodes, [Opcode::Set, Opcode::BatchWrite, Opcode::Persist]);
}
