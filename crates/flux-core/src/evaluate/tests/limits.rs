//! Scripts of commands that are refused for their size, or for what there is already.

use super::Partition;
use super::golden::{check, run};

#[test]
fn limits_hold_for_every_command() {
    let with_key = [
        "get K",
        "getmany a K",
        "getrange K 0 1",
        "length K",
        "exists a K",
        "lcs a K",
        "lcs K a",
        "describe K",
        "set K v",
        "setmany a v K v",
        "setmanynx K v",
        "delete a K",
        "deleteif K always",
        "getdelete K",
        "getexpire K never",
        "append K v",
        "setrange K 0 v",
        "increment K 1",
        "incrementfloat K 1",
        "expire K in=5",
        "persist K",
        "rename K a",
        "rename a K",
        "copy K a",
        "copy a K",
        "multi K:v=0 | get a",
        "all | set K v",
    ];
    for command in with_key {
        let script = |key: &str, reply: &str| {
            check(&format!(
                "> set a v
                 written v=1
                 > {}
                 {reply}
                 => 1 put a v",
                command.replace('K', key)
            ));
        };
        script("\"\"", "error: empty key");
        script("k*65537", "error: key of 65537 bytes is over the limit of 65536");
    }
    let with_value =
        ["set k V", "setmany k v l V", "setmanynx k V", "append k V", "setrange k 0 V"];
    for command in with_value {
        let command = command.replace('V', "v*16777217");
        check(&format!(
            "> {command}
             error: value of 16777217 bytes is over the limit of 16777216
             =>",
        ));
    }
    check(
        "> set k*65536 v
         written v=1
         > set k v*16777215
         written v=2
         > append k v
         16777216
         > append k v
         error: value of 16777217 bytes is over the limit of 16777216
         > length k
         16777216",
    );
}

#[test]
fn one_write_is_bounded_however_it_multiplies() {
    let script = "> set k v*16000000
         written v=1
         > multi | copy k a | copy k b | copy k c | copy k d | length a | set small v
         error: writes of 64000097 bytes together are over the limit of 50331648
         > exists a b c d k small
         1
         > multi | copy k a | copy k b
         [1, 1]
         > copy k c
         1
         > all | rename a x | rename b y | rename c z | rename k w
         error: writes of 64000137 bytes together are over the limit of 50331648
         > exists a b c d k small
         4
         > all | expire a in=10 | persist a | getexpire a in=20 | expire a in=30
         error: writes of 64000113 bytes together are over the limit of 50331648
         > describe a
         v=2 at=None bytes=16000000 written=1";
    let mut partition = Partition::new(0, 1);
    run(&mut partition, script, Partition::apply_all);
}

#[test]
fn memory_has_a_limit() {
    let limit =
        "error: max_memory of 20000 bytes is reached; delete keys, or raise max_memory and restart";
    let mut partition = Partition::new(20_000, 1);
    let fill = "> set k v*5000 in=100
                written v=1
                > set l v*5000
                written v=2";
    for in_flight in [true, false] {
        let after_each = |partition: &mut Partition| {
            if !in_flight {
                partition.apply_all();
            }
        };
        run(&mut partition, fill, after_each);
        for command in [
            "set m v*10000",
            "set k v*10000 xx",
            "setmany m v*5000 n v*5000",
            "setmanynx m v*10000",
            "append k v*10000",
            "setrange k 10000 x",
            "all | copy k m | copy k n | copy k o",
        ] {
            run(&mut partition, &format!("> {command}\n{limit}"), after_each);
        }
        let always_allowed = "> get m
                nil
                > length k
                5000
                > persist k
                1
                > expire k in=50
                1
                > rename k m
                1
                > delete l
                1
                > clear 10
                1
                > exists k l m
                0";
        run(&mut partition, always_allowed, after_each);
        partition.discard_all();
    }
}
