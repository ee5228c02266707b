//! Scripts: commands (see `script` for how they are written) and their replies. Each runs twice, once
//! with every batch applied before the next command and once with all of them in flight, and must give
//! the same. The clock starts at 1000 ms; `now=` sets it. `=>` lines show the effects since the last.

use super::Partition;
use super::script::{parse, render};
use crate::effect::{Effect, Effects};

pub(super) fn check(script: &str) {
    for applied in [true, false] {
        let mut partition = Partition::new(0, 1);
        run(&mut partition, script, |partition| {
            partition.close();
            if applied {
                partition.apply_all();
            }
        });
    }
}

pub(super) fn run(partition: &mut Partition, script: &str, after_each: impl Fn(&mut Partition)) {
    let mut reply = String::new();
    let mut shown = 0;
    for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if let Some(now) = line.strip_prefix("now=") {
            partition.now_ms = now.parse().expect(line);
        } else if let Some(command) = line.strip_prefix("> ") {
            reply = render(&partition.run(&parse(command)));
            after_each(partition);
        } else if let Some(expected) = line.strip_prefix("=>") {
            partition.close();
            let effects: Vec<String> =
                partition.payloads[shown..].iter().flat_map(|payload| effects(payload)).collect();
            shown = partition.payloads.len();
            assert_eq!(effects.join(", ").trim(), expected.trim(), "in\n{script}");
        } else {
            assert_eq!(reply, line, "in\n{script}");
        }
    }
}

fn effects(payload: &[u8]) -> Vec<String> {
    let effects = Effects::new(payload).expect("a batch");
    let effect = |item| match item {
        (revision, Effect::Put { key, value, expires_at_ms: None }) => {
            format!("{revision} put {} {}", key.escape_ascii(), value.escape_ascii())
        }
        (revision, Effect::Put { key, value, expires_at_ms: Some(at) }) => {
            format!("{revision} put {} {} at={at}", key.escape_ascii(), value.escape_ascii())
        }
        (revision, Effect::Delete { key, reason }) => {
            format!("{revision} delete {} {reason:?}", key.escape_ascii())
        }
    };
    effects.map(|item| effect(item.expect("an effect"))).collect()
}

#[test]
fn plain_reads_and_writes() {
    check(
        "> get k
         nil
         > set k one
         written v=1
         > set k two
         written v=2
         > set empty \"\"
         written v=3
         > get k
         two v=2
         > getmany k none empty k
         [two v=2, nil, \"\" v=3, two v=2]
         > exists k k none empty
         3
         > length k
         3
         > length none
         0
         > describe k
         v=2 at=None bytes=3 written=1
         > describe none
         nil
         => 1 put k one, 2 put k two, 3 put empty ",
    );
}

#[test]
fn conditions_of_set() {
    check(
        "> set k a xx
         not written v=0
         > set k a nx
         written v=1
         > set k b nx
         not written v=1
         > set k b xx
         written v=2
         > set k c v=1
         not written v=2
         > set k c v=2
         written v=3
         > set new x v=0
         written v=4
         > set new x v=0
         not written v=4
         > set k d get
         c v=3, written
         > set k e nx get
         d v=5, not written
         > set other e nx get
         nil, written
         > set none e xx get
         nil, not written
         > get none
         nil",
    );
}

#[test]
fn expiry_of_set_and_getexpire() {
    check(
        "> set k a in=500
         written v=1
         > get k
         a v=1 at=1500
         > set k b keep
         written v=2
         > get k
         b v=2 at=1500
         > set k c
         written v=3
         > get k
         c v=3
         > set none x keep
         written v=4
         > getexpire k keep
         c v=3
         > getexpire k never
         c v=3
         > getexpire k in=100
         c v=5 at=1100
         > getexpire k keep
         c v=5 at=1100
         > getexpire k never
         c v=6
         > getexpire k at=1000
         c v=6
         > get k
         nil
         > getexpire k at=0
         nil
         => 1 put k a at=1500, 2 put k b at=1500, 3 put k c, 4 put none x, 5 put k c at=1100, 6 put k c, 7 delete k Explicit
         > set k x in=0
         error: invalid expire time
         > set k x at=0
         error: invalid expire time
         > set k x in=18446744073709551615
         error: invalid expire time
         > set k x at=9223372036854775808
         error: invalid expire time
         > set k x xx in=9223372036854775807
         error: invalid expire time
         > getexpire none in=0
         error: invalid expire time
         > getexpire none at=9223372036854775808
         error: invalid expire time
         > set k x at=9223372036854775807
         written v=8
         > set k past at=1
         written v=9
         > get k
         nil
         > set k anew
         written v=11
         => 8 put k x at=9223372036854775807, 9 put k past at=1, 10 delete k Expired, 11 put k anew",
    );
}

#[test]
fn an_expired_key_is_absent() {
    check(
        "> set k a in=500
         written v=1
         > set l a in=500
         written v=2
         now=1499
         > get k
         a v=1 at=1500
         now=1500
         > get k
         nil
         > exists k
         0
         > delete k
         0
         > deleteif k xx
         not written v=0
         > deleteif k v=1
         not written v=0
         > deleteif k v=0
         0
         > deleteif k nx
         0
         > getdelete k
         nil
         > getexpire k never
         nil
         > describe k
         nil
         > set k b xx
         not written v=0
         > set k b keep get
         nil, written
         > get k
         b v=4
         > append l x
         1
         > get l
         x v=6
         => 1 put k a at=1500, 2 put l a at=1500, 3 delete k Expired, 4 put k b, 5 delete l Expired, 6 put l x",
    );
    check(
        "> set k a in=500
         written v=1
         > set n 5 in=500
         written v=2
         > set from f
         written v=3
         now=2000
         > increment n 1
         1 v=5
         > rename k l
         error: no such key
         > rename from k nx
         1
         > persist n
         0
         > setmanynx k a
         not written v=7
         => 1 put k a at=1500, 2 put n 5 at=1500, 3 put from f, 4 delete n Expired, 5 put n 1, 6 delete k Expired, 7 put k f, 8 delete from Explicit",
    );
}

#[test]
fn many_keys_at_once() {
    check(
        "> setmany a 1 b 2 a 3
         written v=3
         > getmany a b
         [3 v=3, 2 v=2]
         > setmanynx c 1 a 1
         not written v=3
         > exists c
         0
         > setmanynx c 1 d 1
         written v=5
         > delete a a none b
         2
         > delete a b
         0
         > setmany a 1 \"\" 2
         error: empty key
         > exists a
         0
         => 1 put a 1, 2 put b 2, 3 put a 3, 4 put c 1, 5 put d 1, 6 delete a Explicit, 7 delete b Explicit",
    );
}

#[test]
fn deletes() {
    check(
        "> set k a
         written v=1
         > deleteif k v=2
         not written v=1
         > deleteif k nx
         not written v=1
         > deleteif k xx
         1
         > deleteif k always
         0
         > set k b
         written v=3
         > getdelete k
         b v=3
         > getdelete k
         nil
         => 1 put k a, 2 delete k Explicit, 3 put k b, 4 delete k Explicit",
    );
}

#[test]
fn a_delete_of_an_absent_key_takes_no_revision() {
    let deletes = [
        ("delete K", "0"),
        ("delete K K", "0"),
        ("deleteif K always", "0"),
        ("deleteif K nx", "0"),
        ("deleteif K xx", "not written v=0"),
        ("getdelete K", "nil"),
        ("getexpire K at=1", "nil"),
        ("expire K at=1", "0"),
        ("rename K other", "error: no such key"),
        ("rename K other nx", "error: no such key"),
        ("multi | delete K | getdelete K", "[0, nil]"),
        ("all | delete K | deleteif K always", "[0, 0]"),
    ];
    for (command, reply) in deletes {
        let command = command.replace('K', "k");
        check(&format!(
            "> {command}
             {reply}
             =>"
        ));
        check(&format!(
            "> set k v in=10
             written v=1
             now=1010
             > {command}
             {reply}
             => 1 put k v at=1010"
        ));
        check(&format!(
            "> set k v
             written v=1
             > delete k
             1
             > {command}
             {reply}
             => 1 put k v, 2 delete k Explicit"
        ));
    }
    check(
        "> clear 10
         0
         => ",
    );
}

#[test]
fn parts_of_values_are_read() {
    check(
        "> append k Hello
         5
         > append k -World
         11
         > append k \"\"
         11
         > append empty \"\"
         0
         > exists empty
         1
         > getrange k 0 4
         Hello
         > getrange k -5 -1
         World
         > getrange k 0 -1
         Hello-World
         > getrange k 6 100
         World
         > getrange k -100 1
         He
         > getrange k -1 -5
         \"\"
         > getrange k 5 3
         \"\"
         > getrange k 11 20
         \"\"
         > getrange k 0 -100
         H
         > getrange k -9223372036854775808 9223372036854775807
         Hello-World
         > getrange k 9223372036854775807 -9223372036854775808
         \"\"
         > getrange empty 0 -1
         \"\"
         > getrange none 0 -1
         \"\"",
    );
}

#[test]
fn parts_of_values_are_overwritten() {
    check(
        "> setrange k 3 abc
         6
         > get k
         ~~~abc v=1
         > setrange k 1 xy
         6
         > get k
         ~xyabc v=2
         > setrange k 5 ZZZ
         8
         > get k
         ~xyabZZZ v=3
         > setrange k 10 !
         11
         > get k
         ~xyabZZZ~~! v=4
         > setrange k 100 \"\"
         11
         > setrange none 5 \"\"
         0
         > exists none
         0
         > setrange k -1 x
         error: offset is out of range
         > setrange k -1 \"\"
         error: offset is out of range
         > setrange k 16777216 x
         error: value of 16777217 bytes is over the limit of 16777216
         > setrange k 9223372036854775807 x
         error: value of 9223372036854775808 bytes is over the limit of 16777216
         > set t abc in=100
         written v=5
         > append t d
         4
         > setrange t 0 A
         4
         > get t
         Abcd v=7 at=1100",
    );
}

#[test]
fn counters() {
    check(
        "> increment n 5
         5 v=1
         > increment n -7
         -2 v=2
         > set n 9223372036854775806 in=10
         written v=3
         > increment n 1
         9223372036854775807 v=4
         > increment n 1
         error: increment or decrement would overflow
         > get n
         9223372036854775807 v=4 at=1010
         > set n -9223372036854775808
         written v=5
         > increment n -1
         error: increment or decrement would overflow
         > set n \"\"
         written v=6
         > increment n 1
         error: value is not an integer or out of range
         > set n 01
         written v=7
         > increment n 1
         error: value is not an integer or out of range
         > set n 9223372036854775808
         written v=8
         > increment n 1
         error: value is not an integer or out of range",
    );
    check(
        "> incrementfloat f 10.50
         10.5
         > incrementfloat f 0.1
         10.6
         > incrementfloat f -5
         5.6
         > get f
         5.6 v=3
         > set f 5.0e3 in=10
         written v=4
         > incrementfloat f 2.0e2
         5200
         > get f
         5200 v=5 at=1010
         > incrementfloat f abc
         error: value is not a valid float
         > incrementfloat f nan
         error: value is not a valid float
         > incrementfloat f inf
         error: increment would produce NaN or Infinity
         > set f x
         written v=6
         > incrementfloat f 1
         error: value is not a valid float
         > set f \"\"
         written v=7
         > incrementfloat f 1
         error: value is not a valid float
         > incrementfloat g 1e20
         100000000000000000000",
    );
}

#[test]
fn expire_and_persist() {
    check(
        "> expire k in=10
         0
         > set k a
         written v=1
         > expire k in=500 xx
         0
         > expire k in=500 gt
         0
         > expire k in=500 lt
         1
         > expire k in=400 nx
         0
         > expire k in=500 gt
         0
         > expire k in=500 lt
         0
         > expire k in=501 gt
         1
         > get k
         a v=3 at=1501
         > expire k in=400 xx lt
         1
         > expire k in=600 xx
         1
         > persist k
         1
         > persist k
         0
         > persist none
         0
         > get k
         a v=6
         > expire k at=1000
         1
         > get k
         nil
         > set k b
         written v=8
         > expire k at=0 gt
         0
         > expire k in=0
         1
         > exists k
         0
         > expire k in=18446744073709551615
         error: invalid expire time
         > expire k at=9223372036854775808
         error: invalid expire time
         > expire k never
         error: invalid expire time
         > expire k keep
         error: invalid expire time
         => 1 put k a, 2 put k a at=1500, 3 put k a at=1501, 4 put k a at=1400, 5 put k a at=1600, 6 put k a, 7 delete k Explicit, 8 put k b, 9 delete k Explicit",
    );
}

#[test]
fn rename_and_copy() {
    check(
        "> rename none k
         error: no such key
         > rename none none
         error: no such key
         > set a 1 in=100
         written v=1
         > set b 2
         written v=2
         > rename a a
         1
         > rename a a nx
         0
         > rename a b nx
         0
         > rename a b
         1
         > getmany a b
         [nil, 1 v=3 at=1100]
         > rename b c nx
         1
         > copy none x
         0
         > copy c c
         0
         > copy c c replace
         0
         > copy c d
         1
         > set e 5
         written v=8
         > copy c e
         0
         > copy c e replace
         1
         > getmany b c d e
         [nil, 1 v=5 at=1100, 1 v=7 at=1100, 1 v=9 at=1100]
         => 1 put a 1 at=1100, 2 put b 2, 3 put b 1 at=1100, 4 delete a Explicit, 5 put c 1 at=1100, 6 delete b Explicit, 7 put d 1 at=1100, 8 put e 5, 9 put e 1 at=1100",
    );
}

#[test]
fn longest_common_subsequences() {
    // The matches as LCS IDX of Redis gives them, its ranges with an end that is included.
    check(
        "> lcs none none
         \"\" []
         > setmany key1 ohmytext key2 mynewtext
         written v=2
         > lcs key1 key2
         mytext [4..8=5..9, 2..4=0..2]
         > lcs key1 none
         \"\" []
         > lcs key1 key1
         ohmytext [0..8=0..8]
         > setmany a abcbdab b bdcaba
         written v=4
         > lcs a b
         bdab [5..7=3..5, 3..5=0..2]
         > setmany a a*8193 b b*8192
         written v=6
         > lcs a b
         error: values of 16385 bytes together are too large to compare",
    );
}

#[test]
fn clearing() {
    check(
        "> clear 10
         0
         > setmany a 1 b 2 c 3
         written v=3
         > set d 4 in=10
         written v=4
         > clear 1
         1
         > clear 0
         0
         now=1010
         > clear 2
         2
         > clear 100
         1
         > clear 100
         0
         > exists a b c d
         0",
    );
}

#[test]
fn transactions() {
    check(
        "> multi | set a 1 | get a | increment a 1 | get none
         [written v=1, 1 v=1, 2 v=2, nil]
         > multi a:v=1 | set a x
         aborted
         > multi a:v=2 none:v=0 | set a x | increment a 1 | set b y nx | set b z nx
         [written v=3, error: value is not an integer or out of range, written v=4, not written v=4]
         > multi none:v=1 | set a x
         aborted
         > all a:v=2 | set a x
         aborted
         > all | set a 5 | increment a 1 | delete b
         [written v=5, 6 v=6, 1]
         > all | set a x | increment a 1 | set b z
         error: value is not an integer or out of range
         > all | set c 1 | set a y | set a z nx
         aborted by 2
         > all | delete a | set a y xx get
         aborted by 1
         > all | deleteif a v=1
         aborted by 0
         > all | set c 1 | set c 2
         [written v=8, written v=9]
         > getmany a b c
         [6 v=6, nil, 2 v=9]
         > multi a:v=6 | get a | exists a b
         [6 v=6, 1]
         > multi a:v=5 | get a
         aborted
         > all \"\":v=0 | get a
         error: empty key
         > multi
         []
         => 1 put a 1, 2 put a 2, 3 put a x, 4 put b y, 5 put a 5, 6 put a 6, 7 delete b Explicit, 8 put c 1, 9 put c 2",
    );
    check(
        "> set k old in=10
         written v=1
         now=1010
         > multi k:v=1 | get k
         aborted
         > multi k:v=0 | get k
         [nil]
         > all | set k new | increment k 1
         error: value is not an integer or out of range
         > set k new
         written v=3
         => 1 put k old at=1010, 2 delete k Expired, 3 put k new",
    );
}
