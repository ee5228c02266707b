//! Transfers from end to end.

use super::*;

/// Entries of a snapshot of about 320 KB in 80 chunks.
const ENTRIES: u64 = 2000;

#[test]
fn a_snapshot_arrives_as_it_was_sent() {
    let pair = Pair::new(quick(), vec![]);
    let sent = write_snapshot(&pair.from, id(PARTITION), ENTRIES);
    assert_eq!(sent.len(), ENTRIES as usize);
    // What the receiver has of the partition gives way, be it older or of the same index.
    write_snapshot(&pair.to, SnapshotId { partition: PARTITION, index: 7 }, 1);
    write_snapshot(&pair.to, id(PARTITION), 1);
    pair.send(PARTITION);
    assert_eq!(pair.result(), (PARTITION, true));

    let arrivals = pair.fake.arrivals.lock();
    let [arrival] = arrivals.as_slice() else { panic!("{} arrivals", arrivals.len()) };
    assert_eq!((arrival.id, arrival.term), (id(PARTITION), 8));
    assert_eq!(arrival.replicas, [SENDER, REPLICA]);
    assert_eq!(arrival.meta, meta(INDEX));
    assert_eq!(arrival.contents, sent);
    assert_eq!(Pair::names(&pair.to), [id(PARTITION).file_name()]);
    let durable = pair.to.power_cut();
    assert_eq!(Pair::file(&durable, PARTITION), Pair::file(&pair.from, PARTITION));
    assert_eq!(Snapshot::list(&durable).unwrap(), [id(PARTITION)]);
    assert_eq!(pair.fake.memory.used(), 0, "the table was dropped by its owner");
}

#[test]
fn a_snapshot_without_entries_arrives_too() {
    let pair = Pair::new(quick(), vec![]);
    write_snapshot(&pair.from, id(PARTITION), 0);
    pair.send(PARTITION);
    assert_eq!(pair.result(), (PARTITION, true));
    assert!(pair.fake.arrivals.lock()[0].contents.is_empty());
}

#[test]
fn a_transfer_that_breaks_off_goes_on_where_it_was() {
    let cuts = vec![Act::Cut(100_000), Act::Cut(3), Act::Cut(100_000), Act::Cut(50_000)];
    let pair = Pair::new(quick(), cuts);
    let sent = write_snapshot(&pair.from, id(PARTITION), ENTRIES);
    pair.send(PARTITION);
    assert_eq!(pair.result(), (PARTITION, true));
    assert_eq!(pair.fake.arrivals.lock()[0].contents, sent);
    assert_eq!(Pair::file(&pair.to, PARTITION), Pair::file(&pair.from, PARTITION));
    assert_eq!(pair.door.connections(), 5);
    let passed: u64 = pair.door.passed.lock().iter().sum();
    let size = Pair::file(&pair.from, PARTITION).unwrap().len() as u64;
    // Each break costs the chunk that was under way, and an offer.
    assert!(passed < size + 5 * 5_000, "{passed} bytes for a file of {size}");
}

#[test]
fn a_later_term_goes_on_with_what_is_there() {
    let pair = Pair::new(TransferLimits { attempts: 1, ..quick() }, vec![Act::Cut(200_000)]);
    write_snapshot(&pair.from, id(PARTITION), ENTRIES);
    pair.send_file(id(PARTITION), 8);
    assert_eq!(pair.result(), (PARTITION, false));
    wait_until("the receiver has noticed", || {
        pair.send_file(id(PARTITION), 9);
        pair.result().1
    });
    let passed = *pair.door.passed.lock().last().unwrap();
    assert!(passed < 200_000, "{passed} bytes after the break");
    assert_eq!(pair.fake.arrivals.lock()[0].term, 9);
}

#[test]
fn chunks_of_another_file_of_the_same_index_are_not_gone_on_with() {
    let limits = TransferLimits { attempts: 1, ..quick() };
    let pair = Pair::new(limits, vec![Act::Cut(200_000)]);
    let before = write_snapshot(&pair.from, id(PARTITION), ENTRIES);
    pair.send_file(id(PARTITION), 8);
    assert_eq!(pair.result(), (PARTITION, false));
    // The sender has started again, and its snapshot has the same index and length, but other chunks.
    let old = Pair::file(&pair.from, PARTITION).unwrap();
    write_again_in_other_chunks(&pair.from, id(PARTITION));
    let new = Pair::file(&pair.from, PARTITION).unwrap();
    assert!(new != old && new.len() == old.len());
    wait_until("the receiver has forgotten what it had", || {
        pair.send_file(id(PARTITION), 9);
        pair.result().1
    });
    assert_eq!(pair.fake.arrivals.lock()[0].contents, before);
    assert_eq!(Pair::file(&pair.to, PARTITION), Pair::file(&pair.from, PARTITION));
}

#[test]
fn a_connection_whose_end_was_not_noticed_makes_room() {
    let limits = TransferLimits { attempts: 10_000, ..quick() };
    let pair = Pair::new(limits, vec![Act::Freeze(200_000)]);
    let sent = write_snapshot(&pair.from, id(PARTITION), ENTRIES);
    pair.send(PARTITION);
    assert_eq!(pair.result(), (PARTITION, true));
    assert_eq!(pair.fake.arrivals.lock()[0].contents, sent);
    let passed = pair.door.passed.lock();
    assert!(passed.len() > 2, "the first one that came was told to come again");
    let size = Pair::file(&pair.from, PARTITION).unwrap().len() as u64;
    assert!(*passed.last().unwrap() < size - 100_000, "{passed:?}");
}

#[test]
fn what_broke_off_is_not_kept_for_ever() {
    let limits = TransferLimits { keep: Duration::from_millis(1), attempts: 1, ..quick() };
    let pair = Pair::new(limits, vec![Act::Cut(100_000)]);
    write_snapshot(&pair.from, id(PARTITION), ENTRIES);
    pair.send(PARTITION);
    assert_eq!(pair.result(), (PARTITION, false));
    wait_until("nothing is left", || {
        Pair::names(&pair.to).is_empty() && pair.fake.memory.used() == 0
    });
    pair.send(PARTITION);
    assert_eq!(pair.result(), (PARTITION, true));
    let size = Pair::file(&pair.from, PARTITION).unwrap().len() as u64;
    assert!(pair.door.passed.lock()[1] > size / 10 * 9, "it began anew");
}

#[test]
fn a_snapshot_that_nobody_wants_is_offered_once() {
    let pair = Pair::new(quick(), vec![]);
    write_snapshot(&pair.from, id(PARTITION), ENTRIES);
    pair.fake.wants.store(false, Ordering::Relaxed);
    pair.send(PARTITION);
    assert_eq!(pair.result(), (PARTITION, false));
    assert_eq!((pair.door.connections(), pair.fake.asked.load(Ordering::Relaxed)), (1, 1));

    // Or it arrives, and the replica has no use for it any more.
    pair.fake.wants.store(true, Ordering::Relaxed);
    pair.fake.installs.store(false, Ordering::Relaxed);
    pair.send(PARTITION);
    assert_eq!(pair.result(), (PARTITION, false));
    assert_eq!((pair.door.connections(), pair.fake.arrivals.lock().len()), (2, 1));
}

#[test]
fn a_damaged_chunk_is_noticed_and_sent_again() {
    let pair = Pair::new(quick(), vec![Act::Flip(150_000)]);
    let sent = write_snapshot(&pair.from, id(PARTITION), ENTRIES);
    pair.send(PARTITION);
    assert_eq!(pair.result(), (PARTITION, true));
    assert_eq!(pair.door.connections(), 2);
    let arrivals = pair.fake.arrivals.lock();
    assert_eq!((arrivals.len(), &arrivals[0].contents), (1, &sent));
    assert_eq!(Pair::file(&pair.to, PARTITION), Pair::file(&pair.from, PARTITION));
}

#[test]
fn the_sender_gives_up_after_some_attempts() {
    let limits = TransferLimits { attempts: 4, ..quick() };
    let pair = Pair::new(limits, vec![Act::Flip(50_000); 4]);
    write_snapshot(&pair.from, id(PARTITION), ENTRIES);
    pair.send(PARTITION);
    assert_eq!(pair.result(), (PARTITION, false));
    assert_eq!((pair.door.connections(), pair.fake.arrivals.lock().len()), (4, 0));
    wait_until("nothing is left", || Pair::names(&pair.to).is_empty());

    let pair = Pair::new(limits, vec![Act::Refuse; 4]);
    write_snapshot(&pair.from, id(PARTITION), ENTRIES);
    pair.send(PARTITION);
    assert_eq!(pair.result(), (PARTITION, false));
    assert_eq!((pair.door.connections(), pair.fake.asked.load(Ordering::Relaxed)), (4, 0));
}

#[test]
fn a_file_that_is_gone_or_damaged_is_not_sent() {
    let pair = Pair::new(quick(), vec![Act::HoldAndCut(100_000)]);
    pair.send(PARTITION);
    assert_eq!(pair.result(), (PARTITION, false), "it was never there");
    assert_eq!(pair.door.connections(), 0);

    // It is gone when the transfer has to go back a little.
    write_snapshot(&pair.from, id(PARTITION), 20 * ENTRIES);
    pair.send(PARTITION);
    wait_until("some of it is there", || pair.door.passed.lock().first() == Some(&100_000));
    pair.from.remove(&id(PARTITION).file_name()).unwrap();
    pair.door.release();
    assert_eq!(pair.result(), (PARTITION, false));

    // A bit of it has changed.
    write_snapshot(&pair.from, id(4), ENTRIES);
    assert!(pair.from.flip_bit(&id(4).file_name(), 200_000, 3));
    let connections = pair.door.connections();
    pair.send(4);
    assert_eq!(pair.result(), (4, false));
    assert_eq!(pair.door.connections(), connections + 1);
    assert!(pair.fake.arrivals.lock().is_empty());
    let name = id(4).file_name();
    wait_until("nothing is left of it", || {
        Pair::names(&pair.to).iter().all(|other| !other.starts_with(&name))
    });
}

#[test]
fn a_full_disk_ends_it() {
    let pair = Pair::new(TransferLimits { attempts: 2, ..quick() }, vec![]);
    let sent = write_snapshot(&pair.from, id(PARTITION), ENTRIES);
    pair.to.limit_capacity(Some(200_000));
    pair.send(PARTITION);
    assert_eq!(pair.result(), (PARTITION, false));
    wait_until("nothing is left", || Pair::names(&pair.to).is_empty());
    pair.to.limit_capacity(None);
    pair.send(PARTITION);
    assert_eq!(pair.result(), (PARTITION, true));
    assert_eq!(pair.fake.arrivals.lock()[0].contents, sent);
}

#[test]
fn the_receiver_takes_few_at_a_time() {
    let limits = TransferLimits { incoming: 1, attempts: 10_000, ..quick() };
    let pair = Pair::new(limits, vec![Act::Hold(50_000)]);
    for partition in [1, 2] {
        write_snapshot(&pair.from, id(partition), ENTRIES);
    }
    pair.send(1);
    wait_until("the first is under way", || pair.door.passed.lock().first() == Some(&50_000));
    pair.send(2);
    wait_until("the second was put off", || pair.door.connections() >= 4);
    assert!(pair.fake.arrivals.lock().is_empty());
    pair.door.release();
    let mut results = [pair.result(), pair.result()];
    results.sort_unstable();
    assert_eq!(results, [(1, true), (2, true)]);
}

#[test]
fn the_sender_sends_few_at_a_time_and_one_to_a_replica() {
    let limits = TransferLimits { outgoing: 2, waiting: 2, ..quick() };
    let pair = Pair::new(limits, vec![Act::Hold(50_000), Act::Hold(50_000)]);
    for partition in 1..=4 {
        write_snapshot(&pair.from, id(partition), ENTRIES);
    }
    pair.send(1);
    pair.send(2);
    wait_until("two are under way", || *pair.door.passed.lock() == [50_000, 50_000]);
    pair.send(1);
    pair.send(3);
    pair.send(3);
    assert_eq!(pair.result(), (3, false), "a newer one is for the same replica");
    pair.send(4);
    assert_eq!(pair.result(), (4, false), "too many wait");
    assert_eq!(pair.door.connections(), 2);
    pair.door.release();
    pair.door.release();
    let mut results: Vec<_> = (0..4).map(|_| pair.result()).collect();
    results.sort_unstable();
    assert_eq!(results, [(1, true), (1, true), (2, true), (3, true)]);
}

#[test]
fn a_stop_ends_what_is_under_way_and_what_waits() {
    let limits = TransferLimits { outgoing: 1, ..quick() };
    let mut pair = Pair::new(limits, vec![Act::Hold(50_000)]);
    for partition in [1, 2] {
        write_snapshot(&pair.from, id(partition), ENTRIES);
    }
    pair.send(1);
    pair.send(2);
    wait_until("the first is under way", || pair.door.passed.lock().first() == Some(&50_000));
    let sender = pair.sender.take().unwrap();
    pair.runtime.block_on(sender.stop());
    let mut results = [pair.result(), pair.result()];
    results.sort_unstable();
    assert_eq!(results, [(1, false), (2, false)]);
}

#[test]
fn the_rate_is_kept_over_all_transfers() {
    let limits = TransferLimits { bytes_per_second: 1_000_000, ..quick() };
    let pair = Pair::new(limits, vec![]);
    let start = std::time::Instant::now();
    for partition in [1, 2] {
        write_snapshot(&pair.from, id(partition), ENTRIES);
    }
    pair.send(1);
    pair.send(2);
    assert!(pair.result().1 && pair.result().1);
    let sizes = [1, 2].map(|partition| Pair::file(&pair.from, partition).unwrap().len());
    // The last chunk and the files' own headers are not waited for.
    let bytes = sizes.iter().sum::<usize>() - 20_000;
    let least = Duration::from_secs_f64(bytes as f64 / 1e6);
    assert!(start.elapsed() >= least, "{bytes} bytes in {:?}", start.elapsed());
}
